"""The schedulers that least peaks are measured against: their orders run, and what is exact among them is exact."""

from __future__ import annotations

import random

import pytest
from benchmarks.peers.hmcos import OutOfTimeError, hmcos, is_concatenation
from benchmarks.peers.memory_aware_sort import (
    breadth_first,
    depth_first,
    extra_users_first,
    inductor,
    least_peak_first,
    list_schedule,
    post_order,
    xla,
)
from benchmarks.peers.model_formulation import Solver, model
from benchmarks.peers.network import Network
from benchmarks.random_cells import celled_graph
from benchmarks.randwire import NEIGHBOURS, NODES, randwire, watts_strogatz
from tests.planning.brute_force import min_peak
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_graph

from retensor.graph import Graph, Operator, Tensor
from retensor.planning import bounds
from retensor.planning.peak import peak_of
from retensor.planning.problem import build_problem

SORTS = (
    least_peak_first, breadth_first, depth_first, inductor, list_schedule, extra_users_first, post_order, xla,
)  # fmt: skip


def graphs(count: int) -> list[Graph]:
    rngs = [random.Random(seed) for seed in range(count)]
    return [
        random_graph(rng) if seed % 2 else layered_graph(rng, operators=rng.randint(5, 11), width=3)
        for seed, rng in enumerate(rngs)
    ]


def test_the_recount_is_the_planners_peak_and_refuses_orders_that_do_not_run() -> None:
    for graph in graphs(200):
        network = Network(graph)
        program = tuple(range(network.n))
        assert network.peak(program) == peak_of(build_problem(graph, False, 1), program)
    network = Network(celled_graph(random.Random(0), 2))
    with pytest.raises(ValueError, match="before"):
        network.peak(tuple(reversed(range(network.n))))
    with pytest.raises(ValueError, match="different operators"):
        network.peak((0, *range(network.n - 1)))


@pytest.mark.parametrize("sort", SORTS)
def test_a_sorts_order_runs_and_is_never_below_the_optimum(sort: object) -> None:
    above = 0
    for graph in graphs(200):
        network = Network(graph)
        peak = network.peak(sort(network))  # type: ignore[operator]
        assert peak >= min_peak(graph)
        above += peak > min_peak(graph)
    # None of them is exact.
    assert above > 0


def test_what_compilers_keep_is_the_best_of_what_they_try() -> None:
    for graph in graphs(100):
        network = Network(graph)
        tried = (tuple(range(network.n)), *(f(network) for f in (least_peak_first, breadth_first, depth_first)))
        assert network.peak(inductor(network)) == min(map(network.peak, tried))
        tried = tuple(f(network) for f in (list_schedule, extra_users_first, post_order))
        assert network.peak(xla(network)) == min(map(network.peak, tried))


def test_the_list_schedule_of_the_drawing_in_xlas_source_is_the_one_that_it_names() -> None:
    sizes = {"A": 1, "B": 2, "C": 1, "D": 1, "E": 1, "F": 2, "G": 0}
    reads = {"A": "", "B": "A", "C": "B", "D": "A", "E": "A", "F": "DE", "G": "CF"}
    operators = [Operator(name, "Op", tuple(reads[name]), (name,)) for name in "ABCDEFG"]
    network = Network(Graph("drawing", operators, [Tensor(name, size) for name, size in sizes.items()], ["G"]))
    assert "".join("ABCDEFG"[o] for o in list_schedule(network)) == "ADEFBCG"


def test_hmcos_orders_run_are_never_below_the_optimum_and_mostly_reach_it_on_cells() -> None:
    reached = 0
    for seed in range(60):
        network = Network(celled_graph(random.Random(seed), 2 + seed % 4))
        result = hmcos(network)
        assert result.finished
        best = bounds(network.graph).m_p
        assert network.peak(result.order) >= best
        reached += network.peak(result.order) == best
    assert reached > 30
    for graph in graphs(200):
        network = Network(graph)
        assert network.peak(hmcos(network).order) >= min_peak(graph)


def test_hmcos_without_cells_is_exact_up_to_its_joined_sequences() -> None:
    """Dynamic programming over all sets of ready vertices: exact where no chain is joined into a sequence."""
    exact = 0
    for seed in range(120):
        graph = layered_graph(random.Random(seed), operators=9, width=3)
        network = Network(graph)
        result = hmcos(network, is_cell_output=lambda kind: False)
        assert result.rounds == 1
        exact += network.peak(result.order) == min_peak(graph)
    assert exact > 100


def test_hmcos_says_when_it_has_no_schedule_in_time() -> None:
    with pytest.raises(OutOfTimeError):
        hmcos(Network(randwire(0)), time_limit=0.0)


def test_a_cell_ends_where_an_operator_concatenates_first() -> None:
    assert is_concatenation("Concat")
    assert is_concatenation("aten.cat.default+aten.relu.default")
    assert not is_concatenation("aten.conv2d.default+aten.cat.default")
    assert not is_concatenation("aten.add.Tensor")


@pytest.mark.parametrize("solver", ["highs", "cp-sat"])
def test_models_optimum_is_the_brute_forces_and_ours(solver: Solver) -> None:
    improved = 0
    for index, graph in enumerate(graphs(60)):
        network = Network(graph)
        result = model(network, solver=solver, threads=1)
        best = min_peak(graph)
        assert result.status == "optimal"
        assert (network.peak(result.order), result.bound) == (best, best), f"graph {index}"
        assert bounds(graph).m_p == best
        improved += best < network.peak(range(network.n))
    assert improved > 5


@pytest.mark.parametrize("solver", ["highs", "cp-sat"])
def test_out_of_time_model_keeps_the_programs_order_and_a_bound_below(solver: Solver) -> None:
    graph = layered_graph(random.Random(3), operators=60, width=6)
    network = Network(graph)
    result = model(network, solver=solver, time_limit=0.01, threads=1)
    assert result.bound <= bounds(graph).m_p <= network.peak(result.order) <= network.peak(range(network.n))


def test_a_program_too_large_to_build_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.peers.model_formulation.MOST_COLUMNS", 10)
    network = Network(layered_graph(random.Random(3), operators=20))
    result = model(network)
    assert (result.status, result.order) == ("too large", tuple(range(network.n)))


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="'highs' or 'cp-sat'"):
        model(Network(random_graph(random.Random(0))), solver="gurobi")  # type: ignore[arg-type]


def test_a_randomly_wired_network_has_the_papers_graph_and_differs_by_seed_only() -> None:
    rows = watts_strogatz(random.Random(1))
    assert sum(map(len, rows)) == NODES * NEIGHBOURS // 2
    assert all(i < node for node, row in enumerate(rows) for i in row)
    assert randwire(1).digest == randwire(1).digest != randwire(2).digest
    found = bounds(randwire(1))
    assert found.m_r < found.m_p == found.m_p_bound
