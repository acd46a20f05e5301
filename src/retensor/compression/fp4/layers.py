"""Layers whose three products read operands of 4 bits, and models made of them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize

from retensor.compression.fp4.product import Turn, product, unfolded
from retensor.compression.fp4.recipe import Recipe
from retensor.files import described
from retensor.replacing import Replacement, replace
from retensor.replacing.match import Pattern, exactly, meaning


class _FP4(Replacement):
    """What the layers have in common: a recipe, and a count of their calls that stochastic rounding draws by."""

    recipe: Recipe
    calls: int

    def _product(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Rows with the weight; only training draws anew, so that a model in eval mode is a function."""
        if not x.is_floating_point():
            raise TypeError(f"a layer in 4 bits takes a tensor of floating point, not of {x.dtype}")
        if x.shape[-1] != w.shape[-1]:
            raise ValueError(f"rows of {x.shape[-1]} numbers came to a {type(self).__name__} of {w.shape[-1]} inputs")
        if not self.training or not torch.is_grad_enabled() or not self.recipe.draws or torch.compiler.is_exporting():
            return product(x, w, Turn(self.recipe, self.recipe.seed, self.calls))
        # A count that was compiled in would make every step's draws the same.
        return self._uncompiled(x, w) if torch.compiler.is_dynamo_compiling() else self._drawn(x, w)

    def _drawn(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return product(x, w, Turn(self.recipe, self.recipe.seed, self.calls))

    # As torch.compiler.disable, which would load the compiler, seconds, for those who do not compile.
    _uncompiled = torch._disable_dynamo(_drawn)

    def _take(self, layer: nn.Module) -> Self:
        """The parameters of a layer themselves, so that what shares them goes on sharing."""
        self.weight, self.bias = layer.weight, layer.bias
        return self

    def extra_repr(self) -> str:
        """Of the layer, and the recipe."""
        return f"{super().extra_repr()}, {self.recipe}".removeprefix(", ")


class FP4Linear(_FP4, nn.Linear):
    """An ``nn.Linear`` that trains in 4 bits; its parameters are the plain layer's, in full precision.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    recipe : Recipe

    Examples
    --------
    >>> layer = FP4Linear(32, 8, recipe=Recipe())
    >>> y = layer(torch.randn(4, 32))
    >>> y.sum().backward()
    >>> y.shape, layer.weight.grad.shape, list(layer.state_dict())
    (torch.Size([4, 8]), torch.Size([8, 32]), ['weight', 'bias'])
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, recipe: Recipe) -> None:
        super().__init__(in_features, out_features, bias)
        self.recipe, self.calls = recipe, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of shape (..., out) from (..., in)."""
        out = self._product(input.reshape(-1, input.shape[-1]), self.weight)
        out = out if self.bias is None else out + self.bias
        return _cast(out, input).reshape(*input.shape[:-1], self.out_features)

    def config(self) -> dict[str, Any]:
        """Sizes and the recipe."""
        return {
            "in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None,
            "recipe": self.recipe.as_dict(),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of these sizes."""
        return cls(**{**config, "recipe": Recipe.from_dict(config["recipe"])})

    def to_dense(self) -> nn.Module:
        """A plain layer with the same parameters: of full precision, so that outputs differ by what 4 bits lost."""
        return _plain(nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"), self)


class FP4Conv1D(_FP4):
    """The linear layer of transformers' GPT-2, which keeps its weight as (in, out), in 4 bits.

    Parameters
    ----------
    nf, nx : int
        Outputs and inputs.
    recipe : Recipe
    """

    def __init__(self, nf: int, nx: int, *, recipe: Recipe) -> None:
        super().__init__()
        self.nf, self.nx, self.recipe, self.calls = nf, nx, recipe, 0
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of shape (..., out) from (..., in)."""
        out = self._product(x.reshape(-1, x.shape[-1]), self.weight.T) + self.bias
        return _cast(out, x).reshape(*x.shape[:-1], self.nf)

    def config(self) -> dict[str, Any]:
        """Sizes and the recipe."""
        return {"nf": self.nf, "nx": self.nx, "recipe": self.recipe.as_dict()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of these sizes."""
        return cls(**{**config, "recipe": Recipe.from_dict(config["recipe"])})

    def to_dense(self) -> nn.Module:
        """A plain layer with the same parameters."""
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(self.nf, self.nx)
        return _plain(plain, self)


class FP4Conv2d(_FP4, nn.Conv2d):
    """An ``nn.Conv2d`` that trains in 4 bits, as the product of its weight with the patches of its input.

    Blocks lie along channels and kernel (c, h, w) in the forward product, along output channels for the gradient of the
    input, and along batch and positions for that of the weight.

    Parameters
    ----------
    *arguments, **options
        As ``nn.Conv2d``.
    recipe : Recipe
    """

    def __init__(self, *arguments: Any, recipe: Recipe, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.recipe, self.calls = recipe, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of shape (batch, out, height, width) from (batch, in, height, width), or of one picture."""
        x = input if input.ndim == 4 else input[None]
        if self.padding_mode != "zeros":
            x = functional.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            top = left = bottom = right = 0
        else:
            left, right, top, bottom = self._reversed_padding_repeated_twice
        if left != right or top != bottom:
            x = functional.pad(x, (left, right, top, bottom))
            left = top = 0
        options = {"stride": self.stride, "padding": (top, left), "dilation": self.dilation}
        rows = unfolded(x, self.kernel_size, **options)
        groups = self.groups
        if groups > 1:
            # A group is a product of its own.
            rows = rows.unflatten(1, (groups, -1)).transpose(0, 1)
            out = self._product(rows, self.weight.flatten(1).unflatten(0, (groups, -1)))
            out = out.transpose(0, 1).flatten(1)
        else:
            out = self._product(rows, self.weight.flatten(1))
        out = out if self.bias is None else out + self.bias
        high, wide = (
            (x.shape[2 + i] + 2 * pad - self.dilation[i] * (self.kernel_size[i] - 1) - 1) // self.stride[i] + 1
            for i, pad in enumerate((top, left))
        )
        out = _cast(out, input).unflatten(0, (x.shape[0], high, wide)).permute(0, 3, 1, 2)
        return out if input.ndim == 4 else out[0]

    def config(self) -> dict[str, Any]:
        """Sizes and the recipe."""
        return {
            "in_channels": self.in_channels, "out_channels": self.out_channels, "kernel_size": list(self.kernel_size),
            "stride": list(self.stride), "dilation": list(self.dilation), "groups": self.groups,
            "padding": self.padding if isinstance(self.padding, str) else list(self.padding),
            "bias": self.bias is not None, "padding_mode": self.padding_mode, "recipe": self.recipe.as_dict(),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A layer of these sizes."""
        given = {name: tuple(part) if isinstance(part, list) else part for name, part in config.items()}
        del given["recipe"]
        return cls(**given, recipe=Recipe.from_dict(config["recipe"]))

    def to_dense(self) -> nn.Module:
        """A plain layer with the same parameters."""
        options = {name: part for name, part in self.config().items() if name != "recipe"}
        options = {name: tuple(part) if isinstance(part, list) else part for name, part in options.items()}
        return _plain(nn.Conv2d(**options, device="meta"), self)


def convert(
    model: nn.Module,
    recipe: Recipe,
    include: Sequence[Pattern] = (nn.Linear, nn.Conv2d),
    exclude: Sequence[Pattern] = (),
) -> nn.Module:
    """A model whose layers train in 4 bits.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    recipe : Recipe
        Each layer gets a seed of its own from the recipe's and its name.
    include, exclude : sequence of patterns
        Globs of names, classes of layers, or functions of name and module (:func:`retensor.replacing.matching`). Of
        what is meant, ``nn.Linear``, ``nn.Conv2d`` and transformers' ``Conv1D`` are replaced, and layers that are in 4
        bits already get the new recipe. First and last layers are better left out by ``exclude``.

    Returns
    -------
    nn.Module
        With parameters of the same names and values, which stay in full precision; embeddings, norms and softmax are
        as they were. :func:`retensor.fold` gives plain layers back.

    Raises
    ------
    TypeError
        Where ``recipe`` is none.
    ValueError
        Where no layer is meant, or one cannot be replaced: its weight is parametrized, or its class has a ``forward``
        of its own.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    >>> fp4 = convert(net, Recipe(), exclude=["2"])
    >>> type(fp4[0]).__name__, type(fp4[2]).__name__, list(fp4.state_dict()) == list(net.state_dict())
    ('FP4Linear', 'Linear', True)
    """
    if not isinstance(recipe, Recipe):
        raise TypeError(f"a model is converted by a Recipe, not by {described(recipe)}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"layers of an nn.Module are converted, not of {described(model)}")
    if isinstance(include, str | type) or isinstance(exclude, str | type):
        raise TypeError("include and exclude are sequences of patterns, such as ['*.fc*']")
    meant, left = [meaning(one) for one in include], [meaning(one) for one in exclude]
    chosen = {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear | nn.Conv2d | FP4Conv1D) or _is_conv1d(module))
        and any(one(name, module) for one in meant)
        and not any(one(name, module) for one in left)
    }
    if not chosen:
        raise ValueError(
            f"no linear layer or convolution of the {type(model).__name__} is meant by include={list(include)!r} "
            f"and exclude={list(exclude)!r}; see model.named_modules() for names"
        )

    for name, module in chosen.items():
        _check_plain(name, module)

    def maker(name: str) -> Any:
        return lambda layer: _made(layer, recipe.seeded(zlib.crc32(f"{recipe.seed}:{name}".encode())))

    # Layers that share a weight keep the one they have.
    return replace(model, {exactly(name): maker(name) for name in chosen})


def matmul(a: torch.Tensor, b: torch.Tensor, recipe: Recipe, *, call: int = 0) -> torch.Tensor:
    """``a @ b`` of two activations, as in attention, whose three products read operands of 4 bits.

    Parameters
    ----------
    a, b : torch.Tensor
        Of shapes (..., M, K) and (..., K, N) with the same leading axes. In the recipe ``x`` is ``a`` and ``w`` is
        ``b``.
    recipe : Recipe
    call : int
        Which draws stochastic rounding takes.

    Returns
    -------
    torch.Tensor
        Of shape (..., M, N).

    Raises
    ------
    ValueError
        Where shapes do not fit.

    Examples
    --------
    >>> matmul(torch.full((2, 3, 16), 6.0), torch.full((2, 16, 4), 3.0), Recipe())[0, 0]
    tensor([288., 288., 288., 288.])
    """
    if a.ndim < 2 or b.ndim != a.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise ValueError(
            f"tensors of shapes {list(a.shape)} and {list(b.shape)} have no product here; they are (..., M, K) and "
            "(..., K, N) with the same leading axes"
        )
    return product(a, b.mT, Turn(recipe, recipe.seed, call))


def _cast(out: torch.Tensor, input: torch.Tensor) -> torch.Tensor:
    """An output of the type that a plain layer would have: autocast's, where that is on."""
    if input.device.type != "meta" and torch.is_autocast_enabled(input.device.type):
        return out.to(torch.get_autocast_dtype(input.device.type))
    return out


def _plain(plain: nn.Module, layer: nn.Module) -> nn.Module:
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain


def _made(layer: nn.Module, recipe: Recipe) -> nn.Module:
    made: _FP4
    # On the meta device nothing is drawn that would be thrown away.
    with torch.device("meta"):
        if isinstance(layer, nn.Conv2d):
            made = FP4Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
                layer.groups, layer.bias is not None, layer.padding_mode, recipe=recipe,
            )  # fmt: skip
        elif isinstance(layer, nn.Linear):
            made = FP4Linear(layer.in_features, layer.out_features, layer.bias is not None, recipe=recipe)
        else:
            made = FP4Conv1D(layer.weight.shape[1], layer.weight.shape[0], recipe=recipe)
    return made._take(layer)


def _check_plain(name: str, layer: nn.Module) -> None:
    """Refuse a layer that computes something else than its kind, which a new one would drop without a word."""
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"the tensors of '{name}' are parametrized; bake that in by "
            "torch.nn.utils.parametrize.remove_parametrizations, or exclude the layer"
        )
    kinds = (nn.Linear, nn.Conv2d)
    if (
        not isinstance(layer, _FP4)
        and not _is_conv1d(layer)
        and all(type(layer).forward is not k.forward for k in kinds)
    ):
        raise ValueError(f"'{name}' is a {type(layer).__name__}, which has a forward of its own; exclude it")


def _is_conv1d(layer: nn.Module) -> bool:
    """Whether it is the linear layer of transformers' GPT-2; told by name, since transformers may not be there."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"
