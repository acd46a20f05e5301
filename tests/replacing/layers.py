"""Replacements of the tests: one that does what a linear layer does, and one that rescales a tensor."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from retensor.replacing import Reparametrization, Replacement


class SameLinear(Replacement):
    """A linear layer inside another module."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(inputs, outputs, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def config(self) -> dict[str, Any]:
        layer = self.inner
        return {"inputs": layer.in_features, "outputs": layer.out_features, "bias": layer.bias is not None}

    def to_dense(self) -> nn.Module:
        return copy.deepcopy(self.inner)


class Keeper(Replacement):
    """Has no plain equivalent."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


class Doubled(Reparametrization):
    """Twice the tensor that is trained."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        return 2 * latent

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        return value / 2

    def config(self) -> dict[str, Any]:
        return {}


def same(layer: nn.Linear) -> SameLinear:
    """The replacement of a linear layer that computes the same."""
    made = SameLinear(layer.in_features, layer.out_features, layer.bias is not None)
    made.inner.load_state_dict(layer.state_dict())
    return made


class Tied(nn.Module):
    """An embedding and a classifier of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(x)))
