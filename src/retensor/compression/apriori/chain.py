"""A chain of convolutions run one after the other, and run again in the backward pass where memory is short."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from retensor.compression.apriori.formats import Stage, swapped

CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
CHUNKS = 8
"""Parts of a batch that a recomputed backward pass goes through, one after the other."""


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, for each axis.

    Attributes
    ----------
    stride, dilation : tuple of int
    padding : tuple of (int, int)
        Before and behind; of a transposed convolution, what is cut off.
    padding_mode : str
    output_padding : tuple of int
    transposed : bool
    """

    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    padding_mode: str = "zeros"
    output_padding: tuple[int, ...] = ()
    transposed: bool = False


def run(x: torch.Tensor, stages: Sequence[Stage], geometry: Geometry, bias: torch.Tensor | None) -> torch.Tensor:
    """Apply the stages in their order; the bias comes with the last, behind every padding."""
    for i, stage in enumerate(stages):
        x = _stage(x, stage, geometry, bias if i == len(stages) - 1 else None)
    return x


def run_recomputed(
    x: torch.Tensor, forward: Callable[..., torch.Tensor], parameters: Sequence[torch.Tensor]
) -> torch.Tensor:
    """``forward(x, *parameters)`` that keeps ``x`` alone for the backward pass.

    There the chain is run again for an eighth of the batch at a time, so that what lies between its stages is never
    whole in memory. A batch of one has no parts.
    """
    result: torch.Tensor = _Recomputed.apply(x, forward, *parameters)
    return result


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: Callable[..., torch.Tensor], *parameters: torch.Tensor) -> Any:
        ctx.save_for_backward(x, *parameters)
        ctx.chain = forward
        kind = x.device.type
        # The chain is run again in the precision of the first time.
        ctx.cast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        return forward(x, *parameters)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, *parameters = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        of_x = torch.empty_like(x) if wanted[0] else None
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        size = max(1, -(-len(x) // CHUNKS))
        for at in range(0, len(x), size):
            with torch.enable_grad(), torch.autocast(**ctx.cast):
                part = x[at : at + size].detach().requires_grad_(wanted[0])
                leaves = [p.detach().requires_grad_(w) for p, w in zip(parameters, wanted[1:], strict=True)]
                y = ctx.chain(part, *leaves)
            sought = [leaf for leaf in (part, *leaves) if leaf.requires_grad]
            found = iter(torch.autograd.grad(y, sought, gradient[at : at + size]))
            if of_x is not None:
                of_x[at : at + size] = next(found)
            for i, leaf in enumerate(leaves):
                if leaf.requires_grad:
                    so_far = sums[i]
                    sums[i] = next(found) if so_far is None else so_far.add_(next(found))
            del y, found
        return of_x, None, *sums


def _stage(x: torch.Tensor, stage: Stage, geometry: Geometry, bias: torch.Tensor | None) -> torch.Tensor:
    dims = stage.weight.dim() - 2
    if stage.order is not None:
        seen, order = stage.order
        sizes = x.shape[2:]
        x = x.unflatten(1, seen).permute(0, *(1 + i for i in order), *range(1 + len(seen), 1 + len(seen) + dims))
        x = x.flatten(1, len(seen)).reshape(x.shape[0], -1, *sizes)

    def here(values: Sequence[int], other: int) -> tuple[int, ...]:
        return tuple(values[i] if i in stage.axes else other for i in range(dims))

    if geometry.transposed:
        weight = swapped(stage.weight, stage.groups)
        cut = here([before for before, _ in geometry.padding], 0)
        return TRANSPOSED[dims](
            x, weight, bias, here(geometry.stride, 1), cut, here(geometry.output_padding, 0), stage.groups,
            here(geometry.dilation, 1),
        )  # fmt: skip
    sides = [geometry.padding[i] if i in stage.axes else (0, 0) for i in range(dims)]
    padding = tuple(before for before, _ in sides)
    if geometry.padding_mode != "zeros" or any(before != behind for before, behind in sides):
        if any(before or behind for before, behind in sides):
            # The last axis comes first.
            flat = [size for pair in reversed(sides) for size in pair]
            mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
            x = functional.pad(x, flat, mode=mode)
        padding = (0,) * dims
    return CONVOLUTION[dims](
        x, stage.weight, bias, here(geometry.stride, 1), padding, here(geometry.dilation, 1), stage.groups
    )
