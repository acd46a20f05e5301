"""``retensor sweep``: traffic and its proved bound over models and scratchpads, as a table, a file and curves."""

from __future__ import annotations

import csv
import io
import json as json_text
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.cli.arguments import (
    Alignment,
    Dtype,
    Fuse,
    InPlace,
    Input,
    Json,
    Seed,
    Weights,
    check_alignment,
    check_outputs,
    check_time_limit,
    chosen_accelerator,
    load_model,
)
from retensor.cli.output import (
    bar,
    describe_graph,
    describe_merges,
    graph_counts,
    plural,
    print_error,
    print_json,
    print_lines,
    print_table,
)
from retensor.cli.watch import watch
from retensor.errors import RetensorError
from retensor.files import brief, write_atomic

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.progress import Progress
    from retensor.planning.sweep import SweepPoint

SCHEMA = "retensor.sweep/1"
INFEASIBLE = 3


def sweep(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="One or more: an .onnx file, a graph .json, or a name: resnet50, onnx:densenet121, timm:vgg11.",
            show_default=False,
        ),
    ],
    points: Annotated[int, typer.Option("--points", help="How many budgets, M_P and M_R included.")] = 9,
    scratchpad: Annotated[
        list[str] | None,
        typer.Option("--scratchpad", metavar="SIZE", help="This budget instead: 2MiB, 1.2*M_R. May be repeated."),
    ] = None,
    accelerator: Annotated[
        list[str] | None,
        typer.Option("--accelerator", metavar="NAME", help="This public accelerator instead. May be repeated."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the rows, as .csv or .json.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the curves, as .svg or .png.")
    ] = None,
    jobs: Annotated[
        int, typer.Option("--jobs", metavar="N", help="Plans at once; several run on a thread each. -1 is one a core.")
    ] = 1,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache", metavar="DIR", help="Keep plans here, not in the user's cache folder.", show_default=False
        ),
    ] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Keep no plan and use none that was kept.")] = False,
    weights: Weights = False,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: Alignment = 1,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", help="For each plan, not for all together.")
    ] = 60.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Plan models for scratchpads from M_P, the least without traffic, down to M_R, the least that runs.

    Or for the scratchpads and accelerators that are named. Each finished plan is kept on disk at once, so a sweep that
    was stopped or killed goes on where it was. Ctrl-C keeps the plans made so far; a second one does not wait for
    those under way.
    """
    check_time_limit(time_limit)
    check_alignment(alignment)
    for model in models:
        check_outputs(
            model,
            {"--output": output, "--picture": picture},
            {"--output": (".csv", ".json"), "--picture": (".svg", ".png")},
        )
    from retensor.planning import sweep as plan_all
    from retensor.planning.many import check_jobs
    from retensor.planning.sweep import check_points

    check_points(points)
    check_jobs(jobs)
    folder = _folder(cache, no_cache)
    chips = [chosen_accelerator(size, None, alignment) for size in scratchpad or ()]
    chips += [chosen_accelerator(None, name, None) for name in accelerator or ()]
    graphs = {model: _without_program(load_model(model, inputs, dtype, fuse, in_place)) for model in models}
    total = 0
    with watch("sweeping", many=True) as seen:

        def tell(state: Progress) -> None:
            nonlocal total
            total = state.total
            if seen.progress:
                seen.progress(state)

        found = plan_all(
            graphs,
            [chip for chip in chips if chip] or None,
            points=points,
            parameters=weights,
            alignment=alignment,
            time_limit=time_limit,
            seed=seed,
            jobs=jobs,
            cache=folder,
            progress=tell,
        )
    content = _to_json(graphs, found, time_limit, seen.stopped)
    runs = [point for point in found if point.plan]
    if output is not None:
        text = json_text.dumps(content, indent=1, allow_nan=False) + "\n"
        write_atomic(output, text if output.suffix.lower() == ".json" else _csv(content["points"]))
    if picture is not None and runs:
        from retensor.planning import plot_sweep

        title = next(iter(graphs.values())).name if len(graphs) == 1 else plural(len(graphs), "network")
        plot_sweep(picture, found, title=f"{title}: off-chip traffic by scratchpad")
    if json:
        print_json(content)
    else:
        _print(graphs, found, content, named=bool(chips))
        if seen.stopped:
            print_lines(f"stopped by Ctrl-C after {len(found)} of {plural(total, 'plan')}")
        if folder is not None:
            print_lines(f"plans are kept in {folder}")
        for path in (output, picture if runs else None):
            if path is not None:
                print_lines(f"wrote {path}")
    if not runs:
        print_error(str(found[0].error))
        raise typer.Exit(INFEASIBLE)


def _folder(cache: Path | None, no_cache: bool) -> Path | None:
    """Where plans are kept: where the user says, or in his cache folder if that can be written to."""
    if no_cache:
        if cache is not None:
            raise ValueError("--cache and --no-cache were both given; give one")
        return None
    from retensor.planning.cache import PlanCache, cache_folder

    folder = cache_folder() if cache is None else cache
    try:
        PlanCache(folder).prepare()
    except RetensorError as error:
        if cache is not None:
            raise
        print_error(f"no plan is kept: {error}")
        return None
    return folder


def _without_program(graph: Graph) -> Graph:
    # The weights of many models need not all be in memory.
    return type(graph)(graph.name, graph.operators, graph.tensors, graph.outputs, graph.aliases, graph.options)


def _to_json(graphs: dict[str, Graph], found: Sequence[SweepPoint], time_limit: float, stopped: bool) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "models": [{"model": name} | graph_counts(graph) for name, graph in graphs.items()],
        "time_limit_per_plan": time_limit,
        "stopped": stopped,
        "searched": _different(point for point in found if not point.cached),
        "cached": _different(point for point in found if point.cached),
        "points": [
            {
                "model": point.model,
                "accelerator": point.accelerator.name,
                "scratchpad_bytes": point.scratchpad_bytes,
                "alignment": point.accelerator.alignment,
                "parameters": point.parameters,
                "status": point.status,
                "non_compulsory_bytes": point.non_compulsory_bytes,
                "bound_bytes": point.bound_bytes,
                "gap": None if point.plan is None else point.plan.gap,
                "compulsory_bytes": point.compulsory_bytes,
                "seconds": round(point.seconds, 3),
                "cached": point.cached,
                "error": point.error,
            }
            for point in found
        ],
    }


def _different(found: Iterable[SweepPoint]) -> int:
    """How many plans there are; points may share one."""
    return len(
        {
            (point.plan.graph_digest, point.scratchpad_bytes, point.accelerator.alignment, point.parameters)
            for point in found
            if point.plan
        }
    )


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _print(graphs: dict[str, Graph], found: Sequence[SweepPoint], content: dict[str, Any], *, named: bool) -> None:
    for graph in graphs.values():
        print_lines(describe_graph(graph), describe_merges(graph))
    print_lines("")
    most: dict[str, int] = {}
    for point in found:
        most[point.model] = max(most.get(point.model, 0), point.non_compulsory_bytes or 0)
    chips = any(point.accelerator.name for point in found)
    headings = ["traffic", "", *(["model"] if len(graphs) > 1 else []), *(["accelerator"] if chips else [])]
    left = len(headings)
    print_table(
        (*headings, "scratchpad", "non-compulsory bytes", "proved bound", "time"),
        [
            (
                bar(point.non_compulsory_bytes or 0, most[point.model]),
                {"optimal": "optimal", "feasible": "best found", "infeasible": "does not fit"}[point.status],
                *([brief(point.model, 60)] if len(graphs) > 1 else []),
                *([point.accelerator.name or ""] if chips else []),
                f"{point.scratchpad_bytes:,}",
                "" if point.non_compulsory_bytes is None else f"{point.non_compulsory_bytes:,}",
                "" if point.bound_bytes is None else f"{point.bound_bytes:,}",
                "kept" if point.cached else f"{point.seconds:.2f} s",
            )
            for point in found
        ],
        left=left,
    )
    print_lines("")
    for point in found:
        if point.error:
            print_lines(f"{brief(point.model, 60)} in {point.scratchpad_bytes:,} bytes: {point.error}")
    if len(found) == len(graphs) and not named and not content["stopped"]:
        print_lines("M_R = M_P: one point, nothing to sweep")
    print_lines(f"{plural(content['searched'], 'plan')} made, {content['cached']:,} found in the cache")
