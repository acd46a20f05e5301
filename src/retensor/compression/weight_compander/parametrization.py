"""The parametrization of one tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.nn.utils import parametrize

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
        Whether ``a`` and ``b`` are trained. Then ``a = a0 exp(shift_a / a0)`` with a parameter ``shift_a`` that begins
        at zero, and ``b`` alike: a small step on ``shift_a`` moves ``a`` as one on ``a`` itself would, and neither
        reaches zero. The buffers ``a0`` and ``b0`` are the values given.
    dtype : torch.dtype
        Of ``a`` and ``b``: float32 or float64. A cast of the model to a half type leaves it as it is: steps at the
        low rate that ``a`` and ``b`` need would be rounded away.
    device : torch.device, optional

    Raises
    ------
    ValueError
        Where ``a`` or ``b`` is not above zero, or ``dtype`` is another.
    TypeError
        Where ``learn`` is neither True nor False.

    Examples
    --------
    >>> from torch.nn.utils import parametrize
    >>> layer = nn.Linear(4, 4)
    >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(0.3, 0.2))
    >>> bool((layer.weight.abs() <= 0.3 * math.pi / 2).all())
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
        if not isinstance(learn, bool):
            raise TypeError(f"learn is {described(learn)}; it is True or False")
        self.learn = learn
        pair = torch.broadcast_tensors(*(positive(value, name, dtype) for value, name in ((a, "a"), (b, "b"))))
        for name, value in zip(("a", "b"), pair, strict=True):
            kept = value.to(device=device, copy=True).contiguous()
            self.register_buffer(f"{name}0", kept)
            if learn:
                self.register_parameter(f"shift_{name}", nn.Parameter(torch.zeros_like(kept)))
        self._registering = True

    @property
    def a(self) -> torch.Tensor:
        """The scale of the weights, of shape () or one that broadcasts to theirs."""
        return _moved(self.a0, self.shift_a) if self.learn else self.a0

    @property
    def b(self) -> torch.Tensor:
        """The scale of the latent weights, of the same shape."""
        return _moved(self.b0, self.shift_b) if self.learn else self.b0

    @property
    def cap(self) -> torch.Tensor:
        """``a pi / 2``, which no weight exceeds by more than its rounding."""
        return self.a * (math.pi / 2)

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        """Weights of latent weights."""
        return psi(v, self.a, self.b)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        """Latent weights of the weights that are assigned to the layer; on registration, ``w`` itself."""
        if self._registering:
            self._registering = False
            return w
        return psi_inverse(w, self.a, self.b, rounded=True)

    def register(self, module: nn.Module, label: str) -> None:
        """Put it on a tensor of a module, which becomes the latent one as it is.

        Owners of one tensor may share one step: it is put on each of them.
        """
        self._registering = True
        parametrize.register_parametrization(module, label, self, unsafe=True)

    def config(self) -> dict[str, Any]:
        """Shape, type, and whether ``a`` and ``b`` are trained; their values are in the state."""
        return {"shape": list(self.a0.shape), "learn": self.learn, "dtype": str(self.a0.dtype).removeprefix("torch.")}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """A module of the same shapes, whose ``a`` and ``b`` are loaded afterwards.

        Raises
        ------
        ValueError
            Where the configuration has other keys, or other values than :meth:`config` writes.
        """
        fine = set(config) == {"shape", "learn", "dtype"} and isinstance(config["learn"], bool)
        if not fine or config["dtype"] not in cls._DTYPES or not _is_shape(config["shape"]):
            raise ValueError(f"{described(dict(config))} is no configuration of a WeightCompander")
        ones = torch.ones(tuple(config["shape"]))
        return cls(ones, ones, learn=config["learn"], dtype=cls._DTYPES[config["dtype"]])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        def wide(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == exact(moved.dtype) else tensor.to(moved.device)

        return super()._apply(wide, recurse)

    def extra_repr(self) -> str:
        """``a``, ``b`` and whether they are trained."""
        a, b = self.a.detach(), self.b.detach()
        told = f"a={a.item():.4g}, b={b.item():.4g}" if a.numel() == 1 else f"shape={list(a.shape)}"
        return f"{told}, learn={self.learn}"


def _moved(start: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    return start * (shift / start).exp()


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in value)
