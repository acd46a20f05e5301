"""``retensor bounds``: how much scratchpad a network needs at all, and how much it needs for no traffic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.cli.arguments import (
    Alignment,
    Dtype,
    Fuse,
    InPlace,
    Input,
    Json,
    Model,
    Seed,
    TimeLimit,
    Weights,
    check_alignment,
    check_time_limit,
    load_model,
)
from retensor.cli.output import (
    describe_graph,
    describe_merges,
    exact_bytes,
    graph_counts,
    print_json,
    print_lines,
    print_table,
)
from retensor.cli.watch import watch

if TYPE_CHECKING:
    from retensor.planning import Bounds


def bounds(
    model: Model,
    weights: Weights = False,
    schedule: Annotated[bool, typer.Option("--schedule", help="Print the schedule that reaches M_P.")] = False,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: Alignment = 1,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Print M_R, M_P and M_H: the least scratchpad, the least without traffic, and halfway.

    M_R is what the largest operator needs for its inputs and outputs; nothing smaller can run. M_P is the
    least peak over all schedules. With --weights also M_Rp, M_Pp and M_Hp, parameters included.
    """
    check_time_limit(time_limit)
    check_alignment(alignment)
    graph = load_model(model, inputs, dtype, fuse, in_place)
    from retensor import planning

    found: list[Bounds] = []
    with watch("bounds") as seen:
        for parameters in (False, True) if weights else (False,):
            if seen.stopped:
                break
            found.append(
                planning.bounds(
                    graph,
                    parameters=parameters,
                    alignment=alignment,
                    time_limit=time_limit,
                    seed=seed,
                    progress=seen.progress,
                )
            )
    if json:
        content: dict[str, Any] = graph_counts(graph) | {"alignment": alignment}
        for limits in found:
            content |= bounds_to_json(limits)
        print_json(content)
        return
    print_lines(describe_graph(graph), describe_merges(graph), "")
    print_table(("bound", "what it is", "bytes"), [row for limits in found for row in _rows(limits)], left=2)
    if schedule:
        for limits in found:
            print_lines("", f"schedule that reaches M_P{'p' if limits.parameters else ''}:", *limits.order)


def bounds_to_json(limits: Bounds) -> dict[str, Any]:
    """The bounds under the names that ``--json`` promises; ``p`` marks those with parameters."""
    p = "p" if limits.parameters else ""
    return {
        f"m_r{p}_bytes": limits.m_r,
        f"m_r{p}_operator": limits.m_r_operator,
        f"m_p{p}_bytes": limits.m_p,
        f"m_p{p}_bound_bytes": limits.m_p_bound,
        f"m_h{p}_bytes": limits.m_h,
        f"schedule{'_with_parameters' if p else ''}": list(limits.order),
        f"seconds{'_with_parameters' if p else ''}": round(limits.seconds, 3),
    }


def _rows(limits: Bounds) -> list[tuple[str, str, str]]:
    p, weights = ("p", ", parameters included") if limits.parameters else ("", "")
    proved = "proved" if limits.m_p_bound >= limits.m_p else f"not proved: at least {limits.m_p_bound:,} B"
    return [
        (f"M_R{p}", f"largest operator{weights}: {limits.m_r_operator}", exact_bytes(limits.m_r)),
        (f"M_H{p}", "halfway", exact_bytes(limits.m_h)),
        (f"M_P{p}", f"least peak of any schedule{weights}, {proved}", exact_bytes(limits.m_p)),
    ]
