"""The compiled search for addresses: canonical placements, from the bottom up, with inference and decomposition.

Follows M. D. Moffitt: MiniMalloc: A Lightweight Memory Allocator for Hardware-Accelerated Machine Learning, ASPLOS
2023, doi 10.1145/3623278.3624752, in what is searched: a buffer lies on the top of another or at 0, buffers are placed
by rising address (ties by a given rank), a placement that leaves a gap which an unplaced buffer could fill is dropped,
and buffers between two moments that no unplaced buffer crosses are a part of their own. Four things are stronger here:

- The search is a tree of two-way choices: this buffer next, or never at this address. A buffer that was passed over
  must be lifted by one still to come, so its address is at least the least top of those that may lie in its place.
- A section (the buffers alive at one moment) is a machine that does one job at a time: for every level ``t``, ``t``
  and the sizes of what must lie above ``t`` fit below the capacity, and a buffer that would leave too little room
  above for all others of its section lies above at least one of them.
- Buffers equal in lifetime, size and alignment are placed in one order.
- A part that failed is not searched again when other choices lead to it (two 64-bit hashes are taken for equality).

Why nothing is lost: of all placements that fit take one of least ``sum(w * address)``, with positive weights ``w``
that fall with the rank. No buffer of it can move to a lower address, and of equal buffers the first lies lowest.
Placed by rising address, each of its buffers lies on what is placed already; a buffer passed over at an address where
it had room is blocked there by a later one; and whoever is placed at or above a free buffer's top cannot block it.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from retensor.planning.compiled import compiled

Integers = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]
Word: TypeAlias = Any
"""A 64-bit number; numba does not tell Python's from NumPy's."""

UNDECIDED, FOUND, IMPOSSIBLE, FULL = 0, 1, 2, 3
"""What a run ends with: out of nodes, all placed, proved impossible, or the trail is full and must grow."""
OPEN, ROOT, PARTS = np.int64(0), np.int64(1), np.int64(2)
"""Kinds of frame: a choice, the first choice of a part, and the mark below the parts that one choice left."""
KIND, BEGIN, END, SECTION_BEGIN, SECTION_END, LEVEL, LEVEL_RANK, CHOSEN, MARK = range(9)
"""Columns of ``State.frames``: its kind; its part as a range of ``pending`` and of sections; the address and rank up to
which all is decided; the buffer it has placed (-1: none yet); and the trail's length before that."""
DEPTH, TRAIL, NODES, FAILING = 0, 1, 2, 3
"""Entries of ``State.counters``."""
# NumPy's numbers, because numba compiles a function anew for each Python constant that it is called with.
BOTTOM, NO_RANK, FAR = np.int64(0), np.int64(-1), np.int64(1 << 62)


class Buffers(NamedTuple):
    """What does not change; addresses and sizes in units, times as sections ``first`` up to ``last``."""

    first: Integers
    last: Integers
    size: Integers
    alignment: Integers
    latest: Integers
    """The largest address, or the address of a fixed buffer."""
    near_start: Integers
    near: Integers
    """``near[near_start[i]:near_start[i + 1]]`` share a section with ``i``."""
    rank: Integers
    twin: Integers
    """An equal buffer that is placed before, or -1."""


class State(NamedTuple):
    """Where a search is; one run goes on where the last ended."""

    least: Integers
    """Lower bound of each address under the choices made."""
    support: Integers
    """The lowest address on what is placed."""
    address: Integers
    """Of placed buffers; else -1."""
    crossing: Integers
    """Unplaced buffers in a section and in the next."""
    pending: Integers
    """All buffers; a frame's unplaced ones are a range of it."""
    total: Integers
    least_top: Integers
    second_top: Integers
    section_failures: Integers
    buffer_failures: Integers
    """How often each ended a branch, for later orders."""
    frames: Integers
    """A row each, with the columns ``KIND`` to ``MARK``."""
    keys: Keys
    """Two hashes of each frame's part and bounds, or 0."""
    trail: Integers
    """What was changed (``4 * buffer``, plus 0: ``least``, 1: ``support``, 2: it was placed), and its old value."""
    failed: Keys
    """Keys of parts without a placement; a power of two of rows, each with the last that fell there."""
    counters: Integers


@compiled
def _mixed(h: Word) -> Word:
    # The finaliser of SplitMix64.
    h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return h ^ (h >> np.uint64(31))


@compiled
def _undo(b: Buffers, s: State, trail: Word, mark: Word) -> Word:
    while trail > mark:
        trail -= 1
        i = s.trail[trail, 0] >> 2
        what = s.trail[trail, 0] & 3
        if what == 0:
            s.least[i] = s.trail[trail, 1]
        elif what == 1:
            s.support[i] = s.trail[trail, 1]
        else:
            s.address[i] = -1
            for k in range(b.first[i], b.last[i] - 1):
                s.crossing[k] += 1
    return trail


@compiled
def _raise(b: Buffers, s: State, trail: Word, i: Word, least: Word) -> bool:
    """Write ``least``, rounded up, as the lower bound of ``i``; False where that is too high."""
    if b.alignment[i] > 1:
        least += -least % b.alignment[i]
    if least > b.latest[i]:
        s.buffer_failures[i] += 1
        return False
    s.trail[trail, 0] = i << 2
    s.trail[trail, 1] = s.least[i]
    s.least[i] = least
    return True


@compiled
def _infer(
    b: Buffers,
    s: State,
    trail: Word,
    capacity: Word,
    begin: Word,
    end: Word,
    low: Word,
    high: Word,
    level: Word,
    rank: Word,
) -> tuple[Word, bool]:
    """Raise lower bounds of ``pending[begin:end]``; the trail's new length, and whether a placement may be left.

    Sections outside ``low`` up to ``high`` have not changed since they were last looked at.
    """
    for _ in range(2):
        for x in range(begin, end):
            i = s.pending[x]
            support = s.support[i]
            if support < level or (support == level and b.rank[i] <= rank):
                # Passed over: one that is still to come must lift it.
                lifted = FAR
                top = support + b.size[i]
                for y in range(b.near_start[i], b.near_start[i + 1]):
                    j = b.near[y]
                    if s.address[j] < 0 and s.least[j] < top:
                        lifted = min(lifted, s.least[j] + b.size[j])
                if lifted > s.least[i]:
                    if not _raise(b, s, trail, i, lifted):
                        return trail, False
                    trail += 1
                    low = min(low, b.first[i])
                    high = max(high, b.last[i])
        if low >= high:
            break
        # Highest lower bound first; nearly sorted already.
        for x in range(begin + 1, end):
            i = s.pending[x]
            least = s.least[i]
            y = x
            while y > begin and s.least[s.pending[y - 1]] < least:
                s.pending[y] = s.pending[y - 1]
                y -= 1
            s.pending[y] = i
        for k in range(low, high):
            s.total[k] = 0
            s.least_top[k] = FAR
            s.second_top[k] = FAR
        for x in range(begin, end):
            i = s.pending[x]
            room = capacity - s.least[i]
            top = s.least[i] + b.size[i]
            over = s.least[i] > b.latest[i]
            for k in range(max(low, b.first[i]), min(high, b.last[i])):
                s.total[k] += b.size[i]
                over |= s.total[k] > room
                s.second_top[k] = min(s.second_top[k], max(s.least_top[k], top))
                s.least_top[k] = min(s.least_top[k], top)
            if over:
                for k in range(max(low, b.first[i]), min(high, b.last[i])):
                    if s.total[k] > room:
                        s.section_failures[k] += 1
                return trail, False
        changed_low = FAR
        changed_high = 0
        for x in range(begin, end):
            i = s.pending[x]
            room = capacity - s.least[i]
            top = s.least[i] + b.size[i]
            lifted = s.least[i]
            for k in range(max(low, b.first[i]), min(high, b.last[i])):
                if s.total[k] > room:
                    # Not the lowest of its section: the others would not fit above it.
                    lifted = max(lifted, s.least_top[k] if s.least_top[k] != top else s.second_top[k])
            if lifted > s.least[i]:
                if not _raise(b, s, trail, i, lifted):
                    return trail, False
                trail += 1
                changed_low = min(changed_low, b.first[i])
                changed_high = max(changed_high, b.last[i])
        low = changed_low
        high = changed_high
        if low >= high:
            break
    return trail, True


@compiled
def _known(b: Buffers, s: State, depth: Word) -> bool:
    """Whether this part, under these bounds, has failed before; remembers its key for when it fails."""
    key = np.uint64(0)
    other = np.uint64(0)
    for x in range(s.frames[depth, BEGIN], s.frames[depth, END]):
        i = s.pending[x]
        h = np.uint64(i) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(s.support[i])
        if s.support[i] < s.frames[depth, LEVEL] or (
            s.support[i] == s.frames[depth, LEVEL] and b.rank[i] <= s.frames[depth, LEVEL_RANK]
        ):
            h += np.uint64(1) << np.uint64(63)
        h = _mixed(_mixed(h) + np.uint64(s.least[i]))
        key += h
        other += _mixed(h + np.uint64(0x632BE59BD9B4E019))
    slot = key & np.uint64(len(s.failed) - 1)
    known: bool = s.failed[slot, 0] == key and s.failed[slot, 1] == other
    s.keys[depth, 0] = np.uint64(0) if known else key
    s.keys[depth, 1] = other
    return known


@compiled
def _push(
    s: State, depth: Word, kind: Word, begin: Word, end: Word, low: Word, high: Word, level: Word, rank: Word
) -> None:
    s.frames[depth, KIND] = kind
    s.frames[depth, BEGIN] = begin
    s.frames[depth, END] = end
    s.frames[depth, SECTION_BEGIN] = low
    s.frames[depth, SECTION_END] = high
    s.frames[depth, LEVEL] = level
    s.frames[depth, LEVEL_RANK] = rank
    s.frames[depth, CHOSEN] = -1
    s.keys[depth, 0] = np.uint64(0)


@compiled
def push_parts(b: Buffers, s: State, depth: Word, begin: Word, end: Word, low: Word, high: Word) -> Word:
    """A frame for each part of ``pending[begin:end]``, between moments that none of them crosses."""
    depth += 1
    _push(s, depth, PARTS, begin, end, low, high, BOTTOM, NO_RANK)
    while low < high:
        cut = low
        while cut + 1 < high and s.crossing[cut] > 0:
            cut += 1
        cut += 1
        middle = begin
        for x in range(begin, end):
            i = s.pending[x]
            if b.first[i] < cut:
                s.pending[x] = s.pending[middle]
                s.pending[middle] = i
                middle += 1
        if middle > begin:
            depth += 1
            _push(s, depth, ROOT, begin, middle, low, cut, BOTTOM, NO_RANK)
        begin = middle
        low = cut
    if s.frames[depth, KIND] == PARTS:
        # Nothing is left; a part without buffers says so.
        depth += 1
        _push(s, depth, ROOT, begin, begin, low, low, BOTTOM, NO_RANK)
    return depth


@compiled
def _next(b: Buffers, s: State, depth: Word) -> Word:
    """The unplaced buffer of the lowest address, then rank, after the frame's level; -1 where there is none."""
    gap = FAR
    for x in range(s.frames[depth, BEGIN], s.frames[depth, END]):
        i = s.pending[x]
        gap = min(gap, s.support[i] + b.size[i])
    chosen = -1
    for x in range(s.frames[depth, BEGIN], s.frames[depth, END]):
        i = s.pending[x]
        at = s.support[i]
        # At or above `gap`, a buffer would leave room below that another can still fill.
        if at != s.least[i] or at >= gap:
            continue
        if at < s.frames[depth, LEVEL] or (at == s.frames[depth, LEVEL] and b.rank[i] <= s.frames[depth, LEVEL_RANK]):
            continue
        if b.twin[i] >= 0 and s.address[b.twin[i]] < 0:
            continue
        if chosen < 0 or at < s.support[chosen] or (at == s.support[chosen] and b.rank[i] < b.rank[chosen]):
            chosen = i
    return chosen


@compiled
def run(b: Buffers, s: State, capacity: Word, nodes: Word) -> Word:
    """Go on for up to ``nodes`` nodes; what it ended with."""
    depth = s.counters[DEPTH]
    trail = s.counters[TRAIL]
    failing = s.counters[FAILING] != 0
    count = len(b.first)
    low = 0
    high = len(s.crossing)
    status = UNDECIDED
    visited = 0
    while visited < nodes:
        if failing:
            if s.keys[depth, 0] != 0:
                slot = s.keys[depth, 0] & np.uint64(len(s.failed) - 1)
                s.failed[slot, 0] = s.keys[depth, 0]
                s.failed[slot, 1] = s.keys[depth, 1]
            root = s.frames[depth, KIND] == ROOT
            depth -= 1
            if root:
                # A part has no placement, so neither have the parts beside it, together.
                while s.frames[depth, KIND] != PARTS:
                    depth -= 1
                depth -= 1
            if depth < 0:
                status = IMPOSSIBLE
                break
            failing = False
            chosen = s.frames[depth, CHOSEN]
            trail = _undo(b, s, trail, s.frames[depth, MARK])
            s.frames[depth, LEVEL] = s.support[chosen]
            s.frames[depth, LEVEL_RANK] = b.rank[chosen]
            low = b.first[chosen]
            high = low
        if trail + 8 * count + 8 > len(s.trail):
            status = FULL
            break
        visited += 1
        begin = s.frames[depth, BEGIN]
        end = s.frames[depth, END]
        if begin == end:
            # The part is done, and with the last of several parts the one that they were parts of.
            while True:
                while s.frames[depth, KIND] == OPEN:
                    depth -= 1
                depth -= 1
                if s.frames[depth, KIND] == ROOT:
                    break
                depth -= 1
                if depth < 0:
                    break
            if depth < 0:
                status = FOUND
                break
            low = s.frames[depth, SECTION_BEGIN]
            high = s.frames[depth, SECTION_END]
            continue
        low = max(low, s.frames[depth, SECTION_BEGIN])
        high = min(high, s.frames[depth, SECTION_END])
        trail, alive = _infer(
            b, s, trail, capacity, begin, end, low, high, s.frames[depth, LEVEL], s.frames[depth, LEVEL_RANK]
        )
        if not alive:
            failing = True
            continue
        if s.frames[depth, CHOSEN] == -1 and _known(b, s, depth):
            failing = True
            continue
        chosen = _next(b, s, depth)
        if chosen < 0:
            failing = True
            continue
        level = s.support[chosen]
        s.frames[depth, CHOSEN] = chosen
        s.frames[depth, MARK] = trail
        s.address[chosen] = level
        s.trail[trail, 0] = (chosen << 2) + 2
        trail += 1
        low = b.first[chosen]
        high = b.last[chosen]
        for y in range(b.near_start[chosen], b.near_start[chosen + 1]):
            j = b.near[y]
            top = level + b.size[chosen]
            if s.address[j] < 0 and s.support[j] < top:
                if b.alignment[j] > 1:
                    top += -top % b.alignment[j]
                s.trail[trail, 0] = (j << 2) + 1
                s.trail[trail, 1] = s.support[j]
                trail += 1
                s.support[j] = top
                if s.least[j] < top:
                    s.trail[trail, 0] = j << 2
                    s.trail[trail, 1] = s.least[j]
                    trail += 1
                    s.least[j] = top
                    low = min(low, b.first[j])
                    high = max(high, b.last[j])
        split = False
        for k in range(b.first[chosen], b.last[chosen] - 1):
            s.crossing[k] -= 1
            split |= s.crossing[k] == 0
        x = begin
        while s.pending[x] != chosen:
            x += 1
        # The others keep their order, which is nearly that of their bounds.
        for y in range(x, end - 1):
            s.pending[y] = s.pending[y + 1]
        s.pending[end - 1] = chosen
        part_low = s.frames[depth, SECTION_BEGIN]
        part_high = s.frames[depth, SECTION_END]
        if split:
            depth = push_parts(b, s, depth, begin, end - 1, part_low, part_high)
            low = s.frames[depth, SECTION_BEGIN]
            high = s.frames[depth, SECTION_END]
        else:
            depth += 1
            _push(s, depth, OPEN, begin, end - 1, part_low, part_high, level, b.rank[chosen])
    s.counters[DEPTH] = depth
    s.counters[TRAIL] = trail
    s.counters[NODES] += visited
    s.counters[FAILING] = failing
    return status
