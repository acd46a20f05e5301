"""Mixtures of primitives: routing, gradients, and the loss that balances by latency."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from retensor.compression import shiftadd
from retensor.compression.shiftadd.moe import scv


def mixture(inputs: int = 8, outputs: int = 4, seed: int = 0, **settings: object) -> shiftadd.MoELinear:
    torch.manual_seed(seed)
    return shiftadd.MoELinear.from_linear(nn.Linear(inputs, outputs), seed=seed, **settings)


@pytest.mark.parametrize("gate", ["paper", "straight"])
def test_each_token_is_the_winner_s_output_times_its_gate(gate):
    layer, x = mixture(gate=gate).eval(), torch.randn(3, 7, 8)
    out = layer(x).reshape(-1, 4)
    p = torch.softmax(x.reshape(-1, 8) @ layer.router.weight.T, -1)
    seen = set()
    for row, probability, given in zip(out, p, x.reshape(-1, 8), strict=True):
        i = int(probability.argmax())
        seen.add(i)
        expert = (layer.multiply, layer.shift)[i]
        factor = float(probability[i].detach()) if gate == "paper" else 1.0
        assert torch.allclose(row, factor * expert(given[None])[0], atol=1e-6)
    assert seen == {0, 1}
    assert layer.tokens.tolist() == [int((p.argmax(-1) == i).sum()) for i in range(2)]


def test_both_experts_begin_at_the_layer():
    plain = nn.Linear(8, 4)
    layer = shiftadd.MoELinear.from_linear(plain)
    assert torch.equal(layer.multiply.weight, plain.weight)
    assert layer.multiply.weight is not plain.weight
    assert torch.equal(layer.shift.bias, plain.bias)
    with torch.no_grad():
        layer.multiply.weight.zero_()
    assert bool((plain.weight != 0).all())


def test_noise_of_the_logits_has_a_deviation_of_one_half():
    layer, x = mixture().train(), torch.randn(20000, 8)
    layer(x)
    noise = (layer._routing.noisy - layer._routing.clean).detach()
    assert float(noise.std()) == pytest.approx(0.5, abs=0.01)
    layer.eval()
    layer(x)
    assert torch.equal(layer.tokens, torch.bincount(layer.router(x).argmax(-1), minlength=2))


@pytest.mark.parametrize("gate", ["paper", "straight"])
def test_the_router_gets_a_gradient_of_the_task(gate):
    layer, x = mixture(gate=gate).train(), torch.randn(50, 8)
    (layer(x) * torch.randn(50, 4)).sum().backward()
    assert float(layer.router.weight.grad.abs().max()) > 0
    # For the winner of two, dp/dlogit = p (1 - p).
    layer.eval().zero_grad()
    x = torch.randn(1, 8)
    p = torch.softmax(layer.router(x), -1)[0]
    i = int(p.argmax())
    inner = float((layer.multiply, layer.shift)[i](x).detach().sum())
    layer(x).sum().backward()
    slope = p[i] * (1 - p[i]) if gate == "paper" else 1 - p[i]
    assert torch.allclose(layer.router.weight.grad[i], inner * slope * x[0], atol=1e-5)
    assert torch.allclose(layer.router.weight.grad[1 - i], -inner * slope * x[0], atol=1e-5)


@pytest.mark.parametrize("winner", [0, 1])
def test_an_expert_without_tokens_works_forward_and_backward(winner):
    layer, x = mixture().eval(), torch.ones(5, 8)
    with torch.no_grad():
        layer.router.weight.fill_(0)
        layer.router.weight[winner] = 1
    layer(x).sum().backward()
    assert layer.tokens.tolist() == ([5, 0] if winner == 0 else [0, 5])
    idle = (layer.shift.shift, layer.multiply.weight)[winner]
    assert idle.grad is not None
    assert not bool(idle.grad.any())
    assert layer(torch.zeros(0, 8)).shape == (0, 4)


def test_the_loss_is_the_formula():
    layer, x = mixture().train(), torch.randn(40, 8)
    layer(x)
    clean, noisy = layer._routing.clean.detach().double(), layer._routing.noisy.detach().double()
    alpha = torch.tensor([0.6, 0.4], dtype=torch.float64)
    importance = torch.softmax(clean, -1).sum(0)
    # The other one of two: chances that a fresh noise of deviation 1/2 lifts an expert above it.
    load = torch.tensor(
        [sum(0.5 * (1 + math.erf((float(c[i]) - float(n[1 - i])) / 0.5 / math.sqrt(2)))
             for c, n in zip(clean, noisy, strict=True)) for i in range(2)],
        dtype=torch.float64,
    )  # fmt: skip
    expected = scv(alpha * importance) + scv(alpha * load)
    assert shiftadd.ll_loss(layer, (6, 4)).item() == pytest.approx(float(expected), rel=1e-4)
    both = nn.Sequential(layer, copy.deepcopy(layer))
    both[1](x)
    assert float(shiftadd.ll_loss(both)) == pytest.approx(
        float(shiftadd.ll_loss(both[0])) + float(shiftadd.ll_loss(both[1])), rel=1e-6
    )


@pytest.mark.parametrize(("alpha", "share"), [((0.6, 0.4), 0.4), ((0.5, 0.5), 0.5), ((0.8, 0.2), 0.2)])
def test_shares_become_the_inverse_of_the_latencies(alpha, share):
    layer = mixture(16, 4).train()
    optimizer = torch.optim.Adam(layer.router.parameters(), lr=1e-2)
    torch.manual_seed(1)
    # The router has no bias: tokens whose mean is nothing would be shared evenly by symmetry.
    for _ in range(600):
        layer(0.5 + torch.randn(256, 16))
        optimizer.zero_grad()
        shiftadd.ll_loss(layer, alpha).backward()
        optimizer.step()
    report = shiftadd.router_report(layer, 0.5 + torch.randn(20000, 16))
    assert report.shares[0] == pytest.approx(share, abs=0.04)


def test_copies_and_pickles_leave_the_graph_of_the_last_pass_behind():
    layer = mixture().train()
    layer(torch.randn(5, 8))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._routing.clean is None
        with pytest.raises(ValueError, match="no routing"):
            shiftadd.ll_loss(other)


@pytest.mark.parametrize("alpha", [(1.0,), (0.6, 0.4, 0.1), (0.6, 0.0), (0.6, -0.4), (0.6, float("nan"))])
def test_latencies_that_are_not_two_positive_numbers_are_refused(alpha):
    layer = mixture().train()
    layer(torch.randn(5, 8))
    with pytest.raises(ValueError, match="alpha"):
        shiftadd.ll_loss(layer, alpha)


def test_models_without_mixtures_are_refused():
    for call in (shiftadd.ll_loss, shiftadd.router_report, lambda m: shiftadd.measure_latency(m, torch.zeros(1, 2))):
        with pytest.raises(ValueError, match="no mixture"):
            call(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="gate"):
        mixture(gate="hard")


def test_packed_mixtures_route_alike():
    layer, x = mixture(64, 32).eval(), torch.randn(100, 64)
    packed = shiftadd.PackedMoELinear.from_moe(layer)
    expected = layer(x)
    assert float((packed(x) - expected).detach().abs().max()) <= 64 * 2.0**-16 + 1e-5
    assert torch.equal(packed.tokens, layer.tokens)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
