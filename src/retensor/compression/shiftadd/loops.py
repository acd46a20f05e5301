"""The compiled loops of MatAdd and MatShift: rows of a table that are added to 16 numbers held in registers.

numba compiles them; the one loop that everything waits for is written in LLVM's own instructions, because a loop over
16 numbers of an array would read and write them at every row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from retensor.planning.compiled import compiled

LANES = 16
"""Numbers that are added at once; a multiple of every vector register's."""
BLOCK = 64
"""Inputs whose shifted copies lie in a table at a time; a table of 15 shifts takes 60 KiB."""
MOST_SHIFT = 30
_UNROLLED = 4


def _row_adder(subtract: bool) -> Any:
    """``add(out, at, table, offsets, start, stop)``: 16 numbers of ``out`` plus (or minus) the rows at some offsets.

    Vectors of LLVM's own, which it cuts to the registers of whatever machine: a loop over 16 numbers of an array would
    be read and written back at every row.
    """

    @intrinsic
    def add(typing: Any, out: Any, at: Any, table: Any, offsets: Any, start: Any, stop: Any) -> Any:
        signature = types.void(out, types.intp, table, offsets, types.intp, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            into, place, rows, named, first, last = given
            whole = ir.IntType(64)
            element = context.get_data_type(signature.args[0].dtype)
            align = signature.args[0].dtype.bitwidth // 8
            vector = ir.VectorType(element, LANES)
            floating = isinstance(element, ir.FloatType | ir.DoubleType)
            plus = builder.fadd if floating else builder.add
            minus = builder.fsub if floating else builder.sub
            combine = minus if subtract else plus
            data = [
                make_array(signature.args[i])(context, builder, array).data
                for i, array in ((0, into), (2, rows), (3, named))
            ]

            def pointer(base: Any, index: Any) -> Any:
                return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

            def row(index: Any) -> Any:
                offset = builder.load(builder.gep(data[2], [index]))
                if offset.type.width < 64:
                    offset = builder.zext(offset, whole)
                return builder.load(pointer(data[1], offset), align=align)

            def loop(begin: Any, end: Any, total: Any, step: int) -> Any:
                before = builder.block
                head, body, after = (builder.append_basic_block() for _ in range(3))
                builder.branch(head)
                builder.position_at_end(head)
                index, running = builder.phi(whole), builder.phi(vector)
                index.add_incoming(begin, before)
                running.add_incoming(total, before)
                builder.cbranch(builder.icmp_signed("<", index, end), body, after)
                builder.position_at_end(body)
                total = running
                for i in range(step):
                    total = combine(total, row(builder.add(index, ir.Constant(whole, i))))
                index.add_incoming(builder.add(index, ir.Constant(whole, step)), builder.block)
                running.add_incoming(total, builder.block)
                builder.branch(head)
                builder.position_at_end(after)
                return running

            home = pointer(data[0], place)
            total = builder.load(home, align=align)
            even = builder.and_(builder.sub(last, first), ir.Constant(whole, -_UNROLLED))
            middle = builder.add(first, even)
            total = loop(first, middle, total, _UNROLLED)
            total = loop(middle, last, total, 1)
            builder.store(total, home, align=align)
            return context.get_dummy_value()

        return signature, generate

    return add


_add_rows = _row_adder(subtract=False)
_subtract_rows = _row_adder(subtract=True)


@intrinsic
def _halve_rows(typing: Any, table: Any, at: Any, rows: Any) -> Any:
    """From the row at ``at`` on, make each next row the one before shifted by one place; shifts that round down add."""
    signature = types.void(table, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        whole = ir.IntType(64)
        element = context.get_data_type(signature.args[0].dtype)
        vector = ir.VectorType(element, LANES)
        base = make_array(signature.args[0])(context, builder, given[0]).data
        one = ir.Constant(vector, [1] * LANES)
        align = signature.args[0].dtype.bitwidth // 8

        def pointer(index: Any) -> Any:
            return builder.bitcast(builder.gep(base, [index]), vector.as_pointer())

        value = builder.load(pointer(given[1]), align=align)
        before = builder.block
        head, body, after = (builder.append_basic_block() for _ in range(3))
        builder.branch(head)
        builder.position_at_end(head)
        index, running = builder.phi(whole), builder.phi(vector)
        index.add_incoming(ir.Constant(whole, 1), before)
        running.add_incoming(value, before)
        builder.cbranch(builder.icmp_signed("<", index, given[2]), body, after)
        builder.position_at_end(body)
        shifted = builder.ashr(running, one)
        place = builder.add(given[1], builder.mul(index, ir.Constant(whole, LANES)))
        builder.store(shifted, pointer(place), align=align)
        index.add_incoming(builder.add(index, ir.Constant(whole, 1)), body)
        running.add_incoming(shifted, body)
        builder.branch(head)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return signature, generate


@compiled
def largest(fixed: Any) -> Any:
    """The largest number without its sign."""
    flat = fixed.reshape(-1)
    low = high = np.int64(0)
    for i in range(flat.size):
        low, high = min(low, np.int64(flat[i])), max(high, np.int64(flat[i]))
    return max(-low, high)


@compiled
def to_fixed(x: Any, unit: Any, most: Any, out: Any) -> Any:
    """Round down to whole numbers of 32 bits after multiplying; whether all were numbers."""
    a, b = x.reshape(-1), out.reshape(-1)
    # In float64, which holds every whole number of 32 bits.
    odd = 0
    for i in range(a.size):
        value = np.float64(a[i]) * unit
        odd += value != value
        b[i] = np.int32(max(-2147483648.0, min(most, np.floor(value))))
    return odd == 0


@compiled
def codes(packed: Any, bits: Any, count: Any) -> Any:
    """Packed codes, a byte each."""
    out = np.empty(count, np.uint8)
    mask = np.uint32(2**bits - 1)
    last = np.int64(packed.size - 1)
    for i in range(count):
        place = np.int64(i) * bits
        byte = place >> 3
        pair = np.uint32(packed[byte]) | (np.uint32(packed[min(byte + 1, last)]) << np.uint32(8))
        out[i] = (pair >> np.uint32(place & 7)) & mask
    return out


@compiled
def span(codes: Any, half: Any, outputs: Any, inputs: Any) -> Any:
    """The fewest and the most places that are shifted by, and the largest sum of an output's weights."""
    weight = np.zeros(2 * half, np.int64)
    shift = np.zeros(2 * half, np.int64)
    for s in range(half - 1):
        # In units of 2**-30, so that whole numbers hold the sum.
        weight[s] = weight[half + s] = np.int64(1) << (MOST_SHIFT - s)
        shift[s] = shift[half + s] = np.int64(1) << s
    heaviest: Any = np.int64(0)
    seen: Any = np.int64(0)
    for o in range(outputs):
        total = np.int64(0)
        for k in range(o * inputs, (o + 1) * inputs):
            total += weight[codes[np.uint64(k)]]
            seen |= shift[codes[np.uint64(k)]]
        heaviest = max(heaviest, total)
    low, high = half, 0
    for s in range(half - 1):
        if seen >> s & 1:
            low, high = min(low, s), max(high, s)
    return min(low, high), high, heaviest / 2.0**MOST_SHIFT


@compiled
def fill(
    codes: Any, half: Any, outputs: Any, inputs: Any, low: Any, span: Any, offsets: Any, added: Any, taken: Any
) -> Any:
    """Offsets of what is added from the front of each part, of what is subtracted from its back, and of no zeros."""
    zero = np.uint8(half - 1)
    for o in range(outputs):
        for part in range(added.shape[1]):
            begin, end = part * BLOCK, min(inputs, (part + 1) * BLOCK)
            front, back = np.uint64(o * inputs + begin), np.uint64(o * inputs + end - 1)
            for k in range(begin, end):
                code = codes[np.uint64(o * inputs + k)]
                minus, there = code > zero, (code & zero) != zero
                row = np.uint16(((k - begin) * span + (code & zero) - low) * LANES)
                # Both places are free and are written, and one of them is passed: no branch to guess.
                offsets[front] = row
                offsets[back] = row
                front += np.uint64(there and not minus)
                back -= np.uint64(there and minus)
            added[o, part] = front - np.uint64(o * inputs + begin)
            taken[o, part] = np.uint64(o * inputs + end - 1) - back


@compiled
def block_sums(
    x: Any, start: Any, offsets: Any, added: Any, taken: Any, low: Any, span: Any, table: Any, sums: Any
) -> Any:
    """Sums of all outputs for 16 tokens from ``start``, 16 numbers an output."""
    rows, inputs = x.shape
    outputs = added.shape[0]
    there = min(LANES, rows - start)
    sums[:] = 0
    for part in range(added.shape[1]):
        begin, end = part * BLOCK, min(inputs, (part + 1) * BLOCK)
        for k in range(begin, end):
            base = (k - begin) * span * LANES
            for t in range(there):
                table[base + t] = x[start + t, k] >> low
            _halve_rows(table, base, span)
        for o in range(outputs):
            at = o * inputs
            _add_rows(sums, o * LANES, table, offsets, at + begin, at + begin + added[o, part])
            _subtract_rows(sums, o * LANES, table, offsets, at + end - taken[o, part], at + end)


@compiled
def shifted_sums(x: Any, offsets: Any, added: Any, taken: Any, low: Any, span: Any, out: Any) -> Any:
    """Sums of shifted numbers of all rows."""
    table = np.zeros(BLOCK * span * LANES, x.dtype)
    outputs = out.shape[1]
    sums = np.empty(outputs * LANES, x.dtype)
    for start in range(0, x.shape[0], LANES):
        block_sums(x, start, offsets, added, taken, low, span, table, sums)
        for t in range(min(LANES, x.shape[0] - start)):
            for o in range(outputs):
                out[start + t, o] = sums[o * LANES + t]


@compiled
def shifted_linear(
    x: Any, offsets: Any, added: Any, taken: Any, low: Any, span: Any, unit: Any, bias: Any, out: Any
) -> Any:
    """The same as floating-point numbers, with a bias."""
    table = np.zeros(BLOCK * span * LANES, x.dtype)
    outputs = out.shape[1]
    sums = np.empty(outputs * LANES, x.dtype)
    for start in range(0, x.shape[0], LANES):
        block_sums(x, start, offsets, added, taken, low, span, table, sums)
        for t in range(min(LANES, x.shape[0] - start)):
            for o in range(outputs):
                out[start + t, o] = np.float32(sums[o * LANES + t]) * unit + bias[o]


@compiled
def masked_sums(packed: Any, values: Any, columns: Any, at_once: Any, out: Any) -> Any:
    """``bits @ values`` into zeros."""
    batch, rows = packed.shape[0], packed.shape[1]
    groups, size = -(-columns // at_once), 1 << at_once
    table = np.zeros(groups * size * LANES, values.dtype)
    named = np.empty(groups, np.int64)
    for n in range(batch):
        flat = out[n].reshape(-1)
        width = out.shape[2]
        for lane in range(0, width, LANES):
            for group in range(groups):
                base = group * size * LANES
                for j in range(min(at_once, columns - group * at_once)):
                    half = (1 << j) * LANES
                    for p in range(0, half, LANES):
                        for t in range(LANES):
                            table[base + half + p + t] = table[base + p + t] + values[n, group * at_once + j, lane + t]
            for i in range(rows):
                if at_once == 8:
                    for group in range(groups):
                        named[group] = (group * size + packed[n, i, group]) * LANES
                else:
                    for group in range(groups):
                        named[group] = (group * size + ((packed[n, i, group >> 1] >> (4 * (group & 1))) & 15)) * LANES
                _add_rows(flat, i * width + lane, table, named, 0, groups)


@compiled
def bucket_sums(packed: Any, values: Any, columns: Any, at_once: Any, out: Any) -> Any:
    """``bits.T @ values`` into zeros."""
    batch, rows = packed.shape[0], packed.shape[1]
    groups, size = -(-columns // at_once), 1 << at_once
    table = np.empty(groups * size * LANES, values.dtype)
    chosen = np.empty(rows, np.int64)
    width = out.shape[2]
    for n in range(batch):
        flat = values[n].reshape(-1)
        for lane in range(0, width, LANES):
            table[:] = 0
            for i in range(rows):
                chosen[i] = i * width + lane
            for i in range(rows):
                for group in range(groups):
                    if at_once == 8:
                        bucket = np.int64(packed[n, i, group])
                    else:
                        bucket = np.int64((packed[n, i, group >> 1] >> (4 * (group & 1))) & 15)
                    _add_rows(table, (group * size + bucket) * LANES, flat, chosen, i, i + 1)
            for group in range(groups):
                base = group * size * LANES
                for j in range(at_once - 1, -1, -1):
                    half = 1 << j
                    if group * at_once + j < columns:
                        for p in range(half):
                            for t in range(LANES):
                                out[n, group * at_once + j, lane + t] += table[base + (half + p) * LANES + t]
                    for p in range(half * LANES):
                        table[base + p] += table[base + half * LANES + p]
