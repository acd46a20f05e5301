"""Many plans at once: models by accelerators, or a curve of traffic against scratchpad for each model.

Each plan is solved on its own; two exact facts then sharpen all plans of one network. A plan for a smaller
scratchpad is a plan for a larger one, so traffic never has to rise with the budget; and what was proved
to be needed in a larger scratchpad is needed in a smaller one, so a bound carries downwards.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from retensor.errors import InfeasibleError
from retensor.files import described
from retensor.graph.structure import Graph
from retensor.planning.accelerators import PRESETS, accelerator_named
from retensor.planning.bounds import Bounds
from retensor.planning.cache import PlanCache
from retensor.planning.checks import check_search
from retensor.planning.many import Answer, How, check_jobs, solve_all
from retensor.planning.plan import Accelerator, Plan
from retensor.planning.problem import minimum_required
from retensor.planning.progress import Clock, Progress, ProgressCallback, stop_on_interrupt
from retensor.planning.tasks import AnswerT, BoundsTask, PlanTask, Task
from retensor.units import parse_size

MOST_POINTS = 1000

Model = Graph | str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One network on one accelerator.

    Attributes
    ----------
    model : str
        Its file or name as given; the graph's name where a graph was given.
    accelerator : Accelerator
        Its scratchpad in bytes.
    parameters : bool
        Whether parameters lie in the scratchpad too.
    plan : Plan or None
        The best plan found; None where the scratchpad is too small.
    error : str or None
        Why there is no plan: the operator that does not fit, and the bytes it needs.
    cached : bool
        Whether it came from the cache without a search.
    """

    model: str
    accelerator: Accelerator
    parameters: bool
    plan: Plan | None
    error: str | None = None
    cached: bool = False

    @property
    def scratchpad_bytes(self) -> int:
        """Bytes of the scratchpad."""
        return parse_size(self.accelerator.scratchpad)

    @property
    def non_compulsory_bytes(self) -> int | None:
        """Bytes spilled and retrieved; None where nothing runs."""
        return None if self.plan is None else self.plan.non_compulsory_bytes

    @property
    def bound_bytes(self) -> int | None:
        """Proved lower bound of the non-compulsory bytes of any plan."""
        return None if self.plan is None else self.plan.bound_bytes

    @property
    def compulsory_bytes(self) -> int | None:
        """Bytes of first loads and of stores."""
        return None if self.plan is None else self.plan.compulsory_bytes

    @property
    def seconds(self) -> float:
        """Time of the search that found the plan; 0 where there was none to find."""
        return self.plan.seconds if self.plan else 0.0

    @property
    def status(self) -> Literal["optimal", "feasible", "infeasible"]:
        """``optimal`` where the bound meets the traffic, ``infeasible`` where nothing runs."""
        return self.plan.status if self.plan else "infeasible"


def sweep(
    models: Model | Iterable[Model] | Mapping[str, Graph],
    accelerators: Accelerator | int | str | Iterable[Accelerator | int | str] | None = None,
    *,
    points: int = 9,
    parameters: bool | Iterable[bool] = False,
    alignment: int = 1,
    order: Literal["default"] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    jobs: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> list[SweepPoint]:
    """Plan every model on every accelerator, at once and only once.

    Without ``accelerators`` each model is planned for budgets evenly spaced from its M_P down to its M_R, both
    included. Inside ``joblib.parallel_config(backend="dask")`` the same call runs on a Dask cluster.

    Parameters
    ----------
    models : Graph, str, path, sequence of these, or mapping of str to Graph
        Files and names are what :func:`retensor.graph.load` takes; each is loaded once, in this process.
    accelerators : Accelerator, int, str, or sequence of these, optional
        A name of :data:`~retensor.planning.accelerators.PRESETS`, or a size such as ``"M_R"`` or ``"2MiB"``, which
        stands for an accelerator of that scratchpad and ``alignment``.
    points : int
        Budgets where no accelerators are given, 2 to 1000; fewer come back where M_P and M_R are closer than
        that, one where they are equal.
    parameters : bool, or sequence of bool
        Whether parameters lie in the scratchpad too; ``(False, True)`` plans both.
    alignment : int
        Every address is a multiple of it; in bytes.
    order : None or "default"
        Free, or the program's.
    time_limit : float
        Seconds for each plan, and for the bounds of each model where they are needed; not for all together.
    seed : int
    jobs : int, optional
        Plans at once, as ``n_jobs`` of joblib: -1 is one a core. By default what ``joblib.parallel_config`` says, or
        1: one plan after the other, each on all cores. With more than one, each plan is searched on one thread.
    cache : path, optional
        A folder where each plan is kept as soon as it is found, such as
        :func:`~retensor.planning.cache.cache_folder`. A kept plan is used where it is proved optimal, or was
        searched for at least as long as ``time_limit``; a longer search replaces it only by a better one. On a
        cluster it is a folder that every machine sees.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` of plans done and in all.

    Returns
    -------
    list of SweepPoint
        In the order asked for: models, then ``parameters``, then accelerators (or budgets from the largest to the
        smallest). A scratchpad that is too small makes a point with the reason. After Ctrl-C, the points that
        are finished; a second Ctrl-C does not wait for them.

    Raises
    ------
    ValueError, TypeError
        Where an argument is out of range, or there is nothing to plan.
    GraphError
        Where a model cannot be loaded.
    RetensorError
        Where the cache cannot be written to, or a worker process was killed.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> tensors = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
    >>> operators = [
    ...     Operator("f", "F", ("x",), ("a",)),
    ...     Operator("g", "G", ("a",), ("b",)),
    ...     Operator("h", "H", ("b",), ("c",)),
    ...     Operator("k", "K", ("a", "c"), ("y",)),
    ... ]
    >>> curve = sweep(Graph("skip", operators, tensors, ["y"]), points=3)
    >>> [(point.scratchpad_bytes, point.non_compulsory_bytes) for point in curve]
    [(14, 0), (13, 8), (12, 8)]
    >>> [point.status for point in sweep(Graph("skip", operators, tensors, ["y"]), [13, 11])]
    ['optimal', 'infeasible']
    """
    check_points(points)
    check_search(time_limit, seed)
    check_jobs(jobs)
    if order not in (None, "default"):
        raise ValueError(f"order is None or 'default', not {order!r}")
    chips = _accelerators(accelerators, alignment)
    settings = _truths(parameters)
    kept = PlanCache(cache) if cache is not None else None
    if kept:
        kept.prepare()
    graphs = _graphs(models)
    clock = Clock(math.inf)
    run = _Run(How(time_limit, jobs, kept), clock, progress)
    with stop_on_interrupt(clock):
        asked = _questions(graphs, settings, chips, points, order, seed, alignment, run)
        fit = [question for question in asked if question.error is None]
        answers = run.all("planning", [question.task for question in fit], [question.model for question in fit])
    by_key = {question.task.key: answer for question, answer in zip(fit, answers, strict=True) if answer}
    found = []
    for question in asked:
        answer = by_key.get(question.task.key)
        if answer or question.error:
            found.append(
                SweepPoint(
                    question.model,
                    question.accelerator,
                    question.task.parameters,
                    plan=answer.value if answer else None,
                    error=question.error,
                    cached=bool(answer and answer.cached),
                )
            )
    if not found:
        raise KeyboardInterrupt
    return settle(found)


def check_points(points: int) -> None:
    """Refuse a number of points that makes no curve.

    Raises
    ------
    TypeError, ValueError
        Where ``points`` is no int from 2 to 1000.
    """
    if isinstance(points, bool) or not isinstance(points, int):
        raise TypeError(f"points is an int, not {type(points).__name__}")
    if not 2 <= points <= MOST_POINTS:
        raise ValueError(f"a sweep has 2 to {MOST_POINTS} points, not {points}")


def budgets(largest: int, smallest: int, points: int) -> list[int]:
    """At most ``points`` distinct whole numbers, evenly spaced from ``largest`` down to ``smallest``.

    >>> budgets(100, 60, 5)
    [100, 90, 80, 70, 60]
    >>> budgets(7, 6, 9), budgets(6, 6, 9)
    ([7, 6], [6])
    """
    span = largest - smallest
    return list(dict.fromkeys(largest - span * i // (points - 1) for i in range(points)))


def settle(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Give each point the best plan and the best bound that the points of the same network allow.

    The plan of a smaller scratchpad fits a larger one, and the bound of a larger one holds for a smaller one.

    Parameters
    ----------
    points : sequence of SweepPoint
        In any order, which is kept.
    """
    settled = list(points)
    networks: dict[object, list[int]] = {}
    for index, point in enumerate(points):
        if point.plan:
            group = (point.plan.graph_digest, point.parameters, point.accelerator.alignment, point.plan.fixed_order)
            networks.setdefault(group, []).append(index)
    for indices in networks.values():
        indices.sort(key=lambda index: points[index].scratchpad_bytes)
        proved = 0
        for index in reversed(indices):
            settled[index], proved = _proved(settled[index], proved)
        least: Plan | None = None
        for index in indices:
            settled[index], least = _served(settled[index], least)
    return settled


def _proved(point: SweepPoint, proved: int) -> tuple[SweepPoint, int]:
    assert point.plan is not None
    if point.plan.bound_bytes >= proved:
        return point, point.plan.bound_bytes
    return replace(point, plan=replace(point.plan, bound_bytes=proved)), proved


def _served(point: SweepPoint, least: Plan | None) -> tuple[SweepPoint, Plan]:
    assert point.plan is not None
    own = point.plan
    if least is None or own.non_compulsory_bytes <= least.non_compulsory_bytes:
        return point, own
    plan = replace(least, scratchpad_bytes=own.scratchpad_bytes, bound_bytes=own.bound_bytes)
    return replace(point, plan=plan), plan


@dataclass(frozen=True, slots=True)
class _Question:
    """One point asked for; ``error`` says why nothing runs there."""

    model: str
    accelerator: Accelerator
    task: PlanTask
    error: str | None


@dataclass
class _Run:
    """Solves lists of tasks, each different one once, and tells of it."""

    how: How
    clock: Clock
    progress: ProgressCallback | None
    begun: float = field(default_factory=time.monotonic)

    def all(self, stage: str, tasks: Sequence[Task[AnswerT]], labels: Sequence[str]) -> list[Answer[AnswerT] | None]:
        """The answers in the order of the tasks; None for those that Ctrl-C came before."""
        unique: dict[str, int] = {}
        for index, task in enumerate(tasks):
            unique.setdefault(task.key, index)
        chosen = list(unique.values())
        done = 0

        def watch(place: int) -> Callable[[Progress], None] | None:
            def tell(state: Progress) -> None:
                self._tell(f"{stage} {labels[chosen[place]]}", done, len(chosen), state)

            return tell if self.progress else None

        answers: dict[str, Answer[AnswerT]] = {}
        self._tell(stage, 0, len(chosen))
        for place, answer in solve_all([tasks[index] for index in chosen], self.how, self.clock, watch):
            answers[tasks[chosen[place]].key] = answer
            done += 1
            self._tell(stage, done, len(chosen))
        return [answers.get(task.key) for task in tasks]

    def _tell(self, stage: str, done: int, total: int, state: Progress | None = None) -> None:
        if self.progress:
            best, bound = (state.incumbent, state.bound) if state else (None, None)
            self.progress(Progress(stage, time.monotonic() - self.begun, best, bound, done, total))


def _questions(
    graphs: Sequence[tuple[str, Graph]],
    settings: Sequence[bool],
    chips: Sequence[Accelerator] | None,
    points: int,
    order: Literal["default"] | None,
    seed: int,
    alignment: int,
    run: _Run,
) -> list[_Question]:
    """What is to be planned, with every size in bytes."""
    networks = [(name, graph, parameters) for name, graph in graphs for parameters in settings]
    needed = {alignment} if chips is None else {chip.alignment for chip in chips if _is_relative(chip)}
    wanted = [
        (name, BoundsTask(graph, align, parameters, seed)) for name, graph, parameters in networks for align in needed
    ]
    limits: dict[str, Bounds] = {}
    if wanted:
        answers = run.all("bounds", [task for _, task in wanted], [name for name, _ in wanted])
        limits = {task.key: answer.value for (_, task), answer in zip(wanted, answers, strict=True) if answer}
    found: list[_Question] = []
    for name, graph, parameters in networks:
        least = {
            align: minimum_required(graph, parameters, align)
            for align in ({alignment} if chips is None else {chip.alignment for chip in chips})
        }
        for chip in _chips(graph, parameters, chips, points, alignment, seed, limits, least):
            size, (m_r, operator) = parse_size(chip.scratchpad), least[chip.alignment]
            error = str(InfeasibleError(operator, m_r, size)) if size < m_r else None
            task = PlanTask(graph, size, chip.alignment, parameters, order, seed)
            found.append(_Question(name, chip, task, error))
    return found


def _chips(
    graph: Graph,
    parameters: bool,
    chips: Sequence[Accelerator] | None,
    points: int,
    alignment: int,
    seed: int,
    limits: Mapping[str, Bounds],
    least: Mapping[int, tuple[int, str]],
) -> Iterator[Accelerator]:
    """The accelerators of one network with scratchpads in bytes; none where Ctrl-C came before its bounds."""
    if chips is None:
        found = limits.get(BoundsTask(graph, alignment, parameters, seed).key)
        # A graph of empty tensors needs no scratchpad, but has one.
        for size in budgets(max(found.m_p, 1), max(found.m_r, 1), points) if found else ():
            yield Accelerator(scratchpad=size, alignment=alignment)
        return
    for chip in chips:
        symbols = {"M_R": least[chip.alignment][0]}
        if _is_relative(chip):
            found = limits.get(BoundsTask(graph, chip.alignment, parameters, seed).key)
            if found is None:
                continue
            symbols |= {"M_P": found.m_p, "M_H": found.m_h}
        yield replace(chip, scratchpad=parse_size(chip.scratchpad, symbols))


def _is_relative(chip: Accelerator) -> bool:
    """Whether its scratchpad needs the least peak to be known."""
    return isinstance(chip.scratchpad, str) and any(symbol in chip.scratchpad for symbol in ("M_P", "M_H"))


def _accelerators(given: Any, alignment: int) -> list[Accelerator] | None:
    # Refused even where every accelerator brings its own.
    Accelerator(scratchpad=1, alignment=alignment)
    if given is None:
        return None
    entries = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not entries:
        raise ValueError("accelerators is empty; give at least one Accelerator or size, or None for a curve")
    return [
        entry
        if isinstance(entry, Accelerator)
        else accelerator_named(entry)
        if isinstance(entry, str) and entry in PRESETS
        else Accelerator(scratchpad=entry, alignment=alignment)
        for entry in entries
    ]


def _truths(given: object) -> list[bool]:
    entries = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    truths = [entry for entry in entries if isinstance(entry, bool)]
    if not truths or len(truths) < len(entries):
        raise TypeError(f"parameters is True, False or (False, True), not {described(given)}")
    return list(dict.fromkeys(truths))


def _graphs(models: Any) -> list[tuple[str, Graph]]:
    """The models as graphs without their programs, which are large and which planning does not need."""
    from retensor.graph import load

    named: list[tuple[str | None, Any]]
    if isinstance(models, Mapping):
        named = list(models.items())
    elif isinstance(models, Iterable) and not isinstance(models, Graph | str | os.PathLike):
        named = [(None, model) for model in models]
    else:
        named = [(None, models)]
    if not named:
        raise ValueError("models is empty; give at least one graph, file or name")
    for name, model in named:
        if not isinstance(model, Graph | str | os.PathLike):
            raise TypeError(f"a model is a Graph, a file or a name, not {type(model).__name__}")
        if not isinstance(name, str | None):
            raise TypeError(f"the name of a model is a str, not {type(name).__name__}")
    found = []
    for name, model in named:
        if isinstance(model, Graph):
            graph, known = model, model.name
        else:
            graph, known = load(model), os.fspath(model)
        bare = Graph(graph.name, graph.operators, graph.tensors, graph.outputs, graph.aliases, graph.options)
        found.append((known if name is None else name, bare))
    return found
