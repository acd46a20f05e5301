"""Trainings of Weight Compander and its controls on 100 digits.

Every arm of a comparison has, for each seed, the same 100 training images, the same initial draw and the same order of
batches. Whatever has a constant to choose (the pair of WC, and its controls) is chosen by the mean accuracy on other
seeds than those it is compared on.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from benchmarks.measuring import Difference, on_all_cores, paired
from torch import nn
from torch.nn.utils import parametrize

from retensor import data
from retensor.compression import weight_compander as wc
from retensor.compression.weight_compander.reports import kurtosis

SEEDS = range(16)
TUNING_SEEDS = range(100, 108)
SAMPLES = 100
STEPS = 300
BATCH = 50
LR = 0.05
DECAY = 5e-4
NOISE = 0.2
PAIRS = ((0.3, 0.2), (0.2, 0.1), (0.2, 0.2))
NEAR = 0.01
COLLAPSE = 0.10
"""A loss of accuracy, against the same seed without WC, that counts as a collapse."""
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


@dataclass(frozen=True)
class Outcome:
    """One training run; ``over`` is the most of its cap that a weight was after any step."""

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
def digits(seed: int, noise: float = 0.0) -> data.Split:
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


def share_of_cap(model: nn.Module) -> float:
    """The most of its present cap that a companded weight is; 0 where there is none."""
    shares = [
        (module.weight.abs() / module.parametrizations.weight[0].cap).max().item()
        for module in model.modules()
        if parametrize.is_parametrized(module, "weight")
    ]
    return max(shares, default=0.0)


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
        over = max(over, share_of_cap(model))

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
    steps = [module for module in model.modules() if isinstance(module, wc.WeightCompander)]
    return Outcome(
        accuracy,
        w.abs().max().item(),
        (w.abs() < NEAR).to(torch.float64).mean().item(),
        kurtosis(w),
        over,
        statistics.mean([step.a.item() for step in steps] or [0.0]),
        statistics.mean([step.b.item() for step in steps] or [0.0]),
    )


def metric(pair: tuple[float, float]) -> float:
    """How much faster a pair's weights learn near zero."""
    return (pair[0] / pair[1]) ** 2


def gain(one: Sequence[Outcome], other: Sequence[Outcome]) -> Difference:
    """Points of accuracy between two arms over the same seeds."""
    return paired([100 * x.accuracy for x in one], [100 * y.accuracy for y in other])


class Runs:
    """Outcomes of arms in settings, each trained once, on all cores."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._known: dict[tuple[str, Arm, int], Outcome] = {}

    def submit(self, asked: Iterable[tuple[Setting, Arm, Sequence[int]]]) -> None:
        """Train what is not known yet, all at once."""
        jobs = {(setting.name, arm, seed): (setting, arm, seed) for setting, arm, seeds in asked for seed in seeds}
        new = [key for key in jobs if key not in self._known]
        if new:
            found = on_all_cores(train, [jobs[key] for key in new], self._progress, "trainings")
            self._known.update(zip(new, found, strict=True))

    def __call__(self, setting: Setting, arm: Arm, seeds: Sequence[int] = SEEDS) -> list[Outcome]:
        self.submit([(setting, arm, seeds)])
        return [self._known[setting.name, arm, seed] for seed in seeds]

    @property
    def over(self) -> float:
        """The most of its cap that any weight of any training so far was."""
        return max((outcome.over for outcome in self._known.values()), default=0.0)

    def best(self, setting: Setting, arms: Sequence[Arm]) -> tuple[Arm, list[tuple[Arm, float]]]:
        """The arm of highest mean accuracy on the tuning seeds, and the mean of each."""
        self.submit((setting, arm, TUNING_SEEDS) for arm in arms)
        means = [(arm, mean_of(self(setting, arm, TUNING_SEEDS), "accuracy")) for arm in arms]
        return max(means, key=lambda pair: pair[1])[0], means


def mean_of(outcomes: Sequence[Outcome], figure: str) -> float:
    return statistics.mean(getattr(outcome, figure) for outcome in outcomes)


BASE = Arm("plain")
COMPANDED = tuple(Arm(f"WC a={a} b={b}", (a, b)) for a, b in PAIRS)
# Companding makes the initial weights a / b times as large; these arms have them, and no function.
BEGUN = {arm: Arm(f"initial weights of {arm.pair}", start=arm.pair) for arm in COMPANDED}
# The same function on the plain network's own initial weights, to tell its dynamics from its beginning.
PRESERVED = Arm(f"WC a={PAIRS[0][0]} b={PAIRS[0][1]}, initial weights preserved", PAIRS[0], init="preserve")
CONTROLS: Mapping[str, tuple[Arm, ...]] = {
    "a higher learning rate": tuple(
        Arm(f"learning rate x{factor:g}", lr=LR * factor) for factor in (1.5, 1.5**2, 2.0**2)
    ),
    "stronger decay": tuple(Arm(f"decay {decay:g}", decay=decay) for decay in (1e-3, 2e-3, 5e-3, 1e-2)),
    "a hard clamp": tuple(Arm(f"clamp at {a} π/2", clamp=a * HALF_PI) for a in (0.2, 0.3, 0.4)),
    "its beginning": tuple(
        arm
        for pair, begun in zip(PAIRS[:2], list(BEGUN.values())[:2], strict=True)
        for arm in (begun, replace(begun, name=f"{begun.name}, rate x{metric(pair):g}", lr=LR * metric(pair)))
    ),
}
LEARNED = tuple(Arm(f"WC learned, rate x{scale:g}", PAIRS[0], learn=True, lr_scale=scale) for scale in (1, 1e-2, 1e-3))
MLP = Setting("MLP", mlp)
OTHERS = (
    (Setting("MLP, no decay", mlp), 0.0),
    (Setting(f"MLP, {NOISE:.0%} wrong labels", mlp, NOISE), DECAY),
    (Setting("MLP with batch norms", mlp_with_norms), DECAY),
    (Setting("CNN", cnn), DECAY),
    (Setting("CNN with batch norms", cnn_with_norms), DECAY),
)


def planned() -> Iterator[tuple[Setting, Arm, Sequence[int]]]:
    """Everything that is trained whatever the tuning finds."""
    for arm in (*COMPANDED, *(arm for grid in CONTROLS.values() for arm in grid)):
        yield MLP, arm, TUNING_SEEDS
    for arm in (BASE, *COMPANDED, PRESERVED, *LEARNED):
        yield MLP, arm, SEEDS
    for setting, plain, arm in others():
        yield setting, plain, SEEDS
        yield setting, arm, SEEDS


def others() -> Iterator[tuple[Setting, Arm, Arm]]:
    """The other settings, each with its plain arm and that of WC."""
    for setting, decay in OTHERS:
        yield setting, replace(BASE, decay=decay), replace(COMPANDED[0], decay=decay)
