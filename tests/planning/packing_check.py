"""What the packing tests trust: a check moment by moment, and a brute force over all addresses."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from retensor.planning.allocate import Block


def assert_packed(
    blocks: Sequence[Block],
    scratchpad: int,
    alignment: Sequence[int],
    fixed: Mapping[int, int],
    addresses: Sequence[int] | None,
) -> None:
    """At every moment the living byte ranges are disjoint and inside; alignments and fixed addresses are kept."""
    assert addresses is not None
    assert len(addresses) == len(blocks)
    for i, address in enumerate(addresses):
        assert address >= 0
        assert address + blocks[i].size <= scratchpad
        assert address == fixed[i] if i in fixed else address % alignment[i] == 0
    for moment in {block.start for block in blocks}:
        ranges = sorted(
            (addresses[i], addresses[i] + b.size) for i, b in enumerate(blocks) if b.start <= moment < b.end and b.size
        )
        for (_, end), (start, _) in itertools.pairwise(ranges):
            assert end <= start


def brute_force(blocks: Sequence[Block], scratchpad: int, alignment: Sequence[int], fixed: Mapping[int, int]) -> bool:
    """Whether there is a packing, by trying every address of every block."""

    def fits(i: int, address: int, placed: Sequence[int]) -> bool:
        return address + blocks[i].size <= scratchpad and not any(
            blocks[i].start < blocks[j].end
            and blocks[j].start < blocks[i].end
            and blocks[i].size
            and blocks[j].size
            and address < placed[j] + blocks[j].size
            and placed[j] < address + blocks[i].size
            for j in range(len(placed))
        )

    def go(placed: list[int]) -> bool:
        i = len(placed)
        if i == len(blocks):
            return True
        tried = [fixed[i]] if i in fixed else range(0, scratchpad + 1, alignment[i])
        return any(fits(i, address, placed) and go([*placed, address]) for address in tried)

    return go([])
