"""A bare graph as JSON, so that any compiler's graph can be planned: operators, tensors, bytes.

The form is published as ``graph.schema.json`` beside this file, under the id ``retensor.graph/1``. Reading is
strict: what the form does not know is refused with a sentence, nothing is guessed and nothing is run.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from retensor.errors import GraphError
from retensor.files import brief, write_atomic
from retensor.graph.structure import LARGEST_TENSOR, MOST_MACS, Graph, Operator, Tensor
from retensor.jsonfile import read_json

SCHEMA = "retensor.graph/1"
PLAN_SCHEMA = "retensor.plan/1"
DEEPEST_OPTION = 8
LARGEST_OPTION = 2**60
LONGEST_NAME = 4096

_TOP = {"schema", "name", "tensors", "operators", "outputs", "aliases", "options"}
_TENSOR = {"name", "bytes", "role", "shape", "dtype", "buffer"}
_OPERATOR = {"name", "kind", "inputs", "outputs", "nodes", "macs"}
_ROLES = ("activation", "input", "parameter")


def graph_to_json(graph: Graph) -> dict[str, Any]:
    """The JSON form of a graph, as plain dicts and lists.

    Parameters
    ----------
    graph : Graph
        Its program is left out.

    Examples
    --------
    >>> from retensor.graph.structure import Graph, Operator, Tensor
    >>> graph = Graph("net", [Operator("a", "Relu", ("x",), ("y",))], [Tensor("x", 4, "input"), Tensor("y", 4)], ["y"])
    >>> graph_from_json(graph_to_json(graph)) == graph
    True
    """
    tensors = []
    for tensor in graph.tensors.values():
        entry: dict[str, Any] = {"name": tensor.name, "bytes": tensor.nbytes, "role": tensor.role}
        if tensor.shape is not None:
            entry["shape"] = list(tensor.shape)
        if tensor.dtype is not None:
            entry["dtype"] = tensor.dtype
        if tensor.buffer:
            entry["buffer"] = True
        tensors.append(entry)
    operators: list[dict[str, Any]] = []
    for operator in graph.operators:
        entry = {
            "name": operator.name,
            "kind": operator.kind,
            "inputs": list(operator.inputs),
            "outputs": list(operator.outputs),
        }
        if operator.nodes:
            entry["nodes"] = list(operator.nodes)
        if operator.macs is not None:
            entry["macs"] = operator.macs
        operators.append(entry)
    form: dict[str, Any] = {
        "schema": SCHEMA,
        "name": graph.name,
        "tensors": tensors,
        "operators": operators,
        "outputs": list(graph.outputs),
    }
    if graph.aliases:
        form["aliases"] = dict(graph.aliases)
    if graph.options:
        form["options"] = dict(graph.options)
    return form


def write_graph(graph: Graph, path: str | os.PathLike[str]) -> None:
    """Write a graph as JSON, whole or not at all.

    Raises
    ------
    GraphError
        Where a name cannot be written as text.
    RetensorError
        Where ``path`` cannot be written.
    """
    try:
        text = json.dumps(graph_to_json(graph), indent=1, ensure_ascii=False, allow_nan=False)
        data = text.encode()
    except (TypeError, ValueError) as error:  # a lone surrogate, options that are no plain data
        raise GraphError(f"graph '{graph.name!a}' cannot be written as JSON: {error}") from None
    write_atomic(path, data + b"\n")


def read_graph(path: str | os.PathLike[str]) -> Graph:
    """Read a graph from a JSON file.

    Returns
    -------
    Graph
        Without a program: it can be planned, not run.

    Raises
    ------
    GraphError
        Where the file cannot be read or is not of the form; the sentence names the place.
    """
    return graph_from_json(read_json(path, "graph", GraphError), brief(path))


def graph_from_json(form: Any, where: str = "the graph") -> Graph:
    """The graph that a JSON form describes.

    Parameters
    ----------
    form : dict
        As :func:`graph_to_json` makes it. Operators may stand in any order; the one given is kept where it runs.
    where : str
        What to call it in errors.

    Raises
    ------
    GraphError
    """
    if isinstance(form, dict) and form.get("schema") == PLAN_SCHEMA:
        raise GraphError(f"{where} is a plan, not a model; give the model that the plan was made for")
    _keys(form, where, _TOP, {"schema", "name", "tensors", "operators", "outputs"})
    if form["schema"] != SCHEMA:
        raise GraphError(f"{where} has schema {_cut(form['schema'])}; '{SCHEMA}' is read")
    name = _name(form["name"], f"the name of {where}")
    operators = [
        _operator(entry, f"operator {i} of {where}") for i, entry in enumerate(_list(form["operators"], "operators"))
    ]
    made = {output for operator in operators for output in operator.outputs}
    tensors = [
        _tensor(entry, f"tensor {i} of {where}", made) for i, entry in enumerate(_list(form["tensors"], "tensors"))
    ]
    outputs = _names(form["outputs"], f"the outputs of {where}")
    aliases = _object(form.get("aliases", {}), f"the aliases of {where}")
    known = {tensor.name for tensor in tensors}
    for value, target in aliases.items():
        _name(value, f"an alias of {where}")
        if _name(target, f"an alias of {where}") not in known:
            raise GraphError(f"{where} has an alias of tensor {_cut(target)}, which it does not have")
    options = _options(form.get("options", {}), f"the options of {where}")
    graph = Graph(name, _in_order(operators, where), tensors, outputs, aliases, options)
    _check_touched(form["tensors"], operators, outputs)
    return graph


def _tensor(entry: Any, where: str, made: set[str]) -> Tensor:
    _keys(entry, where, _TENSOR, {"name", "bytes"})
    name = _name(entry["name"], f"the name of {where}")
    where = f"tensor {_cut(name)}"
    nbytes = _count(entry["bytes"], f"the bytes of {where}")
    role = entry.get("role", "activation" if name in made else "input")
    if not isinstance(role, str) or role not in _ROLES:
        raise GraphError(f"the role of {where} is {_cut(role)}; one of {', '.join(_ROLES)} is allowed")
    shape, dtype = entry.get("shape"), entry.get("dtype")
    if shape is not None:
        shape = tuple(_count(size, f"a dimension of {where}") for size in _list(shape, f"the shape of {where}"))
    if dtype is not None:
        dtype = _name(dtype, f"the dtype of {where}")
    buffer = entry.get("buffer", False)
    if not isinstance(buffer, bool):
        raise GraphError(f"'buffer' of {where} is {_cut(buffer)}; true or false is needed")
    return Tensor(name, nbytes, role, shape, dtype, buffer)  # type: ignore[arg-type]


def _check_touched(entries: Any, operators: Sequence[Operator], outputs: Sequence[str]) -> None:
    """Refuse a tensor that nothing touches, most often a misspelt name; one said to be an input may be unused."""
    touched = {name for operator in operators for name in operator.inputs + operator.outputs} | set(outputs)
    for entry in entries:
        if entry["name"] not in touched and entry.get("role") not in ("input", "parameter"):
            raise GraphError(
                f"tensor {_cut(entry['name'])} is read and made by no operator and is no output; leave it out, "
                "or say by its role that it is an input or a parameter"
            )


def _operator(entry: Any, where: str) -> Operator:
    _keys(entry, where, _OPERATOR, {"name", "inputs", "outputs"})
    name = _name(entry["name"], f"the name of {where}")
    where = f"operator {_cut(name)}"
    return Operator(
        name,
        _name(entry.get("kind", "operator"), f"the kind of {where}"),
        _names(entry["inputs"], f"the inputs of {where}"),
        _names(entry["outputs"], f"the outputs of {where}"),
        _names(entry.get("nodes", []), f"the nodes of {where}"),
        None if entry.get("macs") is None else _count(entry["macs"], f"the macs of {where}", MOST_MACS),
    )


def _in_order(operators: Sequence[Operator], where: str) -> list[Operator]:
    """``operators`` in an order that runs, as near as can be to the one given."""
    maker: dict[str, int] = {}
    for index, operator in enumerate(operators):
        for output in operator.outputs:
            if maker.setdefault(output, index) != index:
                raise GraphError(f"tensor {_cut(output)} is made by two operators of {where}")
    sources = [{maker[name] for name in operator.inputs if name in maker} for operator in operators]
    followers: list[list[int]] = [[] for _ in operators]
    waits = [len(group) for group in sources]
    for index, group in enumerate(sources):
        for source in group:
            followers[source].append(index)
    ready = [index for index, count in enumerate(waits) if count == 0]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for follower in followers[index]:
            waits[follower] -= 1
            if waits[follower] == 0:
                heapq.heappush(ready, follower)
    if len(order) < len(operators):
        stuck = next(operators[index].name for index, count in enumerate(waits) if count > 0)
        raise GraphError(f"{where} has a cycle; operator {_cut(stuck)} waits for its own result")
    return [operators[index] for index in order]


def _options(value: Any, where: str) -> Mapping[str, Any]:
    """How the graph was loaded, for plans to repeat: any plain JSON, with the fields that loaders act on checked."""
    options = _object(value, where)
    _check_plain(options, where, DEEPEST_OPTION)
    for key in ("fuse", "in_place"):
        if not isinstance(options.get(key, False), bool):
            raise GraphError(f"'{key}' in {where} is {_cut(options[key])}; true or false is needed")
    if options.get("dtype") is not None:
        _name(options["dtype"], f"'dtype' in {where}")
    if options.get("inputs") is not None:
        for name, shape in _object(options["inputs"], f"'inputs' in {where}").items():
            for size in _list(shape, f"the shape of {_cut(name)} in {where}"):
                _count(size, f"a dimension of {_cut(name)} in {where}")
    return options


def _check_plain(value: Any, where: str, depth: int) -> None:
    if depth == 0:
        raise GraphError(f"{where} are nested more than {DEEPEST_OPTION} deep")
    if isinstance(value, dict):
        for key, entry in value.items():
            _name(key, f"a key in {where}")
            _check_plain(entry, where, depth - 1)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_plain(entry, where, depth - 1)
    elif isinstance(value, str):
        _name(value, f"a text in {where}")
    elif value is not None and not (isinstance(value, (int, float)) and abs(value) <= LARGEST_OPTION):
        raise GraphError(f"a value in {where} is {_cut(value)}; plain JSON with numbers up to 2**60 is needed")


def _cut(value: Any) -> str:
    try:
        text = ascii(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise GraphError(f"{where} is {_cut(value)}; an object is needed")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise GraphError(f"{where} is {_cut(value)}; a list is needed")
    return list(value)


def _keys(value: Any, where: str, allowed: set[str], required: set[str]) -> None:
    table = _object(value, where)
    for key in table:
        if key not in allowed:
            raise GraphError(f"{where} has the key {_cut(key)}; known are {', '.join(sorted(allowed))}")
    for key in sorted(required):
        if key not in table:
            raise GraphError(f"{where} has no '{key}', which it needs")


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise GraphError(f"{where} is {_cut(value)}; a text of up to {LONGEST_NAME} characters is needed")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise GraphError(f"{where} is {_cut(value)}, which is half of a character")
    return value


def _names(value: Any, where: str) -> tuple[str, ...]:
    return tuple(_name(entry, f"an entry of {where}") for entry in _list(value, where))


def _count(value: Any, where: str, most: int = LARGEST_TENSOR) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise GraphError(f"{where} is {_cut(value)}; a whole number from 0 to 2**{most.bit_length() - 1} is needed")
    return value
