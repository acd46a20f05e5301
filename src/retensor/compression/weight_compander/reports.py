"""What companding does to the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.compression.weight_compander.function import exact, not_negative
from retensor.compression.weight_compander.parametrization import WeightCompander
from retensor.compression.weight_compander.weights import checked

SATURATED = 0.95
"""The part of the cap from which on a weight counts as saturated."""


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
        How many of its latent weights, and of its ``a`` and ``b``, are no finite number. The figures above are of the
        weights that neither spoils.
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
        """Names of the tensors with latent weights, or pairs, that are no finite number."""
        return tuple(layer.name for layer in self.layers if layer.not_finite)

    def __str__(self) -> str:
        """The table as plain text, and a line for each tensor with numbers that are not finite."""
        width = max([len("tensor"), *(len(layer.name) for layer in self.layers)])
        titles = ("a", "b", "cap", "max |w|", "near 0", "kurtosis", "saturated")
        lines = [f"{'tensor':<{width}}" + "".join(f"{title:>10}" for title in titles)]
        for x in self.layers:
            figures = (x.a, x.b, x.cap, x.largest, x.near_zero, x.kurtosis, x.saturated)
            lines.append(f"{x.name:<{width}}" + "".join(f"{figure:>10.4g}" for figure in figures))
        lines += [
            f"{x.name}: {x.not_finite} of its latent weights, a and b are no finite number"
            for x in self.layers
            if x.not_finite
        ]
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module, *, eps: float = 0.01) -> CompanderReport:
    """What companding does to each weight tensor of a model.

    Parameters
    ----------
    model : nn.Module
        Companded or not. Other parametrizations of the same tensor do not count, but what comes before makes the
        latent weights.
    eps : float
        Below it a magnitude counts as near zero.

    Returns
    -------
    CompanderReport
        One entry for each companded tensor.

    Raises
    ------
    TypeError
        Where the model is no module.
    ValueError
        Where ``eps`` is no finite number of at least zero.

    Examples
    --------
    >>> from retensor.compression import weight_compander as wc
    >>> report(wc.apply(nn.Sequential(nn.Linear(8, 2))))["0.weight"].cap
    0.4712...
    """
    not_negative(eps, "eps")
    return CompanderReport(tuple(_layer(*found, eps) for found in _companded(checked(model))))


def kurtosis(w: torch.Tensor) -> float:
    """The fourth central moment over the squared variance."""
    centred = w.to(torch.float64) - w.to(torch.float64).mean()
    return ((centred**4).mean() / (centred**2).mean() ** 2).item()


def _companded(model: nn.Module) -> Iterator[tuple[str, WeightCompander, torch.Tensor]]:
    """Companded tensors by name, each once, with what compands and what is companded."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for label, steps in module.parametrizations.items():
            at = [isinstance(step, WeightCompander) for step in steps]
            latent = (
                [steps.original] if steps.is_tensor else [getattr(steps, f"original{i}") for i in range(steps.ntensors)]
            )
            if not any(at) or id(latent[0]) in seen:
                continue
            seen.add(id(latent[0]))
            for step in list(steps)[: at.index(True)]:
                latent = [step(*latent)]
            yield f"{name}.{label}".lstrip("."), steps[at.index(True)], latent[0]


def _layer(name: str, step: WeightCompander, latent: torch.Tensor, eps: float) -> LayerReport:
    a, b, cap = step.a, step.b, step.cap
    w = step(latent).to(exact(latent.dtype))
    finite = latent.isfinite() & w.isfinite()
    share = (w.abs() / cap)[finite]
    w = w[finite].to(torch.float64)
    return LayerReport(
        name,
        a.mean().item(),
        b.mean().item(),
        cap.max().item(),
        w.abs().max().item() if len(w) else math.nan,
        (w.abs() < eps).to(torch.float64).mean().item(),
        kurtosis(w),
        (share > SATURATED).to(torch.float64).mean().item(),
        sum(int((~values.isfinite()).sum()) for values in (latent, a, b)),
    )
