"""Addresses of long programs: always there, for little more traffic, and checked by the verifier."""

from __future__ import annotations

import random

import pytest
from benchmarks.synthetic import cells, layered
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import minimum_scratchpad, random_graph

from retensor.graph import Graph
from retensor.planning import Accelerator, verify
from retensor.planning.assemble import finish
from retensor.planning.baselines import evict_by_bytes, follow
from retensor.planning.improve import improve
from retensor.planning.problem import build_problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, traffic
from retensor.planning.settle import settle


def settled_bytes(graph: Graph, scratchpad: int, alignment: int, parameters: bool, seconds: float) -> tuple[int, int]:
    """Bytes of a plan's stays as a sum at each step, and with addresses, counted by the verifier."""
    problem = build_problem(graph, parameters, alignment)
    capacity, order = -(-scratchpad // alignment), tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, capacity, "belady"))
    answer = Answer(order, stays, traffic(problem, stays), 0)
    if seconds:
        answer = improve(problem, capacity, answer, Clock(seconds))
    found = settle(problem, scratchpad, answer, Clock(120))
    assert found is not None
    plan = finish(
        graph, Accelerator(scratchpad, alignment), scratchpad, parameters, problem, answer.order, found.stays,
        found.addresses, found.transient_addresses, bound=0, solver="settled", seconds=0.0, fixed_order=True,
    )  # fmt: skip
    return answer.cost, verify(graph, plan).non_compulsory_bytes


@pytest.mark.parametrize("seed", range(4))
def test_every_plan_of_bytes_gets_addresses_that_the_verifier_accepts(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(40):
        graph = random_graph(rng, 12) if rng.random() < 0.5 else layered_graph(rng, rng.randint(3, 80), 3)
        parameters, alignment = rng.random() < 0.4, rng.choice([1, 1, 4, 16])
        scratchpad = minimum_scratchpad(graph, alignment, parameters) + rng.choice([0, 0, 1, 7])
        if not scratchpad:
            continue
        before, after = settled_bytes(graph, scratchpad, alignment, parameters, 0)
        assert after >= before or alignment > 1


@pytest.mark.parametrize("graph", [layered(500, seed=1), cells(500, seed=1)], ids=["layered", "cells"])
def test_addresses_cost_little_where_placing_as_the_steps_come_costs_much(graph: Graph) -> None:
    problem = build_problem(graph, False, 1)
    capacity, order = max(problem.need), tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, capacity, "belady"))
    answer = improve(problem, capacity, Answer(order, stays, traffic(problem, stays), 0), Clock(2))
    found = settle(problem, capacity, answer, Clock(60))
    assert found is not None
    placed = traffic(problem, found.stays)
    online = traffic(problem, follow(problem, answer.order, answer.stays, capacity).stays)
    assert placed <= 1.05 * answer.cost < online


def test_without_time_there_are_none() -> None:
    problem = build_problem(layered(300, seed=2), False, 1)
    order = tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, max(problem.need), "belady"))
    answer = Answer(order, stays, traffic(problem, stays), 0)
    assert settle(problem, max(problem.need), answer, Clock(0.0)) is None
