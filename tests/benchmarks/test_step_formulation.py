"""The paper's own (tensor x step) program reaches the planner's optimum, with both solvers, and its plans replay."""

from __future__ import annotations

import random

import pytest
from benchmarks.peers.step_formulation import PeerResult, Solver, solve
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_budget, random_graph

from retensor.errors import InfeasibleError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import Accelerator, plan, verify

SOLVERS: tuple[Solver, ...] = ("highs", "cp-sat")
GRAPHS = 480
CHUNK = 60


def ladder(steps: int) -> Graph:
    """A line of operators whose results are all read again, in reverse: evictions, moves and few orders."""
    tensors = [Tensor("x", 3, "input"), *(Tensor(f"t{i}", 2 + i % 3) for i in range(2 * steps))]
    operators = [Operator(f"o{i}", "Op", (f"t{i - 1}" if i else "x",), (f"t{i}",)) for i in range(steps)]
    operators += [
        Operator(f"o{i}", "Op", (f"t{i - 1}", f"t{2 * steps - 1 - i}" if i > steps else "x"), (f"t{i}",))
        for i in range(steps, 2 * steps)
    ]
    return Graph("ladder", operators, tensors, [f"t{2 * steps - 1}"])


@pytest.mark.parametrize("first", range(0, GRAPHS, CHUNK))
def test_both_solvers_reach_the_planners_optimum(first: int) -> None:
    evicting = infeasible = 0
    for seed in range(first, first + CHUNK):
        rng = random.Random(seed)
        parameters = rng.random() < 0.5
        graph = random_graph(rng, 6)
        scratchpad, alignment = random_budget(graph, rng, parameters)
        try:
            ours = plan(graph, Accelerator(scratchpad, alignment=alignment), parameters=parameters, workers=1)
        except InfeasibleError:
            infeasible += 1
            least = None
        else:
            assert ours.status == "optimal"
            least = ours.non_compulsory_bytes
            evicting += least > 0
        for solver in SOLVERS:
            peer = solve(graph, scratchpad, parameters=parameters, alignment=alignment, threads=1, solver=solver)
            if least is None:
                assert (peer.status, peer.objective_bytes) == ("infeasible", None), f"seed {seed}, {solver}"
                continue
            found = (peer.status, peer.objective_bytes, peer.bound_bytes)
            assert found == ("optimal", least, least), f"seed {seed}, {solver}"
            assert peer.plan is not None
            assert verify(graph, peer.plan).non_compulsory_bytes == least
    # The sample must hold what the test is about.
    assert evicting >= CHUNK // 20
    assert infeasible >= 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_bytes_that_fit_without_addresses_that_do_are_not_free(solver: Solver) -> None:
    """What lives at any step takes four bytes, but no addresses in four bytes hold all of it without a move."""
    lives = [(0, 1, 4), (1, 2, 2), (1, 3, 2), (2, 4, 1), (2, 6, 1), (3, 5, 1), (3, 6, 1)]
    lives += [(4, 5, 1), (5, 7, 2), (6, 7, 2), (7, 8, 1), (7, 8, 3)]
    operators = []
    for step in range(8):
        reads = tuple(f"t{k}" for k, (start, end, _) in enumerate(lives) if start < step == end - 1)
        writes = tuple(f"t{k}" for k, (start, _, _) in enumerate(lives) if start == step)
        order = (f"order{step - 1}",) if step else ()
        operators.append(Operator(f"o{step}", "Op", order + reads, (f"order{step}", *writes)))
    tensors = [Tensor(f"order{step}", 0) for step in range(8)]
    tensors += [Tensor(f"t{k}", size) for k, (_, _, size) in enumerate(lives)]
    graph = Graph("fragmented", operators, tensors, ["t10", "t11"])
    ours = plan(graph, Accelerator(4), workers=1)
    peer = solve(graph, 4, threads=1, solver=solver)
    assert ours.non_compulsory_bytes > 0
    assert (peer.status, peer.objective_bytes) == ("optimal", ours.non_compulsory_bytes)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_larger_scratchpad_costs_no_more_until_nothing(solver: Solver) -> None:
    graph = ladder(4)
    least = max(sum(graph.tensors[name].nbytes for name in o.inputs + o.outputs) for o in graph.operators)
    results = [solve(graph, least + more, threads=1, solver=solver) for more in (-1, 0, 1, 2, 4, 100)]
    assert results[0].status == "infeasible"
    assert {result.status for result in results[1:]} == {"optimal"}
    costs = [result.objective_bytes for result in results[1:] if result.objective_bytes is not None]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] > costs[-1] == 0


@pytest.mark.parametrize("solver", SOLVERS)
def test_out_of_time_still_tells_a_sound_bound(solver: Solver) -> None:
    # Thousands of rows, which no machine solves in a hundredth of a second.
    graph = layered_graph(random.Random(3), operators=40, width=5)
    best = plan(graph, Accelerator("M_R"), workers=1, time_limit=2.0)
    peer: PeerResult = solve(graph, best.scratchpad_bytes, time_limit=0.01, threads=1, solver=solver)
    assert peer.bound_bytes <= best.non_compulsory_bytes
    assert peer.status in ("unknown", "feasible")
    assert (peer.objective_bytes is None) == (peer.status == "unknown")
    if peer.objective_bytes is not None:
        assert peer.objective_bytes >= best.bound_bytes


def test_steps_out_of_reach_have_no_columns() -> None:
    """In a line of operators each has one step: no tensor ever meets one that is not its neighbour."""
    tensors = [Tensor("x", 1, "input"), *(Tensor(f"t{i}", 1) for i in range(50))]
    operators = [Operator(f"o{i}", "Op", (f"t{i - 1}" if i else "x",), (f"t{i}",)) for i in range(50)]
    line = solve(Graph("line", operators, tensors, ["t49"]), 2, threads=1)
    # One create an operator, and a handful of columns a tensor, whatever the number of steps.
    assert (line.status, line.objective_bytes) == ("optimal", 0)
    assert line.columns < 12 * 50


def test_an_unknown_solver_is_refused() -> None:
    with pytest.raises(ValueError, match="'highs' or 'cp-sat'"):
        solve(ladder(1), 100, solver="gurobi")  # type: ignore[arg-type]
