"""Weight Compander on whole models: which weights, their beginning, files, compilers, and folding."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.nn import quantized
from torch.ao.nn.intrinsic import quantized as intrinsic
from torch.ao.nn.quantized import dynamic, reference
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import retensor as rt
from retensor.compression import weight_compander as wc


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(16), nn.LayerNorm(16),
        nn.ReLU(), nn.Linear(16, 10),
    ).eval()  # fmt: skip


def ready() -> nn.Sequential:
    model = net()
    model(torch.zeros(1, 1, 8, 8))
    return model


def companded(model: nn.Module) -> set[str]:
    return {layer.name for layer in wc.report(model).layers}


class TiedLM(nn.Module):
    """An embedding and a classifier of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.middle(self.embed(x)))


def test_linear_and_convolution_weights_are_companded_and_nothing_else() -> None:
    model = ready()
    done = wc.apply(model)
    assert companded(done) == {"0.weight", "4.weight", "7.weight"}
    assert not wc.is_applied(model)
    assert wc.is_applied(done)
    plain = dict(model.named_parameters())
    for name, p in done.named_parameters():
        ordinary = name.replace("parametrizations.weight.original", "weight")
        assert torch.equal(p, plain[ordinary]), name
    for i in (0, 4, 7):
        torch.testing.assert_close(done[i].weight, 0.3 * torch.atan(model[i].weight / 0.2))


def test_layers_are_left_out_by_name_class_and_function() -> None:
    model = nn.Sequential(ready(), nn.Sequential(nn.Linear(10, 3)))
    assert companded(wc.apply(model, exclude="1.0")) == {"0.0.weight", "0.4.weight", "0.7.weight"}
    assert companded(wc.apply(model, exclude="1")) == {"0.0.weight", "0.4.weight", "0.7.weight"}
    assert companded(wc.apply(model, exclude=(nn.Conv2d, "**.7"))) == {"0.4.weight", "1.0.weight"}
    assert companded(wc.apply(model, exclude=lambda name, _: name.startswith("0."))) == {"1.0.weight"}
    assert companded(wc.apply(model, types=nn.Conv2d)) == {"0.0.weight"}
    assert companded(wc.apply(nn.Linear(2, 2))) == {"weight"}
    with pytest.raises(ValueError, match="exclude has 'hed', which means no layer; names here are such as"):
        wc.apply(model, exclude=("hed",))


def test_two_pairs_go_on_two_parts_of_a_model() -> None:
    done = wc.apply(wc.apply(ready(), 0.4, 0.1, exclude="7"), 0.2, 0.2, exclude=("0", "4"))
    assert {layer.name: round(layer.a, 6) for layer in wc.report(done).layers} == {
        "0.weight": 0.4, "4.weight": 0.4, "7.weight": 0.2,
    }  # fmt: skip


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kdim", [None, 5])
def test_attention_weights_are_companded_and_computed_with(kdim: int | None, bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(8, 2, batch_first=True, kdim=kdim, bias=bias)
    done = wc.apply(layer)
    inner = {"in_proj_weight"} if kdim is None else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert companded(done) == {*inner, "out_proj.weight"}
    with torch.no_grad():
        for name in inner:
            getattr(layer, name).copy_(wc.psi(getattr(layer, name), 0.3, 0.2))
        layer.out_proj.weight.copy_(wc.psi(layer.out_proj.weight, 0.3, 0.2))
    q, k = torch.randn(2, 3, 8), torch.randn(2, 4, kdim or 8)
    v = torch.randn(2, 4, 8)
    torch.testing.assert_close(done(q, k, v)[0], layer(q, k, v)[0], rtol=1e-6, atol=1e-6)


def test_the_fused_path_of_an_encoder_layer_reads_companded_weights() -> None:
    torch.manual_seed(0)
    layer = wc.apply(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    x = torch.randn(2, 3, 8)
    slow = layer.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), slow, rtol=1e-5, atol=1e-5)


def test_recurrent_layers_are_companded_when_asked_for() -> None:
    torch.manual_seed(0)
    lstm = nn.LSTM(3, 4, num_layers=2)
    done = wc.apply(lstm, types=(nn.LSTM,))
    assert companded(done) == {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            if "weight" in name:
                p.copy_(wc.psi(p, 0.3, 0.2))
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(done(x)[0], lstm(x)[0], rtol=1e-6, atol=1e-6)
    done(x)[0].sum().backward()
    assert all(p.grad is not None for p in done.parameters())
    torch.testing.assert_close(wc.bake(done)(x)[0], lstm(x)[0], rtol=1e-6, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    kernel=st.integers(1, 3),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    transposed=st.booleans(),
    granularity=st.sampled_from(["global", "layer", "channel"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    learn=st.booleans(),
)
def test_convolutions_of_any_kind_are_preserved_trained_and_folded(
    axes: int, groups: int, kernel: int, dilation: int, bias: bool, transposed: bool, granularity: str,
    dtype: torch.dtype, learn: bool,
) -> None:  # fmt: skip
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{axes}d")
    layer = kind(2 * groups, 4 * groups, kernel, groups=groups, dilation=dilation, bias=bias, dtype=dtype)
    done = wc.apply(layer, "fit", "fit", init="preserve", granularity=granularity, learn=learn)
    step = done.parametrizations.weight[0]
    channels = list(layer.weight.shape)[1 if transposed else 0]
    assert step.a.numel() == (channels if granularity == "channel" else 1)
    assert step.a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(done.weight, layer.weight, rtol=8 * eps, atol=0)
    assert bool((done.weight.abs() <= step.cap).all())
    x = torch.randn(1, 2 * groups, *[6] * axes, dtype=dtype)
    out = done(x)
    out.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in done.parameters())
    plain = wc.bake(done)
    assert type(plain) is kind
    assert torch.equal(plain(x), out)


def test_preserving_keeps_a_model_and_says_which_layer_needs_what() -> None:
    model = ready()
    with torch.no_grad():
        model[4].weight[0, 0] = 0.6
    x = torch.randn(3, 1, 8, 8)
    for granularity in ("global", "layer", "channel"):
        done = wc.apply(model, a="fit", b="fit", init="preserve", granularity=granularity, margin=0.1)
        torch.testing.assert_close(done(x), model(x), rtol=1e-5, atol=1e-6)
    largest = {
        layer.name: layer for layer in wc.report(wc.apply(model, "fit", 0.1, init="preserve", margin=0.2)).layers
    }
    assert largest["4.weight"].a == pytest.approx(0.6 * 2 / math.pi * 1.2)
    assert largest["4.weight"].b == pytest.approx(0.1)
    torch.testing.assert_close(wc.apply(model, 0.4, 0.2, init="preserve")(x), model(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"'4.weight' cannot be preserved: .* the least a is above 0\.38197"):
        wc.apply(model, 0.38, 0.2, init="preserve")
    with torch.no_grad():
        model[7].weight.zero_()
    with pytest.raises(ValueError, match=r"'7.weight' has weights up to 0\.0, which fit no a"):
        wc.apply(model, "fit", init="preserve")


def test_assigned_weights_are_reached_through_their_latents() -> None:
    model = wc.apply(nn.Linear(3, 2), 0.5, 0.1)
    wanted = torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.7, -0.7]])
    model.weight = wanted
    torch.testing.assert_close(model.weight, wanted)
    with pytest.raises(ValueError, match="are no values of a function"):
        model.weight = torch.ones(2, 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.3, 0.5, 0.7, 1.0, 3.3])
def test_saturated_weights_can_be_assigned_back(a: float, dtype: torch.dtype) -> None:
    model = wc.apply(nn.Linear(3, 1, dtype=dtype), a, 0.2)
    with torch.no_grad():
        model.parametrizations.weight.original.copy_(torch.tensor([[6e4, -6e4, 0.1]]))
        if dtype != torch.float16:
            model.parametrizations.weight.original.mul_(torch.tensor([[1e18, 1e18, 1.0]]))
    weight = model.weight.detach().clone()
    # Rounding may take a weight to the cap, and one step past it, no further.
    assert weight.abs().max().item() <= model.parametrizations.weight[0].cap.item() * (1 + torch.finfo(dtype).eps)
    model.weight = weight
    torch.testing.assert_close(model.weight, weight, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(model.weight[:, :2], weight[:, :2])
    with pytest.raises(ValueError, match="are no values of a function"):
        model.weight = weight * (1 + 4 * torch.finfo(dtype).eps)
    with pytest.raises(ValueError, match="are no values of a function"):
        wc.psi_inverse(torch.tensor([a * math.pi / 2], dtype=torch.float64), a, 0.2)


def test_tied_weights_have_one_parametrization_that_all_owners_see() -> None:
    tied = TiedLM()
    done = wc.apply(tied, learn=True)
    assert done.embed.parametrizations.weight[0] is done.head.parametrizations.weight[0]
    assert done.embed.parametrizations.weight.original is done.head.parametrizations.weight.original
    torch.testing.assert_close(done.head.weight, wc.psi(tied.head.weight, 0.3, 0.2))
    assert torch.equal(done.embed.weight, done.head.weight)
    assert companded(done) == {"embed.weight", "middle.weight"}
    x = torch.tensor([[1, 2, 10]])
    plain = wc.bake(done)
    assert plain.embed.weight is plain.head.weight
    assert torch.equal(plain(x), done(x))
    assert companded(wc.apply(tied, exclude="head")) == {"middle.weight"}
    assert companded(wc.apply(tied, exclude="embed")) == {"middle.weight"}


def test_a_layer_in_two_places_has_one_parametrization() -> None:
    layer = nn.Linear(4, 4)
    done = wc.apply(nn.Sequential(layer, nn.ReLU(), layer))
    assert done[0] is done[2]
    assert len(done[0].parametrizations.weight) == 1
    assert companded(done) == {"0.weight"}
    assert companded(wc.apply(nn.Sequential(layer, layer, nn.Linear(4, 4)), exclude="1")) == {"2.weight"}


def test_frozen_weights_stay_frozen_with_their_pair() -> None:
    model = ready()
    model[0].requires_grad_(False)
    done = wc.apply(model, learn=True)
    assert not any(p.requires_grad for p in done[0].parameters())
    assert all(p.requires_grad for p in done[4].parameters())


@pytest.mark.parametrize("frozen", [0, 4, 7])
def test_frozen_weights_stay_while_a_pair_of_all_others_learns(frozen: int) -> None:
    model = ready()
    model[frozen].requires_grad_(False)
    done = wc.apply(model, learn=True, granularity="global")
    steps = {i: done[i].parametrizations.weight[0] for i in (0, 4, 7)}
    assert len({id(step.shift_a) for step in steps.values()}) == 2
    before = {i: done[i].weight.detach().clone() for i in steps}
    optimizer = torch.optim.SGD(wc.param_groups(done, lr=0.1, lr_scale=1.0))
    done(torch.randn(3, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    for i, step in steps.items():
        assert torch.equal(done[i].weight, before[i]) is (i == frozen)
        assert (step.a.item() == step.a0.item()) is (i == frozen)


def test_parameter_groups_hold_all_that_is_trained_once() -> None:
    done = wc.apply(ready(), learn=True)
    weights, pairs = wc.param_groups(done, lr=0.05, weight_decay=5e-4)
    assert (weights["lr"], weights["weight_decay"]) == (0.05, 5e-4)
    assert (pairs["lr"], pairs["weight_decay"]) == (pytest.approx(5e-5), 0.0)
    assert {id(p) for p in pairs["params"]} == {id(p) for n, p in done.named_parameters() if "shift_" in n}
    assert len(weights["params"]) + len(pairs["params"]) == len(list(done.parameters()))
    assert len(wc.param_groups(wc.apply(ready()), lr=0.05)) == 1
    for name, bad in itertools.product(("lr", "weight_decay", "lr_scale"), (-1.0, math.nan, math.inf, "x", True)):
        with pytest.raises(ValueError, match=f"{name} is .*; it is a finite number of at least zero"):
            wc.param_groups(done, **{"lr": 0.1, name: bad})


def test_report_has_the_statistics_of_the_weights() -> None:
    model = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.001], [0.2, -0.2], [1e6, -0.4]]))
    (layer,) = wc.report(wc.apply(model)).layers
    w = 0.3 * torch.atan(model[0].weight.double() / 0.2)
    centred = w - w.mean()
    assert layer.name == "0.weight"
    assert (layer.a, layer.b) == (pytest.approx(0.3), pytest.approx(0.2))
    assert layer.cap == pytest.approx(0.3 * math.pi / 2)
    assert layer.largest == pytest.approx(layer.cap, rel=1e-5)
    assert layer.near_zero == pytest.approx(2 / 6)
    assert layer.saturated == pytest.approx(1 / 6)
    assert layer.kurtosis == pytest.approx(((centred**4).mean() / (centred**2).mean() ** 2).item(), rel=1e-5)
    assert layer.not_finite == 0
    assert wc.report(wc.apply(model), eps=0.3).layers[0].near_zero == pytest.approx(4 / 6)
    assert "0.weight" in str(wc.report(wc.apply(model)))


def test_latents_that_are_no_number_are_reported_by_name() -> None:
    done = wc.apply(ready())
    with torch.no_grad():
        done[4].parametrizations.weight.original[0, :2] = math.nan
    found = wc.report(done)
    assert found.not_finite == ("4.weight",)
    assert found["4.weight"].not_finite == 2
    assert math.isfinite(found["4.weight"].kurtosis)
    assert "4.weight: 2 of its latent weights, a and b are no finite number" in str(found)
    with pytest.raises(KeyError, match=r"no companded tensor is named '5\.weight'"):
        found["5.weight"]


@pytest.mark.parametrize("name", ["a0", "b0", "shift_a", "shift_b"])
def test_pairs_that_are_no_number_are_reported_by_name(name: str) -> None:
    done = wc.apply(ready(), learn=True, granularity="channel")
    with torch.no_grad():
        getattr(done[4].parametrizations.weight[0], name)[1] = math.nan
    found = wc.report(done)
    assert found.not_finite == ("4.weight",)
    assert found["4.weight"].not_finite == 1
    assert math.isfinite(found["4.weight"].kurtosis)


def test_report_is_of_the_compander_among_other_parametrizations() -> None:
    v = torch.tensor([[0.1, -0.4], [0.2, 1.0]])

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def layer(*steps: nn.Module) -> wc.LayerReport:
        model = nn.Linear(2, 2)
        with torch.no_grad():
            model.weight.copy_(v)
        for step in steps:
            parametrize.register_parametrization(model, "weight", step, unsafe=True)
        (found,) = wc.report(nn.Sequential(model)).layers
        return found

    alone = layer(wc.WeightCompander())
    assert layer(nn.Identity(), wc.WeightCompander()) == alone
    assert layer(wc.WeightCompander(), Doubled()) == alone
    assert layer(Doubled(), wc.WeightCompander()).largest == pytest.approx(0.3 * math.atan(2 / 0.2))
    normed = weight_norm(nn.Linear(2, 2))
    with torch.no_grad():
        normed.weight = v
    parametrize.register_parametrization(normed, "weight", wc.WeightCompander())
    (found,) = wc.report(normed).layers
    assert found.largest == pytest.approx(alone.largest)
    assert found.kurtosis == pytest.approx(alone.kurtosis)


def test_baked_outputs_are_equal_in_every_bit_and_names_are_ordinary() -> None:
    model, x = ready(), torch.randn(3, 1, 8, 8)
    done = wc.apply(model, learn=True)
    plain = wc.bake(done)
    assert torch.equal(plain(x), done(x))
    assert wc.is_applied(done)
    assert not wc.is_applied(plain)
    assert set(plain.state_dict()) == set(model.state_dict())
    untouched = ready()
    untouched.load_state_dict(plain.state_dict())
    assert torch.equal(untouched(x), done(x))
    assert str(plain) == str(model)
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), done(x))


def test_exported_graphs_have_an_arctan_before_baking_and_none_after() -> None:
    done, x = wc.apply(ready()), torch.randn(3, 1, 8, 8)
    exported = torch.export.export(done, (x,))
    assert "aten.atan" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(x), done(x), rtol=1e-6, atol=1e-6)
    baked = torch.export.export(wc.bake(done), (x,))
    assert "atan" not in baked.graph_module.code
    graphs = [program.graph_module.graph for program in (baked, torch.export.export(ready(), (x,)))]
    called = [[node.target for node in graph.nodes if node.op == "call_function"] for graph in graphs]
    assert called[0] == called[1]


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("granularity", ["global", "layer", "channel"])
def test_states_round_trip(tmp_path: Path, learn: bool, granularity: str) -> None:
    done, x = wc.apply(ready(), 0.4, 0.25, learn=learn, granularity=granularity), torch.randn(3, 1, 8, 8)
    rt.save(done, tmp_path / "model.safetensors")
    base = ready()
    with torch.no_grad():
        # Values of the base do not matter, even where they are no values of the function.
        base[4].weight.fill_(1e3)
    loaded = rt.load(tmp_path / "model.safetensors", base)
    assert torch.equal(loaded(x), done(x))
    shared = {id(p) for n, p in loaded.named_parameters(remove_duplicate=False) if n.endswith("shift_a")}
    assert len(shared) == (0 if not learn else 1 if granularity == "global" else 3)
    loaded[7].weight = loaded[7].weight.detach() / 2
    torch.testing.assert_close(loaded[7].weight, done[7].weight / 2)

    buffer = io.BytesIO()
    torch.save(done.state_dict(), buffer)
    buffer.seek(0)
    other = wc.apply(ready(), learn=learn, granularity=granularity)
    assert not torch.equal(other(x), done(x))
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), done(x))
    assert torch.equal(copy.deepcopy(done)(x), done(x))


def test_a_fixed_pair_is_not_read_as_a_learned_one() -> None:
    with pytest.raises(RuntimeError, match=r"shift_a"):
        wc.apply(ready(), learn=True).load_state_dict(wc.apply(ready()).state_dict())


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shape": [2], "learn": 1, "dtype": "float32"},
        {"shape": ["x"], "learn": True, "dtype": "float32"},
        {"shape": [-1], "learn": True, "dtype": "float32"},
        {"shape": 2, "learn": True, "dtype": "float32"},
        {"shape": [2], "learn": True, "dtype": "float16"},
    ],
)
def test_configurations_of_something_else_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is no configuration of a WeightCompander"):
        wc.WeightCompander.from_config(config)


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param("inductor", marks=[
            pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here"),
        ]),
    ],
)  # fmt: skip
def test_compiled_models_compute_and_learn_the_same(backend: str) -> None:
    done, x = wc.apply(ready(), learn=True).train(), torch.randn(4, 1, 8, 8)
    expected = done(x)
    expected.square().mean().backward()
    grads = {name: p.grad.clone() for name, p in done.named_parameters()}
    done.zero_grad()
    fresh = copy.deepcopy(done)
    compiled = torch.compile(fresh, backend=backend, fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    out.square().mean().backward()
    for name, p in fresh.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-5)


def test_autocast_models_compute_the_same() -> None:
    done, x = wc.apply(ready(), learn=True).train(), torch.randn(4, 1, 8, 8)
    expected = done(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = done(x)
    assert low.dtype == torch.bfloat16
    low.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()) for p in done.parameters())
    torch.testing.assert_close(low.float(), expected, rtol=0.1, atol=0.1)


def test_pairs_are_parameters_that_a_distributed_model_reduces() -> None:
    from torch import distributed

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        done = wc.apply(ready(), learn=True).train()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(done))
        x = torch.randn(4, 1, 8, 8)
        for model in (done, parallel):
            model(x).square().mean().backward()
        for p, q in zip(done.parameters(), parallel.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad)
        assert any("shift_a" in name for name, _ in parallel.named_parameters())
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto"])
def test_timm_models_compand_train_and_fold(name: str) -> None:
    timm = pytest.importorskip("timm")
    size = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, pretrained=False, num_classes=5, **size).eval()
    done = wc.apply(model, learn=True)
    matrices = {n for n, p in model.named_parameters() if p.ndim >= 2 and n.endswith("weight")}
    assert companded(done) == matrices
    x = torch.randn(2, 3, 32, 32)
    plain = wc.bake(done)
    assert torch.equal(plain(x), done(x))
    assert set(plain.state_dict()) == set(model.state_dict())
    assert "atan" not in torch.export.export(plain, (x,)).graph_module.code
    done(x).square().mean().backward()
    assert all(p.grad is not None for n, p in done.named_parameters())


def test_a_transformers_model_with_tied_embeddings_compands_and_folds() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForMaskedLM(config).eval()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    done = wc.apply(model)
    assert "bert.embeddings.word_embeddings.weight" in companded(done)
    assert "bert.embeddings.position_embeddings.weight" not in companded(done)
    tokens = torch.tensor([[1, 2, 3, 4]])
    plain = wc.bake(done)
    assert torch.equal(plain(tokens).logits, done(tokens).logits)
    assert plain.cls.predictions.decoder.weight is plain.bert.embeddings.word_embeddings.weight
    assert set(plain.state_dict()) == set(model.state_dict())


def test_companding_twice_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'0\.weight' is companded already"):
        wc.apply(wc.apply(ready()))


def test_weights_made_by_something_else_are_refused_by_name() -> None:
    model = ready()
    weight_norm(model[4])
    with pytest.raises(ValueError, match=r"'4\.weight' is made by _WeightNorm"):
        wc.apply(model)
    assert companded(wc.apply(model, exclude="4")) == {"0.weight", "7.weight"}
    model = ready()
    with torch.no_grad():
        prune.random_unstructured(model[4], "weight", 0.5)
    with pytest.raises(ValueError, match=r"'4\.weight' is made by a hook"):
        wc.apply(model)
    tied = TiedLM()
    parametrize.register_parametrization(tied.embed, "weight", nn.Identity())
    tied.head.weight = tied.embed.parametrizations.weight.original
    with pytest.raises(ValueError, match=r"'embed.*original' is a tensor of another parametrization"):
        wc.apply(tied)


def test_lazy_layers_are_refused_until_they_have_a_shape() -> None:
    with pytest.raises(TypeError, match=r"'4\.weight' has no shape yet; run the model once"):
        wc.apply(net())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_real_floating_point_are_refused(dtype: torch.dtype) -> None:
    model = ready()
    model[4].weight = nn.Parameter(torch.zeros(16, 256, dtype=dtype), requires_grad=False)
    with pytest.raises(TypeError, match=f"'4.weight' is of {dtype}"):
        wc.apply(model)
    assert companded(wc.apply(model, exclude="4")) == {"0.weight", "7.weight"}


QUANTISED = {
    "dynamic.Linear": (lambda: dynamic.Linear(4, 4), nn.Linear),
    "dynamic.LSTM": (lambda: dynamic.LSTM(4, 4), nn.LSTM),
    "Linear": (lambda: quantized.Linear(4, 4), nn.Linear),
    "Conv2d": (lambda: quantized.Conv2d(4, 4, 3), nn.Conv2d),
    "ConvReLU2d": (lambda: intrinsic.ConvReLU2d(4, 4, 3), nn.Conv2d),
    "reference.Linear": (lambda: reference.Linear(4, 4), nn.Linear),
    "Embedding": (lambda: quantized.Embedding(4, 4), nn.Embedding),
}


@pytest.mark.parametrize("name", list(QUANTISED))
def test_quantised_modules_are_refused_where_their_type_is_taken(name: str) -> None:
    make, kind = QUANTISED[name]
    model = nn.Sequential(nn.Linear(4, 4), make(), nn.Bilinear(4, 4, 4))
    with pytest.raises(TypeError, match="'1' is quantised; compand the model before"):
        wc.apply(model, types=(kind, nn.Bilinear))
    assert companded(wc.apply(model, types=(nn.Bilinear,))) == {"2.weight"}
    assert companded(wc.apply(model, exclude="1")) == {"0.weight"}


@pytest.mark.parametrize("name", ["dynamic.LSTM", "Embedding"])
def test_quantised_modules_of_other_types_are_left_alone(name: str) -> None:
    assert companded(wc.apply(nn.Sequential(nn.Linear(4, 4), QUANTISED[name][0]()))) == {"0.weight"}


def test_tensors_of_a_wrapper_class_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    with pytest.raises(TypeError, match=r"'0\.weight' is a TwoTensor"):
        wc.apply(model)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"a": "big"}, ValueError, "a is 'big'; it is a number above zero, or 'fit'"),
        ({"b": "fit"}, ValueError, "b is 'fit', which follows a"),
        ({"granularity": "row"}, ValueError, "granularity is 'row'; it is one of 'global', 'layer', 'channel'"),
        ({"init": "zero"}, ValueError, "init is 'zero'; it is one of 'latent', 'preserve'"),
        ({"margin": -0.1}, ValueError, "margin is -0.1; it is a finite number above zero"),
        ({"margin": 0}, ValueError, "margin is 0; it is a finite number above zero"),
        ({"learn": "no"}, TypeError, "learn is 'no'; it is True or False"),
        ({"exclude": None}, TypeError, "exclude is None, which is no pattern of layers"),
        ({"types": ()}, TypeError, "they are classes of modules"),
        ({"types": ("Linear",)}, TypeError, "they are classes of modules"),
        ({"types": nn.Bilinear}, ValueError, "no weights to compand in layers of Bilinear"),
        ({"types": nn.BatchNorm2d}, ValueError, "no weights to compand in layers of BatchNorm2d"),
        ({"exclude": 3}, TypeError, "exclude is 3, which is no pattern of layers"),
        ({"exclude": [3]}, TypeError, "3 is no pattern"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        wc.apply(ready(), **arguments)


@pytest.mark.parametrize("call", [wc.apply, wc.report, wc.is_applied, lambda x: wc.param_groups(x, 0.1)])
def test_what_is_no_module_is_refused(call: Callable[[int], object]) -> None:
    with pytest.raises(TypeError, match=r"weights of an nn\.Module are companded, not of 3"):
        call(3)


@pytest.mark.parametrize("eps", ["x", -1.0, math.nan])
def test_what_is_no_threshold_is_refused(eps: object) -> None:
    with pytest.raises(ValueError, match=r"eps is .*; it is a finite number of at least zero"):
        wc.report(wc.apply(ready()), eps=eps)
