"""Neural Metamorphosis in miniature: one implicit function for the block of a digit classifier at every width.

The reference network ``digits-cnn`` (8x8 digits; a convolution to 16 channels, a block 16 -> 32 -> 16, a classifier) is
fused and reordered, and the four tensors of its block are generated; its other layers are fixed. Widths 8 to 32 are
trained but for three that are held out, and 6 and 4 are asked for as well. Each seed has a network of its own.

    retensor claims neumeta
"""

from __future__ import annotations

import copy
import importlib
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import joblib
import torch
import torch_pruning
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import retensor as rt
from retensor.claims import Claim, Report, Table, Verdict
from retensor.compression import neumeta as nm
from retensor.data.reference import REFERENCES, DigitsCNN

SOURCE = (
    'Yang, Wang, "Neural Metamorphosis", ECCV 2024, arXiv 2410.11878. Peers: torch-pruning (L1 magnitude); Yu, Huang, '
    '"Universally Slimmable Networks and Improved Training Techniques", ICCV 2019.'
)
SEEDS = (0, 1, 2)
FULL = 32
SMALL = 8
RANGE = range(8, 33)
HELD_OUT = (12, 20, 28)
TRAINED = [width for width in RANGE if width not in HELD_OUT]
UNSEEN = (6, 4)
SHOWN = (32, 24, 16, 12, 8, 6, 4)
ALL = sorted({*SHOWN, *(width + step for width in HELD_OUT for step in (-1, 0, 1))}, reverse=True)
FIELD = {"hidden": 96, "depth": 3, "freqs": 8}
BATCH = 64
WARM = 400
STEPS = 2000
SLIM = 600
LEARNING_RATE = 1e-3
MILESTONES = (0.6, 0.85)
SAMPLES = 20
FINE_TUNING = 200
SCRATCHPAD = 16 << 10

Scores = dict[int, float]
"""Accuracy in percent by width."""


class Batches:
    """Batches in a new order each time, without the cost of gathering samples one by one."""

    def __init__(self, data: rt.data.Split, seed: int) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.data.x) / BATCH)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.randperm(len(self.data.x), generator=self.generator).split(BATCH):
            yield self.data.x[chosen], self.data.y[chosen]


@dataclass(frozen=True)
class Recipe:
    """One way to fit a family."""

    reordered: bool = True
    noise: float = 1.0
    warm: Sequence[int] = tuple(TRAINED)


RECIPES = {
    "NeuMeta": Recipe(),
    "without permutation": Recipe(reordered=False),
    "without noise": Recipe(noise=0.0),
    "without warm start": Recipe(warm=()),
    "warm start at full width only": Recipe(warm=(FULL,)),
}
TRAPPED = ("without warm start", "warm start at full width only")


@dataclass
class Run:
    """What one seed gave."""

    base: float
    bypass: float
    variation: tuple[float, float]
    scores: dict[str, Scores] = field(default_factory=dict)
    dead: dict[str, dict[int, float]] = field(default_factory=dict)
    trapped: dict[str, bool] = field(default_factory=dict)
    family: nm.NeuMeta | None = None


@dataclass(frozen=True)
class Steps:
    """How long everything is trained."""

    warm: int = WARM
    fit: int = STEPS
    slim: int = SLIM
    fine_tuning: int = FINE_TUNING
    alone: int = REFERENCES["digits-cnn"].steps


def scores(make: Callable[[int], nn.Module], data: rt.data.Split, widths: Sequence[int] = ALL) -> Scores:
    return {width: 100 * rt.data.accuracy(make(width), data.x_test, data.y_test) for width in widths}


def fit_job(
    seed: int, name: str, space: nm.WidthSpace, steps: Steps
) -> tuple[int, str, Scores, nm.FitReport, nm.NeuMeta]:
    """One family of one seed, in a process of its own."""
    torch.set_num_threads(1)
    recipe, data = RECIPES[name], rt.data.digits()
    family = nm.NeuMeta(space, **FIELD, seed=seed)
    if recipe.warm:
        nm.warm_start(family, steps=steps.warm, widths=recipe.warm, noise=recipe.noise, seed=seed)
    report = nm.fit(
        family, Batches(data, seed), widths=TRAINED, noise=recipe.noise, recon=10.0, steps=steps.fit, lr=LEARNING_RATE,
        milestones=MILESTONES, seed=seed, on_trap="ignore",
    )  # fmt: skip
    samples = SAMPLES if recipe.noise else 1
    with warnings.catch_warnings():
        # Widths outside of the trained ones are asked for on purpose.
        warnings.simplefilter("ignore")
        return seed, name, scores(lambda width: family.sample(width, k=samples), data), report, family


def peer_job(seed: int, name: str, model: nn.Module, steps: Steps) -> tuple[int, str, Scores]:
    """One baseline of one seed, in a process of its own."""
    torch.set_num_threads(1)
    data = rt.data.digits()
    example = data.x[:2]
    if name == "L1 pruning":
        return seed, name, scores(lambda width: pruned(model, example, width), data)
    if name == "L1 pruning, fine-tuned each":
        return (
            seed,
            name,
            scores(lambda width: tuned(pruned(model, example, width), data, seed, steps.fine_tuning), data, SHOWN),
        )
    if name == "slimmable training":
        return seed, name, scores(slimmable(model, data, seed, steps.slim), data)
    return (
        seed,
        name,
        scores(lambda width: model if width == FULL else alone(width, data, seed, steps.alone), data, SHOWN),
    )


PEERS = ("L1 pruning", "L1 pruning, fine-tuned each", "slimmable training", "trained alone each")


def run_all(progress: Callable[[str], None], steps: Steps) -> list[Run]:
    """All families and baselines, on all cores, one thread each."""
    # Processes find what they run by the name of its module, which that of a file loaded by its path is not.
    here = importlib.import_module("benchmarks.claim_neumeta")
    steps = here.Steps(**vars(steps))
    runs: dict[int, Run] = {}
    jobs: list[Any] = []
    for seed in SEEDS:
        model, data = rt.data.reference("digits-cnn", seed=seed)
        smooth = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], seconds=1.0)
        rough = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], solver="none")
        bypassed = nm.NeuMeta(smooth, hidden=1, depth=1, freqs=1).bypassed()
        right = [100 * rt.data.accuracy(net, data.x_test, data.y_test) for net in (model, bypassed)]
        runs[seed] = Run(right[0], right[1], smooth.variation)
        for name, recipe in RECIPES.items():
            jobs.append(joblib.delayed(here.fit_job)(seed, name, smooth if recipe.reordered else rough, steps))
        jobs += [joblib.delayed(here.peer_job)(seed, name, model, steps) for name in PEERS]
    for done in joblib.Parallel(n_jobs=os.cpu_count(), return_as="generator_unordered")(jobs):
        seed, name, found = done[:3]
        progress(f"seed {seed}: {name}")
        runs[seed].scores[name] = found
        if name in RECIPES:
            runs[seed].dead[name], runs[seed].trapped[name] = done[3].dead, done[3].trapped
            if name == "NeuMeta":
                runs[seed].family = done[4]
    return [runs[seed] for seed in SEEDS]


def pruned(model: nn.Module, example: torch.Tensor, width: int) -> nn.Module:
    """The channels of least L1 norm removed from the block, by torch-pruning."""
    model = copy.deepcopy(model)
    graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=example)
    conv = model.block.conv1
    whole = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, list(range(conv.out_channels)))
    importance = torch_pruning.importance.MagnitudeImportance(p=1)(whole)
    least = importance.argsort()[: conv.out_channels - width].tolist()
    if least:
        graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, least).prune()
    return model.eval()


def tuned(model: nn.Module, data: rt.data.Split, seed: int, steps: int) -> nn.Module:
    """All of a pruned network's values trained on."""
    rt.data.fit(model, data.x, data.y, steps=steps, lr=1e-3, schedule="cosine", seed=seed)
    return model


def alone(width: int, data: rt.data.Split, seed: int, steps: int) -> nn.Module:
    """A network of its own, as the reference one was trained."""
    recipe = REFERENCES["digits-cnn"]
    with rt.data.seeded(seed):
        model = DigitsCNN(width)
    rt.data.fit(
        model, data.x, data.y, steps=steps, batch=recipe.batch, lr=recipe.lr, weight_decay=recipe.weight_decay,
        seed=seed,
    )  # fmt: skip
    return model


def slimmable(model: nn.Module, data: rt.data.Split, seed: int, steps: int) -> Callable[[int], nn.Module]:
    """The block's weights trained so that their first channels work alone: any width is a slice.

    Universally slimmable training from the same network, with the same fixed layers: channels in the
    order of their L1 norms, and at each step the largest width, the least, and two at random that are taught by the
    largest (the sandwich rule and in-place distillation). Normalisations are fused, so none has to be measured anew.
    """
    net = nm.fuse(model, example=data.x[:2]).requires_grad_(False)
    order = torch_pruning.importance.MagnitudeImportance(p=1)(_inner_group(net, data.x[:2])).argsort(descending=True)
    one, two = net.block.conv1, net.block.conv2
    tensors = [one.weight.detach()[order], one.bias.detach()[order], two.weight.detach()[:, order], two.bias.detach()]
    shared = [nn.Parameter(tensor.clone()) for tensor in tensors]

    def sliced(width: int) -> dict[str, torch.Tensor]:
        return {
            "block.conv1.weight": shared[0][:width],
            "block.conv1.bias": shared[1][:width],
            "block.conv2.weight": shared[2][:, :width],
            "block.conv2.bias": shared[3],
        }

    optimizer = torch.optim.AdamW(shared, lr=1e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    loader, taken = Batches(data, seed), 0
    while taken < steps:
        for x, y in loader:
            if taken == steps:
                break
            optimizer.zero_grad()
            largest = functional_call(net, sliced(FULL), (x,))
            functional.cross_entropy(largest, y).backward()
            taught = largest.detach().softmax(-1)
            drawn = [TRAINED[int(i)] for i in torch.randint(len(TRAINED), (2,), generator=generator)]
            for width in (SMALL, *drawn):
                functional.cross_entropy(functional_call(net, sliced(width), (x,)), taught).backward()
            optimizer.step()
            rates.step()
            taken += 1

    def make(width: int) -> nn.Module:
        small = nm.fuse(DigitsCNN(width), example=data.x[:2])
        small.load_state_dict(net.state_dict() | {name: value.detach() for name, value in sliced(width).items()})
        return small

    return make


def _inner_group(net: nn.Module, example: torch.Tensor) -> Any:
    net.requires_grad_(True)
    graph = torch_pruning.DependencyGraph().build_dependency(net, example_inputs=example)
    conv = net.block.conv1
    group = graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, list(range(conv.out_channels)))
    net.requires_grad_(False)
    return group


@dataclass(frozen=True)
class Paired:
    """The mean of differences over seeds, and its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.1f} ± {self.error:.1f}"


def paired(differences: Sequence[float]) -> Paired:
    return Paired(statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences)))


def mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def verdict(held: bool, partly: bool = False) -> Verdict:
    return "held" if held else "partly held" if partly else "not held"


def measure(progress: Callable[[str], None], steps: Steps = Steps()) -> Report:
    runs = run_all(progress, steps)
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
    return mean([run.scores[name][width] for run in runs])


def against(runs: Sequence[Run], one: str, other: str, width: int) -> Paired:
    return paired([run.scores[one][width] - run.scores[other][width] for run in runs])


SETTING = (
    f"digits-cnn of {len(SEEDS)} seeds, block of 16 -> h -> 16 generated and the rest fixed; {WARM} steps of warm "
    f"start and {STEPS} of training in batches of {BATCH}; mean of K = {SAMPLES} samples; test accuracy"
)


def accuracy_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    base = mean([run.base for run in runs])
    share = nm_share(runs[0])
    lost = paired([run.scores["NeuMeta"][SMALL] - run.base for run in runs])
    yield Claim(
        "The full network's accuracy is kept at 75 % compression, without retraining.",
        f"{SETTING} at h = {SMALL}, {share:.0%} of the block's parameters",
        "the network itself, at h = 32",
        "full-size performance",
        f"{across(runs, 'NeuMeta', SMALL):.1f} % of {base:.1f} %: {lost}; the generated h = 32 has "
        f"{across(runs, 'NeuMeta', FULL):.1f} %, the block bypassed {mean([run.bypass for run in runs]):.1f} %",
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
    worst = max(abs(mean(gaps[width])) for width in HELD_OUT)
    yield Claim(
        "Widths that were never trained work as well as trained ones.",
        f"{SETTING}; widths {', '.join(map(str, HELD_OUT))} left out of training",
        "the same family's two neighbouring widths, which were trained",
        "equal",
        "; ".join(f"h = {width}: {paired(gaps[width])}" for width in HELD_OUT),
        verdict(worst <= 1, worst <= 2),
        "" if worst <= 1 else "Held is within 1 point, partly held within 2.",
    )


def gap(run: Run, width: int) -> float:
    mine = run.scores["NeuMeta"]
    return mine[width] - (mine[width - 1] + mine[width + 1]) / 2


def ablation_claims(runs: Sequence[Run]) -> Iterator[Claim]:
    gain = against(runs, "NeuMeta", "without permutation", SMALL)
    before, after = (mean([run.variation[i] for run in runs]) for i in (0, 1))
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
        dead = mean([run.dead[name][FULL] for run in runs])
        trapped = sum(run.trapped[name] for run in runs)
        yield Claim(
            "(ours) A warm start at random widths is needed against the bypass trap.",
            f"{SETTING}; {name}",
            f"NeuMeta {name}",
            "without: dead channels, and one accuracy at all widths",
            f"h = 32/16/8: {listed(runs, 'NeuMeta')} % against {listed(runs, name)} %, "
            f"{'/'.join(map(str, losses.values()))}; without, widths are {mean(apart):.1f} points apart, {dead:.0%} of "
            f"the channels are dead at h = 32, and fit refuses {trapped} of {len(runs)}",
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
    times = medians(
        {
            **{f"h{width}": lambda w=width: family.sample(w, k=1) for width in widths},
            **{f"k{count}": lambda c=count: family.sample(64, k=c) for count in counts},
            "one": lambda: one.sample(64, k=1),
        },
        rounds=3,
    )
    sizes = [family.generated_parameters(width) for width in widths]
    by_size = slope(sizes, [times[f"h{width}"] for width in widths])
    by_k = slope(counts, [times[f"k{count}"] for count in counts])
    yield Claim(
        "(ours) Sampling time is linear in the weights and in K, and below 1 s for a convolution of 64 x 64 x 9.",
        f"256 x 4, F = 16; {sizes[0]:,} to {sizes[-1]:,} weights, K = 1 to {counts[-1]}; "
        f"{torch.get_num_threads()} threads",
        "itself at other sizes",
        "linear; 1 s",
        f"exponents {by_size:.2f} in the weights and {by_k:.2f} in K; {times['one']:.2f} s for 64 x 64 x 9 at K = 1",
        verdict(
            0.8 <= by_size <= 1.2 and 0.8 <= by_k <= 1.2 and times["one"] < 1, times["one"] < 1,
        ),
    )  # fmt: skip
    assert run.family is not None
    x = torch.rand(64, 1, 8, 8)
    small = run.family.sample(SMALL, k=2).eval()
    plain = nm.fuse(DigitsCNN(SMALL), example=x[:2])
    with torch.no_grad():
        running = medians({"small": lambda: small(x), "plain": lambda: plain(x)}, rounds=31, inner=10)
    ratio = running["small"] / running["plain"]
    yield Claim(
        "(ours) A sampled network runs at a plain network's speed.",
        f"64 digits at h = {SMALL}, medians of 31 alternating rounds of 10 runs; {torch.get_num_threads()} threads",
        f"DigitsCNN({SMALL}), fused",
        "equal",
        f"{ratio:.2f} times",
        verdict(ratio < 1.1, ratio < 1.25),
    )


def medians(calls: Mapping[str, Callable[[], object]], rounds: int, inner: int = 1) -> dict[str, float]:
    """Median seconds of each call, all in turn."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begun = time.perf_counter()
            for _ in range(inner):
                call()
            found[name].append((time.perf_counter() - begun) / inner)
    return {name: statistics.median(taken) for name, taken in found.items()}


def slope(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The exponent of a power law through points."""
    x, y = [math.log(size) for size in sizes], [math.log(seconds) for seconds in times]
    return statistics.linear_regression(x, y).slope


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
            rows.append([name, str(width), *each, mean(each)])
    rows.append(["block bypassed", "none", *(run.bypass for run in runs), mean([run.bypass for run in runs])])
    rows.append(["the network itself", "32", *(run.base for run in runs), mean([run.base for run in runs])])
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
