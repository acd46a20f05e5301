"""Lower bounds over all orders: never above the optimum, and tight where they are meant to be."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from benchmarks.synthetic import layered
from tests.planning.brute_force import optimum
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import minimum_scratchpad, random_graph

from retensor.graph import Graph, Operator, Tensor
from retensor.planning import Accelerator, plan
from retensor.planning.baselines import evict_by_bytes
from retensor.planning.chains import glue
from retensor.planning.crossing import crossing_bound
from retensor.planning.late import postpone
from retensor.planning.lower import lower_bound
from retensor.planning.problem import Item, Problem, build_problem, pinned_operators
from retensor.planning.progress import Clock
from retensor.planning.projection import projection_bound
from retensor.planning.residency import keep_or_evict, traffic
from retensor.planning.wavefront import wavefront_bound

Bound = Callable[[Problem, int], int]


def crossing(problem: Problem, capacity: int) -> int:
    return crossing_bound(problem, capacity, Clock(60), workers=1)


def wavefront(problem: Problem, capacity: int) -> int:
    order = range(problem.n)
    return max(wavefront_bound(problem, capacity, order, Clock(60), reach=reach) for reach in (2, 6, 100))


def projection(problem: Problem, capacity: int) -> int:
    return projection_bound(problem, capacity, range(problem.n), Clock(60), lengths=(3, 4, 6), width=50)


BOUNDS: dict[str, Bound] = {"crossing": crossing, "wavefront": wavefront, "projection": projection}


@pytest.mark.parametrize("seed", range(4))
def test_no_bound_is_above_the_brute_force_optimum(seed: int) -> None:
    rng = random.Random(seed)
    above_zero = dict.fromkeys(BOUNDS, 0)
    for _ in range(120):
        graph = random_graph(rng, 8)
        parameters, alignment = rng.random() < 0.4, rng.choice([1, 1, 2])
        scratchpad = minimum_scratchpad(graph, alignment, parameters) + rng.choice([0, 0, 0, 1, 2])
        least = optimum(graph, scratchpad, alignment, parameters)
        assert least is not None
        problem = postpone(build_problem(graph, parameters, alignment))
        for name, bound in BOUNDS.items():
            found = bound(problem, -(-scratchpad // alignment))
            assert found <= least, (name, graph)
            above_zero[name] += found > 0
    assert min(above_zero.values()) > 3


@pytest.mark.parametrize("seed", range(3))
def test_no_bound_is_above_a_proved_plan_of_a_larger_graph(seed: int) -> None:
    rng = random.Random(seed)
    proved = 0
    while proved < 12:
        graph = layered_graph(rng, rng.randint(12, 26), rng.randint(1, 4))
        problem = postpone(build_problem(graph, False, 1))
        capacity = max(problem.need)
        best = plan(graph, Accelerator(capacity), time_limit=10, workers=1)
        if best.status != "optimal":
            continue
        proved += 1
        for name, bound in BOUNDS.items():
            assert bound(problem, capacity) <= best.non_compulsory_bytes, name
        known = best.non_compulsory_bytes
        assert lower_bound(problem, capacity, range(problem.n), known, Clock(30)) <= known


def skips(depth: int) -> Graph:
    """A chain down and back up, in which each step up reads a step down again: a U-net, or a backward pass."""
    tensors = [Tensor("x", 8, "input"), *(Tensor(f"t{i}", 8) for i in range(2 * depth))]
    operators = [Operator("o0", "Op", ("x",), ("t0",))]
    for i in range(1, 2 * depth):
        reads = (f"t{i - 1}",) if i < depth else (f"t{i - 1}", f"t{2 * depth - 1 - i}")
        operators.append(Operator(f"o{i}", "Op", tuple(dict.fromkeys(reads)), (f"t{i}",)))
    return Graph("skips", operators, tensors, [f"t{2 * depth - 1}"])


@pytest.mark.parametrize("depth", [4, 30, 300])
def test_a_chain_with_skips_is_proved_by_what_crosses(depth: int) -> None:
    problem = build_problem(skips(depth), False, 1)
    capacity = max(problem.need) + 16
    known = keep_or_evict(problem, capacity, tuple(range(problem.n)), Clock(60))
    assert known.proved
    assert crossing(problem, capacity) == known.cost
    assert lower_bound(problem, capacity, range(problem.n), known.cost, Clock(60)) == known.cost


def test_wide_graphs_have_a_wavefront_where_next_to_nothing_crosses() -> None:
    problem = build_problem(layered(300, seed=1), False, 1)
    capacity = max(problem.need)
    assert wavefront_bound(problem, capacity, range(problem.n), Clock(60)) > 10 * crossing(problem, capacity)


def test_time_that_runs_out_leaves_a_bound() -> None:
    problem = build_problem(layered(400, seed=1), False, 1)
    capacity = max(problem.need)
    order = tuple(range(problem.n))
    cost = traffic(problem, evict_by_bytes(problem, order, capacity, "belady"))
    seen: list[int] = []
    assert 0 <= lower_bound(problem, capacity, order, cost, Clock(0.0)) <= cost
    best = lower_bound(problem, capacity, order, cost, Clock(8), keep=seen.append)
    assert 0 < best <= cost
    assert seen == sorted(seen)
    assert seen[-1] == best


def test_a_given_order_has_a_bound_of_its_own() -> None:
    rng = random.Random(3)
    above = 0
    for _ in range(40):
        problem = build_problem(layered_graph(rng, rng.randint(5, 40), 3), False, 1)
        capacity, order = max(problem.need), tuple(range(problem.n))
        best = keep_or_evict(problem, capacity, order, Clock(60))
        assert best.proved
        for lengths in ((4,), (10,), (50,)):
            bound = projection_bound(problem, capacity, order, Clock(60), fixed=True, lengths=lengths)
            assert bound <= best.cost
            above += bound > 0
        assert bound == best.cost
    assert above > 20


def test_pinned_operators_are_those_that_compare_with_every_other_one() -> None:
    rng = random.Random(1)
    for _ in range(300):
        graph = random_graph(rng, 12) if rng.random() < 0.5 else layered_graph(rng, rng.randint(3, 30), 2)
        problem = postpone(build_problem(graph, rng.random() < 0.5, 1))
        expected = [
            (before | after).bit_count() == problem.n - 1
            for before, after in zip(problem.ancestors, problem.descendants, strict=True)
        ]
        assert pinned_operators(problem) == expected


def test_a_chain_is_not_glued_past_an_order_that_no_tensor_asks_for() -> None:
    # u makes x, of which v makes y, as large. w reads nothing and may run anywhere, or, where it says so, before v.
    u, w, v, end = range(4)
    items = (
        Item("s", 4, 4, -1, (u, end), 0),
        Item("x", 4, 4, u, (v,), 4),
        Item("z", 4, 4, w, (end,), 4),
        Item("y", 4, 4, v, (end,), 4),
    )
    transients = ((("p", 4),), (), (), ())
    free = Problem((0, 1, 2, 3), items, transients, (12, 4, 8, 12), 1)
    assert (u, v) in glue(free)
    ordered = Problem((0, 1, 2, 3), items, transients, (12, 4, 8, 12), 1, ((w, v),))
    assert (u, v) not in glue(ordered)
