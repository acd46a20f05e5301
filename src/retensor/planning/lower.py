"""Lower bounds over all orders, for problems that no exact search can prove: the best of three.

:mod:`.crossing` proves networks that are nearly chains, with skips; :mod:`.wavefront` finds what wide graphs must hold
at once; :mod:`.projection` proves what small stretches must move. All three hold for every order; the first two are
quick, and the third takes what time is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from retensor.planning.crossing import crossing_bound
from retensor.planning.problem import Problem
from retensor.planning.progress import Clock
from retensor.planning.projection import projection_bound
from retensor.planning.wavefront import wavefront_bound

CROSSING, WAVEFRONT = 0.5, 0.8
"""Parts of what is left of the time that the first two may take, in turn."""
LARGEST_CROSSING = 5_000
"""Operators beyond which the integer program of :mod:`.crossing` is not worth building."""


def lower_bound(
    problem: Problem,
    capacity: int,
    order: Sequence[int],
    cost: int,
    clock: Clock,
    *,
    seed: int = 0,
    workers: int | None = None,
    keep: Callable[[int], None] | None = None,
) -> int:
    """Non-compulsory bytes that every plan moves at least, never above ``cost``, those of a plan that is known.

    Parameters
    ----------
    problem : Problem
    capacity : int
        In units of the alignment.
    order : sequence of int
        The known plan's; where it is good, the bound is closer.
    cost : int
    clock : Clock
    seed, workers : int, optional
        Of CP-SAT.
    keep : callable, optional
        Is given each better bound.
    """
    best = 0

    def note(bound: int) -> None:
        nonlocal best
        if bound > best:
            best = min(bound, cost)
            if keep:
                keep(best)

    if problem.n <= LARGEST_CROSSING:
        note(crossing_bound(problem, capacity, clock.share(CROSSING), seed=seed, workers=workers))
    if best < cost:
        note(wavefront_bound(problem, capacity, order, clock.share(WAVEFRONT), keep=note))
    if best < cost:
        note(projection_bound(problem, capacity, order, clock, keep=note))
    return best
