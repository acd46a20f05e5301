"""A sweep's budgets and points, the two facts that sharpen it, and what it refuses."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.random_graphs import random_graph

from retensor.errors import GraphError, RetensorError
from retensor.graph import Graph, Operator, Tensor, load
from retensor.graph.json import write_graph
from retensor.planning import Accelerator, plan, verify
from retensor.planning import sweep as sweep_function
from retensor.planning.exact import plan as exact_plan
from retensor.planning.plan import Plan, Transfer
from retensor.planning.sweep import SweepPoint, budgets, settle, sweep

TENSORS = [Tensor("x", 4, "input"), Tensor("a", 4), Tensor("b", 6), Tensor("c", 4), Tensor("y", 4)]
OPERATORS = [
    Operator("f", "F", ("x",), ("a",)),
    Operator("g", "G", ("a",), ("b",)),
    Operator("h", "H", ("b",), ("c",)),
    Operator("k", "K", ("a", "c"), ("y",)),
]
SKIP = Graph("skip", OPERATORS, TENSORS, ["y"])
ONE = Graph("one", [Operator("f", "F", ("x",), ("y",))], [Tensor("x", 1, "input"), Tensor("y", 1)], ["y"])


@given(st.integers(1, 10**9), st.integers(0, 10**9), st.integers(2, 1000))
def test_budgets_are_distinct_evenly_spaced_and_reach_both_ends(smallest, span, points):
    found = budgets(smallest + span, smallest, points)
    assert (found[0], found[-1]) == (smallest + span, smallest)
    assert found == sorted(set(found), reverse=True)
    assert len(found) == min(points, span + 1)
    steps = [a - b for a, b in itertools.pairwise(found)]
    assert not steps or max(steps) - min(steps) <= 1


def point(size, traffic, bound, digest="d", parameters=False, alignment=1):
    moves = (Transfer("t", "retrieve", 0, traffic),)
    made = Plan("net", digest, size, alignment, parameters, (), (), moves, bound, "by hand", 0.0)
    return SweepPoint("net", Accelerator(size, alignment), parameters, made)


def test_traffic_of_a_smaller_scratchpad_serves_a_larger_one():
    curve = settle([point(30, 9, 2), point(20, 5, 5), point(10, 7, 7)])
    assert [p.non_compulsory_bytes for p in curve] == [5, 5, 7]
    assert [p.bound_bytes for p in curve] == [2, 5, 7]
    assert [p.status for p in curve] == ["feasible", "optimal", "optimal"]
    assert [p.plan.scratchpad_bytes for p in curve] == [30, 20, 10]


def test_bound_of_a_larger_scratchpad_serves_a_smaller_one():
    curve = settle([point(10, 7, 0), point(30, 5, 5), point(20, 6, 1)])
    assert [p.bound_bytes for p in curve] == [5, 5, 5]
    assert [p.scratchpad_bytes for p in curve] == [10, 30, 20]


def test_traffic_that_meets_its_bound_becomes_optimal():
    curve = settle([point(30, 9, 5), point(20, 5, 5)])
    assert [(p.non_compulsory_bytes, p.status) for p in curve] == [(5, "optimal"), (5, "optimal")]


def test_networks_and_settings_do_not_serve_each_other():
    points = [
        point(30, 9, 0),
        point(20, 5, 5, digest="e"),
        point(20, 5, 5, parameters=True),
        point(20, 5, 5, alignment=2),
    ]
    assert settle(points) == points


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=9))
def test_settled_traffic_never_falls_as_the_scratchpad_shrinks(pairs):
    curve = settle([point(100 - i, traffic, min(traffic, bound)) for i, (traffic, bound) in enumerate(pairs)])
    for values in ([p.non_compulsory_bytes for p in curve], [p.bound_bytes for p in curve]):
        assert values == sorted(values)
    assert settle(curve) == curve


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1, 4]))
def test_a_sweep_is_proved_monotone_and_each_plan_of_it_valid(seed, parameters, alignment):
    graph = random_graph(random.Random(seed), 6)
    curve = sweep(graph, points=4, parameters=parameters, alignment=alignment)
    assert {p.status for p in curve} == {"optimal"}
    assert curve == sorted(curve, key=lambda p: -p.scratchpad_bytes)
    traffic = [p.non_compulsory_bytes for p in curve]
    assert traffic == sorted(traffic)
    for found in curve:
        assert found.plan.scratchpad_bytes == found.scratchpad_bytes
        assert verify(graph, found.plan).non_compulsory_bytes == found.non_compulsory_bytes == found.bound_bytes


def test_rows_come_in_the_order_asked_for_with_the_reason_where_nothing_runs():
    chip = Accelerator("M_R", alignment=2, name="chip")
    rows = sweep([SKIP, ONE], ["M_P", 11, chip], parameters=(False, True))
    assert [(r.model, r.parameters, r.scratchpad_bytes, r.accelerator.name, r.status) for r in rows] == [
        ("skip", False, 14, None, "optimal"),
        ("skip", False, 11, None, "infeasible"),
        ("skip", False, 12, "chip", "optimal"),
        ("skip", True, 14, None, "optimal"),
        ("skip", True, 11, None, "infeasible"),
        ("skip", True, 12, "chip", "optimal"),
        ("one", False, 2, None, "optimal"),
        ("one", False, 11, None, "optimal"),
        ("one", False, 3, "chip", "optimal"),
        ("one", True, 2, None, "optimal"),
        ("one", True, 11, None, "optimal"),
        ("one", True, 3, "chip", "optimal"),
    ]
    assert "needs 12 bytes" in rows[1].error
    assert "1 bytes are missing" in rows[1].error
    assert (rows[1].plan, rows[1].non_compulsory_bytes, rows[1].bound_bytes, rows[1].seconds) == (None, None, None, 0.0)
    assert rows[0].error is None


def test_a_public_accelerator_is_named_beside_sizes():
    from retensor.planning.accelerators import PRESETS

    name, chip = next((name, p.accelerator) for name, p in PRESETS.items() if p.accelerator.alignment > 1)
    rows = sweep(SKIP, [name, "M_R"])
    assert [row.accelerator.name for row in rows] == [chip.name, None]
    assert [row.accelerator.alignment for row in rows] == [chip.alignment, 1]


def test_a_point_is_what_planning_it_alone_gives():
    for row in sweep(SKIP, ["M_R", "M_H", "M_P", 100]):
        alone = plan(SKIP, row.accelerator)
        assert (row.non_compulsory_bytes, row.bound_bytes, row.compulsory_bytes) == (
            alone.non_compulsory_bytes,
            alone.bound_bytes,
            alone.compulsory_bytes,
        )


def test_the_order_of_the_program_is_kept_where_it_is_asked_for():
    for row in sweep(SKIP, points=3, order="default"):
        assert row.plan.order == tuple("fghk")
        assert row.plan.fixed_order


def test_models_are_named_as_they_were_given_and_each_file_is_loaded_once(tmp_path, monkeypatch):
    from retensor import graph as graph_module

    write_graph(SKIP, tmp_path / "net.json")
    loaded = []

    def counted(source, **options):
        loaded.append(source)
        return load(source, **options)

    monkeypatch.setattr(graph_module, "load", counted)
    rows = sweep([tmp_path / "net.json", ONE], points=3, parameters=(False, True))
    assert [row.model for row in rows] == [str(tmp_path / "net.json")] * 6 + ["one"] * 2
    assert loaded == [tmp_path / "net.json"]
    assert {row.model for row in sweep({"mine": SKIP}, [14])} == {"mine"}
    assert {row.model for row in sweep("onnx:squeezenet", ["M_R"])} == {"onnx:squeezenet"}


def test_equal_tasks_are_solved_once(monkeypatch):
    from retensor.planning import tasks

    asked = []

    def counted(graph, accelerator, **options):
        asked.append((graph.name, accelerator.scratchpad))
        return exact_plan(graph, accelerator, **options)

    monkeypatch.setattr(tasks, "plan", counted)
    rows = sweep([SKIP, Graph("twin", OPERATORS, TENSORS, ["y"])], [14, "M_P", "14B", Accelerator(14, name="chip")])
    assert [row.non_compulsory_bytes for row in rows] == [0] * 8
    assert asked == [("skip", 14)]


def test_progress_tells_of_plans_done_and_in_all():
    seen = []
    sweep([SKIP, ONE], points=3, progress=seen.append)
    for stage, total in (("bounds", 2), ("planning", 4)):
        told = [state for state in seen if state.stage.startswith(stage)]
        assert (told[0].done, told[-1].done) == (0, total)
        assert {state.total for state in told} == {total}
        assert [state.done for state in told] == sorted(state.done for state in told)


@pytest.mark.parametrize("points", [1, 0, -3, 1001])
def test_points_out_of_range_are_refused(points):
    with pytest.raises(ValueError, match="2 to 1000"):
        sweep(ONE, points=points)
    with pytest.raises(TypeError):
        sweep(ONE, points=2.0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "sentence"),
    [
        (([],), {}, ValueError, "models is empty; give at least one"),
        (({},), {}, ValueError, "models is empty; give at least one"),
        ((SKIP, []), {}, ValueError, "accelerators is empty; give at least one"),
        ((7,), {}, TypeError, "a model is a Graph, a file or a name, not int"),
        (([SKIP, None],), {}, TypeError, "a model is a Graph, a file or a name, not NoneType"),
        (({1: SKIP},), {}, TypeError, "the name of a model is a str, not int"),
        (("no-such-network",), {}, GraphError, "no-such-network"),
        (([SKIP, "no/such/file.onnx"],), {}, GraphError, "no/such/file.onnx"),
        ((SKIP, ["lots"]), {}, ValueError, "'lots' is not a size"),
        ((SKIP, [0]), {}, ValueError, "makes no sense"),
        ((SKIP, [1.5]), {}, TypeError, "a scratchpad is an int or a str"),
        ((SKIP,), {"jobs": 0}, ValueError, "jobs is a number of processes from 1 to 4096, or -1 for all cores, not 0"),
        ((SKIP,), {"jobs": 10**6}, ValueError, "jobs is a number"),
        ((SKIP,), {"jobs": 2.0}, TypeError, "jobs is an int or None, not float"),
        ((SKIP,), {"jobs": True}, TypeError, "jobs is an int or None, not bool"),
        ((SKIP,), {"parameters": ()}, TypeError, "parameters is True, False or"),
        ((SKIP,), {"parameters": "yes"}, TypeError, "parameters is True, False or"),
        ((SKIP,), {"order": "best"}, ValueError, "order is None or 'default', not 'best'"),
        ((SKIP,), {"alignment": 0}, ValueError, "alignment"),
        ((SKIP,), {"time_limit": 0}, ValueError, "time_limit is a positive number"),
        ((SKIP,), {"seed": -1}, ValueError, "seed is an int"),
        ((SKIP,), {"cache": ""}, RetensorError, "that is no name of a folder"),
        ((SKIP,), {"cache": __file__}, RetensorError, "it is a file; name a folder"),
        ((SKIP,), {"cache": __file__ + "/below"}, RetensorError, "not a directory; name a folder elsewhere"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, options, error, sentence):
    with pytest.raises(error) as caught:
        sweep(*arguments, **options)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_public_name_is_this_function():
    assert sweep_function is sweep
