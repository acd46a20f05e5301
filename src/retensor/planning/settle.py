"""Addresses for long programs: stretch after stretch of steps, and a little more evicted where there is no place.

All stays of a plan that fills the scratchpad at every step seldom have addresses together, and a search over
thousands of them does not end. So the steps are gone through in *stretches*: the tensors that came in before keep their
addresses, those of the stretch get theirs by :mod:`.allocate`, with some steps more in view, so that what is placed
does not stand in the way right after. Where a stretch has no packing, those before it are placed again with it. Where
that does not help, a tensor leaves between two uses that fell into one stay and comes back to another address: of those
whose leaving makes the stretch pack, the one that costs least. Down to single steps there is always a packing, so there
always is a plan.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from retensor.planning.allocate import Block, pack
from retensor.planning.problem import Problem
from retensor.planning.progress import Clock
from retensor.planning.residency import Answer, Stay, steps_of

STEPS = 16
"""Steps of a stretch."""
AHEAD = 12
"""Steps after a stretch that are in view when it is placed."""
BACK = 2
"""Stretches that are placed again, at most, before anything more is evicted."""
TRIED = 16
"""Tensors whose leaving is tried, the cheapest first, before the one that opens most is taken unseen."""
SECONDS = 0.25
"""For one packing, if there is time for four of them in each stretch; then it counts as if there were none."""
LEAST_SECONDS = 0.01
"""Where there is less for a packing, it is tried without a search."""


@dataclass(frozen=True)
class Settled:
    """Stays with addresses in bytes, and those of each operator's transient tensors."""

    stays: tuple[Stay, ...]
    addresses: tuple[int, ...]
    transient_addresses: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A stay (of an item) or a transient tensor (item -1) from step ``start`` up to ``end``."""

    start: int
    end: int
    size: int
    item: int


def settle(
    problem: Problem, scratchpad: int, answer: Answer, clock: Clock, *, seed: int = 0, workers: int | None = None
) -> Settled | None:
    """Addresses below ``scratchpad`` bytes for an answer's stays, more of them where need be; None out of time."""
    return _Settling(problem, scratchpad, answer, clock, seed, workers).run()


class _Settling:
    def __init__(
        self, problem: Problem, scratchpad: int, answer: Answer, clock: Clock, seed: int, workers: int | None
    ) -> None:
        self.problem = problem
        self.scratchpad = scratchpad
        self.order = answer.order
        self.clock = clock
        self.seed = seed
        self.workers = workers
        step = steps_of(answer.order)
        self.uses = [sorted(step[user] for user in item.users) for item in problem.items]
        self.pieces: list[_Piece] = []
        self.starting: list[list[int]] = [[] for _ in range(problem.n)]
        self.address: dict[int, int] = {}
        self.seconds = SECONDS
        self.parts = [0] * len(problem.items)
        """Stays of each item, to tell what one more costs."""
        for stay in sorted(answer.stays, key=lambda stay: (stay.start, stay.item)):
            uses = self.uses[stay.item]
            # What outlasts its last use leaves right after it.
            end = uses[bisect_left(uses, stay.end) - 1] + 1
            self._add(_Piece(stay.start, end, problem.items[stay.item].size, stay.item))
        for operator, row in enumerate(problem.transients):
            for _, size in row:
                self._add(_Piece(step[operator], step[operator] + 1, size, -1))

    def _add(self, piece: _Piece) -> None:
        self.starting[piece.start].append(len(self.pieces))
        self.pieces.append(piece)
        if piece.item >= 0:
            self.parts[piece.item] += 1

    def run(self) -> Settled | None:
        n = self.problem.n
        edges: list[tuple[int, list[int]]] = []
        at = 0
        crossing: list[int] = []
        while at < n:
            edges.append((at, crossing))
            self.seconds = min(SECONDS, self.clock.left * STEPS / (n - at) / 4)
            end = min(n, at + STEPS + AHEAD)
            placed = any(self._place(start, came, end) for start, came in edges[: -2 - BACK : -1])
            if not placed and not self._make_place(at, crossing, end):
                return None
            following = min(n, at + STEPS)
            crossing = [k for k in self._between(at, crossing, following) if self.pieces[k].end > following]
            at = following
        return self._settled()

    def _between(self, start: int, crossing: list[int], end: int) -> Iterator[int]:
        """Pieces in the scratchpad at some step from ``start`` up to ``end``."""
        yield from (k for k in crossing if self.pieces[k].end > start)
        for step in range(start, end):
            yield from self.starting[step]

    def _place(self, start: int, crossing: list[int], end: int) -> bool:
        """Give addresses to what starts in some steps, beside what came before; False where none were found."""
        if self.clock.left <= 0:
            return False
        members = list(self._between(start, crossing, end))
        blocks = [Block(max(p.start, start), min(p.end, end), p.size) for p in map(self.pieces.__getitem__, members)]
        fixed = {at: self.address[k] for at, k in enumerate(members) if self.pieces[k].start < start}
        clock = self.clock.share(min(1.0, self.seconds / max(self.clock.left, self.seconds)))
        found = pack(
            blocks, self.scratchpad, self.problem.alignment, clock, fixed=fixed, exact=self.seconds > LEAST_SECONDS,
            seed=self.seed, workers=self.workers,
        )  # fmt: skip
        if found.addresses is None:
            return False
        self.address.update(zip(members, found.addresses, strict=True))
        return True

    def _make_place(self, start: int, crossing: list[int], end: int) -> bool:
        """Let tensors leave until a stretch packs; False out of time."""
        while self.clock.left > 0:
            # Between two uses one right after the other a tensor can only change its place.
            breaks = sorted(self._breaks(start, crossing, end), key=lambda row: (row[3] == row[2] + 1 != start, row))
            if not breaks:
                return self._place(start, crossing, end)
            for _, k, here, there in breaks[: 1 + int(TRIED * self.seconds / SECONDS)]:
                whole = self._break(k, here, there)
                if self._place(start, crossing, end):
                    return True
                self._mend(k, whole)

            # No single one does: the one that opens most for its bytes goes, and the next is looked for.
            def rate(row: tuple[int, int, int, int]) -> float:
                price, k, here, there = row
                return price / (self.pieces[k].size * (min(there, end) - max(here, start - 1)))

            _, k, here, there = min(breaks, key=rate)
            self._break(k, here, there)
        return False

    def _breaks(self, start: int, crossing: list[int], end: int) -> Iterator[tuple[int, int, int, int]]:
        """What may leave: the price, the piece, and the uses between which it is out."""
        for k in self._between(start, crossing, end):
            piece = self.pieces[k]
            if piece.item < 0 or not piece.size:
                continue
            item = self.problem.items[piece.item]
            price = item.size + (item.spill if self.parts[piece.item] == 1 else 0)
            uses = self.uses[piece.item]
            for here, there in pairwise(uses[bisect_left(uses, piece.start) : bisect_left(uses, piece.end)]):
                if here + 1 < end and there >= start:
                    yield price, k, here, there

    def _break(self, k: int, here: int, there: int) -> _Piece:
        """Let a piece end after one use and another begin at the next; returns the whole."""
        whole = self.pieces[k]
        self.pieces[k] = replace(whole, end=here + 1)
        self._add(replace(whole, start=there))
        return whole

    def _mend(self, k: int, whole: _Piece) -> None:
        """Undo the latest break."""
        self.starting[self.pieces.pop().start].pop()
        self.parts[whole.item] -= 1
        self.pieces[k] = whole

    def _settled(self) -> Settled:
        stays, addresses = [], []
        transients = iter([self.address[k] for k, piece in enumerate(self.pieces) if piece.item < 0])
        for k, piece in enumerate(self.pieces):
            if piece.item >= 0:
                stays.append(Stay(piece.item, piece.start, piece.end))
                addresses.append(self.address[k])
        rows = tuple(tuple(next(transients) for _ in row) for row in self.problem.transients)
        return Settled(tuple(stays), tuple(addresses), rows)
