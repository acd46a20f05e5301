"""Sizes as people write them, and the sentences about those that make no sense."""

import pytest

from retensor.units import parse_size


def test_every_unit_is_known_and_named():
    sizes = {"1B": 1, "1KB": 10**3, "1MB": 10**6, "1GB": 10**9, "1TB": 10**12, "1KiB": 2**10, "1MiB": 2**20}
    for text, size in (sizes | {"1GiB": 2**30, "1TiB": 2**40, "1PiB": 2**50}).items():
        assert parse_size(text) == size
    with pytest.raises(ValueError, match="unknown unit") as caught:
        parse_size("1QiB")
    for unit in ("TB", "TiB", "PiB"):
        assert unit in str(caught.value)
    with pytest.raises(ValueError, match="1 byte and 1 PiB"):
        parse_size("2PiB")


def test_a_multiple_of_a_bound_is_at_least_one_byte():
    assert parse_size("M_R", {"M_R": 0}) == 1
    assert parse_size("0.001*M_R", {"M_R": 96}) == 1
    assert parse_size("1.5*M_R", {"M_R": 96}) == 144
    with pytest.raises(ValueError, match="0 bytes"):
        parse_size("0*M_R", {"M_R": 96})


def test_a_multiple_that_is_too_large_names_the_bound():
    with pytest.raises(ValueError, match=r"3\*M_P makes no sense: M_P is 1,125,899,906,842,623 bytes"):
        parse_size("3*M_P", {"M_P": 2**50 - 1})


def test_absurd_numbers_are_short_sentences():
    for size in (10**5000, -(10**5000), "9" * 5000):
        with pytest.raises(ValueError, match=r"size|scratchpad") as caught:
            parse_size(size)
        assert len(str(caught.value)) < 250
