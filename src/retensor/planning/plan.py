"""Plans: the order of the operators, where each tensor lies and when, and what crosses the chip's edge.

Time is a sequence of steps, one operator a step. A residency ``[start, end)`` keeps a tensor at one
address from step ``start`` to step ``end - 1``. A transfer of step ``t`` happens before the operator of
step ``t`` runs (step ``len(order)``: after the last); at one step, writes happen before reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from retensor.files import brief, described
from retensor.units import parse_size, whole

TransferKind = Literal["load", "store", "spill", "retrieve"]


@dataclass(frozen=True)
class Accelerator:
    """A chip with a software-managed scratchpad.

    Parameters
    ----------
    scratchpad : int or str
        Bytes, or a size: ``"2MiB"``, ``"512KB"``, ``"M_R"``, ``"1.2*M_R"`` (relative to the graph planned).
    alignment : int
        Every address is a multiple of it; in bytes.
    name : str, optional
    bandwidth : float, optional
        Bytes a second between the scratchpad and the memory off-chip, both ways together. Plans do not depend on it
        or on ``macs_per_second``; the roofline of :func:`retensor.cost` does.
    macs_per_second : float, optional
        Multiply-accumulates a second, all units busy.

    Raises
    ------
    TypeError, ValueError
        Where an argument is of another type or makes no sense.

    Examples
    --------
    >>> Accelerator(scratchpad="2MiB").scratchpad
    '2MiB'
    """

    scratchpad: int | str
    alignment: int = 1
    name: str | None = None
    bandwidth: float | None = None
    macs_per_second: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "alignment", whole(self.alignment, "alignment"))
        if not isinstance(self.scratchpad, str):
            size = whole(self.scratchpad, "a scratchpad", "an int or a str such as '2MiB'")
            object.__setattr__(self, "scratchpad", size)
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"an accelerator's name is a str, not {type(self.name).__name__}")
        if not 1 <= self.alignment <= 2**30:
            raise ValueError(f"alignment is a number of bytes from 1 to 2**30, not {self.alignment}")
        for rate in ("bandwidth", "macs_per_second"):
            given = getattr(self, rate)
            if given is None:
                continue
            if isinstance(given, bool) or not isinstance(given, int | float):
                raise TypeError(f"{rate} is a number a second or None, not {type(given).__name__}")
            if not 0 < given < math.inf:
                raise ValueError(f"{rate} is a positive number a second or None, not {given}")
        # A relative size is resolved against a graph later; anything else is checked now.
        parse_size(self.scratchpad, dict.fromkeys(("M_R", "M_P", "M_H"), 2**20))


@dataclass(frozen=True, slots=True)
class Residency:
    """A tensor at one address from step ``start`` up to, not including, step ``end``."""

    tensor: str
    start: int
    end: int
    address: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """Bytes that cross the chip's edge before step ``step``.

    ``load``: the first read of an input or parameter. ``store``: the one write of a network output.
    Both are compulsory. ``spill``: a write of any other tensor. ``retrieve``: a read of something
    that was in the scratchpad before. Both are not compulsory.
    """

    tensor: str
    kind: TransferKind
    step: int
    nbytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """A complete plan and what was proved of it.

    Attributes
    ----------
    graph_name, graph_digest : str
    graph_options : mapping
        How the graph was loaded, so that the same graph can be loaded again.
    scratchpad_bytes, alignment : int
    parameters : bool
        Whether parameters lie in the scratchpad too.
    order : tuple of str
        Operator names, one a step.
    residencies : tuple of Residency
    transfers : tuple of Transfer
    bound_bytes : int
        A proved lower bound of the non-compulsory bytes of any plan (for the fixed order, where
        ``fixed_order``).
    solver : str
    seconds : float
    fixed_order : bool
        Whether the order was given rather than chosen.
    """

    graph_name: str
    graph_digest: str
    scratchpad_bytes: int
    alignment: int
    parameters: bool
    order: tuple[str, ...]
    residencies: tuple[Residency, ...]
    transfers: tuple[Transfer, ...]
    bound_bytes: int
    solver: str
    seconds: float
    fixed_order: bool = False
    graph_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("graph_name", "graph_digest", "solver"):
            if not isinstance(getattr(self, name), str):
                raise TypeError(f"a plan's {name} is a str, not {type(getattr(self, name)).__name__}")
        for name in ("scratchpad_bytes", "alignment", "bound_bytes"):
            object.__setattr__(self, name, whole(getattr(self, name), f"a plan's {name}"))
        for name, kind in (("order", str), ("residencies", Residency), ("transfers", Transfer)):
            given = getattr(self, name)
            try:
                rows = () if isinstance(given, str) else tuple(given)
            except TypeError:
                rows = (given,)
            if isinstance(given, str) or not all(isinstance(row, kind) for row in rows):
                raise TypeError(f"a plan's {name} is a tuple of {kind.__name__}, not {described(given)}")
            object.__setattr__(self, name, rows)
        if not isinstance(self.graph_options, Mapping):
            raise TypeError(f"a plan's graph_options is a mapping, not {type(self.graph_options).__name__}")

    def __repr__(self) -> str:
        """Its figures; a plan's rows are thousands."""
        return (
            f"Plan({brief(self.graph_name, 60)!r}, {self.status}, scratchpad_bytes={self.scratchpad_bytes}, "
            f"non_compulsory_bytes={self.non_compulsory_bytes}, bound_bytes={self.bound_bytes}, "
            f"steps={len(self.order)}, residencies={len(self.residencies)}, transfers={len(self.transfers)})"
        )

    @property
    def compulsory_bytes(self) -> int:
        """Bytes of first loads and of stores."""
        return sum(t.nbytes for t in self.transfers if t.kind in ("load", "store"))

    @property
    def non_compulsory_bytes(self) -> int:
        """Bytes of spills and retrieves: what planning minimises."""
        return sum(t.nbytes for t in self.transfers if t.kind in ("spill", "retrieve"))

    @property
    def gap(self) -> float:
        """``(non_compulsory - bound) / non_compulsory``; 0 where the plan is proved optimal."""
        traffic = self.non_compulsory_bytes
        return 0.0 if traffic <= max(self.bound_bytes, 0) else (traffic - self.bound_bytes) / traffic

    @property
    def status(self) -> Literal["optimal", "feasible"]:
        """``optimal`` where the bound meets the traffic."""
        return "optimal" if self.non_compulsory_bytes <= self.bound_bytes else "feasible"
