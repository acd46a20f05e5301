"""Whatever a plan file holds, reading it gives a plan or a RetensorError, and so does verifying what was read."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.planning.random_graphs import minimum_scratchpad, random_graph
from tests.planning.simple_plans import second_opinion, simple_plan

from retensor.errors import PlanError, RetensorError
from retensor.graph.structure import Graph
from retensor.planning.plan import Plan
from retensor.planning.planfile import plan_from_json, plan_to_json, read_plan, write_plan
from retensor.planning.verify import verify


def some_plans(count: int) -> list[tuple[Graph, Plan]]:
    """Graphs with a plan each, evictions and parameters among them."""
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        graph = random_graph(rng)
        found.append((graph, simple_plan(graph, minimum_scratchpad(graph, 2, True), 2, True, rng)))
    return found


PLANS = some_plans(40)
TOKENS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"-", b"0", b"1e999", b"NaN", b"true", b"null", b"\xff", b"\\ud800"]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, dropped, doubled, swapped, cut or replaced by what JSON trips over."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        if not data:
            break
        at = rng.randrange(len(data))
        end = min(len(data), at + rng.choice([1, 2, 8, 64]))
        match rng.randrange(7):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.choice(TOKENS)
            case 4:
                other = rng.randrange(len(data))
                data[at], data[other] = data[other], data[at]
            case 5 if rng.random() < 0.2:
                del data[at:]
            case _:
                # A digit for a digit keeps the file well-formed, so that the values are tested too.
                digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
                if digits:
                    data[rng.choice(digits)] = rng.randrange(48, 58)
    return bytes(data)


def outcome(graph: Graph, read: Any) -> str:
    """What became of a case; anything but a RetensorError passes through and fails the test."""
    try:
        plan = read()
    except RetensorError as error:
        return "refused" if len(str(error)) < 2000 else "endless message"
    try:
        counted = verify(graph, plan)
    except PlanError:
        return "not valid"
    # What passes both must be a plan in the eyes of the slow second opinion too.
    small = plan.scratchpad_bytes <= 10_000
    agreed = not small or second_opinion(graph, plan) == (counted.compulsory_bytes, counted.non_compulsory_bytes)
    return "valid" if agreed else "disagreement"


def test_mutated_bytes_of_real_plan_files_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    contents = []
    for graph, plan in PLANS:
        write_plan(plan, path)
        contents.append((graph, path.read_bytes()))
    outcomes = Counter[str]()
    slowest = 0.0
    for seed in range(6000):
        rng = random.Random(seed)
        graph, content = rng.choice(contents)
        path.write_bytes(mutated(content, rng))
        begin = time.process_time()
        outcomes[outcome(graph, lambda: read_plan(path))] += 1
        slowest = max(slowest, time.process_time() - begin)
    assert set(outcomes) == {"refused", "not valid", "valid"}, outcomes
    assert min(outcomes.values()) > 100, outcomes
    assert slowest < 5


def paths_of(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of every value inside ``data``."""
    items: list[tuple[Any, Any]] = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    found = [path] if path else []
    for key, value in items:
        found += paths_of(value, (*path, key))
    return found


INTERESTING = st.sampled_from(
    (
        *(0, 1, -1, 2, 3, 2**31, 2**60, 2**60 + 1, 2**64, 10**400, 0.0, -0.0, 1.5, 1e308, float("inf"), float("nan")),
        *("", "x0", "t0_0", "o0", "load", "store", "spill", "retrieve", "optimal", "feasible", "retensor.plan/1"),
        *("\ud800", True, False, None, [], {}),
    )
)
JSON_VALUES = st.recursive(
    INTERESTING | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.data())
def test_structured_changes_of_plans_are_read_or_refused(data: st.DataObject) -> None:
    graph, plan = data.draw(st.sampled_from(PLANS))
    document = json.loads(json.dumps(plan_to_json(plan)))
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths_of(document)))
        place = document
        for key in parents:
            place = place[key]
        if data.draw(st.booleans()) and isinstance(place[last], int):
            place[last] += data.draw(st.integers(-2, 2))
        elif data.draw(st.integers(0, 4)) == 0:
            del place[last]
        else:
            place[last] = data.draw(JSON_VALUES)
        if not document:
            break
    assert outcome(graph, lambda: plan_from_json(document)) in ("refused", "not valid", "valid")


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(JSON_VALUES)
def test_any_json_is_read_or_refused(value: Any) -> None:
    graph, _ = PLANS[0]
    assert outcome(graph, lambda: plan_from_json(value)) == "refused"
    assert outcome(graph, lambda: plan_from_json({"schema": "retensor.plan/1", "graph": value})) == "refused"
