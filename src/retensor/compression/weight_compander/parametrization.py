"""The parametrization of one tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn

from retensor.compression.weight_compander.function import exact, positive, psi, psi_inverse
from retensor.files import described
from retensor.replacing import Reparametrization


class WeightCompander(Reparametrization):
    """The parametrization ``w = a arctan(v / b)`` of one tensor, for :mod:`torch.nn.utils.parametrize`.

    :func:`apply` puts it on whole models. On registration the tensor that is there becomes the latent one as it is;
    what is assigned to the layer afterwards is taken as ``w``, and its latent is :func:`psi_inverse`.

    Parameters
    ----------
    a, b : float or torch.Tensor
        Above zero. Tensors broadcast to the shape of the weight.
    learn : bool
        Whether ``a`` and ``b`` are trained. Then ``log_a`` and ``log_b`` are parameters, so that neither can reach
        zero; otherwise they are the buffers ``fixed_a`` and ``fixed_b``, and all of it is in the state dict.
    dtype : torch.dtype
        Of ``a`` and ``b``: float32 or float64.
    device : torch.device, optional

    Raises
    ------
    ValueError
        Where ``a`` or ``b`` is not above zero, or ``dtype`` is another.

    Examples
    --------
    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(4, 4)
    >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(0.3, 0.2))
    >>> bool((layer.weight.abs() < 0.3 * math.pi / 2).all())
    True
    """

    _DTYPES: ClassVar[dict[str, torch.dtype]] = {"float32": torch.float32, "float64": torch.float64}

    def __init__(
        self,
        a: torch.Tensor | float = 0.3,
        b: torch.Tensor | float = 0.2,
        *,
        learn: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if dtype not in self._DTYPES.values():
            raise ValueError(f"a and b are float32 or float64, not {dtype}")
        # The logarithm is taken before anything is rounded.
        wide = torch.broadcast_tensors(*(positive(value, name) for value, name in ((a, "a"), (b, "b"))))
        self.learn = bool(learn)
        for name, value in zip(("a", "b"), wide, strict=True):
            kept = (value.log() if self.learn else value).to(dtype=dtype, device=device, copy=True).contiguous()
            if self.learn:
                self.register_parameter(f"log_{name}", nn.Parameter(kept))
            else:
                self.register_buffer(f"fixed_{name}", kept)
        self._registering = True

    @property
    def a(self) -> torch.Tensor:
        """The scale of the weights, of shape () or one that broadcasts to theirs."""
        return self.log_a.exp() if self.learn else self.fixed_a

    @property
    def b(self) -> torch.Tensor:
        """The scale of the latent weights, of the same shape."""
        return self.log_b.exp() if self.learn else self.fixed_b

    @property
    def cap(self) -> torch.Tensor:
        """``a pi / 2``, which no weight exceeds."""
        return self.a * (math.pi / 2)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Weights of latent weights."""
        return psi(v, self.a, self.b)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        """Latent weights of the weights that are assigned to the layer; on registration, ``w`` itself."""
        if self._registering:
            self._registering = False
            return w
        return psi_inverse(w, self.a.detach(), self.b.detach())

    def config(self) -> dict[str, Any]:
        """Shape, type, and whether ``a`` and ``b`` are trained; their values are in the state."""
        kept = self.log_a if self.learn else self.fixed_a
        dtype = next(name for name, dtype in self._DTYPES.items() if dtype == exact(kept.dtype))
        return {"shape": list(kept.shape), "learn": self.learn, "dtype": dtype}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A module of the same shapes, whose ``a`` and ``b`` are loaded afterwards."""
        if set(config) != {"shape", "learn", "dtype"} or not isinstance(config["learn"], bool):
            raise ValueError(f"{described(dict(config))} is no configuration of a WeightCompander")
        ones = torch.ones(tuple(config["shape"]), dtype=torch.float64)
        return cls(ones, ones, learn=config["learn"], dtype=cls._DTYPES[config["dtype"]])

    def extra_repr(self) -> str:
        """``a``, ``b`` and whether they are trained."""
        a, b = self.a.detach(), self.b.detach()
        told = f"a={a.item():.4g}, b={b.item():.4g}" if a.numel() == 1 else f"shape={list(a.shape)}"
        return f"{told}, learn={self.learn}"
