"""Data that need no network, one training loop, and models that are trained once."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.data import REFERENCES, Split, accuracy, fit, reference, seeded


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("load", "shape", "samples", "classes"),
    [
        (rt.data.digits, (1, 8, 8), 1797, 10),
        (rt.data.mnist5k, (1, 28, 28), 5000, 10),
        (rt.data.wine, (13,), 178, 3),
        (rt.data.breast_cancer, (30,), 569, 2),
    ],
)
def test_a_set_is_split_by_class_and_the_same_each_time(load, shape, samples, classes) -> None:
    split: Split = load()
    assert split.x.dtype == split.x_test.dtype == torch.float32
    assert split.y.dtype == torch.int64
    assert tuple(split.x.shape[1:]) == tuple(split.x_test.shape[1:]) == shape
    assert len(split.x) + len(split.x_test) == samples
    assert split.classes == classes
    shares = [y.bincount(minlength=classes) / len(y) for y in (split.y, split.y_test)]
    assert torch.allclose(shares[0], shares[1], atol=0.01)
    assert torch.equal(load().x, split.x)
    assert not torch.equal(load(seed=1).x, split.x)
    assert "icence" in load.__doc__ or "CC BY" in load.__doc__
    # No sample is on both sides.
    rows = {tuple(row.flatten().tolist()) for row in split.x}
    again = sum(tuple(row.flatten().tolist()) in rows for row in split.x_test)
    assert again <= 1, "one pair of wine samples and the like may be equal"
    assert len(split.train_set()) == len(split.x)


def test_pictures_lie_between_0_and_1_and_tables_have_mean_0() -> None:
    assert 0 == rt.data.digits().x.min() < rt.data.digits().x.max() == 1
    photographs = rt.data.photographs()
    assert photographs.shape == (2, 3, 427, 640)
    assert 0 <= photographs.min() < photographs.max() <= 1
    wine = rt.data.wine()
    assert torch.allclose(wine.x.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(wine.x.std(0), torch.ones(13), atol=1e-5)


@pytest.mark.parametrize("samples", [10, 50, 103])
def test_few_samples_are_of_all_classes_alike(samples: int) -> None:
    split = rt.data.digits()
    few = split.few(samples)
    counts = few.y.bincount(minlength=10)
    assert len(few.x) == samples
    assert counts.max() - counts.min() <= 1
    assert torch.equal(few.x_test, split.x_test)
    assert torch.equal(split.few(samples, seed=3).x, split.few(samples, seed=3).x)
    assert not torch.equal(split.few(samples, seed=3).x, few.x)


@pytest.mark.parametrize("samples", [0, -1, 1079, 2.5])
def test_samples_that_are_not_there_are_refused(samples: int) -> None:
    with pytest.raises(ValueError, match="of 1078 cannot be taken"):
        rt.data.digits().few(samples)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"leaves some of each class on both sides, not 1\.0"):
        rt.data.digits(test=1.0)
    with pytest.raises(ValueError, match="leaves some of each class on both sides, not 1e-09"):
        rt.data.digits(test=1e-9)
    with pytest.raises(ValueError, match="a whole number from 0 on, not -1"):
        rt.data.digits(seed=-1)


@pytest.mark.usefixtures("no_network")
def test_text_and_its_encoder_are_real() -> None:
    found = rt.data.sentences()
    assert len(found) == len(set(found)) > 1000
    assert any("statement" in sentence for sentence in found)
    model, tokenizer = rt.data.minilm()
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == 22_713_216

    def meaning(sentence: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer([sentence], return_tensors="pt")).last_hidden_state
        return nn.functional.normalize(states.mean(1), dim=-1)[0]

    cat, kitten, tax = map(meaning, ("A cat sleeps.", "A kitten is asleep.", "Taxes are due in April."))
    assert cat @ kitten > 0.6 > 0.3 > cat @ tax


def test_training_is_the_same_for_the_same_seed_and_leaves_the_callers_random_numbers() -> None:
    split = rt.data.digits()

    def trained(seed: int) -> tuple[list[float], torch.Tensor]:
        with seeded(seed):
            model = nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(64, 10))
        losses = fit(model, split.x, split.y, steps=30, seed=seed)
        return losses, model[2].weight.detach()

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = trained(1)
    assert torch.equal(torch.rand(1), expected)
    again, other = trained(1), trained(2)
    assert first[0] == again[0] != other[0]
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "constant"])
def test_training_learns_by_every_schedule(schedule: str) -> None:
    split, seen = rt.data.digits(), []
    with seeded(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    losses = fit(model, split.x, split.y, steps=120, lr=0.03, schedule=schedule, after_step=seen.append, clip=5.0)  # type: ignore[arg-type]
    assert seen == list(range(120))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert accuracy(model, split.x_test, split.y_test) > 0.8
    assert model.training


def test_accuracy_wants_one_class_an_input_and_leaves_every_mode() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    model[1].eval()
    x, y = torch.randn(6, 2), torch.zeros(6, dtype=torch.int64)
    assert 0 <= accuracy(model, x, y) <= 1
    assert model.training
    assert not model[1].training
    for wrong in (y[:, None], y[:1], y[:0]):
        with pytest.raises(ValueError, match="6 inputs need one class each"):
            accuracy(model, x, wrong)
    with pytest.raises(ValueError, match="the model gives classes of shape"):
        accuracy(nn.Unflatten(1, (1, 2)), x, y)
    assert model.training


def test_another_loss_and_optimizer_are_used() -> None:
    x = torch.linspace(-1, 1, 64)[:, None]
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    fit(model, x, 3 * x + 1, steps=200, optimizer=optimizer, loss=lambda m, a, b: ((m(a) - b) ** 2).mean())
    assert abs(model.weight.item() - 3) < 0.05
    assert abs(model.bias.item() - 1) < 0.05


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": -1}, "cannot be taken"),
        ({"batch": 0}, "cannot be taken"),
        ({"y": torch.zeros(3)}, "cannot be taken"),
        ({"schedule": "none"}, "'none' is no schedule"),
    ],
)
def test_mistakes_of_training_are_named(changes: dict, said: str) -> None:
    arguments = {"x": torch.zeros(4, 2), "y": torch.zeros(4, dtype=torch.int64), "steps": 1} | changes
    with pytest.raises(ValueError, match=said):
        fit(nn.Linear(2, 2), **arguments)


def test_a_loss_that_is_no_number_is_told() -> None:
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0"):
        fit(nn.Linear(2, 2), torch.full((4, 2), torch.nan), torch.zeros(4, dtype=torch.int64), steps=3)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_good_trained_once_and_made_anew_when_damaged(
    name: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETENSOR_CACHE", os.fspath(tmp_path))
    recipe = REFERENCES[name]
    monkeypatch.setitem(REFERENCES, name, recipe.__class__(recipe.make, recipe.data, steps=20))
    model, _ = reference(name)
    (path,) = tmp_path.rglob("*.safetensors")
    written = path.stat().st_mtime_ns
    again, _ = reference(name)
    assert path.stat().st_mtime_ns == written
    assert not again.training
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    path.write_bytes(path.read_bytes()[:-10])
    anew, _ = reference(name)
    for key, value in model.state_dict().items():
        assert torch.equal(anew.state_dict()[key], value)
    reference(name, seed=1)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize(("name", "least"), [("digits-vit", 0.93), ("digits-cnn", 0.97), ("digits-mlp", 0.96)])
def test_references_know_their_digits(name: str, least: float) -> None:
    model, split = reference(name)
    assert accuracy(model, split.x_test, split.y_test) > least


def test_a_reference_comes_without_a_cache_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETENSOR_CACHE", "/proc/none")
    recipe = REFERENCES["digits-mlp"]
    monkeypatch.setitem(REFERENCES, "digits-mlp", recipe.__class__(recipe.make, recipe.data, steps=5))
    assert not reference("digits-mlp")[0].training


def test_a_name_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="'cifar' is no reference model; they are digits-vit"):
        reference("cifar")
