"""The compiled loops of MatAdd and MatShift: rows of a table that are added to numbers held in registers.

numba finds what it compiled again by the date of this file alone: where :mod:`.vectors` is changed, this one must be
touched too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from retensor.compression.shiftadd.vectors import (
    STEP,
    WIDE,
    masked_adder,
    masked_spreader,
    row_gatherer,
    row_maker,
    row_summer,
    turn_in,
    turn_out,
)
from retensor.planning.compiled import compiled

MOST_SHIFT = 30
LINE = 64
"""Bytes that a processor reads at once; a row that lies across two takes twice as long."""

_add_wide, _add_narrow = row_gatherer(wide=True), row_gatherer(wide=False)
_mask_wide, _mask_narrow = masked_adder(wide=True), masked_adder(wide=False)
_spread_wide, _spread_narrow = masked_spreader(wide=True), masked_spreader(wide=False)
_sum_wide, _sum_narrow = row_summer(wide=True), row_summer(wide=False)
_make_wide, _make_narrow = row_maker(wide=True), row_maker(wide=False)


@compiled
def lined(size: Any, like: Any) -> Any:
    """Numbers of the type of an array's that begin where a line of the processor's memory does."""
    room = np.empty(size + LINE // like.itemsize, like.dtype)
    skipped = (-room.ctypes.data & (LINE - 1)) // like.itemsize
    return room[skipped : skipped + size]


@compiled
def codes(packed: Any, bits: Any, count: Any) -> Any:
    """Packed codes, a byte each."""
    out = np.empty(count + 8, np.uint8)
    mask = np.uint64(2**bits - 1)
    # Eight codes are as many bytes as a code has bits.
    for group in range(-(-count // 8)):
        word = np.uint64(0)
        for i in range(min(bits, packed.size - group * bits)):
            word |= np.uint64(packed[group * bits + i]) << np.uint64(8 * i)
        for i in range(8):
            out[8 * group + i] = (word >> np.uint64(bits * i)) & mask
    return out[:count]


@compiled
def plan(codes: Any, half: Any, outputs: Any, inputs: Any) -> Any:
    """What a layer adds up: which rows a table has, and where each weight's lies in it.

    Returns
    -------
    named : uint16, (blocks * outputs * 16)
        For every block of 16 inputs and every output the number of each input's row in the block's table. The first row
        is zeros, for weights of 0.
    rows : int32, (blocks, most rows)
        How each other row is made: input of the block, and 2**8 times the places it is shifted by, negative and less 1
        where it is subtracted.
    counts : int64, (blocks,)
        Of these.
    heaviest : float
        The largest sum of an output's weights, without signs.
    """
    blocks = -(-inputs // STEP)
    size = 2 * half
    named = np.zeros(blocks * outputs * STEP, np.uint16)
    rows = np.empty((blocks, size * STEP), np.int32)
    counts = np.zeros(blocks, np.int64)
    weight = np.zeros(size, np.int64)
    for s in range(half - 1):
        # In units of 2**-30, so that whole numbers hold the sum.
        weight[s] = weight[half + s] = np.int64(1) << (MOST_SHIFT - s)
    heavy = np.zeros(outputs, np.int64)
    place = np.empty(size * STEP, np.uint16)
    for block in range(blocks):
        begin = block * STEP
        there = min(STEP, inputs - begin)
        place[:] = 0
        for o in range(outputs):
            total = np.int64(0)
            for k in range(there):
                code = np.int64(codes[o * inputs + begin + k])
                place[code * STEP + k] = 1
                total += weight[code]
            heavy[o] += total
        # Rows of one shift lie beside each other: few shifts are frequent, and stay near the processor.
        found: Any = 0
        for minus in range(2):
            for s in range(half - 1):
                first = (minus * half + s) * STEP
                for k in range(there):
                    if place[first + k]:
                        rows[block, found] = (s << 8 | k) ^ -minus
                        found += 1
                        place[first + k] = found
            # Weights of zero name the row of zeros.
            first = (minus * half + half - 1) * STEP
            place[first : first + STEP] = 0
        counts[block] = found
        for o in range(outputs):
            at = (block * outputs + o) * STEP
            for k in range(there):
                named[at + k] = place[np.int64(codes[o * inputs + begin + k]) * STEP + k]
    return named, rows, counts, heavy.max() / 2.0**MOST_SHIFT if outputs else 0.0


@compiled
def shifted_sums(
    x: Any, named: Any, rows: Any, counts: Any, like: Any, unit: Any, most: Any, scale: Any, bias: Any, out: Any
) -> Any:
    """Sums of shifted numbers for all rows of x, added as numbers of the type of ``like``.

    Floating-point x become whole numbers by ``unit`` and ``most`` (:func:`turn_in`), and sums floating-point ``out`` by
    ``scale`` and ``bias`` (:func:`turn_out`), which has a number for every output of the last block of 16 too.
    """
    tokens, outputs = out.shape
    wide = WIDE // like.itemsize
    table, turned = lined((counts.max() + 1) * wide, like), lined(STEP * wide, like)
    sums = lined(-(-outputs // STEP) * STEP * wide, like)
    square_in, square_out = np.zeros(STEP * STEP, x.dtype), np.empty(STEP * STEP, out.dtype)
    start = 0
    while start < tokens:
        # Narrow rows for the last few tokens.
        lanes = wide if tokens - start > 2 * STEP else STEP
        sums[:] = 0
        table[:lanes] = 0
        for block in range(counts.size):
            _read(x, start, block * STEP, unit, most, square_in, turned, lanes)
            _fill(table, turned, rows[block], counts[block], lanes, wide)
            at = block * outputs * STEP
            if lanes == wide:
                for o in range(outputs):
                    _add_wide(sums, o * lanes, table, named, at + o * STEP)
            else:
                for o in range(outputs):
                    _add_narrow(sums, o * lanes, table, named, at + o * STEP)
        _write(sums, lanes, start, scale, bias, square_out, out)
        start += lanes


@compiled
def _read(x: Any, start: Any, begin: Any, unit: Any, most: Any, square: Any, turned: Any, lanes: Any) -> Any:
    """16 inputs of some tokens from ``start`` on, a row an input, with zeros where there is none."""
    tokens, inputs = x.shape
    flat = x.reshape(-1)
    for t in range(0, lanes, STEP):
        first = start + t
        if first + STEP <= tokens and begin + STEP <= inputs:
            turn_in(flat, first * inputs + begin, inputs, unit, most, turned, t, lanes)
            continue
        square[:] = 0
        for i in range(min(STEP, tokens - first)):
            for k in range(min(STEP, inputs - begin)):
                square[i * STEP + k] = x[first + i, begin + k]
        turn_in(square, 0, STEP, unit, most, turned, t, lanes)


@compiled
def _fill(table: Any, turned: Any, rows: Any, count: Any, lanes: Any, wide: Any) -> Any:
    """The rows of a table that weights name, behind the one of zeros."""
    for row in range(count):
        how: Any = np.int64(rows[row])
        minus = np.int64(-1) if how < 0 else np.int64(0)
        how ^= minus
        if lanes == wide:
            _make_wide(table, (row + 1) * lanes, turned, (how & 255) * lanes, how >> 8, minus)
        else:
            _make_narrow(table, (row + 1) * lanes, turned, (how & 255) * lanes, how >> 8, minus)


@compiled
def _write(sums: Any, lanes: Any, start: Any, scale: Any, bias: Any, square: Any, out: Any) -> Any:
    """Sums of some tokens, a row a token."""
    tokens, outputs = out.shape
    flat = out.reshape(-1)
    for t in range(0, min(lanes, tokens - start), STEP):
        first = start + t
        for o in range(0, outputs, STEP):
            if first + STEP <= tokens and o + STEP <= outputs:
                turn_out(sums, o * lanes + t, lanes, scale, bias, o, flat, first * outputs + o, outputs)
                continue
            turn_out(sums, o * lanes + t, lanes, scale, bias, o, square, 0, STEP)
            for i in range(min(STEP, tokens - first)):
                for k in range(min(STEP, outputs - o)):
                    out[first + i, o + k] = square[i * STEP + k]


@compiled
def masked_sums(packed: Any, values: Any, columns: Any, out: Any) -> Any:
    """``bits @ values`` into zeros, whose width is a multiple of 16."""
    batch, rows, length = packed.shape
    most, width = WIDE // values.itemsize, values.shape[2]
    table = lined(length * 2 * STEP * most, values)
    bits, given, sums = packed.reshape(-1), values.reshape(-1), out.reshape(-1)
    for n in range(batch):
        lane = 0
        while lane < width:
            lanes = most if width - lane >= most else STEP
            _tabulate(table, given, n * columns * width + lane, width, lanes, columns, length)
            for i in range(rows):
                at, first = (n * rows + i) * width + lane, (n * rows + i) * length
                if lanes == most:
                    _mask_wide(sums, at, table, bits, first, first + length)
                else:
                    _mask_narrow(sums, at, table, bits, first, first + length)
            lane += lanes


@compiled
def _tabulate(table: Any, given: Any, at: Any, width: Any, lanes: Any, columns: Any, length: Any) -> Any:
    """All sums of every four rows of values, each from another one by an addition."""
    for group in range(2 * length):
        base = group * STEP * lanes
        table[base : base + lanes] = 0
        for j in range(4):
            half, k = (1 << j) * lanes, 4 * group + j
            for p in range(base, base + half, lanes):
                # Of rows that there are not: those of a byte's last columns.
                if k >= columns:
                    table[p + half : p + half + lanes] = 0
                elif lanes > STEP:
                    _sum_wide(table, p + half, table, p, given, at + k * width)
                else:
                    _sum_narrow(table, p + half, table, p, given, at + k * width)


@compiled
def bucket_sums(packed: Any, values: Any, columns: Any, out: Any) -> Any:
    """``bits.T @ values`` into zeros, whose width is a multiple of 16."""
    batch, rows, length = packed.shape
    most, width = WIDE // values.itemsize, values.shape[2]
    table = lined(length * 2 * STEP * most, values)
    bits, given, sums = packed.reshape(-1), values.reshape(-1), out.reshape(-1)
    for n in range(batch):
        lane = 0
        while lane < width:
            lanes = most if width - lane >= most else STEP
            table[: length * 2 * STEP * lanes] = 0
            for i in range(rows):
                at, first = (n * rows + i) * width + lane, (n * rows + i) * length
                if lanes == most:
                    _spread_wide(table, given, at, bits, first, first + length)
                else:
                    _spread_narrow(table, given, at, bits, first, first + length)
            _gather(table, sums, n * columns * width + lane, width, lanes, columns, length)
            lane += lanes


@compiled
def _gather(table: Any, sums: Any, at: Any, width: Any, lanes: Any, columns: Any, length: Any) -> Any:
    """Sums of four columns from their 16 buckets: half of them have a column's bit, and are added to the other half."""
    for group in range(2 * length):
        base = group * STEP * lanes
        for j in range(3, -1, -1):
            half, to = (1 << j) * lanes, at + (4 * group + j) * width
            if 4 * group + j >= columns:
                continue
            for p in range(base, base + half, lanes):
                if lanes > STEP:
                    _sum_wide(sums, to, sums, to, table, p + half)
                    _sum_wide(table, p, table, p, table, p + half)
                else:
                    _sum_narrow(sums, to, sums, to, table, p + half)
                    _sum_narrow(table, p, table, p, table, p + half)
