"""A-priori compressed convolutions as wave simulators, against dense ones, smaller dense ones and depthwise ones.

Waves are made by the finite-element solver on a 32x32 grid. A residual network of three 5x5 convolutions of width 24
learns the next state from two; its compressed forms have the same topology. Everything is trained on some source
positions and tested on others.

    retensor claims apriori_conv
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import joblib
import numpy as np
import torch
from torch import nn

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import apriori as ap
from retensor.data import fit, seeded

SOURCE = (
    "S. Boukraichi, N. Akkari, F. Casenave, D. Ryckelynck, A priori compression of convolutional neural networks for "
    "wave simulators, 2023, arXiv 2304.04964; tensorly-torch, FactorizedConv."
)
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


def in_parallel(jobs: Sequence[tuple[Any, ...]], progress: Callable[[str], None]) -> list[Run]:
    """Run trainings in two processes of one thread each."""
    # Workers import the function by a name that they can find.
    here = importlib.import_module("benchmarks.claim_apriori_conv")
    progress(f"{len(jobs)} trainings")
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        return joblib.Parallel(n_jobs=2)(joblib.delayed(here.train)(*job) for job in jobs)


def tuned(progress: Callable[[str], None]) -> dict[str, float]:
    """The learning rate of each kind, by validation sources and a seed that is not used again."""
    seed = len(SEEDS)
    jobs = [(kind, TRAIN, seed, rate, TUNING_STEPS, "validation") for kind in KINDS for rate in RATES]
    runs = in_parallel(jobs, progress)
    best: dict[str, float] = {}
    for kind in KINDS:
        found = {job[3]: run.test for job, run in zip(jobs, runs, strict=True) if job[0] == kind}
        best[kind] = min(found, key=lambda rate: found[rate] if math.isfinite(found[rate]) else math.inf)
    return best


def mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / math.sqrt(len(values))


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


def ratio(runs: Sequence[Run], kind: str, other: str, what: str, sources: int = TRAIN) -> tuple[float, float]:
    """The mean ratio of a figure between two kinds, paired by seeds, and its standard error."""
    pairs = zip(of(runs, kind, sources, what), of(runs, other, sources, what), strict=True)
    ratios = [one / two for one, two in pairs]
    return mean(ratios), error(ratios)


def shown(pair: tuple[float, float]) -> str:
    return f"{pair[0]:.3f} ± {pair[1]:.3f}"


def below(pair: tuple[float, float], limit: float) -> Verdict:
    """Held where a figure is within its limit, partly where the limit lies within two standard errors of it."""
    if pair[0] <= limit:
        return "held"
    return "partly held" if pair[0] - 2 * pair[1] <= limit else "not held"


def clearly_below(pair: tuple[float, float], limit: float) -> Verdict:
    """Held where a figure is two standard errors below its limit, partly where it is below."""
    if pair[0] + 2 * pair[1] < limit:
        return "held"
    return "partly held" if pair[0] < limit else "not held"


def times(functions: Sequence[Callable[[], Any]], repetitions: int) -> list[float]:
    """Median seconds of each, run in turns."""
    taken: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repetitions):
        for mine, function in zip(taken, functions, strict=True):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in taken]


def plain_net(width: int, kernel: int) -> nn.Sequential:
    """The convolutions of a stepper, in a row."""
    model = ap.WaveStepper(width, kernel=kernel)
    return nn.Sequential(*model.body, model.head)


def tensorly_net(width: int, kernel: int, rank: int) -> nn.Sequential:
    """The same with tensorly-torch's factorised layers."""
    import tltorch

    def peer(conv: nn.Conv2d) -> nn.Module:
        layer = tltorch.FactorizedConv(
            conv.in_channels, width, kernel, order=2, padding=kernel // 2, bias=True, factorization="cp", rank=rank,
            implementation="factorized",
        )  # fmt: skip
        layer.reset_parameters()
        return layer

    return rt.replace(plain_net(width, kernel), {"[024]": peer})


@dataclass(frozen=True)
class Speed:
    """Seconds of a run and of a training step, by network."""

    width: int
    kernel: int
    forward: dict[str, float]
    training: dict[str, float]
    macs: float

    def ratio(self, name: str, training: bool = False) -> float:
        """To the faster of the dense networks in the two memory formats."""
        found = self.training if training else self.forward
        return found[name] / min(found["dense"], found["dense, channels last"])


def speed(width: int, kernel: int) -> Speed:
    dense = plain_net(width, kernel)
    nets: dict[str, nn.Module] = {
        "dense": dense,
        "dense, channels last": plain_net(width, kernel).to(memory_format=torch.channels_last),
        "cp": ap.compress(dense, rank=width),
        "cp, fused": ap.compress(dense, rank=width, implementation="fused"),
        "cp, recomputed": ap.compress(dense, rank=width, recompute=True),
        "tensorly-torch": tensorly_net(width, kernel, width),
    }
    x = torch.randn(BATCH, 2, GRID, GRID, generator=torch.Generator().manual_seed(0))
    last = x.contiguous(memory_format=torch.channels_last)
    given = {name: last if "channels last" in name or name.startswith("cp") else x for name in nets}

    def forward(name: str) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad():
                nets[name](given[name])

        return run

    def step(name: str) -> Callable[[], None]:
        def run() -> None:
            nets[name].zero_grad(set_to_none=True)
            nets[name](given[name]).square().mean().backward()

        return run

    repetitions = 30 if width < 32 else 12
    seconds = [times([make(name) for name in nets], repetitions) for make in (forward, step)]
    told = ap.summary(nets["cp"], x).total
    return Speed(
        width, kernel, dict(zip(nets, seconds[0], strict=True)), dict(zip(nets, seconds[1], strict=True)),
        told.macs / told.dense_macs,
    )  # fmt: skip


def speed_in_space() -> tuple[int, float, float]:
    """Of one layer for fields in space: parameters that cp saves, its share of multiply-accumulates and of time."""
    dense = nn.Conv3d(24, 24, 5, padding=2)
    layer = ap.factored(dense, 24)
    x = torch.randn(2, 24, 16, 16, 16)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        seconds = times([lambda: dense(x), lambda: dense(last), lambda: layer(last)], 9)
    told = ap.summary(layer, x).total
    return told.dense_parameters - told.parameters, told.macs / told.dense_macs, seconds[2] / min(seconds[:2])


def peak(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Bytes that a training step with Adam needs: what stays (weights and two moments), and the most that comes on top.

    The latter is what torch's profiler sees the allocator give and take.
    """
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss(model, x, y).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss(model, x, y).backward()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return 3 * 4 * count(model), most


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Of a power law, by least squares on both logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def growth() -> list[tuple[str, list[int], list[float], float]]:
    """Seconds of one layer as its rank, its pixels or its kernel grow; the exponent of each."""

    def run(layer: nn.Module, x: torch.Tensor) -> Callable[[], None]:
        x = x.contiguous(memory_format=torch.channels_last)
        layer = layer.to(memory_format=torch.channels_last)

        def function() -> None:
            with torch.no_grad():
                layer(x)

        return function

    x = torch.randn(BATCH, 32, 64, 64)
    ranks, sides, kernels = [64, 128, 256, 512], [32, 64, 128, 256], [3, 5, 7, 11, 15]
    rows = []
    by_rank = [run(ap.CPConv2d(32, 32, 15, padding=7, rank=rank), x) for rank in ranks]
    rows.append(("cp, rank", ranks, times(by_rank, 7)))
    one = ap.CPConv2d(32, 32, 5, padding=2, rank=32)
    by_pixels = [run(one, torch.randn(2, 32, side, side)) for side in sides]
    rows.append(("cp, pixels", [side**2 for side in sides], times(by_pixels, 15)))
    by_kernel = [run(ap.CPConv2d(32, 32, k, padding=k // 2, rank=32), x) for k in kernels]
    rows.append(("cp, kernel size", kernels, times(by_kernel, 15)))
    dense = [run(nn.Conv2d(32, 32, k, padding=k // 2), x) for k in kernels]
    rows.append(("dense, kernel size", kernels, times(dense, 7)))
    return [(name, sizes, seconds, exponent(sizes, seconds)) for name, sizes, seconds in rows]


def solver_truth() -> tuple[list[float], list[float], float]:
    """Orders in ``h`` and in ``dt`` by the standing mode, and the largest relative change of the energy."""
    by_h, by_dt = [], []
    for n in (15, 31, 63):
        mesh = ap.Mesh(n)
        y, x = mesh.points
        mode = np.sin(np.pi * x) * np.sin(np.pi * y)
        end = ap.newmark(mesh, mode, dt=1 / 1024, steps=512).u[0, -1]
        by_h.append(np.abs(end - mode * math.cos(math.sqrt(2) * math.pi / 2)).max())
    ends = [ap.newmark(mesh, mode, dt=0.5 / steps, steps=steps).u[0, -1] for steps in (16, 32, 64, 128)]
    by_dt = [np.abs(ends[i] - ends[i + 1]).max() for i in range(3)]
    mesh = ap.Mesh(31)
    start = np.random.default_rng(0).standard_normal((2, 1, 31, 31))
    total = ap.energy(mesh, ap.newmark(mesh, start[0], start[1], dt=0.05, steps=1000, velocity=True))
    orders = [[float(np.log2(e[i] / e[i + 1])) for i in range(2)] for e in (by_h, by_dt)]
    return orders[0], orders[1], float(np.abs(total / total[:, :1] - 1).max())


def measure(progress: Callable[[str], None]) -> Report:
    progress("solver")
    orders_h, orders_dt, drift = solver_truth()
    progress("speed")
    narrow, wide = speed(24, 5), speed(64, 7)
    space = speed_in_space()
    progress("growth")
    grown = growth()
    progress("memory and traffic")
    x, y = ap.pairs(trajectories("train"))
    dense = build("dense", 0).normalise_(x, y)
    forms = {
        "dense": dense,
        "cp, R = 24": ap.compress(dense, rank=24),
        "cp, R = 24, fused": ap.compress(dense, rank=24, implementation="fused"),
        "cp, R = 24, recomputed": ap.compress(dense, rank=24, recompute=True),
    }
    peaks = {name: peak(model, x[:BATCH], y[:BATCH]) for name, model in forms.items()}
    scratchpad = rt.cost(dense, (1, 2, GRID, GRID), time_limit=5).m_r_bytes
    both = rt.compare(
        dense,
        forms["cp, R = 24"],
        inputs=(1, 2, GRID, GRID),
        accelerator=scratchpad,
        names=["dense", "cp"],
        time_limit=5,
    )
    progress("learning rates")
    rates = tuned(progress)
    jobs = [
        (kind, TRAIN, seed, rates[kind], STEPS, "test")
        for kind in KINDS
        for seed in (OTHER_SEEDS if kind in OTHER_FORMATS else SEEDS)
    ]
    jobs += [(kind, FEW, seed, rates[kind], STEPS, "test") for kind in FEW_KINDS for seed in SEEDS]
    runs = in_parallel(jobs, progress)
    claims = [
        *accuracy_claims(runs),
        overfitting_claim(runs),
        *speed_claims(narrow, wide),
        space_claim(*space),
        memory_claim(peaks),
        growth_claim(grown),
        traffic_claim(both, scratchpad),
        solver_claim(orders_h, orders_dt, drift),
    ]
    tables = [accuracy_table(runs, rates), speed_table(narrow, wide), memory_table(peaks), growth_table(grown)]
    libraries = ("torch", "scikit-fem", "tensorly-torch", "numpy", "joblib")
    return Report("apriori_conv", "A-priori convolutions for wave simulators", SOURCE, claims, tables, libraries)


def setting(sources: int) -> str:
    return (
        f"finite-element waves on {GRID}x{GRID}, {sources} training sources, {TEST} unseen ones, {STEPS} Adam steps of "
        f"batch {BATCH} with noise of {NOISE:.0%} on inputs, {len(SEEDS)} "
        f"seeds; learning rates of all by {VALIDATION} validation sources"
    )


def accuracy_claims(runs: Sequence[Run]) -> list[Claim]:
    sizes = [of(runs, kind, TRAIN, "parameters")[0] for kind in ("dense", "cp24")]
    less = f"{sizes[0]:,} parameters, {sizes[1]:,} compressed, {sizes[0] / sizes[1]:.1f} times fewer"
    plain, roll = (ratio(runs, "cp24", "dense", what) for what in ("test", "rollout"))
    small, small_roll = (ratio(runs, "cp24", "small", what) for what in ("test", "rollout"))
    depth, depth_roll = (ratio(runs, "cp24", "depthwise", what) for what in ("test", "rollout"))
    return [
        Claim(
            "Accuracy equivalent to classical convolutions with fewer trainable parameters: one step ahead.",
            f"{setting(TRAIN)}; {less}",
            "the same network with dense convolutions",
            "equivalent; the bar here is 15 % above",
            f"relative L2 error {shown(plain)} of dense",
            below(plain, 1.15),
        ),
        Claim(
            f"The same over a rollout of {ROLLOUT} steps.",
            f"{setting(TRAIN)}; {less}",
            "the same network with dense convolutions",
            "equivalent; the bar here is 15 % above",
            f"relative L2 error {shown(roll)} of dense",
            below(roll, 1.15),
        ),
        Claim(
            "(ours) The compressed network is better than a small dense one of as many parameters.",
            setting(TRAIN),
            f"dense networks of widths {SMALL[0]} and {SMALL[1]}, interpolated to {sizes[1]:,} parameters",
            "below 1",
            f"one step {shown(small)}, rollout {shown(small_roll)} of its error",
            worst(clearly_below(small, 1), clearly_below(small_roll, 1)),
        ),
        Claim(
            "(ours) It is better than a depthwise-separable one of as many parameters.",
            setting(TRAIN),
            f"depthwise-separable 5x5 convolutions, width {depthwise_width()}, "
            f"{of(runs, 'depthwise', TRAIN, 'parameters')[0]:,} parameters",
            "below 1",
            f"one step {shown(depth)}, rollout {shown(depth_roll)} of its error",
            worst(clearly_below(depth, 1), clearly_below(depth_roll, 1)),
        ),
    ]


def worst(*verdicts: Verdict) -> Verdict:
    """Held where all are, not held where none is, partly else."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "partly held"


def overfitting_claim(runs: Sequence[Run]) -> Claim:
    gaps = {kind: of(runs, kind, FEW, "gap") for kind in ("dense", "cp24")}
    apart = [one - two for one, two in zip(gaps["cp24"], gaps["dense"], strict=True)]
    test = ratio(runs, "cp24", "dense", "test", FEW)
    return Claim(
        "Overfitting is reduced.",
        setting(FEW),
        "the same network with dense convolutions",
        "a gap between unseen and training sources no larger than dense",
        f"gap {mean(gaps['cp24']):.4f}, dense {mean(gaps['dense']):.4f}, difference {mean(apart):.4f} ± "
        f"{error(apart):.4f}; error on unseen sources {shown(test)} of dense",
        below((mean(apart), error(apart)), 0),
        "The gap is the relative L2 error of one step on unseen sources less that on training sources.",
    )


def speed_claims(narrow: Speed, wide: Speed) -> list[Claim]:
    threads = f"batch {BATCH}, {GRID}x{GRID}, {torch.get_num_threads()} threads of a CPU"
    return [
        Claim(
            "Shorter prediction times.",
            f"the whole network, {threads}; width 24 with 5x5 and R = 24, width 64 with 7x7 and R = 64",
            "dense convolutions, in the faster of two memory formats",
            "shorter; the bars here are 0.7 and 0.35 of dense",
            f"{narrow.ratio('cp'):.2f} and {wide.ratio('cp'):.2f} of dense, with {narrow.macs:.2f} and "
            f"{wide.macs:.2f} of its multiply-accumulates",
            worst(below((narrow.ratio("cp"), 0), 0.7), below((wide.ratio("cp"), 0), 0.35)),
        ),
        Claim(
            "Shorter training times.",
            f"forward and backward pass, {threads}; the same two networks",
            "dense convolutions, in the faster of two memory formats",
            "shorter",
            f"{narrow.ratio('cp', True):.2f} and {wide.ratio('cp', True):.2f} of dense",
            worst(below((narrow.ratio("cp", True), 0), 1), below((wide.ratio("cp", True), 0), 1)),
        ),
        Claim(
            "(ours) Faster than the same factors in tensorly-torch.",
            f"forward pass, {threads}; the same two networks",
            "tltorch.FactorizedConv, factorization cp, implementation factorized",
            "below 1",
            f"{narrow.forward['cp'] / narrow.forward['tensorly-torch']:.2f} and "
            f"{wide.forward['cp'] / wide.forward['tensorly-torch']:.2f} of its time",
            worst(*(below((s.forward["cp"] / s.forward["tensorly-torch"], 0), 1) for s in (narrow, wide))),
        ),
    ]


def space_claim(saved: int, macs: float, forward: float) -> Claim:
    return Claim(
        "(ours) For 3-way kernels the saving is greater: k^3 becomes 3 k.",
        f"one layer, width 24, 5x5x5, R = 24, batch 2 of 16x16x16, forward, {torch.get_num_threads()} threads",
        "nn.Conv3d, in the faster of two memory formats",
        "below 1",
        f"{forward:.2f} of dense, with {macs:.3f} of its multiply-accumulates and {saved:,} parameters fewer",
        below((forward, 0), 1),
    )


def memory_claim(peaks: dict[str, tuple[int, int]]) -> Claim:
    whole = {name: sum(pair) / sum(peaks["dense"]) for name, pair in peaks.items()}
    kept = peaks["cp, R = 24"][0] / peaks["dense"][0]
    plain, again = whole["cp, R = 24"], whole["cp, R = 24, recomputed"]
    return Claim(
        "Lower memory.",
        f"a training step of batch {BATCH}, {GRID}x{GRID}, width 24, R = 24: weights, Adam's moments and the most that "
        "the allocator gives on top",
        "the same network with dense convolutions",
        "lower",
        f"weights and moments {kept:.2f}; peak {again:.2f} recomputed, {plain:.2f} with the chain's outputs kept, "
        f"{whole['cp, R = 24, fused']:.2f} fused",
        "held" if max(kept, plain, again) <= 1 else "partly held" if max(kept, again) <= 1 else "not held",
        "" if plain <= 1 else "Training keeps three outputs of width R more a layer; recompute=True does not.",
    )


def growth_claim(grown: Sequence[tuple[str, list[int], list[float], float]]) -> Claim:
    found = {name: power for name, _, _, power in grown}
    linear = all(found[name] <= 1.2 for name in ("cp, rank", "cp, pixels", "cp, kernel size"))
    return Claim(
        "(ours) Time grows linearly with rank, pixels and the size of the kernel, of dense layers with its square.",
        f"one layer of 32 channels, forward, {torch.get_num_threads()} threads",
        "a dense layer of as many channels",
        "exponents of at most 1, and 2 if dense",
        ", ".join(f"{name} {power:.2f}" for name, power in found.items()),
        "held" if linear and found["dense, kernel size"] > 1.5 else "partly held" if linear else "not held",
        "Fitted to both logarithms; what does not grow makes an exponent smaller.",
    )


def traffic_claim(both: Any, scratchpad: int) -> Claim:
    before, after = both["dense"].off_chip_bytes, both["cp"].off_chip_bytes
    return Claim(
        "(ours) Less off-chip traffic at the same scratchpad.",
        f"one state of {GRID}x{GRID} in float32, width 24, R = 24, scratchpad of {scratchpad:,} bytes: the least that "
        "runs the dense network",
        "the same network with dense convolutions, planned alike",
        "below 1",
        f"{after:,} bytes of {before:,}, {after / before:.3f} of dense" if before and after else "does not fit",
        "held" if before and after and after < before else "not held",
    )


def solver_claim(orders_h: Sequence[float], orders_dt: Sequence[float], drift: float) -> Claim:
    right = all(abs(order - 2) < 0.1 for order in (*orders_h, *orders_dt))
    return Claim(
        "(ours) The finite-element solver converges at order 2 in space and time and keeps the energy.",
        "the standing mode sin(pi x) sin(pi y) cos(sqrt2 pi c t); energy over 1,000 steps from random states",
        "the closed form",
        "2, 2 and a relative change of 1e-10",
        f"orders {', '.join(f'{o:.2f}' for o in orders_h)} in h, {', '.join(f'{o:.2f}' for o in orders_dt)} in dt; "
        f"energy changed by {drift:.1e}",
        "held" if right and drift < 1e-10 else "partly held" if right or drift < 1e-10 else "not held",
    )


def accuracy_table(runs: Sequence[Run], rates: dict[str, float]) -> Table:
    u = trajectories("test")
    x, y = ap.pairs(u)
    still = ap.relative_l2(2 * x[:, :1] - x[:, 1:], y).item()
    rows: list[tuple[str | int | float, ...]] = [("no network: 2 u_n - u_{n-1}", TRAIN, 0, "", "", f"{still:.3f}", "")]
    for sources, kinds in ((TRAIN, KINDS), (FEW, FEW_KINDS)):
        for kind in kinds:
            figures = {what: of(runs, kind, sources, what) for what in ("train", "test", "rollout")}
            cells = [f"{mean(values):.4f} ± {error(values):.4f}" for values in figures.values()]
            size = int(of(runs, kind, sources, "parameters")[0])
            rows.append((NAMES[kind], sources, size, f"{rates[kind]:g}", *cells))
    columns = ("Network", "Training sources", "Parameters", "Learning rate", "Training", "Unseen", f"{ROLLOUT} steps")
    title = (
        f"Relative L2 errors, mean and standard error over {len(SEEDS)} seeds, {len(OTHER_SEEDS)} of vh, tucker and tt"
    )
    return Table(title, columns, rows)


def speed_table(*speeds: Speed) -> Table:
    rows = [
        (f"width {s.width}, {s.kernel}x{s.kernel}", name, s.ratio(name), s.ratio(name, True))
        for s in speeds
        for name in s.forward
    ]
    return Table("Times, of the faster dense network's", ("Setting", "Network", "Forward", "Training step"), rows)


def memory_table(peaks: dict[str, tuple[int, int]]) -> Table:
    rows = [(name, kept, most, sum((kept, most)) / sum(peaks["dense"])) for name, (kept, most) in peaks.items()]
    return Table(
        "Bytes of a training step", ("Network", "Weights and moments", "Most on top", "Together, of dense"), rows
    )


def growth_table(grown: Sequence[tuple[str, list[int], list[float], float]]) -> Table:
    rows = [
        (name, ", ".join(map(str, sizes)), ", ".join(f"{s / seconds[0]:.2f}" for s in seconds), power)
        for name, sizes, seconds, power in grown
    ]
    return Table("Growth of time", ("Layer and size", "Sizes", "Times, of the first", "Exponent"), rows)
