"""The frontier of performance over overhead, drawn."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from retensor.planning.drawing import INK, legible, picture_suffix, save, style

if TYPE_CHECKING:
    from retensor.compression.fp4.sweep import Point

_LABELS = {
    "overhead": "operations beside the products, for one of theirs",
    "bits": "bits an element",
    "passes": "passes over memory",
}


def plot_frontier(
    path: str | os.PathLike[str],
    points: Sequence[Point],
    front: Sequence[Point],
    *,
    x: str = "overhead",
    y: str = "loss",
    level: float | None = None,
    dark: bool = False,
) -> None:
    """Draw settings as points, and the frontier as a line with numbered names, 1200 px across.

    Parameters
    ----------
    path : path
        Ends in ``.svg`` or ``.png``.
    points, front : sequence of Point
        All of them, and those that no other beats.
    x, y : str
        What they are.
    level : float, optional
        ``y`` of full precision, drawn as a line.
    dark : bool
        Light ink on a dark ground.

    Raises
    ------
    ValueError
        Where the suffix is another.
    RetensorError
        Where the file cannot be written.
    """
    suffix = picture_suffix(path)
    import matplotlib
    from matplotlib.figure import Figure

    ink = INK[dark]
    names = [f"{i}  {point.y:.4g}  {legible(point.name, 66)}" for i, point in enumerate(front, 1)]
    height = max(5.2, 1.6 + 0.24 * len(names))
    with matplotlib.rc_context(style()):
        figure = Figure(figsize=(12, height), dpi=100, facecolor=ink["page"])
        title = f"{y} against {x}"
        figure.text(0.02, 1 - 0.3 / height, legible(title, 80), size=16, weight="bold", color=ink["ink"], va="center",
                    parse_math=False)  # fmt: skip
        told = f"{len(points)} settings, means over seeds; the {len(front)} that no other beats are numbered"
        figure.text(0.02, 1 - 0.62 / height, told, size=10.5, color=ink["muted"], va="center", parse_math=False)
        panel = figure.add_axes((0.07, 0.6 / height, 0.45, 1 - 1.6 / height))
        panel.set_facecolor(ink["page"])
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(ink["line"])
        panel.tick_params(colors=ink["muted"], labelsize=8.5, length=0)
        panel.set_xlabel(legible(_LABELS.get(x, x), 60), size=10, color=ink["ink"], parse_math=False)
        panel.set_ylabel(legible(y, 40), size=10, color=ink["ink"], parse_math=False)
        panel.scatter([p.x for p in points], [p.y for p in points], s=16, color=ink["held"], linewidths=0)
        panel.step([p.x for p in front], [p.y for p in front], where="post", color=ink["operands"], linewidth=1.4)
        panel.scatter([p.x for p in front], [p.y for p in front], s=30, color=ink["operands"], zorder=3)
        if level is not None:
            panel.axhline(level, color=ink["muted"], linewidth=0.9, linestyle=(0, (4, 3)))
            panel.annotate(f"full precision {level:.4g}", (0.99, level), xycoords=("axes fraction", "data"), size=8.5,
                           xytext=(0, 3), textcoords="offset points", ha="right", color=ink["muted"])  # fmt: skip
        best = max(point.y for point in front)
        values = sorted(point.y for point in points)
        # Settings that do not train at all would press the others onto the axis.
        if values[-1] > 4 * values[len(values) // 2] > 0 and best < values[-1]:
            panel.set_yscale("log")
        for i, point in enumerate(front, 1):
            panel.annotate(str(i), (point.x, point.y), xytext=(4, 5), textcoords="offset points", size=9,
                           color=ink["label"])  # fmt: skip
        for i, name in enumerate(names):
            at = 1 - (1.1 + 0.24 * i) / height
            figure.text(0.545, at, name, size=9, color=ink["ink"], va="center", parse_math=False)
        save(figure, path, suffix, title)
