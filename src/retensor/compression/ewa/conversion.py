"""Experts into a model's feed-forward networks, and one network out of them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from retensor.compression.ewa.assignment import Assignment, EvalMode, FewTokens, GradScale
from retensor.compression.ewa.experts import ExpertLinear, ExpertNorm, Role, _needed, norm_kinds
from retensor.compression.ewa.feed_forward import FeedForward, Layers, feed_forwards
from retensor.files import described
from retensor.replacing import fold as fold_all
from retensor.replacing import replace
from retensor.replacing.match import Pattern, exactly

Init: TypeAlias = "Literal['independent', 'copy'] | Callable[[], nn.Module]"
"""How the experts begin: independent draws, copies, or a function that makes a new untrained model."""


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
        scratch, its weights with the entries of each row in another order, which for entries drawn independently is
        another draw (biases too, unless values come twice, as of constants); ``"copy"``, for fine-tuning, the same
        values; or, exactly, those of a model ``init()`` made anew, for each expert one. Copies that are averaged with
        share rate 1 are the plain network.
    eval_mode : {"folded", "ensemble", "rup"}
        What evaluation computes; ``"folded"`` is what will be deployed. See :func:`set_eval_mode`.
    few_tokens : {"raise", "fold"}
        What training does with a batch of fewer than N tokens: refuse, or compute the mean network.
    grad_scale : {"none", "N"}
        Whether gradients of experts are multiplied by N; see :class:`Assignment`. Where gradients are clipped by their
        global norm, N networks count instead of one.
    seed : int
        Of independent draws.

    Raises
    ------
    TypeError
        Where an argument is of another kind.
    ValueError
        Where N is below 2, an option is none of those above, no feed-forward network is found, or one cannot have
        experts.

    Examples
    --------
    >>> import torch
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

    Raises
    ------
    TypeError, ValueError
        As :func:`convert`, and where ``top_k`` lies outside 1 to N.

    Examples
    --------
    >>> import torch
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
        Left as it is; the result is a copy with the original modules' names, shapes and costs.

    Raises
    ------
    ValueError
        Where the model has no experts, or a router chooses among them: their mean is then no equivalent.
    """
    routed = [name for name, layer in _needed(model) if layer.assignment.top_k]
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
    fresh = [_fresh(init, model) for _ in range(experts - 1)] if callable(init) else []
    generator = torch.Generator().manual_seed(seed)
    replacements: dict[Pattern, Callable[[nn.Module], nn.Module]] = {}
    for network in found:
        assignment = make()
        for member, (name, role) in enumerate(network.members):
            others = [other.get_submodule(name) for other in fresh]
            maker = _Maker(network, assignment, role, member, init == "copy", others, generator)
            replacements[exactly(name)] = maker
    converted = replace(model, replacements)
    for network in found:
        router = getattr(converted.get_submodule(network.members[0][0]), "router", None)
        if router is not None:
            with torch.no_grad():
                drawn = torch.randn(router.weight.shape, generator=generator) * 0.02
                router.weight.copy_(drawn)
    return converted


def _fresh(init: Callable[[], nn.Module], model: nn.Module) -> nn.Module:
    made = init()
    if not isinstance(made, nn.Module):
        raise TypeError(f"init() came out as {described(made)}; it makes a new untrained model")
    shapes, own = ({name: t.shape for name, t in m.named_parameters()} for m in (made, model))
    if shapes != own:
        raise ValueError("init() made a model of other names or shapes than the one that is converted")
    return made


class _Maker:
    """What stands in the place of one layer of a feed-forward network."""

    def __init__(
        self,
        network: FeedForward,
        assignment: Assignment,
        role: Role,
        member: int,
        copies: bool,
        others: Sequence[nn.Module],
        generator: torch.Generator,
    ) -> None:
        self.part: dict[str, Any] = {"role": role, "group": network.name, "member": member}
        self.assignment = assignment
        self.copies = copies
        self.others = others
        self.generator = generator

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
                for i in range(self.assignment.num_experts):
                    stacked[i].copy_(self._values(name, first, i))
        return new

    def _values(self, name: str, first: torch.Tensor, i: int) -> torch.Tensor:
        if i == 0 or self.copies:
            return first
        if self.others:
            return self.others[i - 1].get_parameter(name).to(first.device)
        values = first.detach().cpu()
        if values.ndim == 1 and len(values.unique()) < len(values):
            return first
        # Each row in an order of its own.
        order = torch.rand(values.shape, generator=self.generator).argsort(-1)
        return values.gather(-1, order).to(first.device)
