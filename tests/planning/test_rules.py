"""Each rule of the frontier searches, on the smallest problem found where it decides, against a dynamic program.

A condition too few drops the optimum, which random graphs seldom show. So ``CASES`` has a problem for each condition,
which stands beside it: without it the search misses the optimum there. The conditions of ``frontier.py`` stand again,
compiled, in ``layers.py``; each case asks both.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
from tests.planning.answer_check import check

from retensor.planning import chains, wide, windows
from retensor.planning.frontier import _Frontier, _State, search_frontier
from retensor.planning.problem import Item, Problem, bits
from retensor.planning.progress import Clock
from retensor.planning.projection import projection_bound
from retensor.planning.residency import Answer, Stay
from retensor.planning.wide import _Wide, search_wide

Row = tuple[int, tuple[int, ...], int]  # maker (-1: from outside), readers, size
Search = Callable[[Problem, int, Answer], Answer]
ENDLESS = 10**6


def build(
    capacity: int, rows: Sequence[Row], own: Sequence[int], after: Sequence[Any] = (), alignment: int = 1, stored=()
) -> tuple[Problem, int]:
    """A problem and its capacity; ``own`` is each operator's transient bytes, ``stored`` the rows never written."""
    items, need = [], [-(-size // alignment) for size in own]
    for k, (maker, readers, size) in enumerate(rows):
        spill = 0 if maker < 0 or k in stored else size
        items.append(Item(f"t{k}", size, -(-size // alignment), maker, readers, spill))
        for user in items[-1].users:
            need[user] += items[-1].room
    transients = tuple(((f"w{o}", size),) if size else () for o, size in enumerate(own))
    return Problem(tuple(range(len(own))), tuple(items), transients, tuple(need), alignment, tuple(after)), capacity


def some_problem(seed: int) -> tuple[Problem, int]:
    """Four to nine operators: chains, skips, dead ends, tight steps, orders that no tensor asks for."""
    rng = random.Random(seed)
    n, alignment = rng.randint(4, 9), rng.choice((1, 1, 3))
    unread, full = rng.choice((0.3, 0.6, 0.9)), rng.choice((0, 0.2, 0.5))
    sizes = range(1, rng.choice((2, 4, 6, 9)) + 1)
    rows: list[tuple[int, list[int], int]] = [(-1, [], rng.choice(sizes)) for _ in range(rng.randint(0, 3))]
    for o in range(n):
        for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3))):
            fresh = [row for row in rows if not row[1]] if rng.random() < unread else []
            readers = rng.choice(fresh or rows)[1] if rows else [o]
            if o not in readers:
                readers.append(o)
        rows += [(o, [], rng.choice(sizes)) for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 1, 2)))]
    several = [(maker, tuple(readers), size) for maker, readers, size in rows if len(readers) + (maker >= 0) > 1]
    stored = [k for k in range(len(several)) if rng.random() < 0.15]
    after = [tuple(sorted(rng.sample(range(n), 2)))] if rng.random() < 0.3 else []
    own = [rng.choice(sizes) if rng.random() < 0.3 else 0 for _ in range(n)]
    need = build(0, several, own, after, alignment, stored)[0].need
    own = [(max(need) - need[o]) * alignment + own[o] if rng.random() < full else own[o] for o in range(n)]
    problem, _ = build(0, several, own, after, alignment, stored)
    return problem, max(problem.need) + rng.choice((0, 0, 0, 1, 2))


def optimum(problem: Problem, capacity: int) -> int:
    """The least bytes of any plan, by a table over what has run, what lies inside and what has a copy.

    Before each operator any set that it does not use may leave, written if it has no copy; what it uses and is out is
    read, and paid for then, unless it comes in for the first time.
    """
    items, n = problem.items, problem.n
    users = [sum(1 << user for user in item.users) for item in items]
    touched = [sum(1 << k for k in range(len(items)) if users[k] >> o & 1) for o in range(n)]
    before = [sum({1 << a for a, b in problem.after if b == o}) for o in range(n)]
    for item in items:
        for reader in item.consumers:
            before[reader] |= 1 << item.producer if item.producer >= 0 else 0
    own = [sum(-(-size // problem.alignment) for _, size in row) for row in problem.transients]
    rooms = [0]
    for item in items:
        rooms += [room + item.room for room in rooms]
    layer = {(0, 0, 0): 0}
    for _ in range(n):
        following: dict[tuple[int, int, int], int] = {}
        for (done, held, copies), cost in layer.items():
            seen = sum(1 << k for k in range(len(items)) if users[k] & done)
            for o in range(n):
                if done >> o & 1 or before[o] & ~done:
                    continue
                now = done | 1 << o
                alive = sum(1 << k for k in range(len(items)) if users[k] & ~now)
                paid = cost + sum(items[k].size for k in bits(touched[o] & seen & ~held))
                out = free = held & ~touched[o]
                while True:
                    present = held & ~out | touched[o]
                    if rooms[present] + own[o] <= capacity:
                        total = paid + sum(items[k].spill for k in bits(out & ~copies))
                        state = now, present & alive, (copies | out) & alive
                        following[state] = min(total, following.get(state, total))
                    if not out:
                        break
                    out = (out - 1) & free
        layer = following
    return min(layer.values())


def worst(problem: Problem) -> Answer:
    """The plan in program order that keeps nothing from one step to the next."""
    stays = tuple(Stay(k, user, user + 1) for k, item in enumerate(problem.items) for user in item.users)
    cost = sum(item.size * (len(item.users) - 1) + item.spill for item in problem.items)
    return Answer(tuple(range(problem.n)), stays, cost, 0)


def plain(problem: Problem, capacity: int, known: Answer) -> Answer:
    return search_frontier(problem, capacity, Clock(60), known, width=ENDLESS, choices=ENDLESS)


def compiled(problem: Problem, capacity: int, known: Answer) -> Answer:
    return search_wide(problem, capacity, Clock(60), known)


# fmt: off
CASES: dict[str, tuple[Any, ...]] = {
    # The four rules of frontier.py. "Run at once", in _runs_at_once and, compiled, in layers.py.
    "at once: it fits": (2, [(-1, (0, 2), 1), (0, (1,), 1)], [0, 1, 0]),  # held + arriving > capacity
    "at once: what it reads in does not stay": (  # self.users[i] & ~(state.done | 1 << operator)
        2, [(-1, (1, 2), 1), (0, (1,), 1)], [1, 0, 0]),
    "at once: a dying input has the outputs' room": (  # self.room[i] >= rooms
        6, [(0, (1,), 2), (1, (4,), 3), (2, (3,), 3), (3, (4,), 1)], [4, 0, 0, 0, 0], [], 1, [1]),
    "at once: that input dies": (2, [(0, (1, 3), 1), (1, (2,), 1)], [0, 0, 1, 1]),  # not self.users[i] & ~done
    "at once: that input is inside": (  # & state.inside
        6, [(0, (3,), 2), (1, (2,), 2), (2, (3, 4), 3), (3, (5,), 1)], [2, 0, 0, 0, 3, 3]),
    "at once: it is worth the outputs' price": (  # worth >= prices, and prices count the write
        6, [(-1, (0, 2), 2), (0, (1,), 2), (2, (3,), 2)], [0, 3, 0, 3]),
    "at once: an input with a copy is worth less": (  # 0 if state.copied >> i & 1
        5, [(0, (2, 4), 2), (0, (1,), 1), (1, (2,), 1), (2, (3,), 1), (3, (5,), 1), (4, (5,), 2)], [0, 2, 0, 2, 0, 0]),
    "at once: not the head of a chain": (  # operator not in self.next_of
        5, [(0, (1,), 2), (0, (2,), 1), (1, (3,), 2)], [0, 0, 0, 3]),
    # "Cheaper or as good", in _as_good.
    "as good: for no more bytes": (  # b.cost - a.cost < 0
        3, [(0, (1, 2), 1), (1, (3,), 1), (2, (5,), 1), (3, (4,), 1), (4, (5,), 2)], [0, 0, 1, 0, 0, 0]),
    "as good: putting out has a price": (  # left -= self.price[i]
        3, [(-1, (0, 1), 2), (0, (2,), 1), (1, (3,), 1), (2, (3,), 1)], [0, 0, 1, 0]),
    "as good: putting out writes": (  # left -= ... self.spill[i]
        3, [(-1, (0, 1), 4), (0, (2,), 1), (1, (3,), 2), (2, (3,), 1)], [0, 0, 1, 0], [], 3),
    "as good: a copy spares a write later": (  # b.copied & ~a.copied
        6, [(0, (2,), 2), (1, (2,), 2), (1, (2, 4), 2), (3, (4,), 2)], [1, 1, 0, 3, 0]),
    "victims: exactly enough is enough": (2, [(0, (2,), 1), (1, (2,), 1)], [0, 1, 0], [(0, 1)]),  # rest[at] < missing
    # "Without a break", in chains.py.
    "chain: begins when all of it can run": (2, [(0, (2,), 1), (1, (2,), 1)], [0, 0, 0]),  # waiting()
    "chain: one reader": (  # len(item.consumers) != 1
        4, [(-1, (3, 4), 1), (0, (4,), 1), (1, (2, 4), 1), (2, (3,), 1)], [0, 1, 0, 2, 1]),
    "chain: a link that is stored anyway costs no write": (  # not item.spill
        5, [(0, (2,), 4), (1, (3,), 3), (2, (4,), 4), (3, (4,), 4)], [9, 9, 0, 0, 1], [], 3, [3]),
    "pull: fits in what was let go": (  # _peak(...) - items[x].room <= gone
        2, [(-1, (0, 2), 1), (0, (1,), 1)], [0, 1, 0], [(0, 2)]),
    "pull: at each operator of the chain": (  # _peak, not the first's need
        7, [(-1, (1, 4), 1), (0, (1,), 3), (1, (2,), 1), (2, (3,), 2), (3, (5,), 5)], [4, 0, 0, 0, 4, 0]),
    "pull: let go is what no later operator reads": (  # others & ~problem.ancestors[u]
        4, [(-1, (0, 3), 1), (-1, (1, 2), 2), (2, (3,), 2), (3, (4,), 1)], [2, 0, 0, 0, 3]),
    "pull: the link is all it reads": (  # problem.read[v] != (x,)
        4, [(0, (3,), 1), (1, (2,), 1), (-1, (2, 3), 2)], [2, 2, 0, 0]),
    "pull: so for each of the chain": (  # _is_path(problem, second)
        8, [(0, (2,), 1), (1, (4,), 1), (2, (3,), 2), (-1, (3, 4), 5), (3, (5,), 1)], [7, 3, 0, 0, 0, 0]),
    "pull: it waits for nothing else": (  # _only(problem.predecessors, ...)
        3, [(-1, (1, 2), 1), (-1, (0, 4), 1), (1, (2,), 1), (2, (3,), 1), (3, (4,), 1)], [0, 0, 0, 0, 0], [(0, 3)]),
    "pull: outputs take no more room": (  # items[i].room for i in made
        3, [(0, (2,), 2), (2, (3,), 1), (2, (3,), 1)], [4, 6, 0, 0], [(0, 1), (1, 3)], 3),
    "pull: outputs cost no more": (  # items[i].size for i in made
        2, [(0, (2,), 1), (2, (3,), 2)], [1, 6, 0, 0], [(0, 1), (1, 3)], 3),
    "push: fits in what is added": (2, [(0, (2,), 1), (1, (2,), 1)], [1, 0, 0]),  # _peak(...) <= added
    "push: at each operator of the chain": (  # _peak, not the first's need
        2, [(0, (1,), 1), (1, (3,), 1), (2, (3,), 1)], [0, 0, 0, 0]),
    "push: the chain reads nothing else": (  # _is_path(problem, first)
        5, [(0, (2,), 2), (0, (3,), 1), (1, (2,), 1), (2, (4,), 1), (3, (4,), 1)], [0, 0, 0, 2, 3]),
    "push: nothing else waits for it": (  # _only(problem.successors, ...)
        2, [(0, (2,), 1), (1, (2,), 1)], [0, 0, 0], [(0, 1)]),
    "push: inputs take no more room": (  # items[i].room for i in read
        3, [(0, (1,), 1), (0, (1,), 1), (1, (3,), 2)], [0, 0, 6, 4], [(0, 2), (2, 3)], 3),
    "push: inputs cost no more": (  # items[i].size for i in read
        2, [(0, (1,), 2), (1, (3,), 1)], [0, 0, 6, 1], [(0, 2), (2, 3)], 3),
}
# fmt: on


@pytest.mark.parametrize("search", [plain, compiled])
@pytest.mark.parametrize("name", CASES)
def test_the_optimum_is_found_and_proved_where_this_condition_decides(name: str, search: Search) -> None:
    problem, capacity = build(*CASES[name])
    least, known = optimum(problem, capacity), worst(problem)
    # The tightest budgets too: one that only the optimum is below, and one that nothing is.
    for start in (known, replace(known, cost=least + 1), replace(known, cost=least)):
        found = search(problem, capacity, start)
        assert (found.cost, found.bound) == (least, least)
        if start.cost > least:
            assert check(problem, capacity, found) == least


@pytest.mark.parametrize(("search", "count"), [(plain, 800), (compiled, 300)])
def test_the_optimum_of_random_problems_is_found_and_proved(search: Search, count: int) -> None:
    costly = 0
    for seed in range(count):
        problem, capacity = some_problem(seed)
        least = optimum(problem, capacity)
        found = search(problem, capacity, replace(worst(problem), cost=least + 1 + seed % 3))
        assert (found.cost, found.bound) == (least, least), f"seed {seed}"
        assert check(problem, capacity, found) == least
        costly += least > 0
    assert costly > count / 5


def test_every_rule_fires(monkeypatch) -> None:
    fired: Counter[str] = Counter()

    def watch(place: object, name: str, note: Callable[..., list[str]]) -> None:
        whole = getattr(place, name)

        def watched(*given):
            fired.update(note(result := whole(*given), *given))
            return result

        monkeypatch.setattr(place, name, watched)

    def at_once(result: bool, search: _Frontier, state: _State, operator: int) -> list[str]:
        dies = any(not search.users[i] & ~(state.done | 1 << operator) for i in search.problem.read[operator])
        return ["at once for " + ("a dying input" if dies else "nothing")] * result

    def as_good(result: bool, _: _Frontier, a: _State, b: _State) -> list[str]:
        masks = {"as it is": ~0, "put out": a.inside & ~b.inside, "written": a.inside & b.inside & b.copied & ~a.copied}
        return [f"as good, {how}" for how, mask in masks.items() if result and mask]

    watch(_Frontier, "_runs_at_once", at_once)
    watch(_Frontier, "_as_good", as_good)
    watch(_Frontier, "_expand", lambda _, search, state, __: ["without a break"] * (state.operator in search.next_of))
    watch(_Frontier, "_victims", lambda found, *_: ["a choice of what leaves"] * (len(found) > 1))
    watch(_Frontier, "_run", lambda *_: ["run"])
    watch(_Frontier, "_admit", lambda *_: ["within the budget"])
    watch(chains, "_pull", lambda found, _, __, ___, second: [f"pull of {min(2, len(second))}"] * found)
    watch(chains, "_push", lambda found, _, __, first, ___: [f"push of {min(2, len(first))}"] * found)
    for seed in range(600):
        problem, capacity = some_problem(seed)
        plain(problem, capacity, replace(worst(problem), cost=optimum(problem, capacity) + 1))
    fired["past the budget"] = fired["run"] - fired["within the budget"]
    assert len(fired) == 14, sorted(fired)
    assert min(fired.values()) > 5, fired


def test_the_compiled_step_keeps_as_many_states_as_the_plain_one(monkeypatch) -> None:
    kept: list[int] = []
    narrow_plain, narrow_wide = _Frontier._narrow, _Wide._narrow

    def counted_plain(self, layer):
        kept.append(sum(map(len, layer.values())))
        return narrow_plain(self, layer)

    def counted_wide(self, layer, width):
        narrow_wide(self, layer, width)
        kept.append(layer.count)

    monkeypatch.setattr(_Frontier, "_narrow", counted_plain)
    monkeypatch.setattr(_Wide, "_narrow", counted_wide)
    for seed in range(300):
        problem, capacity = some_problem(seed)
        plain(problem, capacity, worst(problem))
        expected, kept[:] = kept[:], []
        _Wide(problem, capacity, Clock(60)).run(worst(problem).cost, ENDLESS)
        assert kept == expected, f"seed {seed}"
        kept.clear()


def test_a_budget_that_no_plan_is_below_is_proved_and_one_above_finds_the_optimum() -> None:
    for seed in range(200):
        problem, capacity = some_problem(seed)
        least, search = optimum(problem, capacity), _Wide(problem, capacity, Clock(60))
        for budget in (least // 2, least, least + 1, 2 * least + 1) if least else ():
            found = search.run(budget, ENDLESS)
            assert (found.cost == least) == (budget > least), f"seed {seed}"
            assert min(budget, least) <= found.bound <= least, f"seed {seed}"


def test_what_leaves_are_the_sets_of_which_no_part_would_do_the_cheapest_first() -> None:
    rng = random.Random(4)
    for _ in range(100):
        rows = [(k, (7,), rng.randint(0, 9)) for k in range(7)]
        problem, capacity = build(99, rows, [0] * 8, alignment=rng.choice((1, 3)))
        search = _Frontier(problem, capacity, Clock(60), worst(problem), ENDLESS, ENDLESS)
        state = _State(0, 0, 127, rng.randrange(128), 0, 0, None, -1, ())
        excess = rng.randint(1, 12)
        enough = [
            set(chosen) for size in range(8) for chosen in combinations(range(7), size)
            if sum(problem.items[k].room for k in chosen) >= excess
        ]  # fmt: skip
        found = search._victims(state, list(range(7)), excess)
        assert len(set(found)) == len(found)
        assert sorted(map(sorted, found)) == sorted(sorted(a) for a in enough if not any(b < a for b in enough))
        tolls = [sum(rows[k][2] * (1 if state.copied >> k & 1 else 2) for k in chosen) for chosen in found]
        assert tolls == sorted(tolls)


@pytest.mark.parametrize(("width", "choices"), [(1, ENDLESS), (4, ENDLESS), (ENDLESS, 1), (2, 2)])
def test_cut_short_no_search_claims_more_than_the_optimum(width: int, choices: int, monkeypatch) -> None:
    monkeypatch.setattr(wide, "CHOICES", min(choices, wide.CHOICES))
    short: Counter[str] = Counter()
    for seed in range(250):
        problem, capacity = some_problem(seed)
        least, known = optimum(problem, capacity), worst(problem)
        for search, found in (
            ("plain", search_frontier(problem, capacity, Clock(60), known, width=width, choices=choices)),
            ("compiled", search_wide(problem, capacity, Clock(60), known, widest=width)),
        ):
            assert found.bound <= least <= found.cost == check(problem, capacity, found), f"seed {seed}"
            short[search] += not found.proved
    assert min(short["plain"], short["compiled"]) > 5


@pytest.mark.parametrize("large", [3, 6])
@pytest.mark.parametrize("count", [6, 63])
def test_a_cheapest_set_that_was_not_looked_at_is_in_the_bound(count: int, large: int, monkeypatch) -> None:
    """One after the other makes a tensor for the end; before that a large step needs one unit. The small one is best.

    Of the tensors it is the last of those that take as much room, or, among larger ones, is left out by the 63rd.
    """
    small = count - 1 if large == 3 else 0
    rows = [(k, (count + 1,), 1 if k == small else large) for k in range(count)]
    held = sum(-(-size // 3) for _, _, size in rows)
    order = [(k, k + 1) for k in range(count + 1)]
    problem, capacity = build(2 * held - 1, rows, [0] * count + [3 * held, 0], order, 3)
    if count == 6:
        assert optimum(problem, capacity) == 2
        monkeypatch.setattr(wide, "CHOICES", 1)
    known = worst(problem)
    narrow = search_frontier(problem, capacity, Clock(60), known, width=ENDLESS, choices=1)
    for found in (narrow, search_wide(problem, capacity, Clock(60), known)):
        assert found.bound <= 2 <= found.cost == check(problem, capacity, found)


class Countdown(Clock):
    """Time for so many looks at the clock."""

    def __init__(self, looks: int) -> None:
        super().__init__(60)
        self.looks = iter([1.0] * looks)

    @property
    def left(self) -> float:
        return next(self.looks, 0.0)


def test_out_of_time_no_search_claims_more_than_the_optimum() -> None:
    for seed in range(20):
        problem, capacity = some_problem(seed)
        least, known = optimum(problem, capacity), worst(problem)
        for looks in (0, 1, 2, 5, 10, 20, 40):
            for search in (search_frontier, search_wide):
                found = search(problem, capacity, Countdown(looks), known)
                assert found.bound <= least <= found.cost == check(problem, capacity, found), f"seed {seed}"


def test_stretches_that_share_tensors_or_operators_are_not_charged_twice() -> None:
    rng, above = random.Random(6), 0
    for seed in range(300):
        problem, capacity = some_problem(seed)
        least, order = optimum(problem, capacity), range(problem.n)
        for lengths in ((2,), (3,), (4,), (2, 3, 4)):
            width = rng.choice((1, 400))
            bound = projection_bound(problem, capacity, order, Clock(60), lengths=lengths, width=width)
            assert bound <= least, f"seed {seed}"
            above += bound > 0
        assert projection_bound(problem, capacity, order, Clock(60), lengths=(problem.n,)) == least, f"seed {seed}"
    assert above > 30


@pytest.mark.parametrize(("passing", "returning"), [(16, 8), (0, 1)])
def test_a_window_put_back_is_a_plan_that_costs_what_the_window_says(passing, returning, monkeypatch) -> None:
    monkeypatch.setattr(windows, "PASSING", passing)
    monkeypatch.setattr(windows, "RETURNING", returning)
    gained = 0
    for seed in range(250):
        rng = random.Random(seed)
        problem, capacity = some_problem(seed)
        poor = search_frontier(problem, capacity, Clock(60), worst(problem), width=1, choices=1)
        course = windows.Course(problem, capacity, rng.choice((poor, worst(problem))))
        for _ in range(2):
            inner = sorted(rng.sample(range(1, problem.n), rng.randint(0, 2)))
            for window in course.sweep([0, *inner, problem.n]):
                before, least = course.cost, optimum(window.problem, window.capacity)
                assert least <= check(window.problem, window.capacity, window.known) == window.known.cost
                found = plain(window.problem, window.capacity, window.known)
                course.accept(window, found)
                assert found.cost == least == window.known.cost - before + course.cost
                gained += course.cost < before
            answer = course.answer(0)
            assert optimum(problem, capacity) <= check(problem, capacity, answer) == course.cost
    assert gained > 50
