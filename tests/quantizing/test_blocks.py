"""Blocks against torchao's microscaling and NVFP4 tensors, and by their definition."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retensor.quantizing import GRIDS, Blocks, integers


def draws(shape: tuple[int, ...] = (64, 256), spread: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Normal numbers whose rows are of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (torch.randn(*shape[:-1], 1, generator=generator) * spread).exp()
    return torch.randn(shape, generator=generator) * sizes


def mx(x: torch.Tensor, mode: str) -> torch.Tensor:
    tensors: Any = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    calculation = getattr(tensors.ScaleCalculationMode, mode)
    return tensors.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, calculation).dequantize(torch.float32)


@pytest.mark.parametrize(("rule", "mode"), [("floor", "FLOOR"), ("ceil", "RCEIL"), ("even", "EVEN")])
def test_microscaling_is_that_of_torchao(rule: str, mode: str) -> None:
    for seed in range(3):
        x = draws(seed=seed)
        x[0, :32] = 0
        # Largest numbers just beside powers of two, where logarithms in floating point err.
        x[1, :32] = torch.linspace(-1, 1, 32)
        x[2, :32] = torch.linspace(-1, 1, 32) * (2 - 2**-22)
        x[3, :32] = torch.linspace(-1, 1, 32) * 1.75
        x[4, :32] = torch.linspace(-1, 1, 32) * 6
        assert torch.equal(Blocks("e2m1", "e8m0", 32, rule=rule).encode(x).decode(), mx(x, mode))  # type: ignore[arg-type]


@pytest.mark.parametrize("scaled", [False, True])
def test_nvfp4_is_that_of_torchao(scaled: bool) -> None:
    tensors: Any = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = draws(spread=1.0)
    ours = Blocks("e2m1", "e4m3", 16, tensor_scale=scaled).encode(x)
    scale = tensors.per_tensor_amax_to_scale(x.abs().amax()) if scaled else None
    theirs = tensors.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    assert torch.equal(ours.decode(), theirs)


FORMATS = [
    Blocks("e2m1", "e8m0", 32, rule="ceil"), Blocks("e2m1", "ue5m3", 16, tensor_scale=True), Blocks("e3m2", "e4m3", 8),
    Blocks(integers(4, signed=True), "e4m3", 16),
]  # fmt: skip


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), dim=st.integers(-1, 0), length=st.integers(1, 70),
    seed=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=25)
def test_any_shape_and_axis_comes_back_and_codes_are_their_own(
    format_: Blocks, shape: list[int], dim: int, length: int, seed: int
) -> None:
    shape[dim] = length
    x = draws(tuple(shape), 1.0, seed)
    kept = format_.encode(x, dim)
    y = kept.decode()
    assert y.shape == x.shape
    blocks = -(-length // format_.size)
    assert kept.scales.numel() == x.numel() // length * blocks
    assert kept.nbytes == -(-kept.codes.numel() * format_.element.bits // 8) + kept.scales.numel() + 4 * (
        format_.tensor_scale
    )
    # Each block's worst error: half of the widest step of the elements, or what was cut off by a scale that rounded
    # down, times the scale.
    element = sorted(v for v in format_.element.values if math.isfinite(v))
    widest = max(b - a for a, b in itertools.pairwise(element))
    most = x.abs().amax()
    # Scales below the normal ones of their format are off by half of its least step.
    off = 2**-10 * format_.element.largest if format_.scale.name == "e4m3" and not format_.tensor_scale else 0.0
    assert float((x - y).abs().max()) <= float(most) / format_.element.largest * widest * 0.75 + off + 1e-12


def test_a_tensor_scale_brings_the_largest_scale_to_the_top() -> None:
    x = draws(spread=1.0) * 1e-7
    kept = Blocks("e2m1", "e4m3", 16, tensor_scale=True).encode(x)
    assert float(GRIDS["e4m3"].decode(kept.scales).max()) == 448
    lost = Blocks("e2m1", "e4m3", 16).encode(x)
    assert not lost.decode().any()
    assert float((kept.decode() - x).norm() / x.norm()) < 0.15


def test_zeros_and_bad_numbers_stay_in_their_block() -> None:
    for format_ in (Blocks("e2m1", "e8m0", 32, rule="floor"), Blocks("e2m1", "ue5m3", 16, tensor_scale=True)):
        x = draws((2, 64), 0.5)
        x[0, :32] = 0
        x[1, 3] = math.nan
        x[1, 40] = math.inf
        y = format_.encode(x).decode()
        assert not y[0, :32].any()
        good = torch.isfinite(y)
        size = format_.size
        assert not good[1, :size].any()
        assert not good[1, 40 // size * size : (40 // size + 1) * size].any()
        assert int((~good).sum()) == 2 * size
    assert not Blocks("e2m1", "e4m3", 16, tensor_scale=True).encode(torch.zeros(3, 20)).decode().any()
    for shape in ((0, 5), (5, 0)):
        assert Blocks().encode(torch.zeros(shape)).decode().shape == shape
        assert Blocks(tensor_scale=True).round(torch.zeros(shape)).shape == shape


def test_bad_arguments_are_named() -> None:
    for make, said in (
        (lambda: Blocks("e9m9"), "element format is 'e9m9'; formats are e2m1"),
        (lambda: Blocks("e2m1", "e4m3", 0), "at least one number, not 0"),
        (lambda: Blocks("e2m1", "e4m3", rule="floor"), "'floor' is for scales that are powers of two"),
        (lambda: Blocks("e2m1", "e4m3", rule="up"), "rule is 'up'"),  # type: ignore[arg-type]
        (lambda: Blocks().encode(torch.ones(3), 1), r"axis 1 of a tensor of shape \[3\]"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(TypeError, match="floating point"):
        Blocks().encode(torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize(
    "format_",
    [
        *FORMATS, Blocks("e2m1", "e8m0", 32, rule="floor"), Blocks("e2m1", "e8m0", 32, rule="even"),
        Blocks("e2m1", "e8m0"), Blocks("e2m1", "float32", 16), Blocks("e2m3", "bfloat16", 4),
        Blocks("e4m3", "e5m2", 16), Blocks("e5m2", "e4m3", 16),
        Blocks("e2m1", "e4m3", 16, tensor_scale=True, tensor_power=True),
    ],
    ids=str,
)  # fmt: skip
@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3), dim=st.integers(-1, 2), seed=st.integers(0, 5),
    spread=st.sampled_from([1.0, 12.0]), rounding=st.sampled_from(["nearest", "stochastic"]),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_rounding_without_codes_is_encoding_and_decoding(
    format_: Blocks, shape: list[int], dim: int, seed: int, spread: float, rounding: Any
) -> None:
    x = draws(tuple(shape), spread, seed)
    x.view(-1)[::7] = 0
    if seed == 5:
        x.view(-1)[0] = math.nan
        x.view(-1)[-1] = math.inf
    dim = min(dim, len(shape) - 1)
    before = x.clone()
    codes = format_.encode(x, dim, rounding, torch.Generator().manual_seed(seed)).decode()
    values = format_.round(x, dim, rounding, torch.Generator().manual_seed(seed))
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    assert torch.equal(values.isnan(), codes.isnan())
    assert torch.equal(values.nan_to_num(), codes.nan_to_num())
    assert format_.round(x.to(torch.bfloat16), dim).dtype == torch.bfloat16


def test_scales_of_torchs_types_are_kept_whole() -> None:
    x = draws(spread=1.0)
    blocks = x.view(64, 16, 16)
    ideal = Blocks("e2m1", "float32", 16)
    kept = ideal.encode(x)
    assert torch.equal(kept.scales, blocks.abs().amax(-1) / 6)
    # The largest of each block is kept within rounding.
    assert torch.allclose(kept.decode().view_as(blocks).abs().amax(-1), blocks.abs().amax(-1), rtol=2**-22)
    assert kept.nbytes == x.numel() // 2 + x.numel() // 16 * 4
    assert Blocks("e2m1", "bfloat16", 16).encode(x).nbytes == x.numel() // 2 + x.numel() // 16 * 2
    for scale in ("float32", "bfloat16", "e8m0"):
        with pytest.raises(ValueError, match=f"scales of {scale} have all the range"):
            Blocks("e2m1", scale, tensor_scale=True)
    with pytest.raises(ValueError, match="tensor_scale=True"):
        Blocks("e2m1", "e4m3", tensor_power=True)
    with pytest.raises(ValueError, match=r"scale format is 'e9m9'; formats are .*e8m0, float32, bfloat16"):
        Blocks("e2m1", "e9m9")


@given(exponent=st.integers(-30, 30), mantissa=st.floats(1, 2, exclude_max=True))
def test_a_tensor_scale_that_is_a_power_of_two_is_the_next_above(exponent: int, mantissa: float) -> None:
    x = torch.tensor([[mantissa * 2.0**exponent] + [0.0] * 15])
    plain = Blocks("e2m1", "ue5m3", 16, tensor_scale=True).encode(x).tensor_scale
    power = Blocks("e2m1", "ue5m3", 16, tensor_scale=True, tensor_power=True).encode(x).tensor_scale
    assert math.frexp(float(power))[0] == 0.5
    assert float(plain) <= float(power) < 2 * float(plain)
