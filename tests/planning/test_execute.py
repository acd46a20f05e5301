"""A plan run inside one arena gives the plain model's outputs, and a plan that loses bytes does not."""

from __future__ import annotations

import dataclasses
import importlib
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.planning.random_graphs import minimum_scratchpad, random_graph
from tests.planning.simple_plans import simple_plan

from retensor.errors import GraphError, PlanError
from retensor.graph import load
from retensor.graph.structure import Bytes, Graph, Operator, Tensor
from retensor.planning import plan as rt_plan
from retensor.planning.execute import difference, execute
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer
from retensor.planning.verify import verify

replace = dataclasses.replace
# The package's attribute of this name is the function.
execute_module = importlib.import_module("retensor.planning.execute")


class TinyProgram:
    """A NumPy program for any graph of float32 tensors: every output depends on every element of every input."""

    def __init__(self) -> None:
        self.graph: Graph
        self.handed: list[tuple[str, set[str]]] = []

    def example_inputs(self, seed: int) -> dict[str, Bytes]:
        rng = np.random.default_rng(seed)
        inputs = [tensor for tensor in self.graph.tensors.values() if tensor.role == "input"]
        return {t.name: rng.normal(size=t.nbytes // 4).astype(np.float32).view(np.uint8) for t in inputs}

    def parameter(self, name: str) -> Bytes:
        count = self.graph.tensors[name].nbytes // 4
        return np.linspace(0.5, 1.5, count, dtype=np.float32).view(np.uint8)

    def run_operator(
        self, operator: Operator, storages: Mapping[str, Bytes], keep_parameters: bool
    ) -> dict[str, Bytes]:
        self.handed.append((operator.name, set(storages)))
        assert not any(storage.flags.writeable for storage in storages.values())
        values = []
        for name in operator.inputs:
            parameter = self.graph.tensors[name].role == "parameter"
            assert (name in storages) != (parameter and keep_parameters)
            value = self.parameter(name) if parameter and keep_parameters else storages[name]
            # Read element by element from wherever the bytes lie.
            values.append(np.frombuffer(value.tobytes(), np.float32))
        return {name: self._compute(operator, name, values) for name in operator.outputs}

    def _compute(self, operator: Operator, name: str, values: list[np.ndarray]) -> Bytes:
        count = self.graph.tensors[name].nbytes // 4
        result = np.full(count, 0.1 * (1 + operator.outputs.index(name)), np.float32)
        for k, value in enumerate(values):
            if operator.kind == "Concat" and value.size:
                result += np.resize(np.roll(value, k), count)
            elif value.size:
                result += np.float32(0.3 + k) * np.resize(value, count) + np.float32(0.01) * value.sum()
        return np.tanh(result).astype(np.float32).view(np.uint8)

    def run_plain(self, inputs: Mapping[str, Bytes]) -> dict[str, Bytes]:
        memory = dict(inputs)
        memory |= {t.name: self.parameter(t.name) for t in self.graph.tensors.values() if t.role == "parameter"}
        for operator in self.graph.operators:
            values = [memory[name].view(np.float32) for name in operator.inputs]
            memory |= {name: self._compute(operator, name, values) for name in operator.outputs}
        return {name: memory[name] for name in self.graph.outputs}


def runnable(graph: Graph) -> Graph:
    """The same graph with four bytes for one, as float32, and a program."""
    program = TinyProgram()
    tensors = [replace(t, nbytes=4 * t.nbytes, shape=(t.nbytes,), dtype="float32") for t in graph.tensors.values()]
    program.graph = Graph(graph.name, graph.operators, tensors, graph.outputs, program=program)
    return program.graph


def test_random_plans_give_the_plain_outputs_bit_by_bit() -> None:
    evicted = 0
    for seed in range(300):
        rng = random.Random(seed)
        graph, parameters, alignment = runnable(random_graph(rng)), rng.random() < 0.5, rng.choice([1, 4, 8])
        least = minimum_scratchpad(graph, alignment, parameters)
        if least < 1:
            continue
        plan = simple_plan(graph, least + rng.choice([0, 0, 4, 5]), alignment, parameters, rng)
        done = execute(graph, plan, seed=seed)
        assert done.bit_equal is True, seed
        assert done.max_abs_difference == done.max_relative_difference == 0
        assert set(done.outputs) == set(graph.outputs)
        moved = {kind: sum(m.nbytes for m in plan.transfers if m.kind == kind) for kind in ("load", "retrieve")}
        assert done.bytes_in == sum(moved.values())
        assert done.bytes_in + done.bytes_out == plan.compulsory_bytes + plan.non_compulsory_bytes
        assert done.peak_bytes == verify(graph, plan).peak_bytes <= done.arena_bytes == plan.scratchpad_bytes
        for value in done.outputs.values():
            assert np.isfinite(value.view(np.float32)).all()
        evicted += plan.non_compulsory_bytes > 0
        operators = {operator.name: operator for operator in graph.operators}
        for name, handed in graph.program.handed:  # type: ignore[union-attr]
            assert handed <= set(operators[name].inputs)
    assert evicted > 150


def skip_graph() -> Graph:
    """``a`` is made first and read last."""
    tensors = [Tensor("x", 2, "input"), Tensor("a", 2), Tensor("b", 2), Tensor("c", 2), Tensor("y", 2)]
    operators = [
        Operator("first", "Relu", ("x",), ("a",)),
        Operator("left", "Relu", ("a",), ("b",)),
        Operator("middle", "Relu", ("b",), ("c",)),
        Operator("last", "Concat", ("c", "a"), ("y",)),
    ]
    return runnable(Graph("skip", operators, tensors, ["y"]))


def plan_of_skip() -> Plan:
    stays = (
        Residency("x", 0, 1, 0),
        Residency("a", 0, 2, 8),
        Residency("b", 1, 3, 0),
        Residency("c", 2, 4, 8),
        Residency("a", 3, 4, 0),
        Residency("y", 3, 4, 16),
    )
    moves = (
        Transfer("x", "load", 0, 8),
        Transfer("a", "spill", 2, 8),
        Transfer("a", "retrieve", 3, 8),
        Transfer("y", "store", 4, 8),
    )
    order = ("first", "left", "middle", "last")
    return Plan("skip", skip_graph().digest, 24, 1, False, order, stays, moves, 0, "by hand", 0.0)


def without_verifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let plans that break the rules run, to see that the arena itself tells."""
    found = verify(skip_graph(), plan_of_skip())
    monkeypatch.setattr(execute_module, "verify", lambda graph, plan: found)


def test_freed_bytes_are_poisoned_so_that_an_early_end_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = skip_graph(), plan_of_skip()
    assert execute(graph, plan).bit_equal is True
    without_verifier(monkeypatch)
    # The retrieve is left out: the tensor's new place holds what was freed there, and that is poison.
    lost = replace(plan, transfers=tuple(move for move in plan.transfers if move.kind != "retrieve"))
    done = execute(graph, lost)
    assert done.bit_equal is False
    assert np.isnan(done.outputs["y"].view(np.float32)).all()
    assert done.max_abs_difference == done.max_relative_difference == np.inf


def test_what_was_not_written_out_is_not_off_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = skip_graph(), plan_of_skip()
    without_verifier(monkeypatch)
    with pytest.raises(KeyError, match="a"):
        execute(graph, replace(plan, transfers=tuple(move for move in plan.transfers if move.kind != "spill")))
    with pytest.raises(KeyError, match="y"):
        execute(graph, replace(plan, transfers=plan.transfers[:-1]))


def test_an_overlap_spoils_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, plan = skip_graph(), plan_of_skip()
    without_verifier(monkeypatch)
    stays = tuple(replace(stay, address=4) if stay.tensor == "b" else stay for stay in plan.residencies)
    assert execute(graph, replace(plan, residencies=stays)).bit_equal is False


def test_a_plan_that_breaks_a_rule_is_not_run() -> None:
    with pytest.raises(PlanError, match="scratchpad has 23"):
        execute(skip_graph(), replace(plan_of_skip(), scratchpad_bytes=23))


def test_the_poison_is_no_number_in_every_float() -> None:
    poison = np.full(8, execute_module.POISON, np.uint8)
    for dtype in (np.float16, np.float32, np.float64):
        assert np.isnan(poison.view(dtype)).all()
    brain = execute_module.decode(Tensor("t", 8, dtype="bfloat16"), poison)
    assert brain is not None
    assert np.isnan(brain).all()


def test_inputs_are_taken_by_name_and_left_alone() -> None:
    graph = skip_graph()
    given = np.array([3.0, -2.0], np.float32)
    before = given.copy()
    done = execute(graph, plan_of_skip(), inputs={"x": given})
    assert done.bit_equal is True
    assert np.array_equal(given, before)
    same = execute(graph, plan_of_skip(), inputs={"x": given.view(np.uint8)})
    assert np.array_equal(same.outputs["y"], done.outputs["y"])
    other = execute(graph, plan_of_skip(), seed=1)
    assert not np.array_equal(other.outputs["y"], done.outputs["y"])
    alone = execute(graph, plan_of_skip(), inputs={"x": given}, reference=False)
    assert (alone.reference, alone.bit_equal, alone.max_abs_difference) == (None, None, None)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "input 'x' is missing; the inputs of graph 'skip' are 'x'"),
        ({"z": np.zeros(2, np.float32)}, "'z' is not an input of graph 'skip'; its inputs are 'x'"),
        ({"x": np.zeros(3, np.float32)}, r"input 'x' has 12 bytes \(float32, shape \(3,\)\); the graph takes 8"),
        ({"x": np.array([None])}, "array of Python objects"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, np.ndarray], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        execute(skip_graph(), plan_of_skip(), inputs=inputs)


def test_a_graph_without_a_program_cannot_be_run() -> None:
    graph = skip_graph()
    bare = Graph(graph.name, graph.operators, graph.tensors, graph.outputs)
    with pytest.raises(GraphError, match="cannot be run: it has no program"):
        execute(bare, plan_of_skip())


def test_a_program_that_returns_other_tensors_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = skip_graph()
    monkeypatch.setattr(graph.program, "run_operator", lambda *_, **__: {"a": np.zeros(4, np.uint8)})
    with pytest.raises(GraphError, match="operator 'first' gave 4 bytes of uint8 for tensor 'a'"):
        execute(graph, plan_of_skip())
    monkeypatch.setattr(graph.program, "run_operator", lambda *_, **__: {})
    with pytest.raises(GraphError, match="operator 'first' did not return tensor 'a'"):
        execute(graph, plan_of_skip())


def test_a_program_that_writes_to_its_inputs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = skip_graph()

    def vandal(operator: Operator, storages: Mapping[str, Bytes], keep_parameters: bool) -> dict[str, Bytes]:
        storages["x"][:] = 0
        return {}

    monkeypatch.setattr(graph.program, "run_operator", vandal)
    with pytest.raises(ValueError, match="read-only"):
        execute(graph, plan_of_skip())


def test_an_output_that_is_an_input_is_taken_from_outside() -> None:
    tensors = [Tensor("x", 2, "input"), Tensor("y", 2)]
    graph = runnable(Graph("pass", [Operator("f", "Relu", ("x",), ("y",))], tensors, ["x", "y"]))
    stays = (Residency("x", 0, 1, 0), Residency("y", 0, 1, 8))
    moves = (Transfer("x", "load", 0, 8), Transfer("y", "store", 1, 8))
    plan = Plan("pass", graph.digest, 16, 1, False, ("f",), stays, moves, 0, "by hand", 0.0)
    done = execute(graph, plan)
    assert done.bit_equal is True
    assert done.bytes_out == 8


def test_a_scratchpad_larger_than_the_machine_is_allocated_as_far_as_it_is_used() -> None:
    done = execute(skip_graph(), replace(plan_of_skip(), scratchpad_bytes=2**50))
    assert done.bit_equal is True
    assert done.arena_bytes == done.peak_bytes == 24


@pytest.mark.parametrize(
    ("dtype", "one", "two", "expected"),
    [
        ("float32", [1.0, np.nan], [1.0, np.nan], (0.0, 0.0)),
        ("float32", [0.0], [-0.0], (0.0, 0.0)),
        ("float32", [1.0, 2.0], [1.0, 4.0], (2.0, 0.5)),
        ("float32", [np.nan], [1.0], (np.inf, np.inf)),
        ("float32", [np.inf, 1.0], [np.inf, 2.0], (1.0, 0.5)),
        ("uint8", [0], [255], (255.0, 1.0)),
        ("int64", [2**60], [2**60 + 1], None),
        ("bool", [True], [False], (1.0, np.inf)),
        ("float16", [1.0], [0.5], (0.5, 1.0)),
    ],
)
def test_differences_are_told_in_the_tensors_own_type(
    dtype: str, one: list[float], two: list[float], expected: tuple[float, float] | None
) -> None:
    values = [np.array(value, dtype).view(np.uint8) for value in (one, two)]
    found = difference(Tensor("t", values[0].nbytes, dtype=dtype), *values)
    if expected is None:
        assert found[0] == 1.0 or np.finfo(np.longdouble).nmant < 60
    else:
        assert found == expected


def test_a_type_that_cannot_be_decoded_differs_infinitely() -> None:
    one, two = np.zeros(2, np.uint8), np.ones(2, np.uint8)
    assert difference(Tensor("t", 2, dtype="float8_e4m3fn"), one, two)[0] == np.inf
    assert difference(Tensor("t", 2), one, two)[0] == np.inf
    assert difference(Tensor("t", 2), one, one) == (0.0, 0.0)
    assert difference(Tensor("t", 2, dtype="bfloat16"), np.array([0x80, 0x3F], np.uint8), one)[0] == 1.0


def test_output_arrays_are_the_models_own_outputs_by_name_type_and_shape(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="relu"),
        helper.make_node("Flatten", ["r"], ["y"], name="flat"),
        helper.make_node("Cast", ["x"], ["h"], name="half", to=TensorProto.FLOAT16),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 12]),
        helper.make_tensor_value_info("h", TensorProto.FLOAT16, [2, 3, 4]),
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "two", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4])], outputs),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "two.onnx")
    graph = load(tmp_path / "two.onnx")
    given = np.linspace(-1, 1, 24, dtype=np.float32).reshape(2, 3, 4)
    done = execute(graph, rt_plan(graph, Accelerator(scratchpad="M_P")), inputs={"x": given})
    arrays = done.output_arrays()
    assert set(arrays) == {"y", "h"}
    assert np.array_equal(arrays["y"], np.maximum(given, 0).reshape(2, 12))
    assert (arrays["h"].dtype, arrays["h"].shape) == (np.float16, (2, 3, 4))
    assert np.array_equal(arrays["h"], given.astype(np.float16))
    assert all(value.dtype == np.uint8 and value.ndim == 1 for value in done.outputs.values())


def test_outputs_of_a_program_that_does_not_know_shapes_come_flat_and_an_execution_prints_short() -> None:
    rng = random.Random(4)
    graph = runnable(random_graph(rng))
    done = execute(graph, simple_plan(graph, minimum_scratchpad(graph, 1, False) + 64, 1, False, rng))
    arrays = done.output_arrays()
    assert set(arrays) == set(graph.outputs)
    for name, array in arrays.items():
        assert array.dtype == np.float32
        assert array.tobytes() == done.outputs[name].tobytes()
    assert len(repr(done)) < 200
    assert "equal in every bit" in repr(done)
