"""Packed codes against whole numbers of Python, and every way to be wrong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from retensor.quantizing import pack, packed_bytes, unpack


@given(st.integers(1, 8).flatmap(lambda b: st.tuples(st.just(b), st.lists(st.integers(0, 2**b - 1), max_size=70))))
def test_bits_lie_one_after_another_and_come_back(case: tuple[int, list[int]]) -> None:
    bits, codes = case
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    whole = sum(code << (bits * i) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == whole.to_bytes(packed_bytes(len(codes), bits), "little")
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_shapes_are_laid_out_in_order() -> None:
    codes = torch.arange(12, dtype=torch.uint8).reshape(3, 4)
    assert unpack(pack(codes.T, 4), 4, 12).tolist() == codes.T.reshape(-1).tolist()


def test_wrong_codes_bytes_and_counts_are_told() -> None:
    packed = pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="a code is 9, which has more than 3 bits"):
        pack(torch.tensor([9], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="9 codes of 3 bits take 4 bytes, and there are 2"):
        unpack(packed, 3, 9)
    with pytest.raises(ValueError, match="bits beyond 3 codes"):
        unpack(torch.tensor([255, 255], dtype=torch.uint8), 3, 3)
    with pytest.raises(TypeError, match=r"not torch\.int64"):
        pack(torch.tensor([1]), 3)
    with pytest.raises(ValueError, match="bits is a number from 1 to 8, not 0"):
        pack(torch.tensor([0], dtype=torch.uint8), 0)
