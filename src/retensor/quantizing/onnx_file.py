"""Weights of an ONNX file in few bits, without the program that it was made by.

What multiplies activations in a convolution or a matrix product becomes codes and a ``DequantizeLinear`` node, rounded
to the nearest. What learns its rounding needs the model in torch (:func:`retensor.quantizing.reconstruct`).
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from retensor.errors import GraphError
from retensor.files import brief, described, write_atomic
from retensor.quantizing.affine import Affine, AffineTensor
from retensor.quantizing.export import OPSET, four_bit, operands

# Of each operator the input that holds weights, and their axis of output channels.
_WEIGHTS = {"Conv": 0, "ConvTranspose": 1, "MatMul": -1, "Gemm": 0}
IR_VERSION = 10
"""The first with 4-bit integers."""
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)


@dataclass(frozen=True)
class WeightReport:
    """One weight of a file.

    Attributes
    ----------
    name : str
        Of the node that it is an input of.
    kind : str
        That node's operator.
    shape : tuple of int
    before, after : int
        Bytes: as it was, and of its codes with steps and zero points.
    error : float
        Root of the mean square of what rounding changed, relative to that of the weight.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    before: int
    after: int
    error: float


def quantize_onnx(
    source: str | os.PathLike[str] | onnx.ModelProto,
    path: str | os.PathLike[str],
    weight: Affine | None = None,
    *,
    channels: bool = True,
    skip: Sequence[str] = (),
) -> tuple[WeightReport, ...]:
    """Write an ONNX file with the weights of its convolutions and matrix products as codes.

    Parameters
    ----------
    source : str, path or onnx.ModelProto
        Left as it is.
    path : str or path
        Written whole or not at all, in opset 21 or a later one of the source's.
    weight : Affine, optional
        The quantiser: 8 bits by default; 4-bit integers in the file up to 4 bits, bytes above.
        ``Affine(4, search=2.4)`` chooses steps of least error.
    channels : bool
        A step for each output channel instead of one for a weight.
    skip : sequence of str
        Globs of the names of nodes that keep their weights, such as the first and the last.

    Returns
    -------
    tuple of WeightReport
        In the order of the file. Operators inside of ``If`` and ``Loop`` keep their weights.

    Raises
    ------
    GraphError
        Where the file cannot be read, or its operators cannot be written in opset 21.
    RetensorError
        Where the result cannot be written.
    TypeError, ValueError
        Where the quantiser sets an axis or groups, which follow from each operator, where a glob of ``skip`` means no
        node, or where nothing can be rounded.

    Notes
    -----
    ONNX Runtime rounds what comes into some products of 4-bit weights to 8 bits: see :func:`to_onnx`.

    Examples
    --------
    >>> import tempfile
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[1, 64] x) => (float[1, 8] y) { y = MatMul(x, w) }''')
    >>> model.graph.initializer.extend([numpy_helper.from_array(np.eye(64, 8, dtype=np.float32), "w")])
    >>> folder = tempfile.TemporaryDirectory()
    >>> quantize_onnx(model, f"{folder.name}/few.onnx", Affine(4))
    (WeightReport(name='y', kind='MatMul', shape=(64, 8), before=2048, after=292, error=0.0),)
    """
    weight = Affine(8) if weight is None else weight
    if not isinstance(weight, Affine):
        raise TypeError(f"weight is a retensor.quantizing.Affine, not {described(weight)}")
    if weight.axis is not None or weight.group_size is not None:
        raise ValueError("the axis of steps follows from each operator; leave axis and group_size of weight out")
    proto = _in_opset(_read(source))
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    constants = {node.output[0]: node for node in proto.graph.node if node.op_type == "Constant" and node.output}
    named = {_title(node) for node in proto.graph.node}
    for pattern in skip:
        if not fnmatch.filter(named, pattern):
            raise ValueError(f"'{pattern}' in skip means no node; names are such as {', '.join(sorted(named)[:3])}")
    report: list[WeightReport] = []
    made: dict[tuple[str, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in proto.graph.node:
        found = _weight_of(node, held, constants)
        if found is not None and not any(fnmatch.fnmatchcase(_title(node), pattern) for pattern in skip):
            array, axis = found
            # Two operators may share a weight, and its channels may lie along another axis for each.
            key = (node.input[1], axis if channels else 0)
            if key not in made:
                made[key] = f"{node.input[1]}.rounded{len(made)}"
                try:
                    kept = _encoded(array, dataclasses.replace(weight, axis=axis if channels else None))
                except ValueError as error:
                    raise ValueError(f"the weight of '{_title(node)}' cannot be rounded: {error}") from error
                nodes.append(_dequantize(proto, kept, made[key], array.dtype))
                report.append(_reported(node, array, kept))
            node.input[1] = made[key]
        nodes.append(node)
    if not report:
        raise ValueError("the file has no convolution or matrix product whose weight is a constant of floating point")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    _drop_unused(proto)
    proto.ir_version = max(proto.ir_version, IR_VERSION)
    write_atomic(path, proto.SerializeToString())
    return tuple(report)


def _read(source: str | os.PathLike[str] | onnx.ModelProto) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    if isinstance(source, onnx.ModelProto):
        proto.CopyFrom(source)
        return proto
    try:
        return onnx.load(os.fspath(source))
    except Exception as error:
        raise GraphError(f"cannot read '{brief(source)}' as an ONNX model: {brief(error)}") from error


def _in_opset(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in the first opset whose ``DequantizeLinear`` takes 4-bit integers, or in its own later one."""
    has = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), OPSET)
    if has >= OPSET:
        return proto
    try:
        return onnx.version_converter.convert_version(proto, OPSET)
    except Exception as error:
        raise GraphError(f"operators of opset {has} cannot be written in {OPSET}: {brief(error)}") from error


def _title(node: onnx.NodeProto) -> str:
    return str(node.name or (node.output[0] if node.output else node.op_type))


def _weight_of(
    node: onnx.NodeProto, held: dict[str, onnx.TensorProto], constants: dict[str, onnx.NodeProto]
) -> tuple[np.ndarray, int] | None:
    """A constant weight of a node, with its axis of output channels."""
    if node.op_type not in _WEIGHTS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
        return None
    tensor = held.get(node.input[1])
    if tensor is None and node.input[1] in constants:
        values = [entry.t for entry in constants[node.input[1]].attribute if entry.name == "value"]
        tensor = values[0] if values else None
    if tensor is None or tensor.data_type not in _FLOATS or len(tensor.dims) < 2 or 0 in tensor.dims:
        return None
    axis = _WEIGHTS[node.op_type]
    if node.op_type == "Gemm" and not any(entry.name == "transB" and entry.i for entry in node.attribute):
        axis = 1
    return np.array(numpy_helper.to_array(tensor)), axis % len(tensor.dims)


def _encoded(array: np.ndarray, quantizer: Affine) -> AffineTensor:
    values = torch.from_numpy(array)
    scale, zero = quantizer.choose(values)
    # The file holds steps in the type of the weight, so codes are chosen by what that type has.
    least = torch.finfo(values.dtype).smallest_normal
    return quantizer.encode(values, scale.to(values.dtype).clamp(min=least).to(scale.dtype), zero)


def _dequantize(proto: onnx.ModelProto, kept: AffineTensor, name: str, dtype: np.dtype) -> onnx.NodeProto:
    """The node that gives a weight back; its codes, steps and zero points go into the graph."""
    codes, scale, zeros = (value.numpy() for value in operands(kept))
    inputs = [f"{name}.{what}" for what in ("codes", "scale", "zeros")]
    values = (codes, scale.astype(dtype), zeros)
    tensors = [numpy_helper.from_array(value, label) for value, label in zip(values, inputs, strict=True)]
    if kept.quantizer.bits <= 4:
        tensors[::2] = (four_bit(tensor, tensor.name) for tensor in tensors[::2])
    proto.graph.initializer.extend(tensors)
    return helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=kept.quantizer.axis or 0)


def _reported(node: onnx.NodeProto, array: np.ndarray, kept: AffineTensor) -> WeightReport:
    wide = torch.from_numpy(array).double()
    apart = (kept.decode(torch.float64) - wide).square().mean() / wide.square().mean().clamp(min=1e-300)
    return WeightReport(_title(node), node.op_type, tuple(array.shape), array.nbytes, kept.nbytes, float(apart.sqrt()))


def _drop_unused(proto: onnx.ModelProto) -> None:
    """Leave out the weights that nothing reads any more; what an operator inside of another reads stays."""
    used = {out.name for out in proto.graph.output}
    graphs = [proto.graph]
    while graphs:
        for node in graphs.pop().node:
            used.update(node.input)
            for entry in node.attribute:
                graphs += [entry.g] if entry.HasField("g") else []
                graphs += list(entry.graphs)
    for tensor in [one for one in proto.graph.initializer if one.name not in used]:
        # Old files list their weights among the inputs as well.
        for value in [one for one in proto.graph.input if one.name == tensor.name]:
            proto.graph.input.remove(value)
        proto.graph.initializer.remove(tensor)
    for node in [one for one in proto.graph.node if one.op_type == "Constant" and not used & set(one.output)]:
        proto.graph.node.remove(node)
