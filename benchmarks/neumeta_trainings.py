"""Families of generated networks on digits, and their peers.

The reference network ``digits-cnn`` (8x8 digits; a convolution to 16 channels, a block 16 -> 32 -> 16, a classifier) is
fused and reordered, and the four tensors of its block are generated; its other layers are fixed. Widths 8 to 32 are
trained but for three that are held out, and 6 and 4 are asked for as well. Each seed has a network of its own.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Fitted:
    """A family and what became of it."""

    scores: Scores
    report: nm.FitReport
    family: nm.NeuMeta


def fitted(seed: int, name: str, space: nm.WidthSpace, steps: Steps) -> Fitted:
    """One family of one seed."""
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
        return Fitted(scores(lambda width: family.sample(width, k=samples), data), report, family)


def peer(seed: int, name: str, model: nn.Module, steps: Steps) -> Scores:
    """One baseline of one seed."""
    data = rt.data.digits()
    example = data.x[:2]
    if name == "L1 pruning":
        return scores(lambda width: pruned(model, example, width), data)
    if name == "L1 pruning, fine-tuned each":
        return scores(lambda width: tuned(pruned(model, example, width), data, seed, steps.fine_tuning), data, SHOWN)
    if name == "slimmable training":
        return scores(slimmable(model, data, seed, steps.slim), data)
    return scores(lambda width: model if width == FULL else alone(width, data, seed, steps.alone), data, SHOWN)


PEERS = ("L1 pruning", "L1 pruning, fine-tuned each", "slimmable training", "trained alone each")


def run_all(progress: Callable[[str], None], steps: Steps) -> list[Run]:
    """All families and baselines, on all cores, one thread each."""
    runs: dict[int, Run] = {}
    jobs: list[tuple[Any, ...]] = []
    for seed in SEEDS:
        model, data = rt.data.reference("digits-cnn", seed=seed)
        smooth = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], seconds=1.0)
        rough = nm.fuse_and_smooth(model, ["block"], example=data.x[:2], solver="none")
        bypassed = nm.NeuMeta(smooth, hidden=1, depth=1, freqs=1).bypassed()
        right = [100 * rt.data.accuracy(net, data.x_test, data.y_test) for net in (model, bypassed)]
        runs[seed] = Run(right[0], right[1], smooth.variation)
        jobs += [(seed, name, smooth if recipe.reordered else rough, steps) for name, recipe in RECIPES.items()]
        jobs += [(seed, name, model, steps) for name in PEERS]
    for (seed, name, *_), found in zip(jobs, on_all_cores(_job, jobs, progress, "trainings"), strict=True):
        if isinstance(found, Fitted):
            runs[seed].scores[name] = found.scores
            runs[seed].dead[name], runs[seed].trapped[name] = found.report.dead, found.report.trapped
            if name == "NeuMeta":
                runs[seed].family = found.family
        else:
            runs[seed].scores[name] = found
    return [runs[seed] for seed in SEEDS]


def _job(seed: int, name: str, given: Any, steps: Steps) -> Fitted | Scores:
    return fitted(seed, name, given, steps) if name in RECIPES else peer(seed, name, given, steps)


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
