"""Normalisations folded into the layers before them; a file of packed layers read where they were not yet used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.data.reference import DigitsCNN
from retensor.quantizing import Affine, quantized_layer
from retensor.replacing import fold_norms


def trained_like(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """With running means and variances that are not 0 and 1."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize("name", ["digits", "mobilenetv2_050", "efficientnet_lite0", "resnet18"])
def test_folding_changes_no_output_and_leaves_activations(name: str) -> None:
    timm = pytest.importorskip("timm")
    x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
    if name == "digits":
        x, model = x[:, :1, :8, :8].contiguous(), DigitsCNN(8)
    else:
        model = timm.create_model(name, pretrained=False, num_classes=4)
    model = trained_like(model, x)
    plain = fold_norms(model, example=x[:1])
    assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    with torch.no_grad():
        wanted, found = model(x), plain(x)
    assert float((wanted - found).abs().max() / wanted.abs().max()) < 1e-4


def test_packed_layers_are_known_to_a_process_that_did_not_use_them(tmp_path: Path) -> None:
    layer = nn.Linear(6, 3)
    rt.save(
        nn.Sequential(quantized_layer(layer, Affine(4).encode(layer.weight.detach()))), tmp_path / "few.safetensors"
    )
    code = (
        "import sys, retensor as rt; from torch import nn; "
        "print(type(rt.load(sys.argv[1], nn.Sequential(nn.Linear(6, 3)))[0]).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "few.safetensors")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuantizedLayer"
