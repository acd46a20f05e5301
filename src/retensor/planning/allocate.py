"""Addresses for tensors whose steps are known: the packing of rectangles into the scratchpad.

Each block has fixed steps and wants an address; blocks alive at the same step must not overlap. First a
first-fit in several orders, where a block that found no place goes to the front of the order and the
whole is tried again; then CP-SAT with a two-dimensional no-overlap, which can also prove that there is no
packing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ortools.sat.python import cp_model

from retensor.planning.progress import Clock
from retensor.planning.solver import minimise


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
    alignment: int,
    clock: Clock,
    *,
    fixed: Mapping[int, int] | None = None,
    exact: bool = True,
    seed: int = 0,
    workers: int | None = None,
) -> Packing:
    """Addresses below ``scratchpad`` bytes, multiples of ``alignment``; ``fixed`` ones are kept."""
    fixed = dict(fixed or {})
    found = _first_fit(blocks, scratchpad, alignment, fixed, clock, seed)
    if found is not None:
        return Packing(found)
    if not exact or clock.left <= 0:
        return Packing(None)
    return _no_overlap(blocks, scratchpad, alignment, fixed, clock, seed, workers)


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


def _first_fit(
    blocks: Sequence[Block], scratchpad: int, alignment: int, fixed: Mapping[int, int], clock: Clock, seed: int
) -> tuple[int, ...] | None:
    near = neighbours(blocks)
    free = [i for i in range(len(blocks)) if i not in fixed]
    orders = [
        sorted(free, key=lambda i: (-blocks[i].size, blocks[i].start)),
        sorted(free, key=lambda i: (-(blocks[i].end - blocks[i].start) * blocks[i].size, blocks[i].start)),
        sorted(free, key=lambda i: (blocks[i].start, -blocks[i].size)),
        sorted(free, key=lambda i: (blocks[i].start - blocks[i].end, -blocks[i].size)),
    ]
    chance = random.Random(seed)
    for order in orders:
        failures: dict[int, int] = {}
        for _ in range(60):
            places, failed = _place(blocks, order, near, scratchpad, alignment, fixed)
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


def _place(
    blocks: Sequence[Block],
    order: Sequence[int],
    near: Sequence[Sequence[int]],
    scratchpad: int,
    alignment: int,
    fixed: Mapping[int, int],
) -> tuple[dict[int, int], int | None]:
    """Lowest free address for each block in turn, or the first block without one."""
    places = dict(fixed)
    for i in order:
        size = blocks[i].size
        address = 0
        taken = sorted((places[j], places[j] + blocks[j].size) for j in near[i] if j in places)
        for low, high in taken:
            if address + size <= low:
                break
            if high > address:
                address = -(-high // alignment) * alignment
        if address + size > scratchpad:
            return places, i
        places[i] = address
    return places, None


def _no_overlap(
    blocks: Sequence[Block],
    scratchpad: int,
    alignment: int,
    fixed: Mapping[int, int],
    clock: Clock,
    seed: int,
    workers: int | None,
) -> Packing:
    model = cp_model.CpModel()
    columns, rows, places = [], [], []
    demands = []
    for i, block in enumerate(blocks):
        if i in fixed:
            place = model.new_constant(fixed[i] // alignment)
        elif block.size > scratchpad:
            return Packing(None, impossible=True)
        else:
            place = model.new_int_var(0, (scratchpad - block.size) // alignment, "")
        room = -(-block.size // alignment)
        places.append(place)
        if not room:
            # An empty tensor overlaps nothing.
            continue
        columns.append(model.new_fixed_size_interval_var(block.start, block.end - block.start, ""))
        rows.append(model.new_fixed_size_interval_var(place, room, ""))
        demands.append(room)
    model.add_no_overlap_2d(columns, rows)
    model.add_cumulative(columns, demands, -(-scratchpad // alignment))
    solver, outcome = minimise(model, clock, seed=seed, workers=workers)
    if outcome.solved:
        return Packing(tuple(solver.value(place) * alignment for place in places))
    return Packing(None, impossible=outcome.proved)
