"""The least peak footprint over all schedules (``M_P``), and a schedule that reaches it.

A search over sets of operators already run: the cheapest way to a set is the order whose largest step
is least, so the states are explored by that peak, like Dijkstra's shortest paths with *max* in place
of *plus*. An operator that fits under the peak reached so far and leaves no more bytes behind than it
found is run at once: in any completion it can be moved to the front, where every step in between holds
what the operator leaves instead of what it consumed, so no step grows. If the sets are too many, CP-SAT
minimises the height of a cumulative profile instead, from a greedy schedule and the bound reached.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from ortools.sat.python import cp_model

from retensor.planning.problem import Problem, bits
from retensor.planning.progress import Clock
from retensor.planning.solver import minimise

STATE_LIMIT = 60_000
"""Sets looked at before CP-SAT takes over; the queue may hold ten times as many."""
MODEL_LIMIT = 400
"""Operators beyond which CP-SAT's model is not worth building."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A schedule (operators of the problem), its peak in units of the alignment, and a proved lower bound."""

    order: tuple[int, ...]
    peak: int
    bound: int


def least_peak(problem: Problem, clock: Clock, *, seed: int = 0, workers: int | None = None) -> Peak:
    """The schedule of least peak; proved where ``peak == bound``."""
    if problem.is_chain:
        order = tuple(range(problem.n))
        peak = peak_of(problem, order)
        return Peak(order, peak, peak)
    found = _explore(problem, clock)
    if isinstance(found, Peak):
        return found
    greedy = _greedy(problem, clock)
    if greedy.peak <= found or clock.left <= 0 or problem.n > MODEL_LIMIT:
        return Peak(greedy.order, greedy.peak, min(found, greedy.peak))
    return _cumulative(problem, greedy, found, clock, seed, workers)


def peak_of(problem: Problem, order: tuple[int, ...]) -> int:
    """Largest number of units alive at once when nothing is ever evicted."""
    state = _State(problem)
    done, live, peak = 0, 0, 0
    for operator in order:
        step, live = state.after(done, live, operator)
        done |= 1 << operator
        peak = max(peak, step)
    return peak


class _State:
    """Live bytes as operators run; everything is a bit mask over operators."""

    def __init__(self, problem: Problem) -> None:
        self.own = [problem.own(operator) for operator in range(problem.n)]
        masks = [sum(1 << user for user in item.users) for item in problem.items]
        self.items = [
            [
                (
                    problem.items[i].room,
                    masks[i],
                    problem.items[i].producer == operator or problem.items[i].producer < 0,
                )
                for i in problem.touched[operator]
            ]
            for operator in range(problem.n)
        ]

    def after(self, done: int, live: int, operator: int) -> tuple[int, int]:
        """The step's footprint and the live units after it, from ``live`` units before it."""
        bit = 1 << operator
        arriving = leaving = 0
        for room, users, can_arrive in self.items[operator]:
            # What comes from outside arrives with its first user; what is made, with its producer.
            if can_arrive and not users & done:
                arriving += room
            if not users & ~(done | bit):
                leaving += room
        step = live + arriving + self.own[operator]
        return step, live + arriving - leaving


def _explore(problem: Problem, clock: Clock) -> Peak | int:
    """The optimum, or a lower bound where the sets are too many."""
    state = _State(problem)
    before = problem.ancestors
    full = (1 << problem.n) - 1
    ready = 0
    for operator in range(problem.n):
        if not before[operator]:
            ready |= 1 << operator
    start = max(problem.need)
    # peak so far, minus operators run (deeper first), done, live, ready
    queue: list[tuple[int, int, int, int, int]] = [(start, 0, 0, 0, ready)]
    origin: dict[int, tuple[int, tuple[int, ...]]] = {0: (0, ())}
    best: dict[int, int] = {0: start}
    settled: set[int] = set()
    while queue:
        peak, depth, done, live, ready = heapq.heappop(queue)
        if done in settled:
            continue
        settled.add(done)
        if done == full:
            return Peak(_walk_back(origin, full), peak, peak)
        if len(settled) > STATE_LIMIT or len(queue) > 10 * STATE_LIMIT or clock.left <= 0:
            return peak
        free = _ready_free(state, done, live, ready, peak)
        candidates = [free] if free is not None else bits(ready)
        for operator in candidates:
            step, next_live = state.after(done, live, operator)
            next_done = done | 1 << operator
            next_peak = max(peak, step)
            if best.get(next_done, next_peak + 1) <= next_peak:
                continue
            best[next_done] = next_peak
            origin[next_done] = (done, (operator,))
            next_ready = ready & ~(1 << operator)
            for successor in problem.successors[operator]:
                if not before[successor] & ~next_done:
                    next_ready |= 1 << successor
            heapq.heappush(queue, (next_peak, depth - 1, next_done, next_live, next_ready))
    raise AssertionError("every acyclic graph has a schedule")


def _ready_free(state: _State, done: int, live: int, ready: int, peak: int) -> int | None:
    for operator in bits(ready):
        step, next_live = state.after(done, live, operator)
        if step <= peak and next_live <= live:
            return operator
    return None


def _walk_back(origin: dict[int, tuple[int, tuple[int, ...]]], done: int) -> tuple[int, ...]:
    order: list[int] = []
    while done:
        done, operators = origin[done]
        order += reversed(operators)
    return tuple(reversed(order))


def _greedy(problem: Problem, clock: Clock) -> Peak:
    """The better of the program order and, in time, of always running the operator that leaves least behind."""
    state = _State(problem)
    waiting = [len(row) for row in problem.predecessors]
    ready = {operator for operator in range(problem.n) if not waiting[operator]}
    done, live = 0, 0
    order: list[int] = []
    while ready and clock.left > 0:
        operator = min(ready, key=lambda o: (*reversed(state.after(done, live, o)), o))
        ready.remove(operator)
        live = state.after(done, live, operator)[1]
        done |= 1 << operator
        order.append(operator)
        for successor in problem.successors[operator]:
            waiting[successor] -= 1
            if not waiting[successor]:
                ready.add(successor)
    schedules = [tuple(range(problem.n))] + ([tuple(order)] if len(order) == problem.n else [])
    best = min(schedules, key=lambda schedule: peak_of(problem, schedule))
    return Peak(best, peak_of(problem, best), max(problem.need))


def _cumulative(problem: Problem, greedy: Peak, bound: int, clock: Clock, seed: int, workers: int | None) -> Peak:
    model = cp_model.CpModel()
    position = add_positions(model, problem)
    peak = model.new_int_var(bound, greedy.peak, "peak")
    intervals, demands = [], []
    for operator in range(problem.n):
        if own := problem.own(operator):
            intervals.append(model.new_fixed_size_interval_var(position[operator], 1, ""))
            demands.append(own)
    for item in problem.items:
        last = model.new_int_var(0, problem.n, "")
        for consumer in item.consumers:
            model.add(last > position[consumer])
        if item.producer >= 0:
            first = position[item.producer]
        else:
            first = model.new_int_var(0, problem.n, "")
            for consumer in item.consumers:
                model.add(first <= position[consumer])
        size = model.new_int_var(1, problem.n, "")
        intervals.append(model.new_interval_var(first, size, last, ""))
        demands.append(item.room)
    model.add_cumulative(intervals, demands, peak)
    model.minimize(peak)
    for step, operator in enumerate(greedy.order):
        model.add_hint(position[operator], step)
    solver, outcome = minimise(model, clock, seed=seed, workers=workers)
    if not outcome.solved:
        return Peak(greedy.order, greedy.peak, max(bound, min(outcome.bound, greedy.peak)))
    order = tuple(sorted(range(problem.n), key=lambda o: solver.value(position[o])))
    return Peak(order, peak_of(problem, order), max(bound, outcome.bound))


def add_positions(model: cp_model.CpModel, problem: Problem) -> list[cp_model.IntVar]:
    """One step for each operator: all different, after what it reads, within what its kin leave it."""
    position = [
        model.new_int_var(
            problem.ancestors[o].bit_count(), problem.n - 1 - problem.descendants[o].bit_count(), f"step{o}"
        )
        for o in range(problem.n)
    ]
    model.add_all_different(position)
    for operator, row in enumerate(problem.predecessors):
        for predecessor in row:
            # An edge that a longer path implies adds nothing.
            if not any(problem.ancestors[other] >> predecessor & 1 for other in row if other != predecessor):
                model.add(position[predecessor] < position[operator])
    return position
