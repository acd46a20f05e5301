"""The layer that stands in a linear layer's place: two of low rank, one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from retensor.compression.pela.svd import balanced_factors
from retensor.files import described
from retensor.replacing import Replacement

Layout: TypeAlias = Literal["linear", "conv1d"]
"""How the replaced layer keeps its weight: (out, in) as ``nn.Linear``, or (in, out) as transformers' ``Conv1D``."""


class LowRankLinear(Replacement, nn.Sequential):
    """A linear layer of low rank, ``B (A x) + bias``, as two plain linear layers named 0 and 1.

    Its state is ``0.weight`` (A, of shape (rank, in)), ``1.weight`` (B, of shape (out, rank)) and ``1.bias``: the names
    of the authors' checkpoints, and plain ``nn.Linear`` layers that other libraries (LoRA of peft, quantizers) find.

    Parameters
    ----------
    in_features, out_features, rank : int
    bias : bool
    layout : {"linear", "conv1d"}
        Of the layer it stands for, which :meth:`to_dense` gives back.

    Raises
    ------
    ValueError
        Where the rank is not between 1 and the smaller of both sizes, or the layout is none.

    Notes
    -----
    As a new ``nn.Linear`` it starts at random; :meth:`from_layer` starts it at a layer's decomposition.

    Examples
    --------
    >>> layer = LowRankLinear(64, 32, rank=8)
    >>> list(layer.state_dict()), layer(torch.zeros(2, 64)).shape, layer.weight.shape
    (['0.weight', '1.weight', '1.bias'], torch.Size([2, 32]), torch.Size([32, 64]))
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True, layout: Layout = "linear"
    ) -> None:
        if isinstance(rank, bool) or not isinstance(rank, int):
            raise ValueError(f"the rank is a whole number from 1, not {described(rank)}")
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"a rank of {rank} for a layer of {in_features} inputs and {out_features} outputs; it lies between 1 "
                "and the smaller of them"
            )
        if layout not in ("linear", "conv1d"):
            raise ValueError(f"layout is {described(layout)}; it is 'linear' or 'conv1d'")
        super().__init__(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias))
        self.layout = layout

    @classmethod
    def from_layer(cls, layer: nn.Module, rank: int) -> Self:
        """The closest layer of that rank to an ``nn.Linear`` or a ``Conv1D``, with its bias.

        Of a layer on the meta device, one on the meta device.

        Raises
        ------
        TypeError, ValueError
            Where the layer is none of both, its weight is not finite, or the rank is none.
        """
        if not isinstance(layer, nn.Linear) and not is_conv1d(layer):
            raise TypeError(f"an nn.Linear or a Conv1D is decomposed, not a {type(layer).__name__}")
        made = cls._empty(*shape_of(layer), rank, layer.bias is not None, layout_of(layer))
        weight = matrix_of(layer)
        if not weight.is_meta and not bool(torch.isfinite(weight).all()):
            raise ValueError(
                "the weight of the layer has values that are not finite; a decomposition needs finite ones"
            )
        first, second = made[0], made[1]
        if weight.is_meta:
            made.to(weight.dtype)
        else:
            a, b = balanced_factors(weight, rank)
            first.weight, second.weight = nn.Parameter(a), nn.Parameter(b)
            if layer.bias is not None:
                second.bias = nn.Parameter(layer.bias.detach().clone())
        return made.trained_as(layer)

    def trained_as(self, layer: nn.Module) -> Self:
        """Train what the layer trains: both factors for its weight, and the bias; returns itself."""
        self.requires_grad_(layer.weight.requires_grad)
        if self.bias is not None:
            self.bias.requires_grad_(layer.bias.requires_grad)
        return self

    def config(self) -> dict[str, Any]:
        """Sizes, and the layout."""
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "rank": self.rank,
            "bias": self.bias is not None,
            "layout": self.layout,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer whose values are not numbers until some are loaded, so that it cannot be used without."""
        made = cls._empty(**config).to_empty(device="cpu")
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.fill_(float("nan"))
        return made

    def to_dense(self) -> nn.Module:
        """The plain layer with the weight ``B A``, multiplied in float32 at least."""
        with torch.device("meta"):
            plain: nn.Module
            if self.layout == "conv1d":
                from transformers.pytorch_utils import Conv1D

                plain = Conv1D(self.out_features, self.in_features)
            else:
                plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = self.product().detach().to(self[1].weight.dtype)
        plain.weight = nn.Parameter(weight.T.contiguous() if self.layout == "conv1d" else weight)
        plain.weight.requires_grad_(self[1].weight.requires_grad)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return plain

    def product(self) -> torch.Tensor:
        """``B A`` of shape (out, in), in float32 at least, under autocast too."""
        a, b = self[0].weight, self[1].weight
        wide = torch.promote_types(a.dtype, torch.float32)
        with torch.autocast(a.device.type, enabled=False):
            return b.to(wide) @ a.to(wide)

    @property
    def in_features(self) -> int:
        """Size of an input."""
        return int(self[0].in_features)

    @property
    def out_features(self) -> int:
        """Size of an output."""
        return int(self[1].out_features)

    @property
    def rank(self) -> int:
        """Size of what lies between both layers."""
        return int(self[0].out_features)

    @property
    def bias(self) -> torch.Tensor | None:
        """Bias of the second layer."""
        return self[1].bias

    @property
    def weight(self) -> torch.Tensor:
        """``B A`` as the replaced layer kept it, for parents that read a weight instead of calling the layer.

        Its shape, type and device cost nothing, and a linear function of it is two thin products; what else reads it
        multiplies both factors.
        """
        # A tensor class that is made while TorchDynamo traces would end its graph.
        return self._multiplied() if torch.compiler.is_dynamo_compiling() else _Product(self)

    def _multiplied(self) -> torch.Tensor:
        product = self.product().to(self[1].weight.dtype)
        return product.T if self.layout == "conv1d" else product

    def __getitem__(self, index: Any) -> Any:
        """The layer of that number, or several of them in a plain ``nn.Sequential``."""
        if isinstance(index, slice):
            return nn.Sequential(*list(self._modules.values())[index])
        return super().__getitem__(index)

    @classmethod
    def _empty(
        cls, in_features: int, out_features: int, rank: int, bias: bool = True, layout: Layout = "linear"
    ) -> Self:
        """On the meta device: nothing is drawn that would be overwritten."""
        with torch.device("meta"):
            return cls(in_features, out_features, rank, bias, layout)


class _Product(torch.Tensor):
    """The weight of a layer of low rank, multiplied where it is used as more than a weight of a linear function."""

    _layer: LowRankLinear

    def __new__(cls, layer: LowRankLinear) -> Self:
        shape = (layer.out_features, layer.in_features)
        like = torch.empty(
            shape[::-1] if layer.layout == "conv1d" else shape, dtype=layer[1].weight.dtype, device="meta"
        )
        made: Self = torch.Tensor._make_subclass(cls, like)
        made._layer = layer
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            if func in _FREE:
                return func(*args, **kwargs)
            if func == torch.Tensor.device.__get__:
                return args[0]._layer[1].weight.device
            return func(*(tree_map(_plain, args)), **tree_map(_plain, kwargs))


_FREE = frozenset({
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.ndim.__get__,
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.is_floating_point,
})  # fmt: skip
"""What is known of a product before it is worked out."""


def _linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    if not isinstance(weight, _Product) or weight._layer.layout != "linear":
        return functional.linear(*(_plain(part) for part in (input, weight, bias)))
    first, second = weight._layer
    return functional.linear(functional.linear(_plain(input), first.weight), second.weight, bias)


def _plain(part: Any) -> Any:
    return part._layer._multiplied() if isinstance(part, _Product) else part


def matrix_of(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as (out, in), without its history."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if is_conv1d(layer) else weight


def layout_of(layer: nn.Module) -> Layout:
    """Whether a layer keeps its weight as (out, in) or as (in, out)."""
    return "conv1d" if is_conv1d(layer) else "linear"


def shape_of(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    first, second = layer.weight.shape
    return (first, second) if is_conv1d(layer) else (second, first)


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2; told by name, since transformers may not be there."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"
