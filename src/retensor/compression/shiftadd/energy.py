r"""Energy of a model by the operations it does and the memories its numbers pass, after published figures.

Picojoules per operation, of the authors' code, which has them from H. You, X. Chen, Y. Zhang, C. Li, S. Li, Z. Liu,
Z. Wang, Y. Lin, "ShiftAddNet: A Hardware-Inspired Deep Network", NeurIPS 2020, arXiv 2010.12785, table 1 (45 nm CMOS,
after M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014):

==========  ========  =====  =====
bits        multiply  add    shift
==========  ========  =====  =====
32          3.7       0.9    0.13
8           0.2       0.03   0.024
==========  ========  =====  =====

Per 16 bits moved: 200 from or to DRAM, 6 x 3.7 in the global buffer, 2 x 3.7 over the network on chip (3.7 for partial
sums), 3.7 in a register file (2 x 3.7 for weights). A layer of shifts moves 10 bits a number, midway between inputs of
16 and weights of 5; products of codes are taken from on-chip memory, and pay for partial sums and registers alone.

Memories are an accelerator like Eyeriss (Y.-H. Chen, T. Krishna, J. Emer, V. Sze, ISSCC 2016) with a row-stationary
data flow: of all ways to tile a layer that fit its 192 units and its memories, the one of least energy is taken. The
authors charge a multiply-accumulate of a dense layer as one multiplication, of MatAdd as one addition and of MatShift
as one shift, and nothing for what is between layers; ``accumulations=True`` charges each its addition too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import nn

from retensor.compression.shiftadd.attention import AddAttention
from retensor.compression.shiftadd.packed import PackedShiftLinear
from retensor.compression.shiftadd.shift import ShiftLinear
from retensor.compression.shiftadd.sources import Source, source_of
from retensor.graph.modes import evaluating
from retensor.units import check_flags

Operation = Literal["multiply", "add", "shift"]
PICOJOULES: dict[int, dict[Operation, float]] = {
    32: {"multiply": 3.7, "add": 0.9, "shift": 0.13},
    8: {"multiply": 0.2, "add": 0.03, "shift": 0.024},
}
"""Per operation, by bits."""
LEVELS = ("compute", "dram", "buffer", "noc", "register")
"""Where energy goes."""
DRAM, BUFFER, NOC, PARTIAL, REGISTER, WEIGHT_REGISTER = 200.0, 6 * 3.7, 2 * 3.7, 3.7, 3.7, 2 * 3.7
SHIFT_BITS = (16 + 5) // 2
UNITS, OUTPUT_REGISTERS, INPUT_REGISTERS, WEIGHT_REGISTERS, BUFFER_WORDS = 192, 16, 12, 960, 65536


class Picojoules(TypedDict):
    """By level, and their sum."""

    compute: float
    dram: float
    buffer: float
    noc: float
    register: float
    total: float


class Energy(TypedDict):
    """Operations, picojoules, and the same of every layer by its name."""

    multiplications: int
    adds: int
    shifts: int
    pj: Picojoules
    layers: dict[str, Any]


@dataclass(frozen=True)
class Work:
    """One layer's run: a convolution, or a linear layer of ``batch`` tokens where sizes are 1."""

    kind: Operation
    batch: int
    inputs: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    picture: tuple[int, int] = (1, 1)
    out_picture: tuple[int, int] = (1, 1)
    stride: int = 1

    @property
    def operations(self) -> int:
        """Terms of all outputs."""
        e, f = self.out_picture
        return self.batch * self.inputs * self.outputs * self.kernel[0] * self.kernel[1] * e * f


def energy(model: nn.Module, x: Any, bits: int = 32, *, accumulations: bool = False) -> Energy:
    """Operations and energy of one run.

    Parameters
    ----------
    model : nn.Module
        Plain, converted or frozen; run in eval mode. Counted are linear layers, convolutions, shift layers, and both
        products of the attentions that :func:`convert` knows. Tokens are charged to the expert they are routed to.
    x : torch.Tensor
        Inputs.
    bits : {32, 8}
    accumulations : bool
        Charge every term the addition that adds it up, which the authors leave out.

    Returns
    -------
    dict
        ``multiplications``, ``adds``, ``shifts``; ``pj`` with ``compute`` (operations alone), ``dram``, ``buffer``,
        ``noc``, ``register`` and ``total``; and ``layers``, the same of each.

    Raises
    ------
    ValueError
        Where there are no figures for these bits.

    Examples
    --------
    >>> found = energy(nn.Linear(64, 64), torch.zeros(10, 64))
    >>> found["multiplications"], round(found["pj"]["compute"])
    (40960, 151552)
    """
    if bits not in PICOJOULES:
        raise ValueError(f"bits is {bits}; there are figures for {' and '.join(map(str, PICOJOULES))}")
    check_flags(accumulations=accumulations)
    done: dict[str, list[Work]] = {}
    handles = []
    for name, layer in model.named_modules():
        if type(layer) in (nn.Linear, nn.Conv2d) or isinstance(layer, ShiftLinear | PackedShiftLinear):
            handles.append(layer.register_forward_hook(_layer_hook(name, done)))
        elif isinstance(layer, AddAttention) or source_of(layer) is not None:
            handles.append(layer.register_forward_hook(_attention_hook(name, done, source_of(layer)), with_kwargs=True))
    try:
        with evaluating(model), torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    layers = {name: _summed([_charged(work, bits, accumulations) for work in works]) for name, works in done.items()}
    total = _summed(list(layers.values()))
    return {**total, "layers": layers}  # type: ignore[typeddict-item]


def _layer_hook(name: str, done: dict[str, list[Work]]) -> Any:
    def hook(layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        x = inputs[0]
        if isinstance(layer, nn.Conv2d):
            batch, outputs, inputs_ = len(x), layer.out_channels, layer.in_channels // layer.groups
            # A grouped convolution is as many of one group each; the authors count a depthwise one like this.
            batch, outputs = batch * layer.groups, outputs // layer.groups
            if tuple(layer.stride) == tuple(layer.kernel_size):
                # Patches that do not overlap are the inputs of a linear layer.
                area = layer.kernel_size[0] * layer.kernel_size[1]
                places = output.shape[-2] * output.shape[-1]
                done.setdefault(name, []).append(Work("multiply", batch * places, inputs_ * area, outputs))
                return
            work = Work("multiply", batch, inputs_, outputs, tuple(layer.kernel_size), tuple(x.shape[-2:]),
                        tuple(output.shape[-2:]), int(layer.stride[0]))  # fmt: skip
        else:
            kind: Operation = "multiply" if isinstance(layer, nn.Linear) else "shift"
            work = Work(kind, x.numel() // layer.in_features, layer.in_features, layer.out_features)
        if work.batch:
            done.setdefault(name, []).append(work)

    return hook


def _attention_hook(name: str, done: dict[str, list[Work]], source: Source | None) -> Any:
    def hook(layer: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: torch.Tensor) -> None:
        x = inputs[0] if inputs else named["x"]
        batch, n = x.shape[:2]
        if source is not None:
            m = n
            if source.reduction > 1:
                sizes = inputs[1] if len(inputs) > 1 else named["feat_size"]
                pooled = getattr(layer, "pool", None) is not None
                m = 49 if pooled else (sizes[0] // source.reduction) * (sizes[1] // source.reduction)
            heads, d = source.heads, source.head_dim
            works = [Work("multiply", batch * heads * n, d, m), Work("multiply", batch * heads * n, m, d)]
        elif layer.attention == "binary_softmax":
            heads, d = layer.heads, layer.head_dim
            works = [Work("add", batch * heads * n, d, n), Work("multiply", batch * heads * n, n, d)]
        else:
            heads, d = layer.heads, layer.head_dim
            codes = layer.hash.bits if layer.attention == "ksh" else d
            works = [Work("add", batch * heads * codes, n, d), Work("add", batch * heads * n, codes, d)]
            if layer.attention == "ksh":
                anchors = layer.hash.anchors
                works += [
                    Work("multiply", batch * heads * n, d, anchors),
                    Work("multiply", batch * heads * n, anchors, codes),
                ]
        done.setdefault(f"{name}.products".lstrip("."), []).extend(works)

    return hook


def _charged(work: Work, bits: int, accumulations: bool) -> dict[str, Any]:
    per = PICOJOULES[bits]
    counts = {"multiplications": 0, "adds": 0, "shifts": 0}
    counts[{"multiply": "multiplications", "add": "adds", "shift": "shifts"}[work.kind]] = work.operations
    if accumulations and work.kind != "add":
        counts["adds"] = work.operations
    compute = (
        counts["multiplications"] * per["multiply"] + counts["adds"] * per["add"] + counts["shifts"] * per["shift"]
    )
    pj = {"compute": compute, **dict(zip(LEVELS[1:], movement(work, bits), strict=True))}
    return {**counts, "pj": {**pj, "total": sum(pj.values())}}


def _summed(parts: list[dict[str, Any]]) -> dict[str, Any]:
    counts = {name: sum(part[name] for part in parts) for name in ("multiplications", "adds", "shifts")}
    pj = {level: float(sum(part["pj"][level] for part in parts)) for level in (*LEVELS, "total")}
    return {**counts, "pj": pj}


@lru_cache(maxsize=4096)
def movement(work: Work, bits: int) -> tuple[float, float, float, float]:
    """Picojoules of DRAM, buffer, network and registers, by the tiling of least energy.

    Loops over the batch (N), outputs (M), inputs (C) and output rows (E) are split between DRAM (index 3), buffer (2),
    the array of units (1) and registers (0).
    """
    word = (SHIFT_BITS if work.kind == "shift" else bits) / 16
    more, units = (1, 1) if bits == 32 else (2, 4)
    r, s = work.kernel
    (h, w), (e, f), stride = work.picture, work.out_picture, work.stride
    linear = (h, w, e, f) == (1, 1, 1, 1)
    # The last tile may be smaller: an expert gets whatever number of tokens, a prime one too.
    n0, n3 = _ragged(work.batch)
    m0, m1, m2, m3 = _splits(work.outputs, 4)
    c0, c1, c2 = _splits(work.inputs, 3)
    e1, e3 = _ragged(e)
    if not linear and e > 1:
        # The rows of a picture are spread over the units.
        e1, e3 = e1[e1 > 1], e3[e1 > 1]
    kept = m0 <= OUTPUT_REGISTERS * more
    m0, m1, m2, m3 = (each[kept][:, None, None, None] for each in (m0, m1, m2, m3))
    kept = c0 * s < INPUT_REGISTERS * more
    c0, c1, c2 = (each[kept][None, :, None, None] for each in (c0, c1, c2))
    e1, e3 = (each[None, None, :, None] for each in (e1, e3))
    n0, n3 = (each[None, None, None, :] for each in (n0, n3))
    fits = (
        (m1 * c1 * e1 * r < UNITS * units)
        & (m0 * c0 * s < WEIGHT_REGISTERS * more)
        & (
            n0 * c1 * c0 * ((e1 - 1) * stride + r) * ((f - 1) * stride + s) + n0 * m2 * m1 * m0 * e1 * f
            < BUFFER_WORDS * more
        )
    )
    sizes = work.batch * h * w * work.inputs, r * s * work.inputs * work.outputs, work.batch * e * f * work.outputs
    inputs, weights, outputs = map(float, sizes)
    rows, columns = r * e / h, s * f / w
    one = np.ones_like(fits, dtype=float)
    on_chip = work.kind == "add"
    dram = one * (m3 * inputs + n3 * e3 * weights + outputs) * DRAM * (not on_chip)
    buffer = one * (m3 * m2 * inputs + np.maximum(2 * (c2 - 1), 1) * outputs) * BUFFER * (not on_chip)
    noc = (m3 * m2 * m1 * rows * inputs + n3 * e3 * e1 * weights) * NOC * (not on_chip)
    noc = one * (noc + np.maximum(c2 * (c1 * r - 1), 1) * outputs * PARTIAL)
    register = m3 * m2 * m1 * rows * m0 * columns * inputs + np.maximum(c2 * c1 * r * (c0 * s - 1) * 2, 1) * outputs
    register = one * (register * REGISTER + work.batch * e * f * weights * WEIGHT_REGISTER)
    if not fits.any():
        raise ValueError(
            f"no tiling of a layer of {work.inputs} inputs, {work.outputs} outputs and {f} columns fits the "
            "accelerator's memories; use a smaller picture or kernel"
        )
    total = np.where(fits, dram + buffer + noc + register, np.inf)
    best = np.unravel_index(int(total.argmin()), total.shape)
    return tuple(float(each[best] * word) for each in (dram, buffer, noc, register))  # type: ignore[return-value]


def _ragged(number: int) -> tuple[Any, Any]:
    """Sizes of tiles, and how many of each it takes."""
    sizes = np.array(sorted({*_divisors(number), *(2**i for i in range(number.bit_length()))}))
    return sizes, -(-number // sizes)


def _splits(number: int, parts: int) -> Any:
    """All ways to write a number as a product, one array a factor."""
    return np.array(list(_products(number, parts))).T


def _products(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (number,)
        return
    for divisor in _divisors(number):
        for rest in _products(number // divisor, parts - 1):
            yield (divisor, *rest)


@lru_cache(maxsize=4096)
def _divisors(number: int) -> tuple[int, ...]:
    small = [i for i in range(1, int(number**0.5) + 1) if number % i == 0]
    return tuple(sorted({*small, *(number // i for i in small)}))
