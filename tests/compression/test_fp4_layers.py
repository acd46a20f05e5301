"""Layers in 4 bits: the six operands by hand, rotation, real models and files."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.compression import fp4

NEAREST = fp4.Recipe(fp4.UE5M3, rounding_bwd="nearest")
NONE = fp4.Recipe(fwd=None)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(m: int = 48, n: int = 24, k: int = 40, recipe: fp4.Recipe = NEAREST) -> tuple[Any, ...]:
    layer = fp4.FP4Linear(k, n, bias=False, recipe=recipe)
    layer.weight.data = normal(n, k, seed=1)
    return layer, normal(m, k).requires_grad_(), normal(m, n, seed=2)


def test_each_of_six_operands_is_in_blocks_along_its_own_reduction() -> None:
    layer, x, dy = linear()
    y = layer(x)
    y.backward(dy)
    w = layer.weight.detach()

    def q(z: torch.Tensor, dim: int) -> torch.Tensor:
        return fp4.quantize(z.detach(), fp4.UE5M3, dim)

    assert torch.equal(y, q(x, 1) @ q(w, 1).T)
    assert torch.equal(x.grad, q(dy, 1) @ q(w, 0))
    assert torch.equal(layer.weight.grad, q(dy, 0).T @ q(x, 0))
    # Codes of W used again for W^T would be another scheme.
    assert not torch.equal(x.grad, q(dy, 1) @ q(w, 1))


def test_each_operand_may_have_a_format_of_its_own() -> None:
    formats = dict.fromkeys(fp4.OPERANDS) | {"dgrad.w": fp4.MXFP4}
    layer, x, dy = linear(recipe=fp4.Recipe(formats=formats))
    y = layer(x)
    y.backward(dy)
    w = layer.weight.detach()
    assert torch.equal(y, x @ w.T)
    assert torch.equal(x.grad, dy @ fp4.quantize(w, fp4.MXFP4, 0))
    assert torch.equal(layer.weight.grad, dy.T @ x)
    both = fp4.Recipe(fwd=fp4.UE5M3, bwd=None)
    assert both.format("fwd.w") == fp4.UE5M3
    assert both.format("wgrad.x") is None
    assert fp4.Recipe(roundings={"wgrad.x": "stochastic"}).rounding("wgrad.x") == "stochastic"


@given(m=st.integers(1, 40), n=st.integers(1, 40), k=st.integers(1, 40), batch=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_rotated_products_in_full_precision_are_the_plain_ones(m: int, n: int, k: int, batch: int) -> None:
    recipe = fp4.Recipe(fwd=None, hadamard={"fwd": 16, "dgrad": 8, "wgrad": 32})
    lead = (2,) * batch
    a, b = normal(*lead, m, k).requires_grad_(), normal(*lead, k, n, seed=1).requires_grad_()
    dy = normal(*lead, m, n, seed=2)
    fp4.matmul(a, b, recipe).backward(dy)
    for ours, left, right in ((fp4.matmul(a, b, recipe), a, b), (a.grad, dy, b.mT), (b.grad, a.mT, dy)):
        assert ours is not None
        # By the size of what is summed: sums of either sign may come out near nothing.
        gap = float((ours - left @ right).detach().norm())
        assert gap <= 1e-5 * float((left.abs() @ right.abs()).detach().norm())


@pytest.mark.parametrize("size", [2, 16, 128])
def test_the_rotation_is_orthogonal_and_is_undone(size: int) -> None:
    whole = fp4.rotate(torch.eye(size, dtype=torch.float64), size, seed=5)
    assert torch.allclose(whole @ whole.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(whole.abs(), torch.full_like(whole, size**-0.5), atol=1e-12)
    x = normal(3, 100, 5)
    turned = fp4.rotate(x, size, dim=1, seed=5)
    assert torch.allclose(fp4.unrotate(turned, size, dim=1, seed=5, length=100), x, atol=1e-5)
    if size > 2:
        assert not torch.equal(turned, fp4.rotate(x, size, dim=1, seed=6))
    for bad in (0, 3, 24, True, 2.0):
        with pytest.raises(ValueError, match="a power of two"):
            fp4.rotate(x, bad)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="a power of two"):
            fp4.Recipe(hadamard={"fwd": bad})  # type: ignore[dict-item]


def test_a_tensor_is_measured_after_it_was_rotated() -> None:
    layer, x, _ = linear(recipe=fp4.Recipe(fp4.UE5M3, hadamard={"fwd": 8}))
    turn = fp4.product.Turn(layer.recipe, layer.recipe.seed)
    left = fp4.quantize(turn.rotated(x.detach(), "fwd", -1), fp4.UE5M3)
    right = fp4.quantize(turn.rotated(layer.weight.detach(), "fwd", -1), fp4.UE5M3)
    assert torch.equal(layer(x), left @ right.T)


def test_gradients_of_quantisers_reach_inputs_and_weights() -> None:
    # With backward products in full precision the layer is two quantisers and a product.
    for hadamard in ({}, {"fwd": 16}):
        recipe = fp4.Recipe(fp4.UE5M3, bwd=None, q_grad="dge", scale_grad="ste", hadamard=hadamard)
        layer, x, dy = linear(recipe=recipe)
        layer(x).backward(dy)
        turn = fp4.product.Turn(recipe, recipe.seed)
        # The gradient of each operand is that of its quantiser, behind the product with the other one as it is.
        for mine, other, g in ((x, layer.weight, dy), (layer.weight, x, dy.T)):
            a = mine.detach().clone().requires_grad_()
            made = fp4.quantize(turn.rotated(a, "fwd", -1), fp4.UE5M3, q_grad="dge", scale_grad="ste")
            (made @ turn.rotated(other.detach(), "fwd", -1).T).backward(g)
            assert torch.allclose(mine.grad, a.grad, atol=1e-4)
    # A slope for weights alone.
    layer, x, dy = linear(recipe=fp4.Recipe(fp4.UE5M3, bwd=None, q_grad="dge", q_grad_x="ste"))
    layer(x).backward(dy)
    assert torch.equal(x.grad, dy @ layer.weight.detach())
    assert not torch.allclose(layer.weight.grad, dy.T @ x.detach())


def test_two_operands_rounded_at_random_are_independent() -> None:
    # The mean of a product is that of its operands' means where they draw apart.
    recipe = fp4.Recipe(
        fp4.Format(scale="e8m0"), formats={"fwd.x": None, "fwd.w": None}, roundings={"wgrad.x": "stochastic"}
    )  # fmt: skip
    layer, x, dy = linear(64, 16, 32, recipe)
    exact, draws = dy.T @ x.detach(), 500
    grads = []
    for _ in range(draws):
        layer.weight.grad = None
        layer(x).backward(dy)
        grads.append(layer.weight.grad)
    every = torch.stack(grads)
    off = (every.mean(0) - exact) / (every.std(0) / draws**0.5)
    # Standard normal numbers, 512 of them.
    assert float(off.square().mean()) == pytest.approx(1, abs=5 * (2 / 512) ** 0.5)


def test_a_compiled_layer_draws_anew_and_repeats_what_it_does_uncompiled() -> None:
    recipe = fp4.Recipe(fp4.UE5M3)
    found = []
    for compiled in (False, True):
        layer, x, dy = linear(recipe=recipe)
        run = torch.compile(layer, backend="eager") if compiled else layer
        grads = []
        for _ in range(3):
            layer.weight.grad = None
            run(x).backward(dy)
            grads.append(layer.weight.grad)
        assert layer.calls == 3
        assert not torch.equal(grads[0], grads[1])
        assert not torch.equal(grads[1], grads[2])
        found.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_layers_take_what_plain_ones_take() -> None:
    layer = fp4.FP4Linear(32, 8, recipe=fp4.Recipe(fp4.UE5M3))
    turned = fp4.FP4Conv1D(8, 32, recipe=fp4.Recipe(fp4.UE5M3))
    for shape in ((32,), (3, 32), (2, 3, 32), (0, 32), (2, 0, 32)):
        x = torch.ones(shape, requires_grad=True)
        for one in (layer, turned):
            out = one(x)
            assert out.shape == (*shape[:-1], 8)
            out.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape
    meta = copy.deepcopy(layer).to("meta")
    x = torch.empty(4, 32, device="meta", requires_grad=True)
    meta(x).sum().backward()
    assert meta.weight.grad.shape == (8, 32)
    with pytest.raises(ValueError, match="rows of 31 numbers came to a FP4Linear of 32 inputs"):
        layer(torch.ones(2, 31))
    with pytest.raises(TypeError, match=r"floating point, not of torch\.int64"):
        layer(torch.ones(2, 32).long())


def test_layers_that_are_more_than_their_kind_are_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    for layer, said in (
        (Doubled(16, 4), "'0' is a Doubled, which has a forward of its own; exclude it"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), "the tensors of '0' are parametrized"),
    ):
        with pytest.raises(ValueError, match=said):
            fp4.convert(nn.Sequential(layer, nn.Linear(4, 2)), NEAREST)
        made = fp4.convert(nn.Sequential(layer, nn.Linear(4, 2)), NEAREST, exclude=["0"])
        assert type(made[1]) is fp4.FP4Linear


def test_the_mean_of_stochastic_gradients_goes_to_that_without_rounding_of_gradients() -> None:
    formats = {"wgrad.x": None, "fwd.x": None, "fwd.w": None}
    layer, x, dy = linear(64, 16, 32, fp4.Recipe(fp4.Format(scale="e8m0"), formats=formats))
    exact = dy.T @ x.detach()

    def error(count: int) -> float:
        total = torch.zeros_like(exact)
        for _ in range(count):
            layer.weight.grad = None
            layer(x).backward(dy)
            total += layer.weight.grad
        return float((total / count - exact).norm() / exact.norm())

    few, many = error(20), error(500)
    # As one over the root of the number: five times less, give or take the chance of either.
    assert many < few / 5 * 1.3
    assert layer.calls == 520
    biased = dy.T @ x.detach() - fp4.quantize(dy, fp4.Format(scale="e8m0"), 0).T @ x.detach()
    assert many < float(biased.norm() / exact.norm()) / 5


def test_layers_draw_anew_in_training_and_alike_with_one_seed() -> None:
    made = [linear(recipe=fp4.Recipe(fp4.UE5M3, seed=seed)) for seed in (0, 0, 1)]
    found = []
    for layer, x, dy in made:
        grads = []
        for _ in range(2):
            layer.weight.grad = None
            layer(x).backward(dy)
            grads.append(layer.weight.grad.clone())
        assert not torch.equal(*grads)
        found.append(grads)
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))
    assert not torch.equal(found[0][0], found[2][0])
    state = torch.random.get_rng_state()
    made[0][0](made[0][1]).backward(made[0][2])
    assert torch.equal(state, torch.random.get_rng_state())


def test_outliers_go_by_a_product_in_full_precision() -> None:
    x = normal(64, 32)
    x[:, 5] *= 50
    w = normal(16, 32, seed=1)
    errors = []
    for outlier in (None, 0.96):
        recipe = fp4.Recipe(fp4.UE5M3, outlier=outlier, rounding_bwd="nearest")
        layer = fp4.FP4Linear(32, 16, bias=False, recipe=recipe)
        layer.weight.data = w.clone()
        z = x.clone().requires_grad_()
        out = layer(z)
        errors.append(float((out.detach() - x @ w.T).norm() / (x @ w.T).norm()))
        out.backward(normal(64, 16, seed=2))
        if outlier:
            limit = x.abs().flatten().sort().values[int(0.96 * x.numel())]
            kept = x.clamp(-limit, limit)
            expected = fp4.quantize(kept, fp4.UE5M3) @ fp4.quantize(w, fp4.UE5M3).T + (x - kept) @ w.T
            assert torch.equal(out, expected)
            assert torch.isfinite(z.grad).all()  # type: ignore[arg-type]
    assert errors[1] < errors[0] / 2
    # Without formats, clamping and the sparse product together are the plain layer.
    layer, z, dy = linear(recipe=fp4.Recipe(fwd=None, outlier=0.9))
    layer(z).backward(dy)
    assert torch.allclose(z.grad, dy @ layer.weight.detach(), atol=1e-4)
    assert torch.allclose(layer.weight.grad, dy.T @ z.detach(), atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"groups": 4, "bias": False},
        {"padding": 2, "padding_mode": "circular"}, {"padding": "same", "kernel_size": (2, 4)}, {"padding": (0, 2)},
    ],
    ids=str,
)  # fmt: skip
def test_convolutions_without_formats_are_torchs(options: dict[str, Any]) -> None:
    plain = nn.Conv2d(**{"in_channels": 8, "out_channels": 12, "kernel_size": 3, **options})
    made = fp4.convert(nn.Sequential(plain), NONE)[0]
    assert type(made) is fp4.FP4Conv2d
    x = normal(2, 8, 9, 11)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = made(a), plain(b)
    assert torch.allclose(ours, theirs, atol=1e-5)
    g = torch.randn_like(theirs)
    ours.backward(g)
    theirs.backward(g)
    for one, other in ((a.grad, b.grad), (made.weight.grad, plain.weight.grad)):
        assert torch.allclose(one, other, atol=1e-4)
    assert torch.allclose(made(x[0]), theirs[0], atol=1e-5)


def test_a_convolution_is_quantised_along_channels_and_kernel() -> None:
    made = fp4.FP4Conv2d(4, 6, 3, padding=1, bias=False, recipe=NEAREST)
    x = normal(2, 4, 5, 5)
    rows = functional.unfold(x, 3, padding=1)
    expected = fp4.quantize(made.weight.detach().flatten(1), fp4.UE5M3) @ fp4.quantize(rows, fp4.UE5M3, 1)
    assert torch.allclose(made(x).flatten(2), expected, atol=1e-5)


def test_recipes_come_back_from_json_and_refuse_what_they_do_not_know() -> None:
    recipe = fp4.Recipe(
        fp4.UE5M3, fp4.NVFP4, formats={"fwd.x": None, "wgrad.x": fp4.MXFP4}, roundings={"fwd.w": "stochastic"},
        hadamard={"wgrad": 16}, q_grad="tanh", q_grad_x="dge", scale_grad="relaxed", outlier=0.99, seed=3,
    )  # fmt: skip
    assert fp4.Recipe.from_dict(json.loads(json.dumps(recipe.as_dict()))) == recipe
    for options, kind, said in (
        ({"fwd": "e2m1"}, TypeError, "fwd is a Format, or None"),
        ({"rounding_bwd": "up"}, ValueError, "rounding_bwd is 'up'"),
        ({"roundings": {"fwd.w": "up"}}, ValueError, "fwd.w is 'up'"),
        ({"formats": {"dy": None}}, ValueError, "'dy' is no operand; operands are fwd.x"),
        ({"formats": {"fwd.x": 3}}, TypeError, "format of fwd.x is a Format or None"),
        ({"hadamard": {"forward": 16}}, ValueError, "'forward' is no product; products are fwd"),
        ({"q_grad": "x"}, ValueError, "q_grad is 'x'"),
        ({"scale_grad": "x"}, ValueError, "scale_grad is 'x'"),
        ({"outlier": 1.0}, ValueError, "outlier is a quantile"),
        ({"seed": 1.5}, TypeError, "seed is a whole number"),
    ):
        with pytest.raises(kind, match=said):
            fp4.Recipe(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no part 'size'"):
        fp4.Recipe.from_dict({"size": 3})


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def test_a_model_keeps_its_names_and_values_and_comes_back(tmp_path: Path) -> None:
    model, x = small(), normal(4, 1, 8, 8)
    recipe = fp4.Recipe(fp4.UE5M3, hadamard={"wgrad": 16})
    made = fp4.convert(model, recipe, exclude=["5"])
    kinds = [type(layer) for layer in made]
    assert kinds[0] is fp4.FP4Conv2d
    assert kinds[3] is fp4.FP4Linear
    assert kinds[5] is nn.Linear
    assert type(model[0]) is nn.Conv2d
    for (name, one), (other_name, other) in zip(
        made.state_dict().items(), model.state_dict().items(), strict=True
    ):  # fmt: skip
        assert name == other_name
        assert torch.equal(one, other)
    assert made[0].recipe.seed != made[3].recipe.seed
    y = made.eval()(x)
    assert torch.equal(copy.deepcopy(made)(x), y)
    rt.save(made, tmp_path / "model.safetensors")
    again = rt.load(tmp_path / "model.safetensors", small()).eval()
    assert torch.equal(again(x), y)
    assert again[3].recipe == made[3].recipe
    plain = rt.fold(made)
    assert type(plain[0]) is nn.Conv2d
    assert torch.allclose(plain(x), model.eval()(x), atol=1e-6)
    fresh = fp4.convert(small(), recipe, exclude=["5"]).eval()
    fresh.load_state_dict(made.state_dict())
    assert torch.equal(fresh(x), y)
    other = fp4.convert(made, NEAREST, include=["3"])
    assert other[3].recipe.fwd == fp4.UE5M3
    assert not other[3].recipe.hadamard


def test_an_exported_model_gives_the_same() -> None:
    made = fp4.convert(small(), fp4.Recipe(fp4.UE5M3, hadamard={"fwd": 16})).eval()
    x = normal(4, 1, 8, 8)
    exported = torch.export.export(made, (x,)).module()
    with torch.no_grad():
        assert torch.allclose(exported(x), made(x), atol=1e-6)


def test_under_autocast_operands_stay_exact() -> None:
    made = fp4.convert(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), NEAREST)
    x = normal(16, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    first = made[0](x).to(torch.bfloat16)
    assert torch.equal(y, made[1](first.float()).to(torch.bfloat16))
    assert made[0].weight.grad.dtype == torch.float32
    half = copy.deepcopy(made).to(torch.bfloat16)
    assert half(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_models_of_timm_and_transformers_train() -> None:
    timm = pytest.importorskip("timm")
    transformers = pytest.importorskip("transformers")
    recipe = fp4.Recipe(fp4.UE5M3, hadamard={"wgrad": 16}, scale_grad="ste")
    vit = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=32, depth=2, num_classes=4, embed_dim=48, num_heads=4
    )
    vit = fp4.convert(vit, recipe, include=["blocks.*.attn.qkv", "blocks.*.mlp.fc*"], exclude=["head"])
    assert sum(isinstance(module, fp4.FP4Linear) for module in vit.modules()) == 6
    x, y = normal(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    optimizer = torch.optim.AdamW(vit.parameters(), 3e-3)
    for _ in range(12):
        loss = functional.cross_entropy(vit(x), y)
        assert fp4.train_step(vit, loss, optimizer, loss_scale=256.0, clip=1.0) > 0
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=50, n_positions=32)
    plain = transformers.GPT2LMHeadModel(config)
    from transformers.pytorch_utils import Conv1D

    gpt = fp4.convert(plain, recipe, include=[Conv1D])
    assert sum(isinstance(module, fp4.FP4Conv1D) for module in gpt.modules()) == 4
    assert gpt.lm_head.weight is gpt.transformer.wte.weight
    ids = torch.arange(32)[None] % 50
    gpt(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())
    assert type(rt.fold(gpt).transformer.h[0].mlp.c_fc) is Conv1D
    nothing = fp4.convert(plain, NONE, include=[Conv1D]).eval()
    assert torch.allclose(nothing(ids).logits, plain.eval()(ids).logits, atol=1e-5)


def test_no_tokens_are_no_gradient() -> None:
    for recipe in (fp4.Recipe(fp4.UE5M3, hadamard={"wgrad": 16}), fp4.Recipe(fp4.MXFP4, scale_grad="ste")):
        layer = fp4.FP4Linear(32, 8, recipe=recipe)
        x = torch.zeros(0, 3, 32, requires_grad=True)
        out = layer(x)
        assert out.shape == (0, 3, 8)
        out.sum().backward()
        assert not layer.weight.grad.any()


def test_what_cannot_be_converted_is_told() -> None:
    for make, kind, said in (
        (lambda: fp4.convert(small(), "e2m1"), TypeError, "by a Recipe"),  # type: ignore[arg-type]
        (lambda: fp4.convert(3, NEAREST), TypeError, "not of 3"),  # type: ignore[arg-type]
        (lambda: fp4.convert(small(), NEAREST, ["9"]), ValueError, "no linear layer or convolution"),
        (lambda: fp4.convert(small(), NEAREST, "3"), TypeError, "sequences of patterns"),
        (lambda: fp4.matmul(torch.ones(2, 3), torch.ones(4, 2), NEAREST), ValueError, "have no product"),
    ):
        with pytest.raises(kind, match=said):
            make()  # type: ignore[no-untyped-call]
