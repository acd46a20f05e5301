"""What a network needs of a scratchpad: ``M_R`` to run at all, ``M_P`` to run without non-compulsory traffic."""

from __future__ import annotations

from dataclasses import dataclass

from retensor.graph.structure import Graph
from retensor.planning.checks import check_alignment, check_graph, check_search
from retensor.planning.late import postpone
from retensor.planning.peak import Peak, least_peak
from retensor.planning.plan import Accelerator
from retensor.planning.problem import build_problem, minimum_required, split
from retensor.planning.progress import Clock, Progress, ProgressCallback, stop_on_interrupt
from retensor.units import parse_size


@dataclass(frozen=True)
class Bounds:
    """The derived sizes of a network, in bytes.

    Attributes
    ----------
    m_r : int
        The most that one operator's inputs and outputs take together; below it no plan exists.
    m_r_operator : str
    m_p : int
        The least peak footprint over schedules that was found; with it, some schedule evicts nothing
        (addresses aside).
    m_p_bound : int
        What was proved: equal to ``m_p`` where it is the minimum.
    m_h : int
        Half-way between ``m_r`` and ``m_p``, rounded down.
    order : tuple of str
        The schedule whose peak is ``m_p`` (MPMF).
    parameters : bool
        Whether parameters are counted.
    seconds : float
    """

    m_r: int
    m_r_operator: str
    m_p: int
    m_p_bound: int
    m_h: int
    order: tuple[str, ...]
    parameters: bool
    seconds: float


def bounds(
    graph: Graph,
    *,
    parameters: bool = False,
    alignment: int = 1,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Bounds:
    """``M_R``, ``M_P`` with its schedule, and ``M_H`` of a graph.

    Parameters
    ----------
    graph : Graph
    parameters : bool
        Count parameters too (``M_Rp``, ``M_Pp``, ``M_Hp``): each lies in the scratchpad while its operator runs.
    alignment : int
        Tensors take whole multiples of it, in bytes.
    time_limit : float
        Seconds. On running out, ``m_p_bound`` may be below ``m_p``.
    seed : int
        Of the search's random choices.
    workers : int, optional
        Threads of the solver; all cores by default.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` after each part of the graph.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("y",), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> found = bounds(graph)
    >>> found.m_r, found.m_p
    (6, 6)
    """
    check_graph(graph)
    check_alignment(alignment)
    check_search(time_limit, seed, workers)
    clock = Clock(time_limit)
    with stop_on_interrupt(clock):
        return _bounds(graph, parameters, alignment, clock, seed, workers, progress)


def _bounds(
    graph: Graph,
    parameters: bool,
    alignment: int,
    clock: Clock,
    seed: int,
    workers: int | None,
    progress: ProgressCallback | None,
) -> Bounds:
    m_r, operator = minimum_required(graph, parameters, alignment)
    problem = postpone(build_problem(graph, parameters, alignment))
    parts = split(problem)
    order: list[int] = []
    peak = bound = 0
    known: dict[object, Peak] = {}
    # The whole network needs that much at least: below it, no part's schedule is better than another.
    enough = max((need for part in parts for need in part.problem.need), default=0)
    for done, part in enumerate(parts):
        key = part.problem.shape_key
        if key not in known:
            known[key] = least_peak(part.problem, clock, seed=seed, workers=workers, enough=enough)
        found = known[key]
        order += [problem.operators[part.operators[o - part.shift]] for o in found.order if o >= part.shift]
        peak, bound = max(peak, found.peak), max(bound, found.bound)
        if progress:
            progress(Progress("least peak", clock.seconds, peak * alignment, bound * alignment, done + 1, len(parts)))
    # Units overstate an operator that need not pad its last tensor; M_P is never below M_R.
    m_p, m_p_bound = max(m_r, peak * alignment), max(m_r, bound * alignment)
    names = tuple(graph.operators[i].name for i in order)
    return Bounds(m_r, operator, m_p, m_p_bound, (m_r + m_p) // 2, names, parameters, clock.seconds)


def resolve_scratchpad(
    graph: Graph,
    accelerator: Accelerator,
    parameters: bool,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
) -> int:
    """The accelerator's scratchpad in bytes; relative sizes are worked out for ``graph``.

    Where the least peak is not proved in time, ``M_P`` is the least that was found.
    """
    text = accelerator.scratchpad
    if isinstance(text, int) or "M_" not in text:
        return parse_size(text)
    if "M_R" in text:
        return parse_size(text, {"M_R": minimum_required(graph, parameters, accelerator.alignment)[0]})
    found = bounds(
        graph,
        parameters=parameters,
        alignment=accelerator.alignment,
        time_limit=time_limit,
        seed=seed,
        workers=workers,
    )
    return parse_size(text, {"M_P": found.m_p, "M_H": found.m_h})
