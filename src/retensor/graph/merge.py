"""Operators that a kernel computes as one, taken together before planning.

``fuse``: a convolution takes in its normalisation and one activation, which a convolution kernel applies to
each element as it is made; and an operator whose weight is kept as codes (integers of few bits with a step) takes in
what makes numbers of them, as kernels for such weights do, so that no tensor of those numbers is ever there.
``in_place``: an operator that maps one tensor to another element by element writes over its input, where nothing else
wants that input. Both work on the operators' kinds, ONNX's (``Conv``) and torch's (``aten.conv2d.default``) alike, and
on tensors' shapes.

Why ``in_place`` loses nothing. Let ``u`` map tensor ``t`` to ``v`` of as many bytes, let ``p`` make ``t``, and
let ``u`` be the only reader of ``t``, which is no output of the network. Take any plan in which ``u`` writes
``v`` over ``t``. Run ``u`` at once after ``p`` and let ``v`` lie wherever ``t`` or ``v`` lay: each spill and
retrieve of ``t`` becomes one of ``v``, no step holds more bytes than before, and ``v`` is spilled once where
``t``, ``v`` or both were. So merging ``p`` and ``u`` into one operator keeps an optimal plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from retensor.graph.structure import Graph, Operator, Tensor


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CONVOLUTIONS = _words(
    "Conv ConvTranspose ConvInteger QLinearConv conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d "
    "conv_transpose3d"
)
_NORMALISATIONS = _words(
    "BatchNormalization batch_norm _native_batch_norm_legit_no_training native_batch_norm cudnn_batch_norm"
)
_AFFINE = _words("Mul Add Sub Div mul add sub div")
_GATES = _words("Sigmoid HardSigmoid sigmoid hardsigmoid")
_PRODUCTS = _words("Mul mul")
_ACTIVATIONS = _words(
    "Relu LeakyRelu PRelu Sigmoid HardSigmoid HardSwish Clip Tanh Elu Selu Celu Gelu Silu Swish Mish Softplus Softsign "
    "ThresholdedRelu "
    "relu relu6 leaky_relu prelu sigmoid hardsigmoid hardswish hardtanh clamp clamp_min clamp_max tanh elu selu celu "
    "gelu silu mish softplus softsign threshold"
)
_ELEMENTWISE = _ACTIVATIONS | _words(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Cos Cosh Erf Exp Floor IsInf IsNaN Log "
    "Neg Not Reciprocal Round Shrink Sign Sin Sinh Sqrt Tan "
    "abs acos acosh asin asinh atan atanh bitwise_not ceil cos cosh erf exp expm1 floor log log1p log2 log10 "
    "logical_not neg reciprocal round rsqrt sign sin sinh sqrt square tan trunc "
    # With a number, or the tensor itself, for the other argument these have one tensor only.
    "Add Sub Mul Div Max Min Sum add sub mul div pow"
)
# Integers that are 64 bits wide are places and sizes.
_CODES = frozenset({"uint2", "int2", "uint4", "int4", "uint8", "int8", "int16", "uint16", "int32", "uint32"})
_LONG_KINDS = {
    "native_batch_norm_legit_no_training": "batch_norm",
    "native_layer_norm": "layer_norm",
    "native_group_norm": "group_norm",
    "native_dropout": "dropout",
}


def merge(graph: Graph, *, fuse: bool, in_place: bool) -> Graph:
    """Merge operators; the tensors between them disappear.

    Parameters
    ----------
    graph : Graph
    fuse : bool
        A convolution takes in the batch normalisation and per-channel scaling that follow it, and then one
        activation, each being the only reader of the tensor before it. What makes numbers of a weight's codes joins the
        one operator that reads them.
    in_place : bool
        An elementwise operator with one input tensor and an output of as many bytes joins the operator that
        makes its input, where it is that tensor's only reader. See the module for why this loses nothing.

    Returns
    -------
    Graph
        With the same program; a merged operator has the first one's name, the kinds joined by ``+``, all their
        ``nodes`` and the sum of their ``macs``. ``graph`` itself where there is nothing to merge.

    Examples
    --------
    >>> from retensor.graph.structure import Graph, Operator, Tensor
    >>> raw = Graph(
    ...     "net",
    ...     [Operator("c", "Conv", ("x", "w"), ("a",), macs=32), Operator("r", "Relu", ("a",), ("b",), macs=0)],
    ...     [Tensor("x", 8, "input"), Tensor("w", 4, "parameter"), Tensor("a", 8), Tensor("b", 8)],
    ...     ["b"],
    ... )
    >>> merge(raw, fuse=True, in_place=False).operators
    (Operator(name='c', kind='Conv+Relu', inputs=('x', 'w'), outputs=('b',), nodes=('c', 'r'), macs=32),)
    """
    work = _Work(graph)
    if fuse:
        for index in range(len(work.operators)):
            _fuse_from(work, index)
        _fuse_decoding(work)
    if in_place:
        for index in range(len(work.operators)):
            _run_in_place(work, index)
    return work.result()


def merged_kinds(graph: Graph) -> dict[str, int]:
    """How many operators of each merged kind there are, the most frequent first.

    >>> from retensor.graph.structure import Graph, Operator, Tensor
    >>> merged_kinds(Graph("net", [Operator("c", "Conv+Relu", (), ("y",))], [Tensor("y", 8)], ["y"]))
    {'Conv+Relu': 1}
    """
    return dict(Counter(operator.kind for operator in graph.operators if "+" in operator.kind).most_common())


def short_kind(kind: str) -> str:
    """An operator's kind for people: torch's names without namespace, overload and internal prefix.

    >>> short_kind("aten.conv2d.default+aten._native_batch_norm_legit_no_training.default+aten.relu.default")
    'conv2d+batch_norm+relu'
    >>> short_kind("aten.add.Tensor"), short_kind("Conv+Relu"), short_kind("aten.max_pool2d_with_indices.default")
    ('add', 'Conv+Relu', 'max_pool2d_with_indices')
    """
    return "+".join(_short_part(part) for part in kind.split("+"))


def _short_part(part: str) -> str:
    if not part.startswith("aten."):
        return part
    # An overload only says which arguments were numbers; an ONNX kind or one of a user's own has no such parts.
    name = part.removeprefix("aten.").split(".")[0].lstrip("_")
    return _LONG_KINDS.get(name, name) or part


@dataclass
class _Work:
    """A graph's operators while they are merged; None stands where one has joined another."""

    graph: Graph
    operators: list[Operator | None] = field(init=False)
    readers: dict[str, list[int]] = field(init=False)
    kept: set[str] = field(init=False)
    gone: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.operators = list(self.graph.operators)
        self.readers = {name: list(users) for name, users in self.graph.consumers.items()}
        self.kept = set(self.graph.outputs)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        return self.graph.tensors

    def only_reader(self, name: str) -> int | None:
        """The one operator that reads an activation which is no output of the network, or None."""
        users = self.readers[name]
        return users[0] if len(users) == 1 and name not in self.kept else None

    def activations(self, operator: Operator) -> list[str]:
        return [name for name in operator.inputs if self.tensors[name].role != "parameter"]

    def join(self, first: int, second: int) -> None:
        """Let operator ``first`` take in ``second``, which reads its outputs and otherwise parameters only."""
        head, tail = self.operators[first], self.operators[second]
        assert head is not None
        assert tail is not None
        between = [name for name in head.outputs if name in tail.inputs and self.readers[name] == [second]]
        between += [name for name in tail.outputs[1:] if not self.readers[name]]
        between = [name for name in between if name not in self.kept]
        inputs = dict.fromkeys(head.inputs + tuple(name for name in tail.inputs if name not in head.outputs))
        outputs = tuple(name for name in head.outputs + tail.outputs if name not in between)
        self.operators[first] = Operator(
            head.name,
            f"{head.kind}+{tail.kind}",
            tuple(inputs),
            outputs,
            (head.nodes or (head.name,)) + (tail.nodes or (tail.name,)),
            None if head.macs is None or tail.macs is None else head.macs + tail.macs,
        )
        self.operators[second] = None
        for name in tail.inputs:
            self.readers[name] = sorted({user for user in self.readers[name] if user != second} | {first})
        for name in head.outputs:
            self.readers[name] = [user for user in self.readers[name] if user != first]
        self.gone.update(between)

    def join_before(self, parts: list[int], second: int) -> None:
        """Let operator ``second`` take in those that make of parameters alone what it and they alone read."""
        tail = self.operators[second]
        assert tail is not None
        heads = [head for index in parts if (head := self.operators[index]) is not None]
        made = {name for head in heads for name in head.outputs}
        read = [name for operator in (*heads, tail) for name in operator.inputs if name not in made]
        first = [name for name in tail.inputs if name not in made]
        self.operators[second] = Operator(
            tail.name,
            f"decode+{tail.kind}",
            tuple(dict.fromkeys(first + read)),
            tail.outputs,
            tuple(node for operator in (*heads, tail) for node in operator.nodes or (operator.name,)),
            tail.macs,
        )
        gone = {*parts, second}
        for index in parts:
            self.operators[index] = None
        for name in read:
            self.readers[name] = sorted({user for user in self.readers[name] if user not in gone} | {second})
        for name in made:
            self.readers[name] = []
        self.gone |= made

    def result(self) -> Graph:
        if not self.gone:
            return self.graph
        tensors = [tensor for name, tensor in self.tensors.items() if name not in self.gone]
        aliases = {value: name for value, name in self.graph.aliases.items() if name not in self.gone}
        operators = [operator for operator in self.operators if operator is not None]
        graph = self.graph
        return Graph(graph.name, operators, tensors, graph.outputs, aliases, graph.options, graph.program)


def _plain(kind: str) -> str:
    """``aten.relu_.default`` as ``relu``; an ONNX kind as it is."""
    if not kind.startswith("aten."):
        return kind
    return kind.split(".")[1].rstrip("_")


def _fuse_from(work: _Work, index: int) -> None:
    """Let the convolution at ``index``, if it is one, take in what follows it."""
    head = work.operators[index]
    if head is None or _plain(head.kind) not in _CONVOLUTIONS or len(head.outputs) != 1:
        return
    while (follower := _follower(work, index)) is not None and _is_normalisation(work, follower[1]):
        work.join(index, follower[0])
    if (follower := _follower(work, index)) is not None and _plain(follower[1].kind) in _ACTIVATIONS:
        work.join(index, follower[0])
    elif (pair := _gate_and_product(work, index)) is not None:
        work.join(index, pair[0])
        work.join(index, pair[1])


def _follower(work: _Work, index: int) -> tuple[int, Operator] | None:
    """The only reader of the operator's only output, if that output is its only activation."""
    head = work.operators[index]
    if head is None or len(head.outputs) != 1:
        return None
    reader = work.only_reader(head.outputs[0])
    tail = None if reader is None else work.operators[reader]
    if reader is None or tail is None or work.activations(tail) != [head.outputs[0]]:
        return None
    # Further outputs (saved statistics) may be named but neither read nor hold anything.
    extra = tail.outputs[1:]
    if any(work.tensors[name].nbytes or work.readers[name] or name in work.kept for name in extra):
        return None
    return reader, tail


def _is_normalisation(work: _Work, operator: Operator) -> bool:
    kind = _plain(operator.kind)
    if kind in _NORMALISATIONS:
        return True
    if kind not in _AFFINE or len(operator.inputs) > 2 or len(operator.outputs) != 1:
        return False
    if len(operator.inputs) == 1:  # a number for the other argument, as torch has it
        return kind.islower()
    value, factor = operator.inputs
    if work.tensors[value].role == "parameter":
        value, factor = factor, value
        if kind in ("Sub", "Div", "sub", "div"):
            return False
    return _by_channel(work.tensors[factor].shape, work.tensors[operator.outputs[0]])


def _by_channel(shape: tuple[int, ...] | None, output: Tensor) -> bool:
    """Whether a parameter is one number, or one for each channel of an output ``N x C x ...``."""
    if shape is None or output.shape is None or len(output.shape) < 2 or len(shape) > len(output.shape):
        return False
    channels = output.shape[1]
    aligned = (1,) * (len(output.shape) - len(shape)) + shape
    if all(size == 1 or (axis == 1 and size == channels) for axis, size in enumerate(aligned)):
        return True
    # The tensor may be read through a view (C as Cx1x1); where C does not fit as the last dimension, it is.
    return shape == (channels,) and output.shape[-1] != channels


def _gate_and_product(work: _Work, index: int) -> tuple[int, int] | None:
    """``y * sigmoid(y)`` in two operators that are all that reads ``y``."""
    head = work.operators[index]
    if head is None or len(head.outputs) != 1 or head.outputs[0] in work.kept:
        return None
    value = head.outputs[0]
    users = work.readers[value]
    if len(users) != 2:
        return None
    for first, second in (users, users[::-1]):
        gate, product = work.operators[first], work.operators[second]
        if gate is None or product is None or len(gate.outputs) != 1 or len(product.outputs) != 1:
            continue
        if (
            _plain(gate.kind) in _GATES
            and _plain(product.kind) in _PRODUCTS
            and gate.inputs == (value,)
            and set(product.inputs) == {value, gate.outputs[0]}
            and work.only_reader(gate.outputs[0]) == second
        ):
            return first, second
    return None


def _fuse_decoding(work: _Work) -> None:
    """Let each operator take in what makes numbers of the codes that it alone reads."""
    codes: dict[str, bool] = {}  # of what is made of parameters alone, whether some of those are codes
    for operator in work.operators:
        # Products of weights with each other are work of their own.
        if operator is None or len(operator.outputs) != 1 or operator.macs or operator.outputs[0] in work.kept:
            continue
        if all(name in codes or work.tensors[name].role == "parameter" for name in operator.inputs):
            made = operator.outputs[0]
            codes[made] = any(codes.get(name, work.tensors[name].dtype in _CODES) for name in operator.inputs)
    owners: dict[int, int] = {}
    for index, operator in reversed(list(enumerate(work.operators))):
        if operator is None or not operator.outputs or operator.outputs[0] not in codes:
            continue
        readers = work.readers[operator.outputs[0]]
        found = {owners.get(reader, reader) for reader in readers}
        if len(found) == 1 and (codes[operator.outputs[0]] or any(reader in owners for reader in readers)):
            owners[index] = found.pop()
    parts: dict[int, list[int]] = {}
    for index in sorted(owners):
        parts.setdefault(owners[index], []).append(index)
    for second, first in parts.items():
        work.join_before(first, second)


def _run_in_place(work: _Work, index: int) -> None:
    """Let the operator at ``index`` take in the elementwise ones that write over its outputs."""
    merged = True
    while merged:
        merged = False
        head = work.operators[index]
        for name in head.outputs if head is not None else ():
            reader = work.only_reader(name)
            tail = None if reader is None else work.operators[reader]
            if (
                reader is not None
                and tail is not None
                and _plain(tail.kind) in _ELEMENTWISE
                and tail.inputs == (name,)
                and len(tail.outputs) == 1
                and work.tensors[tail.outputs[0]].nbytes == work.tensors[name].nbytes
            ):
                work.join(index, reader)
                merged = True
                break
