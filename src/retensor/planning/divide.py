"""Divide and conquer: the COSMA paper's own heuristic for searched networks, as a baseline.

Li, Gupta and Malik, "COSMA: combined scheduling, memory allocation and tensor replacement for minimizing off-chip
data accesses of DNN accelerators", 2023, arXiv 2311.18246. Networks that an architecture search made are too large for
its integer program; the graph is split into segments, each is solved for schedule, allocation and replacement, and the
answers are joined. How the paper chooses segments and treats what crosses between them is not settled here from its
text, of which only the abstract was at hand; where there is a choice, this reading takes what favours the heuristic:

- *Segments* are runs of consecutive operators of an order, at most so many each, cut where the tensors that cross
  take the fewest bytes in all. Two orders are divided, the program's and the one of least peak (MPMF), each into
  segments of up to 30, 40, 50, 60, 80 and 100 operators (from half a cell of a searched network to two), and then the
  best plan's order again, with the cuts moved too, as long as that gains. The best plan counts.
- *Solving* a segment is the library's own planner: :class:`~retensor.planning.search.Search`, proofs, addresses and
  all. Equal segments are solved once.
- *What crosses* is counted on both sides. A segment starts with the tensors that the one before left in the
  scratchpad: they take room from its first step, may leave, and are written only if no copy is off-chip yet. What
  later segments read must be there at the segment's end, or its return is paid for.
- *Joining* puts the orders one after the other. The joined order is then solved once more as a whole with the order
  kept (the paper's fixed-schedule mode, a small program), so evictions are not bound to the cuts. Addresses are found
  for all residencies at once or segment by segment; where there are none, a little more is evicted as steps come.

What it proves of the whole is nothing: the plan's bound is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from retensor.graph.structure import Graph
from retensor.planning.allocate import Block, pack
from retensor.planning.assemble import finish
from retensor.planning.baselines import Held, follow
from retensor.planning.bounds import resolve_scratchpad
from retensor.planning.checks import check_accelerator, check_graph, check_search
from retensor.planning.late import postpone
from retensor.planning.peak import least_peak
from retensor.planning.plan import Accelerator, Plan
from retensor.planning.problem import Item, Part, Problem, build_problem, check_feasible, independent_parts, split
from retensor.planning.progress import Clock, Progress, ProgressCallback, stop_on_interrupt
from retensor.planning.residency import Stay, keep_or_evict, steps_of, traffic
from retensor.planning.search import Search
from retensor.units import whole

SIZES = (30, 40, 50, 60, 80, 100)
"""The most operators of a segment, each tried in turn."""
TURN = 0.25
"""Part of the time left that one division may take, where there is more to divide than one segment."""
SEGMENTS_SHARE = 0.8
"""Part of the time for segments; the rest is for the joined order and its addresses."""
TOGETHER = 3
"""Segments whose addresses are sought together where one alone does not pack under what is placed."""


def divide_and_conquer(
    graph: Graph,
    accelerator: Accelerator,
    *,
    parameters: bool = False,
    segment_operators: int | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """A plan by the paper's heuristic: segments solved one after the other, and joined.

    Parameters
    ----------
    graph : Graph
    accelerator : Accelerator
        Its scratchpad may be relative to the graph (``"M_R"``).
    parameters : bool
        Whether parameters lie in the scratchpad too.
    segment_operators : int, optional
        The most operators of a segment, at least 1; by default several sizes are tried and the best plan counts.
    time_limit : float
        Seconds, shared by the segments; what is not reached takes the first answer at hand.
    seed : int
        Of the search's random choices.
    workers : int, optional
        Threads of the solver; all cores by default.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` after each segment.

    Returns
    -------
    Plan
        Complete and valid, with a bound of 0.

    Raises
    ------
    InfeasibleError
        Where one operator's inputs and outputs alone do not fit.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("x", "y"), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> divide_and_conquer(graph, Accelerator(scratchpad=9), segment_operators=1).non_compulsory_bytes
    0
    """
    check_graph(graph)
    check_accelerator(accelerator)
    check_search(time_limit, seed, workers)
    sizes = SIZES if segment_operators is None else (whole(segment_operators, "segment_operators"),)
    if min(sizes) < 1:
        raise ValueError(f"segment_operators is at least 1, not {segment_operators}")
    clock = Clock(time_limit)
    scratchpad = resolve_scratchpad(graph, accelerator, parameters, time_limit=time_limit, seed=seed, workers=workers)
    check_feasible(graph, scratchpad, parameters, accelerator.alignment)
    problem = postpone(build_problem(graph, parameters, accelerator.alignment))
    with stop_on_interrupt(clock):
        found = _Divider(problem, scratchpad, clock, seed, workers, progress).run(sizes)
    held = found.held
    return finish(
        graph, accelerator, scratchpad, parameters, problem, found.order, held.stays, held.addresses,
        held.transient_addresses, bound=0, solver="divide and conquer", seconds=clock.seconds, fixed_order=False,
    )  # fmt: skip


def segments(problem: Problem, order: Sequence[int], most: int, first: int | None = None) -> list[tuple[int, ...]]:
    """Consecutive operators of ``order``, at most ``most`` together, with the least sum of bytes across all cuts.

    ``first`` is the most operators of the first segment, where it may be shorter than the others.
    """
    step = steps_of(order)
    change = [0] * (len(order) + 1)
    for item in problem.items:
        uses = [step[user] for user in item.users]
        change[min(uses) + 1] += item.size
        change[max(uses) + 1] -= item.size
    crossing = list(accumulate(change))
    # Least sum of a division that ends before each position, and where its last segment starts.
    least, start = [0], [0]
    for end in range(1, len(order) + 1):
        starts = range(max(0 if end <= (first or most) else 1, end - most), end)
        best = min(starts, key=lambda s: (least[s], s))
        least.append(least[best] + (crossing[end] if end < len(order) else 0))
        start.append(best)
    found: list[tuple[int, ...]] = []
    end = len(order)
    while end:
        found.append(tuple(order[start[end] : end]))
        end = start[end]
    return found[::-1]


@dataclass(frozen=True)
class _Segment:
    """A segment as a problem of its own, and what its operators and items are in the whole.

    Operator ``i`` of ``problem`` is ``operators[i - shift]``; before them comes, where ``shift`` is 1, one that makes
    what lies in the scratchpad from before, after them one for each item that later segments read. ``alone`` are the
    items that one operator of the segment touches, and that neither enter nor leave: its problem has nothing to
    decide on them.
    """

    problem: Problem
    operators: tuple[int, ...]
    items: tuple[int, ...]
    alone: tuple[tuple[int, int], ...]
    shift: int


@dataclass(frozen=True)
class _Solution:
    """A segment's order and stays, in its problem's terms."""

    order: tuple[int, ...]
    stays: tuple[Stay, ...]


@dataclass(frozen=True)
class _Found:
    """A complete plan in the whole problem's terms, and the bytes it costs."""

    order: tuple[int, ...]
    held: Held
    cost: int


class _Divider:
    """One run of the heuristic."""

    def __init__(
        self,
        problem: Problem,
        scratchpad: int,
        clock: Clock,
        seed: int,
        workers: int | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.problem = problem
        self.scratchpad = scratchpad
        self.capacity = -(-scratchpad // problem.alignment)
        self.clock = clock
        self.seed = seed
        self.workers = workers
        self.progress = progress
        self.known: dict[object, _Solution] = {}
        self.divided: set[tuple[tuple[int, ...], ...]] = set()

    def run(self, sizes: Sequence[int]) -> _Found:
        """The best of the plans from two orders divided at each size, and of dividing the best one's order again."""
        least = self._least_peak_order()
        best: _Found | None = None
        for order in (tuple(range(self.problem.n)), least):
            for size in sizes:
                best = self._divide(order, size, best)
        assert best is not None
        gained = True
        while gained:
            before = best.cost
            for size in sizes:
                # A shorter first segment moves the cuts along, to where segments were whole before.
                best = self._divide(best.order, size, best)
                best = self._divide(best.order, size, best, first=-(-size // 2))
            gained = best.cost < before
        return best

    def _divide(self, order: tuple[int, ...], size: int, best: _Found | None, first: int | None = None) -> _Found:
        """The better of ``best`` and what ``order`` divided comes to, unless there is nothing to gain or no time."""
        if best is not None and (not best.cost or self.clock.left <= 0):
            return best
        division = tuple(segments(self.problem, order, size, first))
        if best is not None and division in self.divided:
            return best
        self.divided.add(division)
        found = self._conquer(division, self.clock.share(TURN if len(division) > 1 else 1.0))
        # Of two as good the later one counts: its order has not been divided yet.
        return found if best is None or found.cost <= best.cost else best

    def _least_peak_order(self) -> tuple[int, ...]:
        clock = self.clock.share(0.2)
        known: dict[object, tuple[int, ...]] = {}
        order: list[int] = []
        for part in split(self.problem):
            key = part.problem.shape_key
            if key not in known:
                known[key] = least_peak(part.problem, clock, seed=self.seed, workers=self.workers).order
            order += _operators(part, known[key])
        return tuple(order)

    # -- segments -------------------------------------------------------------------------------

    def _conquer(self, parts: Sequence[tuple[int, ...]], clock: Clock) -> _Found:
        """Solve the segments in turn, join them, and find addresses."""
        solving = clock.share(SEGMENTS_SHARE)
        inside: set[int] = set()
        copied: set[int] = set()
        order: list[int] = []
        stays: list[Stay] = []
        ends = [0]
        later = _last_segment(self.problem, parts)
        for k, members in enumerate(parts):
            # The planner lists operators in an order that runs; the whole's is one.
            segment = self._segment(sorted(members), inside, copied, {i for i, last in later.items() if last > k})
            solution = self._solve(segment, solving.share(1 / (len(parts) - k)))
            inside = self._append(segment, solution, order, stays, copied)
            ends.append(len(order))
            if self.progress:
                cost = traffic(self.problem, stays)
                self.progress(Progress("segments", self.clock.seconds, cost, None, k + 1, len(parts)))
        sequence = tuple(order)
        again = keep_or_evict(
            self.problem, self.capacity, sequence, clock.share(0.3), seed=self.seed, workers=self.workers
        )
        # Each has its own chance of addresses: fewer bytes may leave less room to place them.
        choices = dict.fromkeys(sorted((again.stays, tuple(stays)), key=lambda chosen: traffic(self.problem, chosen)))
        placed = [
            self._place(sequence, chosen, ends, clock.share(1 / (len(choices) - i))) for i, chosen in enumerate(choices)
        ]
        held = min(placed, key=lambda one: traffic(self.problem, one.stays))
        return _Found(sequence, held, traffic(self.problem, held.stays))

    def _segment(self, members: Sequence[int], inside: set[int], copied: set[int], leaving: set[int]) -> _Segment:
        """The problem of some operators with what lies in the scratchpad before them, and what must after them."""
        whole_problem = self.problem
        shift = 1 if inside else 0
        local = {operator: i + shift for i, operator in enumerate(members)}
        transients: list[list[tuple[str, int]]] = [[] for _ in range(shift)]
        transients += [list(whole_problem.transients[o]) for o in members]
        items: list[tuple[int, Item]] = []
        alone: list[tuple[int, int]] = []
        ends = len(members) + shift
        # What passes through untouched while it is out is no business of this segment's.
        for i in dict.fromkeys([i for o in members for i in whole_problem.touched[o]] + sorted(inside)):
            item = whole_problem.items[i]
            consumers = [local[c] for c in item.consumers if c in local]
            if i in leaving:
                consumers.append(ends)
                transients.append([])
                ends += 1
            producer = 0 if i in inside else local.get(item.producer, -1)
            # Read in for the first time here, or back in at a price already paid, it has its bytes off-chip.
            spill = item.spill if producer >= 0 and i not in copied else 0
            part = Item(item.name, item.size, item.room, producer, tuple(consumers), spill)
            if len(part.users) == 1:
                transients[part.users[0]].append((item.name, item.size))
                alone.append((i, part.users[0]))
            else:
                items.append((i, part))
        after = _in_between(whole_problem, members, local, shift, ends)
        items.sort(key=lambda pair: (pair[1].users, pair[1].size))
        listed = [part for _, part in items]
        operators = (
            *[-1] * shift,
            *(whole_problem.operators[o] for o in members),
            *[-1] * (ends - shift - len(members)),
        )
        # Tensors of no bytes tie together what may not be solved apart: the planner would run parts without a common
        # tensor one after the other, and cut where the pairs above, not tensors, put operators in line.
        links = [Item("", 0, 0, 0, (ends - 1,), 0)] if ends > shift + len(members) else []
        problem = _problem(operators, [*listed, *links], transients, whole_problem.alignment, after)
        if shift or links:
            apart = [group[0] for group in independent_parts(problem) if 0 not in group]
            links += [Item("", 0, 0, 0, (o,), 0) if shift else Item("", 0, 0, o, (ends - 1,), 0) for o in apart]
            problem = _problem(operators, [*listed, *links], transients, whole_problem.alignment, after)
        return _Segment(problem, tuple(members), tuple(i for i, _ in items), tuple(alone), shift)

    def _solve(self, segment: _Segment, clock: Clock) -> _Solution:
        key = segment.problem.shape_key
        if key not in self.known:
            search = Search(segment.problem, self.scratchpad, None, clock, self.seed, self.workers, None)
            layout = search.run()
            self.known[key] = _Solution(layout.order, layout.stays)
        return self.known[key]

    def _append(
        self, segment: _Segment, solution: _Solution, order: list[int], stays: list[Stay], copied: set[int]
    ) -> set[int]:
        """Add a segment's answer to the whole's; what lies in the scratchpad at its end."""
        low = segment.shift
        high = low + len(segment.operators)
        offset = len(order) - low
        order += [segment.operators[o - low] for o in solution.order if low <= o < high]
        step = steps_of(solution.order)
        stays += [Stay(i, step[o] + offset, step[o] + offset + 1) for i, o in segment.alone]
        inside: set[int] = set()
        carried = {stay.item: k for k, stay in enumerate(stays) if stay.end == low + offset}
        for stay in sorted(solution.stays, key=lambda s: s.start):
            if stay.item >= len(segment.items):
                continue
            item = segment.items[stay.item]
            start, end = max(stay.start, low) + offset, min(stay.end, high) + offset
            if stay.start < high < stay.end:
                inside.add(item)
            else:
                # It leaves for the last time, or there is a copy from now on.
                copied.add(item)
            if stay.start < low:
                # It lay there before: no new stay.
                stays[carried[item]] = Stay(item, stays[carried[item]].start, end)
            elif start < end:
                stays.append(Stay(item, start, end))
        return inside

    # -- addresses ------------------------------------------------------------------------------

    def _place(self, order: tuple[int, ...], stays: Sequence[Stay], ends: list[int], clock: Clock) -> Held:
        """Addresses for the joined stays; with further evictions where they do not pack."""
        step = steps_of(order)
        blocks = [Block(s.start, s.end, self.problem.items[s.item].size) for s in stays]
        for operator, row in enumerate(self.problem.transients):
            blocks += [Block(step[operator], step[operator] + 1, size) for _, size in row]
        addresses = pack(
            blocks, self.scratchpad, self.problem.alignment, clock.share(0.3), exact=False, seed=self.seed
        ).addresses or self._place_in_turn(blocks, ends, clock)
        if addresses is None:
            return follow(self.problem, order, stays, self.scratchpad)
        rest = iter(addresses[len(stays) :])
        transient = tuple(tuple(next(rest) for _ in row) for row in self.problem.transients)
        return Held(tuple(stays), tuple(addresses[: len(stays)]), transient)

    def _place_in_turn(self, blocks: list[Block], ends: list[int], clock: Clock) -> tuple[int, ...] | None:
        """Addresses segment by segment; where one does not pack under those before, some of them are placed anew."""
        placed: dict[int, int] = {}
        for last, high in enumerate(ends[1:]):
            share = clock.share(1 / (len(ends) - 1 - last))
            for first in range(last, max(-1, last - TOGETHER), -1):
                low = ends[first]
                members = [i for i, b in enumerate(blocks) if b.start < high and b.end > low]
                clipped = [Block(max(blocks[i].start, low), min(blocks[i].end, high), blocks[i].size) for i in members]
                fixed = {k: placed[i] for k, i in enumerate(members) if blocks[i].start < low}
                packing = pack(
                    clipped, self.scratchpad, self.problem.alignment, share.share(0.5), fixed=fixed, seed=self.seed,
                    workers=self.workers,
                )  # fmt: skip
                if packing.addresses is not None:
                    placed.update(zip(members, packing.addresses, strict=True))
                    break
            else:
                return None
        return tuple(placed[i] for i in range(len(blocks)))


def _operators(part: Part, order: Sequence[int]) -> list[int]:
    """A part's order in the whole's operators."""
    return [part.operators[o - part.shift] for o in order if o >= part.shift]


def _last_segment(problem: Problem, parts: Sequence[Sequence[int]]) -> dict[int, int]:
    """The last segment that touches each item."""
    return {i: k for k, members in enumerate(parts) for o in members for i in problem.touched[o]}


def _in_between(
    problem: Problem, members: Sequence[int], local: dict[int, int], shift: int, ends: int
) -> tuple[tuple[int, int], ...]:
    """The pairs that keep a segment's operators after its first one and before those at its end."""
    pairs = {(local[a], local[b]) for a, b in problem.after if a in local and b in local}
    for o in members:
        if shift and not any(p in local for p in problem.predecessors[o]):
            pairs.add((0, local[o]))
        if not any(s in local for s in problem.successors[o]):
            pairs.update((local[o], end) for end in range(len(members) + shift, ends))
    return tuple(sorted(pairs))


def _problem(
    operators: tuple[int, ...],
    items: Sequence[Item],
    transients: Sequence[Sequence[tuple[str, int]]],
    alignment: int,
    after: tuple[tuple[int, int], ...],
) -> Problem:
    need = [sum(-(-size // alignment) for _, size in row) for row in transients]
    for item in items:
        for user in item.users:
            need[user] += item.room
    return Problem(operators, tuple(items), tuple(map(tuple, transients)), tuple(need), alignment, after)
