"""A network as operators and tensors of known size: what every planner and loader speaks.

A :class:`Tensor` here is a *storage*: bytes that exist once. Views and reshapes of it are other names
for the same bytes and appear in :attr:`Graph.aliases` only, never as operators.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from retensor.errors import GraphError
from retensor.files import brief, described
from retensor.units import whole

Role = Literal["activation", "input", "parameter"]
Bytes = npt.NDArray[np.uint8]
LARGEST_TENSOR = 2**50
MOST_MACS = 2**80


def quoted(name: object) -> str:
    """A name in quotation marks for a message: on one line, its middle left out where it is long.

    >>> quoted("conv\\n1")
    "'conv\\\\n1'"
    """
    return f"'{brief(name)}'"


def _check_text(name: object, what: str) -> None:
    if not isinstance(name, str):
        raise GraphError(f"{what} is {described(name, 60)}; a str is needed")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One storage.

    Attributes
    ----------
    name : str
    nbytes : int
        Bytes it takes; zero is allowed (an empty tensor).
    role : {"activation", "input", "parameter"}
        ``activation``: made by an operator. ``input``: comes from outside at each run.
        ``parameter``: a weight or constant.
    shape : tuple of int or None
        For people; planning uses ``nbytes`` only.
    dtype : str or None
        NumPy's name of the element type, for people and for execution.
    buffer : bool
        Of a ``parameter``: whether it is none in the sense of training (running statistics, constants of the
        program). Planning treats both alike; the cost sheet counts a buffer's bytes, not its elements.
    """

    name: str
    nbytes: int
    role: Role = "activation"
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    buffer: bool = False

    def __post_init__(self) -> None:
        _check_text(self.name, "a tensor's name")
        try:
            # Loaders and tools count in NumPy's integers too.
            object.__setattr__(self, "nbytes", whole(self.nbytes, f"the size of tensor {quoted(self.name)}"))
        except TypeError:
            raise GraphError(
                f"tensor {quoted(self.name)} has {described(self.nbytes, 40)} bytes; a whole number is needed"
            ) from None
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))
        if not isinstance(self.buffer, bool):
            raise GraphError(
                f"tensor {quoted(self.name)} has {described(self.buffer, 40)} for buffer; True or False is needed"
            )


@dataclass(frozen=True, slots=True)
class Operator:
    """One step of a schedule.

    Attributes
    ----------
    name : str
    kind : str
        What it computes (``"Conv"``); of a merged operator, its parts joined by ``+``.
    inputs, outputs : tuple of str
        Names of the tensors that lie in the scratchpad while it runs; parameters are among the inputs.
        A tensor used twice is named once.
    nodes : tuple of str
        The source model's nodes it stands for, in order; more than one where nodes were merged.
    macs : int or None
        Multiply-accumulates of one run, as :mod:`retensor.graph.arithmetic` counts them; None where they are not
        known.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    macs: int | None = None

    def __post_init__(self) -> None:
        _check_text(self.name, "an operator's name")
        _check_text(self.kind, f"the kind of operator {quoted(self.name)}")
        for field_name in ("inputs", "outputs", "nodes"):
            given = getattr(self, field_name)
            # Text is a sequence of letters, which is never what is meant.
            if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
                raise GraphError(
                    f"the {field_name} of operator {quoted(self.name)} are {described(given, 60)}; "
                    "a tuple of names is needed, as in ('x',)"
                )
            names = tuple(given)
            for name in names:
                _check_text(name, f"one of the {field_name} of operator {quoted(self.name)}")
            object.__setattr__(self, field_name, names)
        if self.macs is not None:
            try:
                count = whole(self.macs, "the count")
            except TypeError:
                count = -1
            if not 0 <= count <= MOST_MACS:
                raise GraphError(
                    f"operator {quoted(self.name)} has {described(self.macs, 40)} multiply-accumulates; "
                    "a whole number from 0 to 2**80 is needed, or None"
                )
            object.__setattr__(self, "macs", count)


class Program(Protocol):
    """What runs a graph's operators, for :func:`retensor.planning.execute`.

    All storages pass as flat ``uint8`` arrays of the tensor's bytes; the program knows their shapes.
    """

    def example_inputs(self, seed: int) -> dict[str, Bytes]:
        """Random bytes of every input tensor, valid for the model; keys are tensor names."""

    def parameter(self, name: str) -> Bytes:
        """Bytes of a parameter tensor."""

    def run_operator(
        self, operator: Operator, storages: Mapping[str, Bytes], keep_parameters: bool
    ) -> dict[str, Bytes]:
        """Run one operator on its input storages and return its output storages.

        With ``keep_parameters`` the parameters are not in ``storages`` and come from the program itself.
        """

    def run_plain(self, inputs: Mapping[str, Bytes]) -> dict[str, Bytes]:
        """Run the whole model the ordinary way; bytes of every output tensor."""


@dataclass(frozen=True)
class Graph:
    """A directed acyclic graph of operators over tensors, in a default program order.

    Parameters
    ----------
    name : str
    operators : sequence of Operator
        In an order that runs: each input is produced earlier, or is an ``input`` or ``parameter``.
    tensors : mapping of str to Tensor, or iterable of Tensor
    outputs : sequence of str
        Tensors whose bytes leave the network.
    aliases : mapping of str to str, optional
        Other names (views, reshapes) of a tensor's bytes: value name to tensor name.
    options : mapping, optional
        How it was loaded (``fuse``, ``in_place``, ``dtype``, ``inputs``), so that a plan can load it again.
    program : Program, optional
        What can run it; not part of the graph's identity.

    Raises
    ------
    GraphError
        Where names repeat or are unknown, sizes are negative, or the order does not run (a cycle).
    """

    name: str
    operators: tuple[Operator, ...]
    tensors: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    program: Program | None = field(default=None, compare=False, repr=False)

    def __init__(
        self,
        name: str,
        operators: Sequence[Operator],
        tensors: Mapping[str, Tensor] | Iterable[Tensor],
        outputs: Sequence[str],
        aliases: Mapping[str, str] | None = None,
        options: Mapping[str, Any] | None = None,
        program: Program | None = None,
    ) -> None:
        _check_text(name, "a graph's name")
        named = _all(tensors.values() if isinstance(tensors, Mapping) else tensors, Tensor, "tensors")
        operators = _all(operators, Operator, "operators")
        outputs = _all(outputs, str, "outputs")
        table = {tensor.name: tensor for tensor in named}
        if len(table) != len(named):
            raise GraphError(f"graph {quoted(name)} names a tensor twice")
        put = object.__setattr__
        put(self, "name", name)
        put(self, "operators", tuple(operators))
        put(self, "tensors", table)
        put(self, "outputs", tuple(dict.fromkeys(outputs)))
        put(self, "aliases", dict(aliases or {}))
        put(self, "options", dict(options or {}))
        put(self, "program", program)
        self._validate()

    def _validate(self) -> None:
        for tensor in self.tensors.values():
            if not 0 <= tensor.nbytes <= LARGEST_TENSOR:
                size = f"{tensor.nbytes:,}" if abs(tensor.nbytes) < 10**40 else "very many"
                raise GraphError(f"tensor {quoted(tensor.name)} has {size} bytes; 0 to 2**50 are allowed")
            if tensor.role not in get_args(Role):
                raise GraphError(
                    f"tensor {quoted(tensor.name)} has role {quoted(tensor.role)}; one of {get_args(Role)} is allowed"
                )
        if not self.operators:
            raise GraphError(f"graph {quoted(self.name)} has no operators")
        produced: set[str] = set()
        seen: set[str] = set()
        later = {output for operator in self.operators for output in operator.outputs}
        for operator in self.operators:
            if operator.name in seen:
                raise GraphError(f"two operators are named {quoted(operator.name)}")
            seen.add(operator.name)
            for group in (operator.inputs, operator.outputs):
                if len(set(group)) != len(group):
                    raise GraphError(
                        f"operator {quoted(operator.name)} names a tensor twice among its inputs or outputs"
                    )
            for tensor_name in operator.inputs:
                tensor = self._known(tensor_name, operator.name)
                if tensor.role == "activation" and tensor_name not in produced:
                    reason = (
                        "it is produced later: the graph has a cycle or is not in an order that runs"
                        if tensor_name in later
                        else "no operator produces it"
                    )
                    raise GraphError(
                        f"operator {quoted(operator.name)} reads tensor {quoted(tensor_name)}, but {reason}"
                    )
            for tensor_name in operator.outputs:
                tensor = self._known(tensor_name, operator.name)
                if tensor.role != "activation" or tensor_name in produced:
                    raise GraphError(
                        f"operator {quoted(operator.name)} writes tensor {quoted(tensor_name)}, "
                        "which has another source"
                    )
                produced.add(tensor_name)
        for tensor_name in self.outputs:
            tensor = self._known(tensor_name, "outputs")
            if tensor.role == "activation" and tensor_name not in produced:
                raise GraphError(f"no operator produces the network's output {quoted(tensor_name)}")

    def _known(self, tensor_name: str, where: str) -> Tensor:
        try:
            return self.tensors[tensor_name]
        except KeyError:
            raise GraphError(
                f"{quoted(where)} names tensor {quoted(tensor_name)}, which the graph does not have"
            ) from None

    @cached_property
    def producer(self) -> Mapping[str, int]:
        """Index of the operator that makes each activation."""
        return {name: i for i, operator in enumerate(self.operators) for name in operator.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[int, ...]]:
        """Indices of the operators that read each tensor, in program order."""
        table: dict[str, list[int]] = {name: [] for name in self.tensors}
        for i, operator in enumerate(self.operators):
            for name in operator.inputs:
                table[name].append(i)
        return {name: tuple(users) for name, users in table.items()}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the operators, tensors and outputs: what a plan is made for."""
        tensors = [[t.name, t.nbytes, t.role] for t in self.tensors.values()]
        operators = [[o.name, o.kind, o.inputs, o.outputs] for o in self.operators]
        canonical = json.dumps([sorted(tensors), operators, self.outputs], separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def operator_tensors(self, operator: Operator, parameters: bool) -> tuple[str, ...]:
        """Tensors that lie in the scratchpad while ``operator`` runs."""
        names = dict.fromkeys(operator.inputs + operator.outputs)
        if parameters:
            return tuple(names)
        return tuple(name for name in names if self.tensors[name].role != "parameter")


_Kind = TypeVar("_Kind")


def _all(given: Iterable[Any], kind: type[_Kind], what: str) -> list[_Kind]:
    """``given`` as a list, where it is an iterable of ``kind``."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise GraphError(f"a graph's {what} are {described(given, 60)}; a sequence of {kind.__name__} is needed")
    found = list(given)
    for entry in found:
        if not isinstance(entry, kind):
            raise GraphError(f"one of a graph's {what} is {described(entry, 60)}; each is of {kind.__name__}")
    return found
