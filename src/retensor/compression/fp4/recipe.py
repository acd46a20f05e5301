"""Recipes: which format, rounding, rotation and gradient each operand of the three products of a layer has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self

from retensor.compression.fp4.format import Format
from retensor.compression.fp4.gradient import SCALE_GRADIENTS, Estimator, ScaleGradient, check_estimator
from retensor.compression.fp4.hadamard import check_size
from retensor.files import described
from retensor.quantizing.grids import Rounding

Operand = Literal["fwd.x", "fwd.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x"]
GEMMS = ("fwd", "dgrad", "wgrad")
OPERANDS: tuple[Operand, ...] = ("fwd.x", "fwd.w", "dgrad.dy", "dgrad.w", "wgrad.dy", "wgrad.x")
_ROUNDINGS = ("nearest", "stochastic")


@dataclass(frozen=True)
class Recipe:
    """How a layer trains in 4 bits.

    Parameters
    ----------
    fwd : Format or None
        Of both operands of the forward product; None leaves them as they are.
    bwd : Format, None or "fwd"
        Of the four operands of the two backward products; as ``fwd`` by default.
    rounding_fwd, rounding_bwd : {"nearest", "stochastic"}
        Of both operands of the forward product; and of the gradient ``dY`` in both backward products, whose other
        operands, weights and activations, are rounded to the nearest. Scales are never rounded at random.
    formats, roundings : mapping of operand to Format or None, and to rounding
        Where an operand has one of its own: ``"fwd.x"``, ``"fwd.w"``, ``"dgrad.dy"``, ``"dgrad.w"``, ``"wgrad.dy"``,
        ``"wgrad.x"``.
    hadamard : mapping of product to int
        The size of the random Hadamard transform of both operands of ``"fwd"``, ``"dgrad"`` or ``"wgrad"``, before
        anything is measured for a scale.
    q_grad : {"ste", "clipped", "dge", "tanh", "linear"}
        What stands for the slope of the rounding of the forward operands (:func:`slope_of`).
    q_grad_x : optional
        The same for activations alone, where it is another than for weights: ``dge`` is meant for weights, with
        ``q_grad_x="ste"``.
    scale_grad : {"none", "ste", "relaxed"}
        Whether scales of the forward operands pass a gradient on: no; as if they were not rounded; or as if their
        logarithm were not, so that their slope is ``s_q / s``.
    temperature : float
        Of the estimators ``tanh`` and ``linear``.
    outlier : float, optional
        A quantile, 0.99 to 0.999 in the paper below: activations beyond it are clamped to it, and what was cut off is
        multiplied with the weights in full precision, as a sparse product (R. Wang and others, arXiv 2501.17116).
    seed : int
        Of signs and of stochastic rounding; each layer, step and operand draws on its own.

    Raises
    ------
    ValueError, TypeError
        Where a part is none, or does not fit the others.

    Examples
    --------
    >>> recipe = Recipe(fwd=Format(scale="ue5m3", tensor_scale=True), hadamard={"wgrad": 16})
    >>> recipe.rounding("dgrad.dy"), recipe.rounding("dgrad.w"), str(recipe.format("wgrad.x"))
    ('stochastic', 'nearest', 'e2m1·ue5m3+ts·16')
    """

    fwd: Format | None = field(default_factory=Format)
    bwd: Format | Literal["fwd"] | None = "fwd"
    rounding_fwd: Rounding = "nearest"
    rounding_bwd: Rounding = "stochastic"
    formats: Mapping[str, Format | None] = field(default_factory=dict)
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    hadamard: Mapping[str, int] = field(default_factory=dict)
    q_grad: Estimator = "ste"
    q_grad_x: Estimator | None = None
    scale_grad: ScaleGradient = "none"
    temperature: float = 0.5
    outlier: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for label, given in (("fwd", self.fwd), ("bwd", self.bwd)):
            if not isinstance(given, Format) and given is not None and not (label == "bwd" and given == "fwd"):
                raise TypeError(f"{label} is a Format, or None for none, not {described(given)}")
        for label, rounding in (
            ("rounding_fwd", self.rounding_fwd), ("rounding_bwd", self.rounding_bwd), *self.roundings.items()
        ):  # fmt: skip
            if rounding not in _ROUNDINGS:
                raise ValueError(f"{label} is {described(rounding)}; it is 'nearest' or 'stochastic'")
        for operand in (*self.formats, *self.roundings):
            if operand not in OPERANDS:
                raise ValueError(f"{described(operand)} is no operand; operands are {', '.join(OPERANDS)}")
        for operand, given in self.formats.items():
            if given is not None and not isinstance(given, Format):
                raise TypeError(f"the format of {operand} is a Format or None, not {described(given)}")
        for product, size in self.hadamard.items():
            if product not in GEMMS:
                raise ValueError(f"{described(product)} is no product; products are {', '.join(GEMMS)}")
            check_size(size)
        check_estimator(self.q_grad, self.temperature)
        check_estimator(self.estimator("fwd.x"), self.temperature)
        if self.scale_grad not in SCALE_GRADIENTS:
            raise ValueError(
                f"scale_grad is {described(self.scale_grad)}; it is one of {', '.join(SCALE_GRADIENTS)}"
            )  # fmt: skip
        if self.outlier is not None and not (isinstance(self.outlier, float) and 0.5 <= self.outlier < 1):
            raise ValueError(f"outlier is a quantile from 0.5 to below 1, or None, not {described(self.outlier)}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise TypeError(f"seed is a whole number, not {described(self.seed)}")

    def format(self, operand: str) -> Format | None:
        """The format of an operand; None where it is left as it is."""
        if operand in self.formats:
            return self.formats[operand]
        return self.fwd if operand.startswith("fwd") or self.bwd == "fwd" else self.bwd

    def rounding(self, operand: str) -> Rounding:
        """How the elements of an operand are rounded."""
        if operand in self.roundings:
            return self.roundings[operand]
        if operand.startswith("fwd"):
            return self.rounding_fwd
        return self.rounding_bwd if operand.endswith("dy") else "nearest"

    def estimator(self, operand: str) -> Estimator:
        """What stands for the slope of the rounding of a forward operand."""
        return self.q_grad_x if operand == "fwd.x" and self.q_grad_x is not None else self.q_grad

    @property
    def draws(self) -> bool:
        """Whether any operand is rounded at random."""
        return any(self.format(one) is not None and self.rounding(one) == "stochastic" for one in OPERANDS)

    def seeded(self, seed: int) -> Recipe:
        """The same with another seed."""
        return replace(self, seed=seed)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        found = {part.name: getattr(self, part.name) for part in fields(self)}
        for label in ("fwd", "bwd"):
            found[label] = found[label].as_dict() if isinstance(found[label], Format) else found[label]
        found["formats"] = {name: given and given.as_dict() for name, given in self.formats.items()}
        return found | {"roundings": dict(self.roundings), "hadamard": dict(self.hadamard)}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Of what :meth:`as_dict` made.

        Raises
        ------
        ValueError
            Where a part is not known.
        """
        known = [part.name for part in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"a recipe has no part {described(name)}; parts are {', '.join(known)}")
        parts = dict(given)
        for label in ("fwd", "bwd"):
            if isinstance(parts.get(label), Mapping):
                parts[label] = Format.from_dict(parts[label])
        parts["formats"] = {
            name: None if one is None else Format.from_dict(one) for name, one in parts.get("formats", {}).items()
        }  # fmt: skip
        return cls(**parts)

    def __str__(self) -> str:
        """Short enough for a table."""
        bwd = "" if self.bwd == "fwd" else f" | {self.bwd}"
        parts = [f"{self.fwd}{bwd}", "SR" if self.rounding_bwd == "stochastic" else "RTN"]
        parts += [f"RHT({product}){size}" for product, size in self.hadamard.items()]
        parts += [self.q_grad] if self.q_grad != "ste" else []
        parts += [f"x {self.q_grad_x}"] if self.q_grad_x is not None else []
        parts += [f"scale {self.scale_grad}"] if self.scale_grad != "none" else []
        parts += [f"outliers {self.outlier:g}"] if self.outlier else []
        return ", ".join(parts)
