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
    COMPARED,
    CONTROL,
    CONTROL_TWO,
    COPIES,
    DECAYS,
    DEPTH,
    EARLIER,
    EARLY,
    EWAS,
    MAIN,
    ROUTED,
    SAMPLES,
    SCRATCH,
    SEEDS,
    STEPS,
    SWA,
    TAIL,
    TUNING_SEEDS,
    VANILLA,
    WIDTH,
    Key,
    Run,
    Setting,
    Tuning,
    all_runs,
    kin,
    made,
    tune,
)
from benchmarks.measuring import allocated, paired, power, threads, times, verdict
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table
from retensor.compression import ewa

SOURCE = (
    "Huang, Ye, Huang, Li, Chen, He, Ouyang, Experts Weights Averaging: A New General Training Scheme for Vision "
    "Transformers, 2023, arXiv 2308.06093."
)
COST_BATCH = 128
SLOWER, ACTIVATIONS = 1.25, 1.10
"""The most that a training step's time and a pass's activations may grow by."""
TITLES = {"digits": "Digits", "mnist5k": "MNIST", "tune": "Fine-tuning on digits"}


def stepper(model: nn.Module, batch: int) -> Callable[[], None]:
    """A whole training step; experts of a partition are averaged after it, a router's are not."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(batch, 1, 8, 8, generator=generator), torch.arange(batch) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    experts = [module for module in model.modules() if isinstance(module, ewa.ExpertLinear)]
    if experts and not experts[0].assignment.top_k:
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
    kept: tuple[int, int]
    """By how many numbers what is kept between steps grows, and by how many it should."""
    activations: tuple[int, int]
    """Bytes that a pass holds for its gradients: plain, and with experts."""


def costs() -> Costs:
    with threads(1):
        dense = made(0, 8)
        experts = {n: ewa.convert(dense, n) for n in (2, 4)}
        models = {"vanilla": dense, "N=2": experts[2], "N=4": experts[4], "routed": ewa.route(dense, 4)}
        kept = [_kept(model) for model in (dense, experts[4])]
        activations = [_activations(model) for model in (dense, experts[4])]
        step = times({name: stepper(model, COST_BATCH) for name, model in models.items()}, 21)
        plain, folded = made(0, 8).eval(), ewa.fold(experts[4]).eval()
        x = torch.rand(COST_BATCH, 1, 8, 8)
        with torch.no_grad():
            infer = times({"before": lambda: plain(x), "after": lambda: folded(x)}, 101)
        averages = _averages()
        batches = _after_batches(experts[4])
    ffns = sum(p.numel() for block in range(1, DEPTH, 2) for p in dense.blocks[block].mlp.parameters())
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
        # Each parameter has a gradient and two moments.
        (kept[1] - kept[0], 4 * 3 * ffns),
        (activations[0], activations[1]),
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


def _kept(model: nn.Module) -> int:
    """Numbers that lie in memory between steps: parameters, gradients, and what AdamW keeps beside its step counts."""
    optimizer = torch.optim.AdamW(model.parameters())
    model.train()(torch.rand(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    moments = sum(v.numel() for state in optimizer.state.values() for name, v in state.items() if name != "step")
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    return sum(p.numel() for p in model.parameters()) + gradients + moments


def _activations(model: nn.Module) -> int:
    """Bytes at the peak of a pass whose gradients will be asked for."""
    x = torch.rand(COST_BATCH, 1, 8, 8)
    model.train()(x)
    outputs: list[torch.Tensor] = []
    return allocated(lambda: outputs.append(model(x)))


def measure(progress: Callable[[str], None]) -> Report:
    """Trainings first, then what is timed."""
    tunings = tune(progress)
    keys = [
        Key(name, setting, seed, tunings[name, kin(name, setting)].rate)
        for name, settings in COMPARED.items()
        for seed in SEEDS
        for setting in settings
    ]
    found = all_runs(keys, progress)
    dense = made(0, 8)
    both = rt.compare(
        dense, ewa.fold(ewa.convert(dense, 4)), inputs=(1, 1, 8, 8), accelerator=rt.Accelerator("M_R"),
        names=["before", "after"],
    )  # fmt: skip
    progress("costs")
    return report({(key.name, key.setting, key.seed): one for key, one in found.items()}, tunings, costs(), both)


@dataclass(frozen=True)
class Runs:
    """All runs, by what was compared."""

    runs: Mapping[tuple[str, Setting, int], Run]
    tunings: Mapping[tuple[str, Setting], Tuning]

    def of(self, name: str, setting: Setting) -> list[Run]:
        return [self.runs[name, setting, seed] for seed in SEEDS]

    def test(self, name: str, setting: Setting) -> list[float]:
        return [one.test for one in self.of(name, setting)]

    def mean(self, name: str, setting: Setting) -> float:
        return statistics.mean(self.test(name, setting))

    def ema(self, name: str) -> tuple[float, list[float]]:
        """The moving average's decay that is best on pictures kept to choose by, and its figures on the test part."""
        tuned = self.tunings[name, VANILLA].decays
        at = max(range(len(DECAYS)), key=lambda i: tuned[i])
        return DECAYS[at], [one.ema[at] for one in self.of(name, VANILLA)]

    def how(self, name: str) -> str:
        """What all trainings on a set have in common."""
        edges = [setting.label for (on, setting), tuning in self.tunings.items() if on == name and tuning.at_edge]
        noted = f" (at the edge of what was tried: {'; '.join(edges)})" if edges else ""
        # The initial values are said, as they are not timm's default.
        return (
            f"timm VisionTransformer of width {WIDTH}, {DEPTH} blocks, weight_init='jax', every second FFN experts, "
            f"16 tokens; AdamW, one-cycle, each method at its own best learning rate or its nearest kin's, chosen on "
            f"held-out training pictures over {len(TUNING_SEEDS)} other seeds{noted}; weight decay 0.05, label "
            f"smoothing 0.1, {STEPS[name]} steps of {BATCH}; {len(SEEDS)} paired seeds"
        )

    def claim(self, name: str, statement: str, setting: str, ours: Setting, peer: Setting, paper: str = "") -> Claim:
        """Whether one setting is above another."""
        found = paired(self.test(name, ours), self.test(name, peer))
        figures = f"{self.mean(name, ours):.2f} % against {self.mean(name, peer):.2f} %: {found}"
        return Claim(statement, setting, peer.label, paper, figures, found.verdict, found.why)


def report(
    runs: Mapping[tuple[str, Setting, int], Run], tunings: Mapping[tuple[str, Setting], Tuning], cost: Costs, both: Any
) -> Report:
    """Verdicts, out of the figures."""
    all_of = Runs(runs, tunings)
    said = {
        "digits": f"digits, all {SAMPLES['digits']:,} for training, 719 for testing; {all_of.how('digits')}",
        "mnist5k": f"MNIST, {SAMPLES['mnist5k']:,} for training (drawn by the seed), 2,000 for testing; "
        f"{all_of.how('mnist5k')}",
        "tune": f"a transformer trained on 4,000 pictures of MNIST at 8x8 pixels, tuned on {SAMPLES['tune']} of digits "
        f"(drawn by the seed), 719 for testing; experts begin as copies, r=0.3, N=4; {all_of.how('tune')}",
    }
    claims: list[Claim] = []
    for name in ("digits", "mnist5k"):
        claims += _scratch_claims(all_of, name, said[name])
    claims += [_grid(all_of, said["digits"]), _mechanism(all_of, said["digits"])]
    claims += [
        all_of.claim(
            "digits",
            "Averaging experts early in training makes plain routed mixtures better on small sets (Early EWA).",
            f"top-1 of 4, balance loss {BALANCE}, r=0.3 in the first {early.until:g} of training; {said['digits']}",
            early,
            ROUTED,
            "gains, in tables of another scale",
        )
        for early in (EARLY, EARLIER)
    ]
    start = paired(all_of.test("tune", VANILLA), all_of.test("tune", SCRATCH))
    tuned = all_of.claim(
        "tune",
        "Fine-tuning with averaged experts raises accuracy.",
        f"{said['tune']}; from scratch {all_of.mean('tune', SCRATCH):.2f} %, so that the start is worth {start} points",
        COPIES,
        VANILLA,
        "gains, in tables of another scale",
    )
    claims += [tuned, *_cost_claims(cost, both)]
    tables = [_accuracies(all_of, name) for name in COMPARED]
    tables.append(
        Table(
            f"Learning rates, by the mean accuracy on held-out training pictures over {len(TUNING_SEEDS)} seeds",
            ("Set", "Method", "Rates tried, and % right", "Best"),
            [
                (
                    TITLES[name],
                    setting.label,
                    ", ".join(f"{rate:g}: {value:.2f}" for rate, value in tuning.tried.items()),
                    f"{tuning.rate:g}" + (" (at the edge)" if tuning.at_edge else ""),
                )
                for (name, setting), tuning in tunings.items()
            ],
        )
    )
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


def _scratch_claims(all_of: Runs, name: str, said: str) -> list[Claim]:
    """Training from scratch: against plain training, the control, both, no averages, and averages of plain weights."""
    train = {setting: statistics.mean(one.train for one in all_of.of(name, setting)) for setting in (VANILLA, MAIN)}
    setting = (
        f"r=0.3, N=4, linear; {said}; {train[VANILLA]:.1f} % of the training pictures right without experts, "
        f"{train[MAIN]:.1f} % with them"
    )
    more = "(ours) The gain is more than that of {}."
    main = all_of.claim(
        name,
        "Training with averaged experts raises accuracy at unchanged inference cost (from scratch).",
        setting,
        MAIN,
        VANILLA,
        "gains, in tables of another scale",
    )
    control = all_of.claim(name, more.format("smaller initial values"), setting, MAIN, CONTROL)
    # Short of overfitting, a gain may be one of speed.
    fitted = min(train.values()) >= 99.5
    above = [claim.verdict == "held" for claim in (main, control)]
    missing = [claim.baseline for claim in (main, control) if claim.verdict != "held"]
    joint = Claim(
        "(ours) Trained until the training set is learned, averaged experts are above vanilla and above the control.",
        setting,
        f"the better of vanilla and the {CONTROL.label}",
        "",
        f"vanilla: {main.ours}; control: {control.ours}",
        verdict(all(above) and fitted, any(above) and fitted),
        _sentence(
            [f"not above {peer}" for peer in missing]
            + ([] if fitted else ["less than 99.5 % of the training pictures right"])
        ),
    )
    decay, averaged = all_of.ema(name)
    gain = paired(all_of.test(name, MAIN), averaged)
    ema = Claim(
        more.format("a moving average of plain weights"),
        setting,
        f"vanilla with timm's ModelEmaV3 without warm-up, decay {decay:g}, the best of "
        f"{', '.join(f'{one:g}' for one in DECAYS)} on held-out training pictures",
        "",
        f"{all_of.mean(name, MAIN):.2f} % against {statistics.mean(averaged):.2f} %: {gain}",
        gain.verdict,
        gain.why,
    )
    apart = all_of.claim(name, more.format("the random partition without averages"), setting, MAIN, APART)
    claims = [main, control, joint, ema, apart]
    if SWA in COMPARED[name]:
        tail = f"{setting}; the peer holds its rate and averages after {TAIL:.0%} of the steps"
        claims.append(all_of.claim(name, more.format("an average over the last plain weights"), tail, MAIN, SWA))
    return claims


def _grid(all_of: Runs, said: str) -> Claim:
    """Each share rate and number of experts, against plain training and the control of as many draws."""
    gains = {
        (setting, peer): paired(all_of.test("digits", setting), all_of.test("digits", peer))
        for setting in EWAS
        for peer in (VANILLA, CONTROL_TWO if setting.experts == 2 else CONTROL)
    }
    above = [setting for setting in EWAS if all(gain.above() for (one, _), gain in gains.items() if one == setting)]
    against = {
        kind: [gain.mean for (_, peer), gain in gains.items() if (peer == VANILLA) == (kind == "vanilla")]
        for kind in ("vanilla", "control")
    }
    told = ", ".join(f"{min(found):+.2f} to {max(found):+.2f} against {kind}" for kind, found in against.items())
    return Claim(
        "(ours) The gain does not hang on the share rate or the number of experts.",
        f"r of 0.1, 0.3, 0.5 with N of 2 and 4; {said}",
        "vanilla, and the control of as many draws",
        "",
        f"above both beyond the 95 % interval in {len(above)} of {len(EWAS)} settings; {told}",
        verdict(len(above) == len(EWAS), bool(above)),
        "" if len(above) == len(EWAS) else "Not above both: "
        + ", ".join(setting.label for setting in EWAS if setting not in above) + ".",
    )  # fmt: skip


def _mechanism(all_of: Runs, said: str) -> Claim:
    """Folding experts that are averaged, and experts that are not."""

    def ensemble(setting: Setting) -> list[tuple[float, float, float]]:
        return [
            (one.test, one.ensemble, one.apart)
            for one in all_of.of("digits", setting)
            if one.ensemble is not None and one.apart is not None
        ]

    apart, averaged = ensemble(APART), ensemble(MAIN)
    loss = paired([folded for folded, _, _ in apart], [whole for _, whole, _ in apart])
    points = max(abs(folded - whole) for folded, whole, _ in averaged)
    logits = max(far for *_, far in averaged)
    same = points <= 0.01 and logits < 1e-3
    reasons = [] if same else ["averaged experts' ensemble is not their folded network"]
    reasons += [] if loss.below() else ["without averages folding does not lose beyond the 95 % interval"]
    return Claim(
        "(ours) Averaging makes experts foldable: folded and ensemble agree with it, and folding loses without it.",
        f"N=4, independent initial values, r=0.3 against none; {said}",
        "the ensemble of the same experts",
        "",
        f"never averaged: {loss} points; averaged: at most {points:.2f} points and {logits:.1e} in a logit apart",
        verdict(not reasons, len(reasons) == 1),
        _sentence(reasons),
    )


def _sentence(reasons: list[str]) -> str:
    told = "; ".join(reasons)
    return told[:1].upper() + told[1:] + "." * bool(told)


def _cost_claims(cost: Costs, both: Any) -> list[Claim]:
    size = f"width {WIDTH}, {DEPTH} blocks, 2 of them experts, batch {COST_BATCH}, one thread, alternating, medians"
    before, after = both.sheets
    sheet = (
        (before.parameters, before.macs, before.off_chip_bytes),
        (after.parameters, after.macs, after.off_chip_bytes),
    )
    linear = all(0.75 <= power <= 1.25 for power in cost.powers)
    level = 0.75 <= cost.batches <= 1.33
    slow = max(cost.step, cost.step_two)
    exact = cost.kept[0] == cost.kept[1]
    more = cost.activations[1] / cost.activations[0]
    unchanged = sheet[0] == sheet[1]
    as_fast = abs(cost.inference - 1) <= 0.05
    return [
        Claim(
            f"(ours) A step of random uniform partition takes at most {SLOWER:g} times a plain one.",
            f"{size}; average of the experts and AdamW over all of them included",
            "vanilla",
            "as many multiply-accumulates",
            f"{cost.step:.2f} times with N=4, {cost.step_two:.2f} with N=2",
            verdict(slow <= SLOWER),
            "" if slow <= SLOWER else "It includes the average and AdamW over N times the parameters.",
        ),
        Claim(
            "The partition is a more efficient mixture than a routed one.",
            f"{size}; the partition's experts are averaged, the router's are not",
            "the top-1 routed mixture with N=4",
            "faster",
            f"{cost.step:.2f} of vanilla's time against {cost.routed:.2f}",
            verdict(cost.step < cost.routed),
            "" if cost.step < cost.routed else "Its time includes the average, which the routed mixture goes without.",
        ),
        Claim(
            "(ours) Between steps N - 1 times the replaced FFNs' parameters, gradients and moments are added, "
            f"and a pass holds at most {ACTIVATIONS - 1:.0%} more for its gradients.",
            f"N=4, AdamW, batch {COST_BATCH}; activations by torch's record of its allocator",
            "vanilla",
            f"{cost.kept[1]:,} numbers",
            f"{cost.kept[0]:,} numbers; {cost.activations[1]:,} bytes of a pass against {cost.activations[0]:,}, "
            f"{more:.3f} times",
            verdict(exact and more <= ACTIVATIONS, exact),
            "" if exact and more <= ACTIVATIONS
            else "The tokens of the experts are copies in another order." if exact else "It grows by another number.",
        ),
        Claim(
            "(ours) An average takes time in proportion to N times the FFN's parameters, whatever the batch.",
            "timm Mlp of widths 128 to 512, N of 2 to 8, one thread; batches of 16 and 512 in the network above",
            "a power of 1, and a ratio of 1",
            "",
            f"power {cost.powers[0]:.2f} in N and {cost.powers[1]:.2f} in parameters; {cost.batches:.2f} times after "
            "a batch 32 times as large",
            verdict(linear and level, linear or level),
            _sentence(
                (["powers beyond 0.75 to 1.25, as where fixed costs or caches weigh"] if not linear else [])
                + (["the batch before changes its time"] if not level else [])
            ),
        ),
        Claim(
            "Inference after folding costs what it did before.",
            f"{size}; traffic of one picture at a scratchpad of M_R ({before.m_r_bytes:,} bytes)",
            "the original network",
            "unchanged",
            f"{cost.inference:.2f} times the time; parameters {sheet[1][0]:,} of {sheet[0][0]:,}, multiply-accumulates "
            f"{sheet[1][1]:,} of {sheet[0][1]:,}, off-chip bytes {sheet[1][2]:,} of {sheet[0][2]:,}",
            verdict(unchanged and as_fast, unchanged),
            "" if unchanged and as_fast
            else "Its time differs by more than 5 %." if unchanged else "Its cost sheet is another.",
        ),
    ]  # fmt: skip


def _accuracies(all_of: Runs, name: str) -> Table:
    plain = all_of.test(name, VANILLA)
    rows: list[tuple[str | float, ...]] = []
    for setting in COMPARED[name]:
        found = all_of.of(name, setting)
        test = all_of.test(name, setting)
        ensemble = [one.ensemble for one in found if one.ensemble is not None]
        spread = [one.spread for one in found if one.spread is not None]
        rows.append(
            (
                setting.label,
                f"{all_of.tunings[name, kin(name, setting)].rate:g}",
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
            decay, averaged = all_of.ema(name)
            rows.append(
                (f"vanilla with ModelEmaV3, decay {decay:g}", rows[-1][1], f"{statistics.mean(averaged):.2f}",
                 str(paired(averaged, plain)), "", "", "", "", " ".join(f"{value:.1f}" for value in averaged))
            )  # fmt: skip
    columns = (
        TITLES[name], "Rate", "Test %", "Against vanilla, paired", "Test loss", "Train %", "Ensemble %",
        "Largest spread", "Each seed",
    )  # fmt: skip
    return Table(f"{TITLES[name]}: accuracy over {len(SEEDS)} paired seeds", columns, rows)
