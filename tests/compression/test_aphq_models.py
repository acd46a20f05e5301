"""Whole models in few bits: what carries quantisers, what is learned, kept, exported and refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import retensor as rt
from retensor.compression import aphq
from retensor.compression.aphq.blocks import BlockRounding, Dropping
from retensor.data import accuracy, reference
from retensor.data.reference import digits_vit
from retensor.errors import RetensorError
from retensor.quantizing import ActivationQuantizer, Fitting, Learning, QuantizedLayer

FEW: dict[str, Any] = {"calib": 24, "recon": 24, "batch": 8, "rounds": 1, "iters": 5, "lr": 1e-2}


def vit() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return digits_vit(16, 2).eval()


def swin() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SwinTransformer(
            img_size=16, patch_size=2, in_chans=1, num_classes=5, embed_dim=12, depths=(2, 2), num_heads=(2, 4),
            window_size=4,
        ).eval()  # fmt: skip


NETS = {"vit": (vit, 8), "swin": (swin, 16)}


def pictures(size: int, count: int = 24) -> torch.Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=list(NETS))
def few(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor, aphq.Quantized]:
    made, size = NETS[request.param]
    net, x = made(), pictures(size)
    return net, x, aphq.quantize(net, x, aphq.Config(w_bits=3, a_bits=3, **FEW))


def test_every_layer_and_both_products_carry_quantisers(few: tuple[nn.Module, torch.Tensor, aphq.Quantized]) -> None:
    net, _, q = few
    layers = {name for name, module in net.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert set(q.integers()) == layers
    for name in layers:
        layer = q.model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        inputs = layer.inputs
        # One step for all of the tensor, that does not look at the input.
        assert isinstance(inputs, ActivationQuantizer)
        assert inputs.mode == "tensor"
        assert inputs.scale.shape == ()
        conv = isinstance(net.get_submodule(name), nn.Conv2d)
        assert inputs.quantizer.bits == (8 if conv else 3)
        assert layer.quantizer.bits == 3
        assert layer.scale.numel() == layer.shape[0]
    attention = [module for module in q.model.modules() if isinstance(module, aphq.Attention)]
    assert len(attention) == sum(hasattr(module, "qkv") for module in net.modules())
    for module in attention:
        for product in (module.scores, module.mix):
            for side in (product.left, product.right):
                assert isinstance(side, aphq.Rounder)
                assert side.bits == 3
                assert side.scale.shape == (module.heads, 1, 1)
    acts = [module.act for module in q.model.modules() if hasattr(module, "fc2")]
    assert all(isinstance(act, aphq.ReLU) for act in acts)
    assert not any(isinstance(module, nn.GELU | Learning | Dropping) for module in q.model.modules())
    seconds = [module.fc2.inputs.zero_point for module in q.model.modules() if hasattr(module, "fc2")]
    assert not any(bool(zero) for zero in seconds)


def test_codes_are_in_range_and_weights_within_a_step(few: tuple[nn.Module, torch.Tensor, aphq.Quantized]) -> None:
    net, x, _ = few
    config = aphq.Config(w_bits=3, a_bits=3, mlp=False, **{**FEW, "lr": 0.3})
    ready = aphq.calibrate(net, x, config)
    q = aphq.reconstruct_blocks(ready, x)
    for name, kept in q.integers().items():
        weight = ready.model.get_submodule(name).weight
        assert int(kept.codes.max()) <= 7
        low, high = ((end - kept.zero_point) * kept.scale for end in (0, 7))
        apart = (kept.decode() - torch.minimum(torch.maximum(weight, low), high)).abs()
        assert bool((apart <= kept.scale * (1 + 1e-4)).all()), name
        # Steps and zero points of weights stay where they were found.
        assert torch.equal(kept.scale.flatten(), ready.steps[name][0].scale.flatten())
    moved = [share for unit in q.report for share in unit.found["moved"].values()]
    assert max(moved) > 0
    learned = q.model.get_submodule(next(iter(ready.spec.mlp))).fc1.inputs.scale
    assert float(learned) != float(ready.steps[f"{next(iter(ready.spec.mlp))}.fc1"][1].scale)


@pytest.mark.parametrize("name", list(NETS))
@torch.no_grad()
def test_sixteen_bits_change_next_to_nothing(name: str) -> None:
    net, x = NETS[name][0](), pictures(NETS[name][1])
    config = aphq.Config(w_bits=16, a_bits=16, embed_bits=16, mlp=False, **FEW)
    with torch.enable_grad():
        q = aphq.quantize(net, x, config)
    assert float((q(x) - net(x)).abs().max()) < 1e-3
    assert not torch.equal(q(x), net(x))
    with pytest.raises(RetensorError, match="more than 8 bits have no codes"):
        q.save("nowhere")


def test_a_model_is_kept_in_a_file_and_comes_back(
    few: tuple[nn.Module, torch.Tensor, aphq.Quantized], tmp_path: Path
) -> None:
    net, x, q = few
    q.save(tmp_path / "few.safetensors")
    again = rt.load(tmp_path / "few.safetensors", base=net).eval()
    assert torch.equal(again(x), q(x))
    assert torch.equal(copy.deepcopy(q.model)(x), q(x))
    other = rt.load(tmp_path / "few.safetensors", base=NETS["vit" if x.shape[-1] == 8 else "swin"][0]()).eval()
    other.load_state_dict(q.model.state_dict())
    assert torch.equal(other(x), q(x))
    fewer = sum(kept.codes.numel() for kept in q.integers().values()) * 3 / 8
    assert q.nbytes >= fewer
    assert q.nbytes == sum(kept.nbytes for kept in q.integers().values())


def test_onnx_runtime_gives_what_the_model_gives(
    few: tuple[nn.Module, torch.Tensor, aphq.Quantized], tmp_path: Path
) -> None:
    _, x, q = few
    q.to_onnx(x[:8], tmp_path / "few.onnx")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = onnxruntime.InferenceSession(tmp_path / "few.onnx", options)
    found = session.run(None, {session.get_inputs()[0].name: x[:8].numpy()})[0]
    head = next(reversed(q.integers()))
    layer = q.model.get_submodule(head)
    # One step of what comes into the last layer, through its largest weight.
    step = float(layer.inputs.scale * layer.weight.abs().amax())
    assert float((torch.from_numpy(found) - q(x[:8])).abs().max()) <= step


def test_torch_exports_it(few: tuple[nn.Module, torch.Tensor, aphq.Quantized]) -> None:
    _, x, q = few
    program = torch.export.export(q.model, (x[:4],))
    torch.testing.assert_close(program.module()(x[:4]), q(x[:4]))


def test_the_given_model_and_the_callers_random_numbers_stay() -> None:
    net, x = vit().train(), pictures(8)
    before = copy.deepcopy(net.state_dict())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    q = aphq.quantize(net, x, aphq.Config(w_bits=4, a_bits=4, **FEW))
    assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert not q.model.training
    assert all(value.requires_grad for value in net.parameters())
    same = aphq.quantize(net, x, aphq.Config(w_bits=4, a_bits=4, **FEW))
    assert torch.equal(q(x), same(x))
    other = aphq.quantize(net, x, aphq.Config(w_bits=4, a_bits=4, seed=1, **FEW))
    assert not torch.equal(q(x), other(x))


@pytest.mark.parametrize("loss", ["aph", "mse", "mae", "hessian_brecq"])
@pytest.mark.parametrize("average", [True, False])
def test_every_loss_begins_at_start_and_learns(loss: Any, average: bool) -> None:
    net, x = vit(), pictures(8)
    losses: dict[str, list[float]] = {}

    class Watching(BlockRounding):
        def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
            value = super().loss(fitting, found, wanted, done)
            losses.setdefault(fitting.unit.name, []).append(float(value.detach()))
            return value

    ready = aphq.calibrate(net, x, aphq.Config(w_bits=3, a_bits=3, loss=loss, average=average, mlp=False, **FEW))
    rt.quantizing.reconstruct(
        ready.model, x, Watching(ready, x), blocks=list(ready.spec.blocks), steps=4, batch=8, input_mix=0.5
    )
    assert all(found[0] == pytest.approx(2.0, rel=1e-5) for name, found in losses.items() if name != "head")
    assert losses["head"][0] != pytest.approx(2.0)
    assert list(losses) == ["patch_embed", "blocks.0", "blocks.1", "head"]


def test_importance_of_each_image_goes_with_the_image() -> None:
    net, x = vit(), pictures(8)
    ready = aphq.calibrate(net, x, aphq.Config(average=False, mlp=False, **FEW))
    method = BlockRounding(ready, x)
    fitting = Fitting(None, net, net, range(24), None, torch.zeros(24, 1, 2))  # type: ignore[arg-type]
    fitting.unit = type("Unit", (), {"last": False})()
    weights = torch.arange(24.0)[:, None].expand(24, 2)
    fitting.kept["importance"], fitting.chosen = weights, torch.tensor([5, 1])
    found = method._distance(fitting, torch.ones(2, 2), torch.zeros(2, 2))
    assert float(found) == pytest.approx((5 + 1) / 2)


def test_numbers_are_dropped_in_the_fitting_and_never_afterwards() -> None:
    inner = ActivationQuantizer(2).calibrate(torch.linspace(-1, 1, 9))
    dropping = Dropping(inner, 0.25, torch.Generator().manual_seed(0))
    x = torch.rand(20000) * 2 - 1
    apart = inner(x) != x
    left = (dropping(x) == x)[apart]
    assert float(left.double().mean()) == pytest.approx(0.25, abs=0.02)
    dropping.active = False
    assert torch.equal(dropping(x), inner(x))


def test_a_model_of_ones_own_is_told_by_its_parts() -> None:
    class Mixer(nn.Module):
        def __init__(self, width: int = 12) -> None:
            super().__init__()
            self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.first, self.act, self.last = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)
            self.scores, self.mix = aphq.Product(), aphq.Product()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
            mixed = self.mix(self.scores(q, k.mT).softmax(-1), v)
            return x + self.out(mixed.transpose(1, 2).flatten(2))

    class Mlp(nn.Module):
        def __init__(self, width: int = 12) -> None:
            super().__init__()
            self.first, self.act, self.last = nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.last(self.act(self.first(x)))
            return out

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp, self.head = Mixer(), Mlp(), nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.attention(x)
            out: torch.Tensor = self.head((x + self.mlp(x)).mean(1))
            return out

    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(24, 5, 12)
    for name in ("first", "act", "last"):
        delattr(net.attention, name)
    with pytest.raises(ValueError, match=r"none of the blocks that are known.*Spec\(blocks="):
        aphq.quantize(net, x, aphq.Config(**FEW))
    spec = aphq.Spec(["attention", "mlp"], {"mlp": ("first", "act", "last")}, [("attention.norm", "attention.qkv")])
    q = aphq.quantize(net, x, aphq.Config(w_bits=4, a_bits=4, **FEW), spec=spec)
    assert set(q.integers()) == {"attention.qkv", "attention.out", "mlp.first", "mlp.last", "head"}
    assert all(isinstance(product.left, aphq.Rounder) for product in (q.model.attention.scores, q.model.attention.mix))
    assert isinstance(q.model.mlp.act, aphq.ReLU)
    with pytest.raises(ValueError, match=r"the product 'attention\.scores' lies outside of all blocks"):
        aphq.quantize(net, x, aphq.Config(mlp=False, **FEW), spec=aphq.Spec(["mlp"]))


def test_what_cannot_be_put_in_few_bits_is_refused() -> None:
    net, x = vit(), pictures(8)
    with pytest.raises(ValueError, match="there are 24 images and a batch is 32"):
        aphq.quantize(net, x)
    with pytest.raises(TypeError, match=r"an nn\.Module is put in few bits"):
        aphq.calibrate("net", x, spec=aphq.Spec([]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no 'blocks\.9'"):
        aphq.quantize(net, x, aphq.Config(**FEW), spec=aphq.Spec(["blocks.9"]))
    with pytest.raises(ValueError, match=r"'blocks\.0\.norm1' and 'blocks\.0\.attn' are LayerNorm and Attention"):
        aphq.calibrate(net, x, spec=aphq.Spec(["blocks.0"], {}, [("blocks.0.norm1", "blocks.0.attn")]))
    with pytest.raises(ValueError, match=r"'blocks\.0\.mlp\.fc1' is not called with what 'blocks\.0\.norm1' gives"):
        aphq.calibrate(net, x, spec=aphq.Spec(["blocks.0"], {}, [("blocks.0.norm1", "blocks.0.mlp.fc1")]))
    spec = aphq.Spec(["blocks.0"], {"blocks.0.mlp": ("fc1", "act", "fc1")})
    with pytest.raises(ValueError, match=r"does not end in 'blocks\.0\.mlp\.fc1'"):
        aphq.reconstruct_mlp(net, x, aphq.Config(**FEW), spec=spec)
    ready = aphq.calibrate(net, x, aphq.Config(w_bits=4, **FEW))
    with pytest.raises(ValueError, match="calibrated for W4A4, and W3A4 is asked for"):
        aphq.reconstruct_blocks(ready, x, aphq.Config(w_bits=3, **FEW))
    ones = aphq.Config(direction="ones", eps=1e-30, mlp=False, **FEW)
    with pytest.raises(RuntimeError, match=r"'patch_embed' gives is 0 everywhere: a shift by all ones"):
        aphq.quantize(net, x, ones)


def test_attention_of_another_kind_is_refused_by_name() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    tiny = ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=8,
                  patch_size=4, num_channels=1)
    )  # fmt: skip
    with pytest.raises(ValueError, match="timm's PatchEmbed, Block, SwinTransformerBlock and PatchMerging"):
        aphq.quantize(tiny, pictures(8), aphq.Config(**FEW))
    with pytest.raises(ValueError, match=r"products cannot be seen; timm's Attention and WindowAttention are known"):
        aphq.exposed(tiny)
    with pytest.raises(ValueError, match=r"'0' is a MultiheadAttention"):
        aphq.exposed(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(ValueError, match=r"normalises queries, keys or outputs \('q_norm'\)"):
        aphq.exposed(timm.create_model("test_vit", pretrained=False, qk_norm=True))
    shown = aphq.exposed(vit())
    with pytest.raises(ValueError, match="is_causal is not for it"):
        shown.blocks[0].attn(torch.zeros(1, 4, 16), is_causal=True)


@torch.no_grad()
def test_masks_of_attention_do_as_timms() -> None:
    net = vit()
    ours, theirs = aphq.exposed(net).blocks[0].attn, net.blocks[0].attn
    x = torch.randn(3, 5, 16)
    seen = torch.rand(3, 1, 5, 5) > 0.3
    seen[..., 0] = True
    for mask in (seen, torch.randn(1, 1, 5, 5)):
        torch.testing.assert_close(ours(x, attn_mask=mask), theirs(x, attn_mask=mask))


def test_digits_are_told_in_eight_bits_and_nearly_in_three() -> None:
    model, data = reference("digits-vit")
    whole = accuracy(model, data.x_test, data.y_test)
    common: dict[str, Any] = {"calib": 64, "recon": 128, "rounds": 1}
    eight = aphq.quantize(model, data.x, aphq.Config(w_bits=8, a_bits=8, iters=0, mlp=False, **common))
    assert accuracy(eight.model, data.x_test, data.y_test) >= whole - 0.005
    plain = aphq.quantize(model, data.x, aphq.Config(w_bits=3, a_bits=3, iters=0, mlp=False, **common))
    fitted = aphq.quantize(
        model, data.x, aphq.Config(w_bits=3, a_bits=3, iters=40, mlp_iters=100, mlp_lr=1e-3, lr=3e-2, act_lr=1e-3,
                                   batch=16, **common)
    )  # fmt: skip
    wanted = model(data.x_test)
    errors = [float((q(data.x_test) - wanted).detach().square().mean()) for q in (eight, fitted, plain)]
    assert errors == sorted(errors)
    assert accuracy(fitted.model, data.x_test, data.y_test) >= whole - 0.03


def test_rates_of_roundings_stay_and_those_of_steps_fall_along_a_cosine() -> None:
    net, x = vit(), pictures(8)
    rates: dict[str, list[tuple[float, float]]] = {}

    class Watching(BlockRounding):
        def begin(self, fitting: Fitting) -> Any:
            self.optimizers = super().begin(fitting)
            return self.optimizers

        def after_step(self, fitting: Fitting, done: float) -> None:
            super().after_step(fitting, done)
            first, second = (optimizer.param_groups[0]["lr"] for optimizer in self.optimizers)
            rates.setdefault(fitting.unit.name, []).append((first, second))

    config = aphq.Config(mlp=False, act_lr=1e-3, **FEW)
    ready = aphq.calibrate(net, x, config)
    method = Watching(ready, x)
    rt.quantizing.reconstruct(ready.model, x, method, blocks=list(ready.spec.blocks), steps=4, batch=8)
    wanted = [(1e-2, 1e-3 * part) for part in (1.0, 0.5 + 0.5 * 0.5**0.5, 0.5, 0.5 - 0.5 * 0.5**0.5)]
    for found in rates.values():
        assert found == [pytest.approx(pair) for pair in wanted]
