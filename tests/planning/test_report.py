"""The HTML report and the pictures: complete, self-contained, safe with hostile names, and true to the plan."""

from __future__ import annotations

import random

from retensor.graph import Graph, Operator, Tensor
from retensor.planning.plan import Plan, Residency, transfers_of


def layered_graph(operators: int, seed: int = 0, name: str = "layered") -> Graph:
    """A random network of ``operators`` steps with branches, skips, parameters and two outputs."""
    rng = random.Random(seed)
    tensors = [Tensor("image", 3 * 64 * 64, "input", (1, 3, 64, 64), "uint8")]
    made: list[Operator] = []
    live = ["image"]
    for i in range(operators):
        kind = rng.choice(["Conv+Relu", "Conv+Relu", "Conv", "Add", "Concat", "MaxPool"])
        nearby = live[-9:] if i % 3 == 2 else live[-3:]
        readers = rng.sample(nearby, min(len(nearby), 2 if kind in ("Add", "Concat") else 1))
        channels, side = rng.choice([16, 24, 32, 48]), rng.choice([16, 16, 24, 32])
        output = f"stage{i // 12}/block{i % 12}/{kind.lower()}_out"
        tensors.append(Tensor(output, channels * side * side, "activation", (1, channels, side, side), "uint8"))
        inputs = list(readers)
        if kind.startswith("Conv"):
            weight = f"stage{i // 12}.block{i % 12}.weight"
            tensors.append(Tensor(weight, channels * 16 * 9, "parameter", (channels, 16, 3, 3), "uint8"))
            inputs.append(weight)
        made.append(Operator(f"{kind.split('+')[0].lower()}_{i}", kind, tuple(inputs), (output,)))
        live.append(output)
    return Graph(name, made, tensors, live[-2:])


def greedy_plan(graph: Graph, scratchpad: float = 1.02, parameters: bool = True, policy: str = "greedy") -> Plan:
    """Keep tensors while there is room at the first gap, evict the furthest used, compact when nothing fits."""
    order = tuple(operator.name for operator in graph.operators)
    size = {tensor.name: tensor.nbytes for tensor in graph.tensors.values()}
    needed = [graph.operator_tensors(operator, parameters) for operator in graph.operators]
    budget = int(scratchpad * max(sum(size[name] for name in names) for names in needed))
    uses: dict[str, list[int]] = {}
    for step, names in enumerate(needed):
        for name in names:
            uses.setdefault(name, []).append(step)
    placed: dict[str, tuple[int, int]] = {}
    stays: list[Residency] = []

    def leave(name: str, step: int) -> None:
        start, address = placed.pop(name)
        if step > start:
            stays.append(Residency(name, start, step, address))

    def gap(nbytes: int) -> int | None:
        address = 0
        for low, high in sorted((a, a + size[n]) for n, (_, a) in placed.items()):
            if low - address >= nbytes:
                return address
            address = max(address, high)
        return address if budget - address >= nbytes else None

    for step, names in enumerate(needed):
        for name in [n for n in placed if uses[n][-1] < step]:
            leave(name, step)
        for name in sorted((n for n in names if n not in placed), key=lambda n: -size[n]):
            while (address := gap(size[name])) is None:
                others = [n for n in placed if n not in names]
                if not others:
                    break
                future = {n: next(s for s in uses[n] if s > step) for n in others}
                pick = max if policy == "belady" else min
                leave(pick(others, key=lambda n: (future[n] if policy == "belady" else size[n], n)), step)
            if address is None:
                break
            placed[name] = (step, address)
        else:
            continue
        # Only the operator's own tensors are left and there is still no gap: move them all together.
        for name in [n for n in placed]:
            leave(name, step)
        address = 0
        for name in names:
            placed[name] = (step, address)
            address += size[name]
    for name in list(placed):
        leave(name, len(order))
    residencies = tuple(sorted(stays, key=lambda stay: (stay.start, stay.address)))
    transfers = transfers_of(graph, order, residencies)
    traffic = sum(t.nbytes for t in transfers if t.kind in ("spill", "retrieve"))
    return Plan(
        graph_name=graph.name,
        graph_digest=graph.digest,
        scratchpad_bytes=budget,
        alignment=1,
        parameters=parameters,
        order=order,
        residencies=residencies,
        transfers=transfers,
        bound_bytes=traffic * 7 // 8,
        solver=policy,
        seconds=0.0123,
    )
