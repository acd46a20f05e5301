"""APHQ-ViT: what importance, its average and ReLUs gain over the rivals in one loop, what is measured, what it costs.

Vision transformers trained on noisy 8x8 digits (seeds 1 to 3), weights and activations in 3 and 4 bits. Each method
that learns has the best of three rates, and those of squares of two scales of their loss, chosen with another network
and by pictures that nothing else uses.

    retensor claims aphq_vit
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from benchmarks.aphq_vit_trainings import (
    BATCH,
    CALIB,
    DEPTH,
    FEW,
    ITERS,
    LEARNED,
    METHODS,
    MLP_ITERS,
    MLP_RATES,
    NAMES,
    NOISE,
    ORDER,
    RATES,
    RECON,
    SEEDS,
    SQUARES,
    STARTS,
    TUNING,
    WIDTH,
    Run,
    Settings,
    eight_bits,
    measured_curvature,
    run,
    trained,
    tried,
)
from benchmarks.measuring import Difference, Mean, on_all_cores, paired, threads, times, verdict

from retensor.claims import Claim, Report, Table
from retensor.compression import aphq
from retensor.data import seeded
from retensor.data.reference import digits_vit

SOURCE = "Z. Wu, J. Zhang, J. Chen, J. Guo, D. Huang, Y. Wang, APHQ-ViT, CVPR 2025, arXiv 2504.02508."
BITS = (3, 4)
PAPER = {
    ("rtn", "brecq"): "better than",
    ("brecq", "qdrop"): "better than",
    ("qdrop", "aph"): "at least as good as",
    ("aph", "mr+aph"): "at least as good as",
}
ASIDE = {
    ("each", "aph"): "Averaging importance over images helps.",
    ("hessian", "aph"): "The perturbation Hessian is better than BRECQ's squared gradients.",
    ("qdrop", "mr+aph"): "All of APHQ-ViT is better than QDrop.",
    ("mr+qdrop", "mr+aph"): "(ours) With MLPs reconstructed, the weights by importance still help.",
    ("ones", "aph"): "(ours) Random signs are better than the published direction, all ones.",
}
SETTING = (
    f"ViT (width {WIDTH}, {DEPTH} blocks) on 8x8 digits with noise of {NOISE:g}, {RECON} training pictures, {CALIB} of "
    f"them for steps, {ITERS} iterations a block, {MLP_ITERS} an MLP, {len(SEEDS)} seeds"
)
TUNED = "each at the best of 3 rates, squares also of 2 scales of the loss, chosen on another network"
COST_DEPTH, COST_IMAGES, ROUNDS, NEEDED = 6, 128, 5, 1.5
POINTS, CORRELATED = 0.3, 0.85


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    states = on_all_cores(trained, [(seed,) for seed in (TUNING, *SEEDS)], progress, "trainings")
    before = dict(zip((TUNING, *SEEDS), states, strict=True))
    for part in (what_is_measured, in_few_bits, beside_peers):
        progress(part.__name__.replace("_", " "))
        made, shown = part(before, progress)
        claims += made
        tables += shown
    progress("cost")
    claims.append(cost())
    libraries = ("torch", "timm", "torchao", "onnxruntime", "scikit-learn")
    return Report("aphq_vit", "APHQ-ViT: blocks fitted where predictions turn on it", SOURCE, claims, tables, libraries)


def what_is_measured(
    before: Mapping[int, dict[str, torch.Tensor]], progress: Callable[[str], None]
) -> tuple[list[Claim], list[Table]]:
    """The estimate beside the exact curvature."""
    jobs = [(before[seed], seed) for seed in SEEDS]
    return curvatures(on_all_cores(measured_curvature, jobs, progress, "estimates"))


def curvatures(found: Sequence[Mapping[str, float]]) -> tuple[list[Claim], list[Table]]:
    """Whether it follows the curvature, and what is left of a shift by all ones."""
    ways = [name for name in found[0] if not name.startswith("ones beside")]
    means = {name: Mean.of([each[name] for each in found], 3) for name in found[0]}
    signs, nothing = means["signs, float32"], [each["ones beside signs, float64"] for each in found]
    held = signs.mean - signs.half >= CORRELATED
    claims = [
        Claim(
            f"(ours) The perturbation Hessian by random signs, one draw in float32, follows the exact diagonal of the "
            f"Gauss-Newton matrix: a correlation of {CORRELATED:g} and more.",
            SETTING.split(",")[0] + f", 64 pictures, blocks but the last, {len(SEEDS)} seeds",
            f"eight draws: {means['8 draws, float32']}; the published recipe, all ones at 1e-6 in float32: "
            f"{means['ones, 1e-6, float32']}",
            "not given", f"{signs}", verdict(held, signs.mean >= CORRELATED),
            "" if held else f"The 95 % interval reaches below {CORRELATED:g}.",
        ),
        Claim(
            "(ours) A pre-norm transformer does not see a shift by all ones, the published direction: what is measured "
            "by it is rounding.",
            SETTING.split(",")[0] + f", float64, steps of 1e-3, {len(SEEDS)} seeds",
            "random signs in the same setting", "all ones is what was published",
            f"{max(nothing):.1e} of the importance by random signs, at most", verdict(max(nothing) < 1e-6),
            "" if max(nothing) < 1e-6 else "More than rounding is left.",
        ),
    ]  # fmt: skip
    rows = [(name, str(means[name])) for name in ways]
    return claims, [Table("Correlation with the exact diagonal", ("Estimate", "Correlation"), rows)]


def in_few_bits(
    before: Mapping[int, dict[str, torch.Tensor]], progress: Callable[[str], None]
) -> tuple[list[Claim], list[Table]]:
    """All methods at their rates, tuned at the fewest bits."""
    rates, mlp_rate = tuned(before[TUNING], progress)
    jobs = [
        (before[seed], seed, bits, rates, mlp_rate, tuple(METHODS) if bits == BITS[0] else ORDER, bits == BITS[0])
        for bits in BITS
        for seed in SEEDS
    ]
    found = on_all_cores(run, jobs, progress, "networks in few bits")
    claims: list[Claim] = []
    tables: list[Table] = []
    for at, bits in enumerate(BITS):
        runs = found[at * len(SEEDS) : (at + 1) * len(SEEDS)]
        claims += compared(bits, runs)
        tables.append(listed(bits, runs, rates))
        if not at:
            claims += smoothing(runs)
            claims.append(averaging(runs))
    return claims, tables


def tuned(state: dict[str, torch.Tensor], progress: Callable[[str], None]) -> tuple[Settings, float]:
    """The best settings of each method, and then of MLPs, on the tuning network."""
    (scaled, raw), (first, *others) = STARTS, MLP_RATES
    ways = [(lr, scaled, first, LEARNED) for lr in RATES] + [(lr, raw, first, SQUARES) for lr in RATES]
    # What has no MLPs to fit is tried at the first of their rates alone.
    ways += [(RATES[1], scaled, mlp, ("mr+aph",)) for mlp in others]
    jobs = [(state, TUNING, BITS[0], *way) for way in ways]
    done = on_all_cores(tried, jobs, progress, "rates")
    best: dict[str, tuple[float, tuple[float, float | None]]] = {}
    of_mlps: dict[float, float] = {}
    for (lr, start, mlp, names), kl in zip(ways, done, strict=True):
        for name in names:
            if mlp == first:
                best[name] = min(
                    best.get(name, (math.inf, (lr, start))), (kl[name], (lr, start)), key=lambda one: one[0]
                )
        if (lr, start) == (RATES[1], scaled):
            of_mlps[mlp] = kl["mr+aph"]
    return {name: settings for name, (_, settings) in best.items()}, min(of_mlps, key=of_mlps.__getitem__)


def compared(bits: int, runs: Sequence[Run]) -> list[Claim]:
    """The paper's order, one pair after another, and what else is said, by the divergence of predictions."""
    pairs = {pair: f"{NAMES[pair[1]]} is {PAPER[pair]} {NAMES[pair[0]]}." for pair in PAPER} | ASIDE
    claims = []
    for (worse, better), statement in pairs.items():
        if not {worse, better} <= runs[0].methods.keys():
            continue
        kl, points = differences(runs, better, worse)
        equal = PAPER.get((worse, better)) == "at least as good as"
        # Partly held where it is no worse on average, and not told apart.
        held = kl.above()
        claims.append(
            Claim(
                f"W{bits}A{bits}: {statement}" if not statement.startswith("(ours)")
                else f"(ours) W{bits}A{bits}: {statement.removeprefix('(ours) ')}",
                SETTING,
                f"{NAMES[worse]}, {TUNED}" if worse != "rtn" else NAMES[worse],
                "better by top-1 on ImageNet" if not equal else "at least as good by top-1 on ImageNet",
                f"divergence from the given network lower by {kl} (1e-3), accuracy by {points} points",
                verdict(held, equal and kl.mean >= 0),
                "" if held else kl.why,
            )
        )  # fmt: skip
    return claims


def differences(runs: Sequence[Run], better: str, worse: str) -> tuple[Difference, Difference]:
    """By how much the divergence is lower, in thousandths, and the accuracy higher, in points."""
    ours, theirs = ([each.methods[name] for each in runs] for name in (better, worse))
    kl = paired([1000 * out.kl for out in theirs], [1000 * out.kl for out in ours])
    return kl, paired([100 * out.accuracy for out in ours], [100 * out.accuracy for out in theirs])


def listed(bits: int, runs: Sequence[Run], rates: Settings) -> Table:
    """All methods."""
    whole = Mean.of([100 * each.whole for each in runs])
    rows: list[tuple[str, ...]] = [("In float32", "0", str(whole), "")]
    for name in runs[0].methods:
        outcomes = [each.methods[name] for each in runs]
        lr, start = rates.get(name, (None, None))
        rate = "" if lr is None else f"{lr:g}" if start is not None else f"{lr:g}, loss as it is"
        rows.append((NAMES[name], str(Mean.of([1000 * out.kl for out in outcomes])),
                     str(Mean.of([100 * out.accuracy for out in outcomes])), rate))  # fmt: skip
    columns = ("Method", "Divergence, 1e-3", "Test accuracy, %", "Rate")
    return Table(f"W{bits}A{bits}: mean and standard error over seeds", columns, rows)


def smoothing(runs: Sequence[Run]) -> list[Claim]:
    """What ReLUs cost before and after MLPs are reconstructed, and how far out hidden numbers lie."""
    found = [each.mlps for each in runs]
    lost = {
        name: paired([100 * each["before"] for each in found], [100 * each[name] for each in found])
        for name in ("swapped", "fitted")
    }
    tails = {name: Mean.of([each[f"{name} tail"] for each in found]) for name in ("before", "swapped", "fitted")}
    fell = paired([each["before tail"] for each in found], [each["fitted tail"] for each in found])
    near = lost["fitted"].mean + lost["fitted"].half <= 1.5
    many = lost["swapped"].above(1.5)
    return [
        Claim(
            "ReLUs in the places of GELUs lose many points, and reconstructing MLPs brings back all but 1.5.",
            SETTING,
            f"ReLUs put in and nothing fitted: {lost['swapped']} points lost",
            "0.1 to 1.1 points lost on ImageNet",
            f"{lost['fitted']} points lost",
            verdict(near and many, near),
            "" if near and many else "Putting them in loses few points here." if near else "More than 1.5 are lost.",
        ),
        Claim(
            "With reconstructed MLPs the inputs of second layers have a narrow range.",
            f"{SETTING}; the 99.9 % quantile of positive inputs over their median",
            f"the given network: {tails['before']}; ReLUs put in: {tails['swapped']}",
            "bounded (a picture)",
            f"{tails['fitted']}; lower by {fell}",
            fell.verdict,
            fell.why,
        ),
    ]


def averaging(runs: Sequence[Run]) -> Claim:
    """Blocks' loss on pictures that were not seen, with few to fit by."""
    ours, theirs = ([1000 * each.averaging[name] for each in runs] for name in ("aph", "each"))
    gain = paired(theirs, ours)
    told = {name: [1000 * each.averaging[f"{name} kl"] for each in runs] for name in ("aph", "each")}
    kl = paired(told["each"], told["aph"])
    return Claim(
        f"W{BITS[0]}A{BITS[0]}, {FEW} pictures: averaged importance gives blocks of no higher loss on unseen pictures, "
        f"in 1/{FEW} of the memory.",
        SETTING.replace(f"{RECON} training pictures", f"{FEW} training pictures"),
        f"{NAMES['each']}, {TUNED}",
        "better by top-1 on ImageNet",
        f"loss lower by {gain} (1e-3 of the outputs), divergence by {kl} (1e-3)",
        verdict(gain.above(), gain.mean >= 0),
        gain.why,
    )


def beside_peers(
    before: Mapping[int, dict[str, torch.Tensor]], progress: Callable[[str], None]
) -> tuple[list[Claim], list[Table]]:
    """Eight bits."""
    return peers(on_all_cores(eight_bits, [(before[seed], seed) for seed in SEEDS], progress, "networks in 8 bits"))


def peers(found: Sequence[Mapping[str, float]]) -> tuple[list[Claim], list[Table]]:
    """Accuracies in 8 bits."""
    claims = []
    for peer, name in (("torchao", "torchao, a range for each token"), ("onnxruntime", "ONNX Runtime, dynamic int8")):
        behind = paired([100 * each[peer] for each in found], [100 * each["ours"] for each in found])
        near = behind.mean + behind.half <= POINTS
        claims.append(
            Claim(
                f"(ours) W8A8 with fixed steps is within {POINTS:g} points of a peer that looks at every input.",
                SETTING, name, "not given", f"{behind} points behind", verdict(near, behind.mean <= POINTS),
                "" if near else f"The 95 % interval reaches beyond {POINTS:g} points.",
            )
        )  # fmt: skip
    names = {"whole": "In float32", "ours": "W8A8, fixed steps", "torchao": "torchao", "onnxruntime": "ONNX Runtime"}
    rows = [(name, str(Mean.of([100 * each[key] for each in found]))) for key, name in names.items()]
    return claims, [Table("Eight bits", ("Network", "Test accuracy, %"), rows)]


def cost() -> Claim:
    """Importance of all blocks, by running what lies behind each, and by running the whole network."""
    with seeded(0):
        model = digits_vit(WIDTH, COST_DEPTH).eval()
    images = torch.randn(COST_IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    names = [f"blocks.{i}" for i in range(COST_DEPTH)]

    def all_of(rerun: bool) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = aphq.perturbation_hessian(model, images, names, batch=BATCH, rerun=rerun)
        return found

    ours, theirs = all_of(False), all_of(True)
    same = all(torch.equal(ours[name], theirs[name]) for name in names)
    with threads(1):
        found = times({"behind": lambda: all_of(False), "whole": lambda: all_of(True)}, ROUNDS)
    ratio = found.ratio("whole", "behind")
    held = ratio >= NEEDED and same
    return Claim(
        f"(ours) Importance of all blocks takes {NEEDED:g} times less where outputs are kept and only what lies behind "
        "them runs.",
        f"ViT (width {WIDTH}, {COST_DEPTH} blocks), {COST_IMAGES} pictures, 1 thread, median of {ROUNDS}",
        "the whole network run for each block", "not given",
        f"{ratio:.2f} times, numbers equal in every bit: {same}", verdict(held, same and ratio > 1),
        "" if held else "Not as much." if same else "The numbers differ.",
    )  # fmt: skip
