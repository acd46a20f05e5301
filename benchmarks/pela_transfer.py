"""PELA beyond its own task: fine-tuning the student on a second one, and the trained weights of a language model."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

import torch
from benchmarks.measuring import Difference, on_all_cores, paired, verdict
from benchmarks.pela_students import (
    BOTH,
    FD,
    ONLY,
    RATIOS,
    RECIPES,
    SEEDS,
    TASK,
    TUNING,
    Recipe,
    best_rates,
    digits_teacher,
    judged,
    mean,
    not_worse,
    percent,
    points,
    rate_shown,
    trained,
    why,
)
from torch import nn
from torch.nn import functional

from retensor.claims import Claim, Table
from retensor.compression import pela
from retensor.data import accuracy, fit, minilm, seeded, sentences

TURNED_STEPS, TURNED_RATES, REPAIR_RATE, MARGIN = 250, (3e-3, 1e-2, 3e-2), 1e-3, 0.5
DENSE, STUDENT, EQUAL, SMALL, SMALLEST = (
    "the dense model",
    "the student",
    "LoRA on the dense model, of the student's ranks",
    "LoRA of rank 8 on the dense model",
    "LoRA of rank 8 on the student",
)


@dataclass(frozen=True)
class Tuned:
    """A model after fine-tuning."""

    accuracy: float
    numbers: int
    held: int


def second_task(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Fine-tuning on digits turned by a quarter: the repaired student, the dense model, and LoRA on either."""
    names = (DENSE, STUDENT, EQUAL, SMALL, SMALLEST)
    progress("learning rates of the second task")
    tried = [(name, rate) for name in names for rate in TURNED_RATES]
    done = on_all_cores(tuned, [(name, TUNING, rate) for name, rate in tried], progress, "fine-tunings")
    rates = best_rates((*way, out.accuracy) for way, out in zip(tried, done, strict=True))
    runs = iter(
        on_all_cores(tuned, [(name, seed, rates[name]) for name in names for seed in SEEDS], progress, "fine-tunings")
    )
    found = {name: list(islice(runs, len(SEEDS))) for name in names}
    score = {name: [out.accuracy for out in outs] for name, outs in found.items()}
    held = {name: outs[0].held for name, outs in found.items()}
    gains = {f"against {name}": points(score[STUDENT], score[name]) for name in (DENSE, EQUAL)}
    large = _deit_base()
    setting = (
        f"digits turned by a quarter, {TURNED_STEPS} steps, c = 3, repaired once, 5 seeds; each at the best of "
        f"{len(TURNED_RATES)} learning rates on pictures of another teacher"
    )
    what = "weights, gradients and Adam's moments; activations are not counted"
    claims = [
        Claim(
            "The repaired student is fine-tuned as an ordinary model.",
            setting,
            f"all of the dense model, and peft's LoRA on it with as many trained numbers: at most {MARGIN} points less",
            "none",
            f"{percent(score[STUDENT])} %; points: " + ", ".join(f"{name}: {gain}" for name, gain in gains.items()),
            not_worse(gains.values(), MARGIN),
            f"Held where both 95 % intervals lie above -{MARGIN}, partly where only both means do.",
        ),
        Claim(
            "With as many trained numbers LoRA holds the whole backbone besides; the student has no other.",
            f"the same; {what}",
            f"peft's LoRA, {found[EQUAL][0].numbers:,} numbers; {found[STUDENT][0].numbers:,} of the student",
            "less",
            f"{held[STUDENT]:,} bytes against {held[EQUAL]:,}: x{held[STUDENT] / held[EQUAL]:.2f}",
            verdict(held[STUDENT] < held[EQUAL]),
        ),
        Claim(
            "(ours) Trained whole, the student takes less memory than LoRA of rank 8 on the dense model.",
            f"DeiT-B, c = 3; {what}",
            "LoRA of rank 8 on all replaced layers, and the head",
            "none",
            f"{large[STUDENT] / 1e6:,.0f} MB against {large[SMALL] / 1e6:,.0f} MB: "
            f"x{large[STUDENT] / large[SMALL]:.2f}",
            verdict(large[STUDENT] < large[SMALL]),
            f"LoRA of rank 8 on the student: {large[SMALLEST] / 1e6:,.0f} MB. The digits' ViT: {held[STUDENT]:,} "
            f"bytes against {held[SMALL]:,}, and {held[SMALLEST]:,}.",
        ),
    ]
    rows = [
        (name, str(percent(score[name])), out[0].numbers, out[0].held, rate_shown(rates[name], TURNED_RATES))
        for name, out in found.items()
    ]
    columns = ("Model", "Test accuracy, %", "Trained", "Bytes while training", "Rate")
    return claims, [Table("A second task", columns, rows)]


def tuned(name: str, seed: int, rate: float) -> Tuned:
    """Fine-tune a digits' transformer, or its repaired student, on the same pictures turned."""
    from peft import LoraConfig, get_peft_model

    teacher, data = digits_teacher(seed)
    plan = pela.plan(teacher, 3.0)
    model = copy.deepcopy(teacher)
    if name in (STUDENT, SMALLEST):
        model = trained(teacher, data, 3.0, BOTH, "all", REPAIR_RATE, seed)
    if name in (EQUAL, SMALL, SMALLEST):
        layers = {layer.name: layer.rank for layer in plan.layers}
        targets = [f"{layer}.{part}" for layer in layers for part in (0, 1)] if name == SMALLEST else list(layers)
        config = LoraConfig(
            r=8, lora_alpha=16, target_modules=targets, rank_pattern=layers if name == EQUAL else {},
            modules_to_save=["head"],
        )  # fmt: skip
        with seeded(seed):
            model = get_peft_model(model, config)
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(mine, lr=rate, weight_decay=1e-2)
    x, x_test = (torch.rot90(part, 1, (2, 3)) for part in (data.x, data.x_test))
    fit(model, x, data.y, steps=TURNED_STEPS, optimizer=optimizer, seed=seed)
    return Tuned(
        accuracy(model, x_test, data.y_test),
        sum(parameter.numel() for parameter in mine),
        _bytes_held(model, optimizer),
    )


def _bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, of gradients, and of the optimizer's state."""
    weights = [*model.parameters(), *model.buffers()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *gradients, *moments))


def _deit_base() -> dict[str, int]:
    """Bytes while training at DeiT-B's sizes, in float32: each trained number has a gradient and two moments."""
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_base_patch16_224", pretrained=False)
    plan = pela.plan(model, 3.0)
    head = sum(parameter.numel() for parameter in model.head.parameters())

    def lora(sizes: Sequence[int]) -> int:
        return 8 * sum(sizes) + head

    dense = lora([layer.in_features + layer.out_features for layer in plan.layers])
    factors = lora([layer.in_features + layer.out_features + 2 * layer.rank for layer in plan.layers])
    # peft keeps the head's first values beside those that train.
    return {
        STUDENT: 16 * plan.after,
        SMALL: 4 * plan.before + 16 * dense,
        SMALLEST: 4 * plan.after + 16 * factors,
    }


OMIT = ("pooler",)
MINILM_STEPS, MINILM_BATCH, MINILM_RATES = 16, 4, (0.0, 2e-5, 1e-4, 5e-4, 2e-3, 5e-3)


class Language:
    """all-MiniLM-L6-v2, and sentences to train it with, to choose by, and to test with, none in two of them."""

    def __init__(self) -> None:
        self.teacher, self._tokenizer = minilm()
        texts = sentences(least=40, most=120)
        self.parts = {"test": texts[::7][:200], "chosen by": texts[3::7][:100]}
        kept = {text for part in self.parts.values() for text in part}
        # Neighbours in the manual are the pairs of the model's own task: alike, among others that are not.
        self.pairs = [(a, b) for a, b in pairwise(texts) if a not in kept and b not in kept]

    def tokens(self, some: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(self._tokenizer(list(some), padding=True, truncation=True, max_length=24, return_tensors="pt"))

    @staticmethod
    def embedded(output: Any, mask: torch.Tensor) -> torch.Tensor:
        weights = mask[..., None].to(torch.float32)
        return functional.normalize((output.last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)

    @torch.no_grad()
    def ranks(self, model: nn.Module, part: str) -> torch.Tensor:
        """Ranks of the cosines of all pairs of sentences."""
        texts = self.parts[part]
        inputs = [self.tokens(texts[at : at + 50]) for at in range(0, len(texts), 50)]
        whole = torch.cat([self.embedded(model(**some), some["attention_mask"]) for some in inputs])
        cosines = (whole @ whole.T)[tuple(torch.triu_indices(len(texts), len(texts), 1))]
        return cosines.argsort().argsort().to(torch.float64)

    @lru_cache(maxsize=2)  # noqa: B019
    def wanted(self, part: str) -> torch.Tensor:
        return self.ranks(self.teacher, part)

    @lru_cache(maxsize=1)  # noqa: B019
    def decomposed(self, ratio: float) -> nn.Module:
        return pela.compress(self.teacher, pela.plan(self.teacher, ratio, OMIT))

    def begun(self, ratio: float, init: str, seed: int) -> nn.Module:
        if init == "svd":
            return copy.deepcopy(self.decomposed(ratio))
        return pela.compress(self.teacher, pela.plan(self.teacher, ratio, OMIT), init="random", seed=seed)


@lru_cache(maxsize=1)
def language() -> Language:
    """One in each process."""
    return Language()


def repaired_minilm(ratio: float, recipe: Recipe, rate: float, seed: int, part: str) -> tuple[float, float]:
    """Rank correlation of a student's cosines with the original's, and its largest deviation."""
    here = language()
    student = here.begun(ratio, recipe.init, seed)
    loss = pela.PELALoss(here.teacher, student, alpha=recipe.alpha, gamma=recipe.gamma) if recipe.alpha else None

    def step(model: nn.Module, chosen: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        # Without dropout: the student is compared with its teacher token by token.
        model.eval()
        some = [here.pairs[int(i)] for i in chosen]
        inputs = here.tokens([a for a, _ in some] + [b for _, b in some])

        def task(output: Any) -> torch.Tensor:
            first, second = here.embedded(output, inputs["attention_mask"]).split(len(some))
            return functional.cross_entropy(20 * first @ second.T, torch.arange(len(some)))

        if loss is None:
            return task(model(**inputs))
        return loss(inputs, task if recipe.task else None)[0]

    order = torch.arange(len(here.pairs))
    # Fused, since its table of words has most of the parameters.
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=1e-2, fused=True)
    fit(
        student, order, order, steps=MINILM_STEPS if rate else 0, batch=MINILM_BATCH, optimizer=optimizer, loss=step,
        seed=seed,
    )  # fmt: skip
    both = torch.stack([here.ranks(student.eval(), part), here.wanted(part)])
    return float(torch.corrcoef(both)[0, 1]), max(pela.deviations(here.teacher, student).values())


def sentence_pairs(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Trained weights as they come: does a student of all-MiniLM-L6-v2 still tell which sentences are alike."""
    ways = [(ratio, recipe) for ratio in RATIOS for recipe in RECIPES]
    tried = [(way, rate) for way in ways for rate in MINILM_RATES]
    progress("learning rates on all-MiniLM-L6-v2")
    jobs = [(*way, rate, TUNING, "chosen by") for way, rate in tried]
    done = on_all_cores(repaired_minilm, jobs, progress, "students of all-MiniLM-L6-v2")
    rates = best_rates((way, rate, score) for (way, rate), (score, _) in zip(tried, done, strict=True))
    # A student that is not trained comes out the same with every seed.
    alone = [(ratio, TASK, 0.0, TUNING, "test") for ratio in RATIOS]
    jobs = alone + [(*way, rates[way], seed, "test") for way in ways for seed in SEEDS]
    runs = iter(on_all_cores(repaired_minilm, jobs, progress, "students of all-MiniLM-L6-v2"))
    plain = dict(zip(RATIOS, islice(runs, len(RATIOS)), strict=True))
    found = {way: list(islice(runs, len(SEEDS))) for way in ways}
    score = {way: [agreement for agreement, _ in outs] for way, outs in found.items()}
    count = len(language().parts["test"])
    setting = (
        f"all-MiniLM-L6-v2 (its trained weights), {MINILM_STEPS} steps of {2 * MINILM_BATCH} sentences of Python's "
        f"manual, 5 seeds; rank correlation of the {count * (count - 1) // 2:,} cosines of {count} other sentences "
        "with the original's"
    )
    tuned_ = f"each at the best of {len(MINILM_RATES)} learning rates, none among them, on other sentences"
    against = f"SVD + task (neighbouring sentences alike, others of the batch not); {tuned_}"

    def better(statement: str, baseline: str, paper: str, ours: Recipe, theirs: Recipe) -> Claim:
        gains: dict[str, Difference] = {
            f"c = {ratio:g}": paired(score[ratio, ours], score[ratio, theirs], 4) for ratio in RATIOS
        }
        told = "; ".join(
            f"{name}: {gain} ({statistics.fmean(score[ratio, ours]):.3f} against "
            f"{statistics.fmean(score[ratio, theirs]):.3f}, SVD alone {plain[ratio][0]:.3f})"
            for (name, gain), ratio in zip(gains.items(), RATIOS, strict=True)
        )
        return Claim(statement, setting, baseline, paper, told, judged(gains.values()), why(gains))

    claims = [
        better("On trained weights of a language model, the teacher's features add to the task.",
               against, "better", FD, TASK),
        better("(ours) There, features without any task repair better than the task.", against, "none", ONLY, TASK),
        better("(ours) There, features alone repair better than with the task.",
               f"SVD + task + FD; {tuned_}", "none", ONLY, FD),
        better("WP (gamma = 1) adds to FD there.", f"SVD + task + FD; {tuned_}", "better", BOTH, FD),
    ]  # fmt: skip
    rows = [(ratio, "SVD alone", f"{figure:.4f}", far, "") for ratio, (figure, far) in plain.items()] + [
        (
            ratio,
            recipe.name,
            mean(score[ratio, recipe], 4),
            statistics.fmean([far for _, far in out]),
            rate_shown(rates[ratio, recipe], MINILM_RATES),
        )
        for (ratio, recipe), out in found.items()
    ]
    return claims, [
        Table("all-MiniLM-L6-v2", ("c", "Student", "Rank correlation with the original", "Max |BA - W|", "Rate"), rows)
    ]
