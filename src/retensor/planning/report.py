"""The report of a plan: one HTML page that carries its own style, script and data and asks nothing of a network.

The page is the template ``report.html`` with ``report.css``, ``report_chart.js`` and ``report.js`` put in.
Everything a model brings (names of tensors and operators) travels as JSON in a data block with ``<``, ``>``
and ``&`` escaped, and reaches the page as text only; the content security policy admits just the one style
and the one script by their hashes, so a name cannot run or load anything even if it were to become markup.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import os
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any, Protocol

from retensor.files import write_atomic
from retensor.graph.merge import short_kind
from retensor.graph.structure import Graph
from retensor.planning.appearance import KINDS, ROLES, check_graph, palette, role_of, shades, status_sentence
from retensor.planning.plan import Plan
from retensor.units import format_bytes


class BoundsLike(Protocol):
    """What the report shows of a graph's bounds."""

    @property
    def m_r(self) -> int:
        """Bytes of the largest operator: the least scratchpad any plan can have."""

    @property
    def m_r_operator(self) -> str:
        """The operator that needs them."""

    @property
    def m_p(self) -> int:
        """Least peak footprint found over all orders."""

    @property
    def m_p_bound(self) -> int:
        """Proved lower bound of it."""

    @property
    def m_h(self) -> int:
        """Midway between the two."""

    @property
    def parameters(self) -> bool:
        """Whether parameters are counted."""


def write_report(
    path: str | os.PathLike[str],
    graph: Graph,
    plan: Plan,
    baselines: Sequence[tuple[str, Plan]] = (),
    bounds: BoundsLike | None = None,
) -> None:
    """Write one self-contained HTML page about ``plan``.

    Parameters
    ----------
    path : path
        The page; written whole or not at all.
    graph : Graph
        The graph that ``plan`` was made for.
    plan : Plan
    baselines : sequence of (str, Plan), optional
        Other plans of the same graph, by label, shown beside ``plan``.
    bounds : Bounds, optional
        ``M_R``, ``M_H`` and ``M_P`` of the graph, shown beside the scratchpad.

    Raises
    ------
    PlanError
        Where a plan was made for another graph.
    RetensorError
        Where the file cannot be written.

    Notes
    -----
    The page's address takes ``#dark`` or ``#light``, ``#tensor=NAME`` (selects it), ``#operator=NAME``,
    ``#steps=10-40`` (the part shown, both included, counted from 0), joined by ``&``; names are percent-encoded.

    Examples
    --------
    >>> write_report("report.html", graph, plan)  # doctest: +SKIP
    """
    for made in (plan, *(other for _, other in baselines)):
        check_graph(graph, made)
    write_atomic(path, _render(graph, plan, baselines, bounds))


def _render(graph: Graph, plan: Plan, baselines: Sequence[tuple[str, Plan]], bounds: BoundsLike | None) -> str:
    style = _asset("report.css")
    script = f'"use strict";\n(() => {{\n{_asset("report_chart.js")}\n{_asset("report.js")}\n}})();\n'
    data = json.dumps(_data(graph, plan, baselines, bounds), separators=(",", ":"), allow_nan=False)
    # ASCII JSON with these three escaped holds no character that could end the data block.
    data = data.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    summary = (
        f"{graph.name}: {len(plan.order):,} operators in {format_bytes(plan.scratchpad_bytes)}; "
        f"{plan.non_compulsory_bytes:,} bytes spilled and retrieved, {status_sentence(plan)}."
    )
    parts = {
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        "TITLE": _markup(f"{graph.name} in {format_bytes(plan.scratchpad_bytes)} · memory plan"),
        "SUMMARY": _markup(summary),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": data,
    }
    # One pass, so that a name which looks like a placeholder is left alone.
    return re.sub(r"%%([A-Z_]+)%%", lambda match: parts[match[1]], _asset("report.html"))


def _data(graph: Graph, plan: Plan, baselines: Sequence[tuple[str, Plan]], bounds: BoundsLike | None) -> dict[str, Any]:
    """What the script draws, with tensors and operators as indices to keep large plans small."""
    table = {operator.name: operator for operator in graph.operators}
    steps = [table[name] for name in plan.order]
    touched = {step.name: graph.operator_tensors(step, plan.parameters) for step in steps}
    names = list(
        dict.fromkeys(
            [stay.tensor for stay in plan.residencies] + [name for step in steps for name in touched[step.name]]
        )
    )
    index = {name: i for i, name in enumerate(names)}
    kinds = list(dict.fromkeys(short_kind(step.kind) for step in steps))
    roles = [tensor.role for tensor in graph.tensors.values()]
    shade = shades(graph, plan)
    return {
        "name": graph.name,
        "digest": plan.graph_digest,
        "scratchpad": plan.scratchpad_bytes,
        "alignment": plan.alignment,
        "parameters": plan.parameters,
        "status": plan.status,
        "sentence": status_sentence(plan),
        "gap": plan.gap,
        "nonCompulsory": plan.non_compulsory_bytes,
        "compulsory": plan.compulsory_bytes,
        "bound": plan.bound_bytes,
        "solver": plan.solver,
        "seconds": _finite(plan.seconds),
        "fixedOrder": plan.fixed_order,
        "operatorsTotal": len(graph.operators),
        "counts": {role: roles.count(role) for role in ("input", "activation", "parameter")},
        "bounds": None
        if bounds is None
        else {
            "r": bounds.m_r,
            "rOperator": bounds.m_r_operator,
            "p": bounds.m_p,
            "pBound": bounds.m_p_bound,
            "h": bounds.m_h,
            "parameters": bounds.parameters,
        },
        "roles": ROLES,
        "kindsOfTransfer": KINDS,
        "fills": {"light": palette(False), "dark": palette(True)},
        "kinds": kinds,
        "operators": [
            [
                step.name,
                kinds.index(short_kind(step.kind)),
                [index[name] for name in step.inputs if name in index and name in touched[step.name]],
                [index[name] for name in step.outputs],
            ]
            for step in steps
        ],
        "tensors": [
            [
                name,
                graph.tensors[name].nbytes,
                role_of(graph, name),
                shade.get(name, 0),
                graph.tensors[name].shape,
                graph.tensors[name].dtype,
            ]
            for name in names
        ],
        "residencies": [
            v for stay in plan.residencies for v in (index[stay.tensor], stay.start, stay.end, stay.address)
        ],
        "transfers": [v for t in plan.transfers for v in (index[t.tensor], KINDS.index(t.kind), t.step, t.nbytes)],
        "baselines": [
            {
                "label": label,
                "nonCompulsory": other.non_compulsory_bytes,
                "compulsory": other.compulsory_bytes,
                "transfers": sum(t.kind in ("spill", "retrieve") for t in other.transfers),
                "scratchpad": other.scratchpad_bytes,
                "seconds": _finite(other.seconds),
            }
            for label, other in baselines
        ],
    }


def _finite(seconds: float) -> float | None:
    return float(seconds) if math.isfinite(seconds) else None


def _markup(text: str) -> str:
    # References for everything beyond ASCII also carry what UTF-8 cannot (a lone surrogate).
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


def _asset(name: str) -> str:
    text = resources.files("retensor.planning").joinpath(name).read_text(encoding="utf-8")
    # A browser hashes the text after making line ends plain.
    return text.replace("\r\n", "\n")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
