"""On a terminal a solve shows what it has and what is proved; Ctrl-C keeps the best; a pipe sees results only."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

COMMAND = [sys.executable, "-c", "from retensor.cli import main; main()"]
PATIENCE = 120


@pytest.fixture
def terminal():
    """Start a command whose stderr is a terminal; every process started is ended."""
    started = []

    def start(*arguments):
        outside, inside = pty.openpty()
        process = subprocess.Popen(
            [*COMMAND, *(str(argument) for argument in arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=inside,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "160", "LC_ALL": "C.UTF-8"},
            # The test runner may have been started in the background, where Ctrl-C is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(inside)
        started.append((process, outside))
        return process, outside

    yield start
    for process, outside in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
        os.close(outside)


def read_until(descriptor, word):
    """What a terminal shows up to ``word``, or all of it where ``word`` is None and the process ends."""
    seen = ""
    deadline = time.monotonic() + PATIENCE
    while word is None or word not in seen:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            pytest.fail(f"'{word}' did not appear in {PATIENCE} s; seen: {seen[-500:]!r}")
        try:
            part = os.read(descriptor, 65536)
        except OSError:
            part = b""
        if not part:
            if word is None:
                return seen
            pytest.fail(f"ended without '{word}'; seen: {seen[-500:]!r}")
        seen += part.decode(errors="replace")
    return seen


def test_ctrl_c_keeps_writes_and_prints_the_best_plan_with_its_gap(terminal, hard_file, tmp_path):
    output = tmp_path / "plan.json"
    process, screen = terminal("plan", hard_file, "--scratchpad", "M_R", "--time-limit", "600", "-o", output, "--json")
    shown = read_until(screen, "best ")
    assert "planning" in shown
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    found = json.loads(out)
    assert (found["status"], found["stopped"]) == ("feasible", True)
    assert 0 < found["gap"] <= 1
    assert found["bound_bytes"] < found["non_compulsory_bytes"]
    written = json.loads(output.read_text())
    assert written["non_compulsory_bytes"] == found["non_compulsory_bytes"]
    checked = subprocess.run([*COMMAND, "verify", str(output), str(hard_file)], capture_output=True, timeout=PATIENCE)
    assert checked.returncode == 0, checked.stderr


def test_ctrl_c_that_the_planner_does_not_answer_ends_with_130(cli, graph_file, tmp_path, monkeypatch):
    from retensor import planning

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(planning, "plan", interrupted)
    result = cli("plan", graph_file, "--scratchpad", "M_R", "-o", tmp_path / "plan.json", "--json")
    assert result.code == 130
    assert json.loads(result.out)["status"] == "interrupted"
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_twice_leaves_a_whole_plan_or_none(terminal, hard_file, tmp_path):
    output = tmp_path / "plan.json"
    process, screen = terminal("plan", hard_file, "--scratchpad", "M_R", "--time-limit", "600", "-o", output)
    read_until(screen, "best ")
    for _ in range(2):
        process.send_signal(signal.SIGINT)
    _, _ = process.communicate(timeout=PATIENCE)
    # The first may be answered before the second arrives, which then finds the plan written or not yet.
    assert process.returncode in (0, 130)
    assert {path.name for path in tmp_path.iterdir()} <= {"plan.json"}
    if process.returncode == 0:
        assert output.exists()
    if output.exists():
        assert json.loads(output.read_text())["status"] == "feasible"


def test_ctrl_c_ends_a_sweep_with_the_points_planned_so_far(terminal, hard_file):
    process, screen = terminal("sweep", hard_file, "--time-limit", "600", "--points", "4", "--json")
    read_until(screen, "sweeping")
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            out, _ = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            continue
        break
    assert process.returncode in (0, 130)
    found = json.loads(out)
    if process.returncode == 0:
        assert found["stopped"] is True
        assert 1 <= len(found["points"]) <= 4
    else:
        assert found["status"] == "interrupted"


def test_progress_leaves_stdout_alone_and_clears_itself(terminal, graph_file):
    process, screen = terminal("plan", graph_file, "--scratchpad", "M_R", "--json")
    out, _ = process.communicate(timeout=PATIENCE)
    assert json.loads(out)["status"] == "optimal"
    assert process.returncode == 0
    shown = read_until(screen, None)
    assert shown.count("\n") == 0 or shown.endswith(("\x1b[2K", "\x1b[?25h"))


def test_nothing_but_the_result_in_a_pipe(graph_file):
    done = subprocess.run(
        [*COMMAND, "plan", str(graph_file), "--scratchpad", "M_R"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "optimal, proved" in done.stdout


def test_a_reader_that_leaves_early_is_no_error(graph_file):
    for arguments in (("graph", str(graph_file)), ("bounds", str(graph_file), "--json"), ("-h",)):
        process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        errors = process.stderr.read().decode()
        process.stderr.close()
        assert process.wait(timeout=PATIENCE) == 0
        assert errors == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_encoding_of_the_terminal_prints(graph_file, encoding):
    done = subprocess.run(
        [*COMMAND, "sweep", str(graph_file), "--points", "3"],
        capture_output=True,
        timeout=PATIENCE,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"96" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("plan", "{}", "--scratchpad", "M_R"), 0),
        (("plan", "{}", "--scratchpad", "0"), 2),
        (("plan", "{}", "--scratchpad", "9"), 3),
    ],
)
def test_exit_codes_reach_the_shell(graph_file, arguments, code):
    filled = [argument.format(graph_file) for argument in arguments]
    done = subprocess.run([*COMMAND, *filled], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == code
    assert done.stderr.count("\n") == (code != 0)
