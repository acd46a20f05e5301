"""MatAdd and MatShift against the products that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retensor.compression import shiftadd
from retensor.compression.shiftadd import kernels
from retensor.quantizing import pack, powers_of_two

SIZES = st.integers(1, 40)
# A sum of n float32 numbers in any order is off by at most n roundings of the sum of their sizes.
EPSILON = 2.0**-24


def bits(rows: int, columns: int, density: float, seed: int) -> torch.Tensor:
    return torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=40, deadline=None)
@given(SIZES, SIZES, SIZES, st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.integers(0, 99))
def test_masked_sums_equal_the_product(rows, columns, width, density, transposed, seed):
    b = bits(rows, columns, density, seed)
    matrix = (b.mT if transposed else b).double()
    v = torch.randn(2, matrix.shape[-1], width, generator=torch.Generator().manual_seed(seed))
    out = shiftadd.mat_add(b, v, transposed=transposed)
    assert out.dtype == v.dtype
    bound = 2 * matrix.shape[-1] * EPSILON * (matrix @ v.double().abs())
    assert bool(((out.double() - matrix @ v.double()).abs() <= bound).all())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "columns", "width"), [(3136, 32, 16), (196, 64, 64), (16, 12, 12), (1, 1, 1)])
def test_masked_sums_of_attention_s_sizes(rows, columns, width, transposed):
    b = bits(rows, columns, 0.5, 0)
    v = torch.randn(2, rows if transposed else columns, width)
    exact = (b.mT if transposed else b).double() @ v.double()
    out = shiftadd.mat_add(b, v, transposed=transposed)
    assert torch.linalg.norm(out - exact) <= 1e-5 * torch.linalg.norm(exact)


@pytest.mark.parametrize("transposed", [False, True])
def test_whole_numbers_are_summed_exactly_in_every_type(transposed):
    b = bits(50, 50, 0.5, 3)
    matrix = (b.mT if transposed else b).long()
    for dtype in (torch.int32, torch.int64, torch.float64, torch.float32, torch.bfloat16):
        v = torch.randint(-2, 3, (2, 50, 5)).to(dtype)
        out = shiftadd.mat_add(b.to(torch.int8), v, transposed=transposed)
        assert out.dtype == dtype
        assert torch.equal(out.long(), matrix @ v.long())


def test_masks_of_nothing_and_of_all_are_exact():
    v = torch.randn(9, 4)
    assert torch.equal(shiftadd.mat_add(torch.zeros(3, 9, dtype=torch.bool), v), torch.zeros(3, 4))
    alike = shiftadd.mat_add(torch.ones(3, 9, dtype=torch.bool), v)
    assert torch.allclose(alike, v.sum(0).expand(3, 4), rtol=0, atol=9 * EPSILON * float(v.abs().sum(0).max()))


def test_leading_dimensions_broadcast():
    b, v = bits(5, 7, 0.5, 0), torch.randn(3, 1, 7, 2)
    assert torch.allclose(shiftadd.mat_add(b, v), b.float() @ v, atol=1e-6)


def test_the_gradient_of_masked_sums_is_the_transposed_one():
    b = bits(6, 9, 0.5, 1)
    v = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: shiftadd.mat_add(b, v), (v,))


def test_packed_rows_hold_the_bits_lowest_first():
    b = bits(5, 13, 0.5, 2)
    packed = shiftadd.pack_rows(b)
    assert packed.shape == (2, 5, 2)
    back = torch.from_numpy(np.unpackbits(packed.numpy(), axis=-1, count=13, bitorder="little")).bool()
    assert torch.equal(back, b)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 150), SIZES, st.sampled_from([torch.int32, torch.int64]), st.integers(0, 99))
def test_shifted_sums_are_exact_in_64_bits(rows, inputs, outputs, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(-(2**31), 2**31, (rows, inputs), generator=g).to(dtype)
    shift = -torch.randint(0, 31, (outputs, inputs), generator=g)
    sign = torch.randint(-1, 2, (outputs, inputs), generator=g)
    exact = (sign * (x[:, None].long() >> -shift)).sum(-1)
    found = shiftadd.mat_shift(x, shift, sign)
    assert found.dtype == torch.int64
    assert torch.equal(found, exact)


def test_sums_that_leave_32_bits_are_added_in_64():
    inputs = 100
    x = torch.full((3, inputs), 2**31 - 1, dtype=torch.int32)
    found = shiftadd.mat_shift(x, torch.zeros(2, inputs), torch.tensor([[1], [-1]]).expand(2, inputs))
    assert found.tolist() == [[inputs * (2**31 - 1), -inputs * (2**31 - 1)]] * 3


@pytest.mark.parametrize("frac", [3, 8, 16])
@pytest.mark.parametrize("tokens", [1, 15, 33, 128, 131])
def test_layers_add_in_few_bits_what_fits_and_never_more(frac, tokens):
    """Small inputs are added in 16 bits, large ones in 32 and 64; tokens in blocks of 16 and of more."""
    g = torch.Generator().manual_seed(frac + tokens)
    weight = torch.randn(37, 50, generator=g) / 4
    codes = pack(powers_of_two(5).encode(weight), 5)
    weight = powers_of_two(5).decode(powers_of_two(5).encode(weight))
    shift = torch.where(weight == 0, 0, weight.abs().log2()).long()
    for size in (0.05, 1.0, 30.0, 2e4):
        x = size * torch.randn(tokens, 50, generator=g)
        whole = (x.double() * 2**frac).floor().clamp(-(2.0**31), 2.0**31 - 2**frac).long()
        exact = shiftadd.mat_shift(whole, shift, weight.sign().long()).double() * 2.0**-frac
        found = shiftadd.shift_linear(x, codes, None, 37, 5, frac)
        assert torch.allclose(found.double(), exact, rtol=2 * EPSILON, atol=0)


def test_inputs_beyond_the_range_saturate_at_every_point():
    codes = pack(powers_of_two(5).encode(torch.ones(1, 1)), 5)
    for frac in (1, 4, 8, 16, 30):
        x = torch.tensor([[3e38], [-3e38], [float("inf")], [float("-inf")]])
        found = shiftadd.shift_linear(x, codes, None, 1, 5, frac)[:, 0].double()
        most = torch.tensor(2.0 ** (31 - frac) - 1).double()
        assert found.tolist() == [most, -(2.0 ** (31 - frac)), most, -(2.0 ** (31 - frac))]


def test_numbers_of_every_whole_type_are_shifted():
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint32):
        x = torch.tensor([[100, 7]]).to(dtype)
        assert shiftadd.mat_shift(x, torch.tensor([[-1, 0]]), torch.tensor([[1, -1]])).tolist() == [[43]]
    large = torch.tensor([[2**32 - 1]]).to(torch.uint32)
    assert shiftadd.mat_shift(large, torch.tensor([[-4]]), torch.tensor([[1]])).tolist() == [[2**28 - 1]]


def test_a_right_shift_is_low_by_less_than_one_unit_a_term():
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(64, 48, generator=g) * 2**16).floor().long()
    shift, sign = -torch.randint(0, 15, (32, 48), generator=g), torch.ones(32, 48, dtype=torch.int64)
    exact = x.double() @ (sign * 2.0**shift).double().T
    low = exact - shiftadd.mat_shift(x, shift, sign)
    assert float(low.min()) >= 0
    assert float(low.max()) < 48
    # The mean of the bias: (1 - 2**-s) / 2 a term.
    expected = float(((1 - 2.0**shift) / 2).sum(1).mean())
    assert float(low.mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("bits_", [2, 3, 5, 6])
@pytest.mark.parametrize("exponent", [0, -3])
def test_packed_layers_are_the_exact_sum_of_shifts(bits_, exponent):
    g = torch.Generator().manual_seed(1)
    grid = powers_of_two(bits_)
    codes = torch.randint(0, 2**bits_ - 1, (24, 70), generator=g).to(torch.uint8)
    weight = grid.decode(codes)
    x, bias = torch.randn(3, 5, 70, generator=g), torch.randn(24, generator=g)
    found = shiftadd.shift_linear(x, pack(codes, bits_), bias, 24, bits_, 16, exponent)
    whole = (x * 2**16).floor().long()
    shift = torch.where(weight == 0, 0, weight.abs().log2()).long()
    exact = shiftadd.mat_shift(whole, shift, weight.sign().long()).double() * 2.0 ** (exponent - 16) + bias
    assert torch.allclose(found.double(), exact, rtol=4 * EPSILON, atol=4 * EPSILON)


def test_more_threads_give_the_same_bits(monkeypatch):
    x, w = torch.randn(100, 64), torch.randn(32, 64)
    codes = pack(powers_of_two(5).encode(w), 5)
    b, v = bits(30, 20, 0.5, 0), torch.randn(2, 20, 16)
    one = shiftadd.shift_linear(x, codes, None, 32), shiftadd.mat_add(b, v)
    before = torch.get_num_threads()
    monkeypatch.setattr(kernels, "WORK", 1)
    try:
        torch.set_num_threads(3)
        more = shiftadd.shift_linear(x, codes, None, 32), shiftadd.mat_add(b, v)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


def test_no_token_and_one_token_come_out():
    codes = pack(powers_of_two(5).encode(torch.randn(4, 8)), 5)
    assert shiftadd.shift_linear(torch.zeros(0, 8), codes, None, 4).shape == (0, 4)
    assert shiftadd.shift_linear(torch.zeros(8), codes, None, 4).tolist() == [0.0] * 4
    assert shiftadd.mat_shift(torch.zeros(0, 8, dtype=torch.int32), torch.zeros(4, 8), torch.ones(4, 8)).shape == (0, 4)


def test_what_does_not_fit_is_refused_by_name():
    b, v = torch.ones(2, 3, dtype=torch.bool), torch.ones(3, 1)
    with pytest.raises(TypeError, match="bool or a whole type"):
        shiftadd.mat_add(b.float(), v)
    with pytest.raises(TypeError, match="real numbers"):
        shiftadd.mat_add(b, v.bool())
    with pytest.raises(ValueError, match="do not multiply"):
        shiftadd.mat_add(b, v, transposed=True)
    with pytest.raises(ValueError, match="0 or 1"):
        shiftadd.mat_add(2 * b.int(), v)
    x, p, s = torch.ones(1, 3, dtype=torch.int32), torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(TypeError, match="fixed-point"):
        shiftadd.mat_shift(x.float(), p, s)
    with pytest.raises(ValueError, match="do not fit"):
        shiftadd.mat_shift(x, p.T, s)
    with pytest.raises(ValueError, match="between -30 and 0"):
        shiftadd.mat_shift(x, p + 1, s)
    with pytest.raises(ValueError, match="whole numbers"):
        shiftadd.mat_shift(x, p - 0.5, s)
    with pytest.raises(ValueError, match="sign"):
        shiftadd.mat_shift(x, p, 2 * s)
    with pytest.raises(ValueError, match="leave 64 bits"):
        shiftadd.mat_shift(torch.full((1, 3), 2**62), p, s)
    with pytest.raises(ValueError, match="not a number"):
        shiftadd.shift_linear(torch.tensor([[float("nan")]]), pack(torch.zeros(1, dtype=torch.uint8), 5), None, 1)
