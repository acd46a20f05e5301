"""Experts Weights Averaging on small sets of real digits: accuracy against its peers and controls, and what it costs.

Every run of a seed sees the same pictures in the same order and begins, outside the experts, with the same values. Two
processes of one thread each train; nothing else is changed about the machine.

    retensor claims ewa
"""

from __future__ import annotations

import functools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import ewa
from retensor.data import Split, accuracy, digits, fit, mnist5k, reference, seeded

SOURCE = (
    "Huang, Ye, Huang, Li, Chen, He, Ouyang, Experts Weights Averaging: A New General Training Scheme for Vision "
    "Transformers, 2023, arXiv 2308.06093."
)
SEEDS = tuple(range(8))
WIDTH, DEPTH, BATCH = 32, 2, 50
COST_DEPTH, COST_BATCH = 4, 128
SAMPLES, STEPS = 300, 320
TUNE_SAMPLES, TUNE_STEPS = 200, 120
RATES = {"digits": (2e-3, 4e-3, 8e-3), "mnist5k": (2e-3, 4e-3, 8e-3), "tune": (5e-4, 1e-3, 2e-3)}
TUNING_SEEDS = (100, 101)
DECAYS = (0.9, 0.97, 0.99, 0.997)
BALANCE = 0.01


@dataclass(frozen=True)
class Setting:
    """What is trained: every second FFN as it is, as experts, as a mean of draws, or routed."""

    kind: str
    experts: int = 4
    share_rate: float = 0.0
    until: float = 1.0
    init: str = "independent"

    @property
    def label(self) -> str:
        n = f"N={self.experts}"
        names = {
            "vanilla": "vanilla",
            "control": f"control: FFNs begin as the mean of {self.experts} draws",
            "experts": f"EWA r={self.share_rate:g}, {n}" if self.share_rate else f"experts never averaged, {n}",
            "routed": f"routed top-1, {n}" + (f", Early EWA r={self.share_rate:g}" if self.share_rate else ""),
        }
        return names[self.kind] + (", experts begin as copies" if self.init == "copy" else "")


VANILLA = Setting("vanilla")
CONTROL = Setting("control")
MAIN = Setting("experts", share_rate=0.3)
APART = Setting("experts")
COPIES = Setting("experts", share_rate=0.3, init="copy")
ROUTED = Setting("routed")
EARLY = Setting("routed", share_rate=0.3, until=0.5)
EWAS = tuple(Setting("experts", n, r) for n in (2, 4) for r in (0.1, 0.3, 0.5))
DIGITS = (VANILLA, CONTROL, APART, *EWAS, COPIES, ROUTED, EARLY)
MNIST = (VANILLA, CONTROL, MAIN)


@dataclass(frozen=True)
class Run:
    """What came of one training: percentages right."""

    test: float
    train: float
    loss: float
    ensemble: float | None = None
    spread: float | None = None
    ema: tuple[float, ...] = ()


Key = tuple[str, Setting, int, float]
"""The data set, what was trained, the seed, and the learning rate."""


def made(seed: int, image: int, depth: int = DEPTH) -> nn.Module:
    """An untrained transformer over 16 patches, whose tokens are all read by the classifier."""
    with seeded(seed):
        # The initial values of the first vision transformers: with timm's smaller ones 400 pictures take hundreds of
        # epochs to learn.
        model: nn.Module = VisionTransformer(
            img_size=image, patch_size=image // 4, in_chans=1, num_classes=10, embed_dim=WIDTH, depth=depth,
            num_heads=4, global_pool="avg", class_token=False, weight_init="jax",
        )  # fmt: skip
    return model


def begun(setting: Setting, seed: int, image: int) -> nn.Module:
    """A model as its training begins; the experts beyond the first are those of models drawn anew."""
    dense = made(seed, image)
    others = iter(range(1000 * (seed + 1), 1000 * (seed + 2)))
    fresh = "copy" if setting.init == "copy" else lambda: made(next(others), image)
    if setting.kind == "vanilla":
        return dense
    if setting.kind == "routed":
        return ewa.route(dense, setting.experts, init=fresh, seed=seed)
    model = ewa.convert(dense, setting.experts, init=fresh)
    return ewa.fold(model) if setting.kind == "control" else model


def data_of(name: str, seed: int) -> Split:
    """Few pictures for training, drawn by the seed, and all that are kept for testing."""
    return whole(name).few(TUNE_SAMPLES if name == "tune" else SAMPLES, seed=seed)


@functools.cache
def whole(name: str) -> Split:
    """A data set, read once by each process."""
    if name == "digits":
        return digits()
    data = mnist5k(test=0.4)
    if name == "mnist5k":
        return data
    # 28 pixels between two of margin, 4 of them one: 8 pixels as the reference has.
    small = [functional.avg_pool2d(functional.pad(x, (2, 2, 2, 2)), 4) for x in (data.x, data.x_test)]
    return Split(small[0], data.y, small[1], data.y_test, data.classes)


def run(key: Key) -> Run:
    """Train once."""
    name, setting, seed, lr = key
    data = data_of(name, seed)
    model = begun(setting, seed, data.x.shape[-1])
    return trained(model, setting, data, seed, lr, STEPS)


def trained(model: nn.Module, setting: Setting, data: Split, seed: int, lr: float, steps: int) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    averages: list[ModelEmaV3] = []
    if setting.kind == "experts":
        # Of their own, so that the order of the pictures is that of the other settings.
        ewa.use_generator(model, torch.Generator().manual_seed(seed))
    if setting.share_rate:
        ewa.attach(optimizer, model, share_rate=setting.share_rate, total_steps=steps, until=setting.until)
    if setting.kind == "vanilla":
        averages = [ModelEmaV3(model, decay=decay, use_warmup=True) for decay in DECAYS]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = functional.cross_entropy(model(x), y, label_smoothing=0.1)
        return value + BALANCE * ewa.balance_loss(model) if setting.kind == "routed" else value

    def after_step(step: int) -> None:
        for average in averages:
            average.update(model, step=step)

    fit(
        model, data.x, data.y, steps=steps, batch=BATCH, optimizer=optimizer, loss=loss, seed=seed,
        after_step=after_step,
    )  # fmt: skip
    model.eval()
    ensemble = spread = None
    deployed = model
    if setting.kind == "experts":
        deployed = ewa.fold(model)
        spread = max(max(layer.spread) for layer in ewa.stats(model))
        ewa.set_eval_mode(model, "ensemble")
        ensemble = 100 * accuracy(model, data.x_test, data.y_test)
    with torch.no_grad():
        test_loss = float(functional.cross_entropy(deployed(data.x_test), data.y_test))
    return Run(
        100 * accuracy(deployed, data.x_test, data.y_test),
        100 * accuracy(deployed, data.x, data.y),
        test_loss,
        ensemble,
        spread,
        tuple(100 * accuracy(average.module, data.x_test, data.y_test) for average in averages),
    )


def tuned(key: Key) -> Run:
    """Fine-tune the reference transformer for digits on other digits."""
    name, setting, seed, lr = key
    model, _ = reference("digits-vit")
    if setting.kind == "experts":
        model = ewa.convert(model, setting.experts, init="copy")
    data = data_of(name, seed)
    return trained(model, setting, data, seed, lr, TUNE_STEPS)


def _job(key: Key) -> tuple[Key, Run]:
    return key, tuned(key) if key[0] == "tune" else run(key)


def _one_thread() -> None:
    torch.set_num_threads(1)


def all_runs(keys: Sequence[Key], progress: Callable[[str], None]) -> dict[Key, Run]:
    """Train each, two at a time."""
    from benchmarks import claim_ewa as importable

    # Trained once before, not twice at the same time.
    reference("digits-vit")
    found: dict[Key, Run] = {}
    context = multiprocessing.get_context("spawn")
    workers = min(2, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=context, initializer=importable._one_thread) as pool:
        jobs = [pool.submit(importable._job, _there(key, importable)) for key in keys]
        for job in as_completed(jobs):
            key, done = job.result()
            mine = (key[0], Setting(**vars(key[1])), *key[2:])
            found[mine] = Run(**vars(done))
            if len(found) % 10 == 0:
                progress(f"{len(found)} of {len(keys)} trainings")
    return found


def _there(key: Key, module: Any) -> Any:
    """A key of the module as other processes import it."""
    return key[0], module.Setting(**vars(key[1])), *key[2:]


@dataclass(frozen=True)
class Gain:
    """A mean difference over paired seeds, and its standard error."""

    mean: float
    error: float

    @property
    def verdict(self) -> Verdict:
        """Held above two standard errors, partly above none."""
        return "held" if self.mean > 2 * self.error else "partly held" if self.mean > 0 else "not held"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


def gain(ours: Sequence[float], theirs: Sequence[float]) -> Gain:
    apart = [one - other for one, other in zip(ours, theirs, strict=True)]
    return Gain(statistics.mean(apart), statistics.stdev(apart) / math.sqrt(len(apart)))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Timings of one thread, with the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alternating(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one after another in every round, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(seconds: Mapping[str, Sequence[float]], name: str, base: str) -> float:
    return statistics.median(seconds[name]) / statistics.median(seconds[base])


def stepper(model: nn.Module, batch: int) -> Callable[[], None]:
    """A whole training step, average included where there are experts."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 1, 8, 8, generator=generator), torch.arange(batch) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    if any(isinstance(module, ewa.ExpertLinear) for module in model.modules()):
        ewa.attach(optimizer, model, share_rate=0.3, total_steps=10**6)

    def step() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@dataclass(frozen=True)
class Costs:
    """Ratios of time, and counts."""

    step: float
    step_two: float
    routed: float
    inference: float
    powers: tuple[float, float]
    batches: float
    averages: tuple[tuple[int, int, float], ...]
    parameters: tuple[int, int, int]
    moments: tuple[int, int]


def costs() -> Costs:
    with threads(1):
        dense = made(0, 8, COST_DEPTH)
        experts = {n: ewa.convert(dense, n) for n in (2, 4)}
        routed = ewa.route(dense, 4)
        models = {"vanilla": dense, "N=2": experts[2], "N=4": experts[4], "routed": routed}
        step = alternating({name: stepper(model, COST_BATCH) for name, model in models.items()}, 21)
        plain, folded = made(0, 8, COST_DEPTH).eval(), ewa.fold(experts[4]).eval()
        x = torch.rand(COST_BATCH, 1, 8, 8)
        with torch.no_grad():
            infer = alternating({"before": lambda: plain(x), "after": lambda: folded(x)}, 101)
        averages = _averages()
        batches = _after_batches(experts[4])
    ffns = sum(p.numel() for block in (1, 3) for p in dense.blocks[block].mlp.parameters())
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, experts[4])]
    moments = [_moments(model) for model in (dense, experts[4])]
    sizes = {(n, width): seconds for n, width, seconds in averages}
    return Costs(
        ratio(step, "N=4", "vanilla"),
        ratio(step, "N=2", "vanilla"),
        ratio(step, "routed", "vanilla"),
        ratio(infer, "after", "before"),
        (
            math.log(sizes[8, 256] / sizes[2, 256]) / math.log(4),
            math.log(sizes[4, 512] / sizes[4, 128]) / math.log(16),
        ),
        batches,
        tuple((n, width, 1e3 * seconds) for n, width, seconds in averages),
        (counts[0], counts[1] - counts[0], 3 * ffns),
        (moments[1] - moments[0], 2 * 3 * ffns),
    )


def _averages() -> list[tuple[int, int, float]]:
    """Seconds of one average over the experts of one FFN of a width."""
    from timm.layers import Mlp

    sizes = [(2, 256), (4, 256), (8, 256), (4, 128), (4, 512)]
    models = {
        size: ewa.convert(nn.Sequential(Mlp(size[1], 4 * size[1])), size[0], layers="all", init="copy")
        for size in sizes
    }
    calls = {str(size): lambda model=model: ewa.average_(model, 0.1) for size, model in models.items()}
    seconds = alternating(calls, 41)
    return [(*size, statistics.median(seconds[str(size)])) for size in sizes]


def _after_batches(model: nn.Module) -> float:
    """Time of an average after passes of 512 pictures, over that after passes of 16."""
    model.train()
    found: dict[int, list[float]] = {16: [], 512: []}
    for _ in range(9):
        for batch, seconds in found.items():
            model(torch.rand(batch, 1, 8, 8)).sum().backward()
            # Once before, so that the weights lie in the caches after either pass.
            ewa.average_(model, 0.1)
            for _ in range(7):
                start = time.perf_counter()
                ewa.average_(model, 0.1)
                seconds.append(time.perf_counter() - start)
    return statistics.median(found[512]) / statistics.median(found[16])


def _moments(model: nn.Module) -> int:
    """Numbers that AdamW keeps, beside its counts of steps."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    return sum(v.numel() for state in optimizer.state.values() for name, v in state.items() if name != "step")


def measure(progress: Callable[[str], None]) -> Report:
    progress("costs")
    cost = costs()
    dense = made(0, 8, COST_DEPTH)
    both = rt.compare(
        dense, ewa.fold(ewa.convert(dense, 4)), inputs=(1, 1, 8, 8), accelerator=rt.Accelerator("M_R"),
        names=["before", "after"],
    )  # fmt: skip
    progress("learning rates")
    trials = all_runs(
        [(name, VANILLA, seed, lr) for name in RATES for seed in TUNING_SEEDS for lr in RATES[name]],
        progress,
    )
    best = {
        name: max(
            RATES[name], key=lambda lr: statistics.mean(trials[name, VANILLA, seed, lr].test for seed in TUNING_SEEDS)
        )
        for name in RATES
    }
    keys: list[Key] = [("digits", setting, seed, best["digits"]) for seed in SEEDS for setting in DIGITS]
    keys += [("mnist5k", setting, seed, best["mnist5k"]) for seed in SEEDS for setting in MNIST]
    keys += [("tune", setting, seed, best["tune"]) for seed in SEEDS for setting in (VANILLA, COPIES)]
    runs = all_runs(keys, progress)
    return report(runs, best, cost, both)


def report(runs: Mapping[Key, Run], best: Mapping[str, float], cost: Costs, both: Any) -> Report:
    """Verdicts, out of the figures."""

    def of(name: str, setting: Setting) -> list[Run]:
        return [runs[name, setting, seed, best[name]] for seed in SEEDS]

    def test(name: str, setting: Setting) -> list[float]:
        return [one.test for one in of(name, setting)]

    def ema(name: str) -> tuple[float, list[float]]:
        columns = list(zip(*(one.ema for one in of(name, VANILLA)), strict=True))
        at = max(range(len(DECAYS)), key=lambda i: statistics.mean(columns[i]))
        return DECAYS[at], list(columns[at])

    sets = {
        "digits": f"digits, {SAMPLES} for training (drawn anew for each seed), 719 for testing",
        "mnist5k": f"MNIST, {SAMPLES} for training, 2,000 for testing",
    }
    how = (
        f"timm VisionTransformer of width {WIDTH}, {DEPTH} blocks, every second FFN experts, 16 tokens; AdamW at the "
        f"rate best for vanilla of {', '.join(f'{rate:g}' for rate in RATES['digits'])} (other seeds), one-cycle, "
        f"weight decay 0.05, label smoothing 0.1, {STEPS} steps of {BATCH}; {len(SEEDS)} paired seeds"
    )
    claims: list[Claim] = []
    for name, said in sets.items():
        peers = {
            "vanilla": test(name, VANILLA),
            f"vanilla with timm's ModelEmaV3, the best decay of {len(DECAYS)} ({ema(name)[0]:g})": ema(name)[1],
            "the control: one FFN that begins as the mean of 4 independent draws": test(name, CONTROL),
        }
        for peer, figures in peers.items():
            found = gain(test(name, MAIN), figures)
            train = statistics.mean(one.train for one in of(name, VANILLA))
            ours = statistics.mean(test(name, MAIN))
            claims.append(
                Claim(
                    "Training with averaged experts raises accuracy at unchanged inference cost (from scratch)."
                    if peer == "vanilla"
                    else "(ours) The gain is more than that of a peer or of smaller initial values.",
                    f"{said}: r=0.3, N=4, linear; {how}; vanilla has {train:.1f} % of the training set right",
                    peer,
                    "gains, in tables of another scale",
                    f"{ours:.2f} % against {statistics.mean(figures):.2f} %: {found}",
                    found.verdict,
                    _why(found),
                )
            )
    grid = {setting: gain(test("digits", setting), test("digits", VANILLA)) for setting in EWAS}
    above = sum(found.mean > 0 for found in grid.values())
    claims.append(
        Claim(
            "(ours) The gain does not hang on the share rate or the number of experts.",
            f"{sets['digits']}: r of 0.1, 0.3, 0.5 with N of 2 and 4; {how}",
            "vanilla",
            "",
            f"above in {above} of {len(grid)} settings, from {min(g.mean for g in grid.values()):+.2f} to "
            f"{max(g.mean for g in grid.values()):+.2f}",
            "held" if above == len(grid) else "partly held" if above else "not held",
        )
    )
    apart = gain([one.test for one in of("digits", APART)], [float(one.ensemble or 0) for one in of("digits", APART)])
    same = [abs(one.test - float(one.ensemble or 0)) for one in of("digits", MAIN)]
    claims.append(
        Claim(
            "(ours) Averaging makes experts foldable: folded and ensemble agree with it, and folding loses without it.",
            f"{sets['digits']}: N=4, independent initial values, r=0.3 against none; {how}",
            "the ensemble of the same experts",
            "",
            f"never averaged: {apart}; averaged: at most {max(same):.2f} apart",
            # One picture of 719 is 0.14 points.
            "held" if -apart.mean > 2 * apart.error and max(same) <= 0.15
            else "partly held" if max(same) <= 0.15 else "not held",
            "" if -apart.mean > 2 * apart.error else "Without averages folding did not lose beyond its standard error.",
        )
    )  # fmt: skip
    early = gain(test("digits", EARLY), test("digits", ROUTED))
    claims.append(
        Claim(
            "Averaging experts early in training makes plain routed mixtures better on small sets (Early EWA).",
            f"{sets['digits']}: top-1 of 4, balance loss {BALANCE}, r=0.3 in the first half; {how}",
            "the same routed mixture, never averaged",
            "gains, in tables of another scale",
            f"{statistics.mean(test('digits', EARLY)):.2f} % against "
            f"{statistics.mean(test('digits', ROUTED)):.2f} %: {early}",
            early.verdict,
            _why(early),
        )
    )
    tune = gain(test("tune", COPIES), test("tune", VANILLA))
    claims.append(
        Claim(
            "Fine-tuning with averaged experts raises accuracy.",
            f"the reference digits-vit on {TUNE_SAMPLES} digits of MNIST at 8x8 pixels, 2,000 for testing, "
            f"{TUNE_STEPS} steps at the rate best for plain fine-tuning, experts begin as copies, r=0.3, N=4",
            "plain fine-tuning",
            "gains, in tables of another scale",
            f"{statistics.mean(test('tune', COPIES)):.2f} % against "
            f"{statistics.mean(test('tune', VANILLA)):.2f} %: {tune}",
            tune.verdict,
            _why(tune),
        )
    )
    claims += _cost_claims(cost, both)
    tables = [_accuracies(name, of, ema(name)) for name in ("digits", "mnist5k", "tune")]
    tables.append(
        Table(
            "Milliseconds of one average over one FFN's experts, one thread",
            ("N", "Width", "Numbers", "Milliseconds"),
            [(n, width, n * (8 * width * width + 5 * width), ms) for n, width, ms in cost.averages],
        )
    )
    tables.append(
        Table(
            "The cost sheet before and after, at the least scratchpad that can run it",
            ("", "Parameters", "Multiply-accumulates", "Activation peak", "Scratchpad", "Off-chip bytes"),
            [
                (name, sheet.parameters or 0, sheet.macs or 0, sheet.activation_peak_bytes, sheet.m_r_bytes,
                 sheet.off_chip_bytes or 0)
                for name, sheet in zip(both.names, both.sheets, strict=True)
            ],
        )
    )  # fmt: skip
    return Report("ewa", "Experts Weights Averaging", SOURCE, claims, tables, ("timm", "torch"))


def _why(found: Gain) -> str:
    if found.verdict == "held":
        return ""
    return "Within two standard errors of nothing." if abs(found.mean) <= 2 * found.error else "Below it."


def _cost_claims(cost: Costs, both: Any) -> list[Claim]:
    size = (
        f"width {WIDTH}, {COST_DEPTH} blocks, 2 of them experts, batch {COST_BATCH}, one thread, alternating, medians"
    )
    before, after = both.sheets
    sheet = (
        (before.parameters, before.macs, before.off_chip_bytes),
        (after.parameters, after.macs, after.off_chip_bytes),
    )
    linear = all(0.75 <= power <= 1.25 for power in cost.powers)
    level = 0.75 <= cost.batches <= 1.33
    return [
        Claim(
            "A step of random uniform partition costs about what a plain one does.",
            f"{size}; average of the experts and AdamW over all of them included",
            "vanilla",
            "(brief) at most 1.25",
            f"{cost.step:.2f} times with N=4, {cost.step_two:.2f} with N=2",
            "held" if max(cost.step, cost.step_two) <= 1.25 else "not held",
        ),
        Claim(
            "The partition is a more efficient mixture than a routed one.",
            size,
            "the top-1 routed mixture with N=4, also averaged",
            "faster",
            f"{cost.step:.2f} of vanilla's time against {cost.routed:.2f}",
            "held" if cost.step < cost.routed else "not held",
        ),
        Claim(
            "(ours) Training memory grows by N - 1 times the replaced FFNs and their optimizer's state, by no more.",
            "N=4, AdamW",
            "vanilla",
            f"{cost.parameters[2]:,} parameters, {cost.moments[1]:,} moments",
            f"{cost.parameters[1]:,} parameters, {cost.moments[0]:,} moments",
            "held" if cost.parameters[1] == cost.parameters[2] and cost.moments[0] == cost.moments[1] else "not held",
        ),
        Claim(
            "(ours) An average takes time in proportion to N times the FFN's parameters, whatever the batch.",
            "timm Mlp of widths 128 to 512, N of 2 to 8, one thread; batches of 16 and 512 in the network above",
            "a power of 1, and a ratio of 1",
            "",
            f"power {cost.powers[0]:.2f} in N and {cost.powers[1]:.2f} in parameters; {cost.batches:.2f} times after "
            "a batch 32 times as large",
            "held" if linear and level else "partly held" if linear or level else "not held",
        ),
        Claim(
            "Inference after folding costs what it did before.",
            f"{size}; traffic of one picture at a scratchpad of M_R ({before.m_r_bytes:,} bytes)",
            "the original network",
            "unchanged",
            f"{cost.inference:.2f} times the time; parameters {sheet[1][0]:,} of {sheet[0][0]:,}, multiply-accumulates "
            f"{sheet[1][1]:,} of {sheet[0][1]:,}, off-chip bytes {sheet[1][2]:,} of {sheet[0][2]:,}",
            "held" if sheet[0] == sheet[1] and abs(cost.inference - 1) <= 0.05
            else "partly held" if sheet[0] == sheet[1] else "not held",
        ),
    ]  # fmt: skip


def _accuracies(name: str, of: Callable[[str, Setting], list[Run]], ema: tuple[float, list[float]]) -> Table:
    settings = {"digits": DIGITS, "mnist5k": MNIST, "tune": (VANILLA, COPIES)}[name]
    plain = [one.test for one in of(name, VANILLA)]
    rows: list[tuple[str | float, ...]] = []
    for setting in settings:
        found = of(name, setting)
        test = [one.test for one in found]
        ensemble = [one.ensemble for one in found if one.ensemble is not None]
        spread = [one.spread for one in found if one.spread is not None]
        rows.append(
            (
                setting.label,
                f"{statistics.mean(test):.2f}",
                "" if setting == VANILLA else str(gain(test, plain)),
                f"{statistics.mean(one.loss for one in found):.3f}",
                f"{statistics.mean(one.train for one in found):.1f}",
                f"{statistics.mean(ensemble):.2f}" if ensemble else "",
                f"{statistics.mean(spread):.3f}" if spread else "",
                " ".join(f"{value:.1f}" for value in test),
            )
        )
        if setting == VANILLA:
            rows.append(
                (f"vanilla with ModelEmaV3, decay {ema[0]:g}", f"{statistics.mean(ema[1]):.2f}",
                 str(gain(ema[1], plain)), "", "", "", "", " ".join(f"{value:.1f}" for value in ema[1]))
            )  # fmt: skip
    title = {"digits": "Digits", "mnist5k": "MNIST", "tune": "Fine-tuning digits-vit on MNIST at 8x8 pixels"}[name]
    columns = (
        title, "Test %", "Against vanilla, paired", "Test loss", "Train %", "Ensemble %", "Largest spread", "Each seed",
    )  # fmt: skip
    return Table(f"{title}: accuracy over {len(SEEDS)} paired seeds", columns, rows)
