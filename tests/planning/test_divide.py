"""Divide and conquer: valid on anything, never better than the optimum, and exact where one segment is the whole."""

from __future__ import annotations

import itertools
import random

import pytest
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_budget, random_graph

from retensor.errors import InfeasibleError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import BASELINES, Accelerator, baseline, bounds, plan, verify
from retensor.planning.divide import divide_and_conquer, segments
from retensor.planning.problem import build_problem
from retensor.planning.progress import Progress


def _cells(cells: int, skip: bool) -> Graph:
    """Cells that read the outputs of the two before, as in a searched network."""
    tensors = [Tensor("x", 20, "input")]
    operators = []
    older, newer = "x", "x"
    for c in range(cells):
        names = [f"{part}{c}" for part in "abcdefg"]
        a, b, left, right, first, second, out = names
        sizes = (40, 40, 40, 40, 40, 40, 20)
        tensors += [Tensor(name, size) for name, size in zip(names, sizes, strict=True)]
        operators += [
            Operator(a, "Conv", (older if skip else newer,), (a,)),
            Operator(b, "Conv", (newer,), (b,)),
            Operator(left, "Conv", (a,), (left,)),
            Operator(right, "Conv", (b,), (right,)),
            Operator(first, "Add", (left, right), (first,)),
            Operator(second, "Add", (a, b), (second,)),
            Operator(out, "Concat", (first, second), (out,)),
        ]
        older, newer = newer, out
    return Graph("cells", operators, tensors, [newer])


def _checked(graph: Graph, scratchpad: int, alignment: int = 1, **options: object) -> int:
    made = divide_and_conquer(graph, Accelerator(scratchpad, alignment), workers=1, **options)
    assert verify(graph, made).non_compulsory_bytes == made.non_compulsory_bytes
    assert made.scratchpad_bytes == scratchpad
    assert made.bound_bytes == 0
    assert made.solver == "divide and conquer"
    return made.non_compulsory_bytes


def test_it_is_valid_and_never_below_the_optimum_however_small_the_segments() -> None:
    rng = random.Random(1)
    above = 0
    for _ in range(150):
        graph = random_graph(rng)
        parameters = rng.random() < 0.5
        scratchpad, alignment = random_budget(graph, rng, parameters)
        try:
            best = plan(graph, Accelerator(scratchpad, alignment), parameters=parameters, workers=1)
        except InfeasibleError:
            continue
        assert best.status == "optimal"
        for most in (1, 2, 3):
            found = _checked(graph, scratchpad, alignment, parameters=parameters, segment_operators=most)
            assert found >= best.non_compulsory_bytes
            above += found > best.non_compulsory_bytes
    # A heuristic that always met the optimum would mean that nothing is divided here.
    assert above


@pytest.mark.parametrize("seed", range(4))
def test_one_segment_of_everything_is_the_optimum(seed: int) -> None:
    rng = random.Random(100 + seed)
    costly = 0
    for _ in range(40):
        graph = random_graph(rng)
        parameters = rng.random() < 0.5
        scratchpad, alignment = random_budget(graph, rng, parameters)
        try:
            best = plan(graph, Accelerator(scratchpad, alignment), parameters=parameters, workers=1)
        except InfeasibleError:
            continue
        assert _checked(graph, scratchpad, alignment, parameters=parameters) == best.non_compulsory_bytes
        costly += best.non_compulsory_bytes > 0
    assert costly


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_segments_cross_the_fewest_bytes_of_all_divisions(most: int) -> None:
    for seed in range(12):
        problem = build_problem(layered_graph(random.Random(seed), 9), False, 1)
        order = tuple(range(problem.n))

        def crossing(cuts: tuple[int, ...], problem=problem) -> int:
            return sum(i.size for cut in cuts for i in problem.items if min(i.users) < cut <= max(i.users))

        found = segments(problem, order, most)
        assert [o for members in found for o in members] == list(order)
        assert max(map(len, found)) <= most
        cuts = tuple(itertools.accumulate(len(members) for members in found))[:-1]
        every = (
            chosen
            for count in range(problem.n)
            for chosen in itertools.combinations(range(1, problem.n), count)
            if all(b - a <= most for a, b in itertools.pairwise((0, *chosen, problem.n)))
        )
        assert crossing(cuts) == min(crossing(chosen) for chosen in every)


def test_a_segment_is_cut_where_cells_meet() -> None:
    graph = _cells(6, skip=False)
    problem = build_problem(graph, False, 1)
    assert [len(s) for s in segments(problem, tuple(range(problem.n)), 13)] == [7] * 6


@pytest.mark.parametrize("skip", [False, True])
def test_cells_take_less_than_the_baselines_on_average(skip: bool) -> None:
    graph = _cells(8, skip)
    found = bounds(graph)
    assert found.m_r < found.m_p
    for scratchpad in (found.m_r, found.m_h, found.m_p):
        others = [
            baseline(graph, Accelerator(scratchpad), schedule=s, replacement=r, order=found.order).non_compulsory_bytes
            for s, r in BASELINES
        ]
        for most in (7, 14):
            assert _checked(graph, scratchpad, segment_operators=most) < sum(others) / len(others) or not any(others)
    assert _checked(graph, found.m_p) == 0


def test_a_tensor_written_in_one_segment_is_not_written_again_in_the_next() -> None:
    # `a` waits for two far segments; each lets it go. One write, two reads, in three segments.
    tensors = [Tensor("x", 1, "input"), Tensor("a", 10), Tensor("b", 1)]
    operators = [Operator("both", "B", ("x",), ("a", "b"))]
    last = "b"
    for i in range(2):
        tensors += [Tensor(f"wide{i}", 12), Tensor(f"end{i}", 1)]
        operators += [
            Operator(f"wide{i}", "W", (last,), (f"wide{i}",)),
            Operator(f"end{i}", "E", (f"wide{i}", last), (f"end{i}",)),
        ]
        tensors.append(Tensor(f"mix{i}", 1))
        operators.append(Operator(f"mix{i}", "M", (f"end{i}", "a"), (f"mix{i}",)))
        last = f"mix{i}"
    graph = Graph("twice", operators, tensors, [last])
    assert plan(graph, Accelerator(14)).non_compulsory_bytes == 30
    for most in (1, 2, 3):
        assert _checked(graph, 14, segment_operators=most) == 30


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
def test_it_ends_in_time_with_a_valid_plan(limit: float) -> None:
    graph = layered_graph(random.Random(5), 150, width=5)
    scratchpad = bounds(graph, time_limit=1.0).m_r
    made = divide_and_conquer(graph, Accelerator(scratchpad), time_limit=limit, workers=1)
    assert verify(graph, made).non_compulsory_bytes == made.non_compulsory_bytes
    # Addresses and the first answers come on top of the limit; a loaded machine more.
    assert made.seconds < limit + 20


def test_it_tells_of_each_segment() -> None:
    heard: list[Progress] = []
    graph = _cells(4, skip=True)
    divide_and_conquer(graph, Accelerator("M_R"), segment_operators=7, progress=heard.append)
    assert {p.stage for p in heard} == {"segments"}
    assert all(p.done <= p.total for p in heard)
    assert any(p.done == p.total for p in heard)


def test_the_same_call_gives_the_same_plan() -> None:
    graph = layered_graph(random.Random(3), 40)
    one, other = (divide_and_conquer(graph, Accelerator("M_R"), seed=1, workers=1) for _ in range(2))
    assert (one.order, one.residencies) == (other.order, other.residencies)


@pytest.mark.parametrize("most", [0, -1])
def test_segments_of_no_operators_are_refused(most: int) -> None:
    with pytest.raises(ValueError, match="segment_operators is at least 1"):
        divide_and_conquer(_cells(1, False), Accelerator("M_R"), segment_operators=most)


@pytest.mark.parametrize("most", [2.5, "7"])
def test_segments_of_something_else_than_operators_are_refused(most: object) -> None:
    with pytest.raises(TypeError, match="segment_operators"):
        divide_and_conquer(_cells(1, False), Accelerator("M_R"), segment_operators=most)  # type: ignore[arg-type]


def test_an_operator_that_does_not_fit_is_named() -> None:
    with pytest.raises(InfeasibleError, match="needs"):
        divide_and_conquer(_cells(1, False), Accelerator(10))


def test_a_shorter_first_segment_moves_the_cuts() -> None:
    problem = build_problem(_cells(6, skip=False), False, 1)
    found = segments(problem, tuple(range(problem.n)), 15, first=10)
    assert [len(s) for s in found] == [7, 7, 14, 14]
    assert [len(s) for s in segments(problem, tuple(range(problem.n)), 15)] == [14, 14, 14]
