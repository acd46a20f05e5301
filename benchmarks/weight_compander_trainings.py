"""Trainings of Weight Compander and its controls on 100 digits.

Every arm of a comparison has, for each seed, the same 100 training images, the same initial draw and the same order of
batches. Whatever has a constant to choose (the pair of WC, and its controls) is chosen by the mean accuracy on other
seeds than those it is compared on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from benchmarks.measuring import Difference, paired
from torch import nn

from retensor import data
from retensor.compression import weight_compander as wc

SEEDS = range(16)
CNN_SEEDS = range(8)
TUNING_SEEDS = range(100, 108)
SAMPLES = 100
STEPS = 300
BATCH = 50
LR = 0.05
DECAY = 5e-4
NOISE = 0.2
PAIRS = ((0.3, 0.2), (0.2, 0.1), (0.2, 0.2))
NEAR = 0.01
HALF_PI = np.pi / 2


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    pair: tuple[float, float] | None = None
    lr: float = LR
    decay: float = DECAY
    clamp: float | None = None
    learn: bool = False
    lr_scale: float = 1e-3
    start: tuple[float, float] | None = None
    """Plain training that begins at the weights of this pair."""
    init: Literal["latent", "preserve"] = "latent"


@dataclass(frozen=True)
class Setting:
    """A network and its labels."""

    name: str
    make: Callable[[], nn.Module]
    noise: float = 0.0
    seeds: range = SEEDS


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    accuracy: float
    largest: float
    near: float
    kurtosis: float
    over: float
    a: float
    b: float


def mlp() -> nn.Module:
    return data.REFERENCES["digits-mlp"].make()


def mlp_with_norms() -> nn.Module:
    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]

    return nn.Sequential(nn.Flatten(), *hidden(64), *hidden(128), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn_with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@lru_cache(maxsize=64)
def digits(seed: int, noise: float) -> data.Split:
    """100 stratified images to train on and all others to test on; some training labels turned into another class."""
    total = 1797
    # Half a sample below, so that rounding in floating point cannot add one.
    split = data.digits(test=(total - SAMPLES - 0.5) / total, seed=seed)
    assert len(split.x) == SAMPLES
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(SAMPLES, generator=generator)[: round(noise * SAMPLES)]
    labels = split.y.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, split.classes, wrong.shape, generator=generator)) % split.classes
    return replace(split, y=labels)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """The weights that companding takes, as the layers use them."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def train(setting: Setting, arm: Arm, seed: int) -> Outcome:
    """One run; accuracy 0 where the loss stopped being a number."""
    split = digits(seed, setting.noise)
    with data.seeded(seed):
        model = setting.make()
    if arm.start is not None:
        model = wc.bake(wc.apply(model, *arm.start))
    if arm.pair is not None:
        model = wc.apply(model, *arm.pair, learn=arm.learn, init=arm.init)
    optimizer = torch.optim.SGD(wc.param_groups(model, arm.lr, arm.decay, arm.lr_scale), momentum=0.9)
    over = 0.0

    @torch.no_grad()
    def after(_: int) -> None:
        nonlocal over
        if arm.clamp is not None:
            for weight in matrices(model):
                weight.clamp_(-arm.clamp, arm.clamp)
        if arm.pair is not None and not arm.learn:
            over = max(over, max(w.abs().max().item() for w in matrices(model)) / (arm.pair[0] * HALF_PI))

    try:
        data.fit(
            model, split.x, split.y, steps=STEPS, batch=BATCH, optimizer=optimizer, schedule="cosine", seed=seed,
            after_step=after,
        )  # fmt: skip
        accuracy = data.accuracy(model, split.x_test, split.y_test)
    except FloatingPointError:
        accuracy = 0.0
    with torch.no_grad():
        w = torch.cat([weight.flatten() for weight in matrices(model)]).to(torch.float64)
    centred = w - w.mean()
    steps = [module for module in model.modules() if isinstance(module, wc.WeightCompander)]
    return Outcome(
        accuracy,
        w.abs().max().item(),
        (w.abs() < NEAR).to(torch.float64).mean().item(),
        (centred.pow(4).mean() / centred.pow(2).mean() ** 2).item(),
        over,
        statistics.mean([step.a.item() for step in steps] or [0.0]),
        statistics.mean([step.b.item() for step in steps] or [0.0]),
    )


def gain(one: Sequence[Outcome], other: Sequence[Outcome]) -> Difference:
    """Points of accuracy between two arms over the same seeds."""
    return paired([100 * x.accuracy for x in one], [100 * y.accuracy for y in other])


class Runs:
    """Outcomes of arms in settings, each trained once."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._known: dict[tuple[str, Arm, range], list[Outcome]] = {}

    def __call__(self, setting: Setting, arm: Arm, seeds: range | None = None) -> list[Outcome]:
        seeds = setting.seeds if seeds is None else seeds
        key = setting.name, arm, seeds
        if key not in self._known:
            self._progress(f"{setting.name}: {arm.name}")
            self._known[key] = [train(setting, arm, seed) for seed in seeds]
        return self._known[key]

    def best(self, setting: Setting, arms: Sequence[Arm]) -> tuple[Arm, list[tuple[Arm, float]]]:
        """The arm of highest mean accuracy on the tuning seeds, and the mean of each."""
        means = [(arm, mean_of(self(setting, arm, TUNING_SEEDS), "accuracy")) for arm in arms]
        return max(means, key=lambda pair: pair[1])[0], means


def mean_of(outcomes: Sequence[Outcome], figure: str) -> float:
    return statistics.mean(getattr(outcome, figure) for outcome in outcomes)


BASE = Arm("weight decay alone")
COMPANDED = tuple(Arm(f"WC a={a} b={b}", (a, b)) for a, b in PAIRS)
# The same function on the plain network's own initial weights, to tell its dynamics from its beginning.
PRESERVED = Arm(f"WC a={PAIRS[0][0]} b={PAIRS[0][1]}, initial weights preserved", PAIRS[0], init="preserve")
CONTROLS: Mapping[str, tuple[Arm, ...]] = {
    "a higher learning rate": tuple(
        Arm(f"learning rate x{factor:g}", lr=LR * factor) for factor in (1.5, 1.5**2, 2.0**2)
    ),
    "stronger decay": tuple(Arm(f"decay {decay:g}", decay=decay) for decay in (1e-3, 2e-3, 5e-3, 1e-2)),
    "a hard clamp": tuple(Arm(f"clamp at {a} π/2", clamp=a * HALF_PI) for a in (0.2, 0.3, 0.4)),
    # Companding makes the initial weights a / b times as large; this has them, and at will the rate too.
    "its beginning": tuple(
        Arm(f"initial weights of {pair}, rate x{factor:g}", start=pair, lr=LR * factor)
        for pair in PAIRS[:2]
        for factor in (1, (pair[0] / pair[1]) ** 2)
    ),
}
MLP = Setting("MLP", mlp)
OTHERS = (
    (Setting("MLP, no decay", mlp), 0.0),
    (Setting(f"MLP, {NOISE:.0%} wrong labels", mlp, NOISE), DECAY),
    (Setting("MLP with batch norms", mlp_with_norms), DECAY),
    (Setting("CNN", cnn, seeds=CNN_SEEDS), DECAY),
    (Setting("CNN with batch norms", cnn_with_norms, seeds=CNN_SEEDS), DECAY),
)
