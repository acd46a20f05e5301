"""The compiled search over wide frontiers: against the plain one, cut short in every way it can be, and its limits."""

from __future__ import annotations

import random

import pytest
from tests.planning.answer_check import check
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_graph

from retensor.graph import Graph, Operator, Tensor
from retensor.planning import wide
from retensor.planning.baselines import evict_by_bytes
from retensor.planning.frontier import search_frontier
from retensor.planning.problem import Problem, build_problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, traffic
from retensor.planning.wide import search_wide


def start(problem: Problem, capacity: int) -> Answer:
    order = tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, capacity, "belady"))
    return Answer(order, stays, traffic(problem, stays), 0)


def cases(count: int, largest: int):
    for seed in range(count):
        rng = random.Random(seed)
        graph = random_graph(rng, largest) if seed % 3 else layered_graph(rng, operators=largest, width=4)
        problem = build_problem(graph, seed % 2 == 0, rng.choice((1, 1, 4)))
        if problem.items:
            yield seed, problem, max(problem.need) + rng.randint(0, 3)


def test_it_finds_and_proves_what_the_plain_search_does() -> None:
    costly = 0
    for seed, problem, capacity in cases(300, 12):
        known = start(problem, capacity)
        plain = search_frontier(problem, capacity, Clock(60), known, width=10**6, choices=10**6)
        found = search_wide(problem, capacity, Clock(60), known)
        assert plain.proved, f"seed {seed}"
        assert (found.cost, found.bound) == (plain.cost, plain.cost), f"seed {seed}"
        assert check(problem, capacity, found) == found.cost
        costly += found.cost > 0
    assert costly > 60


@pytest.mark.parametrize(("widest", "choices"), [(1, 1), (3, 1), (3, 64), (40, 2)])
def test_cut_short_it_never_claims_too_much(widest: int, choices: int, monkeypatch) -> None:
    monkeypatch.setattr(wide, "CHOICES", choices)
    monkeypatch.setattr(wide, "FIRST_ROWS", 4)
    short = 0
    for seed, problem, capacity in cases(150, 14):
        known = start(problem, capacity)
        plain = search_frontier(problem, capacity, Clock(60), known, width=10**6, choices=10**6)
        found = search_wide(problem, capacity, Clock(60), known, widest=widest)
        assert found.bound <= plain.cost <= found.cost <= known.cost, f"seed {seed}"
        assert check(problem, capacity, found) == found.cost
        short += not found.proved
    assert short > 0


def test_its_tables_grow_without_loss(monkeypatch) -> None:
    """A layer begins with room for a few states and is moved many times."""
    monkeypatch.setattr(wide, "FIRST_ROWS", 4)
    grown = 0
    grow = wide._Layer.grow

    def counted(self: wide._Layer) -> None:
        nonlocal grown
        grown += 1
        grow(self)

    monkeypatch.setattr(wide._Layer, "grow", counted)
    for seed in range(6):
        problem = build_problem(
            layered_graph(random.Random(seed), operators=26, width=6), parameters=False, alignment=1
        )
        capacity = max(problem.need)
        found = search_wide(problem, capacity, Clock(60), start(problem, capacity))
        assert check(problem, capacity, found) == found.cost
        assert found.proved
    assert grown > 3


def test_more_tensors_inside_than_it_can_choose_among_are_not_claimed_to_be_tried() -> None:
    """Sixty-six tensors of a byte wait for the last operator while a large one needs their room."""
    reads = [Operator(f"r{i}", "Op", (f"x{i}",), (f"y{i}",)) for i in range(66)]
    tensors = [Tensor(f"x{i}", 1, "input") for i in range(66)] + [Tensor(f"y{i}", 1) for i in range(66)]
    late = [
        Operator("large", "Op", ("y0",), ("z",)),
        Operator("end", "Op", (*(f"y{i}" for i in range(66)), "z"), ("o",)),
    ]
    graph = Graph("many", reads + late, [*tensors, Tensor("z", 60), Tensor("o", 1)], ["o"])
    problem = build_problem(graph, parameters=False, alignment=1)
    capacity = max(problem.need)
    known = start(problem, capacity - 3)
    found = search_wide(problem, capacity, Clock(60), known)
    assert check(problem, capacity, found) == found.cost
    assert found.bound <= found.cost <= known.cost


def test_without_time_it_returns_what_it_was_given() -> None:
    problem = build_problem(layered_graph(random.Random(0), operators=20, width=4), parameters=False, alignment=1)
    known = start(problem, max(problem.need))
    assert search_wide(problem, max(problem.need), Clock(0), known) == known


def test_it_tells_of_every_better_plan_and_bound() -> None:
    problem = build_problem(layered_graph(random.Random(1), operators=24, width=4), parameters=False, alignment=1)
    capacity = max(problem.need)
    told: list[Answer] = []
    known = start(problem, capacity)
    found = search_wide(problem, capacity, Clock(60), known, keep=told.append)
    assert told[-1] == found
    for before, after in zip([known, *told], told, strict=False):
        assert (after.cost, -after.bound) < (before.cost, -before.bound)
