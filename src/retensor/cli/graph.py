"""``retensor graph``: a model as the planner sees it, printed or written as bare JSON for any other tool."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retensor.cli.arguments import Dtype, Fuse, InPlace, Input, Json, Model, check_outputs, load_model
from retensor.cli.output import (
    describe_graph,
    describe_merges,
    exact_bytes,
    graph_counts,
    plural,
    print_json,
    print_lines,
    print_table,
)

if TYPE_CHECKING:
    from retensor.graph.structure import Graph


def graph(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the bare graph as JSON instead of listing it."),
    ] = None,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    json: Json = False,
) -> None:
    """List a model's operators, tensors and what was merged, or write them as a graph file.

    With --json and no -o the graph itself is printed, in the same form as the file.
    """
    check_outputs(model, {"-o": output}, {})
    loaded = load_model(model, inputs, dtype, fuse, in_place)
    from retensor.graph.json import graph_to_json, write_graph
    from retensor.graph.merge import short_kind

    if output is not None:
        write_graph(loaded, output)
    if json:
        print_json(
            graph_to_json(loaded) if output is None else graph_counts(loaded) | {"files": {"graph": str(output)}}
        )
        return
    if output is None:
        print_table(
            ("operator", "kind", "reads and writes", "parameters"),
            [
                (
                    operator.name,
                    short_kind(operator.kind),
                    f"{_bytes(loaded, loaded.operator_tensors(operator, False)):,}",
                    f"{_bytes(loaded, [n for n in operator.inputs if loaded.tensors[n].role == 'parameter']):,}",
                )
                for operator in loaded.operators
            ],
            left=2,
        )
        print_lines("")
    print_lines(describe_graph(loaded), describe_merges(loaded))
    for role in ("input", "activation", "parameter"):
        sizes = [tensor.nbytes for tensor in loaded.tensors.values() if tensor.role == role]
        print_lines(f"{plural(len(sizes), role)}: {exact_bytes(sum(sizes))}")
    if output is not None:
        print_lines("", f"wrote {output}")


def _bytes(loaded: Graph, names: Iterable[str]) -> int:
    return sum(loaded.tensors[name].nbytes for name in names)
