"""Random layered graphs of any size: branches that part and meet, and skips over several layers."""

from __future__ import annotations

import random

from retensor.graph import Graph, Operator, Tensor


def layered_graph(rng: random.Random, operators: int, width: int = 3) -> Graph:
    """A graph of ``operators`` operators in layers of up to ``width``, each reading one to three earlier ones."""
    tensors = [Tensor("x", rng.randint(1, 9) * 16, "input")]
    made: list[Operator] = []
    recent, unread = ["x"], []
    while len(made) < operators:
        layer = []
        for _ in range(min(rng.randint(1, width), operators - len(made))):
            i = len(made)
            reads = {rng.choice(recent) for _ in range(rng.choice([1, 1, 2]))}
            if unread and rng.random() < 0.6:
                reads.add(rng.choice(unread))
            unread = [name for name in unread if name not in reads]
            tensors.append(Tensor(f"t{i}", rng.randint(1, 9) * 16))
            layer.append(f"t{i}")
            if rng.random() < 0.5:
                tensors.append(Tensor(f"w{i}", rng.randint(1, 9) * 16, "parameter"))
                reads.add(f"w{i}")
            made.append(Operator(f"o{i}", "Op", tuple(sorted(reads)), (f"t{i}",)))
        recent = (recent + layer)[-2 * width :]
        unread += layer
    return Graph("layered", made, tensors, unread)
