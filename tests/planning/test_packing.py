"""Buffers packed as a tool of its own: within a capacity, or in the least there is, and files and pictures of them."""

from __future__ import annotations

import os
import random
import signal

import pytest
from benchmarks.peers.cut_packings import crowd, cut_packing
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.planning.packing_check import assert_packed, brute_force

import retensor as rt
from retensor.errors import RetensorError
from retensor.planning import Buffer, pack_buffers, plot_packing, portfolio, read_buffers
from retensor.planning.allocate import Block
from retensor.planning.solver import cp_model


def named(triples) -> list[Buffer]:
    return [Buffer(f"b{i}", *triple) for i, triple in enumerate(triples)]


def blocks_of(buffers) -> list[Block]:
    return [Block(b.lower, b.upper, b.size) for b in buffers]


def assert_right(buffers, found, capacity) -> None:
    fixed = {i: b.offset for i, b in enumerate(buffers) if b.offset is not None}
    assert_packed(blocks_of(buffers), capacity, [b.alignment for b in buffers], fixed, found.offsets)
    assert found.height == max(o + b.size for o, b in zip(found.offsets, buffers, strict=True))


@st.composite
def few_buffers(draw):
    buffers = []
    for i in range(draw(st.integers(1, 4))):
        start = draw(st.integers(-2, 2))
        size, alignment = draw(st.integers(0, 4)), draw(st.sampled_from((1, 1, 2, 3)))
        buffers.append(Buffer(str(i), start, start + draw(st.integers(1, 4)), size, alignment))
    if draw(st.booleans()):
        first = buffers[0]
        buffers[0] = Buffer(first.id, first.lower, first.upper, first.size, 1, draw(st.integers(0, 5)))
    return buffers


@settings(deadline=None, max_examples=200)
@given(few_buffers())
def test_the_least_capacity_is_that_of_a_brute_force(buffers):
    found = pack_buffers(buffers)
    assert found.status == "optimal"
    assert_right(buffers, found, found.height)
    blocks, alignment = blocks_of(buffers), [b.alignment for b in buffers]
    fixed = {i: b.offset for i, b in enumerate(buffers) if b.offset is not None}
    least = next(c for c in range(100) if brute_force(blocks, c, alignment, fixed))
    # Empty buffers fit into nothing, wherever they are said to lie.
    assert found.height == least
    assert found.bound == least
    if least > 1:
        assert pack_buffers(buffers, least - 1).status == "infeasible"
        assert pack_buffers(buffers, least - 1).bound == least
    if least:
        assert pack_buffers(buffers, least).status == "packed"


def test_a_crowd_that_needs_more_than_its_bytes_alive_is_proved_from_below():
    above = 0
    for seed in range(20):
        buffers = named(crowd(12, 24, seed=seed))
        found = pack_buffers(buffers)
        assert found.status == "optimal"
        assert_right(buffers, found, found.height)
        below = pack_buffers(buffers, found.height - 1)
        assert below.status == "infeasible"
        assert below.bound == found.height
        above += "complete search" in below.reason
    assert above >= 2


@pytest.mark.parametrize("unit", [1, 1024])
def test_a_perfect_packing_is_found_in_its_bytes_alive(unit):
    buffers = named((lower, upper, size * unit) for lower, upper, size in cut_packing(80, seed=5))
    found = pack_buffers(buffers)
    assert (found.status, found.height, found.bound) == ("optimal", 1024 * unit, 1024 * unit)
    assert_right(buffers, found, 1024 * unit)


def test_what_makes_a_capacity_too_small_is_named():
    buffers = [Buffer("wide", 0, 9, 60), Buffer("long", 3, 5, 50), Buffer("held", 10, 11, 5, offset=100)]
    assert "buffer 'wide' alone has 60 bytes" in pack_buffers(buffers, 59).reason
    assert "must lie up to byte 105" in pack_buffers(buffers, 104).reason
    assert "the buffers alive at 3 have 110 bytes together" in pack_buffers(buffers[:2], 109).reason
    assert pack_buffers(buffers[:2], 109).bound == 110


def test_time_that_runs_out_says_so_and_keeps_the_best():
    hard = named(cut_packing(1200, slack=0.01, capacity=2**20))
    unknown = pack_buffers(hard, 2**20, time_limit=0.3)
    assert (unknown.status, unknown.offsets, unknown.height) == ("unknown", None, None)
    assert "the time limit came before" in unknown.reason
    best = pack_buffers(hard, time_limit=0.5)
    assert best.status == "feasible"
    assert_right(hard, best, best.height)
    assert best.bound <= best.height


def test_progress_tells_height_and_bound_and_ctrl_c_keeps_the_best():
    hard = named(cut_packing(1200, slack=0.01, capacity=2**20))
    seen = []

    def progress(state):
        seen.append(state)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGINT)

    found = pack_buffers(hard, time_limit=60, progress=progress)
    assert found.status == "feasible"
    assert found.seconds < 50
    assert_right(hard, found, found.height)
    assert all(state.bound <= state.incumbent for state in seen)
    assert seen[-1].incumbent == found.height


@pytest.mark.parametrize("workers", [1, 2, None])
def test_cp_sat_gets_the_threads_that_were_asked_for_or_all(workers, monkeypatch):
    threads = []

    def solve(solver, *arguments):
        threads.append(solver.parameters.num_workers)
        return real(solver, *arguments)

    real = cp_model.CpSolver.solve
    monkeypatch.setattr(cp_model.CpSolver, "solve", solve)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    # After one node it is CP-SAT's turn. There are no offsets, so none are found before.
    monkeypatch.setattr(portfolio, "_TURN", 1)
    monkeypatch.setattr(portfolio, "_SPELL", 0.0)
    buffers = named(crowd(12, 24, seed=6))
    assert pack_buffers(buffers, 24, workers=workers).status == "infeasible"
    assert pack_buffers(buffers, workers=workers).bound == 25
    assert len(threads) >= 2
    assert set(threads) == {workers or 3}


def test_equal_calls_give_equal_answers():
    buffers = named(cut_packing(60, slack=0.05, seed=2))
    assert pack_buffers(buffers, 1024, seed=3) == pack_buffers(buffers, 1024, seed=3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("x", 3, 3, 1), "upper must be above lower"),
        (("x", 0, 1, -1), "size of buffer 'x' is -1; it may be 0 to"),
        (("x", 0, 1, 2**51), "size of buffer 'x' is 2,251,799,813,685,248"),
        (("x", 0, 10**400, 1), "a number of many digits"),
        (("x", 0, 1, 1, 0), "alignment of buffer 'x' is 0; it may be 1 to"),
        (("x", 0, 1, 1, 1, -2), "offset of buffer 'x' is -2; it may be 0 to"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Buffer(*arguments)


def test_wrong_calls_are_refused_with_what_to_do():
    one = Buffer("x", 0, 2, 4)
    with pytest.raises(TypeError, match="size of buffer 'x' is an int, not float"):
        Buffer("x", 0, 2, 4.0)
    with pytest.raises(ValueError, match="two buffers have the id 'x'"):
        pack_buffers([one, one])
    with pytest.raises(ValueError, match="no multiple of its alignment 4"):
        pack_buffers([Buffer("x", 0, 2, 4, 4, 6)])
    with pytest.raises(ValueError, match="'y' and 'x' overlap"):
        pack_buffers([Buffer("x", 0, 2, 4, offset=3), Buffer("y", 1, 3, 4, offset=0)])
    with pytest.raises(ValueError, match="a capacity of 0 bytes makes no sense"):
        pack_buffers([one], 0)
    with pytest.raises(ValueError, match="time limit"):
        pack_buffers([one], 4, time_limit=float("nan"))
    with pytest.raises(ValueError, match="workers is a number of threads from 1 to 1024"):
        pack_buffers([one], 4, workers=0)
    with pytest.raises(ValueError, match=r"seed is an int from 0 to"):
        pack_buffers([one], 4, seed=-1)
    with pytest.raises(ValueError, match="bytes together"):
        pack_buffers([Buffer(str(i), 0, 1, 2**50) for i in range(1025)])


def test_the_planning_floor_offers_it():
    assert rt.planning.pack_buffers([rt.planning.Buffer("x", 0, 1, 4)], 4).offsets == (0,)
    assert pack_buffers([]).height == 0
    assert pack_buffers([], 5).status == "packed"


# -- files --------------------------------------------------------------------------------------------


def written(folder, text):
    path = folder / "buffers.csv"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_file_comes_back_with_offsets_and_its_other_columns(tmp_path):
    text = 'note,upper,size,id,lower,alignment,offset\n"a, b",3,4,x,0,2,\n,9,4,y,3,,-1\nkept,9,4,z,0,1,8\n'
    table = read_buffers(written(tmp_path, text))
    assert table.buffers == (Buffer("x", 0, 3, 4, 2), Buffer("y", 3, 9, 4), Buffer("z", 0, 9, 4, 1, 8))
    again = table.with_offsets((0, 0, 8))
    assert again == 'note,upper,size,id,lower,alignment,offset\n"a, b",3,4,x,0,2,0\n,9,4,y,3,,0\nkept,9,4,z,0,1,8\n'
    assert [b.offset for b in read_buffers(written(tmp_path, again)).buffers] == [0, 0, 8]


def test_other_names_of_columns_are_known_and_end_is_inclusive(tmp_path):
    table = read_buffers(written(tmp_path, b"\xef\xbb\xbfbuffer_id,start,end,size\r\n\r\nx,0,2,4\r\n"))
    assert table.buffers == (Buffer("x", 0, 3, 4),)
    assert table.with_offsets([7]) == "buffer_id,start,end,size,offset\nx,0,2,4,7\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "is empty; its first line names the columns"),
        ("id,lower,upper,size\n", "has a header but no buffers"),
        ("id,lower,upper\nx,0,1\n", "has no column 'size'"),
        ("id,lower,upper,size,begin\nx,0,1,1,0\n", "has the column 'lower' twice"),
        ("id,lower,upper,size\nx,0,1\n", "line 2 has 3 fields; the header has 4"),
        ("id,lower,upper,size\nx,0,1,1\nx,0,1,1\n", "line 3 has the id 'x' of line 2"),
        ("id,lower,upper,size\nx,2,1,1\n", "line 2: buffer 'x' is alive from 2 up to 1"),
        ("id,lower,upper,size\nx,0,1,-4\n", "line 2: size of buffer 'x' is -4"),
        ("id,lower,upper,size\nx,0,1,4.5\n", "line 2: size is '4.5', not a whole number"),
        ("id,lower,upper,size\nx,0,1,\n", "line 2: size is '', not a whole number"),
        ("id,lower,upper,size\nx,0,1,1_0\n", "size is '1_0', not a whole number"),
        (f"id,lower,upper,size\nx,0,1,{'9' * 60}\n", "size of buffer 'x' is a number of many digits"),
        (f"id,lower,upper,size\nx,0,1,{'9' * 6000}\n", "not a whole number"),
        ("id,lower,upper,size,gaps\nx,0,9,1,2-3\n", "has gaps, which cannot be packed"),
        ('id,lower,upper,size\n"x,0,1,1\n', "is not CSV"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"id,lower,upper,size\n\x00,0,1,1\n\x00,0,1,1\n", "line 3 has the id"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, text, sentence):
    with pytest.raises(RetensorError, match=sentence):
        read_buffers(written(tmp_path, text))


def test_no_file_and_no_ordinary_file_are_refused(tmp_path):
    with pytest.raises(RetensorError, match="there is no file"):
        read_buffers(tmp_path / "none.csv")
    with pytest.raises(RetensorError, match="is not a regular file"):
        read_buffers(tmp_path)


def test_mutated_files_are_read_or_refused_in_a_sentence(tmp_path):
    good = "id,lower,upper,size,alignment\nx,0,3,4,2\ny,3,9,4,1\nz,0,9,4,1\n"
    dice = random.Random(0)
    refusals = []
    for _ in range(1000):
        data = bytearray(good.encode())
        for _ in range(dice.randint(1, 3)):
            at = dice.randrange(len(data))
            data[at : at + dice.randint(0, 3)] = bytes(
                dice.choice(b'0-,\n"x\xff9 \r') for _ in range(dice.randint(0, 3))
            )
        try:
            read_buffers(written(tmp_path, bytes(data)))
        except RetensorError as error:
            refusals.append(str(error))
    assert 100 < len(refusals) < 980
    assert not any("\n" in sentence for sentence in refusals)


# -- the picture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["svg", "png"])
@pytest.mark.parametrize("dark", [False, True])
def test_a_packing_is_drawn(tmp_path, suffix, dark):
    buffers = [*named(cut_packing(30, seed=1)), Buffer("far $x$", 10**15, 10**15 + 3, 0)]
    found = pack_buffers(buffers, 1024)
    path = tmp_path / f"packed.{suffix}"
    plot_packing(path, buffers, found.offsets, capacity=1024, title="thirty", dark=dark)
    drawn = path.read_bytes()
    assert drawn.startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")
    if suffix == "svg":
        assert b"thirty" in drawn
        assert b"31 buffers in 1 KiB" in drawn


def test_a_picture_needs_an_offset_for_each_buffer(tmp_path):
    with pytest.raises(ValueError, match="1 offsets for 0 buffers"):
        plot_packing(tmp_path / "x.svg", [], [1])
    with pytest.raises(ValueError, match="ends in neither"):
        plot_packing(tmp_path / "x.gif", [], [])
    plot_packing(tmp_path / "x.svg", [], [])


def test_an_empty_buffer_that_must_lie_high_counts_for_the_least_capacity() -> None:
    """Without a size it takes no room, but the capacity reaches up to it and need not go on."""
    buffers = [Buffer("0", 0, 2, 0, 2, 12), Buffer("1", -3, 1, 5, 2), Buffer("2", -2, -1, 5, 4)]
    found = pack_buffers(buffers, time_limit=10)
    assert (found.status, found.height) == ("optimal", 12)
    assert pack_buffers(buffers, 12, time_limit=10).status == "packed"
    assert pack_buffers(buffers, 11, time_limit=10).status == "infeasible"
