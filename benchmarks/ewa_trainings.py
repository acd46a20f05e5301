"""Trainings with averaged experts, their controls and their peers on small sets of real digits.

Every run of a seed sees the same pictures in the same order and begins, outside the experts, with the same values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from benchmarks.measuring import on_all_cores
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional

from retensor.compression import ewa
from retensor.data import Split, accuracy, digits, fit, mnist5k, reference, seeded

SEEDS = tuple(range(8))
WIDTH, DEPTH, BATCH = 32, 2, 50
SAMPLES, STEPS = 300, 320
TUNE_SAMPLES, TUNE_STEPS = 200, 120
RATES = {"digits": (2e-3, 4e-3, 8e-3), "mnist5k": (2e-3, 4e-3, 8e-3), "tune": (5e-4, 1e-3, 2e-3)}
TUNING_SEEDS = (100, 101)
DECAYS = (0.9, 0.97, 0.99, 0.997)
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
        names = {
            "vanilla": "vanilla",
            "control": f"control: FFNs begin as the mean of {self.experts} draws",
            "experts": f"EWA r={self.share_rate:g}, {n}" if self.share_rate else f"experts never averaged, {n}",
            "routed": f"routed top-1, {n}" + (f", Early EWA r={self.share_rate:g}" if self.share_rate else ""),
        }
        return names[self.kind] + (", experts begin as copies" if self.init == "copy" else "")


VANILLA = Setting("vanilla")
CONTROL = Setting("control")
MAIN = Setting("experts", share_rate=0.3)
APART = Setting("experts")
COPIES = Setting("experts", share_rate=0.3, init="copy")
ROUTED = Setting("routed")
EARLY = Setting("routed", share_rate=0.3, until=0.5)
EWAS = tuple(Setting("experts", n, r) for n in (2, 4) for r in (0.1, 0.3, 0.5))
DIGITS = (VANILLA, CONTROL, APART, *EWAS, COPIES, ROUTED, EARLY)
MNIST = (VANILLA, CONTROL, MAIN)


@dataclass(frozen=True)
class Run:
    """What came of one training: percentages right."""

    test: float
    train: float
    loss: float
    ensemble: float | None = None
    spread: float | None = None
    ema: tuple[float, ...] = ()


Key = tuple[str, Setting, int, float]
"""The data set, what was trained, the seed, and the learning rate."""


def made(seed: int, image: int, depth: int = DEPTH) -> nn.Module:
    """An untrained transformer over 16 patches, whose tokens are all read by the classifier."""
    with seeded(seed):
        # The initial values of the first vision transformers: with timm's smaller ones 400 pictures take hundreds of
        # epochs to learn.
        model: nn.Module = VisionTransformer(
            img_size=image, patch_size=image // 4, in_chans=1, num_classes=10, embed_dim=WIDTH, depth=depth,
            num_heads=4, global_pool="avg", class_token=False, weight_init="jax",
        )  # fmt: skip
    return model


def begun(setting: Setting, seed: int, image: int) -> nn.Module:
    """A model as its training begins; the experts beyond the first are those of models drawn anew."""
    dense = made(seed, image)
    others = iter(range(1000 * (seed + 1), 1000 * (seed + 2)))
    fresh = "copy" if setting.init == "copy" else lambda: made(next(others), image)
    if setting.kind == "vanilla":
        return dense
    if setting.kind == "routed":
        return ewa.route(dense, setting.experts, init=fresh, seed=seed)
    model = ewa.convert(dense, setting.experts, init=fresh)
    return ewa.fold(model) if setting.kind == "control" else model


def data_of(name: str, seed: int) -> Split:
    """Few pictures for training, drawn by the seed, and all that are kept for testing."""
    return whole(name).few(TUNE_SAMPLES if name == "tune" else SAMPLES, seed=seed)


@functools.cache
def whole(name: str) -> Split:
    """A data set, read once by each process."""
    if name == "digits":
        return digits()
    data = mnist5k(test=0.4)
    if name == "mnist5k":
        return data
    # 28 pixels between two of margin, 4 of them one: 8 pixels as the reference has.
    small = [functional.avg_pool2d(functional.pad(x, (2, 2, 2, 2)), 4) for x in (data.x, data.x_test)]
    return Split(small[0], data.y, small[1], data.y_test, data.classes)


def run(key: Key) -> Run:
    """Train once."""
    name, setting, seed, lr = key
    data = data_of(name, seed)
    model = begun(setting, seed, data.x.shape[-1])
    return trained(model, setting, data, seed, lr, STEPS)


def trained(model: nn.Module, setting: Setting, data: Split, seed: int, lr: float, steps: int) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    averages: list[ModelEmaV3] = []
    if setting.kind == "experts":
        # Of their own, so that the order of the pictures is that of the other settings.
        ewa.use_generator(model, torch.Generator().manual_seed(seed))
    if setting.share_rate:
        ewa.attach(optimizer, model, share_rate=setting.share_rate, total_steps=steps, until=setting.until)
    if setting.kind == "vanilla":
        averages = [ModelEmaV3(model, decay=decay, use_warmup=True) for decay in DECAYS]

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        value = functional.cross_entropy(model(x), y, label_smoothing=0.1)
        return value + BALANCE * ewa.balance_loss(model) if setting.kind == "routed" else value

    def after_step(step: int) -> None:
        for average in averages:
            average.update(model, step=step)

    fit(
        model, data.x, data.y, steps=steps, batch=BATCH, optimizer=optimizer, loss=loss, seed=seed,
        after_step=after_step,
    )  # fmt: skip
    model.eval()
    ensemble = spread = None
    deployed = model
    if setting.kind == "experts":
        deployed = ewa.fold(model)
        spread = max(max(layer.spread) for layer in ewa.stats(model))
        ewa.set_eval_mode(model, "ensemble")
        ensemble = 100 * accuracy(model, data.x_test, data.y_test)
    with torch.no_grad():
        test_loss = float(functional.cross_entropy(deployed(data.x_test), data.y_test))
    return Run(
        100 * accuracy(deployed, data.x_test, data.y_test),
        100 * accuracy(deployed, data.x, data.y),
        test_loss,
        ensemble,
        spread,
        tuple(100 * accuracy(average.module, data.x_test, data.y_test) for average in averages),
    )


def tuned(key: Key) -> Run:
    """Fine-tune the reference transformer for digits on other digits."""
    name, setting, seed, lr = key
    model, _ = reference("digits-vit")
    if setting.kind == "experts":
        model = ewa.convert(model, setting.experts, init="copy")
    data = data_of(name, seed)
    return trained(model, setting, data, seed, lr, TUNE_STEPS)


def all_runs(keys: Sequence[Key], progress: Callable[[str], None]) -> dict[Key, Run]:
    """Train each, as many at a time as there are cores."""
    # Trained once before, not twice at the same time.
    reference("digits-vit")
    return dict(zip(keys, on_all_cores(_one, [(key,) for key in keys], progress, "trainings"), strict=True))


def _one(key: Key) -> Run:
    return tuned(key) if key[0] == "tune" else run(key)
