"""Packing blocks: right against a brute force, complete proofs, within the clock, and light where that is enough."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from unittest.mock import patch

import numpy as np
import pytest
from benchmarks.peers import no_overlap
from benchmarks.peers.cut_packings import crowd, cut_packing
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.packing_check import assert_packed, brute_force

from retensor.planning import allocate, portfolio
from retensor.planning.allocate import Block, Packing, most_alive, pack
from retensor.planning.progress import Clock

PATIENCE = 60.0


def search(blocks, scratchpad, alignment=1, fixed=None, clock=None, seed=0, tell=None) -> Packing:
    """Pack by the search alone."""
    with patch.object(allocate, "first_fit", return_value=None):
        return pack(blocks, scratchpad, alignment, clock or Clock(PATIENCE), fixed=fixed, seed=seed, tell=tell)


def cut(*arguments, **options) -> list[Block]:
    return [Block(*triple) for triple in cut_packing(*arguments, **options)]


@pytest.fixture(scope="module")
def compiled():
    """The search, compiled before its time is taken."""
    search([Block(0, 2, 1), Block(1, 3, 1)], 2)


@st.composite
def tiny(draw, most=5, alignments=(1,), fixed=False):
    """Blocks, a scratchpad around what is alive at once, alignments, and fixed addresses."""
    blocks = []
    for _ in range(draw(st.integers(1, most))):
        start = draw(st.integers(0, 4))
        blocks.append(Block(start, draw(st.integers(start + 1, 5)), draw(st.integers(0, 4))))
    alignment = [draw(st.sampled_from(alignments)) for _ in blocks]
    scratchpad = max(1, most_alive(blocks) + draw(st.integers(-1, 2)))
    kept = {}
    if fixed:
        for i in draw(st.sets(st.integers(0, len(blocks) - 1), max_size=2)):
            kept[i] = draw(st.integers(0, scratchpad))
    return blocks, scratchpad, alignment, kept


def agrees_with_brute_force(case) -> None:
    blocks, scratchpad, alignment, fixed = case
    possible = brute_force(blocks, scratchpad, alignment, fixed)
    for packing in (
        search(blocks, scratchpad, alignment, fixed),
        pack(blocks, scratchpad, alignment, Clock(PATIENCE), fixed=fixed),
    ):
        if possible:
            assert_packed(blocks, scratchpad, alignment, fixed, packing.addresses)
        else:
            assert packing == Packing(None, impossible=True)


@settings(deadline=None, max_examples=400)
@given(tiny())
def test_a_packing_is_found_or_ruled_out_as_by_brute_force(case):
    agrees_with_brute_force(case)


@settings(deadline=None, max_examples=300)
@given(tiny(most=4, alignments=(1, 2, 3, 4)))
def test_each_block_keeps_its_alignment_as_by_brute_force(case):
    agrees_with_brute_force(case)


@settings(deadline=None, max_examples=300)
@given(tiny(fixed=True))
def test_fixed_blocks_stay_as_by_brute_force(case):
    agrees_with_brute_force(case)


@settings(deadline=None, max_examples=200)
@given(tiny(most=4, alignments=(2, 4), fixed=True))
def test_fixed_blocks_and_alignments_go_together_as_by_brute_force(case):
    agrees_with_brute_force(case)


@pytest.mark.parametrize("slack", [0.0, 0.05])
@pytest.mark.parametrize("seed", range(8))
def test_packings_cut_at_random_are_found_again(seed, slack):
    blocks = cut(60, slack=slack, seed=seed)
    assert_packed(blocks, 1024, [1] * len(blocks), {}, search(blocks, 1024).addresses)


def test_a_perfect_packing_of_large_pages_is_found_and_one_byte_less_ruled_out():
    blocks = [Block(b.start, b.end, b.size * 4096) for b in cut(40, seed=3)]
    assert_packed(blocks, 1024 * 4096, [4096] * len(blocks), {}, search(blocks, 1024 * 4096, 4096).addresses)
    assert search(blocks, 1024 * 4096 - 1, 4096).impossible


def test_what_the_bytes_alive_do_not_rule_out_the_search_does_and_cp_sat_confirms():
    above = 0
    for seed in range(40):
        triples = crowd(12, 24, seed=seed)
        blocks = [Block(*triple) for triple in triples]
        least = most_alive(blocks)
        while (packing := search(blocks, least, seed=seed)).addresses is None:
            assert packing.impossible
            assert no_overlap.solve(triples, least, time_limit=PATIENCE, threads=1) is False
            above += 1
            least += 1
        assert_packed(blocks, least, [1] * len(blocks), {}, packing.addresses)
    # The test says nothing where all are ruled out by counting.
    assert above >= 3


def test_the_last_block_may_end_off_the_grid_of_addresses():
    blocks = [Block(0, 1, 16), Block(0, 1, 5)]
    packing = search(blocks, 21, 16)
    assert packing.addresses == (0, 16)
    assert search(blocks, 20, 16).impossible


def test_fixed_blocks_that_overlap_or_stick_out_are_impossible():
    blocks = [Block(0, 2, 4), Block(1, 3, 4)]
    assert pack(blocks, 16, 1, Clock(PATIENCE), fixed={0: 0, 1: 3}).impossible
    assert pack(blocks, 16, 1, Clock(PATIENCE), fixed={0: 13}).impossible
    assert_packed(blocks, 8, [1, 1], {0: 4}, search(blocks, 8, fixed={0: 4}).addresses)


def test_empty_blocks_take_no_room():
    blocks = [Block(0, 3, 0), Block(0, 3, 4), Block(2, 2, 9), Block(1, 2, 0)]
    for packing in (search(blocks[:2] + blocks[3:], 4), pack([], 4, 1, Clock(PATIENCE))):
        assert packing.addresses is not None


def test_the_same_call_gives_the_same_addresses():
    blocks = cut(80, slack=0.02, seed=1)
    assert search(blocks, 1024, seed=5) == search(blocks, 1024, seed=5)


@pytest.mark.usefixtures("compiled")
def test_time_is_kept_inside_compiled_code():
    blocks = cut(1200, slack=0.01, capacity=2**20)
    started = time.monotonic()
    assert pack(blocks, 2**20, 1, Clock(1.0)) == Packing(None)
    assert time.monotonic() - started < 3


@pytest.mark.usefixtures("compiled")
def test_a_stop_ends_the_search_at_its_next_breath():
    clock = Clock(PATIENCE)
    told = []

    def tell():
        told.append(clock.seconds)
        if len(told) == 3:
            clock.stop()

    assert search(cut(1200, slack=0.01, capacity=2**20), 2**20, clock=clock, tell=tell) == Packing(None)
    assert len(told) == 3
    assert clock.seconds < PATIENCE / 2


@settings(deadline=None, max_examples=60)
@given(tiny(alignments=(1, 2), fixed=True))
def test_cp_sat_in_turn_decides_as_the_search(case):
    blocks, scratchpad, alignment, fixed = case
    with patch.object(portfolio, "_SPELL", 0.0), patch.object(portfolio, "_TURN", 1):
        packing = search(blocks, scratchpad, alignment, fixed)
    if brute_force(blocks, scratchpad, alignment, fixed):
        assert_packed(blocks, scratchpad, alignment, fixed, packing.addresses)
    else:
        assert packing == Packing(None, impossible=True)


def test_without_the_search_first_fit_decides_alone():
    blocks = cut(200, seed=0)
    assert pack(blocks, 1024, 1, Clock(PATIENCE), exact=False) == Packing(None)
    assert pack(blocks, 1023, 1, Clock(PATIENCE), exact=False).impossible


def test_easy_packings_load_no_compiler():
    script = (
        "import sys\n"
        "from retensor.planning.allocate import Block, pack\n"
        "from retensor.planning.progress import Clock\n"
        "assert pack([Block(0, 2, 3), Block(1, 3, 4)], 7, 1, Clock(9)).addresses\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr


def test_a_full_trail_grows_and_the_search_goes_on():
    blocks = cut(60, seed=1)
    n = len(blocks)
    columns = ([b.start for b in blocks], [b.end for b in blocks], [b.size for b in blocks], [1] * n, [-1] * n)
    problem = portfolio._Problem(
        portfolio.Blocks(*(np.array(column, dtype=np.int64) for column in columns)),
        1024,
        np.array([1024 - b.size for b in blocks]),
    )

    def run(length):
        one = portfolio._Run(problem, problem.order("WAT"))
        one.state = one.state._replace(trail=np.zeros((length, 2), np.int64))
        return one, one.go(10**6, Clock(PATIENCE))

    short, found = run(8 * n + 9)
    assert len(short.state.trail) > 8 * n + 9
    assert_packed(blocks, 1024, [1] * n, {}, [int(a) for a in found])
    _, other = run(10**6)
    assert found.tolist() == other.tolist()


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 6)), min_size=1, max_size=12))
def test_sections_hold_just_what_meets(spans):
    start = np.array([s for s, _ in spans], dtype=np.int64)
    end = start + np.array([w for _, w in spans], dtype=np.int64)
    first, last, count = portfolio.sections(start, end)
    assert first.min() == 0
    assert last.max() == count
    near_start, near = portfolio.neighbours(first, last)
    alive = [{i for i in range(len(spans)) if first[i] <= k < last[i]} for k in range(count)]
    for i in range(len(spans)):
        meets = {j for j in range(len(spans)) if j != i and start[i] < end[j] and start[j] < end[i]}
        assert {j for section in alive if i in section for j in section} - {i} == meets
        assert set(near[near_start[i] : near_start[i + 1]].tolist()) == meets
    # None lies within its neighbour: each is as many as can be alive at once.
    assert not any(a <= b or b <= a for a, b in itertools.pairwise(alive))
