"""The planner against a brute force, and what it promises of its bounds, limits and arguments."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from tests.planning.brute_force import min_peak, optimum
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_budget, random_graph

from retensor.errors import InfeasibleError, PlanError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import BASELINES, Accelerator, Plan, baseline, bounds, plan, verify

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


def test_ctrl_c_returns_the_best_plan_so_far() -> None:
    graph = layered_graph(random.Random(2), operators=400, width=12)
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    started = time.monotonic()
    try:
        found = plan(graph, Accelerator("M_R"), time_limit=300.0)
    finally:
        timer.cancel()
    assert time.monotonic() - started < 60
    verify(graph, found)
    assert found.status == "feasible"


def test_progress_tells_incumbent_and_bound() -> None:
    graph = layered_graph(random.Random(3), operators=18, width=4)
    seen = []
    found = plan(graph, Accelerator("M_R"), progress=seen.append)
    assert seen
    assert seen[-1].done == seen[-1].total
    assert all(p.bound <= p.incumbent for p in seen if p.bound is not None and p.incumbent is not None)
    assert all(p.bound is None or p.bound <= found.non_compulsory_bytes for p in seen)


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


@pytest.mark.parametrize("limit", [0, -1.0, float("nan")])
def test_absurd_time_limits_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="time_limit"):
        plan(_two(), Accelerator(9), time_limit=limit)


def test_relative_budgets_are_worked_out_for_the_graph() -> None:
    graph = layered_graph(random.Random(4), operators=20)
    found = bounds(graph)
    for text, size in [("M_R", found.m_r), ("M_P", found.m_p), ("M_H", found.m_h), ("1.5*M_R", found.m_r * 3 // 2)]:
        made: Plan = plan(graph, Accelerator(text))
        assert made.scratchpad_bytes == size
