"""The cost sheet: what a model costs, in the figures that every system of the library answers in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from retensor.errors import RetensorError
from retensor.files import described
from retensor.planning.plan import Accelerator

SCHEMA = "retensor.cost/1"

_RATES = ("bandwidth", "macs_per_second")
_DERIVED = (
    "off_chip_bytes",
    "arithmetic_intensity",
    "status",
    "missing_bytes",
    "compute_seconds",
    "transfer_seconds",
    "roofline_seconds",
    "limited_by",
)
"""Properties that the JSON form states besides the fields."""


@dataclass(frozen=True)
class CostSheet:
    """What one run of a model costs. All sizes are bytes.

    Attributes
    ----------
    name : str
    operators : int
        Steps of the graph, after merging.
    parameters : int or None
        Numbers that training sets, tied ones once. Of a module: all of ``module.parameters()``. Of a file or a graph:
        those that some operator reads; None where it does not tell their shapes.
    parameter_bytes : int
        Of parameters and buffers (running statistics, constants), tied ones once.
    macs : int or None
        Multiply-accumulates, as :mod:`retensor.graph.arithmetic` counts them; where ``uncounted`` names operators, of
        the others. None where no operator's are known.
    macs_by_kind : mapping of str to int
        ``macs`` by kind of operator, without those of none.
    uncounted : mapping of str to int
        Kinds of operators whose multiply-accumulates are not known, and how many of each there are.
    activation_peak_bytes : int
        The most that inputs and activations take at once when the operators run in the model's own order and nothing
        is evicted.
    m_r_bytes, m_p_bytes, m_p_bound_bytes : int
        The least scratchpad that can run it, the least with which some order evicts nothing, and what was proved of
        the latter; see :class:`retensor.planning.Bounds`.
    m_r_operator : str
    dtype : str or None
        The type that floating-point elements are counted at, where that was chosen.
    parameters_resident : bool
        Whether parameters lie in the scratchpad too; else each operator reads its own past it.
    accelerator : Accelerator or None
        With its scratchpad in bytes. Without one, the fields below are None.
    compulsory_bytes : int or None
        Bytes of first loads and of stores, as in :class:`retensor.planning.Plan`.
    streamed_bytes : int or None
        Bytes of parameters read past the scratchpad: every operator reads its own whole, once.
    non_compulsory_bytes : int or None
        Bytes spilled and retrieved by the best plan found. None also where the scratchpad is below ``m_r_bytes``.
    bound_bytes : int or None
        A proved lower bound of ``non_compulsory_bytes``.
    """

    name: str
    operators: int
    parameters: int | None
    parameter_bytes: int
    macs: int | None
    activation_peak_bytes: int
    m_r_bytes: int
    m_p_bytes: int
    m_p_bound_bytes: int
    m_r_operator: str = ""
    macs_by_kind: Mapping[str, int] = field(default_factory=dict)
    uncounted: Mapping[str, int] = field(default_factory=dict)
    dtype: str | None = None
    parameters_resident: bool = False
    accelerator: Accelerator | None = None
    compulsory_bytes: int | None = None
    streamed_bytes: int | None = None
    non_compulsory_bytes: int | None = None
    bound_bytes: int | None = None

    @property
    def off_chip_bytes(self) -> int | None:
        """All bytes that cross the chip's edge: compulsory, streamed and non-compulsory."""
        if self.compulsory_bytes is None or self.streamed_bytes is None or self.non_compulsory_bytes is None:
            return None
        return self.compulsory_bytes + self.streamed_bytes + self.non_compulsory_bytes

    @property
    def arithmetic_intensity(self) -> float | None:
        """Multiply-accumulates for each byte off-chip; what a roofline has across."""
        if self.macs is None or not self.off_chip_bytes:
            return None
        return self.macs / self.off_chip_bytes

    @property
    def status(self) -> Literal["optimal", "feasible", "does not fit"] | None:
        """``optimal`` where the bound meets the traffic; None without an accelerator."""
        if self.accelerator is None:
            return None
        if self.non_compulsory_bytes is None or self.bound_bytes is None:
            return "does not fit"
        return "optimal" if self.non_compulsory_bytes <= self.bound_bytes else "feasible"

    @property
    def missing_bytes(self) -> int | None:
        """Bytes that the scratchpad lacks for the largest operator; 0 where it runs."""
        if self.accelerator is None:
            return None
        return max(0, self.m_r_bytes - int(self.accelerator.scratchpad))

    @property
    def compute_seconds(self) -> float | None:
        """Time for the multiply-accumulates with every unit busy."""
        rate = None if self.accelerator is None else self.accelerator.macs_per_second
        return None if rate is None or self.macs is None else self.macs / rate

    @property
    def transfer_seconds(self) -> float | None:
        """Time for the bytes off-chip at the full bandwidth."""
        rate = None if self.accelerator is None else self.accelerator.bandwidth
        return None if rate is None or self.off_chip_bytes is None else self.off_chip_bytes / rate

    @property
    def roofline_seconds(self) -> float | None:
        """The longer of the two: no run is faster (Williams, Waterman, Patterson, "Roofline", 2009)."""
        if self.compute_seconds is None or self.transfer_seconds is None:
            return None
        return max(self.compute_seconds, self.transfer_seconds)

    @property
    def limited_by(self) -> Literal["compute", "bandwidth"] | None:
        """Which of the two the roofline is."""
        if self.compute_seconds is None or self.transfer_seconds is None:
            return None
        return "compute" if self.compute_seconds >= self.transfer_seconds else "bandwidth"

    def as_dict(self) -> dict[str, Any]:
        """The JSON form, described by ``cost.schema.json`` beside this module.

        Examples
        --------
        >>> sheet = CostSheet("net", 1, 10, 40, 100, 8, 8, 8, 8)
        >>> sheet.as_dict()["schema"], CostSheet.from_dict(sheet.as_dict()) == sheet
        ('retensor.cost/1', True)
        """
        form: dict[str, Any] = {"schema": SCHEMA}
        for part in fields(self):
            value = getattr(self, part.name)
            form[part.name] = dict(value) if isinstance(value, Mapping) else value
        if self.accelerator is not None:
            chip = self.accelerator
            form["accelerator"] = {
                "name": chip.name,
                "scratchpad_bytes": chip.scratchpad,
                "alignment": chip.alignment,
                **{rate: getattr(chip, rate) for rate in _RATES},
            }
        return form | {name: getattr(self, name) for name in _DERIVED}

    @classmethod
    def from_dict(cls, form: Any) -> CostSheet:
        """The sheet that a JSON form describes; derived figures are worked out anew.

        Raises
        ------
        RetensorError
            Where the form is another.
        """
        if not isinstance(form, Mapping) or form.get("schema") != SCHEMA:
            raise RetensorError(f"{described(form, 60)} is no cost sheet; an object of schema '{SCHEMA}' is read")
        known = {part.name: part for part in fields(cls)}
        strange = [key for key in form if key not in known and key not in _DERIVED and key != "schema"]
        absent = [key for key in known if key not in form]
        if strange or absent:
            what = f"has the key {described(strange[0])}" if strange else f"has no '{absent[0]}'"
            raise RetensorError(f"the cost sheet {what}; its keys are {', '.join(known)}")
        values = {key: _checked(key, str(part.type), form[key]) for key, part in known.items()}
        return cls(**values)

    def __str__(self) -> str:
        """The sheet as a table."""
        from retensor.costing.table import render

        return render([self], [self.name], {})

    def __rich__(self) -> Any:
        from retensor.costing.table import table

        return table([self], [self.name], {})

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        from retensor.costing.table import html_table

        return html_table([self], [self.name], {})


def _checked(key: str, kind: str, value: Any) -> Any:
    """One field of a JSON form, where it is of the field's type."""
    optional = kind.endswith("| None")
    if value is None and optional:
        return None
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if key == "accelerator" and isinstance(value, Mapping):
        known = {"name", "scratchpad_bytes", "alignment", *_RATES}
        if set(value) == known and isinstance(value["scratchpad_bytes"], int):
            rest = {part: value[part] for part in known - {"scratchpad_bytes"}}
            try:
                return Accelerator(value["scratchpad_bytes"], **rest)
            except (TypeError, ValueError) as error:
                raise RetensorError(f"the accelerator of the cost sheet: {error}") from None
    elif kind.startswith("Mapping"):
        counts = isinstance(value, Mapping) and all(isinstance(count, int) and count >= 0 for count in value.values())
        if counts and all(isinstance(name, str) for name in value):
            return dict(value)
    elif (
        (kind.startswith("str") and isinstance(value, str))
        or (kind == "bool" and isinstance(value, bool))
        or (kind.startswith("int") and whole)
    ):
        return value
    raise RetensorError(f"'{key}' of the cost sheet is {described(value, 60)}; {kind} is needed")
