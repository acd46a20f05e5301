"""Schedules of least peak footprint, found from valley to valley, from the front or from the back.

Let ``f(D)`` be the units alive once the operators ``D`` have run: those of the tensors that some but not all of their
users have touched. Over sets that hold whatever must run before their members, ``f`` is submodular:
``f(A | B) + f(A & B) <= f(A) + f(B)``. So is, for an operator ``o``, what the tensors that ``o`` does not touch take.
Three exchanges follow. Each is exact, and they are all that this search consists of.

*Valley.* From ``D`` let the operators ``S`` be run within the peak, with ``f(D | S) <= f(D | T)`` for each ``T`` within
``S`` that could run first, ``T`` empty among them. Then run ``S`` now: in any completion, let ``X`` be what it had run
before some step; that step now holds ``D | S | X`` instead of ``D | X``, and ``f(D | S | X) - f(D | X)
<= f(D | S) - f(D | (S & X)) <= 0``. The same holds of the tensors that the step's operator does not touch, for of those
it touches no fewer are alive at ``D | S`` than at ``D | T``. No step grows, so no other way out of ``D`` matters.

*Least part.* Where ``S`` merely has ``f(D | S) <= f(D)``, its subset ``T`` of least ``f`` (a minimum cut) is a valley:
run ``T``'s operators in the order ``S`` had them, and a step that held ``A`` holds ``A & (D | T)``, where
``f(A & (D | T)) <= f(A) + f(D | T) - f(A | T) <= f(A)``.

*Chain.* Where each operator of ``S`` waits for the one before, the subsets are the beginnings, so no cut is needed.

The search climbs out of the last valley, sets ordered by the largest step on the way and then the deeper first, until
it comes to a set with no more alive than the valley, or to the only one left. It forgets all others and goes on from
there. Chains are taken at each set on the way. Where the next set needs a larger peak, no schedule has a smaller one:
valleys lose nothing. Read backwards the problem is the same, since a tensor's users are a set, so the search also runs
from the last operator to the first.

The exchange of subtrees that end in valleys is J. W. H. Liu's ("An application of generalized tree pebbling to sparse
matrix factorization", 1987), where the graph is a tree and each valley known beforehand.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import chain

from ortools.graph.python import max_flow

from retensor.planning.problem import Problem, bits
from retensor.planning.progress import Clock


class Footprint:
    """Units alive as operators run, in either direction; sets are bit masks over operators."""

    def __init__(self, problem: Problem, *, backwards: bool = False) -> None:
        self.n = problem.n
        self.own = [problem.own(operator) for operator in range(problem.n)]
        self.rooms = [item.room for item in problem.items]
        self.users = [sum(1 << user for user in item.users) for item in problem.items]
        self.touched = problem.touched
        self.first = problem.successors if backwards else problem.predecessors
        self.then = problem.predecessors if backwards else problem.successors
        self.before = [sum(1 << other for other in row) for row in self.first]
        self.items = [[(self.rooms[i], self.users[i]) for i in row] for row in self.touched]

    def after(self, done: int, live: int, operator: int) -> tuple[int, int]:
        """The step's footprint and the live units after it, from ``live`` units before it."""
        with_it = done | 1 << operator
        arriving = leaving = 0
        for room, users in self.items[operator]:
            # A tensor arrives with the first of its users and leaves with the last.
            if not users & done:
                arriving += room
            if not users & ~with_it:
                leaving += room
        step = live + arriving
        return step + self.own[operator], step - leaving

    def ready_after(self, done: int, ready: int, operator: int) -> int:
        """What can run once ``operator`` has; ``done`` includes it."""
        ready &= ~(1 << operator)
        for successor in self.then[operator]:
            if not self.before[successor] & ~done:
                ready |= 1 << successor
        return ready


class Climber:
    """A schedule in the making: the operators run so far from one end of a problem, valley by valley.

    Attributes
    ----------
    order : list of int
        Operators in the order they were run: forwards from the first, backwards from the last.
    done : int
        The same as a bit mask.
    """

    def __init__(self, problem: Problem, *, backwards: bool = False) -> None:
        self.footprint = Footprint(problem, backwards=backwards)
        self.order: list[int] = []
        self.done = self._live = 0
        self._ready = sum(1 << o for o in range(problem.n) if not self.footprint.before[o])

    def climb(self, target: int, bound: int, sets: int, clock: Clock) -> int:
        """Go on, until all of ``target`` has run or a climb has looked at more than ``sets`` sets.

        The operators outside of ``target`` are those that the climber from the other end has run. What is run here
        begins some schedule of least peak among all that end so, and none of its steps needs more than the peak
        that is returned: ``bound`` or, where that is too little for any schedule, the least that may be enough.
        """
        while self.done != target:
            found, bound = _valley(
                self.footprint, target, self.done, self._live, self._ready & target, bound, sets, clock
            )
            if not found:
                break
            for operator in found:
                self._live = self.footprint.after(self.done, self._live, operator)[1]
                self.done |= 1 << operator
                self._ready = self.footprint.ready_after(self.done, self._ready, operator)
            self.order += found
        return bound


def _valley(
    footprint: Footprint, target: int, start: int, level: int, ready: int, bound: int, sets: int, clock: Clock
) -> tuple[list[int], int]:
    """Operators to run next, none where the sets are too many, and the least peak that may be enough."""
    # Peak on the way, minus operators run (deeper first), live, done, ready.
    queue = [(bound, 0, level, start, ready)]
    origin: dict[int, tuple[int, tuple[int, ...]]] = {}
    best = {start: bound}
    settled: set[int] = set()
    while queue:
        peak, depth, live, done, ready = heapq.heappop(queue)
        if done in settled:
            continue
        settled.add(done)
        if done != start and not queue:
            # Every way on leads through here.
            return _path(origin, start, done), peak
        if done != start and (live <= level or done == target):
            path = _path(origin, start, done)
            return (path if done == target else _least_part(footprint, start, path)), peak
        if len(settled) > sets or len(queue) > 10 * sets or clock.left <= 0:
            return [], peak
        down = _chain_down(footprint, target, done, live, ready, peak)
        for operators in [down] if down else [(operator,) for operator in bits(ready)]:
            next_done, next_live, next_ready, next_peak = done, live, ready, peak
            for operator in operators:
                step, next_live = footprint.after(next_done, next_live, operator)
                next_peak = max(next_peak, step)
                next_done |= 1 << operator
                next_ready = footprint.ready_after(next_done, next_ready, operator) & target
            if best.get(next_done, next_peak + 1) <= next_peak:
                continue
            best[next_done] = next_peak
            origin[next_done] = (done, operators)
            heapq.heappush(queue, (next_peak, depth - len(operators), next_live, next_done, next_ready))
    raise AssertionError("every acyclic graph has a schedule")


def _path(origin: dict[int, tuple[int, tuple[int, ...]]], start: int, done: int) -> list[int]:
    order: list[int] = []
    while done != start:
        done, operators = origin[done]
        order += reversed(operators)
    return order[::-1]


def _chain_down(
    footprint: Footprint, target: int, done: int, live: int, ready: int, peak: int
) -> tuple[int, ...] | None:
    """Operators, each waiting for the one before, that fit under the peak and leave no more than there was."""
    for first in bits(ready):
        path, ran, level, operator = [first], done, live, first
        while True:
            step, level = footprint.after(ran, level, operator)
            if step > peak:
                break
            if level <= live:
                return tuple(path)
            ran |= 1 << operator
            freed = [o for o in footprint.then[operator] if target >> o & 1 and not footprint.before[o] & ~ran]
            if len(freed) != 1:
                break
            operator = freed[0]
            path.append(operator)
    return None


def _least_part(footprint: Footprint, start: int, path: list[int]) -> list[int]:
    """The operators of ``path``, in its order, that leave least alive of all its subsets that can run first."""
    if len(path) == 1:
        return path
    chosen, _ = _minimum_cut(footprint, start, path)
    return [operator for operator in path if chosen >> operator & 1]


def raise_bound(problem: Problem, front: int, back: int, bound: int, cuts: int, clock: Clock) -> int:
    """``bound``, or what some operator between ``front`` and ``back`` needs at least, whatever runs before it.

    ``cuts`` operators are asked, those first that touch most. What one touches is alive, and of the other tensors at
    least those of a minimum cut between what must run before it and what must run after it.
    """
    footprint = Footprint(problem)
    between = [o for o in range(problem.n) if not (front | back) >> o & 1]
    for operator in sorted(between, key=lambda o: (-problem.need[o], o))[:cuts]:
        if clock.left <= 0:
            break
        later = problem.descendants[operator] | 1 << operator
        able = [o for o in between if not later >> o & 1]
        forced = problem.ancestors[operator] & ~front
        _, others = _minimum_cut(footprint, front, able, forced=forced, without=problem.touched[operator])
        bound = max(bound, problem.need[operator] + others)
    return bound


def _minimum_cut(
    footprint: Footprint, start: int, able: Sequence[int], *, forced: int = 0, without: Sequence[int] = ()
) -> tuple[int, int]:
    """The operators of ``able``, ``forced`` among them, that leave least alive after ``start``; and how much.

    Tensors ``without`` do not count. Whatever is on the source's side of the cut runs. A tensor has a node that is on
    that side where its first user has run, and one that is there only if all of them have; between the two lies its
    size. Of the sets that leave least, it is the one with most operators.
    """
    flow = max_flow.SimpleMaxFlow()
    source, sink = 0, 1
    node = {operator: k + 2 for k, operator in enumerate(able)}
    members = sum(1 << operator for operator in able)
    count = len(able) + 2
    items = set(chain.from_iterable(footprint.touched[o] for o in [*able, *bits(start)])) - set(without)
    endless = 1 + sum(footprint.rooms[i] for i in items)
    # Solving needs both ends to exist.
    flow.add_arc_with_capacity(source, sink, 0)
    for operator in able:
        if forced >> operator & 1:
            flow.add_arc_with_capacity(source, node[operator], endless)
        for other in footprint.first[operator]:
            if other in node:
                flow.add_arc_with_capacity(node[operator], node[other], endless)
    for i in items:
        users = footprint.users[i]
        inside = [node[user] for user in bits(users & members)]
        if users & start:
            begun = source
        else:
            begun, count = count, count + 1
            for user in inside:
                flow.add_arc_with_capacity(user, begun, endless)
        if users & ~(start | members):
            ended = sink
        elif not inside:
            continue
        else:
            ended, count = count, count + 1
            for user in inside:
                flow.add_arc_with_capacity(ended, user, endless)
        flow.add_arc_with_capacity(begun, ended, footprint.rooms[i])
    if flow.solve(source, sink) != flow.OPTIMAL:
        raise AssertionError("a minimum cut always exists")
    outside = set(flow.get_sink_side_min_cut())
    return sum(1 << operator for operator in able if node[operator] not in outside), flow.optimal_flow()
