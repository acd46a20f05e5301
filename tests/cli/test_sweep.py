"""``retensor sweep``: several models and budgets, rows in files, curves, and plans that are kept."""

import csv
import io
import json
import os
import pty
import signal
import subprocess
import sys

import pytest

from retensor.files import brief
from retensor.planning import plan

COMMAND = [sys.executable, "-c", "from retensor.cli import main; main()"]
PATIENCE = 120


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "plans"


@pytest.fixture(scope="module")
def other_file(models):
    """A graph whose bounds are equal, so that its sweep is one point."""
    from retensor.graph import Graph, Operator, Tensor
    from retensor.graph.json import write_graph

    path = models / "relu.json"
    tensors = [Tensor("x", 200, "input"), Tensor("y", 200)]
    write_graph(Graph("relu", [Operator("relu", "Relu", ("x",), ("y",))], tensors, ["y"]), path)
    return path


def counts(result):
    assert result.code == 0, result.err
    found = json.loads(result.out)
    return found["searched"], found["cached"]


def test_a_second_sweep_finds_every_plan_in_the_cache(cli, graph_file, folder):
    sweep = ("sweep", graph_file, "--points", "3", "--cache", folder, "--json")
    assert counts(cli(*sweep)) == (3, 0)
    assert counts(cli(*sweep)) == (0, 3)
    assert counts(cli(*sweep, "--points", "5")) == (2, 3)
    assert counts(cli("sweep", graph_file, "--points", "3", "--no-cache", "--json")) == (3, 0)
    told = cli("sweep", graph_file, "--points", "3", "--cache", folder).out
    assert "0 plans made, 3 found in the cache\n" in told
    assert f"plans are kept in {folder}\n" in told
    assert "plans are kept" not in cli("sweep", graph_file, "--points", "3", "--no-cache").out


def test_without_a_word_plans_are_kept_in_the_users_folder(cli, graph_file, folder, monkeypatch):
    monkeypatch.setenv("RETENSOR_CACHE", str(folder))
    assert counts(cli("sweep", graph_file, "--points", "3", "--json")) == (3, 0)
    assert counts(cli("sweep", graph_file, "--points", "3", "--json")) == (0, 3)
    # A home that cannot be written to is no reason to plan nothing.
    monkeypatch.setenv("RETENSOR_CACHE", str(graph_file))
    result = cli("sweep", graph_file, "--points", "3", "--json")
    assert counts(result) == (3, 0)
    assert result.err.startswith("retensor: no plan is kept: cannot keep plans in")
    assert result.err.count("\n") == 1


def test_models_and_sizes_are_rows_in_their_order_and_what_does_not_fit_says_why(cli, graph_file, other_file, folder):
    sizes = [word for size in ("M_P", "95", "M_R") for word in ("--scratchpad", size)]
    table = cli("sweep", graph_file, other_file, *sizes, "--cache", folder)
    assert table.code == 0
    assert table.err == ""
    # A long path is shortened in its middle.
    assert f"{brief(graph_file, 60)} in 95 bytes: operator" in table.out
    assert f"{brief(other_file, 60)} in 95 bytes: operator 'relu' needs 400 bytes" in table.out
    found = json.loads(cli("sweep", graph_file, other_file, *sizes, "--cache", folder, "--json").out)
    assert [(row["model"], row["scratchpad_bytes"], row["status"], row["cached"]) for row in found["points"]] == [
        (str(graph_file), 128, "optimal", True),
        (str(graph_file), 95, "infeasible", False),
        (str(graph_file), 96, "optimal", True),
        (str(other_file), 400, "optimal", True),
        (str(other_file), 95, "infeasible", False),
        (str(other_file), 400, "optimal", True),
    ]
    # The two rows of one plan are one plan.
    assert (found["searched"], found["cached"]) == (0, 3)
    assert [model["model"] for model in found["models"]] == [str(graph_file), str(other_file)]


def test_where_nothing_fits_the_code_is_3_and_the_reason_a_sentence(cli, graph_file, tmp_path):
    picture = tmp_path / "sweep.svg"
    result = cli("sweep", graph_file, "--scratchpad", "95", "--no-cache", "--picture", picture)
    assert result.code == 3
    assert result.err.count("\n") == 1
    assert "1 bytes are missing" in result.err
    assert "does not fit" in result.out
    assert not picture.exists()
    as_json = cli("sweep", graph_file, "--scratchpad", "95", "--no-cache", "--json")
    assert as_json.code == 3
    assert json.loads(as_json.out)["points"][0]["status"] == "infeasible"


def test_public_accelerators_bring_their_own_scratchpad_and_alignment(cli, graph_file):
    from retensor.planning.accelerators import PRESETS

    name, chip = next((name, p.accelerator) for name, p in PRESETS.items() if p.accelerator.alignment > 1)
    found = json.loads(cli("sweep", graph_file, "--accelerator", name, "--no-cache", "--json").out)
    (row,) = found["points"]
    assert (row["alignment"], row["status"]) == (chip.alignment, "optimal")
    assert row["accelerator"] == chip.name
    assert cli("sweep", graph_file, "--accelerator", "nonsense", "--no-cache").code == 2


def test_rows_go_to_csv_and_json_and_curves_to_a_picture(cli, graph_file, other_file, tmp_path):
    both = ("sweep", graph_file, other_file, "--points", "3", "--no-cache")
    written = {}
    for suffix in ("csv", "json"):
        path, picture = tmp_path / f"rows.{suffix}", tmp_path / f"{suffix}.svg"
        told = cli(*both, "-o", path, "--picture", picture)
        assert told.code == 0, told.err
        assert f"wrote {path}\nwrote {picture}\n" in told.out
        written[suffix] = path.read_text()
        drawn = picture.read_text()
        assert "bottleneck.json" in drawn
        assert "relu.json" in drawn
    found = json.loads(written["json"])
    assert found["schema"] == "retensor.sweep/1"
    rows = list(csv.DictReader(io.StringIO(written["csv"])))
    assert [row.keys() for row in rows] == [found["points"][0].keys()] * 4
    traffic = [int(row["non_compulsory_bytes"]) for row in rows]
    assert traffic == [point["non_compulsory_bytes"] for point in found["points"]] == [0, 64, 64, 0]


def test_two_jobs_print_what_one_prints_but_for_the_times(cli, graph_file, other_file):
    def rows(jobs):
        found = json.loads(cli("sweep", graph_file, other_file, "--jobs", jobs, "--no-cache", "--json").out)
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found["points"]]

    assert rows(2) == rows(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{graph}", "no-such-network"), "no-such-network"),
        ((), "MODEL"),
        (("{graph}", "--jobs", "0"), "jobs is a number of processes from 1 to 4096, or -1 for all cores, not 0"),
        (("{graph}", "--jobs", "x"), "jobs"),
        (("{graph}", "--cache", "{graph}"), "it is a file; name a folder"),
        (("{graph}", "--cache", "{graph}/below"), "not a directory; name a folder elsewhere"),
        (("{graph}", "--cache", "/proc/retensor"), "cannot keep plans in '/proc/retensor'"),
        (("{graph}", "--cache", "somewhere", "--no-cache"), "--cache and --no-cache were both given"),
        (("{graph}", "--scratchpad", "lots"), "'lots' is not a size"),
        (("{graph}", "-o", "rows.txt"), "ends in none of .csv, .json"),
        (("{graph}", "-o", "{graph}"), "is also the input"),
        (("{other}", "{graph}", "-o", "{graph}"), "is also the input"),
    ],
)
def test_a_mistake_is_one_sentence_with_code_2(cli, graph_file, other_file, arguments, words):
    filled = [argument.format(graph=graph_file, other=other_file) for argument in arguments]
    result = cli("sweep", *filled)
    assert (result.code, result.out) == (2, ""), result.err
    assert result.err.startswith("retensor: ")
    assert result.err.count("\n") == 1
    assert words in result.err


def test_a_terminal_sees_a_bar_and_a_pipe_nothing(graph_file, folder):
    command = [*COMMAND, "sweep", str(graph_file), "--points", "3", "--cache", str(folder), "--json"]
    piped = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert (piped.returncode, piped.stderr) == (0, "")
    outside, inside = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "160", "LC_ALL": "C.UTF-8"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=inside, env=environment)
    os.close(inside)
    out, _ = process.communicate(timeout=PATIENCE)
    shown = b""
    try:
        while part := os.read(outside, 65536):
            shown += part
    except OSError:
        pass
    os.close(outside)
    assert json.loads(out)["cached"] == 3
    assert b"sweeping" in shown
    assert b"3/3" in shown
    assert "━".encode() in shown


def test_ctrl_c_says_what_was_kept(cli, graph_file, folder, monkeypatch):
    from retensor.planning import tasks

    made = []

    def pressed(*arguments, **options):
        made.append(plan(*arguments, **options))
        if len(made) == 2:
            signal.raise_signal(signal.SIGINT)
        return made[-1]

    monkeypatch.setattr(tasks, "plan", pressed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = cli("sweep", graph_file, "--points", "4", "--cache", folder)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.code == 0, result.err
    assert "2 plans made, 0 found in the cache\n" in result.out
    assert "stopped by Ctrl-C after 2 of 4 plans\n" in result.out
    assert f"plans are kept in {folder}\n" in result.out
    monkeypatch.undo()
    assert counts(cli("sweep", graph_file, "--points", "4", "--cache", folder, "--json")) == (2, 2)
