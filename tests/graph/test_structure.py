"""Graphs made by hand: what is taken as meant, what is refused with a sentence, and what plans say of themselves."""

import numpy as np
import pytest

from retensor.errors import GraphError, PlanError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import verify
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer


def one(**changes):
    given = {
        "name": "one",
        "operators": [Operator("relu", "Relu", ("x",), ("y",))],
        "tensors": [Tensor("x", 4, "input"), Tensor("y", 4)],
        "outputs": ["y"],
    }
    return Graph(**{**given, **changes})


def plan_of(graph, **changes):
    given = {
        "graph_name": graph.name,
        "graph_digest": graph.digest,
        "scratchpad_bytes": 8,
        "alignment": 1,
        "parameters": False,
        "order": ("relu",),
        "residencies": (Residency("x", 0, 1, 0), Residency("y", 0, 1, 4)),
        "transfers": (Transfer("x", "load", 0, 4), Transfer("y", "store", 1, 4)),
        "bound_bytes": 0,
        "solver": "by hand",
        "seconds": 0.0,
    }
    return Plan(**{**given, **changes})


def test_lists_and_iterators_of_names_become_tuples():
    listed = Operator("relu", "Relu", ["x"], iter(["y"]), ["n"])
    assert (listed.inputs, listed.outputs, listed.nodes) == (("x",), ("y",), ("n",))
    graph = one(operators=iter([listed]), tensors=iter([Tensor("x", 4, "input"), Tensor("y", 4)]), outputs=iter(["y"]))
    assert graph.operator_tensors(listed, True) == ("x", "y")
    assert graph.digest == one().digest


@pytest.mark.parametrize("wrong", ["x", b"x", 5, None, [1], [None]])
def test_names_that_are_none_are_refused(wrong):
    with pytest.raises(GraphError, match="inputs of operator 'relu'"):
        Operator("relu", "Relu", wrong, ("y",))


@pytest.mark.parametrize("wrong", [5, None, b"x", ["x"], 10**5000], ids=lambda wrong: type(wrong).__name__)
def test_names_are_text(wrong):
    for make in (
        lambda: Tensor(wrong, 4),
        lambda: Operator(wrong, "Relu", (), ()),
        lambda: Operator("a", wrong, (), ()),
        lambda: one(name=wrong),
        lambda: one(outputs=[wrong]),
    ):
        with pytest.raises(GraphError) as caught:
            make()
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("field", ["operators", "tensors", "outputs"])
@pytest.mark.parametrize("wrong", [5, None, "x", [5], [None]])
def test_parts_of_a_graph_are_sequences_of_their_kind(field, wrong):
    with pytest.raises(GraphError, match=f"graph's {field}"):
        one(**{field: wrong})


def test_sizes_are_whole_numbers_of_any_kind_and_kept_as_int():
    tensor = Tensor("x", np.int64(4))
    assert type(tensor.nbytes) is int
    assert one(tensors=[Tensor("x", np.uint8(4), "input"), Tensor("y", 4)]).digest == one().digest
    for wrong in (True, np.True_, 4.0, "4", None):
        with pytest.raises(GraphError, match="tensor 'x' has"):
            Tensor("x", wrong)
    for wrong in (-1, 2**50 + 1, 10**5000):
        with pytest.raises(GraphError, match="0 to 2"):
            one(tensors=[Tensor("x", wrong, "input"), Tensor("y", 4)])


def test_a_name_with_a_line_break_stays_in_one_sentence():
    name = "a\nb\x1b[31m"
    with pytest.raises(GraphError) as caught:
        one(operators=[Operator(name, "Relu", ("x",), ("z",))])
    assert "'a\\nb\\x1b[31m'" in str(caught.value)
    graph = one()
    with pytest.raises(PlanError) as caught:
        verify(graph, plan_of(graph, order=("relu", name)))
    assert str(caught.value).isprintable()


def test_verify_says_what_it_takes():
    graph = one()
    plan = plan_of(graph)
    assert verify(graph, plan).steps == 1
    for wrong in ((plan, graph), (graph, None), (3, plan)):
        with pytest.raises(TypeError, match="verify takes a Graph and a Plan"):
            verify(*wrong)
    with pytest.raises(PlanError, match="whole numbers"):
        verify(graph, plan_of(graph, residencies=(Residency("x", "0", 1, 0),)))
    with pytest.raises(PlanError, match="whole numbers"):
        verify(graph, plan_of(graph, transfers=(Transfer(["x"], "load", 0, 4),)))


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("graph_name", 5),
        ("solver", None),
        ("alignment", 1.5),
        ("bound_bytes", "0"),
        ("scratchpad_bytes", True),
        ("order", "relu"),
        ("order", 5),
        ("residencies", [1]),
        ("transfers", None),
        ("graph_options", []),
    ],
)
def test_a_plan_of_wrong_types_is_a_sentence(field, wrong):
    with pytest.raises(TypeError, match=f"a plan's {field} is a"):
        plan_of(one(), **{field: wrong})


def test_a_plan_takes_lists_and_shows_figures_not_rows():
    graph = one()
    rows = plan_of(graph)
    assert plan_of(graph, order=["relu"], transfers=list(rows.transfers), alignment=np.int64(1)) == rows
    many = plan_of(graph, residencies=rows.residencies * 10_000)
    assert len(repr(many)) < 300
    assert "residencies=20000" in repr(many)
    assert "optimal" in repr(many)


def test_an_accelerator_takes_whole_numbers_of_any_kind():
    chip = Accelerator(np.int64(2**20), np.uint16(64))
    assert chip == Accelerator(2**20, 64)
    assert type(chip.scratchpad) is type(chip.alignment) is int
    for wrong in ({"scratchpad": True}, {"scratchpad": 1.5}, {"alignment": "64"}, {"alignment": np.True_}, {"name": 5}):
        with pytest.raises(TypeError, match=r" is an int| is a str"):
            Accelerator(**{"scratchpad": 99, **wrong})
