"""A lower bound over all orders for wide graphs: the least that lies around an operator when it runs.

Elango, Rastello, Pouchet, Ramanujam and Sadayappan, "On characterizing the data movement complexity of computational
DAGs for parallel execution", SPAA 2014, arXiv 1404.4767: when an operator *o* runs, some set *D* of operators has run
that contains its ancestors and none of its descendants. Tensors with a user in *D* and a user outside it, beside those
that *o* itself touches, are in the scratchpad, which has ``capacity - need(o)`` units left for them, or out, which
costs their bytes. The least of the sums over all *D* is a minimum cut.

Here every tensor has a price (a retrieve, and a write where it has no copy) and takes room. For any rate of bytes a
unit, what is out costs at least the cut with weights ``min(price, rate * room)`` less ``rate * (capacity - need(o))``:
that much of the cut may be in. The cut is found as a maximum flow, and the flow through a tensor is what the bound of
that operator charges it; the rest of its price is left for the bounds of others. Since nothing is charged twice, the
bounds add up. A tensor with many users may leave many times: two operators may each charge a retrieve of it in full
where one of its users runs between them in every order. Only operators near *o* in a given order are looked at: leaving
out the others is a projection (see :mod:`.projection`), so the bound stays one.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
from ortools.graph.python import max_flow

from retensor.planning.crossing import longest_chain
from retensor.planning.problem import Problem
from retensor.planning.progress import Clock
from retensor.planning.residency import steps_of

LEAST_REACH, EFFORT = 160, 200_000
"""Operators to either side of one that its cut looks at, at least; more where few cuts are looked for, up to that many
operators in all of them."""
SHARES = (0.5, 0.25, 0.0)
"""An operator is taken in a pass where its bound is at least this part of what it charges, or waits for the next."""
REMEMBERED = 2_000
"""Operators whose neighbourhood is kept from pass to pass."""
SAMPLE = 20
"""Operators on which the time for one is measured."""
ENDLESS = 2**52


def wavefront_bound(
    problem: Problem,
    capacity: int,
    order: Sequence[int],
    clock: Clock,
    *,
    reach: int | None = None,
    shares: Sequence[float] = SHARES,
    keep: Callable[[int], None] | None = None,
) -> int:
    """Non-compulsory bytes that every plan moves at least.

    Parameters
    ----------
    problem : Problem
    capacity : int
        In units of the alignment.
    order : sequence of int
        An order that runs; one that moves few bytes serves best.
    clock : Clock
        Operators that are not reached in time add nothing.
    reach : int, optional
        Operators to either side of one that its cut looks at.
    shares : sequence of float
        One pass over the operators for each.
    keep : callable, optional
        Is given the bound after each pass.
    """
    search = _Wavefronts(problem, capacity, order)
    promising = search.promising()
    search.reach = reach or max(LEAST_REACH, EFFORT // max(1, len(promising)))
    promising = _affordable(search, promising, clock, len(shares))
    for share in shares:
        for at in promising:
            if clock.left <= 0:
                return search.total
            search.charge(at, share)
        if keep:
            keep(search.total)
    return search.total


def _affordable(search: _Wavefronts, promising: list[int], clock: Clock, passes: int) -> list[int]:
    """As many steps as there is time for, spread over the program: neighbours tell much the same."""
    if len(promising) <= SAMPLE or clock.left == float("inf"):
        return promising
    begun = clock.left
    for at in promising[:: len(promising) // SAMPLE][:SAMPLE]:
        search.near_of(at)
    each = max(1e-6, (begun - clock.left) / SAMPLE)
    stride = -(-len(promising) * passes * each // max(begun, 1e-6))
    if stride <= 1:
        return promising
    chosen = set(sorted(promising)[:: int(stride)])
    return [at for at in promising if at in chosen]


class _Wavefronts:
    def __init__(self, problem: Problem, capacity: int, order: Sequence[int]) -> None:
        self.problem = problem
        self.capacity = capacity
        self.order = tuple(order)
        self.step = steps_of(self.order)
        self.reach = LEAST_REACH
        self.prices = [_Price(item.size, item.spill) for item in problem.items]
        for i, item in enumerate(problem.items):
            if len(item.users) > 2:
                chain = longest_chain(sorted(item.users), problem.descendants)
                self.prices[i] = _Price(item.size, item.spill, tuple(chain))
        self.total = 0
        self.near: dict[int, _Near] = {}
        densities = sorted({(item.size + item.spill) // item.room for item in problem.items if item.room} - {0})
        # All of them, where they are few: a unit is a unit of the alignment, so most items have one of two.
        self.rates = densities[:: max(1, len(densities) // 3)][:3] + densities[-1:] if len(densities) > 4 else densities

    def promising(self) -> list[int]:
        """Steps whose bound may be above nothing, the largest parts of what they charge first.

        What lies around an operator in the given order is one of the cuts, so the least one is no more. The rate that
        makes most of it is the one that the operator is tried with.
        """
        items, n = self.problem.items, self.problem.n
        best = np.zeros(n)
        self.rate = np.zeros(n, dtype=np.int64)
        need = np.array([self.problem.need[o] for o in self.order], dtype=np.int64)
        gain = np.zeros(n, dtype=np.int64)
        for rate in self.rates:
            around = np.zeros(n + 1, dtype=np.int64)
            weights = [min(item.size + item.spill, rate * item.room) for item in items]
            for item, weight in zip(items, weights, strict=True):
                if not weight:
                    continue
                uses = [self.step[user] for user in item.users]
                around[min(uses)] += weight
                around[max(uses) + 1] -= weight
            around = np.cumsum(around[:-1])
            for item, weight in zip(items, weights, strict=True):
                # An item that the operator uses is no matter of the cut.
                for user in item.users:
                    around[self.step[user]] -= weight
            value = around - rate * (self.capacity - need)
            share = np.where(value > 0, value / np.maximum(around, 1), 0)
            self.rate[value > gain] = rate
            gain = np.maximum(gain, value)
            best = np.maximum(best, share)
        found = np.argsort(-best, kind="stable")
        return [int(at) for at in found if best[at] > 0]

    def near_of(self, at: int) -> _Near:
        """The operators near the one at a step."""
        near = self.near.get(at) or _Near(self, at)
        if len(self.near) < REMEMBERED:
            self.near[at] = near
        return near

    def charge(self, at: int, share: float) -> None:
        """Add the bound of the operator at a step, where it is large enough a part of what it charges."""
        near, rate = self.near_of(at), int(self.rate[at])
        least, flows = near.cut(rate)
        value = least - rate * (self.capacity - self.problem.need[self.order[at]])
        if value > 0 and value >= share * sum(flows.values()):
            self.total += value
            for i, flow in flows.items():
                self.prices[i].pay(flow, near.span[i])


class _Price:
    """What an item may still be charged: one write, and a retrieve between any two of the users of a chain.

    The users of ``chain`` follow one on the other in every order. Entry *k* of ``retrieves`` is for what leaves and
    comes back after ``chain[k - 1]`` and before ``chain[k]``.
    """

    def __init__(self, size: int, spill: int, chain: tuple[int, ...] = ()) -> None:
        self.write = spill
        self.chain = chain
        self.retrieves = [size] * (len(chain) + 1)

    def span(self, before: int, after: int) -> tuple[int, int]:
        """Entries that an operator with these ancestors and descendants (bits) may fall into: from, up to."""
        low = bisect_left(self.chain, True, key=lambda user: not before >> user & 1)
        high = bisect_left(self.chain, True, key=lambda user: after >> user & 1 == 1)
        return low, high + 1

    def left(self, span: tuple[int, int]) -> int:
        """What an operator may charge."""
        return min(self.retrieves[span[0] : span[1]]) + self.write

    def pay(self, amount: int, span: tuple[int, int]) -> None:
        """Take an amount away, of the retrieves first."""
        low, high = span
        retrieve = min(amount, *self.retrieves[low:high])
        for k in range(low, high):
            self.retrieves[k] -= retrieve
        self.write -= amount - retrieve


class _Near:
    """The operators near one, as the nodes of a network: 0 has run before it, 1 runs after it, others are free."""

    def __init__(self, whole: _Wavefronts, at: int) -> None:
        self.whole = whole
        problem, order = whole.problem, whole.order
        low, high = max(0, at - whole.reach), min(problem.n, at + whole.reach + 1)
        node = dict.fromkeys(order[low:high], -1)
        node[order[at]] = 0
        for operator in order[low : at + 1][::-1]:
            if node[operator] == 0:
                node.update((other, 0) for other in problem.predecessors[operator] if other in node)
        later = {order[at]}
        for operator in order[at + 1 : high]:
            if not later.isdisjoint(problem.predecessors[operator]):
                later.add(operator)
                node[operator] = 1
        count = 2
        for operator in order[low:high]:
            if node[operator] < 0:
                node[operator] = count
                count += 1
        self.node = node
        self.count = count
        tails: list[int] = []
        heads: list[int] = []
        for operator, own in node.items():
            if own != 1:
                for other in problem.predecessors[operator]:
                    if (there := node.get(other, 0)) != 0 and there != own:
                        tails.append(own)
                        heads.append(there)
        self.closure = tails, heads
        # Items that may lie around the operator: by how they can, and the nodes of their users.
        self.rows: list[tuple[int, int, tuple[int, ...]]] = []
        self.across: list[int] = []
        self.span: dict[int, tuple[int, int]] = {}
        before, after = problem.ancestors[order[at]], problem.descendants[order[at]]
        own_items = set(problem.touched[order[at]])
        for i in dict.fromkeys(i for o in order[low:high] for i in problem.touched[o]):
            item = problem.items[i]
            if i in own_items or not item.room:
                continue
            users = {node[user] for user in item.users if user in node}
            if len(users) < 2:
                continue
            self.span[i] = whole.prices[i].span(before, after) if whole.prices[i].chain else (0, 1)
            if 0 in users and 1 in users:
                self.across.append(i)
                continue
            maker = node.get(item.producer, -1) if item.producer >= 0 else -1
            # What the maker is to a cut any first user is not: an item from outside is around between any two users.
            self.rows.append((i, maker, tuple(sorted(users))))

    def cut(self, rate: int) -> tuple[int, dict[int, int]]:
        """The least cut with the given bytes a unit of room, and the flow through each item."""
        items, prices = self.whole.problem.items, self.whole.prices
        flows = {i: min(prices[i].left(self.span[i]), rate * items[i].room) for i in self.across}
        least = sum(flows.values())
        if not self.rows:
            return least, flows
        tails, heads = list(self.closure[0]), list(self.closure[1])
        limits = [ENDLESS] * len(tails)
        count = self.count
        arcs: list[tuple[int, int]] = []
        for i, maker, users in self.rows:
            arcs.append((i, len(tails)))
            weight = min(prices[i].left(self.span[i]), rate * items[i].room)
            if maker >= 0:
                tails.append(maker)
                heads.append(count)
                limits.append(weight)
                for user in users:
                    if user != maker:
                        tails.append(count)
                        heads.append(user)
                        limits.append(ENDLESS)
                count += 1
            else:
                tails.append(count)
                heads.append(count + 1)
                limits.append(weight)
                for user in users:
                    tails += [user, count + 1]
                    heads += [count, user]
                    limits += [ENDLESS, ENDLESS]
                count += 2
        network = max_flow.SimpleMaxFlow()
        names = network.add_arcs_with_capacity(
            np.array(tails, dtype=np.int32), np.array(heads, dtype=np.int32), np.array(limits, dtype=np.int64)
        )
        if network.solve(0, 1) != network.OPTIMAL:
            return least, flows
        through = network.flows(names)
        for i, arc in arcs:
            if through[arc]:
                flows[i] = int(through[arc])
        return least + network.optimal_flow(), flows
