"""The implicit function against NumPy, against itself one tensor at a time, and its gradients."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from retensor.compression import neumeta as nm
from retensor.compression.neumeta.field import shaped, values


def by_numpy(field: nm.WeightField, number: int, of: int, shape: tuple[int, ...], noise: np.ndarray) -> np.ndarray:
    """One tensor, entry by entry, as the paper has it."""
    p = {name: value.detach().numpy() for name, value in field.named_parameters()}
    found = np.zeros(shape)
    rows, columns = shape[0], (shape[1] if len(shape) > 1 else 1)
    for o in range(rows):
        for c in range(columns):
            raw = np.array([number, o, c, of, rows, columns], float) + noise[o * columns + c]
            v = raw / field.norm
            v = np.concatenate([v[:3] / v[3:], v[3:]])
            phi = [v]
            for wave in (np.sin, np.cos):
                phi.extend(wave(2**k * np.pi * v) for k in range(field.freqs))
            x = np.maximum(p["first.weight"] @ np.concatenate(phi) + p["first.bias"], 0)
            for i, scale in enumerate(p["scales"]):
                x = scale * np.maximum(p[f"inner.{i}.weight"] @ x + p[f"inner.{i}.bias"], 0) + x
            y = (p["last.weight"] @ x + p["last.bias"]) / raw[5]
            if len(shape) == 4:
                size = shape[2] * shape[3]
                start = len(y) // 2 - size // 2
                found[o, c] = y[start : start + size].reshape(shape[2:])
            else:
                found[(o, c) if len(shape) == 2 else o] = y[0]
    return found


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3, 1, 1), (4, 5), (6,)])
@pytest.mark.parametrize("nu", [0.0, 1.0])
def test_a_field_gives_what_numpy_gives(shape: tuple[int, ...], nu: float) -> None:
    torch.manual_seed(0)
    field = nm.WeightField(7, 3, 4, 9, norm=6.0).double()
    columns = shape[1] if len(shape) > 1 else None
    raw = nm.coordinates(2, 4, shape[0], columns, dtype=torch.float64)
    noise = (np.random.default_rng(0).random(tuple(raw.shape)) - 0.5) * nu
    given_raw = raw + torch.from_numpy(noise)
    before = given_raw.clone()
    found = shaped(field(given_raw), shape).detach().numpy()
    assert torch.equal(given_raw, before)
    np.testing.assert_allclose(found, by_numpy(field, 2, 4, shape, noise), rtol=1e-10, atol=1e-12)


def test_a_bias_without_noise_is_not_divided_and_a_weight_is_by_its_columns() -> None:
    field = nm.WeightField(4, 1, 2, 9, norm=8.0)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.zero_()
        field.last.bias.copy_(torch.arange(1.0, 10.0))
    weight = shaped(field(nm.coordinates(0, 2, 3, 5)), (3, 5, 3, 3))
    bias = shaped(field(nm.coordinates(1, 2, 3, None)), (3,))
    assert torch.equal(weight, (torch.arange(1.0, 10.0) / 5).view(3, 3).expand(3, 5, 3, 3))
    assert torch.equal(bias, torch.ones(3))


def test_a_smaller_kernel_is_the_centre_of_a_larger_one() -> None:
    value = torch.arange(25.0).expand(6, 25)
    assert shaped(value, (3, 2, 1, 1)).unique().tolist() == [12.0]
    assert shaped(value, (3, 2, 3, 3))[0, 0].flatten().tolist() == list(range(8, 17))
    assert shaped(value, (3, 2)).unique().tolist() == [0.0]


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.one_of(st.none(), st.integers(1, 9))), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 1000),
)
def test_fields_in_one_batch_give_what_each_gives(
    sizes: list[tuple[int, int | None]], depth: int, freqs: int, seed: int
) -> None:
    torch.manual_seed(seed)
    fields = [nm.WeightField(6, depth, freqs, 9, norm=9.0).double() for _ in sizes]
    raws = [
        nm.coordinates(i, len(sizes), rows, columns, dtype=torch.float64) for i, (rows, columns) in enumerate(sizes)
    ]
    raws = [raw + torch.rand_like(raw) - 0.5 for raw in raws]
    with torch.no_grad():
        alone = [field(raw) for field, raw in zip(fields, raws, strict=True)]
        whole = values(fields, raws)
    with_gradients = values(fields, raws)
    for one, other, third in zip(alone, whole, with_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(one, third.detach(), rtol=1e-10, atol=1e-12)


def test_many_entries_are_worked_out_in_parts() -> None:
    torch.manual_seed(0)
    fields = [nm.WeightField(4, 2, 2, 9, norm=200.0) for _ in range(2)]
    raws = [nm.coordinates(i, 2, 200, 130) for i in range(2)]
    with torch.no_grad():
        for field, raw, whole in zip(fields, raws, values(fields, raws), strict=True):
            torch.testing.assert_close(field(raw), whole, rtol=1e-5, atol=1e-7)


def test_gradients_through_a_generated_network_are_finite_differences() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 3)).double()
    space = nm.WidthSpace(net, ["0", "2"], example=torch.zeros(1, 1, 6, 6, dtype=torch.float64))
    hyper = nm.NeuMeta(space, hidden=5, depth=2, freqs=2)
    with torch.no_grad():
        # Not at the kinks of ReLU, and weights of the size of a trained net's.
        for field in (field for layer in hyper.layers.values() for field in layer.fields.values()):
            field.last.weight.mul_(4)
    x, y = torch.randn(6, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    noise = torch.Generator()

    def loss() -> torch.Tensor:
        noise.manual_seed(1)
        tensors = hyper.weights(3, noise=1.0, generator=noise)
        return functional.cross_entropy(functional_call(space.net, tensors, (x,)), y)

    loss().backward()
    step = 1e-6
    rng = np.random.default_rng(0)
    checked = 0
    for parameter in hyper.fields():
        assert parameter.grad is not None
        for place in rng.choice(parameter.numel(), min(3, parameter.numel()), replace=False):
            flat = parameter.detach().view(-1)
            before = float(flat[place])
            with torch.no_grad():
                flat[place] = before + step
                above = float(loss())
                flat[place] = before - step
                below = float(loss())
                flat[place] = before
            # Rounding of the losses over the step, and the step's square.
            assert float(parameter.grad.view(-1)[place]) == pytest.approx((above - below) / (2 * step), abs=1e-8)
            checked += abs(above - below) > 0
    assert checked > 20


def test_a_field_survives_copies() -> None:
    field = nm.WeightField(4, 2, 2, 1, norm=8.0)
    raw = nm.coordinates(0, 1, 3, 3)
    assert torch.equal(field(raw), copy.deepcopy(field)(raw))
