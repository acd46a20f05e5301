"""A plan in the graph's own names, from what a search or a baseline decided on the whole problem."""

from __future__ import annotations

from collections.abc import Sequence

from retensor.errors import PlanError
from retensor.graph.structure import Graph
from retensor.planning.plan import Accelerator, Plan, Residency, Transfer
from retensor.planning.problem import Problem
from retensor.planning.residency import Stay, join_idle_moves, steps_of


def sequence_of(graph: Graph, names: Sequence[str]) -> tuple[int, ...]:
    """Operator indices of a schedule given by names.

    Raises
    ------
    PlanError
        Where the names are not the graph's operators, each once, in an order that runs.
    """
    index = {operator.name: i for i, operator in enumerate(graph.operators)}
    if len(names) != len(index) or set(names) != set(index):
        wrong = next((n for n in names if n not in index), None)
        reason = f"'{wrong}' is no operator of it" if wrong else "it must name each operator once"
        raise PlanError(f"the order given does not fit graph '{graph.name}': {reason}")
    sequence = tuple(index[name] for name in names)
    step = steps_of(sequence)
    for name, producer in graph.producer.items():
        for consumer in graph.consumers[name]:
            if step[consumer] <= step[producer]:
                raise PlanError(
                    f"the order given runs '{graph.operators[consumer].name}' before "
                    f"'{graph.operators[producer].name}', which makes its input '{name}'"
                )
    return sequence


def finish(
    graph: Graph,
    accelerator: Accelerator,
    scratchpad: int,
    parameters: bool,
    problem: Problem,
    order: tuple[int, ...],
    stays: Sequence[Stay],
    addresses: Sequence[int],
    transient_addresses: Sequence[Sequence[int]],
    *,
    bound: int,
    solver: str,
    seconds: float,
    fixed_order: bool,
) -> Plan:
    """A :class:`Plan` in the graph's names, from what a search decided on the whole problem."""
    step = steps_of(order)
    stays, addresses = join_idle_moves(stays, addresses)
    residencies = [
        Residency(problem.items[s.item].name, s.start, s.end, address)
        for s, address in zip(stays, addresses, strict=True)
    ]
    for operator, row in enumerate(problem.transients):
        for (name, _), address in zip(row, transient_addresses[operator], strict=True):
            residencies.append(Residency(name, step[operator], step[operator] + 1, address))
    residencies.sort(key=lambda r: (r.start, r.address, r.tensor))
    names = tuple(graph.operators[problem.operators[o]].name for o in order)
    ordered = tuple(residencies)
    transfers = transfers_of(graph, names, ordered)
    return Plan(
        graph_name=graph.name,
        graph_digest=graph.digest,
        scratchpad_bytes=scratchpad,
        alignment=accelerator.alignment,
        parameters=parameters,
        order=names,
        residencies=ordered,
        transfers=transfers,
        bound_bytes=bound,
        solver=solver,
        seconds=seconds,
        fixed_order=fixed_order,
        graph_options=dict(graph.options),
    )


def transfers_of(graph: Graph, order: tuple[str, ...], residencies: tuple[Residency, ...]) -> tuple[Transfer, ...]:
    """The transfers that a set of residencies implies, writes as early as the first residency ends."""
    step_of = {name: step for step, name in enumerate(order)}
    by_tensor: dict[str, list[Residency]] = {}
    for residency in residencies:
        by_tensor.setdefault(residency.tensor, []).append(residency)
    outputs = set(graph.outputs)
    transfers: list[Transfer] = []
    for name, stays in by_tensor.items():
        tensor = graph.tensors[name]
        stays.sort(key=lambda residency: residency.start)
        made_here = tensor.role == "activation"
        if not made_here:
            transfers.append(Transfer(name, "load", stays[0].start, tensor.nbytes))
        elif name in outputs:
            transfers.append(Transfer(name, "store", stays[0].end, tensor.nbytes))
        elif len(stays) > 1:
            transfers.append(Transfer(name, "spill", stays[0].end, tensor.nbytes))
        if made_here and stays[0].start != step_of[graph.operators[graph.producer[name]].name]:
            raise AssertionError(f"first residency of '{name}' does not start at its producer")
        transfers += [Transfer(name, "retrieve", stay.start, tensor.nbytes) for stay in stays[1:]]
    # At one step writes come before reads, so that a retrieve may follow its own spill.
    transfers.sort(key=lambda t: (t.step, t.kind in ("load", "retrieve"), t.tensor))
    return tuple(transfers)
