"""Many tasks at once through joblib: on the cores of this machine, or wherever its parallel backend works.

Each task is solved by one process on one thread, looks in the cache before it starts and keeps its answer there the
moment it is found. With one job everything runs in this process, one task after the other on all its cores.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, cast

from retensor.errors import RetensorError
from retensor.planning.cache import PlanCache
from retensor.planning.progress import Clock, ProgressCallback, stop_on_interrupt
from retensor.planning.tasks import AnswerT, Task


@dataclass(frozen=True, slots=True)
class Answer(Generic[AnswerT]):
    """What came of one task.

    Attributes
    ----------
    value : answer
    cached : bool
        Whether it needed no search.
    searched : float
        Seconds that the search was allowed.
    """

    value: AnswerT
    cached: bool = False
    searched: float = 0.0


@dataclass(frozen=True, slots=True)
class How:
    """How tasks are solved.

    Attributes
    ----------
    time_limit : float
        Seconds for each.
    jobs : int or None
        As ``n_jobs`` of joblib: processes; -1 for all cores; None for what ``joblib.parallel_config`` says, else 1.
    cache : PlanCache or None
    """

    time_limit: float
    jobs: int | None = None
    cache: PlanCache | None = None


def check_jobs(jobs: object) -> None:
    """Refuse a number of processes that joblib would refuse.

    Raises
    ------
    TypeError, ValueError
    """
    if jobs is None:
        return
    if isinstance(jobs, bool) or not isinstance(jobs, int):
        raise TypeError(f"jobs is an int or None, not {type(jobs).__name__}")
    if jobs == 0 or abs(jobs) > 4096:
        raise ValueError(f"jobs is a number of processes from 1 to 4096, or -1 for all cores, not {jobs}")


def solve(
    task: Task[AnswerT],
    cache: PlanCache | None,
    time_limit: float,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
    *,
    lenient: bool = False,
) -> Answer[AnswerT]:
    """The answer to one task, from the cache where a search would bring no better one.

    Where it cannot be kept that is an error, or where ``lenient`` the business of who asked.
    """
    clock = Clock(math.inf)
    with stop_on_interrupt(clock):
        kept = cache.find(task) if cache else None
        if cache and kept and cache.serves(task, kept, time_limit):
            return Answer(kept.answer, cached=True)
        found = task.solve(time_limit, workers, progress)
        # After Ctrl-C it was searched for no longer than this.
        searched = min(time_limit, clock.seconds) if clock.stopped else time_limit
        if cache:
            with suppress(RetensorError) if lenient else nullcontext():
                found = cache.keep(task, found, searched).answer
        return Answer(found, searched=searched)


def solve_all(
    tasks: Sequence[Task[AnswerT]], how: How, clock: Clock, watch: Callable[[int], ProgressCallback | None]
) -> Iterator[tuple[int, Answer[AnswerT]]]:
    """Index and answer of each task, as they come.

    Parameters
    ----------
    tasks : sequence of Task
    how : How
    clock : Clock
        Once it is stopped no further task is begun; those under way are waited for.
    watch : callable
        Index of a task to what is told of its search; asked only where it runs in this process.

    Raises
    ------
    RetensorError
        Where a worker process was killed, or an answer cannot be kept.
    """
    import joblib

    if joblib.effective_n_jobs(how.jobs) == 1:
        for index, task in enumerate(tasks):
            if clock.stopped:
                return
            yield index, solve(task, how.cache, how.time_limit, progress=watch(index))
        return
    left: list[int] = []
    for index, task in enumerate(tasks):
        if clock.stopped:
            return
        # Asked here first, so that a sweep which is done already starts no process.
        kept = how.cache.find(task) if how.cache else None
        if how.cache and kept and how.cache.serves(task, kept, how.time_limit):
            yield index, Answer(kept.answer, cached=True)
        else:
            left.append(index)
    if left:
        yield from _solve_apart([(index, tasks[index]) for index in left], how, clock)


def _solve_apart(
    tasks: Sequence[tuple[int, Task[AnswerT]]], how: How, clock: Clock
) -> Iterator[tuple[int, Answer[AnswerT]]]:
    import joblib
    from joblib.parallel import get_active_backend

    def calls() -> Iterator[Any]:
        for index, task in tasks:
            if clock.stopped:
                return
            yield joblib.delayed(_solve_in_worker)(index, task, how.cache, how.time_limit, os.getpid())

    # Ray's backend gives all results at the end; they are in the cache before.
    streams = get_active_backend()[0].supports_return_generator
    # One task at a time to each worker: a batch would keep finished answers back, and run on after Ctrl-C.
    pool = joblib.Parallel(
        n_jobs=how.jobs,
        return_as="generator_unordered" if streams else "list",
        pre_dispatch="n_jobs",
        batch_size=1,
    )
    by_index = dict(tasks)
    done = 0
    answers = cast("Iterable[tuple[int, Answer[AnswerT]]]", pool(calls()))
    try:
        for index, answer in answers:
            done += 1
            # A worker on another machine may have kept it on a disk of its own, or not at all.
            if how.cache and not how.cache.holds(by_index[index]):
                how.cache.keep(by_index[index], answer.value, answer.searched)
            yield index, answer
    except (BrokenProcessPool, KeyboardInterrupt) as error:
        # Ctrl-C may have ended a worker that was still starting; one that is meant for this process has no cause.
        if clock.stopped and (isinstance(error, BrokenProcessPool) or error.__cause__ is not None):
            return
        if isinstance(error, KeyboardInterrupt):
            raise
        kept = f"; {done} of {len(tasks)} finished ones are kept" if how.cache else ""
        raise RetensorError(
            f"a worker process was killed, perhaps for want of memory{kept}; start again with fewer jobs"
        ) from error
    finally:
        if isinstance(answers, Generator):
            with warnings.catch_warnings():
                # That tasks under way are given up is what an error or a second Ctrl-C means.
                warnings.simplefilter("ignore")
                answers.close()


def _solve_in_worker(
    index: int, task: Task[AnswerT], cache: PlanCache | None, time_limit: float, home: int
) -> tuple[int, Answer[AnswerT]]:
    main = threading.current_thread() is threading.main_thread()
    if os.getpid() != home and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C then ends a search with its best answer, and nothing else: an idle worker that dies of it would take
        # the searches of the others along. A process started in the background ignores it, and goes on to.
        signal.signal(signal.SIGINT, _carry_on)
    return index, solve(task, cache, time_limit, workers=1, lenient=True)


def _carry_on(number: int, frame: FrameType | None) -> None:
    """Hear a signal and do nothing."""
