"""Settings of APHQ-ViT, with the published values where nothing is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from retensor.files import described
from retensor.units import check_flags

Direction = Literal["rademacher", "ones"]
Loss = Literal["aph", "mse", "mae", "hessian_brecq"]
WIDE = 16
"""Bits up to which numbers may be rounded; codes are kept of at most 8."""


@dataclass(frozen=True)
class Config:
    """Settings of :func:`quantize` and its stages.

    Parameters
    ----------
    w_bits, a_bits : int
        Of weights, and of what goes into linear layers and into both products of attention: 2 to 8. Up to 16 are for
        checks: weights of more than 8 are rounded to nearest, learn nothing and cannot be saved.
    pct : float, optional
        The part of the positive inputs of an MLP's second layer that its bound lies above: 0.99 at 3 bits and 0.98 at
        others by default.
    temp : float
        Temperature of the softmax whose divergence tells importance.
    direction : {"rademacher", "ones"}
        Which way a module's output is moved. ``ones`` is what was published, which pre-norm transformers do not see:
        see :func:`perturbation_hessian`.
    draws : int
        Directions of signs that are averaged.
    eps : float, optional
        How far it is moved; by default a part of the root mean square of the output (0.01, in float64 0.001).
    calib, recon : int
        Images by which steps are searched, and to which blocks are fitted: the first ones of those given.
    iters, batch : int
        Steps for each block, and images of each.
    qdrop : float
        The probability with which each number inside a block stays as it is while the block is fitted.
    input_drop : float, optional
        That of each number that comes into a block; ``qdrop`` by default. 1 takes the given model's.
    mlp : bool
        Whether activations of MLPs become ReLUs first.
    mlp_iters : int, optional
        Steps for each MLP; ``iters`` by default.
    mlp_lr, lr, act_lr : float
        Adam's rates for MLPs, for what rounds weights and for the steps of activations. The published ones, which are
        the defaults, are meant for 20 000 steps; a tenth of the steps needs ten times the rates and more.
    loss : {"aph", "mse", "mae", "hessian_brecq"}
        How far a block is from what it gave: squares weighted by the average perturbation Hessian, squares, absolute
        values, or squares weighted by squared gradients of the model in few bits.
    average : bool
        Whether the perturbation Hessian is one for all images.
    start : float, optional
        What the loss of a block is scaled to be at its first step; None leaves it.
    regularisation : float
        How much counts that weights are rounded one way or the other.
    embed_bits : int
        Of what goes into a convolution, such as the embedding of patches.
    rounds : int
        Searches of steps of weights and activations in turn by a layer's output.
    seed : int

    Raises
    ------
    ValueError, TypeError
        Where one is out of range, named.

    Examples
    --------
    >>> Config(w_bits=3, a_bits=3).bound, Config(w_bits=4, a_bits=4).bound
    (0.99, 0.98)
    """

    w_bits: int = 4
    a_bits: int = 4
    pct: float | None = None
    temp: float = 20.0
    direction: Direction = "rademacher"
    draws: int = 1
    eps: float | None = None
    calib: int = 128
    recon: int = 1024
    iters: int = 20000
    batch: int = 32
    qdrop: float = 0.5
    input_drop: float | None = None
    mlp: bool = True
    mlp_iters: int | None = None
    mlp_lr: float = 4e-5
    lr: float = 1e-3
    act_lr: float = 4e-5
    loss: Loss = "aph"
    average: bool = True
    start: float | None = 2.0
    regularisation: float = 0.01
    embed_bits: int = 8
    rounds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_flags(mlp=self.mlp, average=self.average)
        for name in ("w_bits", "a_bits", "embed_bits"):
            _whole(name, getattr(self, name), 2, WIDE)
        for name, least in (("draws", 1), ("calib", 2), ("recon", 2), ("iters", 0), ("batch", 1), ("rounds", 0)):
            _whole(name, getattr(self, name), least)
        if self.mlp_iters is not None:
            _whole("mlp_iters", self.mlp_iters, 0)
        _number("temp", self.temp, above=0.0)
        for name in ("eps", "start"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), above=0.0)
        for name in ("mlp_lr", "lr", "act_lr", "regularisation"):
            _number(name, getattr(self, name))
        for name in ("pct", "qdrop", "input_drop"):
            if (share := getattr(self, name)) is not None and not (_is_number(share) and 0 <= share <= 1):
                raise ValueError(f"{name} is a part from 0 to 1, not {described(share)}")
        for name, kinds in (("direction", Direction), ("loss", Loss)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name} is {described(getattr(self, name))}; it is one of {', '.join(get_args(kinds))}"
                )

    @property
    def bound(self) -> float:
        """``pct``, or what was published for the bits of activations."""
        return self.pct if self.pct is not None else (0.99 if self.a_bits == 3 else 0.98)

    @property
    def mixed(self) -> float:
        """The part of a block's inputs that comes from behind blocks in few bits."""
        return 1.0 - (self.qdrop if self.input_drop is None else self.input_drop)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(name: str, value: Any, above: float | None = None) -> None:
    if not _is_number(value) or value < 0 or (above is not None and value <= above):
        raise ValueError(f"{name} is a number {'above' if above is not None else 'from'} 0, not {described(value)}")


def _whole(name: str, value: Any, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        to = "" if most is None else f" to {most}"
        raise ValueError(f"{name} is a whole number from {least}{to}, not {described(value)}")
