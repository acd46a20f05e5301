"""Weights that learn what they are divided by, or what is added to them, before they are rounded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import nn

from retensor.files import described
from retensor.quantizing import Affine, AffineTensor, WeightLearner
from retensor.quantizing.rounding import whole_numbers
from retensor.units import check_flags

RANK, LARGE_RANK, LARGE = 1024, 2048, 8192
"""The ranks of LRQ, the second where both sides of a weight are at least ``LARGE``."""


class StepLearner(WeightLearner):
    """A weight in few bits whose common step ``s1`` is learned: ``scale exp(log_s1)``.

    The logarithm keeps it positive. What is learned is its difference from the step that the quantiser chose, so that
    before the first step it is that one in every bit, which ``exp(log(s1))`` would not be.

    Parameters
    ----------
    weight : torch.Tensor
        What is to be put in few bits; it is not kept.
    quantizer : retensor.quantizing.Affine
    learn_step : bool
        False keeps ``s1`` as it was chosen.
    """

    def __init__(self, weight: torch.Tensor, quantizer: Affine, *, learn_step: bool = True) -> None:
        check_flags(learn_step=learn_step)
        super().__init__(weight, quantizer)
        self.learn_step = learn_step
        self.log_s1 = nn.Parameter(torch.zeros_like(self.scale), requires_grad=learn_step)

    @property
    def s1(self) -> torch.Tensor:
        """The common step, of the shape of the quantiser's."""
        return self.scale * self.log_s1.exp()

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and the largest whole number without the zero point."""
        return self.quantizer.low - self.zero_point, self.quantizer.high - self.zero_point

    def divided(self, weight: torch.Tensor) -> torch.Tensor:
        """What is rounded: the weight in its units, in the quantiser's grouped shape."""
        raise NotImplementedError

    @torch.no_grad()
    def quantized(self, weight: torch.Tensor) -> AffineTensor:
        """The weight as codes, by what is learned so far."""
        whole = self.divided(weight).round().clamp(*self.bounds()) + self.zero_point
        codes = (whole - self.quantizer.low).to(torch.uint8).reshape(weight.shape)
        return AffineTensor(codes, self.s1, self.zero_point, self.quantizer)

    def options(self) -> dict[str, Any]:
        """Arguments of the class beside the weight and the quantiser, as JSON has them."""
        return {"learn_step": self.learn_step}

    def config(self) -> dict[str, Any]:
        """Shape, the quantiser's settings and options."""
        return {**super().config(), **self.options()}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """One for weights of that shape, whose values are loaded."""
        given = dict(config)
        shape, quantizer = given.pop("shape"), Affine(**given.pop("quantizer"))
        # Values follow, the step among them: none has to be searched.
        made = cls(torch.zeros(shape), dataclasses.replace(quantizer, search=None), **given)
        made.quantizer = quantizer
        return made


class Dividing(StepLearner):
    """A weight that is divided by ``S = s1 S'`` number by number and rounded, and multiplied by ``s1`` alone."""

    def log_divisor(self) -> torch.Tensor:
        """``log S'``, of the weight's shape."""
        raise NotImplementedError

    def divided(self, weight: torch.Tensor) -> torch.Tensor:
        """``W / S``, in the quantiser's grouped shape."""
        scaled = self.quantizer.grouped(weight) * (1.0 / self.s1)
        return scaled * self.quantizer.grouped(-self.log_divisor()).exp()

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """``s1 clip(round(W / S), -z, 2**b - 1 - z)``, of the shape and type of ``weight``."""
        grouped, apart = self.quantizer.grouped(weight), self.quantizer.grouped(self.log_divisor())
        out: torch.Tensor = _Divided.apply(grouped, apart, self.s1, *self.bounds())
        return out.reshape(weight.shape).to(weight.dtype)


class FlexRound(Dividing):
    """A weight divided by ``S = s1 S2 s3 s4``, all of which are learned, as logarithms.

    Parameters
    ----------
    weight : torch.Tensor
        Of a linear layer, shape (outputs, inputs), or of a convolution, (outputs, inputs of a group, ...). It is not
        kept.
    quantizer : retensor.quantizing.Affine
    learn_step : bool
        False keeps ``s1`` as it was chosen.
    rows, columns : bool
        Whether there are ``s3``, of shape (outputs, 1, ...), and, for convolutions, ``s4``, (1, inputs, 1, ...).

    Attributes
    ----------
    log_s1, log_S2 : nn.Parameter
        0 at the start, of the shape of the steps and of the weight.
    log_s3, log_s4 : nn.Parameter or None

    Notes
    -----
    Codes are 0 where weights are, and a weight's gradient to ``log S2`` is its own size times that of what it becomes:
    large weights move more.

    Examples
    --------
    >>> weight = torch.tensor([[0.0, 0.6, 1.4, 3.0]])
    >>> learner = FlexRound(weight, Affine(2))
    >>> learner(weight)
    tensor([[0., 1., 1., 3.]], grad_fn=...)
    >>> with torch.no_grad():
    ...     _ = learner.log_S2[0, 3].fill_(math.log(3.0))
    >>> learner.quantized(weight).codes
    tensor([[0, 1, 1, 1]], dtype=torch.uint8)
    """

    log_s3: nn.Parameter | None
    log_s4: nn.Parameter | None

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Affine,
        *,
        learn_step: bool = True,
        rows: bool = True,
        columns: bool = True,
    ) -> None:
        check_flags(rows=rows, columns=columns)
        super().__init__(weight, quantizer, learn_step=learn_step)
        self.rows, self.columns = rows, columns
        shape = tuple(weight.shape)
        rest = (1,) * (len(shape) - 1)
        self.log_S2 = nn.Parameter(self.scale.new_zeros(shape))
        self.log_s3 = nn.Parameter(self.scale.new_zeros(shape[0], *rest)) if rows and rest else None
        wide = columns and len(shape) > 2
        self.log_s4 = nn.Parameter(self.scale.new_zeros(1, *shape[1:2], *rest[1:])) if wide else None

    def log_divisor(self) -> torch.Tensor:
        """``log S2 + log s3 + log s4``, of the weight's shape."""
        found = self.log_S2
        for part in (self.log_s3, self.log_s4):
            found = found if part is None else found + part
        return found

    def options(self) -> dict[str, Any]:
        """Arguments of the class beside the weight and the quantiser, as JSON has them."""
        return {**super().options(), "rows": self.rows, "columns": self.columns}


class LRQ(Dividing):
    """A weight divided by ``s1 exp(L2 U2 + r2 + c2)``: FlexRound with far fewer learned values.

    Source: J. H. Lee, J. Kim, J. Y. Yang, S. J. Kwon, E. Yang, K. M. Yoo, D. Lee, "LRQ: Optimizing Post-Training
    Quantization for Large Language Models by Learning Low-Rank Weight-Scaling Matrices", 2024, arXiv 2407.11534.

    Parameters
    ----------
    weight, quantizer, learn_step
        See :class:`FlexRound`. A convolution's weight is flattened behind its first axis.
    rank : int, optional
        By default 1024, or 2048 where both sides are at least 8192, and at most as makes half as many learned values
        as weights.
    seed : int
        Of ``U2``.

    Attributes
    ----------
    L2, U2, r2, c2 : nn.Parameter
        Shapes (outputs, rank), (rank, inputs), (outputs, 1) and (1, inputs); all are 0 at the start but ``U2``.

    Examples
    --------
    >>> learner = LRQ(torch.ones(64, 96), Affine(4))
    >>> learner.rank, sum(value.numel() for value in learner.parameters())
    (19, 3201)
    """

    def __init__(
        self,
        weight: torch.Tensor,
        quantizer: Affine,
        *,
        learn_step: bool = True,
        rank: int | None = None,
        seed: int = 0,
    ) -> None:
        if weight.ndim < 2:
            raise ValueError(f"a matrix of low rank stands for weights of two axes or more, not {list(weight.shape)}")
        out, inner = weight.shape[0], math.prod(weight.shape[1:])
        if rank is None:
            most = LARGE_RANK if min(out, inner) >= LARGE else RANK
            rank = max(1, min(most, out * inner // (2 * (out + inner))))
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank is a whole number from 1, not {described(rank)}")
        super().__init__(weight, quantizer, learn_step=learn_step)
        self.rank = rank
        self.L2 = nn.Parameter(self.scale.new_zeros(out, rank))
        self.U2 = nn.Parameter(self.scale.new_zeros(rank, inner))
        self.r2 = nn.Parameter(self.scale.new_zeros(out, 1))
        self.c2 = nn.Parameter(self.scale.new_zeros(1, inner))
        if not self.U2.is_meta:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.empty(rank, inner, device="cpu")
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
            self.U2.data.copy_(drawn)

    def log_divisor(self) -> torch.Tensor:
        """``L2 U2 + r2 + c2``, in the weight's shape."""
        return (torch.addmm(self.c2 + self.r2, self.L2, self.U2)).reshape(self.shape)

    def options(self) -> dict[str, Any]:
        """Arguments of the class beside the weight and the quantiser, as JSON has them."""
        return {**super().options(), "rank": self.rank}


class AdaQuant(StepLearner):
    """A weight to which something is added before it is rounded: ``s1 clip(round((W + V) / s1))``.

    Source: I. Hubara, Y. Nahshan, Y. Hanani, R. Banner, D. Soudry, "Accurate Post Training Quantization With Small
    Calibration Sets", ICML 2021, arXiv 2006.10518.

    Attributes
    ----------
    V : nn.Parameter
        Of the weight's shape and units; 0 at the start.

    Examples
    --------
    >>> weight = torch.tensor([[0.0, 0.6, 1.4, 3.0]])
    >>> AdaQuant(weight, Affine(2)).quantized(weight).decode()
    tensor([[0., 1., 1., 3.]])
    """

    def __init__(self, weight: torch.Tensor, quantizer: Affine, *, learn_step: bool = True) -> None:
        super().__init__(weight, quantizer, learn_step=learn_step)
        self.V = nn.Parameter(self.scale.new_zeros(tuple(weight.shape)))

    def divided(self, weight: torch.Tensor) -> torch.Tensor:
        """``(W + V) / s1``, in the quantiser's grouped shape."""
        return self.quantizer.grouped(weight + self.V) * (1.0 / self.s1)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``weight``."""
        out = self.s1 * whole_numbers(self.divided(weight), *self.bounds())
        return out.reshape(weight.shape).to(weight.dtype)


class _Divided(torch.autograd.Function):
    """``s1 clip(round(W / (s1 exp(d))))`` and its gradients in one go, which keeps two tensors instead of eight.

    The rounding lets gradients through, the clipping only within its range.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: torch.Tensor, d: torch.Tensor, s1: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        # In the order of Dividing.divided, so that both give the same bits.
        divided = torch.neg(d).exp_().mul_(weight * (1.0 / s1))
        whole = torch.round(divided)
        clipped = whole.clamp(low, high)
        outside = clipped != whole
        # Filled, not multiplied: beyond the range a quotient may be infinite.
        free = divided.masked_fill_(outside, 0)
        kept = (d, outside) if ctx.needs_input_grad[0] else (None, None)
        ctx.save_for_backward(free, clipped, s1, *kept)
        return clipped * s1

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        free, clipped, s1, d, outside = ctx.saved_tensors
        to_weight = (grad * torch.exp(-d)).masked_fill_(outside, 0) if ctx.needs_input_grad[0] else None
        inner = grad * free
        to_step = (grad * clipped).sub_(inner).sum_to_size(s1.shape) if ctx.needs_input_grad[2] else None
        to_d = inner.mul_(-s1) if ctx.needs_input_grad[1] else None
        return to_weight, to_d, to_step, None, None
