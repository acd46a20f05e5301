"""MatAdd and MatShift on a CPU: products without a multiplication, compiled by numba.

Both come down to one loop: add rows of a table, named by a list of offsets, to 16 numbers that stay in registers.

MatAdd, ``b V`` with ``b`` of 0 and 1, packs 8 of its bits to a byte. For every 8 rows of V (or 4, where there are few
rows of b) all their 256 sums are worked out once, each from another one by a single addition, and a row of b then adds
one of them a byte instead of one row of V a bit (V. Arlazarov, E. Dinic, M. Kronrod, I. Faradzev 1970, the method of
the four Russians). For ``b^T V`` the roles are exchanged: rows of V are added to the one of 256 buckets that their byte
names, and the buckets are summed up by bits at the end.

MatShift, ``sum_k sign (x_k >> s_k)``, shifts every input once by each number of places that a weight has, for 16 tokens
side by side; a weight is then the offset of a row of that table, added where its sign is plus and subtracted where it
is minus, and zeros cost nothing. The 5-bit weights are read as they are packed; the lists of offsets, two bytes a
weight, live during the call only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch

from retensor.compression.shiftadd.loops import (
    BLOCK,
    LANES,
    MOST_SHIFT,
    bucket_sums,
    codes,
    fill,
    largest,
    masked_sums,
    shifted_linear,
    shifted_sums,
    span,
    to_fixed,
)

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
        int64, of shape (..., outputs). Added in 32 bits where no sum can leave them, which is seen from the largest
        input and the weights, and in 64 otherwise.

    Raises
    ------
    TypeError
        Where x is of no whole type.
    ValueError
        Where P or a sign is out of range, or the shapes do not fit.

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
    if bool(((sign != 0) & (sign.abs() != 1)).any()):
        raise ValueError("a sign is -1, 0 or 1, and some are none of these")
    bits, zero = 6, MOST_SHIFT + 1
    coded = torch.where(sign == 0, zero, -shift.to(torch.int64) + (sign < 0) * (zero + 1)).to(torch.uint8)
    rows = x.reshape(-1, x.shape[-1])
    fixed = np.ascontiguousarray(rows.cpu().numpy().astype(np.int64 if x.dtype == torch.int64 else np.int32))
    lists = _lists(coded.reshape(-1).cpu().contiguous().numpy(), bits, *shift.shape)
    if not _fits_32(fixed, lists):
        fixed = fixed.astype(np.int64)
    out = np.empty((len(fixed), len(shift)), fixed.dtype)
    _over_rows(lambda a, b: shifted_sums(fixed[a:b], *lists[:5], out[a:b]), len(out), shift.numel())
    return torch.from_numpy(out.astype(np.int64)).reshape(*x.shape[:-1], len(shift)).to(x.device)


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
    rows = x.detach().reshape(-1, inputs).to(device="cpu", dtype=torch.float32).contiguous().numpy()
    fixed = np.empty(rows.shape, np.int32)
    if not to_fixed(rows, 2.0**frac_bits, float((2 ** (31 - frac_bits) - 1) * 2**frac_bits), fixed):
        raise ValueError("an input of a shift layer is not a number; look for the first layer whose output is not")
    lists = _lists(codes(packed.cpu().numpy(), bits, outputs * inputs), bits, outputs, inputs)
    if not _fits_32(fixed, lists):
        fixed = fixed.astype(np.int64)
    offset = np.zeros(outputs, np.float32) if bias is None else bias.detach().cpu().to(torch.float32).numpy()
    out = np.empty((len(rows), outputs), np.float32)
    unit = np.float32(2.0 ** (exponent - frac_bits))
    _over_rows(
        lambda a, b: shifted_linear(fixed[a:b], *lists[:5], unit, offset, out[a:b]),
        len(out), outputs * inputs,
    )  # fmt: skip
    return torch.from_numpy(out).reshape(*x.shape[:-1], outputs).to(device=x.device, dtype=x.dtype)


def _packed_rows(bits: torch.Tensor) -> torch.Tensor:
    found = np.packbits(bits.detach().cpu().contiguous().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(found).to(bits.device)


def _summed(packed: torch.Tensor, values: torch.Tensor, columns: int, transposed: bool) -> torch.Tensor:
    lead, (count, width) = values.shape[:-2], values.shape[-2:]
    rows = packed.shape[-2]
    wide = torch.promote_types(values.dtype, torch.float32 if values.is_floating_point() else torch.int64)
    padded = -(-width // LANES) * LANES
    v = values.detach().reshape(-1, count, width).to(device="cpu", dtype=wide)
    if padded != width:
        v = torch.nn.functional.pad(v, (0, padded - width))
    v = v.contiguous().numpy()
    p = packed.reshape(-1, rows, packed.shape[-1]).cpu().contiguous().numpy()
    out = np.zeros((len(v), columns if transposed else rows, padded), v.dtype)
    at_once = _at_once(rows, columns, transposed)
    kernel = bucket_sums if transposed else masked_sums
    work = rows * -(-columns // at_once) * padded
    _in_parts(lambda a, b: kernel(p[a:b], v[a:b], columns, at_once, out[a:b]), len(v), len(v) * work)
    made = torch.from_numpy(out)[..., :width].reshape(*lead, out.shape[1], width)
    return made.to(device=values.device, dtype=values.dtype)


def _at_once(rows: int, columns: int, transposed: bool) -> int:
    """Bits a table is made for, 8 or 4: whichever adds less."""
    cost = {b: -(-columns // b) * ((2 if transposed else 1) * 2**b + rows) for b in (4, 8)}
    return min(cost, key=cost.__getitem__)


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


def _over_rows(run: Callable[[int, int], Any], rows: int, size: int) -> None:
    blocks = -(-rows // LANES)
    _in_parts(lambda a, b: run(a * LANES, min(rows, b * LANES)), blocks, rows * size)


class _Lists(NamedTuple):
    """The weights of a layer as offsets in a table.

    ``added`` and ``taken`` count, for every output and block of inputs, what is added from the front of its offsets and
    subtracted from their back; a table has ``span`` rows an input, the first shifted by ``low`` places; ``heaviest`` is
    the largest sum of the weights of an output, without signs.
    """

    offsets: Any
    added: Any
    taken: Any
    low: int
    span: int
    heaviest: float


def _lists(coded: Any, bits: int, outputs: int, inputs: int) -> _Lists:
    parts = -(-inputs // BLOCK)
    offsets = np.empty(outputs * inputs + 1, np.uint16)
    added, taken = (np.zeros((outputs, parts), np.int32) for _ in range(2))
    low, high, heaviest = span(coded, 2 ** (bits - 1), outputs, inputs)
    fill(coded, 2 ** (bits - 1), outputs, inputs, low, high - low + 1, offsets, added, taken)
    return _Lists(offsets, added, taken, low, high - low + 1, heaviest)


def _fits_32(fixed: Any, lists: _Lists) -> bool:
    if fixed.dtype != np.int32:
        return False
    # A shift may round one unit away from zero.
    return bool(float(largest(fixed)) * lists.heaviest + fixed.shape[1] < 2**31)


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
