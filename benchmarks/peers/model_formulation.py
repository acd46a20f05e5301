"""MODeL's integer linear program for the least peak of memory: a peer to measure against.

Benoit Steiner, Mostafa Elhoushi, Jacob Kahn, James Hegarty, "MODeL: Memory Optimizations for Deep Learning", ICML 2023
(arXiv 2210.12924 under its earlier name OLLA; public source: github.com/facebookresearch/MODel_opt). For tensor ``e``
of size ``S_e`` and step ``t``, with binaries create ``C`` and preserve ``P``::

    min   peak
    s.t.  P_et + C_et <= 1,   P_et <= P_e,t-1 + C_e,t-1     what is there was there, or was made, a step before
          sum_t C_et = 1                                    each tensor is made once
          C_ft = C_et                                       results of one operator are made together
          C_et <= P_it                                      for each i that the operator of e reads
          sum_e S_e (C_et + P_et) <= peak

A tensor has columns only at steps between the earliest of its producer and the latest of its readers. As a courtesy to
the solvers there are as many steps as operators with one operator at each, which the formulation allows (two at a step
have all their tensors alive at once, so no schedule gains by it), so an operator's earliest and latest step follow from
how many run before and after it; the create columns belong to the operator, so that results share them; sizes are
divided by their greatest common divisor; the peak starts at the largest operator's need; and both solvers start from
the program's order. A network input is made by no operator: it may be read at the step at which it appears. HiGHS
stands for Gurobi, which the authors used and which cannot be run here; CP-SAT is given the same rows.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from benchmarks.peers.network import Network

Solver = Literal["highs", "cp-sat"]
Status = Literal["optimal", "feasible", "too large"]
MOST_COLUMNS = 400_000
"""Columns beyond which the program is not built: neither solver finishes its presolve in any budget used here."""


@dataclass(frozen=True)
class Result:
    """The order found, a proved lower bound of the peak in bytes, and the size of the program.

    ``status`` is "too large" where the program was not built; the order is the program's then, as it is where the
    solver found none better in time.
    """

    status: Status
    order: tuple[int, ...]
    bound: int
    rows: int
    columns: int
    seconds: float


def model(network: Network, *, solver: Solver = "highs", time_limit: float = 60.0, threads: int = 2) -> Result:
    """Schedule with MODeL's formulation; ``time_limit`` is the solver's, building the program comes on top.

    Raises
    ------
    ValueError
        Where ``solver`` is neither of the two.
    """
    if solver not in ("highs", "cp-sat"):
        raise ValueError(f"solver is 'highs' or 'cp-sat', not {solver!r}")
    started = time.perf_counter()
    program = tuple(range(network.n))
    size = _columns(network)
    if size > MOST_COLUMNS:
        return Result("too large", program, 0, 0, size, time.perf_counter() - started)
    built = _Program(network)
    run = _run_highs if solver == "highs" else _run_cp_sat
    values, bound, proved = run(built, time_limit, threads)
    order = program if values is None else built.order(values)
    return Result(
        "optimal" if proved else "feasible",
        order,
        bound * built.unit,
        len(built.rows),
        len(built.upper),
        time.perf_counter() - started,
    )


def _windows(network: Network) -> tuple[list[int], list[int]]:
    """The earliest and the latest step of each operator."""
    before = [0] * network.n
    for o in range(network.n):
        for p in network.predecessors[o]:
            before[o] |= before[p] | 1 << p
    behind = [0] * network.n
    for o in range(network.n - 1, -1, -1):
        for s in network.successors[o]:
            behind[o] |= behind[s] | 1 << s
    return [m.bit_count() for m in before], [network.n - 1 - m.bit_count() for m in behind]


def _spans(network: Network) -> dict[int, tuple[int, int]]:
    """First and last step at which each tensor that somebody reads can be alive."""
    earliest, latest = _windows(network)
    spans = {}
    for t, readers in enumerate(network.readers):
        if readers and network.sizes[t]:
            maker = network.producer[t]
            first = earliest[maker] if maker >= 0 else min(earliest[r] for r in readers)
            spans[t] = (first, max(latest[r] for r in readers))
    return spans


def _columns(network: Network) -> int:
    earliest, latest = _windows(network)
    return sum(b - a + 1 for a, b in zip(earliest, latest, strict=True)) + sum(
        b - a + 1 for a, b in _spans(network).values()
    )


class _Program:
    """Columns and rows for either solver; a row is columns, coefficients, least and most."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.unit = math.gcd(*network.sizes) or 1
        self.lower: list[int] = []
        self.upper: list[int] = []
        self.rows: list[tuple[list[int], list[int], int | None, int | None]] = []
        earliest, latest = _windows(network)
        need = [
            sum(network.sizes[t] for t in (*network.inputs[o], *network.outputs[o])) // self.unit
            for o in range(network.n)
        ]
        self.start = network.peak(range(network.n)) // self.unit
        self.peak = self._column(max(need), self.start)
        #: create, by operator and step
        self.create = [{t: self._column(0, 1) for t in range(earliest[o], latest[o] + 1)} for o in range(network.n)]
        steps: list[list[int]] = [[] for _ in range(network.n)]
        for row in self.create:
            self._row(row.values(), least=1, most=1)
            for t, column in row.items():
                steps[t].append(column)
        for columns in steps:
            self._row(columns, least=1, most=1)
        alive: list[dict[int, int]] = [{} for _ in range(network.n)]
        #: preserve and, of a network input, appear; by tensor and step
        self.preserve: dict[int, dict[int, int]] = {}
        self.appear: dict[int, dict[int, int]] = {}
        for tensor, (first, last) in _spans(network).items():
            self._tensor(tensor, first, last, alive)
        for tensor in range(len(network.sizes)):
            self._short_lived(tensor, alive)
        for row in alive:
            columns = [*row, self.peak]
            self.rows.append((columns, [*row.values(), -1], None, 0))

    def _column(self, lower: int, upper: int) -> int:
        self.lower.append(lower)
        self.upper.append(upper)
        return len(self.upper) - 1

    def _row(
        self, plus: Iterable[int], minus: Iterable[int] = (), *, least: int | None = None, most: int | None = None
    ) -> None:
        columns = [*plus]
        ones = [1] * len(columns)
        columns += minus
        self.rows.append((columns, ones + [-1] * (len(columns) - len(ones)), least, most))

    def _tensor(self, tensor: int, first: int, last: int, alive: list[dict[int, int]]) -> None:
        network = self.network
        maker = network.producer[tensor]
        keep = {t: self._column(0, 1) for t in range(first + 1, last + 1)}
        if maker >= 0:
            create = self.create[maker]
        else:
            create = {t: self._column(0, 1) for t in range(first, last + 1)}
            self.appear[tensor] = create
            self._row(create.values(), least=1, most=1)
        self.preserve[tensor] = keep
        for t in range(first, last + 1):
            made = [create[t]] if t in create else []
            if t in keep:
                before = [keep[t - 1]] if t - 1 in keep else []
                before += [create[t - 1]] if t - 1 in create else []
                self._row([keep[t]], before, most=0)
                self._row([keep[t], *made], most=1)
            for reader in network.readers[tensor]:
                if t in self.create[reader]:
                    there = [keep[t]] if t in keep else []
                    self._row([self.create[reader][t]], there + (made if maker < 0 else []), most=0)
            for column in (*made, *([keep[t]] if t in keep else [])):
                alive[t][column] = alive[t].get(column, 0) + network.sizes[tensor] // self.unit

    def _short_lived(self, tensor: int, alive: list[dict[int, int]]) -> None:
        """What nobody reads is alive while it is made."""
        maker = self.network.producer[tensor]
        if maker >= 0 and not self.network.readers[tensor]:
            for t, column in self.create[maker].items():
                alive[t][column] = alive[t].get(column, 0) + self.network.sizes[tensor] // self.unit

    def hint(self) -> list[int]:
        """The program's order as values of all columns."""
        values = [0] * len(self.upper)
        values[self.peak] = self.start
        for o, row in enumerate(self.create):
            values[row[o]] = 1
        for tensor, keep in self.preserve.items():
            readers = self.network.readers[tensor]
            maker = self.network.producer[tensor]
            first = maker if maker >= 0 else min(readers)
            if maker < 0:
                values[self.appear[tensor][first]] = 1
            for t in range(first + 1, max(readers) + 1):
                values[keep[t]] = 1
        return values

    def order(self, values: np.ndarray[Any, Any] | list[int]) -> tuple[int, ...]:
        step = [next(t for t, column in row.items() if values[column] > 0.5) for row in self.create]
        return tuple(sorted(range(self.network.n), key=step.__getitem__))


# Column values, lower bound in units, and whether it is met.
Outcome = tuple[Any, int, bool]


def _run_highs(program: _Program, time_limit: float, threads: int) -> Outcome:
    highspy: Any = importlib.import_module("highspy")
    infinity = highspy.kHighsInf
    solver = highspy.Highs()
    solver.silent()
    # The number of threads of an earlier run in this process would stay otherwise.
    highspy.Highs.resetGlobalScheduler(True)
    solver.setOptionValue("threads", threads)
    solver.setOptionValue("time_limit", float(time_limit))
    solver.setOptionValue("mip_rel_gap", 0.0)
    # Peaks are whole numbers, so any gap below one is none.
    solver.setOptionValue("mip_abs_gap", 0.99)
    lp = highspy.HighsLp()
    lp.num_col_, lp.num_row_ = len(program.upper), len(program.rows)
    lp.col_cost_ = np.eye(1, lp.num_col_, program.peak)[0]
    lp.col_lower_, lp.col_upper_ = np.array(program.lower, float), np.array(program.upper, float)
    lp.row_lower_ = np.array([-infinity if low is None else low for *_, low, _ in program.rows], float)
    lp.row_upper_ = np.array([infinity if high is None else high for *_, high in program.rows], float)
    lp.integrality_ = [highspy.HighsVarType.kInteger] * lp.num_col_
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.cumsum([0, *(len(columns) for columns, *_ in program.rows)], dtype=np.int32)
    lp.a_matrix_.index_ = np.array([c for columns, *_ in program.rows for c in columns], np.int32)
    lp.a_matrix_.value_ = np.array([v for _, values, *_ in program.rows for v in values], float)
    if solver.passModel(lp) != highspy.HighsStatus.kOk:
        raise AssertionError("HiGHS refuses the program")
    start = highspy.HighsSolution()
    start.col_value = [float(value) for value in program.hint()]
    solver.setSolution(start)
    solver.run()
    info = solver.getInfo()
    bound = info.mip_dual_bound
    # What the relaxation's arithmetic may be off by must not round up.
    whole = math.ceil(bound - 1e-4 - 1e-7 * abs(bound)) if math.isfinite(bound) else 0
    found = info.primal_solution_status == highspy.SolutionStatus.kSolutionStatusFeasible
    values = np.array(solver.getSolution().col_value) if found else None
    proved = solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    return values, max(whole, program.lower[program.peak]), proved


def _run_cp_sat(program: _Program, time_limit: float, threads: int) -> Outcome:
    cp_model: Any = importlib.import_module("ortools.sat.python.cp_model")
    made = cp_model.CpModel()
    columns = [made.new_int_var(a, b, "") for a, b in zip(program.lower, program.upper, strict=True)]
    for row, coefficients, low, high in program.rows:
        total = cp_model.LinearExpr.weighted_sum([columns[c] for c in row], coefficients)
        # An open side is one that no values reach.
        reach = sum(abs(v) * program.upper[c] for c, v in zip(row, coefficients, strict=True))
        made.add_linear_constraint(total, -reach if low is None else low, reach if high is None else high)
    made.minimize(columns[program.peak])
    for column, value in zip(columns, program.hint(), strict=True):
        made.add_hint(column, value)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit
    solver.parameters.num_workers = threads
    status = solver.solve(made)
    found = status in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    values = [solver.value(column) for column in columns] if found else None
    bound = math.ceil(solver.best_objective_bound - 1e-6)
    return values, max(bound, program.lower[program.peak]), status == cp_model.OPTIMAL
