"""Addresses for blocks whose steps are known: the packing of rectangles into the scratchpad.

Each block has fixed steps and wants an address; blocks alive at the same step must not overlap. First a
first-fit in several orders, where a block that found no place goes to the front of the order and the
whole is tried again, which does for most; then :mod:`retensor.planning.portfolio`, a search that can also
prove that there is no packing. It runs apart for blocks that no step connects.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from retensor.planning.progress import Clock

_PATIENCE = {True: 100_000, False: 300_000}
"""Neighbours that first-fit may look at where a search comes after it, and where none does."""


@dataclass(frozen=True, slots=True)
class Block:
    """``size`` bytes alive from step ``start`` up to, not including, ``end``."""

    start: int
    end: int
    size: int


@dataclass(frozen=True)
class Packing:
    """Addresses in bytes, one a block; or None, and then ``impossible`` tells whether that was proved."""

    addresses: tuple[int, ...] | None
    impossible: bool = False


def pack(
    blocks: Sequence[Block],
    scratchpad: int,
    alignment: int | Sequence[int],
    clock: Clock,
    *,
    fixed: Mapping[int, int] | None = None,
    exact: bool = True,
    seed: int = 0,
    workers: int | None = None,
    tell: Callable[[], None] | None = None,
) -> Packing:
    """Addresses below ``scratchpad`` bytes, multiples of ``alignment``; ``fixed`` ones are kept.

    Parameters
    ----------
    blocks : sequence of Block
    scratchpad, alignment : int
        In bytes; an alignment for each block where it is a sequence.
    clock : Clock
        Stops the search; not the first use's compilation, which takes seconds once for a machine.
    fixed : mapping of int to int, optional
        Addresses by index into ``blocks``; aligned or not.
    exact : bool
        Whether to search where first-fit finds nothing.
    seed : int
    workers : int, optional
        Threads of CP-SAT, which is asked where the search has taken a second; default all cores.
    tell : callable, optional
        Called many times a second while the search runs.
    """
    fixed = dict(fixed or {})
    aligned = [alignment] * len(blocks) if isinstance(alignment, int) else list(alignment)
    if _too_much(blocks, scratchpad, fixed):
        return Packing(None, impossible=True)
    found = first_fit(blocks, scratchpad, aligned, fixed, clock, seed, _PATIENCE[exact])
    if found is not None:
        return Packing(found)
    if not exact or clock.left <= 0:
        return Packing(None)
    # Empty blocks overlap nothing.
    addresses = [fixed.get(i, 0) for i in range(len(blocks))]
    for group in connected(blocks):
        here = [blocks[i] for i in group]
        kept = {k: fixed[i] for k, i in enumerate(group) if i in fixed}
        packing = _search(here, scratchpad, [aligned[i] for i in group], kept, clock, seed, tell, workers)
        if packing.addresses is None:
            return packing
        for i, address in zip(group, packing.addresses, strict=True):
            addresses[i] = address
    return Packing(tuple(addresses))


def neighbours(blocks: Sequence[Block]) -> list[list[int]]:
    """Blocks that share a step, by a sweep over starts."""
    table: list[list[int]] = [[] for _ in blocks]
    alive: list[int] = []
    for i in sorted(range(len(blocks)), key=lambda k: blocks[k].start):
        alive = [j for j in alive if blocks[j].end > blocks[i].start]
        for j in alive:
            table[i].append(j)
            table[j].append(i)
        alive.append(i)
    return table


def connected(blocks: Sequence[Block]) -> Iterator[list[int]]:
    """Groups of non-empty blocks between steps that none of them crosses, each by index."""
    group: list[int] = []
    until = 0
    for i in sorted((i for i, b in enumerate(blocks) if b.size and b.start < b.end), key=lambda i: blocks[i].start):
        if group and blocks[i].start >= until:
            yield group
            group = []
        until = blocks[i].end if not group else max(until, blocks[i].end)
        group.append(i)
    if group:
        yield group


def most_alive(blocks: Sequence[Block]) -> int:
    """The most bytes alive at one step: no packing is smaller."""
    events = sorted([(b.start, b.size) for b in blocks] + [(b.end, -b.size) for b in blocks])
    most = alive = 0
    for _, change in events:
        alive += change
        most = max(most, alive)
    return most


def _too_much(blocks: Sequence[Block], scratchpad: int, fixed: Mapping[int, int]) -> bool:
    """Whether bytes alive at one step, or fixed addresses, tell at once that there is no packing."""
    if most_alive(blocks) > scratchpad or any(a < 0 or a + blocks[i].size > scratchpad for i, a in fixed.items()):
        return True
    alive: list[int] = []
    for i in sorted((i for i in fixed if blocks[i].size), key=lambda i: blocks[i].start):
        alive = [j for j in alive if blocks[j].end > blocks[i].start]
        if any(fixed[i] < fixed[j] + blocks[j].size and fixed[j] < fixed[i] + blocks[i].size for j in alive):
            return True
        alive.append(i)
    return False


def first_fit(
    blocks: Sequence[Block],
    scratchpad: int,
    alignment: Sequence[int],
    fixed: Mapping[int, int],
    clock: Clock,
    seed: int,
    patience: int,
) -> tuple[int, ...] | None:
    """Addresses by the lowest free place for each block in turn, in several orders, repaired where one fails."""
    near = neighbours(blocks)
    free = [i for i in range(len(blocks)) if i not in fixed]
    orders = [
        sorted(free, key=lambda i: (-blocks[i].size, blocks[i].start)),
        sorted(free, key=lambda i: (-(blocks[i].end - blocks[i].start) * blocks[i].size, blocks[i].start)),
        sorted(free, key=lambda i: (blocks[i].start, -blocks[i].size)),
        sorted(free, key=lambda i: (blocks[i].start - blocks[i].end, -blocks[i].size)),
    ]
    chance = random.Random(seed)
    attempts = max(1, min(60, patience // (len(orders) * max(1, sum(len(row) for row in near)))))
    for order in orders:
        failures: dict[int, int] = {}
        for _ in range(attempts):
            places, failed = place(blocks, order, near, scratchpad, alignment, fixed, clock)
            if failed is None:
                return tuple(places[i] for i in range(len(blocks)))
            # A block that found no place goes before all it met; after repeats, somewhere before.
            failures[failed] = failures.get(failed, 0) + 1
            at = order.index(failed)
            earliest = min((order.index(j) for j in near[failed] if j not in fixed), default=0)
            target = min(earliest, at) if failures[failed] < 4 else chance.randrange(at + 1)
            order.insert(target, order.pop(at))
            if clock.left <= 0:
                return None
    return None


def place(
    blocks: Sequence[Block],
    order: Sequence[int],
    near: Sequence[Sequence[int]],
    scratchpad: int,
    alignment: Sequence[int],
    fixed: Mapping[int, int],
    clock: Clock | None = None,
) -> tuple[dict[int, int], int | None]:
    """Lowest free address for each block in turn, or the first block without one, or without time."""
    places = dict(fixed)
    for done, i in enumerate(order):
        if clock and not done % 64 and clock.left <= 0:
            return places, i
        size = blocks[i].size
        address = 0
        taken = sorted((places[j], places[j] + blocks[j].size) for j in near[i] if j in places)
        for low, high in taken:
            if address + size <= low:
                break
            if high > address:
                address = -(-high // alignment[i]) * alignment[i]
        if address + size > scratchpad:
            return places, i
        places[i] = address
    return places, None


def grain(blocks: Sequence[Block], alignment: Sequence[int], fixed: Mapping[int, int]) -> int:
    """The largest unit in which nothing is lost by counting: a packing has one whose addresses are its multiples."""
    return math.prod(_units(blocks, alignment, fixed))


def _units(blocks: Sequence[Block], alignment: Sequence[int], fixed: Mapping[int, int]) -> tuple[int, int]:
    free = [i for i in range(len(blocks)) if i not in fixed]
    # Addresses are multiples of this unit, so sizes may be rounded up to it ...
    unit = math.gcd(*fixed.values(), *(alignment[i] for i in free)) or 1
    # ... and as each block lies on others or at 0, of what all sizes, alignments and fixed addresses share.
    shared = math.gcd(
        *(-(-b.size // unit) for b in blocks),
        *(alignment[i] // unit for i in free if alignment[i] > unit),
        *(address // unit for address in fixed.values()),
    )
    return unit, shared or 1


def _search(
    blocks: Sequence[Block],
    scratchpad: int,
    alignment: Sequence[int],
    fixed: Mapping[int, int],
    clock: Clock,
    seed: int,
    tell: Callable[[], None] | None = None,
    workers: int | None = None,
) -> Packing:
    """Search for addresses of connected blocks, counted in their grain."""
    import numpy as np

    from retensor.planning.portfolio import Blocks, search

    unit, shared = _units(blocks, alignment, fixed)
    rooms = [-(-b.size // unit) // shared for b in blocks]
    latest = [(scratchpad - b.size) // unit // shared for b in blocks]
    steps = [1 if i in fixed else max(1, alignment[i] // unit // shared) for i in range(len(blocks))]
    at = [fixed[i] // unit // shared if i in fixed else -1 for i in range(len(blocks))]
    columns = ([b.start for b in blocks], [b.end for b in blocks], rooms, steps, at)
    outcome = search(
        Blocks(*(np.array(column, dtype=np.int64) for column in columns)),
        max(last + room for last, room in zip(latest, rooms, strict=True)),
        np.array(latest, dtype=np.int64),
        clock,
        seed,
        tell,
        workers,
    )
    if isinstance(outcome, bool):
        return Packing(None, impossible=True)
    if outcome is None:
        return Packing(None)
    return Packing(tuple(int(address) * unit * shared for address in outcome))
