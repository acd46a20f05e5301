"""The least peak footprint over all schedules (``M_P``), and a schedule that reaches it.

Two climbers (:mod:`.valleys`) run operators from valley to valley, one from the first operator on, one from the last
one back, each as far as it comes with few sets looked at, then with more, until they meet: that proves the optimum.
Where they do not, CP-SAT minimises the height of a cumulative profile for the operators between them, from a greedy
schedule and the bound reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from retensor.planning.problem import Problem, bits
from retensor.planning.progress import Clock
from retensor.planning.solver import minimise
from retensor.planning.valleys import Climber, Footprint, raise_bound

SET_LIMITS = (1_000, 10_000, 100_000)
"""Sets looked at in one climb, in turn from the front and from the back, before CP-SAT takes over."""
CUTS = 50
"""Operators whose least footprint is bounded by a minimum cut between two attempts: those that need most."""
MODEL_LIMIT = 400
"""Operators beyond which CP-SAT's model is not worth building."""


@dataclass(frozen=True, slots=True)
class Peak:
    """A schedule (operators of the problem), its peak in units of the alignment, and a proved lower bound."""

    order: tuple[int, ...]
    peak: int
    bound: int


def least_peak(problem: Problem, clock: Clock, *, seed: int = 0, workers: int | None = None, enough: int = 0) -> Peak:
    """The schedule of least peak; proved where ``peak == bound``.

    Parameters
    ----------
    problem : Problem
    clock : Clock
    seed : int
    workers : int, optional
        Threads of CP-SAT; by default as many as cores.
    enough : int
        Units below which no schedule need be told from another: a peak of at most ``enough`` is as good as the least.
        What is proved then is that the peak is at most ``enough``, or that it is the least.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> from retensor.planning.problem import build_problem
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("y",), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> least_peak(build_problem(graph, parameters=False, alignment=1), Clock(1.0))
    Peak(order=(0, 1), peak=6, bound=6)
    """
    if problem.is_chain:
        order = tuple(range(problem.n))
        peak = peak_of(problem, order)
        return Peak(order, peak, peak)
    least = max(problem.need)
    bound = max(least, enough)
    everything = (1 << problem.n) - 1
    front, back = Climber(problem), Climber(problem, backwards=True)
    for attempt, sets in enumerate(SET_LIMITS):
        if attempt:
            bound = raise_bound(problem, front.done, back.done, bound, CUTS, clock)
        for climber, other in ((front, back), (back, front)):
            bound = climber.climb(everything & ~other.done, bound, sets, clock)
            if front.done | back.done == everything:
                order = (*front.order, *reversed(back.order))
                return Peak(order, peak_of(problem, order), bound if bound > enough else least)
    greedy = _greedy(problem, clock, front.order, back.order[::-1])
    if greedy.peak > bound and clock.left > 0 and problem.n - len(front.order) - len(back.order) <= MODEL_LIMIT:
        greedy = _cumulative(problem, greedy, bound, clock, seed, workers, front.order, back.order[::-1])
        bound = greedy.bound
    return Peak(greedy.order, greedy.peak, min(bound, greedy.peak) if bound > enough else least)


def peak_of(problem: Problem, order: tuple[int, ...]) -> int:
    """Largest number of units alive at once when nothing is ever evicted."""
    state = Footprint(problem)
    done, live, peak = 0, 0, 0
    for operator in order:
        step, live = state.after(done, live, operator)
        done |= 1 << operator
        peak = max(peak, step)
    return peak


def _greedy(problem: Problem, clock: Clock, front: Sequence[int] = (), back: Sequence[int] = ()) -> Peak:
    """The best of three: the program's order and two that begin and end as given, with in between the operators in the
    program's order or, in time, always the one that leaves least behind."""
    footprint = Footprint(problem)
    done = live = 0
    ready = sum(1 << operator for operator in range(problem.n) if not footprint.before[operator])
    order: list[int] = []
    last = set(back)
    while len(order) < problem.n - len(back) and clock.left > 0:
        if len(order) < len(front):
            operator = front[len(order)]
        else:
            able = (o for o in bits(ready) if o not in last)
            operator = min(able, key=lambda o: (*reversed(footprint.after(done, live, o)), o))
        live = footprint.after(done, live, operator)[1]
        done |= 1 << operator
        ready = footprint.ready_after(done, ready, operator)
        order.append(operator)
    ends = {*front, *back}
    schedules = [tuple(range(problem.n)), (*front, *(o for o in range(problem.n) if o not in ends), *back)]
    if len(order) + len(back) == problem.n:
        schedules.append((*order, *back))
    best = min(schedules, key=lambda schedule: peak_of(problem, schedule))
    return Peak(best, peak_of(problem, best), max(problem.need))


def _cumulative(
    problem: Problem,
    greedy: Peak,
    bound: int,
    clock: Clock,
    seed: int,
    workers: int | None,
    front: Sequence[int] = (),
    back: Sequence[int] = (),
) -> Peak:
    """The least peak of schedules that begin with ``front`` and end with ``back``, as far as CP-SAT gets in time."""
    model = cp_model.CpModel()
    position = add_positions(model, problem)
    for step, operator in [*enumerate(front), *enumerate(back, problem.n - len(back))]:
        model.add(position[operator] == step)
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
