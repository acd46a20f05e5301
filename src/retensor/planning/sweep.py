"""Traffic against scratchpad: plans for budgets from M_P, where none is needed, down to M_R, where all fails below.

Each budget is planned on its own; two exact facts then sharpen the whole curve. A plan for a smaller
scratchpad is a plan for a larger one, so traffic never has to rise with the budget; and what was proved
to be needed in a larger scratchpad is needed in a smaller one, so a bound carries downwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from retensor.graph.structure import Graph
from retensor.planning.plan import Accelerator
from retensor.planning.progress import Progress

MOST_POINTS = 1000


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """What one scratchpad costs.

    Attributes
    ----------
    scratchpad_bytes : int
    non_compulsory_bytes : int
        Bytes spilled and retrieved by the best plan found.
    bound_bytes : int
        Proved lower bound of the non-compulsory bytes of any plan.
    compulsory_bytes : int
        Bytes of first loads and of stores.
    seconds : float
        Time to plan this budget.
    status : {"optimal", "feasible"}
        ``optimal`` where the bound meets the traffic.
    """

    scratchpad_bytes: int
    non_compulsory_bytes: int
    bound_bytes: int
    compulsory_bytes: int
    seconds: float
    status: Literal["optimal", "feasible"]


def sweep(
    graph: Graph,
    *,
    points: int = 9,
    parameters: bool = False,
    alignment: int = 1,
    time_limit: float = 60.0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> list[SweepPoint]:
    """Plan ``graph`` for budgets evenly spaced from its M_P down to its M_R, both included.

    Parameters
    ----------
    graph : Graph
    points : int
        Budgets, 2 to 1000; fewer come back where M_P and M_R are closer than that, one where they are equal.
    parameters : bool
        Whether parameters lie in the scratchpad too.
    alignment : int
        Every address is a multiple of it; in bytes.
    time_limit : float
        Seconds for the bounds, and again for each budget.
    seed : int
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` while it solves.

    Returns
    -------
    list of SweepPoint
        From the largest scratchpad to the smallest; traffic and bound never fall along it.

    Raises
    ------
    ValueError
        Where ``points`` is out of range.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> tensors = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
    >>> operators = [
    ...     Operator("f", "F", ("x",), ("a",)),
    ...     Operator("g", "G", ("a",), ("b",)),
    ...     Operator("h", "H", ("b",), ("c",)),
    ...     Operator("k", "K", ("a", "c"), ("y",)),
    ... ]
    >>> curve = sweep(Graph("skip", operators, tensors, ["y"]), points=3)
    >>> [(point.scratchpad_bytes, point.non_compulsory_bytes) for point in curve]
    [(14, 0), (13, 8), (12, 8)]
    """
    return settle(
        list(
            sweep_points(
                graph,
                points=points,
                parameters=parameters,
                alignment=alignment,
                time_limit=time_limit,
                seed=seed,
                progress=progress,
            )
        )
    )


def sweep_points(
    graph: Graph,
    *,
    points: int = 9,
    parameters: bool = False,
    alignment: int = 1,
    time_limit: float = 60.0,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Iterator[SweepPoint]:
    """The points of :func:`sweep` one by one, for a caller that shows them or stops early.

    Bounds are carried down as they come; :func:`settle` carries the traffic up once the points are known.
    """
    from retensor.planning import bounds, plan

    check_points(points)
    limits = bounds(
        graph, parameters=parameters, alignment=alignment, time_limit=time_limit, seed=seed, progress=progress
    )
    proved = 0
    for budget in budgets(limits.m_p, limits.m_r, points):
        found = plan(
            graph,
            Accelerator(scratchpad=budget, alignment=alignment),
            parameters=parameters,
            time_limit=time_limit,
            seed=seed,
            progress=progress,
        )
        proved = max(proved, found.bound_bytes)
        yield _point(budget, found.non_compulsory_bytes, proved, found.compulsory_bytes, found.seconds)


def check_points(points: int) -> None:
    """Refuse a number of points that makes no curve.

    Raises
    ------
    TypeError, ValueError
        Where ``points`` is no int from 2 to 1000.
    """
    if isinstance(points, bool) or not isinstance(points, int):
        raise TypeError(f"points is an int, not {type(points).__name__}")
    if not 2 <= points <= MOST_POINTS:
        raise ValueError(f"a sweep has 2 to {MOST_POINTS} points, not {points}")


def budgets(largest: int, smallest: int, points: int) -> list[int]:
    """At most ``points`` distinct whole numbers, evenly spaced from ``largest`` down to ``smallest``.

    >>> budgets(100, 60, 5)
    [100, 90, 80, 70, 60]
    >>> budgets(7, 6, 9), budgets(6, 6, 9)
    ([7, 6], [6])
    """
    span = largest - smallest
    return list(dict.fromkeys(largest - span * i // (points - 1) for i in range(points)))


def settle(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Give each point the least traffic of the points with a smaller scratchpad, whose plans fit it too.

    Parameters
    ----------
    points : sequence of SweepPoint
        From the largest scratchpad to the smallest.
    """
    settled: list[SweepPoint] = []
    least: int | None = None
    for point in reversed(points):
        least = point.non_compulsory_bytes if least is None else min(least, point.non_compulsory_bytes)
        status: Literal["optimal", "feasible"] = "optimal" if least <= point.bound_bytes else "feasible"
        settled.append(replace(point, non_compulsory_bytes=least, status=status))
    return settled[::-1]


def _point(budget: int, traffic: int, bound: int, compulsory: int, seconds: float) -> SweepPoint:
    return SweepPoint(budget, traffic, bound, compulsory, seconds, "optimal" if traffic <= bound else "feasible")
