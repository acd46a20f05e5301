"""Trainings of ShiftAddViT's claim: small vision transformers on noisy digits, converted and trained on for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.measuring import on_all_cores
from torch import nn
from torch.nn import functional

from retensor.compression import shiftadd
from retensor.data import Split, accuracy, digits, fit
from retensor.data.reference import digits_vit
from retensor.data.training import seeded

SEEDS = (1, 2, 3, 4, 5)
TUNING = 0
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
WIDTH, DEPTH, NOISE = 48, 4, 0.2
BEGIN, EPOCHS, BATCH, WEIGHT = 600, 10, 64, 0.01
PERCEPTRONS = ("**.fc1", "**.fc2")


@dataclass(frozen=True)
class Way:
    """What a trained model is turned into before it is trained on."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()
    alpha: tuple[float, float] | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.settings)


def way(name: str, alpha: tuple[float, float] | None = None, **settings: Any) -> Way:
    return Way(name, tuple(settings.items()), alpha)


def perceptrons(linears: str, bits: int) -> dict[str, Any]:
    """Perceptrons alone; three bits need a scale of the layer's, or no small weight could be told from another."""
    return {
        "attention": None, "linears": linears, "include": PERCEPTRONS, "weight_bits": bits, "scale": bits < 5
    }  # fmt: skip


DENSE = way("as it is")
ADD = way("additions in attention", linears=None)
SHIFT = {bits: way(f"shifts in perceptrons, {bits} bits", **perceptrons("shift", bits)) for bits in (5, 3)}
MOE = {
    bits: way(f"mixtures in perceptrons, {bits} bits", shiftadd.ALPHA, **perceptrons("moe", bits)) for bits in (5, 3)
}
UNSCALED = way(
    "mixtures in perceptrons, 5 bits, outputs not scaled", shiftadd.ALPHA, **perceptrons("moe", 5), gate="straight"
)
EVEN = way("mixtures in perceptrons, 5 bits, equal latencies", (0.5, 0.5), **perceptrons("moe", 5))
ALL_SHIFT = way("additions, and shifts in all layers", linears="shift")
ALL_MOE = way("additions, and mixtures in all layers", shiftadd.ALPHA, linears="moe")
WAYS = (DENSE, ADD, *SHIFT.values(), *MOE.values(), EVEN, UNSCALED, ALL_SHIFT, ALL_MOE)


@dataclass(frozen=True)
class Outcome:
    """A model right after its conversion and after training; the share of its tokens that multiply."""

    before: float
    after: float
    share: float | None
    frozen: float


def noisy(seed: int = 0) -> Split:
    """The digits with noise on every pixel, the same for all models."""
    data = digits()
    generator = torch.Generator().manual_seed(seed)
    x, x_test = (part + NOISE * torch.randn(part.shape, generator=generator) for part in (data.x, data.x_test))
    return Split(x, data.y, x_test, data.y_test, data.classes)


def held_out(data: Split) -> Split:
    """The training part alone, a third of it for testing: what rates are chosen on."""
    cut = 2 * len(data.x) // 3
    return Split(data.x[:cut], data.y[:cut], data.x[cut:], data.y[cut:], data.classes)


def data_of(seed: int) -> Split:
    """Of the seed that rates are chosen on without the test pictures."""
    return held_out(noisy()) if seed == TUNING else noisy()


def begun(seed: int) -> dict[str, torch.Tensor]:
    """The state of a trained model of a seed."""
    data = data_of(seed)
    model = fresh(seed)
    fit(model, data.x, data.y, steps=BEGIN, batch=BATCH, seed=seed)
    return model.state_dict()


def fresh(seed: int) -> nn.Module:
    with seeded(seed):
        return digits_vit(WIDTH, DEPTH)


def trained(seed: int, state: Mapping[str, torch.Tensor], how: Way, rate: float) -> Outcome:
    """One model of a way, trained on; each pass over the pictures is an epoch."""
    data = data_of(seed)
    model = fresh(seed)
    model.load_state_dict(dict(state))
    if how.settings:
        model = shiftadd.convert(model, seed=seed, **how.arguments)
    before = accuracy(model, data.x_test, data.y_test)
    alpha = how.alpha

    def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        task = functional.cross_entropy(model(x), y)
        return task if alpha is None else task + WEIGHT * shiftadd.ll_loss(model, alpha)

    fit(model, data.x, data.y, steps=EPOCHS * -(-len(data.x) // BATCH), batch=BATCH, lr=rate, loss=loss, seed=seed)
    after = accuracy(model, data.x_test, data.y_test)
    share = None if alpha is None else shiftadd.router_report(model, data.x_test).shares[0]
    frozen = accuracy(shiftadd.freeze(model), data.x_test, data.y_test) if how.settings else after
    return Outcome(before, after, share, frozen)


def all_trained(progress: Callable[[str], None]) -> tuple[dict[Way, float], dict[Way, list[Outcome]]]:
    """The best rate of every way, and its models of all seeds."""
    seeds = (TUNING, *SEEDS)
    states = dict(zip(seeds, on_all_cores(begun, [(seed,) for seed in seeds], progress, "models"), strict=True))
    tries = [(how, rate) for how in WAYS for rate in RATES]
    done = on_all_cores(trained, [(TUNING, states[TUNING], how, rate) for how, rate in tries], progress, "rates")
    rates: dict[Way, float] = {}
    best: dict[Way, float] = {}
    for (how, rate), outcome in zip(tries, done, strict=True):
        if outcome.after > best.get(how, -1.0):
            best[how], rates[how] = outcome.after, rate
    jobs = [(how, seed) for how in WAYS for seed in SEEDS]
    found = on_all_cores(trained, [(seed, states[seed], how, rates[how]) for how, seed in jobs], progress, "trainings")
    outcomes: dict[Way, list[Outcome]] = {how: [] for how in WAYS}
    for (how, _), outcome in zip(jobs, found, strict=True):
        outcomes[how].append(outcome)
    return rates, outcomes


def rate_shown(rate: float, rates: Sequence[float] = RATES) -> str:
    """A rate that was chosen, and whether a better one may lie beyond those that were tried."""
    return f"{rate:g}" + (" (the grid's end)" if rate in (rates[0], rates[-1]) else "")
