"""Weight Compander: what it does to accuracy and weights on few samples, what it costs, and what it leaves behind.

Every arm of a comparison has, for each seed, the same 100 training images, the same initial draw and the same order of
batches. Whatever has a constant to choose (the pair of WC, and its controls) is chosen by the mean accuracy on other
seeds than those it is compared on.

    retensor claims weight_compander
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Literal

import numpy as np
import torch
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
SEEDS = range(16)
CNN_SEEDS = range(8)
TUNING_SEEDS = range(100, 108)
SAMPLES = 100
STEPS = 300
BATCH = 50
LR = 0.05
DECAY = 5e-4
NOISE = 0.2
PAIRS = ((0.3, 0.2), (0.2, 0.1), (0.2, 0.2))
NEAR = 0.01
COLLAPSE = 0.10
LIMIT = 1.10
SIZE = 64
BATCHES = (4, 16, 64)
ROUNDS = {4: 9, 16: 11, 64: 5}
HALF_PI = np.pi / 2


# -- training on 100 digits ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to train."""

    name: str
    pair: tuple[float, float] | None = None
    lr: float = LR
    decay: float = DECAY
    clamp: float | None = None
    learn: bool = False
    lr_scale: float = 1e-3
    start: tuple[float, float] | None = None
    """Plain training that begins at the weights of this pair."""
    init: Literal["latent", "preserve"] = "latent"


@dataclass(frozen=True)
class Setting:
    """A network and its labels."""

    name: str
    make: Callable[[], nn.Module]
    noise: float = 0.0
    seeds: range = SEEDS


@dataclass(frozen=True)
class Outcome:
    """One training run."""

    accuracy: float
    largest: float
    near: float
    kurtosis: float
    over: float
    a: float
    b: float


def mlp() -> nn.Module:
    return data.REFERENCES["digits-mlp"].make()


def mlp_with_norms() -> nn.Module:
    def hidden(inputs: int) -> list[nn.Module]:
        return [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]

    return nn.Sequential(nn.Flatten(), *hidden(64), *hidden(128), nn.Linear(128, 10))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def cnn_with_norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


@lru_cache(maxsize=64)
def digits(seed: int, noise: float) -> data.Split:
    """100 stratified images to train on and all others to test on; some training labels turned into another class."""
    total = 1797
    # Half a sample below, so that rounding in floating point cannot add one.
    split = data.digits(test=(total - SAMPLES - 0.5) / total, seed=seed)
    assert len(split.x) == SAMPLES
    generator = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(SAMPLES, generator=generator)[: round(noise * SAMPLES)]
    labels = split.y.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, split.classes, wrong.shape, generator=generator)) % split.classes
    return replace(split, y=labels)


def matrices(model: nn.Module) -> list[torch.Tensor]:
    """The weights that companding takes, as the layers use them."""
    return [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def train(setting: Setting, arm: Arm, seed: int) -> Outcome:
    """One run; accuracy 0 where the loss stopped being a number."""
    split = digits(seed, setting.noise)
    with data.seeded(seed):
        model = setting.make()
    if arm.start is not None:
        model = wc.bake(wc.apply(model, *arm.start))
    if arm.pair is not None:
        model = wc.apply(model, *arm.pair, learn=arm.learn, init=arm.init)
    optimizer = torch.optim.SGD(wc.param_groups(model, arm.lr, arm.decay, arm.lr_scale), momentum=0.9)
    over = 0.0

    @torch.no_grad()
    def after(_: int) -> None:
        nonlocal over
        if arm.clamp is not None:
            for weight in matrices(model):
                weight.clamp_(-arm.clamp, arm.clamp)
        if arm.pair is not None and not arm.learn:
            over = max(over, max(w.abs().max().item() for w in matrices(model)) / (arm.pair[0] * HALF_PI))

    try:
        data.fit(
            model, split.x, split.y, steps=STEPS, batch=BATCH, optimizer=optimizer, schedule="cosine", seed=seed,
            after_step=after,
        )  # fmt: skip
        accuracy = data.accuracy(model, split.x_test, split.y_test)
    except FloatingPointError:
        accuracy = 0.0
    with torch.no_grad():
        w = torch.cat([weight.flatten() for weight in matrices(model)]).to(torch.float64)
    centred = w - w.mean()
    steps = [module for module in model.modules() if isinstance(module, wc.WeightCompander)]
    return Outcome(
        accuracy,
        w.abs().max().item(),
        (w.abs() < NEAR).to(torch.float64).mean().item(),
        (centred.pow(4).mean() / centred.pow(2).mean() ** 2).item(),
        over,
        statistics.mean([step.a.item() for step in steps] or [0.0]),
        statistics.mean([step.b.item() for step in steps] or [0.0]),
    )


@dataclass(frozen=True)
class Paired:
    """Differences of two arms over the same seeds, in points."""

    mean: float
    error: float

    @classmethod
    def of(cls, one: Sequence[Outcome], other: Sequence[Outcome]) -> Paired:
        apart = [100 * (x.accuracy - y.accuracy) for x, y in zip(one, other, strict=True)]
        return cls(statistics.mean(apart), statistics.stdev(apart) / len(apart) ** 0.5)

    @property
    def above(self) -> bool:
        return self.mean > 2 * self.error

    @property
    def below(self) -> bool:
        return self.mean < -2 * self.error

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


class Runs:
    """Outcomes of arms in settings, each trained once."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._known: dict[tuple[str, Arm, range], list[Outcome]] = {}

    def __call__(self, setting: Setting, arm: Arm, seeds: range | None = None) -> list[Outcome]:
        seeds = setting.seeds if seeds is None else seeds
        key = setting.name, arm, seeds
        if key not in self._known:
            self._progress(f"{setting.name}: {arm.name}")
            self._known[key] = [train(setting, arm, seed) for seed in seeds]
        return self._known[key]

    def best(self, setting: Setting, arms: Sequence[Arm]) -> tuple[Arm, list[tuple[Arm, float]]]:
        """The arm of highest mean accuracy on the tuning seeds, and the mean of each."""
        means = [(arm, mean_of(self(setting, arm, TUNING_SEEDS), "accuracy")) for arm in arms]
        return max(means, key=lambda pair: pair[1])[0], means


def mean_of(outcomes: Sequence[Outcome], figure: str) -> float:
    return statistics.mean(getattr(outcome, figure) for outcome in outcomes)


BASE = Arm("weight decay alone")
COMPANDED = tuple(Arm(f"WC a={a} b={b}", (a, b)) for a, b in PAIRS)
# The same function on the plain network's own initial weights, to tell its dynamics from its beginning.
PRESERVED = Arm(f"WC a={PAIRS[0][0]} b={PAIRS[0][1]}, initial weights preserved", PAIRS[0], init="preserve")
CONTROLS: Mapping[str, tuple[Arm, ...]] = {
    "a higher learning rate": tuple(
        Arm(f"learning rate x{factor:g}", lr=LR * factor) for factor in (1.5, 1.5**2, 2.0**2)
    ),
    "stronger decay": tuple(Arm(f"decay {decay:g}", decay=decay) for decay in (1e-3, 2e-3, 5e-3, 1e-2)),
    "a hard clamp": tuple(Arm(f"clamp at {a} π/2", clamp=a * HALF_PI) for a in (0.2, 0.3, 0.4)),
    # Companding makes the initial weights a / b times as large; this has them, and at will the rate too.
    "its beginning": tuple(
        Arm(f"initial weights of {pair}, rate x{factor:g}", start=pair, lr=LR * factor)
        for pair in PAIRS[:2]
        for factor in (1, (pair[0] / pair[1]) ** 2)
    ),
}
MLP = Setting("MLP", mlp)
OTHERS = (
    (Setting("MLP, no decay", mlp), 0.0),
    (Setting(f"MLP, {NOISE:.0%} wrong labels", mlp, NOISE), DECAY),
    (Setting("MLP with batch norms", mlp_with_norms), DECAY),
    (Setting("CNN", cnn, seeds=CNN_SEEDS), DECAY),
    (Setting("CNN with batch norms", cnn_with_norms, seeds=CNN_SEEDS), DECAY),
)


def accuracy_claims(runs: Runs) -> tuple[list[Claim], list[Table]]:
    base = runs(MLP, BASE)
    pair, tried = runs.best(MLP, COMPANDED)
    companded = {arm: runs(MLP, arm) for arm in COMPANDED}
    ours = companded[pair]
    gain = Paired.of(ours, base)
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
            f"{gain} points (paired standard error) over {100 * mean_of(base, 'accuracy'):.2f} %",
            "held" if gain.above else "not held" if gain.mean <= 0 else "partly held",
            f"Plain training from {begun.name} gains {Paired.of(runs(MLP, begun), base)}, and WC that begins at the "
            f"plain network's weights {Paired.of(runs(MLP, PRESERVED), base)}.",
        ),
        _weights_claim(where, pair, base, ours),
    ]
    rows = [_row(MLP, BASE, base, base), *(_row(MLP, arm, found, base) for arm, found in companded.items())]
    rows.append(_row(MLP, PRESERVED, runs(MLP, PRESERVED), base))
    chosen = [(pair, tried)]
    ahead: dict[str, Paired] = {}
    for name, grid in CONTROLS.items():
        arm, means = runs.best(MLP, grid)
        chosen.append((arm, means))
        found = runs(MLP, arm)
        ahead[f"{name} ({arm.name})"] = Paired.of(ours, found)
        rows.append(_row(MLP, arm, found, base))
    lost = [name for name, apart in ahead.items() if apart.below]
    level = [name for name, apart in ahead.items() if not apart.above]
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
    gains: dict[str, Paired] = {}
    for setting, decay in OTHERS:
        plain, arm = replace(BASE, decay=decay), replace(COMPANDED[0], decay=decay)
        one, other = runs(setting, plain), runs(setting, arm)
        gains[setting.name] = Paired.of(other, one)
        rows += [_row(setting, plain, one, one), _row(setting, arm, other, one)]
    worse = [name for name, apart in gains.items() if apart.below]
    better = [name for name, apart in gains.items() if apart.above]
    claims.append(
        Claim(
            "(ours) It does no harm without decay, with wrong labels, in a CNN, and before normalisation layers.",
            f"the same images; {COMPANDED[0].name} untuned; {len(SEEDS)} seeds, {len(CNN_SEEDS)} for the CNNs",
            "the same networks without WC",
            "a gain of at least zero within two standard errors",
            "; ".join(f"{name} {apart}" for name, apart in gains.items()),
            "not held" if worse else "held",
            f"Worse by over two standard errors: {', '.join(worse)}." if worse else
            f"Better by over two standard errors: {', '.join(better) or 'none'}.",
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
        return f"Ahead of WC by over two standard errors: {', '.join(lost)}."
    return f"Not told apart by two standard errors: {', '.join(level)}." if level else ""


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
    apart = Paired.of(found, base)
    return (
        setting.name, arm.name, 100 * mean_of(found, "accuracy"), apart.mean, apart.error, mean_of(found, "largest"),
        mean_of(found, "near"), mean_of(found, "kurtosis"),
    )  # fmt: skip


def learned_claims(runs: Runs) -> tuple[list[Claim], list[Table]]:
    base = runs(MLP, BASE)
    rows: list[tuple[str | int | float, ...]] = []
    kept: dict[float, tuple[Paired, int]] = {}
    for scale in (1.0, 1e-2, 1e-3):
        arm = Arm(f"WC learned, rate x{scale:g}", PAIRS[0], learn=True, lr_scale=scale)
        found = runs(MLP, arm)
        collapsed = sum(x.accuracy < y.accuracy - COLLAPSE for x, y in zip(found, base, strict=True))
        kept[scale] = Paired.of(found, base), collapsed
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
            "not held" if collapsed or apart.below else "held" if apart.above else "partly held",
            _learned_reason(apart, collapsed),
        )
    ]
    table = Table(
        "Learned a and b by the rate of their own",
        ("Rate", "Accuracy, %", "Gain, points", "±", "Worst, %", "Collapsed", "a", "b", "max |w|"),
        rows,
    )
    return claims, [table]


def _learned_reason(apart: Paired, collapsed: int) -> str:
    if collapsed:
        return f"{collapsed} seeds collapsed at the default rate."
    if apart.below:
        return "Stable, but worse by over two standard errors."
    return "" if apart.above else "Stable; the gain is within two standard errors of none."


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


def ratios(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Times over those of the first, medians over rounds in which each is called once, in turning order."""
    names = list(calls)
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - begin)
    base = times[names[0]]
    return {name: statistics.median(x / y for x, y in zip(times[name], base, strict=True)) for name in names}


def peak(trainee: Trainee, batch: int) -> int:
    """The most bytes that a forward and backward pass holds over what was there, by torch's record of allocations."""
    x, y = pictures(batch)
    trainee.step(x, y)
    trainee.optimizer.zero_grad(set_to_none=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        trainee.pass_(x, y)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert changes
    trainee.optimizer.zero_grad(set_to_none=True)
    return int(max(np.cumsum(changes)))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the error stream that it found no GPU."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


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
    times: dict[int, dict[str, float]] = {}
    models = trainees()
    for batch in BATCHES:
        progress(f"time of a training step, batch {batch}")
        some = models if batch == 16 else {name: models[name] for name in ("plain", "WC", "WC, recomputed")}
        x, y = pictures(batch)
        calls = {name: partial(trainee.step, x, y) for name, trainee in some.items()}
        times[batch] = ratios(calls, ROUNDS[batch])
    where = f"timm's resnet18, {SIZE}x{SIZE} pixels, float32, {torch.get_num_threads()} threads, SGD with momentum"
    at = times[16]
    fast, slim = at["WC"] <= LIMIT, memory["WC, recomputed"] <= LIMIT * base
    both = at["WC, recomputed"] <= LIMIT and slim
    falling = [times[batch]["WC"] for batch in BATCHES]
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
             *(f"{times[batch][name]:.3f}" if name in times[batch] else "" for batch in BATCHES))
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
        ratio = ratios({"plain": lambda: plain(batch), "baked": lambda: baked(batch)}, 15)["baked"]
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
