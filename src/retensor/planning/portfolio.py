"""The search for addresses in many orders, until one of them finds a placement or proves that none is there.

How long :mod:`retensor.planning.canonical` searches depends by orders of magnitude on the order in which it tries
blocks, and most searches that end well end soon. So the orders that MiniMalloc names, by area, width, size, sections
crossed and most bytes alive at once, have a short turn each; then one of them goes on where it was, for longer and
longer, in turn with short searches in orders drawn at random, which put blocks first at which searches have failed so
far. The first alone would end with a proof; the others find what luck can find. What is open after a second is tried
with CP-SAT too, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from retensor.planning.progress import Clock

Integers = npt.NDArray[np.int64]
_ORDERS = ("A", "CAT", "TAW", "WAT", "TCA", "Z", "TWA", "W", "TZA")
"""Keys, the largest first: area, sections crossed, most bytes alive at once, width, size."""
_TURN, _TURN_GROWTH = 1000, 1.3
"""Nodes of the first turn, and how the turns of the search that goes on grow."""
_RESTARTS, _RESTART_GROWTH = 9, 1.1
_SPELL = 1.0
"""Seconds before CP-SAT has its first turn, three times as long; spells double."""
_MOST_LEARNED = 2000
"""Blocks above which CP-SAT's model grows too large to be of use."""
_SLICE = 0.05
"""Seconds after which compiled code comes back to look at the clock."""


class Blocks(NamedTuple):
    """What to place, as arrays: times, sizes, alignments, and fixed addresses (-1: free); one unit throughout."""

    start: Integers
    end: Integers
    size: Integers
    alignment: Integers
    fixed: Integers


def search(
    blocks: Blocks,
    capacity: int,
    latest: Integers,
    clock: Clock,
    seed: int,
    tell: Callable[[], None] | None = None,
    workers: int | None = None,
) -> Integers | bool | None:
    """Addresses of blocks that are all connected in time; False where there are none; None out of time.

    Parameters
    ----------
    blocks : Blocks
        Sizes and lifetimes above 0.
    capacity : int
        What sections may hold.
    latest : int64 array
        The largest address of each free block.
    clock : Clock
    seed : int
    tell : callable, optional
        Called whenever compiled code comes back.
    workers : int, optional
        Threads of CP-SAT; default all cores.
    """
    problem = _Problem(blocks, capacity, latest)
    spell = _SPELL
    until = clock.seconds + spell
    for run, nodes in _turns(problem, np.random.default_rng(seed)):
        outcome = run.go(nodes, clock, tell)
        if outcome is not None:
            return outcome
        if clock.left <= 0:
            return None
        if clock.seconds >= until and problem.n <= _MOST_LEARNED:
            from retensor.planning.no_overlap import no_overlap

            # Sections for times: they are small numbers, and fewer.
            placed = blocks._replace(start=problem.first, end=problem.last)
            outcome = no_overlap(placed, capacity, latest, clock, seed, workers=workers, time_limit=3 * spell)
            if outcome is not None:
                return outcome
            spell *= 2
            until = clock.seconds + spell
    raise AssertionError("turns do not end")


def _turns(problem: _Problem, chance: np.random.Generator) -> Iterator[tuple[_Run, int]]:
    learner = _Learner(problem, chance)
    steady = None
    for name in _ORDERS:
        run = _Run(problem, problem.order(name))
        steady = steady or run
        yield run, _TURN
        learner.hear(run)
    assert steady is not None
    turn, restart = float(_TURN), float(_TURN)
    while True:
        turn *= _TURN_GROWTH
        yield steady, int(turn)
        for _ in range(_RESTARTS):
            run = _Run(problem, learner.order(), memory=1 << 14)
            yield run, int(restart)
            learner.hear(run)
        restart *= _RESTART_GROWTH


class _Problem:
    """Sections, neighbours and scores of the blocks, shared by all runs."""

    def __init__(self, blocks: Blocks, capacity: int, latest: Integers) -> None:
        self.blocks, self.capacity = blocks, capacity
        self.n = len(blocks.size)
        self.first, self.last, self.sections = sections(blocks.start, blocks.end)
        self.latest = np.where(blocks.fixed >= 0, blocks.fixed, latest)
        self.near_start, self.near = neighbours(self.first, self.last)
        change = np.zeros(self.sections + 1, np.int64)
        np.add.at(change, self.first, 1)
        np.add.at(change, self.last - 1, -1)
        self.crossing = np.cumsum(change)[: self.sections]
        load = np.zeros(self.sections + 1, np.int64)
        np.add.at(load, self.first, blocks.size)
        np.add.at(load, self.last, -blocks.size)
        self.load = np.cumsum(load)[: self.sections]
        self.most = np.array([self.load[a:b].max() for a, b in zip(self.first, self.last, strict=True)])
        # Times may be large; areas only order.
        self.width = (blocks.end - blocks.start).astype(float)
        self.area = self.width * blocks.size

    def order(self, name: str) -> Integers:
        """Blocks by falling keys, which ``name`` gives by their letters."""
        keys = {
            "A": self.area,
            "C": self.last - self.first,
            "T": self.most,
            "W": self.width,
            "Z": self.blocks.size,
        }
        return np.lexsort([-keys[letter] for letter in reversed(name)])


class _Learner:
    """Learns where searches fail, and draws orders that put those blocks first."""

    def __init__(self, problem: _Problem, chance: np.random.Generator) -> None:
        self.problem, self.chance = problem, chance
        self.weight = np.zeros(problem.n)
        self.keys = np.log(np.array([problem.width, problem.blocks.size, problem.most], dtype=float))

    def hear(self, run: _Run) -> None:
        """Take in where ``run`` has failed."""
        sections = np.concatenate([[0.0], np.cumsum(run.state.section_failures)])
        share = (sections[self.problem.last] - sections[self.problem.first]) / max(1.0, sections[-1])
        self.weight = 0.9 * self.weight + share + run.state.buffer_failures / max(1, run.nodes)

    def order(self) -> Integers:
        """The next order: by a product of powers of width, size and (half the time) most bytes, and by failures."""
        powers = self.chance.uniform(0, (2, 2, 20)) * (1, 1, self.chance.integers(2))
        scores = powers @ self.keys + np.log(0.02 + self.weight / max(self.weight.max(), 1e-9))
        scores += self.chance.normal(0, 0.05, self.problem.n)
        return np.argsort(-scores, kind="stable")


class _Run:
    """One search in one order, which can be left and gone on with."""

    def __init__(self, problem: _Problem, order: Integers, memory: int = 1 << 17) -> None:
        from retensor.planning import canonical

        self.kernel, self.problem = canonical, problem
        n, sections, blocks = problem.n, problem.sections, problem.blocks
        rank = np.empty(n, np.int64)
        rank[order] = np.arange(n)
        self.buffers = canonical.Buffers(
            problem.first, problem.last, blocks.size, blocks.alignment, problem.latest, problem.near_start,
            problem.near, rank, _twins(problem, order),
        )  # fmt: skip
        self.slice = 64
        start = np.maximum(blocks.fixed, 0)

        def zeros(shape: int | tuple[int, int]) -> Integers:
            return np.zeros(shape, np.int64)

        self.state = canonical.State(
            least=start.copy(), support=start.copy(), address=np.full(n, -1), crossing=problem.crossing.copy(),
            pending=order[np.argsort(-start[order], kind="stable")], total=zeros(sections),
            least_top=zeros(sections), second_top=zeros(sections), section_failures=zeros(sections),
            buffer_failures=zeros(n), frames=zeros((3 * n + 8, 9)), keys=np.zeros((3 * n + 8, 2), np.uint64),
            trail=zeros((64 * n + 64, 2)), failed=np.zeros((memory, 2), np.uint64), counters=zeros(4),
        )  # fmt: skip
        self.state.counters[canonical.DEPTH] = canonical.push_parts(self.buffers, self.state, -1, 0, n, 0, sections)

    @property
    def nodes(self) -> int:
        """Nodes visited so far."""
        return int(self.state.counters[self.kernel.NODES])

    def go(self, nodes: int, clock: Clock, tell: Callable[[], None] | None = None) -> Integers | bool | None:
        """Search ``nodes`` nodes more: addresses, False where there are none, or None: not yet decided."""
        goal = self.nodes + nodes
        while self.nodes < goal and clock.left > 0:
            began = time.monotonic()
            status = self.kernel.run(
                self.buffers, self.state, self.problem.capacity, min(self.slice, goal - self.nodes)
            )
            took = time.monotonic() - began
            if tell:
                tell()
            self.slice = (
                max(1, self.slice // 2) if took > _SLICE else self.slice * 2 if took < _SLICE / 4 else self.slice
            )
            if status == self.kernel.FOUND:
                return self.state.address
            if status == self.kernel.IMPOSSIBLE:
                return False
            if status == self.kernel.FULL:
                trail = self.state.trail
                self.state = self.state._replace(trail=np.concatenate([trail, np.zeros_like(trail)]))
        return None


def sections(start: Integers, end: Integers) -> tuple[Integers, Integers, int]:
    """Moments at which no further block can be alive, as a range for each block, and their number.

    Times between which only blocks are born, or only blocks die, are one section: whoever meets at all meets there.
    """
    times = np.concatenate([end, start])
    births = np.concatenate([np.zeros(len(end), bool), np.ones(len(start), bool)])
    order = np.lexsort((births, times))
    born = births[order]
    # A section closes with a death that follows a birth.
    closes = ~born & np.concatenate([[False], born[:-1]])
    count = np.cumsum(closes)
    place = np.empty(len(order), np.int64)
    place[order] = count
    return place[len(end) :], place[: len(end)], int(count[-1]) if len(count) else 0


def neighbours(first: Integers, last: Integers) -> tuple[Integers, Integers]:
    """For each block those it shares a section with, as ``near[start[i]:start[i + 1]]``."""
    n = len(first)
    order = np.argsort(first, kind="stable")
    begins = first[order]
    # In order of birth, whoever is born before a block dies and after it was born meets it.
    until = np.searchsorted(begins, last[order], side="left")
    count = until - np.arange(n) - 1
    left = np.repeat(np.arange(n), count)
    right = left + 1 + np.arange(len(left)) - np.repeat(np.cumsum(count) - count, count)
    one, other = order[np.concatenate([left, right])], order[np.concatenate([right, left])]
    by_one = np.lexsort((other, one))
    start = np.concatenate([[0], np.cumsum(np.bincount(one, minlength=n))])
    return start.astype(np.int64), other[by_one].astype(np.int64)


def _twins(problem: _Problem, order: Integers) -> Integers:
    """For each block the equal one just before it in ``order``, or -1; fixed blocks have no equals."""
    twin = np.full(problem.n, -1, np.int64)
    before: dict[tuple[int, ...], int] = {}
    blocks = problem.blocks
    for i in order.tolist():
        if blocks.fixed[i] < 0:
            kind = (problem.first[i], problem.last[i], blocks.size[i], blocks.alignment[i], problem.latest[i])
            twin[i] = before.get(kind, -1)
            before[kind] = i
    return twin
