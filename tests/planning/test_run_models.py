"""Plans run inside one arena of M_R bytes give what the model gives: ONNX light models and torch networks."""

from __future__ import annotations

import pytest

from retensor.graph import load
from retensor.planning import Accelerator, execute, plan

LIGHT = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)
NETWORKS = (
    "torchvision:resnet50",
    "torchvision:densenet121",
    "torchvision:vit_b_16",
    "torchvision:r2plus1d_18",
    "timm:convnext_atto",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"onnx:{light}" for light in LIGHT), *NETWORKS])
@pytest.mark.parametrize("parameters", [False, True])
def test_a_plan_at_m_r_runs_bit_equal(name: str, parameters: bool) -> None:
    graph = load(name)
    made = plan(graph, Accelerator("M_R", alignment=4), parameters=parameters)
    ran = execute(graph, made)
    assert made.status == "optimal"
    assert ran.bit_equal, f"largest difference {ran.max_abs_difference}"
    assert ran.bytes_in + ran.bytes_out == made.compulsory_bytes + made.non_compulsory_bytes
    assert ran.peak_bytes <= made.scratchpad_bytes


@pytest.mark.parametrize("name", ["onnx:squeezenet", "onnx:shufflenet"])
@pytest.mark.parametrize("options", [{"fuse": False}, {"in_place": True}, {"fuse": True, "in_place": True}])
def test_merged_and_unmerged_plans_run_bit_equal(name: str, options: dict[str, bool]) -> None:
    graph = load(name, **options)
    ran = execute(graph, plan(graph, Accelerator("M_R")))
    assert ran.bit_equal
