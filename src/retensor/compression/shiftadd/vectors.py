"""Instructions of MatAdd and MatShift that numba has no Python for: vectors of numbers that stay in registers.

A loop over 16 numbers of an array reads and writes them at every row that it adds, and columns that are read one number
at a time wait for each. These are written in LLVM's own vectors, which it cuts to the registers of whatever machine.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

STEP = 16
"""Rows that are added in one go; rows and columns of a square that is turned; and the fewest numbers of a row."""
WIDE = 256
"""Bytes of a row of many numbers, four of the widest registers."""
WHOLE = ir.IntType(64)


class Rows:
    """Vectors of an array's numbers, by the place of their first."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, lanes: int) -> None:
        self.builder = builder
        self.element = context.get_data_type(kind.dtype)
        self.bytes = kind.dtype.bitwidth // 8
        self.vector = ir.VectorType(self.element, lanes)
        self.floating = isinstance(self.element, ir.FloatType | ir.DoubleType)
        self.data = make_array(kind)(context, builder, array).data

    def at(self, place: Any) -> Any:
        """A pointer to the row at a place."""
        return self.builder.bitcast(self.builder.gep(self.data, [place]), self.vector.as_pointer())

    def load(self, place: Any) -> Any:
        """The row at a place."""
        return self.builder.load(self.at(place), align=self.bytes)

    def store(self, value: Any, place: Any) -> None:
        """Write a row."""
        self.builder.store(value, self.at(place), align=self.bytes)

    def plus(self, a: Any, b: Any) -> Any:
        """The sum of two rows."""
        return self.builder.fadd(a, b) if self.floating else self.builder.add(a, b)

    def splat(self, number: Any) -> Any:
        """One number in every lane."""
        return splat(self.builder, number, self.vector)


def lanes_of(kind: Any, wide: bool) -> int:
    """Numbers of a row of an array."""
    return 8 * WIDE // int(kind.dtype.bitwidth) if wide else STEP


def row_gatherer(wide: bool) -> Any:
    """``add(out, at, table, named, start)``: 16 rows of a table, named by number, are added to the one of ``out``."""

    @intrinsic
    def add(typing: Any, out: Any, at: Any, table: Any, named: Any, start: Any) -> Any:
        signature = types.void(out, types.intp, table, named, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind, _, rows_kind, named_kind, _ = signature.args
            lanes = lanes_of(kind, wide)
            into = Rows(context, builder, kind, given[0], lanes)
            table = Rows(context, builder, rows_kind, given[2], lanes)
            named = make_array(named_kind)(context, builder, given[3]).data
            total = into.load(given[1])
            for i in range(STEP):
                row = builder.load(builder.gep(named, [builder.add(given[4], ir.Constant(WHOLE, i))]))
                first = builder.mul(builder.zext(row, WHOLE), ir.Constant(WHOLE, lanes))
                total = builder.add(total, table.load(first))
            into.store(total, given[1])
            return context.get_dummy_value()

        return signature, generate

    return add


def row_maker(wide: bool) -> Any:
    """``make(table, to, numbers, at, places, minus)``: a row shifted right, and negated where minus is -1 and not 0."""

    @intrinsic
    def make(typing: Any, table: Any, to: Any, numbers: Any, at: Any, places: Any, minus: Any) -> Any:
        signature = types.void(table, types.intp, numbers, types.intp, types.intp, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = signature.args[0]
            lanes = lanes_of(kind, wide)
            into = Rows(context, builder, kind, given[0], lanes)
            source = Rows(context, builder, signature.args[2], given[2], lanes)
            places, minus = (
                into.splat(each if into.bytes == 8 else builder.trunc(each, into.element)) for each in given[4:]
            )
            value = builder.ashr(source.load(given[3]), places)
            # -x is the complement of x and one more.
            into.store(builder.sub(builder.xor(value, minus), minus), given[1])
            return context.get_dummy_value()

        return signature, generate

    return make


def row_summer(wide: bool) -> Any:
    """``add(out, to, a, i, b, j)``: the sum of a row of ``a`` and one of ``b``."""

    @intrinsic
    def add(typing: Any, out: Any, to: Any, a: Any, i: Any, b: Any, j: Any) -> Any:
        signature = types.void(out, types.intp, a, types.intp, b, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            lanes = lanes_of(signature.args[0], wide)
            into, a, b = (Rows(context, builder, signature.args[n], given[n], lanes) for n in (0, 2, 4))
            into.store(into.plus(a.load(given[3]), b.load(given[5])), given[1])
            return context.get_dummy_value()

        return signature, generate

    return add


def masked_adder(wide: bool) -> Any:
    """``add(out, at, table, packed, first, stop)``: rows of a table that packed bits name, plus the one of ``out``.

    Each four bits from the byte ``first`` on name one of the next 16 rows.
    """

    @intrinsic
    def add(typing: Any, out: Any, at: Any, table: Any, packed: Any, first: Any, stop: Any) -> Any:
        signature = types.void(out, types.intp, table, packed, types.intp, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = signature.args[0]
            lanes = lanes_of(kind, wide)
            into = Rows(context, builder, kind, given[0], lanes)
            table = Rows(context, builder, signature.args[2], given[2], lanes)
            packed = make_array(signature.args[3])(context, builder, given[3]).data

            def body(places: Any, total: Any) -> Any:
                for row in places:
                    total = into.plus(total, table.load(row))
                return total

            into.store(_by_bytes(builder, packed, given[4:], lanes, body, into.load(given[1])), given[1])
            return context.get_dummy_value()

        return signature, generate

    return add


def masked_spreader(wide: bool) -> Any:
    """``add(table, values, at, packed, first, stop)``: a row of values is added to the rows that packed bits name."""

    @intrinsic
    def add(typing: Any, table: Any, values: Any, at: Any, packed: Any, first: Any, stop: Any) -> Any:
        signature = types.void(table, values, types.intp, packed, types.intp, types.intp)

        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            kind = signature.args[0]
            lanes = lanes_of(kind, wide)
            table = Rows(context, builder, kind, given[0], lanes)
            packed = make_array(signature.args[3])(context, builder, given[3]).data
            value = Rows(context, builder, signature.args[1], given[1], lanes).load(given[2])

            def body(places: Any, same: Any) -> Any:
                for row in places:
                    table.store(table.plus(table.load(row), value), row)
                return same

            _by_bytes(builder, packed, given[4:], lanes, body, value)
            return context.get_dummy_value()

        return signature, generate

    return add


@intrinsic
def turn_in(typing: Any, x: Any, at: Any, stride: Any, unit: Any, most: Any, out: Any, to: Any, pitch: Any) -> Any:
    """A square of 16 by 16 numbers, turned: rows ``stride`` apart become columns of rows ``pitch`` apart.

    Floating-point numbers become whole ones on the way: times ``unit``, rounded down, no less than -2**31 and no more
    than ``most``.
    """
    signature = types.void(x, types.intp, types.intp, types.float32, types.intp, out, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source = Rows(context, builder, signature.args[0], given[0], STEP)
        into = Rows(context, builder, signature.args[5], given[5], STEP)
        rows = [source.load(place(builder, given[1], given[2], i)) for i in range(STEP)]
        if source.floating:
            floor = get_or_insert_function(
                builder.module, ir.FunctionType(source.vector, [source.vector]), f"llvm.floor.v{STEP}f32"
            )
            whole = ir.VectorType(ir.IntType(32), STEP)
            unit, most = source.splat(given[3]), splat(builder, builder.trunc(given[4], whole.element), whole)
            # The last float32 below 2**31, which may lie above or below the most.
            last, least = (ir.Constant(source.vector, [each] * STEP) for each in (2.0**31 - 128, -(2.0**31)))
            made = []
            for row in rows:
                value = builder.call(floor, [builder.fmul(row, unit)])
                beyond = builder.fcmp_ordered(">", value, last)
                value = builder.select(beyond, last, value)
                value = builder.select(builder.fcmp_ordered(">", value, least), value, least)
                number = builder.fptosi(value, whole)
                beyond = builder.or_(beyond, builder.icmp_signed(">", number, most))
                made.append(_whole(builder, builder.select(beyond, most, number), into.vector))
            rows = made
        else:
            rows = [_whole(builder, row, into.vector) for row in rows]
        for i, row in enumerate(turned(builder, rows)):
            into.store(row, place(builder, given[6], given[7], i))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def turn_out(typing: Any, sums: Any, at: Any, pitch: Any, unit: Any, bias: Any, first: Any, out: Any, to: Any,
             stride: Any) -> Any:  # fmt: skip
    """The way back; numbers become floating point on the way, times ``unit`` and with a bias from ``first`` on."""
    signature = types.void(sums, types.intp, types.intp, types.float32, bias, types.intp, out, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source = Rows(context, builder, signature.args[0], given[0], STEP)
        into = Rows(context, builder, signature.args[6], given[6], STEP)
        rows = [source.load(place(builder, given[1], given[2], i)) for i in range(STEP)]
        if into.floating:
            rows = [builder.fmul(builder.sitofp(row, into.vector), into.splat(given[3])) for row in rows]
            offset = Rows(context, builder, signature.args[4], given[4], STEP).load(given[5])
            rows = [builder.fadd(row, offset) for row in turned(builder, rows)]
        else:
            rows = turned(builder, [_whole(builder, row, into.vector) for row in rows])
        for i, row in enumerate(rows):
            into.store(row, place(builder, given[7], given[8], i))
        return context.get_dummy_value()

    return signature, generate


def _by_bytes(builder: Any, packed: Any, ends: Any, lanes: int, body: Any, start: Any) -> Any:
    """A loop over bytes; ``body`` gets the places of the two rows that each names, and what it returned before."""
    first, stop = ends
    before = builder.block
    head, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    byte, running = builder.phi(WHOLE), builder.phi(start.type)
    byte.add_incoming(first, before)
    running.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", byte, stop), inside, after)
    builder.position_at_end(inside)
    bits = builder.zext(builder.load(builder.gep(packed, [byte])), WHOLE)
    base = builder.mul(builder.sub(byte, first), ir.Constant(WHOLE, 2 * STEP))
    low = builder.add(base, builder.and_(bits, ir.Constant(WHOLE, STEP - 1)))
    high = builder.add(base, builder.add(builder.lshr(bits, ir.Constant(WHOLE, 4)), ir.Constant(WHOLE, STEP)))
    found = body([builder.mul(row, ir.Constant(WHOLE, lanes)) for row in (low, high)], running)
    byte.add_incoming(builder.add(byte, ir.Constant(WHOLE, 1)), builder.block)
    running.add_incoming(found, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return running


def place(builder: Any, start: Any, stride: Any, i: int) -> Any:
    """Where row ``i`` begins, of rows so far apart."""
    return builder.add(start, builder.mul(ir.Constant(WHOLE, i), stride))


def splat(builder: Any, number: Any, vector: Any) -> Any:
    """One number in every lane."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(
        one, one, ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    )


def _whole(builder: Any, row: Any, vector: Any) -> Any:
    have, want = row.type.element.width, vector.element.width
    return row if have == want else builder.sext(row, vector) if have < want else builder.trunc(row, vector)


def turned(builder: Any, rows: list[Any]) -> list[Any]:
    """Columns of a square: its off-diagonal halves are exchanged, and those of its quarters, and so on."""
    step = len(rows) // 2
    while step:
        for i in range(len(rows)):
            if not i & step:
                a, b = rows[i], rows[i + step]
                for to, lanes in (
                    (i, [j - step + len(rows) if j & step else j for j in range(len(rows))]),
                    (i + step, [j + len(rows) if j & step else j + step for j in range(len(rows))]),
                ):
                    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(rows)), lanes)
                    rows[to] = builder.shuffle_vector(a, b, mask)
        step //= 2
    return rows
