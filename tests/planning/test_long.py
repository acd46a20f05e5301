"""Long programs: planned, verified, bounded, and on time."""

from __future__ import annotations

import time

import pytest
from benchmarks.synthetic import cells, layered

from retensor.graph import Graph, Operator, Tensor
from retensor.planning import Accelerator, Plan, baseline, plan, verify
from retensor.planning.progress import Progress


def checked(graph: Graph, seconds: float, **options: object) -> tuple[Plan, float]:
    """A verified plan at the least scratchpad, and the seconds it took."""
    begun = time.monotonic()
    found = plan(graph, Accelerator("M_R"), time_limit=seconds, **options)  # type: ignore[arg-type]
    taken = time.monotonic() - begun
    assert verify(graph, found).non_compulsory_bytes == found.non_compulsory_bytes
    assert 0 <= found.bound_bytes <= found.non_compulsory_bytes
    return found, taken


@pytest.mark.parametrize("make", [layered, cells])
def test_long_programs_have_good_plans_with_a_bound(make: object) -> None:
    graph = make(1_600, seed=3)  # type: ignore[operator]
    found, _ = checked(graph, 20)
    belady = baseline(graph, Accelerator("M_R"), placement="online")
    assert found.non_compulsory_bytes < 0.75 * belady.non_compulsory_bytes
    assert found.bound_bytes > 0


def test_long_programs_keep_a_given_order() -> None:
    graph = layered(1_600, seed=4)
    found, taken = checked(graph, 15, order="default")
    assert found.order == tuple(operator.name for operator in graph.operators)
    assert found.fixed_order
    assert found.bound_bytes > 0
    assert taken < 20
    belady = baseline(graph, Accelerator("M_R"), placement="online")
    assert found.non_compulsory_bytes < belady.non_compulsory_bytes


def test_progress_shows_the_plan_get_better_under_a_bound() -> None:
    seen: list[Progress] = []
    checked(layered(1_600, seed=5), 10, progress=seen.append)
    costs = [report.incumbent for report in seen if report.incumbent is not None]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 3


def wide(fan: int) -> Graph:
    """One operator that reads the results of very many, each of which another one reads too."""
    tensors = [Tensor("x", 64, "input")]
    operators = []
    for i in range(fan):
        tensors += [Tensor(f"a{i}", 16), Tensor(f"b{i}", 64)]
        operators += [Operator(f"f{i}", "Op", ("x",), (f"a{i}",)), Operator(f"g{i}", "Op", (f"a{i}", "x"), (f"b{i}",))]
    tensors.append(Tensor("y", 16))
    operators.append(Operator("join", "Op", tuple(f"a{i}" for i in range(fan)), ("y",)))
    for i in range(3 * fan):
        # And a long tail that reads them once more.
        tensors.append(Tensor(f"c{i}", 16))
        before = f"c{i - 1}" if i else "y"
        operators.append(Operator(f"h{i}", "Op", (before, f"b{i % fan}"), (f"c{i}",)))
    return Graph("wide", operators, tensors, [f"c{3 * fan - 1}"])


@pytest.mark.parametrize("limit", [1.0, 4.0])
def test_limits_hold_on_wide_graphs(limit: float) -> None:
    graph = wide(1_000)
    assert len(graph.operators) == 5_001
    checked(wide(20), 5)  # loads what is compiled
    _, taken = checked(graph, limit)
    assert taken < limit + 3


def test_a_baseline_of_a_wide_graph_is_quick() -> None:
    graph = wide(1_000)
    for placement in ("online", "arena"):
        begun = time.monotonic()
        found = baseline(graph, Accelerator("M_R"), placement=placement)
        assert time.monotonic() - begun < 20
        verify(graph, found)
