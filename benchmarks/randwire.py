"""Randomly wired networks, the hardest that HMCOS was measured on: three stages of random graphs.

Saining Xie, Alexander Kirillov, Ross Girshick, Kaiming He, "Exploring Randomly Wired Neural Networks for Image
Recognition", 2019, arXiv 1904.01569; the small regime: stages of 32 nodes wired by Watts and Strogatz's model
WS(K=4, P=0.75), 78 channels, 1x3x224x224, 8-bit activations. An edge goes from the lower number to the higher. A
node is a weighted sum of its inputs (a concatenation first, as frameworks express it), then ReLU, then a separable
convolution; nodes without predecessor read the stage's input at stride 2, and the stage's output is the mean of the
nodes without successor. Batch normalisation is merged, the network is operators and sizes only.
"""

from __future__ import annotations

import random

from retensor.graph.structure import Graph, Operator, Tensor

NODES, NEIGHBOURS, REWIRE = 32, 4, 0.75
CHANNELS, PIXELS = 78, 224


def randwire(seed: int) -> Graph:
    """The network whose three graphs are drawn with ``seed``."""
    rng = random.Random(seed)
    made = _Maker()
    size = PIXELS // 2
    value = made.operator("Conv", ["image"], CHANNELS // 2 * size**2)
    size //= 2
    value = made.operator("Conv", [value], CHANNELS * size**2)
    channels = before = CHANNELS
    for _ in range(3):
        value = _stage(made, watts_strogatz(rng), value, (before, size), channels)
        size, before, channels = size // 2, channels, channels * 2
    value = made.operator("Conv", [value], 1280 * size**2)
    value = made.operator("GlobalAveragePool", [value], 1280)
    value = made.operator("Gemm", [value], 1000)
    return Graph(f"randwire-{seed}", made.operators, made.tensors, [value])


def watts_strogatz(rng: random.Random) -> list[list[int]]:
    """Predecessors of each node: a ring of neighbours, some edges of which are drawn anew."""
    near = {(i, (i + k) % NODES) for k in range(1, NEIGHBOURS // 2 + 1) for i in range(NODES)}
    edges = {frozenset(edge) for edge in near}
    for k in range(1, NEIGHBOURS // 2 + 1):
        for i in range(NODES):
            if rng.random() < REWIRE:
                free = [j for j in range(NODES) if j != i and frozenset((i, j)) not in edges]
                edges.discard(frozenset((i, (i + k) % NODES)))
                edges.add(frozenset((i, rng.choice(free))))
    return [sorted(i for i in range(node) if frozenset((i, node)) in edges) for node in range(NODES)]


class _Maker:
    def __init__(self) -> None:
        self.tensors = [Tensor("image", 3 * PIXELS**2, "input")]
        self.operators: list[Operator] = []

    def operator(self, kind: str, reads: list[str], nbytes: int) -> str:
        name = f"t{len(self.operators)}"
        self.tensors.append(Tensor(name, nbytes))
        self.operators.append(Operator(f"{kind}{len(self.operators)}", kind, tuple(reads), (name,)))
        return name


def _stage(made: _Maker, predecessors: list[list[int]], value: str, entering: tuple[int, int], channels: int) -> str:
    before, size = entering
    results: list[str] = []
    for row in predecessors:
        here = (before * size**2) if not row else channels * (size // 2) ** 2
        x = [results[i] for i in row] or [value]
        summed = made.operator("Concat+MatMul", x, here) if len(x) > 1 else x[0]
        relu = made.operator("Relu", [summed], here)
        depthwise = made.operator("Conv", [relu], (channels if row else before) * (size // 2) ** 2)
        results.append(made.operator("Conv", [depthwise], channels * (size // 2) ** 2))
    read = {i for row in predecessors for i in row}
    ends = [result for node, result in enumerate(results) if node not in read]
    return made.operator("Mean", ends, channels * (size // 2) ** 2)
