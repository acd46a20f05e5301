"""A model as operators and tensors: from ONNX, from torch.export, by name, from JSON."""

from retensor.graph.structure import Graph, Operator, Program, Tensor

__all__ = ["Graph", "Operator", "Program", "Tensor"]
