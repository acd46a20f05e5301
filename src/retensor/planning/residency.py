"""Which tensor stays and which leaves: the exact models over residencies.

A *stay* is an interval of steps during which an item lies in the scratchpad. Its first stay begins where
it is made (or first loaded); every further one is opened by a retrieve just before one of its consumers.
Longer stays than from a use to a use never help. Bytes to minimise: ``size`` for each retrieve, and
``spill`` once where there is any.

Three models, all solved by CP-SAT, the first two with capacity as a sum of bytes at each step:

- :func:`keep_or_evict` for a given order: one binary for each gap between consecutive uses.
- :func:`schedule_and_evict` for a free order: a position for each operator, and for each item one
  optional stay for each consumer that may open it. Each consumer lies in one of them.
- :func:`schedule_evict_and_place`: the same with an address for each stay, no two overlapping in steps
  and bytes (Li, Gupta and Malik, "COSMA", 2023, arXiv 2311.18246, over residencies in place of time
  steps).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ortools.sat.python import cp_model

from retensor.planning.peak import add_positions
from retensor.planning.problem import Item, Problem
from retensor.planning.progress import Clock
from retensor.planning.solver import minimise

Tell = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Stay:
    """An item in the scratchpad from step ``start`` up to, not including, ``end``."""

    item: int
    start: int
    end: int


@dataclass(frozen=True)
class Answer:
    """An order, its stays, the bytes they cost, and a proved lower bound for the problem asked."""

    order: tuple[int, ...]
    stays: tuple[Stay, ...]
    cost: int
    bound: int

    @property
    def proved(self) -> bool:
        """Whether the cost meets the bound."""
        return self.cost <= self.bound


def steps_of(order: Sequence[int]) -> list[int]:
    """The step of each operator."""
    step = [0] * len(order)
    for position, operator in enumerate(order):
        step[operator] = position
    return step


def gaps(item: Item, step: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive uses of an item, as pairs of steps."""
    uses = sorted(step[user] for user in item.users)
    return list(pairwise(uses))


def traffic(problem: Problem, stays: Iterable[Stay]) -> int:
    """Non-compulsory bytes of a set of stays."""
    counts = Counter(stay.item for stay in stays)
    items = problem.items
    return sum(items[i].size * (count - 1) + items[i].spill for i, count in counts.items() if count > 1)


def join_idle_moves(stays: Sequence[Stay], addresses: Sequence[int]) -> tuple[tuple[Stay, ...], tuple[int, ...]]:
    """Make one stay of two where an item leaves and comes back at once to the address it had."""
    kept: list[tuple[Stay, int]] = []
    for stay, address in sorted(zip(stays, addresses, strict=True), key=lambda pair: (pair[0].item, pair[0].start)):
        last, there = kept[-1] if kept else (None, -1)
        if last and (last.item, last.end, there) == (stay.item, stay.start, address):
            kept[-1] = Stay(last.item, last.start, stay.end), address
        else:
            kept.append((stay, address))
    return tuple(stay for stay, _ in kept), tuple(address for _, address in kept)


def answer_from_evictions(
    problem: Problem, order: tuple[int, ...], evicted: set[tuple[int, int]], bound: int
) -> Answer:
    """The answer that keeps every gap but those in ``evicted`` (item, step where the gap begins)."""
    step = steps_of(order)
    stays: list[Stay] = []
    for i, item in enumerate(problem.items):
        uses = sorted(step[user] for user in item.users)
        start = uses[0]
        for here, there in pairwise(uses):
            if (i, here) in evicted:
                stays.append(Stay(i, start, here + 1))
                start = there
        stays.append(Stay(i, start, uses[-1] + 1))
    return Answer(order, tuple(stays), traffic(problem, stays), bound)


def keep_or_evict(
    problem: Problem,
    capacity: int,
    order: tuple[int, ...],
    clock: Clock,
    *,
    seed: int = 0,
    workers: int | None = None,
    tell: Tell | None = None,
) -> Answer:
    """The least bytes for a given order, with capacity (in units) as a sum at each step."""
    step = steps_of(order)
    held = [problem.need[operator] for operator in order]
    wide: list[tuple[int, int, int]] = []
    change = [0] * (problem.n + 1)
    for i, item in enumerate(problem.items):
        for here, there in gaps(item, step):
            if there - here > 1 and item.room:
                wide.append((i, here, there))
                change[here + 1] += item.room
                change[there] -= item.room
    crowded: list[int] = []
    above = 0
    for s in range(problem.n):
        above += change[s]
        if held[s] + above > capacity:
            crowded.append(s)
    if not crowded:
        return answer_from_evictions(problem, order, set(), 0)

    model = cp_model.CpModel()
    over: dict[int, list[tuple[int, cp_model.IntVar]]] = {s: [] for s in crowded}
    evict: dict[tuple[int, int], cp_model.IntVar] = {}
    cost: list[cp_model.LinearExprT] = []
    spilled: dict[int, cp_model.IntVar] = {}
    for i, here, there in wide:
        inside = crowded[bisect_right(crowded, here) : bisect_left(crowded, there)]
        if not inside:
            continue
        if clock.left <= 0:
            # Not even time for the model: all that may be in the way leaves.
            return answer_from_evictions(problem, order, {(k, start) for k, start, _ in wide}, 0)
        item = problem.items[i]
        out = evict[i, here] = model.new_bool_var("")
        for s in inside:
            over[s].append((item.room, out))
        cost.append(item.size * out)
        if item.spill:
            if i not in spilled:
                spilled[i] = model.new_bool_var("")
                cost.append(item.spill * spilled[i])
            model.add_implication(out, spilled[i])
    for s in crowded:
        present = held[s] + sum(room for room, _ in over[s])
        rooms, outs = zip(*over[s], strict=True)
        model.add(cp_model.LinearExpr.weighted_sum(outs, rooms) >= present - capacity)
    model.minimize(sum(cost))
    solver, outcome = minimise(model, clock, seed=seed, workers=workers, tell=tell)
    if not outcome.solved:
        return answer_from_evictions(problem, order, set(evict), outcome.bound)
    evicted = {key for key, out in evict.items() if solver.boolean_value(out)}
    return answer_from_evictions(problem, order, evicted, outcome.bound)


@dataclass
class _Segments:
    """The optional stays of one item in a model: opened by its producer (-1) or by a consumer."""

    end: dict[int, cp_model.IntVar]
    open: dict[int, cp_model.IntVar]
    serves: dict[tuple[int, int], cp_model.IntVar]
    intervals: list[cp_model.IntervalVar]


def _add_segments(
    model: cp_model.CpModel,
    problem: Problem,
    item: Item,
    position: list[cp_model.IntVar],
    cost: list[cp_model.LinearExprT],
) -> _Segments:
    n = problem.n
    found = _Segments({}, {}, {}, [])
    openers = ([-1] if item.producer >= 0 else []) + list(item.consumers)
    for opener in openers:
        start = position[item.producer if opener < 0 else opener]
        end = found.end[opener] = model.new_int_var(1, n, "")
        size = model.new_int_var(1, n, "")
        present = found.open[opener] = model.new_bool_var("") if opener >= 0 else model.new_constant(1)
        found.intervals.append(model.new_optional_interval_var(start, size, end, present, ""))
        if opener >= 0:
            cost.append(item.size * present)
    for consumer in item.consumers:
        choices = []
        for opener in openers:
            if opener == consumer:
                serves = found.open[opener]
            elif opener < 0:
                serves = model.new_bool_var("")
                model.add(found.end[opener] > position[consumer]).only_enforce_if(serves)
            elif problem.descendants[consumer] >> opener & 1:
                continue
            else:
                serves = model.new_bool_var("")
                model.add_implication(serves, found.open[opener])
                model.add(found.end[opener] > position[consumer]).only_enforce_if(serves)
                model.add(position[opener] < position[consumer]).only_enforce_if(serves)
            found.serves[consumer, opener] = serves
            choices.append(serves)
        model.add_exactly_one(choices)
    retrieves = [found.open[opener] for opener in openers if opener >= 0]
    if item.producer < 0:
        # What comes from outside is opened by some consumer, and the first load is not counted.
        cost.append(-item.size)
    elif item.spill:
        spilled = model.new_bool_var("")
        for retrieve in retrieves:
            model.add_implication(retrieve, spilled)
        cost.append(item.spill * spilled)
    return found


def _read(
    problem: Problem, solver: cp_model.CpSolver, order: tuple[int, ...], segments: dict[int, _Segments]
) -> dict[int, list[tuple[int, int, int]]]:
    """Stays of each modelled item as (start, end, opener), disjoint, each from a use to a use."""
    step = steps_of(order)
    result: dict[int, list[tuple[int, int, int]]] = {}
    for i, segment in segments.items():
        item = problem.items[i]
        opener_of = {
            consumer: opener for (consumer, opener), serves in segment.serves.items() if solver.boolean_value(serves)
        }
        rows: list[tuple[int, int, int]] = []
        for user in sorted(item.users, key=step.__getitem__):
            # A stay that is open anyway serves whoever comes while it lasts.
            if rows and solver.value(segment.end[rows[-1][2]]) > step[user]:
                rows[-1] = (rows[-1][0], step[user] + 1, rows[-1][2])
            else:
                opener = -1 if user == item.producer else opener_of[user]
                rows.append((step[user], step[user] + 1, opener))
        result[i] = rows
    return result


def _hint(
    model: cp_model.CpModel,
    problem: Problem,
    position: list[cp_model.IntVar],
    segments: dict[int, _Segments],
    hint: Answer,
) -> None:
    step = steps_of(hint.order)
    for operator in range(problem.n):
        model.add_hint(position[operator], step[operator])
    for i, segment in segments.items():
        item = problem.items[i]
        rows = sorted((s for s in hint.stays if s.item == i), key=lambda s: s.start)
        at = {step[user]: user for user in item.users}
        openers: dict[int, Stay] = {}
        for row in rows:
            user = at[row.start]
            openers[-1 if user == item.producer else user] = row
        for opener, present in segment.open.items():
            opened = openers.get(opener)
            if opener >= 0:
                model.add_hint(present, opened is not None)
            start = step[item.producer if opener < 0 else opener]
            model.add_hint(segment.end[opener], opened.end if opened else start + 1)
        for (consumer, opener), serves in segment.serves.items():
            if consumer != opener:
                opened = openers.get(opener)
                model.add_hint(serves, opened is not None and opened.start < step[consumer] < opened.end)


def schedule_and_evict(
    problem: Problem,
    capacity: int,
    clock: Clock,
    hint: Answer,
    *,
    bound: int = 0,
    glued: Sequence[tuple[int, int]] = (),
    seed: int = 0,
    workers: int | None = None,
    time_limit: float | None = None,
    tell: Tell | None = None,
) -> Answer:
    """The least bytes over all orders, with capacity (in units) as a sum at each step.

    ``glued`` are pairs of operators of which the second may follow the first at once without loss.
    """
    model = cp_model.CpModel()
    position = add_positions(model, problem)
    for first, second in glued:
        model.add(position[second] == position[first] + 1)
    cost: list[cp_model.LinearExprT] = []
    intervals: list[cp_model.IntervalVar] = []
    demands: list[int] = []
    held = list(problem.need)
    segments: dict[int, _Segments] = {}
    leaves: dict[int, cp_model.IntVar] = {}
    for i, item in enumerate(problem.items):
        if len(item.users) == 2:
            # One gap: the two users hold it themselves, so only the steps between them are at stake.
            first, last = (position[user] for user in item.users)
            leave = leaves[i] = model.new_bool_var("")
            size = model.new_int_var(0, problem.n, "")
            if item.producer >= 0:
                intervals.append(model.new_optional_interval_var(first + 1, size, last, ~leave, ""))
            else:
                # Two consumers of something from outside, in either order.
                low = model.new_int_var(0, problem.n, "")
                high = model.new_int_var(0, problem.n, "")
                model.add_min_equality(low, [first, last])
                model.add_max_equality(high, [first, last])
                intervals.append(model.new_optional_interval_var(low + 1, size, high, ~leave, ""))
            demands.append(item.room)
            cost.append((item.size + item.spill) * leave)
            continue
        segments[i] = _add_segments(model, problem, item, position, cost)
        intervals += segments[i].intervals
        demands += [item.room] * len(segments[i].intervals)
        for user in item.users:
            held[user] -= item.room
    for operator in range(problem.n):
        if held[operator]:
            intervals.append(model.new_fixed_size_interval_var(position[operator], 1, ""))
            demands.append(held[operator])
    model.add_cumulative(intervals, demands, capacity)
    objective = sum(cost)
    if bound:
        model.add(objective >= bound)
    model.minimize(objective)
    _hint(model, problem, position, segments, hint)
    stays_of = {s.item: 0 for s in hint.stays}
    for stay in hint.stays:
        stays_of[stay.item] += 1
    for i, leave in leaves.items():
        model.add_hint(leave, stays_of[i] > 1)
    solver, outcome = minimise(model, clock, seed=seed, workers=workers, time_limit=time_limit, tell=tell)
    proved = max(bound, outcome.bound)
    if not outcome.solved:
        return Answer(hint.order, hint.stays, hint.cost, min(proved, hint.cost))
    order = tuple(sorted(range(problem.n), key=lambda o: solver.value(position[o])))
    step = steps_of(order)
    evicted = {
        (i, min(step[user] for user in problem.items[i].users))
        for i, leave in leaves.items()
        if solver.boolean_value(leave)
    }
    for i, rows in _read(problem, solver, order, segments).items():
        evicted |= {(i, end - 1) for _, end, _ in rows[:-1]}
    answer = answer_from_evictions(problem, order, evicted, proved)
    return answer if answer.cost <= hint.cost else Answer(hint.order, hint.stays, hint.cost, proved)


@dataclass(frozen=True)
class Placed:
    """An answer whose stays have addresses: ``addresses[k]`` (in units) belongs to ``answer.stays[k]``."""

    answer: Answer
    addresses: tuple[int, ...]


def schedule_evict_and_place(
    problem: Problem,
    scratchpad: int,
    clock: Clock,
    *,
    order: tuple[int, ...] | None = None,
    hint: Answer | None = None,
    bound: int = 0,
    seed: int = 0,
    workers: int | None = None,
    tell: Tell | None = None,
) -> tuple[Placed | None, int]:
    """The least bytes over all orders (or for ``order``) and addresses, and the bound that was proved.

    ``scratchpad`` is in bytes. None where no plan was found in time; one always exists if every operator
    fits alone.
    """
    unit = problem.alignment
    capacity = -(-scratchpad // unit)
    model = cp_model.CpModel()
    if order is None:
        position = add_positions(model, problem)
    else:
        position = [model.new_constant(step) for step in steps_of(order)]
    cost: list[cp_model.LinearExprT] = []
    columns: list[cp_model.IntervalVar] = []
    rows: list[cp_model.IntervalVar] = []
    demands: list[int] = []
    segments: dict[int, _Segments] = {}
    place: dict[tuple[int, int], cp_model.IntVar] = {}
    for i, item in enumerate(problem.items):
        segments[i] = _add_segments(model, problem, item, position, cost)
        for interval, (opener, present) in zip(segments[i].intervals, segments[i].open.items(), strict=True):
            address = place[i, opener] = model.new_int_var(0, (scratchpad - item.size) // unit, "")
            if not item.room:
                # An empty tensor only carries a dependency; it overlaps nothing.
                continue
            columns.append(interval)
            rows.append(model.new_optional_fixed_size_interval_var(address, item.room, present, ""))
            demands.append(item.room)
    for operator in range(problem.n):
        for _, size in problem.transients[operator]:
            if not size:
                continue
            address = model.new_int_var(0, (scratchpad - size) // unit, "")
            room = -(-size // unit)
            columns.append(model.new_fixed_size_interval_var(position[operator], 1, ""))
            rows.append(model.new_fixed_size_interval_var(address, room, ""))
            demands.append(room)
    model.add_no_overlap_2d(columns, rows)
    model.add_cumulative(columns, demands, capacity)
    objective = sum(cost)
    if bound:
        model.add(objective >= bound)
    model.minimize(objective)
    if hint is not None and order is None:
        _hint(model, problem, position, segments, hint)
    solver, outcome = minimise(model, clock, seed=seed, workers=workers, tell=tell)
    proved = max(bound, outcome.bound)
    if not outcome.solved:
        return None, proved
    found = tuple(sorted(range(problem.n), key=lambda o: solver.value(position[o])))
    stays: list[Stay] = []
    addresses: list[int] = []
    for i, parts in _read(problem, solver, found, segments).items():
        for start, end, opener in parts:
            stays.append(Stay(i, start, end))
            addresses.append(solver.value(place[i, opener]))
    answer = Answer(found, tuple(stays), traffic(problem, stays), proved)
    return Placed(answer, tuple(addresses)), proved
