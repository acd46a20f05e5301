"""Merging operators: what joins what, what keeps them apart, and that merging in place costs nothing."""

from __future__ import annotations

import random
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import pytest

import retensor.graph as rg
from retensor.graph.merge import merge, merged_kinds
from retensor.graph.onnx import load_onnx
from retensor.graph.structure import Graph, Operator, Tensor

IMAGE = (1, 4, 6, 6)
SIZE = 4 * 4 * 36


def chain(*kinds: str, parameters: dict[int, tuple[int, ...]] | None = None, extra: tuple[Operator, ...] = ()) -> Graph:
    """``x -> t0 -> t1 -> ...`` of equal size; operator ``i`` reads a parameter ``p{i}`` where a shape is given."""
    tensors = [Tensor("x", SIZE, "input", IMAGE), Tensor("w", 64, "parameter", (4, 4, 1, 1))]
    operators = []
    last = "x"
    for i, kind in enumerate(kinds):
        inputs = [last, "w"] if i == 0 else [last]
        if parameters and i in parameters:
            shape = parameters[i]
            tensors.append(Tensor(f"p{i}", 4 * int(np.prod(shape)), "parameter", shape))
            inputs.append(f"p{i}")
        operators.append(Operator(f"o{i}", kind, tuple(inputs), (f"t{i}",), (f"n{i}",)))
        tensors.append(Tensor(f"t{i}", SIZE, "activation", IMAGE))
        last = f"t{i}"
    for operator in extra:
        tensors += [Tensor(name, SIZE, "activation", IMAGE) for name in operator.outputs]
    outputs = [last] + [name for operator in extra for name in operator.outputs]
    return Graph("chain", operators + list(extra), tensors, outputs, {"view": "t0"})


def kinds(graph: Graph) -> list[str]:
    return [operator.kind for operator in graph.operators]


@pytest.mark.parametrize(
    "parts",
    [
        ("Conv", "BatchNormalization", "Relu"),
        ("ConvTranspose", "LeakyRelu"),
        ("QLinearConv", "Clip"),
        ("Conv", "HardSwish"),
        ("Conv", "BatchNormalization"),
        ("aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default"),
        ("aten.conv3d.default", "aten.batch_norm.default", "aten.relu_.default"),
        ("aten.conv1d.padding", "aten.gelu.default"),
        ("aten.convolution.default", "aten._native_batch_norm_legit_no_training.default", "aten.silu.default"),
        ("aten.conv2d.default", "aten.hardtanh.default"),
        ("aten.conv2d.default", "aten.hardswish.default"),
        ("aten.conv2d.default", "aten.clamp.default"),
        ("aten.conv2d.default", "aten.mul.Scalar", "aten.relu.default"),
    ],
)
def test_a_convolution_takes_in_its_normalisation_and_activation(parts: tuple[str, ...]) -> None:
    graph = merge(chain(*parts), fuse=True, in_place=False)
    (operator,) = graph.operators
    assert operator.kind == "+".join(parts)
    assert operator.name == "o0"
    assert operator.nodes == tuple(f"n{i}" for i in range(len(parts)))
    assert operator.inputs == ("x", "w")
    assert operator.outputs == (f"t{len(parts) - 1}",)
    assert set(graph.tensors) == {"x", "w", operator.outputs[0]}
    assert graph.aliases == {}
    assert merged_kinds(graph) == {operator.kind: 1}


def test_nothing_merges_unless_asked() -> None:
    raw = chain("Conv", "BatchNormalization", "Relu")
    assert merge(raw, fuse=False, in_place=False) is raw
    assert merged_kinds(raw) == {}


@pytest.mark.parametrize("kind", ["Mul", "Add", "Sub", "Div", "aten.mul.Tensor"])
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (1,), (), (4,)])
def test_scaling_by_channel_is_a_normalisation(kind: str, shape: tuple[int, ...]) -> None:
    # A plain (4,) does not fit the last dimension of 6, so it is read through a view.
    graph = merge(chain("Conv", kind, "Relu", parameters={1: shape}), fuse=True, in_place=False)
    assert kinds(graph) == [f"Conv+{kind}+Relu"]
    assert graph.operators[0].inputs == ("x", "w", "p1")


@pytest.mark.parametrize("shape", [(6,), (6, 1), (4, 6, 6), (1, 4, 6, 6), (4, 1, 1, 1)])
def test_other_operands_are_not(shape: tuple[int, ...]) -> None:
    raw = chain("Conv", "Mul", "Relu", parameters={1: shape})
    assert merge(raw, fuse=True, in_place=False) is raw


def test_a_number_minus_or_by_the_result_is_not() -> None:
    raw = chain("Conv", "Relu")
    tensors = [*raw.tensors.values(), Tensor("p", 16, "parameter", (4, 1, 1)), Tensor("y", SIZE, "activation", IMAGE)]
    for kind, fused in (("Sub", False), ("Div", False), ("Mul", True), ("Add", True)):
        operators = [
            raw.operators[0],
            Operator("s", kind, ("p", "t0"), ("t1",)),
            Operator("r", "Relu", ("t1",), ("y",)),
        ]
        graph = merge(Graph("g", operators, tensors, ["y"]), fuse=True, in_place=False)
        assert (len(graph.operators) == 1) is fused, kind


def test_only_one_activation_is_taken_in() -> None:
    assert kinds(merge(chain("Conv", "Relu", "Relu"), fuse=True, in_place=False)) == ["Conv+Relu", "Relu"]
    assert kinds(merge(chain("Conv", "Relu", "BatchNormalization"), fuse=True, in_place=False)) == [
        "Conv+Relu",
        "BatchNormalization",
    ]


def test_other_operators_take_nothing_in() -> None:
    for kind in ("MatMul", "Gemm", "aten.linear.default", "BatchNormalization", "BatchNormalizationTraining"):
        raw = chain(kind, "Relu")
        assert merge(raw, fuse=True, in_place=False) is raw
    assert kinds(merge(chain("Conv", "BatchNormalizationTraining", "Relu"), fuse=True, in_place=False))[0] == "Conv"


def test_a_tensor_that_another_operator_reads_stays() -> None:
    raw = chain("Conv", "BatchNormalization", "Relu", extra=(Operator("e", "Exp", ("t1",), ("u",)),))
    graph = merge(raw, fuse=True, in_place=False)
    assert kinds(graph) == ["Conv+BatchNormalization", "Relu", "Exp"]
    assert "t1" in graph.tensors
    assert "t0" not in graph.tensors


def test_a_network_output_stays() -> None:
    raw = chain("Conv", "BatchNormalization", "Relu")
    for kept, expected in (
        ("t0", ["Conv", "BatchNormalization+Relu"]),
        ("t1", ["Conv+BatchNormalization", "Relu"]),
    ):
        graph = Graph("g", raw.operators, raw.tensors, [kept, "t2"])
        assert kinds(merge(graph, fuse=True, in_place=True)) == expected


def test_an_activation_with_another_activation_as_operand_is_not_taken_in() -> None:
    raw = chain("Conv", "Relu")
    operators = [raw.operators[0], Operator("o1", "PRelu", ("t0", "x"), ("t1",))]
    graph = Graph("g", operators, raw.tensors, ["t1"])
    assert merge(graph, fuse=True, in_place=True) is graph
    with_parameter = chain("Conv", "PRelu", parameters={1: (4, 1, 1)})
    assert kinds(merge(with_parameter, fuse=True, in_place=False)) == ["Conv+PRelu"]


@pytest.mark.parametrize(("gate", "product"), [("Sigmoid", "Mul"), ("aten.sigmoid.default", "aten.mul.Tensor")])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_swish_of_two_operators_is_one_activation(gate: str, product: str, swapped: bool) -> None:
    raw = chain("Conv", "BatchNormalization", gate)
    operands = ("t2", "t1") if swapped else ("t1", "t2")
    tensors = [*raw.tensors.values(), Tensor("y", SIZE, "activation", IMAGE)]
    graph = Graph("g", [*raw.operators, Operator("m", product, operands, ("y",))], tensors, ["y"])
    merged = merge(graph, fuse=True, in_place=False)
    assert kinds(merged) == [f"Conv+BatchNormalization+{gate}+{product}"]
    assert set(merged.tensors) == {"x", "w", "y"}
    assert merged.operators[0].outputs == ("y",)
    # Where the gate is wanted elsewhere too, only what comes before it can be taken in.
    kept = merge(Graph("g", graph.operators, graph.tensors, ["y", "t2"]), fuse=True, in_place=False)
    assert kinds(kept) == ["Conv+BatchNormalization", gate, product]


def test_saved_statistics_that_hold_nothing_vanish() -> None:
    kind = "aten._native_batch_norm_legit_no_training.default"
    raw = chain("aten.conv2d.default", kind, "aten.relu.default")
    operators = list(raw.operators)
    operators[1] = Operator("o1", kind, ("t0",), ("t1", "mean"), ("n1",))
    for nbytes, merged in ((0, True), (16, False)):
        graph = Graph("g", operators, [*raw.tensors.values(), Tensor("mean", nbytes)], ["t2"])
        assert (len(merge(graph, fuse=True, in_place=False).operators) == 1) is merged


# --- in place


def test_elementwise_operators_join_what_makes_their_input() -> None:
    graph = merge(chain("MatMul", "Relu", "Exp", "Softmax", "Neg"), fuse=False, in_place=True)
    assert kinds(graph) == ["MatMul+Relu+Exp", "Softmax+Neg"]
    assert set(graph.tensors) == {"x", "w", "t2", "t4"}


def test_an_operator_on_a_network_input_or_of_another_size_stays() -> None:
    x, a, b = Tensor("x", 8, "input"), Tensor("a", 8), Tensor("b", 4)
    operators = [Operator("r", "Relu", ("x",), ("a",)), Operator("c", "Cast", ("a",), ("b",))]
    graph = Graph("g", operators, [x, a, b], ["b"])
    assert merge(graph, fuse=True, in_place=True) is graph


def test_an_elementwise_operator_joins_one_of_many_outputs() -> None:
    tensors = [Tensor(name, 8) for name in ("a", "b", "c", "y")]
    operators = [
        Operator("s", "Split", ("x",), ("a", "b")),
        Operator("r", "Relu", ("b",), ("c",)),
        Operator("j", "Concat", ("a", "c"), ("y",)),
    ]
    graph = merge(Graph("g", operators, [Tensor("x", 16, "input"), *tensors], ["y"]), fuse=False, in_place=True)
    assert graph.operators[0] == Operator("s", "Split+Relu", ("x",), ("a", "c"), ("s", "r"))
    assert kinds(graph) == ["Split+Relu", "Concat"]


def smallest_peak(graph: Graph, in_place: bool) -> int:
    """Least peak over all orders; with ``in_place`` an elementwise operator may write over a tensor it reads last."""
    best = None
    names = range(len(graph.operators))
    for order in permutations(names):
        step = {index: t for t, index in enumerate(order)}
        if any(step[graph.producer[n]] >= step[i] for i in names for n in graph.operators[i].inputs if n != "x"):
            continue
        end = {n: max((step[i] for i in graph.consumers[n]), default=-1) for n in graph.tensors}
        for n in graph.outputs:
            end[n] = len(order)
        peak = 0
        for t, index in enumerate(order):
            operator = graph.operators[index]
            live = {n for n in graph.tensors if end[n] >= t and (n == "x" or step[graph.producer[n]] < t)}
            room = sum(graph.tensors[n].nbytes for n in live | set(operator.outputs))
            first, last = operator.inputs[0], operator.outputs[0]
            if (
                in_place
                and operator.kind == "Relu"
                and graph.tensors[first].nbytes == graph.tensors[last].nbytes
                and graph.consumers[first] == (index,)
                and first not in graph.outputs
                and first != "x"
            ):
                room -= graph.tensors[last].nbytes
            peak = max(peak, room)
        best = peak if best is None else min(best, peak)
    assert best is not None
    return best


def test_merging_in_place_never_costs() -> None:
    chance = random.Random(11)
    merged_some = 0
    for _ in range(150):
        tensors, operators = [Tensor("x", chance.randint(1, 9), "input")], []
        for i in range(chance.randint(3, 6)):
            if chance.random() < 0.5:
                source = chance.choice(tensors)
                operators.append(Operator(f"o{i}", "Relu", (source.name,), (f"t{i}",)))
                tensors.append(Tensor(f"t{i}", source.nbytes))
            else:
                sources = chance.sample(tensors, chance.randint(1, min(2, len(tensors))))
                operators.append(Operator(f"o{i}", "Mix", tuple(s.name for s in sources), (f"t{i}",)))
                tensors.append(Tensor(f"t{i}", chance.randint(1, 9)))
        read = {name for operator in operators for name in operator.inputs}
        outputs = [t.name for t in tensors[1:] if t.name not in read or chance.random() < 0.1]
        graph = Graph("random", operators, tensors, outputs)
        merged = merge(graph, fuse=False, in_place=True)
        merged_some += len(merged.operators) < len(operators)
        assert smallest_peak(merged, in_place=False) == smallest_peak(graph, in_place=True)
    assert merged_some > 50


# --- merged operators run


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv(x, w) b = BatchNormalization(c, s, s, s, v) m = Mul(b, k) a = Add(m, k) y = Relu(a)",
        "c = Conv(x, w) g = Sigmoid(c) y = Mul(c, g)",
        "c = Conv(x, w) f = Flatten(c) r = Relu(f) e = Exp(r) y = Neg(e)",
        "c = Conv(x, w) lo = Constant<value_float = 0.1>() hi = Constant<value_float = 0.4>() y = Clip(c, lo, hi)",
    ],
)
def test_a_merged_operator_makes_the_same_bytes(tmp_path: Path, body: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 17]> net (float[1, 2, 5, 5] x) => (float y)
        <float[2, 2, 1, 1] w = {{0.5, 1.5, -1.0, 0.25}}, float[2] s = {{0.5, 2.0}}, float[2] v = {{1.5, 3.0}},
         float[2, 1, 1] k = {{0.75, -0.5}}> {{ {body} }}"""
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    graph = load_onnx(tmp_path / "m.onnx", in_place=True)
    assert len(graph.operators) == 1
    assert graph.program is not None
    inputs = graph.program.example_inputs(2)
    plain = graph.program.run_plain(inputs)
    assert np.array_equal(graph.program.run_operator(graph.operators[0], inputs, True)["y"], plain["y"])


def test_what_merges_in_resnet_is_known() -> None:
    # 53 convolutions, each with its normalisation; 33 of the 49 activations follow one directly.
    graph = rg.load("onnx:resnet50")
    assert merged_kinds(graph) == {"Conv+BatchNormalization+Relu": 33, "Conv+BatchNormalization": 20}
    assert kinds(graph).count("Relu") == 16
    in_place = rg.load("onnx:resnet50", in_place=True)
    assert kinds(in_place).count("Sum+Relu") == 16
    assert "Relu" not in kinds(in_place)
