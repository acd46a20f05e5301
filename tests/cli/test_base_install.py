"""The base install has no torch and needs none: import, an ONNX model planned, checked and run, the command line.

``make test`` makes a second environment with nothing but ``pip install retensor`` and names its interpreter
in RETENSOR_BASE_PYTHON.
"""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

PYTHON = os.environ.get("RETENSOR_BASE_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="RETENSOR_BASE_PYTHON names no interpreter; 'make test' sets it")


def base(*arguments, cwd):
    """Run the base environment's interpreter; what it prints."""
    assert PYTHON is not None
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([PYTHON, *arguments], cwd=cwd, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torch_is_absent(tmp_path):
    script = (
        "from importlib.util import find_spec; print([n for n in ('torch', 'torchvision', 'timm') if find_spec(n)])"
    )
    assert base("-c", script, cwd=tmp_path).strip() == "[]"


def test_library_plans_an_onnx_model(tmp_path):
    script = (
        "import retensor as rt\n"
        "graph = rt.graph.load('onnx:squeezenet')\n"
        "plan = rt.plan(graph, rt.Accelerator(scratchpad='M_R'))\n"
        "rt.planning.verify(graph, plan)\n"
        "print(plan.status)\n"
    )
    assert base("-c", script, cwd=tmp_path).strip() == "optimal"


def test_command_line_plans_verifies_and_runs(tmp_path):
    retensor = str(Path(str(PYTHON)).parent / "retensor")
    made = base(
        retensor,
        "plan",
        "squeezenet",
        "--scratchpad",
        "M_R",
        "-o",
        "plan.json",
        "--report",
        "r.html",
        "--json",
        cwd=tmp_path,
    )
    assert json.loads(made)["status"] == "optimal"
    assert (tmp_path / "r.html").stat().st_size > 1000
    assert json.loads(base(retensor, "verify", "plan.json", "squeezenet", "--json", cwd=tmp_path))["status"] == "valid"
    assert json.loads(base(retensor, "run", "plan.json", "squeezenet", "--json", cwd=tmp_path))["bit_equal"] is True


def test_a_torch_model_names_the_extra_to_install(tmp_path):
    retensor = str(Path(str(PYTHON)).parent / "retensor")
    done = subprocess.run(
        [str(PYTHON), retensor, "bounds", "torchvision:resnet18"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    assert re.search(r'pip install ".*\[torch\]"', done.stderr)
    assert done.stderr.count("\n") == 1
