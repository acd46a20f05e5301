"""Traffic against scratchpad as a picture: one network with its bound and baselines, or a curve for each of several.

Like :mod:`.picture`, whose axes it uses, it touches no global figure, backend or style.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from retensor.planning.drawing import INK, legible, picture_suffix, save, style
from retensor.planning.picture import binary_ticks, plain_axes
from retensor.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BASELINE_INK = {
    False: ("#8a4fb0", "#b25a00", "#0f7d70", "#a33a5e", "#5b6675"),
    True: ("#c79bea", "#f2a65a", "#56c7b8", "#f08fb0", "#a3aebd"),
}
_CURVE_INK = {
    False: ("#2f5fa8", "#b25a00", "#0f7d70", "#8a4fb0", "#a33a5e", "#5b6675", "#7a6a00", "#1f7fb0"),
    True: ("#6f9fe0", "#f2a65a", "#56c7b8", "#c79bea", "#f08fb0", "#a3aebd", "#d9c95a", "#6cc4ef"),
}
_CURVE_MARKERS = "osD^vP*X"
_WIDE = 12
"""Where sizes of several networks differ by more than this factor, equal factors are drawn as equal distances."""
_MOST_NAMES = 20


class SweepPointLike(Protocol):
    """What :func:`plot_sweep` reads of a point.

    An optional ``baselines`` maps labels to bytes; points that differ in an optional ``model``, ``parameters`` or
    ``accelerator.alignment`` are points of different curves.
    """

    @property
    def scratchpad_bytes(self) -> int:
        """Bytes of the scratchpad."""

    @property
    def non_compulsory_bytes(self) -> int | None:
        """Bytes spilled and retrieved with that scratchpad; None where nothing runs."""

    @property
    def bound_bytes(self) -> int | None:
        """A proved lower bound of those bytes."""


class _Point(NamedTuple):
    scratchpad: int
    traffic: int
    bound: int
    baselines: Mapping[str, int]


def plot_sweep(
    path: str | os.PathLike[str],
    points: Sequence[SweepPointLike],
    *,
    title: str | None = None,
    dark: bool = False,
) -> None:
    """Draw non-compulsory traffic against scratchpad: the plans, their proved bound and any baselines.

    Of several networks there is a curve for each, without baselines; points where nothing runs are left out.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    points : sequence
        At least one that runs; each with ``scratchpad_bytes``, ``non_compulsory_bytes``, ``bound_bytes`` and
        optionally ``baselines``, a mapping of label to bytes.
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
    suffix = picture_suffix(path)
    curves = _curves(points)
    if not curves:
        raise ValueError("a sweep without points cannot be drawn; give at least one point where the model runs")
    import matplotlib
    from matplotlib.figure import Figure

    heading = title or "Off-chip traffic by scratchpad"
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12, 7), dpi=100, facecolor=INK[dark]["page"])
        axes = figure.add_axes((0.085, 0.11, 0.895, 0.765))
        if len(curves) == 1:
            _draw_one(axes, next(iter(curves.values())), dark)
        else:
            _draw_several(axes, curves, dark)
        figure.text(
            0.02,
            0.955,
            legible(heading, 90),
            size=16,
            weight="bold",
            color=INK[dark]["ink"],
            va="center",
            parse_math=False,
        )
        figure.text(
            0.02,
            0.915,
            "bytes spilled and retrieved in one run; loads and stores that no plan avoids are not counted",
            size=10.5,
            color=INK[dark]["muted"],
            va="center",
        )
        save(figure, path, suffix, heading)


def _curves(points: Sequence[SweepPointLike]) -> dict[str, list[_Point]]:
    """Points that run by the name of their curve, smallest scratchpad first."""
    rows = [
        (
            str(getattr(point, "model", "")),
            bool(getattr(point, "parameters", False)),
            int(getattr(getattr(point, "accelerator", None), "alignment", 1)),
            _Point(
                point.scratchpad_bytes,
                point.non_compulsory_bytes,
                min(point.bound_bytes or 0, point.non_compulsory_bytes),
                getattr(point, "baselines", None) or {},
            ),
        )
        for point in points
        if point.non_compulsory_bytes is not None
    ]
    both, aligned = len({row[1] for row in rows}) > 1, len({row[2] for row in rows}) > 1
    curves: dict[str, list[_Point]] = {}
    for model, parameters, alignment, point in rows:
        # What all curves have in common is left out of their names.
        name = model + (", with parameters" if both and parameters else "")
        curves.setdefault(name + (f", alignment {alignment}" if aligned else ""), []).append(point)
    return {name: sorted(curve, key=lambda point: point.scratchpad) for name, curve in curves.items()}


def _draw_one(axes: Axes, points: Sequence[_Point], dark: bool) -> None:
    ink = INK[dark]
    across, ours, bound = _columns(points)
    series: dict[str, list[tuple[int, int]]] = {}
    for point in points:
        for label, nbytes in point.baselines.items():
            series.setdefault(label, []).append((point.scratchpad, nbytes))
    top = max([*ours, *(nbytes for line in series.values() for _, nbytes in line), 1])
    plain_axes(axes, dark, top, 7)
    axes.xaxis.set_major_locator(binary_ticks(max(across[-1] - across[0], across[-1] // 8, 1), 7))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.grid(visible=True, axis="both", color=ink["line"], linewidth=0.8)
    # Baselines that coincide everywhere are one line with all their names, not one hiding the others.
    merged: dict[tuple[tuple[int, int], ...], list[str]] = {}
    for label, line in series.items():
        merged.setdefault(tuple(line), []).append(legible(label.lstrip("_"), 40))
    for i, (curve, labels) in enumerate(merged.items()):
        colour = _BASELINE_INK[dark][i % len(_BASELINE_INK[dark])]
        dash = [(0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 3))][i % 4]
        axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.5, linestyle=dash, marker="o", markersize=3.5,
                  drawstyle="steps-post", label="\n".join(labels))  # fmt: skip
    proved = ours == bound
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
    _name_axes(axes, dark)


def _draw_several(axes: Axes, curves: Mapping[str, Sequence[_Point]], dark: bool) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    across, above, _ = _columns([point for curve in curves.values() for point in curve])
    least, most, top = min(across), max(across), max([*above, 1])
    plain_axes(axes, dark, top, 7)
    if most > _WIDE * least:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(LogLocator(base=4 if most > 64 * least else 2))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(binary_ticks(max(most - least, most // 8, 1), 7))
    peaks = [peak for curve in curves.values() if (peak := max(point.traffic for point in curve))]
    if peaks and top > _WIDE * min(peaks):
        # Zero, which a logarithm does not have, is where curves end.
        axes.set_yscale("symlog", base=4, linthresh=min(nbytes for nbytes in above if nbytes), linscale=0.6)
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(0, top * 2)
    else:
        axes.set_ylim(0, top * 1.06)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.grid(visible=True, axis="both", color=INK[dark]["line"], linewidth=0.8)
    for i, (name, curve) in enumerate(curves.items()):
        colour = _CURVE_INK[dark][i % len(_CURVE_INK[dark])]
        wide, ours, bound = _columns(curve)
        proved = bound == ours
        # A label that begins with an underscore is left out of the legend.
        label = legible(name.lstrip("_"), 48, tail=True) + ("" if proved else " (shaded: not yet proved)")
        if not proved:
            axes.fill_between(wide, bound, ours, step="post", color=colour, linewidth=0, alpha=0.18)
        axes.plot(wide, ours, color=colour, linewidth=2.2, marker=_CURVE_MARKERS[i % len(_CURVE_MARKERS)],
                  markersize=5.5, zorder=5, clip_on=False, drawstyle="steps-post",
                  label=label if i < _MOST_NAMES else "_")  # fmt: skip
    _name_axes(axes, dark)


def _columns(points: Sequence[_Point]) -> tuple[list[int], list[int], list[int]]:
    """Scratchpads, traffic and bounds."""
    return [p.scratchpad for p in points], [p.traffic for p in points], [p.bound for p in points]


def _name_axes(axes: Axes, dark: bool) -> None:
    ink = INK[dark]
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
