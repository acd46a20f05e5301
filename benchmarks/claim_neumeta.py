"""Neural Metamorphosis in miniature: one implicit function for the block of a digit classifier at every width.

retensor claims neumeta
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from benchmarks.measuring import Difference, paired, power, times, verdict
from benchmarks.neumeta_trainings import (
    BATCH,
    FIELD,
    FULL,
    HELD_OUT,
    PEERS,
    RANGE,
    RECIPES,
    SAMPLES,
    SEEDS,
    SHOWN,
    SLIM,
    SMALL,
    STEPS,
    TRAPPED,
    UNSEEN,
    WARM,
    Run,
    Steps,
    run_all,
)
from torch import nn

import retensor as rt
from retensor.claims import Claim, Report, Table
from retensor.compression import neumeta as nm
from retensor.data.reference import DigitsCNN

SOURCE = (
    'Yang, Wang, "Neural Metamorphosis", ECCV 2024, arXiv 2410.11878. Peers: torch-pruning (L1 magnitude); Yu, Huang, '
    '"Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.'
)
SCRATCHPAD = 16 << 10


def measure(progress: Callable[[str], None]) -> Report:
    runs = run_all(progress, Steps())
    claims = [
        *accuracy_claims(runs),
        *ablation_claims(runs),
        storage_claim(runs[0]),
        *speed_claims(runs[0], progress),
    ]
    costs, traffic = traffic_claim(runs, progress)
    return Report(
        "neumeta",
        "Neural Metamorphosis",
        SOURCE,
        [*claims, costs],
        [accuracy_table(runs), held_out_table(runs), dead_table(runs), traffic],
        ("fast-tsp", "torch", "torch-pruning"),
    )


def across(runs: Sequence[Run], name: str, width: int) -> float:
    return statistics.fmean([run.scores[name][width] for run in runs])


def against(runs: Sequence[Run], one: str, other: str, width: int) -> Difference:
    return paired([run.scores[one][width] for run in runs], [run.scores[other][width] for run in runs], digits=1)


SETTING = (
    f"digits-cnn of {len(SEEDS)} seeds, block of 16 -> h -> 16 generated and the rest fixed; {WARM} steps of warm "
    f"start and {STEPS} of training in batches of {BATCH}; mean of K = {SAMPLES} samples; test accuracy"
)


def accuracy_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    base = statistics.fmean([run.base for run in runs])
    bypass = statistics.fmean([run.bypass for run in runs])
    share = nm_share(runs[0])
    lost = paired([run.scores["NeuMeta"][SMALL] for run in runs], [run.base for run in runs], digits=1)
    yield Claim(
        "The full network's accuracy is kept at 75 % compression, without retraining.",
        f"{SETTING} at h = {SMALL}, {share:.0%} of the block's parameters",
        "the network itself, at h = 32",
        "full-size performance",
        f"{across(runs, 'NeuMeta', SMALL):.1f} % of {base:.1f} %: {lost}; the generated h = 32 has "
        f"{across(runs, 'NeuMeta', FULL):.1f} %, the block bypassed {bypass:.1f} %",
        verdict(lost.mean > -2, lost.mean > -6),
        "" if lost.mean > -2 else "Held is within 2 points, partly held within 6.",
    )
    rows = [
        ("L1 pruning", "torch-pruning's L1 magnitude, no fine-tuning", "Sampled networks beat pruned ones."),
        ("trained alone each", "a network trained for each width", "Sampled networks match individual training."),
        ("slimmable training", f"universally slimmable training, {SLIM} steps of four widths, same fixed layers",
         "(ours) Sampled networks match slimmable ones."),
    ]  # fmt: skip
    for name, baseline, statement in rows:
        differences = {width: against(runs, "NeuMeta", name, width) for width in (16, SMALL, *UNSEEN)}
        better = [d.mean > 0 if name == "L1 pruning" else d.mean > -1 for d in differences.values()]
        yield Claim(
            statement,
            f"{SETTING}; h = 16 and {SMALL} of the trained range, {UNSEEN[0]} and {UNSEEN[1]} outside",
            baseline,
            "better" if name == "L1 pruning" else "within 1 point",
            "; ".join(
                f"h = {width}: {across(runs, 'NeuMeta', width):.1f} against {across(runs, name, width):.1f} ({d})"
                for width, d in differences.items()
            ),
            verdict(all(better), any(better)),
            "" if all(better) else f"So at {sum(better)} of {len(better)} widths.",
        )
    gaps = {width: [gap(run, width) for run in runs] for width in HELD_OUT}
    worst = max(abs(statistics.fmean(gaps[width])) for width in HELD_OUT)
    yield Claim(
        "Widths that were never trained work as well as trained ones.",
        f"{SETTING}; widths {', '.join(map(str, HELD_OUT))} left out of training",
        "the same family's two neighbouring widths, which were trained",
        "equal",
        "; ".join(f"h = {width}: {Difference.of(gaps[width], digits=1)}" for width in HELD_OUT),
        verdict(worst <= 1, worst <= 2),
        "" if worst <= 1 else "Held is within 1 point, partly held within 2.",
    )


def gap(run: Run, width: int) -> float:
    mine = run.scores["NeuMeta"]
    return mine[width] - (mine[width - 1] + mine[width + 1]) / 2


def ablation_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    gain = against(runs, "NeuMeta", "without permutation", SMALL)
    before, after = (statistics.fmean([run.variation[i] for run in runs]) for i in (0, 1))
    yield Claim(
        "Reordering channels along a shortest path helps.",
        f"{SETTING} at h = {SMALL}",
        "the same without reordering",
        "helps; +10 points or more by the brief's own trial",
        f"{across(runs, 'NeuMeta', SMALL):.1f} against {across(runs, 'without permutation', SMALL):.1f} %: {gain}; "
        f"total variation {before:.0f} to {after:.0f}",
        verdict(gain.mean >= 10, gain.mean > 0),
        "" if gain.mean >= 10 else "Held is 10 points or more, partly held any gain.",
    )
    outside = {width: against(runs, "NeuMeta", "without noise", width) for width in UNSEEN}
    inside = {width: against(runs, "NeuMeta", "without noise", width) for width in (FULL, 16, SMALL)}
    yield Claim(
        "Noise on coordinates helps at widths outside of the trained range.",
        f"{SETTING}; without noise K = 1",
        "the same without noise, in the warm start, training and sampling",
        "helps, and costs about 1 point inside",
        "; ".join(f"h = {width}: {d}" for width, d in {**outside, **inside}.items()),
        verdict(all(d.mean > 0 for d in outside.values()), any(d.mean > 0 for d in outside.values())),
    )
    for name in TRAPPED:
        losses = {width: against(runs, "NeuMeta", name, width) for width in (FULL, 16, SMALL)}
        apart = [max(run.scores[name][w] for w in losses) - min(run.scores[name][w] for w in losses) for run in runs]
        dead = statistics.fmean([run.dead[name][FULL] for run in runs])
        trapped = sum(run.trapped[name] for run in runs)
        yield Claim(
            "(ours) A warm start at random widths is needed against the bypass trap.",
            f"{SETTING}; {name}",
            f"NeuMeta {name}",
            "without: dead channels, and one accuracy at all widths",
            f"h = 32/16/8: {listed(runs, 'NeuMeta')} % against {listed(runs, name)} %, "
            f"{'/'.join(map(str, losses.values()))}; without, widths are {statistics.fmean(apart):.1f} points apart, "
            f"{dead:.0%} of the channels are dead at h = 32, and fit refuses {trapped} of {len(runs)}",
            verdict(all(d.mean > 2 for d in losses.values()), any(d.mean > 2 for d in losses.values())),
            "" if trapped else "No fit was trapped here: held is 2 points better at all three widths, partly at any.",
        )


def listed(runs: Sequence[Run], name: str) -> str:
    return "/".join(f"{across(runs, name, width):.1f}" for width in (FULL, 16, SMALL))


def nm_share(run: Run) -> float:
    assert run.family is not None
    return run.family.generated_parameters(SMALL) / run.family.generated_parameters(FULL)


def storage_claim(run: Run) -> Claim:
    family = run.family
    assert family is not None
    own = sum(parameter.numel() for parameter in family.fields())
    full = family.generated_parameters(FULL)
    every = sum(family.generated_parameters(width) for width in RANGE)
    return Claim(
        "(ours) One object for all sizes is smaller than the networks of these sizes.",
        f"implicit functions of {FIELD['hidden']} x {FIELD['depth']}, F = {FIELD['freqs']}; widths 8 to 32",
        "the generated tensors of all 25 widths, and of the full width alone",
        "one object",
        f"{own:,} parameters; {every:,} at all widths together, {full:,} at the full one ({own / full:.1f} times that)",
        verdict(own < every),
        "At this scale the object is larger than the one block it replaces.",
    )


def speed_claims(run: Run, progress: Callable[[str], None]) -> Iterator[Claim]:
    progress("sampling and running times")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1))
    family = nm.NeuMeta(nm.WidthSpace(net, "**", example=torch.zeros(1, 64, 8, 8)))
    single = nn.Sequential(nn.Conv2d(64, 64, 3), nn.ReLU(), nn.Conv2d(64, 1, 1))
    one = nm.NeuMeta(nm.WidthSpace(single, "**", example=torch.zeros(1, 64, 8, 8)))
    widths, counts = (64, 128, 256), (1, 2, 4, 8)
    taken = times(
        {
            **{f"h{width}": lambda w=width: family.sample(w, k=1) for width in widths},
            **{f"k{count}": lambda c=count: family.sample(64, k=c) for count in counts},
            "one": lambda: one.sample(64, k=1),
        },
        rounds=3,
    )
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
    plain = nm.fuse(DigitsCNN(SMALL), example=x[:2])
    with torch.no_grad():
        running = times({"small": lambda: small(x), "plain": lambda: plain(x)}, rounds=31, inner=10)
    ratio = running.ratio("small", "plain")
    yield Claim(
        "(ours) A sampled network runs at a plain network's speed.",
        f"64 digits at h = {SMALL}, medians of 31 alternating rounds of 10 runs; {torch.get_num_threads()} threads",
        f"DigitsCNN({SMALL}), fused",
        "equal",
        f"{ratio:.2f} times",
        verdict(ratio < 1.1, ratio < 1.25),
    )


def traffic_claim(runs: Sequence[Run], progress: Callable[[str], None]) -> tuple[Claim, Table]:
    progress("off-chip traffic")
    family = runs[0].family
    assert family is not None
    widths = (32, 16, SMALL)
    names = [f"h = {width}" for width in widths]
    both = rt.compare(
        *(family.sample(width, k=2) for width in widths), inputs=(1, 1, 8, 8), accelerator=SCRATCHPAD, names=names
    )
    full, small = both[names[0]], both[names[-1]]
    rows = []
    for name, width, sheet in zip(names, widths, both.sheets, strict=True):
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


def accuracy_table(runs: Sequence[Run]) -> Table:
    rows: list[list[str | float]] = []
    for name in (*RECIPES, *PEERS):
        for width in SHOWN:
            each = [run.scores[name][width] for run in runs]
            rows.append([name, str(width), *each, statistics.fmean(each)])
    rows.append(
        ["block bypassed", "none", *(run.bypass for run in runs), statistics.fmean([run.bypass for run in runs])]
    )
    rows.append(["the network itself", "32", *(run.base for run in runs), statistics.fmean([run.base for run in runs])])
    title = "Test accuracy in % by width; 6 and 4 are outside of the trained range, 12 is held out"
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


def dead_table(runs: Sequence[Run]) -> Table:
    rows = [
        (name, str(width), *(100 * run.dead[name][width] for run in runs))
        for name in RECIPES
        for width in sorted(runs[0].dead[name], reverse=True)
    ]
    title = "Inner channels that never fire on a training batch, in %"
    return Table(title, ("Family", "h", *(f"Seed {seed}" for seed in SEEDS)), rows)
