"""Run a plan: the network's operators, one a step, on tensors that lie in one arena of bytes.

What the planner claims is done here for real. One flat array stands for the scratchpad and a table of
bytes for the memory off-chip, which holds the inputs and parameters and whatever was stored or spilled, and
nothing else. Bytes whose residency ended are poisoned, so that an operator that reads a tensor which should
have been gone gives wrong results rather than lucky ones. An operator is handed its own tensors only, as
views into the arena that it cannot write to. The outputs are compared with those of the plain model.

The poison is ``0xFF`` in every byte: not-a-number in float16, bfloat16, float32, float64 and the 8-bit
floats, -1 or the largest value in integers.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from retensor.errors import GraphError, PlanError
from retensor.graph.structure import Bytes, Graph, Operator, Program, Tensor
from retensor.planning.plan import Plan, Residency, Transfer
from retensor.planning.verify import verify

POISON = 0xFF
LARGEST_WHOLE_ARENA = 2**30
"""Scratchpads above this many bytes are allocated only up to the highest address that the plan uses."""

_BASE_ALIGNMENT = 64

Array = np.ndarray[Any, np.dtype[Any]]


@runtime_checkable
class _Decoding(Protocol):
    """A program that knows its outputs' names, types and shapes."""

    outputs: tuple[str, ...]

    def storage_of(self, value: str) -> str: ...

    def decode(self, value: str, storage: Bytes) -> Array: ...


@dataclass(frozen=True, eq=False, repr=False)
class Execution:
    """What came out of running a plan, and how it compares with the plain run.

    Attributes
    ----------
    outputs : dict of str to uint8 array
        Bytes of each output tensor, as they left the chip.
    reference : dict of str to uint8 array, or None
        The same from the plain model; None where no reference was asked for.
    bit_equal : bool or None
        Whether every output's bytes are those of the reference.
    max_abs_difference : float or None
        Largest ``|output - reference|`` of any element. Two not-a-numbers are equal; one alone, or unequal
        bytes of an element type that cannot be decoded, count as infinite.
    max_relative_difference : float or None
        Largest over the outputs of ``max |output - reference| / max |reference|``.
    bytes_in, bytes_out : int
        Bytes counted while running: loads and retrieves, stores and spills.
    peak_bytes : int
        One past the highest byte of the arena that held a tensor.
    arena_bytes : int
        Bytes of the arena.
    seconds : float
        Time of the planned run, without the plain one.
    """

    outputs: dict[str, Bytes]
    reference: dict[str, Bytes] | None
    bit_equal: bool | None
    max_abs_difference: float | None
    max_relative_difference: float | None
    bytes_in: int
    bytes_out: int
    peak_bytes: int
    arena_bytes: int
    seconds: float
    _arrays: Mapping[str, Array] = field(default_factory=dict)

    def __repr__(self) -> str:
        compared = {None: "not compared", True: "equal in every bit", False: "not equal in every bit"}[self.bit_equal]
        return (
            f"<Execution: {len(self.outputs)} output{'' if len(self.outputs) == 1 else 's'}, {compared}; "
            f"{self.bytes_in:,} bytes in, {self.bytes_out:,} out, peak {self.peak_bytes:,} of {self.arena_bytes:,}>"
        )

    def output_arrays(self) -> dict[str, Array]:
        """The outputs as arrays of numbers; :attr:`outputs` has the same as raw bytes.

        Returns
        -------
        dict of str to array
            In their types and shapes: of an ONNX model by its own output names, of a PyTorch module as ``output0``,
            ``output1``, ... in the order it returns them. Of another program without such names, the elements of
            each output tensor as they lie, flat. An element type that NumPy lacks comes as bits, bytes or float32.

        Examples
        --------
        >>> execute(graph, plan).output_arrays()["softmax"].argmax()  # doctest: +SKIP
        """
        return dict(self._arrays)


def _arrays(graph: Graph, outputs: Mapping[str, Bytes]) -> dict[str, Array]:
    program: Any = graph.program
    if isinstance(program, _Decoding):
        return {value: program.decode(value, outputs[program.storage_of(value)]) for value in program.outputs}
    flat = {name: decode(graph.tensors[name], value) for name, value in outputs.items()}
    return {name: outputs[name] if array is None else array for name, array in flat.items()}


def execute(
    graph: Graph,
    plan: Plan,
    *,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
    reference: bool = True,
) -> Execution:
    """Verify ``plan`` and run ``graph`` by it inside one arena of the scratchpad's bytes.

    Parameters
    ----------
    graph : Graph
        With a program, so loaded from a model at the model's own element type.
    plan : Plan
    inputs : mapping of str to array, optional
        The value of every input tensor, by tensor name or alias; of any element type, its bytes are taken.
        Random ones made from ``seed`` where left out.
    seed : int
    reference : bool
        Whether to run the plain model too and compare.

    Returns
    -------
    Execution

    Raises
    ------
    PlanError
        Where the plan is not valid for the graph, or the arena does not fit in this machine's memory.
    GraphError
        Where the graph has no program, or its program returns other tensors than the graph says.
    ValueError
        Where ``inputs`` misses a tensor, names an unknown one, or has another number of bytes.
    """
    checked = verify(graph, plan)
    program = graph.program
    if program is None:
        raise GraphError(
            f"graph '{graph.name}' cannot be run: it has no program, as a graph read from JSON or loaded at another "
            f"element type; load the model itself, at its own element type, and plan that"
        )
    given = program.example_inputs(seed) if inputs is None else inputs
    values = _input_bytes(graph, given)
    chip = _Chip(graph, plan, program, values, checked.peak_bytes)
    begin = time.perf_counter()
    chip.run()
    seconds = time.perf_counter() - begin
    outputs = {name: chip.fetch(name).copy() for name in graph.outputs}
    expected: dict[str, Bytes] | None = None
    bit_equal: bool | None = None
    absolute: float | None = None
    relative: float | None = None
    if reference:
        plain = program.run_plain({name: value.copy() for name, value in values.items()})
        expected = {name: _returned(graph.tensors[name], plain, "the plain run").copy() for name in graph.outputs}
        bit_equal = all(np.array_equal(outputs[name], expected[name]) for name in graph.outputs)
        pairs = [difference(graph.tensors[name], outputs[name], expected[name]) for name in graph.outputs]
        absolute = max((pair[0] for pair in pairs), default=0.0)
        relative = max((pair[1] for pair in pairs), default=0.0)
    return Execution(
        outputs,
        expected,
        bit_equal,
        absolute,
        relative,
        chip.bytes_in,
        chip.bytes_out,
        chip.peak_bytes,
        chip.arena.nbytes,
        seconds,
        _arrays(graph, outputs),
    )


def difference(tensor: Tensor, value: Bytes, expected: Bytes) -> tuple[float, float]:
    """Largest absolute difference of two values of ``tensor``, and the same relative to the largest expected.

    Examples
    --------
    >>> tensor = Tensor("y", 8, dtype="float32")
    >>> one, two = (np.array(v, np.float32).view(np.uint8) for v in ([1, 4], [1, 5]))
    >>> difference(tensor, one, two)
    (1.0, 0.2)
    """
    if np.array_equal(value, expected):
        return 0.0, 0.0
    decoded = decode(tensor, value), decode(tensor, expected)
    if decoded[0] is None or decoded[1] is None:
        return math.inf, math.inf
    # Long doubles hold every 64-bit integer exactly where the machine has them.
    wide = np.clongdouble if decoded[0].dtype.kind == "c" else np.longdouble
    a, b = decoded[0].astype(wide), decoded[1].astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    if same.all():
        return 0.0, 0.0
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(a - b)[~same]
    largest = float(np.max(np.where(np.isnan(gaps), np.inf, gaps)))
    magnitudes = np.abs(b)[np.isfinite(b)]
    scale = float(np.max(magnitudes)) if magnitudes.size else 0.0
    return largest, largest / scale if scale > 0 else math.inf


def decode(tensor: Tensor, value: Bytes) -> Array | None:
    """The elements of ``tensor`` in ``value``, flat; None where the element type is unknown to NumPy."""
    if tensor.dtype == "bfloat16":
        if value.nbytes % 2:
            return None
        # A bfloat16 is the upper half of a float32.
        return (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    try:
        dtype = np.dtype(tensor.dtype) if tensor.dtype is not None else None
    except TypeError:
        return None
    if dtype is None or dtype.kind not in "biufc" or value.nbytes % dtype.itemsize:
        return None
    return np.ascontiguousarray(value).view(dtype)


class _Chip:
    """The arena, the memory beside it, and what crossed between the two."""

    def __init__(self, graph: Graph, plan: Plan, program: Program, inputs: Mapping[str, Bytes], highest: int) -> None:
        self.graph, self.plan, self.program = graph, plan, program
        whole = plan.scratchpad_bytes <= LARGEST_WHOLE_ARENA
        self.arena = _arena(plan.scratchpad_bytes if whole else highest)
        self.off_chip: dict[str, Bytes] = dict(inputs)
        self.living: dict[str, Residency] = {}
        self.bytes_in = self.bytes_out = self.peak_bytes = 0

    def run(self) -> None:
        """Go through the plan's steps; the plan is known to be valid."""
        starting: dict[int, list[Residency]] = defaultdict(list)
        ending: dict[int, list[Residency]] = defaultdict(list)
        writes: dict[int, list[Transfer]] = defaultdict(list)
        reads: dict[int, list[Transfer]] = defaultdict(list)
        for stay in self.plan.residencies:
            starting[stay.start].append(stay)
            ending[stay.end].append(stay)
        for move in self.plan.transfers:
            (writes if move.kind in ("store", "spill") else reads)[move.step].append(move)
        operators = {operator.name: operator for operator in self.graph.operators}
        for step in range(len(self.plan.order) + 1):
            for move in writes[step]:
                self._write_out(move.tensor)
            for stay in ending[step]:
                self._poison(stay)
            for stay in starting[step]:
                self.living[stay.tensor] = stay
                self.peak_bytes = max(self.peak_bytes, stay.address + self.graph.tensors[stay.tensor].nbytes)
            for move in reads[step]:
                self._read_in(move.tensor)
            if step < len(self.plan.order):
                self._operate(operators[self.plan.order[step]])

    def fetch(self, name: str) -> Bytes:
        """Bytes of ``name`` off-chip; parameters are there from the start, in the program's own keeping."""
        if name not in self.off_chip and self.graph.tensors[name].role == "parameter":
            return _sized(self.graph.tensors[name], self.program.parameter(name), "the program's parameter")
        return self.off_chip[name]

    def _view(self, name: str) -> Bytes:
        address = self.living[name].address
        return self.arena[address : address + self.graph.tensors[name].nbytes]

    def _write_out(self, name: str) -> None:
        self.off_chip[name] = self._view(name).copy()
        self.bytes_out += self.off_chip[name].nbytes

    def _read_in(self, name: str) -> None:
        value = self.fetch(name)
        self._view(name)[:] = value
        self.bytes_in += value.nbytes

    def _poison(self, stay: Residency) -> None:
        # Everything outside living residencies was poisoned before, and nothing but them is ever written.
        self._view(stay.tensor)[:] = POISON
        del self.living[stay.tensor]

    def _operate(self, operator: Operator) -> None:
        storages: dict[str, Bytes] = {}
        for name in operator.inputs:
            if self.graph.tensors[name].role == "parameter" and not self.plan.parameters:
                continue
            view = self._view(name)
            view.flags.writeable = False
            storages[name] = view
        results = self.program.run_operator(operator, storages, keep_parameters=not self.plan.parameters)
        for name in operator.outputs:
            self._view(name)[:] = _returned(self.graph.tensors[name], results, f"operator '{operator.name}'")


def _arena(nbytes: int) -> Bytes:
    """``nbytes`` of poison whose first byte is aligned as kernels like it, so that runs repeat bit by bit."""
    try:
        room = np.full(nbytes + _BASE_ALIGNMENT, POISON, dtype=np.uint8)
    except (MemoryError, ValueError):
        raise PlanError(
            f"an arena of {nbytes:,} bytes does not fit in this machine's memory; plan for a smaller scratchpad"
        ) from None
    skip = -room.ctypes.data % _BASE_ALIGNMENT
    return room[skip : skip + nbytes]


def _input_bytes(graph: Graph, given: Mapping[str, Any]) -> dict[str, Bytes]:
    """A copy of the bytes of every input tensor; the caller's arrays are only read."""
    wanted = [tensor for tensor in graph.tensors.values() if tensor.role == "input"]
    named = {graph.aliases.get(name, name): value for name, value in given.items()}
    if len(named) != len(given):
        raise ValueError(f"two of the inputs {', '.join(map(repr, given))} are names of the same tensor; give it once")
    allowed = ", ".join(f"'{tensor.name}'" for tensor in wanted) or "none"
    for name in named:
        if name not in {tensor.name for tensor in wanted}:
            raise ValueError(f"'{name}' is not an input of graph '{graph.name}'; its inputs are {allowed}")
    values: dict[str, Bytes] = {}
    for tensor in wanted:
        if tensor.name not in named:
            raise ValueError(f"input '{tensor.name}' is missing; the inputs of graph '{graph.name}' are {allowed}")
        array = np.asarray(named[tensor.name])
        if array.dtype.hasobject:
            raise ValueError(f"input '{tensor.name}' is an array of Python objects; give one of numbers")
        if array.nbytes != tensor.nbytes:
            raise ValueError(
                f"input '{tensor.name}' has {array.nbytes:,} bytes ({array.dtype}, shape {array.shape}); the graph "
                f"takes {tensor.nbytes:,} ({tensor.dtype or 'unknown type'}, shape {tensor.shape})"
            )
        values[tensor.name] = np.frombuffer(array.tobytes(), dtype=np.uint8)
    return values


def _returned(tensor: Tensor, results: Mapping[str, Bytes], source: str) -> Bytes:
    if tensor.name not in results:
        raise GraphError(f"{source} did not return tensor '{tensor.name}'")
    return _sized(tensor, results[tensor.name], source)


def _sized(tensor: Tensor, value: Bytes, source: str) -> Bytes:
    if value.dtype != np.uint8 or value.shape != (tensor.nbytes,):
        raise GraphError(
            f"{source} gave {value.nbytes:,} bytes of {value.dtype} for tensor '{tensor.name}'; "
            f"the graph says {tensor.nbytes:,} flat bytes"
        )
    return value
