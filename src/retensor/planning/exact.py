"""COSMA: the schedule, the addresses and the evictions with the least off-chip traffic, and the proof.

Li, Gupta and Malik, "COSMA: combined scheduling, memory allocation and tensor replacement for minimizing
off-chip data accesses of DNN accelerators", 2023, arXiv 2311.18246. The problem is theirs; it is solved
in stages that together are exact:

1. The graph falls into parts (:mod:`.problem`); equal parts are solved once.
2. Each part without addresses: no traffic where its least peak fits (:mod:`.peak`), else a search over orders
   and evictions, by frontiers (:mod:`.frontier`) and by CP-SAT over residencies (:mod:`.residency`), started
   from the best evictions for two good orders. The parts' optima add up to a lower bound of any plan.
3. Addresses for the stays found (:mod:`.allocate`). If they exist, the bound is met: the plan is optimal.
4. If a part's stays cannot be packed, that part is solved again with addresses in the model; if parts
   pack alone but not together, they are joined and solved as one. Each such step keeps a proved bound.

Whenever time runs out or the user stops it, the best complete plan so far is returned with its gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product

from retensor.graph.structure import Graph
from retensor.planning.allocate import Block, Packing, pack
from retensor.planning.baselines import Placement, Replacement, follow, sequence_of, simulate
from retensor.planning.bounds import resolve_scratchpad
from retensor.planning.chains import glue
from retensor.planning.frontier import search_frontier
from retensor.planning.peak import least_peak
from retensor.planning.plan import Accelerator, Plan, Residency, transfers_of
from retensor.planning.problem import Part, Problem, build_problem, check_feasible, make_part, split
from retensor.planning.progress import Clock, Progress, ProgressCallback
from retensor.planning.residency import (
    Answer,
    Stay,
    answer_from_evictions,
    keep_or_evict,
    schedule_and_evict,
    schedule_evict_and_place,
    steps_of,
)

FIRST_WIDTH = 200
"""States of a layer in the first frontier search; each further one has eight times as many."""
LARGEST_MODEL = 400
"""Operators of a part beyond which CP-SAT's model with a free order finds nothing in any reasonable time."""


def plan(
    graph: Graph,
    accelerator: Accelerator,
    *,
    parameters: bool = False,
    order: str | Sequence[str] | None = None,
    time_limit: float = 60.0,
    seed: int = 0,
    workers: int | None = None,
    progress: ProgressCallback | None = None,
) -> Plan:
    """The plan of least non-compulsory off-chip traffic for a graph on an accelerator.

    Parameters
    ----------
    graph : Graph
    accelerator : Accelerator
        Its scratchpad may be relative to the graph (``"M_R"``, ``"1.2*M_R"``).
    parameters : bool
        Whether parameters lie in the scratchpad too, each while its operators run.
    order : None, "default" or sequence of str
        Free (chosen with everything else), the program's, or the operators' names in the order to keep.
    time_limit : float
        Seconds of search; then, or on Ctrl-C, the best plan so far is returned with its bound and gap.
    seed : int
        Of the search's random choices.
    workers : int, optional
        Threads of the solver; all cores by default.
    progress : callable, optional
        Called with a :class:`~retensor.planning.progress.Progress` now and then.

    Returns
    -------
    Plan
        ``plan.status`` is ``"optimal"`` where ``plan.bound_bytes`` meets the traffic.

    Raises
    ------
    InfeasibleError
        Where one operator's inputs and outputs alone do not fit.
    PlanError
        Where ``order`` is not an order of this graph that runs.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> graph = Graph("two", [Operator("f", "f", ("x",), ("y",)), Operator("g", "g", ("x", "y"), ("z",))],
    ...               [Tensor("x", 4, "input"), Tensor("y", 2), Tensor("z", 3)], ["z"])
    >>> plan(graph, Accelerator(scratchpad=9)).status
    'optimal'
    """
    if isinstance(time_limit, bool) or not time_limit > 0:
        raise ValueError(f"time_limit is a positive number of seconds, not {time_limit}")
    clock = Clock(time_limit)
    scratchpad = resolve_scratchpad(graph, accelerator, parameters)
    check_feasible(graph, scratchpad, parameters, accelerator.alignment)
    problem = build_problem(graph, parameters, accelerator.alignment)
    fixed: tuple[int, ...] | None = None
    if order is not None:
        names = [operator.name for operator in graph.operators] if order == "default" else list(order)
        fixed = sequence_of(graph, names)
    search = _Search(problem, scratchpad, fixed, clock, seed, workers, progress)
    try:
        result = search.run()
    except KeyboardInterrupt:
        clock.stopped = True
        result = search.fallback()
    return finish(
        graph, accelerator, scratchpad, parameters, problem, result.order, result.stays, result.addresses,
        result.transient_addresses, bound=search.bound, solver="COSMA (CP-SAT)", seconds=clock.seconds,
        fixed_order=fixed is not None,
    )  # fmt: skip


def finish(
    graph: Graph,
    accelerator: Accelerator,
    scratchpad: int,
    parameters: bool,
    problem: Problem,
    order: tuple[int, ...],
    stays: Sequence[Stay],
    addresses: Sequence[int],
    transient_addresses: Sequence[Sequence[int]],
    *,
    bound: int,
    solver: str,
    seconds: float,
    fixed_order: bool,
) -> Plan:
    """A :class:`Plan` in the graph's names, from what a search decided on the whole problem."""
    step = steps_of(order)
    residencies = [
        Residency(problem.items[s.item].name, s.start, s.end, address)
        for s, address in zip(stays, addresses, strict=True)
    ]
    for operator, row in enumerate(problem.transients):
        for (name, _), address in zip(row, transient_addresses[operator], strict=True):
            residencies.append(Residency(name, step[operator], step[operator] + 1, address))
    residencies = _without_idle_moves(residencies)
    residencies.sort(key=lambda r: (r.start, r.address, r.tensor))
    names = tuple(graph.operators[o].name for o in order)
    ordered = tuple(residencies)
    transfers = transfers_of(graph, names, ordered)
    return Plan(
        graph_name=graph.name,
        graph_digest=graph.digest,
        scratchpad_bytes=scratchpad,
        alignment=accelerator.alignment,
        parameters=parameters,
        order=names,
        residencies=ordered,
        transfers=transfers,
        bound_bytes=bound,
        solver=solver,
        seconds=seconds,
        fixed_order=fixed_order,
        graph_options=dict(graph.options),
    )


def _without_idle_moves(residencies: list[Residency]) -> list[Residency]:
    """Join what leaves and comes back at once to the address it had."""
    kept: list[Residency] = []
    for residency in sorted(residencies, key=lambda r: (r.tensor, r.start)):
        last = kept[-1] if kept else None
        if last and (last.tensor, last.end, last.address) == (residency.tensor, residency.start, residency.address):
            kept[-1] = Residency(last.tensor, last.start, residency.end, last.address)
        else:
            kept.append(residency)
    return kept


@dataclass(frozen=True)
class _Layout:
    order: tuple[int, ...]
    stays: tuple[Stay, ...]
    addresses: tuple[int, ...]
    transient_addresses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Solved:
    part: Part
    answer: Answer


class _Search:
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
        self.bound = 0
        self.solved: list[_Solved] = []
        self._known: dict[object, Answer] = {}

    def run(self) -> _Layout:
        parts = self._parts()
        for done, part in enumerate(parts):
            key = part.problem.shape_key
            if key not in self._known:
                self._known[key] = self._without_addresses(part.problem)
            self.solved.append(_Solved(part, self._known[key]))
            self.bound = sum(s.answer.bound for s in self.solved)
            self._tell("evictions", done + 1, len(parts))
        layout = self._with_addresses()
        if traffic(self.problem, layout.stays) > self.bound:
            layout = min(layout, self.fallback(), key=lambda found: traffic(self.problem, found.stays))
        return layout

    def _parts(self) -> list[Part]:
        if self.fixed is None:
            return split(self.problem)
        # A given order may interleave what the cuts would part; its model is small anyway.
        return [make_part(self.problem, range(self.problem.n), None)]

    def _without_addresses(self, problem: Problem) -> Answer:
        if self.fixed is not None:
            return self._evict(problem, self.fixed)
        # A proof of the least peak is worth only part of the time: it tells whether no traffic is possible.
        low = least_peak(problem, Clock(self.clock.left / 5), seed=self.seed, workers=self.workers)
        if low.peak <= self.capacity:
            return answer_from_evictions(problem, low.order, set(), 0)
        best = self._evict(problem, low.order)
        if problem.is_chain or (best.proved and best.cost == 0):
            return best
        program = tuple(range(problem.n))
        if low.order != program:
            best = min(best, self._evict(problem, program), key=lambda answer: answer.cost)
        # What was proved of one order says nothing of the others.
        best = Answer(best.order, best.stays, best.cost, 0)
        # Where the least peak does not fit, some item leaves at least once.
        best = Answer(
            best.order, best.stays, best.cost, self._least_eviction(problem) if low.bound > self.capacity else 0
        )
        return self._improve(problem, best)

    def _improve(self, problem: Problem, best: Answer) -> Answer:
        """Frontier search and CP-SAT in turn, each from the best plan and bound so far, until one proves it.

        The frontier proves narrow problems at once and is the better beam; CP-SAT proves what is wide in orders
        but short on choices.
        """
        width = FIRST_WIDTH
        while not best.proved and self.clock.left > 0:
            best = search_frontier(problem, self.capacity, self.clock, best, width=width)
            if not best.proved and self.clock.left > 0 and width == FIRST_WIDTH and problem.n <= LARGEST_MODEL:
                best = schedule_and_evict(
                    problem, self.capacity, self.clock, best, bound=best.bound, glued=glue(problem), seed=self.seed,
                    workers=self.workers, time_limit=self.clock.left / 2, tell=self._watch(),
                )  # fmt: skip
            width *= 8
        return best

    def _least_eviction(self, problem: Problem) -> int:
        """Bytes of the cheapest single eviction: some tensor must leave where the least peak does not fit."""
        return min((item.size + item.spill for item in problem.items if item.size), default=0)

    def _evict(self, problem: Problem, order: tuple[int, ...]) -> Answer:
        return keep_or_evict(problem, self.capacity, order, self.clock, seed=self.seed, workers=self.workers)

    # -- addresses ------------------------------------------------------------------------------

    def _with_addresses(self) -> _Layout:
        """Pack the parts' stays; solve again, with addresses, what does not pack."""
        while True:
            order, stays = self._join()
            blocks = self._blocks(order, stays)
            quick = pack(blocks, self.scratchpad, self.problem.alignment, self.clock, exact=False, seed=self.seed)
            addresses = quick.addresses or self._pack_in_turn(blocks)
            if isinstance(addresses, tuple):
                return self._layout(order, stays, addresses)
            if addresses is None or not self._place(addresses):
                return self.fallback()

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
        placed, proved = schedule_evict_and_place(
            part.problem, self.scratchpad, self.clock, order=self.fixed, hint=hint, bound=bound,
            seed=self.seed, workers=self.workers, tell=self._watch("addresses"),
        )  # fmt: skip
        self.bound += proved - bound
        if placed is None:
            return False
        self.solved[conflict.start : conflict.stop] = [_Solved(part, placed.answer)]
        return True

    # -- joining parts --------------------------------------------------------------------------

    def _join(self) -> tuple[tuple[int, ...], tuple[Stay, ...]]:
        return join(self.problem, self.solved)

    def _blocks(self, order: tuple[int, ...], stays: Sequence[Stay]) -> list[Block]:
        """The stays, then every operator's transients, as blocks to pack."""
        step = steps_of(order)
        blocks = [Block(s.start, s.end, self.problem.items[s.item].size) for s in stays]
        for operator, row in enumerate(self.problem.transients):
            blocks += [Block(step[operator], step[operator] + 1, size) for _, size in row]
        return blocks

    def _layout(self, order: tuple[int, ...], stays: tuple[Stay, ...], addresses: tuple[int, ...]) -> _Layout:
        rest = iter(addresses[len(stays) :])
        transient = tuple(tuple(next(rest) for _ in row) for row in self.problem.transients)
        return _Layout(order, stays, addresses[: len(stays)], transient)

    def fallback(self) -> _Layout:
        """The best complete plan at hand: the stays found so far, and what replacement policies find."""
        problem, orders, runs = self.problem, [self.fixed or tuple(range(self.problem.n))], []
        if sum(len(s.part.operators) for s in self.solved) == problem.n:
            order, stays = self._join()
            runs.append((order, follow(problem, order, stays, self.scratchpad)))
            orders.append(order)
        policies: tuple[Replacement, ...] = ("belady", "greedy")
        placements: tuple[Placement, ...] = ("arena", "online")
        for order, policy, placement in product(dict.fromkeys(orders), policies, placements):
            runs.append((order, simulate(problem, order, self.scratchpad, policy, placement)))
        order, held = min(runs, key=lambda run: traffic(problem, run[1].stays))
        return _Layout(order, held.stays, held.addresses, held.transient_addresses)

    # -- progress -------------------------------------------------------------------------------

    def _watch(self, stage: str = "evictions") -> Callable[[int, int], None] | None:
        if self.progress is None:
            return None
        before = sum(s.answer.cost for s in self.solved)

        def tell(incumbent: int, bound: int) -> None:
            self._tell(stage, len(self.solved), 0, before + incumbent, self.bound + bound)

        return tell

    def _tell(self, stage: str, done: int, total: int, incumbent: int | None = None, bound: int | None = None) -> None:
        if self.progress:
            known = sum(s.answer.cost for s in self.solved)
            self.progress(
                Progress(
                    stage,
                    self.clock.seconds,
                    known if incumbent is None else incumbent,
                    self.bound if bound is None else bound,
                    done,
                    total or done,
                )
            )


def join(whole: Problem, solved: Sequence[_Solved]) -> tuple[tuple[int, ...], tuple[Stay, ...]]:
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


def traffic(problem: Problem, stays: Sequence[Stay]) -> int:
    """Non-compulsory bytes of a set of stays."""
    counts: dict[int, int] = {}
    for stay in stays:
        counts[stay.item] = counts.get(stay.item, 0) + 1
    items = problem.items
    return sum(items[i].size * (count - 1) + items[i].spill for i, count in counts.items() if count > 1)


def _relabel(part: Part, whole: Problem, order: Sequence[int], stays: Sequence[Stay]) -> Answer:
    """A joined answer in the terms of the part that replaces its pieces."""
    local = {operator: i + part.shift for i, operator in enumerate(part.operators)}
    index = {item.name: i for i, item in enumerate(part.problem.items)}
    moved = tuple(Stay(index[whole.items[s.item].name], s.start + part.shift, s.end + part.shift) for s in stays)
    head = (0,) if part.shift else ()
    return Answer((*head, *(local[o] for o in order)), moved, traffic(part.problem, moved), 0)
