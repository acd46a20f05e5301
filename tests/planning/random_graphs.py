"""Random small graphs with everything that a planner may trip over, and budgets near what they need."""

from __future__ import annotations

import random

from retensor.graph.structure import Graph, Operator, Tensor


def random_graph(rng: random.Random, most: int = 8) -> Graph:
    """A graph of 1 to ``most`` operators (at most 8 by default, so that a brute force can follow).

    One in six is a chain of identical cells, one in four a ladder of long skips that cross (the kind that needs
    evictions most), one in twenty holds tensors that fit by bytes but not by address. The others are built operator
    by operator with parallel branches, several outputs, tensors read by many operators, shared parameters, empty
    tensors, outputs that are also consumed, outputs that are inputs, and results that nothing reads.
    """
    roll = rng.random()
    if roll < 1 / 6:
        return _cells(rng, most)
    if roll < 5 / 12 and most >= 3:
        return _ladder(rng, most)
    if roll < 28 / 60 and most >= 8:
        return _fragmented(rng)
    return _general(rng, min(most, rng.choice([1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8, 8])))


def _size(rng: random.Random, sizes: list[int]) -> int:
    """Mostly 1 to 6, sometimes 0 or large, sometimes that of a tensor before."""
    roll = rng.random()
    if roll < 0.05:
        return 0
    if roll < 0.3 and sizes:
        return rng.choice(sizes)
    return rng.randint(7, 9) if roll < 0.33 else rng.randint(1, 6)


def _general(rng: random.Random, count: int) -> Graph:
    tensors: list[Tensor] = []
    sizes: list[int] = []

    def add(name: str, role: str) -> str:
        sizes.append(_size(rng, sizes))
        tensors.append(Tensor(name, sizes[-1], role))  # type: ignore[arg-type]
        return name

    inputs = [add(f"x{i}", "input") for i in range(rng.choice([1, 1, 1, 2, 3]))]
    parameters = [add(f"w{i}", "parameter") for i in range(rng.choice([0, 0, 1, 2, 3, 4]))]
    values = list(inputs)
    # How much the graph is a chain: reading the newest value only, or any value so far.
    chain = rng.choice([0.0, 0.1, 0.4, 0.8])
    operators = []
    for i in range(count):
        reads: list[str] = []
        for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3])):
            recent = values[-2:] if rng.random() < chain else values
            reads.append(rng.choice(recent))
        if parameters and rng.random() < 0.5:
            reads.append(rng.choice(parameters))
        writes = [add(f"t{i}_{k}", "activation") for k in range(rng.choice([1, 1, 1, 1, 1, 1, 1, 2, 2, 3]))]
        values += writes
        operators.append(Operator(f"o{i}", "Op", tuple(dict.fromkeys(reads)), tuple(writes)))
    read = {name for operator in operators for name in operator.inputs}
    ends = [name for name in values if name not in read and name not in inputs]
    # Some results that nothing reads stay unused; some that are read are outputs as well.
    outputs = [name for name in ends if rng.random() < 0.85]
    outputs += [name for name in values if name in read and name not in inputs and rng.random() < 0.12]
    outputs += [name for name in inputs if rng.random() < 0.05]
    rng.shuffle(outputs)
    return Graph("random", operators, tensors, outputs)


def _cells(rng: random.Random, most: int) -> Graph:
    """Identical cells one after another: a branch or two from each cell's input, joined at its end."""
    branches = [rng.randint(1, 2) for _ in range(rng.randint(1, 2))]
    per_cell = sum(branches) + 1
    count = max(1, min(most // per_cell, rng.randint(1, 4)))
    sizes = [[rng.randint(1, 6) for _ in range(length)] for length in branches]
    width, weight, with_parameter = rng.randint(1, 6), rng.randint(0, 4), rng.random() < 0.5
    skip = rng.random() < 0.5
    tensors = [Tensor("x", width, "input")]
    operators = []
    before = "x"
    for cell in range(count):
        ends = []
        for b, length in enumerate(branches):
            here = before
            for k in range(length):
                made = f"c{cell}_b{b}_{k}"
                tensors.append(Tensor(made, sizes[b][k]))
                operators.append(Operator(f"o_{made}", f"Branch{b}", (here,), (made,)))
                here = made
            ends.append(here)
        reads = [*ends, before] if skip else ends
        if with_parameter:
            tensors.append(Tensor(f"c{cell}_w", weight, "parameter"))
            reads.append(f"c{cell}_w")
        made = f"c{cell}_y"
        tensors.append(Tensor(made, width))
        operators.append(Operator(f"o_{made}", "Join", tuple(dict.fromkeys(reads)), (made,)))
        before = made
    # A cell may have been cut where ``most`` is smaller than one cell; keep what fits.
    operators = operators[:most]
    kept = {name for operator in operators for name in operator.inputs + operator.outputs}
    tensors = [tensor for tensor in tensors if tensor.name in kept]
    return Graph("cells", operators, tensors, [operators[-1].outputs[0]])


def _ladder(rng: random.Random, most: int) -> Graph:
    """Some operators one after another, then some that read the first ones' results again, mostly in reverse."""
    down = rng.randint(2, max(2, most // 2))
    up = rng.randint(1, max(1, most - down))
    sizes: list[int] = []
    tensors = [Tensor("x", rng.randint(1, 6), "input")]
    weights = [Tensor(f"w{i}", rng.randint(1, 4), "parameter") for i in range(rng.choice([0, 0, 1, 2]))]
    operators = []
    values = ["x"]
    for i in range(down + up):
        reads = [values[-1]]
        if i >= down:
            reads.append(values[max(0, 2 * down - i)] if rng.random() < 0.7 else rng.choice(values))
        if weights and rng.random() < 0.4:
            reads.append(rng.choice(weights).name)
        sizes.append(_size(rng, sizes))
        tensors.append(Tensor(f"t{i}", sizes[-1]))
        operators.append(Operator(f"o{i}", "Op", tuple(dict.fromkeys(reads)), (f"t{i}",)))
        values.append(f"t{i}")
    outputs = [values[-1]] + [name for name in values[:-1] if rng.random() < 0.1]
    return Graph("ladder", operators, tensors + weights, outputs)


# Lives (first step, one past the last, bytes) that never take more than the first number of bytes together, and yet
# have no addresses within it. About one in 4,000 random sets of lives that fill every step is like this.
_UNPLACEABLE = [
    (4, "014 122 132 241 261 351 361 451 572 672 781 783"),
    (7, "013 044 121 162 271 453 471 563 681 684 782"),
    (6, "012 014 123 133 242 261 342 361 461 473 673"),
]


def _fragmented(rng: random.Random) -> Graph:
    """A network whose only order leaves holes in the scratchpad that no choice of addresses avoids."""
    _, lives = rng.choice(_UNPLACEABLE)
    scale = rng.choice([1, 1, 2])
    boxes = [(int(life[0]), int(life[1]), int(life[2]) * scale) for life in lives.split()]
    steps = max(end for _, end, _ in boxes)
    # Empty tensors hand the order on without taking room.
    tensors = [Tensor(f"order{i}", 0) for i in range(steps)]
    tensors += [Tensor(f"t{k}", size) for k, (_, _, size) in enumerate(boxes)]
    operators = []
    for step in range(steps):
        reads = [f"order{step - 1}"] if step else []
        reads += [f"t{k}" for k, (start, end, _) in enumerate(boxes) if start < step == end - 1]
        writes = [f"order{step}", *(f"t{k}" for k, (start, _, _) in enumerate(boxes) if start == step)]
        operators.append(Operator(f"o{step}", "Op", tuple(reads), tuple(writes)))
    return Graph("fragmented", operators, tensors, [f"t{k}" for k, (_, end, _) in enumerate(boxes) if end == steps])


def minimum_scratchpad(graph: Graph, alignment: int = 1, parameters: bool = False) -> int:
    """M_R at an alignment: the least bytes in which every operator alone has a place for its tensors.

    Each tensor takes whole units of the alignment, but the topmost may end before its last unit does.
    """
    return max(
        packed_bytes([graph.tensors[name].nbytes for name in graph.operator_tensors(operator, parameters)], alignment)
        for operator in graph.operators
    )


def packed_bytes(sizes: list[int], alignment: int) -> int:
    """The least bytes that tensors of ``sizes`` take side by side at aligned addresses."""
    rounded = [-(-size // alignment) * alignment for size in sizes]
    slack = max((whole - size for whole, size in zip(rounded, sizes, strict=True)), default=0)
    return sum(rounded) - slack


def random_budget(graph: Graph, rng: random.Random, parameters: bool = False) -> tuple[int, int]:
    """A scratchpad between one byte too few and somewhat more than needed, and an alignment.

    One in five is the peak of the default order, where bytes fit without eviction and addresses may not.
    """
    alignment = rng.choice([1, 1, 1, 2, 4])
    if rng.random() < 0.2:
        return max(1, default_peak(graph, parameters)), alignment
    least = minimum_scratchpad(graph, alignment, parameters)
    extra = rng.choice([-1, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3, rng.randint(0, 8)])
    return max(1, least + extra), alignment


def default_peak(graph: Graph, parameters: bool = False) -> int:
    """The largest sum of living tensors when the operators run in the graph's own order."""
    steps = [graph.operator_tensors(operator, parameters) for operator in graph.operators]
    last = {name: step for step, names in enumerate(steps) for name in names}
    living: set[str] = set()
    peak = 0
    for step, names in enumerate(steps):
        living.update(names)
        peak = max(peak, sum(graph.tensors[name].nbytes for name in living))
        living = {name for name in living if last[name] > step}
    return peak
