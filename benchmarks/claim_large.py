"""Large graphs: what a plan of thousands of operators takes in seconds and bytes, how far it is from its bound.

Real networks of one to four thousand operators (:mod:`benchmarks.networks_large`) and synthetic graphs of one to
twenty thousand (:mod:`benchmarks.synthetic`), each in a process of its own, so that its peak memory is its own. Every
plan is checked by the independent verifier. ``make pictures`` draws the growth curve from the results.

    retensor claims large
"""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from retensor.claims import Claim, Report, Table
from retensor.graph import Graph
from retensor.planning import Accelerator, Progress, baseline, plan, verify

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "large.json"
NETWORKS = ("resnet_training", "decoder", "unet", "decoder_training")
NETWORK_LIMIT = 60.0
FAMILIES = ("layered", "cells")
SIZES = (1_000, 2_000, 5_000, 10_000, 20_000)
SECONDS_AN_OPERATOR = 0.009
"""Time limit of the synthetic graphs: three minutes for 20,000 operators."""
GOOD = 0.3
"""A plan is good once it moves at most this part of Belady's bytes."""
FITTED = 2_000
"""Operators from which the growth is fitted: what smaller graphs take is mostly the start."""
MINUTES, GIBIBYTES = 5, 4
TITLE = "Planning and verifying synthetic graphs at M_R"
SYNTHETIC = "Synthetic graphs"


@dataclass(frozen=True)
class Row:
    """One graph, planned at M_R.

    ``good`` is the seconds until the plan was good (see ``GOOD``; the whole call where it never was), ``seconds`` the
    whole call.
    """

    source: str
    operators: int
    tensors: int
    scratchpad: int
    belady: int
    cost: int
    bound: int
    first: float
    good: float
    seconds: float
    verifying: float
    memory: int

    @property
    def gap(self) -> float:
        return (self.cost - self.bound) / self.cost if self.cost else 0.0


def made(source: str, operators: int) -> Graph:
    """A graph by the name of the function that makes it; ``operators`` of synthetic ones."""
    from benchmarks import networks_large, synthetic

    graph: Graph = getattr(synthetic, source)(operators) if operators else getattr(networks_large, source)()
    return graph


def peak_memory() -> int:
    """The most bytes this process has held in memory since it was started."""
    status = Path("/proc/self/status")
    if status.exists():
        # ``ru_maxrss`` survives ``exec``: a process started by a large one would report the other's size.
        held = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(held.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def row_of(source: str, operators: int, limit: float) -> Row:
    """Plan and verify one graph in this process."""
    graph = made(source, operators)
    accelerator = Accelerator("M_R")
    # What is compiled once on a machine, and imported once in a process, is no part of the growth.
    plan(made("layered", 200), accelerator, time_limit=3)
    seen: list[tuple[float, int]] = []

    def note(report: Progress) -> None:
        if report.incumbent is not None:
            seen.append((report.seconds, report.incumbent))

    begun = time.perf_counter()
    found = plan(graph, accelerator, time_limit=limit, progress=note)
    planned = time.perf_counter()
    counted = verify(graph, found).non_compulsory_bytes
    verified = time.perf_counter()
    if counted != found.non_compulsory_bytes:
        raise AssertionError(f"{source}: the verifier counts other bytes")
    memory = peak_memory()
    belady = baseline(graph, accelerator, placement="online").non_compulsory_bytes
    good = min((seconds for seconds, cost in seen if cost <= GOOD * belady), default=planned - begun)
    first = seen[0][0] if seen else planned - begun
    return Row(
        source, len(graph.operators), len(graph.tensors), found.scratchpad_bytes, belady, counted, found.bound_bytes,
        first, good, planned - begun, verified - planned, memory,
    )  # fmt: skip


def apart(source: str, operators: int, limit: float) -> Row:
    """The row of one graph, from a process of its own."""
    code = (
        f"import json, dataclasses; from benchmarks.claim_large import row_of; "
        f"print('row', json.dumps(dataclasses.asdict(row_of({source!r}, {operators}, {limit}))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("row ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{source}, {operators} operators: {done.stderr[-2000:]}")
    return Row(**json.loads(lines[0].removeprefix("row ")))


def exponent(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    """Slope of a straight line through the logarithms, from ``FITTED`` on: 1 where a value grows with the operators."""
    points = [(math.log(row.operators), math.log(max(value(row), 1e-3))) for row in rows if row.operators >= FITTED]
    x, y = (sum(point[k] for point in points) / len(points) for k in (0, 1))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def measure(progress: Callable[[str], None]) -> Report:
    networks, synthetic = [], []
    for name in NETWORKS:
        progress(name)
        networks.append(apart(name, 0, NETWORK_LIMIT))
    for family in FAMILIES:
        for size in SIZES:
            progress(f"{family}, {size:,} operators")
            synthetic.append(apart(family, size, SECONDS_AN_OPERATOR * size))
    return Report(
        "large",
        "COSMA: large graphs",
        "Not in the paper (arXiv 2311.18246), whose largest networks have under a thousand operators.",
        [_largest(synthetic), _growth(synthetic), _gaps(networks)],
        [_table("Networks", networks), _table(SYNTHETIC, synthetic)],
        ("ortools", "numba", "torch", "numpy"),
    )


def _largest(rows: Sequence[Row]) -> Claim:
    largest = [row for row in rows if row.operators == max(SIZES)]
    held = all(
        row.seconds + row.verifying < 60 * MINUTES and row.memory < GIBIBYTES * 2**30 for row in largest
    )  # fmt: skip
    parts = [
        f"{row.source}: {row.seconds:.0f} s and {row.verifying:.1f} s, {row.memory / 2**30:.2f} GiB, "
        f"{1 - row.cost / row.belady:.0%} fewer bytes than Belady's, gap {row.gap:.0%}"
        for row in largest
    ]
    return Claim(
        f"(ours) {max(SIZES):,} operators are planned and verified in under {MINUTES} minutes and {GIBIBYTES} GiB.",
        f"synthetic graphs, M_R, time limit {SECONDS_AN_OPERATOR * max(SIZES):.0f} s",
        "none",
        "no figure",
        "; ".join(parts),
        "held" if held else "not held",
        "how much of the gap of wide random graphs is the bound's and how much the plan's is open",
    )


def _growth(rows: Sequence[Row]) -> Claim:
    """Both halves are needed: a limit in proportion to the operators bounds the time, and then bytes would suffer."""
    parts, held = [], True
    for family in FAMILIES:
        mine = [row for row in rows if row.source == family]
        good, verifying, memory = (
            exponent(mine, lambda row, field=field: asdict(row)[field]) for field in ("good", "verifying", "memory")
        )
        small, large = (row.cost / row.belady for row in (next(r for r in mine if r.operators == FITTED), mine[-1]))
        held = held and max(good, verifying, memory) <= 1.2 and large <= 1.2 * small
        parts.append(
            f"{family}: {good:.2f} (verifying {verifying:.2f}, memory {memory:.2f}), {large:.0%} of Belady's bytes at "
            f"{mine[-1].operators:,} operators, {small:.0%} at {FITTED:,}"
        )
    return Claim(
        "(ours) In time and memory near-linear in the operators, plans stay as good.",
        f"{FITTED:,} to {max(SIZES):,} operators, time limit in proportion; seconds until the bytes are at most "
        f"{GOOD:.0%} of Belady's",
        "an exponent of 1 is linear growth; Belady's replacement, placed as the steps come",
        "no figure",
        "exponents: " + "; ".join(parts),
        "held" if held else "not held",
        "" if held else "an exponent is above 1.2, or the larger plans are more than a fifth worse",
    )


def _gaps(rows: Sequence[Row]) -> Claim:
    return Claim(
        "(ours) Large networks get a plan with a bound close to it.",
        f"operator by operator, 8 bits, activations alone, M_R, {NETWORK_LIMIT:.0f} s",
        "the proved lower bound",
        "no figure",
        "; ".join(f"{row.source.replace('_', ' ')} ({row.operators:,} operators): gap {row.gap:.1%}" for row in rows),
        "held" if all(row.gap <= 0.05 for row in rows) else "partly held",
        "" if all(row.gap <= 0.05 for row in rows) else "a gap above 5 % on some",
    )


def _table(title: str, rows: Sequence[Row]) -> Table:
    return Table(
        f"{title}: M_R, activations alone",
        [
            "Graph", "Operators", "Tensors", "Scratchpad", "Belady, as the steps come", "COSMA", "Bound", "Gap",
            "First plan, s", "Good plan, s", "Planning, s", "Verifying, s", "Peak memory, MiB",
        ],
        [
            [
                row.source, row.operators, row.tensors, row.scratchpad, row.belady, row.cost, row.bound,
                f"{row.gap:.1%}", round(row.first, 2), round(row.good, 2), round(row.seconds, 1),
                round(row.verifying, 3), round(row.memory / 2**20),
            ]
            for row in rows
        ],
    )  # fmt: skip


def measured(results: Path = RESULTS) -> list[Row]:
    """The rows of the synthetic graphs, as the results of the claim hold them."""
    tables = json.loads(results.read_text())["tables"]
    table = next(table for table in tables if table["title"].startswith(SYNTHETIC))
    rows = []
    for *counts, _gap, first, good, seconds, verifying, mebibytes in table["rows"]:
        rows.append(Row(*counts, first, good, seconds, verifying, mebibytes * 2**20))
    return rows


def draw(rows: Sequence[Row], folder: Path) -> None:
    """The growth curve, for a light and a dark page: seconds and memory against operators."""
    import matplotlib
    from matplotlib.figure import Figure

    from retensor.planning.drawing import INK, save, style

    for dark in (False, True):
        ink = INK[dark]
        with matplotlib.rc_context(style()):
            figure = Figure(figsize=(12, 5.4), dpi=100, facecolor=ink["page"])
            figure.text(0.03, 0.93, TITLE, color=ink["label"], fontsize=15)
            for place, what in ((0.07, "seconds"), (0.58, "memory")):
                axes = figure.add_axes((place, 0.13, 0.39, 0.68), facecolor=ink["page"])
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.grid(color=ink["line"], linewidth=0.8)
                axes.tick_params(colors=ink["muted"], which="both")
                for spine in axes.spines.values():
                    spine.set_color(ink["line"])
                axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
                axes.minorticks_off()
                axes.set_xlabel("operators", color=ink["muted"])
                if what == "seconds":
                    _draw_seconds(axes, rows, ink)
                else:
                    _draw_memory(axes, rows, ink)
                axes.legend(frameon=False, labelcolor=ink["ink"], fontsize=9, loc="upper left")
            save(figure, folder / f"growth-large{'-dark' if dark else ''}.svg", "svg", TITLE)


def _draw_seconds(axes, rows, ink) -> None:  # type: ignore[no-untyped-def]
    axes.set_title("seconds", color=ink["label"], loc="left", fontsize=11)
    kinds = (("good", "to a good plan", "o-"), ("first", "to a first plan", "s--"), ("verifying", "to verify it", "^:"))
    for family, colour in zip(FAMILIES, (ink["operands"], ink["retrieve"]), strict=True):
        mine = [row for row in rows if row.source == family]
        for field, label, mark in kinds:
            values = [max(asdict(row)[field], 1e-3) for row in mine]
            counts = [row.operators for row in mine]
            axes.plot(counts, values, mark, color=colour, label=f"{family}: {label}", markersize=5)
    axes.set_ylim(top=axes.get_ylim()[1] * 30)


def _draw_memory(axes, rows, ink) -> None:  # type: ignore[no-untyped-def]
    axes.set_title("peak memory, MiB", color=ink["label"], loc="left", fontsize=11)
    for family, colour in zip(FAMILIES, (ink["operands"], ink["retrieve"]), strict=True):
        mine = [row for row in rows if row.source == family]
        values = [row.memory / 2**20 for row in mine]
        axes.plot([row.operators for row in mine], values, "o-", color=colour, label=family, markersize=5)
    axes.axhline(GIBIBYTES * 1024, color=ink["spill"], linewidth=1, linestyle="--", label=f"{GIBIBYTES} GiB")
    axes.set_yticks([256, 512, 1024, 2048, 4096], ["256", "512", "1,024", "2,048", "4,096"])
    axes.set_ylim(128, 16_384)
