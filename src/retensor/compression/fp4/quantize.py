"""One tensor in 4 bits: simulated, with its gradient, or as codes."""

from __future__ import annotations

from typing import Any

import torch

from retensor.compression.fp4.format import Format
from retensor.compression.fp4.gradient import (
    SCALE_GRADIENTS,
    Estimator,
    ScaleGradient,
    check_estimator,
    quantizer_gradient,
)
from retensor.files import described
from retensor.quantizing import BlockTensor
from retensor.quantizing.grids import Rounding


def quantize(
    x: torch.Tensor,
    format: Format,
    dim: int = -1,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
    q_grad: Estimator = "ste",
    scale_grad: ScaleGradient = "none",
    temperature: float = 0.5,
) -> torch.Tensor:
    """A tensor whose numbers are those of a format, of the type it had, with a gradient.

    Parameters
    ----------
    x : torch.Tensor
        Floating point; computed in float32.
    format : Format
    dim : int
        The axis that blocks lie along: the one that the product sums over.
    rounding : {"nearest", "stochastic"}
        Of the elements.
    generator : torch.Generator, optional
        Of the random choices; torch's own by default.
    q_grad, scale_grad, temperature
        What stands for the slopes of the elements' and of the scales' rounding, as in :class:`Recipe`.

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``x``. A block whose scale is rounded to zero is zero. An element times a scale with a
        tensor's scale has more bits than a type of 16 bits keeps: give float32 where the numbers have to be exact.

    Raises
    ------
    TypeError
        Where ``x`` is not floating point, or the format is none.
    ValueError
        Where an option is none, the format is strict and blocks do not fill the axis, or the format refuses numbers
        that are not finite and there are some.

    Examples
    --------
    >>> x = torch.tensor([0.3, -1.0, 2.6, 6.0], requires_grad=True)
    >>> y = quantize(x, Format(scale="e8m0", block=4), scale_grad="ste")
    >>> y
    tensor([ 0.5000, -1.0000,  3.0000,  6.0000], grad_fn=<_QuantizeBackward>)
    >>> y.sum().backward()
    >>> x.grad  # the largest number passes on what rounding added, over 6
    tensor([1.0000, 1.0000, 1.0000, 1.1000])
    """
    check_input(x, format, dim)
    check_estimator(q_grad, temperature)
    if scale_grad not in SCALE_GRADIENTS:
        raise ValueError(f"scale_grad is {described(scale_grad)}; it is one of {', '.join(SCALE_GRADIENTS)}")
    if not x.requires_grad or not torch.is_grad_enabled():
        return format.blocks.round(x, dim, rounding, generator)
    out: torch.Tensor = _Quantize.apply(x, format, dim, rounding, generator, (q_grad, scale_grad, temperature))
    return out


def encode(
    x: torch.Tensor,
    format: Format,
    dim: int = -1,
    *,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> BlockTensor:
    """A tensor as codes: what :func:`quantize` gives is :meth:`~retensor.quantizing.BlockTensor.decode` of it.

    Parameters
    ----------
    x, format, dim, rounding, generator
        As in :func:`quantize`.

    Returns
    -------
    BlockTensor
        With ``codes``, ``scales``, ``tensor_scale`` and ``nbytes``, packed.

    Raises
    ------
    TypeError, ValueError
        As :func:`quantize`.

    Examples
    --------
    >>> kept = encode(torch.ones(2, 64), Format(scale="e4m3", block=16))
    >>> kept.nbytes, kept.codes[0, 0], kept.scales.shape
    (72, tensor(7, dtype=torch.uint8), torch.Size([2, 4]))
    """
    check_input(x, format, dim)
    return format.blocks.encode(x, dim, rounding, generator)


def check_input(x: Any, format: Any, dim: int) -> None:
    """Refuse a tensor that a format does not take."""
    if not isinstance(format, Format):
        raise TypeError(f"a tensor is quantised to a Format, not to {described(format)}")
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        what = f"a tensor of {x.dtype}" if isinstance(x, torch.Tensor) else described(x)
        raise TypeError(f"a tensor of floating point is quantised, not {what}")
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim:
        raise ValueError(f"axis {dim} of a tensor of shape {list(x.shape)} was asked for; it has {x.ndim}")
    if format.strict and x.shape[dim] % format.block:
        raise ValueError(
            f"axis {dim} of {x.shape[dim]} numbers is no multiple of the block of {format.block}; take another block, "
            "or strict=False to fill it up with zeros"
        )
    if format.nonfinite == "raise" and not torch.compiler.is_compiling() and not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"a tensor of shape {list(x.shape)} holds NaN or infinity, which the format refuses; look where it comes "
            "from, or take nonfinite='propagate'"
        )


class _Quantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, format: Format, dim: int, rounding: Rounding, generator: Any, gradient: Any
    ) -> torch.Tensor:
        out = format.blocks.round(x, dim, rounding, generator)
        ctx.format, ctx.dim, ctx.gradient = format, dim, gradient
        if gradient[:2] != ("ste", "none"):
            ctx.save_for_backward(x, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.saved_tensors:
            return grad, None, None, None, None, None
        x, out = ctx.saved_tensors
        return quantizer_gradient(grad, x, out, ctx.format, ctx.dim, *ctx.gradient), None, None, None, None, None
