"""Valid plans made without a planner, and a slow second opinion on what a valid plan is, for the tests.

The two makers do what a child would do: put everything back after each step, or keep things until there is no
room. The second opinion looks at every byte of every step in a table, where the verifier replays with sets.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter

from tests.planning.random_graphs import packed_bytes

from retensor.graph.structure import Graph
from retensor.planning.plan import Plan, Residency, Transfer


def random_order(graph: Graph, rng: random.Random) -> list[str]:
    """Names of the operators in a random order that runs."""
    left = list(graph.operators)
    made: set[str] = set()
    order = []
    while left:
        ready = [o for o in left if all(graph.tensors[n].role != "activation" or n in made for n in o.inputs)]
        operator = rng.choice(ready)
        left.remove(operator)
        made.update(operator.outputs)
        order.append(operator.name)
    return order


def evicting_plan(graph: Graph, scratchpad: int, alignment: int, parameters: bool, rng: random.Random) -> Plan:
    """Everything leaves after each step and comes back compactly when it is needed."""
    order = random_order(graph, rng)
    stays: list[Residency] = []
    for step, _ in enumerate(order):
        for tensor, address in _compact(graph, order[step], scratchpad, alignment, parameters, rng).items():
            stays.append(Residency(tensor, step, step + 1, address))
    return _plan(graph, scratchpad, alignment, parameters, order, stays, rng)


def keeping_plan(graph: Graph, scratchpad: int, alignment: int, parameters: bool, rng: random.Random) -> Plan:
    """Tensors stay where they are until the last use, or until a newcomer finds no gap; then chance decides."""
    order = random_order(graph, rng)
    operators = {operator.name: operator for operator in graph.operators}
    needs = [graph.operator_tensors(operators[name], parameters) for name in order]
    last = {tensor: step for step, names in enumerate(needs) for tensor in names}
    stays: list[Residency] = []
    living: dict[str, tuple[int, int]] = {}  # tensor: start, address

    def leave(tensor: str, step: int) -> None:
        start, address = living.pop(tensor)
        stays.append(Residency(tensor, start, step, address))

    for step, names in enumerate(needs):
        for tensor in [tensor for tensor in living if last[tensor] < step]:
            leave(tensor, step)
        while True:
            new = [tensor for tensor in names if tensor not in living]
            found = _first_fit(graph, new, living, scratchpad, alignment, rng)
            if found is not None:
                break
            others = [tensor for tensor in living if tensor not in names]
            if others:
                leave(rng.choice(others), step)
                continue
            for tensor in list(living):
                leave(tensor, step)
            found = _compact(graph, order[step], scratchpad, alignment, parameters, rng)
            break
        for tensor, address in found.items():
            living[tensor] = (step, address)
    for tensor in list(living):
        leave(tensor, last[tensor] + 1 if rng.random() < 0.5 else len(order))
    return _plan(graph, scratchpad, alignment, parameters, order, stays, rng)


def simple_plan(graph: Graph, scratchpad: int, alignment: int, parameters: bool, rng: random.Random) -> Plan:
    """A plan of one of the two kinds."""
    maker = evicting_plan if rng.random() < 0.4 else keeping_plan
    return maker(graph, scratchpad, alignment, parameters, rng)


def _compact(
    graph: Graph, name: str, scratchpad: int, alignment: int, parameters: bool, rng: random.Random
) -> dict[str, int]:
    """Addresses of one operator's tensors side by side, the one that wastes most of its last unit on top."""
    operator = next(operator for operator in graph.operators if operator.name == name)
    tensors = list(graph.operator_tensors(operator, parameters))
    rng.shuffle(tensors)
    tensors.sort(key=lambda tensor: -graph.tensors[tensor].nbytes % alignment)
    if packed_bytes([graph.tensors[tensor].nbytes for tensor in tensors], alignment) > scratchpad:
        raise ValueError("the scratchpad is too small for this operator")
    found, at = {}, 0
    for tensor in tensors:
        # An empty tensor at the very end would have its address past the last aligned one.
        found[tensor] = at if graph.tensors[tensor].nbytes else 0
        at += -(-graph.tensors[tensor].nbytes // alignment) * alignment
    return found


def _first_fit(
    graph: Graph,
    new: list[str],
    living: dict[str, tuple[int, int]],
    scratchpad: int,
    alignment: int,
    rng: random.Random,
) -> dict[str, int] | None:
    taken = [(address, address + graph.tensors[tensor].nbytes) for tensor, (_, address) in living.items()]
    found = {}
    for tensor in rng.sample(new, len(new)):
        size = graph.tensors[tensor].nbytes
        free = (
            address
            for address in range(0, scratchpad - size + 1, alignment)
            if not any(a < address + size and address < b and size for a, b in taken)
        )
        address = next(free, None)
        if address is None:
            return None
        found[tensor] = address
        taken.append((address, address + size))
    return found


def _plan(
    graph: Graph,
    scratchpad: int,
    alignment: int,
    parameters: bool,
    order: list[str],
    stays: list[Residency],
    rng: random.Random,
) -> Plan:
    """Join residencies that touch at one address, then add the transfers, at random among the steps allowed."""
    by_tensor: dict[str, list[Residency]] = {}
    for stay in sorted(stays, key=lambda stay: stay.start):
        row = by_tensor.setdefault(stay.tensor, [])
        if row and row[-1].end == stay.start and row[-1].address == stay.address:
            stay = Residency(stay.tensor, row.pop().start, stay.end, stay.address)
        row.append(stay)
    moves = []
    for name, row in by_tensor.items():
        tensor = graph.tensors[name]
        first = row[0]
        if tensor.role != "activation":
            moves.append(Transfer(name, "load", first.start, tensor.nbytes))
        elif name in graph.outputs:
            stay = first if len(row) > 1 else rng.choice(row)
            moves.append(Transfer(name, "store", rng.randint(stay.start + 1, stay.end), tensor.nbytes))
        elif len(row) > 1:
            moves.append(Transfer(name, "spill", rng.randint(first.start + 1, first.end), tensor.nbytes))
        moves += [Transfer(name, "retrieve", stay.start, tensor.nbytes) for stay in row[1:]]
    joined = [stay for row in by_tensor.values() for stay in row]
    rng.shuffle(joined)
    rng.shuffle(moves)
    cost = sum(move.nbytes for move in moves if move.kind in ("spill", "retrieve"))
    return Plan(
        graph_name=graph.name,
        graph_digest=graph.digest,
        scratchpad_bytes=scratchpad,
        alignment=alignment,
        parameters=parameters,
        order=tuple(order),
        residencies=tuple(joined),
        transfers=tuple(moves),
        bound_bytes=rng.randint(0, cost),
        solver="by hand",
        seconds=rng.choice([0.0, 1.5, 1 / 3]),
        fixed_order=rng.random() < 0.5,
        graph_options={"fuse": True, "in_place": False, "dtype": None, "inputs": {}},
    )


def second_opinion(graph: Graph, plan: Plan) -> tuple[int, int] | None:
    """Compulsory and non-compulsory bytes of a plan, or None where it breaks a rule.

    Every rule is a statement about a table with one row a step and one column a byte, or a count; nothing is
    replayed. Slow on purpose.
    """
    steps, size = len(plan.order), plan.scratchpad_bytes
    nbytes = {name: tensor.nbytes for name, tensor in graph.tensors.items()}
    if plan.graph_digest != graph.digest or size < 1 or plan.alignment < 1:
        return None
    if Counter(plan.order) != Counter(operator.name for operator in graph.operators):
        return None
    at = {name: step for step, name in enumerate(plan.order)}
    made = {name: at[operator.name] for operator in graph.operators for name in operator.outputs}
    allowed = {n for n, t in graph.tensors.items() if plan.parameters or t.role != "parameter"}
    if any(thing.tensor not in allowed for thing in (*plan.residencies, *plan.transfers)):
        return None
    for stay in plan.residencies:
        if not (0 <= stay.start < stay.end <= steps and stay.address >= 0 and stay.address % plan.alignment == 0):
            return None
        if stay.address + nbytes[stay.tensor] > size:
            return None
    # The table of bytes, and the same for tensors, which sees empty tensors too.
    for step in range(steps):
        living = [stay for stay in plan.residencies if stay.start <= step < stay.end]
        cells = [0] * size
        for stay in living:
            for byte in range(stay.address, stay.address + nbytes[stay.tensor]):
                cells[byte] += 1
        if max(cells) > 1 or len({stay.tensor for stay in living}) != len(living):
            return None
    for operator in graph.operators:
        step = at[operator.name]
        present = {stay.tensor for stay in plan.residencies if stay.start <= step < stay.end}
        if not {name for name in operator.inputs + operator.outputs if name in allowed} <= present:
            return None
        if any(name in made and made[name] >= step for name in operator.inputs):
            return None
    for name in allowed:
        if not _tensor_rules(graph, plan, name, made.get(name)):
            return None
    kinds = Counter[str]()
    for move in plan.transfers:
        kinds[move.kind] += move.nbytes
    spent = kinds["spill"] + kinds["retrieve"]
    return (kinds["load"] + kinds["store"], spent) if 0 <= plan.bound_bytes <= spent else None


def _tensor_rules(graph: Graph, plan: Plan, name: str, made: int | None) -> bool:
    tensor = graph.tensors[name]
    row = sorted((stay for stay in plan.residencies if stay.tensor == name), key=lambda stay: stay.start)
    moves = {kind: [m for m in plan.transfers if m.tensor == name and m.kind == kind] for kind in _KINDS}
    if sum(len(group) for group in moves.values()) != sum(m.tensor == name for m in plan.transfers):
        return False
    if any(m.nbytes != tensor.nbytes for group in moves.values() for m in group):
        return False
    if any(a.end == b.start and a.address == b.address for a, b in itertools.pairwise(row)):
        return False
    loads, stores, spills, retrieves = (sorted(m.step for m in moves[kind]) for kind in _KINDS)
    if retrieves != [stay.start for stay in row[1:]]:
        return False
    if tensor.role != "activation":
        return loads == [stay.start for stay in row[:1]] and not stores and not spills
    if loads or (row and row[0].start != made):
        return False
    output = name in graph.outputs
    if len(stores) != int(output) or len(spills) != int(not output and bool(retrieves)):
        return False
    writes = stores + spills
    if not all(any(stay.start < step <= stay.end for stay in row) for step in writes):
        return False
    return not retrieves or writes[0] <= retrieves[0]


_KINDS = ("load", "store", "spill", "retrieve")
