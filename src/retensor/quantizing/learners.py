"""Weights in few bits while they are learned: round to nearest, and AdaRound.

``RoundToNearest`` learns nothing. ``AdaRound`` learns for each weight whether it goes to the whole number below it or
above:

    W' = s (clip(floor(W / s) + h(V) + z, low, high) - z),  h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)

with ``sum (1 - |2 h(V) - 1|**beta)`` added to the loss, so that each ``h`` ends at 0 or 1 (M. Nagel, R. A. Amjad, M.
van Baalen, C. Louizos, T. Blankevoort, Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, arXiv
2004.10568).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from retensor.quantizing.affine import Affine, AffineTensor
from retensor.replacing import Reparametrization

STRETCH = 1.2
OVER = 0.1
WARM_UP = 0.2
BETA_FIRST, BETA_LAST = 20.0, 2.0


class WeightLearner(Reparametrization):
    """A weight that is learned in few bits: a parametrization whose result is what codes stand for.

    Its step and zero point are those that the quantiser chooses for a weight. Subclasses give :meth:`forward` and, with
    the same values, :meth:`quantized`.

    Parameters
    ----------
    weight : torch.Tensor
        What is to be put in few bits; it is not kept.
    quantizer : Affine
    steps : pair of torch.Tensor, optional
        Step and zero point where they are found already, as :meth:`Affine.choose` gives them.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, quantizer: Affine, steps: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.quantizer, self.shape = quantizer, tuple(weight.shape)
        if steps is not None:
            scale, zero = (value.detach().clone().reshape(quantizer.steps(self.shape)) for value in steps)
        elif weight.is_meta:
            # It is rebuilt to be filled; there are no values to choose by.
            scale = weight.new_ones(quantizer.steps(self.shape), dtype=torch.float32)
            zero = torch.zeros_like(scale)
        else:
            scale, zero = quantizer.choose(weight.detach())
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero)

    def quantized(self, weight: torch.Tensor) -> AffineTensor:
        """The weight as codes, by what is learned so far."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """The weight's shape and the quantiser's settings."""
        return {"shape": list(self.shape), "quantizer": self.quantizer.settings()}

    @classmethod
    def from_config(cls, config: Any) -> WeightLearner:
        """One for weights of that shape, whose values are loaded."""
        quantizer = Affine(**config["quantizer"])
        # The step is loaded too; a search for one would be for nothing.
        made = cls(torch.zeros(config["shape"]), replace(quantizer, search=None))
        made.quantizer = quantizer
        return made


class RoundToNearest(WeightLearner):
    """Rounds each weight to the nearest whole number of steps.

    Examples
    --------
    >>> weight = torch.tensor([[0.0, 0.6, 1.4, 3.0]])
    >>> RoundToNearest(weight, Affine(2))(weight)
    tensor([[0., 1., 1., 3.]])
    """

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``weight``."""
        return self.quantized(weight).decode(weight.dtype)

    def quantized(self, weight: torch.Tensor) -> AffineTensor:
        """The weight as codes."""
        return self.quantizer.encode(weight, self.scale, self.zero_point)


class AdaRound(WeightLearner):
    """Learns for each weight whether it is rounded down or up; its step stays.

    Attributes
    ----------
    V : nn.Parameter
        Of the weight's shape; it begins where ``h(V)`` is the part of a step by which the weight lies above a whole
        number, so that nothing is rounded yet.
    hard : bool
        Whether ``h`` is 0 or 1, by its nearer end.

    Examples
    --------
    >>> weight = torch.tensor([[0.0, 0.6, 1.4, 3.0]])
    >>> learner = AdaRound(weight, Affine(2))
    >>> torch.allclose(learner(weight), weight, atol=1e-5)
    True
    >>> learner.quantized(weight).decode()
    tensor([[0., 1., 1., 3.]])
    """

    def __init__(
        self, weight: torch.Tensor, quantizer: Affine, steps: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> None:
        super().__init__(weight, quantizer, steps)
        self.hard = False
        apart = self._steps(weight.detach())
        part = (apart - apart.floor()).clamp(1e-6, 1 - 1e-6)
        self.V = nn.Parameter(torch.logit((part + OVER) / STRETCH).reshape(weight.shape))

    def rounding(self) -> torch.Tensor:
        """``h(V)``, of the weight's shape."""
        soft = (STRETCH * torch.sigmoid(self.V) - OVER).clamp(0, 1)
        return (soft >= 0.5).to(soft) if self.hard else soft

    def regulariser(self, done: float) -> torch.Tensor:
        """``sum (1 - |2 h - 1|**beta)`` when a part ``done`` of the steps is taken: nothing in the first fifth.

        ``beta`` falls along a line from 20 to 2 afterwards.
        """
        if done < WARM_UP:
            return self.V.new_zeros(())
        beta = BETA_LAST + (BETA_FIRST - BETA_LAST) * (1 - (done - WARM_UP) / (1 - WARM_UP))
        return (1 - (2 * self.rounding() - 1).abs().pow(beta)).sum()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``weight``."""
        low, high = self.quantizer.low, self.quantizer.high
        whole = self._steps(weight).floor() + self.quantizer.grouped(self.rounding()) + self.zero_point
        return ((whole.clamp(low, high) - self.zero_point) * self.scale).reshape(weight.shape).to(weight.dtype)

    def quantized(self, weight: torch.Tensor) -> AffineTensor:
        """The weight as codes, each ``h`` at its nearer end."""
        low, high = self.quantizer.low, self.quantizer.high
        up = self.quantizer.grouped((self.V.detach() >= 0).to(self.V))
        whole = (self._steps(weight.detach()).floor() + up + self.zero_point).clamp(low, high)
        codes = (whole - low).to(torch.uint8).reshape(weight.shape)
        return AffineTensor(codes, self.scale, self.zero_point, self.quantizer)

    def _steps(self, weight: torch.Tensor) -> torch.Tensor:
        return self.quantizer.grouped(weight) * (1.0 / self.scale)
