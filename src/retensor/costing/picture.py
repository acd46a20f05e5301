"""Cost sheets as a picture: bars for each cost, or a further figure such as accuracy against each cost."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retensor.costing.table import MEASURES, Measure, footnotes, written
from retensor.planning.drawing import INK, legible, picture_suffix, save, style
from retensor.planning.picture import binary_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from retensor.costing.compare import Comparison

_DRAWN = (
    "parameters",
    "parameter_bytes",
    "macs",
    "activation_peak_bytes",
    "m_p_bytes",
    "off_chip_bytes",
    "arithmetic_intensity",
    "roofline_seconds",
)
_TRAFFIC = (
    ("compulsory_bytes", "compulsory", "held"),
    ("streamed_bytes", "parameters streamed", "operands"),
    ("non_compulsory_bytes", "non-compulsory", "spill"),
)
_ACROSS = 4


def plot_comparison(
    path: str | os.PathLike[str], comparison: Comparison, *, against: str | None = None, dark: bool = False
) -> None:
    """Draw cost sheets side by side, 1200 px across.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    comparison : Comparison
        With columns, one of them is drawn against each cost, a point for each model; without, bars.
    against : str, optional
        Which column to draw; the first by default.
    dark : bool
        Light ink on a dark ground.

    Raises
    ------
    ValueError
        Where the suffix is another, or there is no such column.
    RetensorError
        Where the file cannot be written.

    Examples
    --------
    >>> plot_comparison("costs.svg", compare(before, after, inputs=x, accuracy=[0.91, 0.9]))  # doctest: +SKIP
    """
    suffix = picture_suffix(path)
    if against is not None and against not in comparison.columns:
        known = ", ".join(comparison.columns) or "none"
        raise ValueError(f"there is no column '{against}' to draw against; columns are {known}")
    if against is None and comparison.columns:
        against = next(iter(comparison.columns))
    import matplotlib
    from matplotlib.figure import Figure

    measures = [
        measure
        for measure in MEASURES
        if measure.key in _DRAWN and any(getattr(sheet, measure.key) is not None for sheet in comparison.sheets)
    ]
    if against is not None:
        # What is the same for all models tells nothing of what accuracy costs.
        measures = [measure for measure in measures if _differs(comparison, measure)] or measures[:1]
    down = math.ceil(len(measures) / _ACROSS)
    tall = 2.6 if against is not None else 0.75 + 0.34 * len(comparison.names)
    notes = footnotes(comparison.sheets)
    top, bottom = 0.95, 0.25 + 0.22 * len(notes)
    height = top + bottom + down * (tall + 0.45)
    ink = INK[dark]
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12, height), dpi=100, facecolor=ink["page"])
        title = f"{against} against cost" if against is not None else "Cost"
        figure.text(0.02, 1 - 0.3 / height, legible(title, 80), size=16, weight="bold", color=ink["ink"], va="center",
                    parse_math=False)  # fmt: skip
        named = ", ".join(legible(name, 40) for name in comparison.names[:8])
        figure.text(0.02, 1 - 0.62 / height, legible(named, 150), size=10.5, color=ink["muted"], va="center",
                    parse_math=False)  # fmt: skip
        for i, measure in enumerate(measures):
            # Names of models stand left of the first panel of a row of bars; figures left of each panel of points.
            left, across = (0.075, 0.93 / _ACROSS) if against is not None else (0.135, 0.86 / _ACROSS)
            panel = figure.add_axes(
                (
                    left + (i % _ACROSS) * across,
                    1 - (top + (i // _ACROSS) * (tall + 0.45) + tall) / height,
                    across - (0.055 if against is not None else 0.02),
                    (tall - 0.35) / height,
                )
            )
            if against is not None:
                _points(panel, comparison, measure, against, dark)
            else:
                _bars(panel, comparison, measure, dark, i % _ACROSS == 0)
        if against is None and any(sheet.off_chip_bytes is not None for sheet in comparison.sheets):
            _legend(figure, dark, height)
        for i, line in enumerate(notes):
            at = (bottom - 0.2 - 0.22 * i) / height
            figure.text(0.02, at, legible(line, 170), size=9, color=ink["muted"], va="center", parse_math=False)
        save(figure, path, suffix, title)


def _frame(panel: Axes, measure: Measure, dark: bool) -> None:
    ink = INK[dark]
    panel.set_facecolor(ink["page"])
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink["line"])
    panel.tick_params(colors=ink["muted"], labelsize=8.5, length=0)
    panel.set_axisbelow(True)
    panel.set_title(measure.label, loc="left", size=10, color=ink["ink"], pad=6)


def _bars(panel: Axes, comparison: Comparison, measure: Measure, dark: bool, named: bool) -> None:
    ink = INK[dark]
    _frame(panel, measure, dark)
    values = [getattr(sheet, measure.key) for sheet in comparison.sheets]
    most = max((value for value in values if value is not None), default=0) or 1
    places = range(len(values))
    for place, (sheet, value) in enumerate(zip(comparison.sheets, values, strict=True)):
        if value is None:
            text = "does not fit" if sheet.missing_bytes else "not known"
            panel.text(most * 0.02, place, text, size=8.5, color=ink["muted"], va="center")
            continue
        parts: Sequence[tuple[float, str]] = [(value, ink["held"] if place == 0 else ink["operands"])]
        if measure.key == "off_chip_bytes":
            parts = [(getattr(sheet, key), ink[colour]) for key, _, colour in _TRAFFIC]
        start = 0.0
        for size, colour in parts:
            panel.barh(place, size, left=start, height=0.62, color=colour, linewidth=0)
            start += size
        panel.text(value + most * 0.02, place, written(value, measure.unit, False), size=8.5, color=ink["ink"],
                   va="center")  # fmt: skip
    panel.set_ylim(len(values) - 0.4, -0.6)
    # Room for the longest label after the longest bar.
    panel.set_xlim(0, most * 1.42)
    panel.set_yticks(places, [legible(name, 22) for name in comparison.names] if named else [""] * len(values))
    panel.set_xticks([])
    panel.spines["bottom"].set_visible(False)
    for label in panel.get_yticklabels():
        label.set_parse_math(False)
        label.set_color(ink["ink"])


def _points(panel: Axes, comparison: Comparison, measure: Measure, against: str, dark: bool) -> None:
    ink = INK[dark]
    _frame(panel, measure, dark)
    panel.grid(visible=True, color=ink["line"], linewidth=0.8)
    found: list[tuple[float, float, str]] = []
    for name, sheet, figure in zip(comparison.names, comparison.sheets, comparison.columns[against], strict=True):
        value = getattr(sheet, measure.key)
        if value is not None and figure is not None:
            found.append((value, figure, name))
    most = max((value for value, _, _ in found), default=1) or 1
    for value, figure, name in found:
        colour = ink["muted"] if name == comparison.names[0] else ink["operands"]
        panel.scatter([value], [figure], s=42, color=colour, linewidths=0, zorder=3)
    panel.set_xlim(0, most * 1.15)
    panel.margins(y=0.25)
    _name_points(panel, found, dark)
    if len(found) < len(comparison.names):
        panel.text(0.98, 0.04, f"{len(comparison.names) - len(found)} without a figure", transform=panel.transAxes,
                   size=8, color=ink["muted"], ha="right")  # fmt: skip
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(binary_ticks(most, 3) if measure.unit == "bytes" else MaxNLocator(3))
    panel.yaxis.set_major_locator(MaxNLocator(4))
    panel.xaxis.set_major_formatter(lambda value, _: written(value, measure.unit, False) if value else "0")


def _differs(comparison: Comparison, measure: Measure) -> bool:
    return len({getattr(sheet, measure.key) for sheet in comparison.sheets}) > 1


# Where a name may stand beside its point: how far off in points, and how it is aligned.
_BESIDE = (
    (0, 7, "center", "bottom"), (0, -7, "center", "top"), (7, 0, "left", "center"), (-7, 0, "right", "center"),
    (5, 5, "left", "bottom"), (-5, 5, "right", "bottom"), (5, -5, "left", "top"), (-5, -5, "right", "top"),
)  # fmt: skip
_LETTER, _LINE, _DOT = 4.9, 9.5, 7.0
_Box = tuple[float, float, float, float]


def _name_points(panel: Axes, found: Sequence[tuple[float, float, str]], dark: bool) -> None:
    """Write names beside points, each where it covers the fewest points and names and stays in the panel."""
    across, up = panel.bbox.width * 72 / panel.figure.dpi, panel.bbox.height * 72 / panel.figure.dpi
    (left, right), (low, top) = panel.get_xlim(), panel.get_ylim()
    dots = [((x - left) / (right - left) * across, (y - low) / (top - low) * up) for x, y, _ in found]
    taken: list[_Box] = [(x - _DOT / 2, y - _DOT / 2, x + _DOT / 2, y + _DOT / 2) for x, y in dots]
    for (x, y), (value, figure, name) in zip(dots, found, strict=True):
        label = legible(name, 24)
        boxes = [_box(x, y, _LETTER * len(label), *beside) for beside in _BESIDE]
        over = [_covered(box, taken, across, up) for box in boxes]
        best = over.index(min(over))
        taken.append(boxes[best])
        dx, dy, ha, va = _BESIDE[best]
        panel.annotate(label, (value, figure), xytext=(dx, dy), ha=ha, va=va, textcoords="offset points", size=8,
                       color=INK[dark]["ink"], parse_math=False)  # fmt: skip


def _box(x: float, y: float, width: float, dx: int, dy: int, ha: str, va: str) -> _Box:
    start = x + dx - {"left": 0.0, "center": 0.5, "right": 1.0}[ha] * width
    bottom = y + dy - {"bottom": 0.0, "center": 0.5, "top": 1.0}[va] * _LINE
    return start, bottom, start + width, bottom + _LINE


def _covered(box: _Box, taken: Sequence[_Box], across: float, up: float) -> float:
    """How much of what is taken a box covers, and how far it reaches out of the panel."""
    over = sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
        * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )
    beyond = max(0.0, -box[0]) + max(0.0, box[2] - across) + max(0.0, -box[1]) + max(0.0, box[3] - up)
    return over + 5 * beyond


def _legend(figure: Any, dark: bool, height: float) -> None:
    from matplotlib.patches import Patch

    figure.legend(
        handles=[Patch(facecolor=INK[dark][colour], label=label) for _, label, colour in _TRAFFIC],
        title="off-chip traffic",
        title_fontproperties={"size": 8.5},
        loc="upper right",
        bbox_to_anchor=(0.985, 1 - 0.06 / height),
        ncols=3,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK[dark]["muted"],
        handlelength=1.2,
    ).get_title().set_color(INK[dark]["muted"])
