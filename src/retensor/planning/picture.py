"""Pictures of a plan for papers and READMEs: the scratchpad as address by step, and traffic by scratchpad.

:func:`plot_plan` draws each residency as a rectangle, the transfers on a lane below it and the occupancy
below that; :func:`plot_sweep` draws traffic against scratchpad. Both use matplotlib's object interface,
so no global figure, backend or style is touched.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from retensor.files import write_atomic
from retensor.graph.structure import Graph
from retensor.planning.appearance import (
    KINDS,
    ROLES,
    check_graph,
    occupancy_of,
    palette,
    role_of,
    shades,
    status_sentence,
)
from retensor.planning.plan import Plan
from retensor.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = {
    False: {
        "page": "#ffffff",
        "ink": "#14181f",
        "muted": "#566070",
        "line": "#dde1e7",
        "label": "#10151d",
        "operands": "#4b78b8",
        "held": "#b9cbe4",
        "budget": "#14181f",
        "spill": "#c4122f",
        "retrieve": "#a84a00",
        "load": "#5b6675",
        "store": "#5b6675",
    },
    True: {
        "page": "#0f141b",
        "ink": "#e8ecf2",
        "muted": "#9ba6b5",
        "line": "#29323d",
        "label": "#f4f7fb",
        "operands": "#6c9ee0",
        "held": "#2f4a70",
        "budget": "#e8ecf2",
        "spill": "#ff6f7d",
        "retrieve": "#ffb057",
        "load": "#a3aebd",
        "store": "#a3aebd",
    },
}
_BASELINE_INK = {
    False: ("#8a4fb0", "#b25a00", "#0f7d70", "#a33a5e", "#5b6675"),
    True: ("#c79bea", "#f2a65a", "#56c7b8", "#f08fb0", "#a3aebd"),
}
_ACROSS = 1074
"""Pixels that the steps span."""
_MARKERS = {"spill": "v", "retrieve": "^", "load": "^", "store": "v"}


class SweepPointLike(Protocol):
    """What :func:`plot_sweep` reads of a point; an optional ``baselines`` maps labels to bytes."""

    @property
    def scratchpad_bytes(self) -> int:
        """Bytes of the scratchpad."""

    @property
    def non_compulsory_bytes(self) -> int:
        """Bytes spilled and retrieved with that scratchpad."""

    @property
    def bound_bytes(self) -> int:
        """A proved lower bound of those bytes."""


def plot_plan(path: str | os.PathLike[str], graph: Graph, plan: Plan, *, dark: bool = False) -> None:
    """Draw ``plan`` as a picture of 1200 x 700 px: residencies, transfers, occupancy.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    graph : Graph
        The graph that ``plan`` was made for.
    plan : Plan
    dark : bool
        Light ink on a dark ground.

    Raises
    ------
    ValueError
        Where the suffix is another.
    PlanError
        Where the plan was made for another graph.
    RetensorError
        Where the file cannot be written.

    Examples
    --------
    >>> plot_plan("plan.svg", graph, plan)  # doctest: +SKIP
    """
    suffix = _suffix(path)
    check_graph(graph, plan)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(12, 7), dpi=100, facecolor=_INK[dark]["page"])
        names = len(plan.order) <= 40
        longest = min(22, max((len(name) for name in plan.order), default=0))
        upright = longest * 5.6 < _ACROSS / max(len(plan.order), 1)
        # Slanted operator names need room below the map; upright ones and step numbers are one line.
        below = 0.045 if upright or not names else 0.13 * longest / 22 + 0.03
        bottom, occupancy_height, lane_height, gap = 0.065, 0.17, 0.1, 0.015
        lane_bottom = bottom + occupancy_height + gap
        map_bottom = lane_bottom + lane_height + below
        left, width = 0.085, 0.895
        scratchpad = figure.add_axes((left, map_bottom, width, 0.875 - map_bottom))
        lane = figure.add_axes((left, lane_bottom, width, lane_height), sharex=scratchpad)
        occupancy = figure.add_axes((left, bottom, width, occupancy_height), sharex=scratchpad)
        _draw_map(scratchpad, graph, plan, dark)
        if names:
            _name_steps(scratchpad, plan, dark, upright)
        _draw_lane(lane, plan, dark)
        _draw_occupancy(occupancy, graph, plan, dark)
        scratchpad.set_xlim(0, max(len(plan.order), 1))
        _draw_title(figure, graph, plan, dark)
        _save(figure, path, suffix, f"Memory plan of {graph.name}")


def plot_sweep(
    path: str | os.PathLike[str],
    points: Sequence[SweepPointLike],
    *,
    title: str | None = None,
    dark: bool = False,
) -> None:
    """Draw non-compulsory traffic against scratchpad: the plans, their proved bound and any baselines.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    points : sequence
        At least one; each with ``scratchpad_bytes``, ``non_compulsory_bytes``, ``bound_bytes`` and optionally
        ``baselines``, a mapping of label to bytes.
    title : str, optional
    dark : bool
        Light ink on a dark ground.

    Raises
    ------
    ValueError
        Where the suffix is another, or there is no point.
    RetensorError
        Where the file cannot be written.

    Examples
    --------
    >>> plot_sweep("sweep.png", sweep(graph))  # doctest: +SKIP
    """
    suffix = _suffix(path)
    if not points:
        raise ValueError("a sweep without points cannot be drawn; give at least one point")
    import matplotlib
    from matplotlib.figure import Figure

    ordered = sorted(points, key=lambda point: point.scratchpad_bytes)
    heading = title or "Off-chip traffic by scratchpad"
    with matplotlib.rc_context(_style()):
        figure = Figure(figsize=(12, 7), dpi=100, facecolor=_INK[dark]["page"])
        axes = figure.add_axes((0.085, 0.11, 0.895, 0.765))
        _draw_sweep(axes, ordered, dark)
        figure.text(
            0.02,
            0.955,
            _legible(heading, 90),
            size=16,
            weight="bold",
            color=_INK[dark]["ink"],
            va="center",
            parse_math=False,
        )
        figure.text(
            0.02,
            0.915,
            "bytes spilled and retrieved in one run; loads and stores that no plan avoids are not counted",
            size=10.5,
            color=_INK[dark]["muted"],
            va="center",
        )
        _save(figure, path, suffix, heading)


def _draw_map(axes: Axes, graph: Graph, plan: Plan, dark: bool) -> None:
    from matplotlib.collections import PolyCollection

    ink, fills, shade = _INK[dark], palette(dark), shades(graph, plan)
    steps = len(plan.order)
    top = max((stay.address + graph.tensors[stay.tensor].nbytes for stay in plan.residencies), default=0)
    height = _scale(plan.scratchpad_bytes, top)
    _frame(axes, dark, height, 7)
    axes.set_ylim(0, height * 1.02)
    axes.axhline(plan.scratchpad_bytes, color=ink["budget"], linewidth=1.2, linestyle=(0, (5, 3)))
    boxes, colours = [], []
    for stay in plan.residencies:
        nbytes = graph.tensors[stay.tensor].nbytes
        low, high = stay.address, stay.address + nbytes
        boxes.append([(stay.start, low), (stay.start, high), (stay.end, high), (stay.end, low)])
        colours.append(fills[role_of(graph, stay.tensor)][shade[stay.tensor]])
    edge = 0.9 if steps <= 100 else 0.45 if steps <= 400 else 0.15
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors=ink["page"], linewidths=edge))
    _mark_edges(axes, graph, plan, dark)
    _label_boxes(axes, graph, plan, dark, height)
    axes.set_ylabel("address", color=ink["muted"], size=10.5)
    axes.tick_params(axis="x", labelbottom=True, length=3, color=ink["muted"], labelcolor=ink["muted"])


def _name_steps(axes: Axes, plan: Plan, dark: bool, upright: bool) -> None:
    """Operator names instead of step numbers, thinned where slanted names would touch."""
    steps = len(plan.order)
    axes.set_xticks([step + 0.5 for step in range(steps)], [""] * steps)
    # A line of 8 pt slanted text needs 15 px across.
    for step in range(0, steps, max(1, math.ceil(15 * steps / _ACROSS))):
        axes.annotate(
            _legible(plan.order[step], 22, tail=True),
            (step + 0.5, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0 if upright else 3, -6),
            textcoords="offset points",
            ha="center" if upright else "right",
            va="top",
            rotation=0 if upright else 38,
            rotation_mode="default" if upright else "anchor",
            size=8,
            color=_INK[dark]["muted"],
            parse_math=False,
            annotation_clip=False,
        )


def _mark_edges(axes: Axes, graph: Graph, plan: Plan, dark: bool) -> None:
    """A coloured edge where a rectangle opens by a retrieve or ends by a spill."""
    from matplotlib.collections import LineCollection

    sides: dict[str, list[list[tuple[float, float]]]] = {"spill": [], "retrieve": []}
    moved = {(t.tensor, t.kind, t.step) for t in plan.transfers if t.kind in sides}
    for stay in plan.residencies:
        high = stay.address + graph.tensors[stay.tensor].nbytes
        if (stay.tensor, "retrieve", stay.start) in moved:
            sides["retrieve"].append([(stay.start, stay.address), (stay.start, high)])
        if (stay.tensor, "spill", stay.end) in moved:
            sides["spill"].append([(stay.end, stay.address), (stay.end, high)])
    width = 2.4 if len(plan.order) <= 100 else 1.0
    for kind, lines in sides.items():
        axes.add_collection(LineCollection(lines, colors=_INK[dark][kind], linewidths=width, capstyle="butt", zorder=3))


def _label_boxes(axes: Axes, graph: Graph, plan: Plan, dark: bool, height: float) -> None:
    """Names inside the rectangles that have room for them, or for the last eight characters."""
    across = _ACROSS / max(len(plan.order), 1)
    up = axes.get_position().height * 700 / max(height, 1)
    for stay in plan.residencies:
        nbytes = graph.tensors[stay.tensor].nbytes
        width, tall = (stay.end - stay.start) * across, nbytes * up
        room = int((width - 8) / 5.9)
        if room < min(8, len(stay.tensor)) or tall < 13:
            continue
        text = _legible(stay.tensor, room, tail=True)
        if tall >= 30 and room >= 7:
            text += f"\n{format_bytes(nbytes)}"
        axes.text(
            (stay.start + stay.end) / 2,
            stay.address + nbytes / 2,
            text,
            ha="center",
            va="center",
            size=7.5,
            linespacing=1.25,
            color=_INK[dark]["label"],
            clip_on=True,
            parse_math=False,
            zorder=4,
        )


def _draw_lane(axes: Axes, plan: Plan, dark: bool) -> None:
    ink = _INK[dark]
    _frame(axes, dark)
    axes.set_ylim(len(KINDS) - 0.4, -0.6)
    axes.set_yticks(range(len(KINDS)), KINDS)
    axes.tick_params(axis="y", length=0, pad=9)
    axes.tick_params(axis="x", labelbottom=False, length=0)
    axes.grid(visible=False)
    axes.hlines(range(len(KINDS)), 0, len(plan.order), color=ink["line"], linewidth=0.8, zorder=0)
    for row, kind in enumerate(KINDS):
        steps = sorted({transfer.step for transfer in plan.transfers if transfer.kind == kind})
        size = 30 if len(steps) <= 60 else 14 if len(steps) <= 200 else 7
        axes.scatter(
            steps,
            [row] * len(steps),
            marker=_MARKERS[kind],
            s=size,
            facecolors=ink[kind] if row < 2 else ink["page"],
            edgecolors=ink[kind],
            linewidths=0.9 if size > 9 else 0.6,
            clip_on=False,
            zorder=3,
        )


def _draw_occupancy(axes: Axes, graph: Graph, plan: Plan, dark: bool) -> None:
    ink = _INK[dark]
    resident, needed = occupancy_of(graph, plan)
    height = _scale(plan.scratchpad_bytes, int(resident.max(initial=0)))
    _frame(axes, dark, height, 4)
    axes.set_ylim(0, height * 1.12)
    edges = np.arange(len(plan.order) + 1)
    axes.stairs(resident, edges, fill=True, color=ink["held"], linewidth=0, label="held for later")
    axes.stairs(np.minimum(needed, resident), edges, fill=True, color=ink["operands"], linewidth=0)
    if plan.scratchpad_bytes <= height:
        axes.axhline(plan.scratchpad_bytes, color=ink["budget"], linewidth=1.2, linestyle=(0, (5, 3)))
    else:
        axes.text(
            0.995,
            0.93,
            f"scratchpad {format_bytes(plan.scratchpad_bytes)}, above",
            transform=axes.transAxes,
            ha="right",
            va="top",
            size=8.5,
            color=ink["muted"],
        )
    axes.set_ylabel("resident", color=ink["muted"], size=10.5)
    axes.set_xlabel("step", color=ink["muted"], size=10.5, labelpad=2)


def _draw_title(figure: Figure, graph: Graph, plan: Plan, dark: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ink, fills = _INK[dark], palette(dark)
    figure.text(
        0.02, 0.958, _legible(graph.name, 60), size=16, weight="bold", color=ink["ink"], va="center", parse_math=False
    )
    facts = (
        f"{len(plan.order):,} operators in {format_bytes(plan.scratchpad_bytes)}  ·  "
        f"{format_bytes(plan.non_compulsory_bytes)} spilled and retrieved, {status_sentence(plan)}"
    )
    figure.text(0.02, 0.913, facts, size=10.5, color=ink["muted"], va="center", parse_math=False)
    present = {role_of(graph, stay.tensor) for stay in plan.residencies}
    handles: list[Any] = [Patch(facecolor=fills[role][0], label=ROLES[role]) for role in sorted(present)]
    handles += [
        Patch(facecolor=ink["operands"], label="operator's own"),
        Patch(facecolor=ink["held"], label="held for later"),
        Line2D([], [], color=ink["budget"], linewidth=1.2, linestyle=(0, (5, 3)), label="scratchpad"),
    ]
    figure.legend(
        handles=handles,
        loc="upper right",
        bbox_to_anchor=(0.985, 0.985),
        ncols=len(handles),
        frameon=False,
        fontsize=8.5,
        labelcolor=ink["muted"],
        handlelength=1.4,
        columnspacing=1.3,
        handletextpad=0.5,
    )


def _draw_sweep(axes: Axes, points: Sequence[SweepPointLike], dark: bool) -> None:
    ink = _INK[dark]
    across = [point.scratchpad_bytes for point in points]
    ours = [point.non_compulsory_bytes for point in points]
    bound = [min(point.bound_bytes, point.non_compulsory_bytes) for point in points]
    series: dict[str, list[tuple[int, int]]] = {}
    for point in points:
        found: Mapping[str, int] = getattr(point, "baselines", None) or {}
        for label, nbytes in found.items():
            series.setdefault(label, []).append((point.scratchpad_bytes, nbytes))
    top = max([*ours, *(nbytes for line in series.values() for _, nbytes in line), 1])
    _frame(axes, dark, top, 7)
    axes.xaxis.set_major_locator(_ticks(max(across[-1] - across[0], across[-1] // 8, 1), 7))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.grid(visible=True, axis="both", color=ink["line"], linewidth=0.8)
    # Baselines that coincide everywhere are one line with all their names, not one hiding the others.
    merged: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for label, line in series.items():
        merged.setdefault(tuple(line), []).append(_legible(label.lstrip("_"), 40))
    for i, (curve, labels) in enumerate(merged.items()):
        colour = _BASELINE_INK[dark][i % len(_BASELINE_INK[dark])]
        dash = [(0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 3))][i % 4]
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.5, linestyle=dash, marker="o", markersize=3.5,
                  drawstyle="steps-post", label="\n".join(labels))  # fmt: skip
    proved = all(low == high for low, high in zip(bound, ours, strict=True))
    if not proved:
        axes.fill_between(
            across, bound, ours, step="post", color=ink["held"], linewidth=0, alpha=0.7, label="not yet proved"
        )
        axes.plot(across, bound, color=ink["muted"], linewidth=1.2, linestyle=(0, (1, 1.5)), drawstyle="steps-pre",
                  label="proved bound")  # fmt: skip
    # Between two budgets the smaller one's plan still fits and nothing less was looked for: a step, not a slope.
    axes.plot(across, ours, color=ink["operands"], linewidth=2.6, marker="o", markersize=6, zorder=5, clip_on=False,
              drawstyle="steps-post", label="COSMA, proved optimal at the dots" if proved else "COSMA")  # fmt: skip
    axes.set_ylim(0, top * 1.06)
    axes.margins(x=0.03)
    axes.set_xlabel("scratchpad", color=ink["muted"], size=11)
    axes.set_ylabel("non-compulsory bytes", color=ink["muted"], size=11)
    legend = axes.legend(
        loc="upper right",
        frameon=True,
        facecolor=ink["page"],
        edgecolor=ink["line"],
        labelcolor=ink["ink"],
        fontsize=10,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _frame(axes: Axes, dark: bool, height: int = 0, ticks: int = 0) -> None:
    """Plain axes, ``height`` bytes tall with about ``ticks`` ticks in binary units (0: none)."""
    ink = _INK[dark]
    axes.set_facecolor(ink["page"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink["line"])
    axes.tick_params(colors=ink["muted"], labelsize=9, length=0)
    axes.set_axisbelow(True)
    if ticks:
        axes.yaxis.set_major_locator(_ticks(height, ticks))
        axes.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
        axes.grid(visible=True, axis="y", color=ink["line"], linewidth=0.8)


def _ticks(span: float, count: int) -> Any:
    """Ticks at multiples of a power of two of bytes, at most ``count`` and one of them over ``span``."""
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(2 ** max(0, math.ceil(math.log2(max(span, 1) / count))))


def _scale(budget: int, used: int) -> int:
    """Bytes an axis spans: the scratchpad, or what is used where that is a small part of it."""
    return max(budget if used * 2 >= budget else used * 6 // 5, used, 1)


def _legible(text: str, room: int, *, tail: bool = False) -> str:
    """``text`` in at most ``room`` characters that the figure's font has, shortened in the middle or to its tail."""
    plain = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    if len(plain) <= room:
        return plain
    # Names of one network share their beginnings: the end tells them apart.
    kept = room - 1 if tail else max((room - 1) // 2, 1)
    return f"{plain[: room - 1 - kept]}…{plain[-kept:]}"


def _suffix(path: str | os.PathLike[str]) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"'{Path(path).name}' ends in neither .svg nor .png; name the picture *.svg or *.png")
    return suffix[1:]


def _style() -> dict[str, Any]:
    return {
        # DejaVu comes with matplotlib and decides the layout; the others are about as wide, for a viewer without it.
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Bitstream Vera Sans", "Arial", "sans-serif"],
        # Text stays text: it can be searched, selected and read aloud.
        "svg.fonttype": "none",
        # A fixed salt and no date: the same plan gives the same file.
        "svg.hashsalt": "retensor",
        "axes.unicode_minus": False,
        "text.usetex": False,
    }


def _save(figure: Figure, path: str | os.PathLike[str], suffix: str, title: str) -> None:
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Title": _legible(title, 120)}
    if suffix == "svg":
        metadata["Date"] = None
    figure.savefig(buffer, format=suffix, metadata=metadata, facecolor=figure.get_facecolor())
    write_atomic(path, buffer.getvalue())
