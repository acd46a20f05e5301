"""The four baselines of the COSMA paper: a given schedule, TensorFlow Lite's allocator, a replacement policy.

Operators run in the given order (the program's, or the one of least peak, MPMF). When a step's tensors do
not fit beside what is there, tensors that the step does not need leave:

- ``belady``: the one whose next use is furthest away, one after the other until there is room;
- ``greedy``: the set with the least bytes that makes room (the paper's integer program at each eviction).

Addresses are TensorFlow Lite's linear arena: larger tensors first, each into the smallest gap among those
alive at the same time. It can be read in two ways, and ``placement`` names which:

- ``arena``: the policy works on byte counts, and then all its residencies are placed at once, lifetimes
  known, as TensorFlow Lite does before it runs a model. Where that leaves one without a gap, the policy evicts
  once more among what lies there at the time, and all is placed again. Where ``online`` evicts less, it counts.
- ``online``: tensors are placed when their step comes. Where no gap is left although there are bytes
  enough, the policy evicts further until one opens (``greedy``: the least bytes whose leaving opens one, by
  looking at all windows of addresses). Where only the step's own tensors are left and still no gap is,
  its resident inputs leave too, smallest first, and come back elsewhere: there is always a plan.

The paper's figures (traffic even at ``M_P`` on nearly every network) are those of ``online``; ``arena`` is
the stronger baseline and the default.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import Literal

from retensor.graph.structure import Graph
from retensor.planning.allocate import Block, neighbours
from retensor.planning.assemble import finish, sequence_of
from retensor.planning.bounds import bounds, resolve_scratchpad
from retensor.planning.checks import check_accelerator, check_graph
from retensor.planning.plan import Accelerator, Plan
from retensor.planning.problem import Problem, build_problem, check_feasible
from retensor.planning.progress import Clock
from retensor.planning.residency import Stay, join_idle_moves, steps_of, traffic

Schedule = Literal["default", "mpmf"]
Replacement = Literal["belady", "greedy"]
Placement = Literal["arena", "online"]

SUMS = 100_000
"""Sums of bytes that the greedy choice looks at: all there are, but in networks with very many tensors alive."""

BASELINES: tuple[tuple[Schedule, Replacement], ...] = (
    ("default", "belady"),
    ("default", "greedy"),
    ("mpmf", "belady"),
    ("mpmf", "greedy"),
)
"""The pairs of schedule and replacement that the paper compares with."""


def baseline(
    graph: Graph,
    accelerator: Accelerator,
    *,
    schedule: Schedule = "default",
    replacement: Replacement = "belady",
    placement: Placement = "arena",
    parameters: bool = False,
    order: Sequence[str] | None = None,
) -> Plan:
    """A plan by one of the four baselines.

    Parameters
    ----------
    graph : Graph
    accelerator : Accelerator
    schedule : {"default", "mpmf"}
        The program's order, or the one of least peak footprint.
    replacement : {"belady", "greedy"}
    placement : {"arena", "online"}
        Addresses with lifetimes known in advance, or as the steps come.
    parameters : bool
        Whether parameters lie in the scratchpad too.
    order : sequence of str, optional
        The MPMF schedule where the caller has it already (``bounds(graph).order``).

    Raises
    ------
    InfeasibleError
        Where one operator alone does not fit.
    """
    check_graph(graph)
    check_accelerator(accelerator)
    if schedule not in ("default", "mpmf"):
        raise ValueError(f"schedule is 'default' or 'mpmf', not '{schedule}'")
    if replacement not in ("belady", "greedy"):
        raise ValueError(f"replacement is 'belady' or 'greedy', not '{replacement}'")
    if placement not in ("arena", "online"):
        raise ValueError(f"placement is 'arena' or 'online', not '{placement}'")
    scratchpad = resolve_scratchpad(graph, accelerator, parameters)
    check_feasible(graph, scratchpad, parameters, accelerator.alignment)
    if schedule == "default":
        names = [operator.name for operator in graph.operators]
    else:
        names = list(order or bounds(graph, parameters=parameters, alignment=accelerator.alignment).order)
    clock = Clock(float("inf"))
    problem = build_problem(graph, parameters, accelerator.alignment)
    sequence = sequence_of(graph, names)
    held = simulate(problem, sequence, scratchpad, replacement, placement)
    return finish(
        graph, accelerator, scratchpad, parameters, problem, sequence, held.stays, held.addresses,
        held.transient_addresses, bound=0,
        solver=f"{schedule} schedule, {replacement} replacement, {placement} placement",
        seconds=clock.seconds, fixed_order=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What a simulation kept where: addresses in bytes, beside the stays and the transients by step."""

    stays: tuple[Stay, ...]
    addresses: tuple[int, ...]
    transient_addresses: tuple[tuple[int, ...], ...]


class _Scratchpad:
    """Address ranges taken, by key: an item's index, or a negative one for a transient tensor."""

    def __init__(self, size: int, alignment: int) -> None:
        self.size = size
        self.alignment = alignment
        self.taken: dict[int, tuple[int, int]] = {}
        self.rows: list[tuple[int, int, int]] = []
        """Start, end and key by address, without empty tensors, which overlap nothing."""

    def copy(self) -> _Scratchpad:
        other = _Scratchpad(self.size, self.alignment)
        other.taken, other.rows = dict(self.taken), list(self.rows)
        return other

    def put(self, key: int, address: int, size: int) -> None:
        self.taken[key] = (address, address + size)
        if size:
            insort(self.rows, (address, address + size, key))

    def remove(self, key: int) -> int:
        """Free a key's range and return where it started."""
        start, end = self.taken.pop(key)
        if start < end:
            del self.rows[bisect_left(self.rows, (start, end, key))]
        return start

    def best_fit(self, size: int) -> int | None:
        """Start of the smallest gap that holds ``size`` bytes."""
        best: int | None = None
        least = self.size + 1
        low = 0
        for start, end, _ in [*self.rows, (self.size, self.size, 0)]:
            if start - low >= size:
                address = -(-low // self.alignment) * self.alignment
                if size <= start - address < least:
                    best, least = address, start - address
            if end > low:
                low = end
        return best

    def cheapest_window(self, size: int, removable: set[int]) -> set[int] | None:
        """The removable keys with the least bytes whose leaving opens a gap of ``size`` bytes."""
        rows = self.rows
        best: tuple[int, int, int] | None = None
        first = last = load = pinned = 0
        # A best window starts at the bottom or where some range ends; both of its ends only move up.
        for low in [0, *(end for _, end, _ in rows)]:
            address = -(-low // self.alignment) * self.alignment
            if address + size > self.size:
                break
            while last < len(rows) and rows[last][0] < address + size:
                load += rows[last][1] - rows[last][0]
                pinned += rows[last][2] not in removable
                last += 1
            while first < last and rows[first][1] <= address:
                load -= rows[first][1] - rows[first][0]
                pinned -= rows[first][2] not in removable
                first += 1
            if not pinned and (best is None or load < best[0]):
                best = (load, first, last)
        return None if best is None else {key for _, _, key in rows[best[1] : best[2]]}


def simulate(
    problem: Problem,
    order: tuple[int, ...],
    scratchpad: int,
    replacement: Replacement,
    placement: Placement = "arena",
    clock: Clock | None = None,
) -> Held:
    """Run ``order`` (operators of ``problem``) under a replacement policy; out of time, placed as the steps come."""
    online = _step_by_step(problem, order, scratchpad, replacement)
    if placement == "online":
        return online
    held = _arena(problem, order, scratchpad, replacement, clock or Clock(float("inf")))
    # Where the arena ends up evicting more, its user would rather place tensors as they come.
    return held if held and traffic(problem, held.stays) <= traffic(problem, online.stays) else online


def evict_by_bytes(problem: Problem, order: tuple[int, ...], capacity: int, replacement: Replacement) -> list[Stay]:
    """The policy's residencies where only the sum of bytes at each step counts."""
    step_of = steps_of(order)
    uses = [sorted(step_of[user] for user in item.users) for item in problem.items]
    room = [item.room for item in problem.items]
    since: dict[int, int] = {}
    held = 0
    # What may leave, by its next use; an entry counts while it is the item's latest.
    queue: list[tuple[int, int]] = []
    following: dict[int, int] = {}
    stays: list[Stay] = []
    for step, operator in enumerate(order):
        own = problem.touched[operator]
        excess = problem.need[operator] + held - sum(room[item] for item in own if item in since) - capacity
        victims: list[int] = []
        if excess > 0 and replacement == "belady":
            inside = set(own)
            while queue and excess > 0:
                use, item = heappop(queue)
                if following.get(item) == -use and item in since and item not in inside:
                    victims.append(item)
                    excess -= room[item]
        elif excess > 0:
            victims = _least_set({item: room[item] for item in since if item not in own}, excess)
        for item in victims:
            stays.append(Stay(item, since.pop(item), step))
            held -= room[item]
        for item in own:
            if item not in since:
                since[item] = step
                held += room[item]
            if uses[item][-1] == step:
                stays.append(Stay(item, since.pop(item), step + 1))
                held -= room[item]
            else:
                following[item] = uses[item][bisect_right(uses[item], step)]
                if replacement == "belady":
                    heappush(queue, (-following[item], item))
    return stays


def _least_set(rooms: dict[int, int], excess: int) -> list[int]:
    """The items with the least room in all, at least ``excess`` (of up to ``SUMS`` sums looked at)."""
    if excess <= 0:
        return []
    # Sums that stay below the excess, with the items that make them; the best that reaches it.
    below: dict[int, tuple[int, ...]] = {0: ()}
    best, best_items = sum(rooms.values()), tuple(rooms)
    for item, room in sorted(rooms.items(), key=lambda pair: -pair[1]):
        for total, items in list(below.items()):
            if total + room >= excess:
                if total + room < best:
                    best, best_items = total + room, (*items, item)
            elif len(below) < SUMS:
                below.setdefault(total + room, (*items, item))
    return sorted(best_items)


def _arena(
    problem: Problem, order: tuple[int, ...], scratchpad: int, replacement: Replacement, clock: Clock
) -> Held | None:
    """All residencies placed at once, larger first into the smallest gap, with further evictions until all fit.

    A residency without a gap makes the policy evict once more among what lies there at the same time: ``belady`` what
    is used furthest in the future, ``greedy`` what takes least. None where nothing more can leave, or out of time.
    """
    step = steps_of(order)
    stays = evict_by_bytes(problem, order, -(-scratchpad // problem.alignment), replacement)
    uses = [sorted(step[user] for user in item.users) for item in problem.items]
    fixed = [
        Block(step[operator], step[operator] + 1, size)
        for operator in range(problem.n)
        for _, size in problem.transients[operator]
    ]
    while clock.left > 0:
        blocks = [Block(s.start, s.end, problem.items[s.item].size) for s in stays] + fixed
        near = neighbours(blocks)
        places: dict[int, int] = {}
        stuck: int | None = None
        for i in sorted(range(len(blocks)), key=lambda k: (-blocks[k].size, blocks[k].start, k)):
            if clock.left <= 0:
                return None
            pad = _Scratchpad(scratchpad, problem.alignment)
            pad.rows = sorted(
                (places[other], places[other] + blocks[other].size, other)
                for other in near[i]
                if other in places and blocks[other].size
            )
            address = pad.best_fit(blocks[i].size)
            if address is None:
                stuck = i
                break
            places[i] = address
        if stuck is None:
            rest = iter(range(len(stays), len(blocks)))
            transient = tuple(tuple(places[next(rest)] for _ in row) for row in problem.transients)
            return Held(tuple(stays), tuple(places[i] for i in range(len(stays))), transient)
        options: list[tuple[int, int, int, int]] = []
        for i in (stuck, *near[stuck]):
            if i >= len(stays):
                continue
            stay, item = stays[i], problem.items[stays[i].item]
            for here, there in pairwise(uses[stay.item]):
                inside = stay.start <= here and there < stay.end and there - here > 1 and item.room
                if inside and here + 1 < blocks[stuck].end and blocks[stuck].start < there:
                    options.append((-there if replacement == "belady" else item.size, i, here, there))
        if not options:
            return None
        _, i, here, there = min(options)
        stay = stays[i]
        stays[i : i + 1] = [Stay(stay.item, stay.start, here + 1), Stay(stay.item, there, stay.end)]
    return None


def follow(problem: Problem, order: tuple[int, ...], stays: Sequence[Stay], scratchpad: int) -> Held:
    """Addresses as the steps come for stays that need not pack: more is evicted where no gap is left."""
    return _step_by_step(problem, order, scratchpad, "greedy", stays)


def _step_by_step(
    problem: Problem,
    order: tuple[int, ...],
    scratchpad: int,
    replacement: Replacement,
    intended: Sequence[Stay] = (),
) -> Held:
    """Place each step's tensors when it runs, evicting until there is a gap.

    What ``intended`` lets go before its last use leaves then, whether or not there is need.
    """
    step_of = steps_of(order)
    uses = [sorted(step_of[user] for user in item.users) for item in problem.items]
    pad = _Scratchpad(scratchpad, problem.alignment)
    since: dict[int, int] = {}
    stays: list[Stay] = []
    addresses: list[int] = []
    transient_addresses: list[tuple[int, ...]] = [()] * problem.n
    leaving: dict[int, list[int]] = {}
    for stay in intended:
        leaving.setdefault(stay.end, []).append(stay.item)

    def leave(item: int, step: int) -> None:
        stays.append(Stay(item, since.pop(item), step))
        addresses.append(pad.remove(item))

    for step, operator in enumerate(order):
        own = problem.touched[operator]
        for item in leaving.get(step, ()):
            if item in since:
                leave(item, step)
        sizes = {item: problem.items[item].size for item in own}
        transients = [-1 - position for position in range(len(problem.transients[operator]))]
        sizes |= {key: size for key, (_, size) in zip(transients, problem.transients[operator], strict=True)}
        distance: dict[int, int] = {}

        while True:
            wanted = sorted((key for key in sizes if key not in since), key=lambda key: (-sizes[key], key))
            trial = pad.copy()
            evicted = _make_room(trial, wanted, sizes, distance, replacement)
            if evicted is None and not distance:
                # Most steps evict nothing, and there may be very many tensors to look at.
                distance = {item: uses[item][bisect_right(uses[item], step)] for item in since if item not in sizes}
                if distance:
                    continue
            if evicted is not None:
                break
            inside = [item for item in own if item in since]
            if inside:
                leave(min(inside, key=lambda item: (sizes[item], item)), step)
                continue
            # Nothing of the step's own is left inside, yet the order of sizes does not pack: start afresh.
            trial, evicted = _stacked(sizes, scratchpad, problem.alignment), list(distance)
            break
        for item in evicted:
            leave(item, step)
        pad = trial
        for item in own:
            since.setdefault(item, step)
        transient_addresses[operator] = tuple(pad.remove(key) for key in transients)
        for item in own:
            if uses[item][-1] == step:
                leave(item, step + 1)
    return Held(*join_idle_moves(stays, addresses), tuple(transient_addresses))


def _make_room(
    pad: _Scratchpad, wanted: list[int], sizes: dict[int, int], distance: dict[int, int], replacement: Replacement
) -> list[int] | None:
    """Place ``wanted`` in ``pad``, evicting from ``distance`` (item to next use); None where it cannot be done."""
    evicted: list[int] = []
    for key in wanted:
        while (address := pad.best_fit(sizes[key])) is None:
            removable = {item for item in distance if item in pad.taken}
            if replacement == "greedy":
                victims = pad.cheapest_window(sizes[key], removable)
            elif removable:
                victims = {max(removable, key=lambda item: (distance[item], -item))}
            else:
                victims = None
            if victims is None:
                return None
            for item in victims:
                pad.remove(item)
            evicted += sorted(victims)
        pad.put(key, address, sizes[key])
    return evicted


def _stacked(sizes: dict[int, int], scratchpad: int, alignment: int) -> _Scratchpad:
    """A step's tensors one on the other; the one that its alignment would pad most goes on top."""
    pad = _Scratchpad(scratchpad, alignment)
    address = 0
    for key in sorted(sizes, key=lambda key: (-sizes[key] % alignment, key)):
        pad.put(key, address, sizes[key])
        address = -(-(address + sizes[key]) // alignment) * alignment
    return pad
