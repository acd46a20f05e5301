"""Models in any type keep it in few bits, and those that would give something else are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import retensor as rt
from retensor.errors import RetensorError
from retensor.quantizing import (
    ActivationQuantizer,
    Affine,
    Fitting,
    Learning,
    Method,
    QuantizedLayer,
    RoundToNearest,
    Storage,
    quantized_layer,
    reconstruct,
    to_onnx,
    to_torchao,
)

X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Nearest(Method):
    """Round to nearest, with nothing learned."""

    def begin(self, fitting: Fitting) -> list[torch.optim.Optimizer]:
        for name in fitting.unit.layers:
            layer = fitting.layer(name)
            fitting.place(name, Learning(layer, RoundToNearest(layer.weight, Affine(8, axis=0))))
        return []

    def end(self, fitting: Fitting) -> dict[str, Any]:
        for name in fitting.unit.layers:
            fitting.place(name, fitting.layer(name).finished())
        return {}


def few(layer: nn.Module, inputs: nn.Module | None = None) -> QuantizedLayer:
    return quantized_layer(layer, Affine(4, axis=0).encode(layer.weight.detach()), inputs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_keeps_its_type_in_few_bits_in_files_and_folded(tmp_path: Path, dtype: torch.dtype, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias), nn.ReLU(), nn.Linear(8, 4, bias)).to(dtype)
    x = X.to(dtype)
    done = reconstruct(model, x, Nearest(), steps=0).model
    assert done(x).dtype == done[0].weight.dtype == dtype
    assert done[0].scale.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.allclose(done(x).double(), model(x).double(), atol=0.05)
    rt.save(done, tmp_path / "m.safetensors")
    again = rt.load(tmp_path / "m.safetensors", model)
    assert torch.equal(again(x), done(x))
    assert torch.equal(again[0].scale, done[0].scale)
    assert rt.fold(done)[2].weight.dtype == dtype
    # The decoded weights are numbers of the type: folding rounds nothing more.
    assert torch.equal(rt.fold(done)(x), done(x))


def test_a_model_that_goes_to_half_precision_keeps_its_steps() -> None:
    layer = few(nn.Linear(8, 4))
    scale = layer.scale.clone()
    half = nn.Sequential(layer).half()
    assert torch.equal(half[0].scale, scale)
    assert half(X.half()).dtype == half[0].weight.dtype == half[0].bias.dtype == torch.float16
    assert half.double()[0].scale.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_layer_alone_comes_back_in_its_type(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = few(nn.Linear(8, 4).to(dtype))
    rt.save(layer, tmp_path / "m.safetensors")
    again = rt.load(tmp_path / "m.safetensors")
    assert again.bias.dtype == again.weight.dtype == dtype
    assert torch.equal(again(X.to(dtype)), layer(X.to(dtype)))


def test_inputs_that_no_file_describes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RetensorError, match="whose inputs go through ReLU6 cannot be saved"):
        rt.save(few(nn.Linear(8, 4), nn.ReLU6()), tmp_path / "m.safetensors")
    rt.save(few(nn.Linear(8, 4), ActivationQuantizer(8, "token")), tmp_path / "m.safetensors")


class Tripled(nn.Linear):
    """Computes otherwise than a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_layers_that_compute_otherwise_are_refused() -> None:
    layers = pytest.importorskip("timm.layers")
    pictures = torch.randn(8, 3, 9, 9)
    for layer in (layers.StdConv2d(3, 4, 3), layers.ScaledStdConv2d(3, 4, 3), layers.Conv2dSame(3, 4, 3, stride=2)):
        with pytest.raises(TypeError, match=f"a {type(layer).__name__} computes otherwise than nn.Conv2d"):
            reconstruct(nn.Sequential(layer, nn.ReLU()), pictures, Nearest(), steps=0)
    with pytest.raises(TypeError, match=r"a Tripled computes otherwise than nn\.Linear"):
        reconstruct(nn.Sequential(Tripled(8, 8)), X, Nearest(), steps=0)
    # Classes of another name that give the same are taken, parametrized ones too.
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    done = reconstruct(nn.Sequential(layers.Linear(8, 8), normed), X, Nearest(), steps=0)
    assert all(unit.after < 1e-3 for unit in done.report)


class Twice(nn.Module):
    """A layer under two names, called by the second."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again, self.last = self.first, nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.again(x)))


def test_a_layer_of_two_names_is_in_few_bits_under_both(tmp_path: Path) -> None:
    done = reconstruct(Twice(), X, Nearest(), steps=0).model
    assert isinstance(done.again, QuantizedLayer)
    assert done.again is done.first
    to_onnx(done, X, tmp_path / "twice.onnx")
    import onnx

    kinds = [node.op_type for node in onnx.load(tmp_path / "twice.onnx").graph.node]
    assert kinds.count("DequantizeLinear") == 2
    theirs = to_torchao(done)
    assert type(theirs.again) is nn.Linear
    assert theirs.again is theirs.first


def test_a_quantiser_alone_is_written(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    eight = ActivationQuantizer(8).calibrate(X)
    to_onnx(eight, X, tmp_path / "eight.onnx")
    session = runtime.InferenceSession(tmp_path / "eight.onnx")
    got = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    assert np.abs(got - eight(X).detach().numpy()).max() <= eight.scale.item() * 1.001


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_in_other_types_go_to_torchao_or_stay(dtype: torch.dtype) -> None:
    model = nn.Sequential(few(nn.Linear(8, 4).to(dtype)))
    theirs = to_torchao(model)
    assert isinstance(theirs[0], QuantizedLayer) == (dtype == torch.float64)
    assert torch.allclose(theirs(X.to(dtype)), model(X.to(dtype)), atol=1e-2)


class Inner(nn.Module):
    """Two layers, and something of the whole batch between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, size: Any) -> torch.Tensor:
        return self.second(self.first(x) * size)


class Batchwise(nn.Module):
    """Gives its blocks what depends on all samples of a batch."""

    def __init__(self, number: bool) -> None:
        super().__init__()
        self.blocks, self.number = nn.ModuleList([Inner(), Inner()]), number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = float(x.abs().max()) if self.number else x.mean(0).abs()
        for block in self.blocks:
            x = block(x, size)
        return x


@pytest.mark.parametrize("number", [True, False])
def test_what_depends_on_the_batch_is_not_taken_for_what_is_one_for_all(number: bool) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.0' is called with .* for some samples and .* for others"):
        reconstruct(Batchwise(number), X, Nearest(), steps=0)


class Pooled(nn.Module):
    """One row for a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x)).mean(0, keepdim=True)


def test_a_block_without_an_axis_of_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0' gives a tensor of shape \[1, 8\] for 16 samples"):
        reconstruct(nn.Sequential(Pooled(), nn.Identity()), X, Nearest(), steps=0)


def test_arguments_that_fit_nothing_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    for seed in ("a", 1.5, True):
        with pytest.raises(TypeError, match="seed is an int"):
            reconstruct(model, X, Nearest(), seed=seed)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed is a number of 64 bits"):
        reconstruct(model, X, Nearest(), seed=10**30)
    with pytest.raises(TypeError, match="storage is a Storage, not 'disk'"):
        reconstruct(model, X, Nearest(), storage="disk")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"not in torch\.int8"):
        Storage(torch.int8)
    with pytest.raises(ValueError, match="is none; make it before"):
        Storage(folder=tmp_path / "missing")
    with pytest.raises(ValueError, match="the model is one Linear"):
        reconstruct(nn.Linear(8, 8), X, Nearest())
    with pytest.raises(TypeError, match="a scripted model"):
        reconstruct(torch.jit.script(model), X, Nearest())
    with pytest.raises(TypeError, match="of a loader or a generator give a list of such batches"):
        reconstruct(model, (part for part in X.split(4)), Nearest())
    with pytest.raises(ValueError, match="there is at least one"):
        reconstruct(model, (), Nearest())
