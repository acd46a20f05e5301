"""What each convolution of a model costs now, and what it would cost dense."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from retensor.compression.apriori.compress import KINDS, shape_of
from retensor.compression.apriori.factored import Factored
from retensor.files import described
from retensor.graph.modes import evaluating


@dataclass(frozen=True)
class Row:
    """One convolution; ``dense_`` figures are those of the dense layer in its place.

    Attributes
    ----------
    name, format : str
        ``"dense"`` where the layer is one of torch's.
    rank : tuple of int
    parameters, dense_parameters : int
        With the bias.
    macs, dense_macs : int
        Multiply-accumulates for the whole input.
    activation_bytes, dense_activation_bytes : int
        Of all outputs between the stages and at the end: what is written in one run, and what training keeps where
        the layer does not recompute.
    """

    name: str
    format: str
    rank: tuple[int, ...]
    parameters: int
    dense_parameters: int
    macs: int
    dense_macs: int
    activation_bytes: int
    dense_activation_bytes: int


@dataclass(frozen=True)
class Summary:
    """Rows for all convolutions in the order they run; ``print`` shows a table.

    Attributes
    ----------
    rows : tuple of Row
    parameters : int
        Of the whole model, whatever its layers are.
    """

    rows: tuple[Row, ...]
    parameters: int

    @property
    def total(self) -> Row:
        """The sums over all rows."""
        names = [name for name in Row.__dataclass_fields__ if name not in ("name", "format", "rank")]
        return Row("total", "", (), *(sum(getattr(row, name) for row in self.rows) for name in names))

    def __str__(self) -> str:
        """The table: each figure now, and dense in brackets."""
        head = ["layer", "format", "rank", "parameters", "multiply-accumulates", "activation bytes"]
        lines = [head]
        for row in (*self.rows, self.total):
            rank = ", ".join(map(str, row.rank))
            pairs = [
                f"{now:,} ({dense:,})"
                for now, dense in (
                    (row.parameters, row.dense_parameters),
                    (row.macs, row.dense_macs),
                    (row.activation_bytes, row.dense_activation_bytes),
                )
            ]
            lines.append([row.name or "(model)", row.format, rank, *pairs])
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = [
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in lines
        ]
        return "\n".join(line.rstrip() for line in [*text, f"{self.parameters:,} parameters in the whole model"])


@torch.no_grad()
def summary(model: nn.Module, inputs: Sequence[int] | torch.Tensor) -> Summary:
    """Parameters, multiply-accumulates and activations of each convolution, now and dense.

    Parameters
    ----------
    model : nn.Module
    inputs : sequence of int or torch.Tensor
        The shape of its input, with the batch, or an input.

    Returns
    -------
    Summary

    Raises
    ------
    TypeError
        Where the input is something else.

    Examples
    --------
    >>> from retensor.compression.apriori import CPConv2d
    >>> print(summary(nn.Sequential(CPConv2d(24, 24, 5, padding=2, rank=24)), (1, 24, 32, 32)))
    layer  format  rank      parameters    multiply-accumulates  activation bytes
    0      cp      24    1,416 (14,424)  1,425,408 (14,745,600)  393,216 (98,304)
    total                1,416 (14,424)  1,425,408 (14,745,600)  393,216 (98,304)
    1,416 parameters in the whole model
    """
    x = inputs if isinstance(inputs, torch.Tensor) else _zeros(model, inputs)
    rows: list[Row] = []
    handles = []

    def watch(name: str) -> Any:
        def hook(module: Any, given: tuple[Any, ...], output: torch.Tensor) -> None:
            rows.append(_row(name, module, given[0], output))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Factored) or type(module) in KINDS:
            handles.append(module.register_forward_hook(watch(name)))
    try:
        with evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return Summary(tuple(rows), sum(parameter.numel() for parameter in model.parameters()))


def _zeros(model: nn.Module, shape: Any) -> torch.Tensor:
    if not isinstance(shape, Sequence) or isinstance(shape, str) or not all(isinstance(size, int) for size in shape):
        raise TypeError(f"the input is {described(shape)}; its shape, such as (1, 2, 64, 64), or a tensor is needed")
    some = next(model.parameters(), torch.empty(0))
    return torch.zeros(*shape, device=some.device, dtype=some.dtype)


def _row(name: str, layer: Any, x: torch.Tensor, y: torch.Tensor) -> Row:
    shape = layer.shape if isinstance(layer, Factored) else shape_of(layer)
    dims = shape.dims
    batch = x.shape[0] if x.dim() == dims + 2 else 1
    bias = 0 if layer.bias is None else shape.outputs
    plain = shape.dense_parameters + bias
    transposed = layer.transposed if isinstance(layer, Factored) else KINDS[type(layer)].transposed
    reach, elements = (shape.fan_out, x.shape[-dims - 1 :]) if transposed else (shape.fan_in, y.shape[-dims - 1 :])
    macs = batch * math.prod(elements) * reach
    written = y.numel() * y.element_size()
    if not isinstance(layer, Factored):
        return Row(name, "dense", (), plain, plain, macs, macs, written, written)
    sizes = tuple(x.shape[-dims:])
    between = batch * sum(math.prod(made) for made in layer.output_shapes(sizes)) * y.element_size()
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    return Row(name, layer.format, layer.rank, parameters, plain, batch * layer.macs(sizes), macs, between, written)
