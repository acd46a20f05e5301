"""Trainings of wave simulators, dense and compressed a priori.

Waves are made by the finite-element solver on a 32x32 grid. A residual network of three 5x5 convolutions of width 24
learns the next state from two; its compressed forms have the same topology. Everything is trained on some source
positions and tested on others.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarks.measuring import Mean, on_all_cores, verdict
from torch import nn

import retensor as rt
from retensor.claims import Verdict
from retensor.compression import apriori as ap
from retensor.data import fit, seeded
from retensor.graph.modes import evaluating

GRID, TIMES, ROLLOUT = 32, 42, 20
TRAIN_SOURCES, FEW_SOURCES, TEST, VALIDATION = 30, 4, 16, 8
SEEDS = tuple(range(5))
STEPS, BATCH, NOISE = 800, 8, 0.01
RATES = (3e-3, 1e-2, 3e-2, 6e-2)
SMALL = (8, 9)
"""Widths of dense networks with a little less and a little more parameters than the compressed one."""
FORMATS, FORMAT_SEEDS = ("cp12", "vh", "tucker", "tt"), SEEDS[:3]
KINDS = ("dense", "cp24", *(f"dense{width}" for width in SMALL), "depthwise", *FORMATS)
NAMES = {
    "dense": "dense, width 24", "cp24": "cp, R = 24", "cp12": "cp, R = 12", "vh": "vh, as large as cp, R = 24",
    "tucker": "tucker, as large", "tt": "tt, as large", "depthwise": "depthwise-separable, as large",
    **{f"dense{width}": f"dense, width {width}" for width in SMALL},
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """What a network is trained on, and how long."""

    sources: int = TRAIN_SOURCES
    noise: float = NOISE
    steps: int = STEPS


FULL, HALF = Training(), Training(steps=STEPS // 2)
CLEAN, FEW = Training(noise=0.0), Training(sources=FEW_SOURCES)
TRAINED: dict[Training, tuple[str, ...]] = {
    FULL: KINDS, CLEAN: ("dense", "cp24", *(f"dense{width}" for width in SMALL)), FEW: ("dense", "cp24"),
    HALF: ("dense", "cp24"),
}  # fmt: skip
"""Which networks are trained how."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes
    ----------
    train, test, rollout : float
        Relative L2 errors of one step on training and unseen sources, and of rollouts on unseen ones; infinite where
        training broke off.
    diverged : float
        The share of rollouts that are further off than a field of zeros.
    """

    kind: str
    training: Training
    seed: int
    parameters: int
    train: float = math.inf
    test: float = math.inf
    rollout: float = math.inf
    diverged: float = 1.0

    @property
    def gap(self) -> float:
        return self.test - self.train if math.isfinite(self.test) else math.inf


@dataclass(frozen=True)
class Ratio:
    """A figure over another's of the same seeds: the geometric mean of the ratios, and its 95 % interval.

    Errors of rollouts scatter over orders of magnitude, where the arithmetic mean is that of the worst seed.
    """

    mean: float
    low: float
    high: float
    broken: int = 0
    """Seeds whose training of the former broke off; they have no ratio."""
    seeds: int = 0

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        broken = sum(not math.isfinite(one) for one in ours)
        both = [(one, other) for one, other in zip(ours, theirs, strict=True) if math.isfinite(one + other)]
        if len(both) < 2:
            return cls(math.nan, 0.0, math.inf, broken, len(ours))
        logs = Mean.of([math.log(one) - math.log(other) for one, other in both])
        ends = (logs.mean, logs.mean - logs.half, logs.mean + logs.half)
        return cls(*(math.exp(min(end, 700.0)) for end in ends), broken, len(ours))

    def below(self, limit: float) -> Verdict:
        """Whether it is better: held where the whole interval lies below a limit."""
        return verdict(not self.broken and self.high < limit)

    def within(self, limit: float) -> Verdict:
        """Whether it is no worse: held where the whole interval keeps to a limit, partly where only the mean does."""
        return verdict(not self.broken and self.high <= limit, not self.broken and self.mean <= limit)

    def __str__(self) -> str:
        if self.broken:
            return f"diverged in {self.broken} of {self.seeds} seeds"
        return f"{self.mean:.3g} ({self.low:.3g} to {self.high:.3g})"


class DepthwiseSeparable(nn.Sequential):
    """A filter of all axes for each channel, then a mix of channels (L. Sifre, S. Mallat 2014), started to scale."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, kernel, padding=kernel // 2, groups=inputs, bias=False),
            nn.Conv2d(inputs, outputs, 1),
        )
        nn.init.normal_(self[0].weight, std=1 / kernel)
        nn.init.kaiming_normal_(self[1].weight)
        nn.init.zeros_(self[1].bias)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def build(kind: str, seed: int) -> ap.WaveStepper:
    """A network of that kind, untrained."""
    width = depthwise_width() if kind == "depthwise" else 0
    with seeded(seed):
        if kind.startswith("dense"):
            return ap.WaveStepper(int(kind.removeprefix("dense") or 24))
        if kind == "depthwise":
            return depthwise(width)
        dense = ap.WaveStepper()
    if kind.startswith("cp"):
        return ap.compress(dense, rank=int(kind.removeprefix("cp")), seed=seed)
    return ap.compress(dense, ratio=kernel_ratio(), format=kind, seed=seed)


def depthwise(width: int) -> ap.WaveStepper:
    model = ap.WaveStepper(width)
    return rt.replace(model, {"body.conv*": lambda conv: DepthwiseSeparable(conv.in_channels, conv.out_channels, 5)})


@functools.cache
def depthwise_width() -> int:
    """The width with which a depthwise-separable network is nearest to the compressed one in parameters."""
    target = count(build("cp24", 0))
    return min(range(8, 64), key=lambda width: abs(count(depthwise(width)) - target))


@functools.cache
def kernel_ratio() -> float:
    """What ``ratio`` gives other formats the parameters of cp at R = 24, all kernels together."""
    dense = ap.WaveStepper()
    target = sum(choice.parameters for choice in ap.choices(dense, rank=24, exclude=("head",)))
    return sum(choice.dense_parameters for choice in ap.choices(dense, rank=24, exclude=("head",))) / target


@functools.cache
def waves() -> dict[str, torch.Tensor]:
    """Trajectories and the places of their sources: those for tests, for tuning, and each seed's own for training."""
    sources = TEST + VALIDATION + TRAIN_SOURCES * (len(SEEDS) + 1)
    found: dict[str, torch.Tensor] = ap.wave2d(n=GRID, steps=TIMES, sources=sources, solver="fem", seed=0)
    return found


def part(name: str, seed: int = 0, sources: int = TRAIN_SOURCES) -> slice:
    """Which trajectories serve what."""
    if name == "test":
        return slice(TEST)
    if name == "validation":
        return slice(TEST, TEST + VALIDATION)
    start = TEST + VALIDATION + TRAIN_SOURCES * seed
    return slice(start, start + sources)


def trajectories(name: str, seed: int = 0, sources: int = TRAIN_SOURCES) -> torch.Tensor:
    return waves()["u"][part(name, seed, sources)]


@torch.no_grad()
def one_step(model: nn.Module, u: torch.Tensor) -> float:
    """The error of one step, over all pairs."""
    x, y = ap.pairs(u)
    with evaluating(model):
        parts = [ap.relative_l2(model(a), b) * len(a) for a, b in zip(x.split(256), y.split(256), strict=True)]
    return float(sum(parts)) / len(x)


def rolled(model: nn.Module, u: torch.Tensor) -> tuple[float, float]:
    """The error of all states of a rollout together, the mean of three starts; and the share above 1."""
    errors = []
    for at in range(0, u.shape[1] - ROLLOUT - 1, 10):
        true = u[:, at + 2 : at + 2 + ROLLOUT].double()
        apart = ap.rollout(model, u[:, at : at + 2], ROLLOUT).double() - true
        errors.append(apart.flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1))
    found = torch.cat(errors).nan_to_num(math.inf, math.inf)
    return found.mean().item(), (found > 1).double().mean().item()


def train(kind: str, training: Training, seed: int, rate: float, name: str) -> Run:
    """Train one network and measure it on a part of the unseen sources."""
    u, unseen = trajectories("train", seed, training.sources), trajectories(name)
    x, y = ap.pairs(u)
    model = build(kind, seed).normalise_(x, y)
    try:
        fit(
            model, x, y, steps=training.steps, batch=BATCH, lr=rate, weight_decay=0, loss=ap.step_loss(training.noise),
            seed=seed,
        )  # fmt: skip
    except FloatingPointError:
        # A rate that is too high for this kind.
        return Run(kind, training, seed, count(model))
    if name == "validation":
        return Run(kind, training, seed, count(model), test=one_step(model, unseen))
    # A third of the training sources tells the error on them as well.
    errors = one_step(model, u[:10]), one_step(model, unseen), *rolled(model, unseen)
    return Run(kind, training, seed, count(model), *errors)


Rates = dict[tuple[str, Training], dict[float, float]]
"""Errors on validation sources by learning rate, for each kind and training."""


def tuned(progress: Callable[[str], None]) -> Rates:
    """Errors at each learning rate, after as many steps as count, with a seed that is not used again."""
    jobs = [
        (kind, training, len(SEEDS), rate, "validation")
        for training, kinds in TRAINED.items()
        if training != HALF
        for kind in kinds
        for rate in RATES
    ]
    runs = on_all_cores(train, jobs, progress, "trainings for learning rates")
    found: Rates = {}
    for (kind, training, _, rate, _), run in zip(jobs, runs, strict=True):
        found.setdefault((kind, training), {})[rate] = run.test if math.isfinite(run.test) else math.inf
    return found


def best(rates: Rates, kind: str, training: Training) -> float:
    """The best learning rate; half a training takes that of the whole."""
    errors = rates[kind, FULL if training == HALF else training]
    return min(errors, key=lambda rate: errors[rate])


def trained(rates: Rates, progress: Callable[[str], None]) -> list[Run]:
    """All runs on test sources."""
    jobs = [
        (kind, training, seed, best(rates, kind, training), "test")
        for training, kinds in TRAINED.items()
        for kind in kinds
        for seed in (FORMAT_SEEDS if kind in FORMATS else SEEDS)
    ]
    return on_all_cores(train, jobs, progress, "trainings")


def of(runs: Sequence[Run], kind: str, what: str, training: Training = FULL) -> list[float]:
    """One figure of all seeds, in their order; of ``small`` what dense networks of the compressed size would have."""
    if kind == "small":
        size = of(runs, "cp24", "parameters", training)[0]
        (low, high) = (of(runs, f"dense{width}", "parameters", training)[0] for width in SMALL)
        share = math.log(size / low) / math.log(high / low)
        ends = [of(runs, f"dense{width}", what, training) for width in SMALL]
        return [math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in zip(*ends, strict=True)]
    mine = sorted((run for run in runs if run.kind == kind and run.training == training), key=lambda run: run.seed)
    return [getattr(run, what) for run in mine]


def ratio(runs: Sequence[Run], kind: str, other: str, what: str, training: Training = FULL) -> Ratio:
    """The ratio of a figure between two kinds, paired by seeds."""
    return Ratio.of(of(runs, kind, what, training), of(runs, other, what, training))


def diverged(runs: Sequence[Run], kind: str, training: Training = FULL) -> float:
    """The share of rollouts of all seeds that are further off than a field of zeros."""
    return statistics.fmean(of(runs, kind, "diverged", training))


DECODER_SEEDS, DECODER_STEPS, DECODER_TIMES = SEEDS[:3], 600, slice(8, 24, 4)


def decode(compressed: bool, seed: int, rate: float, name: str) -> tuple[int, float]:
    """Train a decoder from places of sources to fields at four times: its parameters and error on unseen places."""

    def pair(which: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return waves()["positions"][which], waves()["u"][which, DECODER_TIMES]

    x, y = pair(slice(TEST + VALIDATION, None))
    with seeded(seed):
        model: nn.Module = ap.FieldDecoder(2, fields=y.shape[1], n=GRID, width=16)
    if compressed:
        model = ap.compress(model, ratio=4, seed=seed)
    try:
        fit(
            model, x, y, steps=DECODER_STEPS, batch=BATCH, lr=rate, weight_decay=0, seed=seed,
            loss=lambda model, x, y: ap.relative_l2(model(x), y),
        )  # fmt: skip
    except FloatingPointError:
        return count(model), math.inf
    x, y = pair(part(name))
    with torch.no_grad(), evaluating(model):
        return count(model), ap.relative_l2(model(x), y).item()


@dataclass(frozen=True)
class Decoded:
    """A kind of decoder: its parameters, its best learning rate, and errors on unseen places by seed."""

    parameters: int
    rate: float
    errors: list[float]


def decoders(progress: Callable[[str], None]) -> dict[bool, Decoded]:
    """Compressed decoders and dense ones, each at its best rate on validation places."""
    both = (True, False)
    jobs = [(compressed, len(SEEDS), rate, "validation") for compressed in both for rate in RATES]
    tried = dict(zip(jobs, on_all_cores(decode, jobs, progress, "decoders for learning rates"), strict=True))
    rates = {key: min((job for job in jobs if job[0] == key), key=lambda job: tried[job][1])[2] for key in both}
    last = [(compressed, seed, rates[compressed], "test") for compressed in both for seed in DECODER_SEEDS]
    found = on_all_cores(decode, last, progress, "decoders")
    return {
        key: Decoded(
            next(size for job, (size, _) in tried.items() if job[0] == key),
            rates[key],
            [error for job, (_, error) in zip(last, found, strict=True) if job[0] == key],
        )
        for key in both
    }
