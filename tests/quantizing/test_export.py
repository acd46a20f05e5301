"""ONNX files of models in few bits, executed by ONNX Runtime, against the models themselves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import retensor as rt
from retensor.errors import MissingExtraError, RetensorError
from retensor.quantizing import (
    ActivationQuantizer,
    Affine,
    Fitting,
    Learning,
    Method,
    RoundToNearest,
    quantized_layer,
    reconstruct,
    to_onnx,
)

pytest.importorskip("onnxscript")


class Nearest(Method):
    """Weights rounded to nearest, and what comes into each layer to so many bits."""

    def __init__(self, quantizer: Affine, bits: int | None = None, mode: Any = "tensor") -> None:
        self.quantizer, self.bits, self.mode = quantizer, bits, mode

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        quantizers = {}
        for name in fitting.unit.layers:
            layer = fitting.layer(name)
            quantizers[name] = None if self.bits is None else ActivationQuantizer(self.bits, self.mode)
            fitting.place(name, Learning(layer, RoundToNearest(layer.weight, self.quantizer)))
        seen: dict[str, torch.Tensor] = {}
        handles = [
            fitting.layer(name).register_forward_pre_hook(lambda _, given, name=name: seen.update({name: given[0]}))
            for name in fitting.unit.layers
        ]
        arguments, named = fitting.inputs.take(slice(0, len(fitting.inputs)))
        with torch.no_grad():
            fitting.module(*arguments, **named)
        for handle in handles:
            handle.remove()
        for name, quantizer in quantizers.items():
            if quantizer is not None:
                fitting.layer(name).inputs = quantizer.calibrate(seen[name])
        return []

    def end(self, fitting: Fitting) -> dict[str, Any]:
        for name in fitting.unit.layers:
            fitting.place(name, fitting.layer(name).finished())
        return {}


def run(path: Path, inputs: Any) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    values = inputs.values() if isinstance(inputs, dict) else [inputs]
    names = [one.name for one in session.get_inputs()]
    return session.run(None, dict(zip(names, (value.numpy() for value in values), strict=True)))[0]


@torch.no_grad()
def first(model: nn.Module, inputs: Any) -> np.ndarray:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return (out if isinstance(out, torch.Tensor) else out[0]).numpy()


def vit() -> tuple[nn.Module, Any, Any]:
    model, data = rt.data.reference("digits-vit")
    return model, data.x[:64], data.x_test[:32]


def cnn() -> tuple[nn.Module, Any, Any]:
    model, data = rt.data.reference("digits-cnn-plain")
    return model, data.x[:64], data.x_test[:32]


def resnet() -> tuple[nn.Module, Any, Any]:
    timm = pytest.importorskip("timm")
    with rt.data.seeded(0):
        model = timm.create_model("resnet10t", pretrained=False, num_classes=10, in_chans=1).eval()
    data = rt.data.mnist5k()
    wide = nn.functional.interpolate(data.x[:48], size=56)
    return model, wide[:32], wide[32:]


def sentences() -> tuple[nn.Module, Any, Any]:
    model, tokenizer = rt.data.minilm()
    batch = tokenizer(
        rt.data.sentences()[:20], padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    batch = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model.eval()
    return model, batch, {name: value[:8] for name, value in batch.items()}


MODELS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "vit": vit, "cnn": cnn, "resnet": resnet, "minilm": sentences,
}  # fmt: skip
WAYS = {
    "W4 by channel": Nearest(Affine(4, axis=0)),
    "W8 A8": Nearest(Affine(8, True, axis=0), 8),
    "W3 A4": Nearest(Affine(3), 4),
    "W4 A8 by token": Nearest(Affine(4, axis=0), 8, "token"),
}


# A picture has no tokens whose range could be taken.
PAIRS = [(name, way) for name in MODELS for way in WAYS if "token" not in way or name in ("vit", "minilm")]


@pytest.mark.parametrize(("name", "way"), PAIRS)
def test_onnx_runtime_gives_what_the_model_in_few_bits_does(name: str, way: str, tmp_path: Path) -> None:
    model, calibration, inputs = MODELS[name]()
    few = reconstruct(model, calibration, WAYS[way]).model
    path = tmp_path / "few.onnx"
    to_onnx(few, inputs, path)
    wanted = first(few, inputs)
    found = run(path, inputs)
    apart, size = float(np.abs(found - wanted).max()), float(np.ptp(wanted))
    # Weights alone leave nothing but the order of sums. Where activations are rounded, what lies in the middle of two
    # steps may go either way, which moves the outputs by less than one step of theirs in as many bits; by a few where
    # the steps themselves are of what comes.
    bits = WAYS[way].bits
    assert apart <= (1e-5 * size if bits is None else (4 if "token" in way else 1) * size / (2**bits - 1))
    assert np.square(found - wanted).sum() <= 0.01 * np.square(first(model, inputs) - wanted).sum()


def test_codes_lie_in_the_file_as_integers_of_their_size(tmp_path: Path) -> None:
    layer = nn.Linear(64, 32)
    for quantizer, kind, bits in (
        (Affine(2, axis=0), onnx.TensorProto.UINT4, 4),
        (Affine(4, group_size=16), onnx.TensorProto.UINT4, 4),
        (Affine(4, True), onnx.TensorProto.INT4, 4),
        (Affine(5), onnx.TensorProto.UINT8, 8),
        (Affine(8, True, axis=0), onnx.TensorProto.INT8, 8),
    ):
        kept = quantizer.encode(layer.weight.detach())
        to_onnx(quantized_layer(layer, kept), torch.zeros(2, 64), tmp_path / "layer.onnx")
        proto = onnx.load(tmp_path / "layer.onnx")
        onnx.checker.check_model(proto)
        (codes,) = (tensor for tensor in proto.graph.initializer if tensor.name.endswith("codes"))
        assert codes.data_type == kind
        assert len(codes.raw_data or bytes(codes.int32_data)) == 64 * 32 * bits // 8
        whole = onnx.numpy_helper.to_array(codes).astype(np.int16)
        assert np.array_equal(whole, kept.codes.numpy().astype(np.int16) + quantizer.low)
        x = torch.randn(2, 64)
        np.testing.assert_allclose(run(tmp_path / "layer.onnx", x), quantized_layer(layer, kept)(x).detach(), atol=2e-5)


def test_the_planner_takes_the_file(tmp_path: Path) -> None:
    model, calibration, inputs = vit()
    few = reconstruct(model, calibration, WAYS["W8 A8"]).model
    to_onnx(few, inputs[:1], tmp_path / "few.onnx")
    plan = rt.plan(rt.graph.load(tmp_path / "few.onnx"), rt.Accelerator(scratchpad="M_R"))
    assert plan.gap == 0


def test_what_cannot_be_exported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"an nn\.Module is exported"):
        to_onnx(3, torch.zeros(1), tmp_path / "a.onnx")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a batch is a tensor"):
        to_onnx(nn.Linear(2, 2), "x", tmp_path / "a.onnx")

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(RetensorError, match="cannot export this Odd"):
        to_onnx(Odd(), torch.zeros(1, 2), tmp_path / "a.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingExtraError, match="compression extra"):
        to_onnx(nn.Linear(2, 2), torch.zeros(1, 2), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())
