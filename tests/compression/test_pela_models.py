"""PELA on models of timm, transformers and torch as they come, and on checkpoints of theirs; nothing is downloaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from timm.models.mlp_mixer import MlpMixer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import retensor as rt
from retensor.compression import pela
from retensor.errors import RetensorError

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 60,
}  # fmt: skip
PICTURES = {**SMALL, "image_size": 32, "patch_size": 8}
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 60,
    "decoder_start_token_id": 0,
}  # fmt: skip
IDS = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)}
GPT2 = {
    "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def of_timm(name: str, **options: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (
        MlpMixer(img_size=32, patch_size=8, embed_dim=64, num_blocks=2, num_classes=10)
        if name == "mixer"
        else timm.create_model(name, pretrained=False, **options),
        torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32),
    )


def vit(**options: Any) -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10, **options}


def of_tf(cls: Any, config: Any, inputs: Any) -> Callable[[], tuple[nn.Module, Any]]:
    return lambda: (cls(config), inputs)


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, Any]], int]] = {
    "deit": (of_timm("deit_tiny_patch16_224", **vit()), 2),
    "deit distilled": (of_timm("deit_tiny_distilled_patch16_224", **vit()), 2),
    "deit3": (of_timm("deit3_small_patch16_224", **vit()), 2),
    "beit": (of_timm("beit_base_patch16_224", **vit()), 2),
    "swin": (
        of_timm("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2),
                num_heads=(2, 4)), 4,
    ),
    "swin v2": (
        of_timm("swinv2_tiny_window8_256", img_size=32, patch_size=2, window_size=4, embed_dim=32, depths=(2, 2),
                num_heads=(2, 4)), 4,
    ),
    "mixer": (
        of_timm("mixer"), 2,
    ),
    "convnext": (of_timm("convnext_tiny", depths=(1, 1, 2, 1), dims=(16, 32, 64, 64)), 5),
    "bert": (of_tf(tf.BertModel, tf.BertConfig(**SMALL), IDS), 2),
    "gpt2": (of_tf(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2), IDS), 2),
    "llama": (of_tf(tf.LlamaForCausalLM, tf.LlamaConfig(**SMALL), IDS), 2),
    "t5": (
        of_tf(tf.T5ForConditionalGeneration, tf.T5Config(**T5), {**IDS, "decoder_input_ids": IDS["input_ids"]}), 4,
    ),
    "vit of transformers": (of_tf(tf.ViTModel, tf.ViTConfig(**PICTURES), IMAGES), 2),
    "clip's pictures": (of_tf(tf.CLIPVisionModel, tf.CLIPVisionConfig(**PICTURES), IMAGES), 2),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model, x = MODELS[name][0]()
    with torch.no_grad():
        # Some start with gains of nothing, so that no layer would matter.
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval(), x


def run(model: nn.Module, x: Any) -> torch.Tensor:
    out = model(**x) if isinstance(x, dict) else model(x)
    return (out if isinstance(out, torch.Tensor) else out[0]).detach()


@pytest.mark.parametrize("name", MODELS)
def test_models_of_both_libraries_go_through_as_they_come(name: str) -> None:
    model, x = made(name)
    before, expected = copy.deepcopy(model.state_dict()), run(model, x)
    full = pela.compress(model, planned(model, full=True))
    assert torch.linalg.norm(run(full, x) - expected) <= 1e-5 * torch.linalg.norm(expected)
    found = planned(model)
    student = pela.compress(model, found)
    assert sum(parameter.numel() for parameter in student.parameters()) == found.after < found.before
    plain = pela.merge(student)
    assert str(plain) == str(model)
    apart = torch.linalg.norm(run(plain, x) - run(student, x)) / torch.linalg.norm(run(student, x))
    assert apart < 1e-5
    names = pela.blocks(student)
    assert len(names) == MODELS[name][1]
    total, parts = pela.PELALoss(model, student, beta=1.0)(x)
    total.backward()
    assert all(float(parts[part]) > 0 for part in ("fd", "wp", "logit"))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert str(model) == str(made(name)[0])


def planned(model: nn.Module, full: bool = False) -> pela.Plan:
    """Half the weights, or all layers of full rank. Of these models Swin v2 has a layer of two inputs."""
    found = pela.plan(model, 2.0, on_tiny="skip")
    if not full:
        return found
    return pela.plan(
        model, on_tiny="skip", ranks={la.name: min(la.in_features, la.out_features) for la in found.layers}
    )


@pytest.mark.parametrize("name", ["deit", "swin", "bert", "gpt2"])
def test_students_are_exported_copied_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    student = pela.compress(model, 2.0).eval()
    expected = run(student, x)
    rt.save(student, tmp_path / "s.safetensors")
    base = made(name)[0]
    state = student.state_dict()
    for same in (
        copy.deepcopy(student),
        rt.load(tmp_path / "s.safetensors", base),
        pela.load(tmp_path / "s.safetensors", base),
        pela.load(state, base),
    ):
        assert torch.equal(run(same, x), expected)
        assert list(same.state_dict()) == list(state)
    if name != "gpt2":
        # The caches of a decoder keep it from being exported as it is.
        program = torch.export.export(student, () if isinstance(x, dict) else (x,), x if isinstance(x, dict) else None)
        assert torch.allclose(run(program.module(), x), expected, atol=1e-5)


def test_blocks_are_what_timm_calls_intermediates() -> None:
    model, x = made("deit")
    student = pela.compress(model, 2.0)
    found = pela.PELALoss(model, student, gamma=0)(x)[1]["fd"]
    theirs = [
        [
            # timm takes the class token off.
            torch.cat([prefix, patches], dim=1)
            for patches, prefix in m.forward_intermediates(
                x, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
            )
        ]
        for m in (student, model)
    ]
    assert [tuple(tokens.shape) for tokens in theirs[0]] == [(2, 17, 64)] * len(pela.blocks(student))
    expected = sum(((s - t) ** 2).mean() for s, t in zip(*theirs, strict=True)) / len(theirs[0])
    assert torch.allclose(found, expected.detach(), rtol=1e-5, atol=0)
    assert pela.blocks(pela.compress(made("swin")[0], 2.0)) == [
        f"layers.{i}.blocks.{j}" for i in (0, 1) for j in (0, 1)
    ]


def test_the_linear_layer_of_gpt2_keeps_its_layout() -> None:
    model, _ = made("gpt2")
    student = pela.compress(model, 2.0)
    layer = student.transformer.h[0].mlp.c_fc
    original = model.transformer.h[0].mlp.c_fc
    assert isinstance(layer, pela.LowRankLinear)
    assert layer.weight.shape == original.weight.shape == (64, 256)
    assert type(pela.merge(student).transformer.h[0].mlp.c_fc) is type(original)
    s = torch.linalg.svdvals(original.weight.detach().double())
    error = float(((layer.weight - original.weight).detach().double() ** 2).sum())
    assert error == pytest.approx(float((s[layer.rank :] ** 2).sum()), rel=1e-5)
    assert pela.weight_loss([(layer, original.weight.T)], 0.0).item() == pytest.approx(
        pela.deviations(model, student)["transformer.h.0.mlp.c_fc"] ** 2, rel=1e-5
    )


def test_a_tied_classifier_is_refused_by_both_names_and_stays_tied_when_omitted() -> None:
    model = tf.BertForMaskedLM(tf.BertConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match=r"'bert.embeddings.word_embeddings.weight' and 'cls.predictions.decoder.weig"):
        pela.plan(model)
    student = pela.compress(model, pela.plan(model, 2.0, ("decoder",)))
    assert student.cls.predictions.decoder.weight is student.bert.embeddings.word_embeddings.weight
    gpt2 = pela.compress(made("gpt2")[0], 2.0)
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight


def test_torchs_encoder_goes_the_plain_way_in_eval() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 32)
    found = pela.plan(model, 2.0, ("out_proj",))
    student = pela.compress(model, found)
    with torch.no_grad():
        fast = student(x)
        student.train()
        for module in student.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for layer in student.layers:
            layer.self_attn.dropout = 0.0
        assert torch.allclose(fast, student(x), atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_what_save_pretrained_writes_is_loaded(name: str, tmp_path: Path) -> None:
    model, x = made(name)
    student = pela.compress(model, 3.0)
    student.save_pretrained(tmp_path)
    again = pela.load(tmp_path, base=made(name)[0])
    assert torch.equal(run(again, x), run(student, x))
    if name == "gpt2":
        assert again.lm_head.weight is again.transformer.wte.weight


def test_each_layer_is_decomposed_once_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    from retensor.compression.pela import layer

    shapes: list[tuple[int, ...]] = []

    def counting(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(tuple(weight.shape))
        return pela.balanced_factors(weight, rank)

    monkeypatch.setattr(layer, "balanced_factors", counting)
    model, _ = made("deit")
    pela.compress(model, 2.0)
    assert shapes == [(192, 64), (64, 64), (256, 64), (64, 256)] * 2
    pela.skeleton(model, 2.0)
    pela.compress(model, 2.0, init="random")
    assert len(shapes) == 8


@pytest.mark.parametrize("ratio", [2.0, 3.0])
def test_the_file_shrinks_by_the_ratio_of_parameters(ratio: float, tmp_path: Path) -> None:
    model = timm.create_model("deit_tiny_patch16_224", pretrained=False)
    found = pela.plan(model, ratio)
    for part, name in ((model, "before"), (pela.compress(model, found), "after")):
        rt.save(part, tmp_path / name)
    sizes = [(tmp_path / name).stat().st_size for name in ("before", "after")]
    assert sizes[1] / sizes[0] == pytest.approx(found.after / found.before, rel=0.01)


def test_multiply_accumulates_fall_as_the_weights_do() -> None:
    model, _ = made("deit")
    found = pela.plan(model, 3.0)
    both = rt.compare(model, pela.compress(model, found), inputs=(1, 3, 32, 32), names=["before", "after"])
    saved = sum(layer.before - layer.after for layer in found.layers) * 17
    assert both["before"].macs - both["after"].macs == saved
    assert both["after"].parameters == found.after


def test_lora_of_peft_finds_the_factors() -> None:
    peft = pytest.importorskip("peft")
    model, x = made("bert")
    student = pela.compress(model, 2.0)
    expected = run(student, x)
    tuned = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules="all-linear"))
    names = [name for name, module in tuned.named_modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(names) == 2 * len(pela.plan(model).layers)
    assert torch.equal(run(tuned.eval(), x), expected)
    vision, x = made("deit")
    student = pela.compress(vision, 2.0)
    expected = run(student, x)
    tuned = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules=["qkv.0", "qkv.1"]))
    assert sum(isinstance(m, peft.tuners.lora.Linear) for m in tuned.modules()) == 4
    assert torch.equal(run(tuned.eval(), x), expected)
    tuned.merge_and_unload()


def test_a_skeleton_that_is_not_filled_cannot_be_used() -> None:
    model, x = made("deit")
    empty = pela.skeleton(model, 2.0)
    assert run(empty, x).isnan().all()
    state = pela.compress(model, 2.0).state_dict()
    del state["blocks.1.mlp.fc1.0.weight"]
    empty.load_state_dict(state, strict=False)
    assert run(empty, x).isnan().all()


def cut(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: cut(s, "blocks.1.mlp.fc1.1.bias"), r"lacks 'blocks.1.mlp.fc1.1.bias'"),
        (lambda s: cut(s, "blocks.1.mlp.fc1.0.weight"), r"holds 'blocks.1.mlp.fc1.1.(weight|bias)', which the model"),
        (lambda s: cut(s, "pos_embed"), "lacks 'pos_embed'"),
        (lambda s: s | {"more": torch.zeros(1)}, "holds 'more', which the model lacks"),
        (lambda s: s | {"norm.bias": torch.zeros(64, dtype=torch.int64)}, "'norm.bias' is of type torch.int64 in"),
        (
            lambda s: s | {"pos_embed": torch.zeros(1, 2, 3)},
            r"'pos_embed' has shape \[1, 2, 3\] in .* and \[1, 17, 64\]",
        ),
        (
            lambda s: s | {"blocks.0.mlp.fc1.0.weight": torch.zeros(3, 64)},
            r"'blocks.0.mlp.fc1.0.weight' and 'blocks.0.mlp.fc1.1.weight' of .* have shapes \[3, 64\] and \[256, 25\]",
        ),
        (lambda s: {"a": torch.zeros(1)}, "has no layer of low rank that the base has"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change: Callable[..., Any], said: str, tmp_path: Path) -> None:
    model, _ = made("deit")
    state = change(pela.compress(model, 2.0).state_dict())
    with pytest.raises(RetensorError, match=said):
        pela.load(state, model)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    with pytest.raises(RetensorError, match=said):
        pela.load(tmp_path, model)


def test_a_base_is_checked_before_it_is_filled() -> None:
    model, _ = made("deit")
    state = pela.compress(model, 2.0).state_dict()
    with pytest.raises(RetensorError, match="of the model lies on the meta device, where values cannot be loaded"):
        pela.load(state, copy.deepcopy(model).to("meta"))
    with pytest.raises(RetensorError, match=r"'norm.bias' of 'the checkpoint' is 3; a state dict holds tensors alone"):
        pela.load(state | {"norm.bias": 3}, model)  # type: ignore[dict-item]
    tied = copy.deepcopy(model)
    tied.blocks[1].attn.qkv.weight = tied.blocks[0].attn.qkv.weight
    with pytest.raises(RetensorError, match=r"'the checkpoint' does not fit the base: .* are one tensor"):
        pela.load(cut(state, "blocks.1.attn.qkv.0.weight"), tied)
    with torch.no_grad():
        # What is not a number in the base does not matter: all values come from the checkpoint.
        for parameter in tied.parameters():
            parameter.fill_(float("nan"))
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert all(torch.equal(value, state[name]) for name, value in pela.load(state, model).state_dict().items())


@pytest.mark.parametrize("name", ["t5", "beit", "swin v2"])
def test_parents_that_read_a_weight_save_operations_too(name: str) -> None:
    model, x = made(name)
    student = pela.compress(model, planned(model))
    flops = []
    for part in (model, student):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run(part, x)
        flops.append(counter.get_total_flops())
    # Half of the layers' operations go; those of the attention stay.
    assert flops[1] < 0.56 * flops[0]


def test_the_distance_of_weights_follows_a_teacher_whose_tensors_are_exchanged() -> None:
    model, x = made("gpt2")
    student = pela.compress(model, 2.0)
    loss = pela.PELALoss(model, student, alpha=0)
    before = loss(x)[1]["wp"]
    for assign in (False, True):
        model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=assign)
        after = loss(x)[1]["wp"]
        assert torch.equal(after, pela.PELALoss(model, student, alpha=0)(x)[1]["wp"])
        assert after > before
        before = after


def test_sources_that_are_none_are_told(tmp_path: Path) -> None:
    model, _ = made("deit")
    with pytest.raises(RetensorError, match=r"model.safetensors' is not there; give the path of a safetensors file"):
        pela.load(tmp_path, model)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(RetensorError, match="is not there; save the model in one file"):
        pela.load(tmp_path, model)
    (tmp_path / "c.pth").write_bytes(b"PK")
    with pytest.raises(RetensorError, match=r"is no whole safetensors file: .*; give a state dict for files of other"):
        pela.load(tmp_path / "c.pth", model)
    (tmp_path / "l").symlink_to(tmp_path / "l")
    with pytest.raises(RetensorError, match="give the path of a checkpoint"):
        pela.load(tmp_path / "l", model)
    with pytest.raises(TypeError, match="a checkpoint is a path or a state dict, not 3"):
        pela.load(3, model)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the base of a checkpoint is an nn.Module, not None"):
        pela.load(tmp_path, None)  # type: ignore[arg-type]
    rt.save(pela.compress(model, 2.0), tmp_path / "s")
    assert "blocks.0.attn.qkv.0.weight" in load_file(tmp_path / "s")
