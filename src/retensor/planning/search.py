"""The search behind :func:`retensor.planning.plan`, in stages that together are exact.

1. The graph falls into parts (:mod:`.problem`); equal parts are solved once.
2. Each part without addresses: no traffic where its least peak fits (:mod:`.peak`), else a search over orders
   and evictions, by frontiers (:mod:`.frontier`) and by CP-SAT over residencies (:mod:`.residency`), started
   from the best evictions for two good orders. The parts' optima add up to a lower bound of any plan.
3. Addresses for the stays found (:mod:`.allocate`). If they exist, the bound is met: the plan is optimal.
4. If a part's stays cannot be packed, that part is solved again with addresses in the model; if parts
   pack alone but not together, they are joined and solved as one. Each such step keeps a proved bound.

Every part has a first answer before any is improved, and addresses keep a share of the time, so whenever time
runs out or the user stops it, the best complete plan so far is there, with its bound.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, product

from retensor.planning.allocate import Block, Packing, pack
from retensor.planning.baselines import Placement, Replacement, evict_by_bytes, follow, simulate
from retensor.planning.chains import glue
from retensor.planning.frontier import search_frontier
from retensor.planning.peak import least_peak
from retensor.planning.problem import Part, Problem, make_part, split
from retensor.planning.progress import Clock, Progress, ProgressCallback
from retensor.planning.residency import (
    Answer,
    Stay,
    answer_from_evictions,
    keep_or_evict,
    schedule_and_evict,
    schedule_evict_and_place,
    steps_of,
    traffic,
)

FIRST_WIDTH = 200
"""States of a layer in the first frontier search; each further one has eight times as many."""
LARGEST_FRONTIER = 2_000_000
"""States that a frontier search may keep in all its layers: some hundred bytes each."""
LARGEST_MODEL = 400
"""Operators of a part beyond which CP-SAT's model with a free order finds nothing in any reasonable time."""
QUICK = 200_000
"""Operators times most tensors of one, up to which the simplest baselines run even when there is no time left."""
EVICTIONS_SHARE = 0.7
"""Part of the time for order and evictions; the rest is for addresses."""


@dataclass(frozen=True)
class Layout:
    """A plan in the whole problem's terms: ``addresses`` in bytes, one a stay; transients' by operator."""

    order: tuple[int, ...]
    stays: tuple[Stay, ...]
    addresses: tuple[int, ...]
    transient_addresses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Solved:
    """A part and its answer."""

    part: Part
    answer: Answer


class Search:
    """One run: the problem, the scratchpad in bytes, an order to keep or None, and the time there is."""

    def __init__(
        self,
        problem: Problem,
        scratchpad: int,
        fixed: tuple[int, ...] | None,
        clock: Clock,
        seed: int,
        workers: int | None,
        progress: ProgressCallback | None,
    ) -> None:
        self.problem = problem
        self.scratchpad = scratchpad
        self.capacity = -(-scratchpad // problem.alignment)
        self.fixed = fixed
        self.clock = clock
        self.seed = seed
        self.workers = workers
        self.progress = progress
        self.solved: list[Solved] = []

    @property
    def bound(self) -> int:
        """Proved lower bound of any plan's non-compulsory bytes (of any with the order to keep)."""
        return sum(s.answer.bound for s in self.solved)

    def run(self) -> Layout:
        """The best plan found before the clock ran out or was stopped."""
        self._solve_parts()
        layout = self._with_addresses()
        if layout is None:
            return self._fallback()
        if traffic(self.problem, layout.stays) > self.bound:
            layout = min(layout, self._fallback(), key=lambda found: traffic(self.problem, found.stays))
        return layout

    # -- order and evictions --------------------------------------------------------------------

    def _solve_parts(self) -> None:
        parts = self._parts()
        clock = self.clock.share(EVICTIONS_SHARE)
        answers: dict[object, Answer] = {}
        problems = {part.problem.shape_key: part.problem for part in parts}
        # What is not reached keeps an answer that needs no search.
        for key, problem in problems.items():
            answers[key] = self._without_search(problem)
        for done, (key, problem) in enumerate(problems.items()):
            answers[key] = self._first(problem, answers[key], clock.share(0.5))
            self._tell("first evictions", answers, parts, done + 1, len(problems))
        open_keys = [key for key in problems if not answers[key].proved]
        for done, key in enumerate(open_keys):
            share = clock.share(1 / (len(open_keys) - done))

            def keep(answer: Answer, key: object = key, done: int = done) -> None:
                answers[key] = answer
                self._tell("evictions", answers, parts, done, len(open_keys))

            self._improve(problems[key], answers[key], share, keep)
            self._tell("evictions", answers, parts, done + 1, len(open_keys))
        self.solved = [Solved(part, answers[part.problem.shape_key]) for part in parts]

    def _parts(self) -> list[Part]:
        if self.fixed is None:
            return split(self.problem)
        # A given order may interleave what the cuts would part; its model is small anyway.
        return [make_part(self.problem, range(self.problem.n), None)]

    def _without_search(self, problem: Problem) -> Answer:
        """The order at hand with Belady's evictions."""
        order = self.fixed or tuple(range(problem.n))
        stays = tuple(evict_by_bytes(problem, order, self.capacity, "belady"))
        return Answer(order, stays, traffic(problem, stays), 0)

    def _first(self, problem: Problem, known: Answer, clock: Clock) -> Answer:
        if self.fixed is not None:
            return min(self._evict(problem, self.fixed, clock), known, key=lambda answer: answer.cost)
        low = least_peak(problem, clock.share(0.4), seed=self.seed, workers=self.workers)
        if low.peak <= self.capacity:
            return answer_from_evictions(problem, low.order, set(), 0)
        best = self._evict(problem, low.order, clock.share(0.5))
        if problem.is_chain:
            return best
        program = tuple(range(problem.n))
        others = [known] if low.order == program or clock.left <= 0 else [known, self._evict(problem, program, clock)]
        best = min(best, *others, key=lambda answer: answer.cost)
        # What was proved of one order says nothing of the others.
        return replace(best, bound=min(best.cost, self._least_evictions(problem, low.bound - self.capacity)))

    def _least_evictions(self, problem: Problem, excess: int) -> int:
        """A lower bound of any plan's bytes where the least peak passes the capacity by ``excess`` units.

        Take a plan's order and evict nothing: some step then passes the capacity by as much. In the plan, items of
        at least that room are out at that step between two of their uses, so each is read again, and was written.
        """
        if excess <= 0:
            return 0
        priced = [(item.size + item.spill, item.room) for item in problem.items if item.room]
        cheapest = min(price for price, _ in priced)
        price, room = min(priced, key=lambda pair: pair[0] / pair[1])
        return max(cheapest, -(-excess * price // room))

    def _improve(self, problem: Problem, best: Answer, clock: Clock, keep: Callable[[Answer], None]) -> None:
        """Frontier search and CP-SAT in turn, each from the best plan and bound so far, until one proves it.

        The frontier proves narrow problems at once and is the better beam; CP-SAT proves what is wide in orders
        but short on choices.
        """
        widest = max(FIRST_WIDTH, LARGEST_FRONTIER // problem.n)
        width = FIRST_WIDTH
        while not best.proved and clock.left > 0:
            last = width >= widest
            best = search_frontier(problem, self.capacity, clock, best, width=min(width, widest), choices=width // 4)
            keep(best)
            if not best.proved and clock.left > 0 and problem.n <= LARGEST_MODEL and (last or width == FIRST_WIDTH):

                def tell(cost: int, bound: int, best: Answer = best) -> None:
                    keep(replace(best, cost=min(cost, best.cost), bound=max(bound, best.bound)))

                best = schedule_and_evict(
                    problem, self.capacity, clock, best, bound=best.bound, glued=glue(problem), seed=self.seed,
                    workers=self.workers, time_limit=clock.left if last else clock.left / 2,
                    tell=tell if self.progress else None,
                )  # fmt: skip
                keep(best)
            if last:
                return
            width *= 8

    def _evict(self, problem: Problem, order: tuple[int, ...], clock: Clock) -> Answer:
        return keep_or_evict(problem, self.capacity, order, clock, seed=self.seed, workers=self.workers)

    # -- addresses ------------------------------------------------------------------------------

    def _with_addresses(self) -> Layout | None:
        """Pack the parts' stays; solve again, with addresses, what does not pack. None where time ran out."""
        while True:
            order, stays = join(self.problem, self.solved)
            blocks = self._blocks(order, stays)
            quick = pack(blocks, self.scratchpad, self.problem.alignment, self.clock, exact=False, seed=self.seed)
            addresses = quick.addresses or self._pack_in_turn(blocks)
            if isinstance(addresses, tuple):
                return self._layout(order, stays, addresses)
            if addresses is None or not self._place(addresses):
                return None

    def _pack_in_turn(self, blocks: list[Block]) -> tuple[int, ...] | range | None:
        """Addresses part by part; or the parts that cannot be packed together; or None out of time.

        Only the entering tensor's block reaches into a part from before, so its address is what earlier
        parts leave decided. Where a part does not pack under it, the parts before are undone one by one.
        """
        ends = list(accumulate(len(s.part.operators) for s in self.solved))
        starts = [0, *ends[:-1]]
        placed: dict[int, int] = {}
        for last in range(len(self.solved)):
            first = last
            while True:
                low, high = starts[first], ends[last]
                members = [i for i, b in enumerate(blocks) if b.start < high and b.end > low]
                clipped = [Block(max(blocks[i].start, low), min(blocks[i].end, high), blocks[i].size) for i in members]
                entering = {k: placed[i] for k, i in enumerate(members) if blocks[i].start < low}
                packing = self._pack(clipped, entering)
                if packing.addresses is not None:
                    placed.update(zip(members, packing.addresses, strict=True))
                    break
                if not packing.impossible:
                    return None
                if entering:
                    packing = self._pack(clipped, {})
                    if packing.addresses is not None and first > 0:
                        first -= 1
                        continue
                return range(first, last + 1) if packing.impossible else None
        return tuple(placed[i] for i in range(len(blocks)))

    def _pack(self, blocks: list[Block], fixed: dict[int, int]) -> Packing:
        return pack(
            blocks, self.scratchpad, self.problem.alignment, self.clock, fixed=fixed, seed=self.seed,
            workers=self.workers,
        )  # fmt: skip

    def _place(self, conflict: range) -> bool:
        """Solve some consecutive parts as one, with addresses; False where time ran out first."""
        chosen = self.solved[conflict.start : conflict.stop]
        if len(chosen) == 1:
            part, hint = chosen[0].part, chosen[0].answer
        else:
            operators = [o for s in chosen for o in s.part.operators]
            # The parts come in an order that runs, but a part of the whole lists its operators as the graph does.
            part = make_part(self.problem, sorted(operators), chosen[0].part.entering)
            order, stays = join(self.problem, chosen)
            hint = _relabel(part, self.problem, order, stays)
        bound = sum(s.answer.bound for s in chosen)
        others = [s.answer for s in self.solved if s not in chosen]
        beside, under = sum(a.cost for a in others), sum(a.bound for a in others)

        def tell(incumbent: int, proved: int) -> None:
            if self.progress:
                shown = beside + incumbent, under + max(proved, bound)
                self.progress(Progress("addresses", self.clock.seconds, *shown, conflict.start, len(self.solved)))

        placed, proved = schedule_evict_and_place(
            part.problem, self.scratchpad, self.clock, order=self.fixed, hint=hint, bound=bound, seed=self.seed,
            workers=self.workers, tell=tell,
        )  # fmt: skip
        answer = replace(hint, bound=proved) if placed is None else placed.answer
        if len(chosen) == 1:
            # Equal parts have the same stays, which do not pack there either.
            key = part.problem.shape_key
            self.solved = [Solved(s.part, answer) if s.part.problem.shape_key == key else s for s in self.solved]
        else:
            self.solved[conflict.start : conflict.stop] = [Solved(part, answer)]
        return placed is not None

    def _blocks(self, order: tuple[int, ...], stays: Sequence[Stay]) -> list[Block]:
        """The stays, then every operator's transients, as blocks to pack."""
        step = steps_of(order)
        blocks = [Block(s.start, s.end, self.problem.items[s.item].size) for s in stays]
        for operator, row in enumerate(self.problem.transients):
            blocks += [Block(step[operator], step[operator] + 1, size) for _, size in row]
        return blocks

    def _layout(self, order: tuple[int, ...], stays: tuple[Stay, ...], addresses: tuple[int, ...]) -> Layout:
        rest = iter(addresses[len(stays) :])
        transient = tuple(tuple(next(rest) for _ in row) for row in self.problem.transients)
        return Layout(order, stays, addresses[: len(stays)], transient)

    def _fallback(self) -> Layout:
        """The best complete plan at hand: the stays found so far, and what replacement policies find."""
        problem, orders, runs = self.problem, [self.fixed or tuple(range(self.problem.n))], []
        if self.solved:
            order, stays = join(problem, self.solved)
            runs.append((order, follow(problem, order, stays, self.scratchpad)))
            orders.append(order)
        quick = problem.n * max(map(len, problem.touched)) <= QUICK
        policies: tuple[Replacement, ...] = ("belady", "greedy")
        placements: tuple[Placement, ...] = ("online", "arena")
        for order, placement, policy in product(dict.fromkeys(orders), placements, policies):
            # Placing as the steps come is quick, and no plan should be worse than the simplest baseline.
            due = placement == "online" and order == orders[0] and quick
            if runs and self.clock.left <= 0 and not due:
                continue
            runs.append((order, simulate(problem, order, self.scratchpad, policy, placement)))
        order, held = min(runs, key=lambda run: traffic(problem, run[1].stays))
        return Layout(order, held.stays, held.addresses, held.transient_addresses)

    # -- progress -------------------------------------------------------------------------------

    def _tell(self, stage: str, answers: dict[object, Answer], parts: list[Part], done: int, total: int) -> None:
        if self.progress:
            copies = Counter(part.problem.shape_key for part in parts)
            cost = sum(answers[key].cost * count for key, count in copies.items())
            bound = sum(answers[key].bound * count for key, count in copies.items())
            self.progress(Progress(stage, self.clock.seconds, cost, bound, done, total))


def join(whole: Problem, solved: Sequence[Solved]) -> tuple[tuple[int, ...], tuple[Stay, ...]]:
    """The parts' answers one after the other, in the whole problem's operators, items and steps."""
    index = {item.name: i for i, item in enumerate(whole.items)}
    order: list[int] = []
    stays: list[Stay] = []
    for entry in solved:
        part, answer = entry.part, entry.answer
        # A pseudo operator stands for the last operator of the part before.
        offset = len(order) - part.shift
        order += [part.operators[o - part.shift] for o in answer.order if o >= part.shift]
        for stay in answer.stays:
            item = index[part.problem.items[stay.item].name]
            stays.append(Stay(item, stay.start + offset, stay.end + offset))
    return tuple(order), tuple(stays)


def _relabel(part: Part, whole: Problem, order: Sequence[int], stays: Sequence[Stay]) -> Answer:
    """A joined answer in the terms of the part that replaces its pieces."""
    local = {operator: i + part.shift for i, operator in enumerate(part.operators)}
    index = {item.name: i for i, item in enumerate(part.problem.items)}
    moved = tuple(Stay(index[whole.items[s.item].name], s.start + part.shift, s.end + part.shift) for s in stays)
    head = (0,) if part.shift else ()
    return Answer((*head, *(local[o] for o in order)), moved, traffic(part.problem, moved), 0)
