"""FP4 formats and quantisers: against public types bit for bit, their error on known numbers, and chance."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import Domain, FormatInfo, decode_float
from hypothesis import given, settings
from hypothesis import strategies as st

from retensor.compression import fp4
from retensor.quantizing import GRIDS, pack

IDEAL = fp4.Format(scale="float32")
E4M3 = fp4.Format(scale="e4m3")
UE5M3 = fp4.Format(scale="ue5m3")
E4M3_TS = fp4.NVFP4
CEIL, FLOOR = fp4.Format(scale="e8m0"), fp4.Format(scale="e8m0", rule="floor")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sqnr(x: torch.Tensor, format: fp4.Format) -> float:
    return float(10 * torch.log10(x.square().sum() / (fp4.quantize(x, format) - x).square().sum()))


def test_every_code_of_ue5m3_is_that_of_gfloat() -> None:
    info = FormatInfo(
        "ue5m3", 8, 4, bias=15, is_signed=False, domain=Domain.Finite, has_nz=False, num_high_nans=1,
        has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip
    theirs = [decode_float(info, code).fval for code in range(256)]
    ours = list(GRIDS["ue5m3"].values)
    assert ours[:255] == theirs[:255]
    assert math.isnan(ours[255])
    assert math.isnan(theirs[255])
    assert (max(ours[:255]), ours[1], ours[8]) == (114688.0, 7.62939453125e-6, 2.0**-14)


def test_elements_are_those_of_ml_dtypes() -> None:
    x = normal(10_000) * 3
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    # With a largest number of 6 in each block, every scale is 1.
    blocks = torch.cat([x.clamp(-6, 6).view(-1, 8), torch.full((1250, 8), 6.0)], 1)
    assert torch.equal(fp4.quantize(blocks, UE5M3)[:, :8].flatten(), torch.from_numpy(theirs).clamp(-6, 6))


@pytest.mark.parametrize("mode", ["floor", "ceil", "even", "e4m3", "e4m3+ts"])
def test_microscaling_and_nvfp4_are_those_of_torchao(mode: str) -> None:
    x = normal(64, 256)
    if mode.startswith("e4m3"):
        tensors: Any = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
        scale = tensors.per_tensor_amax_to_scale(x.abs().amax()) if mode.endswith("ts") else None
        theirs = tensors.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
        format = fp4.NVFP4 if mode.endswith("ts") else E4M3
    else:
        tensors = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
        calculation = getattr(tensors.ScaleCalculationMode, {"ceil": "RCEIL"}.get(mode, mode.upper()))
        theirs = tensors.MXTensor.to_mx(x, torch.float4_e2m1fn_x2, 32, calculation).dequantize(torch.float32)
        format = fp4.Format(scale="e8m0", block=32, rule=mode)  # type: ignore[arg-type]
    assert float((fp4.quantize(x, format) - theirs).abs().max()) == 0.0
    assert torch.equal(fp4.encode(x, format).decode(), theirs)


FORMATS = [
    fp4.MXFP4, fp4.NVFP4, fp4.UE5M3, CEIL, IDEAL, fp4.Format(scale="bfloat16", block=8),
    fp4.Format(scale="ue5m3", tensor_scale="power"),
]  # fmt: skip


@pytest.mark.parametrize("format", FORMATS, ids=str)
@given(rows=st.integers(1, 5), length=st.integers(1, 70), dim=st.integers(0, 1), seed=st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_quantising_is_encoding_and_decoding_at_any_shape(
    format: fp4.Format, rows: int, length: int, dim: int, seed: int
) -> None:
    x = normal(*((length, rows) if dim == 0 else (rows, length)), seed=seed)
    kept = fp4.encode(x, format, dim)
    y = fp4.quantize(x, format, dim)
    assert torch.equal(kept.decode(), y)
    padded = -(-length // format.block) * format.block * rows
    assert kept.nbytes == -(-padded // 2) + padded // format.block * format.blocks.scale.bits // 8 + 4 * bool(
        format.tensor_scale
    )
    assert len(pack(kept.codes, 4)) == -(-padded // 2)


@pytest.mark.parametrize("format", [CEIL, FLOOR, fp4.MXFP4, IDEAL, E4M3, UE5M3, E4M3_TS, fp4.UE5M3], ids=str)
def test_what_was_encoded_encodes_to_the_same(format: fp4.Format) -> None:
    kept = fp4.encode(normal(64, 256), format)
    again = fp4.encode(kept.decode(), format)
    assert torch.equal(again.decode(), kept.decode())
    if format.rule != "ceil":
        # There the largest code may be 3, and is 6 of half the scale.
        assert torch.equal(again.codes, kept.codes)
        assert torch.equal(again.scales, kept.scales)


def test_signal_to_noise_by_scale_format() -> None:
    # Normal numbers: ideal 20.5, formats of 3 mantissa bits 0.1 less, powers of two 1.5 and 1.9 less.
    x = normal(4096, 256)
    found = {name: sqnr(x, format) for name, format in
             {"ideal": IDEAL, "e4m3": E4M3, "ue5m3": UE5M3, "ceil": CEIL, "floor": FLOOR}.items()}  # fmt: skip
    assert found["ideal"] == pytest.approx(20.5, abs=0.06)
    assert found["e4m3"] == pytest.approx(20.4, abs=0.06)
    assert found["ue5m3"] == pytest.approx(20.4, abs=0.06)
    assert found["ceil"] == pytest.approx(18.95, abs=0.06)
    assert found["floor"] == pytest.approx(18.6, abs=0.06)


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails_suit_precise_scales_and_a_rotation_gives_that_away(seed: int) -> None:
    # By the largest few of a million numbers, the ratio differs from draw to draw: 21.0 to 21.6 for ideal scales.
    heavy = torch.from_numpy(np.random.default_rng(seed).standard_t(3, (4096, 256))).float()
    found = [sqnr(heavy, format) for format in (IDEAL, UE5M3, E4M3, CEIL, FLOOR)]
    assert found == pytest.approx([21.1, 20.9, 20.9, 17.6, 17.5], abs=0.2)
    # Rotated they are nearly normal: worse for elements whose steps grow, better for scales of one bit.
    turned = fp4.rotate(heavy, 256, seed=seed)
    assert [sqnr(turned, format) for format in (UE5M3, CEIL)] == pytest.approx([20.4, 18.95], abs=0.15)


def test_range_decides_which_blocks_are_lost() -> None:
    sizes = (4 * normal(20_000, 1)).exp() * 1e-6
    x = normal(20_000, 16, seed=1) * sizes

    def lost(scale: str, tensor_scale: bool = False) -> float:
        format = fp4.Format(scale=scale, tensor_scale=tensor_scale)
        return float((fp4.quantize(x, format) == 0).all(1).float().mean())

    assert lost("e8m0") == 0
    # Of 20,000 blocks, a third of a point either way. With a scale of the tensor, the largest block moves it.
    assert lost("e4m3") == pytest.approx(0.97, abs=0.01)
    assert lost("ue5m3") == pytest.approx(0.73, abs=0.01)
    assert lost("e4m3", True) == pytest.approx(0.78, abs=0.12)
    assert lost("ue5m3", True) == pytest.approx(0.025, abs=0.025)


def test_stochastic_rounding_is_right_in_the_mean_and_follows_its_generator() -> None:
    x = torch.full((100_000, 2), 2.3)
    x[:, 1] = 6.0
    format = fp4.Format(scale="e8m0", block=2)
    assert bool((fp4.quantize(x, format)[:, 0] == 2).all())
    draws = fp4.quantize(x, format, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    # 2 or 3: the mean's standard error is 0.46 / sqrt(1e5).
    assert set(draws[:, 0].unique().tolist()) == {2.0, 3.0}
    assert float(draws[:, 0].mean()) == pytest.approx(2.3, abs=5 * 0.46 / 100_000**0.5)
    assert bool((draws[:, 1] == 6).all())
    again = fp4.quantize(x, format, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, again)
    state = torch.random.get_rng_state()
    fp4.quantize(x, format, rounding="stochastic", generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_zeros_bad_numbers_and_tiny_ones_stay_in_their_block() -> None:
    x = normal(2, 64)
    x[0, :16] = 0
    x[1, 3] = math.nan
    x[1, 40] = math.inf
    for format in (fp4.Format(scale=scale) for scale in fp4.format.SCALES):
        y = fp4.quantize(x, format)
        assert not y[0].isnan().any()
        assert not y[0, :16].any()
        assert y[1, :16].isnan().all()
        assert y[1, 32:48].isnan().all()
        assert not y[1, 16:32].isnan().any()
    assert not fp4.quantize(torch.zeros(3, 16), fp4.UE5M3).any()
    assert not fp4.quantize(torch.full((1, 16), 1e-9), UE5M3).any()
    tiny = torch.full((1, 16), 1e-42)
    assert torch.isfinite(fp4.quantize(tiny, fp4.UE5M3)).all()
    with pytest.raises(ValueError, match=r"shape \[2, 64\] holds NaN or infinity"):
        fp4.quantize(x, fp4.Format(nonfinite="raise"))


def test_types_of_16_bits_are_quantised_in_float32() -> None:
    x = normal(8, 64)
    for kind in (torch.bfloat16, torch.float16, torch.float64):
        y = fp4.quantize(x.to(kind), UE5M3)
        assert y.dtype == kind
        assert torch.equal(y, fp4.quantize(x.to(kind).float(), UE5M3).to(kind))


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: fp4.Format(element="e9m9"), ValueError, "element format is 'e9m9'; formats are e2m1"),
        (lambda: fp4.Format(element="e8m0"), ValueError, "element format is 'e8m0'"),
        (lambda: fp4.Format(scale="fp8"), ValueError, "scale format is 'fp8'; formats are .*ue5m3.*float32"),
        (lambda: fp4.Format(scale="e2m3"), ValueError, "scale format is 'e2m3'; formats are e4m3, e5m2"),
        (lambda: fp4.Format(block=0), ValueError, "at least one number, not 0"),
        (lambda: fp4.Format(scale="e8m0", tensor_scale=True), ValueError, "e8m0 have all the range"),
        (lambda: fp4.Format(tensor_scale="two"), ValueError, "True, False or 'power'"),  # type: ignore[arg-type]
        (lambda: fp4.Format(rule="floor"), ValueError, "for scales that are powers of two"),
        (lambda: fp4.Format(strict=1), TypeError, "strict is True or False"),  # type: ignore[arg-type]
        (lambda: fp4.Format(nonfinite="drop"), ValueError, "'propagate' or 'raise'"),  # type: ignore[arg-type]
        (lambda: fp4.Format.from_dict({"size": 3}), ValueError, "no part 'size'"),
        (lambda: fp4.quantize(torch.ones(2, 20), fp4.Format(strict=True)), ValueError, "20 numbers is no multiple"),
        (lambda: fp4.quantize(torch.ones(2), "e2m1"), TypeError, "to a Format, not to 'e2m1'"),  # type: ignore[arg-type]
        (lambda: fp4.quantize(torch.ones(2).int(), UE5M3), TypeError, "floating point is quantised"),
        (lambda: fp4.quantize(torch.ones(2), UE5M3, 1), ValueError, "axis 1 of a tensor"),
        (lambda: fp4.quantize(torch.ones(2), UE5M3, rounding="up"), ValueError, "rounding is 'up'"),  # type: ignore[arg-type]
        (lambda: fp4.quantize(torch.ones(2), UE5M3, q_grad="x"), ValueError, "q_grad is 'x'"),  # type: ignore[arg-type]
        (lambda: fp4.quantize(torch.ones(2), UE5M3, scale_grad="x"), ValueError, "one of none, ste, relaxed"),  # type: ignore[arg-type]
        (lambda: fp4.encode(torch.ones(2, 20), fp4.Format(strict=True)), ValueError, "no multiple"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(make: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        make()


def test_formats_come_back_from_json() -> None:
    import json

    for format in FORMATS:
        assert fp4.Format.from_dict(json.loads(json.dumps(format.as_dict()))) == format
    assert fp4.Format(block=16).bits_per_element() == 4.5
    assert fp4.NVFP4.bits_per_element(64) == 5.0
