"""A-priori compressed convolutions as wave simulators, against dense ones, smaller dense ones and depthwise ones.

retensor claims apriori_conv
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from benchmarks.apriori_conv_costs import Speed, growth, peak, solver_truth, speed, speed_in_space
from benchmarks.apriori_conv_trainings import (
    BATCH,
    FEW,
    FEW_KINDS,
    GRID,
    KINDS,
    NAMES,
    NOISE,
    OTHER_FORMATS,
    OTHER_SEEDS,
    ROLLOUT,
    SEEDS,
    SMALL,
    STEPS,
    TEST,
    TRAIN,
    VALIDATION,
    Run,
    build,
    depthwise_width,
    of,
    ratio,
    train,
    trajectories,
    tuned,
)
from benchmarks.measuring import Mean, on_all_cores, paired, verdict

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import apriori as ap

SOURCE = (
    "S. Boukraichi, N. Akkari, F. Casenave, D. Ryckelynck, A priori compression of convolutional neural networks for "
    "wave simulators, 2023, arXiv 2304.04964; tensorly-torch, FactorizedConv."
)


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
    runs = on_all_cores(train, jobs, progress, "trainings")
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
            f"relative L2 error {plain} of dense",
            within(plain, 1.15),
        ),
        Claim(
            f"The same over a rollout of {ROLLOUT} steps.",
            f"{setting(TRAIN)}; {less}",
            "the same network with dense convolutions",
            "equivalent; the bar here is 15 % above",
            f"relative L2 error {roll} of dense",
            within(roll, 1.15),
        ),
        Claim(
            "(ours) The compressed network is better than a small dense one of as many parameters.",
            setting(TRAIN),
            f"dense networks of widths {SMALL[0]} and {SMALL[1]}, interpolated to {sizes[1]:,} parameters",
            "below 1",
            f"one step {small}, rollout {small_roll} of its error",
            worst(clearly_below(small, 1), clearly_below(small_roll, 1)),
        ),
        Claim(
            "(ours) It is better than a depthwise-separable one of as many parameters.",
            setting(TRAIN),
            f"depthwise-separable 5x5 convolutions, width {depthwise_width()}, "
            f"{of(runs, 'depthwise', TRAIN, 'parameters')[0]:,} parameters",
            "below 1",
            f"one step {depth}, rollout {depth_roll} of its error",
            worst(clearly_below(depth, 1), clearly_below(depth_roll, 1)),
        ),
    ]


def within(found: Mean, limit: float) -> Verdict:
    """Held where a figure is within its limit, partly where its 95 % interval reaches it."""
    return verdict(found.mean <= limit, found.within(limit))


def clearly_below(found: Mean, limit: float) -> Verdict:
    """Held where the 95 % interval of a figure lies below its limit, partly where the figure does."""
    return verdict(found.below(limit), found.mean < limit)


def worst(*verdicts: Verdict) -> Verdict:
    """Held where all are, not held where none is, partly else."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return "partly held"


def overfitting_claim(runs: Sequence[Run]) -> Claim:
    gaps = {kind: of(runs, kind, FEW, "gap") for kind in ("dense", "cp24")}
    apart = paired(gaps["cp24"], gaps["dense"], digits=4)
    test = ratio(runs, "cp24", "dense", "test", FEW)
    return Claim(
        "Overfitting is reduced.",
        setting(FEW),
        "the same network with dense convolutions",
        "a gap between unseen and training sources no larger than dense",
        f"gap {statistics.fmean(gaps['cp24']):.4f}, dense {statistics.fmean(gaps['dense']):.4f}, difference {apart}; "
        f"error on unseen sources {test} of dense",
        within(apart, 0),
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
            worst(verdict(narrow.ratio("cp") <= 0.7), verdict(wide.ratio("cp") <= 0.35)),
        ),
        Claim(
            "Shorter training times.",
            f"forward and backward pass, {threads}; the same two networks",
            "dense convolutions, in the faster of two memory formats",
            "shorter",
            f"{narrow.ratio('cp', True):.2f} and {wide.ratio('cp', True):.2f} of dense",
            worst(*(verdict(s.ratio("cp", True) <= 1) for s in (narrow, wide))),
        ),
        Claim(
            "(ours) Faster than the same factors in tensorly-torch.",
            f"forward pass, {threads}; the same two networks",
            "tltorch.FactorizedConv, factorization cp, implementation factorized",
            "below 1",
            f"{narrow.forward['cp'] / narrow.forward['tensorly-torch']:.2f} and "
            f"{wide.forward['cp'] / wide.forward['tensorly-torch']:.2f} of its time",
            worst(*(verdict(s.forward["cp"] <= s.forward["tensorly-torch"]) for s in (narrow, wide))),
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
            cells = [str(Mean.of(values, digits=4)) for values in figures.values()]
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
