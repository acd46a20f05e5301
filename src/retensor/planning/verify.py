"""Replay a plan against its graph: every rule of the scratchpad checked, every byte counted again.

The verifier shares no code with the planner. It keeps the little a chip would know (what lies where, what
has a copy off-chip) and goes through the steps in time order; the first thing that a chip could not do, or
that the rules of counting forbid, is named with its step, operator, tensor and addresses.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NoReturn

from retensor.errors import PlanError
from retensor.files import described
from retensor.graph.structure import Graph, Operator, quoted
from retensor.planning.plan import Plan, Residency, Transfer


@dataclass(frozen=True, slots=True)
class Verification:
    """What a replay of a valid plan counted.

    Attributes
    ----------
    compulsory_bytes : int
        Bytes of first loads of inputs and parameters and of stores of outputs.
    non_compulsory_bytes : int
        Bytes of spills and retrieves.
    peak_bytes : int
        One past the highest byte address that any tensor takes.
    steps : int
        Operators run.
    """

    compulsory_bytes: int
    non_compulsory_bytes: int
    peak_bytes: int
    steps: int


def verify(graph: Graph, plan: Plan) -> Verification:
    """Replay ``plan`` step by step from its residencies and transfers and ``graph`` alone.

    At each step writes (spill, store) come first, then residencies end, then residencies start with their
    reads (load, retrieve), then the operator runs on tensors that all lie in the scratchpad.

    Parameters
    ----------
    graph : Graph
    plan : Plan

    Returns
    -------
    Verification

    Raises
    ------
    PlanError
        Names the first rule that the plan breaks. Nothing else is raised, whatever the plan's values.
    TypeError
        Where they are no graph and plan.

    Examples
    --------
    >>> from retensor.graph import Graph, Operator, Tensor
    >>> from retensor.planning.plan import Plan, Residency, Transfer
    >>> tensors = [Tensor("x", 4, "input"), Tensor("y", 4)]
    >>> graph = Graph("one", [Operator("relu", "Relu", ("x",), ("y",))], tensors, ["y"])
    >>> stays = (Residency("x", 0, 1, 0), Residency("y", 0, 1, 4))
    >>> moves = (Transfer("x", "load", 0, 4), Transfer("y", "store", 1, 4))
    >>> plan = Plan("one", graph.digest, 8, 1, False, ("relu",), stays, moves, 0, "by hand", 0.0)
    >>> verify(graph, plan)
    Verification(compulsory_bytes=8, non_compulsory_bytes=0, peak_bytes=8, steps=1)
    """
    given: tuple[object, object] = (graph, plan)
    if not hasattr(given[0], "operator_tensors") or not hasattr(given[1], "residencies"):
        kinds = " and ".join(type(one).__name__ for one in given)
        raise TypeError(f"verify takes a Graph and a Plan, in this order, not {kinds}")
    _check_header(graph, plan)
    operators = _check_order(graph, plan)
    _check_residencies(graph, plan, len(operators))
    _check_transfers(graph, plan, len(operators))
    replay = _Replay(graph, plan, operators)
    replay.run()
    if plan.bound_bytes < 0:
        raise PlanError(f"the plan's lower bound is {_n(plan.bound_bytes)} bytes; a bound is zero or more")
    if plan.bound_bytes > replay.non_compulsory:
        raise PlanError(
            f"the plan claims a lower bound of {_n(plan.bound_bytes)} non-compulsory bytes but itself moves "
            f"{replay.non_compulsory:,}: the bound is wrong"
        )
    peak = max((stay.address + graph.tensors[stay.tensor].nbytes for stay in plan.residencies), default=0)
    return Verification(replay.compulsory, replay.non_compulsory, peak, len(operators))


def _n(count: int) -> str:
    """``count`` for a sentence; a plan's integers have no limit, and Python refuses to print very long ones."""
    return f"{count:,}" if abs(count) < 10**30 else "over 10**30" if count > 0 else "under -10**30"


def _check_header(graph: Graph, plan: Plan) -> None:
    rows: list[tuple[str, Any, tuple[object, ...]]] = [
        ("residency", stay, (stay.start, stay.end, stay.address)) for stay in plan.residencies
    ]
    rows += [("transfer", move, (move.step, move.nbytes)) for move in plan.transfers]
    for what, row, numbers in rows:
        if not isinstance(row.tensor, str) or not all(isinstance(number, int) for number in numbers):
            raise PlanError(f"a {what} is of a tensor's name and whole numbers, not {described(row, 100)}")
    if plan.graph_digest != graph.digest:
        raise PlanError(
            f"the plan was made for another graph: it names {quoted(plan.graph_name)} with digest "
            f"{str(plan.graph_digest)[:12]}, this is {quoted(graph.name)} with digest {graph.digest[:12]}; "
            f"load the graph with the options the plan was made with, or plan this one"
        )
    if plan.scratchpad_bytes < 1:
        raise PlanError(f"the plan's scratchpad has {_n(plan.scratchpad_bytes)} bytes; at least 1 is allowed")
    if plan.alignment < 1:
        raise PlanError(f"the plan's alignment is {_n(plan.alignment)} bytes; at least 1 is allowed")


def _check_order(graph: Graph, plan: Plan) -> list[Operator]:
    """The operators in the plan's order, which must name each once and respect every dependency."""
    known = {operator.name: operator for operator in graph.operators}
    step_of: dict[str, int] = {}
    for step, name in enumerate(plan.order):
        if name not in known:
            raise PlanError(f"step {step}: the plan runs operator {quoted(name)}, which the graph does not have")
        if name in step_of:
            raise PlanError(f"step {step}: operator {quoted(name)} runs a second time; it ran at step {step_of[name]}")
        step_of[name] = step
    for name in known:
        if name not in step_of:
            raise PlanError(f"operator {quoted(name)} is missing from the plan's order")
    operators = [known[name] for name in plan.order]
    for step, operator in enumerate(operators):
        for tensor in operator.inputs:
            maker = graph.producer.get(tensor)
            if maker is not None and step_of[graph.operators[maker].name] >= step:
                raise PlanError(
                    f"step {step} (operator {quoted(operator.name)}): reads tensor {quoted(tensor)} before operator "
                    f"{quoted(graph.operators[maker].name)} makes it at step {step_of[graph.operators[maker].name]}"
                )
    return operators


def _check_name(graph: Graph, plan: Plan, tensor: str, what: str) -> None:
    if tensor not in graph.tensors:
        raise PlanError(f"{what} names tensor {quoted(tensor)}, which the graph does not have")
    if graph.tensors[tensor].role == "parameter" and not plan.parameters:
        raise PlanError(f"{what} names parameter {quoted(tensor)}, but the plan is for activations only")


def _check_residencies(graph: Graph, plan: Plan, steps: int) -> None:
    """Each residency by itself: known tensor, steps in range, address aligned and inside the scratchpad."""
    for stay in plan.residencies:
        _check_name(graph, plan, stay.tensor, "a residency")
        what = f"tensor {quoted(stay.tensor)} in steps {_n(stay.start)} to {_n(stay.end)} at address {_n(stay.address)}"
        if not 0 <= stay.start < stay.end <= steps:
            raise PlanError(f"{what}: a residency starts at step 0 or later, before it ends, and ends by step {steps}")
        if stay.address < 0:
            raise PlanError(f"{what}: addresses start at 0")
        if stay.address % plan.alignment:
            raise PlanError(f"{what}: the address is not a multiple of the alignment, {_n(plan.alignment)}")
        end = stay.address + graph.tensors[stay.tensor].nbytes
        if end > plan.scratchpad_bytes:
            raise PlanError(f"{what}: it ends at byte {_n(end)}, the scratchpad has {_n(plan.scratchpad_bytes)}")


def _check_transfers(graph: Graph, plan: Plan, steps: int) -> None:
    """Each transfer by itself: known tensor and kind, step in range, the tensor's own bytes."""
    for transfer in plan.transfers:
        _check_name(graph, plan, transfer.tensor, "a transfer")
        what = f"the {transfer.kind} of tensor {quoted(transfer.tensor)} at step {_n(transfer.step)}"
        if transfer.kind not in ("load", "store", "spill", "retrieve"):
            raise PlanError(f"{what}: kinds are load, store, spill and retrieve")
        if not 0 <= transfer.step <= steps:
            raise PlanError(f"{what}: transfers happen at steps 0 to {steps}")
        nbytes = graph.tensors[transfer.tensor].nbytes
        if transfer.nbytes != nbytes:
            raise PlanError(f"{what}: it moves {_n(transfer.nbytes)} bytes, the tensor has {_n(nbytes)}")


class _Replay:
    """The state of the chip between two steps, and the bytes that crossed its edge so far."""

    def __init__(self, graph: Graph, plan: Plan, operators: list[Operator]) -> None:
        self.graph, self.plan, self.operators = graph, plan, operators
        self.outputs = frozenset(graph.outputs)
        self.compulsory = self.non_compulsory = 0
        self.resident: dict[str, Residency] = {}
        self.left: dict[str, Residency] = {}  # residencies that ended at the present step
        self.seen: set[str] = set()  # tensors that have been in the scratchpad
        self.copied: dict[str, Transfer] = {}  # the one write off-chip of each tensor that had one
        self.wanted_back: set[str] = set()  # tensors retrieved so far
        # The living byte ranges, disjoint and in address order: parallel lists, so that bisect finds neighbours.
        self.range_starts: list[int] = []
        self.range_owners: list[Residency] = []
        self.starting: dict[int, list[Residency]] = defaultdict(list)
        self.ending: dict[int, list[Residency]] = defaultdict(list)
        self.writes: dict[int, list[Transfer]] = defaultdict(list)
        self.reads: dict[int, list[Transfer]] = defaultdict(list)
        for stay in plan.residencies:
            self.starting[stay.start].append(stay)
            self.ending[stay.end].append(stay)
        for transfer in plan.transfers:
            table = self.writes if transfer.kind in ("store", "spill") else self.reads
            table[transfer.step].append(transfer)

    def run(self) -> None:
        for step, operator in enumerate(self.operators):
            self._cross(step)
            for tensor in self.graph.operator_tensors(operator, self.plan.parameters):
                if tensor not in self.resident:
                    verb = "writes" if tensor in operator.outputs else "reads"
                    self._fail(step, f"{verb} tensor {quoted(tensor)}, which is not in the scratchpad")
        self._cross(len(self.operators))
        for tensor in self.graph.outputs:
            if self.graph.tensors[tensor].role == "activation" and tensor not in self.copied:
                self._fail(len(self.operators), f"output {quoted(tensor)} was never stored")
        for tensor, transfer in self.copied.items():
            if transfer.kind == "spill" and tensor not in self.wanted_back:
                self._fail(transfer.step, f"pointless spill of tensor {quoted(tensor)}: it is never retrieved")

    def _cross(self, step: int) -> None:
        """What happens between two operators: writes, then ends, then starts with their reads."""
        for transfer in self.writes.get(step, ()):
            self._write(step, transfer)
        self.left.clear()
        for stay in self.ending.get(step, ()):
            self._release(stay)
        reads: dict[str, Transfer] = {}
        for transfer in self.reads.get(step, ()):
            if transfer.tensor in reads:
                self._fail(step, f"tensor {quoted(transfer.tensor)} is read from off-chip twice")
            reads[transfer.tensor] = transfer
        for stay in self.starting.get(step, ()):
            self._start(step, stay, reads.pop(stay.tensor, None))
        for transfer in reads.values():
            self._fail(step, f"the {transfer.kind} of tensor {quoted(transfer.tensor)} starts no residency")

    def _write(self, step: int, transfer: Transfer) -> None:
        tensor, nbytes = transfer.tensor, transfer.nbytes
        if self.graph.tensors[tensor].role != "activation":
            self._fail(
                step, f"{transfer.kind} of {quoted(tensor)}, which is an input or parameter and has a copy off-chip"
            )
        if transfer.kind == "spill" and tensor in self.outputs:
            self._fail(step, f"spill of {quoted(tensor)}, which is an output: its one write is a store")
        if transfer.kind == "store" and tensor not in self.outputs:
            self._fail(step, f"store of {quoted(tensor)}, which is not an output of the network")
        if tensor in self.copied:
            first = self.copied[tensor]
            self._fail(
                step, f"tensor {quoted(tensor)} is written off-chip again; its {first.kind} was at step {first.step}"
            )
        # Neither ends nor starts of this step have happened yet: what is resident now is valid.
        if tensor not in self.resident:
            self._fail(step, f"{transfer.kind} of tensor {quoted(tensor)}, which is not in the scratchpad then")
        self.copied[tensor] = transfer
        if transfer.kind == "store":
            self.compulsory += nbytes
        else:
            self.non_compulsory += nbytes

    def _start(self, step: int, stay: Residency, read: Transfer | None) -> None:
        tensor = stay.tensor
        if tensor in self.resident:
            other = self.resident[tensor]
            where = f"at address {_n(other.address)} until step {_n(other.end)}"
            self._fail(
                step, f"tensor {quoted(tensor)} starts at address {_n(stay.address)} while it still lies {where}"
            )
        if tensor in self.left and self.left[tensor].address == stay.address:
            self._fail(
                step, f"tensor {quoted(tensor)} leaves and returns at the same address {_n(stay.address)}: join the two"
            )
        self._take(step, stay)
        if tensor not in self.seen and self.graph.tensors[tensor].role == "activation":
            self._made(step, stay, read)
        elif tensor not in self.seen:
            if read is None or read.kind != "load":
                self._fail(step, f"the first residency of tensor {quoted(tensor)} starts without a load")
            self.compulsory += read.nbytes
        else:
            if read is None or read.kind != "retrieve":
                self._fail(step, f"a further residency of tensor {quoted(tensor)} starts without a retrieve")
            if self.graph.tensors[tensor].role == "activation" and tensor not in self.copied:
                self._fail(step, f"retrieve of tensor {quoted(tensor)}, which has no copy off-chip by then")
            self.non_compulsory += read.nbytes
            self.wanted_back.add(tensor)
        self.seen.add(tensor)
        self.resident[tensor] = stay

    def _made(self, step: int, stay: Residency, read: Transfer | None) -> None:
        """The first residency of an activation: at its producer's step, and not by a transfer."""
        tensor = stay.tensor
        if read is not None:
            self._fail(step, f"{read.kind} of tensor {quoted(tensor)}, which was not made yet")
        if step >= len(self.operators) or tensor not in self.operators[step].outputs:
            maker = self.graph.producer.get(tensor)
            by = (
                "no operator makes it"
                if maker is None
                else f"operator {quoted(self.graph.operators[maker].name)} makes it"
            )
            self._fail(
                step, f"the first residency of tensor {quoted(tensor)} starts at a step that does not produce it ({by})"
            )

    def _take(self, step: int, stay: Residency) -> None:
        """Mark the bytes of ``stay`` as taken; they must all be free."""
        nbytes = self.graph.tensors[stay.tensor].nbytes
        if nbytes == 0:
            return
        at = bisect_left(self.range_starts, stay.address)
        # The living ranges are disjoint, so only the two neighbours can overlap.
        for neighbour in self.range_owners[max(at - 1, 0) : at + 1]:
            end = neighbour.address + self.graph.tensors[neighbour.tensor].nbytes
            if neighbour.address < stay.address + nbytes and stay.address < end:
                here = f"tensor {quoted(stay.tensor)} at addresses {_n(stay.address)} to {_n(stay.address + nbytes)}"
                there = f"tensor {quoted(neighbour.tensor)} at {_n(neighbour.address)} to {_n(end)}"
                self._fail(step, f"{here} overlaps {there}")
        self.range_starts.insert(at, stay.address)
        self.range_owners.insert(at, stay)

    def _release(self, stay: Residency) -> None:
        del self.resident[stay.tensor]
        self.left[stay.tensor] = stay
        if self.graph.tensors[stay.tensor].nbytes:
            at = bisect_left(self.range_starts, stay.address)
            del self.range_starts[at], self.range_owners[at]

    def _fail(self, step: int, sentence: str) -> NoReturn:
        if step < len(self.operators):
            raise PlanError(f"step {step} (operator {quoted(self.operators[step].name)}): {sentence}")
        raise PlanError(f"after the last step: {sentence}")
