"""Grids against ml_dtypes, gfloat and torch, code by code and number by number."""

from __future__ import annotations

import itertools
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retensor.quantizing import GRIDS, Grid, codebook, floating, integers, logarithmic, powers_of_two

TYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
}


def numbers(grid: Grid, count: int = 20_000) -> torch.Tensor:
    """Numbers of all sizes a grid knows, its values, and the middles of them."""
    generator = torch.Generator().manual_seed(0)
    finite = sorted({v for v in grid.values if math.isfinite(v)})
    drawn = torch.randn(count, generator=generator, dtype=torch.float64).exp2()
    spread = torch.rand(count, generator=generator, dtype=torch.float64) * math.log2(2 * grid.largest / 1e-6) - 20
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1 if grid.least < 0 else torch.ones(count)
    middles = [low + (high - low) / 2 for low, high in itertools.pairwise(finite)]
    exact = torch.tensor([*finite, *middles], dtype=torch.float64)
    return torch.cat([exact, drawn * spread.exp2() * signs]).to(torch.float32)


@pytest.mark.parametrize("name", TYPES)
def test_every_code_stands_for_the_number_of_the_public_type(name: str) -> None:
    grid = GRIDS[name]
    codes = torch.arange(2**grid.bits, dtype=torch.uint8)
    theirs = codes.numpy().view(TYPES[name]).astype(np.float64)
    ours = grid.decode(codes, torch.float64).numpy()
    np.testing.assert_array_equal(ours, theirs)
    # Zeros of both signs too.
    np.testing.assert_array_equal(np.signbit(ours)[~np.isnan(ours)], np.signbit(theirs)[~np.isnan(theirs)])


@pytest.mark.parametrize("name", [name for name in TYPES if name != "e8m0"])
def test_numbers_round_as_the_public_type_does(name: str) -> None:
    grid = GRIDS[name]
    x = numbers(grid)
    if grid.infinite == "largest":
        # Beyond the largest the public types of 8 bits give NaN; ours saturate.
        x = x[x.abs() <= grid.largest]
    theirs = torch.from_numpy(x.numpy().astype(TYPES[name]).view(np.uint8).copy())
    assert torch.equal(grid.encode(x), theirs)


def test_powers_of_two_round_as_values_do() -> None:
    grid = GRIDS["e8m0"]
    x = numbers(grid)
    x = x[(x >= 2.0**-126) & (x <= 2.0**127)]
    found = grid.decode(grid.encode(x)).double()
    lower = torch.exp2(torch.floor(torch.log2(x.double())))
    # By distance: 3 lies between 2 and 4, in the middle.
    assert bool(((found - x).abs() <= torch.minimum((x - lower).abs(), (2 * lower - x).abs()) * (1 + 1e-12)).all())


def test_ue5m3_is_that_of_gfloat() -> None:
    gfloat = pytest.importorskip("gfloat")
    theirs = gfloat.FormatInfo(
        "ue5m3", 8, 4, bias=15, is_signed=False, domain=gfloat.Domain.Finite, has_nz=False, num_high_nans=1,
        has_subnormals=True, is_twos_complement=False,
    )  # fmt: skip
    grid = GRIDS["ue5m3"]
    for code in range(256):
        value = gfloat.decode_float(theirs, code).fval
        assert grid.values[code] == value or (math.isnan(grid.values[code]) and math.isnan(value))
    assert (grid.largest, grid.values[1]) == (114688, 7.62939453125e-6)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_integers_round_half_to_even_and_saturate(bits: int, signed: bool) -> None:
    grid = integers(bits, signed)
    x = torch.cat([torch.arange(-300, 300) / 2, torch.randn(1000) * 2**bits])
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    assert torch.equal(grid.decode(grid.encode(x)), x.round().clamp(low, high) + 0.0)


GRIDS_OF_ALL_KINDS = [
    *GRIDS.values(), integers(4), integers(5, signed=True), powers_of_two(5), logarithmic(3), codebook([-2, 0.1, 7]),
    floating("e5m0", 5, 0), floating("e1m2", 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS_OF_ALL_KINDS, ids=lambda grid: grid.name)
def test_values_are_their_own_codes(grid: Grid) -> None:
    codes = torch.tensor([c for c, v in enumerate(grid.values) if not math.isnan(v)], dtype=torch.uint8)
    for rounding in ("nearest", "stochastic"):
        # Decoded in float64, as 2^-127 is no normal number of float32.
        assert torch.equal(grid.encode(grid.decode(codes, torch.float64), rounding), codes)


@pytest.mark.parametrize("grid", GRIDS_OF_ALL_KINDS, ids=lambda grid: grid.name)
def test_no_other_value_is_nearer(grid: Grid) -> None:
    x = numbers(grid, 2000).double()
    x = x[x.abs() < 2 * grid.largest]
    finite = torch.tensor([v for v in grid.values if math.isfinite(v)], dtype=torch.float64)
    found = grid.decode(grid.encode(x), torch.float64)
    kept = torch.isfinite(found)
    best = (x[:, None] - finite).abs().amin(1)
    assert torch.equal((x - found).abs()[kept], best[kept])


@pytest.mark.parametrize("grid", [GRIDS["e2m1"], integers(3, signed=True), powers_of_two(4), codebook([-1, 0.5, 3])],
                         ids=lambda grid: grid.name)  # fmt: skip
def test_stochastic_rounding_is_to_neighbours_and_right_in_the_mean(grid: Grid) -> None:
    generator = torch.Generator().manual_seed(1)
    finite = sorted(v for v in grid.values if math.isfinite(v))
    for number in (0.3 * finite[0] + 0.7 * finite[1], 0.55 * finite[-1] + 0.45 * finite[-2]):
        drawn = grid.decode(
            grid.encode(torch.full((200_000,), number, dtype=torch.float64), "stochastic", generator), torch.float64
        )
        low, high = max(v for v in finite if v <= number), min(v for v in finite if v >= number)
        assert set(drawn.unique().tolist()) == {low, high}
        # Five standard errors of a coin of this bias.
        share = (number - low) / (high - low)
        spread = (high - low) * math.sqrt(share * (1 - share) / len(drawn))
        assert float(drawn.mean()) == pytest.approx(number, abs=5 * spread)


def test_random_rounding_follows_its_generator() -> None:
    x, grid = torch.randn(1000), GRIDS["e2m1"]
    one, two, other = (grid.encode(x, "stochastic", torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_what_lies_beyond_saturates_or_becomes_infinity_and_nan_stays() -> None:
    x = torch.tensor([math.inf, -math.inf, 1e30, math.nan])
    assert GRIDS["e2m1"].decode(GRIDS["e2m1"].encode(x[:3])).tolist() == [6, -6, 6]
    assert GRIDS["e5m2"].decode(GRIDS["e5m2"].encode(x[:3])).tolist() == [math.inf, -math.inf, math.inf]
    for name in ("e4m3", "e5m2", "ue5m3", "e8m0"):
        assert math.isnan(GRIDS[name].decode(GRIDS[name].encode(x))[3])


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=2, max_size=256, unique=True))
def test_codebooks_of_any_values_find_the_nearest(values: list[float]) -> None:
    values = [value + 0.0 for value in values]
    if len(set(values)) < len(values):
        return
    grid = codebook(values)
    assert 2 ** (grid.bits - 1) < len(values) <= 2**grid.bits
    x = torch.tensor([*values, 0.0, 1e9], dtype=torch.float64)
    found = grid.decode(grid.encode(x), torch.float64)
    best = (x[:, None] - torch.tensor(values, dtype=torch.float64)).abs().amin(1)
    assert torch.equal((x - found).abs(), best)


def test_bad_arguments_are_named() -> None:
    for make, said in (
        (lambda: integers(9), "bits is a number from 1 to 8, not 9"),
        (lambda: integers(True), "bits is a number"),  # type: ignore[arg-type]
        (lambda: powers_of_two(1), "from 2 to 8"),
        (lambda: codebook([1.0]), "2 to 256 finite values"),
        (lambda: codebook([1.0, math.inf]), "finite"),
        (lambda: codebook([1.0, 1.0]), "a value twice"),
        (lambda: Grid("odd", 2, (1.0, 2.0)), "2 values for codes of 2 bits"),
        (lambda: GRIDS["e2m1"].encode(torch.ones(1), "up"), "it is 'nearest' or 'stochastic'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(TypeError, match=r"not of torch\.int64"):
        GRIDS["e2m1"].encode(torch.ones(1, dtype=torch.int64))
    with pytest.raises(TypeError, match="uint8"):
        GRIDS["e2m1"].decode(torch.ones(1))


@pytest.mark.parametrize(
    "grid", [*GRIDS.values(), integers(4, signed=True), powers_of_two(3)], ids=lambda grid: grid.name
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_without_codes_is_encoding_and_decoding(grid: Grid, dtype: torch.dtype) -> None:
    finite = torch.tensor([v for v in grid.values if math.isfinite(v)], dtype=dtype)
    finite = finite.sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    least = torch.nextafter(middles, torch.full_like(middles, -math.inf))
    x = torch.cat([numbers(grid).to(dtype), finite, middles, least, 2 * finite[[0, -1]]])
    x = x[x.isfinite()]
    for rounding in ("nearest", "stochastic"):
        ours = grid.round(x, rounding, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        codes = grid.encode(x, rounding, torch.Generator().manual_seed(1))  # type: ignore[arg-type]
        assert torch.equal(ours, grid.decode(codes, dtype))
    assert math.isnan(grid.round(torch.tensor([math.nan], dtype=dtype)))
    with pytest.raises(ValueError, match="rounding is 'up'"):
        grid.round(x, "up")  # type: ignore[arg-type]


def test_rounding_in_place_is_for_floating_point_grids() -> None:
    x = torch.tensor([0.7, -9.0])
    assert GRIDS["e2m1"].round_(x) is x
    assert x.tolist() == [0.5, -6.0]
    with pytest.raises(ValueError, match="'int4' holds no floating-point"):
        integers(4, signed=True).round_(x)
