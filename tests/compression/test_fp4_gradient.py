"""The full gradient of a quantiser: against finite differences of smooth ones, and what follows from it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retensor.compression import fp4
from retensor.quantizing import GRIDS

Function = Callable[[torch.Tensor], torch.Tensor]
LARGEST, MOST_SCALE = 6.0, 448.0


def smooth(x: torch.Tensor, q: Function, q_scale: Function, scaled: bool) -> tuple[torch.Tensor, ...]:
    """The quantiser on rows as blocks, with functions of one's own in the places of both roundings."""
    s = x.abs().amax(-1) / LARGEST
    s_t = s.amax() / MOST_SCALE if scaled else torch.ones((), dtype=x.dtype)
    s_q = s_t * q_scale(s / s_t)
    return s_q[:, None] * q(x / s_q[:, None]), s_q, s_t


def finite_difference(loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, step: float) -> torch.Tensor:
    out = torch.empty_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x).view(-1)
        shift[i] = step
        out.view(-1)[i] = (loss(x + shift.view_as(x)) - loss(x - shift.view_as(x))) / (2 * step)
    return out


def soft(u: torch.Tensor) -> torch.Tensor:
    return u + 0.3 * torch.sin(2 * u)


def soft_slope(u: torch.Tensor) -> torch.Tensor:
    return 1 + 0.6 * torch.cos(2 * u)


def soft_scale(v: torch.Tensor) -> torch.Tensor:
    return v + 0.2 * torch.sin(v)


def soft_scale_slope(v: torch.Tensor) -> torch.Tensor:
    return 1 + 0.2 * torch.cos(v)


@pytest.mark.parametrize("scaled", [False, True])
@given(seed=st.integers(0, 1000), rows=st.integers(1, 4), block=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_the_gradient_is_that_of_finite_differences(scaled: bool, seed: int, rows: int, block: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, block, dtype=torch.float64, generator=generator)
    g = torch.randn(rows, block, dtype=torch.float64, generator=generator)
    # Two numbers that change places as the largest within the step would be no derivative.
    if block > 1 and float((x.abs().topk(2, -1).values.diff()).abs().min()) < 1e-3:
        return
    if scaled and rows > 1 and float(x.abs().amax(-1).topk(2).values.diff().abs()) < 1e-3:
        return
    out, s_q, s_t = smooth(x, soft, soft_scale, scaled)
    most = x.abs().amax(-1)
    found = fp4.pullback(
        g, x, out, most=most, sizes=s_q, largest=LARGEST, element_slope=soft_slope(x / s_q[:, None]),
        scale_slope=soft_scale_slope(most / LARGEST / s_t), tensor_scale=s_t if scaled else None,
        tensor_slope=1 / (LARGEST * MOST_SCALE) if scaled else 0.0,
    )  # fmt: skip
    expected = finite_difference(lambda z: (g * smooth(z, soft, soft_scale, scaled)[0]).sum(), x, 1e-6)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6 * float(g.abs().max()) * block)


def test_without_rounding_of_elements_the_jacobian_is_the_identity() -> None:
    x = torch.randn(3, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out, s_q, s_t = smooth(x, lambda u: u, soft_scale, True)
    assert torch.allclose(out, x, rtol=1e-14)
    most = x.abs().amax(-1)
    for i in range(x.numel()):
        g = torch.zeros(48, dtype=torch.float64)
        g[i] = 1
        found = fp4.pullback(
            g.view(3, 16), x, x, most=most, sizes=s_q, largest=LARGEST, element_slope=torch.ones_like(x),
            scale_slope=soft_scale_slope(most / LARGEST / s_t), tensor_scale=s_t, tensor_slope=1 / (6 * MOST_SCALE),
        )  # fmt: skip
        # What scales add is nothing at all.
        assert torch.equal(found.flatten(), g)


def test_passed_straight_the_largest_number_gets_the_residual() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1), requires_grad=True)
    g = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    format = fp4.Format(scale="ue5m3")
    y = fp4.quantize(x, format, scale_grad="ste")
    y.backward(g)
    assert x.grad is not None
    blocks = x.detach().view(4, 2, 16)
    sizes = format.blocks.sizes(blocks.abs().amax(-1))[0]
    share = (g.view(4, 2, 16) * (y.detach().view(4, 2, 16) - blocks) / sizes[..., None]).sum(-1) / 6
    added = (x.grad - g).view(4, 2, 16)
    first = blocks.abs().argmax(-1, keepdim=True)
    assert int((added != 0).sum()) == 8
    assert torch.allclose(added.gather(-1, first)[..., 0], share * blocks.gather(-1, first)[..., 0].sign(), atol=1e-6)


@pytest.mark.parametrize("format", [fp4.UE5M3, fp4.NVFP4, fp4.Format(), fp4.Format(scale="e8m0")], ids=str)
def test_passed_straight_it_is_what_autograd_makes_of_straight_roundings(format: fp4.Format) -> None:
    # Scales of the tensor and of blocks, the residual and the ends of both: autograd knows nothing of the formula.
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3), requires_grad=True)
    g = torch.randn(6, 32, generator=torch.Generator().manual_seed(4))
    fp4.quantize(x, format, scale_grad="ste").backward(g)
    z = x.detach().double().view(6, 2, 16).requires_grad_()
    s = z.abs().amax(-1) / 6
    s_t = s.amax() / format.blocks.scale.largest if format.tensor_scale else torch.ones(())
    sizes, _ = format.blocks.sizes(z.detach().abs().amax(-1).float())
    s_q = s_t * (s / s_t + (sizes / s_t - s / s_t).detach())
    u = z / s_q[..., None]
    out = s_q[..., None] * (u + (GRIDS["e2m1"].round(u) - u).detach())
    out.backward(g.view(6, 2, 16).double())
    assert x.grad is not None
    assert z.grad is not None
    assert not torch.equal(x.grad, g)
    assert torch.allclose(x.grad.view(6, 2, 16).double(), z.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("q_grad", fp4.ESTIMATORS)
@pytest.mark.parametrize(
    "format", [fp4.Format(scale="e8m0"), fp4.UE5M3, fp4.NVFP4, fp4.Format(scale="float32")], ids=str
)
@given(seed=st.integers(0, 99), length=st.integers(1, 50))
@settings(max_examples=6, deadline=None)
def test_relaxed_scales_make_a_quantiser_of_degree_one(q_grad: str, format: fp4.Format, seed: int, length: int) -> None:
    # Twice the input is twice the output where scales are relaxed: Euler's identity, x dL/dx = g out.
    x = torch.randn(3, length, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    g = torch.randn(3, length, generator=torch.Generator().manual_seed(seed + 1))
    y = fp4.quantize(x, format, q_grad=q_grad, scale_grad="relaxed")  # type: ignore[arg-type]
    y.backward(g)
    assert x.grad is not None
    ours, theirs = (x.grad.double() * x.detach().double()).sum(), (g.double() * y.detach().double()).sum()
    scale = float((g.abs() * y.detach().abs()).sum() + (g.abs() * x.detach().abs()).sum() * 3)
    assert abs(float(ours - theirs)) < 1e-5 * scale


def test_a_tie_for_the_largest_is_shared() -> None:
    x = torch.tensor([[3.1, -3.1, 1.2, 0.7]], requires_grad=True)
    fp4.quantize(x, fp4.Format(scale="e4m3", block=4), scale_grad="ste").backward(torch.ones(1, 4))
    assert x.grad is not None
    first, second = (x.grad[0, :2] - 1).tolist()
    assert first == pytest.approx(-second)
    assert first != 0
    assert x.grad[0, 2:].tolist() == [1, 1]


def test_zero_and_lost_blocks_pass_a_finite_gradient() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    for scale in ("e8m0", "ue5m3", "float32"):
        for scale_grad in fp4.SCALE_GRADIENTS:
            x.grad = None
            fp4.quantize(x, fp4.Format(scale=scale), scale_grad=scale_grad).sum().backward()
            assert torch.equal(x.grad, torch.ones(2, 16))  # type: ignore[arg-type]
    for shape in ((0, 16), (3, 0)):
        nothing = torch.zeros(shape, requires_grad=True)
        fp4.quantize(nothing, fp4.UE5M3, q_grad="dge", scale_grad="ste").sum().backward()
        assert nothing.grad is not None
        assert nothing.grad.shape == shape
    small = torch.full((1, 16), 1e-9, requires_grad=True)
    fp4.quantize(small, fp4.Format(scale="e4m3"), scale_grad="relaxed").sum().backward()
    assert torch.isfinite(small.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["tanh", "linear"])
@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0])
def test_an_estimate_over_a_cell_has_the_cells_height(estimator: str, temperature: float) -> None:
    for low, high in ((0.0, 0.5), (2.0, 3.0), (-6.0, -4.0)):
        # Midpoints of equal parts, as many as the ramp's ends divide.
        u = low + (high - low) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        slopes = fp4.slope_of(u, GRIDS["e2m1"], estimator, temperature)  # type: ignore[arg-type]
        assert slopes is not None
        assert float(slopes.mean()) == pytest.approx(1, abs=1e-4)
        assert float(slopes.argmax()) == pytest.approx(10_000, abs=10_000 * temperature + 1)
    assert float(fp4.slope_of(torch.tensor([6.5]), GRIDS["e2m1"], estimator)) == 0  # type: ignore[arg-type]


def test_the_estimator_of_wang_has_the_cells_height_less_what_is_cut_off() -> None:
    # The integral of |y|^(-4/5) / 5 from -1 to 1 is 2, the cell's height in these units; cut off at 3, where
    # |y| = 15^(-5/4), it loses 2 * 15^(-1/4) and keeps 6 * 15^(-5/4).
    t = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    slopes = fp4.slope_of(2 + t, GRIDS["e2m1"], "dge")
    assert slopes is not None
    y = (2 * t - 1).abs()
    assert torch.allclose(slopes, (y ** (1 / 5 - 1) / 5).clamp(max=3), rtol=1e-6)
    assert float(slopes.mean()) == pytest.approx(1 - 15**-0.25 + 3 * 15**-1.25, abs=1e-5)


def test_gradients_go_through_models_and_repeat() -> None:
    layer = nn.Linear(32, 4)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))

    def gradient(**options: object) -> torch.Tensor:
        layer.zero_grad()
        weight = fp4.quantize(layer.weight, fp4.UE5M3, **options)  # type: ignore[arg-type]
        (nn.functional.linear(x, weight).square().sum()).backward()
        assert layer.weight.grad is not None
        return layer.weight.grad.clone()

    plain = gradient()
    assert torch.equal(plain, gradient())
    assert not torch.equal(plain, gradient(scale_grad="ste"))
    assert not torch.equal(plain, gradient(q_grad="dge"))
    with pytest.raises(ValueError, match="temperature of linear is a number above 0 and at most 1, not 2"):
        gradient(q_grad="linear", temperature=2)
