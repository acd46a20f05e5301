"""Weight Compander: what it does to accuracy and weights on few samples, what it costs, and what it leaves behind.

retensor claims weight_compander
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from benchmarks.measuring import Difference, Times, allocated, times
from benchmarks.weight_compander_trainings import (
    BASE,
    BATCH,
    CNN_SEEDS,
    COMPANDED,
    CONTROLS,
    DECAY,
    HALF_PI,
    LR,
    MLP,
    NEAR,
    OTHERS,
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
COLLAPSE = 0.10
LIMIT = 1.10
SIZE = 64
BATCHES = (4, 16, 64)
ROUNDS = {4: 9, 16: 11, 64: 5}


def accuracy_claims(runs: Runs) -> tuple[list[Claim], list[Table]]:
    base = runs(MLP, BASE)
    pair, tried = runs.best(MLP, COMPANDED)
    companded = {arm: runs(MLP, arm) for arm in COMPANDED}
    ours = companded[pair]
    found_gain = gain(ours, base)
    begun, _ = runs.best(MLP, CONTROLS["its beginning"])
    where = (
        f"scikit-learn's digits, {SAMPLES} for training and the other 1,697 for testing, MLP 64-128-128-10, SGD "
        f"{LR}, momentum 0.9, {STEPS} steps of {BATCH}, cosine, {len(SEEDS)} paired seeds; pair chosen of "
        f"{len(PAIRS)} on {len(TUNING_SEEDS)} other seeds: {pair.name}"
    )
    claims = [
        Claim(
            "WC on top of standard regularisation improves generalisation.",
            where,
            f"the same with weight decay {DECAY:g} alone",
            "better accuracy of ResNet-type networks on CIFAR, Tiny ImageNet and ImageNet",
            f"{found_gain} points (paired standard error) over {100 * mean_of(base, 'accuracy'):.2f} %",
            found_gain.verdict,
            f"Plain training from {begun.name} gains {gain(runs(MLP, begun), base)}, and WC that begins at the "
            f"plain network's weights {gain(runs(MLP, PRESERVED), base)}.",
        ),
        _weights_claim(where, pair, base, ours),
    ]
    rows = [_row(MLP, BASE, base, base), *(_row(MLP, arm, found, base) for arm, found in companded.items())]
    rows.append(_row(MLP, PRESERVED, runs(MLP, PRESERVED), base))
    chosen = [(pair, tried)]
    ahead: dict[str, Difference] = {}
    for name, grid in CONTROLS.items():
        arm, means = runs.best(MLP, grid)
        chosen.append((arm, means))
        found = runs(MLP, arm)
        ahead[f"{name} ({arm.name})"] = gain(ours, found)
        rows.append(_row(MLP, arm, found, base))
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
    for setting, decay in OTHERS:
        plain, arm = replace(BASE, decay=decay), replace(COMPANDED[0], decay=decay)
        one, other = runs(setting, plain), runs(setting, arm)
        gains[setting.name] = gain(other, one)
        rows += [_row(setting, plain, one, one), _row(setting, arm, other, one)]
    worse = [name for name, apart in gains.items() if apart.below()]
    better = [name for name, apart in gains.items() if apart.above()]
    claims.append(
        Claim(
            "(ours) It does no harm without decay, with wrong labels, in a CNN, and before normalisation layers.",
            f"the same images; {COMPANDED[0].name} untuned; {len(SEEDS)} seeds, {len(CNN_SEEDS)} for the CNNs",
            "the same networks without WC",
            "a gain of at least zero within the 95 % interval",
            "; ".join(f"{name} {apart}" for name, apart in gains.items()),
            "not held" if worse else "held",
            f"Worse beyond the 95 % interval: {', '.join(worse)}." if worse else
            f"Better beyond the 95 % interval: {', '.join(better) or 'none'}.",
        )
    )  # fmt: skip
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


def _weights_claim(where: str, pair: Arm, base: Sequence[Outcome], ours: Sequence[Outcome]) -> Claim:
    assert pair.pair is not None
    over = max(outcome.over for outcome in ours)
    # float32 rounds the cap itself.
    bound = over <= 1 + torch.finfo(torch.float32).eps
    figures = {name: (mean_of(base, name), mean_of(ours, name)) for name in ("largest", "near", "kurtosis")}
    moved = {
        "the bound": bound,
        "a smaller largest weight": figures["largest"][1] < figures["largest"][0],
        "fewer weights near zero": figures["near"][1] < figures["near"][0],
        "30 % less kurtosis": figures["kurtosis"][1] <= 0.7 * figures["kurtosis"][0],
    }
    missed = [name for name, fine in moved.items() if not fine]
    return Claim(
        "WC restricts the magnitude of weights and forces them away from zero, so that more of them are used.",
        where,
        f"the same with weight decay {DECAY:g} alone",
        "bounded weights, fewer near zero; (ours) kurtosis down by 30 %",
        f"largest weight {figures['largest'][0]:.2f} to {figures['largest'][1]:.2f} (cap "
        f"{pair.pair[0] * HALF_PI:.3f}, most {over:.3f} of it after any step), share below {NEAR} "
        f"{figures['near'][0]:.3f} to {figures['near'][1]:.3f}, kurtosis {figures['kurtosis'][0]:.1f} to "
        f"{figures['kurtosis'][1]:.1f}",
        "held" if not missed else "not held" if len(missed) == len(moved) or not bound else "partly held",
        f"Missed: {', '.join(missed)}." if missed else "",
    )


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
    for scale in (1.0, 1e-2, 1e-3):
        arm = Arm(f"WC learned, rate x{scale:g}", PAIRS[0], learn=True, lr_scale=scale)
        found = runs(MLP, arm)
        collapsed = sum(x.accuracy < y.accuracy - COLLAPSE for x, y in zip(found, base, strict=True))
        kept[scale] = gain(found, base), collapsed
        apart = kept[scale][0]
        worst = 100 * min(outcome.accuracy for outcome in found)
        rows.append(
            (f"{scale:g}", 100 * mean_of(found, "accuracy"), apart.mean, apart.error, worst, collapsed,
             mean_of(found, "a"), mean_of(found, "b"), mean_of(found, "largest"))
        )  # fmt: skip
    apart, collapsed = kept[1e-3]
    claims = [
        Claim(
            "The hyper-parameters a and b can be learned with the weights, without a search.",
            f"the MLP as above, a pair a layer from {PAIRS[0]}, at 1/1000 of the weights' learning rate, "
            f"{len(SEEDS)} seeds",
            "weight decay alone",
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
    at = {name: taken[16].ratio(name, "plain") for name in models}
    fast, slim = at["WC"] <= LIMIT, memory["WC, recomputed"] <= LIMIT * base
    both = at["WC, recomputed"] <= LIMIT and slim
    falling = [taken[batch].ratio("WC", "plain") for batch in BATCHES]
    falls = all(one > other for one, other in itertools.pairwise(falling))
    claims = [
        Claim(
            "(ours) A training step costs at most 1.10 times as much: in time as WC is, in memory recomputed.",
            f"{where}, batch 16; median of {ROUNDS[16]} alternating rounds; peak of a pass over what is there between "
            "steps, with gradients, by torch's record of allocations",
            "the plain model; weight_norm of torch",
            f"{LIMIT:.2f}x time, {LIMIT:.2f}x peak memory",
            f"time {at['WC']:.2f}x, recomputed {at['WC, recomputed']:.2f}x, weight_norm {at['weight_norm']:.2f}x; "
            f"memory {memory['WC'] / base:.2f}x, recomputed {memory['WC, recomputed'] / base:.2f}x, weight_norm "
            f"{memory['weight_norm'] / base:.2f}x",
            "held" if both else "partly held" if fast or slim else "not held",
            "Within both limits in one mode." if both else
            "A layer keeps its weight for its backward pass: either a second tensor of the weights' size, or one more "
            "evaluation of the function. No one mode is within both limits here.",
        ),
        Claim(
            "(ours) The cost is by weight and not by sample: its ratio falls as the batch grows.",
            where,
            "the plain model",
            "falling",
            ", ".join(f"{ratio:.2f}x at {batch}" for batch, ratio in zip(BATCHES, falling, strict=True)),
            "held" if falls else "partly held" if falling[-1] < falling[0] else "not held",
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
            "held" if same and apart == 0 else "partly held" if same and apart <= 1e-6 else "not held",
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
