"""``retensor pack``: offsets for buffers of known lifetimes, within a capacity or in as few bytes as possible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retensor.cli.arguments import Json, Seed, check_outputs, check_time_limit
from retensor.cli.output import exact_bytes, percent, plural, print_error, print_json, print_lines, print_table
from retensor.cli.watch import watch
from retensor.files import brief, write_atomic

if TYPE_CHECKING:
    from retensor.planning.bufferfile import BufferTable
    from retensor.planning.packing import PackedBuffers

SCHEMA = "retensor.packing/1"
INFEASIBLE = 3
UNKNOWN = 4


def pack(
    buffers: Annotated[
        Path, typer.Argument(metavar="BUFFERS", help="A CSV with the columns id, lower, upper and size.")
    ],
    capacity: Annotated[
        str | None,
        typer.Option("--capacity", metavar="SIZE", help="Bytes for all: 1MiB, 512KB. Not given: as few as possible."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="Write the CSV with offsets here, not to stdout."),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the buffers, as .svg or .png.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", help="Stop here with what was found and proved.")
    ] = 60.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Find offsets at which no two buffers that are alive at once overlap, or prove that there are none.

    A buffer is alive from lower up to, not including, upper. Columns alignment and offset (where it must lie) may be
    there too. Without -o the CSV with offsets goes to stdout, and what was found is said on stderr. Exit code 3: proved
    not to fit; 4: neither found nor ruled out in time.
    """
    check_time_limit(time_limit)
    from retensor.units import parse_size

    limit = None if capacity is None else parse_size(capacity)
    check_outputs(str(buffers), {"-o": output, "--picture": picture}, {"-o": (".csv",), "--picture": (".svg", ".png")})
    from retensor.planning.bufferfile import read_buffers
    from retensor.planning.packing import pack_buffers

    table = read_buffers(buffers)
    with watch("packing") as seen:
        found = pack_buffers(table.buffers, limit, time_limit=time_limit, seed=seed, progress=seen.progress)
    if found.offsets is None and found.status == "unknown" and seen.stopped:
        raise KeyboardInterrupt
    if found.offsets is not None and output is not None:
        write_atomic(output, table.with_offsets(found.offsets))
    if found.offsets is not None and picture is not None:
        from retensor.planning.packing_picture import plot_packing

        plot_packing(picture, table.buffers, found.offsets, capacity=limit, title=buffers.stem)
    if found.offsets is None:
        print_error(_sentence(table, found))
    if json:
        print_json(_to_json(table, found, seen.stopped, {"offsets": output, "picture": picture}))
    elif found.offsets is not None and output is None:
        print(table.with_offsets(found.offsets), end="")
        # stdout is the CSV.
        print_error(f"{plural(len(table.buffers), 'buffer')} in {exact_bytes(found.height or 0)}, {_verdict(found)}")
    elif found.offsets is not None:
        _print(table, found, [path for path in (output, picture) if path is not None])
    if found.offsets is None:
        raise typer.Exit(INFEASIBLE if found.status == "infeasible" else UNKNOWN)


def _sentence(table: BufferTable, found: PackedBuffers) -> str:
    what = f"{plural(len(table.buffers), 'buffer')} in {exact_bytes(found.capacity or 0)}"
    if found.status == "infeasible":
        return f"{what} is proved impossible: {found.reason}; give at least {found.bound:,} bytes"
    return f"{what} is not decided: {found.reason}; give a longer --time-limit or a larger --capacity"


def _verdict(found: PackedBuffers) -> str:
    if found.status == "packed":
        return "found"
    if found.status == "optimal":
        return "proved the least"
    height = found.height or 0
    return f"not proved the least: at least {exact_bytes(found.bound)}, gap {percent((height - found.bound) / height)}"


def _print(table: BufferTable, found: PackedBuffers, written: list[Path]) -> None:
    print_table(
        ("packing", ""),
        [
            ("buffers", f"{len(table.buffers):,}"),
            *([("capacity", exact_bytes(found.capacity))] if found.capacity is not None else []),
            ("height", f"{exact_bytes(found.height or 0)}, {_verdict(found)}"),
            ("at least", exact_bytes(found.bound)),
            ("time", f"{found.seconds:.2f} s"),
        ],
        left=2,
    )
    print_lines("", *(f"wrote {brief(path)}" for path in written))


def _to_json(table: BufferTable, found: PackedBuffers, stopped: bool, files: dict[str, Path | None]) -> dict[str, Any]:
    offsets = found.offsets
    return {
        "schema": SCHEMA,
        "status": found.status,
        "stopped": stopped,
        "buffers": len(table.buffers),
        "capacity_bytes": found.capacity,
        "height_bytes": found.height,
        "bound_bytes": found.bound,
        "offsets": None if offsets is None else {b.id: o for b, o in zip(table.buffers, offsets, strict=True)},
        "reason": found.reason,
        "seconds": round(found.seconds, 3),
        "files": {kind: str(path) for kind, path in files.items() if path is not None and offsets is not None},
    }
