"""Neural Metamorphosis in miniature: one implicit function for the block of a digit classifier at every width.

retensor claims neumeta
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from benchmarks.measuring import Difference, paired, power, times, verdict
from benchmarks.neumeta_trainings import (
    BATCH,
    FIELD,
    FULL,
    HELD_OUT,
    NORMED,
    PLAIN,
    RANGE,
    RECON,
    SAMPLES,
    SEEDS,
    SHOWN,
    SMALL,
    TRAPPED,
    UNSEEN,
    Base,
    Run,
    run_all,
)
from torch import nn

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import neumeta as nm
from retensor.data.reference import DigitsCNN

SOURCE = (
    'Yang, Wang, "Neural Metamorphosis", ECCV 2024, arXiv 2410.11878. Peers: torch-pruning (L1 magnitude); Yu, Huang, '
    '"Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.'
)
SCRATCHPAD = 16 << 10


INSIDE = (16, SMALL)
WIDTHS = (FULL, *INSIDE)


def measure(progress: Callable[[str], None]) -> Report:
    # The longest trainings first, so that no core waits for the last of them.
    normed, plain = run_all(progress, (NORMED, PLAIN))
    claims = [
        kept_claim(plain, PLAIN),
        *peer_claims(plain),
        held_out_claim(plain),
        *ablation_claims(plain),
        normed_claim(normed, plain),
        storage_claim(plain[0]),
    ]
    costs, traffic = traffic_claim(plain, progress)
    tables = [
        accuracy_table(plain, PLAIN),
        held_out_table(plain),
        dead_table(plain, PLAIN),
        accuracy_table(normed, NORMED),
        dead_table(normed, NORMED),
        traffic,
    ]
    return Report(
        "neumeta",
        "Neural Metamorphosis",
        SOURCE,
        [*claims, costs, *speed_claims(plain[0], progress)],
        tables,
        ("fast-tsp", "torch", "torch-pruning"),
    )


def across(runs: Sequence[Run], name: str, width: int) -> float:
    return statistics.fmean([run.scores[name][width] for run in runs])


def against(runs: Sequence[Run], one: str, other: str, width: int) -> Difference:
    return paired([run.scores[one][width] for run in runs], [run.scores[other][width] for run in runs], digits=1)


def setting(base: Base) -> str:
    decay = " and ".join(f"{100 * part:.0f} %" for part in base.milestones)
    return (
        f"{base.reference} of {len(SEEDS)} seeds, block of 16 -> h -> 16 generated and the rest fixed; {base.warm} "
        f"steps of warm start and {base.fit} of training in batches of {BATCH} at a rate of {base.lr:g}"
        f"{f', a tenth from {decay} of them on' if decay else ''}; reconstruction weight {RECON:g}; mean of K = "
        f"{SAMPLES} samples; test accuracy"
    )


def judged(differences: Mapping[int, Difference], limit: float) -> tuple[Verdict, str]:
    """Held where every 95 % interval lies above the limit, partly held where any does."""
    above = [difference.above(limit) for difference in differences.values()]
    return verdict(all(above), any(above)), (
        "" if all(above) else f"The 95 % interval lies above {limit:g} points at {sum(above)} of {len(above)} widths."
    )


def kept_claim(runs: Sequence[Run], base: Base) -> Claim:
    lost = paired([run.scores["NeuMeta"][SMALL] for run in runs], [run.base for run in runs], digits=1)
    full, bypass = (statistics.fmean([getattr(run, name) for run in runs]) for name in ("base", "bypass"))
    held = lost.above(-2)
    return Claim(
        "The full network's accuracy is kept at 75 % compression, without retraining.",
        f"{setting(base)} at h = {SMALL}, {100 * share(runs[0]):.0f} % of the block's parameters",
        "the network itself, at h = 32",
        "full-size performance",
        f"{across(runs, 'NeuMeta', SMALL):.1f} % of {full:.1f} %: {lost}; h = 32/16/8: {listed(runs, 'NeuMeta')} %; "
        f"the block bypassed {bypass:.1f} %",
        verdict(held, lost.above(-6)),
        "" if held else "Held is a 95 % interval within 2 points of the network, partly held within 6.",
    )


def normed_claim(runs: Sequence[Run], plain: Sequence[Run]) -> Claim:
    """The same of networks with normalisation, and how they differ."""
    claim = kept_claim(runs, NORMED)
    others = [f"{name} {listed(runs, name)}" for name in ("without permutation", *NORMED.peers)]

    def smoothness(runs: Sequence[Run]) -> str:
        before, after, shaken = map(statistics.fmean, zip(*((*run.variation, run.shaken) for run in runs), strict=True))
        return f"total variation {before:.0f} to {after:.0f}, and {shaken:.0f} % right with such noise"

    return replace(
        claim,
        statement=f"{claim.statement[:-1]}, where batch normalisation was fused.",
        ours=f"{claim.ours}; {', '.join(others)} %",
        reason=f"{claim.reason} How smooth fused weights become by reordering, and how they bear noise of half their "
        f"size: {smoothness(runs)}; without normalisation {smoothness(plain)}.".strip(),
    )


COMPARED = [
    ("L1 pruning", "torch-pruning's L1 magnitude, no fine-tuning", "Sampled networks beat pruned ones", 0.0),
    ("resampled along the path", "the full weights resampled along the reordered channels, no training",
     "(ours) Sampled networks beat resampled ones", 0.0),
    ("L1 pruning, fine-tuned each", f"torch-pruning's L1 magnitude, then {PLAIN.fine_tuning} steps of the whole "
     "network for each width", "(ours) Sampled networks match pruned ones that were fine-tuned", -1.0),
    ("trained alone each", "a network trained for each width", "Sampled networks match individual training", -1.0),
    ("slimmable training", f"universally slimmable training, {PLAIN.slim} steps of four widths, same fixed layers",
     "(ours) Sampled networks match slimmable ones", -1.0),
]  # fmt: skip


def peer_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    for name, baseline, statement, limit in COMPARED:
        for widths, where in ((INSIDE, "at trained widths"), (UNSEEN, "at widths below the trained ones")):
            differences = {width: against(runs, "NeuMeta", name, width) for width in widths}
            found, reason = judged(differences, limit)
            yield Claim(
                f"{statement} {where}.",
                f"{setting(PLAIN)}; h = {' and '.join(map(str, widths))}",
                baseline,
                "within 1 point" if limit else "better",
                "; ".join(
                    f"h = {width}: {across(runs, 'NeuMeta', width):.1f} against {across(runs, name, width):.1f} ({d})"
                    for width, d in differences.items()
                ),
                found,
                reason,
            )


def held_out_claim(runs: Sequence[Run]) -> Claim:
    gaps = {width: [gap(run, width) for run in runs] for width in HELD_OUT}
    # Absolute, so that one seed's gain does not hide another's loss.
    apart = {width: statistics.fmean(map(abs, each)) for width, each in gaps.items()}
    worst, largest = max(apart.values()), max(abs(value) for each in gaps.values() for value in each)
    # Widths at which the block does nothing are all alike.
    works = all(
        paired([run.scores["NeuMeta"][width] for run in runs], [run.bypass for run in runs]).above()
        for width in HELD_OUT
    )
    reason = "Held is within 1 point in the mean of the seeds' distances, partly held within 2."
    return Claim(
        "Widths inside the range that were never trained work as well as trained ones.",
        f"{setting(PLAIN)}; widths {', '.join(map(str, HELD_OUT))} left out of training",
        "the same family's two neighbouring widths, which were trained",
        "equal",
        "; ".join(
            f"h = {width}: {apart[width]:.1f} points apart ({Difference.of(each, digits=1)})"
            for width, each in gaps.items()
        )
        + f"; at most {largest:.1f} in one seed",
        verdict(works and worst <= 1, works and worst <= 2),
        "No better than the block bypassed." if not works else "" if worst <= 1 else reason,
    )


def gap(run: Run, width: int) -> float:
    mine = run.scores["NeuMeta"]
    return mine[width] - (mine[width - 1] + mine[width + 1]) / 2


def ablation_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    gain = against(runs, "NeuMeta", "without permutation", SMALL)
    before, after = (statistics.fmean([run.variation[i] for run in runs]) for i in (0, 1))
    yield Claim(
        "Reordering channels along a shortest path helps.",
        f"{setting(PLAIN)} at h = {SMALL}",
        "the same without reordering",
        "helps",
        f"{across(runs, 'NeuMeta', SMALL):.1f} against {across(runs, 'without permutation', SMALL):.1f} %: {gain}; "
        f"total variation {before:.0f} to {after:.0f}",
        verdict(gain.above(10), gain.above()),
        "" if gain.above(10) else "Held is a 95 % interval above 10 points, partly held above none.",
    )
    outside, inside = (
        {width: against(runs, "NeuMeta", "without noise", width) for width in widths} for widths in (UNSEEN, WIDTHS)
    )
    yield Claim(
        "Noise on coordinates helps at widths below the trained ones.",
        f"{setting(PLAIN)}; without noise K = 1",
        "the same without noise, in the warm start, training and sampling",
        "helps",
        f"{told(outside)}; inside the range {told(inside)}",
        *judged(outside, 0.0),
    )
    for name in TRAPPED:
        yield trap_claim(runs, name)


def trap_claim(runs: Sequence[Run], name: str) -> Claim:
    """That a warm start is needed where most fits without are trapped, else that it helps."""
    gains = {width: against(runs, "NeuMeta", name, width) for width in WIDTHS}
    apart = statistics.fmean(
        [max(run.scores[name][w] for w in WIDTHS) - min(run.scores[name][w] for w in WIDTHS) for run in runs]
    )
    dead = statistics.fmean([100 * run.dead[name][FULL] for run in runs])
    caught, escaped = sum(run.trapped[name] for run in runs), not any(run.trapped["NeuMeta"] for run in runs)
    needed = 2 * caught > len(runs)
    found, reason = judged(gains, 0.0)
    if needed:
        found = verdict(escaped)
        reason = "" if escaped else "Some fits with the warm start are trapped as well."
    return Claim(
        "(ours) A warm start at random widths is needed against the bypass trap."
        if needed
        else "(ours) A warm start at random widths helps.",
        f"{setting(PLAIN)}; {name}",
        f"NeuMeta {name}",
        "without: dead channels, and one accuracy at all widths" if needed else "better",
        f"h = 32/16/8: {listed(runs, 'NeuMeta')} % against {listed(runs, name)} %, {told(gains)}; without, widths are "
        f"{apart:.1f} points apart, {dead:.0f} % of the channels are dead at h = 32, and fit refuses {caught} of "
        f"{len(runs)}",
        found,
        reason,
    )


def told(differences: Mapping[int, Difference]) -> str:
    return "; ".join(f"h = {width}: {d}" for width, d in differences.items())


def listed(runs: Sequence[Run], name: str) -> str:
    return "/".join(f"{across(runs, name, width):.1f}" for width in WIDTHS)


def share(run: Run) -> float:
    assert run.family is not None
    return run.family.generated_parameters(SMALL) / run.family.generated_parameters(FULL)


def storage_claim(run: Run) -> Claim:
    family = run.family
    assert family is not None
    own = sum(parameter.numel() for parameter in family.fields())
    full = family.generated_parameters(FULL)
    every = sum(family.generated_parameters(width) for width in RANGE)
    return Claim(
        "(ours) One object for all sizes is smaller than what else serves these sizes.",
        f"implicit functions of {FIELD['hidden']} x {FIELD['depth']}, F = {FIELD['freqs']}; widths 8 to 32",
        "the generated tensors of all 25 widths, and slimmable training's, which serve all widths as slices of the "
        "full width's",
        "one object",
        f"{own:,} parameters; {every:,} at all widths together; slimmable {full:,} ({own / full:.1f} times that)",
        verdict(own < min(every, full), own < every),
        ""
        if own < full
        else "Slimmable training has one smaller object for all sizes; partly held is below all widths together.",
    )


def speed_claims(run: Run, progress: Callable[[str], None]) -> Iterator[Claim]:
    progress("sampling and running times")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    family = nm.NeuMeta(nm.WidthSpace(net, "**", example=torch.zeros(1, 64, 8, 8)))
    single = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 1, 1))
    one = nm.NeuMeta(nm.WidthSpace(single, "**", example=torch.zeros(1, 64, 8, 8)))
    widths, counts = (64, 128, 256), (1, 2, 4, 8)
    calls = {
        **{f"h{width}": lambda w=width: family.sample(w, k=1) for width in widths},
        **{f"k{count}": lambda c=count: family.sample(64, k=c) for count in counts},
        "one": lambda: one.sample(64, k=1),
    }
    with warnings.catch_warnings():
        # What is sampled takes as long from a family that was never fitted.
        warnings.simplefilter("ignore")
        taken = times(calls, rounds=5)
    sizes = [family.generated_parameters(width) for width in widths]
    by_size = power(sizes, [taken[f"h{width}"] for width in widths])
    by_k = power(counts, [taken[f"k{count}"] for count in counts])
    yield Claim(
        "(ours) Sampling time is linear in the weights and in K, and below 1 s for a convolution of 64 x 64 x 9.",
        f"256 x 4, F = 16; {sizes[0]:,} to {sizes[-1]:,} weights, K = 1 to {counts[-1]}; "
        f"{torch.get_num_threads()} threads",
        "itself at other sizes",
        "linear; 1 s",
        f"exponents {by_size:.2f} in the weights and {by_k:.2f} in K; {taken['one']:.2f} s for 64 x 64 x 9 at K = 1",
        verdict(
            0.8 <= by_size <= 1.2 and 0.8 <= by_k <= 1.2 and taken["one"] < 1, taken["one"] < 1,
        ),
    )  # fmt: skip
    assert run.family is not None
    x = torch.rand(64, 1, 8, 8)
    small = run.family.sample(SMALL, k=2).eval()
    plain = DigitsCNN(SMALL, norm=False).eval()
    with torch.no_grad():
        running = times({"small": lambda: small(x), "plain": lambda: plain(x)}, rounds=31, inner=10)
    ratio = running.ratio("small", "plain")
    yield Claim(
        "(ours) A sampled network runs at a plain network's speed.",
        f"64 digits at h = {SMALL}, medians of 31 alternating rounds of 10 runs; {torch.get_num_threads()} threads",
        f"DigitsCNN({SMALL}) without normalisation",
        "equal",
        f"{ratio:.2f} times",
        verdict(ratio < 1.1, ratio < 1.25),
    )


def traffic_claim(runs: Sequence[Run], progress: Callable[[str], None]) -> tuple[Claim, Table]:
    progress("off-chip traffic")
    family = runs[0].family
    assert family is not None
    names = [f"h = {width}" for width in WIDTHS]
    both = rt.compare(
        *(family.sample(width, k=2) for width in WIDTHS), inputs=(1, 1, 8, 8), accelerator=SCRATCHPAD, names=names
    )
    full, small = both[names[0]], both[names[-1]]
    rows = []
    for name, width, sheet in zip(names, WIDTHS, both.sheets, strict=True):
        rows.append((name, sheet.parameters, sheet.macs, sheet.m_r_bytes, total(sheet), across(runs, "NeuMeta", width)))
    columns = ("Network", "Parameters", "Multiply-accumulates", "M_R, bytes", "Off-chip bytes", "Accuracy, %")
    ratio = total(small) / total(full)
    claim = Claim(
        "(ours) A small sample moves fewer bytes off the chip than the full network at the same scratchpad.",
        f"one digit, scratchpad of {SCRATCHPAD:,} bytes, float32; activations by the planner, parameters streamed",
        "the sample at h = 32",
        "fewer",
        f"{total(small):,} of {total(full):,} bytes: {ratio:.2f} times",
        verdict(ratio < 1),
    )
    return claim, Table(f"Costs of samples at a scratchpad of {SCRATCHPAD:,} bytes", columns, rows)


def total(sheet: rt.CostSheet) -> int:
    assert sheet.compulsory_bytes is not None
    assert sheet.streamed_bytes is not None
    assert sheet.non_compulsory_bytes is not None
    return sheet.compulsory_bytes + sheet.streamed_bytes + sheet.non_compulsory_bytes


def accuracy_table(runs: Sequence[Run], base: Base) -> Table:
    rows: list[list[str | float]] = []
    for name in (*base.recipes, *base.peers):
        for width in SHOWN:
            each = [run.scores[name][width] for run in runs]
            rows.append([name, str(width), *each, statistics.fmean(each)])
    rows.append(
        ["block bypassed", "none", *(run.bypass for run in runs), statistics.fmean([run.bypass for run in runs])]
    )
    rows.append(["the network itself", "32", *(run.base for run in runs), statistics.fmean([run.base for run in runs])])
    title = f"{base.reference}: test accuracy in % by width; 6 and 4 are outside of the trained range, 12 is held out"
    return Table(title, ("Network", "h", *(f"Seed {seed}" for seed in SEEDS), "Mean"), rows)


def held_out_table(runs: Sequence[Run]) -> Table:
    rows = [
        (
            str(width),
            *(across(runs, "NeuMeta", width + step) for step in (-1, 0, 1)),
            *(gap(run, width) for run in runs),
        )
        for width in HELD_OUT
    ]
    columns = ("h", "h - 1, trained", "h, held out", "h + 1, trained", *(f"Apart, seed {seed}" for seed in SEEDS))
    return Table(
        "Held-out widths inside the range: test accuracy in %, mean over seeds, and apart of neighbours", columns, rows
    )


def dead_table(runs: Sequence[Run], base: Base) -> Table:
    rows = [
        (name, str(width), *(100 * run.dead[name][width] for run in runs))
        for name in base.recipes
        for width in sorted(runs[0].dead[name], reverse=True)
    ]
    title = f"{base.reference}: inner channels that never fire on a training batch, in %"
    return Table(title, ("Family", "h", *(f"Seed {seed}" for seed in SEEDS)), rows)
