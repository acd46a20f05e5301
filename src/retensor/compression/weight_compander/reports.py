"""What companding does to the weights of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from retensor.compression.weight_compander.function import exact
from retensor.compression.weight_compander.parametrization import WeightCompander

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
    >>> from retensor.compression import weight_compander as wc
    >>> report(wc.apply(nn.Sequential(nn.Linear(8, 2))))["0.weight"].cap
    0.4712...
    """
    return CompanderReport(tuple(_layer(name, steps, eps) for name, steps in _companded(model)))


def _companded(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Companded tensors by name, each once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for label, steps in module.parametrizations.items():
            if any(isinstance(step, WeightCompander) for step in steps) and id(steps.original) not in seen:
                seen.add(id(steps.original))
                yield f"{name}.{label}".lstrip("."), steps


def _layer(name: str, steps: nn.Module, eps: float) -> LayerReport:
    latent, step = steps.original, steps[0]
    a, b, cap = step.a.detach(), step.b.detach(), step.cap.detach()
    finite = latent.isfinite()
    w = steps().to(exact(latent.dtype))
    share = w.abs() / cap
    w, share = w[finite].to(torch.float64), share[finite]
    centred = w - w.mean()
    return LayerReport(
        name,
        a.mean().item(),
        b.mean().item(),
        cap.max().item(),
        w.abs().max().item() if len(w) else math.nan,
        (w.abs() < eps).to(torch.float64).mean().item(),
        ((centred**4).mean() / (centred**2).mean() ** 2).item(),
        (share > SATURATED).to(torch.float64).mean().item(),
        int((~finite).sum()),
    )
