"""Numbers, steps and settings that would quietly give something else are refused; small ones keep their precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from retensor.quantizing import (
    GRIDS,
    ActivationQuantizer,
    Affine,
    Blocks,
    Grid,
    codebook,
    floating,
    integers,
    powers_of_two,
    rounded,
    unpack,
)

SQUARE = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", [1e30, 1e-7, 1e-9, 1e-30])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", [None, 2.4])
def test_the_error_does_not_depend_on_the_size_of_numbers(size: float, symmetric: bool, search: float | None) -> None:
    x = SQUARE / SQUARE.abs().max() * size
    kept = Affine(8 if search is None else 4, symmetric=symmetric, axis=0, search=search).encode(x)
    most = 1 / 250 if search is None else 1 / 14
    assert float((kept.decode() - x).abs().max()) <= most * size


def test_a_range_beyond_the_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"beyond what torch\.float32 holds"):
        Affine(8).encode(torch.tensor([-3e38, 3e38]))
    wide = torch.tensor([-3e38, 3e38], dtype=torch.float64)
    assert bool(((Affine(8).encode(wide).decode(torch.float64) - wide).abs() < 3e36).all())


def test_steps_of_another_shape_are_refused_and_one_serves_all() -> None:
    quantizer = Affine(4, axis=0)
    scale, zero = quantizer.choose(SQUARE)
    with pytest.raises(ValueError, match=r"the step has shape \[4\].* those of \[4, 1\]"):
        quantizer.encode(SQUARE, scale.flatten(), zero.flatten())
    one = quantizer.encode(SQUARE, scale.max(), zero.max())
    assert one.scale.shape == one.zero_point.shape == (4, 1)


@pytest.mark.parametrize(
    ("x", "scale", "zero", "told"),
    [
        (torch.full((4, 4), torch.nan), 1.0, 0.0, "not finite has no codes"),
        (SQUARE, 0.0, 0.0, "a step is a finite number above 0"),
        (SQUARE, -1.0, 0.0, "a step is a finite number above 0"),
        (SQUARE, torch.nan, 0.0, "a step is a finite number above 0"),
        (SQUARE, 1.0, 100.0, "a zero point is a whole number from 0 to 15"),
        (SQUARE, 1.0, 0.5, "a zero point is a whole number from 0 to 15"),
    ],
)
def test_steps_that_give_no_codes_are_refused(x: torch.Tensor, scale: float, zero: float, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Affine(4).encode(x, torch.tensor(scale), torch.tensor(zero))


@pytest.mark.parametrize(
    "settings", [{"bits": None}, {"axis": "0"}, {"axis": 1.0}, {"axis": True}, {"search": "x"}, {"search": True}]
)
def test_settings_of_an_affine_quantiser_are_named(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} is "):
        Affine(**settings)


def test_what_is_no_tensor_of_numbers_is_told() -> None:
    calls: list[Any] = [
        Affine(4).encode,
        GRIDS["e2m1"].encode,
        GRIDS["e2m1"].round,
        GRIDS["e2m1"].decode,
        Blocks().encode,
        Blocks().round,
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"not \[1\.0\]"):
            call([1.0])
    with pytest.raises(ValueError, match="on the meta device"):
        Affine(4).encode(torch.zeros(2, device="meta"))
    with pytest.raises(TypeError, match=r"not in torch\.float16; use round"):
        GRIDS["e2m1"].round_(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(TypeError, match="grid is a Grid"):
        rounded(SQUARE, "e2m1")  # type: ignore[arg-type]
    for mode in ("tensor", "token"):
        with pytest.raises(TypeError, match=r"not of torch\.int64"):
            ActivationQuantizer(8, mode)(torch.arange(4))


def test_not_a_number_gets_the_code_that_is_promised_and_stays_one_where_it_is_rounded() -> None:
    nothing = torch.tensor([torch.nan, 1.0])
    assert integers(4).encode(nothing).tolist() == [0, 1]
    assert GRIDS["e2m1"].decode(GRIDS["e2m1"].encode(nothing)).tolist() == [-6.0, 1.0]
    assert rounded(nothing, GRIDS["e2m1"]).isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"exponent": 0, "mantissa": 3}, "exponent is a number of bits"),
        ({"exponent": 2.0, "mantissa": 1}, "exponent is a number of bits"),
        ({"exponent": 2, "mantissa": True}, "mantissa is a number of bits"),
        ({"exponent": 4, "mantissa": 3, "specials": "inf"}, "specials is 'inf'"),
        ({"exponent": 4, "mantissa": 3, "bias": "x"}, "bias is a whole number"),
        ({"exponent": 4, "mantissa": 3, "bias": -200}, "none of float32"),
        ({"exponent": 4, "mantissa": 3, "bias": 200}, "none of float32"),
    ],
)
def test_settings_of_a_floating_point_grid_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        floating("x", **settings)


@pytest.mark.parametrize("bias", [-110, -90, 130, 140])
def test_grids_at_the_ends_of_float32_round_as_they_encode(bias: int) -> None:
    grid = floating("x", 4, 3, bias=bias)
    x = torch.randn(200, generator=torch.Generator().manual_seed(0)) * grid.largest
    assert torch.equal(grid.round(x), grid.decode(grid.encode(x)) + 0.0)


def test_other_grids_and_blocks_name_what_is_wrong() -> None:
    for largest in (0.5, 2000):
        with pytest.raises(ValueError, match="largest is a power from -126 to 127"):
            powers_of_two(4, largest)  # type: ignore[arg-type]
    for values in ("ab", torch.zeros(2, 2)):
        with pytest.raises(ValueError, match="a codebook is a list of numbers"):
            codebook(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="numbers for values"):
        Grid("x", 1, ("a", "b"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="tensor_scale is True or False"):
        Blocks(tensor_scale="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the element format is"):
        Blocks(["e2m1"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="dim is the number of an axis"):
        Blocks().encode(SQUARE, "last")  # type: ignore[arg-type]


def test_bytes_that_are_no_vector_and_counts_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="packed bytes are a vector"):
        unpack(torch.zeros(2, 2, dtype=torch.uint8), 4, 8)
    for count in (-1, 4.0, True):
        with pytest.raises(ValueError, match="count is a whole number from 0"):
            unpack(torch.zeros(2, dtype=torch.uint8), 4, count)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-6, 1e-6], [-60000.0, 60000.0]])
def test_rows_in_half_precision_are_rounded_to_numbers(dtype: torch.dtype, values: list[float]) -> None:
    x = torch.tensor([values], dtype=dtype)
    got = ActivationQuantizer(8, "token")(x)
    assert got.dtype == dtype
    assert torch.allclose(got.float(), x.float(), rtol=0.03, atol=1e-9)
    assert ActivationQuantizer(8, "token")(torch.zeros(2, 0, dtype=dtype)).shape == (2, 0)


def test_a_module_in_half_precision_keeps_its_steps() -> None:
    eight = ActivationQuantizer(8).calibrate(SQUARE)
    scale = eight.scale.item()
    half = nn.Sequential(eight).half()[0]
    assert half.scale.item() == scale
    assert half(SQUARE.half()).dtype == torch.float16
