"""A lower bound over all orders: what must cross an operator.

Let *u* and *v* be two users of a tensor, *u* an ancestor of *v*, and *o* an operator between them: after *u* and before
*v* in every order. While *o* runs, the tensor is in the scratchpad or out, and if it is out it left after *u* or later
and is read again for *v* or earlier. So take for each tensor users that follow one on the other in every order; each
gap between two of them is kept (0) or broken (1), and a broken one is at least one retrieve of its own, and at
least one write of the tensor. At each operator, what it needs itself and the unbroken gaps around it must fit. The
least bytes under these conditions alone, an integer program without any order, bound every plan. They are close where
the graph is nearly a chain, with long skips: decoders, U-nets, a backward pass behind its forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ortools.sat.python import cp_model

from retensor.planning.problem import Problem, bits
from retensor.planning.progress import Clock
from retensor.planning.solver import minimise

MANY = 40
"""Users of a tensor up to which the longest chain of them is looked for; of more, any chain that cannot grow."""
NEAR = 12
"""Operators to either side of which one is compared with, to drop those that ask for less."""


@dataclass(frozen=True)
class _Gap:
    """An item between two of its users, and the operators that run in between in every order (bits)."""

    item: int
    between: int


def crossing_bound(problem: Problem, capacity: int, clock: Clock, *, seed: int = 0, workers: int | None = None) -> int:
    """Non-compulsory bytes that every plan moves at least; ``capacity`` in units of the alignment."""
    gaps = _gaps(problem)
    around: list[list[int]] = [[] for _ in range(problem.n)]
    for k, gap in enumerate(gaps):
        for operator in bits(gap.between):
            around[operator].append(k)
    rows = _rows(problem, capacity, gaps, around)
    if not rows or clock.left <= 0:
        return 0
    return _least(problem, capacity, gaps, rows, clock, seed, workers)


def _gaps(problem: Problem) -> list[_Gap]:
    descendants, ancestors = problem.descendants, problem.ancestors
    found = []
    for i, item in enumerate(problem.items):
        if not item.room or not item.size:
            continue
        mask = sum(1 << user for user in item.users)
        chain = longest_chain(sorted(item.users), descendants)
        for here, there in pairwise(chain):
            between = descendants[here] & ancestors[there] & ~mask
            if between:
                found.append(_Gap(i, between))
    return found


def longest_chain(users: list[int], descendants: tuple[int, ...]) -> list[int]:
    """Users of which each comes after the one before in every order: as many as there are, or nearly."""
    if len(users) > MANY:
        chain = users[:1]
        for user in users[1:]:
            if descendants[chain[-1]] >> user & 1:
                chain.append(user)
        return chain
    longest: list[list[int]] = []
    for at, user in enumerate(users):
        before = [longest[k] for k in range(at) if descendants[users[k]] >> user & 1]
        longest.append([*max(before, key=len, default=[]), user])
    return max(longest, key=len)


def _rows(
    problem: Problem, capacity: int, gaps: list[_Gap], around: list[list[int]]
) -> list[tuple[int, tuple[int, ...]]]:
    """Room left beside an operator and the gaps around it, where those do not all fit; without rows another implies."""
    rows: list[tuple[int, int, frozenset[int]]] = []
    for operator, crossing in enumerate(around):
        left = capacity - problem.need[operator]
        if sum(problem.items[gaps[k].item].room for k in crossing) > left:
            rows.append((left, len(rows), frozenset(crossing)))
    kept = []
    for left, at, row in rows:
        near = rows[max(0, at - NEAR) : at + NEAR + 1]
        # Of equal rows the first stays.
        rank = left, -len(row), at
        if not any(row <= other and (less, -len(other), there) < rank for less, there, other in near if less <= left):
            kept.append((left, tuple(sorted(row))))
    return kept


def _least(
    problem: Problem,
    capacity: int,
    gaps: list[_Gap],
    rows: list[tuple[int, tuple[int, ...]]],
    clock: Clock,
    seed: int,
    workers: int | None,
) -> int:
    model = cp_model.CpModel()
    broken = {k: model.new_bool_var("") for k in dict.fromkeys(k for _, row in rows for k in row)}
    cost: list[cp_model.LinearExprT] = []
    written: dict[int, cp_model.IntVar] = {}
    for k, out in broken.items():
        i = gaps[k].item
        item = problem.items[i]
        cost.append(item.size * out)
        if item.spill:
            if i not in written:
                written[i] = model.new_bool_var("")
                cost.append(item.spill * written[i])
            model.add_implication(out, written[i])
    for left, row in rows:
        rooms = [problem.items[gaps[k].item].room for k in row]
        # More than all of them need not leave.
        model.add(
            cp_model.LinearExpr.weighted_sum([broken[k] for k in row], rooms) >= min(sum(rooms), sum(rooms) - left)
        )
        if clock.left <= 0:
            return 0
    model.minimize(sum(cost))
    return minimise(model, clock, seed=seed, workers=workers)[1].bound
