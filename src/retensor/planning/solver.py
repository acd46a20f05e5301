"""OR-Tools CP-SAT, run so that a time limit and Ctrl-C both end it with the best answer found so far."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ortools.sat.python import cp_model

from retensor.planning.progress import Clock


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a search ended with.

    ``solved`` tells whether values can be read; ``proved`` whether the answer is final: an optimum,
    or that there is none. ``objective`` and ``bound`` are those of a minimisation.
    """

    solved: bool
    proved: bool
    objective: int
    bound: int


class _Watch(cp_model.CpSolverSolutionCallback):  # type: ignore[misc]  # OR-Tools ships no types
    """Tells of each better answer and each better bound; both come from the search's own threads."""

    def __init__(self, tell: Callable[[int, int], None]) -> None:
        super().__init__()
        self._tell = tell
        self._latest: tuple[int, int] | None = None

    def on_solution_callback(self) -> None:
        self._latest = round(self.objective_value), round(self.best_objective_bound)
        self._tell(*self._latest)

    def on_bound(self, bound: float) -> None:
        if self._latest is not None:
            self._latest = self._latest[0], max(self._latest[1], round(bound))
            self._tell(*self._latest)


def minimise(
    model: cp_model.CpModel,
    clock: Clock,
    *,
    seed: int = 0,
    workers: int | None = None,
    time_limit: float | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[cp_model.CpSolver, Outcome]:
    """Solve ``model`` within what is left of ``clock`` (and within ``time_limit`` seconds, if given)."""
    solver = cp_model.CpSolver()
    parameters = solver.parameters
    parameters.max_time_in_seconds = max(0.01, min(clock.left, clock.left if time_limit is None else time_limit))
    parameters.num_workers = workers or os.cpu_count() or 1
    parameters.random_seed = seed
    # Signals are Python's business here: see below.
    parameters.catch_sigint_signal = False
    watch = _Watch(tell) if tell else None
    if watch:
        solver.best_bound_callback = watch.on_bound
    status = [cp_model.UNKNOWN]
    finished = threading.Event()

    def run() -> None:
        try:
            status[0] = solver.solve(model, watch)
        finally:
            finished.set()

    # The search runs beside the main thread, which alone learns of Ctrl-C. (Not thread.join to wait: where Ctrl-C
    # interrupts it, CPython takes the running thread for ended, bpo-45274.)
    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
        while not finished.wait(0.1):
            if clock.stopped:
                solver.stop_search()
    finally:
        # Left by an exception: a solver still running would outlive the interpreter.
        while thread.is_alive() and not finished.wait(0.05):
            solver.stop_search()
    solved = status[0] in (cp_model.OPTIMAL, cp_model.FEASIBLE)
    proved = status[0] in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    objective = round(solver.objective_value) if solved else 0
    # The bound is a float: round up what rounding errors took off an integer.
    bound = objective if status[0] == cp_model.OPTIMAL else max(0, -int(-(solver.best_objective_bound - 1e-6) // 1))
    return solver, Outcome(solved, proved, objective, bound)
