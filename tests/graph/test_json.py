"""The JSON form of a graph: round trips, the published schema, and strict reading."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import retensor.graph as rg
from retensor.errors import GraphError, RetensorError
from retensor.graph import json as graph_json
from retensor.graph.json import graph_from_json, graph_to_json, read_graph, write_graph
from retensor.graph.structure import Graph, Operator, Tensor

SMALL: dict[str, Any] = {
    "schema": "retensor.graph/1",
    "name": "small",
    "tensors": [
        {"name": "x", "bytes": 4},
        {"name": "w", "bytes": 8, "role": "parameter", "shape": [2], "dtype": "float32"},
        {"name": "a", "bytes": 4},
        {"name": "y", "bytes": 0, "role": "activation", "shape": None},
    ],
    "operators": [
        {"name": "first", "kind": "Conv", "inputs": ["x", "w"], "outputs": ["a"]},
        {"name": "second", "inputs": ["a"], "outputs": ["y"]},
    ],
    "outputs": ["y"],
}


@pytest.mark.parametrize("name", rg.light_models())
@pytest.mark.parametrize("fuse", [True, False])
def test_a_real_graph_comes_back_the_same(tmp_path: Path, name: str, fuse: bool) -> None:
    graph = rg.load(f"onnx:{name}", fuse=fuse)
    write_graph(graph, tmp_path / "graph.json")
    back = read_graph(tmp_path / "graph.json")
    assert back == graph
    assert back.digest == graph.digest
    assert back.options == graph.options
    assert back.program is None


def test_load_takes_a_json_graph_as_it_is(tmp_path: Path) -> None:
    graph = rg.load("onnx:squeezenet", fuse=False, dtype="int8")
    for name in ("graph.json", "graph.txt"):
        write_graph(graph, tmp_path / name)
        # A plan repeats the options of its graph; they must not stand in the way.
        again = rg.load(str(tmp_path / name), **graph.options)
        assert again.digest == graph.digest
    assert rg.load(tmp_path / "graph.json").digest == graph.digest
    with pytest.raises(GraphError, match="bytes are as written"):
        rg.load(tmp_path / "graph.json", dtype="int4")
    with pytest.raises(GraphError, match="shapes are as written"):
        rg.load(tmp_path / "graph.json", inputs={"x": [1]})


def test_load_can_merge_a_json_graph_in_place(tmp_path: Path) -> None:
    write_graph(rg.load("onnx:resnet50"), tmp_path / "graph.json")
    graph = rg.load(tmp_path / "graph.json", in_place=True)
    assert graph.digest == rg.load("onnx:resnet50", in_place=True).digest
    assert graph.options["in_place"] is True


def test_left_out_roles_and_kinds_have_defaults() -> None:
    graph = graph_from_json(SMALL)
    assert [tensor.role for tensor in graph.tensors.values()] == ["input", "parameter", "activation", "activation"]
    assert [operator.kind for operator in graph.operators] == ["Conv", "operator"]
    assert graph.tensors["w"] == Tensor("w", 8, "parameter", (2,), "float32")


def test_operators_in_any_order_are_sorted_and_an_order_that_runs_is_kept() -> None:
    names = [f"o{i}" for i in range(6)]
    tensors = [Tensor(f"t{i}", 1) for i in range(6)]
    operators = [Operator(n, "k", () if i < 2 else (f"t{i - 2}",), (f"t{i}",)) for i, n in enumerate(names)]
    for order in ([1, 3, 0, 5, 2, 4], [0, 1, 2, 3, 4, 5]):
        graph = Graph("g", [operators[i] for i in order], tensors, ["t4", "t5"])
        assert graph_from_json(graph_to_json(graph)) == graph
    form = graph_to_json(Graph("g", operators, tensors, ["t4", "t5"]))
    form["operators"].reverse()
    assert [operator.name for operator in graph_from_json(form).operators] == ["o1", "o3", "o5", "o0", "o2", "o4"]


def changed(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    form = copy.deepcopy(SMALL)
    change(form)
    return form


REFUSED: dict[str, tuple[Any, str]] = {
    "a list": ([], "an object is needed"),
    "a number": (1, "an object is needed"),
    "nothing": (None, "an object is needed"),
    "no schema": (changed(lambda f: f.pop("schema")), "has no 'schema'"),
    "another schema": (changed(lambda f: f.update(schema="retensor.graph/2")), "has schema 'retensor.graph/2'"),
    "an unknown key": (changed(lambda f: f.update(extra=1)), "has the key 'extra'; known are"),
    "an unknown tensor key": (changed(lambda f: f["tensors"][0].update(size=1)), "has the key 'size'"),
    "an unknown operator key": (changed(lambda f: f["operators"][0].update(type=1)), "has the key 'type'"),
    "no tensors": (changed(lambda f: f.pop("tensors")), "has no 'tensors'"),
    "tensors as an object": (changed(lambda f: f.update(tensors={})), "a list is needed"),
    "a tensor as text": (changed(lambda f: f["tensors"].append("x")), "an object is needed"),
    "bytes missing": (changed(lambda f: f["tensors"][0].pop("bytes")), "has no 'bytes'"),
    "bytes negative": (changed(lambda f: f["tensors"][0].update(bytes=-1)), r"0 to 2\*\*50"),
    "bytes huge": (changed(lambda f: f["tensors"][0].update(bytes=2**51)), r"0 to 2\*\*50"),
    "bytes a fraction": (changed(lambda f: f["tensors"][0].update(bytes=1.0)), "whole number"),
    "bytes text": (changed(lambda f: f["tensors"][0].update(bytes="4")), "whole number"),
    "bytes true": (changed(lambda f: f["tensors"][0].update(bytes=True)), "whole number"),
    "a strange role": (changed(lambda f: f["tensors"][0].update(role="weight")), "one of activation, input, parameter"),
    "a list as role": (changed(lambda f: f["tensors"][0].update(role=["input"])), "one of activation"),
    "a negative dimension": (changed(lambda f: f["tensors"][0].update(shape=[-1])), "a dimension of tensor 'x'"),
    "a shape that is none": (changed(lambda f: f["tensors"][0].update(shape="2x2")), "a list is needed"),
    "a dtype that is none": (changed(lambda f: f["tensors"][0].update(dtype=1)), "the dtype of tensor 'x'"),
    "a name that is none": (changed(lambda f: f["tensors"][0].update(name=1)), "a text of up to"),
    "a long name": (changed(lambda f: f["tensors"][0].update(name="n" * 5000)), "a text of up to"),
    "half a character": (changed(lambda f: f["tensors"][0].update(name="\ud800")), "half of a character"),
    "two tensors of a name": (
        changed(lambda f: f["tensors"].append({"name": "x", "bytes": 1})),
        "names a tensor twice",
    ),
    "two operators of a name": (changed(lambda f: f["operators"][0].update(name="second")), "two operators"),
    "two makers": (changed(lambda f: f["operators"][0].update(outputs=["a", "y"])), "made by two operators"),
    "a tensor twice": (changed(lambda f: f["operators"][1].update(inputs=["a", "a"])), "names a tensor twice"),
    "an unknown tensor": (changed(lambda f: f["operators"][1].update(inputs=["ghost"])), "'ghost'"),
    "an unknown output": (changed(lambda f: f.update(outputs=["ghost"])), "'ghost'"),
    "a cycle": (changed(lambda f: f["operators"][0].update(inputs=["y"])), "has a cycle; operator 'first'"),
    "an operator that reads its result": (changed(lambda f: f["operators"][0].update(inputs=["a"])), "has a cycle"),
    "no operators": (changed(lambda f: f.update(operators=[])), "has no operators"),
    "an activation that nothing makes": (
        changed(lambda f: f["tensors"][0].update(role="activation")),
        "no operator produces it",
    ),
    "an input that is made": (changed(lambda f: f["tensors"][2].update(role="input")), "has another source"),
    "an alias of nothing": (changed(lambda f: f.update(aliases={"v": "ghost"})), "alias of tensor 'ghost'"),
    "options that are none": (changed(lambda f: f.update(options=[1])), "the options of"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_form_does_not_know_is_refused_in_one_sentence(case: str) -> None:
    form, message = REFUSED[case]
    with pytest.raises(GraphError, match=message) as caught:
        graph_from_json(form)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


SMALL_TEXT = json.dumps(SMALL)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PNG", "is not JSON"),
        (SMALL_TEXT[:-20].encode(), "is not JSON"),
        (SMALL_TEXT.encode("utf-16"), "is not UTF-8"),
        (b"\xff\xfe\x00", "is not UTF-8"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": NaN').encode(), "the number NaN"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": -Infinity').encode(), "the number -Infinity"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": 1e400').encode(), "whole number"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": ' + "9" * 100).encode(), r"0 to 2\*\*50"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": ' + "9" * 10_000).encode(), "too many digits"),
        (SMALL_TEXT.replace('"bytes": 8', '"bytes": 8, "bytes": 9').encode(), "the key 'bytes' twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "graph.json"
    path.write_bytes(content)
    with pytest.raises(GraphError, match=message) as caught:
        read_graph(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="is a directory"):
        read_graph(tmp_path)
    with pytest.raises(GraphError, match="there is no file"):
        read_graph(tmp_path / "none.json")
    with pytest.raises(GraphError, match="cannot read"):
        read_graph("a\0b.json")


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(512 * 2**20 + 1)
    with pytest.raises(GraphError, match="up to 536,870,912"):
        read_graph(path)


def test_writing_leaves_nothing_half_written(tmp_path: Path) -> None:
    graph = graph_from_json(SMALL)
    with pytest.raises(RetensorError, match="is a directory"):
        write_graph(graph, tmp_path)
    odd = Graph("g", graph.operators, graph.tensors, graph.outputs, options={"x": float("nan")})
    with pytest.raises(GraphError, match="cannot be written"):
        write_graph(odd, tmp_path / "odd.json")
    assert list(tmp_path.iterdir()) == []


def test_the_published_schema_says_what_the_reader_does() -> None:
    schema = json.loads(Path(graph_json.__file__).with_name("graph.schema.json").read_text())
    assert schema["$id"] == schema["properties"]["schema"]["const"] == graph_json.SCHEMA
    tensor, operator = schema["$defs"]["tensor"], schema["$defs"]["operator"]
    for part, known in ((schema, graph_json._TOP), (tensor, graph_json._TENSOR), (operator, graph_json._OPERATOR)):
        assert set(part["properties"]) == known
        assert part["additionalProperties"] is False
    for part, form in ((schema, SMALL), (tensor, SMALL["tensors"][0]), (operator, SMALL["operators"][1])):
        assert set(part["required"]) == set(form)
    assert tuple(tensor["properties"]["role"]["enum"]) == graph_json._ROLES
    assert schema["$defs"]["count"]["maximum"] == 2**50
    assert schema["$defs"]["name"]["maxLength"] == graph_json.LONGEST_NAME


def test_sources_that_load_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="there is no file"):
        rg.load(str(tmp_path / "none.onnx"))
    with pytest.raises(GraphError, match="there is no file"):
        rg.load("none.json")
    with pytest.raises(GraphError, match="no ONNX light model 'nothing'; there are bvlc_alexnet"):
        rg.load("onnx:nothing")
    with pytest.raises(GraphError, match="is a directory"):
        rg.load(tmp_path)
    with pytest.raises(RetensorError):
        rg.load("no-such-network-anywhere")


@pytest.mark.parametrize("role", [None, "activation"])
def test_a_tensor_that_nothing_touches_is_refused_by_name(role: str | None) -> None:
    form: dict[str, Any] = {
        "schema": "retensor.graph/1",
        "name": "net",
        "tensors": [{"name": "x", "bytes": 4}, {"name": "y", "bytes": 4}, {"name": "stray", "bytes": 4}],
        "operators": [{"name": "f", "inputs": ["x"], "outputs": ["y"]}],
        "outputs": ["y"],
    }
    if role:
        form["tensors"][2]["role"] = role
    with pytest.raises(GraphError, match="'stray' is read and made by no operator and is no output"):
        graph_from_json(form)
    for kept in ("input", "parameter"):
        form["tensors"][2]["role"] = kept
        assert graph_from_json(form).tensors["stray"].role == kept
    del form["tensors"][2]["role"]
    form["outputs"].append("stray")
    assert graph_from_json(form).tensors["stray"].role == "input"


@pytest.mark.parametrize(
    "options",
    [
        {"fuse": "x"},
        {"in_place": 1},
        {"dtype": []},
        {"inputs": 5},
        {"inputs": {"x": 5}},
        {"inputs": {"x": [1.5]}},
        {"other": 10**30},
        {"other": 1e300},
        {"other": {1, 2}},
        {"deep": [[[[[[[[[[]]]]]]]]]]},
    ],
    ids=str,
)
def test_options_that_no_plan_could_repeat_are_refused(options):
    form = {
        "schema": "retensor.graph/1",
        "name": "b",
        "tensors": [{"name": "z", "bytes": 1}],
        "operators": [{"name": "o", "inputs": [], "outputs": ["z"]}],
        "outputs": ["z"],
    }
    good = {"fuse": True, "dtype": None, "inputs": {"x": [1, 3]}, "by": {"tool": ["a", 1, None]}}
    assert graph_from_json({**form, "options": good}).options == good
    with pytest.raises(GraphError, match="options"):
        graph_from_json({**form, "options": options})


def test_a_byte_order_mark_and_endless_numbers_have_sentences_of_their_own(tmp_path):
    path = tmp_path / "g.json"
    path.write_bytes(b"\xef\xbb\xbf{}")
    with pytest.raises(GraphError, match="byte order mark"):
        read_graph(path)
    path.write_text('{"schema": ' + "9" * 10_000 + "}")
    with pytest.raises(GraphError, match="too many digits"):
        read_graph(path)
