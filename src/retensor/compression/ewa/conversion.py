"""Experts into a model's feed-forward networks, and one network out of them again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from retensor.compression.ewa.assignment import Assignment, EvalMode, FewTokens, GradScale
from retensor.compression.ewa.experts import ExpertLinear, ExpertNorm, Role, needed_layers, norm_kinds
from retensor.compression.ewa.feed_forward import FeedForward, Layers, feed_forwards
from retensor.files import described
from retensor.replacing import fold as fold_all
from retensor.replacing import replace
from retensor.replacing.match import Pattern, exactly

Init: TypeAlias = "Literal['independent', 'copy'] | Callable[[], nn.Module]"
"""How the experts begin: independent draws, copies, or a function that makes a new untrained model."""

Values: TypeAlias = "Mapping[str, torch.Tensor]"


def convert(
    model: nn.Module,
    num_experts: int = 4,
    *,
    layers: Layers = "every2",
    init: Init = "independent",
    eval_mode: EvalMode = "folded",
    few_tokens: FewTokens = "raise",
    grad_scale: GradScale = "none",
    seed: int = 0,
) -> nn.Module:
    r"""Put N experts in the places of feed-forward networks, with tokens shared out at random and evenly.

    Linear layers and normalisations of each network become :class:`ExpertLinear` and :class:`ExpertNorm` under the same
    names; activation, dropout and everything around stay.

    Parameters
    ----------
    model : nn.Module
        Of timm, transformers, torchvision or your own; left as it is, the result is a copy.
    num_experts : int
        N.
    layers : str or pattern
        Which feed-forward networks: ``"every2"``, ``"last2"``, ``"all"``, or a pattern; see :func:`feed_forwards`.
    init : {"independent", "copy"} or function
        The first expert is the network that stands there. Further ones are: ``"independent"``, for training from
        scratch, drawn anew as the model draws its weights, by the ``init_weights`` of timm's models or the
        ``_init_weights`` of transformers' where there is one, and by each layer's ``reset_parameters`` elsewhere (as
        of torchvision); ``"copy"``, for fine-tuning, the same values; or those of a model that ``init()`` makes anew,
        for each expert one, where weights were drawn in a way of your own. Copies that are averaged with share rate 1
        are the plain network.
    eval_mode : {"folded", "ensemble", "rup"}
        What evaluation computes; ``"folded"`` is what will be deployed. See :func:`set_eval_mode`.
    few_tokens : {"raise", "fold"}
        What training does with a batch of fewer than N tokens: refuse, or compute the mean network.
    grad_scale : {"none", "N"}
        Whether gradients of experts are multiplied by N; see :class:`Assignment`. Where gradients are clipped by their
        global norm, N networks count instead of one.
    seed : int
        Of independent draws.

    Returns
    -------
    nn.Module
        Whose experts' tensors are stacked, of shape (N, ...).

    Raises
    ------
    TypeError
        Where an argument is of another kind.
    ValueError
        Where N is below 2, an option is none of those above, no feed-forward network is found, or one cannot have
        experts.

    Examples
    --------
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    >>> experts = convert(vit, num_experts=4)
    >>> tuple(experts.blocks[1].mlp.fc1.weight.shape), type(experts.blocks[0].mlp.fc1).__name__
    ((4, 32, 8), 'Linear')
    >>> folded = fold(experts)
    >>> {name: v.shape for name, v in folded.state_dict().items()} == {n: v.shape for n, v in vit.state_dict().items()}
    True
    """
    make = _assignments(num_experts, eval_mode=eval_mode, few_tokens=few_tokens, grad_scale=grad_scale)
    return _converted(model, layers, init, seed, make)


def route(
    model: nn.Module,
    num_experts: int = 4,
    *,
    top_k: int = 1,
    layers: Layers = "every2",
    init: Init = "independent",
    grad_scale: GradScale = "none",
    seed: int = 0,
) -> nn.Module:
    """Put mixtures of experts with a learned router in the places of feed-forward networks.

    Each token goes to the ``top_k`` experts of the largest softmax probability, which weights what they give; none is
    dropped. This is the plain ("naive") mixture that Early EWA improves: ``attach(..., until=0.5)`` averages the
    experts in the first half of training. It stays for inference, so that :func:`fold` refuses it.

    Parameters
    ----------
    model, num_experts, layers, init, grad_scale, seed
        As of :func:`convert`.
    top_k : int
        Experts of each token.

    Returns
    -------
    nn.Module
        With a ``router`` in the first layer of each mixture.

    Raises
    ------
    TypeError, ValueError
        As :func:`convert`, and where ``top_k`` lies outside 1 to N.

    Examples
    --------
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3)
    >>> route(vit, num_experts=4, top_k=2).blocks[1].mlp.fc1.router
    Linear(in_features=8, out_features=4, bias=False)
    """
    if isinstance(top_k, int) and not isinstance(top_k, bool) and top_k < 1:
        raise ValueError(f"top_k is {top_k}; of {num_experts} experts 1 to {num_experts} can be chosen")
    return _converted(model, layers, init, seed, _assignments(num_experts, top_k=top_k, grad_scale=grad_scale))


def fold(model: nn.Module) -> nn.Module:
    """Fold experts into plain layers of their mean: :func:`retensor.fold`, with an error where that changes nothing.

    Parameters
    ----------
    model : nn.Module
        Left as it is.

    Returns
    -------
    nn.Module
        A copy with the original modules' names, shapes and costs.

    Raises
    ------
    ValueError
        Where the model has no experts, or a router chooses among them: their mean is then no equivalent.

    Examples
    --------
    >>> from timm.layers import Mlp
    >>> fold(convert(nn.Sequential(Mlp(8, 16)), num_experts=2, layers="all"))[0].fc1
    Linear(in_features=8, out_features=16, bias=True)
    """
    routed = [name for name, layer in needed_layers(model) if layer.assignment.top_k]
    if routed:
        raise ValueError(
            f"'{routed[0]}' belongs to a routed mixture, which has no plain equivalent; it stays for inference. "
            "Experts made by ewa.convert can be folded"
        )
    return fold_all(model)


def _assignments(num_experts: int, **settings: Any) -> Callable[[], Assignment]:
    # Made once here, so that a bad argument is told before the model is looked at.
    Assignment(num_experts, **settings)
    return lambda: Assignment(num_experts, **settings)


def _converted(model: nn.Module, layers: Layers, init: Init, seed: int, make: Callable[[], Assignment]) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"experts are put into an nn.Module, not into {described(model)}")
    if init not in ("independent", "copy") and not callable(init):
        raise ValueError(
            f"init is {described(init)}; it is 'independent', 'copy', or a function that makes a new untrained model"
        )
    found = feed_forwards(model, layers)
    experts = make().num_experts
    fresh: list[Values] = []
    if callable(init):
        fresh = [_made(init, model) for _ in range(experts - 1)]
    elif init == "independent":
        fresh = _drawn(model, found, experts - 1, seed)
    replacements: dict[Pattern, Callable[[nn.Module], nn.Module]] = {}
    for network in found:
        assignment = make()
        for member, (name, role) in enumerate(network.members):
            others = [{n.removeprefix(f"{name}."): v for n, v in values.items()} for values in fresh]
            replacements[exactly(name)] = _Maker(network, assignment, role, member, others)
    converted = replace(model, replacements)
    generator = torch.Generator().manual_seed(seed)
    for network in found:
        router = getattr(converted.get_submodule(network.members[0][0]), "router", None)
        if router is not None:
            with torch.no_grad():
                drawn = torch.randn(router.weight.shape, generator=generator) * 0.02
                router.weight.copy_(drawn)
    return converted


def _made(init: Callable[[], nn.Module], model: nn.Module) -> Values:
    made = init()
    if not isinstance(made, nn.Module):
        raise TypeError(f"init() came out as {described(made)}; it makes a new untrained model")
    shapes, own = ({name: t.shape for name, t in m.named_parameters()} for m in (made, model))
    if shapes != own:
        raise ValueError("init() made a model of other names or shapes than the one that is converted")
    return dict(made.named_parameters())


def _drawn(model: nn.Module, networks: Sequence[FeedForward], count: int, seed: int) -> list[Values]:
    """Values of the networks' layers, drawn anew so many times as the model draws its own."""
    fresh = copy.deepcopy(model)
    fresh = fresh.to_empty(device="cpu") if any(p.is_meta for p in fresh.parameters()) else fresh.cpu()
    found: list[Values] = []
    names = [name for network in networks for name, _ in network.members]
    with _seeded(seed):
        for _ in range(count):
            for name in names:
                fresh.get_submodule(name).reset_parameters()
            for path in dict.fromkeys(_drawers(fresh, networks)):
                owner = fresh.get_submodule(path)
                if hasattr(owner, "init_weights") and not hasattr(owner, "config"):
                    owner.init_weights()
                else:
                    for part in (part for network in networks for part in network.parts):
                        # Transformers' own init_weights leaves alone what it has drawn once.
                        fresh.get_submodule(part).apply(owner._init_weights)
            layers = {name: fresh.get_submodule(name) for name in names}
            found.append(
                {
                    f"{name}.{label}": p.detach().clone()
                    for name, layer in layers.items()
                    for label, p in layer.named_parameters()
                }
            )
    return found


def _drawers(model: nn.Module, networks: Sequence[FeedForward]) -> Iterator[str]:
    """Names of the outermost modules around networks that draw weights for what they hold."""
    for network in networks:
        steps = network.parts[0].split(".")
        for depth in range(len(steps) + 1):
            path = ".".join(steps[:depth])
            owner = model.get_submodule(path)
            if callable(getattr(owner, "init_weights", None)) or (
                hasattr(owner, "_init_weights") and hasattr(owner, "config")
            ):
                yield path
                break


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Random numbers on the CPU from a seed inside, the caller's afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


class _Maker:
    """What stands in the place of one layer of a feed-forward network."""

    def __init__(
        self,
        network: FeedForward,
        assignment: Assignment,
        role: Role,
        member: int,
        others: Sequence[Values],
    ) -> None:
        self.part: dict[str, Any] = {"role": role, "group": network.name, "member": member}
        self.assignment = assignment
        self.others = others

    def __call__(self, layer: nn.Module) -> nn.Module:
        place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
        arguments = {"bias": layer.bias is not None, **self.part, **place}
        new: ExpertLinear | ExpertNorm
        if isinstance(layer, nn.Linear):
            new = ExpertLinear(layer.in_features, layer.out_features, self.assignment, **arguments)
        else:
            library = next(name for name, kind in norm_kinds().items() if type(layer) is kind)
            new = ExpertNorm(layer.normalized_shape[0], self.assignment, eps=layer.eps, library=library, **arguments)
        with torch.no_grad():
            for name, stacked in new.experts():
                first = layer.get_parameter(name)
                stacked.requires_grad_(first.requires_grad)
                stacked.copy_(first.expand_as(stacked))
                for i, values in enumerate(self.others, 1):
                    stacked[i].copy_(values[name])
        return new
