"""Claims: what a paper says, what was measured here, and whether it held.

Each file ``benchmarks/claim_<slug>.py`` has a function ``measure(progress)`` that returns a
:class:`Report`. :func:`run_claims` runs them and writes ``benchmarks/results/<slug>.json``, with the
command, commit, versions and cores that it was measured with; :func:`write_table` makes ``CLAIMS.md`` of
all results. Nobody edits either by hand.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from retensor.errors import RetensorError
from retensor.files import write_atomic
from retensor.jsonfile import read_json
from retensor.systems import SYSTEMS

SCHEMA = "retensor.claims/1"
Verdict = Literal["held", "partly held", "not held"]


@dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes
    ----------
    statement : str
        What the paper says.
    setting : str
        What was run here.
    baseline : str
        What it was compared with, by name.
    paper, ours : str
        The figures, with units.
    verdict : {"held", "partly held", "not held"}
    reason : str
        Why it did not hold, or what the figure leaves open.
    """

    statement: str
    setting: str
    baseline: str
    paper: str
    ours: str
    verdict: Verdict
    reason: str = ""


@dataclass(frozen=True)
class Table:
    """Figures behind the claims: a title, column names, and rows of text and numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | int | float]]


@dataclass(frozen=True)
class Report:
    """All claims of one system."""

    slug: str
    system: str
    paper: str
    claims: Sequence[Claim]
    tables: Sequence[Table] = field(default_factory=tuple)
    libraries: Sequence[str] = ()
    environment: Sequence[str] = ()
    """Variables that named what it was measured against, such as a peer's program; without them it is not repeated."""


Measure = Callable[[Callable[[str], None]], Report]


def find_claims(folder: Path) -> dict[str, Path]:
    """Claim files of a ``benchmarks`` folder, by slug."""
    if not folder.is_dir():
        raise RetensorError(
            f"there is no folder '{folder}'; run this in a checkout of retensor, or name its benchmarks"
        )
    found = {path.stem.removeprefix("claim_"): path for path in sorted(folder.glob("claim_*.py"))}
    if not found:
        raise RetensorError(f"the folder '{folder}' has no file claim_*.py; run this in a checkout of retensor")
    return found


def run_claims(folder: Path, slugs: Sequence[str], progress: Callable[[str], None]) -> list[Report]:
    """Run claim files and write their results beside them.

    Raises
    ------
    RetensorError
        Where a slug has no file, or needs a variable that is not set.
    """
    files = find_claims(folder)
    for slug in slugs:
        if slug not in files:
            raise RetensorError(f"no claim is named '{slug}'; there are: {', '.join(files)}")
        if unset := _unset(folder, slug):
            raise RetensorError(
                f"'{slug}' was measured against what {' and '.join(unset)} named; set it as {files[slug].name} says, "
                f"or remove results/{slug}.json to measure without"
            )
    reports = []
    for slug in slugs or files:
        if unset := _unset(folder, slug):
            progress(f"'{slug}' is left as it is: {' and '.join(unset)} is not set")
            continue
        report = load_measure(files[slug])(progress)
        save(report, folder)
        reports.append(report)
    return reports


def _unset(folder: Path, slug: str) -> list[str]:
    """Variables that a result was measured with and that are not set now."""
    found = next((result for result in _results(folder) if result["slug"] == slug), {})
    return [name for name in found.get("environment", ()) if not os.environ.get(name)]


def load_measure(path: Path) -> Measure:
    """The ``measure`` function of a claim file."""
    # The name by which processes that a claim starts can import it too.
    spec = importlib.util.spec_from_file_location(f"{path.resolve().parent.name}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise RetensorError(f"'{path}' is no Python file")
    module = importlib.util.module_from_spec(spec)
    # A claim may import its peers, which lie beside it: benchmarks.peers.
    root = str(path.resolve().parents[1])
    if root not in sys.path:
        sys.path.insert(0, root)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    measure: Measure = module.measure
    return measure


def save(report: Report, folder: Path) -> Path:
    """Write ``results/<slug>.json`` under a benchmarks folder."""
    target = folder / "results" / f"{report.slug}.json"
    target.parent.mkdir(exist_ok=True)
    content = {
        "schema": SCHEMA,
        "command": " ".join([*(f"{name}=..." for name in report.environment), f"retensor claims {report.slug}"]),
        "commit": _commit(folder),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "versions": {name: importlib.metadata.version(name) for name in ("retensor", *report.libraries)},
        **asdict(report),
    }
    write_atomic(target, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    return target


def write_table(folder: Path, target: Path) -> None:
    """Make ``CLAIMS.md`` of all results in a benchmarks folder."""
    lines = [
        "# Claims",
        "",
        "What the papers claim, measured with retensor. Made by `retensor claims`; every figure can be",
        "measured again with the command under its heading. A claim that does not hold here is shown as such.",
        "",
    ]
    for result in _results(folder):
        lines += _section(result)
    write_atomic(target, "\n".join(lines))


README_BLOCK = ("<!-- claims: made by retensor claims -->", "<!-- end of claims -->")
SYSTEMS_BLOCK = ("<!-- systems: made by retensor claims -->", "<!-- end of systems -->")


def statuses(folder: Path) -> dict[str, str]:
    """How the claims about each system came out, by its name: ``"3 held, 1 not held"``, or ``"not measured"``."""
    results = _results(folder)
    found = {}
    for system in SYSTEMS:
        verdicts = [c["verdict"] for result in results if result["slug"] in system.claims for c in result["claims"]]
        kinds: tuple[Verdict, ...] = ("held", "partly held", "not held")
        counts = [f"{verdicts.count(kind)} {kind}" for kind in kinds if kind in verdicts]
        found[system.name] = ", ".join(counts) or "not measured"
    return found


def write_readme(folder: Path, target: Path) -> None:
    """Renew two tables in a README, between their marks: the spine's claims, and systems with how theirs came out.

    Without marks nothing is written.
    """
    others = {slug for system in SYSTEMS if system.wing != "planning" for slug in system.claims}
    claims = [
        [result["system"].split(":")[0], claim["statement"], claim["baseline"], claim["ours"], claim["verdict"]]
        for result in _results(folder)
        if result["slug"] not in others
        for claim in result["claims"]
    ]
    _renew(target, README_BLOCK, _grid(["System", "Claim", "Against", "Here", "Verdict"], claims))
    status = statuses(folder)
    systems = [
        [
            f"{system.name}: {system.does}",
            f"`{system.module}`",
            f"{system.authors}, [arXiv {system.arxiv}](https://arxiv.org/abs/{system.arxiv})",
            status[system.name],
        ]
        for system in SYSTEMS
    ]
    _renew(target, SYSTEMS_BLOCK, _grid(["System", "Where", "Paper", "Claims"], systems))


def _renew(target: Path, marks: tuple[str, str], lines: Sequence[str]) -> None:
    """Put lines between two marks of a file, in the place of what stands there."""
    text = target.read_text() if target.is_file() else ""
    begin, end = marks
    if begin not in text or end not in text:
        return
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    write_atomic(target, "\n".join([f"{before}{begin}", *lines, f"{end}{after}"]))


def _results(folder: Path) -> list[dict[str, Any]]:
    """What was measured; JSON files of others in that folder are passed over."""
    found = [read_json(path, "result", RetensorError) for path in sorted((folder / "results").glob("*.json"))]
    return [result for result in found if isinstance(result, dict) and result.get("schema") == SCHEMA]


def _section(result: Mapping[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines = [
        f"## {result['system']}",
        "",
        result["paper"],
        "",
        f"`{result['command']}` · commit {result['commit']} · Python {result['python']}, {versions} · "
        f"{result['cores']} cores",
        "",
        *_grid(
            ["Claim", "Setting here", "Against", "Paper", "Here", "Verdict"],
            [
                [c["statement"], c["setting"], c["baseline"], c["paper"], c["ours"], _verdict(c)]
                for c in result["claims"]
            ],
        ),
        "",
    ]
    for table in result["tables"]:
        lines += ["<details>", f"<summary>{table['title']}</summary>", "", *_grid(table["columns"], table["rows"])]
        lines += ["", "</details>", ""]
    return lines


def _verdict(claim: Mapping[str, str]) -> str:
    return f"**{claim['verdict']}**" + (f": {claim['reason']}" if claim["reason"] else "")


def _grid(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> list[str]:
    def cell(value: str | int | float) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return (f"{value:.3f}" if isinstance(value, float) else value).replace("|", "\\|").replace("\n", " ")

    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(columns))]
    return [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if number else "---" for number in numeric) + "|",
        *("| " + " | ".join(cell(value) for value in row) + " |" for row in rows),
    ]


def _commit(folder: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # Results and the table they make may differ from the commit; anything else must not go unsaid.
        changed = git("status", "--porcelain", "--", ":/", ":!/benchmarks/results", ":!/CLAIMS.md", ":!/README.md")
        return git("rev-parse", "--short", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
