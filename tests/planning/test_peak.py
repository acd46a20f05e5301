"""The least peak is that of a table over all sets of operators, however the search came by it."""

from __future__ import annotations

import functools
import os
import random
from itertools import combinations

import pytest
from tests.planning.brute_force import min_peak
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_graph

from retensor.graph import Graph, Operator, Tensor
from retensor.planning import Accelerator, bounds, peak, plan, valleys
from retensor.planning.late import postpone
from retensor.planning.peak import least_peak, peak_of
from retensor.planning.problem import Problem, bits, build_problem, split
from retensor.planning.progress import Clock
from retensor.planning.solver import cp_model
from retensor.planning.tasks import BoundsTask
from retensor.planning.valleys import Climber, Footprint

EVERYTHING = 10**9


def hilly_graph(rng: random.Random, operators: int) -> Graph:
    """Operators that read one to three of the last few results, whose sizes go far up and down, and some inputs."""
    inputs = [Tensor(f"x{i}", rng.randint(1, 20), "input") for i in range(rng.randint(1, 3))]
    tensors, made = list(inputs), [t.name for t in inputs]
    nodes = []
    for o in range(operators):
        reads = rng.sample(made[-rng.randint(2, 7) :], min(len(made), rng.choice([1, 1, 2, 2, 3]), 2))
        writes = [f"t{o}_{k}" for k in range(rng.choice([1, 1, 1, 2]))]
        tensors += [Tensor(name, rng.choice([1, 2, 3, 5, 10, 30])) for name in writes]
        nodes.append(Operator(f"o{o}", "Op", tuple(reads), tuple(writes)))
        made += writes
    read = {name for node in nodes for name in node.inputs}
    return Graph("hilly", nodes, tensors, [name for node in nodes for name in node.outputs if name not in read])


def graphs(count: int, operators: int) -> list[Graph]:
    """As many of each kind: small ones with everything, layered ones, hilly ones."""
    found = []
    for seed in range(count):
        rng = random.Random(seed)
        match seed % 3:
            case 0:
                found.append(random_graph(rng, 8))
            case 1:
                found.append(layered_graph(rng, operators=rng.randint(6, operators), width=rng.randint(2, 5)))
            case _:
                found.append(hilly_graph(rng, rng.randint(6, operators)))
    return found


def test_the_least_peak_is_that_of_all_orders_and_its_schedule_has_it() -> None:
    above = 0
    for index, graph in enumerate(graphs(900, 13)):
        parameters = index % 2 == 0
        problem = build_problem(graph, parameters, 1)
        found = least_peak(problem, Clock(60))
        best = min_peak(graph, parameters)
        assert (found.peak, found.bound) == (best, best), f"graph {index}"
        assert _runs(problem, found.order)
        assert peak_of(problem, found.order) == best
        above += best > max(problem.need)
    # Elsewhere any order that starts from the largest operator's need would do.
    assert above > 200


def test_either_climber_alone_reaches_the_least_peak() -> None:
    for index, graph in enumerate(graphs(450, 12)):
        problem = build_problem(graph, True, 1)
        best = min_peak(graph, True)
        for backwards in (False, True):
            climber = Climber(problem, backwards=backwards)
            bound = climber.climb((1 << problem.n) - 1, max(problem.need), EVERYTHING, Clock(60))
            order = tuple(reversed(climber.order) if backwards else climber.order)
            assert _runs(problem, order)
            assert (bound, peak_of(problem, order)) == (best, best), f"graph {index}, backwards {backwards}"


@pytest.mark.parametrize("limits", [(0,), (1,), (2, 3), (1, 3, 4)])
def test_climbers_that_stop_early_leave_an_optimum_between_them(
    limits: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they run is safe: CP-SAT between their ends still reaches the optimum, and bounds stay bounds."""
    handed_over: list[int] = []
    cumulative = peak._cumulative

    def watched(problem: Problem, *arguments: object) -> peak.Peak:
        *_, front, back = arguments
        handed_over.append(len(front) + len(back))  # type: ignore[arg-type]
        return cumulative(problem, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(peak, "SET_LIMITS", limits)
    monkeypatch.setattr(peak, "_cumulative", watched)
    for index, graph in enumerate(graphs(240, 11)):
        problem = build_problem(graph, False, 1)
        found = least_peak(problem, Clock(60), workers=1)
        best = min_peak(graph, False)
        assert (found.peak, found.bound) == (best, best), f"graph {index}"
    assert len(handed_over) > 5
    # That the ends are fixed matters in some.
    assert any(handed_over) == (max(limits) > 0)


def test_cp_sat_gets_the_threads_that_were_asked_for_or_all(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def solve(solver: cp_model.CpSolver, *arguments: object) -> int:
        threads.append(solver.parameters.num_workers)
        status: int = real(solver, *arguments)
        return status

    real = cp_model.CpSolver.solve
    monkeypatch.setattr(cp_model.CpSolver, "solve", solve)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    # Nothing climbs, so CP-SAT is asked for each part.
    monkeypatch.setattr(peak, "SET_LIMITS", ())
    graph = layered_graph(random.Random(0), operators=12)
    least = min_peak(graph, False)
    for workers in (1, 2, None):
        for asked in (
            lambda n: bounds(graph, workers=n).m_p,
            lambda n: BoundsTask(graph).solve(60.0, n, None).m_p,
            # A relative scratchpad is worked out first.
            lambda n: plan(graph, Accelerator("M_P"), workers=n).scratchpad_bytes,
        ):
            threads.clear()
            assert asked(workers) == least
            assert set(threads) == {workers or 3}
    with pytest.raises(ValueError, match=r"^workers is a number of threads from 1"):
        bounds(graph, workers=0)


def test_without_time_the_bound_is_below_and_the_schedule_above_the_optimum() -> None:
    for graph in graphs(240, 12):
        problem = build_problem(graph, True, 1)
        found = least_peak(problem, Clock(0.0))
        assert _runs(problem, found.order)
        assert found.bound <= min_peak(graph, True) <= found.peak == peak_of(problem, found.order)


def test_a_peak_that_is_enough_is_reached_and_a_higher_one_proved() -> None:
    for index, graph in enumerate(graphs(300, 12)):
        problem = build_problem(graph, False, 1)
        best = min_peak(graph, False)
        for enough in (best - 1, best, best + random.Random(index).randint(1, 20)):
            found = least_peak(problem, Clock(60), enough=enough)
            assert peak_of(problem, found.order) == found.peak <= max(best, enough)
            assert found.bound <= best
            if best > enough:
                assert (found.peak, found.bound) == (best, best)


def test_the_whole_networks_peak_is_that_of_its_parts_and_alignment_rounds_up() -> None:
    for index, graph in enumerate(graphs(150, 12)):
        for alignment in (1, 4):
            problem = postpone(build_problem(graph, True, alignment))
            whole = least_peak(problem, Clock(60)).peak
            assert max(least_peak(part.problem, Clock(60)).peak for part in split(problem)) == whole, f"graph {index}"
        found = bounds(graph, parameters=True)
        assert found.m_p == found.m_p_bound == min_peak(graph, True)


def test_a_footprint_read_backwards_is_the_same_footprint() -> None:
    for graph in graphs(150, 12):
        problem = build_problem(graph, True, 1)
        forwards, backwards = Footprint(problem), Footprint(problem, backwards=True)
        steps = []
        for footprint, order in ((forwards, range(problem.n)), (backwards, reversed(range(problem.n)))):
            done = live = 0
            row = []
            for operator in order:
                step, live = footprint.after(done, live, operator)
                done |= 1 << operator
                row.append(step)
            assert live == 0
            steps.append(row)
        assert steps[0] == steps[1][::-1]


def test_what_is_alive_is_submodular() -> None:
    """The property that all exchanges of the search rest on."""
    for graph in graphs(60, 8):
        problem = build_problem(graph, False, 1)
        footprint = Footprint(problem)
        first = [d for d in range(1 << problem.n) if all(not footprint.before[o] & ~d for o in bits(d))]
        alive = {d: _alive(footprint, d) for d in first}
        for a, b in combinations(first, 2):
            assert alive[a | b] + alive[a & b] <= alive[a] + alive[b]


def test_the_least_part_of_a_climb_is_the_least_of_all_its_subsets() -> None:
    smaller = 0
    for index, graph in enumerate(graphs(400, 10)):
        problem = build_problem(graph, False, 1)
        rng = random.Random(index)
        for backwards in (False, True):
            footprint = Footprint(problem, backwards=backwards)
            order = list(range(problem.n))[:: -1 if backwards else 1]
            begin = rng.randint(0, problem.n - 1)
            end = rng.randint(begin + 1, problem.n)
            start, path = sum(1 << o for o in order[:begin]), order[begin:end]
            part = valleys._least_part(footprint, start, path)
            subsets = (sum(1 << o for o in some) for k in range(len(path) + 1) for some in combinations(path, k))
            able = [start | s for s in subsets if all(not footprint.before[o] & ~(start | s) for o in bits(s))]
            least = min(_alive(footprint, d) for d in able)
            chosen = start | sum(1 << o for o in part)
            assert chosen in able
            if len(path) > 1:
                assert _alive(footprint, chosen) == least
                assert chosen.bit_count() == max(d.bit_count() for d in able if _alive(footprint, d) == least)
            smaller += 0 < len(part) < len(path)
    assert smaller > 50


def test_what_a_minimum_cut_says_of_each_operator_is_no_more_than_the_least_peak() -> None:
    raised = 0
    for graph in graphs(300, 12):
        problem = build_problem(graph, False, 1)
        best, least = min_peak(graph, False), max(problem.need)
        bound = valleys.raise_bound(problem, 0, 0, least, problem.n, Clock(60))
        assert least <= bound <= best
        raised += bound > least
        front, back = Climber(problem), Climber(problem, backwards=True)
        everything = (1 << problem.n) - 1
        between = front.climb(everything, least, 2, Clock(60))
        between = back.climb(everything & ~front.done, between, 2, Clock(60))
        assert bound <= valleys.raise_bound(problem, front.done, back.done, bound, 3, Clock(60)) <= best
    assert raised > 30


@pytest.mark.parametrize("early", [1, 9])
@pytest.mark.parametrize("backwards", [False, True])
def test_what_a_valley_can_do_without_is_not_run_with_it(early: int, backwards: bool) -> None:
    """``early`` can run before the climb over the two hills or on the way, but it costs the peak that comes later."""
    sizes = {"x": 1, "a": 5, "b": 5, "c": 0, "hill": 20, "cliff": 20, "valley": 1, "early": early, "top": 60, "low": 1}
    reads = {"a": "x", "hill": "a", "cliff": "b", "early": "c", "valley": "hill cliff", "top": "valley", "low": "top"}
    operators = [
        Operator(made, "Op", tuple(row.split()), ("a", "b", "c") if made == "a" else (made,))
        for made, row in reads.items()
    ]
    operators.append(Operator("end", "Op", ("early", "low"), ("y",)))
    tensors = [Tensor(name, size, "input" if name == "x" else "activation") for name, size in sizes.items()]
    if backwards:
        graph = _reversed(operators, {**sizes, "y": 1})
    else:
        graph = Graph("late", operators, [*tensors, Tensor("y", 1)], ["y"])
    problem = build_problem(graph, False, 1)
    climber = Climber(problem, backwards=backwards)
    assert max(problem.need) == min_peak(graph) == 61
    assert climber.climb((1 << problem.n) - 1, 61, EVERYTHING, Clock(60)) == 61


def test_branches_that_can_run_in_any_order_need_few_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty branches that each go up and down: 2**40 sets of finished branches."""
    monkeypatch.setattr(peak, "SET_LIMITS", (1_000, 1_000))
    monkeypatch.setattr(peak, "MODEL_LIMIT", 0)
    tensors, operators = [Tensor("x", 5, "input")], []
    for b in range(40):
        tensors += [Tensor(f"up{b}", 100 + b), Tensor(f"mid{b}", 50), Tensor(f"end{b}", 1)]
        operators += [
            Operator(f"a{b}", "Up", ("x",), (f"up{b}",)),
            Operator(f"b{b}", "Mid", (f"up{b}",), (f"mid{b}",)),
            Operator(f"c{b}", "Down", (f"mid{b}",), (f"end{b}",)),
        ]
    operators.append(Operator("join", "Join", tuple(f"end{b}" for b in range(40)), ("y",)))
    graph = Graph("branches", operators, [*tensors, Tensor("y", 1)], ["y"])
    found = least_peak(build_problem(graph, False, 1), Clock(60))
    # The largest branch first, beside nothing but the input, and each later one beside one more end.
    assert found.peak == found.bound == 139 + 50 + 5


def _reversed(operators: list[Operator], sizes: dict[str, int]) -> Graph:
    """The same graph with every edge turned round: each tensor that one operator read is made by that one."""
    maker = {name: o.name for o in operators for name in o.outputs}
    reader = {name: o.name for o in operators for name in o.inputs}
    turned = [
        Operator(
            o.name,
            "Op",
            tuple(name for name, made in maker.items() if made == o.name),
            tuple(name for name, read in reader.items() if read == o.name),
        )
        for o in reversed(operators)
    ]
    inputs = set(maker) - set(reader)
    tensors = [Tensor(name, size, "input" if name in inputs else "activation") for name, size in sizes.items()]
    return Graph("turned", turned, tensors, sorted(set(reader) - set(maker)))


def _alive(footprint: Footprint, done: int) -> int:
    return sum(
        room for room, users in zip(footprint.rooms, footprint.users, strict=True) if users & done and users & ~done
    )


def _runs(problem: Problem, order: tuple[int, ...]) -> bool:
    ran: set[int] = set()
    for operator in order:
        if not set(problem.predecessors[operator]) <= ran:
            return False
        ran.add(operator)
    return len(order) == len(ran) == problem.n


def test_the_brute_force_of_these_tests_is_one() -> None:
    """Against the orders themselves, one by one, where they are few."""
    for seed in range(60):
        graph = random_graph(random.Random(seed), 5)
        problem = build_problem(graph, True, 1)

        @functools.cache
        def orders(done: int, problem: Problem = problem) -> list[tuple[int, ...]]:
            if done == (1 << problem.n) - 1:
                return [()]
            able = [o for o in range(problem.n) if not done >> o & 1 and not problem.ancestors[o] & ~done]
            return [(o, *rest) for o in able for rest in orders(done | 1 << o)]

        assert min_peak(graph, True) == min(peak_of(problem, order) for order in orders(0))
