"""Cost sheets as a table: one row a measure, one column a model, each model beside the first."""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from retensor.costing.sheet import CostSheet
from retensor.planning.accelerators import caveats
from retensor.planning.plan import Accelerator
from retensor.units import format_bytes

Columns = Mapping[str, Sequence[float | None]]


class Measure(NamedTuple):
    """A figure of the sheet: its attribute, its name for people, and how it is written."""

    key: str
    label: str
    unit: str


MEASURES = (
    Measure("parameters", "parameters", "count"),
    Measure("parameter_bytes", "parameters and buffers", "bytes"),
    Measure("macs", "multiply-accumulates", "count"),
    Measure("activation_peak_bytes", "activation peak", "bytes"),
    Measure("m_r_bytes", "M_R, least to run", "bytes"),
    Measure("m_p_bytes", "M_P, least without traffic", "bytes"),
    Measure("compulsory_bytes", "compulsory traffic", "bytes"),
    Measure("streamed_bytes", "parameters streamed", "bytes"),
    Measure("non_compulsory_bytes", "non-compulsory traffic", "bytes"),
    Measure("off_chip_bytes", "off-chip traffic", "bytes"),
    Measure("arithmetic_intensity", "MACs per byte off-chip", "number"),
    Measure("roofline_seconds", "roofline time", "seconds"),
)
"""Rows of the table, in order; those that no sheet has a figure for are left out."""


class Row(NamedTuple):
    """A measure's name, and for each model its value and how it compares with the first."""

    label: str
    cells: list[tuple[str, str]]


def rows(sheets: Sequence[CostSheet], columns: Columns) -> list[Row]:
    """The table's rows; one model alone is written to the last digit."""
    exact = len(sheets) == 1
    found = []
    for measure in MEASURES:
        values = [getattr(sheet, measure.key) for sheet in sheets]
        if measure.key == "non_compulsory_bytes":
            # A scratchpad that is too small is said here.
            absent = all(sheet.accelerator is None for sheet in sheets)
        else:
            absent = not any(values) if measure.key == "streamed_bytes" else all(value is None for value in values)
        if absent:
            continue
        cells = [
            (_cell(sheet, measure, exact), _beside(values[0], value) if i else "")
            for i, (sheet, value) in enumerate(zip(sheets, values, strict=True))
        ]
        found.append(Row(measure.label, cells))
    for label, figures in columns.items():
        cells = [
            ("-" if figure is None else f"{figure:.4g}", _difference(figures[0], figure) if i else "")
            for i, figure in enumerate(figures)
        ]
        found.append(Row(label, cells))
    return found


def _cell(sheet: CostSheet, measure: Measure, exact: bool) -> str:
    value = getattr(sheet, measure.key)
    if value is None:
        if measure.key == "non_compulsory_bytes" and sheet.missing_bytes:
            return f"does not fit: {format_bytes(sheet.missing_bytes)} missing"
        return "-"
    text = written(value, measure.unit, exact)
    if measure.key == "macs" and sheet.uncounted:
        return f"at least {text}"
    if measure.key == "m_p_bytes" and sheet.m_p_bound_bytes < sheet.m_p_bytes:
        return f"{text} (at least {written(sheet.m_p_bound_bytes, 'bytes', False)})"
    if measure.key == "non_compulsory_bytes":
        proved = sheet.bound_bytes or 0
        return f"{text} (at least {written(proved, 'bytes', False)})" if proved < value else text
    if measure.key == "roofline_seconds":
        return f"{text}, {sheet.limited_by}"
    return text


def written(value: float, unit: str, exact: bool) -> str:
    """A figure for people.

    >>> written(25557032, "count", True), written(25557032, "count", False), written(0.0123, "seconds", False)
    ('25,557,032', '25.56 M', '12.3 ms')
    """
    if unit == "bytes":
        short = format_bytes(value)
        return f"{value:,} B ({short})" if exact and value >= 1024 else short
    if unit == "seconds":
        for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
            if value * factor >= 1 or name == "µs":
                break
        return f"{value * factor:.3g} {name}"
    if unit == "number":
        return f"{value:.4g}"
    return f"{value:,}" if exact else short_count(value)


def short_count(value: float) -> str:
    """A count with a decimal prefix.

    >>> short_count(999), short_count(4089184256)
    ('999', '4.089 G')
    """
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}"
    return f"{value:g}"


def _beside(first: float | None, value: float | None) -> str:
    return "" if first is None or value is None or first == 0 else f"x{value / first:.3g}"


def _difference(first: float | None, value: float | None) -> str:
    return "" if first is None or value is None else f"{value - first:+.3g}"


def footnotes(sheets: Sequence[CostSheet]) -> list[str]:
    """What the figures hold for: the accelerator, where parameters lie, what was not counted."""
    lines = []
    types = list(dict.fromkeys(sheet.dtype for sheet in sheets if sheet.dtype is not None))
    if types:
        lines.append(f"floating-point elements counted as {', '.join(types)}")
    chips = list(dict.fromkeys(described(sheet.accelerator) for sheet in sheets if sheet.accelerator is not None))
    if chips:
        where = "in the scratchpad too" if sheets[0].parameters_resident else "read past the scratchpad"
        lines.append(f"on {'; '.join(chips)}; parameters {where}")
    pairs = dict.fromkeys((sheet.accelerator, sheet.dtype) for sheet in sheets if sheet.accelerator is not None)
    lines += dict.fromkeys(line for chip, dtype in pairs for line in caveats(chip, dtype))
    uncounted = list(dict.fromkeys(kind for sheet in sheets for kind in sheet.uncounted))
    if uncounted:
        named = ", ".join(uncounted[:6]) + (", ..." if len(uncounted) > 6 else "")
        lines.append(f"multiply-accumulates not known of: {named}")
    return lines


def described(chip: Accelerator) -> str:
    """An accelerator in a few words.

    >>> described(Accelerator(1024, 16, "chip", 1e9))
    'chip (1 KiB, alignment 16, 1 GB/s)'
    """
    facts = [format_bytes(int(chip.scratchpad))]
    if chip.alignment > 1:
        facts.append(f"alignment {chip.alignment}")
    if chip.bandwidth is not None:
        facts.append(f"{short_count(chip.bandwidth)}B/s")
    if chip.macs_per_second is not None:
        facts.append(f"{short_count(chip.macs_per_second)}MAC/s")
    return f"{chip.name or 'a scratchpad'} ({', '.join(facts)})"


def table(sheets: Sequence[CostSheet], names: Sequence[str], columns: Columns) -> Group:
    """The sheets as a table of :mod:`rich`, with its footnotes."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    made.add_column("")
    for i, name in enumerate(names):
        made.add_column(Text(name), justify="right", overflow="fold")
        if i:
            made.add_column("", justify="left", style="dim")
    for label, cells in rows(sheets, columns):
        shown = [Text(text) for i, pair in enumerate(cells) for text in (pair if i else pair[:1])]
        made.add_row(Text(label), *shown)
    return Group(made, *(Text(line, style="dim") for line in footnotes(sheets)))


def render(sheets: Sequence[CostSheet], names: Sequence[str], columns: Columns) -> str:
    """The table as plain text, each line as long as it is."""
    stream = io.StringIO()
    # Wide enough that nothing is folded.
    Console(file=stream, width=120 + 80 * len(names), color_system=None, highlight=False).print(
        table(sheets, names, columns)
    )
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def html_table(sheets: Sequence[CostSheet], names: Sequence[str], columns: Columns) -> str:
    """The table as HTML, for a notebook."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    body = []
    for label, cells in rows(sheets, columns):
        shown = "".join(
            f"<td>{html.escape(value)}{f' <small>{html.escape(beside)}</small>' if beside else ''}</td>"
            for value, beside in cells
        )
        body.append(f"<tr><th>{html.escape(label)}</th>{shown}</tr>")
    notes = "".join(f"<p><small>{html.escape(line)}</small></p>" for line in footnotes(sheets))
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>{notes}"
