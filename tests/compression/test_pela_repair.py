"""The repair on real data: what each part of the loss is worth, on a trained transformer and on trained MiniLM."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.compression import pela
from retensor.data import Split


@pytest.fixture(scope="module")
def original(cache_of_this_run: None) -> tuple[nn.Module, Split]:
    return rt.data.reference("digits-vit")


def repaired(
    teacher: nn.Module, data: Split, labels: int, steps: int, seed: int = 0, init: str = "svd", **weights: float
) -> nn.Module:
    """A student at c = 3 after some steps with few labels and all inputs; ``task=0`` is without any label."""
    some, task = data.few(labels, seed=seed), weights.pop("task", 1.0)
    student = pela.compress(teacher, 3.0, init=init, seed=seed)  # type: ignore[arg-type]
    loss = pela.PELALoss(teacher, student, **{"alpha": 0.0, "gamma": 0.0, **weights})  # type: ignore[arg-type]

    def step(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        chosen = torch.randperm(labels)[:32]
        x = torch.cat([some.x[chosen], x]) if loss.alpha else some.x[chosen]
        known = (lambda out: functional.cross_entropy(out[: len(chosen)], some.y[chosen])) if task else None
        return loss(x, known)[0]

    rt.data.fit(student, data.x, data.y, steps=steps, batch=32, lr=5e-4, loss=step, seed=seed)
    return student.eval()


def test_with_few_labels_the_teachers_features_repair_better_than_the_task(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    gains = []
    for seed in range(3):
        task, features = (
            rt.data.accuracy(repaired(teacher, data, 50, 60, seed, alpha=alpha), data.x_test, data.y_test)
            for alpha in (0.0, 1.0)
        )
        gains.append(features - task)
    assert min(gains) > 0
    assert sum(gains) / 3 > 0.01


def test_a_student_comes_near_its_teacher_and_new_factors_do_not(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    test = data.x_test, data.y_test
    student = repaired(teacher, data, len(data.x), 50, alpha=1.0, gamma=1.0)
    assert rt.data.accuracy(student, *test) > rt.data.accuracy(teacher, *test) - 0.02
    assert rt.data.accuracy(repaired(teacher, data, len(data.x), 50, init="random"), *test) < 0.6


def test_without_any_label_the_student_agrees_more_with_its_teacher(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    before = pela.compress(teacher, 6.0).eval()
    loss = pela.PELALoss(teacher, before, gamma=0)
    wanted = teacher(data.x_test).argmax(-1)
    agreed = rt.data.accuracy(before, data.x_test, wanted)
    rt.data.fit(before, data.x, data.y, steps=60, lr=1e-3, loss=lambda _, x, y: loss(x)[0])
    assert rt.data.accuracy(before.eval(), data.x_test, wanted) > agreed + 0.1


def test_a_heavy_weight_holds_the_product_near_the_weights(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    farthest = [
        max(pela.deviations(teacher, repaired(teacher, data, 50, 60, alpha=1.0, gamma=gamma)).values())
        for gamma in (0.0, 10.0)
    ]
    assert farthest[1] < 0.9 * farthest[0]


def test_a_repaired_student_is_fine_tuned_without_its_teacher(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    student = pela.load(pela.compress(teacher, 3.0).state_dict(), base=teacher)
    student.head = nn.Linear(48, 2)
    odd, odd_test = data.y % 2, data.y_test % 2
    rt.data.fit(student, data.x, odd, steps=60, lr=2e-3)
    assert rt.data.accuracy(student, data.x_test, odd_test) > 0.9


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, Callable[[nn.Module, list[str]], torch.Tensor]]:
    model, tokenizer = rt.data.minilm()

    @torch.no_grad()
    def embed(some: nn.Module, texts: list[str]) -> torch.Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        weights = inputs["attention_mask"][..., None].float()
        return functional.normalize((some(**inputs).last_hidden_state * weights).sum(1) / weights.sum(1), dim=-1)

    return model, embed


def test_trained_weights_of_a_language_model_are_the_same_at_full_rank(minilm: tuple) -> None:
    model, embed = minilm
    texts = rt.data.sentences()[:8]
    found = pela.plan(model, 3.0, ("pooler",))
    assert len(found.layers) == 36
    assert {layer.rank for layer in found.layers} == {64, 102}
    full = pela.compress(model, pela.plan(model, omit=("pooler",), ranks={nn.Linear: 384}))
    assert torch.allclose(embed(full, texts), embed(model, texts), atol=1e-5)


def test_trained_weights_of_a_language_model_are_repaired(minilm: tuple) -> None:
    model, embed = minilm
    texts = rt.data.sentences(most=100)
    test = texts[-40:]
    wanted = embed(model, test)
    student = pela.compress(model, pela.plan(model, 3.0, ("pooler",)))
    before = float((embed(student.eval(), test) * wanted).sum(-1).mean())
    loss = pela.PELALoss(model, student, gamma=0)
    tokenizer = rt.data.minilm()[1]
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4)
    for step in range(8):
        inputs = tokenizer(
            texts[8 * step : 8 * step + 8], padding=True, truncation=True, max_length=24, return_tensors="pt"
        )
        optimizer.zero_grad()
        loss(inputs)[0].backward()
        optimizer.step()
    after = float((embed(student, test) * wanted).sum(-1).mean())
    assert after > before + 0.05


def test_the_claims_verdicts_follow_their_figures() -> None:
    from benchmarks import claim_pela as claim

    for gains, verdict in (
        ([0.02, 0.021], "held"), ([-0.02, -0.021], "not held"), ([0.02, -0.02], "not held"),
    ):  # fmt: skip
        assert claim._better("", "", "", "", lambda ratio: (gains, [0.0, 0.0]), "why").verdict == verdict  # noqa: B023
    one = claim._better("", "", "", "", lambda ratio: ([ratio + 0.01, ratio + 1], [2.0, 3.0]), "why")
    assert (one.verdict, one.reason) == ("partly held", "why")
    lost = claim._lost([0.95, 0.95], {2.0: [0.948, 0.95], 3.0: [0.9, 0.9]}, "")
    assert lost.verdict == "partly held"
    assert copy.deepcopy(lost).ours.startswith("points lost: c = 2: +0.1 ± 0.1, c = 3: +5.0")
