"""Random networks of cells, the shape that HMCOS groups by, small enough that it finishes on all of them."""

from __future__ import annotations

import random

from retensor.graph.structure import Graph, Operator, Tensor


def celled_graph(rng: random.Random, cells: int) -> Graph:
    """Cells of three or four branches, each ended by a concatenation; a branch reads one of the two last results.

    A branch is one to three operators; sizes are drawn from 1 to 9.
    """
    tensors = [Tensor("x", rng.randint(1, 9), "input")]
    operators: list[Operator] = []
    results = ["x"]

    def operator(kind: str, reads: list[str]) -> str:
        name = f"t{len(operators)}"
        tensors.append(Tensor(name, rng.randint(1, 9)))
        operators.append(Operator(f"o{name}", kind, tuple(dict.fromkeys(reads)), (name,)))
        return name

    for _ in range(cells):
        ends = []
        for _ in range(rng.randint(3, 4)):
            here = rng.choice(results[-2:])
            for _ in range(rng.randint(1, 3)):
                here = operator("Conv", [here])
            ends.append(here)
        results.append(operator("Concat", ends))
    return Graph("cells", operators, tensors, [results[-1]])
