"""Windows of a course: what they cost, what they leave as it is, and that any plan of one can be put in its place."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.planning.answer_check import check
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_graph

from retensor.planning.baselines import evict_by_bytes
from retensor.planning.frontier import search_frontier
from retensor.planning.late import postpone
from retensor.planning.problem import Problem, build_problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, traffic
from retensor.planning.windows import Course


def some_problem(rng: random.Random) -> Problem:
    graph = random_graph(rng, 20) if rng.random() < 0.5 else layered_graph(rng, rng.randint(3, 60), rng.randint(1, 4))
    return postpone(build_problem(graph, rng.random() < 0.4, rng.choice([1, 1, 4])))


def some_answer(rng: random.Random, problem: Problem, capacity: int) -> Answer:
    order = tuple(range(problem.n))
    stays = tuple(evict_by_bytes(problem, order, capacity, rng.choice(["belady", "greedy"])))
    return Answer(order, stays, traffic(problem, stays), 0)


def some_cuts(rng: random.Random, n: int) -> list[int]:
    cuts = [0]
    while cuts[-1] < n:
        cuts.append(min(n, cuts[-1] + rng.randint(1, 12)))
    # Sometimes with steps before the first window.
    return cuts[rng.randint(0, 1) :] if len(cuts) > 2 else cuts


def occupancy(problem: Problem, answer: Answer) -> list[int]:
    held = [problem.own(operator) for operator in answer.order]
    for stay in answer.stays:
        for step in range(stay.start, stay.end):
            held[step] += problem.items[stay.item].room
    return held


@pytest.mark.parametrize("seed", range(12))
def test_a_window_in_the_place_of_the_courses_own_changes_the_cost_by_the_difference(seed: int) -> None:
    rng = random.Random(seed)
    accepted = gained = 0
    for _ in range(25):
        problem = some_problem(rng)
        capacity = max(problem.need) + rng.choice([0, 0, 1, 5, rng.randint(0, 40)])
        course = Course(problem, capacity, some_answer(rng, problem, capacity))
        for _ in range(3):
            for window in course.sweep(some_cuts(rng, problem.n)):
                assert check(window.problem, window.capacity, window.known) == window.known.cost
                if not window.known.cost or rng.random() < 0.2:
                    continue
                found = search_frontier(window.problem, window.capacity, Clock(60), window.known, width=40, choices=10)
                before = course.cost
                course.accept(window, found)
                accepted += 1
                gained += before - course.cost
                assert before - course.cost == window.known.cost - found.cost >= 0
            if rng.random() < 0.5:
                before = course.cost
                course.keep_again()
                assert course.cost <= before
            answer = course.answer(0)
            assert check(problem, capacity, answer) == answer.cost == course.cost
            assert course.held.tolist() == occupancy(problem, answer)
    assert accepted > 20
    assert gained > 0


def test_the_whole_as_one_window_is_the_whole_problem() -> None:
    rng = random.Random(5)
    for _ in range(30):
        problem = some_problem(rng)
        capacity = max(problem.need)
        answer = some_answer(rng, problem, capacity)
        course = Course(problem, capacity, answer)
        (window,) = course.sweep([0, problem.n])
        assert window.known.cost == answer.cost
        assert window.capacity == capacity
        assert window.operators == (-1, *answer.order, -1)


def test_what_is_put_out_without_need_is_kept_again() -> None:
    rng = random.Random(9)
    problem = some_problem(rng)
    loose = sum(item.room for item in problem.items) + max(problem.need)
    course = Course(problem, loose, some_answer(rng, problem, max(problem.need)))
    assert course.cost > 0
    course.keep_again()
    assert course.cost == 0
    assert not course.out


def test_what_lies_in_the_scratchpad_is_known_to_the_course() -> None:
    rng = random.Random(2)
    for _ in range(20):
        problem = some_problem(rng)
        answer = some_answer(rng, problem, max(problem.need))
        course = Course(problem, max(problem.need), answer)
        assert np.array_equal(course.held, occupancy(problem, course.answer(0)))
        assert course.held.max() <= max(problem.need)
