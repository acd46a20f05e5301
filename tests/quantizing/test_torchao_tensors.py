"""Packed layers as torchao's tensors: the same numbers, and the same outputs."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.errors import MissingExtraError
from retensor.quantizing import ActivationQuantizer, Affine, QuantizedLayer, quantized_layer, to_torchao

pytest.importorskip("torchao")


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"axis": 0, "symmetric": True}, {"group_size": 16}])
def test_weights_and_outputs_are_bit_equal(bits: int, where: dict[str, int]) -> None:
    layer, x = nn.Linear(64, 32), torch.randn(5, 64)
    few = nn.Sequential(quantized_layer(layer, Affine(bits, **where).encode(layer.weight.detach())), nn.ReLU())
    theirs = to_torchao(few)
    assert type(theirs[0]) is nn.Linear
    assert theirs[0].weight.target_dtype == getattr(torch, f"int{bits}")
    assert torch.equal(theirs[0].weight.dequantize(), few[0].weight)
    assert torch.equal(theirs(x), few(x))
    assert isinstance(few[0], QuantizedLayer)


def test_eight_bits_by_token_become_theirs() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(50, 64)
    kept = Affine(4, axis=0).encode(layer.weight.detach())
    few, bare = quantized_layer(layer, kept, ActivationQuantizer(8, "token")), quantized_layer(layer, kept)
    # What lies in the middle of two steps may go either way.
    with torch.no_grad():
        apart = (to_torchao(few)(x) - few(x)).square().mean()
        assert float(apart) < 0.02 * float((few(x) - bare(x)).square().mean())


def test_what_their_tensor_cannot_hold_stays() -> None:
    conv, layer = nn.Conv2d(2, 3, 3), nn.Linear(8, 4)
    inputs = ActivationQuantizer(4).calibrate(torch.randn(8))
    for few in (
        quantized_layer(conv, Affine(4).encode(conv.weight.detach())),
        quantized_layer(layer, Affine(4).encode(layer.weight.detach()), inputs),
        quantized_layer(layer, Affine(4, axis=1).encode(layer.weight.detach())),
    ):
        assert isinstance(to_torchao(few), QuantizedLayer)
        assert isinstance(to_torchao(nn.Sequential(few))[0], QuantizedLayer)


def test_bad_input_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        to_torchao(3)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(MissingExtraError, match="torchao extra"):
        rt.quantizing.to_torchao(nn.Linear(2, 2))
