"""HMCOS, the hierarchical scheduler of networks made by architecture search: a peer to measure against.

Zihan Wang, Chengcheng Wan, Yuting Chen, Ziyi Lin, He Jiang, Lei Qiao, "Hierarchical Memory-Constrained Operator
Scheduling of Neural Architecture Search Networks", DAC 2022, doi 10.1145/3489517.3530472 (public source:
github.com/wzh99/HMCOS). The graph gets two levels above the operators. A *sequence* is a chain whose later operators
raise neither the peak nor what is alive. A *group* is a cell: the sequences that the cell's output (a concatenation)
post-dominates; and, behind it, those of the next cells that it dominates, if running more than two of them first leaves
fewer bytes than the cell's output takes ("intrusion"). Then, again and again:

1. Schedule the top level by dynamic programming over its sets of ready vertices, one vertex more a round, the least
   peak of each set kept, no step above the best peak so far. A group on the way runs in reverse post-order if that
   does not raise the peak, else by the same dynamic programming over its sequences, remembered by which of the tensors
   that it reads it uses up.
2. Find the tensors alive at the peak. Dissolve the groups of the sequences that make them, and the groups that read
   from those sequences. End where nothing is dissolved.

What is ours: bytes are counted as the planner counts them (a network input from its first reader on, no operator
writes over its input), so that the peer minimises what it is measured by. The edges between groups are derived anew
from the operators' whenever a group is made or dissolved, where the source repairs pointers (it crashes on some of the
graphs here); a group whose edges would close a circle is not made. A graph of several inputs or outputs has one vertex
before and one behind them all for the two dominator trees. The search for the best intrusion visits each set of
sequences once; past ``INTRUSIONS`` sets it takes the best so far. A round that would keep more than ``SCHEDULES``
partial schedules, some gigabytes, ends as if time were out.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from benchmarks.peers.network import Network

INTRUSIONS = 100_000
SCHEDULES = 1_000_000
UNLIMITED = 1 << 62


class OutOfTimeError(Exception):
    """The time limit has passed, or memory is used up, before there was any schedule."""


@dataclass(frozen=True)
class Result:
    """The order, and whether the algorithm came to its end within the time limit."""

    order: tuple[int, ...]
    finished: bool
    rounds: int
    seconds: float


@dataclass(frozen=True, slots=True)
class _Partial:
    """Operators run (in order, as a linked list), their bit mask, and bytes alive: the most and now."""

    path: tuple[object, int] | None
    done: int
    peak: int
    live: int


def is_concatenation(kind: str) -> bool:
    """Whether an operator of that kind ends a cell: what it does first is to concatenate."""
    return kind.split("+")[0].lower().removeprefix("aten.").split(".")[0] in ("cat", "concat", "concatenate")


def hmcos(
    network: Network, *, time_limit: float = 60.0, is_cell_output: Callable[[str], bool] = is_concatenation
) -> Result:
    """The iterative hierarchical scheduling of HMCOS; past ``time_limit`` the best order of the rounds so far.

    Raises
    ------
    OutOfTimeError
        Where the first round takes longer than ``time_limit``, or more memory than there is.
    """
    started = time.perf_counter()
    scheduler = _Scheduler(network, _Hierarchy(network, is_cell_output), started + time_limit)
    best: tuple[int, ...] = ()
    budget, rounds, finished = UNLIMITED, 0, False
    while True:
        try:
            order = scheduler.schedule(budget)
        except OutOfTimeError:
            if not best:
                raise
            break
        rounds += 1
        peak, alive = _peak_tensors(network, order)
        if peak < budget:
            best, budget = order, peak
        if not scheduler.hierarchy.dissolve_around({network.producer[t] for t in alive} - {-1}):
            finished = True
            break
    return Result(best, finished, rounds, time.perf_counter() - started)


def _peak_tensors(network: Network, order: Sequence[int]) -> tuple[int, set[int]]:
    """The peak, and all tensors that are alive at some step that reaches it."""
    left = [len(row) for row in network.readers]
    alive: set[int] = set()
    peak = 0
    found: set[int] = set()
    for operator in order:
        alive |= {*network.inputs[operator], *network.outputs[operator]}
        now = sum(network.sizes[t] for t in alive)
        if now > peak:
            peak, found = now, set()
        if now == peak:
            found |= alive
        for t in network.inputs[operator]:
            left[t] -= 1
        alive -= {t for t in (*network.inputs[operator], *network.outputs[operator]) if not left[t]}
    return peak, found


class _Hierarchy:
    """Sequences, groups of them, and the top level: each sequence alone or as part of its group."""

    def __init__(self, network: Network, is_cell_output: Callable[[str], bool]) -> None:
        self.network = network
        self.sequences = _join(network)
        self.sequence_of = [0] * network.n
        for s, row in enumerate(self.sequences):
            for operator in row:
                self.sequence_of[operator] = s
        count = len(self.sequences)
        self.before: list[set[int]] = [set() for _ in range(count)]
        self.behind: list[set[int]] = [set() for _ in range(count)]
        for operator, row in enumerate(network.predecessors):
            for other in row:
                a, b = self.sequence_of[other], self.sequence_of[operator]
                if a != b:
                    self.behind[a].add(b)
                    self.before[b].add(a)
        #: group of each sequence, -1 for none; a group's number never changes and is never used again
        self.group = [-1] * count
        self.members: dict[int, list[int]] = {}
        self.topological = _topological(range(count), self.before)
        self.dominators = _dominators(self.topological, self.before)
        self.post_dominators = _dominators(self.topological[::-1], self.behind)
        for s in self.topological:
            if self.group[s] < 0 and is_cell_output(network.kinds[self.sequences[s][0]]):
                self._make_cell(s)

    def _make_cell(self, output: int) -> None:
        cell = self._closure(output, self.before, lambda s: bool(self.post_dominators[s] >> output & 1))
        intruded = self._closure(output, self.behind, lambda s: bool(self.dominators[s] >> output & 1))
        # Where something that the output does not dominate reads it, its bytes stay whatever is run first.
        if all(s in intruded for s in self.behind[output]):
            chosen = self._best_intrusion(output, intruded)
            if self._make_group(cell) and len(chosen) > 2:
                self._make_group(chosen - {output})
        else:
            self._make_group(cell)

    def _closure(self, start: int, edges: list[set[int]], inside: Callable[[int], bool]) -> set[int]:
        """Sequences within reach of ``start`` over sequences that are ``inside`` and in no group."""
        found, stack = {start}, [start]
        while stack:
            for other in edges[stack.pop()]:
                if other not in found and self.group[other] < 0 and inside(other):
                    found.add(other)
                    stack.append(other)
        return found

    def _best_intrusion(self, output: int, intruded: set[int]) -> set[int]:
        """The sequences to run right after the cell, ``output`` itself among them, so that least bytes are alive."""
        sizes = {s: sum(self.network.sizes[t] for t in self.network.outputs[self.sequences[s][-1]]) for s in intruded}
        first = frozenset([output])
        seen, stack = {first}, [first]
        best, least = set(first), UNLIMITED
        while stack and len(seen) <= INTRUSIONS:
            chosen = stack.pop()
            size = sum(sizes[s] for s in chosen if not self.behind[s] <= chosen)
            if size and (size < least or (size == least and len(chosen) > len(best))):
                best, least = set(chosen), size
            ready = {b for s in chosen for b in self.behind[s] if b in intruded and b not in chosen}
            for s in ready:
                if all(p in chosen for p in self.before[s] if p in intruded):
                    more = chosen | {s}
                    if more not in seen:
                        seen.add(more)
                        stack.append(more)
        return best

    def _make_group(self, members: set[int]) -> bool:
        """Whether a group of these sequences leaves the top level without a circle; if so, it is made."""
        if len(members) < 2:
            return False
        number = len(self.members)
        for s in members:
            self.group[s] = number
        top = self.top_level()
        if len(_topological(top, self._edges(top)[0])) < len(top):
            for s in members:
                self.group[s] = -1
            return False
        self.members[number] = sorted(members)
        return True

    def dissolve_around(self, operators: Iterable[int]) -> bool:
        """Dissolve the groups of these operators' sequences, and the groups that read what these sequences make."""
        sequences = {self.sequence_of[o] for o in operators}
        doomed = {self.group[s] for s in sequences} | {self.group[b] for s in sequences for b in self.behind[s]}
        doomed.discard(-1)
        for s, number in enumerate(self.group):
            if number in doomed:
                self.group[s] = -1
        return bool(doomed)

    def vertex(self, sequence: int) -> int:
        """What stands for a sequence on the top level: itself, or -1 - g for the group g."""
        return sequence if self.group[sequence] < 0 else -1 - self.group[sequence]

    def top_level(self) -> list[int]:
        return list(dict.fromkeys(self.vertex(s) for s in range(len(self.sequences))))

    def _edges(self, top: Iterable[int]) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        """Predecessors and successors of each vertex of the top level."""
        before: dict[int, set[int]] = {v: set() for v in top}
        behind: dict[int, set[int]] = {v: set() for v in top}
        for s, row in enumerate(self.before):
            for p in row:
                a, b = self.vertex(p), self.vertex(s)
                if a != b:
                    before[b].add(a)
                    behind[a].add(b)
        return before, behind

    def edges(self) -> tuple[dict[int, set[int]], dict[int, set[int]]]:
        return self._edges(self.top_level())


class _Scheduler:
    """One round after another over the same hierarchy; groups' schedules are remembered across rounds."""

    def __init__(self, network: Network, hierarchy: _Hierarchy, deadline: float) -> None:
        self.network, self.hierarchy, self.deadline = network, hierarchy, deadline
        self.known: dict[tuple[int, tuple[bool, ...]], tuple[int, ...]] = {}
        self.border: dict[int, tuple[int, ...]] = {}

    def schedule(self, budget: int) -> tuple[int, ...]:
        before, behind = self.hierarchy.edges()

        def run(vertex: int, state: _Partial) -> _Partial | None:
            if vertex >= 0:
                return self._run(self.hierarchy.sequences[vertex], state, budget)
            return self._run_group(-1 - vertex, state, budget)

        found = self._by_ready_sets(_Partial(None, 0, 0, 0), before, behind, run)
        if found is None:
            raise AssertionError("the best schedule so far is within its own peak")
        return _unlinked(found)

    def _by_ready_sets(
        self,
        start: _Partial,
        before: dict[int, set[int]],
        behind: dict[int, set[int]],
        run: Callable[[int, _Partial], _Partial | None],
    ) -> _Partial | None:
        """Dynamic programming: of all partial schedules with the same vertices ready, the one of least peak."""
        place = {v: k for k, v in enumerate(before)}
        # How many predecessors each vertex still waits for: an array, of which each partial schedule has its own.
        waiting = array("H", map(len, before.values()))
        memo = {frozenset(v for v, row in before.items() if not row): (start, waiting)}
        for _ in before:
            after: dict[frozenset[int], tuple[_Partial, array[int]]] = {}
            for ready, (state, waiting) in memo.items():
                if time.perf_counter() > self.deadline or len(memo) + len(after) > SCHEDULES:
                    raise OutOfTimeError
                for vertex in ready:
                    made = run(vertex, state)
                    if made is None:
                        continue
                    left = waiting[:]
                    for other in behind[vertex]:
                        left[place[other]] -= 1
                    key = (ready - {vertex}) | {other for other in behind[vertex] if not left[place[other]]}
                    if key not in after or made.peak < after[key][0].peak:
                        after[key] = (made, left)
            memo = after
        return memo[frozenset()][0] if memo else None

    def _run(self, operators: Sequence[int], state: _Partial, budget: int) -> _Partial | None:
        path, done, peak, live = state.path, state.done, state.peak, state.live
        for operator in operators:
            arriving, leaving = self.network.step(done, operator)
            if live + arriving > budget:
                return None
            peak = max(peak, live + arriving)
            live += arriving - leaving
            done |= 1 << operator
            path = (path, operator)
        return _Partial(path, done, peak, live)

    def _run_group(self, group: int, state: _Partial, budget: int) -> _Partial | None:
        members = self.hierarchy.members[group]
        inside = sum(1 << o for s in members for o in self.hierarchy.sequences[s])
        # What the group uses up of what it reads from outside, and which inputs it is the first to read.
        context = tuple(
            flag
            for t in self._read_from_outside(group, inside)
            for flag in (
                not self._readers(t) & ~(state.done | inside),
                self.network.producer[t] < 0 and not self._readers(t) & state.done,
            )
        )
        if (group, context) in self.known:
            return self._run(self.known[group, context], state, budget)
        rank = {s: k for k, s in enumerate(self.hierarchy.topological)}
        plain = [o for s in sorted(members, key=rank.__getitem__) for o in self.hierarchy.sequences[s]]
        simple = self._run(plain, state, min(budget, state.peak))
        if simple is not None:
            return simple
        chosen = set(members)
        before = {s: self.hierarchy.before[s] & chosen for s in members}
        behind = {s: self.hierarchy.behind[s] & chosen for s in members}
        start = _Partial(None, state.done, 0, state.live)
        found = self._by_ready_sets(
            start, before, behind, lambda s, partial: self._run(self.hierarchy.sequences[s], partial, budget)
        )
        if found is None:
            return None
        self.known[group, context] = _unlinked(found)
        return self._run(self.known[group, context], state, budget)

    def _read_from_outside(self, group: int, inside: int) -> tuple[int, ...]:
        if group not in self.border:
            operators = [o for s in self.hierarchy.members[group] for o in self.hierarchy.sequences[s]]
            reads = dict.fromkeys(t for o in operators for t in self.network.inputs[o])
            self.border[group] = tuple(
                t for t in reads if self.network.producer[t] < 0 or not inside >> self.network.producer[t] & 1
            )
        return self.border[group]

    def _readers(self, tensor: int) -> int:
        return sum(1 << o for o in self.network.readers[tensor])


def _unlinked(partial: _Partial) -> tuple[int, ...]:
    order, path = [], partial.path
    while path is not None:
        path, operator = path  # type: ignore[assignment]
        order.append(operator)
    return tuple(reversed(order))


def _join(network: Network) -> list[list[int]]:
    """Chains of operators that raise neither the peak nor what is alive after the first of them."""

    def change(operator: int) -> tuple[int, int]:
        made = sum(network.sizes[t] for t in network.outputs[operator])
        used = sum(network.sizes[t] for t in network.inputs[operator] if len(network.readers[t]) == 1)
        return made, used + sum(network.sizes[t] for t in network.outputs[operator] if not network.readers[t])

    sequences: list[list[int]] = []
    taken: set[int] = set()
    for first in range(network.n):
        if first in taken:
            continue
        row = [first]
        made, used = change(first)
        highest, level = made, made - used
        while len(network.successors[row[-1]]) == 1:
            following = network.successors[row[-1]][0]
            outside = any(network.producer[t] < 0 for t in network.inputs[following])
            if network.predecessors[following] != [row[-1]] or outside:
                break
            made, used = change(following)
            if level + made > highest or made > used:
                break
            level += made - used
            row.append(following)
        taken.update(row)
        sequences.append(row)
    return sequences


def _topological(vertices: Iterable[int], before: list[set[int]] | dict[int, set[int]]) -> list[int]:
    """Vertices after their predecessors, depth first; fewer than all where there is a circle."""
    vertices = list(vertices)
    waiting = {v: len(before[v]) for v in vertices}
    behind: dict[int, list[int]] = {v: [] for v in vertices}
    for v in vertices:
        for p in before[v]:
            behind[p].append(v)
    stack = [v for v in reversed(vertices) if not waiting[v]]
    order = []
    while stack:
        vertex = stack.pop()
        order.append(vertex)
        for other in behind[vertex]:
            waiting[other] -= 1
            if not waiting[other]:
                stack.append(other)
    return order


def _dominators(order: list[int], before: list[set[int]]) -> list[int]:
    """Bit masks of the vertices on all ways to each, itself included; ways begin at any vertex without predecessor."""
    found = [0] * len(order)
    for vertex in order:
        common = -1 if before[vertex] else 0
        for p in before[vertex]:
            common &= found[p]
        found[vertex] = common | 1 << vertex
    return found
