"""Chains that no other order can help: pairs of operators of which the second follows the first at once.

Let operator *u* make one tensor *x* that only *v* reads. Two exchanges, in any plan by byte sums:

- *v to u*: *x* is all that *v* reads and its outputs take no more than *x*. Run *v* right after *u*. Its
  outputs take *x*'s place until *v*'s old step, and where *x* was written out and read back they are, for
  no more bytes. The only new moment is *v*'s step right after *u*: it fits if what *v* needs beside *x*
  is no more than what *u* has just let go (its parameters, and inputs no later operator reads).
- *u to v*: what *u* reads, only *u* reads, and it takes no more than *x*. Run *u* right before *v*, with
  its input in *x*'s place meanwhile. It fits if what *u* needs beside *x* is no more than what *v* adds.

Both keep every other step's bytes, so some optimal plan has all pairs found one after the other, chains
already found moving as one. Addresses are another matter (the room let go may be in pieces), so the pairs
serve the models without addresses only, whose optimum is a bound for those with.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from retensor.planning.problem import Problem


def glue(problem: Problem) -> list[tuple[int, int]]:
    """Pairs of operators ``(u, v)`` with ``v`` right after ``u`` in some optimal order."""
    chain_of = list(range(problem.n))
    members = {o: [o] for o in range(problem.n)}
    pairs: list[tuple[int, int]] = []
    changed = True
    while changed:
        changed = False
        for i, item in enumerate(problem.items):
            if item.producer < 0 or len(item.consumers) != 1 or not item.spill:
                continue
            u, v = item.producer, item.consumers[0]
            first, second = members[chain_of[u]], members[chain_of[v]]
            if first is second or first[-1] != u or second[0] != v:
                continue
            if _pull(problem, i, first, second) or _push(problem, i, first, second):
                pairs.append((u, v))
                for operator in second:
                    chain_of[operator] = chain_of[u]
                first += second
                changed = True
    return pairs


def waiting(problem: Problem, pairs: Sequence[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    """Predecessors where glued operators run without a break: the first also waits for all that the rest needs."""
    next_of, table = dict(pairs), [set(row) for row in problem.predecessors]
    for head in set(next_of) - set(next_of.values()):
        chain = [head]
        while chain[-1] in next_of:
            chain.append(next_of[chain[-1]])
        table[head] = {p for member in chain for p in table[member]} - set(chain)
    return tuple(tuple(sorted(row)) for row in table)


def _peak(problem: Problem, chain: list[int]) -> int:
    return max(problem.need[operator] for operator in chain)


def _is_path(problem: Problem, chain: list[int]) -> bool:
    """Whether inside the chain each operator reads just what the one before makes, and makes just that."""
    return all(problem.made[a] == problem.read[b] and len(problem.made[a]) == 1 for a, b in itertools.pairwise(chain))


def _only(table: Sequence[Sequence[int]], chain: list[int], allowed: set[int]) -> bool:
    """Whether nothing else holds the chain's operators, not even an order that no tensor asks for."""
    return all(other in allowed for operator in chain for other in table[operator])


def _pull(problem: Problem, x: int, first: list[int], second: list[int]) -> bool:
    u, v = first[-1], second[0]
    items = problem.items
    made = problem.made[second[-1]]
    if problem.read[v] != (x,) or not _is_path(problem, second) or problem.made[u] != (x,):
        return False
    if not _only(problem.predecessors, second, {u, *second}):
        return False
    if sum(items[i].room for i in made) > items[x].room or sum(items[i].size for i in made) > items[x].size:
        return False
    gone = problem.own(u)
    for i in problem.read[u]:
        others = sum(1 << user for user in items[i].users if user != u)
        if not others & ~problem.ancestors[u]:
            gone += items[i].room
    return _peak(problem, second) - items[x].room <= gone


def _push(problem: Problem, x: int, first: list[int], second: list[int]) -> bool:
    u, v = first[0], second[0]
    items = problem.items
    read = problem.read[u]
    if problem.made[first[-1]] != (x,) or not _is_path(problem, first):
        return False
    if not _only(problem.successors, first, {v, *first}):
        return False
    if any(items[i].consumers != (u,) for i in read):
        return False
    if sum(items[i].room for i in read) > items[x].room or sum(items[i].size for i in read) > items[x].size:
        return False
    added = problem.own(v) + sum(items[i].room for i in problem.made[v])
    return _peak(problem, first) - items[x].room <= added
