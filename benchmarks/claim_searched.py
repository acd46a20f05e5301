"""COSMA on networks that an architecture search made: where the paper stops at a heuristic, proofs.

Four networks, three budgets, activations alone and with parameters. Every plan is verified, and the same network in
32-bit floats, whose tensors are four times as large, is planned for four times the scratchpad and run inside one arena
of that many bytes: its traffic must be four times that of the 8-bit plan and its outputs those of the network.

    retensor claims searched
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.claim_cosma import BUDGETS, PAPER, PLACEMENTS

from retensor.claims import Claim, Report, Table
from retensor.graph import Graph, load
from retensor.graph.networks import SEARCHED_NETWORKS
from retensor.planning import (
    BASELINES,
    Accelerator,
    Plan,
    baseline,
    bounds,
    divide_and_conquer,
    execute,
    plan,
    verify,
)
from retensor.planning.baselines import Placement

TIME_LIMIT = 120.0
ENOUGH = 0.85
"""What the paper says is removed of the baselines' bytes."""
FLOAT = 4
"""Bytes of a 32-bit float for one of the 8-bit plan."""


@dataclass(frozen=True)
class Row:
    """One network, setting and budget."""

    network: str
    operators: int
    parameters: bool
    budget: str
    plan: Plan
    seconds: float
    heuristic: int
    heuristic_seconds: float
    baselines: dict[Placement, list[int]]
    runs_bit_equal: bool

    @property
    def mean(self) -> float:
        return statistics.mean(value for values in self.baselines.values() for value in values)

    @property
    def reduction(self) -> float:
        return 1 - self.plan.non_compulsory_bytes / self.mean


def rows_of(network: str, budgets: tuple[str, ...] = BUDGETS, run: bool = True) -> Iterator[Row]:
    graph = load(network, dtype="int8")
    for parameters in (False, True):
        found = bounds(graph, parameters=parameters)
        for budget in budgets:
            accelerator = Accelerator({"M_R": found.m_r, "M_H": found.m_h, "M_P": found.m_p}[budget])
            started = time.perf_counter()
            ours = plan(graph, accelerator, parameters=parameters, time_limit=TIME_LIMIT)
            seconds = time.perf_counter() - started
            _verified(graph, ours)
            started = time.perf_counter()
            divided = divide_and_conquer(graph, accelerator, parameters=parameters, time_limit=TIME_LIMIT)
            divided_seconds = time.perf_counter() - started
            theirs: dict[Placement, list[int]] = {
                placement: [
                    _verified(
                        graph,
                        baseline(
                            graph, accelerator, schedule=schedule, replacement=replacement, placement=placement,
                            parameters=parameters, order=found.order,
                        ),
                    )
                    for schedule, replacement in BASELINES
                ]
                for placement in PLACEMENTS
            }  # fmt: skip
            runs = run and _runs(network, ours)
            yield Row(
                network,
                len(graph.operators),
                parameters,
                budget,
                ours,
                seconds,
                _verified(graph, divided),
                divided_seconds,
                theirs,
                runs,
            )


def _verified(graph: Graph, made: Plan) -> int:
    counted = verify(graph, made).non_compulsory_bytes
    if counted != made.non_compulsory_bytes:
        raise AssertionError(f"{graph.name}: the verifier counts other bytes")
    return counted


def _runs(network: str, eight_bit: Plan) -> bool:
    """Whether the same network in floats, planned alike, gives its plain outputs bit for bit."""
    graph = load(network)
    accelerator = Accelerator(FLOAT * eight_bit.scratchpad_bytes, alignment=FLOAT)
    made = plan(graph, accelerator, parameters=eight_bit.parameters, time_limit=TIME_LIMIT)
    if made.non_compulsory_bytes != FLOAT * eight_bit.non_compulsory_bytes:
        raise AssertionError(f"{network}: the plan for floats is not that for 8 bits")
    return execute(graph, made).bit_equal


def measure(progress: Callable[[str], None]) -> Report:
    rows = []
    for network in SEARCHED_NETWORKS:
        progress(network)
        rows += rows_of(network)
    # Budgets that are the same bytes are one case, not three.
    cases = {(row.network, row.parameters, row.plan.scratchpad_bytes): row for row in rows}
    costly = [row for row in cases.values() if row.mean]
    reduction = statistics.mean(row.reduction for row in costly)
    halves = [statistics.mean(row.reduction for row in costly if row.parameters == p) for p in (False, True)]
    enough = [row for row in costly if row.reduction >= ENOUGH]
    short = [row for row in costly if row.reduction < ENOUGH]
    proved = sum(row.plan.status == "optimal" for row in rows)
    gap = max(row.plan.gap for row in rows)
    slowest = max(rows, key=lambda row: row.seconds)
    peak = [row.plan.non_compulsory_bytes for row in rows if row.budget == "M_P"]
    below = sum(row.plan.non_compulsory_bytes < row.heuristic for row in rows)
    above = sum(row.plan.non_compulsory_bytes > row.heuristic for row in rows)
    setting = "PNASNet-5, NASNet-A, AmoebaNet-D, DARTS; three budgets, activations alone and with parameters"
    claims = [
        Claim(
            "For searched networks the divide-and-conquer heuristic removes on average 85 % of the accesses of the "
            "other schemes, in about two minutes.",
            setting,
            "mean of the four baselines in both placements, where it is above 0",
            "85 %, about two minutes",
            f"{reduction:.1%} over the {len(costly)} scratchpads where baselines have traffic ({halves[0]:.1%} "
            f"activations alone, {halves[1]:.1%} with parameters), by proved plans, which the heuristic meets in "
            f"{len(rows) - below} of {len(rows)} rows; it takes "
            f"{statistics.median(row.heuristic_seconds for row in rows):.1f} s at the median, "
            f"{max(row.heuristic_seconds for row in rows):.1f} s at most",
            "held" if reduction >= ENOUGH else "partly held" if reduction > 0.5 else "not held",
            "" if reduction >= ENOUGH else f"{proved} of {len(rows)} plans are proved optimal: no plan removes more",
        ),
        Claim(
            "(ours) Each plan of a searched network lies at least 85 % below the mean of the baselines with traffic.",
            setting,
            "mean of the four baselines in both placements, where it is above 0",
            "85 % on average",
            f"{len(enough)} of {len(costly)} scratchpads; the others "
            + ", ".join(
                f"{row.network} {'with parameters ' if row.parameters else ''}{row.budget} {row.reduction:.0%}"
                for row in short
            ),
            "held" if not short else "partly held",
            f"{sum(row.plan.status == 'optimal' for row in short)} of the {len(short)} others are proved optimal: no "
            "plan lies lower",
        ),
        Claim(
            "(ours) Searched networks are planned with proof, within two minutes.",
            f"{setting}; {TIME_LIMIT:.0f} s each, all cores of this machine",
            "the paper's divide-and-conquer heuristic, written here (retensor.planning.divide)",
            "no proof",
            f"{proved} of {len(rows)} proved optimal, largest gap {gap:.1%}; median "
            f"{statistics.median(row.seconds for row in rows):.1f} s, longest {slowest.seconds:.1f} s "
            f"({slowest.network}, {slowest.budget}); below the heuristic in {below}, above in {above} rows",
            "held" if gap <= 0.05 and not above else "partly held",
        ),
        Claim(
            "(ours) At M_P searched networks need no traffic either, and every plan runs.",
            f"{setting}; run in 32-bit floats inside one arena",
            "the network run plainly",
            "no figure",
            f"0 bytes in {sum(not value for value in peak)} of {len(peak)} rows at M_P; bit-equal outputs in "
            f"{sum(row.runs_bit_equal for row in rows)} of {len(rows)} rows",
            "held" if not any(peak) and all(row.runs_bit_equal for row in rows) else "partly held",
        ),
    ]
    return Report(
        "searched", "COSMA on searched networks", PAPER, claims, [_table(rows)], ("ortools", "numba", "torch")
    )


def _table(rows: list[Row]) -> Table:
    names = [f"{schedule}, {replacement}" for schedule, replacement in BASELINES]
    return Table(
        "Searched networks: non-compulsory bytes, 8-bit tensors",
        [
            "Network", "Operators", "Setting", "Budget", "Scratchpad", "COSMA", "Bound", "Seconds",
            "Divide and conquer", "Divide and conquer, seconds",
            *(f"{name} ({placement})" for placement in PLACEMENTS for name in names),
            "Below their mean", "Runs bit-equal",
        ],
        [
            [
                row.network,
                row.operators,
                "with parameters" if row.parameters else "activations",
                row.budget,
                row.plan.scratchpad_bytes,
                row.plan.non_compulsory_bytes,
                row.plan.bound_bytes,
                round(row.seconds, 3),
                row.heuristic,
                round(row.heuristic_seconds, 3),
                *row.baselines["online"],
                *row.baselines["arena"],
                f"{row.reduction:.1%}" if row.mean else "none has traffic",
                "yes" if row.runs_bit_equal else "no",
            ]
            for row in rows
        ],
    )  # fmt: skip
