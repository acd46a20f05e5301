"""A sweep's budgets, and the two facts that sharpen its curve."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retensor.graph import Graph, Operator, Tensor
from retensor.planning.sweep import SweepPoint, budgets, settle, sweep


@given(st.integers(1, 10**9), st.integers(0, 10**9), st.integers(2, 1000))
def test_budgets_are_distinct_evenly_spaced_and_reach_both_ends(smallest, span, points):
    found = budgets(smallest + span, smallest, points)
    assert (found[0], found[-1]) == (smallest + span, smallest)
    assert found == sorted(set(found), reverse=True)
    assert len(found) == min(points, span + 1)
    steps = [a - b for a, b in itertools.pairwise(found)]
    assert not steps or max(steps) - min(steps) <= 1


def point(size, traffic, bound):
    return SweepPoint(size, traffic, bound, 0, 0.0, "optimal" if traffic <= bound else "feasible")


def test_traffic_of_a_smaller_scratchpad_serves_a_larger_one():
    curve = settle([point(30, 9, 2), point(20, 5, 5), point(10, 7, 7)])
    assert [p.non_compulsory_bytes for p in curve] == [5, 5, 7]
    assert [p.status for p in curve] == ["feasible", "optimal", "optimal"]


def test_traffic_that_meets_its_bound_becomes_optimal():
    curve = settle([point(30, 9, 5), point(20, 5, 5)])
    assert [(p.non_compulsory_bytes, p.status) for p in curve] == [(5, "optimal"), (5, "optimal")]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=9))
def test_settled_traffic_never_falls_as_the_scratchpad_shrinks(pairs):
    curve = settle([point(100 - i, traffic, min(traffic, bound)) for i, (traffic, bound) in enumerate(pairs)])
    traffic = [p.non_compulsory_bytes for p in curve]
    assert traffic == sorted(traffic)
    assert settle(curve) == curve


@st.composite
def small_graphs(draw):
    """Up to six operators, each reading one or two earlier tensors."""
    tensors = [Tensor("in", draw(st.integers(1, 9)), "input")]
    operators = []
    for i in range(draw(st.integers(2, 6))):
        inputs = draw(st.lists(st.sampled_from([t.name for t in tensors]), min_size=1, max_size=2, unique=True))
        tensors.append(Tensor(f"t{i}", draw(st.integers(1, 9))))
        operators.append(Operator(f"op{i}", "Op", tuple(inputs), (f"t{i}",)))
    read = {name for operator in operators for name in operator.inputs}
    return Graph("small", operators, tensors, [t.name for t in tensors if t.name not in read])


@settings(max_examples=25, deadline=None)
@given(small_graphs())
def test_sweep_is_proved_monotone_and_free_at_the_top(graph):
    curve = sweep(graph, points=4)
    assert {p.status for p in curve} == {"optimal"}
    assert all(p.bound_bytes == p.non_compulsory_bytes for p in curve)
    assert curve == sorted(curve, key=lambda p: -p.scratchpad_bytes)
    traffic = [p.non_compulsory_bytes for p in curve]
    assert traffic == sorted(traffic)


@pytest.mark.parametrize("points", [1, 0, -3, 1001])
def test_points_out_of_range_are_refused(points):
    graph = Graph("one", [Operator("f", "F", ("x",), ("y",))], [Tensor("x", 1, "input"), Tensor("y", 1)], ["y"])
    with pytest.raises(ValueError, match="2 to 1000"):
        sweep(graph, points=points)
    with pytest.raises(TypeError):
        sweep(graph, points=2.0)
