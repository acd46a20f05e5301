"""Static shape and element type of every value of an ONNX model, one node at a time.

Each node is inferred alone, by onnx's own inference on a model of that one node whose inputs have static
shapes. Where its result depends on the values of an input (the shape given to a Reshape, say), that input is
evaluated if it is a constant expression of cheap operators, under a limit on bytes; nothing else is ever
evaluated while loading. What still has no shape takes the one the file declares, or stays unknown.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, numpy_helper

from retensor.errors import GraphError
from retensor.graph.onnx_file import ELEMENTS, OnnxModel, ValueType, is_external, tensor_bytes
from retensor.graph.onnx_guard import InferenceError, infer_shapes
from retensor.graph.onnx_node import LARGEST_DIMENSION, domain_of, kind_of, reads, reason, shown, subgraphs

EVALUATED_BYTES = 16 * 2**20
"""Bytes of constants that may be evaluated to learn the shapes of one model."""
_GIVEN_ELEMENTS = 1024

Array = npt.NDArray[Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Operators that are evaluated while loading: shape arithmetic, linear in what they read and write.
_CHEAP = _words(
    "Abs Add And Cast CastLike Ceil Clip Compress Concat Constant ConstantOfShape CumSum Div Equal Expand Flatten "
    "Floor Gather GatherElements GatherND Greater GreaterOrEqual Identity Less LessOrEqual Max Min Mod Mul Neg "
    "NonZero Not Or Pad Range ReduceMax ReduceMin ReduceProd ReduceSum Reshape Round ScatterElements ScatterND "
    "Sign Size Slice Split Sqrt Squeeze Sub Tile Transpose Trilu Unsqueeze Where Xor"
)
_RANDOM = _words("RandomNormal RandomNormalLike RandomUniform RandomUniformLike Multinomial Bernoulli Dropout")


def sorted_nodes(model: OnnxModel) -> list[NodeProto]:
    """The nodes in an order that runs, the file's own order wherever that is one.

    Raises
    ------
    GraphError
        Where a value is made twice, made by nothing, or the nodes form a cycle.
    """
    maker: dict[str, int] = {}
    for index, node in enumerate(model.nodes):
        for name in node.output:
            if name and (name in maker or name in model.inputs or name in model.initializers or name in model.sparse):
                raise GraphError(f"'{model.path}' makes the value '{shown(name)}' twice")
            if name:
                maker[name] = index
    waits = [0] * len(model.nodes)
    followers: list[list[int]] = [[] for _ in model.nodes]
    for index, node in enumerate(model.nodes):
        for name in reads(node):
            if name in maker:
                waits[index] += 1
                followers[maker[name]].append(index)
            elif not (name in model.inputs or name in model.initializers or name in model.sparse):
                raise GraphError(
                    f"node '{shown(node.name)}' ({kind_of(node)}) reads '{shown(name)}', which nothing makes"
                )
    ready = [index for index, count in enumerate(waits) if count == 0]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for follower in followers[index]:
            waits[follower] -= 1
            if waits[follower] == 0:
                heapq.heappush(ready, follower)
    if len(order) < len(model.nodes):
        stuck = model.nodes[next(index for index, count in enumerate(waits) if count > 0)]
        raise GraphError(f"'{model.path}' has a cycle through node '{shown(stuck.name)}' ({kind_of(stuck)})")
    return [model.nodes[index] for index in order]


def input_types(model: OnnxModel, given: Mapping[str, Sequence[int]] | None) -> dict[str, ValueType]:
    """Static types of the network's inputs, open dimensions fixed by ``given``.

    A dimension with a name (``batch``) that is fixed at one input is fixed wherever the name stands.

    Raises
    ------
    GraphError
        Where ``given`` names no input or does not fit, or a dimension stays open.
    """
    wanted = {str(name): _checked_shape(str(name), shape) for name, shape in (given or {}).items()}
    for name in wanted:
        if name not in model.inputs:
            names = ", ".join(f"'{shown(known)}'" for known in list(model.inputs)[:20]) or "none"
            raise GraphError(f"the model has no input '{shown(name)}'; its inputs: {names}")
    declared: dict[str, tuple[int, list[int | str | None]]] = {}
    symbols: dict[str, int] = {}
    for name, kind in model.inputs.items():
        element, dimensions = _declared_input(name, kind)
        declared[name] = element, dimensions
        if name not in wanted:
            continue
        shape = wanted[name]
        if len(shape) != len(dimensions):
            raise GraphError(
                f"input '{shown(name)}' has {len(dimensions)} dimensions ({_written(dimensions)}), "
                f"{'x'.join(map(str, shape))} has {len(shape)}"
            )
        for size, dimension in zip(shape, dimensions, strict=True):
            if isinstance(dimension, int) and dimension != size:
                raise GraphError(
                    f"input '{shown(name)}' is {_written(dimensions)} in the model, not {'x'.join(map(str, shape))}; "
                    "only open dimensions can be chosen"
                )
            if isinstance(dimension, str) and symbols.setdefault(dimension, size) != size:
                raise GraphError(
                    f"the dimension '{shown(dimension)}' is given as {symbols[dimension]} and as {size}; "
                    "the model needs them equal"
                )
    types: dict[str, ValueType] = {}
    unfixed: list[str] = []
    for name, (element, dimensions) in declared.items():
        if name in wanted:
            types[name] = ValueType(element, wanted[name])
            continue
        sizes = [symbols.get(size) if isinstance(size, str) else size for size in dimensions]
        fixed = tuple(size for size in sizes if size is not None)
        if len(fixed) == len(sizes):
            types[name] = ValueType(element, fixed)
        else:
            unfixed.append(name)
    if unfixed:
        listed = ", ".join(f"'{shown(name)}' ({_written(declared[name][1])})" for name in unfixed[:8])
        first, example = shown(unfixed[0]), _example(declared[unfixed[0]][1])
        raise GraphError(
            f"the model leaves dimensions of its inputs open: {listed}; fix them, as in "
            f"--input {first}={'x'.join(map(str, example))} or in Python inputs={{'{first}': {example}}}"
        )
    return types


def _checked_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise GraphError(f"the shape of input '{shown(name)}' is a sequence of numbers such as (1, 3, 224, 224)")
    sizes = []
    for size in shape:
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or not 1 <= size <= LARGEST_DIMENSION:
            raise GraphError(
                f"the shape of input '{shown(name)}' has a dimension {shown(repr(size), 30)}; "
                "1 to 2**31 - 1 are allowed"
            )
        sizes.append(int(size))
    return tuple(sizes)


def _example(dimensions: Sequence[int | str | None]) -> list[int]:
    """A shape that could be given for one input, open dimensions as a plain guess."""
    return [size if isinstance(size, int) else 1 if axis == 0 else 224 for axis, size in enumerate(dimensions)]


def _written(dimensions: Sequence[int | str | None]) -> str:
    return shown("x".join("?" if size is None else str(size) for size in dimensions) or "a scalar", 120)


def _with_article(noun: str) -> str:
    return noun if noun == "untyped" else f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _declared_input(name: str, kind: Any) -> tuple[int, list[int | str | None]]:
    """Element type and dimensions (number, name or None) of a network input."""
    if kind.WhichOneof("value") != "tensor_type":
        held = str(kind.WhichOneof("value") or "untyped").removesuffix("_type").replace("_", " ")
        raise GraphError(
            f"input '{shown(name)}' is {_with_article(held)}, not a tensor; only tensors can be planned: "
            "give the model an input for each tensor of it"
        )
    tensor = kind.tensor_type
    if tensor.elem_type not in ELEMENTS:
        what = "strings" if tensor.elem_type == TensorProto.STRING else f"unknown elements ({tensor.elem_type})"
        raise GraphError(f"input '{shown(name)}' holds {what}; only tensors of numbers can be planned")
    if not tensor.HasField("shape"):
        raise GraphError(
            f"input '{shown(name)}' has no shape in the file, not even how many dimensions; export it anew"
        )
    if len(tensor.shape.dim) > 64:
        raise GraphError(f"input '{shown(name)}' has {len(tensor.shape.dim)} dimensions; up to 64 are allowed")
    dimensions: list[int | str | None] = []
    for dimension in tensor.shape.dim:
        if not dimension.HasField("dim_value"):
            dimensions.append(dimension.dim_param or None)
        elif dimension.dim_value == -1:  # what some exporters write for an open dimension
            dimensions.append(None)
        elif not 0 <= dimension.dim_value <= LARGEST_DIMENSION:
            raise GraphError(
                f"input '{shown(name)}' has a dimension of {dimension.dim_value:,}; 0 to 2**31 - 1 are allowed"
            )
        else:
            dimensions.append(dimension.dim_value)
    return tensor.elem_type, dimensions


class Shapes:
    """Types of a model's values, and what is constant among them.

    Parameters
    ----------
    model : OnnxModel
    nodes : sequence of NodeProto
        In an order that runs.
    inputs : mapping of str to ValueType

    Attributes
    ----------
    types : dict of str to ValueType
        Every value whose type and shape are known and static.
    constants : set of str
        Values that are the same at each run.
    unknown : dict of str to str
        Why a value has no type.
    maker : dict of str to NodeProto
    """

    def __init__(self, model: OnnxModel, nodes: Sequence[NodeProto], inputs: Mapping[str, ValueType]) -> None:
        """Infer every node in turn."""
        self.model = model
        self.types: dict[str, ValueType] = dict(inputs)
        self.constants: set[str] = set(model.initializers) | set(model.sparse)
        self.unknown: dict[str, str] = {}
        self.maker = {name: node for node in nodes for name in node.output if name}
        self._values: dict[str, Array | None] = {}
        self._left = EVALUATED_BYTES
        for name, tensor in model.initializers.items():
            if tensor.data_type in ELEMENTS:
                self.types[name] = ValueType(tensor.data_type, tuple(tensor.dims))
            else:
                self.unknown[name] = "it holds strings"
        for name, sparse in model.sparse.items():
            if sparse.values.data_type in ELEMENTS:
                self.types[name] = ValueType(sparse.values.data_type, tuple(sparse.dims))
        for node in nodes:
            self._infer(node)

    def is_constant(self, node: NodeProto) -> bool:
        """Whether what ``node`` makes is the same at each run, whatever the inputs."""
        if domain_of(node) == "" and node.op_type in ("Shape", "Size"):
            return node.input[0] in self.types
        return all(name in self.constants for name in reads(node)) and not _draws(node)

    def value(self, name: str) -> Array | None:
        """The value of a small constant expression of cheap operators; None for anything else."""
        stack = [name]
        while stack:
            current = stack[-1]
            if current in self._values:
                stack.pop()
                continue
            node = self.maker.get(current)
            if current not in self.constants or (node is not None and not self._is_cheap(node)):
                self._values[current] = None
                continue
            if node is None:
                self._values[current] = self._initializer(current)
                continue
            needed = [] if node.op_type in ("Shape", "Size") else [name for name in node.input if name]
            if open_ones := [name for name in needed if name not in self._values]:
                stack.extend(open_ones)
                continue
            self._evaluate(node)
        return self._values[name]

    def _is_cheap(self, node: NodeProto) -> bool:
        return domain_of(node) == "" and (node.op_type in _CHEAP or node.op_type == "Shape")

    def _afford(self, nbytes: int) -> bool:
        if nbytes > self._left:
            return False
        self._left -= nbytes
        return True

    def _initializer(self, name: str) -> Array | None:
        kind = self.types.get(name)
        if kind is None or name in self.model.sparse or ELEMENTS[kind.element][1] < 8:
            return None
        if not self._afford(kind.nbytes):
            return None
        try:
            data = tensor_bytes(self.model.weight(name), self.model.path)
            return data.view(np.dtype(ELEMENTS[kind.element][0])).reshape(kind.shape)
        except (GraphError, TypeError):  # its file is missing, or NumPy does not know the element type
            return None

    def _evaluate(self, node: NodeProto) -> None:
        """Put the values of a cheap node's outputs, or None, among the values."""
        for name in node.output:
            self._values[name] = None
        if node.op_type in ("Shape", "Size"):
            shape = self.types[node.input[0]].shape
            if node.op_type == "Size":
                self._values[node.output[0]] = np.asarray(np.prod(shape, dtype=np.int64))
                return
            bounds = {attribute.name: attribute.i for attribute in node.attribute}
            self._values[node.output[0]] = np.asarray(shape[bounds.get("start") : bounds.get("end")], np.int64)
            return
        feeds = {name: self._values[name] for name in node.input if name}
        if any(value is None for value in feeds.values()):
            return
        made = 0
        for name in filter(None, node.output):
            kind = self.types.get(name)
            if kind is None and node.op_type in ("NonZero", "Compress"):
                made += sum(8 * value.size * max(value.ndim, 1) for value in feeds.values() if value is not None)
            elif kind is None or kind.element in (8, 16) or ELEMENTS[kind.element][1] < 8:
                return
            else:
                made += kind.nbytes
        if not self._afford(made):
            return
        try:
            from onnx.reference import ReferenceEvaluator

            with np.errstate(all="ignore"):
                results = ReferenceEvaluator(node, opsets=self.model.opsets).run(None, feeds)
        except Exception:  # hostile arguments; the value is then simply not known
            return
        for name, result in zip(node.output, results, strict=False):
            array = np.asarray(result)
            kind = self.types.get(name)
            if kind is None:
                element = next((number for number, (title, _) in ELEMENTS.items() if title == array.dtype.name), None)
                if element is not None:
                    self.types[name] = ValueType(element, array.shape)
                    self.unknown.pop(name, None)
                    self._values[name] = array
            elif array.dtype.name == ELEMENTS[kind.element][0] and array.shape == kind.shape:
                self._values[name] = array

    def _infer(self, node: NodeProto) -> None:
        if self.is_constant(node):
            self.constants.update(filter(None, node.output))
        wanted = [name for name in node.output if name]
        names = reads(node)
        blocked = next((name for name in names if name not in self.types), None)
        if blocked is not None:
            cause = self.unknown.get(blocked, "unknown")
            # The first cause is what helps, not the whole way from it.
            why = cause if " made from " in cause else f"it is made from '{shown(blocked)}', where {cause}"
            self.unknown.update(dict.fromkeys(wanted, shown(why, 300)))
            self._declare(wanted)
            return
        given = {name: value for name in node.input if (value := self._given(name)) is not None}
        self._ask(node, names, given)
        if all(name in self.types for name in wanted):
            return
        deeper = {
            name: value for name in node.input if name in self.constants and (value := self.value(name)) is not None
        }
        if deeper.keys() - given.keys():
            self._ask(node, names, deeper)
        if node.op_type == "Loop" and domain_of(node) == "":
            self._ask_loop(node, names)
        if not all(name in self.types for name in wanted) and wanted[0] in self.constants:
            # A size that depends on the data, of a constant (NonZero): its value has a shape.
            self.value(wanted[0])
        self._declare([name for name in wanted if name not in self.types])

    def _given(self, name: str) -> Array | None:
        """A constant's value where it costs nothing to know."""
        if name in self._values:
            return self._values[name]
        node = self.maker.get(name)
        kept = self.model.initializers.get(name)
        plain = kept is not None and not is_external(kept)
        plain = plain or (node is not None and node.op_type in ("Constant", "Shape"))
        kind = self.types.get(name)
        return self.value(name) if plain and kind is not None and kind.elements <= _GIVEN_ELEMENTS else None

    def _ask_loop(self, node: NodeProto, names: Sequence[str]) -> None:
        """Types of what a Loop carries from round to round, where the body keeps them as they are.

        onnx leaves their shapes open, since a body may change them. If the body maps the initial types to the
        same types, every round does, by induction.
        """
        body = next(subgraphs(node), None)
        carried = list(node.input[2:])
        if body is None or len(body.input) != 2 + len(carried) or len(body.output) < 1 + len(carried):
            return
        single = self._model()
        single.graph.CopyFrom(body)
        del single.graph.input[:]
        inside = [value.name for value in body.input]
        kinds = [ValueType(TensorProto.INT64, ()), ValueType(TensorProto.BOOL, ())]
        kinds += [self.types[name] for name in carried]
        single.graph.input.extend(value_info(name, kind) for name, kind in zip(inside, kinds, strict=True))
        single.graph.input.extend(value_info(name, self.types[name]) for name in names if name not in inside)
        for value in single.graph.output:
            value.ClearField("type")
        try:
            answer = infer_shapes(single, f"the body of node '{shown(node.name)}' (Loop)", strict=False)
        except InferenceError:
            return
        found = [_static(value.type, value.name) for value in answer.graph.output[1 : 1 + len(carried)]]
        if found == kinds[2:]:
            for name, kind in zip(node.output, kinds[2:], strict=False):
                if name:
                    self.types[name] = kind
                    self.unknown.pop(name, None)

    def _model(self) -> ModelProto:
        single = ModelProto(ir_version=10)
        for domain, version in self.model.opsets.items():
            single.opset_import.add(domain=domain, version=version)
        return single

    def _ask(self, node: NodeProto, names: Sequence[str], given: Mapping[str, Array]) -> None:
        """Infer ``node`` by onnx, with the values of some inputs, and take what comes out static."""
        single = self._model()
        single.graph.node.append(node)
        for name in names:
            single.graph.input.append(value_info(name, self.types[name]))
        for name, value in given.items():
            if value.size <= 16 * _GIVEN_ELEMENTS:
                single.graph.initializer.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        why = "its shape depends on the data, or ONNX's shape inference does not cover it"
        what = f"node '{shown(node.name)}' ({shown(kind_of(node))})"
        try:
            answer = infer_shapes(single, what, strict=True)
        except InferenceError as error:
            why = reason(error)
            try:
                answer = infer_shapes(single, what, strict=False)
            except InferenceError:
                answer = ModelProto()
        found = {value.name: value.type for value in answer.graph.value_info}
        for name in filter(None, node.output):
            outcome = _static(found.get(name), name)
            if isinstance(outcome, ValueType):
                self.types[name] = outcome
                self.unknown.pop(name, None)
            else:
                self.unknown[name] = outcome or f"{kind_of(node)}: {why}"

    def _declare(self, names: Sequence[str]) -> None:
        """Take the file's word for values that inference has no shape for."""
        for name in names:
            outcome = _static(self.model.declared.get(name), name)
            if isinstance(outcome, ValueType):
                self.types[name] = outcome
                self.unknown.pop(name, None)


def value_info(name: str, kind: ValueType) -> Any:
    """A graph input or output of static shape."""
    return onnx.helper.make_tensor_value_info(name, kind.element, kind.shape)


def _static(kind: TypeProto | None, name: str) -> ValueType | str:
    """The static type a TypeProto states, or why there is none (empty where it states nothing)."""
    if kind is None or kind.WhichOneof("value") is None:
        return ""
    if kind.WhichOneof("value") != "tensor_type":
        held = str(kind.WhichOneof("value")).removesuffix("_type").replace("_", " ")
        return f"it is of type {held}, and only tensors can be planned"
    tensor = kind.tensor_type
    if tensor.elem_type == TensorProto.STRING:
        return "it holds strings, and only tensors of numbers can be planned"
    if tensor.elem_type not in ELEMENTS or not tensor.HasField("shape") or len(tensor.shape.dim) > 64:
        return ""
    shape = []
    for dimension in tensor.shape.dim:
        if not dimension.HasField("dim_value") or dimension.dim_value < 0:
            return ""
        if dimension.dim_value > LARGEST_DIMENSION:
            raise GraphError(
                f"value '{shown(name)}' has a dimension of {dimension.dim_value:,}; 0 to 2**31 - 1 are allowed"
            )
        shape.append(int(dimension.dim_value))
    return ValueType(tensor.elem_type, tuple(shape))


def _draws(node: NodeProto) -> bool:
    """Whether a node, or one in its subgraphs, may draw random numbers."""
    if domain_of(node) == "" and node.op_type in _RANDOM:
        return node.op_type != "Dropout" or len(node.input) > 2 or len(node.output) > 1
    return any(_draws(inner) for body in subgraphs(node) for inner in body.node)
