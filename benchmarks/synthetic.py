"""Large graphs made from a seed: layered random ones with long skips, and chains of random cells.

Sizes are in the proportions of activations of networks: a few different ones, which halve along the depth and
repeat often, rather than numbers all different.
"""

from __future__ import annotations

import random

from retensor.graph import Graph, Operator, Tensor

UNIT = 1024
"""All sizes are multiples of it, in bytes."""


def layered(operators: int, *, seed: int = 0, width: int = 6, skip: float = 0.1) -> Graph:
    """Layers of one to ``width`` operators that read one or two results of late; some read one from long ago.

    Parameters
    ----------
    operators : int
    seed : int
    width : int
        Most operators of a layer.
    skip : float
        Chance that an operator also reads a result that nothing has read yet, up to 40 layers old.

    Examples
    --------
    >>> graph = layered(100, seed=1)
    >>> len(graph.operators), graph.digest == layered(100, seed=1).digest
    (100, True)
    """
    chance = random.Random(seed)
    tensors = [Tensor("x", 16 * UNIT, "input")]
    made: list[Operator] = []
    recent, unread = ["x"], []
    while len(made) < operators:
        layer: list[str] = []
        for _ in range(min(chance.randint(1, width), operators - len(made))):
            name = f"t{len(made)}"
            reads = dict.fromkeys(chance.choice(recent) for _ in range(chance.choice((1, 1, 2))))
            if unread and chance.random() < skip:
                reads[chance.choice(unread)] = None
            unread = [other for other in unread if other not in reads]
            tensors.append(Tensor(name, chance.choice((2, 4, 4, 8, 8, 16)) * UNIT))
            layer.append(name)
            if chance.random() < 0.5:
                tensors.append(Tensor(f"w{len(made)}", chance.choice((1, 2, 4)) * UNIT, "parameter"))
                reads[f"w{len(made)}"] = None
            made.append(Operator(f"o{len(made)}", "Op", tuple(reads), (name,)))
        recent = (recent + layer)[-2 * width :]
        unread = (unread + layer)[-40 * width :]
    read = {name for operator in made for name in operator.inputs}
    outputs = [name for operator in made for name in operator.outputs if name not in read]
    return Graph(f"layered-{operators}-{seed}", made, tensors, outputs)


def cells(operators: int, *, seed: int = 0, size: int = 24, kinds: int = 8) -> Graph:
    """Random cells one after the other, each reading the results of the two before it, as searched networks do.

    Parameters
    ----------
    operators : int
    seed : int
    size : int
        Operators of a cell.
    kinds : int
        Different cells; they are repeated in random order.

    Examples
    --------
    >>> len(cells(100, seed=1).operators)
    100
    """
    chance = random.Random(seed)
    # A cell: what each operator reads, as positions among (two inputs, operators so far), and its result's size.
    library = [_cell(chance, size) for _ in range(kinds)]
    tensors = [Tensor("x", 4 * UNIT, "input")]
    made: list[Operator] = []
    older = newer = "x"
    while len(made) < operators:
        names = [older, newer]
        for reads, amount in chance.choice(library):
            if len(made) == operators:
                break
            name = f"t{len(made)}"
            tensors.append(Tensor(name, amount * UNIT))
            made.append(Operator(f"o{len(made)}", "Op", tuple(dict.fromkeys(names[k] for k in reads)), (name,)))
            names.append(name)
        older, newer = newer, names[-1]
    read = {name for operator in made for name in operator.inputs}
    outputs = [name for operator in made for name in operator.outputs if name not in read]
    return Graph(f"cells-{operators}-{seed}", made, tensors, outputs)


def _cell(chance: random.Random, size: int) -> list[tuple[list[int], int]]:
    """Operators of a cell: positions read, at most four, and units of the result; the last one joins what is left."""
    rows: list[tuple[list[int], int]] = []
    unread: list[int] = []
    for at in range(2, size + 2):
        left = size + 1 - at
        if left == 0:
            reads = unread
        elif len(unread) > min(4 + 3 * left, size // 2):
            reads = chance.sample(unread, 3)
        else:
            reads = sorted({chance.randrange(at) for _ in range(chance.choice((1, 1, 2)))})
        unread = [position for position in unread if position not in reads] + [at]
        rows.append((list(reads), chance.choice((1, 2, 4)) if left else 4))
    return rows
