"""Large-neighbourhood search: a plan gets better a window at a time, for as long as there is time.

Shaw, "Using constraint programming and local search methods to solve vehicle routing problems", CP 1998: free a part of
the solution, solve that part well with the rest as it is, keep what is better, go on with another part. The part is
a window of consecutive steps (:mod:`.windows`), whose operators are ordered anew and whose tensors are kept or put out
anew, by the frontier search (:mod:`.wide`). A round goes over the whole plan once. Windows that move no bytes
cannot get better and are left alone; equal windows are solved once; rounds start at another step each, so that
what one window's edge cuts the next one frees. Where a round brings little, windows get longer and the search in them
wider, and once both are greatest, rounds go on until every start was tried since the last gain (one, where a window
holds the whole plan). After each round, what was put out but would fit is kept again.

The same seed does the same, but for where the time runs out.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from retensor.planning.problem import Problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, keep_or_evict
from retensor.planning.wide import search_wide
from retensor.planning.windows import Course, Window

FIRST_STEPS = 32
"""Steps of a window in the first round."""
FIXED_STEPS = 200
"""Steps of a window where the order is kept."""
MOST_STEPS = 120
"""Steps of a window at most."""
FIRST_WIDTH = 50
"""States that the frontier search keeps of each layer in the first round."""
MOST_WIDTH = 20_000
"""States that it keeps of each layer at most."""
LITTLE = 0.02
"""A round that saves less than this part of the bytes is followed by one with longer windows."""
REMEMBERED = 50_000
"""Windows whose outcome is kept, so that equal ones are not solved again."""


def improve(
    problem: Problem,
    capacity: int,
    answer: Answer,
    clock: Clock,
    *,
    seed: int = 0,
    fixed: bool = False,
    keep: Callable[[Answer], None] | None = None,
) -> Answer:
    """The best answer that large-neighbourhood search finds from ``answer`` in the time there is.

    Parameters
    ----------
    problem : Problem
    capacity : int
        In units of the alignment; a sum at each step.
    answer : Answer
        Where to start; its bound is handed on as it is.
    clock : Clock
        Rounds go on until it runs out, or until windows of the greatest size have brought nothing wherever they
        begin.
    seed : int
        Of where windows begin.
    fixed : bool
        Whether the order stays as it is: then windows are solved by :func:`~.residency.keep_or_evict`.
    keep : callable, optional
        Is given each round's answer.

    Returns
    -------
    Answer
        Never dearer than ``answer``.
    """
    search = _Rounds(problem, capacity, answer, clock, seed, fixed)
    while clock.left > 0 and search.course.cost > answer.bound and search.round():
        if keep:
            keep(search.course.answer(answer.bound))
    found = search.course.answer(answer.bound)
    return found if found.cost < answer.cost else answer


class _Rounds:
    def __init__(self, problem: Problem, capacity: int, answer: Answer, clock: Clock, seed: int, fixed: bool) -> None:
        self.problem = problem
        self.capacity = capacity
        self.clock = clock
        self.chance = random.Random(seed)
        self.course = Course(problem, capacity, answer)
        self.fixed = fixed
        self.steps = min(FIXED_STEPS if fixed else FIRST_STEPS, problem.n)
        self.width = FIRST_WIDTH
        self.outcomes: dict[object, Answer] = {}
        self.tried: set[int] = set()
        """Where rounds of the greatest windows have begun since the last gain."""

    def round(self) -> bool:
        """Go over the plan once; False where there is nothing more to try."""
        before = self.course.cost
        self.course.keep_again()
        n = self.problem.n
        offset = self.chance.choice([k for k in range(self.steps) if k not in self.tried])
        cuts = sorted({0, *range(offset, n, self.steps), n})
        for window in self.course.sweep(cuts):
            if self.clock.left <= 0:
                break
            if window.known.cost:
                self._solve(window)
        self.course.keep_again()
        gain = before - self.course.cost
        if self.fixed or (self.steps >= min(MOST_STEPS, n) and self.width >= MOST_WIDTH):
            if gain:
                self.tried.clear()
            self.tried.add(offset)
            return self.steps < n and len(self.tried) < self.steps
        if gain <= LITTLE * before:
            self.steps = min(self.steps * 3 // 2, MOST_STEPS, n)
            self.width = min(self.width * 2, MOST_WIDTH)
            self.outcomes.clear()
        return True

    def _solve(self, window: Window) -> None:
        known = window.known
        key = window.problem.shape_key, window.capacity, tuple(known.stays), self.width
        if key not in self.outcomes:
            if len(self.outcomes) >= REMEMBERED:
                self.outcomes.clear()
            self.outcomes[key] = self._best(window)
        found = self.outcomes[key]
        if found.cost < known.cost:
            self.course.accept(window, found)

    def _best(self, window: Window) -> Answer:
        if self.fixed:
            return keep_or_evict(window.problem, window.capacity, window.known.order, self.clock, workers=1)
        return search_wide(window.problem, window.capacity, self.clock, window.known, widest=self.width)
