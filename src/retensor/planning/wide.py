"""The frontier search at widths of hundreds of thousands of states, compiled, between two budgets.

The rules and why nothing is lost stand in :mod:`.frontier`; :mod:`.layers` holds the compiled step. What this
file adds is where to look: a search that may spend less than a *budget* keeps few states when the budget is
below the optimum, and then proves it; a budget little above the optimum keeps more, and finds it. So the
interval between what is proved and what is known is halved again and again, which costs little more than the
last search.

Chains that no other order can help (:mod:`.chains`) run without a break.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd

import numpy as np
import numpy.typing as npt

from retensor.planning.chains import glue, waiting
from retensor.planning.layers import ALIVE, COUNT, FULL, LOST, OVER, advance, expand, relink, victim_sets
from retensor.planning.problem import Problem, turned
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, answer_from_evictions

NONE = 2**62
CHOICES = 64
"""Sets to evict that one operator tries."""
CHUNK = 4_000
"""States expanded between two looks at the clock."""
FIRST_ROWS = 16_384
"""States that a layer has room for at first, beside what one state may lead to."""
NARROWEST, WIDEST = 2_000, 400_000
LARGEST_HISTORY = 2**31
"""Bytes of all layers' steps that are kept to tell the plan from."""

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Outcome:
    """What one search found: a plan that spends less than its budget, if any, and what no plan can be below."""

    order: tuple[int, ...]
    evicted: frozenset[tuple[int, int]]
    cost: int
    bound: int
    narrowed: bool


def search_wide(
    problem: Problem,
    capacity: int,
    clock: Clock,
    known: Answer,
    *,
    widest: int = WIDEST,
    keep: Callable[[Answer], None] | None = None,
) -> Answer:
    """The better of ``known`` and the best plan found, with the bound that was proved.

    ``widest`` limits the states of a layer; ``keep`` is told of every better plan or bound.
    """
    search = _Wide(problem, capacity, clock)
    best, width = known, min(NARROWEST, widest)
    # All costs are multiples of this.
    unit = gcd(*(item.size for item in problem.items), *(item.spill for item in problem.items)) or 1
    budget = best.cost
    while not best.proved and clock.left > 0:
        found = search.run(budget, width)
        before = best
        if found.cost < best.cost:
            best = answer_from_evictions(problem, found.order, set(found.evicted), best.bound)
        proved = min(best.cost, -(-max(found.bound, best.bound) // unit) * unit)
        best = replace(best, bound=proved)
        if keep is not None and best != before:
            keep(best)
        span = best.cost - best.bound
        if found.narrowed and 4 * span > 3 * (before.cost - before.bound):
            if width >= widest:
                break
            width = min(4 * width, widest)
        # Near the end one search settles it, if it is not cut short.
        near = 16 * span <= best.cost and not found.narrowed
        budget = best.cost if near else best.bound + max(span // 2, unit)
    return best


class _Wide:
    """The problem as arrays, and one search over it."""

    def __init__(self, problem: Problem, capacity: int, clock: Clock) -> None:
        self.problem = problem
        self.capacity = capacity
        self.clock = clock
        n, items = problem.n, problem.items
        self.words, self.item_words = -(-n // 64), max(1, -(-len(items) // 64))
        self.own = np.array([problem.own(o) for o in range(n)], dtype=np.int64)
        self.room = np.array([item.room for item in items], dtype=np.int64)
        self.price = np.array([item.size for item in items], dtype=np.int64)
        self.spill = np.array([item.spill for item in items], dtype=np.int64)
        self.producer = np.array([item.producer for item in items], dtype=np.int64)
        self.touch_at, self.touch = _rows(problem.touched)
        pairs = glue(problem)
        self.glued = np.full(n, -1, dtype=np.int64)
        for first, second in pairs:
            self.glued[first] = second
        self.predecessors = waiting(problem, pairs)
        self.next_at, self.following = _rows(turned(self.predecessors))
        self.before = _masks(self.predecessors, self.words)
        self.users = _masks([item.users for item in items], self.words)
        # Any fixed numbers serve: equal sets are compared in full.
        self.key_of = np.random.default_rng(1).integers(0, 2**63, size=n, dtype=np.uint64)

    @property
    def columns(self) -> int:
        return 2 * (self.words + self.item_words)

    @property
    def margin(self) -> int:
        """Rows for what one state leads to, and more."""
        return 64 * self.words * CHOICES

    @cached_property
    def most_rows(self) -> int:
        """Rows of a layer that a gigabyte holds."""
        return 2**30 // (8 * self.columns + 60)

    def run(self, budget: int, width: int) -> Outcome:
        """Search plans that spend less than ``budget``, keeping ``width`` states of a layer."""
        width = min(width, self.most_rows // 4)
        layer, following = (_Layer(self.columns, min(4 * width, FIRST_ROWS) + self.margin) for _ in range(2))
        layer.count = 1
        for operator, row in enumerate(self.predecessors):
            if not row:
                layer.masks[0, self.words + operator // 64] |= np.uint64(1 << operator % 64)
        layer.last[0] = -1
        self.tally = np.array([0, NONE, NONE, 0, 0], dtype=np.int64)
        history: list[_History] = []
        kept = 0
        for _ in range(self.problem.n):
            if not self._expand(layer, following, budget, width):
                return Outcome((), frozenset(), NONE, 0, narrowed=True)
            self._narrow(following, width)
            layer, following = following, layer
            if layer.count == 0:
                break
            history.append(layer.history())
            kept += layer.count * 8
            if kept > LARGEST_HISTORY:
                return Outcome((), frozenset(), NONE, 0, narrowed=True)
        lost, over = int(self.tally[LOST]), int(self.tally[OVER])
        bound = min(lost, over)
        if layer.count == 0:
            return Outcome((), frozenset(), NONE, bound, narrowed=lost < budget)
        end = int(np.argmin(layer.cost[: layer.count]))
        cost = int(layer.cost[end])
        order, evicted = self._path(history, end, budget)
        return Outcome(order, evicted, cost, min(bound, cost), narrowed=lost < cost)

    def _expand(self, layer: _Layer, following: _Layer, budget: int, width: int) -> bool:
        """Fill ``following``; False where time ran out first."""
        tally = self.tally
        tally[COUNT] = tally[ALIVE] = 0
        following.table.fill(-1)
        first = 0
        while first < layer.count:
            if self.clock.left <= 0:
                return False
            first = expand(
                first, min(first + CHUNK, layer.count), layer.cost, layer.held, layer.masks, layer.last, layer.keys,
                self.words, self.item_words, self.own, self.touch_at, self.touch, self.next_at, self.following,
                self.before, self.users, self.room, self.price, self.spill, self.producer, self.glued, self.key_of,
                self.capacity, budget, CHOICES,
                following.cost, following.held, following.masks, following.last, following.keys, following.parent,
                following.choice, following.dropped, following.link, following.table, tally,
            )  # fmt: skip
            if tally[FULL]:
                following.count = int(tally[COUNT])
                if tally[ALIVE] > 3 * width:
                    self._narrow(following, width)
                else:
                    following.keep(np.flatnonzero(~following.dropped[: following.count]))
                if 2 * following.count > len(following.cost) - self.margin:
                    following.grow()
                relink(following.keys, following.masks, following.link, following.table, self.words, following.count)
                tally[COUNT] = tally[ALIVE] = following.count
        following.count = int(tally[COUNT])
        return True

    def _narrow(self, layer: _Layer, width: int) -> None:
        """Leave the ``width`` most promising states, in the order they were made."""
        alive = np.flatnonzero(~layer.dropped[: layer.count])
        if len(alive) > width:
            rank = layer.cost[alive] + layer.held[alive]
            chosen = np.argpartition(rank, width)
            self.tally[LOST] = min(self.tally[LOST], layer.cost[alive[chosen[width:]]].min())
            alive = np.sort(alive[chosen[:width]])
        layer.keep(alive)

    def _path(
        self, history: Sequence[_History], end: int, budget: int
    ) -> tuple[tuple[int, ...], frozenset[tuple[int, int]]]:
        """The order that leads to state ``end`` of the last layer, and what it evicts, by replay."""
        steps: list[tuple[int, int]] = []
        at = end
        for layer in reversed(history):
            steps.append((int(layer.last[at]), int(layer.choice[at])))
            at = int(layer.parent[at])
        steps.reverse()
        row = np.zeros(self.columns, dtype=np.uint64)
        held = cost = 0
        candidates = np.empty(64, dtype=np.int64)
        found, tolls = np.empty(4 * CHOICES, dtype=np.uint64), np.empty(4 * CHOICES, dtype=np.int64)
        evicted: set[tuple[int, int]] = set()
        used: dict[int, int] = {}
        inside = 2 * self.words
        for step, (operator, choice) in enumerate(steps):
            own = self.problem.touched[operator]
            excess = held + int(self.own[operator]) - self.capacity
            excess += sum(int(self.room[i]) for i in own if not int(row[inside + i // 64]) >> i % 64 & 1)
            victims = np.uint64(0)
            if excess > 0:
                victim_sets(
                    row, operator, excess, budget - cost, self.words, self.item_words, self.room, self.price,
                    self.spill, self.touch_at, self.touch, candidates, found, tolls, CHOICES,
                    np.full(2, NONE, dtype=np.int64),
                )  # fmt: skip
                victims = found[choice]
                cost += int(tolls[choice])
                for k in range(64):
                    if int(victims) >> k & 1:
                        item = int(candidates[k])
                        evicted.add((item, used[item]))
            held = advance(
                row, held, operator, victims, candidates, self.words, self.item_words, self.touch_at, self.touch,
                self.next_at, self.following, self.before, self.users, self.room,
            )  # fmt: skip
            for i in own:
                used[i] = step
        return tuple(operator for operator, _ in steps), frozenset(evicted)


@dataclass(frozen=True)
class _History:
    parent: npt.NDArray[np.int32]
    last: npt.NDArray[np.int16]
    choice: npt.NDArray[np.int16]


class _Layer:
    """States side by side; the rows up to ``count`` are in use."""

    def __init__(self, columns: int, rows: int) -> None:
        self.count = 0
        self.cost = np.zeros(rows, dtype=np.int64)
        self.held = np.zeros(rows, dtype=np.int64)
        self.masks = np.zeros((rows, columns), dtype=np.uint64)
        self.last = np.zeros(rows, dtype=np.int64)
        self.keys = np.zeros(rows, dtype=np.uint64)
        self.parent = np.zeros(rows, dtype=np.int32)
        self.choice = np.zeros(rows, dtype=np.int16)
        self.dropped = np.zeros(rows, dtype=np.bool_)
        self.link = np.zeros(rows, dtype=np.int64)
        self._make_table(rows)

    _COLUMNS = ("cost", "held", "masks", "last", "keys", "parent", "choice", "dropped")

    def _make_table(self, rows: int) -> None:
        self.table = np.full(1 << (2 * rows).bit_length(), -1, dtype=np.int64)

    def keep(self, rows: Ints) -> None:
        """Move the chosen rows to the front."""
        for name in self._COLUMNS:
            values = getattr(self, name)
            values[: len(rows)] = values[rows]
        self.count = len(rows)

    def grow(self) -> None:
        """Twice the rows."""
        rows = 2 * len(self.cost)
        for name in (*self._COLUMNS, "link"):
            old = getattr(self, name)
            new = np.zeros((rows, *old.shape[1:]), dtype=old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)
        self._make_table(rows)

    def history(self) -> _History:
        n = self.count
        return _History(self.parent[:n].copy(), self.last[:n].astype(np.int16), self.choice[:n].copy())


def _rows(table: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
    """Rows of unequal length as one array and where each begins."""
    begins = np.cumsum([0, *(len(row) for row in table)])
    return begins, np.array([entry for row in table for entry in row], dtype=np.int64)


def _masks(table: Sequence[Sequence[int]], words: int) -> Words:
    masks = np.zeros((len(table), words), dtype=np.uint64)
    for row, members in enumerate(table):
        for member in members:
            masks[row, member // 64] |= np.uint64(1 << member % 64)
    return masks
