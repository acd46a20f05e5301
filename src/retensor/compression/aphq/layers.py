"""Attention whose two products are seen, quantisers of their operands, and the ReLU in an activation's place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.files import described
from retensor.quantizing import QuantizedLayer, fake_quantized
from retensor.quantizing.layers import layer_settings, plain_layer
from retensor.replacing import Replacement
from retensor.replacing.replace import copied, put, settle

VIT = ("timm.layers.attention", "Attention")
WINDOW = ("timm.models.swin_transformer", "WindowAttention")
KNOWN = "timm's Attention and WindowAttention"


class ReLU(Replacement):
    """``max(x, 0)``, which files remember where it stands in another activation's place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``x``."""
        return functional.relu(x)

    def config(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def to_dense(self) -> nn.Module:
        """torch's."""
        return nn.ReLU()


class Rounder(nn.Module):
    """Rounds a tensor by a step and a zero point for all of it, or for each entry of its third axis from the end.

    Parameters
    ----------
    bits : int
        2 to 16.
    heads : int, optional
        Entries of that axis, such as the heads of attention.

    Examples
    --------
    >>> two = Rounder(2, heads=2)
    >>> two.keep(torch.tensor([1.0, 10.0]), torch.tensor([0.0, 0.0]))
    >>> two(torch.full((1, 2, 1, 1), 12.0)).flatten()
    tensor([ 3., 10.], grad_fn=...)
    """

    zero_point: torch.Tensor

    def __init__(self, bits: int, heads: int | None = None) -> None:
        super().__init__()
        self.bits, self.heads, self.high = bits, heads, 2**bits - 1
        shape = () if heads is None else (heads, 1, 1)
        self.scale = nn.Parameter(torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape))

    @torch.no_grad()
    def keep(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Take a step and a zero point."""
        self.scale.copy_(scale.reshape(self.scale.shape))
        self.zero_point.copy_(zero_point.reshape(self.scale.shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``x``."""
        return fake_quantized(x, self.scale, self.zero_point, 0, self.high).to(x.dtype)

    def extra_repr(self) -> str:
        """Bits and heads."""
        return f"bits={self.bits}" + ("" if self.heads is None else f", heads={self.heads}")


class Product(Replacement):
    """A product of two tensors, whose operands may be rounded; the third axis from the end is that of heads.

    Attention of your own that calls two of these is put in few bits as timm's is.

    Attributes
    ----------
    left, right : Rounder or None

    Examples
    --------
    >>> Product()(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 4, 5)).shape
    torch.Size([1, 2, 3, 5])
    """

    left: nn.Module | None
    right: nn.Module | None

    def __init__(self, bits: int | None = None, heads: int | None = None) -> None:
        super().__init__()
        self.left = None if bits is None else Rounder(bits, heads)
        self.right = None if bits is None else Rounder(bits, heads)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``a @ b``."""
        if self.left is not None and self.right is not None:
            a, b = self.left(a), self.right(b)
        return a @ b

    def config(self) -> dict[str, Any]:
        """Bits and heads, None where nothing is rounded."""
        rounder = self.left if isinstance(self.left, Rounder) else None
        return {"bits": rounder and rounder.bits, "heads": rounder and rounder.heads}


class Attention(Replacement):
    """Attention of queries, keys and values that one layer makes, with both products as modules.

    For inference: nothing is dropped.

    Parameters
    ----------
    qkv, proj : nn.Module
        The layers before and after.
    heads : int
    scale : float
        Of the scores.
    bias : torch.Tensor, optional
        Added to the scores, shape (heads, tokens, tokens).
    scores, mix : Product, optional
        Queries times keys, and weights times values.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        qkv: nn.Module,
        proj: nn.Module,
        heads: int,
        scale: float,
        bias: torch.Tensor | None = None,
        scores: Product | None = None,
        mix: Product | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.qkv, self.proj = qkv, proj
        self.scores, self.mix = scores or Product(), mix or Product()
        self.register_buffer("bias", bias)

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        is_causal: bool = False,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Of the shape of ``x``, (batch, tokens, channels).

        Parameters
        ----------
        x : torch.Tensor
        attn_mask : torch.Tensor, optional
            True where a token is seen, or what is added to the scores, as timm's vision transformers give it.
        is_causal : bool
            Not for images.
        mask : torch.Tensor, optional
            Shape (windows, tokens, tokens), added to the scores of each, as timm's Swin transformers give it.
        """
        if is_causal:
            raise ValueError("attention in few bits sees all tokens of an image; is_causal is not for it")
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.scores(q, k.transpose(-2, -1)) * self.scale
        if self.bias is not None:
            scores = scores + self.bias
        if mask is not None:
            windows = scores.unflatten(0, (-1, len(mask))) + mask[:, None]
            scores = windows.flatten(0, 1)
        if attn_mask is not None:
            added = attn_mask
            if attn_mask.dtype == torch.bool:
                added = torch.zeros_like(attn_mask, dtype=scores.dtype).masked_fill(~attn_mask, -torch.inf)
            scores = scores + added
        mixed = self.mix(scores.softmax(-1), v)
        out: torch.Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return out

    def config(self) -> dict[str, Any]:
        """Settings of both layers and of both products."""
        return {
            "qkv": _described(self.qkv),
            "proj": _described(self.proj),
            "heads": self.heads,
            "scale": self.scale,
            "tokens": None if self.bias is None else self.bias.shape[-1],
            "scores": self.scores.config(),
            "mix": self.mix.config(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Attention of the same shapes."""
        tokens, heads = config["tokens"], config["heads"]
        return cls(
            _made(config["qkv"]),
            _made(config["proj"]),
            heads,
            config["scale"],
            None if tokens is None else torch.zeros(heads, tokens, tokens),
            Product(**config["scores"]),
            Product(**config["mix"]),
        )


def exposed(model: nn.Module) -> nn.Module:
    """A copy of a model in which both products of each attention are modules; what it gives stays, within rounding.

    Raises
    ------
    ValueError
        Where attention is of another kind, whose products would stay as they are.

    Examples
    --------
    >>> from retensor.data import reference
    >>> model, _ = reference("digits-vit")
    >>> sum(isinstance(module, Product) for module in exposed(model).modules())
    6
    """
    student = copied(model)
    for name, module in list(student.named_modules()):
        if _kinds(module) & {VIT, WINDOW}:
            put(student, name, _shown(name, module))
    for name, module in student.named_modules():
        hidden = isinstance(module, nn.MultiheadAttention) or "attention" in type(module).__name__.lower()
        inner = list(module.modules())[1:]
        inside = any(isinstance(part, Product) for part in inner)
        around = any("attention" in type(part).__name__.lower() for part in inner)
        if hidden and not inside and not around:
            raise ValueError(
                f"'{name}' is a {type(module).__name__}, whose products cannot be seen; {KNOWN} are known, and "
                "attention of your own that calls two aphq.Product modules"
            )
    return student


def products(model: nn.Module, within: str = "") -> dict[str, Product]:
    """Products by name, of a model or of a module in it."""
    prefix = f"{within}." if within else ""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Product) and (name == within or name.startswith(prefix))
    }


def _shown(name: str, old: nn.Module) -> Attention:
    for part in ("q_norm", "k_norm", "norm"):
        if not isinstance(getattr(old, part, nn.Identity()), nn.Identity):
            raise ValueError(f"'{name}' normalises queries, keys or outputs ('{part}'), which is not known here")
    if getattr(old, "gate", None) is not None:
        raise ValueError(f"'{name}' has a gate, which is not known here")
    bias = old._get_rel_pos_bias().detach()[0].clone() if WINDOW in _kinds(old) else None
    new = Attention(old.qkv, old.proj, old.num_heads, float(old.scale), bias)
    settle(old, new)
    return new


def _kinds(module: nn.Module) -> set[tuple[str, str]]:
    return {(kind.__module__, kind.__name__) for kind in type(module).__mro__}


def _described(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, QuantizedLayer):
        return {"quantized": layer.config()}
    return {"plain": layer_settings(layer)}


def _made(config: Mapping[str, Any]) -> nn.Module:
    if "quantized" in config:
        return QuantizedLayer.from_config(config["quantized"])
    if "plain" not in config:
        raise ValueError(f"{described(config)} describes no layer of attention")
    return plain_layer(config["plain"])
