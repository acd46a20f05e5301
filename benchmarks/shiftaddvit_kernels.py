"""Timings of ShiftAddViT's claim: MatAdd and MatShift beside torch's kernels, and whole models."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numba
import torch
from benchmarks.measuring import Times, threads, times
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import nn
from torch.nn import functional

from retensor.compression import shiftadd
from retensor.compression.shiftadd.loops import lined
from retensor.compression.shiftadd.vectors import STEP, WHOLE, Rows, place, turned
from retensor.quantizing import pack, powers_of_two

MAT_SHIFT = ((3136, 64, 512), (3136, 512, 64), (784, 128, 1024), (784, 1024, 128), (196, 64, 256))
"""Tokens, inputs, outputs: the authors' unit tests, and one head's size."""
MAT_ADD = ((1, 3136, 32, 16), (2, 784, 32, 16), (5, 196, 32, 16), (1, 3136, 64, 64), (8, 196, 64, 64))
"""Heads, tokens, width of a code, width of a value: the authors' unit tests, and two of vision transformers."""
ROUNDS, INNER = 15, 5
"""Calls of one kind follow each other five times, so that none finds the caches of another."""
SEQUENCES = (784, 3136)


TILE = 64
FEW = 8
"""Bits behind the point of inputs that are as coarse as int8's, and whose sums have room in 16 bits."""


@intrinsic
def _multiply_rows(typing: Any, sums: Any, at: Any, x: Any, first: Any, weight: Any, start: Any) -> Any:
    """64 sums and, of 16 rows of 64 numbers, each times a weight: the loop of MatShift, but for the multiplications."""
    signature = types.void(sums, types.intp, x, types.intp, weight, types.intp)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        out, rows = (Rows(context, builder, signature.args[i], given[i], TILE) for i in (0, 2))
        weights = make_array(signature.args[4])(context, builder, given[4]).data
        total = out.load(given[1])
        for k in range(STEP):
            factor = out.splat(builder.load(builder.gep(weights, [builder.add(given[5], ir.Constant(WHOLE, k))])))
            row = rows.load(builder.add(given[3], ir.Constant(WHOLE, k * TILE)))
            # Both may become one instruction.
            total = builder.fadd(total, builder.fmul(row, factor, flags=("contract",)), flags=("contract",))
        out.store(total, given[1])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def _turn(typing: Any, x: Any, at: Any, stride: Any, out: Any, to: Any, pitch: Any) -> Any:
    """A square of 16 by 16 numbers, turned."""
    signature = types.void(x, types.intp, types.intp, out, types.intp, types.intp)

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        source, into = (Rows(context, builder, signature.args[i], given[i], STEP) for i in (0, 3))
        for i, row in enumerate(turned(builder, [source.load(place(builder, *given[1:3], i)) for i in range(STEP)])):
            into.store(row, place(builder, *given[4:], i))
        return context.get_dummy_value()

    return signature, generate


@numba.njit(nogil=True)
def _dense(x: Any, weight: Any, out: Any) -> None:
    (tokens, inputs), outputs = x.shape, len(weight)
    flat, weights, made = x.reshape(-1), weight.reshape(-1), out.reshape(-1)
    rows, sums = lined(STEP * TILE, x), lined(outputs * TILE, x)
    for start in range(0, tokens, TILE):
        sums[:] = 0
        for k in range(0, inputs, STEP):
            for t in range(0, TILE, STEP):
                _turn(flat, (start + t) * inputs + k, inputs, rows, t, TILE)
            for o in range(outputs):
                _multiply_rows(sums, o * TILE, rows, 0, weights, o * inputs + k)
        for t in range(0, TILE, STEP):
            for o in range(0, outputs, STEP):
                _turn(sums, o * TILE + t, TILE, made, (start + t) * outputs + o, outputs)


def dense(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The float product by the compiler that compiles the shifts, in the order of their loops and on the same vectors.

    64 tokens side by side in registers, 16 inputs at a time; inputs and outputs are multiples of 16.
    """
    tokens = len(x)
    if tokens % TILE:
        x = functional.pad(x, (0, 0, 0, TILE - tokens % TILE))
    out = torch.empty(len(x), len(weight))
    _dense(x.numpy(), weight.numpy(), out.numpy())
    return out[:tokens]


def mat_shift_times() -> dict[tuple[int, int, int], Times]:
    """Every way to apply a layer of power-of-two weights, on one thread."""
    found = {}
    with threads(1), torch.inference_mode():
        for size in MAT_SHIFT:
            found[size] = times(_shifts(*size), ROUNDS, INNER)
    return found


def _shifts(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    torch.manual_seed(0)
    layer = shiftadd.ShiftLinear.from_linear(nn.Linear(inputs, outputs, bias=False))
    weight = layer.effective_weight().detach()
    x = torch.randn(tokens, inputs)
    codes = pack(powers_of_two(5).encode(weight), 5)
    shift, sign = layer.shift.detach().round().clamp(-14, 0), layer.sign.detach()
    small, few = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in (x.shape, (inputs, outputs)))
    dynamic = torch.ao.nn.quantized.dynamic.Linear(inputs, outputs)
    dynamic.set_weight_bias(torch.quantize_per_tensor(weight, float(weight.abs().max()) / 127, 0, torch.qint8), None)
    return {
        "MatShift": lambda: shiftadd.shift_linear(x, codes, None, outputs),
        "MatShift, 8 bits": lambda: shiftadd.shift_linear(x, codes, None, outputs, frac_bits=FEW),
        "fake shift": lambda: functional.linear(x, torch.exp2(shift) * sign),
        "float32": lambda: functional.linear(x, weight),
        "int8": lambda: dynamic(x),
        "int8 product": lambda: torch._int_mm(small, few),
        "numba float32": lambda: dense(x, weight),
    }


def mat_add_times() -> dict[tuple[int, int, int, int], Times]:
    """``b(q) KV`` and ``b(k)^T v`` on one thread; packing the codes is a call of its own."""
    found = {}
    with threads(1), torch.inference_mode():
        for size in MAT_ADD:
            heads, tokens, width, values = size
            torch.manual_seed(0)
            bits = torch.rand(heads, tokens, width) > 0.5
            floats, packed = bits.float(), shiftadd.pack_rows(bits)
            inner, v = torch.randn(heads, width, values), torch.randn(heads, tokens, values)
            found[size] = times(
                {
                    "MatAdd": _call(shiftadd.packed_mat_add, packed, inner, width),
                    "float32": _call(torch.matmul, floats, inner),
                    "MatAdd, transposed": _call(shiftadd.packed_mat_add, packed, v, width, True),
                    "float32, transposed": _call(torch.matmul, floats.mT, v),
                    "packing": _call(shiftadd.pack_rows, bits),
                },
                ROUNDS,
                INNER,
            )
    return found


def _call(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def attention_times() -> tuple[Mapping[str, float], Times]:
    """Growth from 784 to 3136 tokens of one head's products, and the times at both."""
    torch.manual_seed(0)
    calls: dict[str, Callable[[], Any]] = {}
    for tokens in SEQUENCES:
        q, k, v = torch.randn(3, 1, 1, tokens, 32)
        bits = (shiftadd.binarized(q), shiftadd.binarized(k))
        packed = tuple(shiftadd.pack_rows(b > 0) for b in bits)
        calls |= {
            f"linear, {tokens}": _linear(packed[0], packed[1], v),
            f"quadratic, {tokens}": _quadratic(*bits, v),
            f"fused softmax, {tokens}": _call(functional.scaled_dot_product_attention, q, k, v),
        }
    with threads(1), torch.inference_mode():
        found = times(calls, ROUNDS, INNER)
    small, large = SEQUENCES
    kinds = ("linear", "quadratic", "fused softmax")
    return {kind: found.ratio(f"{kind}, {large}", f"{kind}, {small}") for kind in kinds}, found


def _linear(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    return lambda: shiftadd.packed_mat_add(q, shiftadd.packed_mat_add(k, v, 32, True), 32)


def _quadratic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], Any]:
    return lambda: (q @ k.transpose(-1, -2)) @ v


def model_times() -> tuple[Times, dict[str, int]]:
    """PVTv2-B0 at 224 pixels, one picture, one thread; and bytes of weights that stay in memory."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("pvt_v2_b0", pretrained=False).eval()
    x = torch.randn(1, 3, 224, 224)
    shifted = shiftadd.convert(model, linears="shift").eval()
    models = {
        "float32": model,
        "additions and float shifts": shifted,
        "additions and packed shifts": shiftadd.freeze(shifted),
        "additions and packed mixtures": shiftadd.freeze(shiftadd.convert(model, linears="moe")),
        "int8": _int8(model),
    }
    with threads(1), torch.inference_mode():
        found = times({name: _call(one, x) for name, one in models.items()}, 5)
    layers = [m for m in shifted.modules() if isinstance(m, shiftadd.ShiftLinear)]
    numbers = sum(m.in_features * m.out_features for m in layers)
    packed = sum(
        m.codes.numel() for m in models["additions and packed shifts"].modules()
        if isinstance(m, shiftadd.PackedShiftLinear)
    )  # fmt: skip
    return found, {"float32": 4 * numbers, "packed": packed}


def _int8(model: nn.Module) -> nn.Module:
    made: nn.Module = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    return made
