"""The implicit function: weights as values of a small network at the coordinates of a tensor's entries.

Entry (o, c) of tensor l of L has the raw coordinates ``(l, o, c, L, n_out, n_in)``, entry o of a bias
``(l, o, 0, L, n_out, 1)``. All are divided by NORM, the first three then by the last three:
``v = [l/L, o/n_out, c/n_in, L/NORM, n_out/NORM, n_in/NORM]``, and
``phi(v) = [v, sin(2^k pi v_j), cos(2^k pi v_j)]`` for k = 0..F-1 goes through
``x = ReLU(W_0 phi)``, ``x = s_i ReLU(W_i x) + x``, and a last layer with one output an element of a kernel, which is
divided by the raw ``n_in``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

# Rows that are worked out at once where no gradient is needed, so that memory stays bounded.
_CHUNK = 2_048


class WeightField(nn.Module):
    """The implicit function of one tensor.

    Parameters
    ----------
    hidden : int
        Width of its layers.
    depth : int
        Layers before the last.
    freqs : int
        F, the octaves of the Fourier features.
    outputs : int
        Elements of the largest kernel.
    norm : float
        NORM, the largest size of a tensor.
    scale : float
        Start of the residual scales s_i.

    Examples
    --------
    >>> field = WeightField(hidden=8, depth=2, freqs=3, outputs=9, norm=4.0)
    >>> field(coordinates(0, 4, rows=4, columns=2)).shape
    torch.Size([8, 9])
    """

    def __init__(self, hidden: int, depth: int, freqs: int, outputs: int, norm: float, scale: float = 0.1) -> None:
        super().__init__()
        self.freqs = freqs
        self.norm = norm
        self.first = nn.Linear(6 + 12 * freqs, hidden)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.scales = nn.Parameter(torch.full((depth - 1,), scale))
        self.last = nn.Linear(hidden, outputs)

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Values of shape (entries, outputs) at raw coordinates of shape (entries, 6), which stay as they are."""
        x = features(raw, self.freqs, self.norm).to(self.first.weight.dtype)
        x = torch.relu(self.first(x))
        for scale, layer in zip(self.scales, self.inner, strict=True):
            x = scale * torch.relu(layer(x)) + x
        return self.last(x) / raw[:, 5:].to(x.dtype)


def coordinates(
    number: int, of: int, rows: int, columns: int | None, *, dtype: torch.dtype | None = None, device: object = None
) -> torch.Tensor:
    """Raw coordinates of a tensor's entries, row by row.

    Parameters
    ----------
    number, of : int
        l and L.
    rows : int
        n_out.
    columns : int or None
        n_in; None for a bias.
    dtype, device
        torch's default type, and the CPU, by default.

    Returns
    -------
    torch.Tensor
        Shape (rows * columns, 6).

    Examples
    --------
    >>> coordinates(1, 4, 2, None)
    tensor([[1., 0., 0., 4., 2., 1.],
            [1., 1., 0., 4., 2., 1.]])
    """
    width = 1 if columns is None else columns
    kind = {"dtype": dtype or torch.get_default_dtype(), "device": device}
    o = torch.arange(rows, **kind).repeat_interleave(width)
    c = torch.arange(width, **kind).repeat(rows)
    fixed = [torch.full_like(o, value) for value in (number, of, rows, width)]
    return torch.stack([fixed[0], o, c, *fixed[1:]], dim=1)


def features(raw: torch.Tensor, freqs: int, norm: float) -> torch.Tensor:
    """Fourier features ``phi(v)`` of raw coordinates, scaled as the module says.

    Parameters
    ----------
    raw : torch.Tensor
        Shape (..., 6); stays as it is.
    freqs : int
        F.
    norm : float
        NORM.

    Returns
    -------
    torch.Tensor
        Shape (..., 6 + 12 F): v, the sines of each coordinate's octaves in turn, and the cosines.

    Examples
    --------
    >>> features(coordinates(1, 2, 2, None), freqs=1, norm=2.0)[:, :6]
    tensor([[0.5000, 0.0000, 0.0000, 1.0000, 1.0000, 0.5000],
            [0.5000, 0.5000, 0.0000, 1.0000, 1.0000, 0.5000]])
    """
    scaled = raw / norm
    v = torch.cat([scaled[..., :3] / scaled[..., 3:], scaled[..., 3:]], dim=-1)
    octaves = math.pi * 2.0 ** torch.arange(freqs, dtype=v.dtype, device=v.device)
    angles = (octaves[:, None] * v[..., None, :]).flatten(-2)
    return torch.cat([v, angles.sin(), angles.cos()], dim=-1)


def values(fields: Sequence[WeightField], raws: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What each field gives at its coordinates, those of like many entries in one batch of matrix products."""
    found: list[torch.Tensor | None] = [None] * len(fields)
    for bucket in _buckets([len(raw) for raw in raws]):
        longest = max(len(raws[i]) for i in bucket)
        # Rows that are added are worked out for nothing, and must not be divided by 0.
        padded = torch.stack([
            nn.functional.pad(raws[i], (0, 0, 0, longest - len(raws[i])), value=1.0) for i in bucket
        ])  # fmt: skip
        mine = [fields[i] for i in bucket]
        if torch.is_grad_enabled():
            whole = _stacked(mine, padded)
        else:
            whole = torch.cat([_stacked(mine, part) for part in padded.split(_CHUNK, dim=1)], dim=1)
        for place, i in enumerate(bucket):
            found[i] = whole[place, : len(raws[i])]
    return [value for value in found if value is not None]


def shaped(value: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of ``shape`` of the values of its entries: a smaller kernel takes the centre of the outputs.

    Matrices and biases take the first.

    Parameters
    ----------
    value : torch.Tensor
        Shape (entries, outputs).
    shape : sequence of int
    """
    kernel = math.prod(shape[2:])
    outputs = value.shape[1]
    start = outputs // 2 - kernel // 2 if len(shape) > 2 else 0
    return value[:, start : start + kernel].reshape(tuple(shape))


def _buckets(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Places of like sizes together: none less than half of the largest, so that little is padded."""
    left = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    while left:
        bucket = [i for i in left if 2 * sizes[i] >= sizes[left[0]]]
        yield sorted(bucket)
        left = [i for i in left if i not in bucket]


def _stacked(fields: Sequence[WeightField], raw: torch.Tensor) -> torch.Tensor:
    """Values of shape (fields, entries, outputs) at coordinates of shape (fields, entries, 6)."""
    one = fields[0]

    def layer(x: torch.Tensor, layers: Sequence[nn.Linear]) -> torch.Tensor:
        weight, bias = (torch.stack([getattr(each, label) for each in layers]) for label in ("weight", "bias"))
        return torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))

    x = features(raw, one.freqs, one.norm).to(one.first.weight.dtype)
    x = torch.relu(layer(x, [field.first for field in fields]))
    for i in range(len(one.inner)):
        scale = torch.stack([field.scales[i] for field in fields])[:, None, None]
        x = scale * torch.relu(layer(x, [field.inner[i] for field in fields])) + x
    return layer(x, [field.last for field in fields]) / raw[..., 5:].to(x.dtype)
