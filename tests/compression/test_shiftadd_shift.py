"""Shift layers: their weights, their gradients, and what is kept of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.compression import shiftadd
from retensor.errors import RetensorError
from retensor.quantizing import packed_bytes


def layer(outputs: int = 6, inputs: int = 10, seed: int = 0, **settings: object) -> shiftadd.ShiftLinear:
    torch.manual_seed(seed)
    return shiftadd.ShiftLinear.from_linear(nn.Linear(inputs, outputs), **settings)


def test_weights_are_the_nearest_powers_in_logarithm():
    plain = nn.Linear(4, 1, bias=False)
    plain.weight.data = torch.tensor([[0.3, -0.7, 1e-7, 0.0]])
    made = shiftadd.ShiftLinear.from_linear(plain)
    assert made.effective_weight().tolist() == [[0.25, -0.5, 2.0**-14, 0.0]]
    plain.weight.data = torch.tensor([[3.0, -5.0, 0.4, 0.0]])
    assert shiftadd.ShiftLinear.from_linear(plain).effective_weight().tolist() == [[1.0, -1.0, 0.5, 0.0]]
    # Folding a scale in lets the largest weights be.
    scaled = shiftadd.ShiftLinear.from_linear(plain, scale=True, weight_bits=3)
    assert scaled.effective_weight().tolist() == [[4.0, -4.0, 1.0, 0.0]]


@pytest.mark.parametrize("variant", ["ps", "q"])
@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_both_variants_begin_at_the_same_weights(variant, bits):
    weight = layer(variant=variant, weight_bits=bits).effective_weight().detach()
    plain = layer(variant="ps", weight_bits=bits).effective_weight().detach()
    assert torch.equal(weight, plain)
    powers = weight.abs().log2()
    assert torch.equal(powers, powers.round())
    assert float(powers.min()) >= -(2 ** (bits - 1) - 2)
    assert float(powers.max()) <= 0


def test_gradients_are_deepshift_s_and_not_the_product_s():
    made = layer()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        made.shift.add_(torch.randn(made.shift.shape, generator=g))
        made.shift[0, 0], made.shift[0, 1], made.sign[1, 1] = 2.0, -20.0, 0.2
    x = torch.randn(7, 10, generator=g)
    out = made(x)
    upstream = torch.randn(out.shape, generator=g)
    out.backward(upstream)
    weight_gradient = upstream.T @ shiftadd.fixed_point(x)
    p = made.shift.detach().round().clamp(-14, 0)
    sign = made.sign.detach().round().sign()
    assert torch.allclose(made.shift.grad, weight_gradient * sign * 2.0**p * math.log(2), atol=1e-6)
    assert torch.allclose(made.sign.grad, weight_gradient, atol=1e-6)
    # What autograd would make of sign * 2**P is another one: it leaves nothing at clamped shifts.
    shift, signs = p.clone().requires_grad_(), sign.clone().requires_grad_()
    (functional.linear(shiftadd.fixed_point(x), signs * 2.0**shift) * upstream).sum().backward()
    assert not torch.allclose(made.sign.grad, signs.grad, atol=1e-3)
    assert torch.allclose(made.bias.grad, upstream.sum(0), atol=1e-6)


def test_the_rounded_weight_lets_its_gradient_through():
    made = layer(variant="q")
    x = torch.randn(5, 10)
    made(x).sum().backward()
    assert torch.allclose(made.weight.grad, shiftadd.fixed_point(x).sum(0).expand(6, 10), atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.floats(-5e4, 5e4, width=32), st.integers(1, 30))
def test_fixed_point_numbers_are_rounded_down_and_saturate(value, frac):
    found = float(shiftadd.fixed_point(torch.tensor([value]), frac))
    limit = 2.0 ** (31 - frac)
    expected = min(max(math.floor(value * 2.0**frac) / 2.0**frac, -limit), limit - 1)
    # 2**31 - 1 and its like have more bits than float32.
    assert found == float(torch.tensor(expected))


def test_fixed_point_passes_its_gradient_and_leaves_the_input():
    x = torch.tensor([0.3, 1e9, -1e9], requires_grad=True)
    before = x.detach().clone()
    shiftadd.fixed_point(x).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(x.detach(), before)


def test_inputs_and_biases_are_never_changed():
    made = layer()
    x, bias = torch.randn(3, 10) * 1e5, made.bias.detach().clone()
    kept = x.clone()
    made(x)
    assert torch.equal(x, kept)
    assert torch.equal(made.bias, bias)


def test_saturation_is_counted_and_refused_where_strict():
    made = layer()
    made(torch.tensor([[1e6, -1e6, 32767.0, *[0.0] * 7]]))
    assert int(made.saturated) == 2
    assert shiftadd.saturations(nn.Sequential(made)) == {"0": 2}
    with pytest.raises(RetensorError, match=r"2 inputs .* beyond"):
        layer(strict=True)(torch.tensor([[1e6, -1e6, *[0.0] * 8]]))
    # The packed layer saturates to the same numbers.
    packed = shiftadd.PackedShiftLinear.from_shift(made).eval()
    x = torch.tensor([[1e6, -1e6, 3e9, *[0.0] * 7]])
    assert torch.allclose(packed(x), made(x), rtol=1e-5)
    assert shiftadd.saturations(nn.Sequential(packed)) == {"0": 3}


def test_frozen_layers_stay_strict(tmp_path):
    made = layer(strict=True)
    packed = shiftadd.PackedShiftLinear.from_shift(made).eval()
    rt.save(packed, tmp_path / "packed.safetensors")
    for kept in (packed, rt.load(tmp_path / "packed.safetensors").eval()):
        assert int(kept.saturated) == 0
        with pytest.raises(RetensorError, match=r"1 inputs .* beyond"):
            kept(torch.tensor([[1e6, *[0.0] * 9]]))


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
@pytest.mark.parametrize("scale", [False, True])
def test_packed_weights_are_the_same_and_outputs_low_by_rounding_alone(bits, scale):
    made = layer(33, 70, weight_bits=bits, scale=scale)
    packed = shiftadd.PackedShiftLinear.from_shift(made).eval()
    assert torch.equal(packed.weight, made.effective_weight())
    assert packed.codes.numel() == packed_bytes(33 * 70, bits)
    x = torch.randn(4, 9, 70)
    apart = (made(x) - packed(x)).detach().abs().max()
    # One unit of the fixed point a term, and the float sum's own roundings.
    assert float(apart) <= (70 * 2.0**-16 * 2.0**made.exponent) + 1e-5


def test_five_bits_are_less_than_a_sixth_of_float():
    packed = shiftadd.PackedShiftLinear.from_shift(layer(256, 64))
    assert packed.codes.numel() / (4 * 256 * 64) == 5 / 32 <= 0.17


def test_layers_fold_copy_save_and_load(tmp_path):
    made = layer(weight_bits=4, variant="q", scale=True)
    x = torch.randn(3, 10)
    expected = made(x)
    plain = rt.fold(made)
    assert isinstance(plain, nn.Linear)
    assert torch.allclose(plain(x), expected, atol=10 * 2.0**-16)
    rt.save(made, tmp_path / "layer.safetensors")
    again = rt.load(tmp_path / "layer.safetensors")
    assert torch.equal(again(x), expected)
    assert torch.equal(copy.deepcopy(made)(x), expected)
    other = layer(seed=5, weight_bits=4, variant="q")
    other.load_state_dict(made.state_dict())
    packed = shiftadd.PackedShiftLinear.from_shift(made).eval()
    rt.save(packed, tmp_path / "packed.safetensors")
    assert torch.equal(rt.load(tmp_path / "packed.safetensors").eval()(x), packed(x))
    assert torch.equal(rt.fold(packed).weight, packed.weight)


def test_half_precision_layers_run():
    made = shiftadd.ShiftLinear.from_linear(nn.Linear(8, 4).to(torch.bfloat16))
    assert made(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    packed = shiftadd.PackedShiftLinear.from_shift(made).eval()
    assert packed(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_frozen_layers_refuse_to_be_trained():
    with pytest.raises(RetensorError, match="eval mode only"):
        shiftadd.PackedShiftLinear.from_shift(layer())(torch.zeros(1, 10))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"weight_bits": 7}, "from 2 to 6"),
        ({"weight_bits": 5.0}, "weight_bits"),
        ({"act_frac_bits": 0}, "act_frac_bits"),
        ({"variant": "r"}, "variant"),
    ],
)
def test_settings_out_of_range_are_named(settings, told):
    with pytest.raises(ValueError, match=told):
        layer(**settings)
    with pytest.raises(TypeError, match="True or False"):
        layer(strict=1)


def test_what_is_no_linear_layer_is_refused():
    with pytest.raises(TypeError, match=r"nn\.Linear"):
        shiftadd.ShiftLinear.from_linear(nn.Conv2d(1, 1, 1))
    plain = nn.Linear(2, 2)
    plain.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        shiftadd.ShiftLinear.from_linear(plain)
