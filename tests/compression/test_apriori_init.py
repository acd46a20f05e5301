"""First values of factors, the factors of given kernels, and the balance between factors."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from retensor.compression import apriori as ap
from retensor.compression.apriori.decompose import decompose, error
from retensor.compression.apriori.formats import Shape, resolved

FORMATS = list(ap.FORMATS)
pytestmark = pytest.mark.filterwarnings("ignore:rank .* takes:UserWarning")


def drawn(layer: Any, init: str, draws: int, **named: Any) -> float:
    """The mean square of a kernel's elements over draws."""
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for _ in range(draws):
        ap.initialise_(layer, init, generator=generator, **named)
        total += layer.kernel().square().mean().item()
    return total / draws


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_has_kaimings_variance(name: str, groups: int) -> None:
    layer = ap.FactoredConv2d(8, 12, (3, 5), groups=groups, rank=6, format=name)
    fan_in, fan_out = 15 * 8 / groups, 15 * 12 / groups
    # Products of four normal factors scatter widely; 400 draws of 1,440 elements and more.
    assert drawn(layer, "match", 400) == pytest.approx(2 / fan_in, rel=0.03)
    assert drawn(layer, "xavier", 400) == pytest.approx(2 / (fan_in + fan_out), rel=0.03)
    assert drawn(layer, "match", 400, variance=0.3) == pytest.approx(0.3, rel=0.03)
    assert drawn(layer, "decompose", 1) == pytest.approx(2 / fan_in, rel=1e-5)
    assert drawn(layer, "default", 400) == pytest.approx(3.0 ** -len(layer.factors) / fan_in, rel=0.1)
    assert layer.bias.abs().sum() != 0


def test_a_transposed_layer_keeps_the_scale_of_its_inputs_at_any_stride() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 12, 12, generator=generator)
    for stride, kernel in [(1, 3), (2, 4)]:
        squares = [
            ap.CPConvTranspose2d(32, 32, kernel, stride, 1, rank=32, bias=False, generator=generator)(x).square().mean()
            for _ in range(30)
        ]
        assert torch.stack(squares).mean().item() == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("name", FORMATS)
def test_twenty_layers_keep_the_signal_as_dense_ones_do_and_default_factors_lose_it(name: str) -> None:
    def stack(make: Any) -> nn.Sequential:
        return nn.Sequential(*(part for _ in range(20) for part in (make(), nn.ReLU())))

    def dense() -> nn.Conv2d:
        conv = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
        nn.init.kaiming_normal_(conv.weight, generator=generator)
        return conv

    def logs(net: nn.Sequential) -> torch.Tensor:
        """Of the mean square behind each convolution."""
        found, y = [], x
        for part in net:
            y = part(y)
            if not isinstance(part, nn.ReLU):
                found.append(y.square().mean().log())
        return torch.stack(found)

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 16, 8, 8, generator=generator)

    def factored(init: str) -> nn.Sequential:
        named = {"padding_mode": "circular", "bias": False, "generator": generator, "init": init}
        return stack(lambda: ap.FactoredConv2d(16, 16, 3, padding=1, rank=16, format=name, **named))

    with torch.no_grad():
        nets = {
            "dense": [logs(stack(dense)) for _ in range(12)],
            "match": [logs(factored("match")) for _ in range(12)],
        }
        lost = logs(factored("default"))
    means = {key: torch.stack(found).mean(0) for key, found in nets.items()}
    apart = (means["match"] - means["dense"]).abs()
    # A layer at a time is within a factor of two, and all together within 1.2 a layer unless chance explains more.
    assert (apart[:5] < math.log(2) * torch.arange(1, 6)).all()
    error = sum(torch.stack(found)[:, -1].var() / len(found) for found in nets.values()) ** 0.5
    assert apart[-1] < max(20 * math.log(1.2), 3.5 * error)
    assert lost[-1] - means["dense"][-1] < 20 * math.log(0.4)


def test_separable_kernels_are_recovered_by_rank_one_and_the_laplacian_by_rank_two() -> None:
    gauss = torch.exp(-torch.linspace(-2, 2, 5, dtype=torch.float64).square())
    kernels = {
        "sobel": (torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([-1.0, 0, 1]), 1),
        "gauss": (gauss[:, None] * gauss, 1),
        "laplace": (torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]), 2),
    }
    for name in ("cp", "separable", "vh", "tt"):
        for key, (kernel, rank) in kernels.items():
            shape = Shape(1, 1, tuple(kernel.shape))
            form = ap.FORMATS[name]
            ranks = (1, rank, 1) if name == "tt" else (rank,)
            factors = decompose(kernel[None, None], form, shape, ranks)
            assert error(kernel[None, None], form, shape, factors) < 1e-12, (name, key)
            if rank > 1:
                less = decompose(kernel[None, None], form, shape, (1,) * len(ranks))
                assert error(kernel[None, None], form, shape, less) > 0.1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_of_low_rank_are_found_again_and_no_rank_does_worse_than_a_lower_one(dims: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    for name, form in ap.FORMATS.items():
        if dims < form.least_dims:
            continue
        shape = Shape(4 * groups, 5 * groups, (3, 4, 2)[:dims], groups)
        ranks = resolved(form, shape, 2)
        sizes = form.factors(shape, ranks)
        factors = {key: torch.randn(s, generator=generator, dtype=torch.float64) for key, s in sizes.items()}
        kernel = form.kernel(shape, factors)
        found = decompose(kernel, form, shape, ranks)
        assert {key: tuple(factor.shape) for key, factor in found.items()} == sizes
        assert error(kernel, form, shape, found) < 1e-12, name
        noise = torch.randn(kernel.shape, generator=generator, dtype=torch.float64)
        errors = [error(noise, form, shape, decompose(noise, form, shape, resolved(form, shape, r))) for r in (1, 2, 4)]
        assert errors == sorted(errors, reverse=True), name


def test_alternating_least_squares_fits_as_well_as_tensorly() -> None:
    tensorly = pytest.importorskip("tensorly")
    from tensorly.decomposition import parafac

    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((8, 6, 3, 3))
    form, shape = ap.FORMATS["cp"], Shape(6, 8, (3, 3))
    previous = tensorly.get_backend()
    tensorly.set_backend("numpy")
    try:
        theirs = min(
            np.linalg.norm(
                kernel - tensorly.cp_to_tensor(parafac(kernel, 6, init=init, n_iter_max=200, random_state=0))
            )
            for init in ("svd", "random")
        )
    finally:
        tensorly.set_backend(previous)
    found = decompose(torch.from_numpy(kernel), form, shape, (6,))
    assert error(torch.from_numpy(kernel), form, shape, found) <= 1.01 * theirs / np.linalg.norm(kernel)


@pytest.mark.parametrize("name", ["cp", "separable"])
def test_balancing_keeps_the_kernel_and_evens_the_norms(name: str) -> None:
    layer = ap.FactoredConv2d(4, 6, 3, groups=2, rank=3, format=name, dtype=torch.float64)
    with torch.no_grad():
        layer.factors["axis0"].mul_(100)
        layer.factors["axis1"][..., 0, :] = 0 if name == "cp" else layer.factors["axis1"][..., 0, :]
    model = nn.Sequential(layer, ap.FactoredConv2d(4, 6, 3, rank=1, format="vh"))
    before = layer.kernel()
    assert ap.balance_(model) == 1
    assert (layer.kernel() - before).abs().max() < 1e-12 * before.abs().max()
    if name == "cp":
        norms = torch.stack(
            [layer.factors[key].norm(dim=axis) for key, axis in
             [("inputs", 2), ("axis0", 2), ("axis1", 2), ("outputs", 1)]]
        )[:, :, 1:]  # fmt: skip
        assert (norms / norms[0] - 1).abs().max() < 1e-12
    after = ap.balancer(model, every=2)
    with torch.no_grad():
        layer.factors["axis0"].mul_(7)
    kept = layer.factors["axis0"].clone()
    after(0)
    assert torch.equal(layer.factors["axis0"], kept)
    after(1)
    assert not torch.equal(layer.factors["axis0"], kept)
    with pytest.raises(ValueError, match="every is 0"):
        ap.balancer(model, every=0)
