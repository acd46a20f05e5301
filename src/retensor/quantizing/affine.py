"""Uniform affine quantisers: whole numbers, a step and a zero point for a tensor, each channel or each group.

    x' = s (clip(round(x / s) + z, low, high) - z)

with ``low, high`` 0 and ``2**b - 1``, or ``-2**(b-1)`` and ``2**(b-1) - 1`` and ``z`` 0 where it is symmetric (B. Jacob
and others, Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from retensor.files import described
from retensor.quantizing.grids import check_floating
from retensor.quantizing.packing import packed_bytes
from retensor.units import check_flags

LEAST_STEP = 1e-8
_THRESHOLDS = 100


@dataclass(frozen=True)
class Affine:
    """A uniform affine quantiser.

    Parameters
    ----------
    bits : int
        2 to 8.
    symmetric : bool
        Whether the zero point is 0 and codes are signed.
    axis : int, optional
        The axis whose entries have a step each, such as 0 for the output channels of a weight; by default the tensor
        has one.
    group_size : int, optional
        How many entries along the last axis share a step; then ``axis`` is left out.
    search : float, optional
        Choose the step and zero point of least mean ``|x - x'|**search``, by a grid, instead of the range. 2.4 is what
        FlexRound and BRECQ use.

    Raises
    ------
    ValueError, TypeError
        Where a setting is out of range, named.

    Examples
    --------
    >>> four = Affine(4)
    >>> kept = four.encode(torch.tensor([-1.0, 0.0, 0.5, 2.0]))
    >>> kept.codes, float(kept.scale), int(kept.zero_point)
    (tensor([ 0,  5,  7, 15], dtype=torch.uint8), 0.20000000298023224, 5)
    >>> kept.decode()
    tensor([-1.0000,  0.0000,  0.4000,  2.0000])
    """

    bits: int = 8
    symmetric: bool = False
    axis: int | None = None
    group_size: int | None = None
    search: float | None = None

    def __post_init__(self) -> None:
        check_flags(symmetric=self.symmetric)
        for name, value, least in (("bits", self.bits, 2), ("group_size", self.group_size, 1)):
            left_out = value is None and name == "group_size"
            if not left_out and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(f"{name} is a whole number from {least}, not {described(value)}")
        if self.bits > 8:
            raise ValueError(f"bits is a number from 2 to 8, not {self.bits}")
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int)):
            raise ValueError(f"axis is the number of an axis, or None, not {described(self.axis)}")
        if self.axis is not None and self.group_size is not None:
            raise ValueError("axis and group_size were both given; groups lie along the last axis")
        power = self.search
        if power is not None and (isinstance(power, bool) or not isinstance(power, int | float) or not 0 < power < 100):
            raise ValueError(f"search is the power of the error, above 0, not {described(self.search)}")

    @property
    def low(self) -> int:
        """The least whole number."""
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        """The largest whole number."""
        return self.low + 2**self.bits - 1

    def settings(self) -> dict[str, Any]:
        """Its arguments, as JSON has them."""
        return asdict(self)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step and the zero point for a tensor.

        Returns
        -------
        scale, zero_point : torch.Tensor
            float32 (float64 of a float64 tensor) and whole numbers of that type, of a shape that broadcasts against
            :meth:`grouped`.

        Raises
        ------
        TypeError
            Where ``x`` is not floating point.
        ValueError
            Where it is empty, not finite or on the meta device, spans more than its type holds, has no such axis, or
            groups do not divide its last axis.
        """
        x = self.grouped(x)
        if x.is_meta:
            raise ValueError("a tensor on the meta device holds no values, so it has no range; load its values first")
        if not x.numel() or not bool(torch.isfinite(x).all()):
            raise ValueError("a tensor that is empty or not finite has no range; take those values out first")
        axes = self._shared(x)
        low, high = x.amin(axes, keepdim=True).clamp(max=0), x.amax(axes, keepdim=True).clamp(min=0)
        scale, zero = self.of_range(low, high)
        if not bool(torch.isfinite(scale).all()):
            raise ValueError(f"the range of the tensor is beyond what {x.dtype} holds; scale it down, or give float64")
        if self.search is None:
            return scale, zero
        least = self._error(x, scale, zero)
        for i in range(1, _THRESHOLDS):
            for candidate in self._candidates(low, high, i / _THRESHOLDS):
                error = self._error(x, *candidate)
                better = error < least
                least = torch.where(better, error, least)
                scale, zero = (torch.where(better, new, old) for new, old in zip(candidate, (scale, zero), strict=True))
        return scale, zero

    def whole(self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
        """Whole numbers of a tensor, in its type and grouped shape.

        The product with ``1 / scale`` is what torchao computes; it differs from the quotient where that falls beside
        the middle of two.
        """
        return (torch.round(self.grouped(x) * (1.0 / scale)) + zero_point).clamp(self.low, self.high)

    def encode(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None
    ) -> AffineTensor:
        """A tensor as codes, by the step and zero point that are given or chosen for it.

        Raises
        ------
        TypeError, ValueError
            As :meth:`choose`; where only one of the two is given, or they are not one for each step, above zero, and
            one of the whole numbers; or where the tensor is not finite.
        """
        if (scale is None) != (zero_point is None):
            raise ValueError("a step and a zero point are given together")
        if scale is None or zero_point is None:
            scale, zero_point = self.choose(x)
        else:
            scale, zero_point = self._checked(x, scale, zero_point)
        codes = (self.whole(x.detach(), scale, zero_point) - self.low).to(torch.uint8).reshape(x.shape)
        return AffineTensor(codes, scale, zero_point, self)

    def grouped(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor with an axis of groups before its last, where it has groups; at least in float32."""
        check_floating(x, "tensors of floating point are quantised")
        x = x if x.dtype == torch.float64 else x.to(torch.float32)
        if self.axis is not None and not -x.ndim <= self.axis < x.ndim:
            raise ValueError(f"axis {self.axis} of a tensor of shape {list(x.shape)} was asked for; it has {x.ndim}")
        if self.group_size is None:
            return x
        if x.ndim == 0 or x.shape[-1] % self.group_size:
            raise ValueError(f"groups of {self.group_size} do not divide the last axis of shape {list(x.shape)}")
        return x.unflatten(-1, (-1, self.group_size))

    def steps(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the steps for a tensor of a shape.

        >>> Affine(4, axis=0).steps((8, 3, 5, 5)), Affine(4, group_size=2).steps((8, 6))
        ((8, 1, 1, 1), (8, 3, 1))
        """
        grouped = self.grouped(torch.empty(*shape, device="meta"))
        shared = self._shared(grouped)
        return tuple(1 if axis in shared else length for axis, length in enumerate(grouped.shape))

    def _shared(self, x: torch.Tensor) -> list[int]:
        """Axes of a grouped tensor along which the step is one."""
        if self.group_size is not None:
            return [x.ndim - 1]
        return [axis for axis in range(x.ndim) if self.axis is None or axis != self.axis % x.ndim]

    def of_range(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The step and the zero point of ranges from ``low``, at most 0, to ``high``, at least 0."""
        if self.symmetric:
            scale = self._step(2 * torch.maximum(-low, high))
            return scale, torch.zeros_like(scale)
        scale = self._step(high - low)
        return scale, (-torch.round(low / scale)).clamp(self.low, self.high)

    def _step(self, span: torch.Tensor) -> torch.Tensor:
        """The step that divides a span: not 0, and not so small that what is divided by it overflows."""
        step = (span / (2**self.bits - 1)).clamp(min=torch.finfo(span.dtype).tiny)
        return torch.where(span > 0, step, torch.full_like(step, LEAST_STEP))

    def _checked(
        self, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The step and the zero point that were given, of the shape that they have here."""
        steps = self.steps(x.shape)
        for name, value in (("step", scale), ("zero point", zero_point)):
            # Of another shape it would be spread along whatever axis has its length.
            if tuple(value.shape) != steps and value.numel() != 1:
                raise ValueError(
                    f"the {name} has shape {list(value.shape)}; a tensor of shape {list(x.shape)} has those of "
                    f"{list(steps)} here"
                )
        scale, zero_point = (v if tuple(v.shape) == steps else v.reshape(()).expand(steps) for v in (scale, zero_point))
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or x.is_meta:
            return scale, zero_point
        if not bool(torch.isfinite(x).all()):
            raise ValueError("a tensor that is not finite has no codes; take those values out first")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise ValueError("a step is a finite number above 0; choose it anew")
        most = 0 if self.symmetric else self.high
        if not bool(((zero_point == zero_point.round()) & (zero_point >= 0) & (zero_point <= most)).all()):
            raise ValueError(f"a zero point is a whole number from 0 to {most} here; round it, or choose it anew")
        return scale, zero_point

    def _candidates(
        self, low: torch.Tensor, high: torch.Tensor, share: float
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Steps of a share of the range, with each zero point there is."""
        if self.symmetric:
            return [self.of_range(low * share, high * share)]
        scale = self._step((high - low) * share)
        one_signed = bool(((low == 0) | (high == 0)).all())
        if one_signed:
            return [self.of_range(low * share, high * share)]
        return [(scale, torch.full_like(scale, float(zero))) for zero in range(self.low, self.high + 1)]

    def _error(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        assert self.search is not None
        rounded = (torch.round(x * (1.0 / scale)) + zero).clamp(self.low, self.high)
        return ((rounded - zero) * scale - x).abs().pow(self.search).mean(self._shared(x), keepdim=True)


@dataclass(frozen=True)
class AffineTensor:
    """Codes of a tensor, with their steps and zero points.

    Attributes
    ----------
    codes : torch.Tensor
        uint8, of the tensor's shape: the whole numbers less the least.
    scale, zero_point : torch.Tensor
        As :meth:`Affine.choose` gives them.
    quantizer : Affine
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    quantizer: Affine

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, packed, of float32 steps, and of zero points as codes where there are some."""
        quantizer, steps = self.quantizer, self.scale.numel()
        zeros = 0 if quantizer.symmetric else packed_bytes(steps, quantizer.bits)
        return packed_bytes(self.codes.numel(), quantizer.bits) + 4 * steps + zeros

    def decode(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The numbers that codes stand for, of the shape that was encoded."""
        whole = self.quantizer.grouped(self.codes.to(self.scale.dtype)) + self.quantizer.low
        return ((whole - self.zero_point) * self.scale).reshape(self.codes.shape).to(dtype)
