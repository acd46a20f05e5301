"""Codes of a weight: the best clusters there are, groups of rows, layers that hold bits, sums by codeword."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from torch import nn

import retensor as rt
from retensor.compression import jlcm
from retensor.compression.jlcm.grouping import bounds_of, equal_bounds, row_scales
from retensor.compression.jlcm.lut import TILE


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cost(values: torch.Tensor, centres: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    off = (values.double() - centres[jlcm.nearest(values.double(), centres)]).square()
    return float((off if weights is None else off * weights).sum())


@settings(max_examples=80, deadline=None)
@given(
    values=st.lists(st.integers(-20, 20), min_size=1, max_size=9),
    k=st.integers(1, 4),
    far=st.sampled_from([0.0, 1e4]),
    data=st.data(),
)
def test_clusters_are_those_of_brute_force(values: list[int], k: int, far: float, data: st.DataObject) -> None:
    x = torch.tensor(values, dtype=torch.float64) / 4 + far
    w = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values)))).double()
    order = x.argsort()
    least = min(
        sum(
            float((w[part] * (x[part] - (w[part] * x[part]).sum() / w[part].sum()).square()).sum())
            for part in torch.tensor_split(order, list(cuts))
            if len(part)
        )
        for cuts in itertools.combinations_with_replacement(range(len(x) + 1), k - 1)
    )
    centres = jlcm.kmeans_1d(x, k, w)
    assert centres.shape == (k,)
    assert bool((centres.diff() >= 0).all())
    # Quarters up to 5 are exact; the sums of their squares are off by some units of the last place of 1e4.
    assert cost(x, centres, w) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("heavy", [False, True])
def test_no_run_of_lloyds_is_better(k: int, heavy: bool) -> None:
    for seed in range(5):
        values = drawn(1000, seed=seed).double()
        values = values**3 if heavy else values
        ours = cost(values, jlcm.kmeans_1d(values, k))
        theirs = KMeans(k, n_init=10, random_state=seed).fit(values[:, None].numpy()).inertia_
        assert ours <= theirs * (1 + 1e-9)


def test_no_run_of_lloyds_is_better_on_a_thousand_vectors() -> None:
    for seed in range(1000):
        values = drawn(48, seed=seed).double()
        ours = cost(values, jlcm.kmeans_1d(values, 4))
        theirs = KMeans(4, n_init=1, random_state=seed).fit(values[:, None].numpy()).inertia_
        assert ours <= theirs * (1 + 1e-9)


def test_a_weight_is_as_good_as_that_many_equal_numbers() -> None:
    values, counts = drawn(40), torch.randint(1, 5, (40,), generator=torch.Generator().manual_seed(0))
    many = jlcm.kmeans_1d(values.repeat_interleave(counts), 5)
    assert torch.allclose(jlcm.kmeans_1d(values, 5, counts), many, atol=1e-12)


def test_few_distinct_numbers_are_codewords_themselves() -> None:
    assert jlcm.kmeans_1d(torch.tensor([3.0, 1.0, 3.0]), 4).tolist() == [1.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize(
    ("values", "weights", "k", "sentence"),
    [
        ([], None, 2, "0 numbers cannot"),
        ([1.0], None, 0, "in 0 clusters"),
        ([float("nan")], None, 2, "are finite"),
        ([1.0], [-1.0], 2, "not negative"),
        ([1.0], [0.0], 2, "all weights are 0"),
    ],
)
def test_what_cannot_be_clustered_is_refused(
    values: list[float], weights: list[float] | None, k: int, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        jlcm.kmeans_1d(torch.tensor(values), k, None if weights is None else torch.tensor(weights))


def test_the_distance_of_features_is_the_wasserstein_distance() -> None:
    from scipy.stats import wasserstein_distance

    # Shifted by a constant, rows are apart by it at every quantile, in both.
    row = drawn(1, 512)
    both = jlcm.row_features(torch.cat([row, row + 0.5]))
    apart = float((both[0] - both[1]).square().mean().sqrt())
    assert apart == pytest.approx(0.5, abs=1e-6)
    assert wasserstein_distance(row[0], row[0] + 0.5) == pytest.approx(apart, abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 60), groups=st.integers(1, 8), seed=st.integers(0, 5), equal=st.booleans())
def test_groups_are_large_enough_and_ascend_in_scale(rows: int, groups: int, seed: int, equal: bool) -> None:
    groups = min(groups, rows)
    weight = drawn(rows, 24, seed=seed) * (1.0 if equal else drawn(rows, 1, seed=seed + 1).exp())
    for way in ("quantiles", "std", "random"):
        labels = jlcm.group_rows(weight, groups, way, seed)
        counts = torch.bincount(labels, minlength=groups)
        assert len(counts) == groups
        assert int(counts.min()) >= max(1, rows // (4 * groups))
        if way != "random":
            scale = row_scales(weight)
            means = [float(scale[labels == group].mean()) for group in range(groups)]
            assert means == sorted(means)
        assert torch.equal(labels, jlcm.group_rows(weight, groups, way, seed))


def test_rows_that_are_all_alike_are_grouped_too() -> None:
    labels = jlcm.group_rows(torch.ones(12, 5), 4)
    assert torch.bincount(labels).tolist().count(0) == 0


def test_groups_of_two_kinds_are_found() -> None:
    narrow, wide = drawn(20, 64), 3 * drawn(12, 64, seed=1)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    labels = jlcm.group_rows(torch.cat([narrow, wide])[order], 2)
    assert torch.equal(labels, (order >= 20).long())


def test_the_bounds_say_the_labels() -> None:
    labels = torch.tensor([0, 0, 1, 3, 3])
    layout = jlcm.Layout(4, 5, bounds_of(labels, 4))
    assert torch.equal(layout.labels(5), labels)
    assert jlcm.Layout(2, 3, equal_bounds(3, 2)).labels(6).tolist() == [0, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("variant", ["codebooks", "scales"])
def test_nearest_codes_are_no_worse_than_one_codebook(variant: str) -> None:
    weight = drawn(32, 40) * drawn(32, 1, seed=1).exp()
    labels = jlcm.group_rows(weight, 4)
    one = jlcm.nearest_codes(weight, 4, torch.zeros_like(labels), 1)
    many = jlcm.nearest_codes(weight, 4, labels, 4, variant)
    errors = [float((coded.weight() - weight).square().sum()) for coded in (one, many)]
    assert errors[1] < errors[0]
    # Each weight has the nearest of its codewords.
    words = many.codebook[labels if variant == "codebooks" else torch.zeros_like(labels)]
    words = words if many.scales is None else words * many.scales[labels][:, None]
    least = (weight.double()[:, :, None] - words[:, None, :]).abs().amin(-1)
    if variant == "codebooks":
        assert torch.allclose((many.weight() - weight).abs(), least, atol=1e-12)


LAYERS = {
    "linear": (lambda: nn.Linear(24, 10), (5, 24)),
    "odd": (lambda: nn.Linear(7, 9, bias=False), (2, 3, 7)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (2, 3, 6, 6)),
    "depthwise": (lambda: nn.Conv1d(6, 6, 3, groups=6), (2, 6, 9)),
}


def made(layer: nn.Module, k: int, groups: int, variant: str, labelled: bool) -> tuple[jlcm.CodebookLayer, jlcm.Coded]:
    labels = jlcm.group_rows(layer.weight, groups)
    labels = labels if labelled else labels.sort().values
    bounds = None if labelled else bounds_of(labels, groups)
    coded = jlcm.nearest_codes(layer.weight, k, labels, groups, variant)
    coding = jlcm.Coding(k, jlcm.Layout(groups, len(labels), bounds), variant, 32)
    return (
        jlcm.codebook_layer(
            layer, coding, coded.indices.reshape(layer.weight.shape), coded.codebook, coded.scales, labels
        ),
        coded,
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("k", [2, 3, 4, 16, 40, 256])
@pytest.mark.parametrize(("groups", "variant"), [(1, "codebooks"), (3, "codebooks"), (3, "scales")])
@pytest.mark.parametrize("labelled", [False, True])
def test_a_layer_gives_what_its_codes_stand_for(kind: str, k: int, groups: int, variant: str, labelled: bool) -> None:
    torch.manual_seed(0)
    build, shape = LAYERS[kind]
    layer = build()
    held, coded = made(layer, k, groups, variant, labelled)
    dense = coded.codebook.float()[coded.labels if len(coded.codebook) > 1 else torch.zeros_like(coded.labels)]
    dense = dense.gather(1, coded.indices.long())
    if coded.scales is not None:
        # Scales are kept in 16 bits.
        dense = dense * coded.scales.half().float()[coded.labels][:, None]
    assert torch.equal(held.weight, dense.reshape(layer.weight.shape))
    x = drawn(*shape)
    plain = copy.deepcopy(layer)
    plain.weight.data = dense.reshape(layer.weight.shape)
    assert torch.equal(held(x), plain(x))
    assert torch.equal(held.to_dense()(x), plain(x))
    assert held.nbytes == held.coding.nbytes(held.shape) == sum(b.nbytes for b in held.buffers())
    kept = [value for value in held.buffers() if value.numel()]
    assert not any(value.dtype == torch.int64 or value.is_floating_point() for value in kept)
    if kind in ("linear", "odd"):
        assert torch.allclose(jlcm.lut_linear(held, x), plain(x), atol=2e-5)


def test_sums_by_codeword_take_any_batch() -> None:
    held, _ = made(nn.Linear(33, 12), 8, 2, "codebooks", False)
    for count in (1, 2, TILE, TILE + 3):
        x = drawn(count, 33)
        assert torch.allclose(jlcm.lut_linear(held, x), held(x), atol=2e-5)
    with pytest.raises(TypeError, match="float32 on the CPU"):
        jlcm.lut_linear(held, drawn(2, 33).double())
    with pytest.raises(ValueError, match=r"takes 33 inputs, and x has shape \[3, 11\]"):
        jlcm.lut_linear(held, drawn(3, 11))
    with pytest.raises(TypeError, match="not of Conv2d"):
        jlcm.lut_linear(nn.Conv2d(1, 1, 1), drawn(2, 33))


def test_a_change_of_type_leaves_the_codes() -> None:
    held, _ = made(nn.Linear(24, 10), 4, 2, "scales", True)
    before = held.weight
    for kind in (torch.float64, torch.bfloat16, torch.float32):
        held.to(kind)
        assert held(drawn(2, 24).to(kind)).dtype == kind
        assert held.weight.dtype == held.to_dense().weight.dtype == kind
        assert torch.equal(held.decoded(), before)


def test_a_layer_is_copied_saved_exported_and_folded(tmp_path) -> None:
    held, _ = made(nn.Linear(24, 10), 4, 3, "codebooks", False)
    net, x = nn.Sequential(held, nn.ReLU(), nn.Linear(10, 3)), drawn(5, 24)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    rt.save(net, tmp_path / "net.safetensors")
    again = rt.load(tmp_path / "net.safetensors", nn.Sequential(nn.Linear(24, 10), nn.ReLU(), nn.Linear(10, 3)))
    assert torch.equal(again(x), net(x))
    other, _ = made(nn.Linear(24, 10), 4, 3, "codebooks", False)
    other.load_state_dict(held.state_dict())
    assert torch.equal(other.weight, held.weight)
    program = torch.export.export(net, (x,))
    assert torch.allclose(program.module()(x), net(x), atol=1e-6)
    assert torch.equal(rt.fold(net)(x), net(x))
    assert type(rt.fold(net)[0]) is nn.Linear


def test_codings_out_of_range_are_refused() -> None:
    for k in (1, 257, 2.0, True):
        with pytest.raises(ValueError, match="2 to 256 codewords"):
            jlcm.Coding(k, jlcm.Layout(1, 8))
    with pytest.raises(ValueError, match="variant is 'both'"):
        jlcm.Coding(4, jlcm.Layout(1, 8), "both")
    with pytest.raises(ValueError, match="4 groups have 3 bounds, not 0"):
        jlcm.Layout(4, 8)
    with pytest.raises(ValueError, match="it is 16 or 32"):
        jlcm.Coding(4, jlcm.Layout(1, 8), codebook_bits=8)
    with pytest.raises(ValueError, match="at most as many groups as rows"):
        jlcm.CodebookLayer(nn.Linear(4, 3), jlcm.Coding(4, jlcm.Layout(4, 3, None)))
    with pytest.raises(ValueError, match="there are 1 to 3"):
        jlcm.group_rows(torch.ones(3, 2), 4)
    with pytest.raises(ValueError, match="way is 'best'"):
        jlcm.group_rows(torch.ones(3, 2), 2, "best")
