"""Experts in models of timm, transformers and torchvision, routed mixtures, hooks of optimizers, and bad input."""

from __future__ import annotations

import copy
import gc
import json
import warnings
from collections.abc import Callable

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.layers.mlp import GlobalResponseNormMlp
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from torch import nn

import retensor as rt
from retensor.compression import ewa
from retensor.data import accuracy, digits, fit, seeded
from retensor.replacing.state import KEY, read_header

SMALL = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
TIMM: dict[str, tuple[str, dict[str, object]]] = {
    "vit": ("vit_tiny_patch16_224", SMALL),
    "deit": ("deit_tiny_distilled_patch16_224", SMALL),
    "glu": ("vit_giant_patch14_dinov2", {**SMALL, "patch_size": 16}),
    "swiglu with norm": ("eva02_base_patch14_224", {**SMALL, "patch_size": 16}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "num_classes": 3},
    ),
    "convnext": ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8), "conv_mlp": False, "num_classes": 3}),
}


def timm_model(name: str) -> nn.Module:
    kind, settings = TIMM[name]
    with seeded(0):
        return timm.create_model(kind, pretrained=False, **settings)


def transformers_model(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    picture = {"image_size": 32, "patch_size": 16}
    swin = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
    makers: dict[str, Callable[[], nn.Module]] = {
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**small, **picture)),
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**small, **picture, use_swiglu_ffn=True)),
        "swin": lambda: transformers.SwinModel(transformers.SwinConfig(**swin)),
        # The next three have the two parts Intermediate and Output.
        "yolos": lambda: transformers.YolosModel(
            transformers.YolosConfig(**small, patch_size=16, image_size=[32, 32], num_detection_tokens=2)
        ),
        "swinv2": lambda: transformers.Swinv2Model(transformers.Swinv2Config(**swin)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**small, vocab_size=20)),
    }
    with seeded(0):
        return makers[name]()


def inputs_of(model: nn.Module) -> dict[str, torch.Tensor]:
    if hasattr(model, "config") and model.config.model_type == "bert":
        return {"input_ids": torch.arange(12).reshape(2, 6)}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 32, 32, generator=generator)
    return {"pixel_values": x} if hasattr(model, "config") else {"x": x}


def output(model: nn.Module) -> torch.Tensor:
    found = model(**inputs_of(model))
    return found if isinstance(found, torch.Tensor) else found.last_hidden_state


MODELS = [("timm", name) for name in TIMM]
MODELS += [("transformers", name) for name in ("vit", "dinov2", "swin", "yolos", "swinv2", "bert")]


def model_of(library: str, name: str) -> nn.Module:
    return timm_model(name) if library == "timm" else transformers_model(name)


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_models_train_with_experts_and_fold_to_what_they_were(library: str, name: str, tmp_path: object) -> None:
    dense = model_of(library, name)
    before = {n: v.clone() for n, v in dense.state_dict().items()}
    copies = ewa.convert(dense, 3, layers="all", init="copy", eval_mode="rup")
    torch.testing.assert_close(output(copies.eval()), output(dense.eval()), rtol=0, atol=2e-6)
    model = ewa.convert(dense, 3, layers="every2")
    replaced = {n.rpartition(".")[0] for n, v in model.state_dict().items() if v.shape != before[n].shape}
    assert replaced
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    ewa.attach(optimizer, model, share_rate=0.5, total_steps=2)
    for _ in range(2):
        output(model).square().mean().backward()
        optimizer.step()
    experts = [m for m in model.modules() if isinstance(m, ewa.ExpertLinear | ewa.ExpertNorm)]
    assert all(parameter.grad is not None for layer in experts for parameter in layer.parameters())
    assert all(sum(layer.assignment.sizes) > 0 for layer in experts)
    folded = ewa.fold(model)
    assert {n: v.shape for n, v in folded.state_dict().items()} == {n: v.shape for n, v in before.items()}
    assert [type(m) for m in folded.modules()] == [type(m) for m in dense.modules()]
    torch.testing.assert_close(output(folded.eval()), output(model.eval()), rtol=0, atol=1e-6)
    rt.save(model, tmp_path / "model.safetensors")
    assert torch.equal(output(rt.load(tmp_path / "model.safetensors", dense.eval())), output(model))
    assert all(torch.equal(v, before[n]) for n, v in dense.state_dict().items())


def test_layers_choose_by_rule_pattern_class_and_function() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", **{**SMALL, "depth": 6})

    def chosen(layers: object) -> list[str]:
        return [found.name for found in ewa.feed_forwards(vit, layers)]

    names = [f"blocks.{i}.mlp" for i in range(6)]
    assert (
        chosen("all") == chosen(Mlp) == chosen("blocks.*.mlp") == chosen(lambda name, _: name.endswith("mlp")) == names
    )
    assert chosen("every2") == names[1::2]
    assert chosen("every3") == names[2::3]
    assert chosen("last2") == names[-2:]
    assert chosen("blocks.[14].mlp") == ["blocks.1.mlp", "blocks.4.mlp"]


def test_a_gate_takes_its_tokens_twice_and_a_residual_in_the_second_part_stays_the_blocks() -> None:
    gated = ewa.feed_forwards(timm_model("swiglu with norm"))[0]
    assert [(name.rpartition(".")[2], role) for name, role in gated.members] == [
        ("fc1_g", "first"), ("fc1_x", "entry"), ("norm", "inner"), ("fc2", "exit"),
    ]  # fmt: skip
    pair = ewa.feed_forwards(transformers_model("bert"))[0]
    assert pair.parts == ("encoder.layer.0.intermediate", "encoder.layer.0.output")
    assert pair.members == (
        ("encoder.layer.0.intermediate.dense", "first"), ("encoder.layer.0.output.dense", "exit"),
    )  # fmt: skip


@pytest.mark.parametrize(("library", "name"), MODELS)
def test_independent_experts_are_drawn_as_the_library_draws(library: str, name: str) -> None:
    dense = model_of(library, name)
    model = ewa.convert(dense, 4, layers="all")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, ewa.ExpertLinear)}
    assert layers
    for layer_name, layer in layers.items():
        if name == "convnext" and layer.in_features > 8:
            # Its own draw is no method of the model: layers draw as torch does.
            continue
        spread = layer.weight.detach().flatten(1).std(1)
        ratio = (spread[1:] / spread[0]).tolist()
        assert all(0.6 < one < 1.6 for one in ratio) or name == "convnext", (layer_name, ratio)
        assert len({tuple(one.flatten().tolist()) for one in layer.weight.detach()}) == 4


def test_gradient_checkpointing_recomputes_the_same_partition() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = ewa.convert(timm_model("vit"), 3)
        model.set_grad_checkpointing(checkpointing)
        with seeded(0):
            output(model.train()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_mixed_precision_runs_and_a_skipped_step_is_no_step(fused: bool) -> None:
    model = ewa.convert(timm_model("vit"), 3).train()
    # A scaler does not call a plain optimizer, and tells a fused one, whose hooks then run, to skip the step itself.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
    handle = ewa.attach(optimizer, model, share_rate=0.5, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, poison in enumerate((False, True, False)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = output(model).float().square().mean()
        scaler.scale(loss * float("inf") if poison else loss).backward()
        before = ewa.stats(model)[0].spread
        scaler.step(optimizer)
        scaler.update()
        assert handle.steps == (1, 1, 2)[step]
        assert (ewa.stats(model)[0].spread == before) == poison


def test_moving_averages_see_the_averaged_weights_and_evaluate_folded() -> None:
    model = ewa.convert(timm_model("vit"), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weight = model.blocks[1].mlp.fc1.weight
    stepped: list[torch.Tensor] = []
    optimizer.register_step_post_hook(lambda *_: stepped.append(weight.detach().clone()))
    ewa.attach(optimizer, model, share_rate=0.4, schedule="constant", total_steps=3)
    ema = ModelEmaV3(model, decay=0.5)
    # As where a moving average is a hook of its own, after this one.
    optimizer.register_step_post_hook(lambda *_: ema.update(model))
    expected = weight.detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        output(model.train()).square().mean().backward()
        optimizer.step()
        averaged = 0.6 * stepped[-1] + 0.4 * stepped[-1].mean(0)
        assert float((averaged - stepped[-1]).abs().max()) > 1e-3
        expected = 0.5 * expected + 0.5 * averaged
        torch.testing.assert_close(ema.module.blocks[1].mlp.fc1.weight.detach(), expected, rtol=0, atol=1e-7)
    assert torch.equal(output(ewa.fold(ema.module)), output(ema.module))


def test_attaching_twice_is_attaching_once_and_state_goes_on_after_a_checkpoint() -> None:
    def begun() -> tuple[nn.Module, torch.optim.Optimizer, ewa.Averaging]:
        model = ewa.convert(timm_model("vit"), 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return model, optimizer, ewa.attach(optimizer, model, share_rate=0.4, total_steps=4)

    def spread(model: nn.Module) -> float:
        return max(ewa.stats(model)[0].spread)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        before = spread(model)
        output(model.train()).square().mean().backward()
        optimizer.step()
        return spread(model) / before

    model, optimizer, handle = begun()
    assert ewa.attach(optimizer, model, share_rate=0.4, total_steps=4) is handle
    assert step(model, optimizer) == pytest.approx(0.9, abs=1e-6)
    with pytest.raises(ValueError, match="averaged already, with other arguments"):
        ewa.attach(optimizer, model, share_rate=0.5, total_steps=4)
    assert handle.state_dict() == {"steps": 1}
    other, again, resumed = begun()
    resumed.load_state_dict(handle.state_dict())
    other.load_state_dict(model.state_dict())
    assert step(other, again) == pytest.approx(0.8, abs=1e-6)
    assert (resumed.steps, resumed.beta) == (2, pytest.approx(0.2))
    handle.detach()
    assert step(model, optimizer) == 1.0
    assert ewa.attach(optimizer, model, share_rate=0.5, total_steps=4) is not handle


def test_beyond_the_total_steps_the_rate_is_held_with_one_warning() -> None:
    model = ewa.convert(timm_model("vit"), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = ewa.attach(optimizer, model, share_rate=0.4, total_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        optimizer.step()
    with pytest.warns(UserWarning, match="more than the total of 2 steps; the share rate is held at 0.4"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert handle.beta == 0.4
    handle.detach()
    resumed = ewa.attach(optimizer, model, share_rate=0.4, total_steps=2)
    resumed.load_state_dict({"steps": 5})
    with pytest.warns(UserWarning, match="more than the total of 2 steps"):
        optimizer.step()


def test_a_second_optimizer_over_the_same_experts_is_refused_until_the_first_is_gone() -> None:
    model = ewa.convert(timm_model("vit"), 3)
    arguments = {"share_rate": 0.4, "total_steps": 2}
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    handle = ewa.attach(first, model, **arguments)
    with pytest.raises(ValueError, match="averaged already, after the steps of another optimizer"):
        ewa.attach(second, model, **arguments)
    handle.detach()
    ewa.attach(second, model, **arguments)
    # A copy's experts are others; an optimizer that is no more averages nothing.
    other = copy.deepcopy(model)
    kept = ewa.attach(torch.optim.SGD(other.parameters(), lr=0.1), other, **arguments)
    gc.collect()
    assert ewa.attach(torch.optim.SGD(other.parameters(), lr=0.1), other, **arguments) is not kept


@pytest.mark.parametrize("average_state", [False, True])
def test_moments_of_the_optimizer_are_averaged_on_request(average_state: bool) -> None:
    model = ewa.convert(timm_model("vit"), 3)
    optimizer = torch.optim.AdamW(model.parameters())
    ewa.attach(optimizer, model, share_rate=1.0, schedule="constant", total_steps=1, average_state=average_state)
    output(model.train()).square().mean().backward()
    optimizer.step()
    weight = model.blocks[1].mlp.fc1.weight
    for moment in ("exp_avg", "exp_avg_sq"):
        value = optimizer.state[weight][moment]
        apart = float((value - value.mean(0)).abs().max() / value.abs().max())
        assert (apart < 1e-6) == average_state


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", ["vit", "swiglu with norm"])
def test_a_routed_mixture_is_its_formula(name: str, top_k: int) -> None:
    dense = timm_model(name)
    network = ewa.feed_forwards(dense, "all")[1]
    routed = ewa.route(dense, 3, top_k=top_k)
    mine, plain = routed.get_submodule(network.name), dense.get_submodule(network.name)
    first = routed.get_submodule(network.members[0][0])
    nn.init.normal_(first.router.weight)
    for m in (mine, plain):
        for _, p in m.named_parameters():
            if p.ndim == 1:
                nn.init.normal_(p)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    probabilities = first.router(x).softmax(-1)
    gates, picked = probabilities.topk(top_k)
    expected = torch.zeros_like(x)
    for i in range(3):
        expert = copy.deepcopy(plain)
        for path, _ in network.members:
            layer, inside = routed.get_submodule(path), path.removeprefix(f"{network.name}.")
            for label, tensor in layer.experts():
                expert.get_parameter(f"{inside}.{label}").data.copy_(tensor[i])
        weight = (gates * (picked == i)).sum(-1, keepdim=True)
        expected = expected + weight * expert(x)
    for training in (False, True):
        torch.testing.assert_close(mine.train(training)(x), expected, rtol=1e-4, atol=1e-5)
    share = torch.bincount(picked.flatten(), minlength=3) / picked.numel()
    torch.testing.assert_close(ewa.balance_loss(mine), 3 * (share * probabilities.mean((0, 1))).sum())
    assert ewa.stats(routed)[0].tokens == tuple(torch.bincount(picked.flatten(), minlength=3).tolist())


def test_early_averaging_of_a_routed_mixture_stops_and_leaves_the_router_alone() -> None:
    model = ewa.route(timm_model("vit"), 3).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    handle = ewa.attach(optimizer, model, share_rate=0.4, total_steps=8, until=0.5)
    router = model.blocks[1].mlp.fc1.router.weight.clone()
    ratios, rates = [], []
    for _ in range(8):
        before = max(ewa.stats(model)[0].spread)
        (output(model).square().mean() + 0.01 * ewa.balance_loss(model)).backward()
        optimizer.step()
        ratios.append(max(ewa.stats(model)[0].spread) / before)
        rates.append(handle.beta)
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0, 0, 0, 0])
    assert ratios == pytest.approx([0.9, 0.8, 0.7, 0.6, 1, 1, 1, 1], abs=1e-5)
    assert torch.equal(model.blocks[1].mlp.fc1.router.weight, router)
    assert model.blocks[1].mlp.fc1.router.weight.grad.abs().sum() > 0
    copy.deepcopy(model)


@pytest.mark.slow
def test_digits_are_learned_with_experts_and_folding_keeps_the_ensemble() -> None:
    data = digits()

    def made() -> nn.Module:
        return VisionTransformer(
            img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depth=2, num_heads=4
        )

    found = {}
    for rate in (0.0, 0.3):
        with seeded(0):
            model = ewa.convert(made(), 4, init=made)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
        ewa.attach(optimizer, model, share_rate=rate, total_steps=400)
        fit(model, data.x, data.y, steps=400, optimizer=optimizer)
        folded = accuracy(ewa.fold(model), data.x_test, data.y_test)
        ewa.set_eval_mode(model, "ensemble")
        with torch.no_grad():
            apart = float((model(data.x_test) - ewa.fold(model)(data.x_test)).abs().max())
        found[rate] = folded, apart, max(ewa.stats(model)[0].spread)
    assert found[0.3][0] > 0.9
    assert found[0.3][1] < 1e-4
    assert found[0.0][1] > 1e-1
    assert found[0.3][2] < 0.1 < found[0.0][2]


CONV = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 1}, "num_experts is 1; a mixture needs at least 2 experts"),
        ({"num_experts": 10**9}, "num_experts is 1000000000; a mixture has at most 10000 experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"layers": "every0"}, "count from 1"),
        ({"layers": "blocks.9.mlp"}, "means no feed-forward network in the VisionTransformer; it holds .*Linear"),
        ({"layers": "blocks.0.attn"}, "'blocks.0.attn'"),
        ({"layers": "blocks.0.norm1"}, "'blocks.0.norm1' holds 0 nn.Linear"),
        ({"init": "same"}, "init is 'same'; it is 'independent', 'copy', or a function"),
        ({"init": lambda: CONV}, "other names or shapes"),
        ({"eval_mode": "mean"}, "eval_mode is 'mean'; it is one of 'folded', 'ensemble', 'rup'"),
        ({"few_tokens": "drop"}, "few_tokens is 'drop'; it is one of 'raise', 'fold'"),
        ({"grad_scale": "n"}, "grad_scale is 'n'; it is one of 'none', 'N'"),
    ],
)
def test_bad_arguments_of_convert_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ewa.convert(timm_model("vit"), **arguments)


def test_a_model_without_feed_forward_networks_is_refused_with_what_it_holds() -> None:
    with pytest.raises(ValueError, match=r"means no feed-forward network in the Sequential; it holds Conv2d \(1\)"):
        ewa.convert(CONV)
    with pytest.raises(TypeError, match=r"an nn.Module"):
        ewa.convert("vit")
    with pytest.raises(TypeError, match=r"num_experts is a whole number, not 2.5"):
        ewa.convert(timm_model("vit"), 2.5)
    with pytest.raises(TypeError, match="init\\(\\) came out as None"):
        ewa.convert(timm_model("vit"), init=lambda: None)


class Twice(nn.Module):
    """Calls its first layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(self.fc1(x)))


class Mixing(Twice):
    """Adds up all tokens."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.fc1(x) + x.mean(1, keepdim=True))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Mlp(4, 8, use_conv=True), "means no feed-forward network"),
        (GlobalResponseNormMlp(4, 8), "is a GlobalResponseNorm"),
        (Twice(), "does not call each of its layers once"),
        (Mixing(), "mixes tokens"),
        (nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)), "is a BatchNorm1d"),
        (nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 8)), "does not run on tokens"),
    ],
)
def test_networks_that_cannot_have_experts_are_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ewa.convert(nn.ModuleDict({"net": network}), layers="net" if "feed" not in message else "all")


def test_experts_are_not_put_into_experts() -> None:
    model = ewa.convert(timm_model("vit"), 3)
    with pytest.raises(ValueError, match=r"'blocks.1.mlp'|means no feed-forward network"):
        ewa.convert(model, layers="blocks.1.mlp")


@pytest.mark.parametrize("share_rate", [-0.1, 1.1, float("nan"), "much"])
def test_a_share_rate_outside_zero_to_one_is_refused(share_rate: object) -> None:
    model = ewa.convert(timm_model("vit"), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"share_rate is .*; it lies between 0 and 1"):
        ewa.attach(optimizer, model, share_rate=share_rate, total_steps=2)
    with pytest.raises(ValueError, match=r"share_rate is .*; it lies between 0 and 1"):
        ewa.average_(model, share_rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "step"}, "schedule is 'step'; it is one of 'linear', 'constant', 'cosine'"),
        ({"form": "all"}, "form is 'all'; it is one of 'mean', 'others'"),
        ({"form": "others", "share_rate": 0.7}, "at most 0.6667 can be taken by 3 experts"),
        ({"total_steps": 0}, "total_steps is 0; it is a whole number from 1"),
        ({"total_steps": 2.5}, "total_steps is 2.5"),
        ({"until": 0.0}, "until is 0.0; it lies above 0 and up to 1"),
        ({"until": 1.5}, "until is 1.5"),
        ({"until": "x"}, "until is 'x'; it lies above 0 and up to 1"),
        ({"until": 0.1, "total_steps": 5}, "until is 0.1, which of 5 steps is not one"),
    ],
)
def test_bad_arguments_of_attach_are_named(arguments: dict[str, object], message: str) -> None:
    model = ewa.convert(timm_model("vit"), 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        ewa.attach(optimizer, model, **{"share_rate": 0.3, "total_steps": 2, **arguments})


def test_what_has_no_experts_or_another_optimizer_is_refused() -> None:
    dense = timm_model("vit")
    model = ewa.convert(dense, 3)
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"has no experts; ewa.convert leaves .* use the model that it returns"):
        ewa.attach(optimizer, dense, share_rate=0.3, total_steps=2)
    with pytest.raises(ValueError, match=r"the optimizer does not train 'blocks.1.mlp.fc1'"):
        ewa.attach(optimizer, model, share_rate=0.3, total_steps=2)
    with pytest.raises(TypeError, match=r"optimizer of torch"):
        ewa.attach(None, model, share_rate=0.3, total_steps=2)
    for call in (ewa.fold, ewa.stats, lambda m: ewa.average_(m, 0.1), lambda m: ewa.set_eval_mode(m, "folded")):
        with pytest.raises(ValueError, match="has no experts"):
            call(dense)
    with pytest.raises(ValueError, match="eval_mode is 'mean'"):
        ewa.set_eval_mode(model, "mean")
    handle = ewa.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, share_rate=0.3, total_steps=2)
    for state in ({}, {"steps": -1}, {"steps": "one"}, None):
        with pytest.raises(ValueError, match="is no state of an average"):
            handle.load_state_dict(state)


def test_a_routed_mixture_cannot_be_folded_and_top_k_is_bounded() -> None:
    routed = ewa.route(timm_model("vit"), 3)
    with pytest.raises(ValueError, match=r"'blocks.1.mlp.fc1' belongs to a routed mixture, which has no plain"):
        ewa.fold(routed)
    assert isinstance(rt.fold(routed).blocks[1].mlp.fc1, ewa.ExpertLinear)
    with pytest.raises(ValueError, match="all experts of the VisionTransformer are routed; a router has no mode"):
        ewa.set_eval_mode(routed, "ensemble")
    with pytest.raises(ValueError, match="a router has nothing to draw"):
        ewa.use_generator(routed, 3)
    for top_k in (0, -1, 4):
        with pytest.raises(ValueError, match=f"top_k is {top_k}; of 3 experts 1 to 3 can be chosen"):
            ewa.route(timm_model("vit"), 3, top_k=top_k)
    with pytest.raises(ValueError, match="no routed mixture has run"):
        ewa.balance_loss(routed)


def test_a_damaged_file_names_the_experts_that_cannot_be_made(tmp_path: object) -> None:
    model = ewa.convert(timm_model("vit"), 3)
    path = tmp_path / "model.safetensors"
    rt.save(model, path)
    tensors = load_file(path)
    for wrong in ({"role": "last"}, {"num_experts": 1}, {"eval_mode": "x"}):
        header = read_header(path)
        (entry,) = (entry for entry in header["replacements"] if entry["name"] == "blocks.1.mlp.fc1")
        entry["config"] |= wrong
        save_file(tensors, tmp_path / "damaged.safetensors", {KEY: json.dumps(header)})
        with pytest.raises(rt.RetensorError, match="describes a ExpertLinear that cannot be made"):
            rt.load(tmp_path / "damaged.safetensors", timm_model("vit"))
        # None is written that could not be read.
        layer = copy.deepcopy(model.blocks[1].mlp.fc1)
        layer.config = lambda entry=entry: entry["config"]
        with pytest.raises(rt.RetensorError, match="ExpertLinear cannot be made again of its config"):
            rt.save(layer, path.with_name("none.safetensors"))
