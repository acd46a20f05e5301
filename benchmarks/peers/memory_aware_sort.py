"""Topological sorts that compilers use to lower the peak of memory: PyTorch Inductor's three and XLA's three.

*Inductor* (``torch/_inductor/memory.py``, PyTorch 2.6 and later, ``reorder_for_peak_memory``) tries three sorts and
keeps the best, the program's order included: *least peak memory first* (after "Buffer memory optimization for video
codec application modeled in Simulink", DAC 2006), *breadth first* by when predecessors ran, *depth first* by size.
*XLA* (``hlo_memory_scheduler.cc``) tries three and keeps the best: a *list* scheduler that frees most bytes
first, a *depth first* post-order that visits operands of many extra users first, and the plain *post-order*.

Each is written anew from the sources' description of what is chosen next, and ties fall as they do there (by position
where a source says by name or by hash table). As there, the peak by which a compiler picks among its three is that of
the whole order; here it is counted by :meth:`~benchmarks.peers.network.Network.peak`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

from benchmarks.peers.network import Network

Order = tuple[int, ...]


def inductor(network: Network) -> Order:
    """The best of Inductor's three sorts and the program's order."""
    program = tuple(range(network.n))
    return min((program, least_peak_first(network), breadth_first(network), depth_first(network)), key=network.peak)


def xla(network: Network) -> Order:
    """The best of XLA's three schedulers."""
    return min((list_schedule(network), extra_users_first(network), post_order(network)), key=network.peak)


def least_peak_first(network: Network) -> Order:
    """Inductor's ``lpmf``: what raises the peak least; among what does not raise it, what leaves least behind."""
    size = [sum(network.sizes[t] for t in row) for row in network.outputs]
    outputs = {t for t, row in enumerate(network.readers) if not row and network.producer[t] >= 0}
    # Network outputs have one more use, at the end.
    uses = [len(row) + (t in outputs) for t, row in enumerate(network.readers)]
    live = sum(network.sizes[t] for t, p in enumerate(network.producer) if p < 0)
    most = max(live, sum(network.sizes[t] for t in outputs))
    waiting = [len(row) for row in network.predecessors]
    ready = {o for o in range(network.n) if not waiting[o]}
    order: list[int] = []
    while ready:
        gap = most - live

        def key(o: int, gap: int = gap) -> tuple[int, int, int]:
            freed = sum(network.sizes[t] for t in network.inputs[o] if uses[t] == 1)
            return (size[o] if size[o] > gap else 0, size[o] - freed, o)

        chosen = min(ready, key=key)
        live += size[chosen]
        most = max(most, live)
        live -= sum(network.sizes[t] for t in network.inputs[chosen] if uses[t] == 1)
        for t in network.inputs[chosen]:
            uses[t] -= 1
        order.append(chosen)
        _advance(network, chosen, waiting, ready)
    return tuple(order)


def breadth_first(network: Network) -> Order:
    """Inductor's ``bfs``: the operator whose predecessors ran earliest."""
    waiting = [len(row) for row in network.predecessors]
    queue: list[tuple[list[int], int]] = [([], o) for o in range(network.n) if not waiting[o]]
    heapq.heapify(queue)
    at: dict[int, int] = {}
    while queue:
        chosen = heapq.heappop(queue)[1]
        at[chosen] = len(at)
        for other in network.successors[chosen]:
            waiting[other] -= 1
            if not waiting[other]:
                heapq.heappush(queue, (sorted(at[p] for p in network.predecessors[other]), other))
    return tuple(at)


def depth_first(network: Network) -> Order:
    """Inductor's ``dfs``: operators that touch fewest bytes first, each after its predecessors, in the same order."""
    touched = [
        sum(network.sizes[t] for t in (*reads, *makes))
        for reads, makes in zip(network.inputs, network.outputs, strict=True)
    ]
    return _visit(network, range(network.n), lambda o: (touched[o], o))


def list_schedule(network: Network) -> Order:
    """XLA's ``ListScheduler``: what frees most bytes beyond those it makes; then what has most users."""
    outputs = {t for t, row in enumerate(network.readers) if not row}
    uses = [len(row) + (t in outputs) for t, row in enumerate(network.readers)]
    waiting = [len(row) for row in network.predecessors]
    ready = {o for o in range(network.n) if not waiting[o]}
    order: list[int] = []
    while ready:

        def key(o: int) -> tuple[int, int, int]:
            # What comes from outside is none of the scheduler's business, as parameters of a computation.
            freed = sum(network.sizes[t] for t in network.inputs[o] if uses[t] == 1 and network.producer[t] >= 0)
            made = sum(network.sizes[t] for t in network.outputs[o])
            return (freed - made, len(network.successors[o]), -o)

        chosen = max(ready, key=key)
        for t in network.inputs[chosen]:
            uses[t] -= 1
        order.append(chosen)
        _advance(network, chosen, waiting, ready)
    return tuple(order)


def extra_users_first(network: Network) -> Order:
    """XLA's ``DFSMemoryScheduler``: a post-order that visits first the operands with most users beyond one above them,
    then those with most bytes."""
    extra, total = [0] * network.n, [0] * network.n
    bytes_so_far = 0
    for o in range(network.n):
        own = sum(network.sizes[t] for t in network.outputs[o])
        bytes_so_far += own
        # Both count a shared operand once a path, up to a cap.
        above = network.predecessors[o]
        extra[o] = min(max(0, len(network.successors[o]) - 1) + sum(extra[p] for p in above), network.n)
        total[o] = min(own + sum(total[p] for p in above), bytes_so_far)
    ends = [o for o in range(network.n) if not network.successors[o]]
    return _visit(network, ends, lambda o: (-extra[o], -total[o], o))


def post_order(network: Network) -> Order:
    """XLA's ``PostOrderScheduler``: each operator after its operands, in the order it reads them."""
    ends = [o for o in range(network.n) if not network.successors[o]]
    position = [{network.producer[t]: k for k, t in reversed(list(enumerate(row)))} for row in network.inputs]
    return _visit(network, ends, lambda o: o, lambda o, p: position[o][p])


def _advance(network: Network, chosen: int, waiting: list[int], ready: set[int]) -> None:
    ready.remove(chosen)
    for other in network.successors[chosen]:
        waiting[other] -= 1
        if not waiting[other]:
            ready.add(other)


def _visit(
    network: Network,
    roots: Iterable[int],
    key: Callable[[int], object],
    within: Callable[[int, int], object] | None = None,
) -> Order:
    """A depth-first post-order from ``roots`` along predecessors, both sorted by ``key``, or these by ``within``."""
    order: dict[int, None] = {}
    entered: set[int] = set()
    stack = sorted(roots, key=key, reverse=True)  # type: ignore[arg-type]
    while stack:
        operator = stack[-1]
        if operator in order:
            stack.pop()
        elif operator in entered:
            stack.pop()
            order[operator] = None
        else:
            entered.add(operator)
            above = [p for p in network.predecessors[operator] if p not in order]
            rank = key if within is None else lambda p, o=operator: within(o, p)
            stack += sorted(above, key=rank, reverse=True)  # type: ignore[arg-type]
    return tuple(order)
