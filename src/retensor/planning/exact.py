"""COSMA: the schedule, the addresses and the evictions with the least off-chip traffic, and the proof.

Li, Gupta and Malik, "COSMA: combined scheduling, memory allocation and tensor replacement for minimizing
off-chip data accesses of DNN accelerators", 2023, arXiv 2311.18246. The problem is theirs; :mod:`.search` solves it.
This file is the call around it: what is asked, and the plan in the graph's own names.
"""

from __future__ import annotations

from collections.abc import Sequence

from retensor.graph.structure import Graph
from retensor.planning.assemble import finish, sequence_of
from retensor.planning.bounds import resolve_scratchpad
from retensor.planning.checks import check_accelerator, check_graph, check_search
from retensor.planning.late import postpone
from retensor.planning.plan import Accelerator, Plan
from retensor.planning.problem import build_problem, check_feasible
from retensor.planning.progress import Clock, ProgressCallback, stop_on_interrupt
from retensor.planning.search import Search


def plan(
    graph: Graph,
    accelerator: Accelerator,
    *,
    parameters: bool = False,
    order: str | Sequence[str] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """The plan of least non-compulsory off-chip traffic for a graph on an accelerator.

    Parameters
    ----------
    graph : Graph
    accelerator : Accelerator
        Its scratchpad may be relative to the graph (``"M_R"``, ``"1.2*M_R"``).
    parameters : bool
        Whether parameters lie in the scratchpad too, each while its operators run.
    order : None, "default" or sequence of str
        Free (chosen with everything else), the program's, or the operators' names in the order to keep.
    time_limit : float
        Seconds of search; then, or on Ctrl-C, the best plan so far is returned with its bound and gap.
    seed : int
        Of the search's random choices.
    workers : int, optional
        Threads of the solver; all cores by default.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` now and then.

    Returns
    -------
    Plan
        ``plan.status`` is ``"optimal"`` where ``plan.bound_bytes`` meets the traffic.

    Raises
    ------
    InfeasibleError
        Where one operator's inputs and outputs alone do not fit.
    PlanError
        Where ``order`` is not an order of this graph that runs.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("x", "y"), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> plan(graph, Accelerator(scratchpad=9)).status
    'optimal'
    """
    check_graph(graph)
    check_accelerator(accelerator)
    check_search(time_limit, seed, workers)
    if isinstance(order, str) and order != "default":
        raise ValueError(f"order is None, 'default' or a sequence of operator names, not '{order}'")
    clock = Clock(time_limit)
    scratchpad = resolve_scratchpad(graph, accelerator, parameters, time_limit=time_limit, seed=seed, workers=workers)
    check_feasible(graph, scratchpad, parameters, accelerator.alignment)
    problem = build_problem(graph, parameters, accelerator.alignment)
    fixed: tuple[int, ...] | None = None
    if order is not None:
        names = [operator.name for operator in graph.operators] if order == "default" else list(order)
        fixed = sequence_of(graph, names)
    else:
        problem = postpone(problem)
    search = Search(problem, scratchpad, fixed, clock, seed, workers, progress)
    with stop_on_interrupt(clock):
        result = search.run()
    return finish(
        graph, accelerator, scratchpad, parameters, problem, result.order, result.stays, result.addresses,
        result.transient_addresses, bound=search.bound, solver="COSMA", seconds=clock.seconds,
        fixed_order=fixed is not None,
    )  # fmt: skip
