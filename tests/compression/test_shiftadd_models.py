"""Whole models of timm: converted, trained, packed, kept in files and exported; nothing is downloaded."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import retensor as rt
from retensor.compression import shiftadd
from retensor.compression.shiftadd.shift import ShiftLinear
from retensor.compression.shiftadd.sources import READERS
from retensor.data import accuracy, digits, fit
from retensor.data.reference import digits_vit
from retensor.errors import RetensorError

HASHING = {"bits": 8, "anchors": 6, "samples": 60, "similar": 5}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 10}
MODELS: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "deit": ("deit_tiny_patch16_224", VIT, 2, 8),
    "deit distilled": ("deit_tiny_distilled_patch16_224", VIT, 2, 8),
    "pvt v2": ("pvt_v2_b0", {"embed_dims": (8, 16, 20, 16), "num_classes": 10}, 8, 32),
    "pvt v2 linear": (
        "pvt_v2_b2_li",
        {"embed_dims": (8, 16, 20, 16), "depths": (1, 1, 1, 1), "num_classes": 10},
        4,
        16,
    ),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    architecture, options, _, _ = MODELS[name]
    return timm.create_model(architecture, pretrained=False, **options).eval(), torch.randn(2, 3, 32, 32)


def converted(name: str, attention: Any, linears: Any, **more: Any) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    model, x = made(name)
    hashed = {"hashing": HASHING, "calibration": torch.randn(16, 3, 64, 64)} if attention == "ksh" else {}
    if attention == "ksh" and "deit" in name:
        hashed["calibration"] = torch.randn(16, 3, 32, 32)
    return model, shiftadd.convert(model, attention, linears, **hashed, **more), x


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("attention", "linears"), [("linear_add", "moe"), ("binary_softmax", "shift"), ("linear_add", None), (None, "moe")]
)
def test_models_are_converted_trained_packed_and_kept(name: str, attention: Any, linears: Any, tmp_path: Path) -> None:
    model, mine, x = converted(name, attention, linears)
    before = copy.deepcopy(model.state_dict())
    _, _, attentions, layers = MODELS[name]
    assert sum(isinstance(m, shiftadd.AddAttention) for m in mine.modules()) == (attentions if attention else 0)
    # Queries, keys and values of a pyramid are one layer once its attention is converted.
    split = attentions if attention is None and "pvt" in name else 0
    kind = shiftadd.MoELinear if linears == "moe" else ShiftLinear
    assert sum(isinstance(m, kind) for m in mine.modules()) == (layers + split if linears else 0)
    mine.train()
    loss = functional.cross_entropy(mine(x), torch.tensor([1, 2]))
    if linears == "moe":
        loss = loss + 0.01 * shiftadd.ll_loss(mine)
    loss.backward()
    missing = [n for n, p in mine.named_parameters() if p.grad is None and "head" not in n]
    assert not missing
    mine.zero_grad()
    mine.eval()
    expected = mine(x).detach()
    for same in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(same(x), expected)
    rt.save(mine, tmp_path / "mine.safetensors")
    again = rt.load(tmp_path / "mine.safetensors", made(name)[0])
    assert torch.equal(again(x), expected)
    frozen = shiftadd.freeze(mine)
    out = frozen(x)
    rt.save(frozen, tmp_path / "frozen.safetensors")
    kept = rt.load(tmp_path / "frozen.safetensors", made(name)[0])
    assert torch.equal(kept(x), out)
    if linears == "moe":
        shares = [m.router_report().shares for m in (mine, again, frozen, kept)]
        assert max(s[0] for s in shares) - min(s[0] for s in shares) < 0.05
    file = (tmp_path / "frozen.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert len(file) == header + shiftadd.packed_size(mine) == header + shiftadd.packed_size(frozen)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(RetensorError, match="eval mode only"):
        frozen.train()(x)


def test_a_packed_model_is_near_the_float_one_where_no_code_flips() -> None:
    _, mine, x = converted("deit", None, "shift")
    assert torch.allclose(shiftadd.freeze(mine)(x), mine(x), atol=5e-3)


def test_hashed_models_are_trained_packed_and_kept(tmp_path: Path) -> None:
    _, mine, x = converted("deit", "ksh", "shift")
    mine.train()(x).sum().backward()
    out = shiftadd.freeze(mine)(x)
    rt.save(mine, tmp_path / "mine.safetensors")
    again = rt.load(tmp_path / "mine.safetensors", made("deit")[0])
    assert torch.equal(shiftadd.freeze(again)(x), out)


@pytest.mark.parametrize("name", ["deit", "pvt v2"])
def test_models_are_exported_before_and_after_packing(name: str) -> None:
    _, mine, x = converted(name, "linear_add", "moe")
    mine.eval()
    for model in (mine, shiftadd.freeze(mine)):
        program = torch.export.export(model, (x,))
        assert torch.allclose(program.module()(x), model(x), atol=1e-4)


def test_altered_and_cut_files_are_refused(tmp_path: Path) -> None:
    _, mine, _ = converted("deit", "linear_add", "shift")
    path = tmp_path / "frozen.safetensors"
    rt.save(shiftadd.freeze(mine), path)
    whole = path.read_bytes()
    for content in (whole[:-7], whole.replace(b"PackedShiftLinear", b"PackedShiftLinexr")):
        path.write_bytes(content)
        with pytest.raises(RetensorError):
            rt.load(path, made("deit")[0])


def test_spatial_reduction_goes_and_pictures_of_any_size_run() -> None:
    model, mine, _ = converted("pvt v2", "linear_add", None)
    assert any(name.endswith(".sr") for name, _ in model.named_modules())
    assert not any(name.endswith((".sr", ".pool")) for name, _ in mine.named_modules())
    assert mine.eval()(torch.randn(1, 3, 64, 96)).shape == (1, 10)


def test_the_three_steps_of_the_recipe_keep_what_was_trained() -> None:
    model, x = made("deit")
    second = shiftadd.convert(model, linears=None)
    third = shiftadd.convert(second, attention=None, linears="moe")
    at_once = shiftadd.convert(model)
    assert torch.equal(third.eval()(x), at_once.eval()(x))
    # What is a mixture already stays one, and its experts are not converted again.
    with pytest.raises(ValueError, match="means no nn\\.Linear"):
        shiftadd.convert(third, attention=None, linears="shift")


def test_patterns_choose_layers_and_attentions() -> None:
    model, _ = made("deit")
    mine = shiftadd.convert(model, linears="shift", include="**.mlp.*", exclude=("blocks.0.**",))
    names = [name for name, m in mine.named_modules() if isinstance(m, ShiftLinear)]
    assert names == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert [name for name, m in mine.named_modules() if isinstance(m, shiftadd.AddAttention)] == ["blocks.1.attn"]


def test_other_classes_of_attention_are_named_or_told_of() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 24), nn.Linear(8, 8)

    with pytest.raises(ValueError, match=r"no attention .* timm.*register_attention"):
        shiftadd.convert(nn.Sequential(Mine()))
    try:
        shiftadd.register_attention(Mine, lambda m: shiftadd.Source(heads=2, head_dim=4, qkv=m.inner, proj=m.outer))
        assert shiftadd.convert(nn.Sequential(Mine()))(torch.zeros(1, 3, 8)).shape == (1, 3, 8)
    finally:
        READERS.popitem()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention": "soft"}, "attention is 'soft'"),
        ({"linears": "add"}, "linears is 'add'"),
        ({"attention": None, "linears": None}, "nothing to convert"),
        ({"weight_bits": 1}, "weight_bits is 1"),
        ({"gate": "hard"}, "gate"),
        ({"threshold": "median"}, "threshold"),
        ({"include": "**.nowhere"}, "means no nn.Linear"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        shiftadd.convert(made("deit")[0], **settings)


def test_freezing_nothing_or_twice_is_refused() -> None:
    model, mine, _ = converted("deit", "linear_add", "shift")
    for given in (model, shiftadd.freeze(mine)):
        with pytest.raises(ValueError, match="not frozen"):
            shiftadd.freeze(given)


def test_latencies_are_measured_of_every_mixture() -> None:
    _, mine, x = converted("deit", "linear_add", "moe")
    found = shiftadd.measure_latency(mine, x, rounds=2)
    assert len(found.seconds) == 8
    assert sum(found.alpha) == pytest.approx(1)
    assert min(found.alpha) > 0
    mine.train()(x)
    assert torch.isfinite(shiftadd.ll_loss(mine, found.alpha))


def test_the_report_is_a_table() -> None:
    _, mine, x = converted("deit", "linear_add", "moe")
    report = mine.router_report(x)
    assert len(report) == 8
    assert all(sum(row.tokens) == 2 * 17 for row in report)
    assert "blocks.1.mlp.fc2" in str(report)
    assert str(report).splitlines()[-1].startswith("all")


def test_a_trained_model_of_digits_survives_short_training() -> None:
    data = digits()
    torch.manual_seed(0)
    model = digits_vit(depth=1)
    fit(model, data.x, data.y, steps=300, lr=5e-3)
    full = accuracy(model.eval(), data.x_test, data.y_test)
    mine = shiftadd.convert(model, seed=0)
    before = accuracy(mine, data.x_test, data.y_test)
    fit(
        mine, data.x, data.y, steps=100, lr=5e-3, seed=0,
        loss=lambda m, x, y: functional.cross_entropy(m(x), y) + 0.01 * shiftadd.ll_loss(m),
    )  # fmt: skip
    trained = accuracy(mine, data.x_test, data.y_test)
    frozen = accuracy(shiftadd.freeze(mine), data.x_test, data.y_test)
    assert trained > max(before + 0.1, full - 0.06)
    # A batch's means move a code or two.
    assert abs(frozen - trained) <= 0.01
