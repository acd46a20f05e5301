"""Packing as CP-SAT's two-dimensional no-overlap with a cumulative constraint: the formulation at hand everywhere."""

from __future__ import annotations

from collections.abc import Sequence

from ortools.sat.python import cp_model


def solve(
    buffers: Sequence[tuple[int, int, int]], capacity: int, *, time_limit: float, threads: int
) -> tuple[int, ...] | bool | None:
    """Addresses of buffers (lower, upper, size); False where it proves that there are none; None out of time."""
    if any(size > capacity for _, _, size in buffers):
        return False
    model = cp_model.CpModel()
    places = [model.new_int_var(0, capacity - size, "") for _, _, size in buffers]
    columns = [model.new_fixed_size_interval_var(lower, upper - lower, "") for lower, upper, _ in buffers]
    rows = [model.new_fixed_size_interval_var(place, b[2], "") for place, b in zip(places, buffers, strict=True)]
    model.add_no_overlap_2d(columns, rows)
    model.add_cumulative(columns, [size for _, _, size in buffers], capacity)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit
    solver.parameters.num_workers = threads
    status = solver.solve(model)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return tuple(solver.value(place) for place in places)
    return False if status == cp_model.INFEASIBLE else None
