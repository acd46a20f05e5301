"""Affine quantisers against torchao's, and by their definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retensor.quantizing import Affine


def heavy(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator).pow(-0.4) + 0.1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"group_size": 16}])
def test_steps_zero_points_and_whole_numbers_are_those_of_torchao(
    bits: int, symmetric: bool, where: dict[str, int]
) -> None:
    primitives: Any = pytest.importorskip("torchao.quantization.quant_primitives")
    x = heavy((24, 64), bits)
    quantizer = Affine(bits, symmetric, **where)
    block = {"axis": (1, 64), "group_size": (1, 16)}[next(iter(where))] if where else (24, 64)
    kind = primitives.MappingType.SYMMETRIC if symmetric else primitives.MappingType.ASYMMETRIC
    scale, zero = primitives.choose_qparams_affine(x, kind, block, torch.int32, quantizer.low, quantizer.high)
    kept = quantizer.encode(x)
    # Symmetric ranges reach from the least number to the largest of either sign in torchao, one step more below.
    if not symmetric:
        torch.testing.assert_close(kept.scale.reshape(-1), scale.reshape(-1), rtol=1e-7, atol=0)
        assert torch.equal(kept.zero_point.reshape(-1).int(), zero.reshape(-1))
    steps, zeros = kept.scale.reshape(scale.shape), kept.zero_point.reshape(scale.shape).int()
    theirs = primitives.quantize_affine(x, block, steps, zeros, torch.int32, quantizer.low, quantizer.high)
    assert torch.equal(kept.codes.int() + quantizer.low, theirs)
    back = primitives.dequantize_affine(theirs, block, steps, zeros, torch.int32, quantizer.low, quantizer.high)
    assert torch.equal(kept.decode(), back)


@given(
    bits=st.integers(2, 8), symmetric=st.booleans(), where=st.sampled_from([{}, {"axis": 1}, {"group_size": 5}]),
    shift=st.floats(-3, 3), seed=st.integers(0, 9),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_every_number_within_the_range_is_half_a_step_off_at_most(
    bits: int, symmetric: bool, where: dict[str, int], shift: float, seed: int
) -> None:
    x = heavy((3, 4, 10), seed) + shift
    quantizer = Affine(bits, symmetric, **where)
    kept = quantizer.encode(x)
    apart = (quantizer.grouped(kept.decode()) - quantizer.grouped(x)).abs()
    # The zero point is rounded too, which moves the ends of an asymmetric range by half a step.
    room = 0.5 if symmetric else 1.0
    assert bool((apart <= room * kept.scale + 4e-7 * x.abs().max()).all())
    assert torch.equal(quantizer.encode(kept.decode(), kept.scale, kept.zero_point).codes, kept.codes)
    # Zero is exact, as padding needs it to be.
    zero = quantizer.encode(torch.zeros_like(x), kept.scale, kept.zero_point).decode()
    assert not zero.any()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_search_finds_what_brute_force_does(bits: int, symmetric: bool) -> None:
    x = heavy((400,), bits)
    quantizer = Affine(bits, symmetric, search=2.4)
    found = quantizer.encode(x)

    def error(decoded: torch.Tensor) -> float:
        return float((decoded - x).abs().pow(2.4).mean())

    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    best = error(Affine(bits, symmetric).encode(x).decode())
    for i in range(1, 100):
        for zero in [0] if symmetric else range(2**bits):
            width = 2 * max(-low, high) if symmetric else high - low
            step = torch.tensor(width * i / 100 / (2**bits - 1))
            best = min(best, error(quantizer.encode(x, step, torch.tensor(float(zero))).decode()))
    assert error(found.decode()) == pytest.approx(best, rel=1e-5)
    assert error(found.decode()) < error(Affine(bits, symmetric).encode(x).decode())


def test_bytes_are_those_of_the_packed_parts() -> None:
    x = heavy((10, 30))
    assert Affine(4).encode(x).nbytes == 150 + 4 + 1
    assert Affine(3, axis=0).encode(x).nbytes == 113 + 40 + 4
    assert Affine(4, symmetric=True, group_size=10).encode(x).nbytes == 150 + 120


def test_bad_arguments_are_named() -> None:
    for make, said in (
        (lambda: Affine(1), "bits is a whole number from 2, not 1"),
        (lambda: Affine(9), "bits is a number from 2 to 8, not 9"),
        (lambda: Affine(group_size=0), "group_size is a whole number from 1"),
        (lambda: Affine(axis=0, group_size=4), "were both given"),
        (lambda: Affine(search=0), "search is the power"),
        (lambda: Affine(group_size=4).encode(torch.ones(3, 6)), r"groups of 4 do not divide .* \[3, 6\]"),
        (lambda: Affine(axis=2).encode(torch.ones(3, 6)), "axis 2 of a tensor"),
        (lambda: Affine().encode(torch.tensor([1.0, float("nan")])), "empty or not finite"),
        (lambda: Affine().encode(torch.ones(0)), "empty or not finite"),
        (lambda: Affine().encode(torch.ones(2), torch.ones(())), "given together"),
    ):
        with pytest.raises(ValueError, match=said):
            make()
    with pytest.raises(TypeError, match="floating point"):
        Affine().encode(torch.ones(3, dtype=torch.int32))
    with pytest.raises(TypeError, match="symmetric is True or False"):
        Affine(symmetric="no")  # type: ignore[arg-type]
