"""How a plan looks, shared by the HTML report and the pictures: roles, colours, occupancy, the status in words.

A tensor's hue is its role and its shade is chosen so that tensors which touch in the picture differ.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from retensor.errors import PlanError
from retensor.graph.structure import Graph
from retensor.planning.plan import Plan

ROLES = ("activation", "input", "parameter", "output")
"""How a tensor is coloured; ``output`` is an activation that leaves the network."""
KINDS = ("spill", "retrieve", "load", "store")
"""Kinds of transfer, in the order they are shown: the non-compulsory ones first."""
SHADES = 6

_HUES = {"activation": 252.0, "input": 168.0, "parameter": 84.0, "output": 338.0}
# Lightness and hue offsets of a role's shades; neighbours in the list are far apart.
_OFFSETS = ((0.0, 0.0), (-0.075, 9.0), (0.065, -9.0), (-0.035, -15.0), (0.03, 18.0), (-0.105, -3.0))


def check_graph(graph: Graph, plan: Plan) -> None:
    """Raise :class:`PlanError` where ``plan`` was made for another graph or names what it does not have."""
    if plan.graph_digest != graph.digest:
        raise PlanError(
            f"the plan was made for graph '{plan.graph_name}' ({plan.graph_digest[:12]}), "
            f"not for '{graph.name}' ({graph.digest[:12]}); load the graph it was made for"
        )
    known = {operator.name for operator in graph.operators}
    unknown = [name for name in plan.order if name not in known]
    unknown += [stay.tensor for stay in plan.residencies if stay.tensor not in graph.tensors]
    unknown += [transfer.tensor for transfer in plan.transfers if transfer.tensor not in graph.tensors]
    if unknown:
        raise PlanError(f"the plan names '{unknown[0]}', which graph '{graph.name}' does not have; make the plan again")


def role_of(graph: Graph, tensor: str) -> int:
    """Index into :data:`ROLES` of how ``tensor`` is coloured."""
    role = graph.tensors[tensor].role
    return ROLES.index("output" if role == "activation" and tensor in graph.outputs else role)


def palette(dark: bool) -> list[list[str]]:
    """Fill colours as ``#rrggbb``: for each of :data:`ROLES` a list of :data:`SHADES` shades."""
    lightness, chroma = (0.47, 0.085) if dark else (0.80, 0.085)
    return [[_oklch(lightness + up * 0.8, chroma, _HUES[role] + turn) for up, turn in _OFFSETS] for role in ROLES]


def shades(graph: Graph, plan: Plan) -> dict[str, int]:
    """A shade for each tensor, so that tensors which touch in the picture differ where shades suffice."""
    stays = sorted(plan.residencies, key=lambda r: (r.start, r.address, r.tensor))
    names = [stay.tensor for stay in stays]
    first = np.array([stay.start for stay in stays], dtype=np.int64)
    last = np.array([stay.end for stay in stays], dtype=np.int64)
    low = np.array([stay.address for stay in stays], dtype=np.int64)
    high = low + np.array([graph.tensors[name].nbytes for name in names], dtype=np.int64)
    # Rectangles with the least side are the ones the eye must keep apart, so "touching" has some slack.
    slack = plan.scratchpad_bytes // 100
    near: dict[str, set[str]] = {name: set() for name in names}
    for i, name in enumerate(names):
        close = (first <= last[i]) & (last >= first[i]) & (low <= high[i] + slack) & (high >= low[i] - slack)
        near[name].update(names[j] for j in np.flatnonzero(close) if names[j] != name)
    chosen: dict[str, int] = {}
    used = [0] * SHADES
    for name in dict.fromkeys(names):
        taken = [0] * SHADES
        for other in near[name]:
            if other in chosen and role_of(graph, other) == role_of(graph, name):
                taken[chosen[other]] += 1
        shade = min(range(SHADES), key=lambda s: (taken[s], used[s]))
        chosen[name] = shade
        used[shade] += 1
    return chosen


def occupancy_of(graph: Graph, plan: Plan) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Bytes resident at each step, and of these the bytes of the running operator's own tensors."""
    steps = len(plan.order)
    change = np.zeros(steps + 1, dtype=np.int64)
    for stay in plan.residencies:
        change[stay.start] += graph.tensors[stay.tensor].nbytes
        change[min(stay.end, steps)] -= graph.tensors[stay.tensor].nbytes
    table = {operator.name: operator for operator in graph.operators}
    needed = [
        sum(graph.tensors[name].nbytes for name in graph.operator_tensors(table[step], plan.parameters))
        for step in plan.order
    ]
    return np.cumsum(change)[:steps], np.array(needed, dtype=np.int64)


def status_sentence(plan: Plan) -> str:
    """What was proved, in words that never claim more than the bound does."""
    order = ", for the given order" if plan.fixed_order else ""
    if plan.status == "optimal":
        return f"proved optimal{order}"
    if plan.bound_bytes <= 0:
        return f"not proved: the bound is still 0{order}"
    # Rounded up, so that 0.04 % is not shown as 0.
    percent = math.ceil(plan.gap * 1000 - 1e-9) / 10
    return f"within {percent:g} % of the best possible{order}"


def _oklch(lightness: float, chroma: float, hue: float) -> str:
    """``#rrggbb`` of a colour in OKLCH, where equal lightness looks equally light in every hue."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = (
        4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
        -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
        -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
    )
    encoded = (12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in (max(v, 0.0) for v in linear))
    return "#" + "".join(f"{round(min(v, 1.0) * 255):02x}" for v in encoded)
