r"""What a recipe costs beside its products: operations, passes over memory, random numbers and bits.

An operand of E numbers (filled up to whole blocks) is read once, compared for its blocks' largest (E), divided by the
scale (E) and rounded (E). On top of that

- tensor scaling reads all of it once more before the first block can be coded, and compares E / B block scales;
- a Hadamard transform of size n takes :math:`E \log_2 n` additions, E changes of sign and E multiplications by
  :math:`n^{-1/2}`;
- stochastic rounding takes E random numbers;
- the gradient of scales takes a subtraction, a multiplication and an addition for each number of the forward operands
  (the residual, and its projection), and reads them again in the backward pass;
- slopes of elements other than 1 take so many operations for each number of their operand as
  :data:`SLOPE_OPERATIONS` says, and read it again;
- outliers take a selection of the quantile, 2 E comparisons and E subtractions, and a sparse product of
  :math:`2 (1 - \alpha) M N K` operations forward and for each of both gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from retensor.compression.fp4.gradient import Estimator
from retensor.compression.fp4.layers import FP4Conv1D, FP4Conv2d, FP4Linear, convert
from retensor.compression.fp4.recipe import GEMMS, OPERANDS, Recipe
from retensor.graph.modes import evaluating
from retensor.replacing.match import Pattern
from retensor.replacing.replace import copied

SLOPE_OPERATIONS: dict[Estimator, int] = {"ste": 0, "clipped": 4, "dge": 14, "tanh": 14, "linear": 12}
"""For a number: division by the scale, two comparisons with the grid's ends, the slope within a cell, whose ends are
looked up, and the product with the gradient; a power or a tanh counted as one."""


@dataclass(frozen=True)
class OperandCost:
    """One operand of one product.

    Attributes
    ----------
    layer, operand : str
    elements : int
        With what fills up blocks.
    comparisons, divisions, roundings : int
        What any format in blocks takes.
    hadamard_adds, hadamard_products : int
        Of the transform; the products are signs and the factor.
    randoms : int
        Random numbers.
    gradient_operations : int
        Of the gradient of scales.
    slope_operations : int
        Of the slopes of elements.
    outlier_operations : int
        Comparisons and subtractions; without the sparse product, which is the product's.
    passes : int
        Times that all numbers are read in full precision.
    bits : float
        For an element as it is kept, with its share of scales.
    """

    layer: str
    operand: str
    elements: int
    comparisons: int
    divisions: int
    roundings: int
    hadamard_adds: int
    hadamard_products: int
    randoms: int
    gradient_operations: int
    slope_operations: int
    outlier_operations: int
    passes: int
    bits: float

    @property
    def operations(self) -> int:
        """All of them, a random number counted as one."""
        return (
            self.comparisons + self.divisions + self.roundings + self.hadamard_adds + self.hadamard_products
            + self.randoms + self.gradient_operations + self.slope_operations + self.outlier_operations
        )  # fmt: skip


@dataclass(frozen=True)
class Overhead:
    """Costs of a training step.

    Attributes
    ----------
    operands : tuple of OperandCost
    products : dict of str to int
        Operations of the products in 4 bits, ``"fwd"``, ``"dgrad"`` and ``"wgrad"``, a multiply-add counted twice.
    sparse : int
        Operations of sparse products of outliers, in full precision.
    """

    operands: tuple[OperandCost, ...]
    products: dict[str, int]
    sparse: int

    @property
    def product_operations(self) -> int:
        """Of all products in 4 bits."""
        return sum(self.products.values())

    @property
    def operations(self) -> int:
        """Of everything beside them."""
        return sum(one.operations for one in self.operands) + self.sparse

    @property
    def ratio(self) -> float:
        """Operations beside the products, for one of the products'."""
        return self.operations / self.product_operations if self.product_operations else 0.0

    @property
    def passes(self) -> float:
        """How often an operand is read in full precision, in the mean over numbers."""
        elements = sum(one.elements for one in self.operands)
        return sum(one.passes * one.elements for one in self.operands) / elements if elements else 0.0

    @property
    def bits(self) -> float:
        """Bits of an element of an operand, in the mean."""
        elements = sum(one.elements for one in self.operands)
        return sum(one.bits * one.elements for one in self.operands) / elements if elements else 0.0

    def __add__(self, other: Overhead) -> Overhead:
        """Of both."""
        products = {name: self.products[name] + other.products[name] for name in GEMMS}
        return Overhead(self.operands + other.operands, products, self.sparse + other.sparse)

    def __str__(self) -> str:
        """In a line."""
        return (
            f"{self.operations:,} operations beside {self.product_operations:,} of products ({self.ratio:.1%}), "
            f"{self.passes:.2f} passes, {self.bits:.2f} bits an element"
        )


def product_overhead(m: int, n: int, k: int, recipe: Recipe, *, batch: int = 1, layer: str = "") -> Overhead:
    """Of one layer's three products: ``batch`` times (m, k) with (n, k).

    Parameters
    ----------
    m, n, k : int
        Tokens, outputs and inputs.
    recipe : Recipe
    batch : int
        Products of that size, whose operands share a tensor's scale.
    layer : str
        A name.

    Returns
    -------
    Overhead

    Examples
    --------
    >>> print(product_overhead(512, 256, 256, Recipe()))
    2,228,224 operations beside 201,326,592 of products (1.1%), 1.00 passes, 4.50 bits an element
    """
    shapes = {
        # Rows, and the length of the axis that is summed over.
        "fwd.x": (m, k), "fwd.w": (n, k), "dgrad.dy": (m, n), "dgrad.w": (k, n), "wgrad.dy": (n, m), "wgrad.x": (k, m),
    }  # fmt: skip
    costs = []
    for operand in OPERANDS:
        rows, length = shapes[operand]
        cost = _operand(operand, rows * batch, length, recipe, layer)
        if cost is not None:
            costs.append(cost)
    whole = {"fwd": (m, n, k), "dgrad": (m, k, n), "wgrad": (n, k, m)}
    products = {
        name: 2 * batch * first * second * _filled(length, recipe.hadamard.get(name, 1))
        for name, (first, second, length) in whole.items()
    }
    sparse = 0 if recipe.outlier is None else 3 * round(2 * batch * (1 - recipe.outlier) * m * n * k)
    return Overhead(tuple(costs), products, sparse)


def overhead(
    model: nn.Module,
    recipe: Recipe,
    example: Any,
    include: Sequence[Pattern] = (nn.Linear, nn.Conv2d),
    exclude: Sequence[Pattern] = (),
) -> Overhead:
    """What training a model by a recipe costs in a step, from the shapes that an example has on its way through.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    recipe : Recipe
    example : torch.Tensor or tuple
        Arguments of the model: a batch.
    include, exclude
        Which layers, as in :func:`convert`.

    Returns
    -------
    Overhead
        The first layer's gradient of the input is counted although a training may not ask for it.

    Raises
    ------
    TypeError, ValueError
        As :func:`convert`.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    >>> found = overhead(net, Recipe(), torch.zeros(128, 64))
    >>> found.products["fwd"], len(found.operands), found.bits
    (655360, 12, 4.5)
    """
    made = convert(copied(model), recipe, include, exclude)
    found: list[Overhead] = []

    def told(name: str) -> Any:
        def hook(layer: Any, arguments: Any, out: torch.Tensor) -> None:
            batch, n, k = 1, layer.weight.shape[0], prod(layer.weight.shape[1:])
            k, n = layer.weight.shape if isinstance(layer, FP4Conv1D) else (k, n)
            m = out.numel() // n
            if isinstance(layer, FP4Conv2d):
                batch, n = layer.groups, n // layer.groups
            found.append(product_overhead(m, n, k, layer.recipe, batch=batch, layer=name))

        return hook

    for name, layer in made.named_modules():
        if isinstance(layer, FP4Linear | FP4Conv1D | FP4Conv2d):
            layer.register_forward_hook(told(name))
    with torch.no_grad(), evaluating(made):
        made(*example) if isinstance(example, tuple) else made(example)
    total = Overhead((), dict.fromkeys(GEMMS, 0), 0)
    for one in found:
        total = total + one
    return total


def _operand(operand: str, rows: int, length: int, recipe: Recipe, layer: str) -> OperandCost | None:
    product, _, _ = operand.partition(".")
    format, size = recipe.format(operand), recipe.hadamard.get(product)
    rotated = rows * _filled(length, size) if size else 0
    raw = rows * length
    clamps = recipe.outlier is not None and operand == "fwd.x"
    if format is None and not size and not clamps:
        return None
    elements = rows * _filled(_filled(length, size or 1), format.block) if format else raw
    codes = elements if format else 0
    slope = recipe.estimator(operand) if format is not None and product == "fwd" else "ste"
    scale = format is not None and product == "fwd" and recipe.scale_grad != "none"
    again = scale or slope != "ste"
    scaled = format is not None and bool(format.tensor_scale)
    return OperandCost(
        layer,
        operand,
        elements,
        comparisons=codes + (codes // format.block if format and scaled else 0),
        divisions=codes,
        roundings=codes,
        hadamard_adds=rotated * (size.bit_length() - 1) if size else 0,
        hadamard_products=2 * rotated,
        randoms=codes if recipe.rounding(operand) == "stochastic" else 0,
        gradient_operations=3 * elements if scale else 0,
        slope_operations=SLOPE_OPERATIONS[slope] * elements,
        outlier_operations=4 * raw if clamps else 0,
        passes=1 + scaled + again + clamps,
        bits=format.bits_per_element(raw) * elements / raw if format else 32.0,
    )


def _filled(length: int, size: int) -> int:
    return ceil(length / size) * size
