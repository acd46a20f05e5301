"""Families of generated networks on digits, and their peers.

A reference network (8x8 digits; a convolution to 16 channels, a block 16 -> 32 -> 16, a classifier) is fused and
reordered, and the four tensors of its block are generated; its other layers are fixed. Widths 8 to 32 are trained but
for three that are held out, and 6 and 4 are asked for as well. Each seed has a network of its own. All is measured on
networks without normalisation; those with it are a second, harder case.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch_pruning
from benchmarks.measuring import on_all_cores
from torch import nn
from torch.func import functional_call
from torch.nn import functional

import retensor as rt
from retensor.compression import neumeta as nm
from retensor.data.reference import REFERENCES, DigitsCNN

SEEDS = (0, 1, 2, 3, 4)
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
SAMPLES = 20
RECON = 10.0
SHAKES = 20

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


PEERS = (
    "L1 pruning",
    "resampled along the path",
    "L1 pruning, fine-tuned each",
    "slimmable training",
    "trained alone each",
)


@dataclass(frozen=True)
class Base:
    """A reference network, and how long families of it and their peers are trained."""

    reference: str
    norm: bool
    fit: int
    lr: float
    milestones: tuple[float, ...] = ()
    recipes: tuple[str, ...] = tuple(RECIPES)
    peers: tuple[str, ...] = PEERS
    warm: int = 400
    slim: int = 600
    fine_tuning: int = 200


PLAIN = Base("digits-cnn-plain", norm=False, fit=500, lr=3e-4)
NORMED = Base(
    "digits-cnn", norm=True, fit=2000, lr=1e-3, milestones=(0.6, 0.85), recipes=("NeuMeta", "without permutation"),
    peers=("L1 pruning", "resampled along the path", "slimmable training"),
)  # fmt: skip


@dataclass
class Run:
    """What one seed gave; accuracies in percent."""

    base: float
    bypass: float
    shaken: float
    variation: tuple[float, float]
    scores: dict[str, Scores] = field(default_factory=dict)
    dead: dict[str, dict[int, float]] = field(default_factory=dict)
    trapped: dict[str, bool] = field(default_factory=dict)
    family: nm.NeuMeta | None = None


def scores(make: Callable[[int], nn.Module], data: rt.data.Split, widths: Sequence[int] = ALL) -> Scores:
    return {width: 100 * rt.data.accuracy(make(width), data.x_test, data.y_test) for width in widths}


@dataclass(frozen=True)
class Fitted:
    """A family and what became of it."""

    scores: Scores
    report: nm.FitReport
    family: nm.NeuMeta


def fitted(seed: int, name: str, base: Base, space: nm.WidthSpace) -> Fitted:
    """One family of one seed."""
    recipe, data = RECIPES[name], rt.data.digits()
    family = nm.NeuMeta(space, **FIELD, seed=seed)
    if recipe.warm:
        nm.warm_start(family, steps=base.warm, widths=recipe.warm, noise=recipe.noise, seed=seed)
    report = nm.fit(
        family, Batches(data, seed), widths=TRAINED, noise=recipe.noise, recon=RECON, steps=base.fit, lr=base.lr,
        milestones=base.milestones, seed=seed, on_trap="ignore",
    )  # fmt: skip
    samples = SAMPLES if recipe.noise else 1
    with warnings.catch_warnings():
        # Widths outside of the trained ones are asked for on purpose.
        warnings.simplefilter("ignore")
        return Fitted(scores(lambda width: family.sample(width, k=samples), data), report, family)


def peer(seed: int, name: str, base: Base, model: nn.Module, space: nm.WidthSpace) -> Scores:
    """One baseline of one seed."""
    data = rt.data.digits()
    make: Callable[[int], nn.Module]
    if name == "L1 pruning":
        make = partial(pruned, model, data)
    elif name == "resampled along the path":
        make = partial(resampled, space)
    elif name == "L1 pruning, fine-tuned each":
        make = partial(tuned, model, data, seed, base.fine_tuning)
    elif name == "slimmable training":
        make = slimmable(model, data, seed, base.slim)
    else:
        make = partial(alone, model, base, data, seed)
    return scores(make, data, SHOWN)


def run_all(progress: Callable[[str], None], bases: Sequence[Base]) -> list[list[Run]]:
    """All families and baselines of each base, by seed, on all cores, one thread each."""
    runs: dict[tuple[Base, int], Run] = {}
    jobs: list[tuple[Any, ...]] = []
    for base, seed in itertools.product(bases, SEEDS):
        model, data = rt.data.reference(base.reference, seed=seed)
        smooth = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], seconds=1.0)
        rough = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], solver="none")
        bypassed = nm.NeuMeta(smooth, hidden=1, depth=1, freqs=1).bypassed()
        right = [100 * rt.data.accuracy(net, data.x_test, data.y_test) for net in (model, bypassed)]
        runs[base, seed] = Run(right[0], right[1], shaken(smooth, data, seed), smooth.variation)
        jobs += [(seed, name, base, smooth if RECIPES[name].reordered else rough) for name in base.recipes]
        jobs += [(seed, name, base, model, smooth) for name in base.peers]
    for (seed, name, base, *_), found in zip(jobs, on_all_cores(_job, jobs, progress, "trainings"), strict=True):
        run = runs[base, seed]
        if isinstance(found, Fitted):
            run.scores[name] = found.scores
            run.dead[name], run.trapped[name] = found.report.dead, found.report.trapped
            if name == "NeuMeta":
                run.family = found.family
        else:
            run.scores[name] = found
    return [[runs[base, seed] for seed in SEEDS] for base in bases]


def _job(seed: int, name: str, *given: Any) -> Fitted | Scores:
    return fitted(seed, name, *given) if name in RECIPES else peer(seed, name, *given)


def shaken(space: nm.WidthSpace, data: rt.data.Split, seed: int) -> float:
    """Mean accuracy with normal noise of half its size on each generated tensor: how much of an error is borne."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(SHAKES):
        net = copy.deepcopy(space.net)
        with torch.no_grad():
            for name in space.shapes(FULL):
                value = net.get_parameter(name)
                size = value.square().mean().sqrt()
                value += 0.5 * size * torch.randn(value.shape, generator=generator)
        found.append(100 * rt.data.accuracy(net, data.x_test, data.y_test))
    return statistics.fmean(found)


def resampled(space: nm.WidthSpace, width: int) -> nn.Module:
    """The full weights resampled along the channels' path, without any training."""
    return filled(space.net, space.resampled(width), width)


def filled(net: nn.Module, tensors: dict[str, torch.Tensor], width: int) -> nn.Module:
    """A fused network of a width, with these tensors and all others of a network's."""
    small = DigitsCNN(width, norm=False)
    small.load_state_dict(net.state_dict() | {name: value.detach() for name, value in tensors.items()})
    return small.eval()


def pruned(model: nn.Module, data: rt.data.Split, width: int) -> nn.Module:
    """The channels of least L1 norm removed from the block, by torch-pruning.

    Statistics of normalisations are measured anew on the training samples, since those of the full network do not fit.
    """
    model = copy.deepcopy(model)
    graph, ranked = _ranked(model, data.x[:2])
    least = ranked[: FULL - width]
    if least:
        graph.get_pruning_group(model.block.conv1, torch_pruning.prune_conv_out_channels, least).prune()
        remeasure_(model, data.x)
    return model.eval()


def remeasure_(model: nn.Module, x: torch.Tensor) -> None:
    """Take the statistics of all batch normalisations from these samples."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        # The mean of all batches, of which there is one.
        norm.momentum = None
    with torch.no_grad():
        model.train()(x)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum


def tuned(model: nn.Module, data: rt.data.Split, seed: int, steps: int, width: int) -> nn.Module:
    """A pruned network, all of whose values are trained on."""
    model = pruned(model, data, width)
    rt.data.fit(model, data.x, data.y, steps=steps, lr=1e-3, schedule="cosine", seed=seed)
    return model


def alone(model: nn.Module, base: Base, data: rt.data.Split, seed: int, width: int) -> nn.Module:
    """A network of its own, as the reference one was trained; that one itself at its width."""
    if width == FULL:
        return model
    recipe = REFERENCES[base.reference]
    with rt.data.seeded(seed):
        small = DigitsCNN(width, norm=base.norm)
    rt.data.fit(
        small, data.x, data.y, steps=recipe.steps, batch=recipe.batch, lr=recipe.lr, weight_decay=recipe.weight_decay,
        seed=seed,
    )  # fmt: skip
    return small


def slimmable(model: nn.Module, data: rt.data.Split, seed: int, steps: int) -> Callable[[int], nn.Module]:
    """The block's weights trained so that their first channels work alone: any width is a slice.

    Universally slimmable training from the same network, with the same fixed layers: channels in the
    order of their L1 norms, and at each step the largest width, the least, and two at random that are taught by the
    largest (the sandwich rule and in-place distillation). Normalisations are fused, so none has to be measured anew.
    """
    net = nm.fuse(model, example=data.x[:2])
    order = _ranked(net, data.x[:2])[1][::-1]
    net.requires_grad_(False)
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

    return lambda width: filled(net, sliced(width), width)


def _ranked(model: nn.Module, example: torch.Tensor) -> tuple[Any, list[int]]:
    """The dependency graph, and the block's inner channels from the least L1 norm on."""
    graph = torch_pruning.DependencyGraph().build_dependency(model.requires_grad_(True), example_inputs=example)
    channels = list(range(model.block.conv1.out_channels))
    whole = graph.get_pruning_group(model.block.conv1, torch_pruning.prune_conv_out_channels, channels)
    return graph, torch_pruning.importance.MagnitudeImportance(p=1)(whole).argsort().tolist()
