"""``retensor sweep``: traffic and its proved bound as the scratchpad shrinks, as a table and a curve."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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
    check_outputs,
    check_time_limit,
    load_model,
)
from retensor.cli.output import bar, describe_graph, describe_merges, graph_counts, print_json, print_lines, print_table
from retensor.cli.watch import watch


def sweep(
    model: Model,
    points: Annotated[int, typer.Option("--points", help="How many budgets, M_P and M_R included.")] = 9,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the curve, as .svg or .png.")
    ] = None,
    weights: Weights = False,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: Alignment = 1,
    time_limit: TimeLimit = 60.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Plan for scratchpads from M_P, the least without traffic, down to M_R, the least that runs.

    The time limit is for each of them. Ctrl-C keeps the points planned so far.
    """
    check_time_limit(time_limit)
    check_alignment(alignment)
    check_outputs(model, {"--picture": picture}, {"--picture": (".svg", ".png")})
    from retensor.planning.sweep import check_points, settle, sweep_points

    check_points(points)
    graph = load_model(model, inputs, dtype, fuse, in_place)
    found = []
    with watch("sweeping") as seen:
        for point in sweep_points(
            graph,
            points=points,
            parameters=weights,
            alignment=alignment,
            time_limit=time_limit,
            seed=seed,
            progress=seen.progress,
        ):
            found.append(point)
            if seen.stopped:
                break
    curve = settle(found)
    if picture is not None:
        from retensor.planning import plot_sweep

        plot_sweep(picture, curve, title=f"{graph.name}: off-chip traffic by scratchpad")
    if json:
        rows = [asdict(point) | {"seconds": round(point.seconds, 3)} for point in curve]
        print_json(
            graph_counts(graph)
            | {"parameters": weights, "alignment": alignment, "stopped": seen.stopped, "points": rows}
        )
        return
    most = max(point.non_compulsory_bytes for point in curve)
    print_lines(describe_graph(graph), describe_merges(graph), "")
    print_table(
        ("traffic", "", "scratchpad", "non-compulsory bytes", "proved bound", "time"),
        [
            (
                bar(point.non_compulsory_bytes, most),
                "optimal" if point.status == "optimal" else "best found",
                f"{point.scratchpad_bytes:,}",
                f"{point.non_compulsory_bytes:,}",
                f"{point.bound_bytes:,}",
                f"{point.seconds:.2f} s",
            )
            for point in curve
        ],
        left=2,
    )
    if len(curve) == 1 and not seen.stopped:
        print_lines("", "M_R = M_P: one point, nothing to sweep")
    if seen.stopped:
        print_lines("", f"stopped by Ctrl-C after {len(curve)} of {points} budgets")
    if picture is not None:
        print_lines("", f"wrote {picture}")
