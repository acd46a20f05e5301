"""``retensor systems``: what the library holds, and how the claims about it came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retensor.cli.arguments import Json
from retensor.cli.output import print_json, print_lines, print_table


def systems(
    folder: Annotated[Path, typer.Option("--benchmarks", help="The folder of claim files.")] = Path("benchmarks"),
    json: Json = False,
) -> None:
    """List the systems of this library: wing, paper, and in a checkout how the measured claims came out."""
    from retensor.claims import statuses
    from retensor.systems import SYSTEMS

    measured = (folder / "results").is_dir()
    status = statuses(folder) if measured else {system.name: "not found here" for system in SYSTEMS}
    if json:
        print_json(
            {
                "systems": [
                    {
                        "name": system.name,
                        "wing": system.wing,
                        "module": system.module,
                        "does": system.does,
                        "paper": system.authors,
                        "arxiv": system.arxiv,
                        "claims": status[system.name],
                    }
                    for system in SYSTEMS
                ]
            }
        )
        return
    rows = [
        [system.name, system.wing, f"{system.authors}, arXiv {system.arxiv}", status[system.name], system.does]
        for system in SYSTEMS
    ]
    print_table(["system", "wing", "paper", "claims", "what it does"], rows, left=5)
    if not measured:
        print_lines("", "claims are measured in a checkout; run there, or name its folder with --benchmarks")
