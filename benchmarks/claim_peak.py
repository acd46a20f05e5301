"""Least peaks against published schedulers: HMCOS, MODeL's formulation, and what Inductor and XLA sort by.

Every order, ours too, is counted by the same function, which shares no code with the planner
(:meth:`benchmarks.peers.network.Network.peak`). Networks are those of COSMA's paper, ten designed and four searched,
three randomly wired ones and six of other shapes, 8-bit, activations alone, convolutions merged with what follows.

    retensor claims peak
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.peers.hmcos import OutOfTimeError, hmcos
from benchmarks.peers.memory_aware_sort import inductor, xla
from benchmarks.peers.model_formulation import Solver, model
from benchmarks.peers.network import Network
from benchmarks.random_cells import celled_graph
from benchmarks.randwire import randwire

from retensor.claims import Claim, Report, Table, Verdict
from retensor.graph import Graph, load
from retensor.graph.networks import PAPER_NETWORKS, SEARCHED_NETWORKS
from retensor.planning import Bounds, bounds

PAPER = (
    "Zihan Wang and others: Hierarchical Memory-Constrained Operator Scheduling of Neural Architecture Search "
    "Networks (HMCOS), DAC 2022. Benoit Steiner and others: MODeL: Memory Optimizations for Deep Learning, ICML 2023, "
    "arXiv 2210.12924. Memory-aware sorts of PyTorch Inductor and XLA."
)
OTHERS = {
    "Inception-v3": "torchvision:inception_v3",
    "Inception-v4": "timm:inception_v4",
    "HRNet-W18": "timm:hrnet_w18",
    "DLA-60": "timm:dla60",
    "Swin-T": "torchvision:swin_t",
    "XCiT-N12": "timm:xcit_nano_12_p8_224",
}
SEEDS = (0, 1, 2)
OUR_LIMIT = 20.0
HMCOS_LIMIT = 120.0
MODEL_LIMIT = 20.0
SOLVERS: tuple[Solver, ...] = ("highs", "cp-sat")
THREADS = 2
CELLED = 200
SORTS = {"Inductor": inductor, "XLA": xla}
FINISHED = ("finished", "optimal", "heuristic")
"""What a peer says of itself where its order is what it would give with more time too."""
PEERS = ("HMCOS", *(f"MODeL, {solver}" for solver in SOLVERS), *SORTS)


@dataclass(frozen=True)
class Measured:
    """Bytes of a peer's order (None: it found none in time), seconds, and what it says of itself."""

    peak: int | None
    seconds: float
    status: str


@dataclass(frozen=True)
class Row:
    """One network: our least peak and each peer's."""

    network: str
    operators: int
    program: int
    ours: int
    found: Bounds
    peers: dict[str, Measured]

    @property
    def proved(self) -> bool:
        return self.found.m_p == self.found.m_p_bound

    def compared(self) -> Iterator[tuple[str, int]]:
        """Peers that found an order, with its peak."""
        return ((name, peer.peak) for name, peer in self.peers.items() if peer.peak is not None)


def row_of(name: str, graph: Graph) -> Row:
    network = Network(graph)
    found = bounds(graph, time_limit=OUR_LIMIT)
    position = {operator.name: i for i, operator in enumerate(graph.operators)}
    ours = network.peak([position[operator] for operator in found.order])
    if ours != found.m_p:
        raise AssertionError(f"{name}: the recount of our order is {ours}, not {found.m_p}")
    peers = {"HMCOS": _hmcos(network)}
    for solver in SOLVERS:
        result = model(network, solver=solver, time_limit=MODEL_LIMIT, threads=THREADS)
        peak = None if result.status == "too large" else network.peak(result.order)
        if result.status == "optimal" and peak != result.bound:
            raise AssertionError(f"{name}: {solver} proves {result.bound}, but its order has {peak}")
        if result.status == "optimal" and found.m_p_bound > result.bound:
            raise AssertionError(f"{name}: {solver} proves {result.bound} below our bound {found.m_p_bound}")
        peers[f"MODeL, {solver}"] = Measured(peak, result.seconds, result.status)
    for sort, run in SORTS.items():
        started = time.perf_counter()
        order = run(network)
        peers[sort] = Measured(network.peak(order), time.perf_counter() - started, "heuristic")
    return Row(name, network.n, network.peak(range(network.n)), ours, found, peers)


def _hmcos(network: Network) -> Measured:
    started = time.perf_counter()
    try:
        result = hmcos(network, time_limit=HMCOS_LIMIT)
    except OutOfTimeError:
        return Measured(None, time.perf_counter() - started, "out of time")
    return Measured(network.peak(result.order), result.seconds, "finished" if result.finished else "out of time")


def graphs() -> Iterator[tuple[str, Graph]]:
    for name in (*SEARCHED_NETWORKS, *PAPER_NETWORKS):
        yield name, load(name, dtype="int8")
    for seed in SEEDS:
        yield f"RandWire {seed}", randwire(seed)
    for name, source in OTHERS.items():
        yield name, load(source, dtype="int8")


def measure(progress: Callable[[str], None]) -> Report:
    rows = []
    for name, graph in graphs():
        progress(f"{name}, {len(graph.operators)} operators")
        rows.append(row_of(name, graph))
    libraries = ("ortools", "highspy", "torch", "torchvision", "timm", "numpy")
    progress(f"{CELLED} random networks of cells")
    claims = [_never_above(rows), _proved(rows), _cells()]
    return Report("peak", "Least peak: schedules of least memory", PAPER, claims, [_table(rows)], libraries)


def _verdict(held: bool, partly: bool) -> Verdict:
    return "held" if held else "partly held" if partly else "not held"


def _never_above(rows: list[Row]) -> Claim:
    parts = []
    above = below = 0
    for peer in PEERS:
        pairs = [(row.ours, row.peers[peer]) for row in rows]
        more = sum(peak.peak is not None and ours > peak.peak for ours, peak in pairs)
        done = [(ours, peak.peak) for ours, peak in pairs if peak.peak is not None and peak.status in FINISHED]
        less = [theirs / ours for ours, theirs in done if ours < theirs]
        above, below = above + more, below + len(less)
        text = f"{peer}: ours below on {len(less)} of the {len(done)} it finishes"
        if less:
            text += f" (theirs up to {max(less):.2f} times ours)"
        if len(done) < len(rows):
            text += f", {len(rows) - len(done)} not finished in time and not counted"
        if more:
            text += f", above on {more}"
        parts.append(text)
    return Claim(
        "(ours) Schedules of least peak never above, and somewhere below, those of the published schedulers.",
        f"{len(rows)} networks, activations alone, merged; {OUR_LIMIT:.0f} s for ours, {HMCOS_LIMIT:.0f} s for HMCOS, "
        f"{MODEL_LIMIT:.0f} s for each solver of MODeL's program from the program's order, {THREADS} threads; "
        "sorts without limit",
        "HMCOS and MODeL's program, written here; Inductor's and XLA's best of three sorts each",
        "no figure",
        "; ".join(parts),
        _verdict(not above and below > 0, below > above),
        "" if not above else "some peer found an order of a lower peak",
    )


def _proved(rows: list[Row]) -> Claim:
    proved = sum(row.proved for row in rows)
    slowest = max(rows, key=lambda row: row.found.seconds)
    theirs = [
        f"MODeL, {solver}: {sum(row.peers[f'MODeL, {solver}'].status == 'optimal' for row in rows)}"
        for solver in SOLVERS
    ]
    return Claim(
        "(ours) The least peak is proved.",
        f"{len(rows)} networks, activations alone, merged; within {OUR_LIMIT:.0f} s",
        "MODeL's formulation, which proves optima too",
        "no figure",
        f"{proved} of {len(rows)} proved, longest {slowest.found.seconds:.1f} s ({slowest.network}); "
        + ", ".join(theirs),
        _verdict(proved == len(rows), proved > 0),
    )


def _cells() -> Claim:
    """Where HMCOS finishes every time: is it ever above?"""
    finders: dict[str, Callable[[Network], tuple[int, ...]]] = {"HMCOS": lambda n: hmcos(n).order, **SORTS}
    ratios: dict[str, list[float]] = {name: [] for name in finders}
    proved = 0
    for seed in range(CELLED):
        network = Network(celled_graph(random.Random(seed), 2 + seed % 4))
        found = bounds(network.graph, time_limit=OUR_LIMIT)
        proved += found.m_p == found.m_p_bound
        for name, finder in finders.items():
            ratios[name].append(network.peak(finder(network)) / found.m_p)
    parts = [
        f"{name}: ours below on {sum(r > 1 for r in row)} (theirs up to {max(row):.2f} times ours), "
        f"above on {sum(r < 1 for r in row)}"
        for name, row in ratios.items()
    ]
    return Claim(
        "(ours) Schedules of least peak never above, and somewhere below, those of the published schedulers.",
        f"{CELLED} random networks of two to five cells (benchmarks/random_cells.py)",
        "HMCOS, written here, which finishes on all of them; Inductor's and XLA's best of three sorts each",
        "no figure",
        f"{proved} of {CELLED} proved; " + "; ".join(parts),
        _verdict(min(map(min, ratios.values())) >= 1 and all(max(row) > 1 for row in ratios.values()), False),
    )


def _table(rows: list[Row]) -> Table:
    columns = ["Network", "Operators", "Program's order", "Ours", "Bound", "Seconds"]
    for peer in PEERS:
        columns += [peer, f"{peer}: times ours", f"{peer}: seconds"]
        if peer not in SORTS:
            columns.append(f"{peer}: status")
    body = []
    for row in rows:
        cells: list[str | int | float] = [
            row.network,
            row.operators,
            row.program,
            row.ours,
            row.found.m_p_bound,
            round(row.found.seconds, 3),
        ]
        for name in PEERS:
            measured = row.peers[name]
            none = measured.peak is None
            cells += [
                "none" if measured.peak is None else f"{measured.peak:,}",
                "none" if none else f"{(measured.peak or 0) / row.ours:.3f}",
                round(measured.seconds, 3),
            ]
            if name not in SORTS:
                cells.append(measured.status)
        body.append(cells)
    return Table("Peak bytes of each scheduler's order, 8-bit tensors, activations alone", columns, body)
