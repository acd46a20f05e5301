"""``retensor pack``: what it prints and writes, and its exit codes."""

from __future__ import annotations

import json
import signal

import pytest
from benchmarks.peers.cut_packings import cut_packing

from retensor.cli import watch
from retensor.planning import read_buffers

SMALL = "id,lower,upper,size\nb1,0,3,4\nb2,3,9,4\nb3,0,9,4\nb4,9,21,4\nb5,0,21,4\n"


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.csv"
    path.write_text(SMALL)
    return path


@pytest.fixture
def hard(tmp_path):
    path = tmp_path / "hard.csv"
    rows = [f"{i},{a},{b},{size}\n" for i, (a, b, size) in enumerate(cut_packing(1200, slack=0.01, capacity=2**20))]
    path.write_text("id,lower,upper,size\n" + "".join(rows))
    return path


def assert_offsets(text, tmp_path, capacity):
    path = tmp_path / "checked.csv"
    path.write_text(text)
    buffers = read_buffers(path).buffers
    for i, one in enumerate(buffers):
        assert 0 <= one.offset <= capacity - one.size
        for other in buffers[:i]:
            if one.lower < other.upper and other.lower < one.upper:
                assert one.offset + one.size <= other.offset or other.offset + other.size <= one.offset
    return buffers


def test_the_csv_with_offsets_goes_to_stdout_and_the_rest_to_stderr(cli, small, tmp_path):
    done = cli("pack", small, "--capacity", "12")
    assert done.code == 0
    assert done.out.startswith("id,lower,upper,size,offset\nb1,0,3,4,")
    assert len(assert_offsets(done.out, tmp_path, 12)) == 5
    assert "5 buffers in 12 B, found" in done.err


def test_without_a_capacity_the_least_is_found_and_files_are_written(cli, small, tmp_path):
    done = cli("pack", small, "-o", tmp_path / "out.csv", "--picture", tmp_path / "out.svg")
    assert done.code == 0
    assert "12 B, proved the least" in done.out
    assert "wrote" in done.out
    assert_offsets((tmp_path / "out.csv").read_text(), tmp_path, 12)
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")


def test_json_is_one_object_that_tells_all(cli, small):
    done = cli("pack", small, "--capacity", "1KiB", "--json")
    content = json.loads(done.out)
    assert content["schema"] == "retensor.packing/1"
    assert content["status"] == "packed"
    assert content["capacity_bytes"] == 1024
    assert content["bound_bytes"] == 12
    assert set(content["offsets"]) == {"b1", "b2", "b3", "b4", "b5"}
    assert content["files"] == {}


def test_what_cannot_fit_is_code_3_and_a_sentence(cli, small, tmp_path):
    done = cli("pack", small, "--capacity", "11", "-o", tmp_path / "out.csv")
    assert done.code == 3
    assert done.err == (
        "retensor: 5 buffers in 11 B is proved impossible: the buffers alive at 0 have 12 bytes together; "
        "give at least 12 bytes\n"
    )
    assert done.out == ""
    assert not (tmp_path / "out.csv").exists()
    assert json.loads(cli("pack", small, "--capacity", "3", "--json").out)["status"] == "infeasible"


def test_time_that_runs_out_is_code_4_and_a_sentence(cli, hard):
    done = cli("pack", hard, "--capacity", "1MiB", "--time-limit", "0.2")
    assert done.code == 4
    assert "is not decided: the time limit came before offsets were found or ruled out" in done.err
    assert len(done.err.splitlines()) == 1


def test_the_gap_is_told_where_the_least_is_not_proved(cli, hard, tmp_path):
    done = cli("pack", hard, "--time-limit", "0.2", "-o", tmp_path / "out.csv")
    assert done.code == 0
    assert "not proved the least: at least" in done.out
    assert_offsets((tmp_path / "out.csv").read_text(), tmp_path, 2**21)


def test_ctrl_c_before_a_result_is_code_130(cli, hard, monkeypatch):
    before = watch.watch

    def watched(what):
        from contextlib import contextmanager

        @contextmanager
        def inner():
            with before(what) as seen:
                # What a terminal's progress line would be told; here it presses Ctrl-C.
                seen.progress = lambda state: signal.raise_signal(signal.SIGINT)
                yield seen

        return inner()

    monkeypatch.setattr("retensor.cli.pack.watch", watched)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        done = cli("pack", hard, "--capacity", "1MiB")
    finally:
        signal.signal(signal.SIGINT, old)
    assert done.code == 130
    assert "stopped by Ctrl-C" in done.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--capacity", "much"], "'much' is not a size"),
        (["--capacity", "0"], "makes no sense"),
        (["--time-limit", "0"], "--time-limit is a number of seconds above 0"),
        (["-o", "out.txt"], "ends in none of .csv"),
        (["--picture", "out.gif"], "ends in none of .svg, .png"),
    ],
)
def test_wrong_options_are_one_sentence_and_code_2(cli, small, arguments, sentence):
    done = cli("pack", small, *arguments)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.splitlines()) == 1


def test_the_input_is_not_overwritten_and_a_bad_one_is_named_with_its_line(cli, small, tmp_path):
    done = cli("pack", small, "-o", small)
    assert done.code == 2
    assert small.read_text() == SMALL
    small.write_text("id,lower,upper,size\nb1,4,3,4\n")
    done = cli("pack", small)
    assert done.code == 2
    assert "line 2: buffer 'b1' is alive from 4 up to 3" in done.err
    assert cli("pack", tmp_path / "none.csv").code == 2
