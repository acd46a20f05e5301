"""The optimum of a small graph by trying everything, written without a look at the planner.

All orders, all choices of keeping or evicting in every gap between two uses of a tensor, all placements. The
work is bounded by two exact devices only. A remaining-cost table over (operators run, tensors kept, copies
off-chip) that ignores addresses tells which partial plans can still end at a given cost. And where a set of
residencies is placed, only placements in which nothing can slide down are tried: sliding everything down
never breaks a placement.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from retensor.graph.structure import Graph

Box = tuple[int, int, int]  # start step, end step, bytes
Stays = tuple[tuple[int, int, bool], ...]  # tensor, first step, whether it stays on after the step before

INFINITE = 10**18


def optimum(graph: Graph, scratchpad: int, alignment: int = 1, parameters: bool = False) -> int | None:
    """The least non-compulsory bytes of any plan, or None where no plan exists.

    Parameters
    ----------
    graph : Graph
        Up to about 8 operators.
    scratchpad, alignment : int
        In bytes.
    parameters : bool
        Whether parameters lie in the scratchpad too.
    """
    return _Search(graph, scratchpad, alignment, parameters).optimum()


def min_peak(graph: Graph, parameters: bool = False) -> int:
    """M_P: over all orders, the least of the largest sum of living tensors; no addresses.

    An activation lives from its producer, an input or parameter from its first use, to its last use.
    """
    tables = _Tables(graph, parameters)
    everything = (1 << tables.count) - 1

    @functools.cache
    def best(done: int) -> int:
        if done == everything:
            return 0
        results = []
        for i in tables.ready(done):
            after = done | 1 << i
            living = sum(
                size
                for t, size in enumerate(tables.sizes)
                if t in tables.touched[i] or (tables.users[t] & done and tables.users[t] & ~after)
            )
            results.append(max(living, best(after)))
        return min(results)

    return best(0)


class _Tables:
    """The graph in numbers: bit masks of operators, tensors without the empty ones."""

    def __init__(self, graph: Graph, parameters: bool) -> None:
        self.count = len(graph.operators)
        names = [
            tensor.name
            for tensor in graph.tensors.values()
            if tensor.nbytes and (parameters or tensor.role != "parameter")
        ]
        number = {name: t for t, name in enumerate(names)}
        self.sizes = [graph.tensors[name].nbytes for name in names]
        #: operators that read or write each tensor
        self.users = [0] * len(names)
        self.touched: list[frozenset[int]] = []
        self.before = [0] * self.count
        #: writing it off-chip is free or compulsory: inputs and parameters are there, outputs are stored once
        self.copy_free = [graph.tensors[n].role != "activation" or n in graph.outputs for n in names]
        for i, operator in enumerate(graph.operators):
            used = [number[name] for name in operator.inputs + operator.outputs if name in number]
            self.touched.append(frozenset(used))
            for t in used:
                self.users[t] |= 1 << i
            for name in operator.inputs:
                for j, other in enumerate(graph.operators):
                    if name in other.outputs:
                        self.before[i] |= 1 << j

    def ready(self, done: int) -> list[int]:
        return [i for i in range(self.count) if not done >> i & 1 and self.before[i] & ~done == 0]


class _Search:
    def __init__(self, graph: Graph, scratchpad: int, alignment: int, parameters: bool) -> None:
        self.tables = _Tables(graph, parameters)
        self.scratchpad, self.alignment = scratchpad, alignment
        self.everything = (1 << self.tables.count) - 1
        self.memo: dict[tuple[int, frozenset[int], frozenset[int]], int] = {}

    def optimum(self) -> int | None:
        start = (0, frozenset[int](), frozenset[int]())
        cost = self.remaining(*start)
        if cost >= INFINITE:
            return None
        while True:
            # At first, partial plans are not placed: nearly always the first whole one has a placement. Where it
            # has none, dead ends are cut as early as they show.
            self.next_cost, self.misses = INFINITE, 0
            if self._walk(*start, spent=0, limit=cost, step=0, closed=(), opened={}):
                return cost
            assert self.next_cost < INFINITE, "evicting everything at every step can always be placed"
            cost = self.next_cost

    def remaining(self, done: int, kept: frozenset[int], copied: frozenset[int]) -> int:
        """Least cost of the operators not yet run, by bytes alone, addresses ignored."""
        if done == self.everything:
            return 0
        state = (done, kept, copied)
        if state not in self.memo:
            self.memo[state] = min(
                (cost + self.remaining(*after) for _, _, cost, after in self._moves(*state)), default=INFINITE
            )
        return self.memo[state]

    def _moves(
        self, done: int, kept: frozenset[int], copied: frozenset[int]
    ) -> Iterator[tuple[int, frozenset[int], int, tuple[int, frozenset[int], frozenset[int]]]]:
        """Every next operator with every choice of what to evict before it: (operator, stayed, cost, state).

        ``kept`` are the tensors in the scratchpad that are used again. Evicting one that the operator itself
        needs is a choice too: it comes back, perhaps to another address.
        """
        tables = self.tables
        for i in tables.ready(done):
            after = done | 1 << i
            for evicted in _subsets(sorted(kept)):
                stayed = kept - evicted
                present = stayed | tables.touched[i]
                if not self._fits(present):
                    continue
                written = frozenset(t for t in evicted if not tables.copy_free[t]) - copied
                back = [t for t in tables.touched[i] if t not in stayed and tables.users[t] & done]
                cost = sum(tables.sizes[t] for t in written) + sum(tables.sizes[t] for t in back)
                alive = frozenset(t for t in present if tables.users[t] & ~after)
                # A copy off-chip of a tensor that is dead makes no difference.
                copies = frozenset(t for t in copied | written if tables.users[t] & ~after)
                yield i, stayed, cost, (after, alive, copies)

    def _fits(self, present: frozenset[int]) -> bool:
        sizes = [self.tables.sizes[t] for t in present]
        rounded = [-(-size // self.alignment) * self.alignment for size in sizes]
        # The topmost tensor may end before its unit does.
        slack = max((whole - size for whole, size in zip(rounded, sizes, strict=True)), default=0)
        return sum(rounded) - slack <= self.scratchpad

    def _walk(
        self,
        done: int,
        kept: frozenset[int],
        copied: frozenset[int],
        spent: int,
        limit: int,
        step: int,
        closed: tuple[Box, ...],
        opened: dict[int, tuple[int, int]],
    ) -> bool:
        """Whether some way on from here ends at cost ``limit`` and can be placed.

        ``closed`` are the residencies that ended; ``opened`` maps a tensor to the start of its residency and
        one past the last step that used it.
        """
        if done == self.everything:
            placed = self._placed(closed, opened)
            self.misses += not placed
            return placed
        if self.misses and not self._placed(closed, {t: (start, step) for t, (start, _) in opened.items()}):
            return False
        for i, stayed, cost, after in self._moves(done, kept, copied):
            total = spent + cost + self.remaining(*after)
            if total > limit:
                self.next_cost = min(self.next_cost, total)
                continue
            ended = tuple((s, e, self.tables.sizes[t]) for t, (s, e) in opened.items() if t not in stayed)
            now = {t: stay for t, stay in opened.items() if t in stayed}
            for t in self.tables.touched[i]:
                now[t] = (now[t][0] if t in now else step, step + 1)
            if self._walk(*after, spent + cost, limit, step + 1, closed + ended, now):
                return True
        return False

    def _placed(self, closed: tuple[Box, ...], opened: dict[int, tuple[int, int]]) -> bool:
        boxes = closed + tuple((s, e, self.tables.sizes[t]) for t, (s, e) in opened.items())
        return placeable(tuple(sorted(boxes)), self.scratchpad, self.alignment)


def _subsets(items: list[int]) -> Iterator[frozenset[int]]:
    """All subsets, the small ones in terms of the first items first."""
    for bits in range(1 << len(items)):
        yield frozenset(item for k, item in enumerate(items) if bits >> k & 1)


@functools.lru_cache(maxsize=2**16)
def placeable(boxes: tuple[Box, ...], scratchpad: int, alignment: int) -> bool:
    """Whether residencies ``(start, end, bytes)`` have addresses without overlap; every way is tried.

    If there is a placement, there is one in which no box can slide down. Taken in order of address, each box
    then lies at 0 or on the highest of the boxes before it that share a step with it. So it is enough to try
    every order of boxes with each put there, addresses never falling.
    """
    steps = max((end for _, end, _ in boxes), default=0)
    dead: set[tuple[int, tuple[int, ...], int]] = set()

    def place(left: int, tops: tuple[int, ...], floor: int) -> bool:
        if not left:
            return True
        if (left, tops, floor) in dead:
            return False
        rest = [box for k, box in enumerate(boxes) if left >> k & 1]
        # What is left at a step lies above what is there already.
        fits = all(
            tops[step] + sum(size for start, end, size in rest if start <= step < end) <= scratchpad
            for step in range(steps)
        )
        tried: set[Box] = set()
        if fits:
            for k, box in enumerate(boxes):
                if not left >> k & 1 or box in tried:
                    continue
                tried.add(box)
                start, end, size = box
                address = -(-max(tops[start:end]) // alignment) * alignment
                if address < floor or address + size > scratchpad:
                    continue
                above = tops[:start] + (address + size,) * (end - start) + tops[end:]
                if place(left & ~(1 << k), above, address):
                    return True
        dead.add((left, tops, floor))
        return False

    return place((1 << len(boxes)) - 1, (0,) * steps, 0)
