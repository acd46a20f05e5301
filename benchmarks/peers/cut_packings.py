"""Hard packings whose answer is known: a rectangle of time by address, cut at random into buffers.

Uncut, the buffers fill the capacity at every moment, so nothing may be wasted anywhere (the hardest kind, ``slack`` 0);
with slack, some buffers are dropped at random until that share of the rectangle is free. Addresses are forgotten, and
the buffers come in random order. And crowds, which need not fit at all.
"""

from __future__ import annotations

import random

Cut = list[tuple[int, int, int]]
"""Buffers as (lower, upper, size)."""


def cut_packing(count: int, *, slack: float = 0.0, capacity: int = 1024, steps: int = 0, seed: int = 0) -> Cut:
    """About ``count`` buffers that fit into ``capacity`` units, over ``steps`` moments (0: as many as buffers)."""
    chance = random.Random(f"{count} {slack} {capacity} {steps} {seed}")
    steps = steps or count
    pieces = [(0, steps, 0, capacity)]
    while len(pieces) < count:
        weights = [(end - start) * (high - low) for start, end, low, high in pieces]
        at = chance.choices(range(len(pieces)), weights)[0]
        start, end, low, high = pieces[at]
        # Long and thin pieces are cut across; the others either way.
        wide, tall = (end - start) / steps, (high - low) / capacity
        if chance.random() < wide / (wide + tall):
            if end - start < 2:
                continue
            cut = chance.randrange(start + 1, end)
            pieces[at : at + 1] = [(start, cut, low, high), (cut, end, low, high)]
        elif high - low >= 2:
            cut = chance.randrange(low + 1, high)
            pieces[at : at + 1] = [(start, end, low, cut), (start, end, cut, high)]
    chance.shuffle(pieces)
    free, area = 0, steps * capacity
    while free < slack * area:
        start, end, low, high = pieces.pop()
        free += (end - start) * (high - low)
    return [(start, end, high - low) for start, end, low, high in pieces]


def crowd(steps: int, capacity: int, *, seed: int = 0) -> Cut:
    """Buffers of random lifetimes, added as long as one fits by bytes: many such crowds do not fit by addresses."""
    chance = random.Random(f"{steps} {capacity} {seed}")
    alive = [0] * steps
    buffers: Cut = []
    failures = 0
    while failures < 200:
        lower = chance.randrange(steps)
        upper = min(steps, lower + chance.choice((1, 2, 3, 4, 6)))
        size = min(chance.randint(1, capacity // 2), capacity - max(alive[lower:upper]))
        if size <= 0:
            failures += 1
            continue
        for moment in range(lower, upper):
            alive[moment] += size
        buffers.append((lower, upper, size))
    return buffers
