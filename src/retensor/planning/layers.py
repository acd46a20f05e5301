"""One layer of the wide frontier search (:mod:`.wide`), compiled: states as rows of bit masks.

The rules are those of :mod:`.frontier`, which explains them. A row of ``masks`` holds four bit sets in 64-bit
words: operators run, operators ready, items inside, items with a copy off-chip. States with the same operators
run are linked in a chain from a hash table, so that the cheaper-or-as-good rule meets only its peers.

Besides the width, a budget limits the search: what costs as much is not kept, and the least such cost is
reported, so that a search that loses nothing for want of width proves a bound past its budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from retensor.planning.compiled import compiled

MOST_CANDIDATES = 62
"""Items inside of which subsets are tried; where there are more, the smallest are left out and count as lost."""

COUNT, LOST, OVER, ALIVE, FULL = range(5)
"""Entries of ``tally``: rows written; least cost dropped for want of width or choices; least cost at or past the
budget; rows not dropped since; whether there was no room for more rows."""

_ONE = np.uint64(1)
_ZERO = np.uint64(0)
_DEBRUIJN = np.uint64(0x03F79D71B4CB0A89)
_SHIFT = np.uint64(58)
_PLACE = np.zeros(64, dtype=np.int64)
for _i in range(64):
    _PLACE[((int(_DEBRUIJN) << _i) & (2**64 - 1)) >> 58] = _i


@compiled
def _lowest(word: Any) -> Any:
    """Position of the lowest one of a word that is not zero."""
    return _PLACE[np.int64(((word & (~word + _ONE)) * _DEBRUIJN) >> _SHIFT)]


@compiled
def _has(row: Any, at: Any, i: Any) -> Any:
    return (row[at + (i >> 6)] >> np.uint64(i & 63)) & _ONE != _ZERO


@compiled
def _put(row: Any, at: Any, i: Any) -> None:
    row[at + (i >> 6)] |= _ONE << np.uint64(i & 63)


@compiled
def _clear(row: Any, at: Any, i: Any) -> None:
    row[at + (i >> 6)] &= ~(_ONE << np.uint64(i & 63))


@compiled
def _needed_after(users: Any, row: Any, i: Any, operator: Any, words: Any) -> Any:
    """Whether item ``i`` has a user left once ``operator`` has run too."""
    for w in range(words):
        left = users[i, w] & ~row[w]
        if w == operator >> 6:
            left &= ~(_ONE << np.uint64(operator & 63))
        if left != _ZERO:
            return True
    return False


@compiled
def victim_sets(
    row: Any, operator: Any, excess: Any, spare: Any, words: Any, item_words: Any,
    room: Any, price: Any, spill: Any, touch_at: Any, touch: Any,
    candidates: Any, found: Any, tolls: Any, choices: Any, least: Any,
) -> Any:  # fmt: skip
    """Sets to evict for ``operator`` of which no part would do, cheapest first; how many there are.

    Set ``k`` is the bit mask ``found[k]`` over ``candidates`` and costs ``tolls[k]``, less than ``spare``.
    ``least[0]`` comes out as the least toll that was dropped for want of choices, ``least[1]`` as the least
    that ``spare`` forbade.
    """
    inside, copied = 2 * words, 2 * words + item_words
    count = 0
    for w in range(item_words):
        bits = row[inside + w]
        while bits != _ZERO:
            i = w * 64 + _lowest(bits)
            bits &= bits - _ONE
            mine = room[i] == 0
            for k in range(touch_at[operator], touch_at[operator + 1]):
                mine = mine or touch[k] == i
            if mine:
                continue
            # Insertion by room, larger first: a set is minimal if it falls short without its last.
            at = count if count < MOST_CANDIDATES else MOST_CANDIDATES
            while at > 0 and room[candidates[at - 1]] < room[i]:
                at -= 1
            if at == MOST_CANDIDATES:
                least[0] = 0
                continue
            if count == MOST_CANDIDATES:
                least[0] = 0
                count -= 1
            for k in range(count, at, -1):
                candidates[k] = candidates[k - 1]
            candidates[at] = i
            count += 1
    rest = np.zeros(MOST_CANDIDATES + 1, dtype=np.int64)
    for k in range(count - 1, -1, -1):
        rest[k] = rest[k + 1] + room[candidates[k]]
    stack_at = np.empty(2 * MOST_CANDIDATES + 4, dtype=np.int64)
    stack_missing = np.empty(2 * MOST_CANDIDATES + 4, dtype=np.int64)
    stack_toll = np.empty(2 * MOST_CANDIDATES + 4, dtype=np.int64)
    stack_set = np.empty(2 * MOST_CANDIDATES + 4, dtype=np.uint64)
    stack_at[0], stack_missing[0], stack_toll[0], stack_set[0] = 0, excess, 0, _ZERO
    depth, sets = 1, 0
    limit = len(found)
    while depth > 0:
        depth -= 1
        at, missing, toll, chosen = stack_at[depth], stack_missing[depth], stack_toll[depth], stack_set[depth]
        if at == count or rest[at] < missing:
            continue
        if sets == limit:
            least[0] = 0
            break
        i = candidates[at]
        stack_at[depth], stack_missing[depth], stack_toll[depth], stack_set[depth] = at + 1, missing, toll, chosen
        depth += 1
        more = toll + price[i]
        if not _has(row, copied, i):
            more += spill[i]
        if more >= spare:
            least[1] = min(least[1], more)
            continue
        with_it = chosen | (_ONE << np.uint64(at))
        if room[i] >= missing:
            place = sets
            while place > 0 and tolls[place - 1] > more:
                found[place], tolls[place] = found[place - 1], tolls[place - 1]
                place -= 1
            found[place], tolls[place] = with_it, more
            sets += 1
        else:
            stack_at[depth], stack_missing[depth], stack_toll[depth] = at + 1, missing - room[i], more
            stack_set[depth] = with_it
            depth += 1
    if sets > choices:
        least[0] = min(least[0], tolls[choices])
        sets = choices
    return sets


@compiled
def _as_good(a: Any, cost_a: Any, b: Any, cost_b: Any, words: Any, item_words: Any, price: Any, spill: Any) -> Any:
    """Whether ``a`` reaches what ``b`` has for no more bytes than ``b`` has paid."""
    left = cost_b - cost_a
    if left < 0:
        return False
    inside, copied = 2 * words, 2 * words + item_words
    for w in range(item_words):
        bits = a[inside + w] & ~b[inside + w]
        while bits != _ZERO:
            i = w * 64 + _lowest(bits)
            bits &= bits - _ONE
            left -= price[i]
            if not _has(a, copied, i):
                left -= spill[i]
            if left < 0:
                return False
        bits = a[inside + w] & b[inside + w] & b[copied + w] & ~a[copied + w]
        while bits != _ZERO:
            left -= spill[w * 64 + _lowest(bits)]
            bits &= bits - _ONE
            if left < 0:
                return False
    return True


@compiled
def _runs_at_once(
    row: Any, held: Any, operator: Any, capacity: Any, words: Any, item_words: Any, own: Any, touch_at: Any,
    touch: Any, users: Any, room: Any, price: Any, spill: Any, producer: Any,
) -> Any:  # fmt: skip
    inside, copied = 2 * words, 2 * words + item_words
    arriving, rooms, prices = own[operator], 0, 0
    for k in range(touch_at[operator], touch_at[operator + 1]):
        i = touch[k]
        if _has(row, inside, i):
            continue
        arriving += room[i]
        if producer[i] == operator:
            rooms += room[i]
            prices += price[i] + spill[i]
        elif _needed_after(users, row, i, operator, words):
            return False
    if held + arriving > capacity:
        return False
    if rooms == 0:
        return True
    for k in range(touch_at[operator], touch_at[operator + 1]):
        i = touch[k]
        if not _has(row, inside, i) or room[i] < rooms or _needed_after(users, row, i, operator, words):
            continue
        worth = price[i]
        if not _has(row, copied, i):
            worth += spill[i]
        if worth >= prices:
            return True
    return False


@compiled
def advance(
    row: Any, held: Any, operator: Any, victims: Any, candidates: Any, words: Any, item_words: Any,
    touch_at: Any, touch: Any, next_at: Any, following: Any, before: Any, users: Any, room: Any,
) -> Any:  # fmt: skip
    """Run ``operator`` in ``row`` after evicting the set ``victims`` of ``candidates``; bytes held then."""
    inside, copied = 2 * words, 2 * words + item_words
    while victims != _ZERO:
        i = candidates[_lowest(victims)]
        victims &= victims - _ONE
        _clear(row, inside, i)
        _put(row, copied, i)
        held -= room[i]
    _put(row, 0, operator)
    _clear(row, words, operator)
    for k in range(touch_at[operator], touch_at[operator + 1]):
        i = touch[k]
        if not _has(row, inside, i):
            held += room[i]
            _put(row, inside, i)
    for k in range(touch_at[operator], touch_at[operator + 1]):
        i = touch[k]
        if not _needed_after(users, row, i, operator, words):
            held -= room[i]
            _clear(row, inside, i)
            _clear(row, copied, i)
    for k in range(next_at[operator], next_at[operator + 1]):
        successor = following[k]
        free = True
        for w in range(words):
            if before[successor, w] & ~row[w] != _ZERO:
                free = False
                break
        if free:
            _put(row, words, successor)
    return held


@compiled
def expand(
    first: Any, stop: Any, cost: Any, held: Any, masks: Any, last: Any, keys: Any,
    words: Any, item_words: Any, own: Any, touch_at: Any, touch: Any, next_at: Any, following: Any, before: Any,
    users: Any, room: Any, price: Any, spill: Any, producer: Any, glued: Any, key_of: Any,
    capacity: Any, budget: Any, choices: Any,
    new_cost: Any, new_held: Any, new_masks: Any, new_last: Any, new_keys: Any, parent: Any, choice: Any, dropped: Any,
    link: Any, table: Any, tally: Any,
) -> Any:  # fmt: skip
    """Write what the states ``first`` to ``stop`` of a layer lead to; the first state that was not expanded.

    It stops early where the rows written run short of room, and says so in ``tally[FULL]``.
    """
    columns = 2 * words + 2 * item_words
    inside = 2 * words
    candidates = np.empty(MOST_CANDIDATES + 1, dtype=np.int64)
    found = np.empty(4 * choices, dtype=np.uint64)
    tolls = np.empty(4 * choices, dtype=np.int64)
    least = np.empty(2, dtype=np.int64)
    todo = np.empty(words * 64, dtype=np.int64)
    top = len(new_cost)
    mask = len(table) - 1
    none = np.int64(2**62)
    tally[FULL] = 0
    for s in range(first, stop):
        row = masks[s]
        count = 0
        at_once = False
        if last[s] >= 0 and glued[last[s]] >= 0:
            todo[0] = glued[last[s]]
            count = 1
        else:
            for w in range(words):
                bits = row[words + w]
                while bits != _ZERO:
                    todo[count] = w * 64 + _lowest(bits)
                    bits &= bits - _ONE
                    count += 1
            for k in range(count):
                operator = todo[k]
                if glued[operator] < 0 and _runs_at_once(
                    row, held[s], operator, capacity, words, item_words, own, touch_at, touch, users, room, price,
                    spill, producer,
                ):  # fmt: skip
                    todo[0] = operator
                    count = 1
                    at_once = True
                    break
        if tally[COUNT] + count * choices > top:
            tally[FULL] = 1
            return s
        for k in range(count):
            operator = todo[k]
            excess = np.int64(0)
            if not at_once:
                excess = held[s] + own[operator] - capacity
                for t in range(touch_at[operator], touch_at[operator + 1]):
                    if not _has(row, inside, touch[t]):
                        excess += room[touch[t]]
            sets = 1
            if excess > 0:
                least[0], least[1] = none, none
                sets = victim_sets(
                    row, operator, excess, budget - cost[s], words, item_words, room, price, spill, touch_at, touch,
                    candidates, found, tolls, choices, least,
                )  # fmt: skip
                if least[0] < none:
                    tally[LOST] = min(tally[LOST], cost[s] + least[0])
                if least[1] < none:
                    tally[OVER] = min(tally[OVER], cost[s] + least[1])
            else:
                found[0], tolls[0] = _ZERO, 0
            for v in range(sets):
                new = tally[COUNT]
                target = new_masks[new]
                for w in range(columns):
                    target[w] = row[w]
                now = advance(
                    target, held[s], operator, found[v], candidates, words, item_words, touch_at, touch, next_at,
                    following, before, users, room,
                )  # fmt: skip
                total = cost[s] + tolls[v]
                key = keys[s] ^ key_of[operator]
                slot = np.int64(key >> np.uint64(1)) & mask
                head = np.int64(-1)
                while table[slot] >= 0:
                    head = np.int64(table[slot])
                    same = new_keys[head] == key
                    w = 0
                    while same and w < words:
                        same = new_masks[head, w] == target[w]
                        w += 1
                    if same:
                        break
                    head = np.int64(-1)
                    slot = (slot + 1) & mask
                worse = False
                peer, before_it = head, np.int64(-1)
                while peer >= 0:
                    after = np.int64(link[peer])
                    if _as_good(new_masks[peer], new_cost[peer], target, total, words, item_words, price, spill):
                        worse = True
                        break
                    if _as_good(target, total, new_masks[peer], new_cost[peer], words, item_words, price, spill):
                        dropped[peer] = True
                        tally[ALIVE] -= 1
                        if before_it < 0:
                            head = after
                        else:
                            link[before_it] = after
                    else:
                        before_it = peer
                    peer = after
                if worse:
                    # What it dropped before, what drops it would have dropped too; the chain's head may be new.
                    if head >= 0:
                        table[slot] = head
                    continue
                new_cost[new], new_held[new], new_last[new], new_keys[new] = total, now, operator, key
                parent[new], choice[new], dropped[new] = s, v, False
                link[new] = head
                table[slot] = new
                tally[COUNT] += 1
                tally[ALIVE] += 1
    return stop


@compiled
def relink(keys: Any, masks: Any, link: Any, table: Any, words: Any, count: Any) -> None:
    """Chain the first ``count`` rows anew, after rows were moved."""
    table[:] = -1
    mask = len(table) - 1
    for s in range(count):
        slot = np.int64(keys[s] >> np.uint64(1)) & mask
        head = np.int64(-1)
        while table[slot] >= 0:
            head = table[slot]
            same = keys[head] == keys[s]
            w = 0
            while same and w < words:
                same = masks[head, w] == masks[s, w]
                w += 1
            if same:
                break
            head = np.int64(-1)
            slot = (slot + 1) & mask
        link[s] = head
        table[slot] = s
