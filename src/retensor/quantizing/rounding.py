"""Rounding that a gradient passes: the value on a grid forward, an estimate of the slope of its staircase backward.

``straight`` lets the gradient through as it is (Y. Bengio, N. Leonard, A. Courville 2013, arXiv 1308.3432); ``clipped``
only where the number lies within the grid's range; ``dge``, the differentiable gradient estimator, weights it by
``(1/k) |2t/d - 1|^(1/k - 1)``, where ``t`` is how far into a cell of width ``d`` the number lies, at most 3 (R. Wang
and others 2025, arXiv 2501.17116).
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from retensor.files import described
from retensor.quantizing.grids import Grid, Rounding

Estimator = Literal["straight", "clipped", "dge"]
ESTIMATORS: tuple[Estimator, ...] = ("straight", "clipped", "dge")
STEEPNESS, MOST_SLOPE = 5.0, 3.0


def rounded(
    x: torch.Tensor,
    grid: Grid,
    *,
    rounding: Rounding = "nearest",
    estimator: Estimator = "clipped",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Numbers rounded to a grid, with a gradient.

    Parameters
    ----------
    x : torch.Tensor
        Floating point.
    grid : Grid
    rounding, generator
        See :meth:`Grid.encode`.
    estimator : {"straight", "clipped", "dge"}
        The slope that stands for the staircase's, which is 0 almost everywhere.

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``x``; NaN stays NaN.

    Raises
    ------
    TypeError, ValueError
        As :meth:`Grid.encode`, or where no estimator has that name, or the grid is none.

    Examples
    --------
    >>> from retensor.quantizing import GRIDS
    >>> x = torch.tensor([0.7, 2.4, 9.0], requires_grad=True)
    >>> y = rounded(x, GRIDS["e2m1"])
    >>> y.sum().backward()
    >>> y.tolist(), x.grad.tolist()
    ([0.5, 2.0, 6.0], [1.0, 1.0, 0.0])
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {described(estimator)}; it is one of {', '.join(ESTIMATORS)}")
    if not isinstance(grid, Grid):
        raise TypeError(f"grid is a Grid such as GRIDS['e2m1'], not {described(grid)}")
    out: torch.Tensor = _Rounded.apply(x, grid, rounding, estimator, generator)
    return out


def whole_numbers(x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
    """The nearest whole numbers within a range, with the gradient as it comes where it clips nothing.

    Exact, both ends included: ``x + (round(x) - x).detach()`` is off by rounding, so that numbers at an end may fall
    outside, and the gradient of ``torch.clamp`` at an end is 0 or 1 by torch's version.

    Parameters
    ----------
    x : torch.Tensor
    low, high : torch.Tensor or float
        Whatever broadcasts against it.

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``x``.

    Examples
    --------
    >>> x = torch.tensor([-0.4, 2.5, 3.4, 3.6], requires_grad=True)
    >>> whole = whole_numbers(x, 0, 3)
    >>> whole.sum().backward()
    >>> whole.tolist(), x.grad.tolist()
    ([-0.0, 2.0, 3.0, 3.0], [1.0, 1.0, 1.0, 0.0])
    """
    out: torch.Tensor = _Whole.apply(x, low, high)
    return out


def slope(x: torch.Tensor, grid: Grid, estimator: Estimator) -> torch.Tensor:
    """The estimate at each number."""
    if estimator == "straight":
        return torch.ones_like(x)
    inside = ((x >= grid.least) & (x <= grid.largest)).to(x.dtype)
    if estimator == "clipped":
        return inside
    values = torch.tensor(
        sorted({value for value in grid.values if grid.least <= value <= grid.largest}), dtype=x.dtype, device=x.device
    )
    lower = (torch.bucketize(x, values, right=True) - 1).clamp(0, len(values) - 2)
    low, high = values[lower], values[lower + 1]
    off = (2 * (x - low) / (high - low) - 1).abs()
    return inside * (off.pow(1 / STEEPNESS - 1) / STEEPNESS).clamp(max=MOST_SLOPE)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, grid: Grid, rounding: Rounding, estimator: Estimator, generator: Any
    ) -> torch.Tensor:
        ctx.grid, ctx.estimator = grid, estimator
        if estimator != "straight":
            ctx.save_for_backward(x)
        out = grid.decode(grid.encode(x, rounding, generator), x.dtype)
        return torch.where(torch.isnan(x), torch.full_like(out, torch.nan), out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        if ctx.estimator == "straight":
            return grad, None, None, None, None
        (x,) = ctx.saved_tensors
        return grad * slope(x, ctx.grid, ctx.estimator), None, None, None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float) -> torch.Tensor:
        whole = torch.round(x)
        ctx.save_for_backward((whole >= low) & (whole <= high))
        return whole.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None
