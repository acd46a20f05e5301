"""Which channels of a network belong together: what has to be reordered, or resized, in all layers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from retensor.replacing.norms import LAYERS, NORMS, dependencies


@dataclass(frozen=True)
class Member:
    """One side of a layer whose size is the number of channels of a group.

    Attributes
    ----------
    layer : str
    side : {"out", "in"}
    per : int
        Rows or columns a channel: more than one where a picture is flattened before a linear layer.
    """

    layer: str
    side: Literal["out", "in"]
    per: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that several layers share.

    Attributes
    ----------
    channels : int
    members : tuple of Member
        Layers with weights, producers first.
    obstacles : tuple of str
        What keeps the channels from being reordered or resized, each as a part of a sentence.
    norms : tuple of str
        Batch normalisations among them.
    """

    channels: int
    members: tuple[Member, ...]
    obstacles: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()

    @property
    def movable(self) -> bool:
        """Whether the channels can be reordered and resized: layers with weights alone make and read them."""
        return bool(self.producers and self.consumers and not self.obstacles)

    @property
    def producers(self) -> tuple[str, ...]:
        """Layers that make the channels."""
        return tuple(member.layer for member in self.members if member.side == "out")

    @property
    def consumers(self) -> tuple[str, ...]:
        """Layers that read the channels."""
        return tuple(member.layer for member in self.members if member.side == "in")

    def points(self, net: nn.Module) -> torch.Tensor:
        """One point a channel, of shape (channels, values): all that is indexed by it, flattened."""
        return torch.cat([part for member in self.members for part in _parts(net, member, self.channels)], dim=1)

    def reorder_(self, net: nn.Module, order: torch.Tensor) -> None:
        """Put channel ``order[i]`` in place i, in every tensor of the group."""
        for member in self.members:
            layer = net.get_submodule(member.layer)
            rows = expanded(order, member.per).to(layer.weight.device)
            with torch.no_grad():
                if member.side == "in":
                    layer.weight.copy_(layer.weight[:, rows].clone())
                    continue
                layer.weight.copy_(layer.weight[rows].clone())
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias[rows].clone())


def expanded(channels: torch.Tensor, per: int) -> torch.Tensor:
    """Indices of the rows, ``per`` a channel, of channels.

    >>> expanded(torch.tensor([2, 0]), 3)
    tensor([6, 7, 8, 0, 1, 2])
    """
    return (channels[:, None] * per + torch.arange(per)).flatten()


def channel_groups(net: nn.Module, example: Any) -> list[ChannelGroup]:
    """Groups of channels of a network, found by torch-pruning's dependency graph.

    Parameters
    ----------
    net : nn.Module
        Stays as it is.
    example : torch.Tensor, tuple or mapping
        An input, arguments, or keyword arguments.

    Returns
    -------
    list of ChannelGroup

    Raises
    ------
    MissingExtraError
        Where torch-pruning is not installed.
    RetensorError
        Where it cannot follow the network.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> sorted((group.channels, group.producers, group.consumers) for group in channel_groups(net, torch.zeros(1, 4)))
    [(3, ('2',), ()), (6, ('0',), ('2',))]
    """
    found, names = dependencies(net, example)
    return [_group(net, group, names) for group in found.get_all_groups()]


def _group(net: nn.Module, found: Any, names: Mapping[Any, str]) -> ChannelGroup:
    channels = len(found[0].idxs)
    members: dict[tuple[str, str], Member] = {}
    obstacles: dict[str, None] = {}
    norms: dict[str, None] = {}
    for dependency, indices in found.items:
        module = dependency.target.module
        if isinstance(module, nn.Parameter):
            obstacles["a parameter of its own"] = None
            continue
        name = names.get(module)
        if name is None or (not isinstance(module, LAYERS) and not list(module.parameters(recurse=False))):
            # An operation without values.
            continue
        if isinstance(module, NORMS):
            norms[name] = None
            continue
        if not isinstance(module, LAYERS):
            obstacles[f"the {type(module).__name__} '{name}'"] = None
            continue
        if getattr(module, "groups", 1) != 1:
            obstacles[f"the grouped convolution '{name}'"] = None
            continue
        side: Literal["out", "in"] = "out" if "out" in dependency.handler.__name__ else "in"
        size = module.weight.shape[0 if side == "out" else 1]
        if len(indices) != size or size % channels or (side == "out" and size != channels):
            obstacles[f"'{name}', which takes them among others"] = None
            continue
        members[name, side] = Member(name, side, size // channels)
    ordered = sorted(members.values(), key=lambda member: member.side == "in")
    for name in norms:
        obstacles[f"the batch normalisation '{name}', which is not fused"] = None
    return ChannelGroup(channels, tuple(ordered), tuple(obstacles), tuple(norms))


def _parts(net: nn.Module, member: Member, channels: int) -> list[torch.Tensor]:
    layer = net.get_submodule(member.layer)
    weight = layer.weight.detach()
    if member.side == "in":
        return [weight.transpose(0, 1).reshape(channels, -1)]
    return [weight.reshape(channels, -1)] + ([] if layer.bias is None else [layer.bias.detach()[:, None]])
