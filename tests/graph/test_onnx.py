"""Loading ONNX: what becomes an operator, an alias or a parameter, how many bytes, and which files are refused."""

from __future__ import annotations

import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import retensor.graph as rg
from retensor.errors import GraphError
from retensor.graph import onnx_guard
from retensor.graph.onnx import load_onnx
from retensor.graph.onnx_guard import _child
from retensor.graph.onnx_program import OnnxProgram, output_arrays
from retensor.graph.structure import Graph

LIGHT = rg.light_models()
# Numbers of weights as the literature has them (ResNet-50: 25,557,032 trained and 53,120 running statistics).
WEIGHTS = {"resnet50": 25_610_152, "vgg19": 143_667_240, "bvlc_alexnet": 60_965_224, "squeezenet": 1_235_496}

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a model, given as text, proto or bytes, and return its path."""

    def write(model: str | bytes | onnx.ModelProto, name: str = "model.onnx") -> Path:
        if isinstance(model, str):
            model = onnx.parser.parse_model(model)
        data = model if isinstance(model, bytes) else model.SerializeToString()
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return write


def text(body: str, inputs: str = "float[2, 3] x", outputs: str = "float[2, 3] y", opset: int = 17) -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}]> net ({inputs}) => ({outputs}) {{ {body} }}'


def program_of(graph: Graph) -> OnnxProgram:
    assert isinstance(graph.program, OnnxProgram)
    return graph.program


def run_by_operator(graph: Graph, inputs: dict, keep_parameters: bool) -> dict:
    program = program_of(graph)
    storages = dict(inputs)
    for operator in graph.operators:
        given = {}
        for name in operator.inputs:
            if graph.tensors[name].role != "parameter":
                given[name] = storages[name]
            elif not keep_parameters:
                given[name] = program.parameter(name)
        made = program.run_operator(operator, given, keep_parameters)
        assert set(made) == set(operator.outputs)
        for name, data in made.items():
            assert data.dtype == np.uint8
            assert data.shape == (graph.tensors[name].nbytes,)
        storages.update(made)
    return {name: storages[name] if name in storages else program.parameter(name) for name in graph.outputs}


def assert_runs_equal(graph: Graph, seed: int = 0) -> dict:
    inputs = program_of(graph).example_inputs(seed)
    plain = program_of(graph).run_plain(inputs)
    for keep in (True, False):
        made = run_by_operator(graph, inputs, keep)
        assert made.keys() == plain.keys()
        for name in plain:
            assert np.array_equal(made[name], plain[name]), name
    return plain


# --- the light models


@pytest.mark.parametrize("name", LIGHT)
def test_a_light_model_reproduces_its_shipped_output_plainly_and_by_operator(name: str) -> None:
    graph = rg.load(f"onnx:{name}")
    program = program_of(graph)
    case = next(case for case in load_model_tests(kind="real") if case.url.endswith(f"/light_{name}.onnx"))
    (data_name,) = (tensor.name for tensor in graph.tensors.values() if tensor.role == "input")
    shape = graph.tensors[data_name].shape
    assert shape is not None
    count = int(np.prod(shape))
    # The input that onnx's own test runner makes for these models.
    inputs = {data_name: program.encode(data_name, (np.arange(count).reshape(shape) / count).astype(np.float32))}
    plain = program.run_plain(inputs)
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    expected = numpy_helper.to_array(onnx.load_tensor(str(folder / f"light_{name}_output_0.pb")))
    (output,) = output_arrays(program, plain).values()
    np.testing.assert_allclose(output, expected, rtol=case.rtol, atol=case.atol)
    made = run_by_operator(graph, inputs, keep_parameters=True)
    assert all(np.array_equal(made[tensor], plain[tensor]) for tensor in plain)


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v2"])
@pytest.mark.parametrize(("fuse", "in_place"), [(False, False), (True, True)])
def test_running_by_operator_is_bit_equal_however_it_is_merged(name: str, fuse: bool, in_place: bool) -> None:
    assert_runs_equal(rg.load(name, fuse=fuse, in_place=in_place), seed=3)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_made_by_nodes_are_parameters_of_the_published_number(name: str) -> None:
    graph = rg.load(f"onnx:{name}", fuse=False)
    kinds = {operator.kind for operator in graph.operators}
    assert not kinds & {"ConstantOfShape", "Reshape", "Dropout", "Constant"}
    assert sum(t.nbytes for t in graph.tensors.values() if t.role == "parameter") == 4 * WEIGHTS[name]


def test_loading_evaluates_and_keeps_no_weight() -> None:
    graph = rg.load("onnx:vgg19")  # 548 MiB of weights
    program = program_of(graph)
    assert not program._kept
    assert not program._pieces
    assert len(pickle.dumps(program)) < 2**20


def test_evaluated_constants_are_kept_up_to_a_limit() -> None:
    graph = rg.load("onnx:vgg19")
    program = program_of(graph)
    for tensor in graph.tensors.values():
        if tensor.role == "parameter" and tensor.nbytes < 100 * 2**20:
            assert program.parameter(tensor.name).size == tensor.nbytes
    assert 0 < sum(data.nbytes for data in program._kept.values()) <= 64 * 2**20


def test_a_graph_survives_pickling_and_still_runs() -> None:
    graph = rg.load("onnx:squeezenet")
    inputs = program_of(graph).example_inputs(1)
    plain = program_of(graph).run_plain(inputs)
    copy = pickle.loads(pickle.dumps(graph))
    assert copy.digest == graph.digest
    made = run_by_operator(copy, inputs, keep_parameters=True)
    assert all(np.array_equal(made[name], plain[name]) for name in plain)


# --- views, constants, dead ends


@pytest.mark.parametrize(
    ("body", "opset"),
    [
        ("s = Constant<value_ints=[3, 2]>() b = Reshape(a, s)", 17),
        ("b = Flatten<axis=0>(a)", 17),
        ("i = Constant<value_ints=[1]>() b = Unsqueeze(a, i)", 17),
        ("i = Constant<value_ints=[1]>() b0 = Unsqueeze(a, i) b = Squeeze(b0, i)", 17),
        ("b = Unsqueeze<axes=[0]>(a)", 11),
        ("b = Identity(a)", 17),
        ("b, mask = Dropout(a)", 17),
        ("b, mask = Dropout(a)", 7),
        ("b = Cast<to=1>(a)", 17),
        ("i = Constant<value_ints=[0]>() b0 = Unsqueeze(a, i) b = Transpose<perm=[1, 0, 2]>(b0)", 17),
    ],
)
def test_a_view_is_an_alias_and_no_operator(save: Save, body: str, opset: int) -> None:
    outputs = "float y" if opset == 11 else "float[] y"
    model = onnx.parser.parse_model(text(f"a = Relu(x) {body} y = Exp(b)", outputs=outputs, opset=opset))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    graph = load_onnx(save(model))
    assert [operator.kind for operator in graph.operators] == ["Relu", "Exp"]
    assert graph.operators[1].inputs == ("a",)
    assert graph.aliases["b"] == "a"
    assert set(graph.tensors) == {"x", "a", "y"}
    assert_runs_equal(graph)
    merged = load_onnx(save(model), in_place=True)
    assert [operator.kind for operator in merged.operators] == ["Relu+Exp"]
    assert set(merged.tensors) == {"x", "y"}
    assert_runs_equal(merged)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("b = Transpose<perm=[1, 0]>(a)", "Transpose"),
        ("b = Cast<to=10>(a)", "Cast"),
        ("m = Constant<value_float=0.5>() t = Cast<to=9>(m) b = Dropout(a, m, t)", "Dropout"),
    ],
)
def test_what_moves_or_changes_bytes_is_an_operator(save: Save, body: str, kind: str) -> None:
    model = onnx.parser.parse_model(text(f"a = Relu(x) {body} y = Abs(b)"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    graph = load_onnx(save(model))
    assert [operator.kind for operator in graph.operators] == ["Relu", kind, "Abs"]


def test_a_dropout_whose_mask_is_read_is_an_operator(save: Save) -> None:
    model = text("a = Relu(x) b, mask = Dropout(a) c = Cast<to=1>(mask) y = Add(b, c)")
    graph = load_onnx(save(model))
    assert [operator.kind for operator in graph.operators] == ["Relu", "Dropout", "Cast", "Add"]
    assert graph.operators[1].outputs == ("b", "mask")
    assert_runs_equal(graph)


def test_shape_arithmetic_vanishes(save: Save) -> None:
    model = text(
        """a = Relu(x)
        s = Shape(a)
        zero = Constant<value_ints = [0]>()
        n = Gather(s, zero)
        rest = Constant<value_ints = [-1]>()
        t = Concat<axis = 0>(n, rest)
        b = Reshape(a, t)
        y = Softmax(b)""",
        "float[N, 3, 5] x",
        "float[N, K] y",
    )
    graph = load_onnx(save(model), inputs={"x": (2, 3, 5)})
    assert [operator.kind for operator in graph.operators] == ["Relu", "Softmax"]
    assert graph.tensors["y"].shape == (2, 15)
    assert_runs_equal(graph)


def test_a_constant_expression_that_an_operator_reads_is_a_parameter(save: Save) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        net (float[2, 3] x) => (float[2, 3] y) 
        <int8[3] q = {1, 2, 3}, float scale = {0.5}, float[3] unread = {1, 2, 3}> {
          w = DequantizeLinear(q, scale)
          v = Neg(w)
          y = Mul(x, v)
        }"""
    )
    graph = load_onnx(save(model))
    assert [(t.name, t.role, t.nbytes) for t in graph.tensors.values()] == [
        ("x", "input", 24),
        ("v", "parameter", 12),
        ("y", "activation", 24),
    ]
    assert program_of(graph).parameter("v").view(np.float32).tolist() == [-0.5, -1.0, -1.5]
    assert_runs_equal(graph)


def test_a_view_of_a_weight_is_the_weight(save: Save) -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]>
        net (float[2, 3] x, float[6] w) => (float[2, 2] y) <float[6] w = {1, 2, 3, 4, 5, 6}, int64[2] s = {3, 2}> {
          v = Reshape(w, s)
          y = MatMul(x, v)
        }"""
    )
    graph = load_onnx(save(model))
    # An initializer that also stands among the inputs is a parameter.
    assert graph.operators[0].inputs == ("x", "w")
    assert graph.tensors["w"].role == "parameter"
    assert graph.aliases == {"v": "w"}
    assert_runs_equal(graph)


def test_random_numbers_are_no_constant(save: Save) -> None:
    graph = load_onnx(save(text("r = RandomNormal<shape = [2, 3]>() y = Add(x, r)")))
    assert [operator.kind for operator in graph.operators] == ["RandomNormal", "Add"]


def test_dead_nodes_and_unread_optional_outputs_are_dropped(save: Save) -> None:
    model = text(
        "a, indices = MaxPool<kernel_shape = [2]>(x) dead = Exp(x) deader = Neg(dead) y = Relu(a)",
        "float[1, 1, 4] x",
        "float[1, 1, 3] y",
    )
    graph = load_onnx(save(model))
    assert [operator.kind for operator in graph.operators] == ["MaxPool", "Relu"]
    assert set(graph.tensors) == {"x", "a", "y"}
    assert_runs_equal(graph)


def test_an_unread_output_that_cannot_be_left_out_takes_room(save: Save) -> None:
    graph = load_onnx(save(text("a, b = Split<axis = 0>(x) y = Relu(a)", outputs="float[1, 3] y", opset=11)))
    assert graph.operators[0].outputs == ("a", "b")
    assert_runs_equal(graph)


def test_an_output_that_is_a_view_or_an_input_keeps_its_name_and_shape(save: Save) -> None:
    model = text(
        "a = Relu(x) y = Flatten<axis = 0>(a) z = Identity(x) u = Identity(a)",
        outputs="float[1, 6] y, float[2, 3] z, float[2, 3] u",
    )
    graph = load_onnx(save(model))
    assert graph.outputs == ("a", "x")
    plain = assert_runs_equal(graph)
    arrays = output_arrays(program_of(graph), plain)
    assert {name: array.shape for name, array in arrays.items()} == {"y": (1, 6), "z": (2, 3), "u": (2, 3)}
    assert np.array_equal(arrays["y"].ravel(), np.maximum(arrays["z"], 0).ravel())


def test_an_unread_input_is_no_tensor_and_need_not_be_given(save: Save) -> None:
    graph = load_onnx(save(text("y = Relu(x)", inputs="float[2, 3] x, float[7] unread")))
    assert set(graph.tensors) == {"x", "y"}
    assert_runs_equal(graph)


def test_unnamed_and_repeated_nodes_get_stable_unique_names(save: Save) -> None:
    model = onnx.parser.parse_model(text("a = Relu(x) b = Exp(a) c = Neg(b) y = Abs(c)"))
    for node, name in zip(model.graph.node, ("twice", "", "twice", "Exp_1"), strict=True):
        node.name = name
    graph = load_onnx(save(model))
    assert [operator.name for operator in graph.operators] == ["Relu_0", "Exp_1_", "Neg_2", "Exp_1"]
    assert graph.digest == load_onnx(save(model)).digest


def test_nodes_out_of_order_are_sorted(save: Save) -> None:
    model = onnx.parser.parse_model(text("a = Relu(x) b = Exp(a) y = Abs(b)"))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([nodes[2], nodes[0], nodes[1]])
    assert [operator.kind for operator in load_onnx(save(model)).operators] == ["Relu", "Exp", "Abs"]


# --- subgraphs and functions

IF = """a = Relu(x)
    y = If(c)<then_branch = one () => (float[2, 3] t) { t = Exp(a) },
              else_branch = two () => (float[2, 3] e) { e = Add(a, x) }>"""
LOOP = """a = Relu(x)
    trips = Constant<value_int = 3>()
    one = Constant<value_int = 1>()
    go = Cast<to = 9>(one)
    b = Loop(trips, go, a)<body = step (int64 i, bool on, float[2, 3] v) => (bool on2, float[2, 3] w)
        { on2 = Identity(on) w = Add(v, x) }>
    y = Neg(b)"""


def test_an_if_is_one_operator_that_reads_what_its_branches_capture(save: Save) -> None:
    graph = load_onnx(save(text(IF, inputs="float[2, 3] x, bool c")))
    assert [operator.kind for operator in graph.operators] == ["Relu", "If"]
    assert set(graph.operators[1].inputs) == {"c", "a", "x"}
    assert_runs_equal(graph, seed=1)


def test_a_loop_is_one_operator_that_reads_what_its_body_captures(save: Save) -> None:
    graph = load_onnx(save(text(LOOP)))
    assert [operator.kind for operator in graph.operators] == ["Relu", "Loop", "Neg"]
    assert set(graph.operators[1].inputs) == {"trips", "go", "a", "x"}
    assert_runs_equal(graph)


def test_a_loop_that_changes_the_shape_it_carries_is_refused(save: Save) -> None:
    growing = LOOP.replace("w = Add(v, x)", "w = Concat<axis = 0>(v, x)").replace("float[2, 3] w", "float[M, 3] w")
    with pytest.raises(GraphError, match="tensor 'b' has no static shape: Loop"):
        load_onnx(save(text(growing, outputs="float[M, 3] y")))


def test_functions_of_the_model_are_unfolded(save: Save) -> None:
    model = """<ir_version: 8, opset_import: ["": 17, "my": 1]>
        net (float[2, 3] x) => (float[2, 3] y) { a = my.twice(x) y = Neg(a) }
        <domain: "my", opset_import: ["": 17, "my": 1]> twice (x) => (y) { t = my.once(x) y = my.once(t) }
        <domain: "my", opset_import: ["": 17]> once (x) => (y) { y = Exp(x) }"""
    graph = load_onnx(save(model))
    assert [operator.kind for operator in graph.operators] == ["Exp", "Exp", "Neg"]
    assert_runs_equal(graph)


def test_functions_that_call_themselves_or_multiply_without_bound_are_refused(save: Save) -> None:
    head = '<ir_version: 8, opset_import: ["": 17, "my": 1]> net (float[2, 3] x) => (float[2, 3] y) { y = my.f0(x) }'
    own = '<domain: "my", opset_import: ["": 17, "my": 1]>'
    with pytest.raises(GraphError, match="calls itself"):
        load_onnx(save(f"{head} {own} f0 (x) => (y) {{ y = my.f0(x) }}"))
    bomb = " ".join(f"{own} f{i} (x) => (y) {{ t = my.f{i + 1}(x) y = my.f{i + 1}(t) }}" for i in range(40))
    with pytest.raises(GraphError, match="unfolds to"):
        load_onnx(save(f"{head} {bomb} {own} f40 (x) => (y) {{ y = Exp(x) }}"))


def test_a_sparse_weight_is_run_dense(save: Save) -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("w", TensorProto.FLOAT, [2], [1.0, 2.0]), helper.make_tensor("i", 7, [2], [0, 5]), [3, 2]
    )
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 3])],
        [helper.make_tensor_value_info("y", 1, [1, 2])],
        sparse_initializer=[sparse],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    assert_runs_equal(load_onnx(save(model)))


# --- element types


def test_another_element_type_recounts_floating_tensors_only(save: Save) -> None:
    body = "a = Relu(x) i = Cast<to = 7>(a) s = Constant<value_ints = [0, 1, 2]>() j = Add(i, s) y = Cast<to = 1>(j)"
    path = save(text(body, inputs="float[1, 3] x", outputs="float[1, 3] y"))
    sizes = {t.name: t.nbytes for t in load_onnx(path).tensors.values()}
    assert sizes == {"x": 12, "a": 12, "i": 24, "s": 24, "j": 24, "y": 12}
    for dtype, size in {"int8": 3, "float16": 6, "int4": 2, "float64": 24}.items():
        graph = load_onnx(path, dtype=dtype)
        assert {t.name: t.nbytes for t in graph.tensors.values()} == {**sizes, "x": size, "a": size, "y": size}
        assert graph.program is None
        assert graph.options["dtype"] == dtype
    assert load_onnx(path, dtype="float32").program is not None
    with pytest.raises(ValueError, match="unknown element type 'int7'"):
        load_onnx(path, dtype="int7")


def test_int8_counts_one_byte_an_element_as_the_paper_does() -> None:
    graph = rg.load("onnx:resnet50", dtype="int8", fuse=False)
    assert sum(t.nbytes for t in graph.tensors.values() if t.role == "parameter") == WEIGHTS["resnet50"]


@pytest.mark.parametrize("element", [10, 11, 16])
def test_other_floats_run(save: Save, element: int) -> None:
    # One operator only: between float16 operators ONNX Runtime's plain run keeps float32.
    graph = helper.make_graph(
        [helper.make_node("Concat", ["x", "x"], ["y"], axis=0)],
        "net",
        [helper.make_tensor_value_info("x", element, [2, 3])],
        [helper.make_tensor_value_info("y", element, [4, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    loaded = load_onnx(save(model))
    try:
        program_of(loaded).run_plain(program_of(loaded).example_inputs(0))
    except GraphError as error:
        pytest.skip(f"this ONNX Runtime has no such kernel: {error}")
    assert_runs_equal(loaded)


# --- open dimensions


def test_open_dimensions_are_listed_with_the_flag_that_fixes_them(save: Save) -> None:
    path = save(text("y = Relu(x)", inputs="float[N, 3, H, 224] x", outputs="float[N, 3, H, 224] y"))
    with pytest.raises(
        GraphError, match=r"'x' \(Nx3xHx224\).*--input x=1x3x224x224 .*inputs=\{'x': \[1, 3, 224, 224\]\}"
    ):
        load_onnx(path)
    graph = load_onnx(path, inputs={"x": [1, 3, 8, 224]})
    assert graph.tensors["y"].shape == (1, 3, 8, 224)
    assert graph.options["inputs"] == {"x": [1, 3, 8, 224]}
    assert_runs_equal(graph)


def test_a_named_dimension_given_once_holds_everywhere(save: Save) -> None:
    path = save(text("y = Add(x, z)", inputs="float[N, 3] x, float[N, 3] z", outputs="float[N, 3] y"))
    assert load_onnx(path, inputs={"x": (4, 3)}).tensors["z"].shape == (4, 3)
    with pytest.raises(GraphError, match="'N' is given as 4 and as 5"):
        load_onnx(path, inputs={"x": (4, 3), "z": (5, 3)})


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"x": (1, 3)}, "has 3 dimensions"),
        ({"q": (1, 3, 4)}, "no input 'q'; its inputs: 'x'"),
        ({"x": (1, 4, 5)}, "only open dimensions"),
        ({"x": (0, 3, 5)}, "a dimension 0"),
        ({"x": (-1, 3, 5)}, "a dimension -1"),
        ({"x": (1.0, 3, 5)}, "a dimension 1.0"),
        ({"x": (10**12, 3, 5)}, "a dimension 1000000000000"),
        ({"x": "1x3x5"}, "sequence of numbers"),
        ({"x": 5}, "sequence of numbers"),
    ],
)
def test_input_shapes_that_do_not_fit_are_refused(save: Save, inputs: dict, message: str) -> None:
    path = save(text("y = Relu(x)", inputs="float[N, 3, K] x", outputs="float[N, 3, K] y"))
    with pytest.raises(GraphError, match=message):
        load_onnx(path, inputs=inputs)


# --- external data


@pytest.fixture
def external(tmp_path: Path) -> Path:
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float32).reshape(8, 8), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 8])],
        [helper.make_tensor_value_info("y", 1, [1, 8])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    folder = tmp_path / "model"
    folder.mkdir()
    onnx.save(model, folder / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    return folder / "m.onnx"


def relocate(path: Path, **entries: str) -> None:
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = entries.pop(entry.key, entry.value)
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())


def test_external_data_is_sized_at_load_and_read_at_run(external: Path) -> None:
    graph = load_onnx(external)
    assert graph.tensors["w"].nbytes == 256
    assert_runs_equal(graph)
    graph = load_onnx(external)
    (external.parent / "w.bin").unlink()
    for late in (lambda: program_of(graph).parameter("w"), lambda: load_onnx(external)):
        with pytest.raises(GraphError, match=r"there is no file 'w\.bin'"):
            late()


def test_external_data_that_is_no_file_is_refused_at_load(external: Path) -> None:
    (external.parent / "w.bin").unlink()
    os.mkfifo(external.parent / "w.bin")
    with pytest.raises(GraphError, match="not a regular file"):
        load_onnx(external)
    (external.parent / "w.bin").unlink()
    (external.parent / "w.bin").mkdir()
    with pytest.raises(GraphError, match="not a regular file"):
        load_onnx(external)


@pytest.mark.parametrize("place", ["/etc/hostname", "../secret.bin", "a/../../secret.bin", "..\\s", "C:\\s", ""])
def test_external_data_outside_of_the_models_folder_is_refused(external: Path, place: str) -> None:
    (external.parent.parent / "secret.bin").write_bytes(bytes(256))
    relocate(external, location=place)
    with pytest.raises(GraphError, match="only a file in the model's own folder"):
        load_onnx(external)


def test_a_link_that_leads_out_of_the_models_folder_is_refused(external: Path) -> None:
    graph = load_onnx(external)
    (external.parent.parent / "secret.bin").write_bytes(bytes(256))
    (external.parent / "w.bin").unlink()
    (external.parent / "w.bin").symlink_to(external.parent.parent / "secret.bin")
    for attempt in (lambda: load_onnx(external), lambda: program_of(graph).parameter("w")):
        with pytest.raises(GraphError, match="link that leads out"):
            attempt()
    with pytest.raises(GraphError, match="link that leads out"):
        program_of(graph).run_plain(program_of(graph).example_inputs(0))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"length": "128"}, "has 128 bytes; its shape and type need 256"),
        ({"offset": "64"}, "ends before the 256 bytes"),
        ({"offset": str(2**62)}, "ends before the 256 bytes"),
        ({"offset": "many"}, "no number"),
        ({"offset": "-4"}, "negative"),
    ],
)
def test_external_data_that_does_not_fit_is_refused(external: Path, entries: dict[str, str], message: str) -> None:
    relocate(external, **entries)
    with pytest.raises(GraphError, match=message):
        load_onnx(external)


# --- what a plain run says


def test_an_output_that_is_an_input_too_is_compared_with_itself(save: Save) -> None:
    """ONNX Runtime returns the memory it was fed, which was let go of before the comparison."""
    path = save(text("y = Relu(x)", inputs="float[64, 64] x", outputs="float[64, 64] y, float[64, 64] x"))
    program = program_of(load_onnx(path))
    given = program.example_inputs(0)
    kept = given["x"].copy()
    plain = program.run_plain(given)
    assert not np.shares_memory(plain["x"], given["x"])
    given["x"][:] = 0xFF
    assert np.array_equal(plain["x"], kept)


def test_a_dense_and_a_sparse_initializer_of_one_name_are_refused(save: Save) -> None:
    model = onnx.parser.parse_model(text("y = Add(x, w)", inputs="float[4] x", outputs="float[4] y"))
    model.graph.initializer.append(numpy_helper.from_array(np.ones(4, np.float32), "w"))
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    indices = numpy_helper.from_array(np.array([2], np.int64), "w_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    with pytest.raises(GraphError, match="a dense and a sparse initializer 'w'"):
        load_onnx(save(model))


RANDOM = {
    "Dropout in training": "t = Constant<value = bool {1}>() r = Constant<value_float = 0.5>() y = Dropout(x, r, t)",
    "RandomNormalLike": "r = RandomNormalLike(x) y = Add(x, r)",
    "RandomUniform": "r = RandomUniform<shape = [2, 3]>() y = Add(x, r)",
    "Bernoulli": "y = Bernoulli(x)",
    "RandomNormalLike ": "c = Constant<value = bool {1}>() y = If(c) <then_branch = g () => (float[2, 3] a) "
    "{ a = RandomNormalLike(x) }, else_branch = h () => (float[2, 3] b) { b = Relu(x) }>",
}


@pytest.mark.parametrize("kind", RANDOM)
def test_a_random_model_is_planned_but_not_run(save: Save, kind: str) -> None:
    graph = load_onnx(save(text(RANDOM[kind])))
    program = program_of(graph)
    with pytest.raises(GraphError, match=f"planned, not run.*{kind.strip()}.*random"):
        program.run_operator(graph.operators[0], program.example_inputs(0), True)
    with pytest.raises(GraphError, match="planned, not run"):
        program.run_plain(program.example_inputs(0))


def test_what_is_random_but_reaches_no_output_or_is_off_does_not_keep_a_model_from_running(save: Save) -> None:
    body = "d = RandomNormalLike(x) t = Constant<value = bool {0}>() r = Constant<value_float = 0.5>() "
    assert_runs_equal(load_onnx(save(text(body + "a = Relu(x) b = Dropout(a, r, t) y = Relu(b)"))))


def test_functions_that_call_one_another_too_deep_are_not_said_to_call_themselves(save: Save) -> None:
    depth = 150
    functions = [
        helper.make_function(
            "local",
            f"f{i}",
            ["a"],
            ["b"],
            [helper.make_node(f"f{i + 1}" if i < depth else "Relu", ["a"], ["b"], domain="local" if i < depth else "")],
            [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)],
        )
        for i in range(depth + 1)
    ]
    model = onnx.parser.parse_model(text("y = Relu(x)"))
    model.graph.node[0].op_type, model.graph.node[0].domain = "f0", "local"
    model.opset_import.add(domain="local", version=1)
    model.functions.extend(functions)
    with pytest.raises(GraphError, match="100 deep and deeper") as caught:
        load_onnx(save(model))
    assert "itself" not in str(caught.value)


def test_an_input_that_is_a_sequence_is_one_sentence(save: Save) -> None:
    model = onnx.parser.parse_model(text("y = Relu(x)"))
    model.graph.node[0].CopyFrom(helper.make_node("ConcatFromSequence", ["x"], ["y"], axis=0))
    model.graph.input[0].CopyFrom(helper.make_tensor_sequence_value_info("x", 1, [2, 3]))
    with pytest.raises(GraphError, match="input 'x' is a sequence, not a tensor"):
        load_onnx(save(model))


# --- bad files


def with_input_dimension(size: int) -> bytes:
    model = onnx.parser.parse_model(text("y = Relu(x)"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = size
    return model.SerializeToString()


def with_initializer(dims: list[int]) -> bytes:
    model = onnx.parser.parse_model(text("y = Add(x, w)"))
    model.graph.initializer.add(name="w", data_type=1, dims=dims, raw_data=bytes(4))
    return model.SerializeToString()


def with_opset(domain: str, version: int) -> bytes:
    model = onnx.parser.parse_model(text("y = Relu(x)"))
    model.opset_import[0].domain, model.opset_import[0].version = domain, version
    return model.SerializeToString()


def cyclic() -> bytes:
    model = onnx.parser.parse_model(text("a = Add(x, x) b = Exp(a) y = Abs(b)"))
    model.graph.node[0].input[1] = "b"
    return model.SerializeToString()


def shapeless() -> bytes:
    model = onnx.parser.parse_model(text("y = Relu(x)"))
    model.graph.input[0].type.tensor_type.ClearField("shape")
    return model.SerializeToString()


def truncated() -> bytes:
    data = onnx.load(Path(onnx.__file__).parent / "backend/test/data/light/light_squeezenet.onnx").SerializeToString()
    return data[: len(data) // 2]


def png() -> bytes:
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + bytes(range(256))


BAD = {
    "empty": (b"", "is empty"),
    "png": (png(), "not an ONNX model"),
    "text": (b"This is a plain text file, not a model.\n" * 5, "not an ONNX model"),
    "zeros": (bytes(4096), "not an ONNX model"),
    "truncated": (truncated(), "truncated"),
    "cyclic": (cyclic(), "has a cycle through node"),
    "shapeless": (shapeless(), "'x' has no shape"),
    "opset too new": (with_opset("", 9999), "version 9999 of the operator set 'ai.onnx'"),
    "opset negative": (with_opset("", -1), "version -1"),
    "no opset of the operators": (with_opset("other", 1), "does not import"),
    "huge input": (with_input_dimension(10**12), r"dimension of 1,000,000,000,000; 0 to 2\*\*31 - 1"),
    "negative input": (with_input_dimension(-5), "dimension of -5"),
    "huge initializer": (with_initializer([10**12]), "dimension of 1,000,000,000,000"),
    "negative initializer": (with_initializer([-3]), "dimension of -3"),
    "huge total": (text("y = Neg(x)", "float[2000000000, 2000000000] x", "float y"), r"up to 2\*\*50"),
    "unknown operator": (text("y = NoSuchOperator(x)"), "no operator of the ONNX operator set 17"),
    "too few inputs": (text("y = Add(x)"), "1 inputs; 2 to 2"),
    "unknown attribute": (text("y = Relu<slope = 1>(x)"), "attribute 'slope'"),
    "mistyped attribute": (text("y = Softmax<axis = 1.5>(x)"), "wrong type"),
    "missing attribute": (text("y = Cast(x)"), "lacks its attribute 'to'"),
    "two makers": (text("y = Relu(x) y = Exp(x)"), "'y' twice"),
    "no maker": (text("y = Add(x, ghost)"), "'ghost', which nothing makes"),
    "no maker of the output": (text("a = Relu(x)"), "'y' is made by nothing"),
    "no operators": (text("y = Identity(x)"), "computes nothing"),
    "contradiction": (
        text("w = Constant<value_ints = [1, 2]>() b = Reshape(x, w) y = Relu(b)"),
        "a view of 'x', but of 8 bytes, not 24",
    ),
    "depends on data": (text("a = NonZero(x) y = Cast<to = 1>(a)", outputs="float[2, N] y"), "depends on the data"),
    "strings": (text("y = Relu(x)", inputs="string[2] x"), "strings"),
    "sequence": (text("y = ConcatFromSequence<axis = 0>(x)", inputs="seq(float[2]) x"), "sequence"),
    "a sequence inside": (
        text("s = SequenceConstruct(x, x) y = ConcatFromSequence<axis = 0>(s)", outputs="float y"),
        "of type sequence",
    ),
    # These two end onnx's own shape inference by a signal, which has to stay in the child process.
    "onnx crashes": (text("y, m, s = LayerNormalization<axis = 9223372036854775807>(x, x)"), "crashes at node"),
    "onnx aborts": (
        text("y, b, c, d = Split<axis = 0, num_outputs = 3>(x)", "float[6] x", "float[2] y", opset=18),
        "crashes at node",
    ),
    "einsum without end": (text('y = Einsum<equation = "...i...j->">(x)'), "none of Einsum's"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_costs_one_sentence_and_little_time(save: Save, case: str) -> None:
    content, message = BAD[case]
    path = save(content)
    began = time.perf_counter()
    with pytest.raises(GraphError, match=message) as caught:
        load_onnx(path)
    assert time.perf_counter() - began < 5
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_after_a_crash_in_shape_inference_the_next_model_loads(save: Save) -> None:
    content, _ = BAD["onnx crashes"]
    good = save(text("y = Relu(x)"), "good.onnx")
    bad = save(content, "bad.onnx")
    for _ in range(3):
        with pytest.raises(GraphError):
            load_onnx(bad)
        assert len(load_onnx(good).operators) == 1
    assert _child.process is not None
    assert _child.process.poll() is None


def test_a_shape_inference_without_end_is_cut_off(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retensor.graph.onnx_guard.SECONDS", 0.3)
    endless = onnx.parser.parse_model(text('y = Einsum<equation = "...i...j->">(x)'))
    with pytest.raises(GraphError, match="does not end"):
        onnx_guard.infer_shapes(endless, "the node", strict=True)
    monkeypatch.undo()
    assert len(load_onnx(save(text("y = Relu(x)"))).operators) == 1


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="is a directory"):
        load_onnx(tmp_path)
    with pytest.raises(GraphError, match="there is no file"):
        load_onnx(tmp_path / "none.onnx")
    with pytest.raises(GraphError, match="cannot read"):
        load_onnx("a\0b.onnx")
    with pytest.raises(GraphError, match="cannot read"):
        load_onnx(tmp_path / ("n" * 5000))
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(GraphError, match="not a regular file"):
        load_onnx(tmp_path / "pipe.onnx")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_refused(save: Save) -> None:
    path = save(text("y = Relu(x)"))
    path.chmod(0)
    with pytest.raises(GraphError, match="Permission denied"):
        load_onnx(path)


def test_a_weight_without_its_data_is_refused_when_read(save: Save) -> None:
    model = onnx.parser.parse_model(text("y = Add(x, w)"))
    model.graph.initializer.add(name="w", data_type=1, dims=[2, 3], raw_data=bytes(20))
    graph = load_onnx(save(model))
    with pytest.raises(GraphError, match="holds 20 bytes; its shape and type need 24"):
        program_of(graph).parameter("w")


def test_a_model_that_changed_after_loading_is_not_run(save: Save) -> None:
    path = save(text("y = Relu(x)"))
    graph = load_onnx(path)
    save(text("y = Exp(x) z = Abs(y)"))
    with pytest.raises(GraphError, match="changed since it was loaded"):
        program_of(graph).run_plain(program_of(graph).example_inputs(0))


# --- the program


def test_storages_may_lie_at_any_address_and_are_not_changed(save: Save) -> None:
    graph = load_onnx(save(text("a = Relu(x) y = Exp(a)")))
    program = program_of(graph)
    inputs = program.example_inputs(5)
    arena = np.full(64, 0xAB, np.uint8)
    arena[1:25] = inputs["x"]
    before = arena.copy()
    made = program.run_operator(graph.operators[0], {"x": arena[1:25]}, True)
    assert np.array_equal(arena, before)
    assert np.array_equal(made["a"].view(np.float32), np.maximum(inputs["x"].view(np.float32), 0))


def test_missing_and_misfitting_storages_are_named(save: Save) -> None:
    graph = load_onnx(save(text("y = Relu(x)")))
    program = program_of(graph)
    with pytest.raises(GraphError, match="needs the bytes of tensor 'x'"):
        program.run_operator(graph.operators[0], {}, True)
    with pytest.raises(GraphError, match="of 8 bytes is given where 24"):
        program.run_operator(graph.operators[0], {"x": np.zeros(8, np.uint8)}, True)
    with pytest.raises(GraphError, match="needs the bytes of input 'x'"):
        program.run_plain({})
    with pytest.raises(GraphError, match="no parameter"):
        program.parameter("x")
    with pytest.raises(GraphError, match="no value 'q'"):
        program.decode("q", np.zeros(8, np.uint8))


def test_example_inputs_are_valid_and_repeatable(save: Save) -> None:
    graph = load_onnx(save(text(IF, inputs="float[2, 3] x, bool c")))
    program = program_of(graph)
    first, again, other = program.example_inputs(7), program.example_inputs(7), program.example_inputs(8)
    assert first.keys() == {"x", "c"}
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["x"], other["x"])
    assert first["c"].max() <= 1


def node_cases() -> list:
    """Every third of onnx's own operator tests that is small and draws no random numbers."""
    skipped = ("dropout", "bernoulli", "random", "multinomial", "fp16", "float16", "FLOAT16")
    cases = [case for case in load_model_tests(kind="node") if not any(word in case.name for word in skipped)]
    return [case for case in cases if case.model is not None and case.model.ByteSize() < 20_000][::3]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_onnx_own_operator_tests_run_equal_by_operator_wherever_onnx_runtime_runs_them(save: Save) -> None:
    ran = loaded = 0
    for case in node_cases():
        path = save(case.model)
        try:
            graph = load_onnx(path, in_place=True)
        except GraphError:
            continue
        loaded += 1
        try:
            plain = program_of(graph).run_plain(program_of(graph).example_inputs(0))
        except GraphError:
            continue  # no kernel in this ONNX Runtime, or random bytes that the operator refuses
        made = run_by_operator(graph, program_of(graph).example_inputs(0), keep_parameters=False)
        for name, data in plain.items():
            assert np.array_equal(made[name], data), (case.name, name)
        ran += 1
    assert loaded > 400
    assert ran > 250
