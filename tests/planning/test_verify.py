"""The verifier accepts plans that follow the rules and names the first rule that another plan breaks."""

from __future__ import annotations

import dataclasses
import random
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.planning.random_graphs import minimum_scratchpad, random_budget, random_graph
from tests.planning.simple_plans import keeping_plan, second_opinion, simple_plan

from retensor.errors import PlanError
from retensor.graph.structure import Graph, Operator, Tensor
from retensor.planning.plan import Plan, Residency, Transfer
from retensor.planning.verify import Verification, verify

replace = dataclasses.replace


def diamond() -> Graph:
    """``a`` is made first, leaves, comes back last."""
    tensors = [
        Tensor("x", 4, "input"),
        Tensor("w", 2, "parameter"),
        Tensor("a", 4),
        Tensor("b", 4),
        Tensor("c", 4),
        Tensor("y", 2),
    ]
    operators = [
        Operator("first", "Relu", ("x",), ("a",)),
        Operator("left", "Conv", ("a", "w"), ("b",)),
        Operator("middle", "Relu", ("b",), ("c",)),
        Operator("last", "Concat", ("c", "a"), ("y",)),
    ]
    return Graph("diamond", operators, tensors, ["y", "b"])


def plan_of_diamond() -> Plan:
    stays = (
        Residency("x", 0, 1, 0),
        Residency("a", 0, 2, 4),
        Residency("b", 1, 3, 0),
        Residency("c", 2, 4, 4),
        Residency("a", 3, 4, 0),
        Residency("y", 3, 4, 8),
    )
    moves = (
        Transfer("x", "load", 0, 4),
        Transfer("a", "spill", 2, 4),
        Transfer("b", "store", 3, 4),
        Transfer("a", "retrieve", 3, 4),
        Transfer("y", "store", 4, 2),
    )
    order = ("first", "left", "middle", "last")
    return Plan("diamond", diamond().digest, 10, 1, False, order, stays, moves, 8, "by hand", 0.0)


def swap(row: tuple, old: object, *new: object) -> tuple:
    """``row`` with ``new`` in the place of ``old``."""
    assert old in row
    return tuple(x for item in row for x in (new if item == old else (item,)))


def test_a_valid_plan_is_recounted() -> None:
    assert verify(diamond(), plan_of_diamond()) == Verification(10, 8, 10, 4)


def test_parameters_lie_in_the_scratchpad_iff_the_plan_says_so() -> None:
    graph, plan = diamond(), plan_of_diamond()
    stays = (*plan.residencies, Residency("w", 1, 2, 8))
    moves = (*plan.transfers, Transfer("w", "load", 1, 2))
    assert verify(graph, replace(plan, parameters=True, residencies=stays, transfers=moves)).compulsory_bytes == 12
    with pytest.raises(PlanError, match=r"residency names parameter 'w', but the plan is for activations only"):
        verify(graph, replace(plan, residencies=stays, transfers=moves))
    with pytest.raises(PlanError, match=r"transfer names parameter 'w'"):
        verify(graph, replace(plan, transfers=moves))
    with pytest.raises(PlanError, match=r"step 1 \(operator 'left'\): reads tensor 'w', which is not in"):
        verify(graph, replace(plan, parameters=True))


def broken_plans() -> Iterator[tuple[str, Plan]]:
    """One plan for each rule, and the sentence that names it."""
    p = plan_of_diamond()
    x, a, b, c, _, y = p.residencies
    load, spill, store_b, retrieve, store_y = p.transfers

    def stays(old: Residency, *new: Residency) -> Plan:
        return replace(p, residencies=swap(p.residencies, old, *new))

    def moves(old: Transfer, *new: Transfer) -> Plan:
        return replace(p, transfers=swap(p.transfers, old, *new))

    elsewhere = swap(swap(p.residencies, a, replace(a, end=4)), c, replace(c, address=10))

    yield "made for another graph", replace(p, graph_digest="0" * 64)
    yield "scratchpad has 0 bytes", replace(p, scratchpad_bytes=0)
    yield "alignment is 0 bytes", replace(p, alignment=0)
    yield "step 1: the plan runs operator 'what'", replace(p, order=("first", "what", "middle", "last"))
    yield "step 3: operator 'first' runs a second time; it ran at step 0", replace(p, order=(*p.order[:3], "first"))
    yield "operator 'last' is missing", replace(p, order=p.order[:3])
    yield (
        "step 1 (operator 'middle'): reads tensor 'b' before operator 'left' makes it at step 2",
        replace(p, order=("first", "middle", "left", "last")),
    )
    yield "residency names tensor 'ghost'", stays(x, replace(x, tensor="ghost"))
    yield "transfer names tensor 'ghost'", moves(load, replace(load, tensor="ghost"))
    yield "'y' in steps 3 to 5 at address 8", stays(y, replace(y, end=5))
    yield "'x' in steps -1 to 1", stays(x, replace(x, start=-1))
    yield "'x' in steps 1 to 1", stays(x, replace(x, start=1))
    yield "addresses start at 0", stays(x, replace(x, address=-1))
    yield "it ends at byte 11, the scratchpad has 10", stays(y, replace(y, address=9))
    yield "'y' in steps 3 to 4 at address 8: it ends at byte 10, the sc", replace(p, scratchpad_bytes=9)
    yield "not a multiple of the alignment, 8", replace(p, alignment=8)
    yield (
        "step 0 (operator 'first'): tensor 'a' at addresses 3 to 7 overlaps tensor 'x' at 0 to 4",
        stays(a, replace(a, address=3)),
    )
    yield (
        "step 3 (operator 'last'): tensor 'a' starts at address 0 while it still lies at address 4 until step 4",
        replace(p, scratchpad_bytes=20, residencies=elsewhere),
    )
    yield (
        "leaves and returns at the same address 4: join the two",
        replace(
            p,
            residencies=(*swap(p.residencies, c, Residency("c", 2, 3, 4)), Residency("c", 3, 4, 4)),
            transfers=(*p.transfers, Transfer("c", "spill", 3, 4), Transfer("c", "retrieve", 3, 4)),
        ),
    )
    yield "step 2 (operator 'middle'): reads tensor 'b', which is not in", stays(b, replace(b, end=2))
    yield "step 3 (operator 'last'): writes tensor 'y', which is not in", stays(y)
    yield "first residency of tensor 'y' starts at a step that does not produce it", stays(y, replace(y, start=2))
    yield "load of tensor 'a', which was not made yet", moves(load, load, Transfer("a", "load", 0, 4))
    yield "first residency of tensor 'x' starts without a load", moves(load)
    yield "first residency of tensor 'x' starts without a load", moves(load, replace(load, kind="retrieve"))
    yield "tensor 'x' is read from off-chip twice", moves(load, load, load)
    yield "the load of tensor 'x' starts no residency", moves(load, load, replace(load, step=2))
    yield "further residency of tensor 'a' starts without a retrieve", moves(retrieve)
    yield "further residency of tensor 'a' starts without a retrieve", moves(retrieve, replace(retrieve, kind="load"))
    yield "the retrieve of tensor 'a' starts no residency", moves(retrieve, replace(retrieve, step=2))
    yield "retrieve of tensor 'a', which has no copy off-chip", moves(spill)
    yield "spill of tensor 'a', which is not in the scratchpad then", moves(spill, replace(spill, step=3))
    yield "spill of tensor 'a', which is not in the scratchpad then", moves(spill, replace(spill, step=0))
    yield "tensor 'a' is written off-chip again; its spill was at step 1", moves(spill, replace(spill, step=1), spill)
    yield "store of 'a', which is not an output", moves(spill, replace(spill, kind="store"))
    yield "spill of 'b', which is an output", moves(store_b, replace(store_b, kind="spill"))
    yield "written off-chip again; its store was at step 2", moves(store_b, replace(store_b, step=2), store_b)
    yield "after the last step: output 'y' was never stored", moves(store_y)
    yield "spill of 'x', which is an input or parameter", moves(load, load, Transfer("x", "spill", 1, 4))
    yield "pointless spill of tensor 'c'", moves(store_y, store_y, Transfer("c", "spill", 4, 4))
    yield "moves 3 bytes, the tensor has 4", moves(spill, replace(spill, nbytes=3))
    yield "transfers happen at steps 0 to 4", moves(store_y, replace(store_y, step=5))
    yield "kinds are load, store", moves(store_y, replace(store_y, kind="teleport"))  # type: ignore[arg-type]
    yield "lower bound of 9 non-compulsory bytes but itself moves 8", replace(p, bound_bytes=9)
    yield "lower bound is -1 bytes", replace(p, bound_bytes=-1)


@pytest.mark.parametrize(
    ("sentence", "plan"), list(broken_plans()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_each_broken_rule_is_named(sentence: str, plan: Plan) -> None:
    with pytest.raises(PlanError) as caught:
        verify(diamond(), plan)
    assert sentence in str(caught.value)
    assert second_opinion(diamond(), plan) is None


def test_moving_a_tensor_is_an_eviction_and_a_retrieve() -> None:
    p = plan_of_diamond()
    c = p.residencies[3]
    stays = swap(p.residencies, c, replace(c, end=3), replace(c, start=3, address=4))
    moved = swap(stays, replace(c, end=3), Residency("c", 2, 3, 5))
    moves = (*p.transfers, Transfer("c", "spill", 3, 4), Transfer("c", "retrieve", 3, 4))
    assert verify(diamond(), replace(p, residencies=moved, transfers=moves)).non_compulsory_bytes == 16


def test_an_output_may_be_retrieved_from_its_store() -> None:
    p = plan_of_diamond()
    b = p.residencies[2]
    stays = swap(p.residencies, b, replace(b, end=2), Residency("b", 2, 3, 0 + 6))
    stays = swap(stays, p.residencies[3], Residency("c", 2, 4, 2))
    stays = swap(stays, p.residencies[4], Residency("a", 3, 4, 6))
    stays = swap(stays, p.residencies[5], Residency("y", 3, 4, 0))
    moves = swap(p.transfers, p.transfers[2], Transfer("b", "store", 2, 4), Transfer("b", "retrieve", 2, 4))
    assert verify(diamond(), replace(p, residencies=stays, transfers=moves)).non_compulsory_bytes == 12


def test_empty_tensors_take_no_room_but_follow_the_rules() -> None:
    tensors = [Tensor("x", 4, "input"), Tensor("none", 0), Tensor("y", 4)]
    operators = [Operator("f", "F", ("x",), ("none",)), Operator("g", "G", ("x", "none"), ("y",))]
    graph = Graph("empty", operators, tensors, ["y", "none"])
    stays = (Residency("x", 0, 2, 0), Residency("none", 0, 2, 2), Residency("y", 1, 2, 4))
    moves = (Transfer("x", "load", 0, 4), Transfer("none", "store", 2, 0), Transfer("y", "store", 2, 4))
    plan = Plan("empty", graph.digest, 8, 1, False, ("f", "g"), stays, moves, 0, "by hand", 0.0)
    assert verify(graph, plan) == Verification(8, 0, 8, 2)
    with pytest.raises(PlanError, match="'none' was never stored"):
        verify(graph, replace(plan, transfers=(moves[0], moves[2])))


def corruptions(graph: Graph, plan: Plan, rng: random.Random) -> Iterator[tuple[str, Plan]]:
    """Every single corruption of each residency and transfer, of the order and of the header."""
    for i, stay in enumerate(plan.residencies):
        rest = plan.residencies[:i], plan.residencies[i + 1 :]

        def put(*new: Residency, rest: tuple[tuple[Residency, ...], ...] = rest) -> Plan:
            return replace(plan, residencies=(*rest[0], *new, *rest[1]))

        for by in (-1, 1, -plan.alignment, plan.alignment):
            yield "address", put(replace(stay, address=stay.address + by))
        yield "address", put(replace(stay, address=rng.randrange(plan.scratchpad_bytes)))
        for by in (-1, 1):
            yield "start", put(replace(stay, start=stay.start + by))
            yield "end", put(replace(stay, end=stay.end + by))
            yield "shift", put(replace(stay, start=stay.start + by, end=stay.end + by))
        yield "dropped residency", put()
        yield "duplicated residency", put(stay, stay)
        yield "renamed residency", put(replace(stay, tensor=rng.choice(list(graph.tensors))))
        for cut in range(stay.start + 1, stay.end):
            yield "cut residency", put(replace(stay, end=cut), replace(stay, start=cut))
        for other in rng.sample(plan.residencies, min(2, len(plan.residencies))):
            yield "overlap", put(replace(stay, address=other.address))
    for i, move in enumerate(plan.transfers):
        rest_moves = plan.transfers[:i], plan.transfers[i + 1 :]

        def place(*new: Transfer, rest: tuple[tuple[Transfer, ...], ...] = rest_moves) -> Plan:
            return replace(plan, transfers=(*rest[0], *new, *rest[1]))

        yield "dropped transfer", place()
        yield "duplicated transfer", place(move, move)
        for step in {move.step - 1, move.step + 1, rng.randrange(len(plan.order) + 1)} - {move.step}:
            yield "moved transfer", place(replace(move, step=step))
        for kind in ("load", "store", "spill", "retrieve"):
            if kind != move.kind:
                yield "re-kinded transfer", place(replace(move, kind=kind))  # type: ignore[arg-type]
        yield "changed bytes", place(replace(move, nbytes=move.nbytes + 1))
        yield "changed bytes", place(replace(move, nbytes=move.nbytes - 1))
        yield "renamed transfer", place(replace(move, tensor=rng.choice(list(graph.tensors))))
    operators = {operator.name: operator for operator in graph.operators}
    for i in range(len(plan.order) - 1):
        one, two = plan.order[i : i + 2]
        depends = set(operators[one].outputs) & set(operators[two].inputs)
        swapped = (*plan.order[:i], two, one, *plan.order[i + 2 :])
        yield "dependent swap" if depends else "free swap", replace(plan, order=swapped)
    yield "dropped operator", replace(plan, order=plan.order[:-1])
    yield "doubled operator", replace(plan, order=(*plan.order, plan.order[0]))
    yield "digest", replace(plan, graph_digest=plan.graph_digest[::-1] + "0")
    if peak := max((s.address + graph.tensors[s.tensor].nbytes for s in plan.residencies), default=0):
        yield "scratchpad", replace(plan, scratchpad_bytes=peak - 1)
    yield "bound", replace(plan, bound_bytes=plan.non_compulsory_bytes + 1)
    yield "bound", replace(plan, bound_bytes=-1)
    yield "settings", replace(plan, parameters=not plan.parameters)
    yield "settings", replace(plan, alignment=plan.alignment * 2)


ALWAYS_CAUGHT = {
    "dropped residency",
    "duplicated residency",
    "cut residency",
    "dropped transfer",
    "duplicated transfer",
    "re-kinded transfer",
    "changed bytes",
    "dependent swap",
    "dropped operator",
    "doubled operator",
    "digest",
    "scratchpad",
    "bound",
}


def test_every_single_corruption_is_caught_or_leaves_a_valid_plan() -> None:
    caught, valid = Counter[str](), Counter[str]()
    plans = 0
    for seed in range(400):
        rng = random.Random(seed)
        graph, parameters = random_graph(rng), rng.random() < 0.5
        scratchpad, alignment = random_budget(graph, rng, parameters)
        if scratchpad < minimum_scratchpad(graph, alignment, parameters):
            continue
        plan = simple_plan(graph, scratchpad, alignment, parameters, rng)
        counted = verify(graph, plan)
        assert (counted.compulsory_bytes, counted.non_compulsory_bytes) == second_opinion(graph, plan)
        assert counted.non_compulsory_bytes == plan.non_compulsory_bytes
        plans += 1
        for kind, corrupted in corruptions(graph, plan, rng):
            opinion = second_opinion(graph, corrupted)
            try:
                counted = verify(graph, corrupted)
            except PlanError:
                assert opinion is None, (seed, kind, corrupted)
                caught[kind] += 1
            else:
                assert (counted.compulsory_bytes, counted.non_compulsory_bytes) == opinion, (seed, kind, corrupted)
                assert kind not in ALWAYS_CAUGHT, (seed, kind, corrupted)
                valid[kind] += 1
    # The test itself must have seen what it is about: many plans, every kind, and few harmless changes.
    assert plans > 300
    assert set(caught) >= ALWAYS_CAUGHT | {"address", "start", "end", "overlap", "moved transfer", "shift"}
    assert min(caught.values()) > 20
    assert sum(caught.values()) > 8 * sum(valid.values())


def test_numbers_of_any_size_and_unknown_names_raise_plan_errors_only() -> None:
    graph, plan = diamond(), plan_of_diamond()
    rng = random.Random(0)
    longest = 0
    numbers = [0, -1, 2**63, -(2**63), 10**5000, -(10**5000)]
    names = ["x", "a", "ghost", "", "\ud800", "w"]
    for _ in range(3000):
        stays, moves = list(plan.residencies), list(plan.transfers)
        for _ in range(rng.randint(0, 2)):
            i, field = rng.randrange(len(stays)), rng.choice(["tensor", "start", "end", "address"])
            stays[i] = replace(stays[i], **{field: rng.choice(names if field == "tensor" else numbers)})
        for _ in range(rng.randint(0, 2)):
            i, field = rng.randrange(len(moves)), rng.choice(["tensor", "kind", "step", "nbytes"])
            moves[i] = replace(moves[i], **{field: rng.choice(names if field in ("tensor", "kind") else numbers)})
        other = replace(plan, residencies=tuple(stays), transfers=tuple(moves))
        if rng.random() < 0.3:
            field = rng.choice(["scratchpad_bytes", "alignment", "bound_bytes"])
            other = replace(other, **{field: rng.choice(numbers)})
        if rng.random() < 0.1:
            other = replace(other, order=tuple(rng.choices([*plan.order, *names], k=rng.randint(0, 5))))
        try:
            verify(graph, other)
        except PlanError as error:
            longest = max(longest, len(str(error)))
        else:
            assert second_opinion(graph, replace(other, scratchpad_bytes=min(other.scratchpad_bytes, 100))) is not None
    assert 0 < longest < 1000


def long_graph(count: int, skip: int) -> Graph:
    """A chain in which each operator also reads the result ``skip`` operators before."""
    tensors = [Tensor("t0", 4, "input")] + [Tensor(f"t{i + 1}", 1 + i % 7) for i in range(count)]
    operators = [
        Operator(f"o{i}", "Op", tuple(dict.fromkeys((f"t{i}", f"t{max(0, i - skip)}"))), (f"t{i + 1}",))
        for i in range(count)
    ]
    return Graph("long", operators, tensors, [f"t{count}"])


def test_twenty_thousand_operators_are_verified_within_seconds() -> None:
    """Everything stays for 3,000 steps, so that a comparison of all pairs of living tensors would be seen."""
    count, life = 20_000, 3_000
    graph = long_graph(count, life)
    stays = [Residency("t0", 0, min(count, life + 1), 0)]
    stays += [Residency(f"t{i + 1}", i, min(count, i + life + 2), 8 * ((i + 1) % (life + 3))) for i in range(count)]
    moves = (Transfer("t0", "load", 0, 4), Transfer(f"t{count}", "store", count, graph.tensors[f"t{count}"].nbytes))
    order = tuple(operator.name for operator in graph.operators)
    plan = Plan("long", graph.digest, 8 * (life + 3), 8, False, order, tuple(stays), moves, 0, "by hand", 0.0)
    begin = time.process_time()
    assert verify(graph, plan).steps == count
    assert time.process_time() - begin < 10
    with pytest.raises(PlanError, match="overlaps tensor"):
        verify(graph, replace(plan, residencies=(*stays[:-1], replace(stays[-1], address=stays[-2].address))))


def test_the_second_opinion_and_the_makers_are_not_trivial() -> None:
    """The plans that the corruption test starts from hold evictions of every kind."""
    seen = Counter[str]()
    for seed in range(100):
        rng = random.Random(seed)
        graph = random_graph(rng)
        plan = keeping_plan(graph, minimum_scratchpad(graph, 2, True), 2, True, rng)
        seen.update(move.kind for move in plan.transfers)
        retrieved = {move.tensor for move in plan.transfers if move.kind == "retrieve"}
        seen.update(f"retrieved {graph.tensors[name].role}" for name in retrieved)
        seen.update("retrieved output" for name in retrieved if name in graph.outputs)
    wanted = ["load", "store", "spill", "retrieve", "retrieved input", "retrieved activation", "retrieved output"]
    assert all(seen[kind] >= 5 for kind in [*wanted, "retrieved parameter"]), seen
