"""The search behind :func:`retensor.planning.plan`, in stages that together are exact.

1. The graph falls into parts (:mod:`.problem`); equal parts are solved once.
2. Each part without addresses: no traffic where its least peak fits (:mod:`.peak`), else a search over orders
   and evictions, by frontiers (:mod:`.frontier`) and by CP-SAT over residencies (:mod:`.residency`), started
   from the best evictions for two good orders. The parts' optima add up to a lower bound of any plan. Parts that
   are large get better in windows (:mod:`.improve`) and have bounds of their own (:mod:`.lower`).
3. Addresses for the stays found (:mod:`.allocate`). If they exist, the bound is met: the plan is optimal.
4. If a part's stays cannot be packed, that part is solved again with addresses in the model; if parts
   pack alone but not together, they are joined and solved as one. Each such step keeps a proved bound. Where that
   takes too long, a little more is evicted instead (:mod:`.settle`).

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
from retensor.planning.settle import settle

FIRST_WIDTH = 200
"""States of a layer in the first frontier search, which needs no compiler."""
LARGEST_MODEL = 400
"""Operators of a part beyond which CP-SAT's model with a free order finds nothing in any reasonable time."""
LONG = 1_500
"""Operators of a program beyond which what grows with their square, or has no end, is left to windows and stretches."""
FEW = 60
"""Operators of a part up to which bounds and windows of their own tell nothing that the frontiers do not."""
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
        self.spare: Layout | None = None
        """A complete plan, should nothing better be found in time."""
        self.rounds = 0
        """How often evictions were gone on with after addresses."""

    @property
    def bound(self) -> int:
        """Proved lower bound of any plan's non-compulsory bytes (of any with the order to keep)."""
        return sum(s.answer.bound for s in self.solved)

    def run(self) -> Layout:
        """The best plan found before the clock ran out or was stopped."""
        self._solve_parts()
        begun = self.clock.seconds
        layout = self._with_addresses()
        if layout is None:
            return self._fallback()
        spent = self.clock.seconds - begun
        if self._cost(layout) > self.bound:
            layout = min(layout, self._fallback(), key=self._cost)
        # What addresses did not need goes to evictions again, with as much left as addresses took.
        while self._cost(layout) > self.bound and self.clock.left > 2 * spent + 0.1 and self._go_on(1.5 * spent):
            again = self._with_addresses()
            layout = min(layout, again, key=self._cost) if again else layout
        return layout

    def _cost(self, layout: Layout) -> int:
        return traffic(self.problem, layout.stays)

    def _go_on(self, reserve: float) -> bool:
        """Better the parts that are not proved, but for the last ``reserve`` seconds; whether any got better."""
        from retensor.planning.improve import improve

        open_parts = {s.part.problem.shape_key: s for s in self.solved if not s.answer.proved}
        # Smaller ones had CP-SAT until their time was out.
        large = [s for s in open_parts.values() if s.part.problem.n > LARGEST_MODEL and self.fixed is None]
        clock = self.clock.share(max(0.0, 1 - reserve / max(self.clock.left, 1e-9)))
        better: dict[object, Answer] = {}
        self.rounds += 1
        for done, solved in enumerate(large):
            problem, share = solved.part.problem, clock.share(1 / (len(large) - done))
            found = improve(problem, self.capacity, solved.answer, share, seed=self.seed + self.rounds)
            if found.cost < solved.answer.cost:
                better[problem.shape_key] = found
        self.solved = [Solved(s.part, better.get(s.part.problem.shape_key, s.answer)) for s in self.solved]
        # It belongs to the stays before.
        self.spare = None
        return bool(better)

    # -- order and evictions --------------------------------------------------------------------

    def _solve_parts(self) -> None:
        parts = self._parts()
        clock = self.clock.share(EVICTIONS_SHARE)
        answers: dict[object, Answer] = {}
        problems = {part.problem.shape_key: part.problem for part in parts}
        # What is not reached keeps an answer that needs no search.
        for key, problem in problems.items():
            answers[key] = self._without_search(problem)
        self._tell("first evictions", answers, parts, 0, len(problems))
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

    def _without_search(self, problem: Problem, order: tuple[int, ...] | None = None) -> Answer:
        """An order, by default the one at hand, with Belady's evictions."""
        order = order or self.fixed or tuple(range(problem.n))
        stays = tuple(evict_by_bytes(problem, order, self.capacity, "belady"))
        return Answer(order, stays, traffic(problem, stays), 0)

    def _first(self, problem: Problem, known: Answer, clock: Clock) -> Answer:
        if self.fixed is not None:
            if problem.n > LONG:
                return self._keep_order(problem, known, clock)
            return min(self._evict(problem, self.fixed, clock), known, key=lambda answer: answer.cost)
        long = problem.n > LONG
        if long and clock.left <= 0:
            return known
        low = least_peak(problem, clock.share(0.1 if long else 0.4), seed=self.seed, workers=self.workers)
        if low.peak <= self.capacity:
            return answer_from_evictions(problem, low.order, set(), 0)
        best = self._without_search(problem, low.order) if long else self._evict(problem, low.order, clock.share(0.5))
        if problem.is_chain:
            return best
        program = tuple(range(problem.n))
        others = [known]
        if low.order != program and clock.left > 0 and not long:
            others.append(self._evict(problem, program, clock))
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
        """Frontier searches and CP-SAT in turn, each from the best plan and bound so far, until one proves it.

        A frontier proves narrow problems at once; the wide one, compiled, those whose orders are few for the bytes at
        stake; windows better the plan of what is too wide; CP-SAT proves what is wide in orders but short on choices.
        """
        if self.fixed is not None:
            return
        if problem.n > LONG:
            # Of long programs nothing else comes to an end.
            self._in_windows(problem, best, clock, keep)
            return
        early = clock.share(0.2) if problem.n > FEW else clock
        best = search_frontier(problem, self.capacity, early, best, width=FIRST_WIDTH, choices=FIRST_WIDTH // 4)
        keep(best)
        if not best.proved and clock.left > 0:
            # It brings the compiler along, which most networks never need.
            from retensor.planning.wide import search_wide

            best = search_wide(problem, self.capacity, clock.share(0.7), best, keep=keep)
            keep(best)
        small = problem.n <= LARGEST_MODEL
        if not best.proved and problem.n > FEW:
            best = self._in_windows(problem, best, clock.share(0.5) if small else clock, keep)
        if not best.proved and small and clock.left > 0:

            def tell(cost: int, bound: int) -> None:
                keep(replace(best, cost=min(cost, best.cost), bound=max(bound, best.bound)))

            keep(
                schedule_and_evict(
                    problem, self.capacity, clock, best, bound=best.bound, glued=glue(problem), seed=self.seed,
                    workers=self.workers, time_limit=clock.left, tell=tell if self.progress else None,
                )
            )  # fmt: skip

    def _in_windows(self, problem: Problem, best: Answer, clock: Clock, keep: Callable[[Answer], None]) -> Answer:
        """A better plan by large-neighbourhood search, and lower bounds by what any order must hold and move."""
        from retensor.planning.improve import improve
        from retensor.planning.lower import lower_bound

        for share in (0.3, 1.0):
            best = improve(problem, self.capacity, best, clock.share(share), seed=self.seed, keep=keep)
            if share < 1:
                bound = lower_bound(
                    problem, self.capacity, best.order, best.cost, clock.share(0.5), seed=self.seed,
                    workers=self.workers,
                )  # fmt: skip
                best = replace(best, bound=max(best.bound, bound))
            keep(best)
        return best

    def _keep_order(self, problem: Problem, known: Answer, clock: Clock) -> Answer:
        """The given order of a long program with good evictions, and a bound for that order."""
        from retensor.planning.improve import improve
        from retensor.planning.projection import projection_bound

        best = improve(problem, self.capacity, known, clock.share(0.6), seed=self.seed, fixed=True)
        bound = projection_bound(problem, self.capacity, best.order, clock, fixed=True)
        return replace(best, bound=min(bound, best.cost))

    def _evict(self, problem: Problem, order: tuple[int, ...], clock: Clock) -> Answer:
        return keep_or_evict(problem, self.capacity, order, clock, seed=self.seed, workers=self.workers)

    # -- addresses ------------------------------------------------------------------------------

    def _with_addresses(self) -> Layout | None:
        """Pack the parts' stays; solve again, with addresses, what does not pack. None where time ran out."""
        while self.clock.left > 0 or self.problem.n <= LONG:
            order, stays = join(self.problem, self.solved)
            blocks = self._blocks(order, stays)
            quick = pack(blocks, self.scratchpad, self.problem.alignment, self.clock, exact=False, seed=self.seed)
            if quick.addresses is None and self.spare is None:
                self.spare = self._settle(order, stays)
                if self.spare and (self.problem.n > LONG or traffic(self.problem, self.spare.stays) <= self.bound):
                    return self.spare
            addresses = quick.addresses or self._pack_in_turn(blocks)
            if isinstance(addresses, tuple):
                return self._layout(order, stays, addresses)
            if addresses is None or not self._place(addresses):
                return None
        return None

    def _settle(self, order: tuple[int, ...], stays: tuple[Stay, ...]) -> Layout | None:
        """A complete plan that is a little dearer, at worst; None out of time."""
        answer = Answer(order, stays, traffic(self.problem, stays), self.bound)
        clock = self.clock if self.problem.n > LONG else self.clock.share(0.3)
        found = settle(self.problem, self.scratchpad, answer, clock, seed=self.seed, workers=self.workers)
        return Layout(order, found.stays, found.addresses, found.transient_addresses) if found else None

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
        placements: tuple[Placement, ...] = ("online",) if problem.n > LONG else ("online", "arena")
        for order, placement, policy in product(dict.fromkeys(orders), placements, policies):
            # Placing as the steps come is quick, and no plan should be worse than the simplest baseline.
            due = placement == "online" and order == orders[0] and quick
            if runs and self.clock.left <= 0 and not due:
                continue
            runs.append((order, simulate(problem, order, self.scratchpad, policy, placement, self.clock)))
        order, held = min(runs, key=lambda run: traffic(problem, run[1].stays))
        best = Layout(order, held.stays, held.addresses, held.transient_addresses)
        return min((best, self.spare or best), key=lambda found: traffic(problem, found.stays))

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
