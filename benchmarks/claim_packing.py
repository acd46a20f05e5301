"""Packing buffers of known lifetimes: ours in turn with MiniMalloc's program, or with CP-SAT where that is not at hand.

The instances are perfect packings cut at random, as they are and with slack. MiniMalloc is built outside this
repository and named by an environment variable; a second one names a folder of CSV files to measure too, such as the
public hard instances, which are called NAME.CAPACITY.csv.

    RETENSOR_MINIMALLOC=/path/to/minimalloc RETENSOR_PACKINGS=/path/to/folder retensor claims packing
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.peers import minimalloc, no_overlap
from benchmarks.peers.cut_packings import crowd, cut_packing

from retensor.claims import Claim, Report, Table, Verdict
from retensor.planning import Buffer, PackedBuffers, pack_buffers, read_buffers

PROGRAM, FOLDER = "RETENSOR_MINIMALLOC", "RETENSOR_PACKINGS"
PAPER = (
    "Michael D. Moffitt: MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning, "
    "ASPLOS 2023, doi 10.1145/3623278.3624752."
)
COUNTS = (50, 100, 150, 200)
SLACKS = (0.0, 0.02, 0.1)
SEEDS = range(3)
CAPACITY = 1024
LIMIT = 10.0
RUNS = 3
SHORTEST = 0.001
"""Seconds that the peer must take for a ratio to mean anything: it prints milliseconds."""
THREADS = 2
SMALL = range(40)
"""Seeds of the small instances whose optimum is proved from below."""

Triple = tuple[int, int, int]
Addresses = tuple[int, ...] | bool | None


@dataclass(frozen=True)
class Race:
    """Median seconds of the peer and of ours on one instance; None where time ran out."""

    instance: str
    buffers: int
    theirs: float | None
    ours: float | None
    public: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours through theirs, where both solve it and the peer's time can be told."""
        if self.ours is None or self.theirs is None or self.theirs < SHORTEST:
            return None
        return self.ours / self.theirs


def instances() -> Iterator[tuple[str, list[Triple], int, bool]]:
    """Name, buffers (lower, upper, size), capacity, and whether it is one of the folder that was named."""
    for count in COUNTS:
        for slack in SLACKS:
            for seed in SEEDS:
                yield (
                    f"{count} cut, slack {slack:.0%}, seed {seed}",
                    cut_packing(count, slack=slack, seed=seed),
                    CAPACITY,
                    False,
                )
    folder = os.environ.get(FOLDER)
    for path in sorted(Path(folder).glob("*.*.csv")) if folder else ():
        name, capacity, _ = path.name.rsplit(".", 2)
        yield name, [(b.lower, b.upper, b.size) for b in read_buffers(path).buffers], int(capacity), True


def measure(progress: Callable[[str], None]) -> Report:
    program = os.environ.get(PROGRAM)
    peer = "MiniMalloc's C++, its default options" if program else f"CP-SAT's 2-D no-overlap, {THREADS} threads"

    def their_solve(buffers: Sequence[Triple], capacity: int) -> tuple[Addresses, float]:
        if program:
            return minimalloc.solve(program, buffers, capacity, time_limit=LIMIT)
        started = time.perf_counter()
        found = no_overlap.solve(buffers, capacity, time_limit=LIMIT, threads=THREADS)
        return found, time.perf_counter() - started

    # The first search on a machine compiles, once.
    _ours(cut_packing(100), CAPACITY)
    races = []
    for name, buffers, capacity, public in instances():
        progress(f"{name}, {peer}")
        races.append(replace(race(name, buffers, capacity, their_solve), public=public))
    named = [race for race in races if race.public]
    return Report(
        "packing",
        "Packing: addresses for buffers of known lifetimes",
        PAPER,
        [*([_public(named, peer)] if named else []), _speed(races, peer), _solved(races, peer), _proofs(progress)],
        [_table(races, peer)],
        ("numba", "numpy", "ortools"),
        tuple(name for name in (PROGRAM, FOLDER) if os.environ.get(name)),
    )


def race(
    name: str, buffers: list[Triple], capacity: int, theirs: Callable[[Sequence[Triple], int], tuple[Addresses, float]]
) -> Race:
    """Both in turn, in this process or on this machine at the same time of day; once where one needs long."""
    mine: list[float | None] = []
    other: list[float | None] = []
    while len(mine) < RUNS:
        found, seconds = _ours(buffers, capacity)
        mine.append(seconds if found.status == "packed" else None)
        if found.offsets is not None:
            check(buffers, found.offsets, capacity)
        addresses, seconds = theirs(buffers, capacity)
        other.append(None if addresses is None else seconds)
        if isinstance(addresses, tuple):
            check(buffers, addresses, capacity)
        if found.status == "infeasible" or addresses is False:
            raise AssertionError(f"{name}: said to be infeasible, which it is not")
        if mine[-1] is None or other[-1] is None or mine[-1] + other[-1] > LIMIT / 4:
            break
    return Race(name, len(buffers), _median(other), _median(mine))


def check(buffers: Sequence[Triple], addresses: Sequence[int], capacity: int) -> None:
    """Byte ranges below the capacity, disjoint wherever two buffers are alive at once."""
    for i, ((lower, upper, size), at) in enumerate(zip(buffers, addresses, strict=True)):
        if not 0 <= at <= capacity - size:
            raise AssertionError(f"buffer {i} lies outside the capacity")
        for (low, up, other), place in zip(buffers[:i], addresses[:i], strict=True):
            if lower < up and low < upper and at < place + other and place < at + size:
                raise AssertionError(f"buffer {i} overlaps another")


def _ours(buffers: Sequence[Triple], capacity: int) -> tuple[PackedBuffers, float]:
    named = [Buffer(str(i), *triple) for i, triple in enumerate(buffers)]
    started = time.perf_counter()
    found = pack_buffers(named, capacity, time_limit=LIMIT, workers=THREADS)
    return found, time.perf_counter() - started


def _median(seconds: Sequence[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return statistics.median(known) if len(known) == len(seconds) else None


def _public(races: list[Race], peer: str) -> Claim:
    """The public hard instances alone."""
    solved = sum(r.ours is not None for r in races)
    ratios = [r.ratio for r in races if r.ratio is not None]
    median = statistics.median(ratios) if ratios else float("inf")
    return Claim(
        "(ours) The public hard instances are all packed, in at most twice the peer's time at the median.",
        f"{len(races)} instances, {', '.join(r.instance for r in races)}; in turn, medians of {RUNS} runs",
        peer,
        "at most 2 times",
        f"{solved} of {len(races)} packed; median {median:.3f} times the peer's, from {min(ratios):.3f} to "
        f"{max(ratios):.3f}"
        if ratios
        else f"{solved} of {len(races)} packed; the peer packs none",
        _verdict(solved == len(races) and median <= 2, solved > 0),
        "the first search on a machine compiles for some seconds, which is not counted",
    )


def _speed(races: list[Race], peer: str) -> Claim:
    ratios = [r.ratio for r in races if r.ratio is not None]
    hard = [r.ratio for r in races if r.ratio is not None and r.theirs is not None and r.theirs >= 0.1]
    both = sum(r.ours is not None and r.theirs is not None for r in races)
    text = (
        f"median {statistics.median(ratios):.2f} times the peer's on the {len(ratios)} that it takes a millisecond for"
    )
    if hard:
        text += f", {statistics.median(hard):.3f} times on the {len(hard)} that take it 0.1 s or more"
    held = bool(hard) and statistics.median(hard) <= 2
    return Claim(
        "(ours) Packing takes at most twice the peer's time on hard instances.",
        f"perfect packings cut at random and what was named, {len(races)} in all; in turn, medians, "
        f"at most {LIMIT:.0f} s each",
        peer,
        "at most 2 times",
        text,
        _verdict(held, False),
        f"{both - len(ratios)} of the {both} that both solve take the peer less than it tells, and here some "
        "milliseconds: they are not compared",
    )


def _solved(races: list[Race], peer: str) -> Claim:
    ours = sum(r.ours is not None for r in races)
    theirs = sum(r.theirs is not None for r in races)
    lost = sum(r.ours is None and r.theirs is not None for r in races)
    return Claim(
        f"(ours) What the peer packs in {LIMIT:.0f} s is packed here too, and more.",
        f"{len(races)} instances that have a packing; CP-SAT has turns in ours too, from the first second on",
        peer,
        "all that the peer packs",
        f"{ours} packed here, {theirs} by the peer, {lost} by the peer alone",
        _verdict(lost == 0 and ours >= theirs, ours >= theirs),
        "" if ours == len(races) else f"{len(races) - ours} are too hard for both in that time" if not lost else "",
    )


def _proofs(progress: Callable[[str], None]) -> Claim:
    """Small instances, packed as low as can be, and proved impossible below that."""
    progress("small instances, one unit below the optimum")
    above = proved = agreed = 0
    for seed in SMALL:
        buffers = crowd(12, 24, seed=seed)
        named = [Buffer(str(i), *triple) for i, triple in enumerate(buffers)]
        found = pack_buffers(named, time_limit=LIMIT)
        assert found.height is not None
        proved += found.status == "optimal"
        above += found.height > max(sum(s for a, b, s in buffers if a <= t < b) for t in range(12))
        agreed += no_overlap.solve(buffers, found.height - 1, time_limit=LIMIT, threads=THREADS) is False
    return Claim(
        "(ours) The least capacity is found and proved; one unit less is proved impossible.",
        f"{len(SMALL)} crowds of about 28 buffers, of which {above} need more than the most bytes alive at once",
        "CP-SAT's 2-D no-overlap, which must find one unit less impossible as well",
        "all",
        f"{proved} of {len(SMALL)} proved, {agreed} confirmed",
        _verdict(proved == agreed == len(SMALL), proved == agreed),
    )


def _verdict(held: bool, partly: bool) -> Verdict:
    return "held" if held else "partly held" if partly else "not held"


def _table(races: list[Race], peer: str) -> Table:
    def shown(seconds: float | None) -> str:
        return f"over {LIMIT:.0f}" if seconds is None else f"{seconds:.3f}"

    rows = []
    for r in races:
        ratio = "" if r.ratio is None else f"{r.ratio:.3f}"
        rows.append([r.instance, r.buffers, shown(r.ours), shown(r.theirs), ratio])
    return Table(f"Seconds, ours and {peer}", ["Instance", "Buffers", "Ours", "Peer", "Ratio"], rows)
