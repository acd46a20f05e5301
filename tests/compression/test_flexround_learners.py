"""Rounding by division: its start, its gradient, where it can go and additive rounding cannot, and its forms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import retensor as rt
from retensor.compression import flexround
from retensor.quantizing import AdaRound, Affine, WeightLearner

DIVIDING = {
    "flexround": flexround.FlexRound,
    "without s3 and s4": lambda w, q: flexround.FlexRound(w, q, rows=False, columns=False),
    "lrq": flexround.LRQ,
}
LEARNERS: dict[str, Any] = {**DIVIDING, "adaquant": flexround.AdaQuant}
SHAPES = {"linear": (12, 20), "conv": (8, 3, 4, 5), "depthwise": (8, 1, 3, 5), "conv1d": (6, 4, 5)}


def heavy(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal numbers, a few of which are large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (x * torch.rand(shape, generator=generator, dtype=torch.float64).reciprocal().clamp(max=20)).to(dtype)


def stirred(learner: WeightLearner, seed: int, by: float = 0.3) -> WeightLearner:
    """With values as if it had learned."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(by * torch.randn(value.shape, generator=generator, dtype=value.dtype))
    return learner


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("where", [{}, {"axis": 0}, {"group_size": 5}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_start_is_torchaos_rounding_to_nearest_bit_for_bit(
    bits: int, where: dict[str, int], symmetric: bool, name: str
) -> None:
    primitives: Any = pytest.importorskip("torchao.quantization.quant_primitives")
    weight, quantizer = heavy((24, 60), bits), Affine(bits, symmetric, **where)
    learner = LEARNERS[name](weight, quantizer)
    # A step at a rate of 0 changes nothing.
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.0)
    learner(weight).square().sum().backward()
    optimizer.step()
    block = {"axis": (1, 60), "group_size": (1, 5)}[next(iter(where))] if where else (24, 60)
    steps = (24, 60 // block[1]) if where else (1, 1)
    scale, zero = learner.scale.reshape(steps), learner.zero_point.reshape(steps).int()
    theirs = primitives.quantize_affine(weight, block, scale, zero, torch.int32, quantizer.low, quantizer.high)
    kept = learner.quantized(weight)
    assert torch.equal(kept.codes.int() + quantizer.low, theirs)
    back = primitives.dequantize_affine(theirs, block, scale, zero, torch.int32, quantizer.low, quantizer.high)
    assert torch.equal(learner(weight).detach(), back)


@given(
    name=st.sampled_from(sorted(LEARNERS)), shape=st.sampled_from(sorted(SHAPES)), bits=st.integers(2, 8),
    symmetric=st.booleans(), where=st.sampled_from([{}, {"axis": 0}, {"group_size": 5}]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_what_is_learned_is_whole_numbers_of_the_common_step(
    name: str, shape: str, bits: int, symmetric: bool, where: dict[str, int], seed: int, dtype: torch.dtype
) -> None:
    weight, quantizer = heavy(SHAPES[shape], seed, dtype), Affine(bits, symmetric, **where)
    learner = stirred(LEARNERS[name](weight, quantizer), seed)
    kept, found = learner.quantized(weight), learner(weight).detach()
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert torch.equal(found, kept.decode(dtype))
    # By s1 and by nothing else.
    exact = kept.decode(torch.float64)
    units = quantizer.grouped(exact) / learner.s1.detach().double() + learner.zero_point
    assert float((units - units.round()).abs().max()) < 1e-5 * 2**bits
    assert quantizer.low <= int(units.round().min())
    assert int(units.round().max()) <= quantizer.high


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("where", [{}, {"axis": 0}])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_are_those_of_the_closed_form(shape: str, where: dict[str, int], symmetric: bool) -> None:
    weight = heavy(SHAPES[shape], 3, torch.float64)
    weight[0, 0] = 0.0
    learner = flexround.FlexRound(weight, Affine(3, symmetric, **where))
    stirred(learner, 4)
    upstream = heavy(SHAPES[shape], 5, torch.float64)
    learner(weight).backward(upstream)
    with torch.no_grad():
        divisor, s1 = learner.log_divisor().exp(), learner.s1
        units = weight / (s1 * divisor)
        low, high = learner.bounds()
        inside = (units.round() >= low) & (units.round() <= high)
        assert 0 < int(inside.sum()) < weight.numel()
        to_divisor = -upstream * inside * weight / divisor**2
        whole = units.round().clamp(low, high)
        to_step = upstream * torch.where(inside, whole - units, whole)
        close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-12}
        s2, s3 = learner.log_S2.exp(), learner.log_s3.exp()  # type: ignore[union-attr]
        s4 = torch.ones(()) if learner.log_s4 is None else learner.log_s4.exp()
    assert (learner.log_s4 is None) == (shape == "linear")
    # d/dS2 = s3 s4 d/dS', and d/d log a = a d/da.
    torch.testing.assert_close(learner.log_S2.grad / s2, to_divisor * s3 * s4, **close)
    torch.testing.assert_close(
        learner.log_s3.grad / s3,  # type: ignore[union-attr]
        (to_divisor * s2 * s4).sum_to_size(s3.shape), **close,
    )  # fmt: skip
    if learner.log_s4 is not None:
        torch.testing.assert_close(learner.log_s4.grad / s4, (to_divisor * s2 * s3).sum_to_size(s4.shape), **close)
    torch.testing.assert_close(learner.log_s1.grad / s1, to_step.sum_to_size(s1.shape), **close)
    gone = (weight == 0) | ~inside
    assert bool(gone.any())
    assert not bool(learner.log_S2.grad[gone].any())


def test_gradients_are_those_of_the_definition_by_autograd() -> None:
    weight = heavy((8, 3, 4, 5), 1, torch.float64).requires_grad_()
    learner = stirred(flexround.FlexRound(weight.detach(), Affine(4, axis=0)), 2)
    learner(weight).sin().sum().backward()
    mine = [weight.grad, *(value.grad for value in learner.parameters())]
    weight.grad = None
    again = [value.detach().exp().requires_grad_() for value in learner.parameters()]
    grown, s2, s3, s4 = again
    s1 = learner.scale * grown
    units = weight / (s1 * s2 * s3 * s4)
    straight = units + (units.round() - units).detach()
    low, high = learner.bounds()
    clipped = torch.where(units.detach().round() < low, low, torch.where(units.detach().round() > high, high, straight))
    (s1 * clipped).sin().sum().backward()
    theirs = [weight.grad, *(value.grad * value.detach() for value in again)]  # type: ignore[operator]
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_gradients_are_finite_where_a_quotient_is_not() -> None:
    weight = torch.tensor([[1.0, -2.0, 0.5]]).requires_grad_()
    learner = flexround.FlexRound(weight.detach(), Affine(3))
    with torch.no_grad():
        learner.log_S2[0, 1] = -100.0
    learner(weight).sum().backward()
    for grad in (weight.grad, learner.log_S2.grad, learner.log_s1.grad):
        assert bool(torch.isfinite(grad).all())
    assert weight.grad[0, 1] == 0 == learner.log_S2.grad[0, 1]


def test_twice_the_weight_has_twice_the_gradient_where_an_added_one_has_the_same() -> None:
    weight, quantizer = heavy((12, 20), 0, torch.float64), Affine(8, symmetric=True)
    # A step that clips neither.
    for make, factor in ((flexround.FlexRound, 2.0), (flexround.AdaQuant, 1.0)):
        grads = []
        for times in (1.0, 2.0):
            learner = make(2.1 * weight, quantizer)
            learner(times * weight).backward(torch.ones_like(weight))
            grads.append((learner.log_S2 if factor == 2 else learner.V).grad)
        torch.testing.assert_close(grads[1], factor * grads[0], rtol=1e-6, atol=0)


def test_a_large_weight_crosses_steps_that_rounding_up_or_down_cannot() -> None:
    # What comes in is a half of what it was for one input, and as it was for two: the weight of 3 must become 6.
    weight, wanted = torch.tensor([[3.0, 1.0, -2.0]]), torch.tensor([[6.0, 1.0, -2.0]])
    quantizer = Affine(4, symmetric=True)
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(256, 3, generator=generator)
    shrunk = clean * torch.tensor([0.5, 1.0, 1.0])
    target = clean @ weight.T

    def learned(learner: Any, rate: float) -> tuple[float, torch.Tensor]:
        learner.scale.fill_(1.0)
        if isinstance(learner, AdaRound):
            learner.V.data.zero_()
        optimizer = torch.optim.Adam([value for value in learner.parameters() if value.requires_grad], lr=rate)
        for step in range(400):
            optimizer.zero_grad()
            loss = (shrunk @ learner(weight).T - target).square().mean()
            if isinstance(learner, AdaRound):
                loss = loss + 0.01 * learner.regulariser(step / 400)
            loss.backward()
            optimizer.step()
        kept = learner.quantized(weight).decode()
        return float((shrunk @ kept.T - target).square().mean()), kept

    flexible, found = learned(flexround.FlexRound(weight, quantizer, learn_step=False), 1e-2)
    assert flexible == 0
    assert torch.equal(found, wanted)
    # The most it can reach is 4, which leaves a half of the first input's square.
    best = float((shrunk @ torch.tensor([[4.0, 1.0, -2.0]]).T - target).square().mean())
    for rate in (1e-3, 1e-2, 1e-1, 1.0):
        up_or_down, kept = learned(AdaRound(weight, quantizer), rate)
        assert up_or_down >= best - 1e-6
        assert float((kept - weight).abs().max()) <= 1


def test_codes_that_a_divisor_moved_are_counted() -> None:
    weight, quantizer = heavy((30, 40), 7), Affine(4)
    learner = flexround.FlexRound(weight, quantizer)
    nothing = flexround.moved(weight, learner.quantized(weight), learner.scale)
    assert nothing["moved"] == nothing["far"] == nothing["beyond"] == 0
    assert nothing["grown"] == 1
    stirred(learner, 1, 1.0)
    counts = flexround.moved(weight, learner.quantized(weight), learner.scale)
    assert counts["moved"] >= counts["beyond"] >= counts["far"] > 0
    for seed in range(5):
        rounding = stirred(AdaRound(weight, quantizer), seed, 5.0)
        counts = flexround.moved(weight, rounding.quantized(weight), rounding.scale)
        assert counts["moved"] > 0
        assert counts["far"] == counts["beyond"] == 0


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("search", [None, 2.4])
def test_learners_are_parametrizations_that_fold_and_are_kept(name: str, search: float | None, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)), torch.randn(40, 20)
    wanted = net(x).detach()
    learner = LEARNERS[name](net[0].weight, Affine(2, search=search))
    parametrize.register_parametrization(net[0], "weight", learner)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    errors = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (net(x) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors[-5:]) < 0.9 * errors[0]
    found = net(x).detach()
    assert torch.equal(copy.deepcopy(net)(x), found)
    plain = rt.fold(net)
    assert type(plain[0]) is nn.Linear
    assert torch.equal(plain(x), found)
    rt.save(net, tmp_path / "net.safetensors")
    again = rt.load(tmp_path / "net.safetensors", nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)))
    assert torch.equal(again(x), found)
    kept = again[0].parametrizations.weight[0]
    assert kept.config() == learner.config()


def test_lrq_learns_a_matrix_of_low_rank_and_by_default_half_as_much_as_weights() -> None:
    weight = heavy((48, 96), 0)
    learner = flexround.LRQ(weight, Affine(3), rank=5)
    stirred(learner, 1)
    apart = learner.log_divisor().detach()
    inner = apart - learner.r2.detach() - learner.c2.detach()
    assert int(torch.linalg.matrix_rank(inner, rtol=1e-5)) == 5
    assert sum(value.numel() for value in learner.parameters()) == 5 * (48 + 96) + 48 + 96 + 1
    with torch.device("meta"):
        ranks = [flexround.LRQ(torch.empty(n, n), Affine(4, axis=0)).rank for n in (64, 4096, 8192, 12288)]
    assert ranks == [16, 1024, 2048, 2048]
    same = [flexround.LRQ(weight, Affine(3), seed=seed).U2 for seed in (0, 0, 1)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_a_step_that_is_not_learned_stays() -> None:
    weight = heavy((12, 20), 0)
    for make in (flexround.FlexRound, flexround.LRQ, flexround.AdaQuant):
        learner = make(weight, Affine(3), learn_step=False)
        learner(weight).sum().backward()
        assert not learner.log_s1.requires_grad
        assert learner.log_s1.grad is None
        assert torch.equal(learner.s1, learner.scale)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: flexround.FlexRound(torch.ones(2, 2), Affine(4), rows=1), TypeError, "rows"),  # type: ignore[arg-type]
        (lambda: flexround.FlexRound(torch.ones(2, 2), Affine(4), learn_step=None), TypeError, "learn_step"),  # type: ignore[arg-type]
        (lambda: flexround.FlexRound(torch.ones(2, 2, dtype=torch.int64), Affine(4)), TypeError, "floating point"),
        (lambda: flexround.LRQ(torch.ones(2, 2), Affine(4), rank=0), ValueError, "rank"),
        (lambda: flexround.LRQ(torch.ones(2), Affine(4)), ValueError, "two axes"),
        (lambda: flexround.AdaQuant(torch.full((2, 2), float("nan")), Affine(4)), ValueError, "not finite"),
        (lambda: flexround.FlexRound(torch.ones(2, 2), Affine(9)), ValueError, "bits"),
        (lambda: flexround.FlexRound(torch.ones(2, 2), Affine(1)), ValueError, "bits"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_named(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()
