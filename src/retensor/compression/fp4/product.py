"""One product and its two backward products, each with operands of 4 bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from retensor.compression.fp4.gradient import quantizer_gradient
from retensor.compression.fp4.hadamard import rotate, unrotate
from retensor.compression.fp4.quantize import check_input
from retensor.compression.fp4.recipe import GEMMS, OPERANDS, Recipe


@dataclass(frozen=True)
class Turn:
    """A recipe, the layer's seed, and which of the layer's calls it is."""

    recipe: Recipe
    seed: int
    call: int = 0

    def signs(self, product: str) -> int:
        """The seed of a product's signs: the same at every call."""
        return self.seed * len(GEMMS) + GEMMS.index(product)

    def rotated(self, x: torch.Tensor, product: str, dim: int) -> torch.Tensor:
        """An operand after the random Hadamard transform, where its product has one."""
        size = self.recipe.hadamard.get(product)
        return x if size is None else rotate(x, size, dim=dim, seed=self.signs(product))

    def quantized(self, x: torch.Tensor, operand: str, dim: int) -> torch.Tensor:
        """An operand, rotated before, as its format has it."""
        format = self.recipe.format(operand)
        if format is None:
            return x
        check_input(x, format, dim)
        rounding = self.recipe.rounding(operand)
        generator = None
        if rounding == "stochastic" and x.device.type != "meta":
            place = (self.seed * 2**32 + self.call) * len(OPERANDS) + OPERANDS.index(operand)
            generator = torch.Generator(x.device).manual_seed(_mixed(place))
        return format.blocks.round(x, dim, rounding, generator)


def product(x: torch.Tensor, w: torch.Tensor, turn: Turn) -> torch.Tensor:
    """``X W^T`` over the last axis of both, in float32 at least.

    Parameters
    ----------
    x, w : torch.Tensor
        Of shapes (..., M, K) and (..., N, K).

    Returns
    -------
    torch.Tensor
        Of shape (..., M, N), of their common type.
    """
    kind = torch.promote_types(x.dtype, w.dtype)
    wide = torch.promote_types(kind, torch.float32)
    # The product of an element and a scale has more bits than a type of 16 bits keeps.
    with _no_autocast(x.device):
        a, b = x.to(wide), w.to(wide)
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            out: torch.Tensor = _Product.apply(a, b, turn)
        else:
            out = _forward(a, b, turn, _limit(a, turn.recipe.outlier))[0]
    return out.to(kind)


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off; torch has none on the meta device."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def _forward(
    x: torch.Tensor, w: torch.Tensor, turn: Turn, limit: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The product, and both operands as it read them."""
    kept, cut = _clamped(x, limit)
    left = turn.quantized(turn.rotated(kept, "fwd", -1), "fwd.x", -1)
    right = turn.quantized(turn.rotated(w, "fwd", -1), "fwd.w", -1)
    out = left @ right.mT
    return (out if cut is None else out + cut @ w.mT), left, right


def _limit(x: torch.Tensor, quantile: float | None) -> torch.Tensor | None:
    """The quantile of absolute values beyond which activations are outliers."""
    if quantile is None or not x.numel():
        return None
    sizes = x.detach().abs().flatten()
    return sizes.kthvalue(min(len(sizes), int(quantile * len(sizes)) + 1)).values


def _clamped(x: torch.Tensor, limit: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activations clamped to a limit, and what was cut off, nearly all of it zero."""
    if limit is None:
        return x, None
    kept = torch.maximum(torch.minimum(x, limit), -limit)
    return kept, x - kept


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor, turn: Turn) -> torch.Tensor:
        limit = _limit(x, turn.recipe.outlier)
        out, left, right = _forward(x, w, turn, limit)
        ctx.turn, ctx.limit = turn, limit
        # Backward goes by the gradients of the quantisers, which need what these made only where they are not 1.
        slopes = {turn.recipe.estimator("fwd.x"), turn.recipe.estimator("fwd.w")}
        estimated = slopes != {"ste"} or turn.recipe.scale_grad != "none"
        ctx.save_for_backward(x, w, *((left, right) if estimated else ()))
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, w, *made = ctx.saved_tensors
        turn: Turn = ctx.turn
        left, right = made or (None, None)
        kept, cut = _clamped(x, ctx.limit)
        dx = dw = None
        with _no_autocast(grad.device):
            grad = grad.to(x.dtype)
            if ctx.needs_input_grad[0]:
                dy = turn.quantized(turn.rotated(grad, "dgrad", -1), "dgrad.dy", -1)
                dx = dy @ turn.quantized(turn.rotated(w, "dgrad", -2), "dgrad.w", -2)
                dx = _through(dx, kept, left, turn, "fwd.x")
                if cut is not None:
                    # What was cut off went by the product in full precision; the limit itself is held constant.
                    dx = torch.where(cut == 0, dx, grad @ w)
            if ctx.needs_input_grad[1]:
                dy = turn.quantized(turn.rotated(grad, "wgrad", -2), "wgrad.dy", -2)
                dw = dy.mT @ turn.quantized(turn.rotated(kept, "wgrad", -2), "wgrad.x", -2)
                dw = _through(dw, w, right, turn, "fwd.w")
                if cut is not None:
                    dw = dw + grad.mT @ cut
        return dx, dw, None


def _through(
    grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor | None, turn: Turn, operand: str
) -> torch.Tensor:  # fmt: skip
    """The gradient of an operand of the forward product from that of what its quantiser made."""
    format = turn.recipe.format(operand)
    if format is None or out is None:
        return grad
    size, length = turn.recipe.hadamard.get("fwd"), x.shape[-1]
    recipe = turn.recipe
    found = quantizer_gradient(
        turn.rotated(grad, "fwd", -1), turn.rotated(x, "fwd", -1), out, format, -1, recipe.estimator(operand),
        recipe.scale_grad, recipe.temperature,
    )  # fmt: skip
    return found if size is None else unrotate(found, size, seed=turn.signs("fwd"), length=length)


def unfolded(x: torch.Tensor, kernel: tuple[int, int], **options: Any) -> torch.Tensor:
    """Patches of pictures as rows: of shape (batch * positions, channels * kernel)."""
    columns = functional.unfold(x, kernel, **options)
    return columns.transpose(1, 2).flatten(0, 1)


def _mixed(number: int) -> int:
    """A seed of 63 bits whose neighbours look nothing alike (G. Steele, D. Lea, C. Flood, SplitMix, 2014)."""
    z = (number + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return (z ^ (z >> 31)) >> 1
