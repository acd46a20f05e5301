"""A grid of recipes, trained on tasks over seeds: resumable, in parallel, and its frontier over overhead.

Runs are kept in a file of JSON lines as soon as they are done, ``{"schema": "retensor.fp4-sweep/1"}`` first; a sweep
that was stopped goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from retensor.compression.fp4.format import Format
from retensor.compression.fp4.overhead import Overhead
from retensor.compression.fp4.recipe import Recipe
from retensor.errors import RetensorError
from retensor.files import brief, described, write_atomic

SCHEMA = "retensor.fp4-sweep/1"
BASELINE = {"format": "float32"}
"""The settings of a run in full precision."""
_FORMAT = {part.name for part in fields(Format)}
_RECIPE = {part.name for part in fields(Recipe)} - {"fwd", "bwd", "formats", "roundings", "seed"}
_OFF = {"q_grad": "ste", "q_grad_x": "ste", "scale_grad": "none"}

Training = Callable[["Recipe | None", int], "Mapping[str, float] | float"]
"""Of a recipe (None: full precision) and a seed: the loss, or figures by name with ``"loss"`` among them."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes
    ----------
    task : str
    settings : dict
        What of the grid it was; :data:`BASELINE` for full precision.
    seed : int
    figures : dict of str to float
        What the training gave, and ``"overhead"``, ``"passes"`` and ``"bits"`` where a cost was asked for.
    failed : str, optional
        Why it has no finite loss.
    seconds : float
    """

    task: str
    settings: dict[str, Any]
    seed: int
    figures: dict[str, float]
    failed: str | None = None
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """What tells it from others in a file."""
        return _key(self.task, self.settings, self.seed)


@dataclass(frozen=True)
class Point:
    """One setting of a sweep on a plane: means over its seeds."""

    settings: dict[str, Any]
    x: float
    y: float

    @property
    def name(self) -> str:
        """Short enough for a picture: what is off, or straight through, is left out."""
        parts = []
        for name, value in self.settings.items():
            if _OFF.get(name) == value:
                continue
            if value is True:
                parts.append(name)
            elif isinstance(value, Mapping) and value:
                parts.append(f"{name} " + " ".join(f"{key} {one}" for key, one in value.items()))
            elif value and not isinstance(value, Mapping):
                parts.append(value if isinstance(value, str) and name not in _OFF else f"{name} {value}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Sweep:
    """Runs of a sweep.

    Attributes
    ----------
    runs : tuple of Run
        In the order of tasks, settings and seeds.
    skipped : dict of str to str
        Settings of the grid that make no recipe, and why.
    """

    runs: tuple[Run, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    def records(self) -> list[dict[str, Any]]:
        """A flat dict for each run: ``pandas.DataFrame(found.records())``."""
        return [
            {"task": run.task, **run.settings, "seed": run.seed, **run.figures, "failed": run.failed,
             "seconds": run.seconds}
            for run in self.runs
        ]  # fmt: skip

    def points(
        self, x: str = "overhead", y: str = "loss", task: str | None = None, *, baseline: bool = False
    ) -> list[Point]:  # fmt: skip
        """Means over seeds of the recipes that failed for none; with ``baseline`` of full precision alone.

        Raises
        ------
        ValueError
            Where there are several tasks and none is named, or no run has such figures.
        """
        tasks = list(dict.fromkeys(run.task for run in self.runs))
        if task is None and len(tasks) > 1:
            raise ValueError(f"the sweep has the tasks {', '.join(tasks)}; name one")
        task = tasks[0] if task is None and tasks else task
        groups: dict[str, list[Run]] = {}
        for run in self.runs:
            if run.task == task and (run.settings == BASELINE) == baseline:
                groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
        whole = [
            group for group in groups.values()
            if all(run.failed is None and x in run.figures and y in run.figures for run in group)
        ]  # fmt: skip
        if not whole:
            known = sorted({name for run in self.runs for name in run.figures})
            raise ValueError(f"no setting of task '{task}' has {x} and {y} for all seeds; figures are {known}")
        return [
            Point(group[0].settings, statistics.fmean(run.figures[x] for run in group),
                  statistics.fmean(run.figures[y] for run in group))
            for group in whole
        ]  # fmt: skip

    def pareto(self, x: str = "overhead", y: str = "loss", task: str | None = None) -> list[Point]:
        """The recipes that no other is at least as good as in both and better in one, by ``x``; less is better.

        Examples
        --------
        >>> runs = [Run("t", {"scale": n}, 0, {"overhead": x, "loss": y})
        ...         for n, x, y in (("a", 1, 3), ("b", 2, 1), ("c", 3, 2))]
        >>> [point.settings["scale"] for point in Sweep(tuple(runs)).pareto()]
        ['a', 'b']
        """
        front: list[Point] = []
        for point in sorted(self.points(x, y, task), key=lambda one: (one.x, one.y)):
            if not front or point.y < front[-1].y:
                front.append(point)
        return front

    def plot(
        self, path: str | os.PathLike[str], *, x: str = "overhead", y: str = "loss", task: str | None = None,
        dark: bool = False,
    ) -> None:  # fmt: skip
        """Draw it; see :func:`retensor.compression.fp4.picture.plot_frontier`."""
        from retensor.compression.fp4.picture import plot_frontier

        points, front = self.points(x, y, task), self.pareto(x, y, task)
        whole = any(run.settings == BASELINE and y in run.figures and x in run.figures for run in self.runs)
        level = self.points(x, y, task, baseline=True)[0].y if whole else None
        plot_frontier(path, points, front, x=x, y=y, level=level, dark=dark)


def configurations(grid: Mapping[str, Sequence[Any]]) -> tuple[list[tuple[dict[str, Any], Recipe]], dict[str, str]]:
    """Every combination of a grid as a recipe; and those that make none, with the reason.

    Parameters
    ----------
    grid : mapping of str to sequence
        Names are parts of a :class:`Format`, for all six operands, or of a :class:`Recipe`.

    Returns
    -------
    list of (dict, Recipe), dict of str to str

    Raises
    ------
    ValueError, TypeError
        Where a name is neither, or there is nothing to choose from.

    Examples
    --------
    >>> made, skipped = configurations({"scale": ["e8m0", "ue5m3"], "tensor_scale": [True]})
    >>> [str(recipe) for _, recipe in made], len(skipped)
    (['e2m1·ue5m3+ts·16, SR'], 1)
    """
    for name, values in grid.items():
        if name not in _FORMAT | _RECIPE:
            known = ", ".join(sorted(_FORMAT | _RECIPE))
            raise ValueError(f"{described(name)} of the grid is no part of a format or a recipe; parts are {known}")
        if isinstance(values, str | bytes) or not isinstance(values, Sequence) or not values:
            raise TypeError(f"'{name}' of the grid is a sequence of what it may be, not {described(values)}")
    found, skipped = [], {}
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        try:
            format = Format(**{name: value for name, value in settings.items() if name in _FORMAT})
            recipe = Recipe(format, **{name: value for name, value in settings.items() if name in _RECIPE})
        except ValueError as error:
            skipped[json.dumps(settings)] = str(error)
        else:
            found.append((settings, recipe))
    return found, skipped


def sweep(
    train_fn: Training | Mapping[str, Training],
    grid: Mapping[str, Sequence[Any]],
    seeds: Iterable[int] = (0, 1, 2),
    out: str | os.PathLike[str] | None = None,
    *,
    cost: Callable[[Recipe], Overhead] | Mapping[str, Callable[[Recipe], Overhead]] | None = None,
    baseline: bool = True,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Train every recipe of a grid on every task with every seed, each once.

    Parameters
    ----------
    train_fn : function, or mapping of task to function
        Of a recipe (None for full precision) and a seed: returns the loss, or figures with ``"loss"`` among them. A
        ``FloatingPointError``, or a loss that is not finite, is a failed run and no error. With ``jobs`` it has to be
        one that joblib can send to another process.
    grid : mapping of str to sequence
        As in :func:`configurations`. Combinations that make no recipe are skipped.
    seeds : iterable of int
    out : path, optional
        A file of JSON lines, where each run is kept as soon as it is done. What it holds of this sweep already is not
        run again: name another file where ``train_fn`` has changed.
    cost : function, or mapping of task to function, optional
        Of a recipe: its :class:`Overhead`, for instance ``lambda recipe: overhead(model, recipe, batch)``. Full
        precision costs nothing.
    baseline : bool
        Whether to run full precision too.
    jobs : int, optional
        Trainings at once, as joblib's ``n_jobs``.
    progress : function, optional
        Called with how many runs are done, and of how many.

    Returns
    -------
    Sweep

    Raises
    ------
    ValueError, TypeError
        Where the grid is none.
    RetensorError
        Where the file is of another kind, damaged before its last line, or cannot be written.

    Examples
    --------
    >>> def train(recipe, seed):
    ...     return 1.0 if recipe is None else recipe.fwd.block / 16
    >>> found = sweep(train, {"block": [8, 16, 32]}, seeds=[0, 1])
    >>> len(found.runs), [point.settings for point in found.pareto(x="loss")]
    (8, [{'block': 8}])
    """
    made, skipped = configurations(grid)
    tasks: Mapping[str, Training] = train_fn if isinstance(train_fn, Mapping) else {"task": train_fn}
    costs = cost if isinstance(cost, Mapping) else dict.fromkeys(tasks, cost) if cost is not None else {}
    choices: list[tuple[dict[str, Any], Recipe | None]] = [*made]
    if baseline:
        choices.insert(0, (dict(BASELINE), None))
    seeds = list(seeds)
    asked = [(task, settings, recipe, seed) for task in tasks for settings, recipe in choices for seed in seeds]
    path = None if out is None else Path(out)
    known = {} if path is None else _read(path)
    todo = [one for one in asked if _key(one[0], one[1], one[3]) not in known]
    done = len(asked) - len(todo)
    for run in _runs(todo, tasks, costs, jobs):
        known[run.key] = run
        if path is not None:
            _append(path, run)
        done += 1
        if progress is not None:
            progress(done, len(asked))
    return Sweep(tuple(known[_key(task, settings, seed)] for task, settings, _, seed in asked), skipped)


def _runs(todo: Sequence[Any], tasks: Mapping[str, Training], costs: Mapping[str, Any], jobs: int | None) -> Any:
    import joblib

    work = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")
    return work(
        joblib.delayed(_run)(tasks[task], costs.get(task), task, settings, recipe, seed)
        for task, settings, recipe, seed in todo
    )


def _run(
    train: Training, cost: Any, task: str, settings: dict[str, Any], recipe: Recipe | None, seed: int
) -> Run:  # fmt: skip
    figures: dict[str, float] = {}
    if cost is not None:
        if recipe is None:
            figures = {"overhead": 0.0, "passes": 0.0, "bits": 32.0}
        else:
            paid = cost(recipe)
            figures = {"overhead": paid.ratio, "passes": paid.passes, "bits": paid.bits}
    start = time.perf_counter()
    failed = None
    try:
        given = train(None if recipe is None else recipe.seeded(seed), seed)
        given = given if isinstance(given, Mapping) else {"loss": given}
        figures |= {name: float(value) for name, value in given.items()}
        if "loss" not in figures:
            raise ValueError(f"a training of a sweep returns a loss, or figures with 'loss', not {described(given)}")
    except FloatingPointError as error:
        failed = brief(error)
    bad = [name for name, value in figures.items() if not math.isfinite(value)]
    if bad:
        failed = failed or f"{bad[0]} is {figures[bad[0]]}"
        figures = {name: value for name, value in figures.items() if name not in bad}
    return Run(task, settings, seed, figures, failed, time.perf_counter() - start)


def _key(task: str, settings: Mapping[str, Any], seed: int) -> str:
    text = json.dumps([task, settings, seed], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _read(path: Path) -> dict[str, Run]:
    """Runs of a file; a last line that was cut short, as by a kill, is taken off it."""
    if not path.exists():
        write_atomic(path, json.dumps({"schema": SCHEMA}) + "\n")
        return {}
    shown = brief(path)
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise RetensorError(f"cannot read '{shown}': {brief(error)}; name another file") from None
    lines = text.splitlines()
    try:
        right = bool(lines) and json.loads(lines[0])["schema"] == SCHEMA
    except (ValueError, TypeError, KeyError):
        right = False
    if not right:
        raise RetensorError(f"'{shown}' is no sweep of FP4 trainings; name another file")
    found: dict[str, Run] = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            run = Run(**json.loads(line))
            found[run.key] = run
        except (ValueError, TypeError):
            if number < len(lines) or text.endswith("\n"):
                raise RetensorError(
                    f"line {number} of '{shown}' is damaged; take it out, and its run is made again"
                ) from None
            write_atomic(path, "\n".join(lines[:-1]) + "\n")
            return found
    if not text.endswith("\n"):
        write_atomic(path, text + "\n")
    return found


def _append(path: Path, run: Run) -> None:
    try:
        with path.open("a") as stream:
            stream.write(json.dumps(asdict(run)) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise RetensorError(f"cannot write '{brief(path)}': {error.strerror or error}; make room") from error
