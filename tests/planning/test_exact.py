"""The planner against a brute force, and what it promises of its bounds, limits and arguments."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.planning.brute_force import min_peak, optimum
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_budget, random_graph

from retensor.errors import InfeasibleError, PlanError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import BASELINES, Accelerator, Plan, Progress, baseline, bounds, plan, verify
from retensor.planning.progress import Clock, stop_on_interrupt

ROOT = Path(__file__).parents[2]
GRAPHS = 2_400
CHUNK = 200


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, GRAPHS, CHUNK))
def test_the_optimum_is_that_of_a_brute_force(first: int) -> None:
    """All orders, evictions and placements of random graphs of up to eight operators."""
    evicting = infeasible = 0
    for seed in range(first, first + CHUNK):
        rng = random.Random(seed)
        graph = random_graph(rng)
        scratchpad, alignment = random_budget(graph, rng)
        accelerator = Accelerator(scratchpad, alignment=alignment)
        parameters = rng.random() < 0.5
        least = optimum(graph, scratchpad, alignment, parameters)
        found = bounds(graph, parameters=parameters)
        assert found.m_p == found.m_p_bound == max(found.m_r, min_peak(graph, parameters)), f"seed {seed}"
        if least is None:
            infeasible += 1
            with pytest.raises(InfeasibleError):
                plan(graph, accelerator, parameters=parameters)
            continue
        ours = plan(graph, accelerator, parameters=parameters)
        assert (ours.non_compulsory_bytes, ours.status) == (least, "optimal"), f"seed {seed}"
        assert verify(graph, ours).non_compulsory_bytes == least
        evicting += least > 0
        for schedule, replacement in BASELINES:
            theirs = baseline(graph, accelerator, schedule=schedule, replacement=replacement, parameters=parameters)
            assert verify(graph, theirs).non_compulsory_bytes >= least
    # The sample must hold what the test is about.
    assert evicting >= CHUNK // 10
    assert infeasible >= CHUNK // 20


@pytest.mark.parametrize("first", range(0, 300, 100))
def test_a_given_order_is_never_better_than_a_free_one_and_some_order_is_as_good(first: int) -> None:
    for seed in range(first, first + 100):
        rng = random.Random(seed)
        graph = random_graph(rng)
        accelerator = Accelerator("M_R")
        free = plan(graph, accelerator)
        default = plan(graph, accelerator, order="default")
        # Empty tensors from each operator to the next leave one order only: the brute force of that order.
        links = [Tensor(f"link{i}", 0) for i in range(len(graph.operators) - 1)]
        chained = [
            Operator(
                o.name,
                o.kind,
                o.inputs + ((f"link{i - 1}",) if i else ()),
                o.outputs + ((f"link{i}",) if i < len(links) else ()),
            )
            for i, o in enumerate(graph.operators)
        ]
        forced = Graph(graph.name, chained, [*graph.tensors.values(), *links], graph.outputs)
        assert default.non_compulsory_bytes == optimum(forced, default.scratchpad_bytes)
        same = plan(graph, accelerator, order=free.order)
        assert default.fixed_order
        assert default.status == same.status == "optimal"
        assert default.order == tuple(operator.name for operator in graph.operators)
        assert default.non_compulsory_bytes >= free.non_compulsory_bytes
        assert same.non_compulsory_bytes == free.non_compulsory_bytes
        assert same.order == free.order
        verify(graph, default)


def test_no_traffic_at_the_least_peak_and_less_with_more_room() -> None:
    for seed in range(30):
        graph = layered_graph(random.Random(seed), operators=14)
        found = bounds(graph)
        budgets = [found.m_r, found.m_h, found.m_p]
        traffic = [plan(graph, Accelerator(b)).non_compulsory_bytes for b in budgets]
        assert traffic == sorted(traffic, reverse=True)
        # M_P counts bytes only: where its schedule does not pack, some traffic may stay.
        if traffic[-1]:
            assert plan(graph, Accelerator(found.m_p)).status == "optimal"


def test_equal_runs_give_equal_traffic_whatever_the_seed_and_workers() -> None:
    graph = layered_graph(random.Random(5), operators=16)
    plans = [plan(graph, Accelerator("M_R"), seed=seed, workers=workers) for seed, workers in [(0, 1), (1, 2), (7, 1)]]
    assert len({p.non_compulsory_bytes for p in plans}) == 1
    assert {p.status for p in plans} == {"optimal"}


def test_stopping_early_returns_a_valid_plan_with_its_gap() -> None:
    graph = layered_graph(random.Random(1), operators=400, width=12)
    started = time.monotonic()
    found = plan(graph, Accelerator("M_R"), time_limit=1.0)
    assert time.monotonic() - started < 20
    verify(graph, found)
    assert found.status == "feasible"
    assert 0 < found.gap <= 1
    assert found.bound_bytes < found.non_compulsory_bytes
    best = min(baseline(graph, Accelerator("M_R"), schedule="default", replacement=r).non_compulsory_bytes
               for r in ("belady", "greedy"))  # fmt: skip
    assert found.non_compulsory_bytes <= best


@pytest.mark.parametrize("delay", [0.02, 0.1, 0.5, 1.5, 4.0])
@pytest.mark.parametrize(("operators", "width"), [(200, 8), (400, 12)])
def test_one_ctrl_c_at_any_stage_returns_the_best_plan_so_far(operators: int, width: int, delay: float) -> None:
    """In a process of its own: the interrupt may come while anything is imported, built or solved."""
    program = f"""
import os, random, signal, threading, time
# Whoever started this may ignore Ctrl-C, as shells do in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.planning.layered import layered_graph
from retensor.planning import Accelerator, plan, verify
graph = layered_graph(random.Random(2), operators={operators}, width={width})
threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGINT)).start()
started = time.monotonic()
found = plan(graph, Accelerator("M_R"), time_limit=300.0)
print(time.monotonic() - started)
verify(graph, found)
assert found.status == "feasible" and found.bound_bytes < found.non_compulsory_bytes
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    # What is under way is finished: a solver's step, a layer, one first-fit of all blocks.
    assert float(done.stdout) < delay + 10


def test_a_second_ctrl_c_is_the_callers() -> None:
    graph = layered_graph(random.Random(2), operators=60, width=4)
    clock = Clock(60)
    with stop_on_interrupt(clock):
        os.kill(os.getpid(), signal.SIGINT)
        assert clock.stopped
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert verify(graph, plan(graph, Accelerator("M_R"), time_limit=0.2))


@pytest.mark.parametrize("limit", [0.001, 1.0, 3.0])
def test_a_time_limit_is_kept_on_wide_graphs(limit: float) -> None:
    """A star that joins again, and full layers: many ready operators, many tensors alive."""
    tensors = [Tensor("x", 100, "input"), Tensor("y", 5), *(Tensor(f"t{i}", 10 + i % 13) for i in range(400))]
    star = [Operator(f"o{i}", "F", ("x",), (f"t{i}",)) for i in range(400)]
    star.append(Operator("join", "J", tuple(f"t{i}" for i in range(400)), ("y",)))
    rows = [[f"a{k}_{i}" for i in range(15)] for k in range(12)]
    full = [Operator(name, "F", ("x",), (name,)) for name in rows[0]]
    for above, row in itertools.pairwise(rows):
        full += [Operator(name, "F", tuple(above), (name,)) for name in row]
    layers = [Tensor(name, 20 + i, "activation") for i, name in enumerate(itertools.chain(*rows))]
    for graph in (Graph("star", star, tensors, ["y"]), Graph("full", full, [tensors[0], *layers], rows[-1])):
        started = time.monotonic()
        found = plan(graph, Accelerator("M_R"), time_limit=limit)
        assert time.monotonic() - started < limit + 8
        verify(graph, found)


def test_progress_never_shows_more_than_was_proved() -> None:
    stages = set()
    for seed in [*range(60), 382, 517, 796, 929]:
        rng = random.Random(seed)
        graph = random_graph(rng)
        scratchpad, alignment = random_budget(graph, rng)
        if scratchpad < bounds(graph, parameters=True, alignment=alignment).m_r:
            continue
        seen: list[Progress] = []
        found = plan(graph, Accelerator(scratchpad, alignment=alignment), parameters=True, progress=seen.append)
        assert seen
        stages |= {p.stage for p in seen}
        assert all(p.bound is not None and 0 <= p.bound <= found.non_compulsory_bytes for p in seen), f"seed {seed}"
        assert all(p.bound <= p.incumbent for p in seen if p.bound is not None and p.incumbent is not None)
    assert {"first evictions", "evictions", "addresses"} <= stages


def _two() -> Graph:
    return Graph(
        "two",
        [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("x", "y"), ("z",))],
        [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)],
        ["z"],
    )


def test_infeasible_names_the_operator_and_the_missing_bytes() -> None:
    with pytest.raises(InfeasibleError, match=r"operator 'g' needs 9 bytes.*1 bytes are missing") as caught:
        plan(_two(), Accelerator(8))
    assert (caught.value.required_bytes, caught.value.available_bytes, caught.value.operator) == (9, 8, "g")


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (["g", "f"], "runs 'g' before 'f'"),
        (["f"], "each operator once"),
        (["f", "g", "g"], "each operator once"),
        (["f", "h"], "'h' is no operator"),
    ],
)
def test_an_order_that_does_not_run_is_refused(order: list[str], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        plan(_two(), Accelerator(9), order=order)


@pytest.mark.parametrize("budget", [0, -1, 2**60, "0", "-3MiB", "2 parsecs", "", "M_X", "nan"])
def test_absurd_budgets_are_refused(budget: int | str) -> None:
    with pytest.raises(ValueError):
        Accelerator(budget)


@pytest.mark.parametrize("alignment", [0, -4, 2**40])
def test_absurd_alignments_are_refused(alignment: int) -> None:
    with pytest.raises(ValueError, match="alignment"):
        Accelerator(9, alignment=alignment)


@pytest.mark.parametrize(
    ("word", "value", "error"),
    [
        ("time_limit", 0, ValueError),
        ("time_limit", -1.0, ValueError),
        ("time_limit", float("nan"), ValueError),
        ("time_limit", "5", TypeError),
        ("time_limit", None, TypeError),
        ("time_limit", 10**400, ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**31, ValueError),
        ("seed", 0.5, TypeError),
        ("workers", 0, ValueError),
        ("workers", 2000, ValueError),
        ("workers", "a", TypeError),
        ("order", "mpmf", ValueError),
    ],
)
def test_absurd_arguments_are_refused_by_name(word: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{word} is"):
        plan(_two(), Accelerator(9), **{word: value})


def test_arguments_of_other_types_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match=r"^graph is a Graph"):
        plan("model.onnx", Accelerator(9))
    with pytest.raises(TypeError, match=r"^accelerator is an Accelerator"):
        plan(_two(), "300KB")
    with pytest.raises(TypeError, match=r"^graph is a Graph"):
        bounds(None)
    with pytest.raises(ValueError, match=r"^alignment is"):
        bounds(_two(), alignment=0)


def test_relative_budgets_are_worked_out_for_the_graph() -> None:
    graph = layered_graph(random.Random(4), operators=20)
    found = bounds(graph)
    for text, size in [("M_R", found.m_r), ("M_P", found.m_p), ("M_H", found.m_h), ("1.5*M_R", found.m_r * 3 // 2)]:
        made: Plan = plan(graph, Accelerator(text))
        assert made.scratchpad_bytes == size
