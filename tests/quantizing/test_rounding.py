"""The staircase forward, the estimate of its slope backward."""

from __future__ import annotations

import pytest
import torch

from retensor.quantizing import ESTIMATORS, GRIDS, integers, rounded
from retensor.quantizing.rounding import slope


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_forward_is_the_grid_and_backward_the_estimate(estimator: str) -> None:
    grid = GRIDS["e2m1"]
    x = torch.linspace(-8, 8, 641, dtype=torch.float64, requires_grad=True)
    weights = torch.linspace(1, 2, 641, dtype=torch.float64)
    y = rounded(x, grid, estimator=estimator)  # type: ignore[arg-type]
    assert torch.equal(y.detach(), grid.decode(grid.encode(x), torch.float64))
    (y * weights).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, weights * slope(x.detach(), grid, estimator))  # type: ignore[arg-type]


def test_straight_passes_everywhere_and_clipped_within() -> None:
    x = torch.tensor([-6.5, -6.0, 0.2, 6.0, 6.5])
    assert slope(x, GRIDS["e2m1"], "straight").tolist() == [1, 1, 1, 1, 1]
    assert slope(x, GRIDS["e2m1"], "clipped").tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("cell", [(0.0, 0.5), (2.0, 3.0), (-4.0, -3.0), (4.0, 6.0)])
def test_the_unclipped_estimate_of_a_cell_has_the_cells_height(cell: tuple[float, float]) -> None:
    low, high = cell
    # With u = |2t/d - 1| the integral is that of u^(-4/5) / 5; the substitution v = u^(1/5) makes it exact.
    v = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    u = v**5
    x = low + (high - low) * (1 + u) / 2
    q = slope(x, GRIDS["e2m1"], "dge")
    # Where it is not clipped: (1/5) u^(-4/5) <= 3.
    free = u >= (1 / 15) ** 1.25
    assert torch.allclose(q[free], u[free] ** -0.8 / 5, rtol=1e-9)
    assert bool((q[~free] == 3).all())
    # dx = d/2 du, du = 5 v^4 dv: half the cell, which is its half of the height.
    whole = float((u**-0.8 / 5 * 5 * v**4).mean()) * (high - low) / 2
    assert whole == pytest.approx((high - low) / 2, rel=1e-9)


def test_types_are_kept_and_names_are_checked() -> None:
    assert rounded(torch.ones(2, dtype=torch.bfloat16), integers(4)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="estimator is 'none'; it is one of straight, clipped, dge"):
        rounded(torch.ones(1), integers(4), estimator="none")  # type: ignore[arg-type]
