"""What every picture shares: ink for a light and a dark page, the style of the text, and how a file is written."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retensor.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = {
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
"""Colours by what they draw, for a light page (False) and a dark one."""


def legible(text: str, room: int, *, tail: bool = False) -> str:
    """``text`` in at most ``room`` characters that the figure's font has, shortened in the middle or to its tail."""
    plain = "".join(c if c.isprintable() and ord(c) < 0x250 else "?" for c in text)
    if len(plain) <= room:
        return plain
    # Names of one network share their beginnings: the end tells them apart.
    kept = room - 1 if tail else max((room - 1) // 2, 1)
    return f"{plain[: room - 1 - kept]}…{plain[-kept:]}"


def picture_suffix(path: str | os.PathLike[str]) -> str:
    """``svg`` or ``png``, as the path ends.

    Raises
    ------
    ValueError
        Where it ends otherwise.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".svg", ".png"):
        raise ValueError(f"'{Path(path).name}' ends in neither .svg nor .png; name the picture *.svg or *.png")
    return suffix[1:]


def style() -> dict[str, Any]:
    """Settings of matplotlib for a picture, to put around its drawing: ``with matplotlib.rc_context(style())``."""
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


def save(figure: Figure, path: str | os.PathLike[str], suffix: str, title: str) -> None:
    """Write a figure, whole or not at all; the same figure gives the same file."""
    buffer = io.BytesIO()
    metadata: dict[str, Any] = {"Title": legible(title, 120)}
    if suffix == "svg":
        metadata["Date"] = None
    figure.savefig(buffer, format=suffix, metadata=metadata, facecolor=figure.get_facecolor())
    write_atomic(path, buffer.getvalue())
