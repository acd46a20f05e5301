"""Runs an ONNX model one operator at a time, by ONNX Runtime, on bytes that the caller keeps.

For each operator a model of just its nodes is built, with every tensor, parameters included, as an input, and
run without graph optimisation or prepacked weights; the plain run has the same settings, so that both go through
the same kernels and agree bit for bit. The exception is float16, for which ONNX Runtime's CPU lacks kernels: it
computes in float32 and, in the plain run, drops the rounding between neighbours, which no setting prevents; there
the two agree within float16's own rounding. Constant expressions are evaluated when an operator asks for them, by
ONNX Runtime too.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper

from retensor.errors import GraphError
from retensor.graph.onnx_file import ELEMENTS, OnnxModel, ValueType, external_file, is_external, tensor_bytes
from retensor.graph.onnx_node import reads, reason, shown, subgraphs
from retensor.graph.onnx_shapes import Shapes, value_info
from retensor.graph.structure import Bytes, Operator, Tensor

KEPT_BYTES = 64 * 2**20
"""Bytes of evaluated constants and of weights that are kept for the next operator that reads them."""

MOST_SESSIONS = 1024
"""Operators whose ONNX Runtime session is kept for the next run."""

# What ONNX Runtime takes from NumPy; other elements (bfloat16, float8) pass as raw bytes of the same width.
_NATIVE = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13})
_RAW = {8: np.uint8, 16: np.uint16}
# 4-bit integers are fed to an operator as bytes, by which DequantizeLinear computes the same.
_WIDENED = {TensorProto.INT4: TensorProto.INT8, TensorProto.UINT4: TensorProto.UINT8}


@dataclass
class _Piece:
    """The model of one operator, ready to run."""

    session: Any
    # Model inputs with the storage each is read from.
    feeds: list[tuple[str, str]]
    results: list[str]


class OnnxProgram:
    """Runs the operators of a graph loaded from ONNX (the ``program`` of such a graph).

    Parameters
    ----------
    model : OnnxModel
    nodes : mapping of str to NodeProto
        By the names that operators list in their ``nodes``.
    shapes : Shapes
    storage : mapping of str to str
        The tensor that holds each value's bytes.
    tensors : mapping of str to Tensor
        Of the unmerged graph.
    threads : int
        Threads of each ONNX Runtime session, the plain run's too; 0 lets ONNX Runtime choose.
    random : str, optional
        A node that draws random numbers, for which running is refused: no two runs could be compared.

    Attributes
    ----------
    outputs : tuple of str
        The network's output values by their own names, for :meth:`decode`.
    """

    def __init__(
        self,
        model: OnnxModel,
        nodes: Mapping[str, NodeProto],
        shapes: Shapes,
        storage: Mapping[str, str],
        tensors: Mapping[str, Tensor],
        threads: int = 1,
        random: str | None = None,
    ) -> None:
        """Nothing is built or read before it is asked for."""
        self.threads = threads
        self.random = random
        self.outputs = tuple(model.outputs)
        self._model = model
        self._nodes = dict(nodes)
        self._types = dict(shapes.types)
        self._maker = shapes.maker
        self._constants = shapes.constants
        self._storage = dict(storage)
        self._inputs = tuple(name for name in model.inputs if name in tensors)
        self._pieces: OrderedDict[tuple[str, ...], _Piece] = OrderedDict()
        self._kept: OrderedDict[str, Bytes] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Sessions stay where they are; a copy builds its own."""
        return {**self.__dict__, "_pieces": OrderedDict(), "_kept": OrderedDict()}

    def example_inputs(self, seed: int) -> dict[str, Bytes]:
        """Random bytes of every input: standard normal floats, integers and booleans of 0 and 1.

        Parameters
        ----------
        seed : int

        Returns
        -------
        dict of str to flat uint8 array
        """
        random = np.random.default_rng(seed)
        made: dict[str, Bytes] = {}
        for name in self._inputs:
            kind = self._types[name]
            title, bits = ELEMENTS[kind.element]
            if title in ("float16", "float32", "float64"):
                values: npt.NDArray[Any] = random.standard_normal(kind.elements).astype(title)
            elif title == "bfloat16":
                values = (random.standard_normal(kind.elements).astype(np.float32).view(np.uint32) >> 16).astype(
                    np.uint16
                )
            elif kind.element in _NATIVE:
                values = random.integers(0, 2, kind.elements).astype(title)
            elif title.startswith("complex"):
                values = random.standard_normal(2 * kind.elements).astype(f"float{bits // 2}")
            else:
                # Elements of a byte or less: zeros are numbers at each of these types, ones may not be.
                values = np.zeros(kind.nbytes, np.uint8)
            made[name] = values.view(np.uint8).reshape(-1)
        return made

    def encode(self, value: str, array: npt.NDArray[Any]) -> Bytes:
        """Flat bytes of ``array`` as the value ``value`` of the model.

        Raises
        ------
        GraphError
            Where shape or element type is another.
        """
        kind = self._known(value)
        title = ELEMENTS[kind.element][0]
        if array.shape != kind.shape or array.dtype.name != title:
            raise GraphError(f"'{shown(value)}' is {title} of shape {kind.shape}, not {array.dtype} of {array.shape}")
        return np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def decode(self, value: str, storage: Bytes) -> npt.NDArray[Any]:
        """The value ``value`` of the model (an output, an alias) from the bytes of its tensor.

        Returns
        -------
        array of the value's shape and type
            Elements that NumPy does not have come as unsigned integers of their width; packed ones as bytes.
        """
        return self._array(self._known(value), storage)

    def storage_of(self, value: str) -> str:
        """Name of the tensor that holds the bytes of the model's value ``value``."""
        self._known(value)
        return self._storage[value]

    def parameter(self, name: str) -> Bytes:
        """Bytes of a parameter: a weight, or a constant expression, evaluated now.

        Raises
        ------
        GraphError
            Where ``name`` is no constant, or its data cannot be read.
        """
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        if name not in self._constants:
            raise GraphError(f"'{shown(name)}' is no parameter of the model")
        if name in self._model.initializers:
            data = tensor_bytes(self._model.weight(name), self._model.path)
        elif name in self._model.sparse:
            data = self._densified(name)
        else:
            data = self._evaluated(name)
        self._kept[name] = data
        while sum(kept.nbytes for kept in self._kept.values()) > KEPT_BYTES:
            self._kept.popitem(last=False)
        return data

    def run_operator(
        self, operator: Operator, storages: Mapping[str, Bytes], keep_parameters: bool
    ) -> dict[str, Bytes]:
        """Run one operator.

        Parameters
        ----------
        operator : Operator
        storages : mapping of str to flat uint8 array
            Bytes of its input tensors; nothing keeps or changes them.
        keep_parameters : bool
            Whether parameters come from the program, not from ``storages``.

        Returns
        -------
        dict of str to flat uint8 array
            Bytes of its output tensors.

        Raises
        ------
        GraphError
            Where ONNX Runtime cannot run it, or a storage is missing or of another size.
        """
        self._refuse_random()
        piece = self._piece(operator)
        feeds: dict[str, Any] = {}
        for value, name in piece.feeds:
            if keep_parameters and name in self._constants:
                data = self.parameter(name)
            elif name in storages:
                data = storages[name]
            else:
                raise GraphError(f"operator '{shown(operator.name)}' needs the bytes of tensor '{shown(name)}'")
            feeds[value] = data
        made = self._run(piece.session, feeds, piece.results, f"operator '{shown(operator.name)}'")
        return dict(zip(piece.results, made, strict=True))

    def run_plain(self, inputs: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """Run the model file as it is.

        Parameters
        ----------
        inputs : mapping of str to flat uint8 array
            As :meth:`example_inputs` returns them. An input that no operator reads may be left out.

        Returns
        -------
        dict of str to flat uint8 array
            Bytes of every output tensor (:meth:`decode` gives the values back their shape).

        Raises
        ------
        GraphError
        """
        self._refuse_random()
        # ONNX Runtime follows the external data of the file itself, so its places are checked once more.
        for tensor in self._model.initializers.values():
            if is_external(tensor):
                external_file(tensor, self._model.path)
        self._model.check_unchanged()
        session = self._session(str(self._model.path), "the model")
        feeds: dict[str, Bytes] = {}
        for name in self._model.inputs:
            if name not in inputs and name in self._inputs:
                raise GraphError(f"the model needs the bytes of input '{shown(name)}'")
            feeds[name] = inputs.get(name, np.zeros(0, np.uint8))
            if name not in inputs:
                feeds[name] = np.zeros(self._types[name].nbytes, np.uint8)
        wanted = list(dict.fromkeys(self.outputs))
        made = self._run(session, feeds, wanted, "the model")
        return {self._storage[value]: data for value, data in zip(wanted, made, strict=True)}

    def _refuse_random(self) -> None:
        if self.random is not None:
            raise GraphError(
                f"the model can be planned, not run: {self.random} draws other random numbers in each run, so that a "
                "planned run cannot be compared with a plain one; export the model for inference"
            )

    def _known(self, value: str) -> ValueType:
        if value not in self._types or value not in self._storage:
            raise GraphError(f"the model has no value '{shown(value)}'")
        return self._types[value]

    def _array(self, kind: ValueType, storage: Bytes) -> npt.NDArray[Any]:
        title, bits = ELEMENTS[kind.element]
        if storage.size != kind.nbytes:
            raise GraphError(f"a tensor of {storage.size:,} bytes is given where {kind.nbytes:,} are needed")
        if bits < 8:
            return storage
        dtype = np.dtype(title) if kind.element in _NATIVE or kind.element in (14, 15) else np.dtype(_RAW[bits])
        flat = np.ascontiguousarray(storage)
        # An arena gives any address; kernels are entitled to aligned elements.
        if flat.ctypes.data % dtype.itemsize:
            flat = np.concatenate([flat])
        return flat.view(dtype).reshape(kind.shape)

    def _session(self, model: str | bytes, what: str) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # There is a session for each operator: none keeps memory of its own between runs.
        options.enable_cpu_mem_arena = False
        options.enable_mem_pattern = False
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise GraphError(f"ONNX Runtime cannot run {what}: {reason(error)}") from None

    def _run(self, session: Any, feeds: Mapping[str, Bytes], wanted: Sequence[str], what: str) -> list[Bytes]:
        """Run a session on flat bytes; flat bytes of the values ``wanted``."""
        import onnxruntime

        given: dict[str, Any] = {}
        fed: list[npt.NDArray[Any]] = []
        for value, data in feeds.items():
            kind = self._types[value]
            array = self._array(kind, data)
            fed.append(array)
            if kind.element in _WIDENED:
                given[value] = onnxruntime.OrtValue.ortvalue_from_numpy(_widened(kind, array))
            elif kind.element in _NATIVE:
                given[value] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            elif ELEMENTS[kind.element][1] in _RAW:
                given[value] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind.element)
            else:
                raise GraphError(
                    f"{what} reads '{shown(value)}', whose type {ELEMENTS[kind.element][0]} "
                    "cannot be passed to ONNX Runtime"
                )
        try:
            made = session.run_with_ort_values(list(wanted), given)
        except Exception as error:
            raise GraphError(f"ONNX Runtime cannot run {what}: {reason(error)}") from None
        results = []
        for value, result in zip(wanted, made, strict=True):
            kind = self._types[value]
            if tuple(result.shape()) != kind.shape or result.element_type() != kind.element:
                raise GraphError(
                    f"{what} makes '{shown(value)}' of shape {tuple(result.shape())}; planned were {kind.shape}"
                )
            if kind.element in _NATIVE:
                flat = np.ascontiguousarray(result.numpy()).reshape(-1).view(np.uint8)
            else:
                flat = np.frombuffer(ctypes.string_at(result.data_ptr(), kind.nbytes), np.uint8)
            # An output that is an input too comes back as the memory that was fed, which the caller may let go of.
            results.append(flat.copy() if any(np.may_share_memory(flat, array) for array in fed) else flat)
        return results

    def _piece(self, operator: Operator) -> _Piece:
        key = (*operator.nodes, "", *operator.outputs)
        if key not in self._pieces:
            missing = next((name for name in operator.nodes if name not in self._nodes), None)
            if missing is not None or not operator.nodes:
                raise GraphError(f"operator '{shown(operator.name)}' is none of the model's")
            nodes = [self._nodes[name] for name in operator.nodes]
            self._pieces[key] = self._model_of(nodes, operator.outputs, f"operator '{shown(operator.name)}'")
            if len(self._pieces) > MOST_SESSIONS:
                self._pieces.popitem(last=False)
        self._pieces.move_to_end(key)
        return self._pieces[key]

    def _model_of(self, nodes: Sequence[NodeProto], wanted: Sequence[str], what: str) -> _Piece:
        """A model of ``nodes`` alone; what they read from outside becomes its inputs."""
        made = {name for node in nodes for name in node.output if name}
        model = self._empty_model()
        feeds: dict[str, str] = {}
        known: set[str] = set()
        for node in nodes:
            for value in reads(node):
                if value in made or value in known:
                    continue
                known.add(value)
                root = self._storage[value]
                if root in made:
                    # A view between merged nodes: the bytes stay, the shape is given back.
                    self._add_reshape(model, root, value)
                else:
                    feeds[value] = root
                    kind = self._types[value]
                    kind = kind._replace(element=_WIDENED.get(kind.element, kind.element))
                    model.graph.input.append(value_info(value, kind))
            added = model.graph.node.add()
            added.CopyFrom(node)
            self._take_in(added)
        model.graph.output.extend(value_info(name, self._types[name]) for name in wanted)
        return _Piece(self._session(model.SerializeToString(), what), list(feeds.items()), list(wanted))

    def _empty_model(self) -> ModelProto:
        # From IR version 4 on an initializer need not be an input.
        model = ModelProto(ir_version=max(4, self._model.ir_version))
        for domain, version in self._model.opsets.items():
            model.opset_import.add(domain=domain, version=version)
        model.graph.name = "piece"
        return model

    def _add_reshape(self, model: ModelProto, before: str, after: str) -> None:
        shape = self._types[after].shape
        node = model.graph.node.add(op_type="Reshape", output=[after], input=[before])
        version = self._model.opsets.get("", 1)
        if version < 5:
            node.attribute.add(name="shape", type=AttributeProto.INTS, ints=shape)
            return
        name = f"{after}/shape"
        node.input.append(name)
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(shape, np.int64), name))
        if version >= 14 and 0 in shape:
            node.attribute.add(name="allowzero", type=AttributeProto.INT, i=1)

    def _take_in(self, node: NodeProto) -> None:
        """Bring external data inside: a model made in memory has no folder to look in."""
        tensors: list[TensorProto] = [a.t for a in node.attribute if a.type == AttributeProto.TENSOR]
        for body in subgraphs(node):
            tensors.extend(body.initializer)
            for inner in body.node:
                self._take_in(inner)
        for tensor in tensors:
            if is_external(tensor):
                data = tensor_bytes(tensor, self._model.path).tobytes()
                tensor.ClearField("external_data")
                tensor.data_location = TensorProto.DEFAULT
                tensor.raw_data = data

    def _densified(self, name: str) -> Bytes:
        sparse = self._model.sparse[name]
        kind = self._types[name]
        bits = ELEMENTS[kind.element][1]
        if bits < 8:
            raise GraphError(f"sparse constant '{shown(name)}' has elements under a byte, which is not supported")
        values = tensor_bytes(sparse.values, self._model.path).reshape(-1, bits // 8)
        indices = tensor_bytes(sparse.indices, self._model.path).view(np.int64).reshape(tuple(sparse.indices.dims))
        dense = np.zeros((kind.elements, bits // 8), np.uint8)
        with contextlib.suppress(IndexError, ValueError):
            flat = np.ravel_multi_index(tuple(indices.T), kind.shape) if indices.ndim == 2 else indices
            dense[flat] = values
            return dense.reshape(-1)
        raise GraphError(f"sparse constant '{shown(name)}' has indices outside of its shape")

    def _evaluated(self, name: str) -> Bytes:
        """Run the constant expression that makes ``name``."""
        nodes, leaves = self._expression(name)
        model = self._empty_model()
        feeds: dict[str, Bytes] = {}
        for value in leaves:
            if value in self._model.initializers:
                feeds[value] = tensor_bytes(self._model.weight(value), self._model.path)
            elif value in self._model.sparse:
                feeds[value] = self._densified(value)
            else:  # Shape and Size of something that is not constant itself
                feeds[value] = self._measured(self._maker[value])
            model.graph.input.append(value_info(value, self._types[value]))
        if name in feeds:
            return feeds[name]
        for node in nodes:
            added = model.graph.node.add()
            added.CopyFrom(node)
            self._take_in(added)
        model.graph.output.append(value_info(name, self._types[name]))
        what = f"the constant '{shown(name)}'"
        return self._run(self._session(model.SerializeToString(), what), feeds, [name], what)[0]

    def _expression(self, name: str) -> tuple[list[NodeProto], list[str]]:
        """Nodes that make a constant, in an order that runs, and the values they start from."""
        nodes: list[NodeProto] = []
        leaves: dict[str, None] = {}
        done: set[str] = set()
        stack: list[tuple[str, bool]] = [(name, False)]
        while stack:
            value, entered = stack.pop()
            node = self._maker.get(value)
            if node is None or (node.op_type in ("Shape", "Size") and not node.domain):
                leaves[value] = None
            elif entered:
                nodes.append(node)
            elif value not in done:
                done.update(node.output)
                stack.append((value, True))
                stack.extend((needed, False) for needed in reads(node) if needed not in done)
        return nodes, list(leaves)

    def _measured(self, node: NodeProto) -> Bytes:
        shape = self._types[node.input[0]].shape
        if node.op_type == "Size":
            return np.asarray([self._types[node.input[0]].elements], np.int64).view(np.uint8)
        bounds = {attribute.name: attribute.i for attribute in node.attribute}
        return np.asarray(shape[bounds.get("start") : bounds.get("end")], np.int64).view(np.uint8)


def _widened(kind: ValueType, packed: Bytes) -> npt.NDArray[Any]:
    """4-bit integers, two in a byte and the first in its lower half, as bytes."""
    halves = np.stack([packed & 15, packed >> 4], 1).reshape(-1)[: kind.elements].reshape(kind.shape)
    return ((halves ^ 8).view(np.int8) - np.int8(8)) if kind.element == TensorProto.INT4 else halves


def output_arrays(program: OnnxProgram, storages: Mapping[str, Bytes]) -> dict[str, npt.NDArray[Any]]:
    """The network's outputs by their own names, from the bytes of its output tensors."""
    return {value: program.decode(value, storages[program.storage_of(value)]) for value in _distinct(program.outputs)}


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
