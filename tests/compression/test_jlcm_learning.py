"""Learning: gradients by their formulas, optimisers that keep their ratios, and units that come out nearer."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retensor.compression import jlcm
from retensor.compression.jlcm.learn import CLOSEST
from retensor.data import accuracy, reference


def learner(
    rule: jlcm.Rule, k: int = 4, groups: int = 2, variant: str = "codebooks", seed: int = 0
) -> tuple[jlcm.CodebookLearner, torch.Tensor]:
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, 6)[:, None]
    labels = jlcm.group_rows(weight, groups, "std")
    return jlcm.CodebookLearner(weight, jlcm.nearest_codes(weight, k, labels, groups, variant), rule), weight


def upward(made: jlcm.CodebookLearner, seed: int = 1) -> torch.Tensor:
    grad = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed))
    made.zero_grad()
    made().backward(grad)
    return grad


@settings(max_examples=30, deadline=None)
@given(
    k=st.integers(2, 17), groups=st.integers(1, 3), variant=st.sampled_from(["codebooks", "scales"]),
    seed=st.integers(0, 50),
)  # fmt: skip
def test_it_starts_at_the_nearest_codes(k: int, groups: int, variant: str, seed: int) -> None:
    made, weight = learner(jlcm.Rule(), k, groups, variant, seed)
    coded = made.coded()
    distances = (weight.double()[:, :, None] - made_words(coded)).abs()
    mine = distances.gather(2, coded.indices.long()[..., None])[..., 0]
    # Of two codewords that are equally far in float32 either may be taken.
    assert torch.allclose(mine, distances.amin(-1), atol=1e-6)
    assert torch.allclose(made().double(), coded.weight(), atol=1e-6)


def made_words(coded: jlcm.Coded) -> torch.Tensor:
    shared = len(coded.codebook) == 1
    words = coded.codebook[torch.zeros_like(coded.labels) if shared else coded.labels][:, None, :]
    return words if coded.scales is None else words * coded.scales[coded.labels][:, None, None]


@pytest.mark.parametrize("variant", ["codebooks", "scales"])
def test_codebooks_and_scales_have_their_exact_gradients(variant: str) -> None:
    made, _ = learner(jlcm.Rule(), variant=variant)
    grad = upward(made)
    indices = made.indices().long()
    codebook = made.codebook.detach().clone().requires_grad_(True)
    scales = None if made.scales is None else made.scales.detach().clone().requires_grad_(True)
    found = codebook[made.book].gather(1, indices)
    found = found if scales is None else found * scales[made.labels][:, None]
    found.backward(grad)
    assert torch.allclose(made.codebook.grad, codebook.grad, atol=1e-6)
    if scales is not None:
        assert torch.allclose(made.scales.grad, scales.grad, atol=1e-6)


def test_the_softmax_gradient_is_that_of_the_soft_weight() -> None:
    made, _ = learner(jlcm.Rule("softmax"), variant="scales")
    grad = upward(made)
    logits = made.logits.detach().clone().requires_grad_(True)
    soft = (logits.softmax(-1) * made.codebook.detach()[made.book][:, None, :]).sum(-1)
    (soft * made.scales.detach()[made.labels][:, None]).backward(grad)
    assert torch.allclose(made.logits.grad, logits.grad, atol=1e-6)


@pytest.mark.parametrize("phi", ["inverse", "exponential"])
def test_the_proximal_gradient_falls_with_the_distance_and_keeps_the_sign(phi: str) -> None:
    made, _ = learner(jlcm.Rule("proximal", phi), k=8)
    grad = upward(made)
    chosen = made.indices().long()[..., None]
    words = made.codebook.detach()[made.book][:, None, :].expand(-1, 5, -1)
    apart = words - words.gather(2, chosen)
    found = made.logits.grad
    assert bool((found.gather(2, chosen) == 0).all())
    assert torch.equal(found.sign(), (apart * grad[..., None]).sign())
    # By hand, for one weight and one codeword.
    t = abs(float(apart[2, 3, 0])) / float(made.gaps[made.book[2]])
    size = 1 / t if phi == "inverse" else math.exp(-t)
    assert abs(float(found[2, 3, 0])) == pytest.approx(abs(float(grad[2, 3])) * size, rel=1e-5)
    order = apart.abs().argsort(-1)
    sizes = found.abs().gather(2, order)[..., 1:]
    assert bool((sizes.diff(dim=-1) <= 1e-7).all())
    linear, _ = learner(jlcm.Rule("linear"), k=8)
    upward(linear)
    assert bool((linear.logits.grad.abs().gather(2, order)[..., 1:].diff(dim=-1) >= -1e-7).all())


@pytest.mark.parametrize("phi", ["inverse", "exponential"])
def test_codewords_that_meet_give_finite_gradients(phi: str) -> None:
    made, _ = learner(jlcm.Rule("proximal", phi))
    with torch.no_grad():
        made.codebook[0, 1] = made.codebook[0, 2] + 1e-9
        made.codebook[1] = made.codebook[1, 0]
    upward(made)
    assert bool(torch.isfinite(made.logits.grad).all())
    # Equal codewords are no move at all.
    assert bool((made.logits.grad[made.labels == 1] == 0).all())
    assert float(made.logits.grad.abs().max()) <= 1 / CLOSEST * 10


def test_a_weight_of_one_number_learns_nothing_and_stays_finite() -> None:
    weight = torch.full((4, 3), 0.25)
    made = jlcm.CodebookLearner(weight, jlcm.nearest_codes(weight, 4, torch.zeros(4).long(), 1), jlcm.Rule())
    upward(made)
    assert torch.equal(made().detach(), weight)
    assert bool(torch.isfinite(made.logits.grad).all())


@pytest.mark.parametrize("kind", ["momentum", "shared"])
def test_the_optimiser_keeps_the_ratios_of_a_weights_logits_and_adam_does_not(kind: str) -> None:
    grad = torch.tensor([[[0.0, 1.0, 0.1, -0.01]], [[5.0, 0.0, 0.5, 0.0]]])
    steps = {}
    for name in (kind, "adam"):
        logits = nn.Parameter(torch.zeros(2, 1, 4))
        optimizer = torch.optim.Adam([logits], lr=0.1) if name == "adam" else jlcm.LogitOptimizer([logits], 0.1, kind)
        for _ in range(3):
            logits.grad = grad.clone()
            optimizer.step()
        steps[name] = logits.detach()
    for row in (0, 1):
        mine, wanted = steps[kind][row, 0], grad[row, 0]
        assert torch.allclose(mine / mine.abs().max(), -wanted / wanted.abs().max(), atol=1e-5)
    # One second moment for each logit: a hundredth of the gradient is as long a step.
    assert torch.allclose(steps["adam"][0, 0, 1:].abs(), steps["adam"][0, 0, 1].abs(), rtol=1e-3)


def test_gradients_of_another_size_are_the_same_steps() -> None:
    found = []
    for size in (1.0, 1e-6):
        logits = nn.Parameter(torch.zeros(3, 2, 4))
        optimizer = jlcm.LogitOptimizer([logits], 0.1)
        for turn in range(4):
            logits.grad = size * torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(turn))
            optimizer.step()
        found.append(logits.detach())
    assert torch.allclose(*found, atol=1e-5)
    optimizer.frozen = True
    before = logits.detach().clone()
    optimizer.step()
    assert torch.equal(logits, before)


def test_jumps_are_counted_in_the_order_of_the_start() -> None:
    labels = torch.zeros(1).long()
    before = jlcm.Coded(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3.0, 1.0, 2.0, 0.0]]).double(), None, labels)
    after = jlcm.Coded(torch.tensor([[3, 1, 1, 3]]), torch.tensor([[0.0, 9.0, 5.0, 2.0]]).double(), None, labels)
    assert jlcm.jumps(before, after) == {"flips": 0.5, "mean_jump": 2.0, "longest_jump": 3.0}
    assert jlcm.jumps(before, before) == {"flips": 0.0, "mean_jump": 0.0, "longest_jump": 0.0}


def test_the_first_move_goes_to_a_neighbour() -> None:
    """A step as long as one weight needs: proximal goes one place, linear may go to the end."""
    weight = torch.linspace(-1, 1, 400).reshape(20, 20)
    coded = jlcm.nearest_codes(weight, 8, torch.zeros(20).long(), 1)
    longest = {}
    for gradient in ("proximal", "linear"):
        made = jlcm.CodebookLearner(weight, coded, jlcm.Rule(gradient))
        upward(made)
        step = made.logits.grad / made.logits.grad.square().sum().sqrt()
        with torch.no_grad():
            made.logits.sub_(step * 500)
        longest[gradient] = jlcm.jumps(coded, made.coded())["mean_jump"]
    assert longest["proximal"] < longest["linear"]


def test_learning_beats_the_nearest_codes_threefold() -> None:
    model, data = reference("digits-vit", seed=1)
    kept = jlcm.compress(model, data.x[:256], bits=2, groups=1, iters=0)
    learned = jlcm.compress(model, data.x[:256], bits=2, groups=1, iters=80, lr_map=0.1)
    assert kept.nbytes == learned.nbytes
    last = [found.units[-2].after for found in (kept, learned)]
    assert 3 * last[1] < last[0]
    right = [accuracy(found.model, data.x_test, data.y_test) for found in (kept, learned)]
    assert right[1] > right[0] + 0.02
    assert all(one.flips > 0 and one.mean_jump >= 1 for one in learned.report)
    assert all(one.flips == 0 for one in kept.report)


@pytest.mark.parametrize(
    "settings_", [{"gradient": "softmax"}, {"phi": "exponential"}, {"optimizer": "shared"}, {"commit": True}]
)
def test_every_way_of_learning_lowers_the_error(settings_: dict[str, object]) -> None:
    torch.manual_seed(0)
    # Of inputs without correlations the nearest codes would be the best.
    net, x = nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(128, 3) @ torch.randn(3, 16)
    rate = 0.03 if "optimizer" in settings_ else 0.1
    for variant in ("codebooks", "scales"):
        found = jlcm.compress(net, x, variant=variant, iters=120, blocks=(), lr_map=rate, seed=3, **settings_)
        assert all(unit.after < unit.before / 1.2 for unit in found.units)
        again = jlcm.compress(net, x, variant=variant, iters=120, blocks=(), lr_map=rate, seed=3, **settings_)
        assert torch.equal(found(x), again(x))


def test_committed_indices_stay_for_the_last_fifth() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 48)), torch.randn(128, 16)
    seen = []

    class Watched(jlcm.JointLearning):
        def after_step(self, fitting: object, done: float) -> None:
            super().after_step(fitting, done)
            learning = fitting.layer("0").learner
            seen.append((done, learning.indices(), learning.codebook.detach().clone()))

    from retensor.quantizing import reconstruct

    coded = jlcm.nearest_codes(net[0].weight, 4, torch.zeros(48).long(), 1)
    start = {"0": (jlcm.Coding(4, jlcm.Layout(1, 48)), coded)}
    reconstruct(net, x, Watched(start, jlcm.Rule(), 1.0, 1e-2, commit=True), steps=20)
    late = [(indices, book) for done, indices, book in seen if done >= 0.8]
    assert all(torch.equal(indices, late[0][0]) for indices, _ in late)
    assert not torch.equal(late[0][1], late[-1][1])
    early = [indices for done, indices, _ in seen if done < 0.8]
    assert not torch.equal(early[0], early[-1])


def test_rules_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="gradient is 'steep'"):
        jlcm.Rule("steep")
    with pytest.raises(ValueError, match="phi is 'flat'"):
        jlcm.Rule(phi="flat")
