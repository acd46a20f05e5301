"""Companding the weights of whole models, and taking it off again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from retensor.compression.weight_compander.function import exact, not_negative, number, psi_inverse
from retensor.compression.weight_compander.parametrization import WeightCompander
from retensor.compression.weight_compander.weights import TYPES, Owner, checked, owned_weights
from retensor.files import described
from retensor.replacing import fold
from retensor.replacing.match import Pattern
from retensor.replacing.replace import copied

SLOPE = 1.5
"""``a / b`` of the default pair (0.3, 0.2), which ``b="fit"`` keeps."""

Granularity = Literal["global", "layer", "channel"]
Init = Literal["latent", "preserve"]


def apply(
    model: nn.Module,
    a: float | Literal["fit"] = 0.3,
    b: float | Literal["fit"] = 0.2,
    *,
    learn: bool = False,
    granularity: Granularity = "layer",
    types: type[nn.Module] | tuple[type[nn.Module], ...] = TYPES,
    exclude: Pattern | Sequence[Pattern] = (),
    init: Init = "latent",
    margin: float = 0.05,
) -> nn.Module:
    """A copy of a model whose weights are companded: ``model = wc.apply(model)``, as the one given stays as it is.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is to be trained and folded (:func:`bake`).
    a, b : float or "fit"
        Above zero: the cap is ``a pi / 2``, and small weights move ``a / b`` times as far. ``a="fit"`` takes for every
        layer the least ``a`` that its weights allow, times ``1 + margin``; ``b="fit"`` is then ``a / 1.5``.
    learn : bool
        Whether ``a`` and ``b`` are trained, by :func:`param_groups` at a low rate of their own. Those of a weight that
        needs no gradient need none either; with ``granularity="global"`` it has a pair of its own, which stays.
    granularity : {"global", "layer", "channel"}
        What has a pair of its own: the model, every weight tensor, or every output channel. Output channels lie on the
        first axis, in transposed convolutions on the second, where groups share them.
    types : class or tuple of classes
        Layers to take. In each, every parameter of its own that is called a weight and has two axes or more.
    exclude : pattern or sequence of patterns
        Layers to leave alone, and all inside them: globs of names, classes, or functions of name and module. A tensor
        that one of its owners excludes is left alone in all.
    init : {"latent", "preserve"}
        ``latent``: the present weights become the latent ones, so that fresh weights are companded themselves. Small
        ones are then ``a / b`` times as large as they were, which alone changes what a training finds.
        ``preserve``: the layers compute as before, for trained models, or to train from the same weights.
    margin : float
        Of ``a="fit"``; above zero.

    Returns
    -------
    nn.Module
        With a :class:`WeightCompander` on every weight taken, which the state dict holds as
        ``<layer>.parametrizations.weight.original`` beside ``a`` and ``b``. A tensor of several owners has one for all
        of them, those of other types too. A layer that is called many times a pass computes its weight each time;
        :func:`torch.nn.utils.parametrize.cached` keeps it. As with every parametrization of torch, such a model cannot
        be pickled whole: save its state dict, or use :func:`retensor.save`.

    Notes
    -----
    A training step takes longer, and holds more memory at its peak, by what :func:`psi` says.

    Before a normalisation layer the scale of a weight is void, and what is left is another direction of each step. Adam
    divides by the scale of gradients and with it by most of the slope, so that what is known of SGD says little of it.

    Raises
    ------
    ValueError
        Where ``a`` or ``b`` is not above zero, ``init="preserve"`` meets a weight of ``a pi / 2`` or more, another
        argument is not one of those above, a pattern or the types mean no layer, or a weight is one that something
        else makes already.
    TypeError
        Where a weight is no ordinary real floating-point tensor, has no shape yet (a lazy layer), a module is the
        quantised counterpart of a type that is taken, or an argument is of another type.
    RuntimeError
        Where the weights are companded already.

    Examples
    --------
    >>> model = apply(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), a=0.3, b=0.2, exclude="2")
    >>> [name for name, _ in model.named_parameters()]
    ['0.bias', '0.parametrizations.weight.original', '2.weight', '2.bias']
    """
    _check(model, a, b, granularity, types, init, margin)
    model = copied(model)
    groups = owned_weights(model, types, exclude)
    pairs = _pairs(groups, a, b, granularity, margin)
    shared: WeightCompander | None = None
    for group, (its_a, its_b) in zip(groups, pairs, strict=True):
        weight = group[0].tensor
        if init == "preserve":
            with torch.no_grad():
                weight.copy_(_preserving(weight, its_a, its_b, group[0]))
        step = WeightCompander(
            its_a, its_b, learn=learn, dtype=exact(weight.dtype), device=weight.device
        ).requires_grad_(weight.requires_grad)
        # A frozen weight would move with a pair that others train.
        if learn and granularity == "global" and weight.requires_grad:
            shared = _sharing(step, shared)
        for owner in group:
            step.register(owner.module, owner.label)
    return model


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, lr_scale: float = 1e-3
) -> list[dict[str, Any]]:
    """Parameters for an optimiser: ``a`` and ``b`` at a low rate and without decay, all others as usual.

    The gradient of ``a`` and ``b`` sums over every weight they belong to; at the weights' own rate they run away.

    Parameters
    ----------
    model : nn.Module
        Any; without learned ``a`` and ``b`` there is one group.
    lr, weight_decay : float
        Of all other parameters, latent weights among them.
    lr_scale : float
        ``a`` and ``b`` have the rate ``lr * lr_scale``.

    Returns
    -------
    list of dict
        Groups with ``params``, ``lr`` and ``weight_decay``, of the parameters that need gradients, each once.

    Raises
    ------
    ValueError
        Where a number is negative or not finite, or is no number.
    TypeError
        Where the model is no module.

    Examples
    --------
    >>> model = apply(nn.Sequential(nn.Linear(8, 2)), learn=True)
    >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in param_groups(model, lr=0.5, weight_decay=5e-4)]
    [(2, 0.5, 0.0005), (2, 0.0005, 0.0)]
    """
    checked(model)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_scale", lr_scale)):
        not_negative(value, name)
    slow = {id(p) for module in model.modules() if isinstance(module, WeightCompander) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in slow], "lr": lr, "weight_decay": weight_decay}]
    if any(id(p) in slow for p in trained):
        companded = [p for p in trained if id(p) in slow]
        groups.append({"params": companded, "lr": lr * lr_scale, "weight_decay": 0.0})
    return groups


def bake(model: nn.Module) -> nn.Module:
    """A copy with plain weights in the places of companded ones: ``model = wc.bake(model)``, as the one given stays.

    It is :func:`retensor.fold`, under the name the method's users know. Recurrent layers that have run with gradients
    are folded too, which torch cannot copy otherwise.

    Parameters
    ----------
    model : nn.Module
        Companded or not.

    Returns
    -------
    nn.Module
        With outputs equal in every bit where the same kernels run, and a state dict of ordinary names.

    Raises
    ------
    TypeError
        Where it is no module.
    ValueError
        Where a tensor has other parametrizations beside this one.

    Examples
    --------
    >>> is_applied(bake(apply(nn.Sequential(nn.Linear(8, 2)))))
    False
    """
    return fold(model)


def is_applied(model: nn.Module) -> bool:
    """Whether a model has companded weights.

    Parameters
    ----------
    model : nn.Module

    Raises
    ------
    TypeError
        Where it is no module.

    Examples
    --------
    >>> is_applied(nn.Linear(2, 2)), is_applied(apply(nn.Linear(2, 2)))
    (False, True)
    """
    return any(isinstance(module, WeightCompander) for module in checked(model).modules())


def _check(model: Any, a: Any, b: Any, granularity: Any, types: Any, init: Any, margin: Any) -> None:
    checked(model)
    for name, value in (("a", a), ("b", b)):
        if isinstance(value, str):
            if value != "fit":
                raise ValueError(f"{name} is {described(value)}; it is a number above zero, or 'fit'")
        else:
            number(value, name)
    if b == "fit" and a != "fit":
        raise ValueError(f"b is 'fit', which follows a, but a is {a}; give a='fit', or a number as b")
    for name, value, allowed in (
        ("granularity", granularity, ("global", "layer", "channel")),
        ("init", init, ("latent", "preserve")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {described(value)}; it is one of {', '.join(map(repr, allowed))}")
    kinds = types if isinstance(types, tuple) else (types,)
    if not kinds or not all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        raise TypeError(f"types are {described(types)}; they are classes of modules such as (nn.Linear, nn.Conv2d)")
    number(margin, "margin")


def _pairs(
    groups: list[list[Owner]], a: float | str, b: float | str, granularity: str, margin: float
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """``a`` and ``b`` of each tensor, in float64."""
    scales: list[torch.Tensor] = []
    for owner, *_ in groups:
        weight = owner.tensor.detach()
        shape = [1] * weight.ndim
        if granularity == "channel":
            shape[owner.channels] = weight.shape[owner.channels]
        if not isinstance(a, str):
            scales.append(torch.full(shape if granularity == "channel" else (), float(a), dtype=torch.float64))
            continue
        magnitude = weight.abs().to(torch.float64)
        most = magnitude.amax()
        if not 0 < most.item() < math.inf:
            raise ValueError(f"'{owner.name}' has weights up to {most.item()}, which fit no a; give a number")
        if granularity == "channel":
            axes = [axis for axis in range(weight.ndim) if axis != owner.channels]
            channel = magnitude.amax(axes, keepdim=True)
            # A channel of zeros takes the layer's.
            most = torch.where(channel > 0, channel, most)
        scales.append(most * (2 / math.pi) * (1 + margin))
    if granularity == "global" and isinstance(a, str) and scales:
        scales = [max(scales, key=float)] * len(scales)
    return [(scale, scale / SLOPE if isinstance(b, str) else torch.full_like(scale, b)) for scale in scales]


def _preserving(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, owner: Owner) -> torch.Tensor:
    """Latent weights that give the present ones."""
    try:
        return psi_inverse(weight, a.to(weight.device), b.to(weight.device))
    except ValueError as error:
        raise ValueError(f"'{owner.name}' cannot be preserved: {error}, or pass a='fit'") from None


def _sharing(step: WeightCompander, shared: WeightCompander | None) -> WeightCompander:
    """The step that trains ``a`` and ``b`` for all: the first, whose parameters the others then have."""
    if shared is not None:
        step.shift_a, step.shift_b = shared.shift_a, shared.shift_b
    return shared or step
