"""The design space swept on digits: what each part of a recipe is worth, and the frontier of loss over overhead."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fp4_rows import Rows
from benchmarks.fp4_trainings import network, trained
from benchmarks.measuring import Difference, paired, verdict

from retensor.claims import Claim, Table
from retensor.compression import fp4

GRID: dict[str, Sequence[Any]] = {
    "scale": ["e8m0", "e4m3", "ue5m3"],
    "tensor_scale": [False, True],
    "block": [16, 32],
    "rounding_bwd": ["nearest", "stochastic"],
    "hadamard": [{}, {"wgrad": 16}, dict.fromkeys(fp4.GEMMS, 16)],
}
SWEPT_SEEDS, SWEPT_RATE = (1, 2), 8e-3


def swept(recipe: fp4.Recipe | None, seed: int) -> dict[str, float]:
    return trained("digits", recipe, seed, SWEPT_RATE)


def cost_of(recipe: fp4.Recipe) -> fp4.Overhead:
    model, batch = network("digits")
    return fp4.overhead(model, recipe, batch, include=["2", "4"])


def frontier(progress: Callable[[str], None]) -> Rows:
    """A sweep, stopped and gone on with, and its frontier."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs.jsonl")
        first = {name: values[:1] for name, values in GRID.items()}
        fp4.sweep(swept, first, SWEPT_SEEDS, path, cost=cost_of)
        before = len(path.read_text().splitlines())
        found = fp4.sweep(
            swept, GRID, SWEPT_SEEDS, path, cost=cost_of, jobs=2,
            progress=lambda done, of: progress(f"{done} of {of} swept") if done % 20 == 0 else None,
        )  # fmt: skip
        runs, lines = len(found.runs), len(path.read_text().splitlines())
        found.plot(Path(folder, "frontier.svg"))
    points, front = found.points(), found.pareto()
    effects = {
        "tensor scaling, E4M3": _effect(found, "tensor_scale", False, True, "e4m3"),
        "tensor scaling, UE5M3": _effect(found, "tensor_scale", False, True, "ue5m3"),
        "stochastic rounding": _effect(found, "rounding_bwd", "nearest", "stochastic"),
        "RHT(dW)": _effect(found, "hadamard", {}, {"wgrad": 16}),
        "RHT(all)": _effect(found, "hadamard", {}, dict.fromkeys(fp4.GEMMS, 16)),
    }
    claim = Claim(
        "Tensor scaling, stochastic rounding and Hadamard transforms each pay on the frontier of loss over overhead.",
        f"digits, {len(points)} recipes ({len(found.skipped)} of the grid make none), {len(SWEPT_SEEDS)} seeds, one "
        "rate; operations beside the products for one of theirs",
        "the same recipe and seed without, over all recipes that train (pairs of one seed are not independent)",
        "best performance-to-overhead together",
        "loss lower by "
        + ", ".join(f"{gain} ({name})" for name, gain in effects.items())
        + f"; frontier from {front[0].x:.1%} (loss {front[0].y:.4f}) to {front[-1].x:.1%} ({front[-1].y:.4f})",
        verdict(all(gain.above() for gain in effects.values()), any(gain.above() for gain in effects.values())),
        " ".join(f"{name}: {gain.why}" for name, gain in effects.items() if not gain.above()),
    )
    resumed = Claim(
        "(ours) A sweep that was stopped makes no run twice.",
        f"{before - 1} runs, then the whole grid, through joblib on 2 processes, one file",
        "all runs",
        "none",
        f"{lines - before} runs made afterwards, {runs} in all",
        verdict(lines - 1 == runs),
    )
    rows = [(point.name, f"{point.x:.2%}", f"{point.y:.4f}", "yes" if point in front else "")
            for point in sorted(points, key=lambda point: point.y)]  # fmt: skip
    return [claim, resumed], [
        Table("The sweep, best first", ("Recipe", "Overhead", "Training loss", "On the frontier"), rows)
    ]


def _effect(found: fp4.Sweep, name: str, off: Any, on: Any, scale: str | None = None) -> Difference:
    """By how much a part of a recipe lowers the loss, over pairs of runs that differ in it alone."""
    runs = {
        (
            str({key: value for key, value in run.settings.items() if key != name}),
            run.seed,
            str(run.settings[name]),
        ): run
        for run in found.runs
        if name in run.settings
        and run.failed is None
        and (run.settings["scale"] == scale if scale else _ranged(run.settings))
    }
    pairs = [
        (before.figures["loss"], runs[rest, seed, str(on)].figures["loss"])
        for (rest, seed, value), before in runs.items()
        if value == str(off) and (rest, seed, str(on)) in runs
    ]
    return paired([before for before, _ in pairs], [after for _, after in pairs], 4)


def _ranged(settings: dict[str, Any]) -> bool:
    """Whether scales have the range to train at all."""
    return settings["scale"] != "e4m3" or bool(settings["tensor_scale"])
