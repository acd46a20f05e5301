"""A film of a predicted wave beside the true one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from retensor.files import described, writable_target, write_atomic

SHOWN = 0.99
"""The part of the true wave's numbers that lies within the scale of colours."""


def film(
    true: Any,
    predicted: Any,
    path: str | os.PathLike[str],
    *,
    dt: float | None = None,
    rate: int = 10,
    title: str = "",
) -> None:
    """Write a GIF with three pictures side by side: the true wave, the predicted one, and their difference.

    Parameters
    ----------
    true, predicted : array or torch.Tensor
        States of shape (times, n, n), both alike. All pictures have one scale, that of the true wave without its
        highest hundredth.
    path : str or path
        Written whole or not at all.
    dt : float, optional
        From one state to the next, for the time in the heading; states are numbered without it.
    rate : int
        States a second.
    title : str

    Raises
    ------
    ValueError
        Where the shapes are others, or differ.
    RetensorError
        Where the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     film(np.ones((3, 8, 8)), np.zeros((3, 8, 8)), Path(folder) / "wave.gif")
    ...     (Path(folder) / "wave.gif").read_bytes()[:3]
    b'GIF'
    """
    seen, guessed = (np.asarray(states, dtype=np.float64) for states in (true, predicted))
    if seen.ndim != 3 or seen.shape != guessed.shape or not seen.size:
        raise ValueError(
            f"states of shapes {described(seen.shape)} and {described(guessed.shape)} make no film; both need the same "
            "(times, n, n)"
        )
    if rate < 1:
        raise ValueError(f"rate is {rate}; at least one state a second is shown")
    writable_target(path, f"cannot write '{path}'")
    from matplotlib.animation import FuncAnimation, PillowWriter
    from matplotlib.figure import Figure

    # A wave begins as one high bump and spreads: its first states may be cut off, so that the others can be seen.
    limit = float(np.quantile(np.abs(seen), SHOWN)) or float(np.abs(seen).max()) or 1.0
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    axes = figure.subplots(1, 3)
    images = []
    for axis, name in zip(axes, ("true", "predicted", "difference"), strict=True):
        axis.set(title=name, xticks=[], yticks=[])
        blank = np.zeros(seen.shape[1:])
        images.append(axis.imshow(blank, cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", extent=(0, 1, 0, 1)))
    figure.colorbar(images[-1], ax=axes, shrink=0.8, label="displacement", extend="both")
    heading = figure.suptitle(" ")

    def draw(at: int) -> list[Any]:
        difference = guessed[at] - seen[at]
        for image, state in zip(images, (seen[at], guessed[at], difference), strict=True):
            image.set_data(state)
        norm = np.linalg.norm(seen[at])
        apart = f", {np.linalg.norm(difference) / norm:.1%} apart" if norm else ""
        when = f"state {at + 1}" if dt is None else f"t = {at * dt:.3f}"
        heading.set_text(f"{title}{': ' if title else ''}{when}{apart}")
        return [*images, heading]

    animation = FuncAnimation(figure, draw, frames=len(seen))
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "film.gif"
        animation.save(str(made), writer=PillowWriter(fps=rate), dpi=80)
        write_atomic(path, made.read_bytes())
