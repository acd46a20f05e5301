"""PELA beyond its own task: fine-tuning the student on a second one, and the trained weights of a language model."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from benchmarks.measuring import Difference, Mean, paired, verdict
from benchmarks.pela_students import BOTH, FD, ONLY, RANDOM, RECIPES, TASK, Recipe, percent, points
from torch import nn
from torch.nn import functional

from retensor.claims import Claim, Table
from retensor.compression import pela
from retensor.data import accuracy, fit, minilm, reference, seeded, sentences

SEEDS = (1, 2, 3, 4, 5)


def second_task(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Fine-tuning on digits turned by a quarter: the repaired student, the dense model, and LoRA on the dense one."""
    from peft import LoraConfig, get_peft_model

    figures: dict[str, list[float]] = {"dense": [], "student": [], "LoRA": []}
    held: dict[str, list[int]] = {name: [] for name in figures}
    trained: dict[str, int] = {}
    steps, rates = 60, (2e-3, 6e-3)
    chosen: dict[str, float] = {}
    for seed in (0, *SEEDS):
        teacher, data = reference("digits-vit", seed=seed)
        plan = pela.plan(teacher, 3.0)
        student = pela.compress(teacher, plan)
        loss = pela.PELALoss(teacher, student)
        fit(
            student, data.x, data.y, steps=51, lr=5e-4, seed=seed,
            loss=lambda _, x, y: loss(x, lambda out: functional.cross_entropy(out, y))[0],  # noqa: B023
        )  # fmt: skip
        x, x_test = (torch.rot90(part, 1, (2, 3)) for part in (data.x, data.x_test))
        layers = {layer.name: layer.rank for layer in plan.layers}

        def start(name: str) -> nn.Module:
            model = copy.deepcopy(student if name == "student" else teacher)  # noqa: B023
            if name == "LoRA":
                # Factors of the same sizes as PELA's: as many numbers train.
                with seeded(seed):  # noqa: B023
                    model = get_peft_model(
                        model,
                        LoraConfig(
                            r=8, lora_alpha=16, target_modules=list(layers), rank_pattern=dict(layers),  # noqa: B023
                            modules_to_save=["head"],
                        ),
                    )  # fmt: skip
            return model

        for name in figures:
            progress(f"second task, seed {seed}, {name}")
            for rate in rates if seed == 0 else (chosen[name],):
                model = start(name)
                mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(mine, lr=rate, weight_decay=1e-2)
                fit(model, x, data.y, steps=steps, optimizer=optimizer, seed=seed)
                score = accuracy(model, x_test, data.y_test)
                if seed == 0:
                    best = max(figures[name], default=-1.0)
                    chosen[name] = rate if score > best else chosen[name]
                figures[name].append(score)
                held[name].append(_bytes_held(model, optimizer))
                trained[name] = sum(parameter.numel() for parameter in mine)
        if seed == 0:
            figures = {name: [] for name in figures}
    gain = points(figures["student"], figures["LoRA"])
    dense = points(figures["student"], figures["dense"])
    less = held["student"][-1] / held["LoRA"][-1]
    setting = f"digits turned by a quarter, {steps} steps, c = 3, repaired once, 5 seeds; rates chosen on another"
    claims = [
        Claim(
            "The repaired student is fine-tuned as an ordinary model.",
            setting,
            "peft's LoRA on the dense model with factors of the same sizes, and its head",
            "none",
            f"{percent(figures['student'])} % against {percent(figures['LoRA'])} %: {gain} points; "
            f"against all of the dense model, {percent(figures['dense'])} %: {dense}",
            verdict(not gain.below()),
        ),
        Claim(
            "LoRA has to hold the whole backbone while it trains; the student does not.",
            setting,
            "peft's LoRA, as above",
            "less",
            f"{held['student'][-1]:,} bytes of weights, gradients and Adam's moments against {held['LoRA'][-1]:,}: "
            f"x{less:.2f}",
            "held" if less < 1 else "not held",
            "Activations are not counted.",
        ),
    ]
    rows = [(name, str(percent(figures[name])), trained[name], held[name][-1], f"{chosen[name]:g}") for name in figures]
    columns = ("Model", "Test accuracy, %", "Trained", "Bytes while training", "Rate")
    return claims, [Table("A second task", columns, rows)]


def _bytes_held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, of gradients, and of the optimizer's state."""
    weights = [*model.parameters(), *model.buffers()]
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return sum(tensor.numel() * tensor.element_size() for tensor in (*weights, *gradients, *moments))


def sentence_pairs(progress: Callable[[str], None]) -> tuple[list[Claim], list[Table]]:
    """Trained weights as they come: does a student of all-MiniLM-L6-v2 still tell which sentences are alike."""
    teacher, tokenizer = minilm()
    texts = sentences(least=40, most=120)
    omit = ("pooler",)
    steps, batch, rates = 16, 4, (5e-4, 2e-3)
    test = texts[::7][:200]
    # Neighbours in the manual are the pairs of the model's own task: alike, among others that are not.
    pairs_ = [(a, b) for a, b in pairwise(texts) if a not in test and b not in test]

    def tokens(some: Sequence[str]) -> dict[str, torch.Tensor]:
        return dict(tokenizer(list(some), padding=True, truncation=True, max_length=24, return_tensors="pt"))

    def embedded(output: Any, mask: torch.Tensor) -> torch.Tensor:
        weights = mask[..., None].to(torch.float32)
        return functional.normalize((output.last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)

    @torch.no_grad()
    def cosines(model: nn.Module) -> torch.Tensor:
        inputs = [tokens(test[at : at + 50]) for at in range(0, len(test), 50)]
        whole = torch.cat([embedded(model(**part), part["attention_mask"]) for part in inputs])
        return (whole @ whole.T)[tuple(torch.triu_indices(len(test), len(test), 1))]

    wanted = cosines(teacher)

    def agreement(model: nn.Module) -> float:
        return float(torch.corrcoef(torch.stack([_ranked(cosines(model.eval())), _ranked(wanted)]))[0, 1])

    def trained(ratio: float, recipe: Recipe, rate: float, seed: int) -> tuple[float, float]:
        student = pela.compress(teacher, pela.plan(teacher, ratio, omit), init=recipe.init, seed=seed)  # type: ignore[arg-type]
        loss = pela.PELALoss(teacher, student, alpha=recipe.alpha, gamma=recipe.gamma) if recipe.alpha else None

        def step(model: nn.Module, chosen: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
            # Without dropout: the student is compared with its teacher token by token.
            model.eval()
            some = [pairs_[int(i)] for i in chosen]
            inputs = tokens([a for a, _ in some] + [b for _, b in some])

            def task(output: Any) -> torch.Tensor:
                ours = embedded(output, inputs["attention_mask"])
                first, second = ours.split(len(some))
                return functional.cross_entropy(20 * first @ second.T, torch.arange(len(some)))

            if loss is None:
                return task(model(**inputs))
            return loss(inputs, task if recipe.task else None)[0]

        order = torch.arange(len(pairs_))
        fit(student, order, order, steps=steps, batch=batch, lr=rate, loss=step, seed=seed)
        return agreement(student), max(pela.deviations(teacher, student).values())

    best: dict[str, float] = {}
    for recipe in (TASK, FD, ONLY):
        progress(f"all-MiniLM-L6-v2, learning rate of {recipe.name}")
        best[recipe.name] = max(rates, key=lambda rate: trained(3.0, recipe, rate, 0)[0])
    best |= {RANDOM.name: best[TASK.name], BOTH.name: best[FD.name]}
    found: dict[tuple[float, str], list[tuple[float, float]]] = {}
    for ratio, recipes in ((3.0, RECIPES), (2.0, (ONLY,))):
        plan = pela.plan(teacher, ratio, omit)
        student = pela.compress(teacher, plan)
        found[ratio, "SVD alone"] = [(agreement(student), max(pela.deviations(teacher, student).values()))]
        for recipe in recipes:
            # What is far from everything, and what is only there to be compared, is run once.
            for seed in SEEDS[:1] if recipe is RANDOM or ratio == 2.0 else SEEDS:
                progress(f"all-MiniLM-L6-v2, c = {ratio:g}, {recipe.name}, seed {seed}")
                found.setdefault((ratio, recipe.name), []).append(trained(ratio, recipe, best[recipe.name], seed))
    alone = found[3.0, "SVD alone"][0][0]
    means = {name: statistics.fmean([a for a, _ in found[3.0, name]]) for ratio, name in found if ratio == 3.0}

    def gain_of(ours: Recipe, theirs: Recipe) -> Difference:
        return paired([a for a, _ in found[3.0, ours.name]], [a for a, _ in found[3.0, theirs.name]], digits=4)

    both, features, wp = gain_of(FD, TASK), gain_of(ONLY, TASK), gain_of(BOTH, FD)
    setting = (
        f"all-MiniLM-L6-v2 (its trained weights), c = 3, {steps} steps of {2 * batch} sentences of Python's manual, "
        f"5 seeds; rank correlation of the {len(wanted):,} cosines of {len(test)} other sentences with the original's"
    )
    against = "SVD + task (neighbouring sentences alike, others of the batch not)"
    claims = [
        Claim(
            "On trained weights of a language model, the teacher's features add to the task.",
            setting,
            against,
            "better",
            f"SVD alone {alone:.3f}, + task {means[TASK.name]:.3f}, + FD {means[FD.name]:.3f}: {both}",
            verdict(both.above() and means[FD.name] > alone),
            "Each way at the best of two learning rates on another order of the sentences.",
        ),
        Claim(
            "(ours) There, features without any task repair better than the task.",
            setting,
            against,
            "none",
            f"{means[ONLY.name]:.3f}: {features}",
            features.verdict,
        ),
        Claim(
            "WP (gamma = 1) adds to FD there.",
            setting,
            "SVD + task + FD",
            "better",
            str(wp),
            wp.verdict,
            wp.why,
        ),
    ]
    rows = [
        (
            ratio,
            name,
            str(Mean.of([a for a, _ in out], digits=4)) if len(out) > 1 else f"{out[0][0]:.4f}",
            statistics.fmean([d for _, d in out]),
            f"{best[name]:g}" if name in best else "",
        )
        for (ratio, name), out in found.items()
    ]
    return claims, [
        Table("all-MiniLM-L6-v2", ("c", "Student", "Rank correlation with the original", "Max |BA - W|", "Rate"), rows)
    ]


def _ranked(values: torch.Tensor) -> torch.Tensor:
    return values.argsort().argsort().to(torch.float64)
