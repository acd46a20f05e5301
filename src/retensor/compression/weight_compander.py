"""Weight Compander: every weight becomes a bounded function of a free latent one, which regularises the training.

The optimiser holds the latent ``v``, the layer uses ``w = Psi(v)``, and after training ``w`` is folded into plain
weights at no cost. No weight can grow past a cap, weights near zero move further in a step than others, and
neither needs a term in the loss, so that it goes with weight decay, dropout and the rest.

Source: R. Cakaj, J. Mehnert, B. Yang, "Weight Compander: A Simple Weight Reparameterization for Regularization", 2023,
arXiv 2306.16993::

    w = Psi(v) = a arctan(v / b),      |w| < a pi / 2,      Psi'(v) = (a / b) / (1 + (v / b)^2)

A step of gradient descent on ``v`` moves ``w``, to first order, as one on ``w`` with the learning rate times
``Psi'(v)^2 = (a / b)^2 cos(w / a)^4``: ``(a / b)^2`` at zero, nothing at the cap. Weight decay acts on ``v``, as on all
that an optimiser holds; in ``w`` it pulls ``a / b`` times as hard near zero, and brings back weights near the cap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from retensor.files import described
from retensor.replacing import Reparametrization, fold
from retensor.replacing.match import Pattern, matching, suggestions
from retensor.replacing.replace import copied

__all__ = [
    "TYPES",
    "CompanderReport",
    "LayerReport",
    "WeightCompander",
    "apply",
    "bake",
    "is_applied",
    "param_groups",
    "psi",
    "psi_inverse",
    "psi_slope",
    "recomputed",
    "report",
]

TYPES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.MultiheadAttention,
)
"""Layers whose weights are companded by default: everything linear. Biases and normalisation are left alone."""

SLOPE = 1.5
"""``a / b`` of the default pair (0.3, 0.2), which ``b="fit"`` keeps."""

SATURATED = 0.95
"""The part of the cap from which on a weight counts as saturated."""

Granularity = Literal["global", "layer", "channel"]
Init = Literal["latent", "preserve"]


def psi(v: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """``a arctan(v / b)``, elementwise, with a backward pass that keeps ``v`` and nothing else.

    Parameters
    ----------
    v : torch.Tensor
        Latent weights of any shape; float16, bfloat16, float32 or float64. The half types are computed in float32 and
        rounded once.
    a, b : float or torch.Tensor
        Above zero; tensors must broadcast to the shape of ``v``, and have gradients.

    Returns
    -------
    torch.Tensor
        Weights of the shape and type of ``v``.

    Raises
    ------
    ValueError
        Where a number ``a`` or ``b`` is not above zero. Tensors are not looked into.

    Examples
    --------
    >>> psi(torch.tensor([-1e9, 0.0, 0.2]), 0.3, 0.2)
    tensor([-0.4712,  0.0000,  0.2356])
    """
    a, b = _factor(a, "a", v), _factor(b, "b", v)
    if torch.compiler.is_compiling():
        # A compiler fuses plain operators by itself, and an exported graph has names anyone knows.
        return (a * torch.atan(v.to(_work(v)) / b)).to(v.dtype)
    return _Psi.apply(v, a, b)


def psi_inverse(w: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """The latent weights ``b tan(w / a)`` of weights below the cap; worked out in float64.

    Parameters
    ----------
    w : torch.Tensor
    a, b : float or torch.Tensor

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``w``, and finite.

    Raises
    ------
    ValueError
        Where a weight is at the cap ``a pi / 2`` or above.

    Examples
    --------
    >>> psi_inverse(torch.tensor([0.0, 0.2356]), 0.3, 0.2)
    tensor([0.0000, 0.2000])
    """
    wide = w.detach().to(torch.float64)
    a, b = _factor(a, "a", wide), _factor(b, "b", wide)
    if bool((wide.abs() >= a * (math.pi / 2)).any()):
        raise ValueError(
            f"weights up to {wide.abs().max().item():.6g} are no values of a function below a pi / 2 = "
            f"{(a * (math.pi / 2)).max().item():.6g}; the least a is above {_least(wide):.6g}"
        )
    limit = torch.finfo(w.dtype).max
    return (b * torch.tan(wide / a)).clamp(-limit, limit).to(w.dtype)


def psi_slope(v: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """The derivative ``(a / b) / (1 + (v / b)^2)`` of :func:`psi`; arguments as there.

    Examples
    --------
    >>> psi_slope(torch.tensor([0.0, 0.2]), 0.3, 0.2)
    tensor([1.5000, 0.7500])
    """
    a, b = _factor(a, "a", v), _factor(b, "b", v)
    return (a / b / (1 + (v.to(_work(v)) / b) ** 2)).to(v.dtype)


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
        wide = torch.broadcast_tensors(*(_positive(value, name) for value, name in ((a, "a"), (b, "b"))))
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
        dtype = next(name for name, dtype in self._DTYPES.items() if dtype == _exact(kept.dtype))
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


def apply(
    model: nn.Module,
    a: float | Literal["fit"] = 0.3,
    b: float | Literal["fit"] = 0.2,
    *,
    learn: bool = False,
    granularity: Granularity = "layer",
    types: type[nn.Module] | tuple[type[nn.Module], ...] = TYPES,
    exclude: Pattern | Sequence[Pattern] = (),
    init: Init = "latent",
    margin: float = 0.05,
) -> nn.Module:
    """Let the weights of a model be companded.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy, to be trained and folded (:func:`bake`).
    a, b : float or "fit"
        Above zero: the cap is ``a pi / 2``, and small weights move ``a / b`` times as far. ``a="fit"`` takes for every
        layer the least ``a`` that its weights allow, times ``1 + margin``; ``b="fit"`` is then ``a / 1.5``.
    learn : bool
        Whether ``a`` and ``b`` are trained, by :func:`param_groups` at a low rate of their own.
    granularity : {"global", "layer", "channel"}
        What has a pair of its own: the model, every weight tensor, or every output channel. Output channels lie on the
        first axis, in transposed convolutions on the second, where groups share them.
    types : class or tuple of classes
        Layers to take. In each, every parameter of its own that is called a weight and has two axes or more.
    exclude : pattern or sequence of patterns
        Layers to leave alone, and all inside them: globs of names, classes, or functions of name and module. A tensor
        that one of its owners excludes is left alone in all.
    init : {"latent", "preserve"}
        ``latent``: the present weights become the latent ones, so that fresh weights are companded themselves.
        ``preserve``: the layers compute as before, for trained models.
    margin : float
        Of ``a="fit"``; at least zero.

    Returns
    -------
    nn.Module
        With a :class:`WeightCompander` on every weight taken, which the state dict holds as
        ``<layer>.parametrizations.weight.original`` beside ``a`` and ``b``. A tensor of several owners has one for all
        of them, those of other types too. A layer that is called many times a pass computes its weight each time;
        :func:`torch.nn.utils.parametrize.cached` keeps it. As with every parametrization of torch, such a model cannot
        be pickled whole: save its state dict, or use :func:`retensor.save`.

    Raises
    ------
    ValueError
        Where ``a`` or ``b`` is not above zero, ``init="preserve"`` meets a weight of ``a pi / 2`` or more, another
        argument is not one of those above, a pattern or the types mean no layer, or a weight is one that something
        else makes already.
    TypeError
        Where a weight is no ordinary real floating-point tensor, has no shape yet (a lazy layer), or a module is
        quantised.
    RuntimeError
        Where the weights are companded already.

    Examples
    --------
    >>> model = apply(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), a=0.3, b=0.2, exclude="2")
    >>> [name for name, _ in model.named_parameters()]
    ['0.bias', '0.parametrizations.weight.original', '2.weight', '2.bias']
    """
    _check(model, a, b, granularity, types, init, margin)
    model = copied(model)
    groups = _weights(model, types, exclude)
    pairs = _pairs(groups, a, b, granularity, margin)
    first: WeightCompander | None = None
    for group, (its_a, its_b) in zip(groups, pairs, strict=True):
        weight = group[0].tensor
        if init == "preserve":
            with torch.no_grad():
                weight.copy_(_preserving(weight, its_a, its_b, group[0]))
        step = WeightCompander(
            its_a, its_b, learn=learn, dtype=_exact(weight.dtype), device=weight.device
        ).requires_grad_(weight.requires_grad)
        if first is not None and learn and granularity == "global":
            _share(first, step)
        first = first or step
        for owner in group:
            # Each owner's registration takes the latent as it is; the tensor and the step are one for all of them.
            step._registering = True
            parametrize.register_parametrization(owner.module, owner.label, step, unsafe=True)
    return model


def param_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, lr_scale: float = 1e-3
) -> list[dict[str, Any]]:
    """Parameters for an optimiser: ``a`` and ``b`` at a low rate and without decay, all others as usual.

    The gradient of ``a`` and ``b`` sums over every weight they belong to; at the weights' own rate they run away.

    Parameters
    ----------
    model : nn.Module
        Any; without learned ``a`` and ``b`` there is one group.
    lr, weight_decay : float
        Of all other parameters, latent weights among them.
    lr_scale : float
        ``a`` and ``b`` (their logarithms, to be exact) have the rate ``lr * lr_scale``.

    Raises
    ------
    ValueError
        Where a number is negative.

    Examples
    --------
    >>> model = apply(nn.Sequential(nn.Linear(8, 2)), learn=True)
    >>> [(len(g["params"]), g["lr"], g["weight_decay"]) for g in param_groups(model, lr=0.5, weight_decay=5e-4)]
    [(2, 0.5, 0.0005), (2, 0.0005, 0.0)]
    """
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("lr_scale", lr_scale)):
        if not value >= 0:
            raise ValueError(f"{name} is {described(value)}; it is a number of at least zero")
    slow = {id(p) for module in model.modules() if isinstance(module, WeightCompander) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in slow], "lr": lr, "weight_decay": weight_decay}]
    if any(id(p) in slow for p in trained):
        companded = [p for p in trained if id(p) in slow]
        groups.append({"params": companded, "lr": lr * lr_scale, "weight_decay": 0.0})
    return groups


@dataclass(frozen=True)
class LayerReport:
    """One companded tensor.

    Attributes
    ----------
    name : str
        Such as ``"layers.0.weight"``.
    a, b, cap : float
        Where channels have their own, the mean; of ``cap`` the largest.
    largest : float
        The largest magnitude of a weight.
    near_zero : float
        The share of weights whose magnitude is below ``eps``.
    kurtosis : float
        The fourth central moment over the squared variance: 3 for a normal distribution, 1.8 for a uniform one.
    saturated : float
        The share of weights above 0.95 of their cap, where gradients vanish.
    not_finite : int
        How many latent weights are no finite number; the others are what the figures above are of.
    """

    name: str
    a: float
    b: float
    cap: float
    largest: float
    near_zero: float
    kurtosis: float
    saturated: float
    not_finite: int


@dataclass(frozen=True)
class CompanderReport:
    """What :func:`report` found; ``print`` shows a table.

    Attributes
    ----------
    layers : tuple of LayerReport
        In the model's order.
    """

    layers: tuple[LayerReport, ...]

    def __getitem__(self, name: str) -> LayerReport:
        """The tensor of that name."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(f"no companded tensor is named '{name}'; there are {', '.join(x.name for x in self.layers)}")

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Names of the tensors with latent weights that are no finite number."""
        return tuple(layer.name for layer in self.layers if layer.not_finite)

    def __str__(self) -> str:
        """The table as plain text, and a line for each tensor that has latent weights that are no finite number."""
        width = max([len("tensor"), *(len(layer.name) for layer in self.layers)])
        titles = ("a", "b", "cap", "max |w|", "near 0", "kurtosis", "saturated")
        lines = [f"{'tensor':<{width}}" + "".join(f"{title:>10}" for title in titles)]
        for x in self.layers:
            figures = (x.a, x.b, x.cap, x.largest, x.near_zero, x.kurtosis, x.saturated)
            lines.append(f"{x.name:<{width}}" + "".join(f"{figure:>10.4g}" for figure in figures))
        lines += [f"{x.name}: {x.not_finite} latent weights are no finite number" for x in self.layers if x.not_finite]
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module, *, eps: float = 0.01) -> CompanderReport:
    """What companding does to each weight tensor of a model.

    Parameters
    ----------
    model : nn.Module
    eps : float
        Below it a magnitude counts as near zero.

    Examples
    --------
    >>> report(apply(nn.Sequential(nn.Linear(8, 2))))["0.weight"].cap
    0.4712...
    """
    return CompanderReport(tuple(_layer(name, steps, eps) for name, steps in _companded(model)))


def bake(model: nn.Module) -> nn.Module:
    """Plain weights in the places of companded ones: :func:`retensor.fold`, under the name the method's users know.

    Examples
    --------
    >>> is_applied(bake(apply(nn.Sequential(nn.Linear(8, 2)))))
    False
    """
    return fold(model)


def is_applied(model: nn.Module) -> bool:
    """Whether a model has companded weights.

    Examples
    --------
    >>> is_applied(nn.Linear(2, 2)), is_applied(apply(nn.Linear(2, 2)))
    (False, True)
    """
    return any(isinstance(module, WeightCompander) for module in model.modules())
