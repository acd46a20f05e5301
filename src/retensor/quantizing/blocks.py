"""Blocks of numbers that share a scale: microscaling formats of any element and scale.

A block of ``B`` numbers along one axis is ``s_q`` times codes of an element grid, ``s_q`` a code of a scale grid:

    s = max |x| / largest element,  s_q = s_T Q_s(s / s_T),  x' = s_q Q(x / s_q)

with ``s_T``, one float32 for the whole tensor, 1 where tensor scaling is off. MX (OCP Microscaling Formats 1.0, 2023)
is E8M0 with blocks of 32, NVFP4 is E4M3 with blocks of 16 and tensor scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from retensor.files import described
from retensor.quantizing.grids import GRIDS, UNROUNDED, Grid, Rounding, Unrounded, check_floating
from retensor.quantizing.packing import packed_bytes
from retensor.units import check_flags

ScaleRule = Literal["nearest", "floor", "ceil", "even"]
_RULES = ("nearest", "floor", "ceil", "even")


@dataclass(frozen=True)
class BlockTensor:
    """Codes of a tensor in blocks.

    Attributes
    ----------
    codes : torch.Tensor
        uint8, of the tensor's shape with the blocked axis last and padded to whole blocks.
    scales : torch.Tensor
        uint8 codes, one for each block along the last axis; numbers where the scales are of a type of torch's.
    tensor_scale : torch.Tensor
        float32, of no dimension; 1 where there is none.
    format : Blocks
    dim, length : int
        The axis that was blocked, and its length before padding.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    tensor_scale: torch.Tensor
    format: Blocks
    dim: int
    length: int

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed, of the scales, and of the tensor's scale."""
        block = self.format
        element, scale = packed_bytes(self.codes.numel(), block.element.bits), self.scales.numel()
        return element + packed_bytes(scale, block.scale.bits) + 4 * block.tensor_scale

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers, of the shape that was encoded; NaN in blocks whose scale is."""
        block = self.format
        elements = block.element.decode(self.codes).unflatten(-1, (self.scales.shape[-1], block.size))
        scales = block.scale.decode(self.scales) * self.tensor_scale
        out = (elements * scales[..., None]).flatten(-2)[..., : self.length]
        return out.movedim(-1, self.dim).to(dtype)


@dataclass(frozen=True)
class Blocks:
    """A format of blocks.

    Parameters
    ----------
    element, scale : Grid or str
        Or the name of one (:data:`retensor.quantizing.GRIDS`). A scale may be ``"float32"`` or ``"bfloat16"`` too.
    size : int
        Numbers in a block.
    rule : {"nearest", "floor", "ceil", "even"}
        How a scale is rounded: to the nearest of its grid; or, for E8M0, by the exponent of the largest number as the
        MX specification does (``floor``, after which the largest may saturate), to the next power of two that keeps the
        largest (``ceil``), or by the exponent of the largest number rounded to the element's precision (``even``).
    tensor_scale : bool
        Whether a float32 for the whole tensor brings the largest scale to the scale grid's largest value.
    tensor_power : bool
        Whether that number is a power of two, the next above.

    Raises
    ------
    ValueError
        Where no grid has that name, a rule or a tensor's scale does not fit the scale, or the size is none.

    Examples
    --------
    >>> mx = Blocks("e2m1", "e8m0", 32, rule="floor")
    >>> kept = mx.encode(torch.tensor([[1.0, 2.0, -7.0, 0.1]]))
    >>> kept.decode(), kept.nbytes
    (tensor([[ 1.,  2., -6.,  0.]]), 17)
    """

    element: Grid
    scale: Grid | Unrounded
    size: int
    rule: ScaleRule = "nearest"
    tensor_scale: bool = False
    tensor_power: bool = False

    def __init__(
        self,
        element: Grid | str = "e2m1",
        scale: Grid | Unrounded | str = "e4m3",
        size: int = 16,
        rule: ScaleRule = "nearest",
        tensor_scale: bool = False,
        tensor_power: bool = False,
    ) -> None:
        object.__setattr__(self, "element", _grid(element, "element"))
        object.__setattr__(self, "scale", _scale(scale))
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"a block has at least one number, not {described(size)}")
        if rule not in _RULES:
            raise ValueError(f"rule is {described(rule)}; it is one of {', '.join(_RULES)}")
        if rule != "nearest" and self.scale.name != "e8m0":
            raise ValueError(f"the rule '{rule}' is for scales that are powers of two (e8m0), not {self.scale.name}")
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "rule", rule)
        check_flags(tensor_scale=tensor_scale, tensor_power=tensor_power)
        if tensor_scale and (isinstance(self.scale, Unrounded) or self.scale.name == "e8m0"):
            raise ValueError(f"scales of {self.scale.name} have all the range there is; leave tensor_scale out")
        if tensor_power and not tensor_scale:
            raise ValueError("tensor_power is for formats with tensor_scale=True")
        object.__setattr__(self, "tensor_scale", tensor_scale)
        object.__setattr__(self, "tensor_power", tensor_power)

    def settings(self) -> dict[str, Any]:
        """Its arguments, as JSON has them.

        Raises
        ------
        NotImplementedError
            Where its elements are of a grid that no name tells.
        """
        if GRIDS.get(self.element.name) is not self.element:
            raise NotImplementedError(
                f"a format with elements of a grid of your own ('{self.element.name}') cannot be saved; those of "
                f"{', '.join(GRIDS)} can"
            )
        rest = {name: getattr(self, name) for name in ("size", "rule", "tensor_scale", "tensor_power")}
        return {"element": self.element.name, "scale": self.scale.name, **rest}

    def encode(
        self,
        x: torch.Tensor,
        dim: int = -1,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
    ) -> BlockTensor:
        """A tensor in blocks along one axis; the last block is filled up with zeros.

        Parameters
        ----------
        x : torch.Tensor
            Floating point, of at least one axis.
        dim : int
        rounding, generator
            Of the elements, see :meth:`Grid.encode`; scales are always rounded to the nearest or by the rule.

        Returns
        -------
        BlockTensor
            A block with NaN or infinity in it has the scale NaN where the scale grid has one.

        Raises
        ------
        TypeError
            Where ``x`` is not floating point.
        ValueError
            Where it has no such axis.
        """
        length = self._length(x, dim)
        blocks = functional.pad(x.detach().movedim(dim, -1).to(torch.float32), (0, -length % self.size))
        blocks = blocks.unflatten(-1, (blocks.shape[-1] // self.size, self.size))
        most = blocks.abs().amax(-1)
        tensor_scale = self._tensor_scale(most)
        scales = self._scales(most, tensor_scale)
        size = self.scale.decode(scales) * tensor_scale
        ratio = torch.where(size[..., None] > 0, blocks / size[..., None], torch.zeros_like(blocks))
        codes = self.element.encode(torch.nan_to_num(ratio), rounding, generator)
        return BlockTensor(codes.flatten(-2), scales, tensor_scale, self, dim % x.ndim, length)

    def round(
        self,
        x: torch.Tensor,
        dim: int = -1,
        rounding: Rounding = "nearest",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """What a tensor is after :meth:`encode` and :meth:`BlockTensor.decode`, without codes and many times faster.

        Parameters
        ----------
        x, dim, rounding, generator
            As in :meth:`encode`; the same generator makes the same choices.

        Returns
        -------
        torch.Tensor
            Of the shape and type of ``x``.

        Raises
        ------
        TypeError, ValueError
            As :meth:`encode`.

        Examples
        --------
        >>> Blocks("e2m1", "e8m0", 32, rule="floor").round(torch.tensor([1.0, 2.0, -7.0, 0.1]))
        tensor([ 1.,  2., -6.,  0.])
        """
        length = self._length(x, dim)
        named = isinstance(self.scale, Unrounded) or self.scale.not_a_number is not None
        if self.element._floating is None or self.element.infinite == "own" or not named:
            return self.encode(x, dim, rounding, generator).decode(x.dtype)
        if rounding not in ("nearest", "stochastic"):
            raise ValueError(f"rounding is {described(rounding)}; it is 'nearest' or 'stochastic'")
        dim %= x.ndim
        blocks = self.split(x.detach(), dim)
        sizes = self.sizes(blocks.abs().amax(dim + 1))[0]
        drawn = None
        if rounding == "stochastic":
            # Laid out as the codes are, with the blocked axis last.
            last = blocks.movedim((dim, dim + 1), (-2, -1))
            drawn = torch.rand(last.shape, generator=generator, device=x.device)
            drawn = drawn.movedim((-2, -1), (dim, dim + 1))
        sizes = sizes.unsqueeze(dim + 1)
        # A block whose scale is zero is zero; one whose scale is NaN becomes NaN by the product.
        ratio = blocks / torch.where(sizes == 0, torch.full_like(sizes, math.inf), sizes)
        out = self.element.round_(ratio, drawn).mul_(sizes).flatten(dim, dim + 1)
        return out.narrow(dim, 0, length).to(x.dtype)

    def split(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """A tensor in float32 whose axis ``dim`` is two, blocks and numbers in a block, filled up with zeros."""
        dim %= x.ndim
        x = x.to(torch.float32)
        missing = -x.shape[dim] % self.size
        if missing:
            x = functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
        return x.unflatten(dim, (x.shape[dim] // self.size, self.size))

    def sizes(self, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a unit of each block's codes is worth, ``s_q``, and the tensor's scale ``s_T``.

        Parameters
        ----------
        most : torch.Tensor
            The largest absolute value of each block, float32.
        """
        tensor_scale = self._tensor_scale(most)
        if self.rule == "nearest":
            sizes = self.scale.round(most / self.element.largest / tensor_scale)
            sizes = torch.where(torch.isfinite(most), sizes, torch.full_like(sizes, math.nan))
        else:
            sizes = self.scale.decode(self._scales(most, tensor_scale))
        return sizes * tensor_scale, tensor_scale

    def _length(self, x: torch.Tensor, dim: int) -> int:
        check_floating(x, "numbers of floating point are put in blocks")
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"dim is the number of an axis, not {described(dim)}")
        if x.ndim == 0 or not -x.ndim <= dim < x.ndim:
            raise ValueError(f"axis {dim} of a tensor of shape {list(x.shape)} was asked for; it has {x.ndim}")
        return int(x.shape[dim])

    def _tensor_scale(self, most: torch.Tensor) -> torch.Tensor:
        one = torch.ones((), device=most.device)
        if not self.tensor_scale or not most.numel():
            return one
        # Blocks with infinity do not decide for the others.
        wanted = most / self.element.largest
        largest = torch.where(torch.isfinite(wanted), wanted, torch.zeros_like(wanted)).amax()
        found = largest / self.scale.largest
        if self.tensor_power:
            mantissa, exponent = torch.frexp(found)
            found = torch.ldexp(one, torch.where(mantissa == 0.5, exponent - 1, exponent))
        # Of numbers so small that their scale would be none there is none.
        return torch.where(found > 0, found, one)

    def _scales(self, most: torch.Tensor, tensor_scale: torch.Tensor) -> torch.Tensor:
        """Codes of the scales, by the rule."""
        bad = ~torch.isfinite(most)
        wanted = most / self.element.largest / tensor_scale
        if self.rule == "nearest":
            codes = self.scale.encode(wanted)
        else:
            # By the bits of the numbers: log2 in floating point is wrong beside powers of two.
            mantissa, exponent = torch.frexp(most)
            top = int(torch.frexp(torch.tensor(self.element.largest)).exponent)
            if self.rule == "floor":
                power = exponent - top
            elif self.rule == "ceil":
                mantissa, exponent = torch.frexp(wanted)
                power = torch.where(mantissa == 0.5, exponent - 1, exponent)
            else:
                # Up where the mantissa, rounded to the element's precision, reaches the next power of two.
                last = _mantissa_bits(self.element)
                power = exponent - top + (mantissa >= 1 - 2.0 ** -(last + 2)).to(exponent.dtype)
            codes = (power + 127).clamp(0, 254).to(torch.uint8)
            codes = torch.where(most == 0, torch.zeros_like(codes), codes)
        if self.scale.not_a_number is not None:
            codes = torch.where(bad, torch.full_like(codes, self.scale.not_a_number), codes)
        return codes


def _mantissa_bits(grid: Grid) -> int:
    """How many values lie from 1 to 2, as bits."""
    return (sum(1.0 <= value < 2.0 for value in grid.values) - 1).bit_length()


def _scale(given: Grid | Unrounded | str) -> Grid | Unrounded:
    if isinstance(given, Unrounded):
        return given
    if isinstance(given, str) and given in UNROUNDED:
        return UNROUNDED[given]
    if isinstance(given, Grid) or (isinstance(given, str) and given in GRIDS):
        return _grid(given, "scale")
    known = ", ".join((*GRIDS, *UNROUNDED))
    raise ValueError(f"the scale format is {described(given)}; formats are {known}, or give a Grid")


def _grid(given: Grid | str, what: str) -> Grid:
    if isinstance(given, Grid):
        return given
    if isinstance(given, str) and given in GRIDS:
        return GRIDS[given]
    raise ValueError(f"the {what} format is {described(given)}; formats are {', '.join(GRIDS)}, or give a Grid")
