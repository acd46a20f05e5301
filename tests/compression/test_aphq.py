"""The stages of APHQ-ViT one by one: searches, channels made alike, MLPs with ReLUs, settings that are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from retensor.compression import aphq
from retensor.compression.aphq.calibrate import (
    candidates,
    layer_steps,
    product_steps,
    rounded,
    searched,
)
from retensor.compression.aphq.mlp import fitted_mlps, positive_quantile, with_relus
from retensor.data import reference
from retensor.data.reference import digits_vit


def swin(img: int = 16, window: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = SwinTransformer(
            img_size=img, patch_size=2, in_chans=1, num_classes=5, embed_dim=12, depths=(2, 2), num_heads=(2, 4),
            window_size=window,
        )  # fmt: skip
        # As after training: the tables begin next to 0, and normalisations at 1 and 0.
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias, std=0.5)
            elif isinstance(module, nn.Linear):
                module.reset_parameters()
            elif hasattr(module, "relative_position_bias_table"):
                nn.init.normal_(module.relative_position_bias_table)
        return net.eval()


def vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = digits_vit(16, 2)
        for module in net.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias, std=0.5)
        return net.eval()


def pictures(count: int = 24, size: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["vit", "swin", "padded swin", "deit"])
@torch.no_grad()
def test_exposed_products_and_alike_channels_leave_the_outputs(kind: str) -> None:
    nets = {"vit": vit, "swin": swin, "padded swin": lambda: swin(12, 4), "deit": deit}
    net, x = nets[kind](), pictures(size={"swin": 16, "padded swin": 12, "deit": 16}.get(kind, 8))
    if kind == "deit":
        x = x.expand(-1, 3, -1, -1).contiguous()
    wanted, shown = net(x), aphq.exposed(net)
    assert sum(isinstance(module, aphq.Product) for module in shown.modules()) == {"vit": 4, "deit": 4}.get(kind, 8)
    torch.testing.assert_close(shown(x), wanted, rtol=1e-4, atol=1e-5)
    ready = aphq.calibrate(net, x, aphq.Config(rounds=0, batch=8))
    apart = (ready.model(x) - wanted).abs().max() / wanted.abs().max()
    assert float(apart) <= 1e-4
    pairs = [name for name, _ in ready.spec.norm_linear_pairs]
    moved = [not torch.equal(ready.model.get_submodule(n).weight, net.get_submodule(n).weight) for n in pairs]
    if kind != "padded swin":
        assert all(moved)
        assert len(moved) == {"vit": 4, "deit": 4}.get(kind, 9)
    else:
        # Zeros beside the tokens of padded windows would not stay zeros, so that some pairs are left as they are.
        assert any(moved)
        assert not all(moved)


def deit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=4, qkv_bias=False
        ).eval()


@torch.no_grad()
def test_a_merging_without_bias_gets_one() -> None:
    net, x = swin(), pictures(size=16)
    assert net.layers[1].downsample.reduction.bias is None
    ready = aphq.calibrate(net, x, aphq.Config(rounds=0))
    bias = ready.model.layers[1].downsample.reduction.bias
    assert bias is not None
    assert bool(bias.any())
    assert net.layers[1].downsample.reduction.bias is None


@given(st.integers(2, 12), st.integers(1, 5), st.integers(2, 8), st.booleans(), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_one_step_for_alike_channels_rounds_each_as_its_own_did(
    width: int, out: int, bits: int, bias: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    norm, layer = nn.LayerNorm(width), nn.Linear(width, out, bias=bias)
    norm.weight.copy_(torch.rand(width, generator=generator) * 4 + 0.1)
    norm.bias.copy_(torch.randn(width, generator=generator))
    norm, layer = norm.double(), layer.double()
    rows = torch.randn(40, width, generator=generator).double()
    x, wanted = norm(rows), layer(norm(rows))
    own = searched(x.T, bits)
    few = rounded(x.T, own, 0).T
    step, middle = own.scale.double().mean(), own.zero_point.double().mean().round()
    aphq.reparametrize_(norm, layer, x, bits)
    assert layer.bias is not None
    torch.testing.assert_close(layer(norm(rows)), wanted, rtol=1e-6, atol=1e-6)
    together = rounded(norm(rows), aphq.Steps(step, middle, 40))
    # In units of the common step, less what the common zero point leaves of each channel's, without clipping.
    whole = torch.round(norm(rows) / step) + middle
    inside = (whole >= 0) & (whole <= 2**bits - 1)
    r, z = own.scale.double() / step, own.zero_point.double()
    shift = middle * step - z * own.scale.double() / r
    back = (together + shift) * r
    near = (whole - (norm(rows) / step + middle)).abs() < 0.499
    torch.testing.assert_close(back[inside & near], few[inside & near], rtol=1e-5, atol=1e-5)


@given(st.integers(1, 6), st.integers(3, 40), st.sampled_from([2, 3, 4, 6, 8]), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_candidates_are_128_pairs_that_hold_zero(rows: int, count: int, bits: int, signed: bool, seed: int) -> None:
    x = torch.randn(rows, count, generator=torch.Generator().manual_seed(seed))
    x = x if signed and float(x.min()) < 0 else x.abs()
    scales, zeros = candidates(x, bits)
    assert scales.shape == zeros.shape == (128, rows)
    assert bool((scales >= 1e-4 - 1e-9).all())
    assert bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= 2**bits - 1)).all())
    if float(x.min()) >= 0:
        assert not bool(zeros.any())
        assert len(scales.unique(dim=0)) > 1
    else:
        assert len(zeros[:, 0].unique()) == min(16, 2**bits)
        # At few bits, every zero point there is.
        assert bits > 4 or set(zeros[:, 0].tolist()) == set(range(2**bits))
    assert bool((rounded(torch.zeros_like(x), searched(x, bits), 0) == 0).all())


@torch.no_grad()
def test_a_search_finds_the_least_error_of_what_the_layer_gives() -> None:
    torch.manual_seed(1)
    x = torch.randn(50, 6) @ torch.randn(6, 6)
    for layer in (nn.Linear(6, 4), nn.Linear(6, 9)):
        weight, inputs = layer_steps(layer, x, aphq.Config(w_bits=3, rounds=3), 3)
        wanted, few_x = layer(x), rounded(x, inputs)

        def error(w: torch.Tensor, a: torch.Tensor, wanted: torch.Tensor = wanted, bias: Any = layer.bias) -> float:
            return float((nn.functional.linear(a, w, bias) - wanted).square().sum())

        ours = error(rounded(layer.weight, weight, 0), few_x)
        # The last search is that of the inputs' step, among all pairs.
        few_w = rounded(layer.weight, weight, 0)
        pairs = zip(*candidates(x.reshape(1, -1), 3), strict=True)
        least = min(error(few_w, rounded(x, aphq.Steps(s[0], z[0], 3))) for s, z in pairs)
        assert ours == pytest.approx(least, rel=1e-4)
        plain = layer_steps(layer, x, aphq.Config(w_bits=3, rounds=0), 3)
        assert ours <= error(rounded(layer.weight, plain[0], 0), rounded(x, plain[1])) * (1 + 1e-5)


@torch.no_grad()
def test_a_convolution_is_searched_as_the_linear_layer_that_it_is() -> None:
    torch.manual_seed(0)
    conv, linear = nn.Conv2d(2, 5, 2, stride=2), nn.Linear(8, 5)
    linear.weight.copy_(conv.weight.flatten(1))
    x = torch.randn(6, 2, 4, 4)
    patches = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)
    for one, other in zip(layer_steps(conv, x, aphq.Config(), 8), layer_steps(linear, patches, aphq.Config(), 8),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one.scale, other.scale)
        assert torch.equal(one.zero_point, other.zero_point)


@torch.no_grad()
def test_operands_of_products_have_a_step_for_each_head() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(8, 3, 5, 4) * torch.tensor([1.0, 10.0, 100.0]).view(3, 1, 1), torch.rand(8, 3, 4, 6)
    left, right = product_steps(a, b, aphq.Config(a_bits=4))
    assert left.scale.shape == right.scale.shape == (3,)
    assert float(left.scale[1] / left.scale[0]) == pytest.approx(10, rel=0.5)
    assert float(left.scale[2] / left.scale[1]) == pytest.approx(10, rel=0.5)
    assert not bool(right.zero_point.any())  # no number is below 0
    with pytest.raises(ValueError, match=r"third axis from the end is to be that of heads"):
        product_steps(torch.ones(2, 3, 4, 5), torch.ones(2, 4, 5, 6), aphq.Config())


def test_mlps_with_relus_come_near_to_what_they_gave_and_have_a_bound() -> None:
    model, data = reference("digits-vit")
    config = aphq.Config(a_bits=3, mlp_iters=150, mlp_lr=1e-3, batch=32)
    before = copy.deepcopy(model.state_dict())
    done = fitted_mlps(model, data.x[:256], config, aphq.find_spec(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fitted = [unit for unit in done.report if unit.name.endswith("mlp")]
    assert len(fitted) == 3
    assert all(unit.after < 0.5 * unit.before for unit in fitted)
    inputs: list[torch.Tensor] = []
    model.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    model(data.x[:256])
    bound = next(unit.found["bound"] for unit in fitted if unit.name == "blocks.1.mlp")
    positive = inputs[0][inputs[0] > 0]
    assert float((positive <= bound).double().mean()) == pytest.approx(0.99, abs=0.002)
    assert all(isinstance(block.mlp.act, aphq.ReLU) for block in done.model.blocks)
    for name in ("norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.proj.bias"):
        assert torch.equal(done.model.blocks[0].get_parameter(name), model.blocks[0].get_parameter(name))
    swapped = with_relus(model, aphq.find_spec(model))
    x, wanted = data.x_test, model(data.x_test)
    with torch.no_grad():
        assert float((done.model(x) - wanted).square().mean()) < 0.5 * float((swapped(x) - wanted).square().mean())


def test_a_bound_is_of_positive_numbers_alone() -> None:
    x = torch.cat([-torch.rand(1000), torch.arange(1.0, 101.0)])
    assert float(positive_quantile(x, 0.98)) == pytest.approx(98.02)
    assert float(positive_quantile(-x.abs(), 0.5)) == torch.inf


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"w_bits": 1}, "w_bits is a whole number from 2 to 16, not 1"),
        ({"a_bits": 17}, "a_bits is a whole number from 2 to 16"),
        ({"pct": 1.5}, "pct is a part from 0 to 1"),
        ({"temp": 0}, "temp is a number above 0"),
        ({"eps": -1e-3}, "eps is a number above 0"),
        ({"direction": "up"}, "direction is 'up'; it is one of rademacher, ones"),
        ({"loss": "l1"}, "loss is 'l1'; it is one of aph, mse, mae, hessian_brecq"),
        ({"draws": 0}, "draws is a whole number from 1"),
        ({"qdrop": True}, "qdrop is a part from 0 to 1"),
        ({"iters": 1.5}, "iters is a whole number from 0"),
        ({"lr": float("nan")}, "lr is a number from 0"),
        ({"start": 0.0}, "start is a number above 0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        aphq.Config(**given)


def test_the_inputs_of_blocks_follow_the_dropping_of_activations() -> None:
    assert aphq.Config(qdrop=0.25).mixed == 0.75
    assert aphq.Config(qdrop=0.0, input_drop=1.0).mixed == 0.0
