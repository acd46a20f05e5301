"""Layers of packed codes, the learners that make them, and quantisers of activations."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import retensor as rt
from retensor.quantizing import (
    ActivationQuantizer,
    AdaRound,
    Affine,
    Learning,
    QuantizedLayer,
    RoundToNearest,
    fake_quantized,
    quantized_layer,
)

LAYERS = {
    "linear": (lambda: nn.Linear(10, 6), (3, 10)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, bias=False), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, groups=2, padding_mode="reflect", padding=1), (2, 4, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, dilation=2, padding="same"), (1, 2, 6, 6, 6)),
}


def made(kind: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    make, shape = LAYERS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make(), torch.randn(shape)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"axis": 0, "symmetric": True}])
def test_a_layer_of_codes_gives_what_the_layer_with_decoded_weights_does(
    kind: str, bits: int, where: dict[str, Any], tmp_path: Path
) -> None:
    layer, x = made(kind)
    before = copy.deepcopy(layer.state_dict())
    quantizer = Affine(bits, **where)
    kept = quantizer.encode(layer.weight.detach())
    packed = quantized_layer(layer, kept)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        plain.weight.copy_(kept.decode())
    assert torch.equal(packed(x), plain(x))
    assert torch.equal(rt.fold(packed)(x), plain(x))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    zeros = 0 if quantizer.symmetric else -(-kept.scale.numel() * bits // 8)
    assert packed.nbytes == kept.nbytes == -(-layer.weight.numel() * bits // 8) + 4 * kept.scale.numel() + zeros
    assert "weight" not in dict(packed.named_parameters())
    assert torch.equal(packed.weight, kept.decode())
    rt.save(packed, tmp_path / "layer.safetensors")
    assert torch.equal(rt.load(tmp_path / "layer.safetensors")(x), plain(x))
    assert torch.equal(copy.deepcopy(packed)(x), plain(x))


def test_codes_export_and_give_the_same() -> None:
    layer, x = made("linear")
    for bits in (2, 3, 4, 8):
        packed = quantized_layer(
            layer, Affine(bits, axis=0).encode(layer.weight.detach()), ActivationQuantizer(8, "token")
        )
        exported = torch.export.export(packed.eval(), (x,)).module()
        torch.testing.assert_close(exported(x), packed(x), rtol=1e-6, atol=1e-6)


@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), seed=st.integers(0, 50),
    where=st.sampled_from([{}, {"axis": 0}, {"axis": 1}, {"group_size": 5}]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_a_learner_gives_the_values_of_its_codes(bits: int, symmetric: bool, seed: int, where: dict[str, int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 10, generator=generator)
    quantizer = Affine(bits, symmetric, **where)
    nearest = RoundToNearest(weight, quantizer)
    assert torch.equal(nearest(weight), quantizer.encode(weight).decode())
    learner = AdaRound(weight, quantizer)
    # Begun, it rounds nothing: only what lies outside the range is clipped.
    soft = learner(weight)
    inside = quantizer.grouped(weight) * (1 / learner.scale) + learner.zero_point
    inside = ((inside >= quantizer.low) & (inside <= quantizer.high)).reshape(weight.shape)
    torch.testing.assert_close(soft[inside], weight[inside], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        learner.V.copy_(torch.randn(weight.shape, generator=generator) * 9)
    learner.hard = True
    torch.testing.assert_close(learner(weight), learner.quantized(weight).decode(), rtol=1e-6, atol=1e-6)
    # It moves a weight to one of the two whole numbers beside it, never further.
    apart = (learner.quantized(weight).codes.int() - quantizer.encode(weight).codes.int()).abs()
    assert int(apart.max()) <= 1


@pytest.mark.parametrize("search", [None, 2.4])
def test_learners_in_a_file_are_rebuilt_without_a_weight(search: float | None, tmp_path: Path) -> None:
    layer, x = made("linear")
    parametrize.register_parametrization(layer, "weight", AdaRound(layer.weight, Affine(3, axis=0, search=search)))
    with torch.no_grad():
        layer.parametrizations.weight[0].V.normal_(generator=torch.Generator().manual_seed(0))
    rt.save(nn.Sequential(layer), tmp_path / "layer.safetensors")
    again = rt.load(tmp_path / "layer.safetensors", nn.Sequential(made("linear")[0]))
    assert torch.equal(again(x), layer(x))
    assert again[0].parametrizations.weight[0].config() == layer.parametrizations.weight[0].config()


def test_the_regulariser_of_adaround_is_nothing_first_and_then_what_its_formula_says() -> None:
    weight = torch.randn(3, 5)
    learner = AdaRound(weight, Affine(3))
    assert float(learner.regulariser(0.19)) == 0
    h = (1.2 * torch.sigmoid(learner.V) - 0.1).clamp(0, 1)
    for done, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        wanted = (1 - (2 * h - 1).abs() ** beta).sum()
        torch.testing.assert_close(learner.regulariser(done), wanted)


@given(
    scale=st.floats(0.05, 2), zero=st.integers(0, 15), seed=st.integers(0, 99), symmetric=st.booleans()
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_gradients_of_a_learned_step_are_those_of_lsq(scale: float, zero: int, seed: int, symmetric: bool) -> None:
    low, high, zero = (-8, 7, 0) if symmetric else (0, 15, zero)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(64, generator=generator, dtype=torch.float64) * 4).requires_grad_()
    step = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(64, generator=generator, dtype=torch.float64)
    found = fake_quantized(x, step, torch.tensor(float(zero), dtype=torch.float64), low, high)
    found.backward(upstream)
    whole = torch.round(x.detach() / scale) + zero
    inside = (whole >= low) & (whole <= high)
    assert torch.equal(found, step * (whole.clamp(low, high) - zero))
    torch.testing.assert_close(x.grad, upstream * inside, rtol=1e-12, atol=1e-12)
    slope = torch.where(inside, whole - zero - x.detach() / scale, whole.clamp(low, high) - zero)
    torch.testing.assert_close(step.grad, (upstream * slope).sum(), rtol=1e-9, atol=1e-9)


def test_quantisers_of_activations_round_by_their_range() -> None:
    x = torch.randn(7, 20) * torch.logspace(-2, 2, 7)[:, None]
    fixed = ActivationQuantizer(8).calibrate(x)
    assert torch.equal(fixed(x), Affine(8).encode(x).decode())
    token = ActivationQuantizer(8, "token")
    assert torch.equal(token(x), Affine(8, axis=0).encode(x).decode())
    searched = ActivationQuantizer(3).calibrate(x, search=2.0)
    assert (searched(x) - x).square().mean() <= (ActivationQuantizer(3).calibrate(x)(x) - x).square().mean()
    with pytest.raises(ValueError, match="mode is 'row'"):
        ActivationQuantizer(8, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bits"):
        ActivationQuantizer(1)


def test_quantisers_of_inputs_are_kept_in_files(tmp_path: Path) -> None:
    layer, x = made("linear")
    inputs = ActivationQuantizer(4).calibrate(x)
    model = nn.Sequential(quantized_layer(layer, Affine(4).encode(layer.weight.detach()), inputs), nn.ReLU())
    rt.save(model, tmp_path / "m.safetensors")
    loaded = rt.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(10, 6), nn.ReLU()))
    assert torch.equal(loaded(x), model(x))
    # A plain layer cannot round what comes in.
    assert isinstance(rt.fold(model)[0], QuantizedLayer)


def test_only_linear_layers_and_convolutions_are_put_in_codes() -> None:
    layer = nn.ConvTranspose2d(2, 2, 3)
    with pytest.raises(TypeError, match="not ConvTranspose2d"):
        quantized_layer(layer, Affine(4).encode(layer.weight.detach()))


def test_a_layer_that_is_learned_shows_its_weight_in_few_bits() -> None:
    layer, x = made("conv2d")
    learning = Learning(layer, RoundToNearest(layer.weight, Affine(3)))
    assert torch.equal(learning.weight, Affine(3).encode(layer.weight.detach()).decode())
    assert torch.equal(learning(x), learning.finished()(x))
