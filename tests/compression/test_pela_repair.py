"""The repair on real data: what each part of the loss is worth, on a trained transformer and on trained MiniLM."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.measuring import Difference
from torch import nn
from torch.nn import functional

import retensor as rt
from benchmarks import claim_pela as claim
from benchmarks import pela_students as students
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

    rt.data.fit(student, data.x, data.y, steps=steps, batch=32, lr=1e-3, loss=step, seed=seed)
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
    alone = rt.data.accuracy(pela.compress(teacher, 3.0), *test)
    # The decomposition alone loses something to repair.
    assert alone < rt.data.accuracy(teacher, *test) - 0.1
    student = repaired(teacher, data, len(data.x), 50, alpha=1.0, gamma=1.0)
    assert rt.data.accuracy(student, *test) > alone + 0.05
    assert rt.data.accuracy(student, *test) > rt.data.accuracy(teacher, *test) - 0.04
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


def of(*values: float) -> Difference:
    return Difference.of(values)  # type: ignore[return-value]


CLEAR, BELOW, LIKELY, UNLIKELY = of(1.0, 1.1), of(-1.0, -1.1), of(1.0, -0.9), of(-1.0, 0.9)


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((CLEAR, CLEAR), "held"),
        ((CLEAR, LIKELY), "partly held"),
        ((CLEAR, UNLIKELY), "not held"),
        ((CLEAR, BELOW), "not held"),
        ((LIKELY, LIKELY), "not held"),
    ],
)
def test_a_gain_is_held_where_it_is_clear_everywhere(gains: tuple[Difference, ...], verdict: str) -> None:
    assert students.judged(gains) == verdict


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        ((CLEAR, of(-0.2, -0.21)), "held"),
        # What spreads widely does not make it surer.
        ((CLEAR, of(-0.2, 0.3)), "partly held"),
        ((CLEAR, of(-0.6, -0.61)), "not held"),
        ((of(-9.0, 7.0),), "not held"),
    ],
)
def test_no_loss_is_held_where_a_margin_is_out_of_reach(gains: tuple[Difference, ...], verdict: str) -> None:
    assert students.not_worse(gains, 0.5) == verdict


def test_the_claims_verdicts_and_reasons_follow_their_figures() -> None:
    one = claim._better("", "", "", "", {2.0: [0.5, 0.51], 3.0: [0.5, 0.51]}, {2.0: [0.4, 0.4], 3.0: [0.6, 0.6]})
    assert one.verdict == "not held"
    assert one.reason == "c = 3: below it."
    assert claim._better("", "", "", "", {2.0: [0.5, 0.51]}, {2.0: [0.4, 0.4]}).reason == ""
    lost = claim._lost([0.95, 0.95], {2.0: [0.948, 0.95], 3.0: [0.9, 0.9]}, "")
    assert (lost.verdict, lost.ours) == ("partly held", "points lost: c = 2: +0.1 ± 0.1, c = 3: +5.0 ± 0.0")
    assert "at 1 of 2 ratios" in lost.reason

    def outcomes(*deviations: float) -> list[students.Outcome]:
        return [students.Outcome(0.9, 0.9, deviation, 1) for deviation in deviations]

    sweep = {gamma: outcomes(0.5 - 0.1 * i, 0.51 - 0.1 * i) for i, gamma in enumerate(claim.GAMMAS)}
    assert claim._swept(sweep, "").verdict == "held"
    # Point estimates that fall do not do.
    wide = sweep | {claim.GAMMAS[-1]: outcomes(0.39, -0.01)}
    assert claim._swept(wide, "").verdict == "partly held"


def test_rates_are_chosen_by_their_scores_and_off_the_test_pictures(original: tuple[nn.Module, Split]) -> None:
    scores = [("a", 0.0, 0.5), ("a", 1e-3, 0.7), ("a", 1e-2, 0.7), ("b", 0.0, 0.9), ("b", 1e-2, 0.1)]
    assert students.best_rates(scores) == {"a": 1e-3, "b": 0.0}
    shown = [students.rate_shown(rate, students.RATES) for rate in (0.0, 1e-3, students.RATES[-1])]
    assert shown == ["no training", "0.001", f"{students.RATES[-1]:g} (the grid's end)"]
    data = original[1]
    part = students.held_out(data)
    assert torch.equal(torch.cat([part.x, part.x_test]), data.x)
    assert len(part.x_test) == 360


def test_the_pruned_peer_keeps_the_width_and_comes_near_in_parameters(original: tuple[nn.Module, Split]) -> None:
    teacher, data = original
    wanted = pela.plan(teacher, 3.0).after
    model = students.pruned(teacher, data.few(50), wanted)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(wanted, rel=0.03)
    logits, features = students.tokens(model, data.x_test[:4])
    assert torch.equal(logits, model(data.x_test[:4]))
    assert [tuple(feature.shape) for feature in features] == [(4, 17, 48)] * 3
