"""The low-rank layer: the best of its rank, balanced, and what it stands for when it is of full rank."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import retensor as rt
from retensor.compression import pela

FLOATS = (torch.float32, torch.float64, torch.bfloat16)


def matrix(o: int, i: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(o, i, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def linear(i: int, o: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(i, o, bias, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix(o, i, seed) / i**0.5)
    return layer


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 40), i=st.integers(1, 40), seed=st.integers(0, 99), dtype=st.sampled_from(FLOATS), data=st.data()
)
def test_factors_are_the_best_of_their_rank_and_balanced(
    o: int, i: int, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    weight = matrix(o, i, seed, dtype)
    rank = data.draw(st.integers(1, min(o, i)))
    a, b = pela.balanced_factors(weight, rank)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((rank, i), (o, rank), dtype, dtype)
    s = torch.linalg.svdvals(weight.double())
    # What rounding the factors to their type may add, and what a decomposition in float64 is off by.
    rounding = (torch.finfo(dtype).eps * 4 * rank**0.5 + 1e-13) * s[0]
    tail = (s[rank:] ** 2).sum().sqrt()
    error = torch.linalg.norm(weight.double() - b.double() @ a.double())
    assert tail - rounding <= error <= tail + rounding
    for product in (a.double() @ a.double().T, b.double().T @ b.double()):
        assert torch.allclose(product, torch.diag(s[:rank]), atol=float(rounding), rtol=0)


def test_the_error_is_the_tail_of_the_singular_values_to_five_digits() -> None:
    weight = matrix(96, 64)
    a, b = pela.balanced_factors(weight, 16)
    s = torch.linalg.svdvals(weight.double())
    assert float(((weight - b @ a).double() ** 2).sum()) == pytest.approx(float((s[16:] ** 2).sum()), rel=1e-5)
    assert torch.allclose(pela.singular_values(weight), s, atol=1e-6)


def test_the_product_is_that_of_tensorlys_truncated_decomposition() -> None:
    tensorly = pytest.importorskip("tensorly")
    for shape in ((50, 30), (30, 50)):
        weight = matrix(*shape)
        a, b = pela.balanced_factors(weight, 8)
        # Other tests may have set another backend.
        with tensorly.backend_context("numpy", local_threadsafe=True):
            u, s, v = tensorly.tenalg.svd_interface(weight.numpy(), method="truncated_svd", n_eigenvecs=8)
        assert torch.allclose(b @ a, torch.from_numpy((u * s) @ v), atol=1e-5)


def test_no_other_factors_are_found_that_come_closer() -> None:
    weight = matrix(24, 32, dtype=torch.float64)
    a, b = pela.balanced_factors(weight, 6)
    best = float(((weight - b @ a) ** 2).sum())
    for start in range(4):
        # From the factors themselves and from random ones.
        scale = (1e-2, 0.1, 1.0, 1.0)[start]
        first = a + scale * matrix(6, 32, start, torch.float64) if start < 2 else matrix(6, 32, start, torch.float64)
        second = b + scale * matrix(24, 6, start, torch.float64) if start < 2 else matrix(24, 6, start, torch.float64)
        factors = [nn.Parameter(first), nn.Parameter(second)]
        optimizer = torch.optim.Adam(factors, lr=0.05)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
        for _ in range(500):
            optimizer.zero_grad()
            loss = ((weight - factors[1] @ factors[0]) ** 2).sum()
            loss.backward()
            optimizer.step()
            rates.step()
        found = float(((weight - factors[1] @ factors[0]) ** 2).sum().detach())
        assert best <= found * (1 + 1e-12)
        # The descent came near, so that being above says something.
        assert found < 1.02 * best


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
def test_weights_of_lower_rank_and_of_nothing_are_exact(shape: tuple[int, int]) -> None:
    low = matrix(shape[0], 5) @ matrix(5, shape[1], 1)
    a, b = pela.balanced_factors(low, 12)
    assert torch.isfinite(a).all()
    assert torch.isfinite(b).all()
    assert torch.allclose(b @ a, low, atol=1e-5)
    a, b = pela.balanced_factors(torch.zeros(shape), 4)
    assert not a.any()
    assert not b.any()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("i", "o"), [(48, 32), (32, 48), (32, 32)])
def test_a_layer_of_full_rank_is_the_layer(i: int, o: int, dtype: torch.dtype, bias: bool) -> None:
    layer = linear(i, o, bias, dtype)
    made = pela.LowRankLinear.from_layer(layer, min(i, o))
    x = matrix(7, i, 3, dtype)
    eps = 1e-5 if dtype == torch.float32 else 1e-12
    assert torch.linalg.norm(made(x) - layer(x)) <= eps * torch.linalg.norm(layer(x))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rank", [1, 7, 32])
def test_merging_gives_the_layer_of_the_same_outputs(dtype: torch.dtype, rank: int) -> None:
    model = nn.Sequential(linear(48, 32, dtype=dtype), nn.ReLU(), linear(32, 32, False, dtype))
    student = pela.compress(model, pela.plan(model, ranks={nn.Linear: rank}))
    plain = pela.merge(student)
    assert str(plain) == str(model)
    assert {p.dtype for p in plain.parameters()} == {dtype}
    x = matrix(5, 48, 1, dtype)
    apart = torch.linalg.norm((plain(x) - student(x)).double()) / torch.linalg.norm(student(x).double())
    assert apart < 10 * torch.finfo(dtype).eps


def test_names_of_the_state_are_those_of_the_authors_checkpoints() -> None:
    student = pela.compress(nn.ModuleDict({"qkv": linear(32, 96), "fc": linear(32, 32, False)}))
    assert list(student.state_dict()) == [
        "qkv.0.weight", "qkv.1.weight", "qkv.1.bias", "fc.0.weight", "fc.1.weight",
    ]  # fmt: skip
    assert [type(part) for part in student["qkv"]] == [nn.Linear, nn.Linear]
    assert torch.equal(student["qkv"][1].bias, student["qkv"].bias)
    assert type(student["qkv"][:1]) is nn.Sequential


def test_what_was_frozen_stays_frozen_and_the_bias_is_a_copy() -> None:
    layer = linear(32, 32)
    layer.weight.requires_grad_(False)
    made = pela.LowRankLinear.from_layer(layer, 4)
    assert [parameter.requires_grad for parameter in made.parameters()] == [False, False, True]
    assert made.bias is not layer.bias
    assert torch.equal(made.bias, layer.bias)
    assert not made.to_dense().weight.requires_grad
    model = nn.Sequential(layer)
    for other in (pela.compress(model), pela.compress(model, init="random"), pela.skeleton(model)):
        assert [parameter.requires_grad for parameter in other.parameters()] == [False, False, True]


def test_a_parent_that_reads_the_weight_gets_the_product_with_its_gradient() -> None:
    made = pela.LowRankLinear.from_layer(linear(32, 24), 6)
    x = matrix(3, 32)
    assert torch.allclose(nn.functional.linear(x, made.weight, made.bias), made(x), atol=1e-6)
    made.weight.sum().backward()
    assert made[0].weight.grad is not None
    assert (made.in_features, made.out_features, made.rank) == (32, 24, 6)
    assert pela.LowRankLinear.from_layer(linear(32, 24).bfloat16(), 6).weight.dtype == torch.bfloat16


def test_what_is_known_of_a_weight_costs_nothing_and_a_linear_function_of_it_two_thin_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = pela.LowRankLinear.from_layer(linear(32, 24), 6)
    x, expected = matrix(3, 32), made.product().detach()
    weight = made.weight
    assert torch.equal(weight, expected)
    assert torch.equal(nn.functional.linear(x, weight.detach()), x @ expected.T)
    assert torch.allclose(x @ weight.T, x @ expected.T)

    def refuse(*_: object) -> None:
        raise AssertionError("the product is worked out")

    monkeypatch.setattr(pela.LowRankLinear, "product", refuse)
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.size(0), weight.dim(), weight.ndim, weight.numel()) == ((24, 32), 24, 2, 2, 768)
    assert (weight.dtype, weight.device, weight.is_floating_point()) == (torch.float32, made[0].weight.device, True)
    assert made.to("meta").weight.device.type == "meta"
    made = pela.LowRankLinear.from_layer(linear(32, 24), 6)
    assert torch.equal(nn.functional.linear(input=x, weight=made.weight, bias=made.bias), made(x))
    with pytest.raises(AssertionError, match="is worked out"):
        weight.sum()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((8, 8, 0), "a rank of 0 for a layer of 8 inputs and 8 outputs"),
        ((8, 4, 5), "a rank of 5"),
        ((8, 8, 2, True, "other"), "layout is 'other'; it is 'linear' or 'conv1d'"),
    ],
)
def test_sizes_that_cannot_be_are_named(arguments: tuple, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pela.LowRankLinear(*arguments)


def test_factors_of_no_matrix_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a rank of 4 for a weight of shape \[3, 5\]"):
        pela.balanced_factors(torch.zeros(3, 5), 4)
    with pytest.raises(ValueError, match=r"shape \[3, 5, 2\]"):
        pela.balanced_factors(torch.zeros(3, 5, 2), 1)


def test_copies_pickles_files_and_exports_compute_the_same(tmp_path: Path) -> None:
    model = nn.Sequential(linear(48, 32), nn.GELU(), linear(32, 32, False)).eval()
    student = pela.compress(model, 2.0)
    x = matrix(5, 48)
    expected = student(x)
    buffer = io.BytesIO()
    torch.save(student, buffer)
    buffer.seek(0)
    rt.save(student, tmp_path / "s.safetensors")
    base = nn.Sequential(nn.Linear(48, 32), nn.GELU(), nn.Linear(32, 32, False)).eval()
    made = pela.skeleton(base, 2.0)
    made.load_state_dict(student.state_dict())
    for same in (
        copy.deepcopy(student),
        pickle.loads(pickle.dumps(student)),
        torch.load(buffer, weights_only=False),
        rt.load(tmp_path / "s.safetensors", base),
        pela.load(tmp_path / "s.safetensors", base),
        made,
    ):
        assert torch.equal(same(x), expected)
        assert str(same) == str(student)
    exported = torch.export.export(student, (x,)).module()
    assert torch.allclose(exported(x), expected, atol=1e-6)


def test_making_a_student_draws_no_random_numbers() -> None:
    model = nn.Sequential(linear(48, 32))
    state = torch.get_rng_state()
    student = pela.compress(model, 2.0)
    pela.skeleton(model, 2.0)
    pela.merge(student)
    one, same, other = (pela.compress(model, 2.0, init="random", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one[0][0].weight, same[0][0].weight)
    assert not torch.equal(one[0][0].weight, other[0][0].weight)
    assert torch.equal(one[0].bias, model[0].bias)


@pytest.mark.parametrize("rank", [1.5, True, "a", None])
def test_a_rank_that_is_no_whole_number_is_told(rank: Any) -> None:
    with pytest.raises(ValueError, match="the rank is a whole number from 1"):
        pela.LowRankLinear.from_layer(nn.Linear(4, 4), rank)


def test_what_cannot_be_decomposed_is_told() -> None:
    layer = nn.Linear(4, 4)
    nn.init.constant_(layer.weight, torch.nan)
    with pytest.raises(ValueError, match="has values that are not finite"):
        pela.LowRankLinear.from_layer(layer, 2)
    with pytest.raises(TypeError, match="not a ReLU"):
        pela.LowRankLinear.from_layer(nn.ReLU(), 2)
