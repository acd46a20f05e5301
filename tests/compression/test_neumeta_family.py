"""A family of widths: what is sampled from it, how it is kept, and which networks it can be made of."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

import retensor as rt
from retensor.compression import neumeta as nm
from retensor.compression.neumeta.hyper import skeleton
from retensor.data.reference import DigitsCNN
from retensor.errors import RetensorError

# Most of these families need no fitting for what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:the family was never fitted")

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def family(model: nn.Module | None = None, layers: object = "block", example: torch.Tensor = X) -> nm.NeuMeta:
    torch.manual_seed(0)
    space = nm.fuse_and_smooth(model or DigitsCNN(12), layers, example=example, seconds=0.05)  # type: ignore[arg-type]
    return nm.NeuMeta(space, hidden=10, depth=2, freqs=3)


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 10),
    )  # fmt: skip


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(one.detach().abs().max()))


@pytest.mark.parametrize("width", [1, 3, 7, 12, 20])
def test_a_sample_is_an_ordinary_network_of_that_width(width: int) -> None:
    small = family().sample(width, k=3)
    plain = nm.fuse(DigitsCNN(width), example=X)
    assert [type(module) for module in small.modules()] == [type(module) for module in plain.modules()]
    shapes = {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in plain.state_dict().items()}
    assert (small.block.conv1.out_channels, small.block.conv2.in_channels) == (width, width)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in small.parameters())
    assert not any(isinstance(module, nm.Generated | nm.WeightField | nm.NeuMeta) for module in small.modules())
    assert small(X).shape == (3, 10)


def test_fixed_layers_keep_their_values() -> None:
    model = DigitsCNN(12).eval()
    hyper = family(model)
    small = hyper.sample(5, k=2)
    for name in ("conv", "head"):
        for one, other in zip(
            hyper.net.get_submodule(name).parameters(), small.get_submodule(name).parameters(), strict=True
        ):
            assert torch.equal(one, other)


def test_folding_a_family_is_a_sample_without_noise() -> None:
    hyper = family()
    for width in (4, 12):
        hyper.width = width
        folded, sampled = rt.fold(hyper.net), hyper.sample(width, k=1)
        with torch.no_grad():
            assert torch.equal(folded(X), sampled(X))
            close(hyper(X), folded(X))
            close(hyper(X), functional_call(sampled, hyper.weights(width), (X,)))


def test_a_sample_is_the_mean_of_one_without_noise_and_others_with() -> None:
    hyper = family()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        drawn = [hyper.weights(5), *(hyper.weights(5, noise=1.0, generator=generator) for _ in range(3))]
    state = hyper.sample(5, k=4, seed=7).state_dict()
    for name, value in drawn[0].items():
        close(state[name], torch.stack([one[name] for one in drawn]).mean(0))
        assert not torch.equal(drawn[1][name], value)
    again, other = hyper.sample(5, k=4, seed=7).state_dict(), hyper.sample(5, k=4, seed=8).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert not torch.equal(state["block.conv1.weight"], other["block.conv1.weight"])


def test_sampling_and_training_leave_the_callers_random_numbers() -> None:
    hyper, plain, normed = family(), lenet(), DigitsCNN(6)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    hyper.sample(5, k=3)
    nm.warm_start(hyper, steps=2, widths=[5])
    nm.NeuMeta(nm.WidthSpace(plain, "**", example=X), hidden=4, depth=1, freqs=1, seed=5)
    nm.fuse_and_smooth(normed, "block", example=X, seconds=0.05)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("params", "width"), [(1.0, 12), (0.25, 3), (0.5, 6), (2.0, 24), (1e-9, 1)])
def test_a_sample_of_a_part_of_the_parameters_is_the_nearest_width(params: float, width: int) -> None:
    hyper = family()
    wanted = params * hyper.generated_parameters(12)
    apart = {w: abs(hyper.generated_parameters(w) - wanted) for w in range(1, 40)}
    assert min(apart, key=lambda w: apart[w]) == width
    assert hyper.sample(params=params, k=1).block.conv1.out_channels == width


def test_all_groups_of_a_whole_network_change_in_proportion() -> None:
    hyper = family(lenet(), "**")
    assert hyper.full_width == 4
    assert len(hyper.layers) == 4
    for width, expected in ((4, (4, 8, 16)), (3, (3, 6, 12)), (1, (1, 2, 4)), (6, (6, 12, 24))):
        small = hyper.sample(width, k=1)
        assert (small[0].out_channels, small[3].out_channels, small[7].out_features) == expected
        assert (small[7].in_features, small[9].in_features) == (4 * expected[1], expected[2])
        assert small(X).shape == (3, 10)


def test_coordinates_number_the_tensors_and_norm_is_the_largest_size() -> None:
    hyper = family()
    layers = hyper.layers
    assert [layer.numbers for layer in layers.values()] == [(0, 1), (2, 3)]
    assert {layer.of for layer in layers.values()} == {4}
    assert {layer.field["norm"] for layer in layers.values()} == {16.0}
    raw = layers["block.conv2"].coordinates(5)
    assert raw["weight"][6].tolist() == [2, 1, 1, 4, 16, 5]
    assert raw["bias"][15].tolist() == [3, 15, 0, 4, 16, 1]


def test_resampling_follows_the_path_and_keeps_sums() -> None:
    space = nm.fuse_and_smooth(DigitsCNN(12), ["block"], example=X, seconds=0.05)
    full = {name: parameter.detach() for name, parameter in space.net.named_parameters()}
    half = space.resampled(6)
    rows = torch.tensor([1, 3, 5, 7, 9, 11])
    assert torch.equal(half["block.conv1.weight"], full["block.conv1.weight"][rows])
    assert torch.equal(half["block.conv1.bias"], full["block.conv1.bias"][rows])
    assert torch.equal(half["block.conv2.weight"], 2 * full["block.conv2.weight"][:, rows])
    assert torch.equal(half["block.conv2.bias"], full["block.conv2.bias"])
    for name, value in space.resampled(12).items():
        assert torch.equal(value, full[name])
    # Twice each channel at half the weight is the same function.
    with torch.no_grad():
        close(space.net(X), functional_call(space.net, space.resampled(24), (X,)))
    hyper = nm.NeuMeta(space, hidden=4, depth=1, freqs=1)
    assert all(torch.equal(value, half[name]) for name, value in hyper.resampled(6).items())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 3, 5]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from(["zeros", "reflect", "circular", "same"]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(1, 7),
)
def test_generated_layers_compute_what_their_plain_ones_do(
    dims: int, kernel: int, stride: int, dilation: int, mode: str, bias: bool, dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(0)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    # Circular padding of three axes and reflections need no more than the input has.
    padding = "same" if mode == "same" else 1 if kernel > 1 else 0
    mode = "zeros" if mode == "same" else mode
    stride = 1 if padding == "same" else stride
    net = nn.Sequential(
        kind(2, 5, kernel, stride, padding, dilation, bias=bias, padding_mode=mode), nn.ReLU(),
        kind(5, 3, 1, bias=bias),
    ).to(dtype)  # fmt: skip
    x = torch.randn(2, 2, *[9] * dims).to(dtype)
    hyper = nm.NeuMeta(nm.WidthSpace(net, "**", example=x), hidden=4, depth=2, freqs=2)
    hyper.width = width
    small = hyper.sample(width, k=1)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    with torch.no_grad():
        one, other = hyper(x), small(x)
    assert one.dtype == other.dtype == dtype
    assert torch.equal(one, other) if dtype == torch.bfloat16 else torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_middle_of_a_vision_transformers_perceptron_is_generated() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=2, img_size=32, num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    space = nm.WidthSpace(model, ["blocks.1.mlp"], example=x)
    assert space.full_width == 768
    hyper = nm.NeuMeta(space, hidden=4, depth=1, freqs=1)
    small = hyper.sample(192, k=1)
    assert small.blocks[1].mlp.fc1.out_features == 192
    assert small.blocks[0].mlp.fc1.out_features == 768
    with torch.no_grad():
        close(model(x), functional_call(space.net, hyper.targets(), (x,)))
        assert small(x).shape == (2, 10)


def test_the_last_block_of_a_resnet_of_timm_is_generated() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=10, channels=(16, 16, 32, 64)).eval()
    x = torch.randn(1, 3, 32, 32)
    space = nm.fuse_and_smooth(model, ["layer4.1"], example=x, solver="nearest")
    assert space.layers == ("layer4.1.conv1", "layer4.1.conv2")
    small = nm.NeuMeta(space, hidden=4, depth=1, freqs=1).sample(params=0.25, k=1)
    assert small.layer4[1].conv1.out_channels == 16
    assert small(x).shape == (1, 10)


def test_the_perceptron_of_a_transformers_model_is_generated() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    model = transformers.BertModel(config).eval()
    example = {"input_ids": torch.tensor([[1, 5, 7, 2]])}
    names = ["encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"]
    space = nm.fuse_and_smooth(model, names, example=example, seconds=0.05)
    assert space.full_width == 24
    assert space.variation[1] < space.variation[0]
    small = nm.NeuMeta(space, hidden=4, depth=1, freqs=1).sample(6, k=1)
    with torch.no_grad():
        close(model(**example).last_hidden_state, space.net(**example).last_hidden_state)
        assert small(**example).last_hidden_state.shape == (1, 4, 16)


def equal_families(one: nm.NeuMeta, other: nm.NeuMeta) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.width == other.width
    with torch.no_grad():
        assert torch.equal(one(X), other(X))
        assert torch.equal(one.sample(5, k=3)(X), other.sample(5, k=3)(X))


def test_a_family_survives_deep_copies_and_pickles() -> None:
    hyper = family()
    hyper.width = 6
    equal_families(hyper, copy.deepcopy(hyper))
    equal_families(hyper, pickle.loads(pickle.dumps(hyper)))
    file = io.BytesIO()
    torch.save(hyper, file)
    file.seek(0)
    equal_families(hyper, torch.load(file, weights_only=False))
    other = family()
    nm.warm_start(other, steps=1, widths=[5])
    other.load_state_dict(hyper.state_dict())
    other.width = 6
    equal_families(hyper, other)


def test_a_family_is_saved_and_loaded(tmp_path: Path) -> None:
    hyper = family()
    nm.warm_start(hyper, steps=2, widths=range(3, 10))
    hyper.width = 9
    hyper.save(tmp_path / "a.safetensors")
    rt.save(hyper, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    model = DigitsCNN(12)
    loaded = nm.load(tmp_path / "a.safetensors", model, example=X)
    equal_families(hyper, loaded)
    assert loaded.trained.tolist() == [3, 9]
    # Fitting goes on where it stopped, towards the same weights.
    assert nm.warm_start(loaded, steps=2, widths=[5]) == nm.warm_start(hyper, steps=2, widths=[5])
    base = nm.NeuMeta(nm.WidthSpace(nm.fuse(model, example=X), ["block"], example=X), hidden=3, depth=1, freqs=1)
    again = rt.load(tmp_path / "b.safetensors", base)
    assert isinstance(again, nm.NeuMeta)
    with torch.no_grad():
        assert torch.equal(
            again.sample(4, k=2)(X), nm.load(tmp_path / "b.safetensors", model, example=X).sample(4, k=2)(X)
        )


def test_a_sample_is_saved_and_loaded_as_any_network(tmp_path: Path) -> None:
    small = family().sample(4, k=2)
    rt.save(small, tmp_path / "small.safetensors")
    plain = nm.fuse(DigitsCNN(4), example=X)
    with torch.no_grad():
        assert torch.equal(small(X), rt.load(tmp_path / "small.safetensors", plain)(X))


def test_files_without_a_family_or_of_another_model_are_refused(tmp_path: Path) -> None:
    rt.save(DigitsCNN(4), tmp_path / "plain.safetensors")
    with pytest.raises(RetensorError, match="holds no family of widths"):
        nm.load(tmp_path / "plain.safetensors", DigitsCNN(4), example=X)
    family().save(tmp_path / "family.safetensors")
    with pytest.raises(RetensorError, match=r"generates 'block.conv1', which the model lacks"):
        nm.load(tmp_path / "family.safetensors", lenet(), example=X)
    with pytest.raises(RetensorError, match="is not there"):
        nm.load(tmp_path / "none.safetensors", lenet(), example=X)


def test_a_family_and_its_samples_are_exported() -> None:
    hyper = family()
    hyper.width = 5
    small = hyper.sample(5, k=1)
    for model in (hyper, small):
        program = torch.export.export(model, (X,))
        with torch.no_grad():
            close(model(X), program.module()(X))


def test_traffic_of_a_small_sample_is_below_the_full_networks() -> None:
    hyper = family(DigitsCNN(32))
    both = rt.compare(
        hyper.sample(32, k=1), hyper.sample(8, k=1), inputs=(1, 1, 8, 8), accelerator=20 << 10, names=["full", "small"]
    )
    assert both["small"].macs < both["full"].macs
    assert both["small"].streamed_bytes < both["full"].streamed_bytes


@pytest.mark.parametrize("layers", ["block", "**"])
def test_the_order_of_channels_is_kept_in_the_file_and_can_be_undone(tmp_path: Path, layers: str) -> None:
    model = DigitsCNN(12).eval() if layers == "block" else lenet()
    hyper = family(model, layers)
    hyper.save(tmp_path / "family.safetensors")
    loaded = nm.load(tmp_path / "family.safetensors", model, example=X)
    assert loaded.orders == hyper.orders
    assert len(loaded.orders) == (2 if layers == "block" else 3)
    net = skeleton(loaded)
    for group in nm.channel_groups(net, X):
        if group.producers in loaded.orders:
            group.reorder_(net, torch.tensor(loaded.orders[group.producers]).argsort())
    fused = nm.fuse(model, example=X).state_dict()
    assert all(torch.equal(value, fused[name]) for name, value in net.state_dict().items())


def test_a_family_of_channels_in_their_own_order_has_none_to_undo() -> None:
    space = nm.fuse_and_smooth(DigitsCNN(12), "block", example=X, solver="none")
    assert nm.NeuMeta(space, hidden=4, depth=1, freqs=1).orders == {}


def test_a_family_that_was_never_fitted_warns() -> None:
    hyper = family()
    nm.warm_start(hyper, steps=0, widths=[5])
    with pytest.warns(UserWarning, match="was never fitted, so its weights are no better than random"):
        hyper.sample(5, k=1)


def test_a_width_outside_the_trained_ones_warns() -> None:
    hyper = family()
    nm.warm_start(hyper, steps=1, widths=range(4, 11))
    for width in (3, 11):
        with pytest.warns(UserWarning, match=f"width {width} is outside of 4 to 10"):
            hyper.sample(width, k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper.sample(4, k=1)
        hyper.sample(10, k=1)


def test_the_generated_network_is_unlike_a_slice_of_the_full_one() -> None:
    hyper = family()
    small = hyper.sample(4, k=1).block.conv1.weight
    full = hyper.targets()["block.conv1.weight"]
    assert all(not torch.allclose(small[i], row) for i in range(4) for row in full)
