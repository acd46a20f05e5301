"""Experts Weights Averaging on small sets of real digits: accuracy against its peers and controls, and what it costs.

retensor claims ewa
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.ewa_trainings import (
    APART,
    BALANCE,
    BATCH,
    CONTROL,
    COPIES,
    DECAYS,
    DEPTH,
    DIGITS,
    EARLY,
    EWAS,
    MAIN,
    MNIST,
    RATES,
    ROUTED,
    SAMPLES,
    SEEDS,
    STEPS,
    TUNE_SAMPLES,
    TUNE_STEPS,
    TUNING_SEEDS,
    VANILLA,
    WIDTH,
    Key,
    Run,
    Setting,
    all_runs,
    made,
)
from benchmarks.measuring import paired, power, threads, times
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table
from retensor.compression import ewa

SOURCE = (
    "Huang, Ye, Huang, Li, Chen, He, Ouyang, Experts Weights Averaging: A New General Training Scheme for Vision "
    "Transformers, 2023, arXiv 2308.06093."
)
COST_DEPTH, COST_BATCH = 4, 128


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
        step = times({name: stepper(model, COST_BATCH) for name, model in models.items()}, 21)
        plain, folded = made(0, 8, COST_DEPTH).eval(), ewa.fold(experts[4]).eval()
        x = torch.rand(COST_BATCH, 1, 8, 8)
        with torch.no_grad():
            infer = times({"before": lambda: plain(x), "after": lambda: folded(x)}, 101)
        averages = _averages()
        batches = _after_batches(experts[4])
    ffns = sum(p.numel() for block in (1, 3) for p in dense.blocks[block].mlp.parameters())
    counts = [sum(p.numel() for p in model.parameters()) for model in (dense, experts[4])]
    moments = [_moments(model) for model in (dense, experts[4])]
    sizes = {(n, width): seconds for n, width, seconds in averages}
    return Costs(
        step.ratio("N=4", "vanilla"),
        step.ratio("N=2", "vanilla"),
        step.ratio("routed", "vanilla"),
        infer.ratio("after", "before"),
        (
            power([2, 4, 8], [sizes[n, 256] for n in (2, 4, 8)]),
            power([width**2 for width in (128, 256, 512)], [sizes[4, width] for width in (128, 256, 512)]),
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
    seconds = times(calls, 41)
    return [(*size, seconds[str(size)]) for size in sizes]


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
            found = paired(test(name, MAIN), figures)
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
                    found.why,
                )
            )
    grid = {setting: paired(test("digits", setting), test("digits", VANILLA)) for setting in EWAS}
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
    apart = paired([one.test for one in of("digits", APART)], [float(one.ensemble or 0) for one in of("digits", APART)])
    same = [abs(one.test - float(one.ensemble or 0)) for one in of("digits", MAIN)]
    claims.append(
        Claim(
            "(ours) Averaging makes experts foldable: folded and ensemble agree with it, and folding loses without it.",
            f"{sets['digits']}: N=4, independent initial values, r=0.3 against none; {how}",
            "the ensemble of the same experts",
            "",
            f"never averaged: {apart}; averaged: at most {max(same):.2f} apart",
            # One picture of 719 is 0.14 points.
            "held" if apart.below() and max(same) <= 0.15
            else "partly held" if max(same) <= 0.15 else "not held",
            "" if apart.below() else "Without averages folding did not lose beyond the 95 % interval.",
        )
    )  # fmt: skip
    early = paired(test("digits", EARLY), test("digits", ROUTED))
    claims.append(
        Claim(
            "Averaging experts early in training makes plain routed mixtures better on small sets (Early EWA).",
            f"{sets['digits']}: top-1 of 4, balance loss {BALANCE}, r=0.3 in the first half; {how}",
            "the same routed mixture, never averaged",
            "gains, in tables of another scale",
            f"{statistics.mean(test('digits', EARLY)):.2f} % against "
            f"{statistics.mean(test('digits', ROUTED)):.2f} %: {early}",
            early.verdict,
            early.why,
        )
    )
    tune = paired(test("tune", COPIES), test("tune", VANILLA))
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
            tune.why,
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
                "" if setting == VANILLA else str(paired(test, plain)),
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
                 str(paired(ema[1], plain)), "", "", "", "", " ".join(f"{value:.1f}" for value in ema[1]))
            )  # fmt: skip
    title = {"digits": "Digits", "mnist5k": "MNIST", "tune": "Fine-tuning digits-vit on MNIST at 8x8 pixels"}[name]
    columns = (
        title, "Test %", "Against vanilla, paired", "Test loss", "Train %", "Ensemble %", "Largest spread", "Each seed",
    )  # fmt: skip
    return Table(f"{title}: accuracy over {len(SEEDS)} paired seeds", columns, rows)
