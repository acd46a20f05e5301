"""Factored convolutions compute what the dense one of their kernel does; torch and tensorly-torch are the oracles."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import retensor as rt
from retensor.compression import apriori as ap

FORMATS = list(ap.FORMATS)
PLAIN = {1: ap.FactoredConv1d, 2: ap.FactoredConv2d, 3: ap.FactoredConv3d}
TRANSPOSED = {1: ap.FactoredConvTranspose1d, 2: ap.FactoredConvTranspose2d, 3: ap.FactoredConvTranspose3d}
CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
pytestmark = pytest.mark.filterwarnings("ignore:rank .* takes:UserWarning")


def formats(dims: int) -> list[str]:
    return [name for name in FORMATS if dims >= ap.FORMATS[name].least_dims]


def made(kind: Any, *arguments: Any, seed: int = 0, **named: Any) -> Any:
    """A layer in double precision, its bias not 0."""
    layer = kind(*arguments, **named, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


def close(one: torch.Tensor, other: torch.Tensor, rounding: float = 1e-12) -> None:
    assert one.shape == other.shape
    assert (one - other).abs().max() <= rounding * (1 + other.abs().max())


@st.composite
def plain_layers(draw: Any) -> tuple[Any, torch.Tensor]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    each = st.integers(1, 3)
    tupled = {name: tuple(draw(each) for _ in range(dims)) for name in ("kernel_size", "stride", "dilation")}
    same = draw(st.booleans())
    padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(dims))
    if same:
        tupled["stride"] = (1,) * dims
    layer = made(
        PLAIN[dims],
        groups * draw(each),
        groups * draw(each),
        **tupled,
        padding=padding,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        rank=draw(st.integers(1, 4)),
        format=draw(st.sampled_from(formats(dims))),
        seed=draw(st.integers(0, 99)),
    )
    sizes = [draw(st.integers(8, 10)) for _ in range(dims)]
    return layer, torch.randn(2, layer.in_channels, *sizes, dtype=torch.float64)


@st.composite
def transposed_layers(draw: Any) -> tuple[Any, torch.Tensor]:
    dims, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    each = st.integers(1, 3)
    layer = made(
        TRANSPOSED[dims],
        groups * draw(each),
        groups * draw(each),
        *(tuple(draw(st.integers(*ends)) for _ in range(dims)) for ends in ((2, 3), (1, 2), (0, 1))),
        groups=groups,
        dilation=draw(each),
        bias=draw(st.booleans()),
        rank=draw(each),
        format=draw(st.sampled_from(formats(dims))),
        seed=draw(st.integers(0, 99)),
    )
    return layer, torch.randn(
        2, layer.in_channels, *(draw(st.integers(4, 6)) for _ in range(dims)), dtype=torch.float64
    )


@settings(max_examples=80, deadline=None)
@given(plain_layers())
def test_the_chain_equals_the_dense_layer_and_so_does_the_kernel(drawn: tuple[Any, torch.Tensor]) -> None:
    layer, x = drawn
    dense = layer.to_dense()
    close(layer(x), dense(x))
    close(layer(x[0]), dense(x[0]))
    if layer.padding_mode == "zeros":
        close(
            layer(x),
            CONVOLUTION[layer.dims](
                x, layer.kernel(), layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups
            ),
        )


@settings(max_examples=60, deadline=None)
@given(st.one_of(plain_layers(), transposed_layers()), st.booleans())
def test_gradients_of_factors_are_those_through_the_kernel(drawn: tuple[Any, torch.Tensor], recompute: bool) -> None:
    layer, x = drawn
    layer.recompute = recompute
    whole = copy.deepcopy(layer)
    whole.implementation, whole.recompute = "reconstructed", False
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for each, given_x in zip((layer, whole), inputs, strict=True):
        each(given_x).square().sum().backward()
    close(inputs[0].grad, inputs[1].grad, 1e-11)
    for mine, theirs in zip(layer.parameters(), whole.parameters(), strict=True):
        close(mine.grad, theirs.grad, 1e-11)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_layers_equal_torchs(dims: int, groups: int) -> None:
    for name in formats(dims):
        for stride, padding, extra, dilation in [(1, 0, 0, 1), (2, 1, 1, 1), (3, 2, 2, 2)]:
            layer = made(TRANSPOSED[dims], 4, 6, 3, stride, padding, extra, groups, True, dilation, rank=2, format=name)
            x = torch.randn(2, 4, *range(4, 4 + dims), dtype=torch.float64)
            dense = layer.to_dense()
            close(layer(x), dense(x))
            wanted = [size + 1 for size in dense(x).shape[2:]] if extra < stride - 1 else list(dense(x).shape[2:])
            close(layer(x, output_size=wanted), dense(x, output_size=wanted))
    with pytest.raises(ValueError, match="output_size"):
        layer(x, output_size=[1] * dims)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 1e-5), (torch.float16, 0.008), (torch.bfloat16, 0.06), (torch.float64, 1e-12)],
)
def test_parity_in_every_precision(name: str, dtype: torch.dtype, rounding: float) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = ap.FactoredConv2d(6, 8, 3, padding=1, groups=2, rank=3, format=name, generator=generator, dtype=dtype)
    x = torch.randn(2, 6, 9, 9, generator=generator).to(dtype)
    close(layer(x).float(), layer.to_dense()(x).float(), rounding)


@pytest.mark.parametrize("implementation", ["fused", "reconstructed"])
def test_other_implementations_compute_the_same(implementation: str) -> None:
    layer = made(ap.CPConv3d, 4, 6, (3, 1, 2), (2, 1, 1), 1, groups=2, rank=3)
    x = torch.randn(2, 4, 7, 6, 5, dtype=torch.float64)
    expected = layer(x)
    layer.implementation = implementation
    close(layer(x), expected)
    with pytest.raises(ValueError, match="fused"):
        ap.FactoredConv2d(2, 2, 3, rank=1, format="vh", implementation="fused")


def test_the_einsum_kernel_agrees_with_the_chain_at_stride_dilation_and_uneven_sizes() -> None:
    layer = made(ap.CPConv2d, 5, 7, (3, 7), 2, 3, 2, rank=4)
    x = torch.randn(2, 5, 20, 21, dtype=torch.float64)
    kernel = np.einsum(
        "or,cr,ry,rx->ocyx",
        *(f.detach().numpy() for f in (layer.factors["outputs"][0], layer.factors["inputs"][0].T)),
        *(layer.factors[name].detach()[0].numpy() for name in ("axis0", "axis1")),
    )
    close(layer(x), functional.conv2d(x, torch.from_numpy(kernel), layer.bias, 2, 3, 2), 1e-13)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("name", ["cp", "tucker", "tt"])
def test_equal_to_tensorly_torch_with_copied_factors(dims: int, name: str, dilation: int) -> None:
    tltorch = pytest.importorskip("tltorch")
    kernel = (3, 5, 2)[:dims]
    ranks: Any = {"cp": 4, "tucker": (4, 3, *(2,) * dims), "tt": (3, *range(2, 2 + dims))}[name]
    layer = made(PLAIN[dims], 3, 6, kernel, 2, 1, dilation, rank=ranks, format=name)
    given_rank = (1, *ranks, 1) if name == "tt" else ranks
    peer = tltorch.FactorizedConv(
        3, 6, kernel, stride=2, padding=1, dilation=dilation, bias=True, factorization=name, rank=given_rank,
        implementation="factorized",
    ).double()  # fmt: skip
    mine = {key: factor.detach()[0] for key, factor in layer.factors.items()}
    axes = [mine[f"axis{i}"] for i in range(dims)]
    with torch.no_grad():
        if name == "cp":
            peer.weight.weights.fill_(1)
            values = [mine["outputs"], mine["inputs"].T, *(u.T for u in axes)]
        elif name == "tucker":
            peer.weight.core.copy_(mine["core"])
            values = [mine["outputs"], mine["inputs"].T, *(u.T for u in axes)]
        else:
            values = [mine["inputs"].T[None], *(u.permute(1, 2, 0) for u in axes), mine["outputs"].T[..., None]]
        for theirs, value in zip(peer.weight.factors, values, strict=True):
            theirs.copy_(value)
        peer.bias.copy_(layer.bias)
    x = torch.randn(2, 3, *range(9, 9 + dims), dtype=torch.float64)
    close(layer(x), peer(x), 1e-12)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_parameters_and_multiply_accumulates_follow_the_formulas(dims: int, groups: int) -> None:
    inputs, outputs, k, r, n = 4, 6, 5, 3, 8
    pixels = n**dims
    i, o = inputs // groups, outputs // groups
    whole = {
        "cp": r * (outputs + inputs + groups * dims * k),
        "separable": dims * k * r * inputs * o,
        "vh": k * r * (inputs + outputs) + (dims - 2) * k * r**2 * groups,
        "tt": r * (inputs + outputs) + groups * dims * k * r**2,
        "tucker": r * inputs + groups * dims * k * 2 + groups * r * r * 2**dims + r * outputs,
    }
    steps = {"tucker": r * inputs + groups * k * r * sum(2**j for j in range(1, dims + 1)) + groups * r * r * 2**dims
             + r * outputs}  # fmt: skip
    for name in FORMATS:
        rank = {"tucker": (r, r, *(2,) * dims), "tt": (r,) * (dims + 1)}.get(name, r)
        layer = PLAIN[dims](
            inputs, outputs, k, padding="same", groups=groups, bias=False, rank=rank, format=name, dtype=torch.float64
        )
        assert sum(parameter.numel() for parameter in layer.parameters()) == whole[name], (name, i)
        # Every parameter is used once at every pixel, but for tucker, whose filters serve all channels.
        assert layer.macs((n,) * dims) == pixels * steps.get(name, whole[name])
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(1, inputs, *(n,) * dims, dtype=torch.float64))
        assert counter.get_total_flops() == 2 * layer.macs((n,) * dims)


def test_multiply_accumulates_are_those_of_the_cost_sheet_at_strides_and_transposed() -> None:
    for layer in (
        ap.CPConv2d(6, 8, 3, 2, 1, rank=4),
        ap.FactoredConv2d(6, 8, (3, 5), (1, 2), rank=2, format="separable"),
        ap.CPConvTranspose2d(6, 8, 4, 2, 1, rank=4),
    ):
        sheet = rt.cost(layer, (1, 6, 10, 12), fuse=False)
        assert sheet.macs == layer.macs((10, 12))
        assert sheet.parameters == sum(parameter.numel() for parameter in layer.parameters())


def test_layers_survive_copies_pickles_files_and_export(tmp_path: Any) -> None:
    x = torch.randn(2, 4, 9, 9)
    for name in FORMATS:
        layer = ap.FactoredConv2d(4, 6, 3, padding=1, rank=2, format=name).eval()
        model = nn.Sequential(layer, nn.ReLU(), ap.CPConvTranspose2d(6, 2, 2, 2, rank=2)).eval()
        expected = model(x)
        rt.save(model, tmp_path / "net.safetensors")
        base = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 2, 2, 2)).eval()
        rt.save(layer, tmp_path / "layer.safetensors")
        again = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            rt.load(tmp_path / "net.safetensors", base),
            torch.export.export(model, (x,)).module(),
        ]
        other = nn.Sequential(
            ap.FactoredConv2d(4, 6, 3, padding=1, rank=2, format=name), nn.ReLU(), copy.deepcopy(model[2])
        )
        other.load_state_dict(model.state_dict())
        torch.save(model, tmp_path / "net.pt")
        again += [other, torch.load(tmp_path / "net.pt", weights_only=False)]
        for each in again:
            assert torch.equal(each(x), expected), name
        assert torch.equal(rt.load(tmp_path / "layer.safetensors")(x), layer(x))
        folded = rt.fold(model)
        assert [type(part) for part in folded] == [nn.Conv2d, nn.ReLU, nn.ConvTranspose2d]
        close(folded(x), expected, 1e-5)


def test_recomputing_layers_can_be_exported_and_give_parameters_without_inputs_their_gradients() -> None:
    layer = ap.CPConv2d(4, 6, 3, padding=1, rank=2, recompute=True)
    x = torch.randn(3, 4, 8, 8)
    assert torch.allclose(torch.export.export(layer, (x,)).module()(x), layer(x))
    layer(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    layer.factors.requires_grad_(False)
    layer.bias.grad = None
    layer(x).sum().backward()
    assert torch.allclose(layer.bias.grad, torch.full((6,), 3.0 * 64))


def test_recomputation_goes_with_torch_func_and_autocast() -> None:
    layer = made(ap.CPConv2d, 4, 6, 3, padding=1, rank=3, recompute=True)
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)

    def loss(parameters: Any) -> torch.Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    found = torch.func.grad(loss)({name: value.detach() for name, value in layer.named_parameters()})
    loss(dict(layer.named_parameters())).backward()
    for name, parameter in layer.named_parameters():
        close(found[name], parameter.grad)
    layer.float().zero_grad()
    kept = copy.deepcopy(layer)
    kept.recompute = False
    for each in (layer, kept):
        with torch.autocast("cpu", torch.bfloat16):
            y = each(x.float())
        assert y.dtype is torch.bfloat16
        y.float().square().sum().backward()
    for mine, theirs in zip(layer.parameters(), kept.parameters(), strict=True):
        # One part of the batch after another is rounded to bfloat16.
        assert (mine.grad - theirs.grad).norm() <= 2**-7 * theirs.grad.norm()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"rank": 0}, ValueError, "ranks are at least 1"),
        ({"rank": -2}, ValueError, "ranks are at least 1"),
        ({"rank": 1.5}, TypeError, "rank is 1.5"),
        ({"rank": True}, TypeError, "rank is True"),
        ({"rank": (2, 3)}, ValueError, "rank has 2 numbers"),
        ({"rank": 2, "kernel_size": 4, "padding": "same", "stride": 2}, ValueError, "even size"),
        ({"rank": 2, "groups": 3}, ValueError, "groups=3 does not divide"),
        ({"rank": 2, "groups": 0}, ValueError, "groups is 0"),
        ({"rank": 2, "in_channels": 2.0}, TypeError, "in_channels is 2.0"),
        ({"rank": 2, "kernel_size": 0}, ValueError, "kernel_size is 0"),
        ({"rank": 2, "kernel_size": (3, 3, 3)}, ValueError, "kernel_size is"),
        ({"rank": 2, "stride": "2"}, TypeError, "stride is '2'"),
        ({"rank": 2, "padding": "full"}, ValueError, "'same', 'valid' or numbers"),
        ({"rank": 2, "padding_mode": "mirror"}, ValueError, "padding_mode is 'mirror'"),
        ({"rank": 2, "format": "svd"}, ValueError, "format is 'svd'"),
        ({"rank": 2, "init": "zeros"}, ValueError, "init is 'zeros'"),
        ({"rank": 2, "implementation": "fast"}, ValueError, "implementation is 'fast'"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    given_arguments = {"in_channels": 4, "out_channels": 8, "kernel_size": 3} | arguments
    with pytest.raises(kind, match=message):
        ap.FactoredConv2d(**given_arguments)


def test_more_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="single axis"):
        ap.FactoredConv1d(2, 2, 3, rank=1, format="vh")
    with pytest.raises(ValueError, match="FactoredConv2d"):
        ap.CPConv2d(2, 2, 3, rank=1, format="vh")
    with pytest.raises(ValueError, match="padding_mode is 'reflect'"):
        ap.CPConvTranspose2d(2, 2, 3, rank=1, padding_mode="reflect")
    with pytest.raises(ValueError, match="here it is numbers"):
        ap.CPConvTranspose2d(2, 2, 3, padding="same", rank=1)


@pytest.mark.filterwarnings("error")
def test_a_rank_above_the_dense_size_warns() -> None:
    with pytest.warns(UserWarning, match="rank 9 takes 99 parameters and the dense kernel 54"):
        ap.CPConv2d(3, 2, 3, rank=9, padding_mode="zeros").kernel()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ap.CPConv2d(3, 2, 3, rank=4)


def test_a_layer_shows_what_it_is() -> None:
    layer = ap.CPConv2d(4, 8, 3, groups=2, dilation=2, rank=2, bias=False)
    for part in ("4, 8", "format='cp'", "rank=2", "groups=2", "dilation=(2, 2)", "bias=False"):
        assert part in repr(layer)
    assert math.prod(layer.factors["inputs"].shape) == 2 * 4


@pytest.mark.parametrize("name", FORMATS)
def test_memory_formats_go_through_as_with_torchs_layers(name: str) -> None:
    layer = ap.FactoredConv2d(4, 6, 3, padding=1, rank=2, format=name)
    x = torch.randn(2, 4, 8, 8)
    last = x.to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous()
    assert layer(last).is_contiguous(memory_format=torch.channels_last)
    close(layer(last), layer(x), 1e-5)
    # What torch does to weights of four axes must not fail at factors of five.
    model = nn.Sequential(nn.Conv2d(4, 4, 3), layer).to(memory_format=torch.channels_last)
    assert torch.isfinite(model(last)).all()
    assert next(model.double().parameters()).dtype is layer.bias.dtype is torch.float64
    layer.float()
    expected = layer(x)
    layer.channels_last = False
    close(layer(last), expected, 1e-5)
    close(layer(x), expected, 1e-5)
