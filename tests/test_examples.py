"""Every script of examples/ runs as a user would run it, and prints what it promises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
PROMISES = {
    "plan_an_onnx_file.py": ("wrote plan.json and report.html", ("plan.json", "report.html")),
    "fit_a_model_in_bytes.py": ("outputs equal in every bit: True", ("model.jlcm",)),
    "plan_a_torchvision_model.py": ("at M_H:", ()),
    "plan_any_graph.py": ("bytes spilled and retrieved, optimal", ("graph.json",)),
    "compare_budgets.py": ("mpmf, greedy:", ()),
    "cost_of_a_model.py": ("multiply-accumulates", ("cost.svg",)),
    "regularise_by_companding.py": ("plain weights again, outputs equal in every bit", ()),
    "round_by_division.py": ("packed with their steps", ("few.safetensors",)),
    "run_and_check.py": ("outputs equal in every bit", ()),
    "sample_any_width.py": ("a quarter of the block's parameters: width 8", ("family.safetensors",)),
    "shrink_a_vit_by_rank.py": ("parameters before, ", ("student.safetensors",)),
    "simulate_a_wave.py": ("wrote wave.gif", ("wave.gif",)),
    "trade_products_for_shifts.py": ("energy saved: ", ("packed.safetensors",)),
    "train_experts_and_average.py": ("the folded model has the original names and shapes", ()),
    "quantize_a_vit.py": ("the file gives the same outputs: True", ("few.safetensors",)),
    "train_in_four_bits.py": (
        "trained in e2m1·ue5m3+ts·16; the same names and shapes as in float32",
        ("frontier.svg", "runs.jsonl"),
    ),
}


def test_each_example_promises_something():
    assert {script.name for script in SCRIPTS} == set(PROMISES)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs_and_keeps_its_promise(script, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    line, files = PROMISES[script.name]
    assert line in done.stdout
    for name in files:
        assert (tmp_path / name).stat().st_size > 0
