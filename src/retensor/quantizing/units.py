"""The parts of a model that are reconstructed one after another: its blocks, and every layer outside of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import _pytree as pytree

from retensor.files import described
from retensor.quantizing.samples import Samples
from retensor.replacing.match import inside, suggestions

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What holds a weight that is put in few bits."""


@dataclass(frozen=True)
class Unit:
    """A block, or a layer outside of all blocks.

    Attributes
    ----------
    name : str
        In the model.
    layers : tuple of str
        Names in the model of the layers that hold its weights, in the order in which they are called.
    first, last : bool
        Whether it holds the first or the last layer of the model.
    follows : int, optional
        Which of its arguments is what the unit before puts out, where all others are the same for both; None where
        something lies between them.
    """

    name: str
    layers: tuple[str, ...]
    first: bool = False
    last: bool = False
    follows: int | None = None


def find_units(model: nn.Module, samples: Samples, blocks: Literal["auto"] | Sequence[str] = "auto") -> list[Unit]:
    """Units of a model in the order in which they are called.

    Parameters
    ----------
    model : nn.Module
        In eval mode; it runs on two samples.
    samples : Samples
    blocks : "auto" or sequence of str
        Names of modules; ``auto``: the entries of lists and sequences of modules that hold at least two layers, the
        innermost such. Nothing, ``()``, makes every layer a unit.

    Raises
    ------
    ValueError
        Where a name is no module, one lies in another, a unit is called more than once, or there is no layer.
    """
    names = _blocks(model) if blocks == "auto" else _named(model, blocks)
    arguments, named = samples.take(slice(0, 2))
    order = called_layers(model, arguments, named)
    if not order:
        raise ValueError("the model calls no linear layer or convolution, so there is nothing to put in few bits")
    layers: dict[str, list[str]] = {}
    for layer in order:
        layers.setdefault(next((name for name in names if inside(layer, name)), layer), []).append(layer)
    if blocks != "auto":
        for name in names:
            if name not in layers:
                raise ValueError(f"the block '{name}' calls no linear layer or convolution; leave it out of blocks")
    follows = _follows(model, samples, list(layers))
    listed = list(layers.items())
    return [
        Unit(name, tuple(held), i == 0, i == len(listed) - 1, follows[name]) for i, (name, held) in enumerate(listed)
    ]


def _blocks(model: nn.Module) -> list[str]:
    """Entries of lists of modules that hold at least two layers each, and no such entry themselves."""
    held = {
        name: sum(isinstance(inner, LAYERS) for inner in module.modules()) for name, module in model.named_modules()
    }
    entries = [
        f"{name}.{child}" if name else child
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        for child in module._modules
    ]
    many = [name for name in entries if held.get(name, 0) >= 2]
    return [name for name in many if not any(inside(other, name) for other in many if other != name)]


def _named(model: nn.Module, blocks: Any) -> list[str]:
    if isinstance(blocks, str) or not isinstance(blocks, Sequence):
        raise TypeError(f"blocks is 'auto' or a list of names, not {described(blocks)}")
    known = dict(model.named_modules())
    for name in blocks:
        if not isinstance(name, str) or name not in known or not name:
            raise ValueError(f"the model has no block {described(name)}; {suggestions(name, known)}")
        for other in blocks:
            if other is not name and inside(name, other):
                raise ValueError(f"the block '{name}' lies in the block '{other}'; name one of them")
    return list(blocks)


@torch.no_grad()
def called_layers(model: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> list[str]:
    """Layers in the order of their first call by a run of a model.

    Weights that a parent reads without calling the layer (the projection of ``nn.MultiheadAttention``) are not found.
    """
    order: dict[str, None] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and not isinstance(module, NonDynamicallyQuantizableLinear):
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: order.setdefault(name)))
    try:
        model(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


@torch.no_grad()
def _follows(model: nn.Module, samples: Samples, names: list[str]) -> dict[str, int | None]:
    """For each unit, the argument that is the output of the unit before, where everything else is the same for both."""
    called: dict[str, tuple[list[Any], Any]] = {}
    given: dict[str, tuple[torch.Tensor, int]] = {}
    follows: dict[str, int | None] = dict.fromkeys(names)
    handles = []

    def before(name: str, arguments: Any, named: Any) -> None:
        if name in called:
            raise ValueError(f"'{name}' is called more than once in one run; leave it out of blocks")
        leaves, tree = pytree.tree_flatten((arguments, named))
        called[name] = leaves, tree
        at = names.index(name)
        if not at or names[at - 1] not in given:
            return
        out, version = given[names[at - 1]]
        earlier, same = called[names[at - 1]]
        if tree != same or len(leaves) != len(earlier):
            return
        # Something that changed the output in place on its way here would be left out.
        places = [i for i, leaf in enumerate(leaves) if leaf is out and out._version == version]
        others = [i for i in range(len(leaves)) if i not in places]
        if len(places) == 1 and all(_same(leaves[i], earlier[i]) for i in others):
            follows[name] = places[0]

    def after(name: str, found: Any) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
        if tensors:
            given[name] = tensors[0], tensors[0]._version

    for name in names:
        module = model.get_submodule(name)
        handles.append(
            module.register_forward_pre_hook(
                lambda _, arguments, named, name=name: before(name, arguments, named), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda _, arguments, found, name=name: after(name, found)))
    try:
        arguments, named = samples.take(slice(0, 2))
        model(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
    return follows


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return one is other
    try:
        return bool(one == other)
    except Exception:
        return False
