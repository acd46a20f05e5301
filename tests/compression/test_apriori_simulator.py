"""Networks that stand for the solver, dense and compressed, and the film of what they say."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import retensor as rt
from retensor.compression import apriori as ap
from retensor.data import fit, seeded
from retensor.errors import RetensorError


def waves(sources: int = 10, n: int = 16, steps: int = 24, **named: object) -> dict[str, object]:
    return ap.wave2d(n=n, steps=steps, sources=sources, solver="leapfrog", width=0.1, **named)  # type: ignore[arg-type]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameters_of_the_reference_model_are_those_of_its_formula() -> None:
    dense = ap.WaveStepper()
    assert count(dense) == 30_097
    assert count(ap.compress(dense, rank=24)) == 3_745
    assert count(ap.compress(dense, rank=12)) == 1_921
    assert count(ap.WaveStepper(width=7)) == 2_829


class Leapfrog(nn.Module):
    """One step of the scheme, whose Laplacian is a factored convolution of rank 2."""

    def __init__(self, courant: float) -> None:
        super().__init__()
        plain = nn.Conv2d(1, 1, 3, padding=1, bias=False, dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(courant**2 * torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]))
        self.laplacian = ap.factored(plain, 2, from_weights=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x[:, :1] - x[:, 1:2] + self.laplacian(x[:, :1])


@pytest.mark.filterwarnings("ignore:rank .* takes:UserWarning")
def test_a_rollout_of_rank_two_is_the_scheme_itself() -> None:
    mesh = ap.Mesh(16)
    y, x = mesh.points
    start = np.exp(-((x - 0.3) ** 2 + (y - 0.6) ** 2) / 0.02)
    true = torch.from_numpy(ap.leapfrog(mesh, start, dt=0.5 * mesh.h, steps=60).u)
    model = Leapfrog(0.5)
    assert isinstance(model.laplacian, ap.CPConv2d)
    predicted = ap.rollout(model, true[:, :2], 59)
    assert predicted.shape == (1, 59, 16, 16)
    assert ap.rollout(model, true[:, :2], 0).shape == (1, 0, 16, 16)
    assert (predicted - true[:, 2:]).abs().max() < 1e-11
    assert model.training


def test_the_loss_of_a_step_is_that_of_noisy_inputs() -> None:
    x, y = torch.randn(64, 2, 16, 16), torch.zeros(64, 1, 16, 16)
    model = ap.WaveStepper(2).normalise_(x, y)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    true = model(x)
    assert ap.step_loss(0)(model, x, true) == 0
    # 2 u_n - u_{n-1} of independent noise has five times its variance, of independent states too.
    assert ap.step_loss(0.1)(model, x, true).item() == pytest.approx(0.1, rel=0.05)
    with pytest.raises(ValueError, match="noise is -1"):
        ap.step_loss(-1)


def test_pairs_are_neighbours_in_time() -> None:
    u = torch.arange(2 * 5).reshape(2, 5, 1, 1).float()
    x, y = ap.pairs(u)
    assert x[:, :, 0, 0].tolist() == [[1, 0], [2, 1], [3, 2], [6, 5], [7, 6], [8, 7]]
    assert y.flatten().tolist() == [2, 3, 4, 7, 8, 9]
    with pytest.raises(ValueError, match="hold no step"):
        ap.pairs(u[:, :2])


def test_an_untrained_head_of_zero_leaves_plain_extrapolation() -> None:
    x, y = ap.pairs(waves(2)["u"])  # type: ignore[arg-type]
    model = ap.WaveStepper(4).normalise_(x, y)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    assert torch.equal(model(x), 2 * x[:, :1] - x[:, 1:])
    assert model.scale == pytest.approx(x.square().mean().sqrt().item())
    assert model.step == pytest.approx((y - model(x)).square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("name", list(ap.FORMATS))
def test_every_format_trains_to_step_waves_of_unseen_sources(name: str) -> None:
    u: torch.Tensor = waves()["u"]  # type: ignore[assignment]
    x, y = ap.pairs(u[:8])
    x_test, y_test = ap.pairs(u[8:])
    with seeded(0):
        dense = ap.WaveStepper(12, depth=2, kernel=3).normalise_(x, y)
    model = ap.compress(dense, ratio=1.4 if name == "separable" else 2, format=name, exclude=("head",))
    assert count(model) < count(dense)
    plain = ap.relative_l2(2 * x_test[:, :1] - x_test[:, 1:], y_test).item()
    errors = []
    for each in (model, dense):
        fit(each, x, y, steps=150, batch=8, lr=1e-2, weight_decay=0, loss=lambda m, a, b: ap.relative_l2(m(a), b))
        with torch.no_grad():
            errors.append(ap.relative_l2(each(x_test), y_test).item())
    assert errors[0] < 0.45 * plain
    assert errors[0] <= 1.7 * errors[1]
    folded = rt.fold(model)
    assert (folded(x_test) - model(x_test)).abs().max() < 1e-4


def test_a_rollout_leaves_the_mode_of_every_module_also_where_it_fails() -> None:
    model = nn.Sequential(nn.Conv2d(2, 1, 3, padding=1), nn.Dropout().eval())
    start = torch.randn(2, 2, 8, 8)
    ap.rollout(model, start, 2)
    assert [part.training for part in (model, *model)] == [True, True, False]
    with pytest.raises(RuntimeError):
        ap.rollout(nn.Sequential(model, nn.Flatten()), start, 2)
    assert [part.training for part in (model, *model)] == [True, True, False]
    with pytest.raises(ValueError, match="steps is -1"):
        ap.rollout(model, start, -1)
    with pytest.raises(ValueError, match=r"start of shape \(2, 3, 8, 8\)"):
        ap.rollout(model, torch.zeros(2, 3, 8, 8), 1)


def test_training_with_recomputation_is_the_same_training() -> None:
    x, y = ap.pairs(waves(2)["u"])  # type: ignore[arg-type]
    with seeded(0):
        one = ap.compress(ap.WaveStepper(8).normalise_(x, y), rank=6)
    other = copy.deepcopy(one)
    for layer in other.modules():
        if isinstance(layer, ap.CPConv2d):
            layer.recompute = True
    losses = [
        fit(model, x, y, steps=5, batch=8, weight_decay=0, loss=lambda m, a, b: ap.relative_l2(m(a), b))
        for model in (one, other)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_decoder_is_compressed_with_its_transposed_layers_and_tells_fields_of_unseen_places() -> None:
    found = waves(56)
    fields: torch.Tensor = found["u"][:, 4:6]  # type: ignore[index]
    positions: torch.Tensor = found["positions"]  # type: ignore[assignment]
    x, y, x_test, y_test = positions[:40], fields[:40], positions[40:], fields[40:]
    with seeded(0):
        dense = ap.FieldDecoder(2, fields=2, n=16, width=12)
    model = ap.compress(dense, ratio=3)
    assert {ap.CPConv2d, ap.CPConvTranspose2d} <= {type(layer) for layer in model.modules()}
    assert count(model) < count(dense)
    errors = []
    for each in (model, dense):
        fit(each, x, y, steps=500, batch=10, lr=1e-2, weight_decay=0, loss=lambda m, a, b: ap.relative_l2(m(a), b))
        with torch.no_grad():
            errors.append(ap.relative_l2(each(x_test), y_test).item())
    mean = ap.relative_l2(y.mean(0).expand_as(y_test), y_test).item()
    assert errors[0] < 0.5 * mean
    assert errors[0] <= 1.15 * errors[1]


def test_a_decoders_layers_keep_the_scale_dense_and_compressed() -> None:
    with seeded(0):
        dense = ap.FieldDecoder(2, n=64, width=32)
        model = ap.compress(dense, ratio=2)
        x = torch.randn(64, 32, 4, 4)
    for each in (dense, model):
        with torch.no_grad():
            # What a ReLU halves, each layer doubles; zeros around a field take a little.
            change = (each.body[:-1](x).square().mean() / (2 * x.relu().square().mean())).item()
        assert 0.2 < change < 3


def test_bad_sizes_of_networks_are_named() -> None:
    with pytest.raises(ValueError, match="n is 12"):
        ap.FieldDecoder(n=12)
    with pytest.raises(ValueError, match="kernel odd"):
        ap.WaveStepper(kernel=4)


def test_a_film_shows_every_state(tmp_path: Path) -> None:
    u = np.asarray(waves(1, steps=4)["u"])[0]
    path = tmp_path / "wave.gif"
    ap.film(u, torch.from_numpy(0.5 * u), path, dt=0.1, title="half")
    with Image.open(path) as film:
        assert film.n_frames == 4
        first = np.asarray(film.convert("RGB")).astype(int)
        film.seek(3)
        last = np.asarray(film.convert("RGB")).astype(int)
    assert first.shape[1] > 2 * first.shape[0]
    assert (first != last).any()
    # The pictures are red or blue somewhere, not empty.
    assert (np.abs(first[..., 0] - first[..., 2]) > 100).sum() > 50


def test_bad_films_are_refused(tmp_path: Path) -> None:
    for true, predicted in [((2, 4, 4), (3, 4, 4)), ((4, 4), (4, 4)), ((0, 4, 4), (0, 4, 4))]:
        with pytest.raises(ValueError, match="make no film"):
            ap.film(np.zeros(true), np.zeros(predicted), tmp_path / "wave.gif")
    with pytest.raises(ValueError, match="rate is 0"):
        ap.film(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), tmp_path / "wave.gif", rate=0)
    with pytest.raises(RetensorError, match="directory"):
        ap.film(np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), tmp_path)
