"""Students of PELA's claim: how each is made and trained, how rates are chosen, and how figures are judged."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import torch
from benchmarks.measuring import Difference, Mean, on_all_cores, paired, verdict
from torch import nn
from torch.nn import functional

from retensor.claims import Verdict
from retensor.compression import pela
from retensor.data import Split, fit, reference

SEEDS = (1, 2, 3, 4, 5)
TUNING = 0
RATIOS = (2.0, 3.0)
RATES = (0.0, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
LABELS, STEPS, EPOCHS, BATCH, UNKNOWN = 50, 80, 3, 64, 32
Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Recipe:
    """One way to make a student and to train it."""

    name: str
    init: str = "svd"
    task: bool = True
    alpha: float = 0.0
    gamma: float = 0.0


RANDOM = Recipe("random init + task", init="random")
TASK = Recipe("SVD + task")
FD = Recipe("SVD + task + FD", alpha=1.0)
BOTH = Recipe("SVD + task + FD + WP", alpha=1.0, gamma=1.0)
ONLY = Recipe("SVD + FD, no labels", task=False, alpha=1.0)
PRUNED = Recipe("torch-pruning + task + FD", init="pruned", alpha=1.0)
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


def held_out(data: Split) -> Split:
    """The training part alone, a third of it for testing: what rates are chosen on."""
    cut = 2 * len(data.x) // 3
    return Split(data.x[:cut], data.y[:cut], data.x[cut:], data.y[cut:], data.classes)


def digits_teacher(seed: int) -> tuple[nn.Module, Split]:
    """The reference transformer of a seed; for the seed that rates are chosen on without the test pictures."""
    teacher, data = reference("digits-vit", seed=seed)
    return teacher, held_out(data) if seed == TUNING else data


def trained(
    teacher: nn.Module, data: Split, ratio: float, recipe: Recipe, labels: str, rate: float, seed: int
) -> nn.Module:
    """One student in eval mode; with few labels, each step sees some of them and a batch of inputs without labels.

    A rate of 0 leaves it as it begins.
    """
    some = data.few(LABELS, seed=seed)
    if recipe.init == "pruned":
        student = pruned(teacher, some, pela.plan(teacher, ratio).after)
    else:
        student = pela.compress(teacher, ratio, init=recipe.init, seed=seed)  # type: ignore[arg-type]
    loss = None
    if (recipe.alpha or recipe.gamma) and recipe.init != "pruned":
        loss = pela.PELALoss(teacher, student, alpha=recipe.alpha, gamma=recipe.gamma)

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        known = len(y)
        if labels == "few":
            chosen = torch.randperm(LABELS)[: BATCH - UNKNOWN]
            known, y = len(chosen), some.y[chosen]
            x = torch.cat([some.x[chosen], x]) if recipe.alpha else some.x[chosen]

        def task(logits: torch.Tensor) -> torch.Tensor:
            return functional.cross_entropy(logits[:known], y)

        if loss is not None:
            return loss(x, task if recipe.task else None)[0]
        if not recipe.alpha:
            return task(model(x))
        # The same loss for a model without layers of low rank.
        logits, features = tokens(model, x)
        with torch.no_grad():
            _, targets = tokens(teacher, x)
        return task(logits) + recipe.alpha * pela.feature_loss(features, targets)

    steps = STEPS if labels == "few" else EPOCHS * -(-len(data.x) // BATCH)
    batch = UNKNOWN if labels == "few" else BATCH
    fit(student, data.x, data.y, steps=steps if rate else 0, batch=batch, lr=rate, loss=step, seed=seed)
    return student.eval()


def repaired(seed: int, ratio: float, recipe: Recipe, labels: str, rate: float) -> Outcome:
    """The figures of one student."""
    teacher, data = digits_teacher(seed)
    student = trained(teacher, data, ratio, recipe, labels, rate, seed)
    with torch.no_grad():
        mine, theirs = student(data.x_test).argmax(-1), teacher(data.x_test).argmax(-1)
    return Outcome(
        float((mine == data.y_test).float().mean()),
        float((mine == theirs).float().mean()),
        0.0 if recipe.init == "pruned" else max(pela.deviations(teacher, student).values()),
        sum(parameter.numel() for parameter in student.parameters()),
    )


def tokens(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of a transformer of timm, and all tokens after every block."""
    last, found = model.forward_intermediates(x, norm=False, output_fmt="NLC", return_prefix_tokens=True)
    return model.forward_head(last), [torch.cat([prefix, patches], dim=1) for patches, prefix in found]


def teachers(seeds: Sequence[int], progress: Callable[[str], None]) -> None:
    """Train the reference models that are not kept yet."""
    on_all_cores(digits_teacher, [(seed,) for seed in seeds], progress, "teachers")


def all_repaired(jobs: Sequence[Job], progress: Callable[[str], None]) -> list[Outcome]:
    """Train students, as many at a time as there are cores."""
    return on_all_cores(repaired, jobs, progress, "students")


def pruned(teacher: nn.Module, some: Split, parameters: int) -> nn.Module:
    """The same transformer with narrower heads and perceptrons, as near in parameters as torch-pruning comes.

    Cut by its Taylor importance of the labelled samples. The width stays, so that features can be compared.
    """
    low, high = 0.0, 0.98
    found: list[tuple[int, nn.Module]] = []
    for _ in range(10):
        share = (low + high) / 2
        model = _cut(teacher, some, share)
        count = sum(parameter.numel() for parameter in model.parameters())
        found.append((abs(count - parameters), model))
        low, high = (share, high) if count > parameters else (low, share)
    return min(found, key=lambda pair: pair[0])[1]


def _cut(teacher: nn.Module, some: Split, share: float) -> nn.Module:
    import torch_pruning as tp

    model: Any = copy.deepcopy(teacher)
    functional.cross_entropy(model(some.x), some.y).backward()
    kept = [model.head, model.patch_embed.proj]
    kept += [layer for block in model.blocks for layer in (block.attn.proj, block.mlp.fc2)]
    pruner = tp.pruner.BasePruner(
        model, some.x[:1], importance=tp.importance.GroupTaylorImportance(), pruning_ratio=share,
        ignored_layers=kept, num_heads={block.attn.qkv: 4 for block in model.blocks}, prune_head_dims=True,
        unwrapped_parameters=[(model.pos_embed, 2), (model.cls_token, 2)],
    )  # fmt: skip
    pruner.step()
    model.zero_grad(set_to_none=True)
    for block in model.blocks:
        attention = block.attn
        attention.head_dim = attention.qkv.out_features // 3 // attention.num_heads
        attention.attn_dim = attention.head_dim * attention.num_heads
    return model  # type: ignore[no-any-return]


def best_rates(scores: Iterable[tuple[Way, float, float]]) -> dict[Way, float]:
    """Of every way the rate of the highest score, the lowest of several; each score is (way, rate, score)."""
    best: dict[Way, tuple[float, float]] = {}
    for way, rate, score in scores:
        best[way] = max(best.get(way, (float("-inf"), 0.0)), (score, -rate))
    return {way: -rate for way, (_, rate) in best.items()}


def rate_shown(rate: float, rates: Sequence[float]) -> str:
    """A rate that was chosen, and whether a better one may lie beyond those that were tried."""
    if not rate:
        return "no training"
    return f"{rate:g}" + (" (the grid's end)" if rate in (rates[0], rates[-1]) else "")


def judged(gains: Iterable[Difference]) -> Verdict:
    """Held where every gain is above nothing beyond its interval; partly where one is and no mean is below nothing."""
    gains = list(gains)
    above = [gain.above() for gain in gains]
    return verdict(all(above), any(above) and all(gain.mean > 0 for gain in gains))


def not_worse(gains: Iterable[Difference], margin: float) -> Verdict:
    """Held where no gain's interval reaches a margin below nothing; partly where only no mean does."""
    gains = list(gains)
    return verdict(all(gain.above(-margin) for gain in gains), all(gain.mean > -margin for gain in gains))


def why(gains: Mapping[str, Difference]) -> str:
    """What to say of the gains that are not above nothing, by what each was measured at."""
    return " ".join(f"{name}: {gain.why[0].lower()}{gain.why[1:]}" for name, gain in gains.items() if gain.why)


def percent(values: Sequence[float]) -> Mean:
    """Of shares, as percentages."""
    return Mean.of([100 * value for value in values], digits=1)


def points(ours: Sequence[float], theirs: Sequence[float]) -> Difference:
    """Differences of shares, seed by seed, in points."""
    return paired([100 * value for value in ours], [100 * value for value in theirs], digits=1)


def mean(values: Sequence[float], digits: int) -> str:
    """For a table: with its error where there are several."""
    return str(Mean.of(values, digits)) if len(values) > 1 else f"{statistics.fmean(values):.{digits}f}"
