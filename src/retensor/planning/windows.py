"""A plan that is changed a window at a time, and each window as a problem of its own.

A *course* is an order and, for each item, the users after which it leaves the scratchpad although it is used again.
A *window* is some consecutive steps of it. Its operators may run in any order, and what is in the scratchpad during
its steps may leave or stay; what is outside the window remains as it is and decides what the window starts from and
must give back:

- what lies in the scratchpad when the window begins is made by a pseudo operator that runs first;
- what the course keeps beyond the window is read by a pseudo operator that runs last;
- what the course puts out across an edge of the window counts as kept too, put out within the window, where its room
  is free on the other side of the edge: then the window may keep it. Otherwise it is loaded by its first user in
  the window, or leaves after its last one, for nothing: that is paid for elsewhere;
- a tensor that has a copy off-chip because of an eviction elsewhere is not written again.

So the window's bytes are the course's own for these steps, and any plan of the window can be put in its place: no step
outside holds more than its capacity, and the difference in bytes is the difference of the whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from retensor.planning.problem import Item, Problem
from retensor.planning.residency import Answer, Stay, answer_from_evictions, steps_of

PASSING = 16
"""Tensors that a window holds without using them and may put out; of more, the others just take their room."""
RETURNING = 8
"""Tensors that are out all through a window and which it may keep, at most."""


@dataclass(frozen=True)
class Window:
    """Steps ``first`` up to, not including, ``end`` of a course as a problem.

    Attributes
    ----------
    first, end : int
    problem : Problem
        Operator 0 stands for all before the window, the last one for all after it.
    capacity : int
        Units that are left to it beside the tensors that only pass through.
    known : Answer
        What the course does in these steps.
    operators : tuple of int
        The course's operator behind each of the problem's, -1 for the two pseudo operators.
    items : tuple of int
        The whole problem's item behind each of the problem's.
    """

    first: int
    end: int
    problem: Problem
    capacity: int
    known: Answer
    operators: tuple[int, ...]
    items: tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """An item as a window sees it, the course's item, and after which local steps the course puts it out."""

    item: Item
    index: int
    gone: tuple[int, ...]


class Course:
    """An answer to a whole problem, open to changes window by window."""

    def __init__(self, problem: Problem, capacity: int, answer: Answer) -> None:
        self.problem = problem
        self.capacity = capacity
        self.order = list(answer.order)
        self.step = steps_of(answer.order)
        self.out: dict[int, set[int]] = {}
        """Users of an item after which it leaves, to come back for a later one."""
        rows: dict[int, list[Stay]] = {}
        for stay in answer.stays:
            rows.setdefault(stay.item, []).append(stay)
        for i, stays in rows.items():
            if len(stays) > 1:
                stays.sort(key=lambda stay: stay.start)
                uses = self.uses(i)
                # A stay may outlast its last use; what counts is after which use the item is gone.
                self.out[i] = {self.order[uses[bisect_left(uses, stay.end) - 1]] for stay in stays[:-1]}
        self.cost = sum(self._paid(i) for i in self.out)
        self.held = np.array([problem.own(operator) for operator in self.order], dtype=np.int64)
        """Units that lie in the scratchpad at each step."""
        for i in range(len(problem.items)):
            self._lay(i, self.uses(i), 1)
        self._final = [max(self.step[user] for user in item.users) for item in problem.items]

    def uses(self, i: int) -> list[int]:
        """Steps that use an item, in order."""
        return sorted(self.step[user] for user in self.problem.items[i].users)

    def gone(self, i: int, step: int) -> bool:
        """Whether an item leaves after its use at a step."""
        return i in self.out and self.order[step] in self.out[i]

    def answer(self, bound: int) -> Answer:
        """The course as an answer."""
        evicted = {(i, self.step[user]) for i, users in self.out.items() for user in users}
        return answer_from_evictions(self.problem, tuple(self.order), evicted, bound)

    def _paid(self, i: int) -> int:
        gone = len(self.out.get(i, ()))
        item = self.problem.items[i]
        return gone * item.size + (item.spill if gone else 0)

    def _lay(self, i: int, uses: Sequence[int], sign: int) -> None:
        """Add (or take away) an item's room at the steps from the first to the last of some consecutive uses."""
        room = sign * self.problem.items[i].room
        for here, there in pairwise(uses):
            self.held[here : here + 1 if self.gone(i, here) else there] += room
        self.held[uses[-1]] += room

    def keep_again(self) -> None:
        """Keep what was put out where its room is free all the while; first what saves most for its room and time."""
        items = self.problem.items
        gaps = [
            (i, here, there)
            for i in self.out
            for here, there in pairwise(self.uses(i))
            if self.gone(i, here)
        ]  # fmt: skip
        gaps.sort(key=lambda gap: ((gap[2] - gap[1]) * items[gap[0]].room / max(1, items[gap[0]].size), gap))
        for i, here, there in gaps:
            between = self.held[here + 1 : there]
            if not len(between) or between.max() + items[i].room <= self.capacity:
                between += items[i].room
                before = self._paid(i)
                self._set(i, self.out[i] - {self.order[here]})
                self.cost += self._paid(i) - before

    def _set(self, i: int, users: set[int]) -> None:
        if users:
            self.out[i] = users
        else:
            self.out.pop(i, None)

    # -- windows --------------------------------------------------------------------------------

    def sweep(self, cuts: Sequence[int]) -> Iterator[Window]:
        """The windows between consecutive cuts, in order; :meth:`accept` may be called on the latest one."""
        held: set[int] = set()
        away: set[int] = set()
        at = 0
        for first, end in pairwise(cuts):
            for step in range(at, first):
                self._pass_step(step, held, away)
            yield self._window(first, end, held, away)
            # What the window did with tensors that it does not use is read off the course, which may have changed.
            for i in [*held, *away]:
                uses = self.uses(i)
                out = self.gone(i, uses[bisect_left(uses, first) - 1])
                (away if out else held).add(i)
                (held if out else away).discard(i)
            for step in range(first, end):
                self._pass_step(step, held, away)
            at = end

    def _pass_step(self, step: int, held: set[int], away: set[int]) -> None:
        """Bring up to date what is kept, and what is out to come back, after a step."""
        for i in self.problem.touched[self.order[step]]:
            held.discard(i)
            away.discard(i)
            if step < self._final[i]:
                (away if self.gone(i, step) else held).add(i)

    def _window(self, first: int, end: int, held: set[int], away: set[int]) -> Window:
        problem = self.problem
        operators = self.order[first:end]
        last = len(operators) + 1
        claims: list[tuple[int, int, int]] = []
        touched = dict.fromkeys(i for o in operators for i in problem.touched[o])
        rows = [self._row(i, first, end, last, claims) for i in touched]
        passing = sorted((i for i in held if i not in touched), key=self._grip)
        capacity = self.capacity - sum(problem.items[i].room for i in passing[PASSING:])
        for i in passing[:PASSING]:
            item = problem.items[i]
            rows.append(_Row(_part(item, 0, (last,), i in self.out), i, ()))
        for i in sorted((i for i in away if i not in touched), key=self._grip)[:RETURNING]:
            uses = self.uses(i)
            after = bisect_left(uses, first)
            if self._claim(i, uses[after - 1] + 1, first, claims):
                if self._claim(i, end, uses[after], claims):
                    rows.append(_Row(_part(problem.items[i], 0, (last,), len(self.out[i]) > 1), i, (0,)))
                else:
                    self._release(claims, 1)
        self._release(claims, len(claims))

        transients: list[list[tuple[str, int]]] = [[], *(list(problem.transients[o]) for o in operators), []]
        need = [0, *(problem.need[o] for o in operators), 0]
        for row in rows:
            need[0] += row.item.room if row.item.producer == 0 else 0
            need[last] += row.item.room if last in row.item.consumers else 0
            if len(row.item.users) == 1:
                transients[row.item.users[0]].append((row.item.name, row.item.size))
        rows = sorted((row for row in rows if len(row.item.users) > 1), key=lambda row: (row.item.users, row.item.size))
        local = Problem(
            (-1, *operators, -1),
            tuple(row.item for row in rows),
            tuple(map(tuple, transients)),
            tuple(need),
            problem.alignment,
            _after(problem, operators, last),
        )
        evicted = {(k, here) for k, row in enumerate(rows) for here in row.gone}
        known = answer_from_evictions(local, tuple(range(local.n)), evicted, 0)
        return Window(first, end, local, capacity, known, local.operators, tuple(row.index for row in rows))

    def _row(self, i: int, first: int, end: int, last: int, claims: list[tuple[int, int, int]]) -> _Row:
        """What an item that the window uses is to it."""
        item = self.problem.items[i]
        uses = self.uses(i)
        low, high = bisect_left(uses, first), bisect_left(uses, end)
        inside = [step - first + 1 for step in uses[low:high]]
        gone = [here for here, step in zip(inside[:-1], uses[low:high], strict=False) if self.gone(i, step)]
        producer, consumers = -1, list(inside)
        if low == 0 and item.producer >= 0:
            producer = consumers.pop(0)
        elif low and not self.gone(i, uses[low - 1]):
            producer = 0
        elif low and self._claim(i, uses[low - 1] + 1, first, claims):
            producer = 0
            gone.append(0)
        if high < len(uses):
            if not self.gone(i, uses[high - 1]):
                consumers.append(last)
            elif self._claim(i, end, uses[high], claims):
                consumers.append(last)
                gone.append(inside[-1])
        copied = len(self.out.get(i, ())) > len(gone)
        return _Row(_part(item, producer, tuple(consumers), copied), i, tuple(gone))

    def _claim(self, i: int, start: int, end: int, claims: list[tuple[int, int, int]]) -> bool:
        """Whether an item fits beside what lies there from a step to another; if so its room is taken for now."""
        between = self.held[start:end]
        room = self.problem.items[i].room
        if len(between) and between.max() + room > self.capacity:
            return False
        between += room
        claims.append((start, end, room))
        return True

    def _release(self, claims: list[tuple[int, int, int]], count: int) -> None:
        for _ in range(count):
            start, end, room = claims.pop()
            self.held[start:end] -= room

    def _grip(self, i: int) -> tuple[float, int, int]:
        """What putting an item out costs, in bytes for each unit of room it opens; of equals the larger comes first."""
        item = self.problem.items[i]
        price = item.size + (0 if i in self.out else item.spill)
        return price / item.room if item.room else float("inf"), -item.room, i

    def accept(self, window: Window, answer: Answer) -> None:
        """Put another answer to the latest window in the place of the course's own."""
        first, end = window.first, window.end
        before = self.order[first:end]
        placed = [window.operators[o] for o in answer.order[1:-1]]
        inside = set(placed)
        changed = dict.fromkeys([*window.items, *(i for o in placed for i in self.problem.touched[o])])
        edges: dict[int, tuple[int, int]] = {}
        """Of each item, how many uses come before the window, and how many before its end."""
        leaves: set[int] = set()
        for i in changed:
            uses = self.uses(i)
            low, high = edges[i] = bisect_left(uses, first), bisect_left(uses, end)
            self._lay(i, uses[max(low - 1, 0) : high + 1], -1)
            if low < high < len(uses) and self.gone(i, uses[high - 1]):
                leaves.add(i)

        self.order[first:end] = placed
        for step, operator in enumerate(placed, first):
            self.step[operator] = step
            self.held[step] += self.problem.own(operator) - self.problem.own(before[step - first])

        local = steps_of(answer.order)
        stays: dict[int, list[Stay]] = {}
        for stay in answer.stays:
            stays.setdefault(stay.item, []).append(stay)
        last = len(placed) + 1
        for k, i in enumerate(window.items):
            paid = self._paid(i)
            uses, low = self.uses(i), edges[i][0]
            item = window.problem.items[k]
            users = self.out.get(i, set()) - inside
            if item.producer == 0:
                users.discard(self.order[uses[low - 1]])
            times = sorted(local[user] for user in item.users)
            for stay in sorted(stays[k], key=lambda stay: stay.start)[:-1]:
                at = times[bisect_left(times, stay.end) - 1]
                users.add(self.order[uses[low - 1]] if at == 0 else placed[at - 1])
            if i in leaves and last not in item.consumers:
                users.add(placed[times[-1] - 1])
            self._set(i, users)
            self.cost += self._paid(i) - paid
        for i in changed:
            uses, (low, high) = self.uses(i), edges[i]
            self._final[i] = uses[-1]
            self._lay(i, uses[max(low - 1, 0) : high + 1], 1)


def _part(item: Item, producer: int, consumers: tuple[int, ...], copied: bool) -> Item:
    """An item with other users, which is not written again where it has a copy anyway."""
    return Item(item.name, item.size, item.room, producer, consumers, 0 if copied else item.spill)


def _after(problem: Problem, operators: Sequence[int], last: int) -> tuple[tuple[int, int], ...]:
    """Pairs that put the pseudo operators first and last, and keep what the whole asks beyond its tensors."""
    local = {operator: k for k, operator in enumerate(operators, 1)}
    pairs = {
        (local[before], k) for operator, k in local.items() for before in problem.predecessors[operator]
        if before in local
    }  # fmt: skip
    followed = {before for before, _ in pairs}
    preceded = {k for _, k in pairs}
    pairs |= {(0, k) for k in range(1, last) if k not in preceded}
    pairs |= {(k, last) for k in range(1, last) if k not in followed}
    return tuple(sorted(pairs))
