"""The optimum of a small graph by trying everything, written without a look at the planner.

All orders, all choices of keeping or evicting each tensor before each step, all addresses. Two exact devices bound
the work. A table of the remaining cost over (operators run, tensors kept, copies off-chip), which ignores
addresses, tells which partial plans can still end at a given cost. And a partial plan is known by the operators
run, what lies where, and what has a copy: where one way to get there led nowhere, another is not followed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from retensor.graph.structure import Graph

State = tuple[int, frozenset[int], frozenset[int]]  # operators run (bits), tensors kept, tensors with a copy
Move = tuple[int, frozenset[int], int, State]  # operator, tensors that stayed, cost, state after
Placed = frozenset[tuple[int, int]]  # tensor and address

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
        self.start: State = (0, frozenset(), frozenset())
        self.costs: dict[State, int] = {}
        self.lists: dict[State, list[Move]] = {}

    def optimum(self) -> int | None:
        cost = self.remaining(self.start)
        while cost < INFINITE:
            self.limit, self.next_cost = cost, INFINITE
            self.dead: dict[tuple[State, Placed], int] = {}
            if self._walk(self.start, frozenset(), cost):
                return cost
            # A plan of a cost in between would have been cut at its cost by bytes alone, which is no less than this.
            cost = self.next_cost
        return None

    def remaining(self, state: State) -> int:
        """Least cost of the operators not yet run, by bytes alone, addresses ignored."""
        if state[0] == self.everything:
            return 0
        if state not in self.costs:
            self.costs[state] = min(
                (cost + self.remaining(after) for *_, cost, after in self._moves(state)), default=INFINITE
            )
        return self.costs[state]

    def _moves(self, state: State) -> list[Move]:
        if state not in self.lists:
            self.lists[state] = list(self._all_moves(*state))
        return self.lists[state]

    def _all_moves(self, done: int, kept: frozenset[int], copied: frozenset[int]) -> Iterator[Move]:
        """Every next operator with every choice of what to evict before it.

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
        """Whether these tensors have addresses side by side at one instant."""
        sizes = [self.tables.sizes[t] for t in present]
        rounded = [-(-size // self.alignment) * self.alignment for size in sizes]
        # The topmost tensor may end before its unit does.
        slack = max((whole - size for whole, size in zip(rounded, sizes, strict=True)), default=0)
        return sum(rounded) - slack <= self.scratchpad

    def _walk(self, state: State, placed: Placed, left: int) -> bool:
        """Whether the operators not yet run can be run, at addresses, for ``left`` bytes."""
        if state[0] == self.everything:
            return True
        if left <= self.dead.get((state, placed), -1):
            return False
        where = dict(placed)
        for i, stayed, cost, after in self._moves(state):
            missing = cost + self.remaining(after) - left
            if missing > 0:
                self.next_cost = min(self.next_cost, self.limit + missing)
                continue
            new = self.tables.touched[i] - stayed
            # Those that are used again first: of the others it matters only that they have some place.
            queue = sorted(new, key=lambda t: (t not in after[1], -self.tables.sizes[t]))
            for addresses in self._places(queue, {t: where[t] for t in stayed}, after[1]):
                if self._walk(after, frozenset((t, addresses[t]) for t in after[1]), left - cost):
                    return True
        self.dead[state, placed] = left
        return False

    def _places(self, queue: list[int], where: dict[int, int], alive: frozenset[int]) -> Iterator[dict[int, int]]:
        """Every choice of free addresses for the tensors in ``queue``; for those not alive after, the first found."""
        if not queue:
            yield where
            return
        tensor, *rest = queue
        size = self.tables.sizes[tensor]
        for address in range(0, self.scratchpad - size + 1, self.alignment):
            if all(address + size <= a or a + self.tables.sizes[t] <= address for t, a in where.items()):
                for found in self._places(rest, {**where, tensor: address}, alive):
                    yield found
                    if tensor not in alive:
                        return


def _subsets(items: list[int]) -> Iterator[frozenset[int]]:
    """All subsets, the empty one first."""
    for bits in range(1 << len(items)):
        yield frozenset(item for k, item in enumerate(items) if bits >> k & 1)
