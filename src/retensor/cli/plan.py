"""``retensor plan``: the plan with the least off-chip traffic, as a table, a file, a page and a picture."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.cli.arguments import (
    Chip,
    ChipAlignment,
    Dtype,
    Fuse,
    InPlace,
    Input,
    Json,
    Model,
    Scratchpad,
    Seed,
    TimeLimit,
    Weights,
    check_outputs,
    check_time_limit,
    chosen_accelerator,
    load_model,
)
from retensor.cli.compare import Comparison, compare_with_baselines, comparison_to_json, print_comparison, resolve
from retensor.cli.output import (
    describe_graph,
    describe_merges,
    exact_bytes,
    graph_counts,
    order_to_json,
    percent,
    plural,
    print_json,
    print_lines,
    print_table,
)
from retensor.cli.watch import watch

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.plan import Plan


class Order(StrEnum):
    """Whether the planner chooses the order of the operators or keeps the model's."""

    free = "free"
    default = "default"


def plan(
    model: Model,
    scratchpad: Scratchpad = None,
    chip: Chip = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the plan as JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page with the plan drawn, as HTML.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the plan, as .svg or .png.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Set the baselines beside it, which takes extra time; so does --report.")
    ] = False,
    weights: Weights = False,
    order: Annotated[Order, typer.Option("--order", help="Choose the best order, or keep the model's.")] = Order.free,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: ChipAlignment = None,
    time_limit: TimeLimit = 60.0,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, max=1024, help="Threads of the solver; default all cores.")
    ] = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find the order, addresses and evictions with the least off-chip traffic, and prove it or state the gap.

    Ctrl-C keeps the best plan so far, with its gap. The baselines of --compare and --report are four (two
    schedules by two eviction policies), placed in advance; retensor compare shows a second placement too.
    """
    check_time_limit(time_limit)
    check_outputs(
        model,
        {"-o": output, "--report": report, "--picture": picture},
        {"--report": (".html", ".htm"), "--picture": (".svg", ".png")},
    )
    from retensor import planning

    accelerator = chosen_accelerator(scratchpad, chip, alignment)
    assert accelerator is not None
    graph = load_model(model, inputs, dtype, fuse, in_place)
    with watch("planning") as seen:
        accelerator, limits = resolve(
            graph, accelerator, parameters=weights, time_limit=time_limit, seed=seed, progress=seen.progress
        )
        found = planning.plan(
            graph,
            accelerator,
            parameters=weights,
            order=None if order is Order.free else order.value,
            time_limit=time_limit,
            seed=seed,
            workers=workers,
            progress=seen.progress,
        )
    # First of all: what follows may be stopped without losing the plan.
    if output is not None:
        planning.write_plan(found, output)
    beside: Comparison | None = None
    if (compare or report is not None) and not seen.stopped:
        beside = compare_with_baselines(graph, accelerator, found, limits=limits, time_limit=time_limit, seed=seed)
    if report is not None:
        planning.write_report(
            report, graph, found, beside.named if beside else (), bounds=beside.bounds if beside else None
        )
    if picture is not None:
        planning.plot_plan(picture, graph, found)
    written = {"plan": output, "report": report, "picture": picture}
    if json:
        content = plan_summary(graph, found, seen.stopped) | {
            "caveats": planning.caveats(accelerator, dtype),
            "files": {kind: str(path) for kind, path in written.items() if path is not None},
        }
        if beside is not None:
            content["baselines"] = comparison_to_json(found, beside)
        print_json(content)
        return
    print_lines(describe_graph(graph), describe_merges(graph), "")
    print_plan(found, seen.stopped)
    told = planning.caveats(accelerator, dtype)
    if told:
        print_lines("", *told)
    if beside is not None:
        print_lines("")
        print_comparison(found, beside)
    paths = [f"wrote {path}" for path in written.values() if path is not None]
    if paths:
        print_lines("", *paths)


def plan_summary(graph: Graph, found: Plan, stopped: bool = False) -> dict[str, Any]:
    """The one object of ``--json``."""
    counts = {
        kind: sum(1 for t in found.transfers if t.kind == kind) for kind in ("load", "store", "spill", "retrieve")
    }
    return graph_counts(graph) | {
        "status": found.status,
        "stopped": stopped,
        "scratchpad_bytes": found.scratchpad_bytes,
        "alignment": found.alignment,
        "parameters": found.parameters,
        "order": "given" if found.fixed_order else "free",
        **order_to_json(found),
        "compulsory_bytes": found.compulsory_bytes,
        "non_compulsory_bytes": found.non_compulsory_bytes,
        "bound_bytes": found.bound_bytes,
        "gap": found.gap,
        "transfers": counts,
        "solver": found.solver,
        "seconds": round(found.seconds, 3),
    }


def print_plan(found: Plan, stopped: bool = False) -> None:
    """The plan's figures, one a line."""
    spills = sum(1 for transfer in found.transfers if transfer.kind == "spill")
    retrieves = sum(1 for transfer in found.transfers if transfer.kind == "retrieve")
    order = " for the given order" if found.fixed_order else ""
    if found.status == "optimal":
        verdict = f"optimal{order}, proved"
    else:
        verdict = f"best found{order}{' before Ctrl-C' if stopped else ''}; gap {percent(found.gap)}"
    print_table(
        ("plan", ""),
        [
            ("status", verdict),
            ("scratchpad", exact_bytes(found.scratchpad_bytes)),
            ("non-compulsory", exact_bytes(found.non_compulsory_bytes)),
            ("  by", f"{plural(spills, 'spill')}, {plural(retrieves, 'retrieve')}"),
            (f"proved bound{order}", exact_bytes(found.bound_bytes)),
            ("compulsory", exact_bytes(found.compulsory_bytes)),
            ("time", f"{found.seconds:.2f} s ({found.solver})"),
        ],
        left=2,
    )
