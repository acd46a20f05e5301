"""The cost sheet against the libraries' own parameter counts and fvcore's count of multiply-accumulates.

Forty architectures of timm and transformers without weights; see ``benchmarks/peers/fvcore_count.py`` for which,
and for what fvcore counts otherwise.

    retensor claims cost
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.peers.fvcore_count import NAMES, Count, build, fvcore_count, sheet_count

import retensor as rt
from retensor.claims import Claim, Report, Table

SOURCE = "fvcore, FlopCountAnalysis, https://github.com/facebookresearch/fvcore; timm and transformers."
TIME_LIMIT = 1.0


@dataclass(frozen=True)
class Row:
    """One architecture."""

    name: str
    parameters: int
    own_count: int
    ours: Count
    theirs: Count
    uncounted: tuple[str, ...]

    @property
    def error(self) -> float:
        """The largest relative difference in a group that either counts."""
        groups = {*self.ours.groups, *self.theirs.groups}
        return max(_apart(self.ours.groups.get(group, 0), self.theirs.groups.get(group, 0)) for group in groups)


def _apart(one: int, other: int) -> float:
    return abs(one - other) / max(one, other, 1)


def row_of(name: str) -> Row:
    module, inputs = build(name)
    sheet = rt.cost(module, inputs, fuse=False, time_limit=TIME_LIMIT)
    assert sheet.parameters is not None
    library = sum(parameter.numel() for parameter in module.parameters())
    return Row(
        name, sheet.parameters, library, sheet_count(sheet), fvcore_count(module, inputs), tuple(sheet.uncounted)
    )


def measure(progress: Callable[[str], None]) -> Report:
    rows = []
    for name in NAMES:
        progress(name)
        rows.append(row_of(name))
    same = sum(row.parameters == row.own_count for row in rows)
    near = sum(row.error <= 0.01 for row in rows)
    exact = sum(row.error == 0 for row in rows)
    only = sorted({kind for row in rows for kind in row.ours.others})
    theirs = sorted({kind for row in rows for kind in row.theirs.others})
    claims = [
        Claim(
            "(ours) The cost sheet's parameters are the library's own count.",
            f"{len(rows)} architectures of timm and transformers, random weights",
            "sum of numel over module.parameters()",
            "equal",
            f"equal on {same} of {len(rows)}",
            "held" if same == len(rows) else "partly held" if same else "not held",
        ),
        Claim(
            "(ours) Multiply-accumulates are within 1 % of fvcore's where it counts the same operators.",
            f"the same {len(rows)}, convolutions and matrix products each",
            "fvcore's FlopCountAnalysis.by_operator",
            "1 %",
            f"equal on {exact}, within 1 % on {near} of {len(rows)}",
            "held" if near == len(rows) else "partly held" if near else "not held",
            f"Counted here and not by fvcore: {', '.join(only) or 'nothing'}. Estimated by fvcore and none here: "
            f"{', '.join(theirs) or 'nothing'}.",
        ),
    ]
    table = Table(
        "Multiply-accumulates of one run",
        ("Model", "Parameters", "Library's", "Both count", "fvcore's of it", "Apart", "Only here", "Only fvcore"),
        [
            (
                row.name,
                row.parameters,
                row.own_count,
                sum(row.ours.groups.values()),
                sum(row.theirs.groups.values()),
                row.error,
                _listed(row.ours.others),
                _listed(row.theirs.others),
            )
            for row in rows
        ],
    )
    libraries = ("fvcore", "timm", "torch", "transformers")
    return Report("cost", "The cost sheet", SOURCE, claims, [table], libraries)


def _listed(macs: object) -> str:
    assert isinstance(macs, dict)
    return ", ".join(f"{kind} {count:,}" for kind, count in macs.items())
