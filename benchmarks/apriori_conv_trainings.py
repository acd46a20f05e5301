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
from benchmarks.measuring import Mean, on_all_cores
from torch import nn

import retensor as rt
from retensor.compression import apriori as ap
from retensor.data import fit, seeded

GRID, TIMES, ROLLOUT = 32, 42, 20
NOISE = 0.01
loss = ap.step_loss(NOISE)
TRAIN, FEW, TEST, VALIDATION = 30, 4, 16, 8
SEEDS = tuple(range(5))
STEPS, TUNING_STEPS, BATCH = 400, 150, 8
RATES = (3e-3, 1e-2, 3e-2)
SMALL = (8, 9)
"""Widths of dense networks with a little less and a little more parameters than the compressed one."""
KINDS = ("dense", "cp24", "cp12", "vh", "tucker", "tt", *(f"dense{width}" for width in SMALL), "depthwise")
FEW_KINDS = ("dense", "cp24", f"dense{SMALL[0]}")
OTHER_FORMATS, OTHER_SEEDS = ("vh", "tucker", "tt"), SEEDS[:3]
NAMES = {
    "dense": "dense, width 24", "cp24": "cp, R = 24", "cp12": "cp, R = 12", "vh": "vh, as large as cp, R = 24",
    "tucker": "tucker, as large", "tt": "tt, as large", "depthwise": "depthwise-separable, as large",
    **{f"dense{width}": f"dense, width {width}" for width in SMALL},
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training: relative L2 errors of one step on training and unseen sources, and of a rollout on unseen ones."""

    kind: str
    sources: int
    seed: int
    parameters: int
    train: float
    test: float
    rollout: float

    @property
    def gap(self) -> float:
        return self.test - self.train


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
def data() -> torch.Tensor:
    """Trajectories: those for tests, those for tuning, and each seed's own for training."""
    sources = TEST + VALIDATION + TRAIN * (len(SEEDS) + 1)
    found: torch.Tensor = ap.wave2d(n=GRID, steps=TIMES, sources=sources, solver="fem", seed=0)["u"]
    return found


def trajectories(part: str, seed: int = 0, sources: int = TRAIN) -> torch.Tensor:
    if part == "test":
        return data()[:TEST]
    if part == "validation":
        return data()[TEST : TEST + VALIDATION]
    start = TEST + VALIDATION + TRAIN * seed
    return data()[start : start + sources]


@torch.no_grad()
def one_step(model: nn.Module, u: torch.Tensor) -> float:
    """The error of one step, over all pairs."""
    x, y = ap.pairs(u)
    parts = [ap.relative_l2(model(a), b) * len(a) for a, b in zip(x.split(256), y.split(256), strict=True)]
    return float(sum(parts)) / len(x)


def rolled(model: nn.Module, u: torch.Tensor) -> float:
    """The error of all states of a rollout together, from three starts."""
    starts = range(0, u.shape[1] - ROLLOUT - 1, 10)
    errors = [
        ap.relative_l2(ap.rollout(model, u[:, at : at + 2], ROLLOUT), u[:, at + 2 : at + 2 + ROLLOUT]).item()
        for at in starts
    ]
    return statistics.mean(errors)


def train(kind: str, sources: int, seed: int, rate: float, steps: int, part: str) -> Run:
    """Train one network and measure it on a part of the unseen sources."""
    u, unseen = trajectories("train", seed, sources), trajectories(part)
    x, y = ap.pairs(u)
    model = build(kind, seed).normalise_(x, y)
    try:
        fit(model, x, y, steps=steps, batch=BATCH, lr=rate, weight_decay=0, loss=loss, seed=seed)
    except FloatingPointError:
        # A rate that is too high for this kind.
        return Run(kind, sources, seed, count(model), math.inf, math.inf, math.inf)
    return Run(kind, sources, seed, count(model), one_step(model, u), one_step(model, unseen), rolled(model, unseen))


def tuned(progress: Callable[[str], None]) -> dict[str, float]:
    """The learning rate of each kind, by validation sources and a seed that is not used again."""
    seed = len(SEEDS)
    jobs = [(kind, TRAIN, seed, rate, TUNING_STEPS, "validation") for kind in KINDS for rate in RATES]
    runs = on_all_cores(train, jobs, progress, "trainings")
    best: dict[str, float] = {}
    for kind in KINDS:
        found = {job[3]: run.test for job, run in zip(jobs, runs, strict=True) if job[0] == kind}
        best[kind] = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
    return best


def of(runs: Sequence[Run], kind: str, sources: int, what: str) -> list[float]:
    """One figure of all seeds, in their order; of ``small`` what dense networks of the compressed size would have."""
    if kind == "small":
        size = of(runs, "cp24", sources, "parameters")[0]
        (low, high) = (of(runs, f"dense{width}", sources, "parameters")[0] for width in SMALL)
        share = math.log(size / low) / math.log(high / low)
        ends = [of(runs, f"dense{width}", sources, what) for width in SMALL]
        return [math.exp((1 - share) * math.log(a) + share * math.log(b)) for a, b in zip(*ends, strict=True)]
    mine = sorted((run for run in runs if run.kind == kind and run.sources == sources), key=lambda run: run.seed)
    return [getattr(run, what) for run in mine]


def ratio(runs: Sequence[Run], kind: str, other: str, what: str, sources: int = TRAIN) -> Mean:
    """The mean ratio of a figure between two kinds, paired by seeds."""
    pairs = zip(of(runs, kind, sources, what), of(runs, other, sources, what), strict=True)
    return Mean.of([one / two for one, two in pairs], digits=3)
