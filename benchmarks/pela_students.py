"""Students of PELA's claim: how each is made and trained, and how their figures are summed up."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from benchmarks.measuring import Difference, Mean, on_all_cores, paired
from torch import nn
from torch.nn import functional

from retensor.compression import pela
from retensor.data import Split, fit, reference

LABELS, STEPS, EPOCHS, BATCH, UNKNOWN = 50, 80, 3, 64, 32


@dataclass(frozen=True)
class Recipe:
    """One way to make a student and to train it."""

    name: str
    init: str = "svd"
    task: bool = True
    alpha: float = 0.0
    gamma: float = 0.0
    beta: float = 0.0


RANDOM = Recipe("random init + task", init="random")
TASK = Recipe("SVD + task")
FD = Recipe("SVD + task + FD", alpha=1.0)
BOTH = Recipe("SVD + task + FD + WP", alpha=1.0, gamma=1.0)
ONLY = Recipe("SVD + FD, no labels", task=False, alpha=1.0)
PRUNED = Recipe("torch-pruning + task + logits", init="pruned", beta=1.0)
RECIPES = (RANDOM, TASK, FD, BOTH, ONLY)


Job: TypeAlias = tuple[int, float, Recipe, str, float]
"""Seed of the teacher and of all else, ratio, recipe, ``"few"`` or ``"all"`` labels, learning rate."""


@dataclass(frozen=True)
class Outcome:
    """A student after its training."""

    accuracy: float
    agreement: float
    deviation: float
    parameters: int


def repaired(
    teacher: nn.Module, data: Split, ratio: float, recipe: Recipe, labels: str, rate: float, seed: int
) -> Outcome:
    """Train one student; with few labels, each step sees some of them and a batch of inputs without labels."""
    some = data.few(LABELS, seed=seed)
    if recipe.init == "pruned":
        student = pruned(teacher, some, pela.plan(teacher, ratio).after)
    else:
        student = pela.compress(teacher, ratio, init=recipe.init, seed=seed)  # type: ignore[arg-type]
    loss = None
    if recipe.alpha or recipe.gamma:
        loss = pela.PELALoss(teacher, student, alpha=recipe.alpha, gamma=recipe.gamma)

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        known = len(y)
        if labels == "few":
            chosen = torch.randperm(LABELS)[: BATCH - UNKNOWN]
            known, y = len(chosen), some.y[chosen]
            x = torch.cat([some.x[chosen], x]) if loss is not None or recipe.beta else some.x[chosen]

        def task(logits: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(logits[:known], y)

        if loss is not None:
            return loss(x, task if recipe.task else None)[0]
        logits = model(x)
        if recipe.beta:
            with torch.no_grad():
                wanted = teacher(x)
            return task(logits) + recipe.beta * functional.mse_loss(logits, wanted)
        return task(logits)

    steps = STEPS if labels == "few" else EPOCHS * -(-len(data.x) // BATCH)
    batch = UNKNOWN if labels == "few" else BATCH
    fit(student, data.x, data.y, steps=steps, batch=batch, lr=rate, loss=step, seed=seed)
    student.eval()
    with torch.no_grad():
        mine, theirs = student(data.x_test).argmax(-1), teacher(data.x_test).argmax(-1)
    deviation = 0.0 if recipe.init == "pruned" else max(pela.deviations(teacher, student).values())
    return Outcome(
        float((mine == data.y_test).float().mean()),
        float((mine == theirs).float().mean()),
        deviation,
        sum(parameter.numel() for parameter in student.parameters()),
    )


def teachers(seeds: Sequence[int], progress: Callable[[str], None]) -> None:
    """Train the reference models that are not kept yet."""
    on_all_cores(reference, [("digits-vit", seed) for seed in seeds], progress, "teachers")


def all_repaired(jobs: Sequence[Job], progress: Callable[[str], None]) -> list[Outcome]:
    """Train students, as many at a time as there are cores."""
    return on_all_cores(_job, jobs, progress, "students")


def _job(seed: int, ratio: float, recipe: Recipe, labels: str, rate: float) -> Outcome:
    teacher, data = reference("digits-vit", seed=seed)
    return repaired(teacher, data, ratio, recipe, labels, rate, seed)


def pruned(teacher: nn.Module, some: Split, parameters: int) -> nn.Module:
    """The same transformer with narrower layers, cut by torch-pruning's Taylor importance of the labelled samples."""
    import torch_pruning as tp

    for share in range(36, 60):
        model: Any = copy.deepcopy(teacher)
        functional.cross_entropy(model(some.x), some.y).backward()
        pruner = tp.pruner.BasePruner(
            model, some.x[:1], importance=tp.importance.GroupTaylorImportance(), pruning_ratio=share / 100,
            ignored_layers=[model.head], num_heads={block.attn.qkv: 4 for block in model.blocks},
            prune_head_dims=True, unwrapped_parameters=[(model.pos_embed, 2), (model.cls_token, 2)],
        )  # fmt: skip
        pruner.step()
        model.zero_grad(set_to_none=True)
        if sum(parameter.numel() for parameter in model.parameters()) <= parameters:
            break
    for block in model.blocks:
        attention = block.attn
        attention.head_dim = attention.qkv.out_features // 3 // attention.num_heads
        attention.attn_dim = attention.head_dim * attention.num_heads
    return model


def percent(values: Sequence[float]) -> Mean:
    """Of shares, as percentages."""
    return Mean.of([100 * value for value in values], digits=1)


def points(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Differences of shares, seed by seed, in points."""
    return paired([100 * value for value in ours], [100 * value for value in theirs], digits=1)
