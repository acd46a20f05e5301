"""Which parts of a model are feed-forward networks, and which of their layers tokens pass in which order."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from retensor.compression.ewa.experts import Role, norm_kinds
from retensor.files import brief, described
from retensor.replacing import matching
from retensor.replacing.match import Pattern

Layers: TypeAlias = "str | Pattern"
"""``"every2"``, ``"last3"``, ``"all"``, or a pattern of names, a class, or a function of name and module."""


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network in a model.

    Attributes
    ----------
    name : str
        Of its module; of the block where it lies in two parts, ``intermediate`` and ``output``.
    parts : tuple of str
        Names of its one or two modules.
    members : tuple of (str, Role)
        Names of the layers with values, in the order in which tokens pass, and what each does.
    """

    name: str
    parts: tuple[str, ...]
    members: tuple[tuple[str, Role], ...]


def feed_forwards(model: nn.Module, layers: Layers = "all") -> list[FeedForward]:
    """Feed-forward networks of a model, in its order.

    One is a module whose class is called Mlp, MLP, FFN, FeedForward or SwiGLU in any compound and that holds at least
    two ``nn.Linear`` (``timm.layers.Mlp``, ``GluMlp`` and ``SwiGLU``, torchvision's ``MLPBlock``, transformers'
    ``ViTMLP``, ``SwinMLP``, ``Dinov2SwiGLUFFN``), or a block with the two parts ``intermediate`` and ``output`` (BERT,
    YOLOS, Swin V2); what lies in an attention is none. Each is run once on a few random tokens, to see in which order
    its layers follow and that it treats every token alone.

    Parameters
    ----------
    model : nn.Module
    layers : str or pattern
        ``"every2"`` takes the second, fourth and so on, ``"last2"`` the last two, ``"all"`` all; any other string is a
        glob of names, and a class or a function of ``(name, module)`` chooses as well
        (:func:`retensor.replacing.matching`).

    Returns
    -------
    list of FeedForward

    Raises
    ------
    ValueError
        Where none is found, or one is no network of linear layers and layer normalisations that treats tokens alone.

    Examples
    --------
    >>> from timm.models.vision_transformer import VisionTransformer
    >>> vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=4, num_heads=2)
    >>> [found.name for found in feed_forwards(vit, "every2")]
    ['blocks.1.mlp', 'blocks.3.mlp']
    """
    modules = dict(model.named_modules())
    places = {
        name: parts
        for name, module in modules.items()
        if (parts := _parts(name, module)) is not None and not _ATTENTION.search(name)
    }
    # Outermost, where one lies in another.
    places = {name: parts for name, parts in places.items() if not any(_within(name, outer) for outer in places)}
    by_rule = re.fullmatch(r"(every|last)(\d+)|all", layers) if isinstance(layers, str) else None
    if by_rule is None:
        wanted = [name for name in matching(model, layers) if name in modules]
        places = {name: places.get(name) or _parts_of_block(name, modules[name]) or (name,) for name in wanted}
    elif by_rule[1]:
        count = int(by_rule[2])
        if not count:
            raise ValueError(f"layers is '{layers}'; count from 1, as in '{by_rule[1]}2'")
        names = list(places)
        kept = names[count - 1 :: count] if by_rule[1] == "every" else names[-count:]
        places = {name: places[name] for name in kept}
    if not places:
        seen = Counter(type(module).__name__ for module in modules.values() if module is not model)
        told = ", ".join(f"{kind} ({count})" for kind, count in seen.most_common(12)) or "nothing"
        raise ValueError(
            f"layers={described(layers)} means no feed-forward network in the {type(model).__name__}; it holds {told}. "
            "Name the modules by a pattern, such as layers='blocks.*.mlp'"
        )
    return [_probed(name, parts, modules) for name, parts in places.items()]


_FEED_FORWARD = re.compile(r"mlp|ffn|feedforward|swiglu", re.IGNORECASE)
# A small network beside an attention makes biases or keys of positions, not tokens.
_ATTENTION = re.compile(r"attn|attention|rel_pos|position", re.IGNORECASE)


def _parts(name: str, module: nn.Module) -> tuple[str, ...] | None:
    if pair := _parts_of_block(name, module):
        return pair
    linears = sum(isinstance(inner, nn.Linear) for inner in module.modules())
    kind = type(module).__name__
    is_one = name and linears >= 2 and _FEED_FORWARD.search(kind) and "head" not in kind.lower()
    return (name,) if is_one else None


def _parts_of_block(name: str, module: nn.Module) -> tuple[str, ...] | None:
    """The two parts of a feed-forward network in transformers' older blocks."""
    parts = ("intermediate", "output")
    if all(isinstance(getattr(getattr(module, part, None), "dense", None), nn.Linear) for part in parts):
        return tuple(f"{name}.{part}".lstrip(".") for part in parts)
    return None


def _within(name: str, outer: str) -> bool:
    return name != outer and name.startswith(f"{outer}.")


def _probed(name: str, parts: tuple[str, ...], modules: dict[str, nn.Module]) -> FeedForward:
    """Run a copy on a few tokens, and see what they pass."""
    # Hooks are the caller's, and what they do is not ours to set off.
    copies = [_bare(modules[part]) for part in parts]
    holders = {
        inner: f"{part}.{path}".strip(".")
        for part, module in zip(parts, copies, strict=True)
        for path, inner in module.named_modules()
        if any(True for _ in inner.parameters(recurse=False)) or any(True for _ in inner.buffers(recurse=False))
    }
    # A residual and its normalisation, in the second of two parts, are the block's.
    shared = _after_dense(copies[1]) if len(parts) == 2 else set()
    for inner, path in holders.items():
        if inner not in shared and not _supported(inner):
            raise ValueError(
                f"'{path}' in the feed-forward network '{name}' is a {type(inner).__name__}; experts can be made of "
                "nn.Linear and of nn.LayerNorm over the last dimension. Leave it out with layers=<a pattern>"
            )
    linears = [inner for inner in holders if isinstance(inner, nn.Linear)]
    if len(linears) < 2:
        raise ValueError(f"'{name}' holds {len(linears)} nn.Linear; a feed-forward network has at least 2")
    order: list[tuple[nn.Module, bool]] = []
    x = torch.randn(1, 6, linears[0].in_features, generator=torch.Generator().manual_seed(0))
    x = x.to(linears[0].weight)
    run = _chained(copies, x)
    for inner in holders:
        if inner not in shared:
            inner.register_forward_hook(lambda one, inputs, _: order.append((one, inputs[0] is x)))
    try:
        with torch.no_grad():
            y = run(x)
            calls = list(order)
            other = torch.cat((x[:, :1], x[:, 1:].flip(1) * 2 + 1), 1)
            alone = run(other)
    except Exception as error:  # the module is the caller's, and may raise anything
        raise ValueError(f"'{name}' does not run on tokens of shape {tuple(x.shape)}: {brief(error)}") from error
    if not isinstance(y, torch.Tensor) or y.shape[:2] != x.shape[:2]:
        raise ValueError(f"'{name}' makes no tokens of tokens of shape {tuple(x.shape)}")
    if not y.is_meta and not torch.allclose(y[:, 0], alone[:, 0], rtol=1e-2, atol=1e-2 * float(y.abs().max())):
        raise ValueError(f"'{name}' mixes tokens, which cannot be shared out among experts; leave it out")
    if Counter(one for one, _ in calls) != Counter(inner for inner in holders if inner not in shared):
        raise ValueError(f"'{name}' does not call each of its layers once; experts cannot stand in for them")
    roles = [_role(at, takes, len(calls)) for at, (_, takes) in enumerate(calls)]
    if roles[0] != "first" or not isinstance(calls[0][0], nn.Linear) or (roles[-1] != "exit"):
        raise ValueError(f"'{name}' does not begin with a linear layer of its tokens; experts cannot stand in for it")
    return FeedForward(name, parts, tuple((holders[one], role) for (one, _), role in zip(calls, roles, strict=True)))


def _bare(module: nn.Module) -> nn.Module:
    try:
        module = copy.deepcopy(module).eval()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the {type(module).__name__} cannot be copied: {error}") from error
    for inner in module.modules():
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(inner, hooks).clear()
    return module


def _supported(inner: nn.Module) -> bool:
    # A class derived from these may compute something else.
    if isinstance(inner, nn.Linear):
        return type(inner).forward is nn.Linear.forward
    return type(inner) in norm_kinds().values() and len(inner.normalized_shape) == 1 and inner.weight is not None


def _after_dense(output: nn.Module) -> set[nn.Module]:
    return {inner for inner in output.modules() if inner is not output.dense}


def _chained(modules: list[nn.Module], residual: torch.Tensor) -> Callable[[torch.Tensor], Any]:
    if len(modules) == 1:
        return modules[0]
    first, second = modules

    def run(x: torch.Tensor) -> Any:
        middle = first(x)
        try:
            return second(middle, x)
        except TypeError:
            return second(middle)

    return run


def _role(at: int, takes: bool, count: int) -> Role:
    if at == count - 1:
        return "exit"
    if takes:
        return "first" if at == 0 else "entry"
    return "inner"
