"""A graph from an ONNX file: what must lie in the scratchpad, what is constant, and what is only a view.

A node becomes an operator if it computes something that depends on the inputs and reaches an output. Reshape
and its kin name the same bytes again and become aliases. What depends on no input is a constant: a parameter
where an operator reads it, sized here and evaluated only when the graph is run.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx import NodeProto

from retensor.errors import GraphError, RetensorError
from retensor.graph.arithmetic import onnx_macs
from retensor.graph.merge import merge
from retensor.graph.onnx_file import ELEMENTS, FLOATING, OnnxModel, ValueType, read_model
from retensor.graph.onnx_node import (
    attribute_of,
    domain_of,
    is_weight,
    kind_of,
    optional_outputs,
    plain_attributes,
    reads,
    reason,
    shown,
    subgraphs,
)
from retensor.graph.onnx_program import OnnxProgram
from retensor.graph.onnx_shapes import Shapes, input_types, sorted_nodes
from retensor.graph.structure import LARGEST_TENSOR, Graph, Operator, Role, Tensor

DTYPES: Mapping[str, int] = {
    "float64": 64,
    "float32": 32,
    "float16": 16,
    "bfloat16": 16,
    "float8": 8,
    "float4": 4,
    "int32": 32,
    "int16": 16,
    "int8": 8,
    "uint8": 8,
    "int4": 4,
    "uint4": 4,
}
"""Element types that floating-point tensors can be counted at, and the bits of one element."""

_RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
_VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})
_MOVES = _VIEWS | {"Transpose", "Cast"}


def load_onnx(
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Sequence[int]] | None = None,
    dtype: str | None = None,
    fuse: bool = True,
    in_place: bool = False,
) -> Graph:
    """The graph of an ONNX file.

    Parameters
    ----------
    path : str or path
    inputs : mapping of str to sequence of int, optional
        Shapes of inputs whose dimensions the model leaves open.
    dtype : str, optional
        Count each element of a floating-point tensor at this type (``"int8"``: one byte; ``"int4"``: half
        a byte, a tensor's bytes rounded up); integers and booleans keep theirs. A graph counted at another
        type than the model's own has no ``program``: it can be planned, not run.
    fuse, in_place : bool
        See :func:`retensor.graph.merge.merge`.

    Returns
    -------
    Graph
        Its operators in the file's order, with a program that runs them by ONNX Runtime.

    Raises
    ------
    GraphError
        Where the file is no well-formed ONNX model, or some tensor has no static shape.
    ValueError
        Where ``dtype`` is unknown.

    Examples
    --------
    >>> import onnx, tempfile, os
    >>> model = onnx.parser.parse_model('''<ir_version: 8, opset_import: ["": 17]>
    ... net (float[1, 4] x) => (float[4, 1] y) { a = Relu(x)
    ...   shape = Constant <value_ints = [4, 1]> ()
    ...   b = Reshape(a, shape)
    ...   y = Exp(b) }''')
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     onnx.save(model, os.path.join(folder, "net.onnx"))
    ...     graph = load_onnx(os.path.join(folder, "net.onnx"))
    >>> [operator.kind for operator in graph.operators], graph.aliases
    (['Relu', 'Exp'], {'b': 'a'})
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"unknown element type '{shown(str(dtype))}'; one of {', '.join(DTYPES)} is allowed")
    try:
        model = read_model(path)
        nodes = sorted_nodes(model)
        shapes = Shapes(model, nodes, input_types(model, inputs))
        graph = _Builder(model, nodes, shapes, dtype).graph(Path(path).stem)
        graph = merge(graph, fuse=fuse, in_place=in_place)
    except RetensorError:
        raise
    except Exception as error:
        # The file is not to be trusted, and the libraries under this raise whatever they meet.
        raise GraphError(
            f"'{path}' is not a well-formed ONNX model: {type(error).__name__}: {reason(error)}"
        ) from error
    options = {
        "fuse": fuse,
        "in_place": in_place,
        "dtype": dtype,
        "inputs": {name: [int(size) for size in shape] for name, shape in (inputs or {}).items()},
    }
    return Graph(
        graph.name, graph.operators, graph.tensors, graph.outputs, graph.aliases, options=options, program=graph.program
    )


@dataclass
class _Builder:
    """Sorts a model's nodes into operators, views and constants, and makes the graph of them."""

    model: OnnxModel
    nodes: list[NodeProto]
    shapes: Shapes
    dtype: str | None
    # Where each value's bytes are: the name of the value that first had them.
    storage: dict[str, str] = field(default_factory=dict)
    # Constants that count as parameters in the sense of training.
    learned: set[str] = field(default_factory=set)
    # Values that are made of constant codes, which are no constants here.
    decoded: set[str] = field(default_factory=set)

    def graph(self, name: str) -> Graph:
        """The unmerged graph, with its program where it can be run."""
        used = {value for node in self.nodes for value in reads(node)} | set(self.model.outputs)
        candidates = self._classify(used)
        for value in self.model.outputs:
            if value not in self.storage:
                raise GraphError(f"the network's output '{shown(value)}' is made by nothing")
        titles = self._titles()
        tensors: dict[str, Tensor] = {}
        operators: list[Operator] = []
        nodes: dict[str, NodeProto] = {}
        live = self._live(candidates)
        self._find_learned(live)
        for index in live:
            node = self._without_unread(self.nodes[index], used)
            for value in reads(node):
                self._check_alias(value)
            read = tuple(dict.fromkeys(self.storage[value] for value in reads(node)))
            made = tuple(value for value in node.output if value)
            for value in (*read, *made):
                if value not in tensors:
                    tensors[value] = self._tensor(value)
            title = titles[index]
            nodes[title] = node
            operators.append(Operator(title, self._kind(node), read, made, (title,), self._macs(node)))
        if not operators:
            raise GraphError(
                f"'{self.model.path}' computes nothing from its inputs: its outputs are constants or views"
            )
        for value in self.model.outputs:
            self._check_alias(value)
            root = self.storage[value]
            if root not in tensors:
                tensors[root] = self._tensor(root)
        aliases = {value: root for value, root in self.storage.items() if value != root and root in tensors}
        runnable = all(tensor.dtype == ELEMENTS[self._type(tensor.name).element][0] for tensor in tensors.values())
        program = self._program(nodes, tensors) if runnable else None
        outputs = [self.storage[value] for value in self.model.outputs]
        return Graph(name, operators, tensors, outputs, aliases, program=program)

    def _program(self, nodes: Mapping[str, NodeProto], tensors: Mapping[str, Tensor]) -> OnnxProgram:
        return OnnxProgram(self.model, nodes, self.shapes, self.storage, tensors, random=self._random())

    def _random(self) -> str | None:
        """A node that reaches an output and draws random numbers, for a sentence."""
        wanted = set(self.model.outputs)
        for node in reversed(self.nodes):
            if any(value in wanted for value in node.output if value):
                wanted.update(reads(node))
                if (found := self._drawing(node)) is not None:
                    name = f"node '{shown(node.name)}' " if node.name else ""
                    return f"{name}({found})" if name else f"a node ({found})"
        return None

    def _drawing(self, node: NodeProto) -> str | None:
        """The kind of the node, or of one in its subgraphs, where that is random."""
        if domain_of(node) == "":
            if node.op_type in _RANDOM:
                return str(node.op_type)
            if node.op_type == "Dropout" and self._trains(node):
                return "Dropout in training mode"
        inner = (self._drawing(part) for body in subgraphs(node) for part in body.node)
        return next((found for found in inner if found is not None), None)

    def _classify(self, used: set[str]) -> list[int]:
        """Fill ``storage``; the indices of nodes that compute something from the inputs."""
        for value in (*self.model.inputs, *self.model.initializers, *self.model.sparse):
            self.storage[value] = value
        candidates = []
        for index, node in enumerate(self.nodes):
            self.storage.update((value, value) for value in node.output if value)
            if self._decodes(node):
                # Evaluated in advance they would take the room that codes are there to save.
                self.shapes.constants.discard(node.output[0])
                self.decoded.add(node.output[0])
            if self._is_view(node, used):
                self.storage[node.output[0]] = self.storage[node.input[0]]
            elif not all(value in self.shapes.constants for value in node.output if value):
                candidates.append(index)
        return candidates

    def _decodes(self, node: NodeProto) -> bool:
        """Whether a node makes numbers of constant codes, or moves such numbers."""
        if domain_of(node) != "" or len(node.output) != 1 or not node.input:
            return False
        if node.op_type == "DequantizeLinear":
            return all(value in self.shapes.constants for value in reads(node))
        return node.op_type in _MOVES and node.input[0] in self.decoded

    def _is_view(self, node: NodeProto, used: set[str]) -> bool:
        """Whether the node's output is its first input's bytes under another name."""
        if domain_of(node) != "" or not node.input or not node.output[0]:
            return False
        if node.op_type in _VIEWS:
            return True
        before, after = self.shapes.types.get(node.input[0]), self.shapes.types.get(node.output[0])
        if before is None or after is None:
            return False
        if node.op_type in ("Cast", "CastLike"):
            return before == after
        if node.op_type == "Transpose":
            order = attribute_of(node, "perm", list(reversed(range(len(before.shape)))))
            if sorted(order) != list(range(len(before.shape))):
                return False
            moved = [axis for axis in order if before.shape[axis] != 1]
            return moved == sorted(moved) or before.elements == 0
        if node.op_type == "Dropout":
            return not any(value in used for value in node.output[1:]) and not self._trains(node)
        return False

    def _trains(self, node: NodeProto) -> bool:
        """Whether a Dropout or BatchNormalization works as in training."""
        version = self.model.opsets.get("", 1)
        if node.op_type == "Dropout" and version >= 12:
            if len(node.input) < 3 or not node.input[2]:
                return False
            mode = self.shapes.value(node.input[2])
            return mode is None or bool(mode.any())
        if version < 7:
            return not attribute_of(node, "is_test", 0)
        return bool(attribute_of(node, "training_mode", 0))

    def _live(self, candidates: Sequence[int]) -> list[int]:
        """Those of ``candidates`` that reach an output of the network."""
        wanted = {self.storage[value] for value in self.model.outputs}
        live = []
        for index in reversed(candidates):
            node = self.nodes[index]
            if any(value in wanted for value in node.output if value):
                live.append(index)
                wanted.update(self.storage[value] for value in reads(node))
        return live[::-1]

    def _without_unread(self, node: NodeProto, used: set[str]) -> NodeProto:
        """The node without the optional outputs that nothing reads, so that they take no room."""
        optional = optional_outputs(node, self.model.opsets)
        kept = [value if value in used or i not in optional else "" for i, value in enumerate(node.output)]
        if kept == list(node.output):
            return node
        while kept and not kept[-1]:
            kept.pop()
        slim = NodeProto()
        slim.CopyFrom(node)
        del slim.output[:]
        slim.output.extend(kept)
        return slim

    def _kind(self, node: NodeProto) -> str:
        kind = kind_of(node)
        # Training needs the whole tensor before its first element is known: nothing to take into a convolution.
        return f"{kind}Training" if kind == "BatchNormalization" and self._trains(node) else kind

    def _macs(self, node: NodeProto) -> int | None:
        inputs = [self._type(value).shape if value else None for value in node.input]
        outputs = [self._type(value).shape if value else None for value in node.output]
        return onnx_macs(kind_of(node), inputs, outputs, plain_attributes(node))

    def _find_learned(self, live: Sequence[int]) -> None:
        """Fill ``learned`` with the storages of constants that some node reads as its weights."""
        for index in live:
            node = self.nodes[index]
            for position, value in enumerate(node.input):
                kind, root = self.shapes.types.get(value), self.storage.get(value)
                if kind is None or root is None or root not in self.shapes.constants:
                    continue
                if is_weight(node, position, kind.element in FLOATING, len(kind.shape)):
                    self.learned.add(root)

    def _titles(self) -> list[str]:
        """A unique name for each node: its own, or its type and place where it has none or shares it."""
        count = Counter(node.name for node in self.nodes)
        taken = {name for name, times in count.items() if times == 1}
        titles = []
        for index, node in enumerate(self.nodes):
            title = node.name
            if not title or count[title] > 1:
                title = f"{node.op_type}_{index}"
                while title in taken:
                    title += "_"
                taken.add(title)
            titles.append(title)
        return titles

    def _type(self, value: str) -> ValueType:
        kind = self.shapes.types.get(value)
        if kind is None:
            why = self.shapes.unknown.get(value, "nothing tells it")
            raise GraphError(
                f"tensor '{shown(value)}' has no static shape: {why}; "
                "only a model whose shapes are all known beforehand can be planned"
            )
        return kind

    def _check_alias(self, value: str) -> None:
        root = self.storage[value]
        if value != root and self._type(value).nbytes != self._type(root).nbytes:
            raise GraphError(
                f"'{shown(value)}' is a view of '{shown(root)}', but of {self._type(value).nbytes:,} bytes, "
                f"not {self._type(root).nbytes:,}"
            )

    def _tensor(self, name: str) -> Tensor:
        kind = self._type(name)
        title, bits = ELEMENTS[kind.element]
        if self.dtype is not None and kind.element in FLOATING:
            title, bits = self.dtype, DTYPES[self.dtype]
        nbytes = (kind.elements * bits + 7) // 8
        if nbytes > LARGEST_TENSOR:
            size = "x".join(map(str, kind.shape))
            raise GraphError(f"tensor '{shown(name)}' ({size}) has {nbytes:,} bytes; up to 2**50 are allowed")
        role: Role = "activation"
        if name in self.model.inputs:
            role = "input"
        elif name in self.shapes.constants:
            role = "parameter"
        return Tensor(name, nbytes, role, kind.shape, title, role == "parameter" and name not in self.learned)
