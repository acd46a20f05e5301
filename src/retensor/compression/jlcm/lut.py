"""The product of a coded layer without its weight: inputs are added up by codeword, then multiplied by codewords.

    y_i = s_g(i) sum_m C_m sum over {j: I_ij = m} of x_j

takes k multiplications a row instead of one a weight, and reads the packed indices instead of numbers. Compiled by
numba for a CPU, on the thread that calls it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from retensor.compression.jlcm.layer import CodebookLayer
from retensor.planning.compiled import compiled

TILE = 64
"""Samples whose sums stand side by side."""


@torch.no_grad()
def lut_linear(layer: CodebookLayer, x: torch.Tensor) -> torch.Tensor:
    """What a coded linear layer gives, by sums of inputs for each codeword.

    Parameters
    ----------
    layer : CodebookLayer
        Of a linear layer, on the CPU.
    x : torch.Tensor
        float32 of shape (..., inputs).

    Returns
    -------
    torch.Tensor
        float32 of shape (..., outputs), without gradients.

    Raises
    ------
    TypeError
        Where it is another layer, or inputs are of another type or device.
    ValueError
        Where samples have another number of inputs.

    Examples
    --------
    >>> from retensor.compression import jlcm
    >>> net = nn.Sequential(nn.Linear(8, 4))
    >>> layer = jlcm.compress(net, torch.randn(8, 8), bits=2, groups=2, iters=0).model[0]
    >>> x = torch.randn(3, 8)
    >>> torch.allclose(lut_linear(layer, x), layer(x), atol=1e-5)
    True
    """
    if not isinstance(layer, CodebookLayer) or not isinstance(layer.layer, nn.Linear):
        raise TypeError(f"sums by codeword are those of a coded linear layer, not of {type(layer).__name__}")
    if x.dtype != torch.float32 or x.device.type != "cpu" or layer.packed.device.type != "cpu":
        raise TypeError(f"sums by codeword take float32 on the CPU, not {x.dtype} on {x.device}")
    rows, columns = layer.shape
    if not x.ndim or x.shape[-1] != columns:
        raise ValueError(f"the layer takes {columns} inputs, and x has shape {list(x.shape)}")
    flat = x.reshape(-1, columns)
    groups = layer.groups()
    words = layer.codebook[groups.long()] if layer.coding.codebooks > 1 else layer.codebook.expand(rows, -1)
    if layer.scales is not None:
        words = words * layer.scales[groups.long()][:, None]
    packed = np.append(layer.packed.numpy(), np.zeros(8, np.uint8))
    given = (packed, layer.coding.bits, np.ascontiguousarray(words.numpy()))
    if len(flat) == 1:
        out = torch.from_numpy(_one(*given, flat[0].contiguous().numpy()))[None]
    else:
        out = torch.empty(len(flat), rows)
        for start in range(0, len(flat), TILE):
            part = flat[start : start + TILE].T.contiguous().numpy()
            out[start : start + TILE] = torch.from_numpy(_many(*given, part)).T
    if layer.bias is not None:
        out += layer.bias
    return out.reshape(*x.shape[:-1], rows)


@compiled
def _one(packed: Any, bits: Any, words: Any, x: Any) -> Any:
    rows, columns, k = len(words), len(x), words.shape[1]
    mask, width = np.uint64((1 << bits) - 1), np.uint64(bits)
    out = np.empty(rows, np.float32)
    # Four sets of sums in turn: an addition need not wait for the one before.
    sums = np.empty((4, 1 << bits), np.float32)
    whole = columns - columns % 4
    for i in range(rows):
        sums[:] = 0
        at: Any = np.uint64(i * columns * bits)
        for j in range(0, whole, 4):
            # Four indices lie in at most five bytes; the array ends with more than that.
            byte = at >> np.uint64(3)
            held: Any = np.uint64(packed[byte])
            for more in range(1, 5):
                held |= np.uint64(packed[byte + np.uint64(more)]) << np.uint64(8 * more)
            held >>= at & np.uint64(7)
            sums[0, held & mask] += x[j]
            held >>= width
            sums[1, held & mask] += x[j + 1]
            held >>= width
            sums[2, held & mask] += x[j + 2]
            held >>= width
            sums[3, held & mask] += x[j + 3]
            at += np.uint64(4) * width
        for j in range(whole, columns):
            byte = at >> np.uint64(3)
            last = np.uint64(packed[byte]) | (np.uint64(packed[byte + np.uint64(1)]) << np.uint64(8))
            sums[0, (last >> (at & np.uint64(7))) & mask] += x[j]
            at += width
        total = np.float32(0)
        for m in range(k):
            total += words[i, m] * (sums[0, m] + sums[1, m] + (sums[2, m] + sums[3, m]))
        out[i] = total
    return out


@compiled
def _many(packed: Any, bits: Any, words: Any, x: Any) -> Any:
    rows, columns, k, count = len(words), len(x), words.shape[1], x.shape[1]
    mask, width = np.uint64((1 << bits) - 1), np.uint64(bits)
    out = np.zeros((rows, count), np.float32)
    sums = np.empty((1 << bits, count), np.float32)
    for i in range(rows):
        sums[:] = 0
        at: Any = np.uint64(i * columns * bits)
        for j in range(columns):
            byte = at >> np.uint64(3)
            held = np.uint64(packed[byte]) | (np.uint64(packed[byte + np.uint64(1)]) << np.uint64(8))
            m = (held >> (at & np.uint64(7))) & mask
            for b in range(count):
                sums[m, b] += x[j, b]
            at += width
        for m in range(k):
            for b in range(count):
                out[i, b] += words[i, m] * sums[m, b]
    return out
