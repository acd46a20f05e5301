"""Which modules are an attention, and what is taken from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Source:
    """What an attention is made of.

    Attributes
    ----------
    heads, head_dim : int
    qkv : nn.Linear
        From tokens to queries, keys and values of all heads, in this order.
    proj : nn.Linear
        From all heads to tokens.
    proj_drop : float
        Rate of the dropout behind it.
    reduction : int
        Tokens along each side of a picture that keys and values are pooled over; a linear attention needs none, and
        it is left out.
    """

    heads: int
    head_dim: int
    qkv: nn.Linear
    proj: nn.Linear
    proj_drop: float = 0.0
    reduction: int = 1


Reader = Callable[[Any], Source | None]
"""From a module to what it is made of, or None where it has something that the new attention has not."""

READERS: dict[str, Reader] = {}
"""By the full name of a class, so that no library is loaded to look for its classes."""


def register_attention(kind: type[nn.Module] | str, reader: Reader) -> None:
    """Let :func:`convert` recognise another class of attention.

    Parameters
    ----------
    kind : type or str
        The class, or its full name. Subclasses are not meant.
    reader : function of the module
        Returns a :class:`Source`, or None to leave the module as it is.

    Examples
    --------
    >>> class Mine(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8)
    >>> register_attention(Mine, lambda m: Source(heads=2, head_dim=4, qkv=m.inner, proj=m.outer))
    >>> source_of(Mine()).heads
    2
    """
    READERS[kind if isinstance(kind, str) else _name(kind)] = reader


def source_of(module: nn.Module) -> Source | None:
    """What a module is made of, where it is an attention that is known."""
    reader = READERS.get(_name(type(module)))
    return None if reader is None else reader(module)


def joined(*layers: Any) -> nn.Linear:
    """One linear layer with the outputs of several, one after the other.

    >>> joined(nn.Linear(4, 4), nn.Linear(4, 8)).weight.shape
    torch.Size([12, 4])
    """
    weight = torch.cat([layer.weight.detach() for layer in layers])
    biased = any(layer.bias is not None for layer in layers)
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=biased)
    made.weight = nn.Parameter(weight)
    if biased:
        parts = [
            layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias.detach() for layer in layers
        ]
        made.bias = nn.Parameter(torch.cat(parts))
    return made


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _vision_transformer(module: Any) -> Source | None:
    extras = (getattr(module, name, None) for name in ("q_norm", "k_norm", "norm", "gate"))
    if any(extra is not None and not isinstance(extra, nn.Identity) for extra in extras):
        return None
    return Source(module.num_heads, module.head_dim, module.qkv, module.proj, module.proj_drop.p)


def _pyramid(module: Any) -> Source:
    pooled = module.pool is not None
    reduction = 7 if pooled else 1 if module.sr is None else int(module.sr.stride[0])
    return Source(
        module.num_heads, module.head_dim, joined(module.q, module.kv), module.proj, module.proj_drop.p, reduction
    )


for _kind in ("timm.layers.attention.Attention", "timm.models.vision_transformer.Attention"):
    READERS[_kind] = _vision_transformer
READERS["timm.models.pvt_v2.Attention"] = _pyramid
