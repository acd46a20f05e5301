"""Addresses by CP-SAT's two-dimensional no-overlap, which learns from its conflicts.

It takes seconds where :mod:`retensor.planning.canonical` takes hundredths, and fails on most of what is hard, but
not on the same: perfect packings of few cuts, for one, it finds where orders are of no help.
"""

from __future__ import annotations

import numpy as np
from ortools.sat.python import cp_model

from retensor.planning.portfolio import Blocks, Integers
from retensor.planning.progress import Clock
from retensor.planning.solver import minimise


def no_overlap(
    blocks: Blocks,
    capacity: int,
    latest: Integers,
    clock: Clock,
    seed: int,
    *,
    workers: int | None,
    time_limit: float,
) -> Integers | bool | None:
    """Addresses of blocks; False where there are none; None out of time. Arguments as of the portfolio's search."""
    model = cp_model.CpModel()
    starts, columns, rows = [], [], []
    for i, size in enumerate(blocks.size.tolist()):
        step = int(blocks.alignment[i])
        if blocks.fixed[i] >= 0:
            start = model.new_constant(int(blocks.fixed[i]))
        else:
            start = step * model.new_int_var(0, int(latest[i]) // step, "")
        begin, end = int(blocks.start[i]), int(blocks.end[i])
        starts.append(start)
        columns.append(model.new_fixed_size_interval_var(begin, end - begin, ""))
        rows.append(model.new_fixed_size_interval_var(start, size, ""))
    model.add_no_overlap_2d(columns, rows)
    model.add_cumulative(columns, blocks.size.tolist(), capacity)
    solver, outcome = minimise(model, clock, seed=seed, workers=workers, time_limit=time_limit)
    if outcome.solved:
        return np.array([solver.value(start) for start in starts], dtype=np.int64)
    return False if outcome.proved else None
