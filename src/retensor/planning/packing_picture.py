"""The picture of packed buffers: time across, addresses up, and below it the bytes alive at each moment."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from retensor.planning.appearance import SHADES, palette
from retensor.planning.drawing import INK, legible, picture_suffix, save, style
from retensor.planning.packing import Buffer
from retensor.planning.picture import plain_axes
from retensor.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACROSS, _UP = 1074, 440
"""Pixels of the map."""


def plot_packing(
    path: str | os.PathLike[str],
    buffers: Sequence[Buffer],
    offsets: Sequence[int],
    *,
    capacity: int | None = None,
    title: str = "buffers",
    dark: bool = False,
) -> None:
    """Draw buffers at their offsets as a picture of 1200 x 700 px.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    buffers : sequence of Buffer
    offsets : sequence of int
        In bytes, one a buffer.
    capacity : int, optional
        Drawn as a line.
    title : str
    dark : bool
        Light ink on a dark ground.

    Raises
    ------
    ValueError
        Where the suffix is another, or offsets and buffers differ in number.
    RetensorError
        Where the file cannot be written.

    Examples
    --------
    >>> plot_packing("packing.svg", buffers, found.offsets, capacity=2**20)  # doctest: +SKIP
    """
    suffix = picture_suffix(path)
    if len(buffers) != len(offsets):
        raise ValueError(f"there are {len(offsets)} offsets for {len(buffers)} buffers; give one for each")
    import matplotlib
    from matplotlib.figure import Figure

    ink = INK[dark]
    height = max((o + b.size for b, o in zip(buffers, offsets, strict=True)), default=0)
    first, last = min((b.lower for b in buffers), default=0), max((b.upper for b in buffers), default=1)
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12, 7), dpi=100, facecolor=ink["page"])
        places = figure.add_axes((0.085, 0.255, 0.895, 0.62))
        alive = figure.add_axes((0.085, 0.065, 0.895, 0.16), sharex=places)
        # Times are counted from the first: drawn numbers are floats, which cannot tell large times apart.
        _draw_places(places, buffers, offsets, first, last, height, capacity, dark)
        _draw_alive(alive, buffers, first, last, capacity, dark)
        places.set_xlim(0, last - first)
        places.tick_params(axis="x", labelbottom=False)
        alive.xaxis.set_major_formatter(lambda value, _: f"{first + round(value):,}" if value == round(value) else "")
        figure.text(
            0.02, 0.958, legible(title, 60), size=16, weight="bold", color=ink["ink"], va="center", parse_math=False
        )
        facts = f"{len(buffers):,} buffers in {format_bytes(height)}"
        if capacity is not None:
            facts += f"  ·  capacity {format_bytes(capacity)}"
        figure.text(0.02, 0.913, facts, size=10.5, color=ink["muted"], va="center")
        save(figure, path, suffix, f"Packing of {title}")


def _draw_places(
    axes: Axes,
    buffers: Sequence[Buffer],
    offsets: Sequence[int],
    first: int,
    last: int,
    height: int,
    capacity: int | None,
    dark: bool,
) -> None:
    from matplotlib.collections import PolyCollection

    ink = INK[dark]
    # A capacity far above all buffers would press them into a line.
    top = height if capacity is None or capacity > 2 * height else max(height, capacity)
    plain_axes(axes, dark, max(top, 1), 7)
    axes.set_ylim(0, max(top, 1) * 1.02)
    axes.set_ylabel("address", color=ink["muted"], size=10.5)
    if capacity is not None:
        axes.axhline(capacity, color=ink["budget"], linewidth=1.2, linestyle=(0, (5, 3)), zorder=3)
    fills, shades = palette(dark)[0], _shades(buffers, offsets, height)
    boxes = []
    for b, low in zip(buffers, offsets, strict=True):
        start, end, high = b.lower - first, b.upper - first, low + b.size
        boxes.append([(start, low), (start, high), (end, high), (end, low)])
    # An edge must not hide the box that it is around.
    edges = [
        min(0.9, 0.2 * b.size * _UP / max(top, 1), 0.2 * (b.upper - b.lower) * _ACROSS / (last - first))
        for b in buffers
    ]
    axes.add_collection(
        PolyCollection(boxes, facecolors=[fills[s] for s in shades], edgecolors=ink["page"], linewidths=edges)
    )
    for b, low in zip(buffers, offsets, strict=True):
        room = int((b.upper - b.lower) * _ACROSS / (last - first) / 5.9 - 1.4)
        tall = b.size * _UP / max(top, 1)
        if room < min(8, len(b.id)) or tall < 13:
            continue
        text = legible(b.id, room, tail=True)
        if tall >= 30 and room >= 7:
            text += f"\n{format_bytes(b.size)}"
        axes.text(
            (b.lower + b.upper) / 2 - first,
            low + b.size / 2,
            text,
            ha="center",
            va="center",
            size=7.5,
            linespacing=1.25,
            color=ink["label"],
            clip_on=True,
            parse_math=False,
            zorder=4,
        )


def _shades(buffers: Sequence[Buffer], offsets: Sequence[int], height: int) -> list[int]:
    """A shade for each buffer, so that buffers which touch differ where shades suffice."""
    order = sorted(range(len(buffers)), key=lambda i: (buffers[i].lower, offsets[i]))
    lower = np.array([b.lower for b in buffers], dtype=np.int64)
    upper = np.array([b.upper for b in buffers], dtype=np.int64)
    low = np.array(offsets, dtype=np.int64)
    high = low + np.array([b.size for b in buffers], dtype=np.int64)
    slack = height // 100
    shade = np.full(len(buffers), -1)
    used = [0] * SHADES
    for i in order:
        close = (lower <= upper[i]) & (upper >= lower[i]) & (low <= high[i] + slack) & (high >= low[i] - slack)
        taken = np.bincount(shade[close & (shade >= 0)], minlength=SHADES)
        chosen = min(range(SHADES), key=lambda s: (taken[s], used[s]))
        shade[i] = chosen
        used[chosen] += 1
    return [int(s) for s in shade]


def _draw_alive(axes: Axes, buffers: Sequence[Buffer], first: int, last: int, capacity: int | None, dark: bool) -> None:
    ink = INK[dark]
    change: dict[int, int] = {first: 0, last: 0}
    for b in buffers:
        change[b.lower] = change.get(b.lower, 0) + b.size
        change[b.upper] = change.get(b.upper, 0) - b.size
    times = sorted(change)
    alive = np.cumsum([change[t] for t in times])[:-1]
    most = max(int(alive.max(initial=0)), 1)
    top = most if capacity is None or capacity > 2 * most else max(most, capacity)
    plain_axes(axes, dark, top, 4)
    axes.set_ylim(0, top * 1.12)
    axes.stairs(alive, [t - first for t in times], fill=True, color=ink["operands"], linewidth=0)
    if capacity is not None:
        axes.axhline(capacity, color=ink["budget"], linewidth=1.2, linestyle=(0, (5, 3)))
    axes.set_ylabel("alive", color=ink["muted"], size=10.5)
    axes.set_xlabel("time", color=ink["muted"], size=10.5, labelpad=2)
