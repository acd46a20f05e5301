"""Trainings with averaged experts, their controls and their peers on small sets of real digits.

Every run of a seed sees the same pictures in the same order and begins, outside the experts, with the same values. What
has a constant to choose (the learning rate, a moving average's decay) has it chosen on pictures of the training part
that it was not trained on, over other seeds than those it is compared on; test pictures choose nothing.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from benchmarks.measuring import on_all_cores
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from retensor.compression import ewa
from retensor.data import Split, accuracy, digits, fit, mnist5k, seeded

WIDTH, DEPTH, BATCH = 32, 4, 50
SEEDS = tuple(range(8))
SAMPLES = {"digits": 1078, "mnist5k": 1000, "tune": 200}
STEPS = {"digits": 600, "mnist5k": 500, "tune": 200, "source": 600}
TUNING_SEEDS = (100, 101, 102)
RATES = tuple(2.5e-4 * 2**k for k in range(10))
"""Learning rates that may be tried, of which those around the best are."""
DECAYS = (0.9, 0.97, 0.99, 0.997)
"""Of moving averages over some 10 to 300 steps."""
TAIL = 0.75
"""The part of the steps after which torch's average begins, with the learning rate held."""
BALANCE = 0.01


@dataclass(frozen=True)
class Setting:
    """What is trained: every second FFN as it is, as experts, as a mean of draws, or routed."""

    kind: str
    experts: int = 4
    share_rate: float = 0.0
    until: float = 1.0
    init: str = "independent"

    @property
    def label(self) -> str:
        n = f"N={self.experts}"
        early = f", Early EWA r={self.share_rate:g} in the first {self.until:g}" if self.share_rate else ""
        names = {
            "vanilla": "vanilla",
            "scratch": "vanilla, not pre-trained",
            "swa": "vanilla with torch's AveragedModel over a tail of constant rate",
            "control": f"control: FFNs begin as the mean of {self.experts} draws",
            "experts": f"EWA r={self.share_rate:g}, {n}" if self.share_rate else f"experts never averaged, {n}",
            "routed": f"routed top-1, {n}{early}",
        }
        return names[self.kind] + (", experts begin as copies" if self.init == "copy" else "")


VANILLA = Setting("vanilla")
SCRATCH = Setting("scratch")
SWA = Setting("swa")
CONTROL, CONTROL_TWO = Setting("control"), Setting("control", 2)
MAIN = Setting("experts", share_rate=0.3)
APART = Setting("experts")
COPIES = Setting("experts", share_rate=0.3, init="copy")
ROUTED = Setting("routed")
EARLY, EARLIER = (Setting("routed", share_rate=0.3, until=until) for until in (0.5, 0.25))
EWAS = tuple(Setting("experts", n, r) for n in (2, 4) for r in (0.1, 0.3, 0.5))
COMPARED: Mapping[str, tuple[Setting, ...]] = {
    "digits": (VANILLA, SWA, CONTROL, CONTROL_TWO, APART, *EWAS, COPIES, ROUTED, EARLY, EARLIER),
    "mnist5k": (VANILLA, CONTROL, APART, MAIN),
    "tune": (VANILLA, SCRATCH, COPIES),
}
TUNED: Mapping[str, tuple[Setting, ...]] = {
    "digits": (VANILLA, CONTROL, MAIN, ROUTED, EARLY),
    "mnist5k": (VANILLA, CONTROL, MAIN),
    "tune": (VANILLA, SCRATCH, COPIES),
}


def kin(name: str, setting: Setting) -> Setting:
    """The setting whose learning rate one takes: its own, or that of the nearest that is tuned."""
    if setting in TUNED[name]:
        return setting
    if setting.kind == "routed":
        return EARLY
    return {"swa": VANILLA, "control": CONTROL, "experts": MAIN}[setting.kind]


@dataclass(frozen=True)
class Run:
    """What came of one training: percentages right, and how far folded logits lie from the ensemble's."""

    test: float
    train: float
    loss: float
    ensemble: float | None = None
    apart: float | None = None
    spread: float | None = None
    ema: tuple[float, ...] = ()


@dataclass(frozen=True)
class Key:
    """A training: the data set, what is trained, the seed, the learning rate, and whether it is to choose the rate."""

    name: str
    setting: Setting
    seed: int
    rate: float
    tuning: bool = False


def made(seed: int, image: int, depth: int = DEPTH) -> nn.Module:
    """An untrained transformer over 16 patches, whose tokens are all read by the classifier."""
    with seeded(seed):
        # The initial values of the first vision transformers, which depend on a layer's size: timm's standard
        # deviation of 0.02 is meant for hundreds of channels, and reaches less in as many steps.
        model: nn.Module = VisionTransformer(
            img_size=image, patch_size=image // 4, in_chans=1, num_classes=10, embed_dim=WIDTH, depth=depth,
            num_heads=4, global_pool="avg", class_token=False, weight_init="jax",
        )  # fmt: skip
    return model


def begun(setting: Setting, dense: nn.Module, seed: int) -> nn.Module:
    """A model as its training begins, made of one that is plain."""
    drawn = 1000 + seed
    if setting.kind == "routed":
        return ewa.route(dense, setting.experts, seed=drawn)
    if setting.kind not in ("experts", "control"):
        return dense
    model = ewa.convert(dense, setting.experts, init=setting.init, seed=drawn)  # type: ignore[arg-type]
    return ewa.fold(model) if setting.kind == "control" else model


def data_of(key: Key) -> Split:
    """Pictures for training, drawn by the seed, and the test pictures; to tune, others of the training part instead."""
    data, samples = whole(key.name), SAMPLES[key.name]
    if not key.tuning:
        return data.few(samples, seed=key.seed)
    # A fifth at least is kept to choose by, and no more than is needed.
    samples = min(samples, len(data.x) * 4 // 5)
    chosen, held = train_test_split(
        torch.arange(len(data.x)).numpy(), train_size=samples, test_size=min(1000, len(data.x) - samples),
        random_state=key.seed, stratify=data.y.numpy(),
    )  # fmt: skip
    return Split(data.x[chosen], data.y[chosen], data.x[held], data.y[held], data.classes)


@functools.cache
def whole(name: str) -> Split:
    """A data set, read once by each process."""
    return mnist5k(test=0.4) if name == "mnist5k" else digits()


@functools.cache
def source() -> nn.Module:
    """What is fine-tuned: the transformer trained on other people's digits, made as small; the same in each process."""
    data = mnist5k()
    # 28 pixels between two of margin, 4 of them one.
    x = functional.avg_pool2d(functional.pad(data.x, (2, 2, 2, 2)), 4)
    model = made(0, 8)
    fit(model, x, data.y, steps=STEPS["source"], batch=BATCH, lr=8e-3, weight_decay=0.05, label_smoothing=0.1)
    return model


def run(key: Key) -> Run:
    """Train once."""
    data = data_of(key)
    pretrained = key.name == "tune" and key.setting != SCRATCH
    dense = copy.deepcopy(source()) if pretrained else made(key.seed, data.x.shape[-1])
    model = begun(key.setting, dense, key.seed)
    try:
        return trained(model, key, data, STEPS[key.name])
    except FloatingPointError:
        # A network whose loss is no number tells no class.
        return Run(0.0, 0.0, float("inf"), ema=(0.0,) * len(DECAYS))


def trained(model: nn.Module, key: Key, data: Split, steps: int) -> Run:
    setting = key.setting
    optimizer = torch.optim.AdamW(model.parameters(), lr=key.rate, weight_decay=0.05, fused=True)
    if setting.kind == "experts":
        # Of their own, so that the order of the pictures is that of the other settings.
        ewa.use_generator(model, key.seed)
    if setting.share_rate:
        ewa.attach(optimizer, model, share_rate=setting.share_rate, total_steps=steps, until=setting.until)
    averages = [ModelEmaV3(model, decay=decay) for decay in DECAYS] if setting.kind == "vanilla" else []
    tail = AveragedModel(model) if setting.kind == "swa" else None
    held = round(TAIL * steps)
    rates: list[float] = []

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = functional.cross_entropy(model(x), y, label_smoothing=0.1)
        return value + BALANCE * ewa.balance_loss(model) if setting.kind == "routed" else value

    def after_step(step: int) -> None:
        for average in averages:
            average.update(model)
        if tail is not None and step >= held:
            rates[:] = rates or [optimizer.param_groups[0]["lr"]]
            optimizer.param_groups[0]["lr"] = rates[0]
            tail.update_parameters(model)

    fit(
        model, data.x, data.y, steps=steps, batch=BATCH, optimizer=optimizer, loss=loss, seed=key.seed,
        after_step=after_step,
    )  # fmt: skip
    model.eval()
    deployed = model if tail is None else tail.module
    ensemble = apart = spread = None
    with torch.no_grad():
        if setting.kind == "experts":
            deployed = ewa.fold(model)
            spread = max(max(layer.spread) for layer in ewa.stats(model))
            ewa.set_eval_mode(model, "ensemble")
            ensemble = 100 * accuracy(model, data.x_test, data.y_test)
            apart = float((model(data.x_test) - deployed(data.x_test)).abs().max())
        test_loss = float(functional.cross_entropy(deployed(data.x_test), data.y_test))
    return Run(
        100 * accuracy(deployed, data.x_test, data.y_test),
        100 * accuracy(deployed, data.x, data.y),
        test_loss,
        ensemble,
        apart,
        spread,
        tuple(100 * accuracy(average.module, data.x_test, data.y_test) for average in averages),
    )


def all_runs(keys: Sequence[Key], progress: Callable[[str], None]) -> dict[Key, Run]:
    """Train each, as many at a time as there are cores."""
    return dict(zip(keys, on_all_cores(run, [(key,) for key in keys], progress, "trainings"), strict=True))


@dataclass(frozen=True)
class Tuning:
    """Accuracies on pictures that were kept to choose by, as means over seeds, and what they choose."""

    tried: Mapping[float, float]
    decays: tuple[float, ...] = ()
    """Of the moving averages at the best rate."""

    @property
    def rate(self) -> float:
        return max(self.tried, key=lambda rate: self.tried[rate])

    @property
    def at_edge(self) -> bool:
        """Whether a rate beyond might be better still."""
        return self.rate in (min(self.tried), max(self.tried))


def tune(
    progress: Callable[[str], None], train: Callable[..., Mapping[Key, Run]] = all_runs
) -> dict[tuple[str, Setting], Tuning]:
    """Learning rates: three at first, and on from there until both neighbours of the best have been tried."""
    pairs = [(name, setting) for name, settings in TUNED.items() for setting in settings]
    # A start that is trained already takes less.
    middle = {pair: RATES.index(4e-3 if pair[0] == "tune" and pair[1] != SCRATCH else 1.6e-2) for pair in pairs}
    runs: dict[Key, Run] = {}
    found: dict[tuple[str, Setting], Tuning] = {}
    wanted = {pair: {at - 1, at, at + 1} for pair, at in middle.items()}
    while True:
        keys = [
            key
            for pair in pairs
            for at in sorted(wanted[pair] & {*range(len(RATES))})
            for seed in TUNING_SEEDS
            if (key := Key(*pair, seed, RATES[at], tuning=True)) not in runs
        ]
        if not keys:
            return found
        progress(f"learning rates: {len(keys)} trainings")
        runs.update(train(keys, progress))
        for pair in pairs:
            by_rate: dict[float, list[Run]] = {}
            for key, one in runs.items():
                if (key.name, key.setting) == pair:
                    by_rate.setdefault(key.rate, []).append(one)
            tried = {rate: statistics.mean(one.test for one in by_rate[rate]) for rate in sorted(by_rate)}
            best = Tuning(tried).rate
            decays = tuple(map(statistics.mean, zip(*(one.ema for one in by_rate[best]), strict=True)))
            found[pair] = Tuning(tried, decays)
            at = RATES.index(best)
            wanted[pair] |= {at - 1, at + 1}
