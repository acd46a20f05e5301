"""Damaged model files: each either loads or is refused by a RetensorError, within a bound on time and memory.

Real files (ONNX's light models) and small ones with everything the loader knows are damaged in bytes (flips, cuts,
splices, runaway varints) and in fields (numbers, names, types and whole messages changed so that the file still
parses); the latter is what reaches shape inference. Hypothesis does the same for the JSON reader.
"""

from __future__ import annotations

import copy
import json
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper, numpy_helper

from retensor.errors import RetensorError
from retensor.graph import light_models
from retensor.graph.json import graph_from_json, graph_to_json, read_graph
from retensor.graph.onnx import load_onnx

CASES = 15_000
PARTS = 5
SECONDS = 20.0
"""A case takes a millisecond; shape inference that hangs is cut off after five seconds."""
MEGABYTES = 400

NUMBERS = [0, 1, -1, 2, 3, 7, 64, 255, 65535, 2**31 - 1, 2**31, -(2**31), 2**40, 10**12, 2**62, 2**63 - 1, -(2**63)]
OPERATORS = sorted({schema.name for schema in onnx.defs.get_all_schemas()})
VARINTS = [b"\xff" * 9 + b"\x01", b"\xff\xff\xff\xff\x0f", b"\xff" * 12, b"\x80" * 9 + b"\x01", b"\x80\x80\x80\x80\x20"]
WORDS = ["", "axis", "axes", "x" * 300, "\n", "com.microsoft", "../x", "/etc/passwd", "ai.onnx.ml"]
TEXTS = [b"", b"\xff" * 8, b"SAME_UPPER", b"nearest", b"ij,jk->ik", b"...i...j->", bytes(16)]

SOURCES = [
    """<ir_version: 8, opset_import: ["": 17]> net (float[N, 3, H, W] x) => (float[N, K] y) <float[4, 3, 1, 1] w = {
      1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[4] b = {0, 1, 2, 3}> {
      c = Conv<pads = [1, 1, 1, 1]>(x, w, b)  r = Relu(c)  s = Shape(r)  zero = Constant<value_ints = [0]>()
      n = Gather(s, zero)  rest = Constant<value_ints = [-1]>()  t = Concat<axis = 0>(n, rest)
      f = Reshape(r, t)  y = Softmax(f) }""",
    """<ir_version: 8, opset_import: ["": 17]> net (float[2, 3] x, bool c) => (float[2, 3] y) {
      a = Relu(x)
      y = If(c)<then_branch = one () => (float[2, 3] t) { t = Exp(a) },
                else_branch = two () => (float[2, 3] e) { e = Neg(a) }> }""",
    """<ir_version: 8, opset_import: ["": 17]> net (float[2, 3] x) => (float[2, 3] y) {
      trips = Constant<value_int = 3>()  one = Constant<value_int = 1>()  go = Cast<to = 9>(one)
      b = Loop(trips, go, x)<body = step (int64 i, bool on, float[2, 3] v) => (bool on2, float[2, 3] w)
          { on2 = Identity(on) w = Add(v, x) }>
      y = Neg(b) }""",
    """<ir_version: 8, opset_import: ["": 17, "my": 1]> net (float[2, 3] x) => (float[2, 3] y) {
      a = my.f(x) b = my.g(a) y = Relu(b) }
      <domain: "my", opset_import: ["": 17]> f (x) => (y) { t = Exp(x) y = Add(t, x) }
      <domain: "my", opset_import: ["": 17, "my": 1]> g (x) => (y) { t = my.f(x) y = Neg(t) }""",
    """<ir_version: 8, opset_import: ["": 17]> net (float[2] i, float[5, 2] x) => (float[2] o, float[5, 2] y) {
      o, y = Scan<num_scan_inputs = 1, body = step (float[2] s, float[2] e) => (float[2] so, float[2] eo)
          { so = Add(s, e) eo = Identity(so) }>(i, x) }""",
    """<ir_version: 8, opset_import: ["": 18]> net (float[1, 2, 6, 6] x) => (float[8] y)
      <int8[2, 2] w = {1, 2, 3, 4}, float scale = {0.1}, float[6] g = {1, 2, 3, 4, 5, 6}, int64[1] whole = {-1}> {
      n = LayerNormalization<axis = -1>(x, g)  p, where = MaxPool<kernel_shape = [2, 2], strides = [3, 3]>(n)
      a, b = Split<axis = 1, num_outputs = 2>(p)  j = Concat<axis = 1>(b, a)  d = DequantizeLinear(w, scale)
      e = Einsum<equation = "nchw,wv->nchv">(j, d)  f = Reshape(e, whole)  y = Tanh(f) }""",
]


def external_model() -> ModelProto:
    weight = numpy_helper.from_array(np.arange(64, dtype=np.float32).reshape(8, 8), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": "0", "length": "256"}.items():
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", 1, [1, 8])],
        [helper.make_tensor_value_info("y", 1, [1, 8])],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def seeds() -> list[bytes]:
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    light = [(folder / f"light_{name}.onnx").read_bytes() for name in light_models()]
    small = [onnx.parser.parse_model(source).SerializeToString() for source in SOURCES]
    # The large ones differ from these in nothing but their number of layers.
    return [data for data in light if len(data) < 20_000] + [*small, external_model().SerializeToString()] * 2


def damage_bytes(chance: random.Random, data: bytes) -> bytes:
    at, other = chance.randrange(len(data)), chance.randrange(len(data))
    length = chance.randrange(1, 64)
    kind = chance.randrange(6)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 4, 16])):
            changed[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(changed)
    if kind == 1:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 4])):
            changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == 2:
        return data[:at]
    if kind == 3:
        return data[:at] + data[other : other + length] + data[at:]
    if kind == 4:
        return data[:at] + data[at + length :]
    return data[:at] + chance.choice(VARINTS) + data[at + chance.randrange(3) :]


def damage_field(chance: random.Random, model: ModelProto) -> None:
    """Change one field, somewhere: mostly in or under a node."""
    message: Any = model
    if chance.random() < 0.7 and model.graph.node:
        message = chance.choice(model.graph.node)
    while True:
        inner = [field for field, _ in message.ListFields() if field.type == field.TYPE_MESSAGE]
        if not inner or chance.random() > 0.65:
            break
        value = getattr(message, chance.choice(inner).name)
        if not hasattr(value, "add"):
            message = value
            continue
        at = chance.randrange(len(value))
        if chance.random() < 0.1:
            del value[at]
            return
        if chance.random() < 0.1:
            value.add().CopyFrom(value[at])
            return
        message = value[at]
    plain = [field for field in message.DESCRIPTOR.fields if field.type != field.TYPE_MESSAGE]
    present = [field for field, _ in message.ListFields() if field.type != field.TYPE_MESSAGE]
    if not plain:
        return
    field = chance.choice(present if present and chance.random() < 0.85 else plain)
    current = getattr(message, field.name)
    try:
        if not hasattr(current, "append"):
            if chance.random() < 0.15:
                message.ClearField(field.name)
            else:
                setattr(message, field.name, new_value(chance, field, model))
        elif current and chance.random() < 0.4:
            current[chance.randrange(len(current))] = new_value(chance, field, model)
        elif current and chance.random() < 0.3:
            del current[chance.randrange(len(current))]
        else:
            current.extend(new_value(chance, field, model) for _ in range(chance.choice([1, 1, 1, 10, 1000])))
    except (TypeError, ValueError):
        pass  # a number outside of the field's range


def new_value(chance: random.Random, field: Any, model: ModelProto) -> Any:
    if field.cpp_type in (field.CPPTYPE_INT32, field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
        return chance.choice(NUMBERS) if chance.random() < 0.6 else chance.randrange(-8, 40)
    if field.cpp_type == field.CPPTYPE_ENUM:
        return chance.choice(list(field.enum_type.values_by_number))
    if field.cpp_type in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return chance.choice([0.0, -1.0, 1e30, float("nan"), float("inf")])
    if field.type == field.TYPE_BYTES:
        return chance.choice(TEXTS)
    if field.name == "op_type":
        return chance.choice(OPERATORS)
    if chance.random() < 0.3:
        return chance.choice(WORDS)
    return chance.choice([name for node in model.graph.node for name in (*node.input, *node.output)] or [""])


def damaged(chance: random.Random, data: bytes) -> bytes:
    if chance.random() < 0.4:
        return damage_bytes(chance, data)
    model = ModelProto.FromString(data)
    for _ in range(chance.choice([1, 1, 1, 2, 3, 6])):
        damage_field(chance, model)
    return model.SerializeToString()


def refusal(attempt: Callable[[], object], case: object) -> str | None:
    """What the library says against ``attempt``, in one sentence; None where it succeeds. Fails on anything else."""
    try:
        attempt()
    except RetensorError as error:
        message = str(error)
    except BaseException as error:
        raise AssertionError(f"case {case} raises {type(error).__name__}: {error}") from error
    else:
        return None
    assert "\n" not in message, case
    assert 10 < len(message) < 1200, case
    return message


def megabytes() -> float:
    """Most memory that this process, and any child that has ended, ever had."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


@pytest.mark.parametrize("part", range(PARTS))
def test_a_damaged_onnx_file_loads_or_is_refused(tmp_path: Path, part: int) -> None:
    files = seeds()
    path = tmp_path / "damaged.onnx"
    outcome: Counter[str] = Counter()
    before = megabytes()
    for seed in range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        chance = random.Random(seed)
        data = damaged(chance, chance.choice(files))
        path.write_bytes(data)
        began = time.perf_counter()
        # The open dimension H, as the one source that has it is written.
        inputs = {"x": (1, 3, 8, 8)} if b"\x12\x01H" in data else None
        message = refusal(lambda: load_onnx(path, inputs=inputs, in_place=chance.random() < 0.5), seed)  # noqa: B023
        outcome["loaded" if message is None else "refused"] += 1
        assert time.perf_counter() - began < SECONDS, seed
    # Both ends are met: a fuzz that only ever bounces off the parser would test nothing.
    assert outcome["loaded"] > 100
    assert outcome["refused"] > 1000
    assert megabytes() - before < MEGABYTES


FORM: dict[str, Any] = {
    "schema": "retensor.graph/1",
    "name": "net",
    "tensors": [
        {"name": "x", "bytes": 4, "role": "input"},
        {"name": "w", "bytes": 8, "role": "parameter", "shape": [2], "dtype": "float32"},
        {"name": "a", "bytes": 4},
        {"name": "y", "bytes": 4, "role": "activation"},
    ],
    "operators": [
        {"name": "first", "kind": "Conv", "inputs": ["x", "w"], "outputs": ["a"], "nodes": ["n"]},
        {"name": "second", "inputs": ["a"], "outputs": ["y"]},
    ],
    "outputs": ["y"],
    "aliases": {"v": "a"},
    "options": {"fuse": True},
}
NAMES = st.sampled_from(["x", "w", "a", "y", "v", "first", "second", "", "\ud800", "\n"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | NAMES | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=4),
    max_leaves=12,
)
PLACES = st.lists(st.integers(0, 9), min_size=1, max_size=5)


def replaced(form: Any, place: list[int], value: Any, drop: bool) -> None:
    """Change or drop what lies in ``form`` at ``place``, indices taken modulo what is there."""
    for depth, index in enumerate(place):
        keys = list(form) if isinstance(form, dict) else list(range(len(form)))
        if not keys:
            return
        key = keys[index % len(keys)]
        if depth == len(place) - 1 or not isinstance(form[key], (dict, list)):
            if drop:
                del form[key]
            else:
                form[key] = value
            return
        form = form[key]


@settings(max_examples=1500, deadline=2000, derandomize=True)
@given(st.lists(st.tuples(PLACES, VALUES, st.booleans()), min_size=1, max_size=3))
def test_a_changed_json_graph_is_read_or_refused(changes: list[tuple[list[int], Any, bool]]) -> None:
    form = copy.deepcopy(FORM)
    for place, value, drop in changes:
        replaced(form, place, value, drop)
    if refusal(lambda: graph_from_json(form), form) is None:
        # What is read can be written, and comes back the same.
        graph = graph_from_json(form)
        assert graph_from_json(graph_to_json(graph)) == graph


@settings(max_examples=700, deadline=2000, derandomize=True)
@given(VALUES)
def test_any_json_value_is_read_or_refused(value: Any) -> None:
    assert refusal(lambda: graph_from_json(value), value) is not None


@settings(max_examples=1000, deadline=2000, derandomize=True)
@given(st.integers(0, 2**32), st.binary(max_size=6))
def test_a_damaged_json_file_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, seed: int, junk: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    chance = random.Random(seed)
    data = json.dumps(FORM).encode()
    at = chance.randrange(len(data))
    path.write_bytes(chance.choice([damage_bytes(chance, data), data[:at] + junk + data[at:], junk]))
    refusal(lambda: read_graph(path), seed)
