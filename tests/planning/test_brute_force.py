"""The oracle that the planner is measured by is itself measured: against every order, gap and address literally."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import pytest
from tests.planning import random_graphs
from tests.planning.brute_force import _Search, min_peak, optimum
from tests.planning.random_graphs import minimum_scratchpad, random_budget, random_graph

from retensor.graph.structure import Graph, Operator, Tensor


def literal_optimum(graph: Graph, scratchpad: int, alignment: int, parameters: bool) -> int | None:
    """Permutations, subsets of evicted gaps, and every address of every residency; no bound on the cost."""
    best: int | None = None
    for order in running_orders(graph):
        uses: dict[str, list[int]] = {}
        for step, i in enumerate(order):
            for name in graph.operator_tensors(graph.operators[i], parameters):
                uses.setdefault(name, []).append(step)
        gaps = [(name, k) for name, steps in uses.items() for k in range(len(steps) - 1)]
        for evicted in itertools.chain.from_iterable(itertools.combinations(gaps, k) for k in range(len(gaps) + 1)):
            cost = 0
            stays = []
            for name, steps in uses.items():
                tensor = graph.tensors[name]
                gone = [k for k in range(len(steps) - 1) if (name, k) in evicted]
                spilled = bool(gone) and tensor.role == "activation" and name not in graph.outputs
                cost += tensor.nbytes * (len(gone) + spilled)
                starts = [steps[0], *(steps[k + 1] for k in gone)]
                ends = [*(steps[k] + 1 for k in gone), steps[-1] + 1]
                stays += [(start, end, tensor.nbytes) for start, end in zip(starts, ends, strict=True)]
            if (best is None or cost < best) and literally_placeable(stays, scratchpad, alignment):
                best = cost
    return best


def running_orders(graph: Graph) -> list[tuple[int, ...]]:
    orders = []
    for order in itertools.permutations(range(len(graph.operators))):
        at = {i: step for step, i in enumerate(order)}
        reads = ((i, name) for i in order for name in graph.operators[i].inputs if name in graph.producer)
        if all(at[graph.producer[name]] < at[i] for i, name in reads):
            orders.append(order)
    return orders


def literally_placeable(stays: list[tuple[int, int, int]], scratchpad: int, alignment: int) -> bool:
    stays = sorted(stays)
    placed: list[tuple[int, int, int, int]] = []
    dead: set[tuple[int, frozenset[tuple[int, int, int, int]]]] = set()
    if any(sum(n for s, e, n in stays if s <= step < e) > scratchpad for step, _, _ in stays):
        return False

    def place(k: int) -> bool:
        if k == len(stays):
            return True
        start, end, size = stays[k]
        # In order of their starts, only what still lives can be in the way of those to come.
        living = (k, frozenset(box for box in placed if box[1] > start))
        if living in dead:
            return False
        for address in range(0, scratchpad - size + 1, alignment):
            if any(
                start < e and s < end and address < a + n and a < address + size and size and n for s, e, n, a in placed
            ):
                continue
            placed.append((start, end, size, address))
            if place(k + 1):
                return True
            placed.pop()
        dead.add(living)
        return False

    return place(0)


def small_graph(rng: random.Random) -> Graph:
    """A random graph of up to five operators with tensors small and few enough to enumerate."""
    while True:
        graph = random_graph(rng, most=5)
        uses = sum(len(o.inputs) + len(o.outputs) for o in graph.operators)
        if uses <= 13:
            tensors = [dataclasses.replace(t, nbytes=min(t.nbytes, 1 + t.nbytes % 3)) for t in graph.tensors.values()]
            return Graph(graph.name, graph.operators, tensors, graph.outputs)


def test_the_oracle_equals_literal_enumeration() -> None:
    positive = infeasible = 0
    for seed in range(2000):
        rng = random.Random(seed)
        graph, parameters = small_graph(rng), rng.random() < 0.5
        scratchpad, alignment = random_budget(graph, rng, parameters)
        least = literal_optimum(graph, scratchpad, alignment, parameters)
        assert optimum(graph, scratchpad, alignment, parameters) == least, seed
        positive += bool(least)
        infeasible += least is None
    assert positive >= 40
    assert infeasible >= 40


@pytest.mark.parametrize("index", range(3))
def test_the_known_unplaceable_lives_are_unplaceable_literally(index: int) -> None:
    capacity, lives = random_graphs._UNPLACEABLE[index]
    boxes = [(int(life[0]), int(life[1]), int(life[2])) for life in lives.split()]
    assert max(sum(n for s, e, n in boxes if s <= t < e) for t in range(9)) == capacity
    assert not literally_placeable(boxes, capacity, 1)
    assert literally_placeable(boxes, capacity + 1, 1)


def test_min_peak_equals_all_orders_counted_one_by_one() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        graph, parameters = random_graph(rng, most=6), rng.random() < 0.5
        peaks = []
        for order in running_orders(graph):
            steps = [graph.operator_tensors(graph.operators[i], parameters) for i in order]
            first = {name: step for step, names in reversed(list(enumerate(steps))) for name in names}
            last = {name: step for step, names in enumerate(steps) for name in names}
            living = (
                sum(graph.tensors[name].nbytes for name in first if first[name] <= step <= last[name])
                for step in range(len(order))
            )
            peaks.append(max(living))
        assert min_peak(graph, parameters) == min(peaks), seed


def test_the_oracle_knows_the_plain_facts() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        graph, parameters = random_graph(rng), rng.random() < 0.5
        least = minimum_scratchpad(graph, 1, parameters)
        peak = min_peak(graph, parameters)
        assert peak >= least
        assert optimum(graph, max(1, least), 1, parameters) is not None
        if least > 1:
            assert optimum(graph, least - 1, 1, parameters) is None
        assert optimum(graph, max(1, 2 * sum(t.nbytes for t in graph.tensors.values())), 1, parameters) == 0
        if least < peak:
            cost = optimum(graph, peak - 1, 1, parameters)
            assert cost is not None
            assert cost > 0


@pytest.mark.parametrize(("role", "output", "cost"), [("input", False, 5), ("activation", False, 10)])
def test_an_input_costs_only_the_retrieve(role: str, output: bool, cost: int) -> None:
    """``a`` is used first and last; in between ``m`` needs all the room."""
    tensors = [Tensor("a", 5, role), Tensor("b", 1), Tensor("m", 9), Tensor("c", 1), Tensor("y", 5)]  # type: ignore[arg-type]
    operators = [
        Operator("f", "F", ("a",), ("b",)),
        Operator("g", "G", ("b",), ("m",)),
        Operator("h", "H", ("m",), ("c",)),
        Operator("i", "I", ("a", "c"), ("y",)),
    ]
    if role == "activation":
        operators.insert(0, Operator("make", "Make", (), ("a",)))
    outputs = ["y", "a"] if output else ["y"]
    assert optimum(Graph("skip", operators, tensors, outputs), 11) == cost
    assert optimum(Graph("skip", operators, tensors, ["y", "a"]), 11) == 5


def test_fragmentation_alone_costs_bytes_in_some_graphs() -> None:
    """The bytes would fit without eviction but no addresses do; at every alignment, among random graphs."""
    found = Counter[int]()
    for seed in range(1000):
        rng = random.Random(seed)
        graph = random_graph(rng)
        scratchpad, alignment = random_budget(graph, rng)
        by_bytes = _Search(graph, scratchpad, alignment, False).remaining((0, frozenset(), frozenset()))
        cost = optimum(graph, scratchpad, alignment)
        if cost is not None:
            assert by_bytes <= cost
            found[alignment] += by_bytes < cost
    assert min(found[1], found[2]) >= 3, found
