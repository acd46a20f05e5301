"""Packed layers as torchao's tensors, for what is built on those (its kernels for phones, ExecuTorch)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from retensor.errors import MissingExtraError
from retensor.files import described
from retensor.quantizing.layers import ActivationQuantizer, QuantizedLayer
from retensor.replacing.replace import copied, move_hooks, put_everywhere


def to_torchao(model: nn.Module) -> nn.Module:
    """Plain linear layers with ``IntxUnpackedToInt8Tensor`` weights in the places of packed ones.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy. Codes, steps and zero points are the same numbers. What torchao's tensor
        cannot hold stays as it is: convolutions, float64, and layers whose inputs are rounded otherwise than to 8 bits
        by token.

    Raises
    ------
    TypeError
        Where it is no module.
    MissingExtraError
        Where torchao is not installed.

    Examples
    --------
    >>> from retensor.quantizing import Affine, quantized_layer
    >>> layer = nn.Linear(8, 4)
    >>> few = quantized_layer(layer, Affine(4, axis=0).encode(layer.weight.detach()))
    >>> theirs = to_torchao(nn.Sequential(few))  # doctest: +SKIP
    >>> theirs[0].weight.target_dtype  # doctest: +SKIP
    torch.int4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"layers of an nn.Module are changed, not of {described(model)}")
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torchao's tensors", "torchao") from error
    if isinstance(model, QuantizedLayer):
        return _linear(model) if _fits(model) else copied(model)
    model = copied(model)
    for module in list(model.modules()):
        if isinstance(module, QuantizedLayer) and _fits(module):
            plain = _linear(module)
            move_hooks(module, plain)
            put_everywhere(model, module, plain)
    return model


def _fits(layer: QuantizedLayer) -> bool:
    if not isinstance(layer.layer, nn.Linear) or layer.quantizer.axis not in (None, 0, -2):
        return False
    if layer.weight.dtype == torch.float64:
        return False
    inputs = layer.inputs
    return inputs is None or (
        isinstance(inputs, ActivationQuantizer)
        and inputs.mode == "token"
        and inputs.quantizer.bits == 8
        and not inputs.quantizer.symmetric
    )


def _linear(layer: QuantizedLayer) -> nn.Linear:
    kept, quantizer = layer.kept(), layer.quantizer
    rows, columns = layer.shape
    # Theirs are signed: whole numbers and zero points move by the same.
    low = -(2 ** (quantizer.bits - 1))
    codes = (kept.codes.to(torch.int16) + low).to(torch.int8)
    if quantizer.group_size is not None:
        block = (1, quantizer.group_size)
    else:
        block = (rows if quantizer.axis is None else 1, columns)
    shape = (rows // block[0], columns // block[1])
    zero = (kept.zero_point - quantizer.low + low).to(torch.int8).reshape(shape)
    plain = nn.utils.skip_init(nn.Linear, columns, rows, bias=layer.bias is not None, device=codes.device)
    scale, dtype = kept.scale.float().reshape(shape), layer.weight.dtype
    weight = _tensor(codes, scale, zero, quantizer.bits, block, dtype, layer.inputs is not None)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return plain.train(layer.training)


def _tensor(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    block: tuple[int, int],
    dtype: torch.dtype,
    rounded: bool,
) -> Any:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    kind = getattr(torch, f"int{bits}")
    return IntxUnpackedToInt8Tensor(codes, scale, zero, kind, block, dtype, "int8_asym_per_token" if rounded else None)
