"""A look at every step of an answer that has no addresses yet, which the verifier cannot read."""

from __future__ import annotations

from retensor.planning.problem import Problem
from retensor.planning.residency import Answer, Stay, traffic


def check(problem: Problem, capacity: int, answer: Answer) -> int:
    """Traffic of an answer, after a look at every step.

    Raises
    ------
    AssertionError
        Where a step holds more than the capacity, an operator runs too early, or a use finds its item out.
    """
    step = {operator: at for at, operator in enumerate(answer.order)}
    if sorted(answer.order) != list(range(problem.n)):
        raise AssertionError("the order does not name each operator once")
    for operator, row in enumerate(problem.predecessors):
        if any(step[before] >= step[operator] for before in row):
            raise AssertionError(f"operator {operator} runs before what it reads is made")
    change = [0] * (problem.n + 1)
    inside: dict[int, list[Stay]] = {}
    for stay in answer.stays:
        change[stay.start] += problem.items[stay.item].room
        change[stay.end] -= problem.items[stay.item].room
        inside.setdefault(stay.item, []).append(stay)
    for i, item in enumerate(problem.items):
        for user in item.users:
            if not any(stay.start <= step[user] < stay.end for stay in inside[i]):
                raise AssertionError(f"item {i} is out when operator {user} uses it")
    held = 0
    for at, operator in enumerate(answer.order):
        held += change[at]
        if held + problem.own(operator) > capacity:
            raise AssertionError(f"step {at} holds {held + problem.own(operator)} units of {capacity}")
    return traffic(problem, answer.stays)
