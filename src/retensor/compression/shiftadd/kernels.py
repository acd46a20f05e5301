"""MatAdd and MatShift on a CPU: products without a multiplication, compiled by numba.

Both come down to one loop: rows of a table, named by number, are added to up to 64 numbers that stay in registers.

MatAdd, ``b V`` with ``b`` of 0 and 1, packs 8 of its bits to a byte. For every 4 rows of V all their 16 sums are worked
out once, each from another one by a single addition, and a row of b then adds one of them for four of its bits instead
of one row of V a bit (V. Arlazarov, E. Dinic, M. Kronrod, I. Faradzev 1970, the method of the four Russians). For
``b^T V`` the roles are exchanged: rows of V are added to the one of 16 buckets that their bits name, and the buckets
are summed up by bits at the end.

MatShift, ``sum_k sign (x_k >> s_k)``, shifts every input once by each number of places that a weight has, with each
sign, for 64 tokens side by side; a weight is then a row of that table, and all weights of zero are one row of zeros. So
16 weights are 16 additions without a branch. The numbers have 16 bits where no sum can leave them, which takes half as
long, else 32 or 64. Weights are read as they are packed; the numbers of their rows, two bytes a weight, live during the
call only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from retensor.compression.shiftadd.loops import (
    MOST_SHIFT,
    bucket_sums,
    codes,
    masked_sums,
    plan,
    shifted_sums,
)
from retensor.compression.shiftadd.vectors import STEP, WIDE

WORK = 4_000_000
"""Additions below which another thread would cost more than it saves."""


def mat_add(bits: torch.Tensor, values: torch.Tensor, *, transposed: bool = False) -> torch.Tensor:
    """``bits @ values`` by additions alone; with ``transposed``, ``bits.T @ values``.

    Parameters
    ----------
    bits : torch.Tensor
        Of 0 and 1, of bool or any whole type; shape (..., rows, columns).
    values : torch.Tensor
        Shape (..., columns, width), or (..., rows, width) where transposed. A gradient flows to them.
    transposed : bool

    Returns
    -------
    torch.Tensor
        Of shape (..., rows, width), or (..., columns, width); of the type of ``values``. Types of 16 bits are added in
        float32. Leading dimensions broadcast.

    Raises
    ------
    TypeError
        Where bits are of floating point or complex, or values are bool or complex.
    ValueError
        Where a bit is neither 0 nor 1, or the shapes do not fit.

    Examples
    --------
    >>> bits = torch.tensor([[1, 0, 1], [0, 0, 0]])
    >>> mat_add(bits, torch.tensor([[1.0], [2.0], [4.0]]))
    tensor([[5.],
            [0.]])
    """
    if bits.is_floating_point() or bits.is_complex():
        raise TypeError(f"bits are of bool or a whole type, not {bits.dtype}; compare with a threshold first")
    if values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"values are real numbers, not {values.dtype}")
    if bits.ndim < 2 or values.ndim < 2 or bits.shape[-2 if transposed else -1] != values.shape[-2]:
        raise ValueError(
            f"bits of shape {list(bits.shape)}{' transposed' if transposed else ''} do not multiply values of shape "
            f"{list(values.shape)}"
        )
    if bits.dtype != torch.bool:
        if bool(((bits != 0) & (bits != 1)).any()):
            raise ValueError("bits are 0 or 1, and some are neither; compare with a threshold first")
        bits = bits.bool()
    lead = torch.broadcast_shapes(bits.shape[:-2], values.shape[:-2])
    packed = pack_rows(bits.expand(*lead, *bits.shape[-2:]))
    return packed_mat_add(packed, values.expand(*lead, *values.shape[-2:]), bits.shape[-1], transposed)


def pack_rows(bits: torch.Tensor) -> torch.Tensor:
    """Bits of shape (..., columns) as bytes of shape (..., ceil(columns / 8)), the lowest bit first.

    >>> pack_rows(torch.tensor([[True, False, True], [False, True, True]]))
    tensor([[5],
            [6]], dtype=torch.uint8)
    """
    if torch.compiler.is_compiling():
        packed: torch.Tensor = _pack_op(bits)
        return packed
    return _packed_rows(bits)


def packed_mat_add(packed: torch.Tensor, values: torch.Tensor, columns: int, transposed: bool = False) -> torch.Tensor:
    """:func:`mat_add` of rows that :func:`pack_rows` packed; leading dimensions are equal.

    It is an operator of torch's under a gradient, ``torch.export`` and ``torch.compile``; otherwise the compiled loop
    is called by itself, which is faster where there is little to add.
    """
    if torch.compiler.is_compiling() or (values.requires_grad and torch.is_grad_enabled()):
        out: torch.Tensor = _mat_add_op(packed, values, columns, transposed)
        return out
    return _summed(packed, values, columns, transposed)


def mat_shift(x: torch.Tensor, shift: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """``sum_k sign[o, k] * (x[..., k] >> -shift[o, k])`` for every output o, exactly.

    An arithmetic shift rounds down: against the product with ``sign * 2**shift`` each term of positive sign is up to
    one unit too low, and each of negative sign up to one too high.

    Parameters
    ----------
    x : torch.Tensor
        Fixed-point numbers, of a whole type; shape (..., inputs).
    shift : torch.Tensor
        P of the weights, whole numbers from -30 to 0; shape (outputs, inputs).
    sign : torch.Tensor
        -1, 0 or 1; of the same shape.

    Returns
    -------
    torch.Tensor
        int64, of shape (..., outputs).

    Raises
    ------
    TypeError
        Where x is of no whole type.
    ValueError
        Where P or a sign is out of range or no whole number, the shapes do not fit, or a sum may leave 64 bits.

    Examples
    --------
    >>> x = torch.tensor([[5, -5, 8]])
    >>> mat_shift(x, torch.tensor([[-1, -1, 0]]), torch.tensor([[1, 1, -1]]))
    tensor([[-9]])
    """
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"inputs are fixed-point numbers of a whole type, not {x.dtype}; see fixed_point")
    if shift.ndim != 2 or shift.shape != sign.shape or x.ndim < 1 or x.shape[-1] != shift.shape[1]:
        raise ValueError(
            f"inputs of shape {list(x.shape)}, shifts of {list(shift.shape)} and signs of {list(sign.shape)} do not "
            "fit; they are (..., inputs), (outputs, inputs) and the same"
        )
    if shift.numel() and not (int(shift.min()) >= -MOST_SHIFT and int(shift.max()) <= 0):
        raise ValueError(f"P lies between -{MOST_SHIFT} and 0, not {int(shift.min())} to {int(shift.max())}")
    if shift.is_floating_point() and bool((shift != shift.round()).any()):
        raise ValueError("P are whole numbers, and some are none; round them first")
    if bool(((sign != 0) & (sign.abs() != 1)).any()):
        raise ValueError("a sign is -1, 0 or 1, and some are none of these")
    bits, zero = 6, MOST_SHIFT + 1
    coded = torch.where(sign == 0, zero, -shift.to(torch.int64) + (sign < 0) * (zero + 1)).to(torch.uint8)
    rows = x.reshape(-1, x.shape[-1]).cpu().to(torch.int64).contiguous()
    largest = max(-int(rows.min()), int(rows.max())) if rows.numel() else 0
    out = np.empty((len(rows), len(shift)), np.int64)
    _shifted(rows.numpy(), largest, coded.reshape(-1).cpu().contiguous().numpy(), bits, out, (np.int32, np.int64))
    return torch.from_numpy(out).reshape(*x.shape[:-1], len(shift)).to(x.device)


def shift_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    outputs: int,
    bits: int = 5,
    frac_bits: int = 16,
    exponent: int = 0,
) -> torch.Tensor:
    """A linear layer of packed power-of-two weights on float inputs, inside of which only whole numbers are added.

    Parameters
    ----------
    x : torch.Tensor
        Floating point, of shape (..., inputs); rounded down to multiples of ``2**-frac_bits`` and saturated.
    packed : torch.Tensor
        Codes of :func:`retensor.quantizing.powers_of_two` for a weight of shape (outputs, inputs), packed by
        :func:`retensor.quantizing.pack`.
    bias : torch.Tensor, optional
    outputs, bits, frac_bits : int
    exponent : int
        The weights are ``2**exponent`` times what the codes say.

    Returns
    -------
    torch.Tensor
        Of shape (..., outputs) and the type of ``x``.

    Raises
    ------
    ValueError
        Where an input is not a number.
    """
    if torch.compiler.is_compiling():
        out: torch.Tensor = _shift_linear_op(x, packed, bias, outputs, bits, frac_bits, exponent)
        return out
    return _shift_linear(x, packed, bias, outputs, bits, frac_bits, exponent)


def _shift_linear(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int, bits: int, frac_bits: int,
    exponent: int,
) -> torch.Tensor:  # fmt: skip
    inputs = x.shape[-1]
    rows = x.detach().reshape(-1, inputs).to(device="cpu", dtype=torch.float32).contiguous()
    largest = 0
    if rows.numel():
        # Of numbers one of which is none neither is a number.
        low, high = (float(end) for end in rows.aminmax())
        if low != low:
            raise ValueError("an input of a shift layer is not a number; look for the first layer whose output is not")
        largest = min(2**31, math.ceil(min(2.0**31, max(-low, high) * 2.0**frac_bits)))
    out = torch.empty(len(rows), outputs)
    _shifted(
        rows.numpy(), largest, codes(packed.cpu().numpy(), bits, outputs * inputs), bits, out.numpy(),
        (np.int16, np.int32, np.int64), frac_bits, 2.0 ** (exponent - frac_bits), bias,
    )  # fmt: skip
    return out.reshape(*x.shape[:-1], outputs).to(device=x.device, dtype=x.dtype)


def _shifted(
    x: Any, largest: int, coded: Any, bits: int, out: Any, widths: tuple[Any, ...], frac_bits: int = 0,
    scale: float = 1.0, bias: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Sums of shifted x into ``out``, as numbers of the first of ``widths`` that no sum can leave."""
    (tokens, inputs), outputs = x.shape, out.shape[1]
    if not (tokens and outputs):
        return
    named, rows, counts, heaviest = plan(coded, 2 ** (bits - 1), outputs, inputs)
    # A shift may round one unit away from zero, and every input lies in the table as it is.
    most = max(largest * max(1.0, heaviest) + inputs, largest + 1)
    fitting = [width for width in widths if most < np.iinfo(width).max]
    if not fitting:
        raise ValueError(
            f"sums of {inputs} inputs of up to {largest} may leave 64 bits; shift the inputs before, or split them"
        )
    like = np.empty(0, fitting[0])
    offset = np.zeros(-(-outputs // STEP) * STEP, np.float32)
    if bias is not None:
        offset[:outputs] = bias.detach().cpu().to(torch.float32).numpy()
    saturated = 2**31 - 2**frac_bits

    def run(first: int, last: int) -> None:
        shifted_sums(
            x[first:last], named, rows, counts, like, np.float32(2.0**frac_bits), saturated, np.float32(scale), offset,
            out[first:last],
        )  # fmt: skip

    lanes = WIDE // like.itemsize
    blocks = -(-tokens // lanes)
    _in_parts(lambda a, b: run(a * lanes, min(tokens, b * lanes)), blocks, tokens * outputs * inputs)


def _packed_rows(bits: torch.Tensor) -> torch.Tensor:
    rows = bits.detach().cpu().contiguous().numpy()
    if rows.shape[-1] % 8:
        return torch.from_numpy(np.packbits(rows, axis=-1, bitorder="little")).to(bits.device)
    # Rows of whole bytes are one long row, which is packed many times as fast.
    packed = np.packbits(rows.reshape(-1), bitorder="little").reshape(*rows.shape[:-1], rows.shape[-1] // 8)
    return torch.from_numpy(packed).to(bits.device)


def _summed(packed: torch.Tensor, values: torch.Tensor, columns: int, transposed: bool) -> torch.Tensor:
    lead, (count, width) = values.shape[:-2], values.shape[-2:]
    wide = values.dtype
    if wide not in (torch.float32, torch.float64):
        wide = torch.promote_types(wide, torch.float32 if wide.is_floating_point else torch.int64)
    v = values.detach().to(device="cpu", dtype=wide)
    padded = -(-width // STEP) * STEP
    if padded != width:
        v = torch.nn.functional.pad(v, (0, padded - width))
    v = v.contiguous().numpy().reshape(-1, count, padded)
    p = packed.cpu().contiguous().numpy().reshape(-1, *packed.shape[-2:])
    rows = p.shape[1]
    made = torch.zeros(*lead, columns if transposed else rows, padded, dtype=wide)
    out = made.numpy().reshape(len(v), -1, padded)
    kernel = bucket_sums if transposed else masked_sums
    _in_parts(lambda a, b: kernel(p[a:b], v[a:b], columns, out[a:b]), len(v), len(v) * rows * columns * padded // 4)
    if padded != width:
        made = made[..., :width]
    return made.to(device=values.device, dtype=values.dtype)


def _in_parts(run: Callable[[int, int], Any], count: int, work: int) -> None:
    """Run over all of a range: in this thread, or on torch's number of threads where there is enough to do."""
    parts = min(torch.get_num_threads(), count, max(1, work // WORK))
    if parts <= 1:
        run(0, count)
        return
    # The compiled functions hold no lock of the interpreter's.
    bounds = [count * i // parts for i in range(parts + 1)]
    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))


@torch.library.custom_op("retensor::shiftadd_pack_rows", mutates_args=())
def _pack_op(bits: torch.Tensor) -> torch.Tensor:
    return _packed_rows(bits)


@_pack_op.register_fake
def _(bits: torch.Tensor) -> torch.Tensor:
    return bits.new_empty((*bits.shape[:-1], (bits.shape[-1] + 7) // 8), dtype=torch.uint8)


@torch.library.custom_op("retensor::shiftadd_mat_add", mutates_args=())
def _mat_add_op(packed: torch.Tensor, values: torch.Tensor, columns: int, transposed: bool) -> torch.Tensor:
    return _summed(packed, values, columns, transposed)


@_mat_add_op.register_fake
def _(packed: torch.Tensor, values: torch.Tensor, columns: int, transposed: bool) -> torch.Tensor:
    return values.new_empty((*values.shape[:-2], columns if transposed else packed.shape[-2], values.shape[-1]))


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    packed, _, ctx.columns, ctx.transposed = inputs
    ctx.save_for_backward(packed)


def _backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None, None]:
    (packed,) = ctx.saved_tensors
    return None, packed_mat_add(packed, gradient, ctx.columns, not ctx.transposed), None, None


_mat_add_op.register_autograd(_backward, setup_context=_keep)


@torch.library.custom_op("retensor::shiftadd_shift_linear", mutates_args=())
def _shift_linear_op(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int, bits: int, frac_bits: int,
    exponent: int,
) -> torch.Tensor:  # fmt: skip
    return _shift_linear(x, packed, bias, outputs, bits, frac_bits, exponent)


@_shift_linear_op.register_fake
def _(
    x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int, bits: int, frac_bits: int,
    exponent: int,
) -> torch.Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], outputs))
