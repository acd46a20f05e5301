"""Addresses for buffers of known lifetimes, as a tool of its own: dynamic storage allocation.

A buffer is ``size`` bytes alive from ``lower`` up to, not including, ``upper``; two that are alive at once must not
overlap. With a capacity, :func:`pack_buffers` finds offsets below it or proves that there are none; without, it finds
the least capacity there is. The search is :mod:`retensor.planning.canonical`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from retensor.files import brief
from retensor.planning.allocate import Block, connected, grain, most_alive, neighbours, pack, place
from retensor.planning.checks import check_search
from retensor.planning.progress import Clock, Progress, ProgressCallback, stop_on_interrupt
from retensor.units import LARGEST_SIZE, whole

LARGEST_TIME = 2**60
LARGEST_TOTAL = 2**60
"""Sums of times and of bytes stay within 64 bits."""
Status = Literal["packed", "optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Bytes that are alive for a time.

    Parameters
    ----------
    id : str
    lower, upper : int
        The first moment it is alive, and the first at which it is no more; any unit.
    size : int
        In bytes; an empty buffer overlaps nothing.
    alignment : int
        Its offset is a multiple of this.
    offset : int, optional
        Where it must lie; None: anywhere.

    Raises
    ------
    TypeError
        Where a number is no whole number.
    ValueError
        Where ``lower >= upper``, a size, alignment or offset is negative, or a number is absurdly large.

    Examples
    --------
    >>> Buffer("b1", 0, 3, 4)
    Buffer(id='b1', lower=0, upper=3, size=4, alignment=1, offset=None)
    """

    id: str
    lower: int
    upper: int
    size: int
    alignment: int = 1
    offset: int | None = None

    def __post_init__(self) -> None:
        named = f"buffer '{brief(self.id, 60)}'"
        for name in ("lower", "upper", "size", "alignment", "offset"):
            value = getattr(self, name)
            if value is None and name == "offset":
                continue
            value = whole(value, f"{name} of {named}")
            object.__setattr__(self, name, value)
            least = {"size": 0, "offset": 0, "alignment": 1}.get(name, -LARGEST_TIME)
            most = LARGEST_TIME if name in ("lower", "upper") else LARGEST_SIZE
            if not least <= value <= most:
                shown = f"{value:,}" if abs(value) < 10**40 else "a number of many digits"
                raise ValueError(f"{name} of {named} is {shown}; it may be {least:,} to {most:,}")
        if self.lower >= self.upper:
            raise ValueError(
                f"{named} is alive from {self.lower:,} up to {self.upper:,}, which is never; upper must be above lower"
            )


@dataclass(frozen=True)
class PackedBuffers:
    """What :func:`pack_buffers` found.

    Attributes
    ----------
    status : {"packed", "optimal", "feasible", "infeasible", "unknown"}
        With a capacity: packed, proved infeasible, or unknown when time ran out. Without: packed with the least
        capacity, proved; or feasible, with the gap between ``bound`` and ``height``.
    offsets : tuple of int, or None
        In bytes, one a buffer, in the order given.
    height : int or None
        Bytes up to the highest end of a buffer.
    bound : int
        No offsets have a lower height: the most bytes alive at once, or more where the search has proved it.
    capacity : int or None
        As asked for.
    reason : str
        Why it is infeasible or unknown.
    seconds : float
    """

    status: Status
    offsets: tuple[int, ...] | None
    height: int | None
    bound: int
    capacity: int | None
    reason: str = ""
    seconds: float = field(default=0.0, compare=False)


def pack_buffers(
    buffers: Sequence[Buffer],
    capacity: int | None = None,
    *,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> PackedBuffers:
    """Find offsets at which no two buffers that are alive at once overlap.

    Parameters
    ----------
    buffers : sequence of Buffer
        With ids that differ.
    capacity : int, optional
        Bytes that all must fit into; None: as few as possible.
    time_limit : float
        In seconds. The very first search on a machine compiles for some seconds, which it does not count.
    seed : int
    workers : int, optional
        Threads of CP-SAT, which is asked where the search, on one thread, has taken a second; default all cores.
    progress : callable, optional
        Told of the height so far and its bound, some times a second. Ctrl-C ends the search with what there is.

    Raises
    ------
    ValueError
        Where two buffers have one id, two that are alive at once have offsets that overlap, an offset is no multiple
        of its alignment, the capacity is not 1 byte to 1 PiB, the time limit not a positive number, or the seed or
        the number of threads out of range.
    TypeError

    References
    ----------
    Michael D. Moffitt: MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning, ASPLOS
    2023, doi 10.1145/3623278.3624752.

    Examples
    --------
    >>> buffers = [Buffer("b1", 0, 3, 4), Buffer("b2", 3, 9, 4), Buffer("b3", 0, 9, 4)]
    >>> found = pack_buffers(buffers, 8)
    >>> found.status, found.height
    ('packed', 8)
    >>> pack_buffers(buffers, 7).status
    'infeasible'
    >>> pack_buffers(buffers).height
    8
    """
    if capacity is not None:
        capacity = whole(capacity, "the capacity")
        if not 1 <= capacity <= LARGEST_SIZE:
            raise ValueError(f"a capacity of {brief(capacity, 40)} bytes makes no sense; give between 1 byte and 1 PiB")
    if not math.isfinite(time_limit) or time_limit <= 0:
        raise ValueError(f"the time limit is a number of seconds above 0, not {time_limit:g}")
    check_search(time_limit, seed, workers)
    _check(buffers)
    search = _Search(buffers, Clock(time_limit), seed, workers, progress)
    with stop_on_interrupt(search.clock):
        return search.least() if capacity is None else search.within(capacity)


def _check(buffers: Sequence[Buffer]) -> None:
    if (total := sum(buffer.size for buffer in buffers)) > LARGEST_TOTAL:
        raise ValueError(f"the buffers have {total:,} bytes together; up to {LARGEST_TOTAL:,} can be packed")
    seen: set[str] = set()
    for buffer in buffers:
        if buffer.id in seen:
            raise ValueError(f"two buffers have the id '{brief(buffer.id, 60)}'; give each its own")
        seen.add(buffer.id)
        if buffer.offset is not None and buffer.offset % buffer.alignment:
            raise ValueError(
                f"offset {buffer.offset:,} of buffer '{brief(buffer.id, 60)}' is no multiple of its alignment "
                f"{buffer.alignment:,}; change one of them"
            )
    alive: list[Buffer] = []
    for buffer in sorted((b for b in buffers if b.offset is not None and b.size), key=lambda b: b.lower):
        alive = [other for other in alive if other.upper > buffer.lower]
        for other in alive:
            low, high = sorted((buffer, other), key=lambda b: b.offset or 0)
            if (low.offset or 0) + low.size > (high.offset or 0):
                raise ValueError(
                    f"the offsets given for buffers '{brief(low.id, 60)}' and '{brief(high.id, 60)}' overlap, and both "
                    "are alive at once; leave one out"
                )
        alive.append(buffer)


class _Search:
    """One call: the buffers as blocks, its clock, and what it has found."""

    def __init__(
        self,
        buffers: Sequence[Buffer],
        clock: Clock,
        seed: int,
        workers: int | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.buffers, self.clock, self.seed, self.workers, self.progress = buffers, clock, seed, workers, progress
        self.blocks = [Block(b.lower, b.upper, b.size) for b in buffers]
        self.alignment = [b.alignment for b in buffers]
        self.fixed = {i: b.offset for i, b in enumerate(buffers) if b.offset is not None}
        self.unit = grain(self.blocks, self.alignment, self.fixed)
        self.best: tuple[int, ...] | None = None
        self.low = max([most_alive(self.blocks), *(a + self.blocks[i].size for i, a in self.fixed.items())])

    def within(self, capacity: int) -> PackedBuffers:
        """Offsets below ``capacity``, or why there are none."""
        if (reason := self._too_small(capacity)) is not None:
            return self._answer("infeasible", capacity, reason)
        self._tell()
        found = self._pack(capacity, self.clock)
        if found:
            return self._answer("packed", capacity)
        if found is False:
            self.low = max(self.low, self._next(capacity))
            return self._answer("infeasible", capacity, f"a complete search found that {capacity:,} bytes do not do")
        stopped = "Ctrl-C" if self.clock.stopped else "the time limit"
        return self._answer("unknown", capacity, f"{stopped} came before offsets were found or ruled out")

    def least(self) -> PackedBuffers:
        """The least capacity, between the bytes alive at once and what first-fit needs."""
        self._first_fit()
        high = self._height()
        self.low = min(high, self._next(self.low - 1))
        while self.low < high and self.clock.left > 0:
            # The lower end first, which most often does; where time runs out on it, halfway up, and so on.
            floor = target = self.low
            while floor < high and self.clock.left > 0:
                self._tell()
                found = self._pack(target, self.clock.share(0.3))
                if found:
                    high = self._height()
                else:
                    floor = self._next(target)
                if found is False:
                    self.low = min(high, floor)
                target = floor if floor == self.low else max(floor, min((floor + high) // 2, high - 1))
        return self._answer("optimal" if self.low >= high else "feasible", None)

    def _pack(self, capacity: int, clock: Clock) -> bool | None:
        """Whether there are offsets within ``capacity``, which are kept; None out of time."""
        packing = pack(
            self.blocks,
            capacity,
            self.alignment,
            clock,
            fixed=self.fixed,
            seed=self.seed,
            workers=self.workers,
            tell=self._tell,
        )
        if packing.addresses is not None:
            self.best = packing.addresses
            return True
        return False if packing.impossible else None

    def _first_fit(self) -> None:
        """Offsets of some height, by the lowest free place without a capacity."""
        near = neighbours(self.blocks)
        free = [i for i in range(len(self.blocks)) if i not in self.fixed]
        for key in (
            lambda i: (-self.blocks[i].size, self.blocks[i].start),
            lambda i: (-self.blocks[i].size * (self.blocks[i].end - self.blocks[i].start), self.blocks[i].start),
            lambda i: (self.blocks[i].start - self.blocks[i].end, -self.blocks[i].size),
        ):
            endless = 1 << 100
            places, _ = place(self.blocks, sorted(free, key=key), near, endless, self.alignment, self.fixed)
            offsets = tuple(places[i] for i in range(len(self.blocks)))
            if self.best is None or self._height(offsets) < self._height():
                self.best = offsets
            if self.clock.left <= 0:
                break

    def _height(self, offsets: Sequence[int] | None = None) -> int:
        chosen = self.best if offsets is None else offsets
        assert chosen is not None
        return max((a + b.size for a, b in zip(chosen, self.blocks, strict=True)), default=0)

    def _next(self, capacity: int) -> int:
        """The least capacity above ``capacity`` in which some buffer can lie higher than in it."""
        tops = [((capacity - b.size) // self.unit + 1) * self.unit + b.size for b in self.blocks if b.size]
        # An empty buffer takes no room but may have to lie high.
        ends = [offset + self.blocks[i].size for i, offset in self.fixed.items()]
        return min([*tops, *(end for end in ends if end > capacity)], default=capacity + 1)

    def _too_small(self, capacity: int) -> str | None:
        for b in self.buffers:
            if b.size > capacity:
                return f"buffer '{brief(b.id, 60)}' alone has {b.size:,} bytes"
            if b.offset is not None and b.offset + b.size > capacity:
                return f"buffer '{brief(b.id, 60)}' must lie up to byte {b.offset + b.size:,}"
        for group in connected(self.blocks):
            here = [self.blocks[i] for i in group]
            if most_alive(here) > capacity:
                moment = max(here, key=lambda b: sum(o.size for o in here if o.start <= b.start < o.end)).start
                return f"the buffers alive at {moment:,} have {most_alive(here):,} bytes together"
        return None

    def _tell(self) -> None:
        if self.progress:
            height = None if self.best is None else self._height()
            self.progress(Progress("searching for offsets", self.clock.seconds, height, self.low))

    def _answer(self, status: Status, capacity: int | None, reason: str = "") -> PackedBuffers:
        height = None if self.best is None else self._height()
        return PackedBuffers(status, self.best, height, self.low, capacity, reason, self.clock.seconds)
