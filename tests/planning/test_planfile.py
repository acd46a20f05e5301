"""Plan files come back as they were written; anything else is refused with a sentence."""

from __future__ import annotations

import copy
import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
from tests.planning.random_graphs import minimum_scratchpad, random_graph
from tests.planning.simple_plans import simple_plan

import retensor.planning.planfile as planfile
from retensor import jsonfile
from retensor.errors import PlanError, RetensorError
from retensor.planning.plan import Plan, Residency, Transfer
from retensor.planning.planfile import plan_from_json, plan_to_json, read_plan, write_plan

SCHEMA_FILE = Path(planfile.__file__).with_name("plan.schema.json")


def some_plan(seed: int = 3) -> Plan:
    rng = random.Random(seed)
    graph = random_graph(rng)
    return simple_plan(graph, minimum_scratchpad(graph, 1, True), 1, True, rng)


def test_a_plan_comes_back_exactly(tmp_path: Path) -> None:
    for seed in range(100):
        plan = some_plan(seed)
        write_plan(plan, tmp_path / "plan.json")
        assert read_plan(tmp_path / "plan.json") == plan
        assert plan_from_json(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_names_in_any_script_and_options_come_back(tmp_path: Path) -> None:
    options = {
        "fuse": False,
        "dtype": "int8",
        "inputs": {"入力/0": [1, 3, 224, 224]},
        "other": [1.5, None, {"a": True}],
    }
    plan = Plan(
        graph_name='Ω "quoted" \\ \n',
        graph_digest="ab" * 32,
        scratchpad_bytes=2**60,
        alignment=2**30,
        parameters=True,
        order=("/conv/1", "Ω"),
        residencies=(Residency("é\u2028", 0, 2, 2**30),),
        transfers=(Transfer("é\u2028", "load", 0, 2**60), Transfer("é\u2028", "load", 1, 2**60)),
        bound_bytes=0,
        solver="none",
        seconds=0.1 + 0.2,
        fixed_order=True,
        graph_options=options,
    )
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    (tmp_path / "plan.json").read_bytes().decode("ascii")


def test_an_empty_plan_is_valid_json(tmp_path: Path) -> None:
    plan = Plan("none", "0" * 64, 1, 1, False, (), (), (), 0, "", 0.0)
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan


def set_at(data: Any, path: str, value: Any) -> Any:
    """A copy of ``data`` with the value at a dotted path replaced; ``...`` removes it."""
    data = copy.deepcopy(data)
    *parents, last = path.split(".")
    place = data
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return data


BROKEN = [
    ("schema", ..., "it has no 'schema' field"),
    ("schema", "retensor.plan/2", 'schema is "retensor.plan/2"; this version reads "retensor.plan/1"'),
    ("schema", 1, "schema is a whole number"),
    ("solver", ..., "the plan has no field 'solver'"),
    ("extra", 1, 'unknown field "extra"'),
    ("graph", [], "graph is an object, not a list"),
    ("graph.name", None, "graph.name is a string, not null"),
    ("graph.name", "\ud800", "graph.name holds half of a surrogate pair"),
    ("graph.digest", "xyz", "graph.digest is 64 hexadecimal digits"),
    ("graph.digest", "A" * 64, "graph.digest is 64 hexadecimal digits"),
    ("graph.options", [], "graph.options is an object"),
    ("graph.options.fuse", 1, "graph.options.fuse is true or false, not a whole number"),
    ("graph.options.in_place", "no", "graph.options.in_place is true or false, not a string"),
    ("graph.options.dtype", 8, "graph.options.dtype is a string"),
    ("graph.options.inputs", [1], "graph.options.inputs is an object of shapes"),
    ("graph.options.inputs", {"x": 3}, 'graph.options.inputs["x"] is a list, not a whole number'),
    ("graph.options.inputs", {"x": [True]}, 'graph.options.inputs["x"][0] is a whole number, not true or false'),
    ("graph.options.more", 2**61, "graph.options.more is out of range"),
    ("graph.options.more", [[[[[[[[[]]]]]]]]], "nested too deeply"),
    ("accelerator.scratchpad_bytes", 0, "accelerator.scratchpad_bytes is out of range; 1 to"),
    ("accelerator.scratchpad_bytes", 2**60 + 1, "accelerator.scratchpad_bytes is out of range"),
    ("accelerator.scratchpad_bytes", 10**4000, "accelerator.scratchpad_bytes is out of range"),
    ("accelerator.scratchpad_bytes", True, "accelerator.scratchpad_bytes is a whole number, not true or false"),
    ("accelerator.scratchpad_bytes", 8.0, "accelerator.scratchpad_bytes is a whole number, not a number with a frac"),
    ("accelerator.alignment", 0, "accelerator.alignment is out of range"),
    ("accelerator.speed", 0, 'accelerator has an unknown field "speed"'),
    ("parameters", 0, "parameters is true or false, not a whole number"),
    ("fixed_order", None, "fixed_order is true or false, not null"),
    ("order", "abc", "order is a list, not a string"),
    ("order.0", 5, "order[0] is a string, not a whole number"),
    ("residencies", {}, "residencies is a list, not an object"),
    ("residencies.1", [], "residencies[1] is an object, not a list"),
    ("residencies.1.from", ..., "residencies[1] has no field 'from'"),
    ("residencies.1.from", -1, "residencies[1].from is out of range"),
    ("residencies.1.to", "2", "residencies[1].to is a whole number, not a string"),
    ("residencies.1.address", 1.0, "residencies[1].address is a whole number"),
    ("residencies.1.size", 1, 'residencies[1] has an unknown field "size"'),
    ("transfers.0.kind", "steal", 'transfers[0].kind is one of load, store, spill, retrieve, not "steal"'),
    ("transfers.0.kind", ["load"], "transfers[0].kind is one of"),
    ("transfers.0.step", False, "transfers[0].step is a whole number, not true or false"),
    ("transfers.0.bytes", -4, "transfers[0].bytes is out of range"),
    ("compulsory_bytes", 10**6, "compulsory_bytes is 1,000,000, but the transfers add up to"),
    ("non_compulsory_bytes", 10**6, "non_compulsory_bytes is 1,000,000, but the transfers add up to"),
    ("non_compulsory_bytes", None, "non_compulsory_bytes is a whole number, not null"),
    ("bound_bytes", -1, "bound_bytes is out of range"),
    ("bound_bytes", 0, "but bound and transfers say"),
    ("status", "feasible", 'status is "feasible", but bound and transfers say "optimal"'),
    ("status", {}, "status is an object"),
    ("gap", 0.5, "gap is 0.5, but bound and transfers say 0"),
    ("gap", "0", "gap is a number, not a string"),
    ("gap", float("nan"), "gap is a finite number"),
    ("seconds", float("inf"), "seconds is a finite number"),
    ("seconds", -1, "seconds is a finite number, at least 0, not -1"),
    ("seconds", 10**400, "seconds is out of range"),
    ("solver", ["x"], "solver is a string, not a list"),
]


def proved() -> dict[str, Any]:
    """A plan with evictions whose bound meets its traffic."""
    for seed in range(100):
        plan = some_plan(seed)
        if plan.non_compulsory_bytes and len(plan.residencies) > 2:
            plan = Plan(**{**plan.__dict__, "bound_bytes": plan.non_compulsory_bytes})
            return plan_to_json(plan)
    raise AssertionError("no plan with evictions among 100")


@pytest.mark.parametrize(("path", "value", "sentence"), BROKEN, ids=lambda value: str(value)[:40])
def test_each_wrong_field_is_named(path: str, value: Any, sentence: str) -> None:
    data = proved()
    plan_from_json(data)
    with pytest.raises(PlanError) as caught:
        plan_from_json(set_at(data, path, value))
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("data", [None, [], "plan", 1, True, {}, {"schema": "retensor.graph/1"}])
def test_what_is_no_plan_is_refused(data: object) -> None:
    with pytest.raises(PlanError):
        plan_from_json(data)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\t", "is empty"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"{", "is not JSON"),
        (b"{}", "it has no 'schema' field"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b'{"schema": NaN}', "the number NaN"),
        (b'{"schema": -Infinity}', "the number -Infinity"),
        (b'{"schema": 1, "schema": 2}', "the key 'schema' twice"),
        (b'{"schema": ' + b"9" * 10_000 + b"}", "too many digits"),
        (b"\x80\x04K\x01.", "not UTF-8"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    assert sentence in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_a_directory_and_a_pipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="there is no file"):
        read_plan(tmp_path / "none.json")
    with pytest.raises(PlanError, match="is a directory"):
        read_plan(tmp_path)
    with pytest.raises(PlanError, match="cannot read"):
        read_plan("with\0null")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PlanError, match="not a regular file"):
        read_plan(tmp_path / "pipe")


def test_a_file_over_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonfile, "LARGEST_FILE", 100)
    (tmp_path / "plan.json").write_text(json.dumps(proved()))
    with pytest.raises(PlanError, match="a plan file has up to 100"):
        read_plan(tmp_path / "plan.json")


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    plan = some_plan()
    path = tmp_path / "plan.json"
    changes = [{"seconds": float("nan")}, {"solver": "\udc80"}, {"graph_options": {"x": {1, 2}}}, {"bound_bytes": -1}]
    for change in changes:
        with pytest.raises(PlanError):
            write_plan(Plan(**{**plan.__dict__, **change}), path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RetensorError, match="is a directory"):
        write_plan(plan, tmp_path)


def test_the_published_schema_says_what_the_reader_checks() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    data = proved()

    def agree(part: dict[str, Any], value: Any, where: str) -> None:
        if "$ref" in part:
            part = {**part, **schema["$defs"][part["$ref"].rsplit("/", 1)[1]]}
        if "const" in part:
            assert value == part["const"], where
        if "enum" in part:
            assert value in part["enum"], where
        kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
        kind = part.get("type")
        if isinstance(kind, str):
            assert isinstance(value, kinds[kind]), where
        if isinstance(value, dict):
            # Options are open; everything else is closed and complete.
            if where != "plan.graph.options":
                assert part["additionalProperties"] is False, where
                assert sorted(part["required"]) == sorted(part["properties"]) == sorted(value), where
                for name in value:
                    agree(part["properties"][name], value[name], f"{where}.{name}")
        elif isinstance(value, list):
            for item in value:
                agree(part["items"], item, f"{where}[]")

    agree(schema, data, "plan")
    assert schema["$id"] == planfile.SCHEMA
    assert schema["properties"]["transfers"]["items"]["properties"]["kind"]["enum"] == list(planfile._KINDS)
    assert schema["$defs"]["count"]["maximum"] == planfile.LARGEST_INT
    assert schema["$defs"]["total"]["maximum"] == planfile.LARGEST_SUM
    assert schema["properties"]["accelerator"]["properties"]["alignment"]["maximum"] == planfile.LARGEST_ALIGNMENT


def test_twenty_thousand_operators_are_written_and_read_within_seconds(tmp_path: Path) -> None:
    count = 20_000
    stays = tuple(Residency(f"tensor_{i // 3}", i, i + 2, 64 * i) for i in range(3 * count))
    moves = tuple(Transfer(f"tensor_{i // 3}", "retrieve", i, i) for i in range(3 * count))
    order = tuple(f"operator_{i}" for i in range(count))
    plan = Plan("big", "0" * 64, 2**40, 64, False, order, stays, moves, 0, "none", 1.0)
    begin = time.process_time()
    write_plan(plan, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == plan
    assert time.process_time() - begin < 10
