"""A graph as the peer schedulers of least peak memory see it, and the recount that all of them are measured by.

Activations only, as in the papers: an operator's results are alive from the step that makes them to the last that
reads them, a network input from its first reader to its last. What nothing reads is alive for its one step. The
recount (:meth:`Network.peak`) follows tensors by name and shares no code with the planner.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from retensor.graph.structure import Graph


class Network:
    """Operators ``0..n-1`` in the program's order, tensors by number.

    Attributes
    ----------
    n : int
    sizes : list of int
        Bytes of each tensor.
    inputs, outputs : list of list of int
        Tensors that each operator reads and makes.
    producer : list of int
        The operator that makes each tensor; -1 for a network input.
    readers : list of list of int
        The operators that read each tensor.
    kinds : list of str
        What each operator is.
    """

    def __init__(self, graph: Graph) -> None:
        names = [name for name, tensor in graph.tensors.items() if tensor.role != "parameter"]
        number = {name: i for i, name in enumerate(names)}
        self.graph = graph
        self.n = len(graph.operators)
        self.sizes = [graph.tensors[name].nbytes for name in names]
        self.inputs = [[number[t] for t in o.inputs if t in number] for o in graph.operators]
        self.outputs = [[number[t] for t in o.outputs] for o in graph.operators]
        self.producer = [graph.producer.get(name, -1) for name in names]
        self.readers = [list(graph.consumers[name]) for name in names]
        self.kinds = [operator.kind for operator in graph.operators]

    @cached_property
    def predecessors(self) -> list[list[int]]:
        """Operators whose results each operator reads."""
        return [sorted({self.producer[t] for t in row if self.producer[t] >= 0}) for row in self.inputs]

    @cached_property
    def successors(self) -> list[list[int]]:
        """Operators that read each operator's results."""
        rows: list[list[int]] = [[] for _ in range(self.n)]
        for operator, row in enumerate(self.predecessors):
            for other in row:
                rows[other].append(operator)
        return rows

    @cached_property
    def _users(self) -> list[int]:
        own = [1 << p if p >= 0 else 0 for p in self.producer]
        return [mask | sum(1 << r for r in row) for mask, row in zip(own, self.readers, strict=True)]

    def step(self, done: int, operator: int) -> tuple[int, int]:
        """Bytes that arrive when ``operator`` runs after the set ``done`` (a bit mask), and bytes that leave then."""
        after = done | 1 << operator
        arriving = leaving = 0
        for t in (*self.inputs[operator], *self.outputs[operator]):
            if not self._users[t] & done:
                arriving += self.sizes[t]
            if not self._users[t] & ~after:
                leaving += self.sizes[t]
        return arriving, leaving

    def peak(self, order: Sequence[int]) -> int:
        """The most bytes alive at one step of ``order``, counted anew from the graph.

        Raises
        ------
        ValueError
            Where ``order`` leaves out an operator, or runs one before what it reads is made.
        """
        operators, tensors = self.graph.operators, self.graph.tensors
        if sorted(order) != list(range(self.n)):
            raise ValueError(f"an order of {len(set(order))} different operators where the graph has {self.n}")
        left = {name: len(self.graph.consumers[name]) for name in tensors}
        alive: set[str] = set()
        peak = 0
        for index in order:
            operator = operators[index]
            reads = [name for name in operator.inputs if tensors[name].role != "parameter"]
            for name in reads:
                if tensors[name].role == "activation" and name not in alive:
                    raise ValueError(f"operator '{operator.name}' runs before '{name}' is made")
            alive |= {*reads, *operator.outputs}
            peak = max(peak, sum(tensors[name].nbytes for name in alive))
            for name in reads:
                left[name] -= 1
            alive -= {name for name in (*reads, *operator.outputs) if not left[name]}
        return peak
