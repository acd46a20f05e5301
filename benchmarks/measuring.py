"""What claims measure with: figures over seeds and their differences, times taken in turn, trainings on all cores."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import joblib
import torch
from scipy.stats import t as student_t

from retensor.claims import Verdict

Result = TypeVar("Result")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Mean:
    """The mean of a figure over independent seeds, its standard error, and half its 95 % interval (Student's t)."""

    mean: float
    error: float
    half: float
    digits: int = 2

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 2) -> Mean:
        """Of at least two values."""
        error = statistics.stdev(values) / len(values) ** 0.5
        half = float(student_t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
        return cls(statistics.fmean(values), error, half, digits)

    def above(self, limit: float = 0.0) -> bool:
        """Whether the whole interval lies above a limit."""
        return self.mean - self.half > limit

    def below(self, limit: float = 0.0) -> bool:
        return self.mean + self.half < limit

    def within(self, limit: float) -> bool:
        """Whether the interval reaches down to a limit."""
        return self.mean - self.half <= limit

    def __str__(self) -> str:
        return f"{self.mean:.{self.digits}f} ± {self.error:.{self.digits}f}"


class Difference(Mean):
    """The mean difference of two figures over the same seeds."""

    @property
    def verdict(self) -> Verdict:
        """Held where the interval lies above nothing."""
        return verdict(self.above())

    @property
    def why(self) -> str:
        """What to say of a difference that was hoped to be above nothing."""
        if self.above():
            return ""
        return "Below it." if self.below() else "Not told apart from nothing (95 % interval)."

    def __str__(self) -> str:
        return f"{self.mean:+.{self.digits}f} ± {self.error:.{self.digits}f}"


def paired(ours: Sequence[float], theirs: Sequence[float], digits: int = 2) -> Difference:
    """Ours less theirs, seed by seed."""
    return Difference.of([one - other for one, other in zip(ours, theirs, strict=True)], digits)  # type: ignore[return-value]


def verdict(held: bool, partly: bool = False) -> Verdict:
    return "held" if held else "partly held" if partly else "not held"


def power(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """The exponent of the power law nearest to points, on logarithmic axes."""
    x, y = (torch.tensor(part, dtype=torch.float64).log().tolist() for part in (sizes, figures))
    return statistics.linear_regression(x, y).slope


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of torch's inside, the caller's number afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Times:
    """Seconds of several calls, each list in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def __getitem__(self, name: str) -> float:
        """The median."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """The median, over rounds, of one call's time over another's."""
        return statistics.median(x / y for x, y in zip(self.seconds[name], self.seconds[base], strict=True))


def times(calls: Mapping[str, Callable[[], Any]], rounds: int, inner: int = 1) -> Times:
    """Time calls in turn, ``inner`` times each in every round, another one first each time.

    One round before does not count.
    """
    names = list(calls)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            call = calls[name]
            start = time.perf_counter()
            for _ in range(inner):
                call()
            if turn >= 0:
                found[name].append((time.perf_counter() - start) / inner)
    return Times(found)


def seconds(call: Callable[[], Any]) -> float:
    """The time of one call, where it is too long for rounds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def allocated(call: Callable[[], Any]) -> int:
    """The most bytes that torch's allocator holds during a call over what it held before, by torch's own record."""
    with (
        _quiet(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@contextmanager
def _quiet() -> Iterator[None]:
    """The profiler's library writes to the error stream that it found no GPU."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def on_all_cores(
    function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], progress: Callable[[str], None], what: str
) -> list[Result]:
    """Results of a function over jobs, in their order: as many processes as cores, one thread each."""
    found: list[Result] = []
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        work = joblib.Parallel(n_jobs=os.cpu_count(), return_as="generator")(
            joblib.delayed(_one_thread)(function, job) for job in jobs
        )
        for done in work:
            found.append(done)
            if len(found) % max(1, len(jobs) // 10) == 0:
                progress(f"{len(found)} of {len(jobs)} {what}")
    return found


def _one_thread(function: Callable[..., Result], job: tuple[Any, ...]) -> Result:
    torch.set_num_threads(1)
    return function(*job)
