r"""The gradient of a quantiser in blocks: slopes that stand for staircases, and the part that scales pass on.

:func:`pullback` is the formula of :mod:`retensor.compression.fp4` on the parts of a quantiser that has run. With
``Q' = 1`` and ``Q_s' = 1`` what scales add is the residual :math:`\sum_i g_i (Q(u_i) - u_i)` at the block's largest
number: no product more.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from retensor.compression.fp4.format import Format
from retensor.files import described
from retensor.quantizing.grids import Grid
from retensor.quantizing.rounding import slope

Estimator = Literal["ste", "clipped", "dge", "tanh", "linear"]
ScaleGradient = Literal["none", "ste", "relaxed"]
ESTIMATORS: tuple[Estimator, ...] = ("ste", "clipped", "dge", "tanh", "linear")
SCALE_GRADIENTS: tuple[ScaleGradient, ...] = ("none", "ste", "relaxed")


def slope_of(u: torch.Tensor, grid: Grid, estimator: Estimator, temperature: float = 0.5) -> torch.Tensor | None:
    r"""The slope :math:`Q'` that stands for the staircase's at each number; None where it is 1 everywhere.

    Parameters
    ----------
    u : torch.Tensor
        Numbers in units of their block's scale.
    grid : Grid
        Of the elements.
    estimator : {"ste", "clipped", "dge", "tanh", "linear"}
        ``ste``: 1. ``clipped``: 1 within the grid, 0 beyond. ``dge``: the differentiable gradient estimator of R. Wang
        and others, arXiv 2501.17116, :math:`|2t/\delta - 1|^{1/k - 1} / k`, k = 5, at most 3
        (:mod:`retensor.quantizing.rounding`). ``tanh``: of a soft step
        :math:`\tanh((t/\delta - 1/2)/\tau) / 2\tanh(1/2\tau)`, which a sigmoid of half the temperature is too.
        ``linear``: a ramp over a share :math:`\tau` of the cell in its middle. Each but the first two has the mean 1
        over a cell (dge before it is cut off), and is 0 beyond the grid.
    temperature : float
        :math:`\tau` of the last two, above 0; of ``linear`` at most 1.

    Returns
    -------
    torch.Tensor or None

    Raises
    ------
    ValueError
        Where no estimator has that name, or the temperature is out of range.

    Examples
    --------
    >>> from retensor.quantizing import GRIDS
    >>> slope_of(torch.tensor([2.1, 2.5, 7.0]), GRIDS["e2m1"], "linear", 0.5)
    tensor([0., 2., 0.])
    """
    check_estimator(estimator, temperature)
    if estimator == "ste":
        return None
    if estimator == "clipped" or estimator == "dge":
        return slope(u, grid, estimator)
    values = torch.tensor(sorted({v for v in grid.values if math.isfinite(v)}), dtype=u.dtype, device=u.device)
    lower = (torch.bucketize(u.detach().contiguous(), values, right=True) - 1).clamp(0, len(values) - 2)
    off = (u - values[lower]) / (values[lower + 1] - values[lower]) - 0.5
    inside = ((u >= grid.least) & (u <= grid.largest)).to(u.dtype)
    if estimator == "linear":
        return inside * (off.abs() <= temperature / 2).to(u.dtype) / temperature
    soft = 1 - torch.tanh(off / temperature).square()
    return inside * soft / (2 * temperature * math.tanh(0.5 / temperature))


def check_estimator(estimator: object, temperature: object) -> None:
    """Refuse an estimator that is none, or a temperature it cannot have."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"q_grad is {described(estimator)}; it is one of {', '.join(ESTIMATORS)}")
    most = 1.0 if estimator == "linear" else math.inf
    if not isinstance(temperature, int | float) or not 0 < temperature <= most:
        limit = "above 0 and at most 1" if estimator == "linear" else "above 0"
        raise ValueError(f"the temperature of {estimator} is a number {limit}, not {described(temperature)}")


def pullback(
    grad: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    most: torch.Tensor,
    sizes: torch.Tensor,
    largest: float,
    element_slope: torch.Tensor | None = None,
    scale_slope: torch.Tensor | None = None,
    tensor_scale: torch.Tensor | None = None,
    tensor_slope: float = 0.0,
    axis: int = -1,
) -> torch.Tensor:
    r"""The gradient of a loss with respect to the input of a quantiser, from that of its output.

    Parameters
    ----------
    grad, x, out : torch.Tensor
        Of one shape, of which ``axis`` are the numbers of a block: :math:`g`, :math:`x` and :math:`\hat x`.
    most, sizes : torch.Tensor
        Of each block, without that axis: the largest absolute number, and :math:`s_q`.
    largest : float
        The largest element.
    element_slope : torch.Tensor, optional
        :math:`Q'(u)`; 1 by default.
    scale_slope : torch.Tensor, optional
        :math:`Q_s'(s/s_T)` of each block; scales are held as constants by default.
    tensor_scale : torch.Tensor, optional
        :math:`s_T`, where there is one.
    tensor_slope : float
        :math:`\partial s_T / \partial \max |X|`, 1 / (6 s_max).
    axis : int

    Returns
    -------
    torch.Tensor
        Where several numbers of a block are its largest, each gets as much of what the scale passes on; so with the
        tensor's largest.
    """
    direct = grad if element_slope is None else grad * element_slope
    if scale_slope is None:
        return direct
    # s_q (Q(u) - u Q'(u)), block by block projected on the gradient.
    residual = out - (x if element_slope is None else x * element_slope)
    projected = (grad * residual).sum(axis) / torch.where(sizes == 0, torch.full_like(sizes, math.inf), sizes)
    sizes_of = x.abs()
    top = sizes_of == most.unsqueeze(axis)
    added = (scale_slope * projected / largest / top.sum(axis)).unsqueeze(axis) * top
    if tensor_scale is not None and tensor_slope:
        v = most / largest / tensor_scale
        whole = ((sizes / tensor_scale - v * scale_slope) * projected).nan_to_num().sum() * tensor_slope
        above = sizes_of == torch.where(torch.isfinite(most), most, torch.zeros_like(most)).amax()
        added = added + above * (whole / above.sum())
    return direct + added * x.sign()


def quantizer_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor,
    format: Format,
    dim: int,
    q_grad: Estimator,
    scale_grad: ScaleGradient,
    temperature: float = 0.5,
) -> torch.Tensor:
    """:func:`pullback` of a :class:`Format` along an axis of tensors that are not cut into blocks."""
    if (q_grad == "ste" and scale_grad == "none") or not x.numel():
        return grad
    blocks = format.blocks
    dim %= x.ndim
    cut, g, y = (blocks.split(part, dim) for part in (x, grad, out))
    most = cut.abs().amax(dim + 1)
    sizes, tensor_scale = blocks.sizes(most)
    wide = sizes.unsqueeze(dim + 1)
    element_slope = None
    if q_grad != "ste":
        u = cut / torch.where(wide == 0, torch.full_like(wide, math.inf), wide)
        element_slope = slope_of(u, blocks.element, q_grad, temperature)
    scale_slope = None
    if scale_grad == "ste":
        scale_slope = torch.ones_like(sizes)
    elif scale_grad == "relaxed":
        # As if the logarithm were passed straight through: the scale's slope is the chord from zero.
        wanted = most / blocks.element.largest
        scale_slope = torch.where(wanted > 0, sizes / wanted, torch.ones_like(wanted))
    scaled = bool(format.tensor_scale)
    found = pullback(
        g, cut, y, most=most, sizes=sizes, largest=blocks.element.largest, element_slope=element_slope,
        scale_slope=scale_slope, tensor_scale=tensor_scale if scaled else None,
        tensor_slope=1 / (blocks.element.largest * blocks.scale.largest) if scaled else 0.0, axis=dim + 1,
    )  # fmt: skip
    return found.flatten(dim, dim + 1).narrow(dim, 0, x.shape[dim]).to(grad.dtype)
