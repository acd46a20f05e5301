"""Experts Weights Averaging: the partition, the averages, and the fold, each against what it must equal."""

from __future__ import annotations

import copy
import io
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import retensor as rt
from retensor.compression import ewa
from retensor.data import seeded

KINDS = {
    "mlp": lambda d, h, bias: Mlp(d, h, bias=bias),
    "mlp with norm": lambda d, h, bias: Mlp(d, h, bias=bias, norm_layer=nn.LayerNorm),
    "glu": lambda d, h, bias: GluMlp(d, 2 * h, bias=bias, gate_last=False),
    "swiglu": lambda d, h, bias: SwiGLU(d, h, bias=bias, norm_layer=nn.LayerNorm),
}


def vit(seed: int = 0, **settings: object) -> nn.Module:
    small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
    with seeded(seed):
        return VisionTransformer(**{**small, "num_classes": 5, **settings})


def ffn(kind: str = "mlp", d: int = 6, h: int = 10, bias: bool = True) -> nn.Module:
    """A model that is one feed-forward network, with values that are all different."""
    with seeded(1):
        model = nn.Sequential(KINDS[kind](d, h, bias))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    return model


def experts_of(model: nn.Module, n: int = 4, **settings: object) -> nn.Module:
    return ewa.convert(model, num_experts=n, layers="all", **settings)


def stacked(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{label}": tensor.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, ewa.ExpertLinear | ewa.ExpertNorm)
        for label, tensor in layer.experts()
    }


@given(n=st.integers(1, 60), experts=st.integers(2, 7), seed=st.integers(0, 10**6), lead=st.sampled_from([1, 2, 3]))
@settings(max_examples=80, deadline=None)
def test_every_token_goes_to_one_expert_in_parts_that_differ_by_one_and_comes_back_to_its_place(
    n: int, experts: int, seed: int, lead: int
) -> None:
    shares = ewa.Assignment(experts)
    shares.generator = torch.Generator().manual_seed(seed)
    x = torch.arange(1.0, 2 * n * lead + 1).reshape(lead, n, 2)
    if n * lead < experts:
        with pytest.raises(ValueError, match=f"{n * lead} tokens cannot be shared out among {experts} experts"):
            shares.begin(x, training=True)
        return
    shares.begin(x, training=True)
    parts = shares.take(x)
    assert sum(shares.sizes) == n * lead
    assert max(shares.sizes) - min(shares.sizes) <= 1
    seen = torch.cat([part[:size] for part, size in zip(parts, shares.sizes, strict=True)])
    assert torch.equal(seen.sort(0).values, x.reshape(-1, 2))
    # The expert i multiplies by i.
    y = shares.give(parts * torch.arange(1.0, experts + 1)[:, None, None])
    factor = (y / x).reshape(-1, 2)
    assert torch.equal(factor[:, 0], factor[:, 1])
    counts = torch.bincount(factor[:, 0].round().long(), minlength=experts + 1)
    assert tuple(counts[1:].tolist()) == shares.sizes
    first = shares.sizes[0]
    assert torch.equal(factor.reshape(-1, 2)[shares.chosen[:first], 0], torch.ones(first))


def test_each_expert_gets_each_token_equally_often() -> None:
    shares = ewa.Assignment(4)
    shares.generator = torch.Generator().manual_seed(0)
    draws, n = 10_000, 8
    counts = torch.zeros(n, 4)
    together = 0
    x = torch.zeros(2, n // 2, 1)
    for _ in range(draws):
        shares.begin(x, training=True)
        expert = torch.empty(n, dtype=torch.long)
        expert[shares.chosen] = torch.arange(4).repeat_interleave(n // 4)
        counts[torch.arange(n), expert] += 1
        together += int(expert[0] == expert[1])
    expected = draws / 4
    # Each draw fills the experts equally, so that the sum is 8/7 of a chi-square with 7 * 3 degrees of freedom, which
    # is above 46.8 once in a thousand.
    assert float(((counts - expected) ** 2 / expected).sum()) < 8 / 7 * 46.8
    # Over all tokens of the batch, not per sample: two of one sample meet in one expert with probability 1/7.
    assert abs(together / draws - 1 / 7) < 4 * math.sqrt(1 / 7 * 6 / 7 / draws)


def test_partitions_follow_a_generator_and_differ_between_layers_and_passes() -> None:
    model = experts_of(vit())
    x = torch.randn(4, 1, 8, 8)

    def drawn() -> list[torch.Tensor]:
        model.train()(x)
        return [model.blocks[i].mlp.fc1.assignment.chosen for i in range(2)]

    ewa.use_generator(model, torch.Generator().manual_seed(5))
    first, again = drawn(), drawn()
    ewa.use_generator(model, torch.Generator().manual_seed(5))
    repeated = drawn()
    assert all(torch.equal(a, b) for a, b in zip(first, repeated, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], again[0])
    ewa.use_generator(model, None)
    with seeded(3):
        one = drawn()
    with seeded(3):
        assert torch.equal(one[0], drawn()[0])


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mode", ["rup", "ensemble", "folded"])
def test_equal_experts_are_the_plain_network_and_their_gradients_sum_to_its_own(
    kind: str, bias: bool, mode: str
) -> None:
    dense = ffn(kind, bias=bias).double()
    model = experts_of(dense, 3, init="copy", eval_mode=mode).eval()
    x = torch.randn(2, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(model(x), dense(other), rtol=0, atol=1e-12)
    (model(x) ** 2).sum().backward()
    (dense(other) ** 2).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=0, atol=1e-11)
    for name, parameter in dense.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad.sum(0), parameter.grad, rtol=0, atol=1e-11)


def test_equal_experts_are_the_plain_network_to_a_millionth_in_single_precision() -> None:
    dense = vit(depth=4)
    model = ewa.convert(dense, init="copy")
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for mode in ("folded", "ensemble", "rup"):
        ewa.set_eval_mode(model, mode)
        torch.testing.assert_close(model.eval()(x), dense.eval()(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.train()(x), dense(x), rtol=0, atol=1e-6)


def test_each_expert_computes_its_tokens_alone_with_its_own_weights_and_biases() -> None:
    for kind in KINDS:
        dense = ffn(kind)
        model = experts_of(dense, 3).train()
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
        y = model(x).reshape(8, 6)
        shares = next(m for m in model.modules() if isinstance(m, ewa.ExpertLinear)).assignment
        at = 0
        for i, size in enumerate(shares.sizes):
            single = copy.deepcopy(dense)
            for name, tensor in stacked(model).items():
                single.get_parameter(name).data.copy_(tensor[i])
            mine = shares.chosen[at : at + size]
            torch.testing.assert_close(y[mine], single(x.reshape(8, 6)[mine]), rtol=1e-5, atol=1e-6)
            at += size


def test_the_ensemble_is_the_mean_of_the_experts_outputs() -> None:
    dense = ffn("swiglu")
    model = experts_of(dense, 3, eval_mode="ensemble").eval()
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0))
    outputs = []
    for i in range(3):
        single = copy.deepcopy(dense)
        for name, tensor in stacked(model).items():
            single.get_parameter(name).data.copy_(tensor[i])
        outputs.append(single(x))
    torch.testing.assert_close(model(x), torch.stack(outputs).mean(0), rtol=1e-5, atol=1e-6)
    folded = ewa.fold(model)(x)
    assert float((folded - model(x)).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_folding_gives_the_original_layers_with_mean_weights(kind: str, dtype: torch.dtype) -> None:
    dense = ffn(kind).to(dtype)
    model = experts_of(dense, 3)
    assert all(tensor.dtype == dtype for tensor in model.state_dict().values())
    folded = ewa.fold(model)
    assert {n: (v.shape, v.dtype) for n, v in folded.state_dict().items()} == {
        n: (v.shape, v.dtype) for n, v in dense.state_dict().items()
    }
    assert [type(m) for m in folded.modules()] == [type(m) for m in dense.modules()]
    for name, tensor in stacked(model).items():
        assert torch.equal(folded.get_parameter(name), tensor.mean(0))
    x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(folded.eval()(x), model.eval()(x))
    assert torch.equal(rt.fold(model).eval()(x), folded(x))


def test_after_folding_parameters_and_costs_are_the_original_ones() -> None:
    dense = vit(depth=4)
    model = ewa.convert(dense)
    both = rt.compare(dense, ewa.fold(model), inputs=(1, 1, 8, 8), names=["before", "after"])
    before, after = both["before"], both["after"]
    assert before.macs > 0
    assert (before.parameters, before.parameter_bytes, before.macs) == (
        after.parameters, after.parameter_bytes, after.macs
    )  # fmt: skip
    assert before.activation_peak_bytes == after.activation_peak_bytes
    grown = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in dense.parameters())
    assert grown == 3 * sum(p.numel() for i in (1, 3) for p in dense.blocks[i].mlp.parameters())


@given(
    beta=st.floats(0, 1), experts=st.integers(2, 6), seed=st.integers(0, 1000), form=st.sampled_from(["mean", "others"])
)
@settings(max_examples=50, deadline=None)
def test_averaging_keeps_the_mean_and_shrinks_deviations_by_one_minus_beta(
    beta: float, experts: int, seed: int, form: str
) -> None:
    model = experts_of(ffn().double(), experts, seed=seed)
    before = stacked(model)
    given = beta * (experts - 1) / experts if form == "others" else beta
    ewa.average_(model, given, form=form)
    assert len(before) == 4
    for name, tensor in stacked(model).items():
        mean = before[name].mean(0)
        torch.testing.assert_close(tensor.mean(0), mean, rtol=0, atol=1e-14)
        torch.testing.assert_close(tensor - mean, (1 - beta) * (before[name] - mean), rtol=0, atol=1e-14)


def test_averaging_keeps_the_mean_to_a_ten_millionth_in_single_precision() -> None:
    model = experts_of(vit())
    before = stacked(model)
    for _ in range(10):
        ewa.average_(model, 0.3)
    for name, tensor in stacked(model).items():
        torch.testing.assert_close(tensor.mean(0), before[name].mean(0), rtol=0, atol=1e-7)


def test_the_form_of_the_others_is_its_formula() -> None:
    model = experts_of(ffn().double(), 3)
    before = stacked(model)
    ewa.average_(model, 0.2, form="others")
    for name, tensor in stacked(model).items():
        for i in range(3):
            others = sum(before[name][j] for j in range(3) if j != i) / 2
            torch.testing.assert_close(tensor[i], 0.8 * before[name][i] + 0.2 * others, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("scale", "factor"), [("none", 4), ("N", 1)])
def test_full_sharing_under_sgd_is_plain_training(scale: str, factor: int) -> None:
    dense = ffn().double()
    plain = copy.deepcopy(dense)
    model = experts_of(dense, 4, init="copy", grad_scale=scale)
    x = torch.randn(20, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.randn(20, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ours = torch.optim.SGD(model.parameters(), lr=0.4, momentum=0.5)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.4 / factor, momentum=0.5)
    ewa.attach(ours, model, share_rate=1.0, schedule="constant", total_steps=20)
    for step in range(20):
        for network, optimizer in ((model, ours), (plain, theirs)):
            optimizer.zero_grad()
            functional.mse_loss(network.train()(x[step]), y[step]).backward()
            optimizer.step()
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name].mean(0), tensor, rtol=0, atol=1e-12)
    assert float((plain[0].fc1.weight - dense[0].fc1.weight).detach().abs().max()) > 1e-3


def test_with_weight_decay_the_mean_decays_as_one_network_does() -> None:
    model = experts_of(ffn().double(), 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    ewa.attach(optimizer, model, share_rate=0.5, total_steps=1)
    before = stacked(model)
    (0.0 * model(torch.randn(2, 4, 6, dtype=torch.float64)).sum()).backward()
    optimizer.step()
    for name, tensor in stacked(model).items():
        torch.testing.assert_close(tensor.mean(0), 0.95 * before[name].mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_deviations_are_the_decayed_history_of_the_updates(make: type[torch.optim.Optimizer]) -> None:
    """D_i(t) = sum over s of the product of (1 - beta_v), v = s..t, times (u_i(s) - mean u(s)), from equal experts."""
    model = experts_of(ffn().double(), 3, init="copy")
    optimizer = make(model.parameters(), lr=0.05)
    updates: list[dict[str, torch.Tensor]] = []
    before: dict[str, torch.Tensor] = {}
    # Hooks run in the order in which they are given: this one sees the weights before the average.
    optimizer.register_step_pre_hook(lambda *_: before.update(stacked(model)))
    optimizer.register_step_post_hook(
        lambda *_: updates.append({name: tensor - before[name] for name, tensor in stacked(model).items()})
    )
    handle = ewa.attach(optimizer, model, share_rate=0.4, total_steps=12)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        optimizer.zero_grad()
        (model(torch.randn(2, 5, 6, dtype=torch.float64, generator=generator)) ** 2).sum().backward()
        optimizer.step()
    for name, tensor in stacked(model).items():
        deviation = torch.zeros_like(tensor)
        for s in range(12):
            decay = math.prod(1 - handle.rate(v + 1) for v in range(s, 12))
            deviation += decay * (updates[s][name] - updates[s][name].mean(0))
        torch.testing.assert_close(tensor - tensor.mean(0), deviation, rtol=0, atol=1e-12)
        assert float(deviation.abs().max()) > 1e-5


def test_the_schedules_are_their_formulas() -> None:
    model = experts_of(ffn())
    formulas = {
        "linear": lambda t: t / 8,
        "constant": lambda t: 1,
        "cosine": lambda t: (1 - math.cos(math.pi * t / 8)) / 2,
    }
    for schedule, formula in formulas.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        handle = ewa.attach(optimizer, model, share_rate=0.3, total_steps=8, schedule=schedule)
        assert [handle.rate(t) for t in range(1, 9)] == pytest.approx([0.3 * formula(t) for t in range(1, 9)])
        handle.detach()
        early = ewa.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, share_rate=0.3, total_steps=16,
                           schedule=schedule, until=0.5)  # fmt: skip
        assert [early.rate(t) for t in range(1, 9)] == pytest.approx([0.3 * formula(t) for t in range(1, 9)])
        assert [early.rate(t) for t in range(9, 20)] == [0.0] * 11
        early.detach()


def test_stats_tell_spread_rate_and_tokens() -> None:
    model = experts_of(vit(depth=4), 3)
    assert [layer.tokens for layer in ewa.stats(model)] == [()] * 4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ewa.attach(optimizer, model, share_rate=0.3, total_steps=3)
    model.train()(torch.randn(2, 1, 8, 8)).sum().backward()
    optimizer.step()
    found = ewa.stats(model)
    assert [layer.name for layer in found] == [f"blocks.{i}.mlp" for i in range(4)]
    assert all(layer.tokens == (4, 3, 3) and layer.beta == pytest.approx(0.1) for layer in found)
    values = torch.cat([model.get_parameter(f"blocks.2.mlp.{n}").flatten(1) for n in
                        ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")], 1)  # fmt: skip
    mean = values.mean(0)
    expected = [float((values[i] - mean).norm() / mean.norm()) for i in range(3)]
    assert found[2].spread == pytest.approx(expected, rel=1e-5)


def test_independent_experts_are_other_draws_of_the_same_spread_and_copies_are_copies() -> None:
    dense = vit(embed_dim=64, weight_init="jax")
    weight = dense.blocks[0].mlp.fc1.weight.detach()
    with seeded(0):
        before = torch.rand(1)
    with seeded(0):
        independent = experts_of(dense).blocks[0].mlp.fc1.weight.detach()
        assert torch.equal(torch.rand(1), before)
    assert torch.equal(independent[0], weight)
    bound = (6 / (64 + 256)) ** 0.5
    for i in range(1, 4):
        # As this model draws them, uniformly and by the layer's size, not as timm does by default.
        assert 0.99 * bound < float(independent[i].abs().max()) <= bound
        assert float(independent[i].std() / weight.std()) == pytest.approx(1, abs=0.02)
        # No sum of a row or of a column is another's.
        for dim in (0, 1):
            assert float((independent[i].sum(dim) - weight.sum(dim)).abs().min()) > 1e-6
        # Correlations of 16,384 pairs have a standard error of 1/128.
        both = torch.stack((independent[i].flatten(), independent[i - 1].flatten()))
        assert abs(float(torch.corrcoef(both)[0, 1])) < 4 / 128
    assert torch.equal(independent, experts_of(dense).blocks[0].mlp.fc1.weight)
    assert not torch.equal(independent, experts_of(dense, seed=1).blocks[0].mlp.fc1.weight)
    # Biases that are drawn are drawn anew, even where two happen to be equal.
    biases = experts_of(dense).blocks[0].mlp.fc1.bias.detach()
    assert all(float((biases[i] - biases[0]).abs().min()) > 0 for i in range(1, 4))
    # Trained weights do not come back in another order.
    trained = copy.deepcopy(dense)
    nn.init.constant_(trained.blocks[0].mlp.fc1.weight, 5.0)
    again = experts_of(trained).blocks[0].mlp.fc1.weight.detach()
    assert torch.equal(again[1:], independent[1:])
    copies = experts_of(dense, init="copy").blocks[0].mlp.fc2.weight
    assert all(torch.equal(one, dense.blocks[0].mlp.fc2.weight) for one in copies)


def test_experts_can_be_those_of_models_made_anew() -> None:
    made: list[nn.Module] = []

    def fresh() -> nn.Module:
        made.append(vit(seed=10 + len(made)))
        return made[-1]

    dense = vit()
    model = experts_of(dense, 3, init=fresh)
    assert len(made) == 2
    for i, source in enumerate((dense, *made)):
        assert torch.equal(model.blocks[1].mlp.fc2.weight[i], source.blocks[1].mlp.fc2.weight)
    # What is no expert's is the given model's.
    assert torch.equal(model.blocks[1].attn.qkv.weight, dense.blocks[1].attn.qkv.weight)


def test_a_gate_that_begins_open_is_drawn_open() -> None:
    gate = GluMlp(8, 16)
    gate.init_weights()
    model = experts_of(nn.Sequential(gate), 3)
    assert torch.equal(model[0].fc1.bias[:, 8:].detach(), torch.ones(3, 8))
    assert len(set(model[0].fc1.bias[:, :8].flatten().tolist())) == 24
    rows = model[0].fc1.weight.detach().std(-1)
    assert bool((rows[:, 8:] < 1e-5).all())
    assert bool((rows[:, :8] > 1e-3).all())


def test_a_frozen_network_has_frozen_experts_and_folds_to_a_frozen_one() -> None:
    dense = ffn().requires_grad_(False)
    model = experts_of(dense)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ewa.fold(model).parameters())


def test_copies_pickles_and_state_dicts_keep_experts_and_their_common_assignment() -> None:
    model = experts_of(vit(), 3)
    ewa.use_generator(model, torch.Generator().manual_seed(1))
    x = torch.randn(2, 1, 8, 8)
    model.train()(x).sum().backward()
    ewa.set_eval_mode(model, "ensemble")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert other.blocks[0].mlp.fc1.assignment is other.blocks[0].mlp.fc2.assignment
        assert other.blocks[0].mlp.fc1.assignment is not other.blocks[1].mlp.fc1.assignment
        assert other.blocks[0].mlp.fc1.assignment is not model.blocks[0].mlp.fc1.assignment
        assert torch.equal(other.eval()(x), model.eval()(x))
        other.train()(x)
    again = experts_of(vit(seed=7), 3, eval_mode="ensemble", seed=5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(x), model.eval()(x))


@pytest.mark.parametrize("routed", [False, True])
def test_files_hold_experts_and_their_common_assignment(tmp_path: object, routed: bool) -> None:
    path = tmp_path / "experts.safetensors"
    dense = vit(depth=4)
    model = ewa.route(dense, 3, top_k=2) if routed else ewa.convert(dense, 3, eval_mode="ensemble", grad_scale="N")
    x = torch.randn(2, 1, 8, 8)
    rt.save(model, path)
    # Twice, so that the second reading must not join the first.
    for base in (vit(seed=4, depth=4), vit(seed=5, depth=4)):
        found = rt.load(path, base)
        assert torch.equal(found.eval()(x), model.eval()(x))
        pairs = [(found.blocks[i].mlp.fc1.assignment, found.blocks[i].mlp.fc2.assignment) for i in (1, 3)]
        assert all(one is two for one, two in pairs)
        assert pairs[0][0] is not pairs[1][0]
        with seeded(0):
            expected = model.train()(x)
        with seeded(0):
            assert torch.equal(found.train()(x), expected)
    other = rt.load(path, base)
    assert other.blocks[1].mlp.fc1.assignment is not found.blocks[1].mlp.fc1.assignment


def test_files_of_models_beside_each_other_join_the_layers_of_each(tmp_path: object) -> None:
    towers = nn.ModuleDict({name: ewa.convert(vit(), 3) for name in ("left", "right")})
    rt.save(towers, tmp_path / "towers.safetensors")
    found = rt.load(tmp_path / "towers.safetensors", nn.ModuleDict({name: vit() for name in ("left", "right")}))
    left, right = (found[name].blocks[1].mlp for name in ("left", "right"))
    assert left.fc1.assignment is left.fc2.assignment
    assert right.fc1.assignment is right.fc2.assignment
    assert left.fc1.assignment is not right.fc1.assignment
    towers["left"].blocks[1].mlp.fc2.assignment = ewa.Assignment(4)
    rt.save(towers, tmp_path / "towers.safetensors")
    with pytest.raises(rt.RetensorError):
        rt.load(tmp_path / "towers.safetensors", nn.ModuleDict({name: vit() for name in ("left", "right")}))


@pytest.mark.parametrize("routed", [False, True])
def test_threads_that_share_a_model_share_no_pass(routed: bool) -> None:
    model = ewa.route(ffn(), 3, layers="all") if routed else experts_of(ffn(), 3, eval_mode="ensemble")
    model.eval()
    inputs = [torch.randn(size, 6, generator=torch.Generator().manual_seed(size)) for size in range(3, 43)]
    expected = [model(x) for x in inputs]
    # The other thread's pass comes between the first layer and the last.
    inner = threading.Event(), threading.Event()
    first, last = model[0].fc1, model[0].fc2

    def pause(*_: object) -> None:
        inner[0].set()
        inner[1].wait(10)

    handle = first.register_forward_hook(pause)
    outputs: list[torch.Tensor] = []
    other = threading.Thread(target=lambda: outputs.append(model(inputs[30])))
    other.start()
    assert inner[0].wait(10)
    handle.remove()
    assert torch.equal(model(inputs[0]), expected[0])
    inner[1].set()
    other.join(10)
    assert torch.equal(outputs[0], expected[30])
    assert last.assignment is first.assignment
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            found = list(pool.map(model, inputs))
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_ranks_draw_partitions_of_their_own_from_one_seed() -> None:
    model = experts_of(ffn()).train()

    def drawn(seed: int, rank: int | None) -> list[int]:
        ewa.use_generator(model, seed, rank=rank)
        model(torch.randn(5, 4, 6))
        return model[0].fc1.assignment.chosen.tolist()

    assert drawn(3, 0) == drawn(3, None) == drawn(3, 0)
    assert len({tuple(drawn(seed, rank)) for seed in range(3) for rank in range(3)}) == 9
    for wrong in ((-1, None), (1, -1)):
        with pytest.raises(ValueError, match="numbers from 0 on"):
            drawn(*wrong)
    for wrong in (("a", None), (True, None), (torch.Generator(), 1), (None, 1)):
        with pytest.raises(TypeError, match=r"a torch.Generator, a seed or None"):
            drawn(*wrong)


def _rank(rank: int, path: str, found: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = experts_of(ffn(), 4)
    ewa.use_generator(model, 7)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    ewa.attach(optimizer, model, share_rate=0.3, total_steps=3)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(10 * step + rank))
        parallel(x).square().mean().backward()
        optimizer.step()
    chosen = model[0].fc1.assignment.chosen.tolist()
    found.put((rank, chosen, {n: v.tolist() for n, v in stacked(model).items()}))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_keep_the_same_weights_and_draw_other_partitions(tmp_path: object) -> None:
    context = torch.multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    workers = [
        context.Process(target=_rank, args=(rank, str(tmp_path / "store"), found), daemon=True) for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    (_, first, weights), (_, second, others) = sorted((found.get() for _ in workers), key=lambda one: one[0])
    assert first != second
    assert weights == others


def test_experts_export_and_compile() -> None:
    model = experts_of(vit()).eval()
    x = torch.randn(2, 1, 8, 8)
    for mode in ("folded", "ensemble"):
        ewa.set_eval_mode(model, mode)
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-6)
    # A training pass is one graph without breaks, partition included.
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    with seeded(0):
        expected = model(x)
    with seeded(0):
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-6)


def test_few_tokens_can_be_folded() -> None:
    model = experts_of(ffn(), 4, few_tokens="fold").train()
    x = torch.randn(3, 6)
    assert torch.equal(model(x), ewa.fold(model)(x))
    with pytest.raises(ValueError, match="3 tokens cannot be shared out among 4 experts"):
        experts_of(ffn(), 4).train()(x)


def test_the_partition_is_over_all_tokens_of_the_batch_so_one_token_a_sample_is_enough() -> None:
    model = experts_of(ffn(), 4).train()
    model(torch.randn(8, 1, 6))
    assert ewa.stats(model)[0].tokens == (2, 2, 2, 2)


def test_a_pass_through_experts_multiplies_as_much_as_a_plain_one_and_an_ensemble_more() -> None:
    dense = ffn("swiglu")
    x = torch.randn(3, 4, 6)

    def flops(model: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    model = experts_of(dense, 4)
    assert flops(model.train()) == flops(model.eval()) == flops(dense) > 0
    ewa.set_eval_mode(model, "ensemble")
    assert flops(model.eval()) == 4 * flops(dense)


def test_gradients_through_a_partition_are_those_of_finite_differences() -> None:
    model = experts_of(ffn("glu", d=3, h=4).double(), 3).train()
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        ewa.use_generator(model, torch.Generator().manual_seed(4))
        return model(x)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))
