"""First values of factors: the product must have the variance of a dense kernel's, not each factor on its own.

For ``cp`` with independent factors of mean 0, ``Var K = R Var A_o Var A_c Var u Var w``. Torch's default, given to each
factor, makes a third of the signal's variance at each of four convolutions: after a few layers nothing is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from retensor.compression.apriori.decompose import decompose
from retensor.files import described

if TYPE_CHECKING:
    from retensor.compression.apriori.factored import Factored, Init

INITS = ("match", "xavier", "decompose", "default")


@torch.no_grad()
def initialise_(
    layer: Factored, init: Init = "match", *, variance: float | None = None, generator: torch.Generator | None = None
) -> None:
    """Draw the factors of a layer, in place.

    Parameters
    ----------
    layer : FactoredConv1d, FactoredConv2d, ...
    init : {"match", "xavier", "decompose", "default"}
        ``match``: independent normal factors whose product has Kaiming's variance ``2 / fan_in``, and each of which
        keeps a signal's scale, so that no stage overflows before the whole does. What makes one output of a stage is
        scaled to its expected norm: products of normal numbers scatter widely, and few of them make a factor.
        ``xavier``: the same with ``2 / (fan_in + fan_out)``. ``decompose``: the factors of a random normal kernel of
        Kaiming's variance, scaled to keep it. ``default``: each factor as torch draws a convolution's weight, for
        comparison: signals vanish.
    variance : float, optional
        Of the product, in the place of Kaiming's.
    generator : torch.Generator, optional

    Raises
    ------
    ValueError
        Where ``init`` is none of these.

    Notes
    -----
    Of a transposed convolution ``fan_in`` is what one output gathers: it is divided by the strides. Biases are 0, but
    torch's in ``default``.

    Examples
    --------
    >>> from retensor.compression.apriori import CPConv2d
    >>> conv = CPConv2d(64, 64, 3, rank=64, generator=torch.Generator().manual_seed(0))
    >>> round(conv.kernel().var().item() * 9 * 64 / 2, 1)
    1.0
    """
    if init not in INITS:
        raise ValueError(f"init is {described(init)}; it is one of {', '.join(map(repr, INITS))}")
    shape, form = layer.shape, layer.form
    gathered = shape.fan_in / math.prod(layer.stride) if layer.transposed else shape.fan_in
    scattered = shape.fan_out / (1 if layer.transposed else math.prod(layer.stride))
    target = (2 / (gathered + scattered) if init == "xavier" else 2 / gathered) if variance is None else variance
    variances = form.variances(shape, layer.rank)

    def device(tensor: torch.Tensor) -> torch.device:
        return tensor.device if generator is None else generator.device

    if init == "decompose":
        sizes = (shape.outputs, shape.group_inputs, *shape.kernel)
        where = "cpu" if generator is None else generator.device
        kernel = torch.randn(sizes, generator=generator, device=where, dtype=torch.float64)
        factors = decompose(kernel.cpu(), form, shape, layer.rank)
        # A low rank keeps a part of the energy only.
        left = form.kernel(shape, factors).square().mean()
        scale = (target / left.clamp_min(1e-300)) ** (0.5 / len(factors))
        for name, factor in layer.factors.items():
            factor.copy_(factors[name] * scale)
    elif init == "default":
        for name, factor in layer.factors.items():
            bound = math.sqrt(variances[name])
            factor.copy_(bound * (2 * torch.rand(factor.shape, generator=generator, device=device(factor)) - 1))
    else:
        last = list(variances)[-1]
        variances[last] *= target * shape.fan_in
        for name, factor in layer.factors.items():
            fan = (4,) if layer.format == "separable" and name != last else tuple(range(2, factor.dim()))
            values = torch.randn(factor.shape, generator=generator, device=device(factor))
            if layer.format == "tucker" and name.startswith("axis") and factor.shape[1] <= factor.shape[2]:
                # Few filters serve all channels: alike ones would lose what lies between them.
                values = torch.linalg.qr(values.mT)[0].mT
            norm = values.square().sum(fan, keepdim=True).sqrt().clamp_min(1e-30)
            wanted = variances[name] * math.prod(factor.shape[axis] for axis in fan)
            factor.copy_(values * (math.sqrt(wanted) / norm))
    if layer.bias is not None:
        if init == "default":
            drawn = 2 * torch.rand(shape.outputs, generator=generator, device=device(layer.bias)) - 1
            layer.bias.copy_(drawn / math.sqrt(shape.fan_in))
        else:
            layer.bias.zero_()


@torch.no_grad()
def balance_(model: nn.Module) -> int:
    """Give the vectors of each component equal norms, in place; kernels stay as they are.

    The factors of ``cp`` and ``separable`` can trade scale without changing the kernel; decay of weights then acts on
    whatever split there happens to be, and components may grow against each other.

    What an optimizer keeps of each factor, such as Adam's moments, is not scaled with it: balance seldom.

    Parameters
    ----------
    model : nn.Module
        A factored layer, or a model with some.

    Returns
    -------
    int
        How many layers were balanced; the formats without components are left.

    Examples
    --------
    >>> from retensor.compression.apriori import CPConv2d
    >>> balance_(CPConv2d(2, 3, 3, rank=2))
    1
    """
    from retensor.compression.apriori.factored import Factored

    done = 0
    for layer in model.modules():
        if not isinstance(layer, Factored) or layer.form.component_axes is None:
            continue
        axes = layer.form.component_axes
        norms: dict[str, torch.Tensor] = {}
        for name, factor in layer.factors.items():
            axis = axes[name.rstrip("0123456789")]
            # All axes but those that tell components apart, which have the same shape in every factor.
            kept = range(4) if layer.format == "separable" else (0, axis)
            summed = [i for i in range(factor.dim()) if i not in kept]
            norms[name] = factor.double().square().sum(summed, keepdim=True).sqrt()
        components = {name: norm.flatten() for name, norm in norms.items()}
        product = torch.stack(list(components.values())).log().mean(0).exp()
        for name, factor in layer.factors.items():
            ratio = (product / components[name]).reshape(norms[name].shape)
            # A component that is 0 in one factor is 0 whatever the others are.
            factor.mul_(torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0).to(factor.dtype))
        done += 1
    return done


def balancer(model: nn.Module, every: int = 100) -> Callable[[int], Any]:
    """A function for ``after_step`` of :func:`retensor.data.fit` that balances a model now and then.

    Parameters
    ----------
    model : nn.Module
    every : int
        Steps from one time to the next.

    Returns
    -------
    function of the number of a step, 0 first

    Raises
    ------
    ValueError
        Where ``every`` is below 1.
    """
    if every < 1:
        raise ValueError(f"every is {every}; a model is balanced at most after each step: give 1 or more")

    def after_step(step: int) -> None:
        if (step + 1) % every == 0:
            balance_(model)

    return after_step
