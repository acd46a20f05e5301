"""The picture of a plan for papers and READMEs: the scratchpad as address by step.

:func:`plot_plan` draws each residency as a rectangle, the transfers on a lane below it and the occupancy
below that. It uses matplotlib's object interface, so no global figure, backend or style is touched.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import numpy as np

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
from retensor.planning.drawing import INK, legible, picture_suffix, save, style
from retensor.planning.plan import Plan
from retensor.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ACROSS = 1074
"""Pixels that the steps span."""
_MARKERS = {"spill": "v", "retrieve": "^", "load": "^", "store": "v"}


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
    suffix = picture_suffix(path)
    check_graph(graph, plan)
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12, 7), dpi=100, facecolor=INK[dark]["page"])
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
        save(figure, path, suffix, f"Memory plan of {graph.name}")


def _draw_map(axes: Axes, graph: Graph, plan: Plan, dark: bool) -> None:
    from matplotlib.collections import PolyCollection

    ink, fills, shade = INK[dark], palette(dark), shades(graph, plan)
    steps = len(plan.order)
    top = max((stay.address + graph.tensors[stay.tensor].nbytes for stay in plan.residencies), default=0)
    height = _scale(plan.scratchpad_bytes, top)
    plain_axes(axes, dark, height, 7)
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
            legible(plan.order[step], 22, tail=True),
            (step + 0.5, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0 if upright else 3, -6),
            textcoords="offset points",
            ha="center" if upright else "right",
            va="top",
            rotation=0 if upright else 38,
            rotation_mode="default" if upright else "anchor",
            size=8,
            color=INK[dark]["muted"],
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
        axes.add_collection(LineCollection(lines, colors=INK[dark][kind], linewidths=width, capstyle="butt", zorder=3))


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
        text = legible(stay.tensor, room, tail=True)
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
            color=INK[dark]["label"],
            clip_on=True,
            parse_math=False,
            zorder=4,
        )


def _draw_lane(axes: Axes, plan: Plan, dark: bool) -> None:
    ink = INK[dark]
    plain_axes(axes, dark)
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
    ink = INK[dark]
    resident, needed = occupancy_of(graph, plan)
    height = _scale(plan.scratchpad_bytes, int(resident.max(initial=0)))
    plain_axes(axes, dark, height, 4)
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

    ink, fills = INK[dark], palette(dark)
    figure.text(
        0.02, 0.958, legible(graph.name, 60), size=16, weight="bold", color=ink["ink"], va="center", parse_math=False
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


def plain_axes(axes: Axes, dark: bool, height: int = 0, ticks: int = 0) -> None:
    """Plain axes, ``height`` bytes tall with about ``ticks`` ticks in binary units (0: none)."""
    ink = INK[dark]
    axes.set_facecolor(ink["page"])
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink["line"])
    axes.tick_params(colors=ink["muted"], labelsize=9, length=0)
    axes.set_axisbelow(True)
    if ticks:
        axes.yaxis.set_major_locator(binary_ticks(height, ticks))
        axes.yaxis.set_major_formatter(lambda value, _: format_bytes(value))
        axes.grid(visible=True, axis="y", color=ink["line"], linewidth=0.8)


def binary_ticks(span: float, count: int) -> Any:
    """Ticks at multiples of a power of two of bytes, at most ``count`` and one of them over ``span``."""
    from matplotlib.ticker import MultipleLocator

    return MultipleLocator(2 ** max(0, math.ceil(math.log2(max(span, 1) / count))))


def _scale(budget: int, used: int) -> int:
    """Bytes an axis spans: the scratchpad, or what is used where that is a small part of it."""
    return max(budget if used * 2 >= budget else used * 6 // 5, used, 1)
