"""Sizes as people write them: ``2MiB``, ``512KB``, ``M_R``, ``1.2*M_R``."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from fractions import Fraction
from typing import SupportsIndex

from retensor.files import brief

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
    "PIB": 2**50,
}
_SIZE = re.compile(r"\s*(\d[\d_]{0,30}(?:\.\d{1,12})?)\s*([A-Za-z]{0,3})\s*")
_RELATIVE = re.compile(r"\s*(?:(\d{1,9}(?:\.\d{1,12})?)\s*\*\s*)?(M_[RPH])p?\s*")

LARGEST_SIZE = 2**50
"""Budgets above this (one pebibyte) are refused as slips of the keyboard."""


def parse_size(text: str | SupportsIndex, symbols: Mapping[str, int] | None = None) -> int:
    """Bytes that ``text`` stands for.

    Parameters
    ----------
    text : str or int
        A count of bytes, a size with a unit (``"2MiB"``, ``"512KB"``, ``"1.5 GB"``), or a multiple of
        one of ``symbols`` (``"M_R"``, ``"1.2*M_R"``). Fractions of a byte are rounded
        down; a multiple of a bound is at least one byte.
    symbols : mapping of str to int, optional
        Bytes of ``M_R``, ``M_P`` and ``M_H``.

    Raises
    ------
    ValueError
        Where the text is no size, or the size is not between 1 byte and 1 PiB.

    Examples
    --------
    >>> parse_size("2MiB")
    2097152
    >>> parse_size("1.5*M_R", {"M_R": 100})
    150
    """
    if not isinstance(text, str):
        size = whole(text, "a size", "an int or a str such as '2MiB'")
    elif match := _SIZE.fullmatch(text):
        unit = match[2].upper()
        if unit not in _UNITS:
            raise ValueError(f"unknown unit in size '{text}'; use B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or PiB")
        size = int(Fraction(match[1].replace("_", "")) * _UNITS[unit])
    elif match := _RELATIVE.fullmatch(text):
        if symbols is None or match[2] not in symbols:
            raise ValueError(f"size '{text}' is relative to a graph; give a graph or a size in bytes")
        factor, bound = Fraction(match[1] or "1"), symbols[match[2]]
        # Empty tensors need nothing, and the smallest scratchpad there is has one byte.
        size = max(1, int(factor * bound)) if factor else 0
        if size > LARGEST_SIZE:
            raise ValueError(
                f"a scratchpad of {text.strip()} makes no sense: {match[2]} is {bound:,} bytes, and a scratchpad has "
                "1 byte to 1 PiB"
            )
    else:
        raise ValueError(
            f"'{brief(text, 60)}' is not a size; write bytes or a unit (2MiB, 512KB) or a multiple of a bound "
            "(M_R, 1.2*M_R)"
        )
    if not 1 <= size <= LARGEST_SIZE:
        shown = f"{size:,}" if abs(size) < 10**40 else "that many"
        raise ValueError(f"a scratchpad of {shown} bytes makes no sense; give between 1 byte and 1 PiB")
    return size


def whole(number: object, what: str, allowed: str = "an int") -> int:
    """``number`` as an int, where it is a whole number of any kind (NumPy's too) and no truth value.

    Parameters
    ----------
    number : object
    what, allowed : str
        What it is and what it may be, for the sentence.

    Raises
    ------
    TypeError

    Examples
    --------
    >>> import numpy as np
    >>> whole(np.int64(3), "alignment")
    3
    """
    try:
        if not isinstance(number, bool):
            return operator.index(number)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise TypeError(f"{what} is {allowed}, not {type(number).__name__}")


def check_seed(seed: object) -> None:
    """Refuse what torch's generators do not take.

    Raises
    ------
    TypeError, ValueError
    """
    if not -(2**63) <= whole(seed, "seed") < 2**64:
        raise ValueError(f"seed is a number of 64 bits, not {seed}")


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False, by its name.

    Raises
    ------
    TypeError
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is True or False, not {type(value).__name__}")


def format_bytes(count: int | float) -> str:
    """``count`` bytes for people, in binary units.

    >>> format_bytes(2097152), format_bytes(1000)
    ('2 MiB', '1000 B')
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.4g} {unit}"
