"""Large-neighbourhood search: never worse, always valid, the same for the same seed, and on time."""

from __future__ import annotations

import random
import time

import pytest
from benchmarks.synthetic import cells, layered
from tests.planning.answer_check import check
from tests.planning.layered import layered_graph

from retensor.graph import Graph
from retensor.planning.baselines import evict_by_bytes
from retensor.planning.improve import improve
from retensor.planning.late import postpone
from retensor.planning.problem import Problem, build_problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, traffic
from retensor.planning.search import Search


def started(graph: Graph) -> tuple[Problem, int, Answer]:
    """A graph's problem, the least capacity, and its own order with Belady's evictions."""
    problem = postpone(build_problem(graph, False, 1))
    capacity = max(problem.need)
    order = tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, capacity, "belady"))
    return problem, capacity, Answer(order, stays, traffic(problem, stays), 0)


@pytest.mark.parametrize("graph", [layered(400, seed=2), cells(400, seed=3)], ids=["layered", "cells"])
def test_every_round_is_valid_and_none_is_worse(graph: Graph) -> None:
    problem, capacity, first = started(graph)
    costs = [first.cost]

    def keep(answer: Answer) -> None:
        assert check(problem, capacity, answer) == answer.cost <= costs[-1]
        costs.append(answer.cost)

    found = improve(problem, capacity, first, Clock(4), keep=keep)
    assert check(problem, capacity, found) == found.cost == costs[-1]
    # Belady in the program's order is far from what windows find.
    assert found.cost < 0.7 * first.cost


def test_small_problems_reach_the_proved_optimum_most_of_the_time() -> None:
    rng = random.Random(0)
    reached = tried = 0
    while tried < 25:
        problem, capacity, first = started(layered_graph(rng, rng.randint(10, 24), 3))
        search = Search(problem, capacity, None, Clock(10), 0, 1, None)
        search._solve_parts()
        optimum = sum(solved.answer.cost for solved in search.solved)
        if search.bound != optimum or first.cost == optimum:
            continue
        tried += 1
        found = improve(problem, capacity, first, Clock(10))
        assert found.cost >= optimum
        reached += found.cost == optimum
    assert reached >= 20


def test_the_same_seed_does_the_same() -> None:
    problem, capacity, first = started(layered(300, seed=4))

    def rounds(seed: int) -> list[Answer]:
        clock, seen = Clock(600), []

        def keep(answer: Answer) -> None:
            seen.append(answer)
            if len(seen) == 6:
                clock.stop()

        improve(problem, capacity, first, clock, seed=seed, keep=keep)
        return seen

    assert rounds(7) == rounds(7)
    assert rounds(7) != rounds(8)


def test_a_given_order_is_kept() -> None:
    problem, capacity, first = started(layered(600, seed=5))
    found = improve(problem, capacity, first, Clock(5), fixed=True)
    assert found.order == first.order
    assert check(problem, capacity, found) == found.cost < first.cost


def test_a_proved_answer_is_handed_back() -> None:
    problem, capacity, first = started(layered(50, seed=6))
    proved = Answer(first.order, first.stays, first.cost, first.cost)
    assert improve(problem, capacity, proved, Clock(60)) is proved


def test_it_stops_in_time_and_when_it_is_asked_to() -> None:
    problem, capacity, first = started(layered(5_000, seed=7))
    improve(problem, capacity, first, Clock(1))  # loads the compiled search
    begun = time.monotonic()
    found = improve(problem, capacity, first, Clock(2))
    assert time.monotonic() - begun < 4
    assert found.cost < first.cost
    clock = Clock(60)
    begun = time.monotonic()
    improve(problem, capacity, first, clock, keep=lambda _: clock.stop())
    assert time.monotonic() - begun < 20
