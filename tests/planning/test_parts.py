"""Exact reductions, least peaks, packings and baselines, each against something simpler."""

from __future__ import annotations

import itertools
import random

import pytest
from tests.planning.brute_force import min_peak
from tests.planning.layered import layered_graph
from tests.planning.random_graphs import random_budget, random_graph

from retensor.errors import PlanError
from retensor.graph import Graph, Operator, Tensor
from retensor.planning import BASELINES, Accelerator, baseline, bounds, plan, verify
from retensor.planning.allocate import Block, pack
from retensor.planning.baselines import _least_set, _Scratchpad
from retensor.planning.chains import glue
from retensor.planning.frontier import search_frontier
from retensor.planning.late import postpone
from retensor.planning.peak import _cumulative, _greedy, least_peak, peak_of
from retensor.planning.problem import Problem, build_problem, independent_parts, split
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, keep_or_evict, schedule_and_evict, schedule_evict_and_place


def _chain_of_cells(cells: int) -> Graph:
    """Equal cells: a tensor parts into two branches and meets again."""
    tensors = [Tensor("x0", 4, "input")]
    operators = []
    for c in range(cells):
        tensors += [Tensor(f"a{c}", 6), Tensor(f"b{c}", 3), Tensor(f"c{c}", 3), Tensor(f"x{c + 1}", 4)]
        operators += [
            Operator(f"a{c}", "A", (f"x{c}",), (f"a{c}",)),
            Operator(f"b{c}", "B", (f"x{c}",), (f"b{c}",)),
            Operator(f"c{c}", "C", (f"a{c}",), (f"c{c}",)),
            Operator(f"d{c}", "D", (f"b{c}", f"c{c}", f"x{c}"), (f"x{c + 1}",)),
        ]
    return Graph("cells", operators, tensors, [f"x{cells}"])


def _without_cuts(problem: Problem, capacity: int, glued: bool) -> Answer:
    order = tuple(range(problem.n))
    start = keep_or_evict(problem, capacity, order, Clock(60))
    hint = Answer(order, start.stays, start.cost, 0)
    return schedule_and_evict(problem, capacity, Clock(60), hint, glued=glue(problem) if glued else (), workers=1)


def test_a_network_falls_apart_at_its_single_tensor_cuts_and_equal_cells_are_equal() -> None:
    parts = split(build_problem(_chain_of_cells(5), False, 1))
    assert [len(p.operators) for p in parts] == [4] * 5
    # The first reads an input, the others what a pseudo operator made.
    assert len({p.problem.shape_key for p in parts[1:4]}) == 1
    assert [p.entering is None for p in parts] == [True, False, False, False, False]


def test_a_tensor_that_skips_a_cut_prevents_it() -> None:
    graph = _chain_of_cells(2)
    skip = Operator("skip", "S", ("x2", "a0"), ("y",))
    joined = Graph("skip", [*graph.operators, skip], [*graph.tensors.values(), Tensor("y", 1)], ["y"])
    assert [len(p.operators) for p in split(build_problem(joined, False, 1))] == [9]


def test_what_shares_no_tensor_is_solved_apart() -> None:
    a, b = _chain_of_cells(1), _chain_of_cells(1)

    def rename(graph: Graph, mark: str) -> tuple[list[Operator], list[Tensor]]:
        operators = [
            Operator(mark + o.name, o.kind, tuple(mark + i for i in o.inputs), tuple(mark + i for i in o.outputs))
            for o in graph.operators
        ]
        return operators, [Tensor(mark + t.name, t.nbytes, t.role) for t in graph.tensors.values()]

    (first, some), (second, others) = rename(a, "p"), rename(b, "q")
    mixed = [o for pair in zip(first, second, strict=True) for o in pair]
    graph = Graph("both", mixed, some + others, ["px1", "qx1"])
    problem = build_problem(graph, False, 1)
    assert independent_parts(problem) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert bounds(graph).m_p == bounds(a).m_p
    verify(graph, plan(graph, Accelerator("M_R")))


@pytest.mark.parametrize("parameters", [False, True])
def test_the_parts_optima_add_up_to_the_whole_and_glued_chains_lose_nothing(parameters: bool) -> None:
    compared = glued_pairs = cut = 0
    for seed in range(240):
        rng = random.Random(seed)
        graph = random_graph(rng) if seed % 3 else layered_graph(rng, operators=rng.randint(5, 10))
        problem = build_problem(graph, parameters, 1)
        low = least_peak(problem, Clock(60))
        capacity = max(problem.need)
        if capacity >= low.peak:
            continue
        whole = _without_cuts(problem, capacity, glued=False)
        chained = _without_cuts(problem, capacity, glued=True)
        parts = split(problem)
        apart = [_without_cuts(p.problem, capacity, glued=False) for p in parts if p.problem.n > 1]
        assert whole.proved
        assert chained.proved
        assert whole.cost == chained.cost == sum(a.cost for a in apart), f"seed {seed}"
        compared += 1
        cut += len(parts) > 1
        glued_pairs += len(glue(problem))
    assert compared > 30
    assert cut > 5
    assert glued_pairs > 10


def test_a_frontier_search_is_exact_where_it_is_wide_and_never_claims_too_much_where_it_is_narrow() -> None:
    proved = unproved = narrow_proved = 0
    for seed in range(240):
        rng = random.Random(seed)
        graph = random_graph(rng) if seed % 3 else layered_graph(rng, operators=rng.randint(6, 12), width=4)
        problem = build_problem(graph, seed % 2 == 0, 1)
        low = least_peak(problem, Clock(60))
        capacity = max(problem.need)
        if capacity >= low.peak:
            continue
        optimum = _without_cuts(problem, capacity, glued=False)
        start = keep_or_evict(problem, capacity, tuple(range(problem.n)), Clock(60))
        known = Answer(start.order, start.stays, start.cost, 0)
        wide = search_frontier(problem, capacity, Clock(60), known, width=10**6, choices=10**6)
        assert wide.proved
        assert wide.cost == optimum.cost, f"seed {seed}"
        proved += 1
        for width, choices in ((1, 1), (2, 1), (4, 2)):
            narrow = search_frontier(problem, capacity, Clock(60), known, width=width, choices=choices)
            assert narrow.bound <= optimum.cost <= narrow.cost <= known.cost, f"seed {seed}"
            unproved += not narrow.proved
            narrow_proved += narrow.proved
    assert proved > 60
    assert unproved > 20
    assert narrow_proved > 20


def test_chains_that_start_from_nothing_lose_nothing_by_waiting_for_their_reader() -> None:
    """Against the same problem without it, addresses included; such chains are grafted onto random graphs."""
    moved = evicting = 0
    for seed in range(150):
        rng = random.Random(seed)
        base = _chain_of_cells(2) if seed % 5 == 0 else random_graph(rng, most=5)
        operators, tensors = list(base.operators), list(base.tensors.values())
        for k in range(rng.randint(1, 2)):
            reader = rng.randrange(len(operators))
            result, links = f"c{k}_0", rng.randint(1, 2)
            tensors += [Tensor(f"c{k}_{i}", rng.randint(1, 4)) for i in range(links)]
            chain = [Operator(f"chain{k}_0", "C", (f"p{k}",), (result,))]
            tensors.append(Tensor(f"p{k}", rng.randint(1, 4), "parameter"))
            for i in range(1, links):
                chain.append(Operator(f"chain{k}_{i}", "C", (result,), (f"c{k}_{i}",)))
                result = f"c{k}_{i}"
            old = operators[reader]
            operators[reader] = Operator(old.name, old.kind, (*old.inputs, result), old.outputs)
            operators[:0] = chain
        graph = Graph("late", operators, tensors, base.outputs)
        parameters = rng.random() < 0.5
        scratchpad, alignment = random_budget(graph, rng, parameters)
        plain = build_problem(graph, parameters, alignment)
        late = postpone(plain)
        moved += bool(late.after)
        assert sorted(late.operators) == list(plain.operators)
        if scratchpad < bounds(graph, parameters=parameters, alignment=alignment).m_r:
            continue
        known, bound = schedule_evict_and_place(plain, scratchpad, Clock(60), workers=1)
        assert known is not None
        assert known.answer.cost == bound
        ours = plan(graph, Accelerator(scratchpad, alignment=alignment), parameters=parameters)
        assert (ours.non_compulsory_bytes, ours.status) == (bound, "optimal"), f"seed {seed}"
        verify(graph, ours)
        evicting += bound > 0
    assert moved > 40
    assert evicting > 15


def test_a_chain_that_waits_behind_a_cut_stays_behind_the_operator_that_the_cut_is_at() -> None:
    """Its reader's other predecessor made what crosses the cut: in the later part a pseudo operator stands for it."""
    tensors = [Tensor("s", 4), Tensor("d", 4), Tensor("n", 0), Tensor("b", 1), Tensor("y", 1), Tensor("z", 7)]
    operators = [
        Operator("bias", "B", (), ("n",)),
        Operator("scale", "B", ("n",), ("b",)),
        Operator("start", "A", (), ("s",)),
        Operator("deep", "C", ("s",), ("d",)),
        Operator("add", "D", ("d", "b"), ("y",)),
        Operator("other", "E", ("d",), ("z",)),
    ]
    graph = Graph("behind", operators, tensors, ["y", "z"])
    late = postpone(build_problem(graph, False, 1))
    parts = split(late)
    assert [len(part.operators) for part in parts] == [1, 1, 4]
    behind = parts[-1].problem
    assert all(behind.ancestors[operator] & 1 for operator in range(1, behind.n))
    for budget in ("M_R", "M_P"):
        made = plan(graph, Accelerator(budget))
        assert made.status == "optimal"
        verify(graph, made)


def test_both_ways_to_the_least_peak_agree_with_each_other_and_all_orders() -> None:
    for seed in range(150):
        graph = random_graph(random.Random(seed))
        problem = build_problem(graph, True, 1)
        found = least_peak(problem, Clock(60))
        assert found.peak == found.bound == peak_of(problem, found.order) == min_peak(graph, True)
        greedy = _greedy(problem, Clock(60))
        solved = _cumulative(problem, greedy, max(problem.need), Clock(60), 0, 1)
        assert solved.peak == solved.bound == found.peak


def test_bounds_are_ordered_and_parameters_add_to_them() -> None:
    for seed in range(40):
        graph = layered_graph(random.Random(seed), operators=15)
        alone, both = bounds(graph), bounds(graph, parameters=True)
        for found in (alone, both):
            assert found.m_r <= found.m_h <= found.m_p == found.m_p_bound
            assert sorted(found.order) == sorted(o.name for o in graph.operators)
        assert both.m_r >= alone.m_r
        assert both.m_p >= alone.m_p


def _disjoint(blocks: list[Block], addresses: tuple[int, ...], capacity: int, alignment: int) -> bool:
    for block, address in zip(blocks, addresses, strict=True):
        if address < 0 or address % alignment or address + block.size > capacity:
            return False
    pairs = itertools.combinations(zip(blocks, addresses, strict=True), 2)
    return not any(
        a.start < b.end and b.start < a.end and x < y + b.size and y < x + a.size for (a, x), (b, y) in pairs
    )


def _cut_at_random(rng: random.Random, width: int, height: int, pieces: int) -> list[Block]:
    """A perfect packing of a rectangle, so that its height is feasible and one less is not."""
    boxes = [(0, width, height)]
    while len(boxes) < pieces:
        i = max(range(len(boxes)), key=lambda k: (boxes[k][1] - boxes[k][0]) * boxes[k][2] * rng.random())
        start, end, size = boxes[i]
        if rng.random() < 0.5 and end - start > 1:
            at = rng.randrange(start + 1, end)
            boxes[i : i + 1] = [(start, at, size), (at, end, size)]
        elif size > 1:
            at = rng.randrange(1, size)
            boxes[i : i + 1] = [(start, end, at), (start, end, size - at)]
    rng.shuffle(boxes)
    return [Block(*box) for box in boxes]


@pytest.mark.parametrize("seed", range(12))
def test_a_perfect_packing_is_found_and_one_byte_less_is_proved_impossible(seed: int) -> None:
    rng = random.Random(seed)
    blocks = _cut_at_random(rng, 16, 24, 14)
    found = pack(blocks, 24, 1, Clock(60))
    assert found.addresses is not None
    assert _disjoint(blocks, found.addresses, 24, 1)
    assert pack(blocks, 23, 1, Clock(60)).impossible


@pytest.mark.parametrize("seed", range(8))
def test_aligned_and_fixed_blocks_keep_their_places(seed: int) -> None:
    rng = random.Random(seed)
    blocks = [Block(s := rng.randrange(10), s + rng.randint(1, 5), rng.randint(0, 9)) for _ in range(14)]
    found = pack(blocks, 200, 4, Clock(60), fixed={3: 40})
    assert found.addresses is not None
    assert found.addresses[3] == 40
    assert _disjoint(blocks, found.addresses, 200, 4)


def test_the_least_set_is_that_of_all_subsets() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        rooms = {i: rng.randint(0, 9) for i in range(rng.randint(1, 8))}
        excess = rng.randint(1, max(1, sum(rooms.values())))
        subsets = itertools.chain.from_iterable(itertools.combinations(rooms, k) for k in range(len(rooms) + 1))
        best = min((sum(rooms[i] for i in s) for s in subsets if sum(rooms[i] for i in s) >= excess), default=None)
        chosen = sum(rooms[i] for i in _least_set(rooms, excess))
        assert chosen == (best if best is not None else sum(rooms.values()))


@pytest.mark.parametrize("placement", ["arena", "online"])
def test_baselines_return_valid_plans_and_never_beat_the_optimum(placement: str) -> None:
    worse = 0
    for seed in range(80):
        rng = random.Random(seed)
        graph = random_graph(rng) if seed % 2 else layered_graph(rng, operators=12)
        _, alignment = random_budget(graph, rng)
        accelerator = Accelerator("M_R", alignment=alignment)
        least = plan(graph, accelerator, parameters=True).non_compulsory_bytes
        for schedule, replacement in BASELINES:
            made = baseline(
                graph, accelerator, schedule=schedule, replacement=replacement, placement=placement, parameters=True
            )
            assert verify(graph, made).non_compulsory_bytes >= least
            assert made.fixed_order
            worse += made.non_compulsory_bytes > least
    assert worse > 20


def test_belady_is_not_optimal_and_greedy_can_be_better() -> None:
    """Two tensors fit beside the work; the one used last is large and the one used first small."""
    tensors = [Tensor("x", 3, "input"), Tensor("big", 6), Tensor("small", 2), Tensor("work", 6), Tensor("out", 1)]
    operators = [
        Operator("make_big", "A", ("x",), ("big",)),
        Operator("make_small", "B", ("x",), ("small",)),
        Operator("work", "C", ("x",), ("work",)),
        Operator("shrink", "D", ("work", "small"), ("out",)),
        Operator("end", "E", ("out", "big"), ("y",)),
    ]
    graph = Graph("belady", operators, [*tensors, Tensor("y", 1)], ["y"])
    accelerator = Accelerator(15)
    traffic = {
        policy: baseline(graph, accelerator, schedule="default", replacement=policy).non_compulsory_bytes
        for policy in ("belady", "greedy")
    }
    assert traffic == {"belady": 12, "greedy": 4}


def test_an_arena_with_all_lifetimes_is_never_worse_than_placing_tensors_as_they_come() -> None:
    better = 0
    for seed in range(60):
        rng = random.Random(seed)
        graph = random_graph(rng) if seed % 2 else layered_graph(rng, operators=14)
        for schedule, replacement in BASELINES:
            known, come = (
                baseline(graph, Accelerator("M_R"), schedule=schedule, replacement=replacement, placement=placement)
                for placement in ("arena", "online")
            )
            assert known.non_compulsory_bytes <= come.non_compulsory_bytes
            better += known.non_compulsory_bytes < come.non_compulsory_bytes
    assert better > 10


def test_the_cheapest_window_is_that_of_all_addresses() -> None:
    for seed in range(300):
        rng = random.Random(seed)
        pad = _Scratchpad(24, rng.choice([1, 1, 2, 4]))
        address = 0
        for key in range(8):
            address += rng.randint(0, 2) * pad.alignment
            size = rng.randint(0, 5)
            if address + size <= 24:
                pad.put(key, address, size)
            address = -(-(address + size) // pad.alignment) * pad.alignment
        removable = {key for key in pad.taken if rng.random() < 0.7}
        size = rng.randint(1, 12)
        loads = []
        for low in range(0, 24 - size + 1, pad.alignment):
            inside = {k for k, (start, end) in pad.taken.items() if start < end and start < low + size and end > low}
            if inside <= removable:
                loads.append(sum(pad.taken[k][1] - pad.taken[k][0] for k in inside))
        found = pad.cheapest_window(size, removable)
        assert (found is None) == (not loads)
        if found is not None:
            assert sum(pad.taken[k][1] - pad.taken[k][0] for k in found) == min(loads)


def test_wrong_words_are_named() -> None:
    graph = _chain_of_cells(1)
    accelerator = Accelerator("M_R")
    with pytest.raises(ValueError, match="schedule is 'default' or 'mpmf', not 'best'"):
        baseline(graph, accelerator, schedule="best")
    with pytest.raises(ValueError, match="replacement is 'belady' or 'greedy', not 'lru'"):
        baseline(graph, accelerator, replacement="lru")
    with pytest.raises(ValueError, match="placement is 'arena' or 'online', not 'heap'"):
        baseline(graph, accelerator, placement="heap")
    with pytest.raises(PlanError, match="each operator once"):
        baseline(graph, accelerator, schedule="mpmf", order=["a0"])
