"""A model as operators and tensors: from ONNX, from torch.export, by name, from JSON."""

from retensor.graph.json import graph_from_json, graph_to_json, read_graph, write_graph
from retensor.graph.load import light_models, load
from retensor.graph.merge import merge, merged_kinds
from retensor.graph.structure import Graph, Operator, Program, Tensor
from retensor.graph.training import training_graph

__all__ = [
    "Graph",
    "Operator",
    "Program",
    "Tensor",
    "graph_from_json",
    "graph_to_json",
    "light_models",
    "load",
    "merge",
    "merged_kinds",
    "read_graph",
    "training_graph",
    "write_graph",
]
