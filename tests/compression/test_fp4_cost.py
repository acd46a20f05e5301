"""What recipes cost, by counting what runs: products, random numbers, comparisons, butterflies, slopes, outliers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retensor.compression import fp4
from retensor.quantizing import GRIDS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(m: int, n: int, k: int, recipe: fp4.Recipe) -> tuple[Any, ...]:
    layer = fp4.FP4Linear(k, n, bias=False, recipe=recipe)
    layer.weight.data = normal(n, k, seed=1)
    return layer, normal(m, k).requires_grad_(), normal(m, n, seed=2)


@pytest.mark.parametrize(
    "recipe",
    [
        fp4.Recipe(fp4.Format(scale="e8m0"), rounding_bwd="nearest"),
        fp4.Recipe(fp4.UE5M3, hadamard={"wgrad": 16}),
        fp4.Recipe(fp4.Format(scale="e4m3", block=8), hadamard={"fwd": 8, "dgrad": 4}, rounding_fwd="stochastic"),
        fp4.Recipe(fp4.UE5M3, fp4.Format(scale="float32")),
        fp4.Recipe(fp4.NVFP4, bwd=None, hadamard={"fwd": 32}),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(64, 32, 48), (50, 20, 36)])
def test_the_cost_is_what_counting_finds(recipe: fp4.Recipe, shape: tuple[int, int, int]) -> None:
    layer, x, dy = linear(*shape, recipe=recipe)
    cost = fp4.product_overhead(*shape, recipe)
    with FlopCounterMode(display=False) as flops:
        layer(x).backward(dy)
    with fp4.OperationCounter() as counter:
        layer(x).backward(dy)
    assert flops.get_total_flops() == counter["product"] == cost.product_operations
    assert counter["rand"] == sum(one.randoms for one in cost.operands)
    assert counter["amax"] == sum(one.comparisons for one in cost.operands)
    formats = [recipe.format(one.operand) for one in cost.operands]
    blocks = [
        one.divisions // format.block if format else 0 for one, format in zip(cost.operands, formats, strict=True)
    ]
    # Beside the numbers, the simulation divides each block's largest by 6 and by the tensor's scale, finds that scale
    # by another two, and rounds scales of few bits by the same steps as elements.
    scaled = [n + 1 if format and format.tensor_scale else 0 for n, format in zip(blocks, formats, strict=True)]
    floor = [n if format and format.rule != "floor" else 0 for n, format in zip(blocks, formats, strict=True)]
    rounded = [n if format and format.scale in GRIDS and format.scale != "e8m0" else 0
               for n, format in zip(blocks, formats, strict=True)]  # fmt: skip
    assert counter["div"] == sum(one.divisions for one in cost.operands) + 2 * sum(floor) + sum(scaled)
    assert counter["sub_"] == sum(one.roundings for one in cost.operands) + sum(rounded)
    # Gradients that are added to those of the first run count as additions in place.
    assert counter["add"] + counter["sub"] == sum(one.hadamard_adds for one in cost.operands)


@pytest.mark.parametrize("format", [fp4.Format(scale="e8m0"), fp4.UE5M3], ids=str)
def test_the_cost_of_scales_gradients_is_what_counting_finds(format: fp4.Format) -> None:
    recipe = fp4.Recipe(format, bwd=None, scale_grad="ste")
    layer, x, dy = linear(64, 32, 48, recipe)
    forward = [one for one in fp4.product_overhead(64, 32, 48, recipe).operands if one.operand.startswith("fwd")]
    elements = sum(one.elements for one in forward)
    out = layer(x)
    with fp4.OperationCounter() as counter:
        out.backward(dy)
    # A subtraction for the residual, a sum for its projection, and with a tensor's scale one more for each block.
    blocks = elements // 16 if format.tensor_scale else 0
    assert counter["sub"] == counter["sum"] == elements + blocks
    assert sum(one.gradient_operations for one in forward) == 3 * elements
    # The simulation looks for the largest again, which hardware keeps from the forward pass.
    assert counter["amax"] == elements + 2 * blocks


class Named(nn.Module):
    """Calls its layer by a keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(input=x)


@pytest.mark.parametrize("q_grad", fp4.ESTIMATORS)
def test_the_cost_of_slopes_is_what_counting_finds(q_grad: Any) -> None:
    recipe = fp4.Recipe(fp4.Format(scale="e8m0"), bwd=None, q_grad=q_grad, q_grad_x="ste")
    cost = {one.operand: one for one in fp4.product_overhead(64, 32, 48, recipe).operands}
    weight = cost["fwd.w"]
    u = normal(weight.elements)
    with fp4.OperationCounter() as counter:
        fp4.slope_of(u, GRIDS["e2m1"], q_grad)
    arithmetic = sum(counter[name] for name in ("sub", "mul", "div", "abs", "pow", "clamp", "tanh", "rsub"))
    # Besides: the division by the scale, the product with the gradient, and comparisons, which are no floating point.
    others = {"ste": 0, "linear": 5}.get(q_grad, 4)
    assert weight.slope_operations == arithmetic + others * weight.elements
    assert cost["fwd.x"].slope_operations == 0
    assert weight.passes == (1 if q_grad == "ste" else 2)
    assert weight.operations >= weight.slope_operations


def test_the_cost_of_outliers_is_what_counting_finds() -> None:
    recipe = fp4.Recipe(fp4.Format(scale="e8m0"), outlier=0.9)
    layer, x, dy = linear(64, 32, 48, recipe)
    cost = fp4.product_overhead(64, 32, 48, recipe)
    with fp4.OperationCounter() as counter:
        layer(x)
    (operand,) = (one for one in cost.operands if one.outlier_operations)
    # The simulation compares with both ends, selects, and subtracts.
    run = counter["kthvalue"] + counter["maximum"] + counter["minimum"] + counter["sub"]
    assert operand.outlier_operations == run == 4 * x.numel()
    with FlopCounterMode(display=False) as flops:
        layer(x).backward(dy)
    # It multiplies what was cut off as if it were dense: one product more for each of the three.
    dense = flops.get_total_flops() - cost.product_operations
    assert dense == 6 * 64 * 32 * 48
    sizes = x.detach().abs().flatten()
    kept = int((sizes > sizes.kthvalue(int(0.9 * len(sizes)) + 1).values).sum()) / len(sizes)
    assert cost.sparse == pytest.approx(dense * kept, rel=1.1 / (0.1 * len(sizes)))


def test_a_models_cost_is_that_of_its_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)
    )  # fmt: skip
    x = normal(16, 1, 8, 8)
    recipe = fp4.Recipe(fp4.UE5M3)
    cost = fp4.overhead(model, recipe, x, exclude=["5"])
    parts = fp4.product_overhead(16 * 64, 8, 9, recipe) + fp4.product_overhead(16, 32, 512, recipe)
    assert (cost.products, cost.operations) == (parts.products, parts.operations)
    assert {one.layer for one in cost.operands} == {"0", "3"}
    made = fp4.convert(model, recipe, exclude=["5"])
    with FlopCounterMode(display=False) as flops:
        made(x.requires_grad_()).sum().backward()
    assert flops.get_total_flops() == cost.product_operations + 6 * 16 * 32 * 10
    # 4 bits, a scale of 8 for 16, and 32 for the tensor.
    assert fp4.product_overhead(64, 64, 64, recipe).bits == 4 + 8 / 16 + 32 / 64**2
    assert fp4.product_overhead(64, 64, 64, recipe).passes == 2
    assert fp4.product_overhead(64, 64, 64, fp4.Recipe(outlier=0.99)).sparse == 3 * round(2 * 0.01 * 64**3)
    assert fp4.overhead(Named(), recipe, torch.zeros(8, 32)).products["fwd"] == 2 * 8 * 16 * 32
    transposed = fp4.overhead(nn.Sequential(fp4.FP4Conv1D(32, 16, recipe=recipe)), recipe, torch.zeros(8, 16),
                              include=[fp4.FP4Conv1D])  # fmt: skip
    assert transposed.products["fwd"] == 2 * 8 * 16 * 32
