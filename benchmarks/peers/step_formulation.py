"""The (tensor x step) integer linear program of COSMA's paper, as its authors would run it: a peer to measure against.

Li, Gupta and Malik, "Combined Scheduling, Memory Allocation and Tensor Replacement for Minimizing Off-Chip Data
Accesses of DNN Accelerators", 2023, arXiv 2311.18246. One model decides everything at once; for tensor ``i`` of size
``s_i``, operator ``o`` and step ``t``, with binaries create ``C``, preserve ``P`` (stays from ``t-1`` to ``t``), spill
``W`` (written before ``t``), retrieve ``R`` (read before ``t``), load ``F`` (an input's first, free read), and the
address ``A`` of each resident tensor::

    min   sum_it s_i (W_it + R_it)
    s.t.  sum_o C_ot = 1,  sum_t C_ot = 1            one operator a step; a tensor is created with its operator
          X_it = C_it + F_it + P_it + R_it <= 1      X: resident at t
          P_it <= X_i,t-1,  W_it <= X_i,t-1          only what is there can stay or be written
          R_it <= sum_{u<=t} W_iu,  sum_t W_it <= 1  only what was written can be read (outputs: stored once, free)
          sum_{o reads i} C_ot <= P_it + R_it + F_it inputs are resident while an operator runs
          |A_it - A_i,t-1| <= M (1 - P_it)           what stays keeps its address
          A_it + s_i <= A_jt + M (3 - O_ijt - X_it - X_jt),  and with 1 - O_ijt the other way round
          sum_i s_i X_it <= M

The last row follows from the others in integers; without it the relaxation sees no capacity at all. Nothing is left
out that makes the model smaller without changing its optimum: variables exist between an operator's earliest step
(how many operators must run before it) and its latest (how many must run after it), a tensor's between the first of
its users and the last, rows for pairs that may meet; tensors of one operator alone have no variables but an address;
addresses count in units of the greatest common divisor of all sizes. Not in the model: any start from another
solver's plan, any split of the graph, any stage before or after.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from benchmarks.peers.step_model import Model

from retensor.graph.structure import Graph
from retensor.planning.assemble import transfers_of
from retensor.planning.plan import Plan, Residency
from retensor.planning.verify import verify

Status = Literal["optimal", "feasible", "unknown", "infeasible"]
Solver = Literal["highs", "cp-sat"]


@dataclass(frozen=True)
class PeerResult:
    """What the formulation reached.

    Attributes
    ----------
    status : {"optimal", "feasible", "unknown", "infeasible"}
        ``unknown``: time ran out before any plan was found.
    objective_bytes : int or None
        Non-compulsory bytes of the best plan found.
    bound_bytes : int
        Proved lower bound of any plan's non-compulsory bytes.
    rows, columns : int
        Size of the integer linear program, before any solver's presolve.
    build_seconds, seconds : float
        To set the model up, and all in all.
    plan : Plan or None
        The best plan itself, for :func:`retensor.planning.verify`.
    """

    status: Status
    objective_bytes: int | None
    bound_bytes: int
    rows: int
    columns: int
    build_seconds: float
    seconds: float
    plan: Plan | None = None


def solve(
    graph: Graph,
    scratchpad: int,
    *,
    parameters: bool = False,
    alignment: int = 1,
    time_limit: float = 60.0,
    threads: int = 2,
    solver: Solver = "highs",
) -> PeerResult:
    """Schedule, place and evict with the paper's (tensor x step) formulation.

    Parameters
    ----------
    graph : Graph
    scratchpad : int
        In bytes.
    parameters : bool
        Whether parameters lie in the scratchpad too.
    alignment : int
        Every address is a multiple of it; in bytes.
    time_limit : float
        Seconds of the solver; building the model comes on top.
    threads : int
        Of the solver.
    solver : {"highs", "cp-sat"}
        HiGHS solves the integer linear program. CP-SAT gets the same rows, except that the big-M rows are handed
        over as the implications they encode, which it takes natively.

    Returns
    -------
    PeerResult

    Raises
    ------
    ValueError
        Where ``solver`` is neither of the two.
    PlanError
        Where the solver's answer does not replay (its arithmetic slipped past a row).

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("x", "y"), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> solve(graph, 9, solver="cp-sat").objective_bytes
    0
    """
    if solver not in ("highs", "cp-sat"):
        raise ValueError(f"solver is 'highs' or 'cp-sat', not {solver!r}")
    start = time.perf_counter()
    model = Model(graph, scratchpad, parameters, alignment)
    run = _run_highs if solver == "highs" else _run_cp_sat
    status, values, bound, built = run(model, time_limit, threads)
    seconds = time.perf_counter() - start
    plan = None
    if values is not None:
        plan = _plan(model, values, max(bound, 0), solver, seconds)
        # A solver works in floating point: what does not replay is an error here, not a figure.
        verify(graph, plan)
    return PeerResult(
        status=status,
        objective_bytes=None if plan is None else plan.non_compulsory_bytes,
        bound_bytes=max(bound, 0),
        rows=model.row_count,
        columns=len(model.upper),
        build_seconds=built - start,
        seconds=seconds,
        plan=plan,
    )


# Status, column values, lower bound in bytes, and the moment the solver started.
Outcome = tuple[Status, npt.NDArray[np.float64] | None, int, float]


def _divisor(model: Model) -> int:
    """All objectives are multiples of it."""
    return math.gcd(*model.cost) or 1


def _run_highs(model: Model, time_limit: float, threads: int) -> Outcome:
    highspy: Any = importlib.import_module("highspy")
    divisor = _divisor(model)
    solver = highspy.Highs()
    solver.silent()
    # The number of threads of an earlier run in this process would stay otherwise.
    highspy.Highs.resetGlobalScheduler(True)
    solver.setOptionValue("threads", threads)
    solver.setOptionValue("time_limit", float(time_limit))
    solver.setOptionValue("mip_rel_gap", 0.0)
    # Costs are whole numbers, so any gap below one is none.
    solver.setOptionValue("mip_abs_gap", 0.99)
    # A binary off by the tolerance must not let a big-M row slip by half a unit.
    solver.setOptionValue("mip_feasibility_tolerance", max(1e-10, min(1e-6, 0.1 / max(1, model.capacity))))
    if solver.passModel(_highs_lp(model, divisor, highspy)) != highspy.HighsStatus.kOk:
        raise AssertionError("HiGHS refuses the model")
    built = time.perf_counter()
    solver.run()
    status = solver.getModelStatus()
    info = solver.getInfo()
    if status == highspy.HighsModelStatus.kInfeasible:
        return "infeasible", None, 0, built
    bound = info.mip_dual_bound
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    # All objectives are whole here; what the relaxation's arithmetic may be off by must not round up.
    whole = math.ceil(bound - 1e-4 - 1e-7 * abs(bound)) * divisor if math.isfinite(bound) else 0
    if not found:
        return "unknown", None, whole, built
    values = np.array(solver.getSolution().col_value)
    optimal = status == highspy.HighsModelStatus.kOptimal
    return ("optimal" if optimal else "feasible"), values, whole, built


def _highs_lp(model: Model, divisor: int, highspy: Any) -> Any:
    """The whole program as one sparse matrix."""
    infinity = highspy.kHighsInf
    lengths = [len(columns) for columns, *_ in model.rows]
    row = [np.repeat(np.arange(len(model.rows)), lengths)]
    column = [np.array([c for columns, *_ in model.rows for c in columns], dtype=np.int64)]
    value = [np.array([v for _, values, *_ in model.rows for v in values], dtype=np.float64)]
    least = [np.array([-infinity if low is None else low for *_, low, _ in model.rows], dtype=np.float64)]
    most = [np.array([infinity if high is None else high for *_, high in model.rows], dtype=np.float64)]
    count = len(model.rows)

    def add(columns: Sequence[Any], values: Sequence[Any], limit: Any) -> None:
        """Rows ``sum of values * columns <= limit``, many at once."""
        nonlocal count
        size = len(columns[0])
        for c, v in zip(columns, values, strict=True):
            v = np.broadcast_to(np.asarray(v, dtype=np.float64), (size,))
            row.append((np.arange(size) + count)[v != 0])
            column.append(c[v != 0])
            value.append(v[v != 0])
        least.append(np.full(size, -infinity))
        most.append(np.asarray(limit, dtype=np.float64))
        count += size

    now, before, stays, top = model.keeps.T
    add((now, before, stays), (1, -1, top), top)
    add((now, before, stays), (-1, 1, top), top)
    a, b, x, y, order, room_a, room_b, top_a, top_b = model.orders.T
    # The least M that frees a row: the lower tensor's highest end against address 0. Tensors of one operator share
    # one binary, which then counts once.
    big, apart = top_a + room_a, x != y
    add((a, b, x, y, order), (1, -1, big, big * apart, big), (2 + apart) * big - room_a)
    big = top_b + room_b
    add((b, a, x, y, order), (1, -1, big, big * apart, -big), (1 + apart) * big - room_b)

    rows, columns, values = np.concatenate(row), np.concatenate(column), np.concatenate(value)
    ranked = np.lexsort((columns, rows))
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(model.upper), count
    lp.col_cost_ = np.array(model.cost, dtype=np.float64) / divisor
    lp.col_lower_ = np.array(model.lower, dtype=np.float64)
    lp.col_upper_ = np.array(model.upper, dtype=np.float64)
    lp.row_lower_, lp.row_upper_ = np.concatenate(least), np.concatenate(most)
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.searchsorted(rows[ranked], np.arange(count + 1)).astype(np.int32)
    lp.a_matrix_.index_ = columns[ranked].astype(np.int32)
    lp.a_matrix_.value_ = values[ranked]
    kinds = (highspy.HighsVarType.kInteger, highspy.HighsVarType.kContinuous)
    lp.integrality_ = [kinds[address] for address in model.is_address]
    return lp


def _run_cp_sat(model: Model, time_limit: float, threads: int) -> Outcome:
    from ortools.sat.python import cp_model

    cp = cp_model.CpModel()
    columns = [cp.new_int_var(low, high, "") for low, high in zip(model.lower, model.upper, strict=True)]
    for members, values, least, most in model.rows:
        total = cp_model.LinearExpr.weighted_sum([columns[c] for c in members], values)
        if least == most and least is not None:
            cp.add(total == least)
        elif least is None and most is not None:
            cp.add(total <= most)
        else:
            raise AssertionError("every row is an equation or an upper limit")
    for now, before, stays, _ in model.keeps.tolist():
        cp.add(columns[now] == columns[before]).only_enforce_if(columns[stays])
    for a, b, x, y, order, room_a, room_b, *_ in model.orders.tolist():
        both = [columns[x], columns[y]] if x != y else [columns[x]]
        cp.add(columns[a] + room_a <= columns[b]).only_enforce_if([*both, columns[order]])
        cp.add(columns[b] + room_b <= columns[a]).only_enforce_if([*both, columns[order].negated()])
    cp.minimize(cp_model.LinearExpr.weighted_sum(columns, model.cost))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = float(time_limit)
    solver.parameters.num_workers = threads
    built = time.perf_counter()
    status = solver.solve(cp)
    if status == cp_model.INFEASIBLE:
        return "infeasible", None, 0, built
    if status == cp_model.MODEL_INVALID:
        raise AssertionError(cp.validate())
    divisor = _divisor(model)
    bound = math.ceil((solver.best_objective_bound - 1e-6) / divisor) * divisor
    if status == cp_model.UNKNOWN:
        return "unknown", None, bound, built
    found = np.array([solver.value(column) for column in columns], dtype=np.float64)
    return ("optimal" if status == cp_model.OPTIMAL else "feasible"), found, bound, built


def _plan(model: Model, values: npt.NDArray[np.float64], bound: int, solver: str, seconds: float) -> Plan:
    """The solution as a plan: steps from the binaries, addresses built anew in the order the solution has them."""

    def chosen(column: int) -> bool:
        return bool(values[column] > 0.5)

    step = [next(t for t, column in row.items() if chosen(column)) for row in model.create]
    stays: list[tuple[float, int, int, int]] = []  # address in the solution, item, first step, one past the last
    for i, item in enumerate(model.items):
        uses = {step[o] for o in item.users}
        runs: list[list[int]] = []
        for t in sorted(t for t, column in model.resident[i].items() if chosen(column)):
            if runs and t in model.kept[i] and chosen(model.kept[i][t]):
                runs[-1].append(t)
            else:
                runs.append([t])
        for run in runs:
            # Before its first use and after its last there a stay serves nothing.
            used = [t for t in run if t in uses]
            if used:
                where = values[model.address[i][used[0]]] if item.room else 0.0
                begin = run[0] if item.producer >= 0 and run[0] == step[item.producer] else used[0]
                stays.append((float(where), i, begin, used[-1] + 1))
    stays.sort()
    placed: list[tuple[int, int, int]] = []  # one past its top, first step, one past the last
    residencies = []
    for _, i, begin, end in stays:
        room = model.items[i].room
        address = max((top for top, low, high in placed if low < end and begin < high), default=0) if room else 0
        if room:
            placed.append((address + room, begin, end))
        residencies.append(Residency(model.items[i].name, begin, end, address * model.unit * model.alignment))
    residencies = _joined(residencies)
    order = tuple(model.graph.operators[o].name for o in sorted(range(model.n), key=step.__getitem__))
    return Plan(
        graph_name=model.graph.name,
        graph_digest=model.graph.digest,
        scratchpad_bytes=model.scratchpad,
        alignment=model.alignment,
        parameters=model.parameters,
        order=order,
        residencies=tuple(residencies),
        transfers=transfers_of(model.graph, order, tuple(residencies)),
        bound_bytes=bound,
        solver=f"(tensor x step) program, {solver}",
        seconds=seconds,
        graph_options=dict(model.graph.options),
    )


def _joined(residencies: list[Residency]) -> list[Residency]:
    """Join what leaves and comes back at once to the address it had: an idle move, free or not yet optimised away."""
    kept: list[Residency] = []
    for stay in sorted(residencies, key=lambda stay: (stay.tensor, stay.start)):
        last = kept[-1] if kept else None
        if last and (last.tensor, last.end, last.address) == (stay.tensor, stay.start, stay.address):
            kept[-1] = Residency(last.tensor, last.start, stay.end, last.address)
        else:
            kept.append(stay)
    return kept
