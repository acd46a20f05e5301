"""Models put in few bits: what is reported, kept and refused, on networks of torch, timm and transformers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import retensor as rt
from retensor.compression import flexround
from retensor.data import accuracy, reference
from retensor.data.reference import DigitsCNN
from retensor.quantizing import ActivationQuantizer, Affine, QuantizedLayer, Storage, to_onnx
from retensor.replacing import fold_norms

METHODS = ("flexround", "lrq", "adaquant", "adaround", "rtn")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.b(torch.relu(self.a(x)))


def made(width: int = 12, blocks: int = 2) -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 4))
        # Inputs that hang together, as real ones do.
        return net.eval(), torch.randn(120, 3) @ torch.randn(3, 5)


def codes(model: nn.Module) -> torch.Tensor:
    return torch.cat([module.packed for module in model.modules() if isinstance(module, QuantizedLayer)])


def packed(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


@pytest.mark.parametrize("where", [{}, {"axis": 0}])
@pytest.mark.parametrize("given", [{"steps": 0}, {"steps": 1, "lr": 0.0}])
def test_without_steps_every_method_rounds_to_nearest(given: dict[str, Any], where: dict[str, int]) -> None:
    net, x = made()
    for method in METHODS:
        few = flexround.quantize(net, x, weight=Affine(4, **where), method=method, **given)  # type: ignore[arg-type]
        for name, layer in packed(few.model).items():
            weight = net.get_submodule(name).weight.detach()
            assert torch.equal(layer.kept().codes, Affine(4, **where).encode(weight).codes), method


@pytest.mark.parametrize("method", METHODS[:4])
@pytest.mark.parametrize("where", [{}, {"axis": 0}])
def test_fitting_lowers_the_errors_that_rounding_leaves(method: Any, where: dict[str, int]) -> None:
    net, x = made()
    before = copy.deepcopy(net.state_dict())
    rate = {"adaquant": 1e-2, "adaround": 3e-2}.get(method, 1e-2)
    plain, few = (
        flexround.quantize(net, x, weight=Affine(3, **where), method=name, steps=150, lr=rate, regularisation=1e-4)
        for name in ("rtn", method)
    )
    with torch.no_grad():
        apart = [float((done.model(x) - net(x)).square().mean()) for done in (plain, few)]
    assert apart[1] < 0.7 * apart[0]
    assert [unit.name for unit in few.report] == ["0", "1", "2", "3"]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for unit in few.report:
        assert list(unit.found["layers"]) == list(unit.layers)
        # Judged by its codes from the beginning on, no method ends worse than on the samples held out it began.
        assert unit.after < 1.1 * unit.before
        if method == "adaround":
            assert all(layer["far"] == 0 and layer["grown"] == 1 for layer in unit.found["layers"].values())


def test_what_is_learned_has_the_sizes_that_are_said() -> None:
    net, x = made()
    shapes = [(24, 12), (12, 24)]
    for method, expected in (
        ("flexround", sum(o * i + o + 1 for o, i in shapes)),
        ("lrq", sum(2 * (o + i) + o + i + 1 for o, i in shapes)),
        ("adaquant", sum(o * i + 1 for o, i in shapes)),
        ("adaround", sum(o * i for o, i in shapes)),
        ("rtn", 0),
    ):
        few = flexround.quantize(net, x, method=method, steps=1, rank=2)  # type: ignore[arg-type]
        assert few.report[1].found["learned"] == expected, method
    conv = flexround.quantize(DigitsCNN(8, norm=False), torch.rand(8, 1, 8, 8), steps=1, blocks=["block"])
    assert conv.report[1].found["learned"] == 2 * 16 * 8 * 9 + (8 + 16) + (16 + 8) + 2


def test_parts_of_what_is_learned_can_be_left_out() -> None:
    net, x = made()
    settings: dict[str, Any] = {"steps": 20, "lr": 1e-2, "weight": Affine(3)}
    whole = flexround.quantize(net, x, **settings).report[1].found
    fixed = flexround.quantize(net, x, learn_step=False, **settings).report[1].found
    alone = flexround.quantize(net, x, rows=False, columns=False, **settings).report[1].found
    assert all(layer["grown"] != 1 for layer in whole["layers"].values())
    assert all(layer["grown"] == 1 for layer in fixed["layers"].values())
    assert whole["learned"] - fixed["learned"] == 2
    assert whole["learned"] - alone["learned"] == 24 + 12


def test_four_bits_take_an_eighth_of_the_bytes_and_come_back_from_a_file(tmp_path: Path) -> None:
    net, x = made(64, 3)
    few = flexround.quantize(net, x, weight=Affine(4, axis=0), steps=3, blocks=["1", "2", "3"])
    weights = {name: net.get_submodule(name).weight for name in packed(few.model)}
    assert few.nbytes == sum(
        -(-weight.numel() // 2) + 4 * len(weight) + -(-len(weight) // 2) for weight in weights.values()
    )
    tensor = flexround.quantize(net, x, weight=Affine(4), steps=0)
    assert tensor.nbytes <= 0.135 * 4 * sum(weight.numel() for weight in weights.values())
    path = tmp_path / "few.safetensors"
    few.save(path)
    again = rt.load(path, net)
    assert torch.equal(again(x), few.model(x))
    assert torch.equal(codes(again), codes(few.model))
    plain = few.to_fake_quant()
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), again(x), rtol=0, atol=1e-6)
    assert torch.equal(copy.deepcopy(few.model)(x), few.model(x))


def test_a_model_in_few_bits_exports_and_runs_in_onnx_runtime(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    net, x = made()
    few = flexround.quantize(net, x, weight=Affine(4, axis=0), act=ActivationQuantizer(8), steps=5)
    exported = few.export(x[:7]).module()(x[:7])
    torch.testing.assert_close(exported, few.model(x[:7]), rtol=0, atol=1e-6)
    to_onnx(few.model, x[:7], tmp_path / "few.onnx")
    session = runtime.InferenceSession(tmp_path / "few.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x[:7].numpy()})[0]
    # A number beside the middle of two steps may be rounded otherwise.
    last = packed(few.model)["3"]
    step = float(last.inputs.scale) * float(last.weight.abs().sum(1).max())  # type: ignore[union-attr]
    assert float((torch.from_numpy(found) - few.model(x[:7])).abs().max()) <= step


def test_inputs_of_a_fixed_step_are_calibrated_and_learned_and_rows_have_their_own() -> None:
    net, x = made()
    fixed = flexround.quantize(net, x, act=ActivationQuantizer(8), method="rtn")
    quantiser = packed(fixed.model)["0"].inputs
    wanted = ActivationQuantizer(8).calibrate(x)  # type: ignore[union-attr]
    assert torch.equal(quantiser.scale, wanted.scale)
    assert torch.equal(quantiser.zero_point, wanted.zero_point)
    learned = flexround.quantize(net, x, act=ActivationQuantizer(4), steps=40, lr=1e-2)
    begun = flexround.quantize(net, x, act=ActivationQuantizer(4), steps=0)
    first = [float(packed(done.model)["1.a"].inputs.scale) for done in (learned, begun)]  # type: ignore[union-attr]
    assert 0.5 < first[0] / first[1] < 2
    assert first[0] != first[1]
    rows = flexround.quantize(net, x, act=ActivationQuantizer(8, mode="token"), method="rtn")
    layer = packed(rows.model)["0"]
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-low / scale).round().clamp(0, 255)
    rounded = scale * ((x / scale).round() + zero).clamp(0, 255).sub(zero)
    torch.testing.assert_close(layer(x), nn.functional.linear(rounded, layer.weight, layer.bias), rtol=0, atol=1e-6)
    # A row's result does not hang on the others.
    torch.testing.assert_close(rows.model(x)[:3], rows.model(x[:3]), rtol=0, atol=1e-6)


def test_the_first_and_the_last_layer_keep_more_bits() -> None:
    net, x = made()
    few = flexround.quantize(net, x, weight=Affine(2, search=2.4), act=ActivationQuantizer(4), ends=8, steps=0)
    bits = {name: layer.quantizer.bits for name, layer in packed(few.model).items()}
    assert bits == {"0": 8, "1.a": 2, "1.b": 2, "2.a": 2, "2.b": 2, "3": 8}
    inputs = [layer.inputs.quantizer.bits for layer in packed(few.model).values()]  # type: ignore[union-attr]
    assert inputs == [8, 4, 4, 4, 4, 8]


def test_eight_bits_a_channel_lose_nothing_on_digits() -> None:
    model, data = reference("digits-vit")
    few = flexround.quantize(model, data.x[:64], weight=Affine(8, axis=0), steps=2)
    apart = accuracy(few.model, data.x_test, data.y_test) - accuracy(model, data.x_test, data.y_test)
    assert abs(apart) <= 0.002


def test_normalisation_is_warned_of_and_folded() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net, x = DigitsCNN(8), torch.rand(16, 1, 8, 8)
        net(x)
    with pytest.warns(UserWarning, match="fold_norms"):
        flexround.quantize(net, x, steps=0)
    plain = fold_norms(net, example=x[:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        few = flexround.quantize(plain, x, steps=3, weight=Affine(8, axis=0))
    wanted = net.eval()(x).detach()
    assert float((few.model(x) - wanted).square().mean() / wanted.square().mean()) < 1e-3


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"block_args": {}}),
        ("mobilenetv2_050", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}),
        ("swin_tiny_patch4_window7_224",
         {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}),
    ],
)  # fmt: skip
def test_models_of_timm_are_put_in_few_bits(name: str, options: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {key: value for key, value in options.items() if value != {}}
        model, x = timm.create_model(name, pretrained=False, num_classes=5, **options).eval(), torch.randn(4, 3, 32, 32)
    if name in ("resnet18", "mobilenetv2_050"):
        model = fold_norms(model, example=x[:1])
    few = flexround.quantize(model, x, weight=Affine(4, axis=0), ends=8, steps=1, batch=4)
    layers = [n for n, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert sorted(packed(few.model)) == sorted(layers)
    assert torch.isfinite(few.model(x)).all()
    plain = few.to_fake_quant()
    torch.testing.assert_close(plain(x), few.model(x), rtol=1e-5, atol=1e-5)


def test_models_of_transformers_are_put_in_few_bits_and_tied_heads_stay() -> None:
    tf = pytest.importorskip("transformers")
    ids = torch.arange(24).reshape(4, 6)
    small: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
    llama = tf.LlamaForCausalLM(tf.LlamaConfig(intermediate_size=32, tie_word_embeddings=True, **small)).eval()
    opt = tf.OPTForCausalLM(
        tf.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16, **small)
    ).eval()
    bert = tf.BertModel(tf.BertConfig(intermediate_size=32, **small)).eval()
    for model, tied in ((llama, ["lm_head"]), (opt, ["lm_head"]), (bert, [])):
        batch = [{"input_ids": part} for part in ids.split(2)]
        few = flexround.quantize(model, batch, act=ActivationQuantizer(8, mode="token"), steps=1, batch=2)
        assert [name for unit in few.report for name in unit.found["left"]] == tied
        linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        assert set(packed(few.model)) == linear - set(tied)
        assert torch.isfinite(few.model(input_ids=ids)[0]).all()
        if tied:
            assert few.model.lm_head.weight is few.model.get_input_embeddings().weight
            # Caches of keys and values are left out while blocks are fitted, and no longer.
            assert model.config.use_cache
            assert few.model.config.use_cache
            assert few.model(input_ids=ids).past_key_values.get_seq_length() == 6


def test_the_same_seed_gives_the_same_codes_wherever_samples_are_kept(tmp_path: Path) -> None:
    net, x = made()
    settings: dict[str, Any] = {"weight": Affine(2), "steps": 30, "lr": 1e-2, "batch": 16}
    one = codes(flexround.quantize(net, x, **settings).model)
    assert torch.equal(one, codes(flexround.quantize(net, x, storage=Storage(folder=tmp_path), **settings).model))
    assert not torch.equal(one, codes(flexround.quantize(net, x, seed=1, **settings).model))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"weight": 4}, TypeError, "weight is a"),
        ({"act": 8}, TypeError, "act is a"),
        ({"method": "gptq"}, ValueError, "flexround, lrq, adaquant, adaround, rtn"),
        ({"method": ["rtn"]}, ValueError, "flexround, lrq, adaquant, adaround, rtn"),
        ({"ends": 1}, ValueError, "ends"),
        ({"ends": True}, ValueError, "ends"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": float("nan")}, ValueError, "lr"),
        ({"act_lr": "fast"}, ValueError, "act_lr"),
        ({"regularisation": float("inf")}, ValueError, "regularisation"),
        ({"rows": 0}, TypeError, "rows"),
        ({"method": "lrq", "rank": 0}, ValueError, "rank"),
        ({"calibration": []}, ValueError, "no batch"),
        ({"blocks": ["layer"]}, ValueError, "no block 'layer'"),
        ({"steps": -1}, ValueError, "steps"),
        ({"held_out": 2}, ValueError, "held_out"),
        ({"model": "vit"}, TypeError, "nn.Module"),
    ],
)
def test_arguments_that_cannot_serve_are_named(given: dict[str, Any], error: type[Exception], words: str) -> None:
    net, x = made()
    with pytest.raises(error, match=words):
        flexround.quantize(**{"model": net, "calibration": x, "steps": 1, **given})


def test_bits_that_cannot_serve_are_named() -> None:
    for bits in (1, 9):
        with pytest.raises(ValueError, match="bits"):
            flexround.quantize(made()[0], made()[1], weight=Affine(bits))


def test_models_that_cannot_serve_are_named() -> None:
    net, x = made()
    with pytest.raises(RuntimeError, match="meta"):
        flexround.quantize(copy.deepcopy(net).to("meta"), x)
    with torch.no_grad():
        net[1].b.bias[0] = float("nan")  # type: ignore[union-attr,operator]
    with pytest.raises(RuntimeError, match="'1' gives is not finite"):
        flexround.quantize(net, x, steps=0)
