"""Weight Compander: what it does to accuracy and weights on few samples, what it costs, and what it leaves behind.

retensor claims weight_compander
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from benchmarks.measuring import Difference, Times, allocated, paired, times, verdict
from benchmarks.weight_compander_trainings import (
    BASE,
    BATCH,
    BEGUN,
    COLLAPSE,
    COMPANDED,
    CONTROLS,
    DECAY,
    LEARNED,
    LR,
    MLP,
    NEAR,
    PAIRS,
    PRESERVED,
    SAMPLES,
    SEEDS,
    STEPS,
    TUNING_SEEDS,
    Arm,
    Outcome,
    Runs,
    Setting,
    gain,
    mean_of,
    others,
    planned,
)
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import retensor as rt
from retensor import data
from retensor.claims import Claim, Report, Table
from retensor.compression import weight_compander as wc

SOURCE = (
    "R. Cakaj, J. Mehnert, B. Yang, Weight Compander: A Simple Weight Reparameterization for Regularization, 2023, "
    "arXiv 2306.16993."
)
LIMIT = 1.10
HARM = 0.5
"""The loss in points that a setting may leave possible."""
SAME_TIME = (0.95, 1.05)
SIZE = 64
BATCHES = (4, 16, 64)
ROUNDS = {4: 9, 16: 11, 64: 5}


def accuracy_claims(runs: Runs) -> tuple[list[Claim], list[Table]]:
    runs.submit(planned())
    base = runs(MLP, BASE)
    pair, tried = runs.best(MLP, COMPANDED)
    companded = {arm: runs(MLP, arm) for arm in COMPANDED}
    chosen = [(pair, tried), *(runs.best(MLP, grid) for grid in CONTROLS.values())]
    runs.submit((MLP, arm, SEEDS) for arm in (BEGUN[pair], *(arm for arm, _ in chosen)))
    ours, begun = companded[pair], runs(MLP, BEGUN[pair])
    found_gain, own = gain(ours, base), gain(ours, begun)
    where = (
        f"scikit-learn's digits, {SAMPLES} for training and the other 1,697 for testing, MLP 64-128-128-10, SGD "
        f"{LR}, momentum 0.9, {STEPS} steps of {BATCH}, cosine, {len(SEEDS)} paired seeds; pair chosen of "
        f"{len(PAIRS)} on {len(TUNING_SEEDS)} other seeds: {pair.name}"
    )
    baseline = f"the same with weight decay {DECAY:g} alone, and that from the same initial weights"
    claims = [
        Claim(
            "WC on top of standard regularisation improves generalisation.",
            where,
            baseline,
            "better accuracy of ResNet-type networks on CIFAR, Tiny ImageNet and ImageNet",
            f"{found_gain} points (paired standard error) over {100 * mean_of(base, 'accuracy'):.2f} %; {own} over "
            f"plain training from the initial weights that WC has, which alone gains {gain(begun, base)}",
            verdict(found_gain.above() and own.above(), found_gain.mean > 0),
            _gain_reason(found_gain, own, gain(runs(MLP, PRESERVED), base)),
        ),
        _weights_claim(where, baseline, base, begun, ours, runs.over),
    ]
    rows = [_row(MLP, BASE, base, base), *(_row(MLP, arm, found, base) for arm, found in companded.items())]
    controls = dict(zip(CONTROLS, (arm for arm, _ in chosen[1:]), strict=True))
    rows += [
        _row(MLP, arm, runs(MLP, arm), base) for arm in dict.fromkeys((PRESERVED, BEGUN[pair], *controls.values()))
    ]
    ahead = {f"{name} ({arm.name})": gain(ours, runs(MLP, arm)) for name, arm in controls.items()}
    lost = [name for name, apart in ahead.items() if apart.below()]
    level = [name for name, apart in ahead.items() if not apart.above()]
    claims.append(
        Claim(
            "(ours) The gain is not that of a higher learning rate near zero, of stronger decay, of a bound, or of "
            "larger initial weights.",
            f"the same; each control chosen on the tuning seeds of WC: {', '.join(CONTROLS)}",
            "; ".join(ahead),
            "WC ahead",
            "; ".join(f"{apart} points over {name}" for name, apart in ahead.items()),
            "not held" if lost else "partly held" if level else "held",
            _controls_reason(lost, level),
        )
    )  # fmt: skip
    gains: dict[str, Difference] = {}
    for setting, plain, arm in others():
        one, other = runs(setting, plain), runs(setting, arm)
        gains[setting.name] = gain(other, one)
        rows += [_row(setting, plain, one, one), _row(setting, arm, other, one)]
    claims.append(_harm_claim(gains))
    tables = [
        Table(
            "Digits, 100 training images: means over the seeds",
            ("Setting", "Arm", "Accuracy, %", "Gain, points", "±", "max |w|", "share |w| < 0.01", "kurtosis"),
            rows,
        ),
        Table(
            f"What was tried on the {len(TUNING_SEEDS)} tuning seeds",
            ("Arm", "Accuracy, %", "Taken"),
            [
                (arm.name, 100 * mean, "yes" if arm is taken else "")
                for taken, means in chosen
                for arm, mean in means
            ],
        ),
    ]  # fmt: skip
    return claims, tables


def _controls_reason(lost: Sequence[str], level: Sequence[str]) -> str:
    if lost:
        return f"Ahead of WC beyond the 95 % interval: {', '.join(lost)}."
    return f"Not told apart by 95 % intervals: {', '.join(level)}." if level else ""


def _gain_reason(found: Difference, own: Difference, preserved: Difference) -> str:
    missed = found.why or (own.why and f"Over the same initial weights: {own.why[0].lower()}{own.why[1:]}")
    return f"{missed} WC from the plain network's initial weights gains {preserved}.".lstrip()


def _weights_claim(
    where: str, baseline: str, base: Sequence[Outcome], begun: Sequence[Outcome], ours: Sequence[Outcome], over: float
) -> Claim:
    # float32 rounds the cap itself.
    bound = over <= 1 + torch.finfo(torch.float32).eps
    names = {"largest": "a smaller largest weight", "near": "fewer weights near zero", "kurtosis": "less kurtosis"}
    moved = {"the bound": bound, "30 % less kurtosis": mean_of(ours, "kurtosis") <= 0.7 * mean_of(base, "kurtosis")}
    for other, what in ((base, ""), (begun, " than from the same initial weights")):
        for figure, name in names.items():
            pairs = ([getattr(outcome, figure) for outcome in outcomes] for outcomes in (other, ours))
            moved[f"{name}{what}"] = paired(*pairs).above()
    missed = [name for name, fine in moved.items() if not fine]
    told = ", ".join(
        f"{name} {' / '.join(f'{mean_of(found, figure):.3g}' for found in (base, begun, ours))}"
        for figure, name in (("largest", "largest weight"), ("near", f"share below {NEAR}"), ("kurtosis", "kurtosis"))
    )
    return Claim(
        "WC restricts the magnitude of weights and forces them away from zero, so that more of them are used.",
        f"{where}; the bound in every training of this report, learned pairs and other networks too",
        baseline,
        "bounded weights, fewer near zero; (ours) kurtosis down by 30 %",
        f"plain / plain from the same initial weights / WC: {told}; most {over:.7g} of its cap after any step",
        "not held" if not bound else verdict(not missed, len(missed) < len(moved) - 1),
        f"Missed, or not told apart (95 % intervals): {', '.join(missed)}." if missed else "",
    )


def _harm_claim(gains: Mapping[str, Difference]) -> Claim:
    worse = [name for name, apart in gains.items() if apart.below()]
    open_ = [name for name, apart in gains.items() if apart.mean - apart.half < -HARM]
    least = {name: f"{apart.mean - apart.half:+.2f}" for name, apart in gains.items()}
    return Claim(
        f"(ours) It does no harm of more than {HARM} points without decay, with wrong labels, in a CNN, and before "
        "normalisation layers.",
        f"the same images; {COMPANDED[0].name} untuned; {len(SEEDS)} seeds",
        "the same networks without WC",
        f"no loss, and the 95 % interval above {-HARM} points, in every setting",
        "; ".join(f"{name} {apart} (not below {least[name]})" for name, apart in gains.items()),
        "not held" if worse else verdict(not open_, True),
        f"Worse beyond the 95 % interval: {', '.join(worse)}." if worse else
        f"A loss of more than {HARM} points is not excluded: {', '.join(open_)}." if open_ else
        f"Better beyond the 95 % interval: {', '.join(x for x, apart in gains.items() if apart.above()) or 'none'}.",
    )  # fmt: skip


def _row(setting: Setting, arm: Arm, found: Sequence[Outcome], base: Sequence[Outcome]) -> tuple[str | float, ...]:
    apart = gain(found, base)
    return (
        setting.name, arm.name, 100 * mean_of(found, "accuracy"), apart.mean, apart.error, mean_of(found, "largest"),
        mean_of(found, "near"), mean_of(found, "kurtosis"),
    )  # fmt: skip


def learned_claims(runs: Runs) -> tuple[list[Claim], list[Table]]:
    base = runs(MLP, BASE)
    rows: list[tuple[str | int | float, ...]] = []
    kept: dict[float, tuple[Difference, int]] = {}
    for arm in LEARNED:
        scale, found = arm.lr_scale, runs(MLP, arm)
        collapsed = sum(x.accuracy < y.accuracy - COLLAPSE for x, y in zip(found, base, strict=True))
        kept[scale] = gain(found, base), collapsed
        apart = kept[scale][0]
        worst = 100 * min(outcome.accuracy for outcome in found)
        rows.append(
            (f"{scale:g}", 100 * mean_of(found, "accuracy"), apart.mean, apart.error, worst, collapsed,
             *(_told(mean_of(found, figure)) for figure in ("a", "b", "largest")))
        )  # fmt: skip
    apart, collapsed = kept[1e-3]
    claims = [
        Claim(
            "The hyper-parameters a and b can be learned with the weights, without a search.",
            f"the MLP as above, a pair a layer from {PAIRS[0]}, at 1/1000 of the weights' learning rate, "
            f"{len(SEEDS)} seeds",
            f"the same with weight decay {DECAY:g} alone",
            "learned a and b improve too",
            f"{collapsed} of {len(SEEDS)} seeds collapsed (over {COLLAPSE:.0%} below the same seed without WC); "
            f"{apart} points; collapsed at rate x0.01: {kept[1e-2][1]}, at x1: {kept[1.0][1]}",
            "not held" if collapsed or apart.below() else "held" if apart.above() else "partly held",
            _learned_reason(apart, collapsed),
        )
    ]
    table = Table(
        "Learned a and b by the rate of their own",
        ("Rate", "Accuracy, %", "Gain, points", "±", "Worst, %", "Collapsed", "a", "b", "max |w|"),
        rows,
    )
    return claims, [table]


def _told(value: float) -> float | str:
    """A figure for the table, where trainings that ran away may have left none."""
    return value if math.isfinite(value) else "none"


def _learned_reason(apart: Difference, collapsed: int) -> str:
    if collapsed:
        return f"{collapsed} seeds collapsed at the default rate."
    if apart.below():
        return "Stable, but worse beyond the 95 % interval."
    return "" if apart.above() else "Stable; the gain is not told apart from none (95 % interval)."


# -- cost of a training step --------------------------------------------------------------------------------------


def resnet() -> nn.Module:
    import timm

    with data.seeded(0):
        return timm.create_model("resnet18", pretrained=False, num_classes=10)


def normed(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight_norm(module)
    return model


@dataclass
class Trainee:
    """A model with its optimiser and the context its forward pass runs in."""

    model: nn.Module
    around: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def __post_init__(self) -> None:
        self.model.train()
        self.optimizer = torch.optim.SGD(wc.param_groups(self.model, 1e-3, DECAY), momentum=0.9)

    def pass_(self, x: torch.Tensor, y: torch.Tensor) -> None:
        with self.around():
            loss = nn.functional.cross_entropy(self.model(x), y)
        loss.backward()

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.pass_(x, y)
        self.optimizer.step()


def pictures(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 3, SIZE, SIZE, generator=generator), torch.randint(0, 10, (batch,), generator=generator)


def peak(trainee: Trainee, batch: int) -> int:
    """The most bytes that a forward and backward pass holds over what was there, by torch's record of allocations."""
    x, y = pictures(batch)
    trainee.step(x, y)
    trainee.optimizer.zero_grad(set_to_none=True)
    nbytes = allocated(lambda: trainee.pass_(x, y))
    trainee.optimizer.zero_grad(set_to_none=True)
    return nbytes


def trainees() -> dict[str, Trainee]:
    plain = resnet()
    return {
        "plain": Trainee(copy.deepcopy(plain)),
        "WC": Trainee(wc.apply(plain)),
        "WC, recomputed": Trainee(wc.apply(plain), wc.recomputed),
        "WC learned": Trainee(wc.apply(plain, learn=True)),
        "WC learned, recomputed": Trainee(wc.apply(plain, learn=True), wc.recomputed),
        "weight_norm": Trainee(normed(plain)),
    }


def cost_claims(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    progress("memory of a training step")
    memory = {name: peak(trainee, 16) for name, trainee in trainees().items()}
    base = memory["plain"]
    taken: dict[int, Times] = {}
    models = trainees()
    for batch in BATCHES:
        progress(f"time of a training step, batch {batch}")
        some = models if batch == 16 else {name: models[name] for name in ("plain", "WC", "WC, recomputed")}
        x, y = pictures(batch)
        calls = {name: partial(trainee.step, x, y) for name, trainee in some.items()}
        taken[batch] = times(calls, ROUNDS[batch])
    where = f"timm's resnet18, {SIZE}x{SIZE} pixels, float32, {torch.get_num_threads()} threads, SGD with momentum"
    at = {name: (taken[16].ratio(name, "plain"), memory[name] / base) for name in models}
    fine = {name: [ratio <= LIMIT for ratio in at[name]] for name in ("WC", "WC, recomputed")}
    falling = [taken[batch].ratio("WC", "plain") for batch in BATCHES]
    falls = all(one > other for one, other in itertools.pairwise(falling))
    claims = [
        Claim(
            f"(ours) A training step costs at most {LIMIT:.2f} times as much, in time and in memory.",
            f"{where}, batch 16; median of {ROUNDS[16]} alternating rounds; peak of a pass over what is there between "
            "steps, with gradients, by torch's record of allocations",
            "the plain model; weight_norm of torch",
            f"{LIMIT:.2f}x time, {LIMIT:.2f}x peak memory",
            "; ".join(f"{name}: time {at[name][0]:.2f}x, memory {at[name][1]:.2f}x" for name in (*fine, "weight_norm")),
            verdict(any(map(all, fine.values())), any(map(any, fine.values()))),
            "Within both limits in one mode." if any(map(all, fine.values())) else
            "No mode is within both limits here. A layer keeps its weight for its backward pass: either a second "
            "tensor of the weights' size, or one more evaluation of the function.",
        ),
        Claim(
            "(ours) The cost is by weight and not by sample: its ratio falls as the batch grows.",
            where,
            "the plain model",
            "falling",
            ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in zip(BATCHES, falling, strict=True)),
            verdict(falls, falling[-1] < falling[0]),
            "" if falls else "The ratio does not fall from each batch to the next.",
        ),
    ]  # fmt: skip
    table = Table(
        "A training step of resnet18 over one of the plain model",
        ("Model", "Peak, MiB", "Peak, x", *(f"Time, x, batch {batch}" for batch in BATCHES)),
        [
            (name, nbytes / 2**20, nbytes / base,
             *(f"{taken[batch].ratio(name, 'plain'):.3f}" if name in taken[batch].seconds else "" for batch in BATCHES))
            for name, nbytes in memory.items()
        ],
    )  # fmt: skip
    return claims, [table]


# -- what is left after baking ------------------------------------------------------------------------------------


def baked_claims(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    progress("after baking")
    plain = resnet().eval()
    companded = wc.apply(plain, learn=True).eval()
    baked = wc.bake(companded)
    x, _ = pictures(2)
    with torch.no_grad():
        apart = (baked(x) - companded(x)).abs().max().item()
        batch, _ = pictures(16)
        ratio = times({"plain": lambda: plain(batch), "baked": lambda: baked(batch)}, 15).ratio("baked", "plain")
    graphs = [torch.export.export(model, (x,)).graph_module.graph for model in (plain, baked)]
    called = [[str(node.target) for node in graph.nodes if node.op == "call_function"] for graph in graphs]
    same = called[0] == called[1] and set(plain.state_dict()) == set(baked.state_dict())
    progress("off-chip traffic before and after")
    # With weights in the scratchpad, the least that runs it evicts something.
    both = rt.compare(
        plain, baked, inputs=(1, 3, SIZE, SIZE), accelerator="M_R", parameters=True, names=["plain", "baked"]
    )
    traffic = [both[name].off_chip_bytes for name in both.names]
    sheets = [{**both[name].as_dict(), "name": ""} for name in both.names]
    claims = [
        Claim(
            "After training the function is folded into plain weights, and nothing of it is left.",
            "timm's resnet18, learned pairs, batch 2 for outputs and 16 for the time of a forward pass",
            "the plain model",
            "no cost in use",
            f"outputs {apart:.1g} apart; the exported graph's {len(called[1])} operators and the names of the state "
            f"{'are' if same else 'are not'} the plain model's; time {ratio:.2f}x",
            verdict(same and apart == 0 and SAME_TIME[0] <= ratio <= SAME_TIME[1], same and apart <= 1e-6),
            "" if SAME_TIME[0] <= ratio <= SAME_TIME[1] else "The time is not within 5 % of the plain model's.",
        ),
        Claim(
            "(ours) Off-chip traffic is that of the plain model.",
            f"timm's resnet18 at {SIZE}x{SIZE}, float32, weights in a scratchpad of the least size that runs it",
            "the plain model",
            "equal",
            f"{traffic[0]:,} and {traffic[1]:,} bytes; all of the cost sheet "
            f"{'equal' if sheets[0] == sheets[1] else 'not equal'}",
            "held" if traffic[0] == traffic[1] and sheets[0] == sheets[1] else "not held",
        ),
    ]
    table = Table(
        "The cost sheet before and after",
        ("Model", "Parameters", "MACs", "Scratchpad, bytes", "Off-chip, bytes", "Of it non-compulsory"),
        [
            (name, both[name].parameters or 0, both[name].macs or 0, both[name].m_r_bytes,
             both[name].off_chip_bytes or 0, both[name].non_compulsory_bytes or 0)
            for name in both.names
        ],
    )  # fmt: skip
    return claims, [table]


def measure(progress: Callable[[str], None]) -> Report:
    runs = Runs(progress)
    claims: list[Claim] = []
    tables: list[Table] = []
    for found in (accuracy_claims(runs), learned_claims(runs), cost_claims(progress), baked_claims(progress)):
        claims += found[0]
        tables += found[1]
    libraries = ("torch", "timm", "scikit-learn")
    return Report("weight_compander", "Weight Compander", SOURCE, claims, tables, libraries)
