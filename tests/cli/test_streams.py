"""Streams that are closed or full, files that may not be replaced, and a Ctrl-C before the work has begun."""

import json
import os
import subprocess
import sys

import pytest

# No file may grow: a stream that leads to one is as good as full, while pipes still take what is written.
FULL = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"


def retensor(*arguments, before="", closed=(), **streams):
    code = f"{before}\nfrom retensor.cli import main\nmain()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    # Through a shell that closes the streams, as a user's does.
    closing = " ".join(f"{number}>&-" for number in closed)
    command = ["/bin/sh", "-c", f'exec "$@" {closing}', "sh", *command]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, text=True, timeout=60, check=False, **streams)


def test_a_closed_stdout_is_no_mistake(graph_file, tmp_path):
    for extra in ((), ("--json",)):
        done = retensor("bounds", graph_file, *extra, closed=(1,))
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    output = tmp_path / "plan.json"
    assert retensor("plan", graph_file, "--scratchpad", "M_R", "-o", output, closed=(0, 1, 2)).returncode == 0
    assert output.read_text().startswith("{")


def test_a_closed_stderr_does_not_send_sentences_to_stdout():
    done = retensor("bounds", "nosuch.json", closed=(2,))
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize("extra", [(), ("--json",)])
def test_a_full_stdout_is_named_in_one_sentence(graph_file, tmp_path, extra):
    with (tmp_path / "out").open("w") as stream:
        done = retensor("bounds", graph_file, *extra, before=FULL, stdout=stream)
    assert done.returncode == 2
    assert done.stderr.startswith("retensor: cannot write to stdout: File too large")
    assert done.stderr.count("\n") == 1


def test_a_full_stderr_keeps_the_exit_code(tmp_path):
    with (tmp_path / "err").open("w") as stream:
        done = retensor("bounds", "nosuch.json", "--json", before=FULL, stderr=stream)
    assert done.returncode == 2
    assert json.loads(done.stdout)["status"] == "error"


def test_ctrl_c_during_the_imports_is_one_sentence():
    before = """
import builtins
real = builtins.__import__
def stopped(name, *rest, **more):
    if name == "typer": raise KeyboardInterrupt
    return real(name, *rest, **more)
builtins.__import__ = stopped
"""
    done = retensor("-h", before=before)
    assert (done.returncode, done.stderr) == (130, "retensor: stopped by Ctrl-C\n")


def test_the_model_is_not_replaced_under_another_name(cli, graph_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bare = tmp_path / "model"
    bare.write_bytes(graph_file.read_bytes())
    os.link(bare, tmp_path / "hard.json")
    (tmp_path / "soft.json").symlink_to(bare)
    for output in ("model", "./model", "hard.json", "soft.json"):
        result = cli("graph", "model", "-o", output)
        assert result.code == 2
        assert "the input" in result.err
    assert bare.read_bytes() == graph_file.read_bytes()
    (tmp_path / "a.html").write_text("")
    os.link(tmp_path / "a.html", tmp_path / "b.html")
    assert cli("plan", "model", "--scratchpad", "M_R", "-o", "a.html", "--report", "b.html").code == 2


def test_external_data_of_the_model_is_not_replaced(cli, tmp_path):
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    values = [helper.make_tensor_value_info(name, 1, [64]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones(64, np.float32), "w")
    model = helper.make_model(
        helper.make_graph(nodes, "net", values[:1], values[1:], [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    path, data = tmp_path / "m.onnx", tmp_path / "w.bin"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    before = data.read_bytes()
    result = cli("graph", path, "-o", data)
    assert result.code == 2
    assert "external data" in result.err
    assert data.read_bytes() == before
    assert cli("graph", path, "-o", tmp_path / "g.json").code == 0


def test_names_that_lead_nowhere_say_so_in_short(cli, graph_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop.json").symlink_to("loop.json")
    plan = tmp_path / "p.json"
    assert cli("plan", graph_file, "--scratchpad", "M_R", "-o", plan).code == 0
    for model, words in (
        ("", "name is empty"),
        ("dangling", "link to 'nowhere', which is not there"),
        ("loop.json", "in a circle"),
        ("x" * 5000, "xxx...xxx"),
        ("x" * 300 + ".onnx", "xxx...xxx"),
        ("x" * 300 + ".json", "xxx...xxx"),
        (plan, "is a plan, not a model"),
    ):
        result = cli("graph", model)
        assert result.code == 2
        assert words in result.err
        assert len(result.err) < 300
    assert "is a plan, not a model" in cli("verify", plan, plan).err
    assert len(cli("graph", graph_file, "-o", "x" * 300).err) < 300
