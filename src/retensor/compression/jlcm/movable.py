"""Channels that can be put in another order: every place of a network that is indexed by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Place:
    """Where a tensor is indexed by channels.

    Attributes
    ----------
    tensor : str
        Its name in the model.
    dim : int
    index : torch.Tensor
        int64 of shape (channels, entries of a channel): the indices along that dimension.
    """

    tensor: str
    dim: int
    index: torch.Tensor

    def reorder_(self, tensor: torch.Tensor, order: torch.Tensor) -> None:
        """Put channel ``order[i]`` in place i."""
        to, of = self.index.flatten().to(tensor.device), self.index[order].flatten().to(tensor.device)
        with torch.no_grad():
            tensor.index_copy_(self.dim, to, tensor.index_select(self.dim, of))


@dataclass(frozen=True)
class Movable:
    """Channels that can be put in any order, in all of these places at once.

    Attributes
    ----------
    channels : int
    places : tuple of Place
        One for a tensor and a dimension of it.
    writers : frozenset of str
        Layers that make the channels.
    """

    channels: int
    places: tuple[Place, ...]
    writers: frozenset[str]

    def rows(self) -> dict[str, torch.Tensor]:
        """The rows of each layer that makes these channels, int64 of shape (channels, rows of a channel)."""
        return {
            place.tensor.removesuffix(".weight"): place.index
            for place in self.places
            if place.dim == 0 and place.tensor.removesuffix(".weight") in self.writers
        }

    def reorder_(
        self, tensors: Mapping[str, torch.Tensor], order: torch.Tensor, places: Sequence[Place] | None = None
    ) -> None:
        """Put channel ``order[i]`` in place i, everywhere or in some places."""
        # One tensor may have two names.
        done: set[tuple[int, int]] = set()
        for place in self.places if places is None else places:
            key = (id(tensors[place.tensor]), place.dim)
            if key not in done:
                done.add(key)
                place.reorder_(tensors[place.tensor], order)


@dataclass(frozen=True)
class Trace:
    """What can be put in order, and what cannot.

    Attributes
    ----------
    movables : tuple of Movable
    fixed : dict of str to str
        Layers whose rows stay where they are, with the reason as a part of a sentence.
    """

    movables: tuple[Movable, ...]
    fixed: dict[str, str]


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All parameters and buffers, by every name they have."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def check_values(model: nn.Module) -> None:
    """Refuse a model whose weights are shapes alone."""
    for name, tensor in tensors_of(model).items():
        if tensor.is_meta:
            raise ValueError(f"'{name}' is on the meta device and holds no values; load the model's weights first")
