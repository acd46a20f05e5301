"""A lower bound by projection: stretches of the graph on their own, their optima added up.

Take any plan and leave out all operators but those of a *stretch*, some consecutive operators of an order that runs.
What is left is a plan of the stretch: its operators follow one on the other as before, and no step holds more. Tensors
made elsewhere load for nothing the first time, and what is used elsewhere afterwards need not be kept. So each
tensor that leaves between two uses of the stretch is read again in the whole plan too, and was written.

The same retrieve may count in two stretches that use the same tensor. So only one is charged for it: the one that has
the tensor's first user; in the others it just takes its room while an operator uses it. Then the optima of stretches
that share no operator add up to a lower bound for the whole.

Which stretches to add up is free. They are tried in several lengths at several places, equal ones once, and the best
chain of them is picked by dynamic programming.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

from retensor.planning.baselines import evict_by_bytes
from retensor.planning.frontier import search_frontier
from retensor.planning.problem import Item, Problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, keep_or_evict, steps_of, traffic

LENGTHS = (16, 32, 64)
"""Operators of a stretch that is tried."""
FIXED_LENGTHS = (800,)
"""The same where the order is given."""
LAPS = 2
"""Stretches of one length begin at every such part of their length."""
WIDTH = 400
"""States that the frontier search keeps of each layer."""


def projection_bound(
    problem: Problem,
    capacity: int,
    order: Sequence[int],
    clock: Clock,
    *,
    lengths: Sequence[int] | None = None,
    width: int = WIDTH,
    fixed: bool = False,
    keep: Callable[[int], None] | None = None,
) -> int:
    """Non-compulsory bytes that every plan moves at least.

    Parameters
    ----------
    problem : Problem
    capacity : int
        In units of the alignment.
    order : sequence of int
        An order that runs, whose consecutive operators make the stretches; one that moves few bytes serves best.
    clock : Clock
        What is not reached in time counts as zero.
    lengths : sequence of int, optional
        Operators of a stretch, shorter ones tried first.
    width : int
        Of the frontier search that solves a stretch.
    fixed : bool
        Whether ``order`` is the only one allowed; then the bound is for plans with that order.
    keep : callable, optional
        Is given each better bound.
    """
    n = problem.n
    lengths = lengths or (FIXED_LENGTHS if fixed else LENGTHS)
    step = steps_of(order)
    first_use = [min(step[user] for user in item.users) for item in problem.items]
    solved: dict[object, int] = {}
    values: dict[tuple[int, int], int] = {}
    best = 0
    for length in dict.fromkeys(min(length, n) for length in lengths):
        starts = range(0, n, length) if fixed else range(0, n - length + 1, max(1, length // LAPS))
        for tried, start in enumerate(starts):
            if clock.left <= 0:
                break
            end = min(n, start + length)
            part = stretch(problem, order, step, first_use, start, end)
            key = part.shape_key
            if key not in solved:
                share = clock.share(1 / (len(starts) - tried)) if fixed else clock
                solved[key] = _least(part, capacity, share, width, fixed)
            values[start, end] = solved[key]
        found = _best_chain(n, values)
        if found > best:
            best = found
            if keep:
                keep(best)
    return best


def stretch(
    problem: Problem, order: Sequence[int], step: Sequence[int], first_use: Sequence[int], start: int, end: int
) -> Problem:
    """The problem of the operators at steps ``start`` to ``end`` of an order, charged for what they use first."""
    operators = order[start:end]
    transients = [list(problem.transients[o]) for o in operators]
    items: list[Item] = []
    for i in dict.fromkeys(i for o in operators for i in problem.touched[o]):
        item = problem.items[i]
        local = sorted(step[user] - start for user in item.users if start <= step[user] < end)
        if len(local) == 1 or first_use[i] < start:
            for user in local:
                transients[user].append((item.name, item.size))
            continue
        producer = -1 if item.producer < 0 else local[0]
        consumers = local if producer < 0 else local[1:]
        items.append(Item(item.name, item.size, item.room, producer, tuple(consumers), item.spill))
    items.sort(key=lambda item: (item.users, item.size))
    after = sorted(
        (step[before] - start, at)
        for at, operator in enumerate(operators)
        for before in problem.predecessors[operator]
        if step[before] >= start
    )
    return Problem(
        tuple(problem.operators[o] for o in operators),
        tuple(items),
        tuple(map(tuple, transients)),
        tuple(problem.need[o] for o in operators),
        problem.alignment,
        tuple(after),
    )


def _least(part: Problem, capacity: int, clock: Clock, width: int, fixed: bool) -> int:
    """A lower bound of a stretch's bytes."""
    order = tuple(range(part.n))
    stays = tuple(evict_by_bytes(part, order, capacity, "belady"))
    known = Answer(order, stays, traffic(part, stays), 0)
    if not known.cost:
        return 0
    if fixed:
        return keep_or_evict(part, capacity, order, clock).bound
    return search_frontier(part, capacity, clock, known, width=width, choices=max(8, width // 4)).bound


def _best_chain(n: int, values: dict[tuple[int, int], int]) -> int:
    """The largest sum over stretches of which none overlap."""
    ending: dict[int, list[tuple[int, int]]] = {}
    for (start, end), value in values.items():
        if value:
            ending.setdefault(end, []).append((start, value))
    ends, sums = [0], [0]
    for end in sorted(ending):
        reached = sums[-1]
        for start, value in ending[end]:
            reached = max(reached, value + sums[bisect_left(ends, start + 1) - 1])
        ends.append(end)
        sums.append(reached)
    return sums[-1]
