"""Stage C: blocks in few bits, fitted to what they gave by how weights are rounded and by steps of activations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from retensor.compression.aphq.calibrate import Calibrated, Steps
from retensor.compression.aphq.hessian import gradients, importance
from retensor.compression.aphq.layers import Product, Rounder, products
from retensor.compression.aphq.runs import Traced
from retensor.quantizing import (
    ActivationQuantizer,
    AdaRound,
    Affine,
    AffineTensor,
    Fitting,
    Learning,
    Method,
    fake_quantized,
    quantized_layer,
)
from retensor.quantizing.affine import LEAST_STEP
from retensor.quantizing.learners import WeightLearner

CODED = 8
"""Bits of the largest codes that are kept."""


class Dropping(nn.Module):
    """A quantiser that leaves each number as it is with a probability, while ``active``."""

    def __init__(self, inner: nn.Module, share: float, generator: torch.Generator) -> None:
        super().__init__()
        self.inner, self.share, self.generator, self.active = inner, share, generator, True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``x``."""
        few: torch.Tensor = self.inner(x)
        if not self.active or not self.share:
            return few
        drawn = torch.rand(x.shape, generator=self.generator).to(x.device)
        return torch.where(drawn < self.share, x, few)


class Wide(WeightLearner):
    """A weight rounded to nearest in more bits than codes are kept of."""

    def __init__(self, weight: torch.Tensor, steps: Steps) -> None:
        super().__init__(weight, Affine(CODED, axis=0), (steps.scale, steps.zero_point))
        self.high = 2**steps.bits - 1

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Of the shape and type of ``weight``."""
        return fake_quantized(weight, self.scale, self.zero_point, 0, self.high)

    def quantized(self, weight: torch.Tensor) -> AffineTensor:
        """Nothing: there are no such codes."""
        raise ValueError(f"codes are kept of weights of at most {CODED} bits; take w_bits from 2 to {CODED}")


class BlockRounding(Method):
    """AdaRound in all layers of a unit, learned steps of activations, and a loss weighted by importance."""

    def __init__(self, ready: Calibrated, images: torch.Tensor) -> None:
        self.ready, self.config, self.images = ready, ready.config, images
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.traced: Traced | None = None

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        """Put learners and quantisers in the unit; Adam for how weights are rounded, and for steps."""
        config, unit = self.config, fitting.unit
        roundings: list[nn.Parameter] = []
        rounders: list[Dropping] = []
        shown = list(products(fitting.model, unit.name))
        for name in unit.layers:
            layer = fitting.layer(name)
            weight_steps, input_steps = self.ready.steps[name]
            learner = _learner(layer.weight.detach(), weight_steps)
            inputs = self._dropping(_quantizer(input_steps).to(layer.weight))
            fitting.place(name, Learning(layer, learner, inputs))
            rounders.append(inputs)
            roundings += list(learner.parameters())
        for name in shown:
            product = fitting.layer(name)
            assert isinstance(product, Product)
            for side, steps in zip(("left", "right"), self.ready.steps[name], strict=True):
                rounder = Rounder(steps.bits, len(steps.scale)).to(fitting.inputs.device)
                rounder.keep(steps.scale, steps.zero_point)
                rounders.append(self._dropping(rounder))
                setattr(product, side, rounders[-1])
        fitting.kept.update(rounders=rounders, products=shown, scale=None)
        if not roundings or not config.iters:
            return []
        fitting.kept["importance"] = self._importance(fitting)
        scales = [dropping.inner.scale for dropping in rounders]
        return [
            torch.optim.Adam([{"params": roundings, "lr": config.lr, "rate": _constant}]),
            torch.optim.Adam(scales, lr=config.act_lr),
        ]

    def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
        """How far the unit is from what it gave, and what rounds weights one way or the other."""
        kept, config = fitting.kept, self.config
        value = self._distance(fitting, found, wanted)
        if config.start is not None and not fitting.unit.last:
            if kept["scale"] is None:
                kept["scale"] = config.start / max(float(value.detach()), 1e-30)
            value = kept["scale"] * value
        for learner in _learners(fitting):
            value = value + config.regularisation * learner.regulariser(done)
        return value

    @torch.no_grad()
    def after_step(self, fitting: Fitting, done: float) -> None:
        """Keep steps above 0."""
        for dropping in fitting.kept["rounders"]:
            dropping.inner.scale.clamp_(min=LEAST_STEP)

    @contextmanager
    def judged(self, fitting: Fitting) -> Iterator[None]:
        """With every activation rounded, and weights by their codes."""
        learners, rounders = _learners(fitting), fitting.kept["rounders"]
        for learner in learners:
            learner.hard = True
        for dropping in rounders:
            dropping.active = False
        try:
            yield
        finally:
            for learner in learners:
                learner.hard = False
            for dropping in rounders:
                dropping.active = True

    def end(self, fitting: Fitting) -> dict[str, Any]:
        """Put codes in the layers; the part of each weight that is not rounded to nearest."""
        moved: dict[str, float] = {}
        for name in fitting.unit.layers:
            learning = fitting.layer(name)
            layer, learner, inputs = learning.layer, learning.learner, learning.inputs.inner
            if isinstance(learner, Wide):
                learning.inputs = inputs
                continue
            weight = layer.weight.detach()
            kept = learner.quantized(weight)
            nearest = kept.quantizer.encode(weight, kept.scale, kept.zero_point)
            moved[name] = float((kept.codes != nearest.codes).double().mean())
            fitting.place(name, quantized_layer(layer, kept, inputs))
        for name in fitting.kept["products"]:
            product = fitting.layer(name)
            for side in ("left", "right"):
                setattr(product, side, getattr(product, side).inner)
        return {"moved": moved, "products": fitting.kept["products"]}

    def _dropping(self, inner: nn.Module) -> Dropping:
        return Dropping(inner, self.config.qdrop, self.generator)

    def _importance(self, fitting: Fitting) -> torch.Tensor | None:
        """Weights of the unit's outputs, one for all images or one each."""
        name, config = fitting.unit.name, self.config
        if fitting.unit.last or config.loss in ("mse", "mae"):
            return None
        if self.traced is None:
            self.traced = Traced(fitting.teacher, self.images, self.ready.spec.blocks, (), config.batch)
        if config.loss == "aph":
            outputs = fitting.target.flatten(0, 1)
            return importance(self.traced, name, outputs, config, average=config.average)
        with self.judged(fitting):
            return gradients(fitting.model, name, self.images, self.traced.logits, config)

    def _distance(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        if fitting.unit.last:
            told = functional.log_softmax(found, -1)
            return functional.kl_div(told, functional.softmax(wanted, -1), reduction="batchmean")
        apart, weights = found - wanted, fitting.kept["importance"]
        if weights is None:
            return apart.abs().sum(1).mean() if self.config.loss == "mae" else apart.square().sum(1).mean()
        if len(weights) > 1:
            assert fitting.chosen is not None
            each = len(weights) // len(fitting.clean)
            weights = weights.unflatten(0, (-1, each))[fitting.chosen].flatten(0, 1)
        return (apart.square() * weights).mean()


def _constant(_: float) -> float:
    return 1.0


def _learner(weight: torch.Tensor, steps: Steps) -> WeightLearner:
    if steps.bits > CODED:
        return Wide(weight, steps)
    return AdaRound(weight, Affine(steps.bits, axis=0), (steps.scale, steps.zero_point))


def _quantizer(steps: Steps) -> nn.Module:
    """What rounds the inputs of a layer."""
    if steps.bits > CODED:
        wide = Rounder(steps.bits)
        wide.keep(steps.scale, steps.zero_point)
        return wide
    made = ActivationQuantizer(steps.bits)
    with torch.no_grad():
        made.scale.copy_(steps.scale)
        made.zero_point.copy_(steps.zero_point)
    return made


def _learners(fitting: Fitting) -> list[AdaRound]:
    found = [fitting.layer(name).learner for name in fitting.unit.layers]
    return [learner for learner in found if isinstance(learner, AdaRound)]
