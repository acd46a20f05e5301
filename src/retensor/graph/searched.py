"""Two searched networks that neither torchvision nor timm has: DARTS and AmoebaNet-D, from their published genotypes.

A cell reads the outputs of the two cells before it and makes a few states; each is the sum of two operations on
earlier states, and some of them side by side are the cell's output. A *genotype* names the operations and what they
read, and the states to concatenate. A *reduction* cell halves height and width: its operations on states 0 and 1 have
stride 2.

- DARTS: Liu, Simonyan, Yang, "DARTS: differentiable architecture search", 2018, arXiv 1806.09055. Genotype
  ``DARTS_V2`` and the ImageNet network (C = 48 channels, 14 cells) as in the authors' code, github.com/quark0/darts
  (``cnn/genotypes.py``, ``cnn/model.py``, ``cnn/operations.py``), without the auxiliary head, which is for training:
  4.7 million parameters. State 0 comes from the cell before the last, state 1 from the last.
- AmoebaNet-D: Real, Aggarwal, Huang, Le, "Regularized evolution for image classifier architecture search", 2018,
  arXiv 1802.01548. Genotype and network as in github.com/kakaobrain/torchgpipe (``benchmarks/models/amoebanet``),
  which follows github.com/tensorflow/tpu (``models/official/amoeba_net``), where a normal cell's output is the states
  0, 3, 4 and 6. Its sizes (L, D), cells and filters, are those of Huang and others, "GPipe", 2018, arXiv 1811.06965;
  with (18, 208) it has the 81.5 million parameters stated there. State 0 comes from the last cell, state 1 from the
  one before. There ``max_pool_3x3`` is written as an average; here it is what its name says, of the same size.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch.fx import Node

CLASSES = 1000
"""ImageNet's."""

INPUTS = 2
"""States of a cell that come from other cells, numbered first."""


@dataclass(frozen=True)
class Genotype:
    """The wiring of a network's two kinds of cell.

    Attributes
    ----------
    normal, reduction : tuple of (str, int)
        Operation and the state it reads; two in a row are added and make the next state, the first one being 2.
    normal_concat, reduction_concat : tuple of int
        States that side by side (by channels) are the cell's output.
    """

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduction: tuple[tuple[str, int], ...]
    reduction_concat: tuple[int, ...]


DARTS_V2 = Genotype(
    normal=(
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("identity", 0),
        ("identity", 0), ("dil_conv_3x3", 2),
    ),
    normal_concat=(2, 3, 4, 5),
    reduction=(
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("identity", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("identity", 2),
        ("identity", 2), ("max_pool_3x3", 1),
    ),
    reduction_concat=(2, 3, 4, 5),
)  # fmt: skip
"""The cells of the DARTS paper's second-order search."""

AMOEBANET_D = Genotype(
    normal=(
        ("conv_1x1", 1), ("max_pool_3x3", 1),
        ("identity", 1), ("conv_1x7_7x1", 0),
        ("conv_1x1", 0), ("conv_1x7_7x1", 0),
        ("max_pool_3x3", 2), ("identity", 2),
        ("avg_pool_3x3", 1), ("conv_1x1", 5),
    ),
    normal_concat=(0, 3, 4, 6),
    reduction=(
        ("max_pool_2x2", 0), ("max_pool_3x3", 0),
        ("identity", 2), ("conv_3x3", 1),
        ("conv_1x7_7x1", 2), ("max_pool_3x3", 2),
        ("identity", 3), ("max_pool_2x2", 1),
        ("avg_pool_3x3", 2), ("conv_1x1", 3),
    ),
    reduction_concat=(4, 5, 6),
)  # fmt: skip
"""AmoebaNet-D's cells, as the TensorFlow and PyTorch code has them."""


def darts(channels: int = 48, cells: int = 14, genotype: Genotype = DARTS_V2) -> torch.nn.Module:
    """The ImageNet network of the DARTS paper, from an image of N x 3 x 224 x 224 (or another multiple of 32).

    Parameters
    ----------
    channels : int
        ``C``, filters of a cell's operations before the first reduction; each reduction doubles them.
    cells : int
        Of them, those at one and two thirds are reductions.
    genotype : Genotype

    Returns
    -------
    torch.nn.Module
        In training mode, with torch's random weights; its output is N x 1000.

    Examples
    --------
    >>> sum(weight.numel() for weight in darts().parameters())
    4718752
    """
    net = _Network()
    x = net.conv(net.image, "stem0.0", channels // 2, 3, stride=2, relu=False)
    older = net.conv(x, "stem0.1", channels, 3, stride=2)
    newer = net.conv(older, "stem1", channels, 3, stride=2)
    reduced = True
    for i in range(cells):
        reduction = i in (cells // 3, 2 * cells // 3)
        channels *= 2 if reduction else 1
        cell = f"cells.{i}"
        if reduced:
            first = net.factorized_reduce(older, f"{cell}.preprocess0", channels, pad=False)
        else:
            first = net.conv(older, f"{cell}.preprocess0", channels)
        second = net.conv(newer, f"{cell}.preprocess1", channels)
        older, newer = newer, net.cell(cell, genotype, [first, second], reduction)
        reduced = reduction
    return net.classified(newer, "DARTS")


def amoebanet_d(cells: int = 18, filters: int = 256, genotype: Genotype = AMOEBANET_D) -> torch.nn.Module:
    """AmoebaNet-D (L, D) for ImageNet, from an image of N x 3 x 224 x 224 (or another multiple of 32).

    Parameters
    ----------
    cells : int
        ``L``, normal cells in all, a multiple of 3; two reductions before and two between them come on top.
    filters : int
        ``D``, of a cell's operations in the first third, a multiple of 16; each reduction doubles them.
    genotype : Genotype

    Returns
    -------
    torch.nn.Module
        In training mode, with torch's random weights; its output is N x 1000.

    Raises
    ------
    ValueError
        Where ``cells`` is no multiple of 3, or ``filters`` none of 16.

    Notes
    -----
    (18, 256) is the size that GPipe and torchgpipe measure speed with, and the one that PyTorch users run.

    Examples
    --------
    >>> sum(weight.numel() for weight in amoebanet_d(3, 32).parameters())
    899224
    """
    if cells < 3 or cells % 3:
        raise ValueError(f"AmoebaNet-D has a multiple of 3 normal cells, not {cells}")
    if filters < 1 or filters % 16:
        raise ValueError(f"AmoebaNet-D has a multiple of 16 filters, not {filters}")
    net = _Network()
    channels = filters // 4
    older = newer = net.conv(net.image, "stem", channels, 3, stride=2)
    reduced = False
    third = [False] * (cells // 3)
    for i, reduction in enumerate([True, True, *third, True, *third, True, *third]):
        channels *= 2 if reduction else 1
        cell = f"cells.{i}"
        first = net.conv(newer, f"{cell}.reduce1", channels)
        if reduced:
            second = net.factorized_reduce(older, f"{cell}.reduce2", channels, pad=True)
        elif older.channels != channels:
            second = net.conv(older, f"{cell}.reduce2", channels)
        else:
            second = older
        older, newer = newer, net.cell(cell, genotype, [first, second], reduction)
        reduced = reduction
    return net.classified(newer, "AmoebaNetD")


@dataclass(frozen=True)
class _Value:
    """A tensor of the network while it is written."""

    node: Node
    channels: int


class _Network:
    """A torch module written operation by operation, its parts named by the cell and the edge they belong to."""

    def __init__(self) -> None:
        import torch

        self.nn = torch.nn
        self.torch = torch
        self.graph = torch.fx.Graph()
        self.parts: dict[str, torch.nn.Module] = {}
        self.image = _Value(self.graph.placeholder("x"), 3)

    def classified(self, x: _Value, name: str) -> torch.nn.Module:
        """The whole network: ``x`` averaged over its positions, and a linear classifier."""
        x = self._apply(self.nn.AdaptiveAvgPool2d(1), "pool", x)
        flat = self.graph.call_function(self.torch.flatten, (x.node, 1))
        x = self._apply(self.nn.Linear(x.channels, CLASSES), "classifier", _Value(flat, x.channels))
        self.graph.output(x.node)
        return self.torch.fx.GraphModule(self.parts, self.graph, class_name=name)

    def cell(self, name: str, genotype: Genotype, states: list[_Value], reduction: bool) -> _Value:
        """A cell's output, from its first two states."""
        edges = genotype.reduction if reduction else genotype.normal
        states = list(states)
        for i in range(0, len(edges), 2):
            left, right = (
                self._edge(f"{name}.edges.{i + k}", operation, states[state], 2 if reduction and state < INPUTS else 1)
                for k, (operation, state) in enumerate(edges[i : i + 2])
            )
            states.append(_Value(self.graph.call_function(operator.add, (left.node, right.node)), left.channels))
        chosen = genotype.reduction_concat if reduction else genotype.normal_concat
        return self._side_by_side([states[i] for i in chosen])

    def conv(
        self, x: _Value, name: str, channels: int, kernel: int | tuple[int, int] = 1, *,
        stride: int | tuple[int, int] = 1, relu: bool = True,
    ) -> _Value:  # fmt: skip
        """ReLU (unless told otherwise), a convolution that pads to keep height and width, a normalisation."""
        if relu:
            x = self._apply(self.nn.ReLU(), f"{name}.relu", x)
        padding = tuple(size // 2 for size in kernel) if isinstance(kernel, tuple) else kernel // 2
        conv = self.nn.Conv2d(x.channels, channels, kernel, stride=stride, padding=padding, bias=False)
        return self._normalised(name, self._apply(conv, f"{name}.conv", x, channels))

    def factorized_reduce(self, x: _Value, name: str, channels: int, *, pad: bool) -> _Value:
        """Half the height and width: two 1x1 convolutions of stride 2, the second one pixel further on, side by side.

        With ``pad`` the pixel that the second one lacks at the end is zero, so an odd size serves too.
        """
        x = self._apply(self.nn.ReLU(), f"{name}.relu", x)
        where = (slice(None), slice(None), slice(1, None), slice(1, None))
        shifted = _Value(self.graph.call_function(operator.getitem, (x.node, where)), x.channels)
        if pad:
            shifted = self._apply(self.nn.ZeroPad2d((0, 1, 0, 1)), f"{name}.pad", shifted)
        halves = []
        for i, half in enumerate((x, shifted), start=1):
            conv = self.nn.Conv2d(x.channels, channels // 2, 1, stride=2, bias=False)
            halves.append(self._apply(conv, f"{name}.conv{i}", half, channels // 2))
        return self._normalised(name, self._side_by_side(halves))

    def _edge(self, name: str, operation: str, x: _Value, stride: int) -> _Value:
        channels = x.channels
        match operation:
            case "identity" if stride == 1:
                return x
            case "max_pool_2x2":
                return self._apply(self.nn.MaxPool2d(2, stride), f"{name}.pool", x)
            case "max_pool_3x3":
                return self._apply(self.nn.MaxPool2d(3, stride, padding=1), f"{name}.pool", x)
            case "avg_pool_3x3":
                pool = self.nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
                return self._apply(pool, f"{name}.pool", x)
            case "sep_conv_3x3":
                x = self._separable(f"{name}.0", x, stride, 1)
                return self._separable(f"{name}.1", x, 1, 1)
            case "dil_conv_3x3":
                return self._separable(name, x, stride, 2)
            case "conv_1x1":
                return self.conv(x, name, channels, stride=stride)
            case "conv_3x3":
                x = self.conv(x, f"{name}.0", channels // 4)
                x = self.conv(x, f"{name}.1", channels // 4, 3, stride=stride)
                return self.conv(x, f"{name}.2", channels)
            case "conv_1x7_7x1":
                x = self.conv(x, f"{name}.0", channels // 4)
                x = self.conv(x, f"{name}.1", channels // 4, (1, 7), stride=(1, stride))
                x = self.conv(x, f"{name}.2", channels // 4, (7, 1), stride=(stride, 1))
                return self.conv(x, f"{name}.3", channels)
        raise ValueError(f"a genotype names operation '{operation}' with stride {stride}, which no cell here has")

    def _separable(self, name: str, x: _Value, stride: int, dilation: int) -> _Value:
        """ReLU, a 3x3 convolution of each channel alone, a 1x1 convolution, a normalisation."""
        x = self._apply(self.nn.ReLU(), f"{name}.relu", x)
        alone = self.nn.Conv2d(
            x.channels, x.channels, 3, stride, padding=dilation, dilation=dilation, groups=x.channels, bias=False
        )
        x = self._apply(alone, f"{name}.depthwise", x)
        point = self.nn.Conv2d(x.channels, x.channels, 1, bias=False)
        return self._normalised(name, self._apply(point, f"{name}.pointwise", x))

    def _normalised(self, name: str, x: _Value) -> _Value:
        return self._apply(self.nn.BatchNorm2d(x.channels), f"{name}.norm", x)

    def _apply(self, part: torch.nn.Module, name: str, x: _Value, channels: int | None = None) -> _Value:
        self.parts[name] = part
        return _Value(self.graph.call_module(name, (x.node,)), channels or x.channels)

    def _side_by_side(self, values: list[_Value]) -> _Value:
        nodes = [value.node for value in values]
        return _Value(self.graph.call_function(self.torch.cat, (nodes, 1)), sum(value.channels for value in values))
