"""Layers of microscaling codes: their values, their bytes, files, and what the planner makes of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

import retensor as rt
from retensor.quantizing import BlockLayer, Blocks, block_layer, codebook, packed_bytes

MXFP4, NVFP4 = Blocks("e2m1", "e8m0", 32, rule="ceil"), Blocks("e2m1", "e4m3", 16, tensor_scale=True)
FORMATS = (MXFP4, NVFP4, Blocks("e2m1", "ue5m3", 16), Blocks("e3m2", "bfloat16", 8), Blocks("e2m3", "float32", 5))


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: f"{format.element.name}-{format.scale.name}")
@pytest.mark.parametrize("make", [lambda: nn.Linear(50, 6), lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False)])
def test_a_layer_gives_what_the_plain_one_with_rounded_weights_does(format, make, tmp_path):
    torch.manual_seed(0)
    layer = make()
    few = block_layer(layer, format)
    rounded = format.round(layer.weight.detach().flatten(1)).reshape(layer.weight.shape)
    assert torch.equal(few.weight, rounded)
    x = torch.randn(2, 50) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 7, 7)
    plain = rt.fold(nn.Sequential(few))[0]
    assert type(plain) is type(layer)
    assert torch.equal(plain.weight, rounded)
    assert torch.equal(few(x), plain(x))
    # Bytes: of each block its elements and its scale, and of the tensor four.
    inputs = layer.weight[0].numel()
    blocks = 6 * -(-inputs // format.size)
    wanted = packed_bytes(blocks * format.size, format.element.bits) + blocks * format.scale.bits // 8
    assert few.nbytes == wanted + 4 * format.tensor_scale
    model = nn.Sequential(few, nn.ReLU())
    rt.save(model, tmp_path / "few.safetensors")
    with safe_open(tmp_path / "few.safetensors", "pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(t.numel() * t.element_size() for name, t in held.items() if "bias" not in name) == few.nbytes
    again = rt.load(tmp_path / "few.safetensors", base=nn.Sequential(make(), nn.ReLU()))
    assert isinstance(again[0], BlockLayer)
    assert torch.equal(again(x), model(x))


def test_an_altered_file_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(block_layer(nn.Linear(32, 4), NVFP4))
    rt.save(model, tmp_path / "few.safetensors")
    data = bytearray((tmp_path / "few.safetensors").read_bytes())
    data[-40] ^= 1
    (tmp_path / "few.safetensors").write_bytes(data)
    with pytest.raises(rt.RetensorError, match=r"altered|damaged|sum"):
        rt.load(tmp_path / "few.safetensors", base=nn.Sequential(nn.Linear(32, 4)))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 9), st.sampled_from(FORMATS), st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)  # fmt: skip
def test_codes_come_back_for_any_shape(inputs, outputs, format, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    layer.weight.data = torch.randn(outputs, inputs, generator=generator, dtype=dtype)
    few = block_layer(layer, format)
    kept = format.encode(layer.weight.detach())
    assert torch.equal(few.kept().codes, kept.codes)
    assert torch.equal(few.kept().scales, kept.scales)
    assert few.weight.dtype == dtype
    assert few(torch.zeros(1, inputs, dtype=dtype)).dtype == dtype


def test_scales_stay_where_a_model_goes_to_half_and_back():
    layer = nn.Linear(16, 4)
    few = block_layer(layer, Blocks("e2m1", "bfloat16", 8))
    before, values = few.nbytes, few.weight
    again = few.half().float()
    assert again.nbytes == before
    assert torch.equal(again.weight, values)


def test_the_planner_reads_its_codes():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    few = rt.replace(model, {nn.Linear: lambda layer: block_layer(layer, MXFP4)}).eval()
    graph = rt.graph.load(torch.export.export(few, (torch.zeros(2, 64),)))
    assert [operator.kind.split("+")[0] for operator in graph.operators] == ["decode", "aten.relu.default", "decode"]
    held = sum(tensor.nbytes for tensor in graph.tensors.values() if tensor.role == "parameter")
    packed = sum(module.nbytes for module in few.modules() if isinstance(module, BlockLayer))
    # Codes, biases, and for each layer the values of both grids in float64.
    assert held == packed + 4 * 72 + 2 * 8 * (256 + 16)
    plan = rt.plan(graph, rt.Accelerator(scratchpad="M_R"), parameters=True)
    assert rt.planning.execute(graph, plan).bit_equal


def test_mistakes_are_named():
    with pytest.raises(TypeError, match="Blocks, not 4"):
        block_layer(nn.Linear(4, 4), 4)
    with pytest.raises(TypeError, match="linear layers and convolutions"):
        block_layer(nn.LayerNorm(4), MXFP4)
    with pytest.raises(ValueError, match="meta device"):
        block_layer(nn.Linear(4, 4, device="meta"), MXFP4)
    layer = nn.Linear(4, 4)
    layer.weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        block_layer(layer, MXFP4)
    own = block_layer(nn.Linear(4, 4), Blocks(codebook([-1.0, 0.0, 0.5, 1.0]), "e8m0", 4))
    with pytest.raises(NotImplementedError, match="grid of your own"):
        own.config()
