"""Plans as files: JSON with a ``schema`` field, described by ``plan.schema.json`` beside this module.

Reading a plan is parsing and checking, never running: every value's type and range is checked, unknown
fields are refused, and the totals that the file records must be those of its own transfers. Whether the plan
is valid for a graph is the business of :func:`retensor.planning.verify`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, cast, get_args

from retensor.errors import PlanError
from retensor.files import brief, write_atomic
from retensor.jsonfile import read_json
from retensor.planning.plan import Plan, Residency, Transfer, TransferKind

SCHEMA = "retensor.plan/1"
LARGEST_INT = 2**60
LARGEST_SUM = 2**90
LARGEST_ALIGNMENT = 2**30
DEEPEST_OPTION = 8

_KINDS = get_args(TransferKind)
_FIELDS = (
    "schema",
    "graph",
    "accelerator",
    "parameters",
    "fixed_order",
    "order",
    "residencies",
    "transfers",
    "compulsory_bytes",
    "non_compulsory_bytes",
    "bound_bytes",
    "gap",
    "status",
    "solver",
    "seconds",
)
_GRAPH_FIELDS = ("name", "digest", "options")
_ACCELERATOR_FIELDS = ("scratchpad_bytes", "alignment")
_RESIDENCY_FIELDS = ("tensor", "from", "to", "address")
_TRANSFER_FIELDS = ("tensor", "kind", "step", "bytes")


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """``plan`` as the object that its file holds.

    Raises
    ------
    PlanError
        Where the bound is negative, so that no gap can be told.

    Examples
    --------
    >>> plan = Plan("one", "0" * 64, 8, 1, False, ("relu",), (), (), 0, "by hand", 0.0)
    >>> plan_to_json(plan)["accelerator"]
    {'scratchpad_bytes': 8, 'alignment': 1}
    >>> plan_from_json(plan_to_json(plan)) == plan
    True
    """
    if plan.bound_bytes < 0:
        raise PlanError(f"bound_bytes is out of range; 0 to {LARGEST_INT:,} is allowed")
    return {
        "schema": SCHEMA,
        "graph": {"name": plan.graph_name, "digest": plan.graph_digest, "options": dict(plan.graph_options)},
        "accelerator": {"scratchpad_bytes": plan.scratchpad_bytes, "alignment": plan.alignment},
        "parameters": plan.parameters,
        "fixed_order": plan.fixed_order,
        "compulsory_bytes": plan.compulsory_bytes,
        "non_compulsory_bytes": plan.non_compulsory_bytes,
        "bound_bytes": plan.bound_bytes,
        "gap": plan.gap,
        "status": plan.status,
        "solver": plan.solver,
        "seconds": plan.seconds,
        "order": list(plan.order),
        "residencies": [
            {"tensor": stay.tensor, "from": stay.start, "to": stay.end, "address": stay.address}
            for stay in plan.residencies
        ],
        "transfers": [
            {"tensor": move.tensor, "kind": move.kind, "step": move.step, "bytes": move.nbytes}
            for move in plan.transfers
        ],
    }


def plan_from_json(data: object) -> Plan:
    """The plan that a file's object describes.

    Parameters
    ----------
    data : object
        What :func:`json.loads` returned.

    Raises
    ------
    PlanError
        Names the field that is missing, unknown, of the wrong type, out of range, or at odds with the
        transfers.
    """
    if not isinstance(data, dict):
        raise PlanError(f"a plan is a JSON object, not {_kind(data)}")
    if "schema" not in data:
        raise PlanError(f"this is no plan: it has no 'schema' field; a plan has \"{SCHEMA}\"")
    if data["schema"] != SCHEMA:
        raise PlanError(f'the file\'s schema is {_shown(data["schema"])}; this version reads "{SCHEMA}"')
    _exactly(data, _FIELDS, "the plan")
    graph = _object(data["graph"], _GRAPH_FIELDS, "graph")
    accelerator = _object(data["accelerator"], _ACCELERATOR_FIELDS, "accelerator")
    digest = _text(graph["digest"], "graph.digest")
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise PlanError(f"graph.digest is 64 hexadecimal digits, not {_shown(digest)}")
    order = tuple(_text(name, f"order[{i}]") for i, name in enumerate(_list(data["order"], "order")))
    plan = Plan(
        graph_name=_text(graph["name"], "graph.name"),
        graph_digest=digest,
        scratchpad_bytes=_int(accelerator["scratchpad_bytes"], "accelerator.scratchpad_bytes", 1),
        alignment=_int(accelerator["alignment"], "accelerator.alignment", 1, LARGEST_ALIGNMENT),
        parameters=_bool(data["parameters"], "parameters"),
        order=order,
        residencies=tuple(_residency(row, i) for i, row in enumerate(_list(data["residencies"], "residencies"))),
        transfers=tuple(_transfer(row, i) for i, row in enumerate(_list(data["transfers"], "transfers"))),
        bound_bytes=_int(data["bound_bytes"], "bound_bytes"),
        solver=_text(data["solver"], "solver"),
        seconds=_number(data["seconds"], "seconds"),
        fixed_order=_bool(data["fixed_order"], "fixed_order"),
        graph_options=_options(graph["options"]),
    )
    _check_totals(data, plan)
    return plan


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write ``plan`` to ``path``, whole or not at all.

    Raises
    ------
    RetensorError
        Where the file cannot be written.
    PlanError
        Where the plan has values that :func:`read_plan` would refuse.
    """
    data = plan_to_json(plan)
    plan_from_json(data)
    rows = {name: data.pop(name) for name in ("order", "residencies", "transfers")}
    # One row a line: a plan of thousands of residencies stays readable and its diffs small.
    head = json.dumps(data, indent=1, allow_nan=False).removesuffix("\n}")
    lists = [
        f' "{name}": [' + ",".join("\n  " + json.dumps(row) for row in values) + ("\n ]" if values else "]")
        for name, values in rows.items()
    ]
    write_atomic(path, ",\n".join([head, *lists]) + "\n}\n")


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in the file ``path``. Nothing in the file is run.

    Raises
    ------
    PlanError
        Where the file is missing, a directory, over 512 MiB, or not a well-formed plan.
    """
    data = read_json(path, "plan", PlanError)
    try:
        return plan_from_json(data)
    except PlanError as error:
        raise PlanError(f"cannot read plan '{brief(path)}': {error}") from error


def _residency(row: object, i: int) -> Residency:
    where = f"residencies[{i}]"
    fields = _object(row, _RESIDENCY_FIELDS, where)
    start, end = _int(fields["from"], f"{where}.from"), _int(fields["to"], f"{where}.to")
    return Residency(
        _text(fields["tensor"], f"{where}.tensor"), start, end, _int(fields["address"], f"{where}.address")
    )


def _transfer(row: object, i: int) -> Transfer:
    where = f"transfers[{i}]"
    fields = _object(row, _TRANSFER_FIELDS, where)
    kind = fields["kind"]
    if not isinstance(kind, str) or kind not in _KINDS:
        raise PlanError(f"{where}.kind is one of {', '.join(_KINDS)}, not {_shown(kind)}")
    tensor, step = _text(fields["tensor"], f"{where}.tensor"), _int(fields["step"], f"{where}.step")
    return Transfer(tensor, cast("TransferKind", kind), step, _int(fields["bytes"], f"{where}.bytes"))


def _check_totals(data: Mapping[str, Any], plan: Plan) -> None:
    """What the file says of itself must be what its transfers and bound say."""
    recounts = {"compulsory_bytes": plan.compulsory_bytes, "non_compulsory_bytes": plan.non_compulsory_bytes}
    for name, counted in recounts.items():
        # The sum of many transfers may pass the limit of one.
        recorded = _int(data[name], name, largest=LARGEST_SUM)
        if recorded != counted:
            raise PlanError(f"{name} is {recorded:,}, but the transfers add up to {counted:,}")
    if data["status"] != plan.status:
        raise PlanError(f'status is {_shown(data["status"])}, but bound and transfers say "{plan.status}"')
    gap = _number(data["gap"], "gap")
    if not math.isclose(gap, plan.gap, rel_tol=1e-9, abs_tol=1e-12):
        raise PlanError(f"gap is {gap:.6g}, but bound and transfers say {plan.gap:.6g}")


def _options(value: object) -> dict[str, Any]:
    """How the graph was loaded: any plain JSON, with the fields that loaders act on checked."""
    if not isinstance(value, dict):
        raise PlanError(f"graph.options is an object, not {_kind(value)}")
    options: dict[str, Any] = _plain(value, "graph.options", DEEPEST_OPTION)
    for name in ("fuse", "in_place"):
        if name in options:
            _bool(options[name], f"graph.options.{name}")
    if options.get("dtype") is not None:
        _text(options["dtype"], "graph.options.dtype")
    inputs = options.get("inputs")
    if inputs is None:
        return options
    if not isinstance(inputs, dict):
        raise PlanError(f"graph.options.inputs is an object of shapes, not {_kind(inputs)}")
    for name, shape in inputs.items():
        for i, size in enumerate(_list(shape, f"graph.options.inputs[{_shown(name)}]")):
            _int(size, f"graph.options.inputs[{_shown(name)}][{i}]")
    return options


def _plain(value: Any, where: str, depth: int) -> Any:
    """``value`` checked to be JSON of known types and limited depth; tuples become lists."""
    if depth == 0:
        raise PlanError(f"{where} is nested too deeply")
    if isinstance(value, dict):
        return {_text(key, where): _plain(item, f"{where}.{key}", depth - 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]", depth - 1) for i, item in enumerate(value)]
    if isinstance(value, str):
        return _text(value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _int(value, where, -LARGEST_INT)
    if isinstance(value, float):
        return _number(value, where, -math.inf)
    raise PlanError(f"{where} is {_kind(value)}, which a plan file cannot hold")


def _exactly(table: Mapping[str, Any], fields: tuple[str, ...], where: str) -> None:
    for name in fields:
        if name not in table:
            raise PlanError(f"{where} has no field '{name}'")
    if len(table) != len(fields):
        unknown = next(name for name in table if name not in fields)
        raise PlanError(f"{where} has an unknown field {_shown(unknown)}; fields are {', '.join(fields)}")


def _object(value: object, fields: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise PlanError(f"{where} is an object, not {_kind(value)}")
    _exactly(value, fields, where)
    return value


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise PlanError(f"{where} is a list, not {_kind(value)}")
    return value


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{where} is a string, not {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise PlanError(f"{where} holds half of a surrogate pair, which is no text") from None
    return value


def _bool(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{where} is true or false, not {_kind(value)}")
    return value


def _int(value: object, where: str, least: int = 0, largest: int = LARGEST_INT) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise PlanError(f"{where} is a whole number, not {_kind(value)}")
    if not least <= value <= largest:
        # The value itself is not printed: it may have thousands of digits.
        raise PlanError(f"{where} is out of range; {least:,} to {largest:,} is allowed")
    return value


def _number(value: object, where: str, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise PlanError(f"{where} is a number, not {_kind(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise PlanError(f"{where} is out of range; it is at most {LARGEST_INT:,}")
    if not math.isfinite(value) or value < least:
        raise PlanError(f"{where} is a finite number, at least {least:g}, not {value}")
    return float(value)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    names |= {int: "a whole number", float: "a number with a fraction"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value: object) -> str:
    """``value`` for a sentence: quoted, short, in ASCII."""
    if not isinstance(value, (str, float, bool, type(None))):
        return _kind(value)
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + '..."'
