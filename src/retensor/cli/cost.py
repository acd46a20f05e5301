"""``retensor cost``: the cost sheet of a model, or of several side by side; ``retensor accelerators``: the presets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retensor.cli.arguments import (
    Chip,
    ChipAlignment,
    Dtype,
    Fuse,
    InPlace,
    Input,
    Json,
    Scratchpad,
    Seed,
    TimeLimit,
    Weights,
    check_outputs,
    check_time_limit,
    chosen_accelerator,
    parse_inputs,
)
from retensor.cli.output import console, print_json, print_lines, print_table
from retensor.cli.watch import watch


def cost(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Files or names, as for retensor plan; several are set side by side, the first as what the others "
            "are compared with.",
            show_default=False,
        ),
    ],
    scratchpad: Scratchpad = None,
    chip: Chip = None,
    weights: Weights = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the costs, as .svg or .png.")
    ] = None,
    inputs: Input = None,
    dtype: Dtype = None,
    fuse: Fuse = True,
    in_place: InPlace = False,
    alignment: ChipAlignment = None,
    time_limit: TimeLimit = 10.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Print what a run costs: parameters, bytes, multiply-accumulates, peaks, and off-chip traffic on an accelerator.

    Without --scratchpad or --accelerator there is no traffic. A scratchpad too small for one operator is said in the
    table. The time limit is for each model's bounds, and again for its plan.
    """
    check_time_limit(time_limit)
    for model in models:
        check_outputs(model, {"--picture": picture}, {"--picture": (".svg", ".png")})
    accelerator = chosen_accelerator(scratchpad, chip, alignment, needed=False)
    shapes = parse_inputs(inputs)
    from retensor.costing import compare
    from retensor.costing import cost as sheet_of

    sheets = []
    with watch("costing") as seen:
        for model in models:
            sheets.append(
                sheet_of(
                    model,
                    shapes or None,
                    accelerator,
                    parameters=weights,
                    dtype=dtype,
                    fuse=fuse,
                    in_place=in_place,
                    alignment=alignment,
                    time_limit=time_limit,
                    seed=seed,
                    progress=seen.progress,
                )
            )
            if seen.stopped:
                break
    found = compare(*sheets)
    if picture is not None:
        found.plot(picture)
    if json:
        single = len(models) == 1
        print_json((sheets[0].as_dict() if single else found.as_dict()) | {"stopped": seen.stopped})
        return
    console().print(found)
    if seen.stopped:
        print_lines("", f"stopped by Ctrl-C after {len(sheets)} of {len(models)} models; bounds may be loose")
    if picture is not None:
        print_lines("", f"wrote {picture}")


def accelerators(json: Json = False) -> None:
    """List the accelerators that --accelerator knows, with the public documents their figures are from."""
    from retensor.costing.table import short_count
    from retensor.planning.accelerators import PRESETS
    from retensor.units import parse_size

    if json:
        print_json(
            {
                "accelerators": [
                    {
                        "name": name,
                        "scratchpad_bytes": parse_size(preset.accelerator.scratchpad),
                        "alignment": preset.accelerator.alignment,
                        "bandwidth": preset.accelerator.bandwidth,
                        "macs_per_second": preset.accelerator.macs_per_second,
                        "what": preset.what,
                        "source": preset.source,
                        "note": preset.note,
                    }
                    for name, preset in PRESETS.items()
                ]
            }
        )
        return

    def rate(value: float | None, unit: str) -> str:
        return "not stated" if value is None else f"{short_count(value)}{unit}"

    print_table(
        ("accelerator", "what", "scratchpad", "alignment", "off-chip", "compute"),
        [
            (
                name,
                preset.what,
                str(preset.accelerator.scratchpad),
                str(preset.accelerator.alignment),
                rate(preset.accelerator.bandwidth, "B/s"),
                rate(preset.accelerator.macs_per_second, "MAC/s"),
            )
            for name, preset in PRESETS.items()
        ],
        left=2,
    )
    print_lines("")
    for name, preset in PRESETS.items():
        print_lines(f"{name}: {preset.source}{f'; {preset.note}' if preset.note else ''}")
