"""What the command line prints: results on stdout, sentences about mistakes and progress on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from retensor.units import format_bytes

if TYPE_CHECKING:
    from retensor.graph.structure import Graph
    from retensor.planning.plan import Plan

PIPE_WIDTH = 160
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def console() -> Console:
    """A console on the present stdout: as wide as the terminal, or wide enough not to fold in a pipe."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=PIPE_WIDTH)


def print_json(content: Mapping[str, Any]) -> None:
    """Print the one object that ``--json`` promises."""
    print(json.dumps(content, indent=2, allow_nan=False))


def print_error(sentence: str) -> None:
    """Print a mistake as one sentence on stderr."""
    one_line = " ".join(sentence.split())
    # Where stderr is full or gone the exit code still tells; a file of None would mean stdout.
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"retensor: {one_line}", file=sys.stderr)


def print_lines(*lines: str) -> None:
    """Print lines as they are, never folded and never read as markup."""
    out = console()
    for line in lines:
        out.print(Text(line), soft_wrap=True)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Print a table whose first ``left`` columns are text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


def describe_graph(graph: Graph) -> str:
    """One line: the graph's name and its counts."""
    found = tensor_counts(graph)
    counts = [
        plural(len(graph.operators), "operator"),
        plural(found["input"], "input"),
        plural(found["activation"], "activation"),
        plural(found["parameter"], "parameter"),
    ]
    return f"{graph.name}: {', '.join(counts)}"


def tensor_counts(graph: Graph) -> dict[str, int]:
    """How many tensors of each role a graph has."""
    roles = [tensor.role for tensor in graph.tensors.values()]
    return {role: roles.count(role) for role in ("input", "activation", "parameter")}


def plural(count: int, noun: str) -> str:
    """A count and its noun.

    >>> plural(1, "spill"), plural(2_000, "spill")
    ('1 spill', '2,000 spills')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def graph_counts(graph: Graph) -> dict[str, Any]:
    """What every object of ``--json`` says about its graph."""
    from retensor.graph.merge import merged_kinds

    return {
        "graph": graph.name,
        "operators": len(graph.operators),
        "tensors": len(graph.tensors),
        "tensors_by_role": tensor_counts(graph),
        "merged": dict(merged_kinds(graph)),
    }


def order_to_json(found: Plan) -> dict[str, Any]:
    """What every object of ``--json`` says about how far a plan's bound reaches."""
    return {
        "fixed_order": found.fixed_order,
        "bound_holds_for": "given order" if found.fixed_order else "any order",
    }


def describe_merges(graph: Graph, most: int = 6) -> str:
    """One line on what was merged, such as ``merged 120 nodes into 53 operators: Conv+Relu x 33``."""
    from retensor.graph.merge import merged_kinds, short_kind

    counts: dict[str, int] = {}
    for kind, count in merged_kinds(graph).items():
        counts[short_kind(kind)] = counts.get(short_kind(kind), 0) + count
    kinds = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if not kinds:
        return "nothing merged: each operator is one node of the model"
    nodes = sum(max(1, len(operator.nodes)) for operator in graph.operators)
    shown = ", ".join(f"{kind} x {count}" for kind, count in kinds[:most])
    more = f", and {len(kinds) - most} more kinds" if len(kinds) > most else ""
    return f"merged {nodes:,} nodes into {len(graph.operators):,} operators: {shown}{more}"


def exact_bytes(count: int) -> str:
    """Bytes as a number, and in a unit where that is shorter to read."""
    return f"{count:,} B" if count < 1024 else f"{count:,} B ({format_bytes(count)})"


def percent(part: float) -> str:
    """A share of one as a percentage; never rounded to 0 % or 100 % where it is neither."""
    value = 100 * part
    if 0 < value < 0.1:
        return "<0.1 %"
    if 99.9 < value < 100:
        return ">99.9 %"
    return f"{value:.1f} %" if value % 1 else f"{value:.0f} %"


def bar(value: int, most: int, width: int = 24) -> str:
    """``value`` as a bar of block characters, ``width`` cells long at ``most``; nothing only at zero."""
    eighths = 0 if most <= 0 or value <= 0 else max(1, round(8 * width * value / most))
    return _EIGHTHS[8] * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
