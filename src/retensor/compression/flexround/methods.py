"""What stands in the layers of a unit while they are fitted, for FlexRound and its rivals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from retensor.compression.flexround.learners import LRQ, AdaQuant, FlexRound
from retensor.quantizing import (
    ActivationQuantizer,
    AdaRound,
    Affine,
    AffineTensor,
    Fitting,
    Learning,
    Method,
    RoundToNearest,
    WeightLearner,
)
from retensor.quantizing.affine import LEAST_STEP

Name = Literal["flexround", "lrq", "adaquant", "adaround", "rtn"]
RATES: dict[Name, float] = {"flexround": 3e-3, "lrq": 3e-3, "adaquant": 1e-3, "adaround": 1e-2, "rtn": 0.0}
"""Methods, with the rates that they begin with where none is given."""


@dataclasses.dataclass
class Rounding(Method):
    """A way of rounding weights that learns from what a unit gave, for :func:`retensor.quantizing.reconstruct`.

    See :func:`quantize` for the parameters.
    """

    weight: Affine
    act: ActivationQuantizer | None = None
    name: Name = "flexround"
    lr: float = 3e-3
    step_lr: float = 3e-3
    act_lr: float = 2e-3
    ends: int | None = None
    learn_step: bool = True
    rows: bool = True
    columns: bool = True
    rank: int | None = None
    regularisation: float = 0.01
    seed: int = 0

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        """Put learners in the layers whose weight is theirs alone; one Adam for all that is learned."""
        shared = _shared(fitting.teacher)
        names = [name for name in fitting.unit.layers if name not in shared]
        fitting.kept["left"] = [name for name in fitting.unit.layers if name in shared]
        fitting.kept["layers"] = names
        inputs = self._inputs(fitting, names)
        groups: list[dict[str, Any]] = []
        for name in names:
            layer = fitting.layer(name)
            learner = self._learner(layer.weight.detach(), self._at_ends(fitting, name, self.weight))
            fitting.place(name, Learning(layer, learner, inputs.get(name)))
            groups += self._groups(learner, inputs.get(name))
        return [torch.optim.Adam(groups)] if groups else []

    def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
        """Squares summed over axis 1 and averaged over the others; AdaRound's regulariser is added."""
        value = super().loss(fitting, found, wanted, done)
        for learner in _learners(fitting):
            if isinstance(learner, AdaRound):
                value = value + self.regularisation * learner.regulariser(done)
        return value

    @torch.no_grad()
    def after_step(self, fitting: Fitting, done: float) -> None:
        """Keep the steps of inputs, which are learned as they are, above 0."""
        if self.act is not None and self.act.mode == "tensor":
            for name in fitting.kept["layers"]:
                fitting.layer(name).inputs.scale.clamp_(min=LEAST_STEP)

    @contextmanager
    def judged(self, fitting: Fitting) -> Iterator[None]:
        """AdaRound's weights lie between codes while they are learned; they are judged by the codes."""
        soft = [learner for learner in _learners(fitting) if isinstance(learner, AdaRound)]
        for learner in soft:
            learner.hard = True
        try:
            yield
        finally:
            for learner in soft:
                learner.hard = False

    def end(self, fitting: Fitting) -> dict[str, Any]:
        """Put codes in the layers; what became of each, and the number of values that were learned."""
        found: dict[str, Any] = {"layers": {}, "left": fitting.kept["left"], "learned": 0}
        for name in fitting.kept["layers"]:
            learning = fitting.layer(name)
            learner, weight = learning.learner, learning.layer.weight.detach()
            found["learned"] += sum(p.numel() for p in learner.parameters() if p.requires_grad)
            found["layers"][name] = moved(weight, learner.quantized(weight), learner.scale)
            fitting.place(name, learning.finished())
        return found

    def _inputs(self, fitting: Fitting, names: Sequence[str]) -> dict[str, ActivationQuantizer]:
        """Quantisers of what comes into the layers, by the range that it has in the student."""
        if self.act is None:
            return {}
        made = {name: self._quantiser(fitting, name, self.act) for name in names}
        if self.act.mode == "tensor":
            for name, ends in _ranges(fitting, names).items():
                made[name].calibrate(ends)
        device = fitting.inputs.device
        return {name: quantiser.to(device) for name, quantiser in made.items()}

    def _quantiser(self, fitting: Fitting, name: str, act: ActivationQuantizer) -> ActivationQuantizer:
        settings = act.settings()
        bits = self._at_ends(fitting, name, act.quantizer).bits
        return ActivationQuantizer(**{**settings, "bits": bits})

    def _at_ends(self, fitting: Fitting, name: str, quantizer: Affine) -> Affine:
        """With more bits where it is the first layer of the model or the last."""
        unit = fitting.unit
        first, last = unit.first and name == unit.layers[0], unit.last and name == unit.layers[-1]
        if self.ends is None or not (first or last):
            return quantizer
        # A search over every zero point of so many bits would take minutes to find what the range is next to.
        return dataclasses.replace(quantizer, bits=max(self.ends, quantizer.bits), search=None)

    def _learner(self, weight: torch.Tensor, quantizer: Affine) -> WeightLearner:
        if self.name == "rtn":
            return RoundToNearest(weight, quantizer)
        if self.name == "adaround":
            return AdaRound(weight, quantizer)
        if self.name == "adaquant":
            return AdaQuant(weight, quantizer, learn_step=self.learn_step)
        if self.name == "lrq":
            return LRQ(weight, quantizer, learn_step=self.learn_step, rank=self.rank, seed=self.seed)
        return FlexRound(weight, quantizer, learn_step=self.learn_step, rows=self.rows, columns=self.columns)

    def _groups(self, learner: WeightLearner, inputs: ActivationQuantizer | None) -> list[dict[str, Any]]:
        """What is learned of one layer, with its rates."""
        if self.name == "rtn":
            return []
        steps = [p for name, p in learner.named_parameters() if name == "log_s1" and p.requires_grad]
        others = [p for name, p in learner.named_parameters() if name != "log_s1"]
        groups = [{"params": others, "lr": self.lr}, {"params": steps, "lr": self.step_lr}]
        if inputs is not None and inputs.mode == "tensor":
            groups.append({"params": [inputs.scale], "lr": self.act_lr * float(inputs.scale.detach())})
        return [group for group in groups if group["params"]]


def moved(weight: torch.Tensor, kept: AffineTensor, begun: torch.Tensor) -> dict[str, float]:
    """Where the codes of a weight lie, in steps from where the nearest would.

    Returns
    -------
    dict
        ``step``: the mean step; ``grown``: its mean ratio to the one begun with; ``moved`` and ``far``: the parts of
        the weights whose code is 1 or more, and 2 or more, from that of the nearest multiple of the step that was
        learned; ``beyond``: the part whose code is neither of the two next to the weight, which no method that rounds
        up or down can reach.

    Examples
    --------
    >>> weight = torch.tensor([[0.2, 2.2, 2.2, 2.2, 3.0]])
    >>> four = Affine(2)
    >>> codes = torch.tensor([[0, 2, 3, 1, 1]], dtype=torch.uint8)
    >>> kept = AffineTensor(codes, torch.ones(1, 1), torch.zeros(1, 1), four)
    >>> {name: round(value, 2) for name, value in moved(weight, kept, torch.ones(1, 1)).items()}
    {'step': 1.0, 'grown': 1.0, 'moved': 0.6, 'far': 0.2, 'beyond': 0.4}
    """
    quantizer = kept.quantizer
    codes = quantizer.grouped(kept.codes.to(kept.scale.dtype)) + quantizer.low
    apart = (codes - quantizer.whole(weight, kept.scale, kept.zero_point)).abs()
    units = quantizer.grouped(weight) / kept.scale + kept.zero_point
    below, above = (part.clamp(quantizer.low, quantizer.high) for part in (units.floor(), units.ceil()))
    return {
        "step": float(kept.scale.mean()),
        "grown": float((kept.scale / begun).mean()),
        "moved": float((apart >= 1).double().mean()),
        "far": float((apart >= 2).double().mean()),
        "beyond": float(((codes < below) | (codes > above)).double().mean()),
    }


def _learners(fitting: Fitting) -> list[WeightLearner]:
    return [fitting.layer(name).learner for name in fitting.kept["layers"]]


def _shared(model: nn.Module) -> set[str]:
    """Modules whose weight is another one's too, such as a head that is an embedding."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for label, value in module.named_parameters(recurse=False):
            if label == "weight":
                owners.setdefault(id(value), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


@torch.no_grad()
def _ranges(fitting: Fitting, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The least and the largest number that comes into each layer while the unit runs on what reaches it."""
    found: dict[str, torch.Tensor] = {}

    def look(name: str, arguments: tuple[Any, ...]) -> None:
        ends = torch.stack(arguments[0].aminmax())
        before = found.get(name, ends)
        found[name] = torch.stack([torch.minimum(before[0], ends[0]), torch.maximum(before[1], ends[1])])

    handles = [
        fitting.layer(name).register_forward_pre_hook(lambda _, arguments, name=name: look(name, arguments))
        for name in names
    ]
    try:
        for part in fitting.inputs.chunks():
            arguments, named = fitting.inputs.take(part)
            fitting.module(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
    return found
