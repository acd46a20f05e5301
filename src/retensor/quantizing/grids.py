"""Grids of values: what each code of a few bits stands for, exactly, and the code nearest to a number.

Floating-point grids follow the definitions of the OCP Microscaling Formats (MX) specification 1.0, 2023 (E2M1, E2M3,
E3M2, E4M3, E5M2, E8M0); UE5M3 is E5M3 without a sign (R. Hu, C. Luschi, P. Balanca 2025, arXiv 2509.17791).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from retensor.files import described

Rounding = Literal["nearest", "stochastic"]
MOST_BITS = 8


@dataclass(frozen=True, eq=False)
class Grid:
    """A list of numbers, one for each code.

    Attributes
    ----------
    name : str
    bits : int
        Of a code: 1 to 8.
    values : tuple of float
        By code, ``2**bits`` of them; NaN where a code stands for no number.
    signed_zero : bool
        Whether a code of its own stands for -0, which small negative numbers round to.
    infinite : str
        What infinity and what lies beyond the largest number become: ``"largest"`` (they saturate) or ``"own"``
        (infinity has a code; numbers beyond half a step above the largest get it).

    Raises
    ------
    ValueError
        Where there is not one value for each code, or a value is there twice.

    Examples
    --------
    >>> GRIDS["e2m1"].values[:8]
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    >>> grid = codebook([-1.0, 0.25, 2.0])
    >>> grid.encode(torch.tensor([0.6, 9.0])), grid.decode(torch.tensor([1, 2], dtype=torch.uint8))
    (tensor([1, 2], dtype=torch.uint8), tensor([0.2500, 2.0000]))
    """

    name: str
    bits: int
    values: tuple[float, ...]
    signed_zero: bool = False
    infinite: Literal["largest", "own"] = "largest"
    _floating: tuple[int, int] | None = field(default=None, repr=False)
    _tables: dict[torch.device, _Tables] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not all(isinstance(value, int | float) for value in self.values):
            raise ValueError(f"grid '{self.name}' has codes of {described(self.bits)} bits and numbers for values")
        if not 1 <= self.bits <= MOST_BITS or len(self.values) != 2**self.bits:
            raise ValueError(
                f"grid '{self.name}' has {len(self.values)} values for codes of {self.bits} bits; it needs one for "
                f"each of 2**bits codes, bits from 1 to {MOST_BITS}"
            )
        there = [value for value in self.values if math.isfinite(value)]
        # -0 equals 0, so that a grid with both has one value less.
        if not there or len(set(there)) < len(there) - self.signed_zero:
            raise ValueError(f"grid '{self.name}' has a value twice, or none")

    def __repr__(self) -> str:
        return f"Grid({self.name!r}, {self.bits} bits, {self.least:g} to {self.largest:g})"

    @cached_property
    def largest(self) -> float:
        """The largest finite number."""
        return max(value for value in self.values if math.isfinite(value))

    @cached_property
    def least(self) -> float:
        """The least finite number; the negative of the largest where there are signs."""
        return min(value for value in self.values if math.isfinite(value))

    @cached_property
    def not_a_number(self) -> int | None:
        """A code that stands for no number, where there is one."""
        return next((code for code, value in enumerate(self.values) if math.isnan(value)), None)

    def encode(
        self, x: torch.Tensor, rounding: Rounding = "nearest", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Codes of the values that numbers are rounded to.

        Parameters
        ----------
        x : torch.Tensor
            Floating point, of any shape; computed in float32, or float64 where that is its type.
        rounding : {"nearest", "stochastic"}
            To the nearest value, from the middle of two to that of even code; or to one of the two neighbours at
            random, so that the mean is the number itself.
        generator : torch.Generator, optional
            Of the random choices; torch's own by default.

        Returns
        -------
        torch.Tensor
            uint8, of the shape of ``x``. Beyond the largest value numbers saturate (see :attr:`infinite`). NaN gets the
            code of NaN where there is one, else that of the least value: who calls has to keep it out.

        Raises
        ------
        TypeError
            Where ``x`` is not floating point.
        ValueError
            Where ``rounding`` is neither.
        """
        check_floating(x, "numbers of floating point are rounded")
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding is {described(rounding)}; it is 'nearest' or 'stochastic'")
        x = x.detach()
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        tables = self._on(x.device)
        middles, sorted_values, codes = tables.of(x.dtype)
        if rounding == "nearest":
            found = torch.bucketize(x, middles)
        else:
            lower = torch.bucketize(x, sorted_values, right=True).sub_(1).clamp_(0, len(sorted_values) - 1)
            upper = (lower + 1).clamp_(max=len(sorted_values) - 1)
            low, high = sorted_values[lower], sorted_values[upper]
            share = torch.where(high > low, (x - low) / (high - low), torch.zeros_like(x))
            drawn = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            found = torch.where(drawn < share, upper, lower)
        out = codes[found]
        if self.signed_zero:
            # Zeros lie beside each other; the sign says which of them.
            out = torch.where(torch.signbit(x) & (sorted_values[found] == 0), tables.negative_zero, out)
        if self.infinite == "own":
            beyond = x.abs() >= tables.overflow
            out = torch.where(beyond, torch.where(torch.signbit(x), tables.low_infinity, tables.high_infinity), out)
        unknown = codes[0] if self.not_a_number is None else torch.full_like(codes[0], self.not_a_number)
        return torch.where(torch.isnan(x), unknown, out)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers that codes stand for.

        Parameters
        ----------
        codes : torch.Tensor
            uint8, of any shape; bits above :attr:`bits` are not looked at.
        dtype : torch.dtype

        Raises
        ------
        TypeError
            Where codes are not uint8.
        """
        if not isinstance(codes, torch.Tensor) or codes.dtype != torch.uint8:
            what = codes.dtype if isinstance(codes, torch.Tensor) else described(codes)
            raise TypeError(f"codes are of type torch.uint8, not {what}")
        table = torch.tensor(self.values, dtype=torch.float64).to(device=codes.device, dtype=dtype)
        return table[(codes & (2**self.bits - 1)).long()]

    def round(
        self, x: torch.Tensor, rounding: Rounding = "nearest", generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """The values that numbers are rounded to: ``decode(encode(x))`` without codes, and many times faster.

        Parameters
        ----------
        x, rounding, generator
            As in :meth:`encode`; the same generator makes the same choices.

        Returns
        -------
        torch.Tensor
            Of the shape of ``x``, float32, or float64 where that is its type. A zero has no sign, and NaN stays NaN.

        Raises
        ------
        TypeError, ValueError
            As :meth:`encode`.

        Examples
        --------
        >>> GRIDS["e2m1"].round(torch.tensor([0.7, -2.4, 2.5, 9.0]))
        tensor([ 0.5000, -2.0000,  2.0000,  6.0000])
        """
        check_floating(x, "numbers of floating point are rounded")
        if self._floating is None or rounding not in ("nearest", "stochastic"):
            out = self.decode(self.encode(x, rounding, generator), _computed(x))
            return torch.where(torch.isnan(x), torch.full_like(out, math.nan), out)
        x = x.detach()
        wide = x.to(_computed(x))
        drawn = None
        if rounding == "stochastic":
            drawn = torch.rand(x.shape, generator=generator, device=x.device, dtype=wide.dtype)
        out = self.round_(torch.clone(wide) if wide is x else wide, drawn)
        if self.infinite == "own":
            overflow = self._on(x.device).overflow
            out = torch.where(x.abs() >= overflow, torch.copysign(torch.full_like(out, math.inf), x), out)
        return out

    def round_(self, x: torch.Tensor, drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Round in place to a floating-point grid, what lies beyond it to its largest; what :meth:`round` is made of.

        Parameters
        ----------
        x : torch.Tensor
            float32 or float64.
        drawn : torch.Tensor, optional
            Uniform numbers from 0 to 1 of its shape and type: rounding is stochastic then.

        Raises
        ------
        ValueError
            Where the grid is not one of :func:`floating` with subnormal numbers.
        TypeError
            Where ``x`` is of another type.
        """
        if x.dtype not in _BITS:
            raise TypeError(f"numbers are rounded in place in float32 and float64, not in {x.dtype}; use round")
        if self._floating is None:
            raise ValueError(f"grid '{self.name}' holds no floating-point numbers with subnormal ones; use round")
        least, mantissa = self._floating
        whole, ones, places = _BITS[x.dtype]
        x.clamp_(self.least, self.largest)
        # The power of two at or below each number, read off its bits: the step of the grid there is 2**mantissa less.
        power = x.view(whole) & ones
        power = power.clamp_(min=_pattern(2.0**least, x.dtype)).view(x.dtype)
        if drawn is not None:
            step = power.mul_(2.0**-mantissa)
            x.div_(step)
            lower = torch.floor(x)
            return lower.add_(drawn < x.sub_(lower)).mul_(step)
        # A number so large that its last bit is one step: what is added to it is rounded to steps, half to even.
        anchor = power.mul_(1.5 * 2.0 ** (places - mantissa))
        return x.add_(anchor).sub_(anchor)

    def _on(self, device: torch.device) -> _Tables:
        if device not in self._tables:
            self._tables[device] = _Tables(self, device)
        return self._tables[device]


_BITS = {
    torch.float32: (torch.int32, 0x7F800000, 23),
    torch.float64: (torch.int64, 0x7FF0000000000000, 52),
}
"""By type: the whole numbers of its size, the bits of its exponent, and how many bits its mantissa has."""


def check_floating(x: object, allowed: str) -> None:
    """Refuse what is no tensor of floating point, with a sentence that begins with what is allowed.

    Raises
    ------
    TypeError
    """
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        raise TypeError(f"{allowed}, not {f'of {x.dtype}' if isinstance(x, torch.Tensor) else described(x)}")


def _computed(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pattern(power: float, dtype: torch.dtype) -> int:
    """The bits of a power of two, as a whole number."""
    _, _, places = _BITS[dtype]
    bias = 127 if dtype == torch.float32 else 1023
    return (math.frexp(power)[1] - 1 + bias) << places


class Unrounded:
    """A type of torch's in a grid's place, for scales that are not of few bits: ``float32`` or ``bfloat16``.

    A scale kept in float32 is the ideal that formats of 8 bits are compared with.

    Examples
    --------
    >>> GRIDS["e4m3"].round(torch.tensor([0.3])), UNROUNDED["bfloat16"].round(torch.tensor([0.3]))
    (tensor([0.3125]), tensor([0.3008]))
    """

    not_a_number: int | None = None
    infinite = "own"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")
        self.bits = torch.finfo(dtype).bits
        self.largest = float(torch.finfo(dtype).max)

    def __repr__(self) -> str:
        return f"Unrounded({self.name!r}, {self.bits} bits)"

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """The numbers themselves, of this type."""
        return x.detach().to(self.dtype)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers, of another type."""
        return codes.to(dtype)

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """Numbers rounded to this type, in float32."""
        return self.decode(self.encode(x))


UNROUNDED = {kind.name: kind for kind in (Unrounded(torch.float32), Unrounded(torch.bfloat16))}
"""Scales that are no grid, by name."""


class _Tables:
    """What a grid looks numbers up in, on one device."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        by_code = list(enumerate(grid.values))
        # Of two zeros the positive one is looked up; the other follows from the sign.
        there = sorted(
            (value, code) for code, value in by_code
            if math.isfinite(value) and not (grid.signed_zero and value == 0 and math.copysign(1, value) < 0)
        )  # fmt: skip
        self.values = [value for value, _ in there]
        self.codes = torch.tensor([code for _, code in there], dtype=torch.uint8, device=device)
        self.device = device
        zeros = [code for code, value in by_code if value == 0 and math.copysign(1, value) < 0]
        self.negative_zero = torch.tensor(zeros[0] if zeros else 0, dtype=torch.uint8, device=device)
        infinities = {value: code for code, value in by_code if math.isinf(value)}
        self.high_infinity = torch.tensor(infinities.get(math.inf, 0), dtype=torch.uint8, device=device)
        self.low_infinity = torch.tensor(infinities.get(-math.inf, 0), dtype=torch.uint8, device=device)
        # The largest rounds up to what would come next: half a step above it is the first number that does.
        self.overflow = grid.largest + (self.values[-1] - self.values[-2]) / 2 if len(self.values) > 1 else math.inf
        self._of: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Where each value ends, the values in order, and their codes."""
        if dtype not in self._of:
            values = torch.tensor(self.values, dtype=dtype, device=self.device)
            # Exact for floating-point grids: the middle of two has one bit more than either.
            middles = torch.tensor(
                [low + (high - low) / 2 for low, high in zip(self.values, self.values[1:], strict=False)],
                dtype=dtype, device=self.device,
            )  # fmt: skip
            # bucketize leaves a number equal to a bound below it. Where the value above has the even code, the bound
            # moves down by the least step there is.
            above_even = (self.codes[1:] & 1) == 0
            lower = torch.nextafter(middles, torch.full_like(middles, -math.inf))
            self._of[dtype] = torch.where(above_even, lower, middles), values
        middles, values = self._of[dtype]
        return middles, values, self.codes


def floating(
    name: str,
    exponent: int,
    mantissa: int,
    *,
    bias: int | None = None,
    signed: bool = True,
    specials: Literal["none", "nan", "ieee"] = "none",
    subnormal: bool = True,
) -> Grid:
    """A grid of floating-point numbers.

    Parameters
    ----------
    name : str
    exponent, mantissa : int
        Bits of each; a code is sign, exponent, mantissa from its highest bit down.
    bias : int, optional
        ``2**(exponent - 1) - 1`` by default.
    signed : bool
    specials : {"none", "nan", "ieee"}
        Nothing but numbers; NaN where all bits below the sign are set; or infinities and NaNs in the highest exponent.
    subnormal : bool
        Whether exponent 0 holds zero and the numbers below the normal ones; if not, it is an exponent as any other.

    Returns
    -------
    Grid

    Raises
    ------
    ValueError
        Where a number of bits, the bias or the specials are none, or a value is no number of float32.

    Examples
    --------
    >>> floating("e3m0", 3, 0).values[:8]
    (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
    """
    for what, number, least in (("exponent", exponent, 1), ("mantissa", mantissa, 0)):
        if isinstance(number, bool) or not isinstance(number, int) or not least <= number <= MOST_BITS:
            raise ValueError(f"{what} is a number of bits from {least} to {MOST_BITS}, not {described(number)}")
    if specials not in ("none", "nan", "ieee"):
        raise ValueError(f"specials is {described(specials)}; it is 'none', 'nan' or 'ieee'")
    bias = 2 ** (exponent - 1) - 1 if bias is None else bias
    if isinstance(bias, bool) or not isinstance(bias, int) or abs(bias) > 2**MOST_BITS:
        raise ValueError(f"bias is a whole number up to {2**MOST_BITS}, not {described(bias)}")
    top = 2 ** (exponent + mantissa) - 1

    def value(code: int) -> float:
        e, m = code >> mantissa, code & (2**mantissa - 1)
        if (specials == "nan" and code == top) or (specials == "ieee" and e == 2**exponent - 1 and m):
            return math.nan
        if specials == "ieee" and e == 2**exponent - 1:
            return math.inf
        if e == 0 and subnormal:
            return math.ldexp(m, 1 - bias - mantissa)
        return math.ldexp(2**mantissa + m, e - bias - mantissa)

    positive = tuple(value(code) for code in range(top + 1))
    values = (*positive, *(-v for v in positive)) if signed else positive
    there = [v for v in positive if math.isfinite(v) and v]
    if not there or max(there) > torch.finfo(torch.float32).max or min(there) < 2.0**-149:
        raise ValueError(f"grid '{name}' with bias {bias} has numbers that are none of float32; take another bias")
    # What rounds by the bits of float32 needs its normal numbers, and room above the largest.
    room = math.frexp(max(there))[1] + 24 - mantissa < 128
    by_bits = (1 - bias, mantissa) if subnormal and 1 - bias >= -126 and room else None
    return Grid(
        name, exponent + mantissa + signed, values, signed_zero=signed and subnormal,
        infinite="own" if specials == "ieee" else "largest", _floating=by_bits,
    )  # fmt: skip


def integers(bits: int, signed: bool = False) -> Grid:
    """Whole numbers: 0 to ``2**bits - 1``, or signed ones in two's complement.

    >>> integers(2, signed=True).values
    (0.0, 1.0, -2.0, -1.0)
    """
    _check_bits(bits)
    half = 2 ** (bits - 1)
    values = tuple(float(code - 2 * half if signed and code >= half else code) for code in range(2**bits))
    return Grid(f"{'int' if signed else 'uint'}{bits}", bits, values)


def powers_of_two(bits: int, largest: int = 0) -> Grid:
    """0 and plus or minus powers of two from ``2**largest`` down, as DeepShift has them; one code is left over.

    Codes are the sign above the number of places to shift. M. Elhoushi, Z. Chen, F. Shafiq, Y. Tian, J. Li, DeepShift,
    2019, arXiv 1905.13298.

    >>> powers_of_two(3).values
    (1.0, 0.5, 0.25, 0.0, -1.0, -0.5, -0.25, nan)
    """
    _check_bits(bits, least=2)
    if isinstance(largest, bool) or not isinstance(largest, int) or not -126 <= largest <= 127:
        raise ValueError(f"largest is a power from -126 to 127, not {described(largest)}")
    places = [2.0 ** (largest - shift) for shift in range(2 ** (bits - 1) - 1)]
    return Grid(f"pow2-{bits}", bits, (*places, 0.0, *(-value for value in places), math.nan))


def logarithmic(bits: int) -> Grid:
    """Powers of two from 1 down and no zero: what log2 quantisers give softmax's outputs.

    >>> logarithmic(2).values
    (1.0, 0.5, 0.25, 0.125)
    """
    _check_bits(bits)
    return Grid(f"log2-{bits}", bits, tuple(2.0**-code for code in range(2**bits)))


def codebook(values: list[float] | torch.Tensor, name: str = "codebook") -> Grid:
    """Any numbers, by their place in a list; the fewest bits that number them.

    Raises
    ------
    ValueError
        Where there are fewer than 2 or more than 256, one twice, or one that is not finite.
    """
    try:
        listed = [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"a codebook is a list of numbers, not {described(values)}") from None
    if not 2 <= len(listed) <= 2**MOST_BITS or not all(math.isfinite(value) for value in listed):
        raise ValueError(f"a codebook has 2 to {2**MOST_BITS} finite values, not {len(listed)}")
    bits = (len(listed) - 1).bit_length()
    return Grid(name, bits, (*listed, *[math.nan] * (2**bits - len(listed))))


def _check_bits(bits: int, least: int = 1) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= MOST_BITS:
        raise ValueError(f"bits is a number from {least} to {MOST_BITS}, not {described(bits)}")


GRIDS: dict[str, Grid] = {
    grid.name: grid
    for grid in (
        floating("e2m1", 2, 1),
        floating("e2m3", 2, 3),
        floating("e3m2", 3, 2),
        floating("e4m3", 4, 3, specials="nan"),
        floating("e5m2", 5, 2, specials="ieee"),
        floating("ue5m3", 5, 3, signed=False, specials="nan"),
        floating("e8m0", 8, 0, signed=False, specials="nan", subnormal=False),
    )
}
"""Floating-point grids of public formats, by name."""
