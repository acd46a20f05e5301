"""``retensor claims``: measure what the papers claim, and write the results and ``CLAIMS.md``."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from retensor.cli.arguments import Json
from retensor.cli.output import print_json, print_lines, print_table


def claims(
    slugs: Annotated[list[str] | None, typer.Argument(help="Which systems, such as cosma; all by default.")] = None,
    folder: Annotated[Path, typer.Option("--benchmarks", help="The folder of claim files.")] = Path("benchmarks"),
    json: Json = False,
) -> None:
    """Measure the papers' claims here; write benchmarks/results/ and CLAIMS.md beside the folder.

    For a checkout: the claim files of benchmarks/ are no part of the installed package.
    """
    from retensor.claims import run_claims, write_readme, write_table

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"retensor: {text}", file=sys.stderr)

    # Solvers greet on stdout; there the one object of --json, or the table, should stand alone.
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        reports = run_claims(folder, slugs or [], progress)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    target = folder.resolve().parent / "CLAIMS.md"
    write_table(folder, target)
    write_readme(folder, target.with_name("README.md"))
    if json:
        print_json({"claims": {r.slug: [dataclasses.asdict(claim) for claim in r.claims] for r in reports}})
        return
    for report in reports:
        print_lines("", report.system)
        rows = [[claim.verdict, claim.statement, claim.paper, claim.ours] for claim in report.claims]
        print_table(["verdict", "claim", "paper", "here"], rows, left=4)
    print_lines("", f"wrote {target}")
