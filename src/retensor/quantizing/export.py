"""Models in few bits as ONNX files with ``QuantizeLinear`` and ``DequantizeLinear`` nodes, which ONNX Runtime executes.

Weights lie in the file as their codes: 4-bit integers up to four bits, 8-bit ones above, with a step and a zero point
for the tensor, each channel or each block. What rounds activations by a fixed step becomes a pair of both nodes; what
rounds each token by its own range stays arithmetic in floating point.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from retensor.errors import MissingExtraError, RetensorError
from retensor.files import brief, described, write_atomic
from retensor.graph.modes import evaluating
from retensor.quantizing.affine import AffineTensor
from retensor.quantizing.layers import ActivationQuantizer, QuantizedLayer, called
from retensor.quantizing.packing import pack
from retensor.quantizing.samples import call_of
from retensor.replacing.replace import copied, put_everywhere

OPSET = 21
"""The first in which ``DequantizeLinear`` takes 4-bit integers and blocks."""


def to_onnx(
    model: nn.Module, inputs: Any, path: str | os.PathLike[str], *, dynamic_shapes: Mapping[str, Any] | None = None
) -> None:
    """Write a model to an ONNX file, its packed layers as codes with ``DequantizeLinear``.

    Parameters
    ----------
    model : nn.Module
        Left as it is. :class:`QuantizedLayer` and :class:`ActivationQuantizer` are written as nodes of quantisation,
        everything else as torch exports it.
    inputs : torch.Tensor, tuple, or mapping of str to tensor
        One call's arguments: their shapes are the file's.
    path : str or path
        Written whole or not at all.
    dynamic_shapes : mapping, optional
        Axes that may vary, as ``torch.export.export`` takes them.

    Raises
    ------
    TypeError
        Where the model or its inputs are something else.
    MissingExtraError
        Where onnxscript is not installed.
    RetensorError
        Where torch cannot export the model, or the file cannot be written.

    Notes
    -----
    ONNX Runtime turns such weights into ``MatMulNBits``, which rounds activations to 8 bits as well unless the entry
    ``session.qdq_matmulnbits_accuracy_level`` of the session's configuration is ``"1"``.

    Examples
    --------
    >>> import tempfile
    >>> from retensor.quantizing import Affine, quantized_layer
    >>> layer = nn.Linear(8, 4)
    >>> few = quantized_layer(layer, Affine(4, axis=0).encode(layer.weight.detach()))
    >>> folder = tempfile.TemporaryDirectory()
    >>> to_onnx(few, torch.zeros(1, 8), f"{folder.name}/few.onnx")
    >>> [node.op_type for node in onnx.load(f"{folder.name}/few.onnx").graph.node]
    ['DequantizeLinear', 'Gemm']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is exported, not {described(model)}")
    arguments, named = call_of(inputs)
    try:
        table = _translations()
    except ImportError as error:
        raise MissingExtraError("writing models of torch as ONNX files", "compression") from error
    student = _for_export(model)
    with evaluating(student), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program = torch.onnx.export(
                student, arguments, kwargs=named or None, dynamo=True, opset_version=OPSET, verbose=False,
                custom_translation_table=table, dynamic_shapes=dynamic_shapes,
            )  # fmt: skip
        except Exception as error:
            raise RetensorError(f"torch cannot export this {type(model).__name__}: {brief(error)}") from error
    proto = program.model_proto
    _narrow(proto, {f"{name}.codes" for name, module in student.named_modules() if _is_narrow(module)})
    write_atomic(path, proto.SerializeToString())


class _Weight(nn.Module):
    """A packed layer whose codes are a tensor of whole bytes, made a weight by one operation."""

    def __init__(self, packed: QuantizedLayer) -> None:
        super().__init__()
        kept, quantizer = packed.kept(), packed.quantizer
        self.layer, self.inputs, self.bits = packed.layer, packed.inputs, quantizer.bits
        codes, scale, zeros = operands(kept)
        if quantizer.group_size is not None:
            self.axis, self.block = codes.ndim - 1, quantizer.group_size
        else:
            self.axis, self.block = (quantizer.axis or 0) % codes.ndim, 0
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zeros", zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.ops.retensor.dequantized(self.codes, self.scale, self.zeros, self.axis, self.block)
        return called(self.layer, x if self.inputs is None else self.inputs(x), weight.to(x.dtype))


class _Activation(nn.Module):
    """What rounds activations by a fixed step, as one operation."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        low, high = quantizer.quantizer.low, quantizer.quantizer.high
        kind = torch.int8 if quantizer.quantizer.symmetric else torch.uint8
        scale, zero = quantizer.scale.detach().float(), quantizer.zero_point
        self.register_buffer("scale", scale)
        self.register_buffer("zeros", zero.to(kind))
        # Bytes hold more numbers than fewer bits do: what lies beyond is cut off before.
        self.ends = None if high - low == 255 else (float((low - zero) * scale), float((high - zero) * scale))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.ends is not None:
            x = x.clamp(*self.ends)
        return torch.ops.retensor.rounded(x, self.scale, self.zeros)


def operands(kept: AffineTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, steps and zero points as ``DequantizeLinear`` takes them: whole bytes, a step for all, each or a block."""
    quantizer = kept.quantizer
    kind = torch.int8 if quantizer.symmetric else torch.uint8
    codes, scale, zeros = (kept.codes.to(torch.int16) + quantizer.low).to(kind), kept.scale, kept.zero_point.to(kind)
    if quantizer.group_size is not None:
        # One step for each block, in the weight's rank.
        return codes, scale.squeeze(-1), zeros.squeeze(-1)
    shape = () if quantizer.axis is None else (-1,)
    return codes, scale.reshape(shape), zeros.reshape(shape)


def _for_export(model: nn.Module) -> nn.Module:
    student = copied(model)
    if isinstance(student, QuantizedLayer | ActivationQuantizer):
        return _for_export(nn.Sequential(student))
    for module in list(student.modules()):
        if isinstance(module, QuantizedLayer):
            put_everywhere(student, module, _Weight(module))
    # After the layers, some of which hold them.
    for module in list(student.modules()):
        if isinstance(module, ActivationQuantizer) and module.mode == "tensor":
            put_everywhere(student, module, _Activation(module))
    return student


def _is_narrow(module: nn.Module) -> bool:
    return isinstance(module, _Weight) and module.bits <= 4


@torch.library.custom_op("retensor::dequantized", mutates_args=())
def _dequantized(codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    if block:
        scale, zeros = (value.repeat_interleave(block, axis) for value in (scale, zeros))
    elif scale.ndim:
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        scale, zeros = scale.reshape(shape), zeros.reshape(shape)
    return (codes.to(scale.dtype) - zeros.to(scale.dtype)) * scale


@_dequantized.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=scale.dtype)


@torch.library.custom_op("retensor::rounded", mutates_args=())
def _rounded(x: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    ends = torch.iinfo(zeros.dtype)
    whole = (torch.round(x / scale) + zeros).clamp(ends.min, ends.max)
    return (whole - zeros) * scale


@_rounded.register_fake
def _(x: torch.Tensor, scale: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _translations() -> dict[Any, Any]:
    """How torch's exporter writes both operations."""
    from onnxscript import opset21 as op

    def dequantized(codes: Any, scale: Any, zeros: Any, axis: int, block: int) -> Any:
        if block:
            return op.DequantizeLinear(codes, scale, zeros, axis=axis, block_size=block)
        return op.DequantizeLinear(codes, scale, zeros, axis=axis)

    def rounded(x: Any, scale: Any, zeros: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zeros), scale, zeros)

    return {torch.ops.retensor.dequantized.default: dequantized, torch.ops.retensor.rounded.default: rounded}


def _narrow(proto: onnx.ModelProto, names: set[str]) -> None:
    """Give codes of at most four bits the type of 4-bit integers, and leave out where in the source nodes come from."""
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in names:
            codes, _, zeros = node.input
            # Tensors of equal values may be one in the file: what else looks at the zero points keeps its own.
            node.input[2] = f"{codes}.zero_point"
            if held[codes].data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8):
                proto.graph.initializer.append(four_bit(held[zeros], node.input[2]))
                held[codes].CopyFrom(four_bit(held[codes], codes))
    used = {name for node in proto.graph.node for name in node.input} | {out.name for out in proto.graph.output}
    for tensor in held.values():
        if tensor.name not in used:
            proto.graph.initializer.remove(tensor)
    del proto.graph.value_info[:]
    for part in (proto, proto.graph, *proto.graph.node, *proto.graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""


def four_bit(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """A tensor of bytes as one of 4-bit integers, two in a byte, the first in its lower half."""
    values = onnx.numpy_helper.to_array(tensor)
    kind = onnx.TensorProto.INT4 if values.dtype.kind == "i" else onnx.TensorProto.UINT4
    halves = torch.from_numpy(values.reshape(-1).astype(np.int16) & 15).to(torch.uint8)
    return onnx.helper.make_tensor(name, kind, values.shape, pack(halves, 4).numpy().tobytes(), raw=True)
