"""Operators that depend on nothing that runs: they may wait until what they make is read.

A chain of operators that starts from no tensor but parameters (a bias gathered from a table, a weight that is
normalised) can run anywhere before its one reader *v*. In any plan, let it run right before *v* instead: its
result lies where it lay when *v* ran, and whatever else the chain needs meanwhile lies where *v* is about to
put what it makes or loads, if it fits there. Nothing else moves, so no plan gets worse, addresses included.

What it spares is the search: a network with such chains has no operator that all others are before or after,
and so no cuts. Therefore *v*'s other predecessors are put before the chain.
"""

from __future__ import annotations

from retensor.planning.problem import Item, Problem


def postpone(problem: Problem) -> Problem:
    """The same problem with such chains right before their readers, and after the readers' other predecessors."""
    chains = _chains(problem)
    if not chains:
        return problem
    tails = {chain[-1] for chain, _ in chains}
    late = {operator for chain, _ in chains for operator in chain}
    before: dict[int, list[int]] = {}
    for chain, reader in chains:
        before.setdefault(reader, []).extend(chain)
    order = [o for reader in range(problem.n) if reader not in late for o in (*before.get(reader, ()), reader)]
    new = {old: i for i, old in enumerate(order)}
    after = [
        (new[other], new[chain[0]]) for chain, reader in chains for other in problem.predecessors[reader]
        if other not in tails
    ]  # fmt: skip
    items = tuple(
        Item(i.name, i.size, i.room, new.get(i.producer, -1), tuple(sorted(new[c] for c in i.consumers)), i.spill)
        for i in problem.items
    )
    return Problem(
        tuple(problem.operators[o] for o in order),
        items,
        tuple(problem.transients[o] for o in order),
        tuple(problem.need[o] for o in order),
        problem.alignment,
        tuple(after),
    )


def _chains(problem: Problem) -> list[tuple[list[int], int]]:
    """Chains that start from nothing, each with the operator that reads its result."""
    made, read = problem.made, problem.read
    found = []
    for first in range(problem.n):
        if read[first]:
            continue
        chain, inside = [first], [size for _, size in problem.transients[first]]
        while len(made[chain[-1]]) == 1:
            result = made[chain[-1]][0]
            if len(problem.items[result].consumers) != 1:
                break
            reader = problem.items[result].consumers[0]
            if read[reader] == (result,) and len(made[reader]) == 1:
                chain.append(reader)
                inside += [problem.items[result].size, *(size for _, size in problem.transients[reader])]
                continue
            room = [problem.items[i].size for i in made[reader]] + [size for _, size in problem.transients[reader]]
            if _fits(inside, room, problem.alignment):
                found.append((chain, reader))
            break
    return found


def _fits(pieces: list[int], blocks: list[int], alignment: int) -> bool:
    """Whether the pieces go into the blocks, one beside the other at aligned addresses; larger first, first fit."""
    left = sorted(blocks, reverse=True)
    for piece in sorted(pieces, reverse=True):
        place = next((k for k, room in enumerate(left) if room >= piece), None)
        if place is None:
            return False
        left[place] -= -(-piece // alignment) * alignment
    return True
