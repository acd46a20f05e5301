"""Reading an ONNX file as something to distrust: the bytes on disk become a checked model without its weights.

Everything later (shape inference in C++, ONNX Runtime) assumes a well-formed model, so what the file says is
checked here first: versions, names, nodes, sizes of dimensions, where external data lies. Weights stay on disk:
only their shapes are kept, and :func:`tensor_bytes` fetches the rest.
"""

from __future__ import annotations

import os
import stat
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from retensor.errors import GraphError
from retensor.files import brief, broken_link
from retensor.graph.onnx_guard import InferenceError, inline_functions
from retensor.graph.onnx_node import check_dimensions, check_node, domain_of, reason, shown, subgraphs
from retensor.graph.structure import Bytes

LARGEST_FILE = 2**31 - 1
MOST_NODES = 250_000
DEEPEST_CALL = 100
# A tensor up to this many bytes is kept in the model, because shape inference may want its values.
_SMALL = 4096

# ONNX's number of an element type: NumPy's (or ml_dtypes') name and the bits of one element.
ELEMENTS: Mapping[int, tuple[str, int]] = {
    1: ("float32", 32),
    2: ("uint8", 8),
    3: ("int8", 8),
    4: ("uint16", 16),
    5: ("int16", 16),
    6: ("int32", 32),
    7: ("int64", 64),
    9: ("bool", 8),
    10: ("float16", 16),
    11: ("float64", 64),
    12: ("uint32", 32),
    13: ("uint64", 64),
    14: ("complex64", 64),
    15: ("complex128", 128),
    16: ("bfloat16", 16),
    17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8),
    19: ("float8_e5m2", 8),
    20: ("float8_e5m2fnuz", 8),
    21: ("uint4", 4),
    22: ("int4", 4),
    23: ("float4_e2m1fn", 4),
    24: ("float8_e8m0fnu", 8),
    25: ("uint2", 2),
    26: ("int2", 2),
}
FLOATING = frozenset(number for number, (name, _) in ELEMENTS.items() if "float" in name)


class ValueType(NamedTuple):
    """Element type (ONNX's number) and static shape of a value."""

    element: int
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return count_elements(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the value; elements under a byte are packed."""
        return (self.elements * ELEMENTS[self.element][1] + 7) // 8


@dataclass
class OnnxModel:
    """A checked model without its large weights.

    ``initializers`` hold shape and type; the data too where it is small. ``stamp`` tells whether the file
    is still the one that was read.
    """

    path: Path
    stamp: tuple[int, int]
    ir_version: int
    opsets: dict[str, int]
    nodes: list[NodeProto]
    inputs: dict[str, Any]
    outputs: list[str]
    initializers: dict[str, TensorProto]
    sparse: dict[str, Any]
    declared: dict[str, Any]
    _weights: dict[str, TensorProto] | None = field(default=None, repr=False)

    def weight(self, name: str) -> TensorProto:
        """The initializer ``name`` with its data, read from the file again where it was left there."""
        kept = self.initializers[name]
        if holds_data(kept) or is_external(kept):
            return kept
        if self._weights is None:
            self.check_unchanged()
            self._weights = {tensor.name: tensor for tensor in _parse(self.path).graph.initializer}
        return self._weights[name]

    def check_unchanged(self) -> None:
        """Raise GraphError where the file is no longer the one that was read."""
        if _stamp(self.path) != self.stamp:
            raise GraphError(f"'{self.path}' changed since it was loaded; load it again")

    def __getstate__(self) -> dict[str, Any]:
        """Weights are read again wherever a copy of the model goes."""
        return {**self.__dict__, "_weights": None}


def count_elements(shape: Iterable[int]) -> int:
    """Product of ``shape`` in unbounded integers."""
    count = 1
    for size in shape:
        count *= size
    return count


def read_model(path: str | os.PathLike[str]) -> OnnxModel:
    """Read and check an ONNX file.

    Raises
    ------
    GraphError
        Where the file cannot be read, is no ONNX model, or is malformed.
    """
    source = Path(path)
    stamp = _stamp(source)
    model = _parse(source)
    opsets = _opsets(model, source)
    skeleton = _without_weights(model)
    del model
    if skeleton.functions:
        skeleton = _inlined(skeleton, source)
        opsets = _opsets(skeleton, source)
    graph = skeleton.graph
    if len(graph.node) > MOST_NODES:
        raise GraphError(f"'{source}' has {len(graph.node):,} nodes; up to {MOST_NODES:,} are allowed")
    for node in graph.node:
        check_node(node, opsets)
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    if len(initializers) != len(graph.initializer):
        raise GraphError(f"'{source}' names an initializer twice")
    for tensor in initializers.values():
        check_dimensions(tensor.dims, f"initializer '{shown(tensor.name)}'")
        if tensor.data_type not in ELEMENTS and tensor.data_type != TensorProto.STRING:
            raise GraphError(f"initializer '{shown(tensor.name)}' has unknown element type {tensor.data_type}")
        if is_external(tensor):
            _check_external(tensor, source)
    sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    if len(sparse) != len(graph.sparse_initializer):
        raise GraphError(f"'{source}' names a sparse initializer twice")
    for name, tensor in sparse.items():
        check_dimensions(tensor.dims, f"initializer '{shown(name)}'")
        # Every runtime takes another one of the two.
        if name in initializers:
            raise GraphError(f"'{source}' has a dense and a sparse initializer '{shown(name)}'; leave one of them out")
    inputs: dict[str, Any] = {}
    for value in graph.input:
        if value.name in inputs:
            raise GraphError(f"'{source}' names the input '{shown(value.name)}' twice")
        inputs[value.name] = value.type
    return OnnxModel(
        path=source,
        stamp=stamp,
        ir_version=skeleton.ir_version,
        opsets=opsets,
        nodes=list(graph.node),
        inputs={name: kind for name, kind in inputs.items() if name not in initializers and name not in sparse},
        outputs=[value.name for value in graph.output],
        initializers=initializers,
        sparse=sparse,
        declared={value.name: value.type for value in (*graph.output, *graph.value_info)},
    )


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files beside an ONNX file that hold its external data, each once, links followed.

    Raises
    ------
    GraphError
        Where the file cannot be read or is no ONNX model.
    """
    source = Path(path)
    _stamp(source)
    tensors = [tensor for tensor in _parse(source).graph.initializer if is_external(tensor)]
    return list(dict.fromkeys(external_file(tensor, source)[0] for tensor in tensors))


def _stamp(path: Path) -> tuple[int, int]:
    """Size and time of a regular file; refuses anything else."""
    where = f"'{brief(path)}'"
    if (fault := broken_link(path)) is not None:
        raise GraphError(f"{where} {fault}; give the path of an ONNX model")
    try:
        status = path.stat()
    except FileNotFoundError:
        raise GraphError(f"there is no file {where}; give the path of an ONNX model") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise GraphError(f"cannot read {where}: {why}; give the path of an ONNX model") from None
    if stat.S_ISDIR(status.st_mode):
        raise GraphError(f"{where} is a directory; give the path of an ONNX file inside it")
    if not stat.S_ISREG(status.st_mode):
        raise GraphError(f"{where} is not a regular file; give the path of an ONNX model")
    if status.st_size == 0:
        raise GraphError(f"{where} is empty, not an ONNX model")
    if status.st_size > LARGEST_FILE:
        raise GraphError(
            f"'{path}' has {status.st_size:,} bytes and an ONNX file has less than 2 GiB; "
            "keep its weights as external data"
        )
    return status.st_size, status.st_mtime_ns


def _parse(path: Path) -> ModelProto:
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except OSError as error:
        raise GraphError(f"cannot read '{path}': {error.strerror or error}") from None
    except Exception:  # the protobuf backends raise different types, none of them public here
        raise GraphError(f"'{path}' is not an ONNX model, or is truncated: it does not parse") from None
    if not model.HasField("graph") or not model.graph.node:
        raise GraphError(f"'{path}' is not an ONNX model, or is truncated: it holds no operators")
    return model


def _opsets(model: ModelProto, path: Path) -> dict[str, int]:
    opsets: dict[str, int] = {}
    for entry in model.opset_import:
        domain = domain_of(entry)
        if opsets.setdefault(domain, entry.version) != entry.version:
            raise GraphError(f"'{path}' imports two versions of the operator set '{shown(domain or 'ai.onnx')}'")
    if not opsets:
        raise GraphError(f"'{path}' is not an ONNX model, or is truncated: it names no operator set version")
    newest = onnx.defs.onnx_opset_version()
    for domain, version in opsets.items():
        if version < 1 or (domain == "" and version > newest):
            raise GraphError(
                f"'{path}' asks for version {version} of the operator set '{shown(domain or 'ai.onnx')}'; "
                f"the installed onnx knows 1 to {newest}: convert the model or upgrade onnx"
            )
    if not 0 <= model.ir_version <= onnx.IR_VERSION:
        raise GraphError(
            f"'{path}' has IR version {model.ir_version}; the installed onnx knows up to {onnx.IR_VERSION}: "
            "upgrade onnx"
        )
    return opsets


def _without_weights(model: ModelProto) -> ModelProto:
    """A copy whose large initializers keep name, type and shape only."""
    graph = model.graph
    skeleton = ModelProto(ir_version=model.ir_version)
    skeleton.opset_import.extend(model.opset_import)
    skeleton.functions.extend(model.functions)
    bare = skeleton.graph
    bare.name = "graph"
    bare.node.extend(graph.node)
    bare.input.extend(graph.input)
    bare.output.extend(graph.output)
    bare.value_info.extend(graph.value_info)
    bare.sparse_initializer.extend(graph.sparse_initializer)
    for tensor in graph.initializer:
        if tensor.ByteSize() <= _SMALL or is_external(tensor):
            bare.initializer.append(tensor)
        else:
            bare.initializer.add(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type)
    return skeleton


def _inlined(model: ModelProto, path: Path) -> ModelProto:
    """``model`` with calls of its own functions replaced by their nodes."""
    bodies = {(function.domain, function.name): list(function.node) for function in model.functions}
    if len(bodies) != len(model.functions):
        raise GraphError(f"'{path}' defines a function twice; rename one of the overloads")
    grown: dict[tuple[str, str], int] = {}
    entered: set[tuple[str, str]] = set()

    def size(nodes: Iterable[NodeProto]) -> int:
        total = 0
        for node in nodes:
            total += 1
            total += sum(size(body.node) for body in subgraphs(node))
            key = (node.domain, node.op_type)
            if key in bodies:
                if key not in grown:
                    if key in entered:
                        raise GraphError(f"'{path}' has a function '{shown(node.op_type)}' that calls itself")
                    if len(entered) >= DEEPEST_CALL:
                        raise GraphError(
                            f"'{path}' has functions that call one another {DEEPEST_CALL} deep and deeper, down to "
                            f"'{shown(node.op_type)}'; unfold them before: onnx.inliner.inline_local_functions(model)"
                        )
                    entered.add(key)
                    grown[key] = size(bodies[key])
                    entered.discard(key)
                total += grown[key]
        return total

    # Counted before it is done: functions that call functions can multiply without bound.
    if (total := size(model.graph.node)) > MOST_NODES:
        raise GraphError(f"'{path}' unfolds to {total:,} nodes; up to {MOST_NODES:,} are allowed")
    imported = {entry.domain for entry in model.opset_import}
    for function in model.functions:
        opsets = {entry.domain: entry.version for entry in function.opset_import}
        for node in function.node:
            check_node(node, {**dict.fromkeys(imported, 1), **opsets}, inside_function=True)
        for entry in function.opset_import:
            if entry.domain not in imported:
                model.opset_import.append(entry)
    try:
        return inline_functions(model, f"the functions of '{path}'")
    except InferenceError as error:
        raise GraphError(f"the functions of '{path}' cannot be unfolded: {reason(error)}") from None


def is_external(tensor: TensorProto) -> bool:
    """Whether a tensor's data lies in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def holds_data(tensor: TensorProto) -> bool:
    """Whether a tensor's data is in the message itself (an empty tensor's always is)."""
    return bool(
        tensor.HasField("raw_data")
        or tensor.float_data
        or tensor.int32_data
        or tensor.int64_data
        or tensor.double_data
        or tensor.uint64_data
        or tensor.string_data
        or 0 in tensor.dims
    )


def external_file(tensor: TensorProto, model: Path) -> tuple[Path, int, int | None]:
    """Where a tensor's external data lies: file, offset, and length where it is given.

    Raises
    ------
    GraphError
        Where the place is not inside the model's own folder.
    """
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    where = f"external data of '{shown(tensor.name)}'"
    steps = location.replace("\\", "/").split("/")
    if not location or "\0" in location or steps[0] == "" or ".." in steps or ":" in steps[0]:
        raise GraphError(
            f"{where} lies at '{shown(location)}'; only a file in the model's own folder is read: give a relative path"
        )
    try:
        offset, length = int(entries.get("offset", "0") or 0), entries.get("length")
        size = None if length is None else int(length)
    except ValueError:
        raise GraphError(f"{where} has an offset or length that is no number") from None
    if offset < 0 or (size is not None and size < 0):
        raise GraphError(f"{where} has a negative offset or length")
    folder = Path(os.path.realpath(model.parent))
    file = Path(os.path.realpath(folder / location))
    if not file.is_relative_to(folder):
        raise GraphError(f"{where} lies at '{shown(location)}', a link that leads out of the model's own folder")
    return file, offset, size


def _check_external(tensor: TensorProto, model: Path) -> tuple[Path, int]:
    """File and offset of a tensor's external data, after asking the disk whether as many bytes as it needs are there.

    Raises
    ------
    GraphError
    """
    file, offset, length = external_file(tensor, model)
    where, name = f"external data of '{shown(tensor.name)}'", brief(file.name, 80)
    nbytes = ValueType(tensor.data_type, tuple(tensor.dims)).nbytes if tensor.data_type in ELEMENTS else 0
    if length is not None and length != nbytes:
        raise GraphError(f"{where} has {length:,} bytes; its shape and type need {nbytes:,}")
    try:
        status = file.stat()
    except FileNotFoundError:
        raise GraphError(f"{where}: there is no file '{name}' beside the model; put it there") from None
    except OSError as error:
        raise GraphError(f"{where}: cannot read '{name}': {error.strerror or error}") from None
    if not stat.S_ISREG(status.st_mode):
        raise GraphError(f"{where}: '{name}' is not a regular file")
    if status.st_size - offset < nbytes:
        raise GraphError(f"{where}: '{name}' ends before the {nbytes:,} bytes that are needed")
    return file, offset


def _external_bytes(tensor: TensorProto, model: Path, nbytes: int) -> bytes:
    # Asked before reading, so that a false size never makes the memory for it.
    file, offset = _check_external(tensor, model)
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(nbytes)
    except OSError as error:
        where = f"external data of '{shown(tensor.name)}'"
        raise GraphError(f"{where}: cannot read '{brief(file.name, 80)}': {error.strerror or error}") from None


def tensor_bytes(tensor: TensorProto, model: Path) -> Bytes:
    """The bytes of a constant tensor, little-endian and packed, wherever they lie.

    Raises
    ------
    GraphError
        Where there are not as many as shape and type need.
    """
    kind = ValueType(tensor.data_type, tuple(tensor.dims))
    if kind.element not in ELEMENTS:
        raise GraphError(f"constant '{shown(tensor.name)}' holds strings or an unknown type; only numbers are run")
    if is_external(tensor):
        found: Bytes = np.frombuffer(_external_bytes(tensor, model, kind.nbytes), np.uint8)
    elif tensor.HasField("raw_data"):
        found = np.frombuffer(tensor.raw_data, np.uint8)
    elif ELEMENTS[kind.element][1] < 8:
        found = np.asarray(tensor.int32_data, np.int64).astype(np.uint8)
    else:
        stored = len(tensor.float_data) + len(tensor.int32_data) + len(tensor.int64_data)
        stored += len(tensor.double_data) + len(tensor.uint64_data)
        # Asked before decoding, so that a false shape never makes the memory for it.
        if stored != kind.elements * (2 if kind.element in (14, 15) else 1):
            raise GraphError(f"constant '{shown(tensor.name)}' holds {stored:,} numbers for {kind.elements:,} elements")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = np.ascontiguousarray(numpy_helper.to_array(tensor)).reshape(-1).view(np.uint8)
        except Exception as error:
            raise GraphError(f"constant '{shown(tensor.name)}' cannot be read: {reason(error)}") from None
    if found.size != kind.nbytes:
        raise GraphError(
            f"constant '{shown(tensor.name)}' holds {found.size:,} bytes; its shape and type need {kind.nbytes:,}"
        )
    return found
