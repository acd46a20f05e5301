"""One ONNX node: what it reads, what it is called, and whether it fits its operator's schema.

Shape inference in C++ takes the number and the types of a node's arguments for granted, so they are checked here,
in Python, before it sees the node.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, NodeProto

from retensor.errors import GraphError

LARGEST_DIMENSION = 2**31 - 1
_DEFAULT_DOMAINS = ("", "ai.onnx")
# Positions of inputs that hold integers and are weights, and that hold floats and are none.
_INTEGER_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "ConvInteger": (1,),
    "MatMulInteger": (1,),
    "QLinearConv": (3, 8),
    "QLinearMatMul": (3,),
    "DequantizeLinear": (0,),
    "Gather": (0,),
}
_NO_WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "BatchNormalization": (3, 4),
    "QLinearConv": (1, 4, 6),
    "QLinearMatMul": (1, 4, 6),
    "QuantizeLinear": (1,),
    "DequantizeLinear": (1,),
    "Resize": (1, 2),
    "Upsample": (1,),
    "OneHot": (2,),
}
_TERM = rb"[A-Za-z]*(\.\.\.)?[A-Za-z]*"
# Terms with two ellipses send shape inference into a loop without end.
_EQUATION = re.compile(_TERM + rb"(," + _TERM + rb")*(->" + _TERM + rb")?")


def shown(name: str, limit: int = 80) -> str:
    """A name from a file, made fit for one line of a message."""
    text = "".join(letter if letter.isprintable() else "?" for letter in str(name)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The first line of what a library said, made fit for a sentence."""
    lines = str(error).strip().splitlines()
    return shown(lines[0].strip(), 200) if lines else type(error).__name__


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs among a node's attributes (bodies of If, Loop and Scan)."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def reads(node: NodeProto) -> list[str]:
    """Names of the values a node reads, those its subgraphs capture included, each once."""
    names = dict.fromkeys(name for name in node.input if name)
    for body in subgraphs(node):
        names.update(dict.fromkeys(_captured(body)))
    return list(names)


def _captured(graph: GraphProto) -> list[str]:
    known = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    wanted: dict[str, None] = {}
    for node in graph.node:
        known.update(node.output)
        wanted.update(dict.fromkeys(reads(node)))
    wanted.update(dict.fromkeys(value.name for value in graph.output))
    return [name for name in wanted if name and name not in known]


@lru_cache(maxsize=4096)
def schema_of(kind: str, version: int, domain: str) -> Any:
    """The operator schema in force at ``version``, or None where onnx has none."""
    try:
        return onnx.defs.get_schema(kind, version, domain)
    except Exception:  # SchemaError is not exported by every version
        return None


def domain_of(node: NodeProto) -> str:
    """A node's domain, the default one as the empty string."""
    return "" if node.domain in _DEFAULT_DOMAINS else node.domain


def kind_of(node: NodeProto) -> str:
    """What a node computes, with the domain where it is not ONNX's own."""
    domain = domain_of(node)
    return f"{domain}.{node.op_type}" if domain else str(node.op_type)


@lru_cache(maxsize=4096)
def _signature(kind: str, version: int, domain: str) -> Any:
    schema = schema_of(kind, version, domain)
    if schema is None:
        return None
    variadic = onnx.defs.OpSchema.FormalParameterOption.Variadic
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    needed = [parameter.option == single for parameter in schema.inputs]
    open_ended = bool(schema.inputs) and schema.inputs[-1].option == variadic
    attributes = {name: (int(a.type), bool(a.required)) for name, a in schema.attributes.items()}
    bounds = (schema.min_input, schema.max_input, schema.min_output, schema.max_output)
    return bounds, needed, open_ended, attributes, [name for name, (_, must) in attributes.items() if must]


def check_node(node: NodeProto, opsets: Mapping[str, int], inside_function: bool = False) -> None:
    """Hold a node against its schema; inference in C++ takes the number and type of arguments for granted.

    Raises
    ------
    GraphError
    """
    where = f"node '{shown(node.name)}' ({shown(kind_of(node))})"
    texts = (node.name, node.op_type, node.domain, *node.input, *node.output, *(a.name for a in node.attribute))
    if any(isinstance(text, bytes) for text in texts):  # protobuf gives what is not UTF-8 as bytes
        raise GraphError(f"{where} holds a name that is not UTF-8 text")
    if not node.op_type:
        raise GraphError(f"{where} names no operator type")
    domain = domain_of(node)
    version = opsets.get(domain)
    if version is None:
        raise GraphError(f"{where} is of operator set '{shown(domain or 'ai.onnx')}', which the model does not import")
    for attribute in node.attribute:
        if attribute.ref_attr_name and not inside_function:
            raise GraphError(f"{where} refers to a function's attribute outside of any function")
        if attribute.type == AttributeProto.TENSOR:
            check_dimensions(attribute.t.dims, where)
        elif attribute.type == AttributeProto.SPARSE_TENSOR:
            check_dimensions(attribute.sparse_tensor.dims, where)
        elif attribute.name == "equation" and not _EQUATION.fullmatch(attribute.s.replace(b" ", b"")):
            raise GraphError(f"{where} has the equation '{shown(str(attribute.s)[2:-1])}', which is none of Einsum's")
    for body in subgraphs(node):
        for tensor in body.initializer:
            check_dimensions(tensor.dims, where)
        for inner in body.node:
            check_node(inner, opsets, inside_function)
    signature = _signature(node.op_type, version, domain)
    if signature is None:
        if domain == "":
            raise GraphError(f"{where} is no operator of the ONNX operator set {version}")
        return
    (least_in, most_in, least_out, most_out), needed, open_ended, attributes, required = signature
    if not least_in <= len(node.input) <= most_in:
        raise GraphError(f"{where} has {len(node.input)} inputs; {least_in} to {most_in} are allowed")
    if not least_out <= len(node.output) <= most_out:
        raise GraphError(f"{where} has {len(node.output)} outputs; {least_out} to {most_out} are allowed")
    for position, name in enumerate(node.input):
        if not name and (position >= len(needed) - open_ended or needed[position]):
            raise GraphError(f"{where} leaves its input {position} out, which it needs")
    present: set[str] = set()
    for attribute in node.attribute:
        if attribute.name in present:
            raise GraphError(f"{where} has its attribute '{shown(attribute.name)}' twice")
        present.add(attribute.name)
        known = attributes.get(attribute.name)
        if known is None:
            if not attribute.name.startswith("__"):
                raise GraphError(
                    f"{where} has an attribute '{shown(attribute.name)}', which the operator does not know"
                )
        elif attribute.type != known[0]:
            raise GraphError(f"{where} has its attribute '{shown(attribute.name)}' of the wrong type")
    for name in required:
        if name not in present:
            raise GraphError(f"{where} lacks its attribute '{name}'")


def check_dimensions(dimensions: Sequence[int], where: str) -> None:
    """Refuse negative and absurd dimensions.

    Raises
    ------
    GraphError
    """
    for size in dimensions:
        if not 0 <= size <= LARGEST_DIMENSION:
            raise GraphError(f"{where} has a dimension of {size:,}; 0 to 2**31 - 1 are allowed")


def attribute_of(node: NodeProto, name: str, default: Any = None) -> Any:
    """A plain attribute (number, string as bytes, or list) of a node."""
    for attribute in node.attribute:
        if attribute.name == name:
            if attribute.type == AttributeProto.INT:
                return attribute.i
            if attribute.type == AttributeProto.INTS:
                return list(attribute.ints)
    return default


def is_weight(node: NodeProto, position: int, floating: bool, rank: int) -> bool:
    """Whether a constant that a node reads at ``position`` is a parameter in the sense of training.

    ONNX marks none. Taken for one: an array of floats, except running statistics, scales and the like; and integers
    where an operator has quantised weights. Numbers without an axis are constants of the program.
    """
    kind = node.op_type if domain_of(node) == "" else ""
    if not floating:
        return position in _INTEGER_WEIGHTS.get(kind, ())
    return rank > 0 and position not in _NO_WEIGHTS.get(kind, ())


def plain_attributes(node: NodeProto) -> dict[str, int | list[int] | str]:
    """A node's attributes that are integers, lists of them or text."""
    found: dict[str, int | list[int] | str] = {}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.INT:
            found[attribute.name] = attribute.i
        elif attribute.type == AttributeProto.INTS:
            found[attribute.name] = list(attribute.ints)
        elif attribute.type == AttributeProto.STRING:
            found[attribute.name] = attribute.s.decode("utf-8", "replace")
    return found


def optional_outputs(node: NodeProto, opsets: Mapping[str, int]) -> set[int]:
    """Positions of outputs that the operator's schema lets a model leave out."""
    domain = domain_of(node)
    schema = schema_of(node.op_type, opsets.get(domain, 1), domain)
    if schema is None:
        return set()
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return {i for i, parameter in enumerate(schema.outputs) if parameter.option == optional}
