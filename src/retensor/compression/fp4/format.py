"""Formats of 4 bits: an element, a scale for each block, and how the scale is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal, Self

from retensor.files import described
from retensor.quantizing import GRIDS, UNROUNDED, Blocks
from retensor.quantizing.blocks import ScaleRule

ELEMENTS = tuple(name for name, grid in GRIDS.items() if grid.least < 0)
# A scale that can be NaN carries what is not finite in its block; without one it would be lost.
SCALES = (*(name for name, grid in GRIDS.items() if grid.not_a_number is not None), *UNROUNDED)


@dataclass(frozen=True)
class Format:
    """A format of blocks, for one operand of a product.

    Parameters
    ----------
    element : str
        ``"e2m1"`` is the element of 4 bits, ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}; others of :data:`retensor.quantizing.GRIDS`
        are there to compare with.
    scale : str
        ``"ue5m3"``, ``"e4m3"``, ``"e8m0"``; or ``"bfloat16"`` and ``"float32"``, the ideal.
    block : int
        Numbers that share a scale.
    tensor_scale : bool or "power"
        Whether a float32 of the whole tensor brings its largest scale to the scale format's largest number; ``"power"``
        takes the next power of two above. Scales of e8m0, bfloat16 and float32 have range enough without.
    rule : {"nearest", "floor", "ceil", "even"}, optional
        How a scale is rounded (:class:`retensor.quantizing.Blocks`); ``"ceil"`` for e8m0 and ``"nearest"`` for others
        by default.
    strict : bool
        Refuse an axis that is no multiple of the block; otherwise its last block is filled up with zeros.
    nonfinite : {"propagate", "raise"}
        Whether NaN and infinity make their block NaN, or an error.

    Raises
    ------
    ValueError, TypeError
        Where there is no such format, or parts do not fit each other.

    Examples
    --------
    >>> Format(scale="ue5m3", block=16).bits_per_element()
    4.5
    >>> Format(scale="e8m0", block=32).rule
    'ceil'
    """

    element: str = "e2m1"
    scale: str = "ue5m3"
    block: int = 16
    tensor_scale: bool | Literal["power"] = False
    rule: ScaleRule | None = None
    strict: bool = False
    nonfinite: Literal["propagate", "raise"] = "propagate"

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS:
            raise ValueError(f"the element format is {described(self.element)}; formats are {', '.join(ELEMENTS)}")
        if self.scale not in SCALES:
            raise ValueError(f"the scale format is {described(self.scale)}; formats are {', '.join(SCALES)}")
        if self.tensor_scale not in (True, False, "power"):
            raise ValueError(f"tensor_scale is True, False or 'power', not {described(self.tensor_scale)}")
        if self.nonfinite not in ("propagate", "raise"):
            raise ValueError(f"nonfinite is 'propagate' or 'raise', not {described(self.nonfinite)}")
        if not isinstance(self.strict, bool):
            raise TypeError(f"strict is True or False, not {described(self.strict)}")
        if self.rule is None:
            object.__setattr__(self, "rule", "ceil" if self.scale == "e8m0" else "nearest")
        _ = self.blocks  # which checks the rest

    @cached_property
    def blocks(self) -> Blocks:
        """The quantiser itself."""
        return Blocks(
            self.element, self.scale, self.block, self.rule or "nearest", bool(self.tensor_scale),
            self.tensor_scale == "power",
        )  # fmt: skip

    def bits_per_element(self, elements: int | None = None) -> float:
        """Bits of an element with its share of the scales, and of the tensor's scale where ``elements`` are told.

        >>> Format(scale="e4m3", tensor_scale=True).bits_per_element(1024)
        4.53125
        """
        shared = 32 / elements if self.tensor_scale and elements else 0.0
        return self.blocks.element.bits + self.blocks.scale.bits / self.block + shared

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """Of what :meth:`as_dict` made.

        Raises
        ------
        ValueError
            Where a part is not known.
        """
        known = [part.name for part in fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"a format has no part {described(name)}; parts are {', '.join(known)}")
        return cls(**given)

    def __str__(self) -> str:
        """Short enough for a table."""
        tensor = {False: "", True: "+ts", "power": "+ts2"}[self.tensor_scale]
        rule = f"/{self.rule}" if self.scale == "e8m0" else ""
        return f"{self.element}·{self.scale}{rule}{tensor}·{self.block}"


MXFP4 = Format(scale="e8m0", block=32, rule="floor")
"""As the OCP Microscaling specification 1.0 has it."""
NVFP4 = Format(scale="e4m3", block=16, tensor_scale=True)
"""As torchao's ``NVFP4Tensor`` with a scale of the tensor."""
UE5M3 = Format(scale="ue5m3", block=16, tensor_scale=True)
"""The scale with more range than E4M3 and more precision than E8M0."""
