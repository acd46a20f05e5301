"""Stage B: steps and zero points of all weights and activations, with channels behind normalisations made alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.aphq.config import Config
from retensor.compression.aphq.layers import exposed, products
from retensor.compression.aphq.mlp import LARGE
from retensor.compression.aphq.spec import Spec, check_images, find_spec
from retensor.graph.modes import evaluating
from retensor.quantizing.affine import LEAST_STEP
from retensor.quantizing.samples import Samples, Storage, calibration_samples, caught
from retensor.quantizing.units import LAYERS

PAIRS, ZEROS, LEAST = 128, 16, 1e-4
"""Pairs of a step and a zero point that are tried, zero points among them, and the least step."""
NARROW = 0.9
"""The quantile whose range gives the least step that is tried; the whole range gives the largest."""


@dataclass(frozen=True)
class Steps:
    """A step and a zero point for a tensor, or several along one axis of it.

    Attributes
    ----------
    scale, zero_point : torch.Tensor
    bits : int
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    bits: int


@dataclass(frozen=True)
class Calibrated:
    """A model that is ready to be put in few bits.

    Attributes
    ----------
    model : nn.Module
        In full precision, with the products of attention as modules and the channels behind normalisations made alike;
        it gives what the model it was made of gave, within rounding.
    steps : dict of str to pair of Steps
        By layer, of its weight and of its inputs; by product, of its operands.
    spec : Spec
    config : Config
    """

    model: nn.Module
    steps: dict[str, tuple[Steps, Steps]]
    spec: Spec
    config: Config


@torch.no_grad()
def calibrate(
    model: nn.Module, images: torch.Tensor, config: Config | None = None, *, spec: Spec | None = None
) -> Calibrated:
    """Search the steps of all layers and of both products of attention, one after another, on the given model's inputs.

    128 pairs are tried: first by the error of the weight or the activation, then, ``config.rounds`` times, weight and
    activation in turn by the error of what the layer gives.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    images : torch.Tensor
        Without labels; the first ``config.calib`` are used.
    config : Config, optional
    spec : Spec, optional
        Needed for models that :func:`find_spec` does not know.

    Returns
    -------
    Calibrated

    Raises
    ------
    TypeError, ValueError
        Where the model is not known, holds other attention or convolutions in groups, or images are none.

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, digits = reference("digits-vit")
    >>> ready = calibrate(model, digits.x[:64], Config(calib=32, rounds=1))
    >>> weight, inputs = ready.steps["blocks.0.attn.qkv"]
    >>> weight.scale.shape, inputs.scale.shape
    (torch.Size([144]), torch.Size([]))
    """
    config, asked = config or Config(), spec is not None
    spec = spec or find_spec(model)
    spec.check(model)
    check_images(model, images, 2)
    ready = exposed(model).eval()
    ready.requires_grad_(False)
    with evaluating(ready):
        samples = calibration_samples(images[: config.calib], images.device)
        for norm, layer in spec.norm_linear_pairs:
            if not _is_pair(ready, samples, norm, layer):
                if asked:
                    raise ValueError(f"'{layer}' is not called with what '{norm}' gives; leave the pair out of spec")
                continue
            reparametrize_(
                ready.get_submodule(norm), ready.get_submodule(layer), _inputs(ready, layer, samples)[0], config.a_bits
            )
        steps: dict[str, tuple[Steps, Steps]] = {}
        for name, module in ready.named_modules():
            if isinstance(module, LAYERS):
                bits = config.a_bits if isinstance(module, nn.Linear) else config.embed_bits
                steps[name] = layer_steps(module, _inputs(ready, name, samples)[0], config, bits)
        for name in products(ready):
            a, b = _inputs(ready, name, samples)
            steps[name] = product_steps(a, b, config)
    return Calibrated(ready, steps, spec, config)


@torch.no_grad()
def reparametrize_(norm: nn.LayerNorm, layer: nn.Linear, x: torch.Tensor, bits: int) -> None:
    r"""Make the channels between a normalisation and the layer behind it alike, in place; what the layer gives stays.

    With :math:`s_c, z_c` the best step and zero point of channel :math:`c`, :math:`\bar s` and :math:`\bar z` their
    means, :math:`r = s_c / \bar s` and :math:`b = \bar z \bar s - z_c s_c / r`: the normalisation's weight and bias
    become :math:`\gamma / r` and :math:`\beta / r - b`, the layer's weight :math:`W \odot r`, and its bias grows by
    :math:`(W \odot r) b`. One step and zero point for all channels then round each as its own did (Z. Li, J. Xiao,
    L. Yang, Q. Gu, RepQ-ViT, ICCV 2023, arXiv 2212.08254).

    Parameters
    ----------
    norm, layer : nn.LayerNorm, nn.Linear
        A bias is made where the layer has none.
    x : torch.Tensor
        What the normalisation gives, shape (..., channels).
    bits : int
    """
    found = searched(x.reshape(-1, x.shape[-1]).T, bits)
    s, z = found.scale.to(norm.weight), found.zero_point.to(norm.weight)
    mean, middle = s.mean(), z.mean().round()
    r = s / mean
    b = middle * mean - z * s / r
    norm.weight.div_(r)
    norm.bias.copy_(norm.bias / r - b)
    layer.weight.mul_(r)
    more = layer.weight @ b
    if layer.bias is None:
        layer.bias = nn.Parameter(more, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.add_(more)


def layer_steps(layer: nn.Module, x: torch.Tensor, config: Config, bits: int) -> tuple[Steps, Steps]:
    """Steps of each output channel of a layer's weight, and one of its inputs.

    For a layer that computes ``X W'``, with ``D = X~ - X`` and ``E = X (W~ - W)'`` the error of what it gives is
    ``||D W~' + E||**2``, a square form in ``W~ - W`` for fixed inputs and in ``D`` for a fixed weight.
    """
    weight = layer.weight.detach().flatten(1)
    w_candidates, x_candidates = candidates(weight, config.w_bits), candidates(x.reshape(1, -1), bits)
    best_w, best_x = searched(weight, config.w_bits, w_candidates), searched(x.reshape(1, -1), bits, x_candidates)
    rows = _rows(layer, x)
    for _ in range(config.rounds):
        few = _rows(layer, rounded(x, best_x))
        gram = few.T.double() @ few.double()
        moved = few.T.double() @ ((few - rows) @ weight.T).double()
        least = torch.full((len(weight),), torch.inf, dtype=torch.float64, device=weight.device)
        scales, zeros = w_candidates
        best_scale, best_zero = best_w.scale.clone(), best_w.zero_point.clone()
        for scale, zero in zip(scales, zeros, strict=True):
            apart = (rounded(weight, Steps(scale, zero, config.w_bits), 0) - weight).double()
            error = ((apart @ gram) * apart).sum(1) + 2 * (apart * moved.T).sum(1)
            better = error < least
            least = torch.where(better, error, least)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        best_w = Steps(best_scale, best_zero, config.w_bits)
        ready = rounded(weight, best_w, 0)
        form = _ErrorOf(ready.T, rows @ (ready - weight).T)
        errors = [
            form(_rows(layer, rounded(x, Steps(scale[0], zero[0], bits))) - rows).sum(dtype=torch.float64)
            for scale, zero in zip(*x_candidates, strict=True)
        ]
        at = int(torch.stack(errors).argmin())
        best_x = Steps(x_candidates[0][at], x_candidates[1][at], bits)
    return best_w, Steps(best_x.scale.reshape(()), best_x.zero_point.reshape(()), bits)


def product_steps(a: torch.Tensor, b: torch.Tensor, config: Config) -> tuple[Steps, Steps]:
    """Steps of both operands of a product, one for each entry of the third axis from the end: the heads."""
    if a.ndim < 3 or b.ndim < 3 or a.shape[-3] != b.shape[-3]:
        raise ValueError(
            f"a product of tensors of shape {list(a.shape)} and {list(b.shape)} was found; the third axis from the end "
            "is to be that of heads"
        )
    bits, operands = config.a_bits, (a, b.transpose(-2, -1))
    flat = [value.movedim(-3, 0).flatten(1) for value in operands]
    tried = [candidates(value, bits) for value in flat]
    best = [searched(value, bits, pairs) for value, pairs in zip(flat, tried, strict=True)]
    axis = a.ndim - 3
    others = [i for i in range(a.ndim) if i != axis]
    for _ in range(config.rounds):
        for turn in (0, 1):
            mine, other = operands[turn], operands[1 - turn]
            ready = rounded(other, best[1 - turn], axis)
            form = _ErrorOf(ready.mT, mine @ (ready - other).mT)
            scales, zeros = tried[turn]
            errors = [
                form(rounded(mine, Steps(scale, zero, bits), axis) - mine).sum(others, dtype=torch.float64)
                for scale, zero in zip(scales, zeros, strict=True)
            ]
            at = torch.stack(errors).argmin(0)
            heads = torch.arange(len(at), device=at.device)
            best[turn] = Steps(scales[at, heads], zeros[at, heads], bits)
    return best[0], best[1]


class _ErrorOf:
    """``||D B + E||**2`` for one ``B`` and ``E`` and many ``D``: terms that sum to it, but for a constant."""

    def __init__(self, b: torch.Tensor, e: torch.Tensor) -> None:
        self.b, self.e = b, e
        self.square: torch.Tensor | None = None
        if b.shape[-1] > b.shape[-2]:
            # More outputs than inputs: the form in the inputs is smaller.
            self.square, self.e = b @ b.mT, 2 * (e @ b.mT)

    def __call__(self, d: torch.Tensor) -> torch.Tensor:
        if self.square is None:
            return (d @ self.b).add_(self.e).square_()
        return (d @ self.square).add_(self.e).mul_(d)


def searched(
    rows: torch.Tensor, bits: int, pairs: tuple[torch.Tensor, torch.Tensor] | None = None
) -> Steps:  # fmt: skip
    """For each row the pair of least mean square error, shape (rows,)."""
    scales, zeros = candidates(rows, bits) if pairs is None else pairs
    errors = torch.stack([
        (rounded(rows, Steps(scale, zero, bits), 0) - rows).square().mean(1)
        for scale, zero in zip(scales, zeros, strict=True)
    ])  # fmt: skip
    at = errors.argmin(0)
    chosen = torch.arange(len(at), device=at.device)
    return Steps(scales[at, chosen], zeros[at, chosen], bits)


def candidates(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps and zero points to try for each row, of shape (pairs, rows).

    Steps lie between those of the 0.9 quantile range and of the whole range; zero points are the 16 about the one of
    the whole range, or all where there are no more. Rows without numbers below 0 have the zero point 0 and 128 steps.
    """
    numbers = rows[:, : max(1, LARGE // len(rows))].float()
    ends = torch.tensor([1 - NARROW, NARROW], device=rows.device)
    # Codes hold 0 whatever the numbers are: padding and the zero point are exact.
    low_narrow, high_narrow = torch.quantile(numbers, ends, dim=1)
    low_narrow, low = low_narrow.clamp(max=0), rows.amin(1).float().clamp(max=0)
    high_narrow, high = high_narrow.clamp(min=0), rows.amax(1).float().clamp(min=0)
    levels = 2**bits - 1
    # Where more bits are for checks, the least step would be far above one that they need.
    least = LEAST if bits <= 8 else LEAST_STEP
    if bool((low >= 0).all()):
        share = torch.linspace(0, 1, PAIRS, device=rows.device)[:, None]
        scales = ((high_narrow + share * (high - high_narrow)) / levels).clamp(min=least)
        return scales, torch.zeros_like(scales)
    zeros = min(ZEROS, 2**bits)
    share = torch.linspace(0, 1, PAIRS // zeros, device=rows.device)[:, None]
    narrow, whole = high_narrow - low_narrow, high - low
    spread = narrow + share * (whole - narrow)
    scales = (spread / levels).clamp(min=least)
    middle = torch.round(-low / scales[-1]).clamp(0, levels)
    first = (middle - zeros // 2).clamp(0, levels + 1 - zeros)
    points = first + torch.arange(zeros, device=rows.device)[:, None]
    return scales.repeat_interleave(zeros, 0), points.repeat(len(scales), 1)


def rounded(x: torch.Tensor, steps: Steps, axis: int | None = None) -> torch.Tensor:
    """A tensor rounded by one step, or by those along an axis; without gradients, in one tensor's memory."""
    shape = () if axis is None else [-1 if i == axis else 1 for i in range(x.ndim)]
    scale, zero = steps.scale.reshape(shape).to(x.dtype), steps.zero_point.reshape(shape).to(x.dtype)
    # The ends as plain numbers: several times as fast as tensors.
    return (x / scale).round_().add_(zero).clamp_(0, 2**steps.bits - 1).sub_(zero).mul_(scale)


def _inputs(model: nn.Module, name: str, samples: Samples) -> list[torch.Tensor]:
    """What a module is called with, the samples' rows one after another."""
    found = caught(model, name, samples, Storage())
    arguments, _ = found.take(slice(0, len(found)))
    return [value for value in arguments if isinstance(value, torch.Tensor)]


def _rows(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a layer multiplies with its weight's rows, shape (..., inputs): patches of images for convolutions."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or not isinstance(layer.padding, tuple):
        raise ValueError(
            f"{layer} cannot be calibrated; linear layers and two-dimensional convolutions of one group, padded by "
            "numbers, are"
        )
    if layer.padding_mode != "zeros":
        raise ValueError(f"{layer} pads by '{layer.padding_mode}'; only zeros are known here")
    patches = functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return patches.transpose(1, 2).flatten(0, 1)


def _is_pair(model: nn.Module, samples: Samples, norm: str, layer: str) -> bool:
    """Whether a layer is called with what a normalisation gives, in whatever order of tokens, and with nothing else.

    Windows that are padded hold zeros beside, which would not stay zeros.
    """
    few = Samples(samples.leaves, samples.tree, 2, samples.device)
    given, found = model.get_submodule(norm)(*_inputs(model, norm, few)), _inputs(model, layer, few)[0]
    if given.numel() != found.numel() or given.shape[-1] != found.shape[-1]:
        return False
    ours, theirs = (value.double().flatten(0, -2) for value in (given, found))
    return all(
        torch.allclose(one.sum(0), other.sum(0), rtol=1e-4, atol=1e-4)
        for one, other in ((ours, theirs), (ours.square(), theirs.square()))
    )
