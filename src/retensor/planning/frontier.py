"""Order and evictions together, by a search over what has run: exact while it fits, a beam where it does not.

A state is the set of operators that have run, the items in the scratchpad, and those with a copy off-chip.
Operators run one layer of states after the other; a tensor leaves only when an operator needs its room, and
then what it costs is paid at once, its return included (it is read again, or it would not be there). Nothing is
lost: in any plan an eviction can wait until the first operator that needs the room, and a set of which a part
would do can wait in part.

Four rules keep the layers small:

- *Without a break.* A chain that no other order can help (:mod:`.chains`) runs from end to end once it is begun, and
  begins when all of it can run.
- *Cheaper or as good.* Of two states with the same operators run, one is dropped if the other reaches its
  contents for no more bytes: an item that is out has its return paid, so being out is never worse than being in;
  an item that is in can be put out at its price.
- *Run at once.* An operator whose inputs are in and whose outputs fit, and replace one of its dying inputs of at
  least their room and their price, runs now: in any plan where it runs later, its outputs can live that input's life
  until then.
- *Budget.* A state that costs as much as a known plan is dropped.

A layer of more than ``width`` states keeps the most promising. If that never happened, the best plan found is
optimal; otherwise the least cost among what was dropped bounds every plan that was not seen.
"""

from __future__ import annotations

from itertools import accumulate

from retensor.planning.chains import glue, waiting
from retensor.planning.problem import Problem, bits, turned
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, answer_from_evictions


class _State:
    __slots__ = ("copied", "cost", "done", "evicted", "held", "inside", "operator", "parent", "ready")

    def __init__(
        self,
        cost: int,
        done: int,
        inside: int,
        copied: int,
        held: int,
        ready: int,
        parent: _State | None,
        operator: int,
        evicted: tuple[int, ...],
    ) -> None:
        self.cost = cost
        self.done = done
        self.inside = inside
        self.copied = copied
        self.held = held
        self.ready = ready
        self.parent = parent
        self.operator = operator
        self.evicted = evicted


def search_frontier(
    problem: Problem, capacity: int, clock: Clock, known: Answer, *, width: int = 2_000, choices: int = 64
) -> Answer:
    """The better of ``known`` and the best plan found, with the bound that was proved.

    ``width`` limits the states of a layer, ``choices`` the sets to evict that one operator tries.
    """
    return _Frontier(problem, capacity, clock, known, width, choices).run()


class _Frontier:
    def __init__(self, problem: Problem, capacity: int, clock: Clock, known: Answer, width: int, choices: int) -> None:
        self.problem = problem
        self.capacity = capacity
        self.clock = clock
        self.known = known
        self.width = width
        self.choices = choices
        items = problem.items
        self.room = [item.room for item in items]
        self.price = [item.size for item in items]
        self.spill = [item.spill for item in items]
        self.users = [sum(1 << user for user in item.users) for item in items]
        self.own = [problem.own(operator) for operator in range(problem.n)]
        self.touch = [sum(1 << i for i in row) for row in problem.touched]
        pairs = glue(problem)
        self.next_of = dict(pairs)
        self.predecessors = waiting(problem, pairs)
        self.before = [sum(1 << p for p in row) for row in self.predecessors]
        self.successors = turned(self.predecessors)
        self.lost: int | None = None
        """Least cost of what was dropped for want of width."""

    def run(self) -> Answer:
        ready = 0
        for operator, row in enumerate(self.predecessors):
            if not row:
                ready |= 1 << operator
        layer = {0: [_State(0, 0, 0, 0, 0, ready, None, -1, ())]}
        for _ in range(self.problem.n):
            following: dict[int, list[_State]] = {}
            for states in layer.values():
                for state in states:
                    self._expand(state, following)
                    if self.clock.left <= 0:
                        # What is not expanded is dropped; nothing costs less than nothing.
                        return self._finish(None, 0)
                if len(following) > 20 * self.width:
                    # A wide graph makes many sets of each; they need not all be held at once.
                    following = self._narrow(following)
            layer = self._narrow(following)
            if not layer:
                break
        ends = [state for states in layer.values() for state in states]
        best = min(ends, key=lambda state: state.cost, default=None)
        return self._finish(best, self.lost)

    def _finish(self, best: _State | None, lost: int | None) -> Answer:
        known = self.known
        if best is not None and best.cost < known.cost:
            known = self._answer(best)
        bound = known.cost if lost is None else min(known.cost, lost)
        return Answer(known.order, known.stays, known.cost, max(bound, self.known.bound))

    # -- one step -------------------------------------------------------------------------------

    def _expand(self, state: _State, following: dict[int, list[_State]]) -> None:
        chained = self.next_of.get(state.operator)
        ready = bits(state.ready) if chained is None else [chained]
        for operator in ready if chained is None else ():
            if operator not in self.next_of and self._runs_at_once(state, operator):
                self._run(state, operator, (), following)
                return
        for operator in ready:
            if self.clock.left <= 0:
                return
            own = self.touch[operator]
            arriving = self.own[operator]
            for i in bits(own & ~state.inside):
                arriving += self.room[i]
            excess = state.held + arriving - self.capacity
            if excess <= 0:
                self._run(state, operator, (), following)
            else:
                for victims in self._victims(state, bits(state.inside & ~own), excess):
                    self._run(state, operator, victims, following)

    def _runs_at_once(self, state: _State, operator: int) -> bool:
        arriving = self.own[operator]
        rooms = prices = 0
        for i in bits(self.touch[operator] & ~state.inside):
            arriving += self.room[i]
            if self.problem.items[i].producer == operator:
                rooms += self.room[i]
                prices += self.price[i] + self.spill[i]
            elif self.users[i] & ~(state.done | 1 << operator):
                # It would be read in and stay: not for nothing.
                return False
        if state.held + arriving > self.capacity:
            return False
        if not rooms:
            return True
        done = state.done | 1 << operator
        for i in bits(self.touch[operator] & state.inside):
            if not self.users[i] & ~done and self.room[i] >= rooms:
                worth = self.price[i] + (0 if state.copied >> i & 1 else self.spill[i])
                if worth >= prices:
                    return True
        return False

    def _victims(self, state: _State, candidates: list[int], excess: int) -> list[tuple[int, ...]]:
        """Sets to evict of which no part would do, cheapest first."""
        candidates.sort(key=lambda i: -self.room[i])
        rooms = [self.room[i] for i in candidates]
        rest = list(accumulate(reversed(rooms), initial=0))[::-1]
        found: list[tuple[int, ...]] = []
        limit = 4 * self.choices
        # Largest first: a set is minimal if it falls short without its last, the smallest.
        stack: list[tuple[int, int, tuple[int, ...]]] = [(0, excess, ())]
        while stack and len(found) <= limit:
            at, missing, chosen = stack.pop()
            if at == len(rooms) or rest[at] < missing:
                continue
            stack.append((at + 1, missing, chosen))
            if not rooms[at]:
                continue
            if rooms[at] >= missing:
                found.append((*chosen, candidates[at]))
            else:
                stack.append((at + 1, missing - rooms[at], (*chosen, candidates[at])))
        if stack:
            self._drop(state.cost)
        found.sort(key=lambda chosen: sum(self._toll(state, i) for i in chosen))
        if len(found) > self.choices:
            self._drop(state.cost + sum(self._toll(state, i) for i in found[self.choices]))
            del found[self.choices :]
        return found

    def _toll(self, state: _State, i: int) -> int:
        return self.price[i] + (0 if state.copied >> i & 1 else self.spill[i])

    def _drop(self, cost: int) -> None:
        self.lost = cost if self.lost is None else min(self.lost, cost)

    def _run(self, state: _State, operator: int, victims: tuple[int, ...], following: dict[int, list[_State]]) -> None:
        cost, inside, copied, held = state.cost, state.inside, state.copied, state.held
        for i in victims:
            cost += self.price[i] + (0 if copied >> i & 1 else self.spill[i])
            inside &= ~(1 << i)
            copied |= 1 << i
            held -= self.room[i]
        if cost >= self.known.cost:
            return
        done = state.done | 1 << operator
        own = self.touch[operator]
        for i in bits(own & ~inside):
            held += self.room[i]
        inside |= own
        for i in bits(own):
            if not self.users[i] & ~done:
                held -= self.room[i]
                inside &= ~(1 << i)
                copied &= ~(1 << i)
        ready = state.ready & ~(1 << operator)
        for successor in self.successors[operator]:
            if not self.before[successor] & ~done:
                ready |= 1 << successor
        made = _State(cost, done, inside, copied, held, ready, state, operator, victims)
        self._admit(made, following.setdefault(done, []))

    # -- keeping layers small -------------------------------------------------------------------

    def _admit(self, new: _State, peers: list[_State]) -> None:
        if any(self._as_good(peer, new) for peer in peers):
            return
        peers[:] = [peer for peer in peers if not self._as_good(new, peer)]
        peers.append(new)

    def _as_good(self, a: _State, b: _State) -> bool:
        """Whether ``a`` reaches what ``b`` has for no more bytes than ``b`` has paid."""
        left = b.cost - a.cost
        if left < 0:
            return False
        # In a, out (and paid) in b: put it out. In both but copied only in b: b saves a write later.
        for i in bits(a.inside & ~b.inside):
            left -= self.price[i] + (0 if a.copied >> i & 1 else self.spill[i])
            if left < 0:
                return False
        for i in bits(a.inside & b.inside & b.copied & ~a.copied):
            left -= self.spill[i]
            if left < 0:
                return False
        return True

    def _narrow(self, layer: dict[int, list[_State]]) -> dict[int, list[_State]]:
        if sum(len(states) for states in layer.values()) <= self.width:
            return layer
        ranked = sorted(
            (state for states in layer.values() for state in states), key=lambda s: (s.cost + s.held, s.done)
        )
        for state in ranked[self.width :]:
            self._drop(state.cost)
        kept: dict[int, list[_State]] = {}
        for state in ranked[: self.width]:
            kept.setdefault(state.done, []).append(state)
        return kept

    # -- the plan -------------------------------------------------------------------------------

    def _answer(self, end: _State) -> Answer:
        path: list[_State] = []
        state: _State | None = end
        while state is not None and state.operator >= 0:
            path.append(state)
            state = state.parent
        path.reverse()
        evicted: set[tuple[int, int]] = set()
        last: dict[int, int] = {}
        for step, state in enumerate(path):
            for i in state.evicted:
                evicted.add((i, last[i]))
            for i in self.problem.touched[state.operator]:
                last[i] = step
        return answer_from_evictions(self.problem, tuple(s.operator for s in path), evicted, 0)
