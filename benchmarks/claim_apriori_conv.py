"""A-priori compressed convolutions as wave simulators, against dense ones, smaller dense ones and depthwise ones.

retensor claims apriori_conv
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from benchmarks.apriori_conv_costs import Speed, growth, peak, solver_truth, speed, speed_in_space
from benchmarks.apriori_conv_trainings import (
    BATCH,
    CLEAN,
    DECODER_SEEDS,
    DECODER_STEPS,
    FEW,
    FORMAT_SEEDS,
    FULL,
    GRID,
    HALF,
    NAMES,
    RATES,
    ROLLOUT,
    SEEDS,
    SMALL,
    TEST,
    TRAINED,
    VALIDATION,
    Decoded,
    Rates,
    Ratio,
    Run,
    Training,
    best,
    build,
    decoders,
    depthwise_width,
    diverged,
    of,
    ratio,
    trained,
    trajectories,
    tuned,
    waves,
)
from benchmarks.measuring import Mean, paired, verdict

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import apriori as ap

SOURCE = (
    "S. Boukraichi, N. Akkari, F. Casenave, D. Ryckelynck, A priori compression of convolutional neural networks for "
    "wave simulators, 2023, arXiv 2304.04964; tensorly-torch, FactorizedConv."
)


Peaks = Mapping[tuple[str, int], tuple[int, int]]
"""What stays and what comes on top, in bytes, by network and batch."""


def measure(progress: Callable[[str], None]) -> Report:
    rates = tuned(progress)
    runs = trained(rates, progress)
    decoded = decoders(progress)
    progress("solver")
    truth = solver_truth()
    progress("memory and traffic")
    x, y = ap.pairs(trajectories("train"))
    dense = build("dense", 0).normalise_(x, y)
    forms = {
        "dense": dense,
        "cp, R = 24": ap.compress(dense, rank=24),
        "cp, R = 24, fused": ap.compress(dense, rank=24, implementation="fused"),
        "cp, R = 24, recomputed": ap.compress(dense, rank=24, recompute=True),
    }
    peaks = {(name, size): peak(model, x[:size], y[:size]) for name, model in forms.items() for size in (1, BATCH)}
    pair = (dense, forms["cp, R = 24"])
    least = [rt.cost(model, (1, 2, GRID, GRID), time_limit=5).m_r_bytes for model in pair]
    sheets = rt.compare(*pair, inputs=(1, 2, GRID, GRID), accelerator=max(least), names=["dense", "cp"], time_limit=5)
    progress("speed")
    narrow, wide = speed(24, 5), speed(64, 7)
    space = speed_in_space()
    progress("growth")
    grown = growth()
    claims = [
        *accuracy_claims(runs),
        overfitting_claim(runs),
        decoder_claim(decoded),
        *speed_claims(narrow, wide),
        space_claim(*space),
        memory_claim(peaks),
        growth_claim(grown),
        *traffic_claims(sheets["dense"], sheets["cp"], least),
        solver_claim(*truth),
    ]
    tables = [
        accuracy_table(runs, rates), rates_table(rates), speed_table(narrow, wide), memory_table(peaks),
        growth_table(grown),
    ]  # fmt: skip
    libraries = ("torch", "scikit-fem", "tensorly-torch", "numpy", "joblib")
    return Report("apriori_conv", "A-priori convolutions for wave simulators", SOURCE, claims, tables, libraries)


def setting(training: Training) -> str:
    noise = f"noise of {training.noise:.0%} on inputs" if training.noise else "no noise"
    return (
        f"finite-element waves on {GRID}x{GRID}, {training.sources} training sources, {TEST} unseen ones, "
        f"{training.steps} Adam steps of batch {BATCH} with {noise}, {len(SEEDS)} seeds (geometric means of ratios, "
        f"95 % intervals); the learning rate of each network is the best of {', '.join(f'{r:g}' for r in RATES)} "
        f"one step ahead on {VALIDATION} validation sources, after as many steps, with one more seed"
    )


def accuracy_claims(runs: Sequence[Run]) -> list[Claim]:
    sizes = [int(of(runs, kind, "parameters")[0]) for kind in ("dense", "cp24")]
    less = f"{sizes[0]:,} parameters, {sizes[1]:,} compressed, {sizes[0] / sizes[1]:.1f} times fewer"
    rows = (
        (
            "dense",
            "Accuracy equivalent to classical convolutions with fewer trainable parameters",
            f"the same network with dense convolutions; {less}",
            1.15,
        ),
        (
            "small",
            "(ours) The compressed network is better than a small dense one of as many parameters",
            f"dense networks of widths {SMALL[0]} and {SMALL[1]}, interpolated to {sizes[1]:,} parameters",
            1.0,
        ),
        (
            "depthwise",
            "(ours) It is better than a depthwise-separable one of as many parameters",
            f"depthwise-separable 5x5 convolutions, width {depthwise_width()}, "
            f"{int(of(runs, 'depthwise', 'parameters')[0]):,} parameters",
            1.0,
        ),
    )
    claims = []
    for kind, statement, baseline, limit in rows:
        for what, ahead in (("test", "one step ahead"), ("rollout", f"over rollouts of {ROLLOUT} steps")):
            found = {
                training: ratio(runs, "cp24", kind, what, training)
                for training in (
                    FULL,
                    *((HALF,) if kind == "dense" else ()),
                    *((CLEAN,) if kind != "depthwise" else ()),
                )
            }
            told = [f"relative L2 error {found[FULL]} of the baseline"]
            told += [f"{found[HALF]} at half the training (the same learning rates)"] if HALF in found else []
            told += [f"{found[CLEAN]} trained without noise"] if CLEAN in found else []
            claims.append(
                Claim(
                    f"{statement}: {ahead}.", setting(FULL), baseline,
                    "equivalent; the bar is an interval up to 1.15" if limit > 1 else "below 1", "; ".join(told),
                    worst(*(judged(found[each], limit) for each in (FULL, CLEAN) if each in found)),
                    needs_noise(runs, kind, found, limit) if what == "rollout" and CLEAN in found else "",
                )
            )  # fmt: skip
    return claims


def judged(found: Ratio, limit: float) -> Verdict:
    """Better than the baseline, or no worse where the limit leaves a margin."""
    return found.within(limit) if limit > 1 else found.below(limit)


def needs_noise(runs: Sequence[Run], kind: str, found: Mapping[Training, Ratio], limit: float) -> str:
    """What the verdict on rollouts owes to noise on the inputs in training."""
    kinds = ("dense", "cp24") if kind == "dense" else ("cp24", *(f"dense{width}" for width in SMALL))
    shares = ", ".join(
        f"{NAMES[each]} {diverged(runs, each, FULL):.0%} with noise and {diverged(runs, each, CLEAN):.0%} without"
        for each in kinds
    )
    told = f"Rollouts further off than a field of zeros: {shares}."
    if judged(found[FULL], limit) != "not held" and judged(found[CLEAN], limit) == "not held":
        return f"It holds with noise and does not without. {told}"
    return told


def worst(*verdicts: Verdict) -> Verdict:
    """Held where all are, not held where no part is held, partly else."""
    if set(verdicts) == {"held"}:
        return "held"
    return "partly held" if "held" in verdicts or set(verdicts) == {"partly held"} else "not held"


def overfitting_claim(runs: Sequence[Run]) -> Claim:
    gaps = {kind: of(runs, kind, "gap", FEW) for kind in ("dense", "cp24")}
    broken = {kind: sum(not math.isfinite(gap) for gap in found) for kind, found in gaps.items()}
    told, held = f"diverged in {broken['cp24']} of {len(SEEDS)} seeds, dense in {broken['dense']}", verdict(False)
    why = "The gap is the relative L2 error of one step on unseen sources less that on training sources."
    if not any(broken.values()):
        # Less of a gap than dense is above nothing.
        saved = paired(gaps["dense"], gaps["cp24"], digits=4)
        held, why = saved.verdict, f"{saved.why} {why}".strip()
        told = (
            f"gap {statistics.fmean(gaps['cp24']):.4f}, dense {statistics.fmean(gaps['dense']):.4f}, smaller by "
            f"{saved}; error on unseen sources {ratio(runs, 'cp24', 'dense', 'test', FEW)} of dense"
        )
    return Claim(
        "Overfitting is reduced.",
        setting(FEW),
        "the same network with dense convolutions",
        "a gap between unseen and training sources no larger than dense",
        told,
        held,
        why,
    )


def decoder_claim(decoded: Mapping[bool, Decoded]) -> Claim:
    ours, dense = decoded[True], decoded[False]
    found = Ratio.of(ours.errors, dense.errors)
    edge = [name for name, each in (("dense", dense), ("compressed", ours)) if each.rate in (RATES[0], RATES[-1])]
    return Claim(
        "(ours) The same of a decoder with transposed convolutions, from the place of a source to fields.",
        f"four fields of {GRID}x{GRID} from the places of {len(waves()['u']) - TEST - VALIDATION} sources, width 16, "
        f"{DECODER_STEPS} Adam steps of batch {BATCH}, {len(DECODER_SEEDS)} seeds, {TEST} unseen places; "
        f"{dense.parameters:,} parameters, {ours.parameters:,} compressed; learning rates "
        f"{dense.rate:g} and {ours.rate:g} by {VALIDATION} validation places",
        "the same decoder with dense convolutions",
        "equivalent; the bar is an interval up to 1.15",
        f"relative L2 error {found} of the baseline, whose own is {shown(dense.errors)}",
        found.within(1.15),
        f"At the edge of the learning rates that were tried: {' and '.join(edge)}." if edge else "",
    )


def speed_claims(narrow: Speed, wide: Speed) -> list[Claim]:
    threads = f"batch {BATCH}, {GRID}x{GRID}, {torch.get_num_threads()} threads of a CPU"
    return [
        Claim(
            "Shorter prediction times.",
            f"the whole network, {threads}; width 24 with 5x5 and R = 24, width 64 with 7x7 and R = 64",
            "dense convolutions, in the faster of two memory formats",
            "shorter; the bars here are 0.7 and 0.35 of dense",
            f"{narrow.of('cp', 'dense'):.2f} and {wide.of('cp', 'dense'):.2f} of dense, with {narrow.macs:.2f} and "
            f"{wide.macs:.2f} of its multiply-accumulates",
            worst(verdict(narrow.of("cp", "dense") <= 0.7), verdict(wide.of("cp", "dense") <= 0.35)),
        ),
        Claim(
            "Shorter training times.",
            f"forward and backward pass, {threads}; the same two networks",
            "dense convolutions, in the faster of two memory formats",
            "shorter",
            f"{narrow.of('cp', 'dense', True):.2f} and {wide.of('cp', 'dense', True):.2f} of dense",
            worst(*(verdict(s.of("cp", "dense", True) <= 1) for s in (narrow, wide))),
        ),
        *(
            Claim(
                f"(ours) {what} than with the same factors in tensorly-torch.",
                f"{run}, {threads}; the same two networks",
                "tltorch.FactorizedConv, factorization cp, factorized, in the faster of two memory formats",
                "below 1",
                f"{narrow.of('cp', 'tensorly-torch', training):.2f} and "
                f"{wide.of('cp', 'tensorly-torch', training):.2f} of its time",
                worst(*(verdict(s.of("cp", "tensorly-torch", training) < 1) for s in (narrow, wide))),
            )
            for what, run, training in (
                ("Faster predictions", "forward pass", False),
                ("Faster training", "forward and backward pass", True),
            )
        ),
    ]


def space_claim(saved: int, macs: float, forward: float) -> Claim:
    return Claim(
        "(ours) For 3-way kernels the saving is greater: k^3 becomes 3 k.",
        f"one layer, width 24, 5x5x5, R = 24, batch 2 of 16x16x16, forward, {torch.get_num_threads()} threads",
        "nn.Conv3d, in the faster of two memory formats",
        "below 1",
        f"{forward:.2f} of dense, with {macs:.3f} of its multiply-accumulates and {saved:,} parameters fewer",
        verdict(forward <= 1),
    )


def memory_claim(peaks: Peaks) -> Claim:
    def of_dense(form: str, size: int) -> float:
        return sum(peaks[f"cp, R = 24{form}", size]) / sum(peaks["dense", size])

    def on_top(size: int) -> float:
        return peaks["cp, R = 24, recomputed", size][1] / peaks["dense", size][1]

    kept = peaks["cp, R = 24", BATCH][0] / peaks["dense", BATCH][0]
    told = [
        f"batch {size}: peak {of_dense(', recomputed', size):.2f} recomputed, {of_dense('', size):.2f} with outputs "
        f"kept, {of_dense(', fused', size):.2f} fused"
        for size in (1, BATCH)
    ]
    return Claim(
        "Lower memory.",
        f"a training step, {GRID}x{GRID}, width 24, R = 24: weights, Adam's moments and the most that the allocator "
        "gives on top",
        "the same network with dense convolutions",
        "lower",
        f"weights and moments {kept:.2f}; {'; '.join(told)}",
        worst(
            verdict(kept < 1),
            *(verdict(of_dense("", size) < 1, of_dense(", recomputed", size) < 1) for size in (1, BATCH)),
        ),
        "Training keeps three outputs of width R more a layer. recompute=True does not, and goes through a batch in "
        f"parts: on top of weights and moments it takes {on_top(1):.2f} of dense at batch 1, which has no parts, and "
        f"{on_top(BATCH):.2f} at {BATCH}.",
    )


def growth_claim(grown: Sequence[tuple[str, list[int], list[float], float]]) -> Claim:
    found = {name: power for name, _, _, power in grown}
    linear = all(power <= 1.2 for name, power in found.items() if name.startswith("cp"))
    return Claim(
        "(ours) Time grows at most linearly with rank, pixels and the kernel's size, of dense layers with its square.",
        "one layer, forward, one thread; 32 channels, for the kernel of cp 8 channels and R = 256",
        "a dense layer of 32 channels",
        "exponents of at most 1.2, and of 1.8 or more if dense",
        ", ".join(f"{name} {power:.2f}" for name, power in found.items()),
        verdict(linear and found["dense, kernel size"] >= 1.8, linear),
        "Fitted to both logarithms; what does not grow, and short filters that do not fill vectors, make an exponent "
        "smaller.",
    )


def traffic_claims(dense: Any, cp: Any, least: Sequence[int]) -> list[Claim]:
    where = (
        f"one state of {GRID}x{GRID} in float32, width 24, R = 24, scratchpad of {max(least):,} bytes: what runs both "
        f"(dense needs {least[0]:,}, cp {least[1]:,})"
    )

    def split(sheet: Any) -> tuple[int, int] | None:
        """Bytes of parameters and of activations; None where it does not fit."""
        total = sheet.off_chip_bytes
        return None if total is None else (sheet.streamed_bytes, total - sheet.streamed_bytes)

    before, after = split(dense), split(cp)
    claims = []
    for i, what in enumerate(("parameters", "activations")):
        fits = before is not None and after is not None
        claims.append(
            Claim(
                f"(ours) Less off-chip traffic of {what} at the same scratchpad.", where,
                "the same network with dense convolutions, planned alike", "below 1",
                f"{after[i]:,} bytes of {before[i]:,}" if fits else "does not fit",
                verdict(fits and after[i] < before[i]),
                "Equal." if fits and after[i] == before[i] else "",
            )
        )  # fmt: skip
    return claims


def solver_claim(orders_h: Sequence[float], orders_dt: Sequence[float], drift: float) -> Claim:
    right = all(abs(order - 2) < 0.1 for order in (*orders_h, *orders_dt))
    return Claim(
        "(ours) The finite-element solver converges at order 2 in space and time and keeps the energy.",
        "the standing mode sin(pi x) sin(pi y); energy over 1,000 steps from random states",
        "in h the closed form, in dt the solution that is exact in time on the same mesh, by eigenvectors",
        "2, 2 and a relative change of 1e-10",
        f"orders {', '.join(f'{o:.2f}' for o in orders_h)} in h, {', '.join(f'{o:.2f}' for o in orders_dt)} in dt; "
        f"energy changed by {drift:.1e}",
        worst(verdict(right), verdict(drift < 1e-10)),
    )


def shown(values: Sequence[float]) -> str:
    """A mean and its standard error, and how many seeds have none."""
    finite = [value for value in values if math.isfinite(value)]
    broken = f"diverged in {len(values) - len(finite)} of {len(values)}" if len(finite) < len(values) else ""
    mean = str(Mean.of(finite, digits=4)) if len(finite) > 1 else ""
    return ", ".join(part for part in (mean, broken) if part)


def accuracy_table(runs: Sequence[Run], rates: Rates) -> Table:
    x, y = ap.pairs(trajectories("test"))
    still = ap.relative_l2(2 * x[:, :1] - x[:, 1:], y).item()
    rows: list[tuple[str | int | float, ...]] = [
        ("no network: 2 u_n - u_{n-1}", 0, 0, "", 0, "", "", f"{still:.4f}", "", "")
    ]
    for training, kinds in TRAINED.items():
        for kind in kinds:
            figures = [shown(of(runs, kind, what, training)) for what in ("train", "test", "rollout")]
            size = int(of(runs, kind, "parameters", training)[0])
            rate = best(rates, kind, training)
            edge = ", at the edge" if rate in (RATES[0], RATES[-1]) else ""
            rows.append(
                (NAMES[kind], training.sources, training.steps, f"{training.noise:g}", size, f"{rate:g}{edge}",
                 *figures, f"{diverged(runs, kind, training):.0%}")
            )  # fmt: skip
    columns = ("Network", "Training sources", "Steps", "Noise", "Parameters", "Learning rate", "Training", "Unseen",
               f"{ROLLOUT} steps", "Rollouts above 1")  # fmt: skip
    seeds = f"{len(SEEDS)} seeds, {len(FORMAT_SEEDS)} of cp with R = 12, vh, tucker and tt"
    return Table(f"Relative L2 errors, mean and standard error over {seeds}", columns, rows)


def rates_table(rates: Rates) -> Table:
    rows = [
        (NAMES[kind], training.sources, f"{training.noise:g}", *(f"{error:.4f}" for error in errors.values()))
        for (kind, training), errors in rates.items()
    ]
    columns = ("Network", "Training sources", "Noise", *(f"{rate:g}" for rate in RATES))
    return Table("Relative L2 errors of one step on validation sources, by learning rate", columns, rows)


def speed_table(*speeds: Speed) -> Table:
    rows = [
        (f"width {s.width}, {s.kernel}x{s.kernel}", name, *(
            found[name] / min(found["dense"], found["dense, channels last"]) for found in (s.forward, s.training)
        ))
        for s in speeds
        for name in s.forward
    ]  # fmt: skip
    return Table("Times, of the faster dense network's", ("Setting", "Network", "Forward", "Training step"), rows)


def memory_table(peaks: Peaks) -> Table:
    rows = [
        (name, size, kept, most, sum((kept, most)) / sum(peaks["dense", size]))
        for (name, size), (kept, most) in peaks.items()
    ]
    columns = ("Network", "Batch", "Weights and moments", "Most on top", "Together, of dense")
    return Table("Bytes of a training step", columns, rows)


def growth_table(grown: Sequence[tuple[str, list[int], list[float], float]]) -> Table:
    rows = [
        (name, ", ".join(map(str, sizes)), ", ".join(f"{s / seconds[0]:.2f}" for s in seconds), power)
        for name, sizes, seconds, power in grown
    ]
    return Table("Growth of time", ("Layer and size", "Sizes", "Times, of the first", "Exponent"), rows)
