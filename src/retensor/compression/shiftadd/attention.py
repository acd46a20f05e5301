r"""Attention whose products are additions: queries and keys of 0 and 1, and the linear order of the products.

With queries and keys divided by their lengths and :math:`b(q) = 1[q - \bar q > 0]`, where :math:`\bar q` is the mean of
all queries of the batch,

.. math::
    y = \tfrac12 v + \tfrac1\pi\, b(q)\,\big(b(k)^\top v\big), \qquad
    o = y / \|y\|_2 + \mathrm{DWConv}(v),

heads side by side, then the projection. Both products only add rows of v and of ``b(k)^T v``; the convolution runs
along the tokens, 9 of them, one filter a head. The gradient of b is that of clamp(q, 0, 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.shiftadd.hashing import KernelHash
from retensor.compression.shiftadd.moe import MoELinear, attach_report
from retensor.compression.shiftadd.shift import unset
from retensor.compression.shiftadd.sources import Source
from retensor.errors import RetensorError
from retensor.files import described
from retensor.replacing import Replacement
from retensor.replacing.kinds import kind_named
from retensor.units import check_flags

Attention = Literal["linear_add", "binary_softmax", "ksh"]
Threshold = Literal["batch", "ema"]
KINDS: tuple[Attention, ...] = ("linear_add", "binary_softmax", "ksh")
SPARSE = 0.02
"""Softmax scores at or below this are left out of the sparse branch."""
TINY = 1e-12
"""The least length that something is divided by."""


def binarized(x: torch.Tensor, mean: torch.Tensor | None = None) -> torch.Tensor:
    """1 where a number lies above the mean, else 0; the gradient is that of ``clamp(x, 0, 1)``.

    Parameters
    ----------
    x : torch.Tensor
        Queries or keys, divided by their lengths.
    mean : torch.Tensor, optional
        That of all of x by default, as in the paper: what one sample becomes then depends on the others of its batch.

    Examples
    --------
    >>> binarized(torch.tensor([0.1, 0.9, -0.4]))
    tensor([0., 1., 0.])
    """
    above = (x > (x.mean() if mean is None else mean)).to(x.dtype)
    soft = x.clamp(0, 1)
    # Exact zeros and ones: above - soft + soft would be off by rounding.
    out: torch.Tensor = _Straight.apply(above, soft)
    return out


class AddAttention(Replacement):
    """An attention of additions, in the place of one of products.

    Parameters
    ----------
    dim, heads, head_dim, out_dim : int
        Width of a token, heads, width of each, and width of an output.
    qkv_bias, proj_bias : bool
    attention : {"linear_add", "binary_softmax", "ksh"}
        The paper's; ``softmax(b(q) b(k)^T / sqrt(d)) v``; or the linear one with codes of :class:`KernelHash`, -1 and
        1, and one projection for queries and keys.
    threshold : {"batch", "ema"}
        Of b: the mean over the batch, as in the paper, or in eval mode a running mean of the training's, so that a
        sample's output depends on nothing but the sample.
    sparse : bool
        Add, in training, ``S v`` with S the softmax scores above 0.02 before y is divided by its length.
    proj_drop : float
    kernel_size : int
        Tokens that the convolution reaches over.
    hashing : mapping
        Settings of the :class:`KernelHash`.

    Raises
    ------
    ValueError, TypeError
        Where a setting is out of range, named.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        *,
        attention: Attention = "linear_add",
        threshold: Threshold = "batch",
        sparse: bool = False,
        proj_drop: float = 0.0,
        kernel_size: int = 9,
        hashing: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        check_flags(qkv_bias=qkv_bias, proj_bias=proj_bias, sparse=sparse)
        check_attention(attention, threshold)
        if isinstance(kernel_size, bool) or not isinstance(kernel_size, int) or kernel_size < 1 or not kernel_size % 2:
            raise ValueError(f"kernel_size is an odd number of tokens, not {described(kernel_size)}")
        self.dim, self.heads, self.head_dim, self.out_dim = dim, heads, head_dim, out_dim or dim
        self.attention, self.threshold, self.sparse, self.kernel_size = attention, threshold, sparse, kernel_size
        inner = heads * head_dim
        self.qkv: nn.Module = nn.Linear(dim, inner * (2 if attention == "ksh" else 3), qkv_bias)
        self.proj: nn.Module = nn.Linear(inner, self.out_dim, proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)
        if attention != "binary_softmax":
            self.dwconv = nn.Conv2d(
                heads, heads, (kernel_size, 1), padding=(kernel_size // 2, 0), bias=False, groups=heads
            )
        if attention == "ksh":
            self.hash = KernelHash(heads, head_dim, **(hashing or {}))
        else:
            self.register_buffer("means", torch.zeros(2))
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._learning: int | None = None

    @classmethod
    def from_source(cls, source: Source, *, seed: int = 0, **settings: Any) -> Self:
        """An attention with the projections of another, and a convolution that is drawn from a seed.

        Where queries and keys share one projection it is that of the queries.
        """
        qkv, proj = source.qkv, source.proj
        with torch.device("meta"):
            made = cls(
                qkv.in_features, source.heads, source.head_dim, proj.out_features, qkv.bias is not None,
                proj.bias is not None, proj_drop=source.proj_drop, **settings,
            )  # fmt: skip
        device, dtype = qkv.weight.device, qkv.weight.dtype
        if device.type == "meta":
            return made
        made.to_empty(device=device).to(dtype)
        inner = source.heads * source.head_dim
        kept = slice(None)
        if made.attention == "ksh":
            kept = torch.cat([torch.arange(inner), torch.arange(2 * inner, 3 * inner)]).to(device)
        with torch.no_grad():
            for target, given, rows in ((made.qkv, qkv, kept), (made.proj, proj, slice(None))):
                target.weight.copy_(given.weight[rows])
                if given.bias is not None:
                    target.bias.copy_(given.bias[rows])
            if made.attention != "binary_softmax":
                limit = made.kernel_size**-0.5
                drawn = torch.rand(made.dwconv.weight.shape, generator=torch.Generator().manual_seed(seed))
                made.dwconv.weight.copy_((2 * drawn - 1) * limit)
            for buffer in made.buffers():
                buffer.zero_()
        return made

    def forward(self, x: torch.Tensor, *rest: Any, attn_mask: Any = None, is_causal: bool = False) -> torch.Tensor:
        """Tokens of shape (batch, tokens, dim), as (batch, tokens, out_dim); sizes of a picture are not needed.

        Raises
        ------
        ValueError
            Where a mask is asked for.
        """
        if is_causal or attn_mask is not None or any(isinstance(given, torch.Tensor) for given in rest):
            raise ValueError("an attention in the order Q(KV) has no mask; leave layers that need one out by exclude")
        batch, tokens, _ = x.shape
        parts = self.qkv(x).reshape(batch, tokens, -1, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        y = self._hashed(*parts) if self.attention == "ksh" else self._binary(*parts)
        out: torch.Tensor = self.proj_drop(self.proj(y.transpose(1, 2).reshape(batch, tokens, -1)))
        return out

    def products(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``q (k^T v)`` of codes."""
        return q @ (k.transpose(-1, -2) @ v)

    def config(self) -> dict[str, Any]:
        """Arguments of the class, and what stands in the place of its two projections."""
        qkv_bias, proj_bias = (_has_bias(layer) for layer in (self.qkv, self.proj))
        return {
            "dim": self.dim,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "out_dim": self.out_dim,
            "qkv_bias": qkv_bias,
            "proj_bias": proj_bias,
            "attention": self.attention,
            "threshold": self.threshold,
            "sparse": self.sparse,
            "proj_drop": self.proj_drop.p,
            "kernel_size": self.kernel_size,
            "hashing": self.hash.config() if self.attention == "ksh" else None,
            "layers": {name: _layer_config(getattr(self, name)) for name in ("qkv", "proj")},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """An attention whose values are not numbers until some are loaded."""
        settings = dict(config)
        layers = settings.pop("layers")
        with torch.device("meta"):
            made = cls(**settings)
        for name, layer in layers.items():
            if layer is not None:
                setattr(made, name, kind_named(layer["kind"]).from_config(layer["config"]))
        return unset(made)

    def loaded(self, model: nn.Module) -> None:
        """Give the model its report back."""
        attach_report(model)

    def extra_repr(self) -> str:
        """Sizes and the kind."""
        return f"dim={self.dim}, heads={self.heads}, head_dim={self.head_dim}, attention={self.attention}"

    def codes(self, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as 0 and 1."""
        q, k = unit(q), unit(k)
        running = self.threshold == "ema" and not self.training
        if self.threshold == "ema" and self.training and not torch.compiler.is_compiling():
            self._follow(q, k)
        if running and not torch.compiler.is_compiling() and not int(self.steps):
            raise RetensorError(
                "the running means of an attention have not seen a batch; run the model in training mode before, or "
                "take threshold='batch'"
            )
        return binarized(q, self.means[0] if running else None), binarized(k, self.means[1] if running else None)

    def _binary(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        b, c = self.codes(q, k)
        if self.attention == "binary_softmax":
            return torch.softmax(b @ c.transpose(-1, -2) * self.head_dim**-0.5, -1) @ v
        y = 0.5 * v + self.products(b, c, v) / math.pi
        if self.sparse and self.training:
            scores = torch.softmax(q * self.head_dim**-0.5 @ k.transpose(-1, -2), -1)
            y = y + (scores * (scores > SPARSE)) @ v
        return unit(y) + self.dwconv(v)

    def _hashed(self, q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        points = unit(q)
        if self._learning is not None:
            self.hash.fit(points, seed=self._learning)
        codes = self.hash(points)
        return unit(0.5 * v + self.products(codes, codes, v) / math.pi) + self.dwconv(v)

    @torch.no_grad()
    def _follow(self, q: torch.Tensor, k: torch.Tensor) -> None:
        now = torch.stack([q.mean(), k.mean()]).to(self.means)
        # The mean of all batches at first, then a running one.
        self.steps += 1
        self.means.lerp_(now, max(0.05, 1 / int(self.steps)))


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors along the last dimension divided by their lengths.

    >>> unit(torch.tensor([3.0, 4.0]))
    tensor([0.6000, 0.8000])
    """
    return functional.normalize(x, dim=-1, eps=TINY)


@torch.no_grad()
def fit_hashes(model: nn.Module, x: Any, *, seed: int = 0) -> None:
    """Learn the hashes of a model's attentions from inputs, first layer first, each behind those that are learned.

    Parameters
    ----------
    model : nn.Module
        Changed in place: its hashes' buffers.
    x : torch.Tensor
        Inputs of the model.
    seed : int

    Raises
    ------
    ValueError
        Where no attention is hashed.
    """
    from retensor.graph.modes import evaluating

    layers = [m for m in model.modules() if isinstance(m, AddAttention) and m.attention == "ksh"]
    if not layers:
        raise ValueError("no attention of the model is hashed; convert it with attention='ksh'")
    try:
        for i, layer in enumerate(layers):
            layer._learning = seed + i
        with evaluating(model):
            model(x)
    finally:
        for layer in layers:
            layer._learning = None


def check_attention(attention: object, threshold: object = "batch") -> None:
    """Refuse kinds that there are not."""
    if attention not in KINDS:
        raise ValueError(f"attention is {described(attention)}; it is {', '.join(map(repr, KINDS))} or None")
    if threshold not in ("batch", "ema"):
        raise ValueError(f"threshold is {described(threshold)}; it is 'batch' or 'ema'")


def _has_bias(layer: Any) -> bool:
    return (layer.shift if isinstance(layer, MoELinear) else layer).bias is not None


def _layer_config(layer: nn.Module) -> dict[str, Any] | None:
    if isinstance(layer, Replacement):
        return {"kind": layer.kind(), "config": layer.config()}
    if type(layer) is nn.Linear:
        return None
    raise RetensorError(
        f"a projection of an attention is {described(type(layer))}, which cannot be saved with it; fold it first"
    )


class _Straight(torch.autograd.Function):
    """The first forward, the gradient to the second."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, gradient
