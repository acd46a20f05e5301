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

ROTATED = dict.fromkeys(fp4.GEMMS, 16)
PLAIN: dict[str, Sequence[Any]] = {
    "element": ["e2m1"], "scale": ["ue5m3"], "tensor_scale": [True], "block": [16], "rounding_bwd": ["stochastic"],
    "hadamard": [{}], "q_grad": ["ste"], "q_grad_x": ["ste"], "scale_grad": ["none"], "outlier": [None],
}  # fmt: skip
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "formats": PLAIN | {
        "scale": ["e8m0", "e4m3", "ue5m3"], "tensor_scale": [False, True], "block": [16, 32],
        "rounding_bwd": ["nearest", "stochastic"], "hadamard": [{}, {"wgrad": 16}, ROTATED],
    },
    "gradients": PLAIN | {
        "q_grad": fp4.ESTIMATORS, "scale_grad": fp4.SCALE_GRADIENTS, "outlier": [None, 0.99],
    },
    "elements": PLAIN | {"element": ["e2m1", "e2m3", "e3m2"], "block": [8, 16, 32, 64]},
}  # fmt: skip
"""Each a Cartesian product of some axes of the design space, the others as a plain recipe has them.

Slopes are those of weights, which estimators were made for; activations keep that of 1."""
SWEPT_SEEDS, SWEPT_RATE = (1, 2), 1.6e-2


def swept(recipe: fp4.Recipe | None, seed: int) -> dict[str, float]:
    return trained("digits", recipe, seed, SWEPT_RATE)


def cost_of(recipe: fp4.Recipe) -> fp4.Overhead:
    model, batch = network("digits")
    return fp4.overhead(model, recipe, batch, include=["2", "4"])


def frontier(progress: Callable[[str], None]) -> Rows:
    """A sweep, stopped and gone on with, and its frontier."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "runs.jsonl")
        first = {name: values[:1] for name, values in GRIDS["formats"].items()}
        fp4.sweep(swept, first, SWEPT_SEEDS, path, cost=cost_of)
        before = len(path.read_text().splitlines())
        parts = {
            name: fp4.sweep(
                swept, grid, SWEPT_SEEDS, path, cost=cost_of, jobs=2,
                progress=lambda done, of, name=name: progress(f"{done} of {of}, {name}") if done % 20 == 0 else None,
            )
            for name, grid in GRIDS.items()
        }  # fmt: skip
        lines = len(path.read_text().splitlines())
        # A recipe of several grids, and full precision, is one run for each seed in the file.
        runs = {run.key: run for part in parts.values() for run in part.runs}
        skipped = {what: why for part in parts.values() for what, why in part.skipped.items()}
        found = fp4.Sweep(tuple(runs.values()), skipped)
        found.plot(Path(folder, "frontier.svg"))
    points, front = found.points(), found.pareto()
    level = found.points(baseline=True)[0].y
    formats, gradients = parts["formats"], parts["gradients"]
    effects = {
        "tensor scaling, E4M3": _effect(formats, "tensor_scale", False, True, "e4m3"),
        "tensor scaling, UE5M3": _effect(formats, "tensor_scale", False, True, "ue5m3"),
        "stochastic rounding": _effect(formats, "rounding_bwd", "nearest", "stochastic"),
        "RHT(dW)": _effect(formats, "hadamard", {}, {"wgrad": 16}),
        "RHT(all)": _effect(formats, "hadamard", {}, ROTATED),
    }
    slopes = {
        **{name: _effect(gradients, "q_grad", "ste", name) for name in fp4.ESTIMATORS if name != "ste"},
        **{f"scale {name}": _effect(gradients, "scale_grad", "none", name) for name in ("ste", "relaxed")},
        "outliers": _effect(gradients, "outlier", None, 0.99),
    }
    setting = (
        f"digits, mean of {len(SWEPT_SEEDS)} seeds, learning rate {SWEPT_RATE:g}; pairs of recipes that differ in it "
        "alone, interval over pairs"
    )
    claims = [
        _lower("Tensor scaling, stochastic rounding and Hadamard transforms each lower the loss over the design space.",
               setting, "best performance-to-overhead together", effects),
        _lower("Slopes, gradients of scales and apart outliers lower the loss over the design space.",
               setting, "mixed", slopes),
        Claim(
            "The best of the frontier of loss over overhead has Hadamard, tensor scaling and stochastic rounding.",
            f"{len(points)} recipes of {len(GRIDS)} grids ({len(found.skipped)} combinations make none); operations "
            "beside the products for one of theirs",
            f"recipes without one or the other; float32, loss {level:.4f}",
            "best performance-to-overhead",
            "; ".join(f"{point.name}: {point.x:.1%}, loss {point.y:.4f}" for point in front),
            verdict(_together(front[-1].settings), any(_together(point.settings) for point in front)),
            f"Means of {len(SWEPT_SEEDS)} seeds: neighbours on the frontier may change places.",
        ),
        Claim(
            "(ours) A sweep that was stopped makes no run twice.",
            f"{before - 1} runs, then {len(GRIDS)} whole grids that share some recipes, through joblib on 2 processes, "
            "one file",
            "all runs",
            "none",
            f"{lines - before} runs made afterwards, {len(runs)} in all",
            verdict(lines - 1 == len(runs)),
        ),
    ]  # fmt: skip
    rows = [(point.name, f"{point.x:.2%}", f"{point.y:.4f}", "yes" if point in front else "")
            for point in sorted(points, key=lambda point: point.y)]  # fmt: skip
    return claims, [Table("The sweep, best first", ("Recipe", "Overhead", "Training loss", "On the frontier"), rows)]


def _lower(statement: str, setting: str, paper: str, effects: dict[str, Difference]) -> Claim:
    above = [gain.above() for gain in effects.values()]
    return Claim(
        statement,
        setting,
        "the same recipe without",
        paper,
        "loss lower by " + ", ".join(f"{gain} ({name})" for name, gain in effects.items()),
        verdict(all(above), any(above)),
        " ".join(f"{name}: {gain.why}" for name, gain in effects.items() if not gain.above()),
    )


def _effect(found: fp4.Sweep, name: str, off: Any, on: Any, scale: str | None = None) -> Difference:
    """By how much a part lowers the loss, over pairs of recipes that differ in it alone, each the mean of its seeds.

    Recipes of one seed start from the same weights, so that their seeds are no further pairs.
    """
    losses: dict[str, dict[str, float]] = {}
    for point in found.points(x="loss"):
        if point.settings["scale"] == scale if scale else _ranged(point.settings):
            rest = str({key: value for key, value in point.settings.items() if key != name})
            losses.setdefault(rest, {})[str(point.settings[name])] = point.y
    pairs = [(by[str(off)], by[str(on)]) for by in losses.values() if str(off) in by and str(on) in by]
    return paired([before for before, _ in pairs], [after for _, after in pairs], 4)


def _together(settings: dict[str, Any]) -> bool:
    return bool(settings["hadamard"] and settings["tensor_scale"]) and settings["rounding_bwd"] == "stochastic"


def _ranged(settings: dict[str, Any]) -> bool:
    """Whether scales have the range to train at all."""
    return settings["scale"] != "e4m3" or bool(settings["tensor_scale"])
