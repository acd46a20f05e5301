"""Whole models: plans that fit, files as large as they say, and what comes back from them."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import retensor as rt
from retensor.compression import jlcm
from retensor.data import minilm
from retensor.errors import RetensorError


def perceptron(inner: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, inner), nn.ReLU(), nn.Linear(inner, inner), nn.ReLU(), nn.Linear(inner, 8))


def inputs(count: int = 64) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


FEW = {"codewords": (2, 4, 16), "groups": (1, 4)}
lists = st.lists(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40).map(float)), min_size=1, max_size=4),
    min_size=1,
    max_size=4,
)


@settings(max_examples=200, deadline=None)
@given(options=lists, spare=st.integers(0, 30))
def test_the_knapsack_fits_and_is_within_one_step_of_the_best(
    options: list[list[tuple[int, float]]], spare: int
) -> None:
    budget = sum(min(found)[0] for found in options) + spare
    chosen = jlcm.knapsack(options, budget)
    taken = [found[place] for found, place in zip(options, chosen, strict=True)]
    assert sum(size for size, _ in taken) <= budget
    error = sum(error for _, error in taken)
    best = min(
        sum(error for _, error in choice)
        for choice in itertools.product(*options)
        if sum(size for size, _ in choice) <= budget
    )
    # The largest drop along any hull is what one step can cost.
    step = max(max(e for _, e in found) - min(e for _, e in found) for found in options)
    assert best <= error <= best + step


def test_the_knapsack_is_optimal_where_every_step_fits() -> None:
    options = [[(1, 10.0), (2, 4.0), (3, 1.0)], [(1, 8.0), (2, 3.0), (4, 0.0)]]
    assert jlcm.knapsack(options, 7) == [2, 2]
    assert jlcm.knapsack(options, 2) == [0, 0]
    with pytest.raises(ValueError, match="smallest options take 2 bytes"):
        jlcm.knapsack(options, 1)


@pytest.mark.parametrize("budget", [3_000, 5_000, 8_000, 20_000])
def test_a_plan_fits_and_more_bytes_are_less_error(budget: int) -> None:
    net, x = perceptron(), inputs()
    found = jlcm.plan(net, budget, x, **FEW)
    assert found.nbytes <= budget
    wider = jlcm.plan(net, budget + 2_000, x, **FEW)
    assert sum(one.error for one in wider.layers) <= sum(one.error for one in found.layers)
    made = jlcm.compress(net, x, plan=found, iters=0)
    assert made.nbytes == found.nbytes
    assert made.bits_per_weight == pytest.approx(found.bits_per_weight)
    assert f"{found.nbytes:,} bytes" in found.table()


def test_a_plan_estimates_the_error_that_the_codes_have() -> None:
    net, x = perceptron(), inputs(4096)
    found = jlcm.plan(net, 3_000, x, **FEW)
    made = jlcm.compress(net, x[:64], plan=found, iters=0)
    with torch.no_grad():
        for one, report in zip(found.layers[:1], made.report, strict=False):
            # White inputs: the first layer's error is what the formula says, up to the sample's chance.
            ordered = jlcm.reorder(net, x[:2], {"0": one.groups}) if one.rows == "absorbed" else None
            plain = net if ordered is None else ordered.model
            wanted = x @ plain[0].weight.T
            off = x @ made.model[0].weight.T - wanted
            assert float(off.square().sum() / wanted.square().sum()) == pytest.approx(one.error, rel=0.1)
            assert report.weight_error[0] == pytest.approx(report.weight_error[1], rel=1e-2)


def test_an_impossible_budget_names_the_least() -> None:
    net, x = perceptron(), inputs()
    with pytest.raises(ValueError, match=r"a budget of 500 bytes is below the [\d,]+ that this model takes") as told:
        jlcm.plan(net, 500, x, **FEW)
    least = int(str(told.value).split("below the ")[1].split(" ")[0].replace(",", ""))
    # One bit a weight, the biases, and codebooks of two words.
    weights = sum(layer.weight.numel() for layer in net if isinstance(layer, nn.Linear))
    biases = 4 * (64 + 64 + 8)
    assert least == weights // 8 + biases + 3 * 2 * 2
    assert jlcm.plan(net, least, x, **FEW).nbytes == least
    with pytest.raises(ValueError, match="below the"):
        jlcm.plan(net, least - 1, x, **FEW)


def test_a_file_of_ten_million_weights_is_as_large_as_said_and_gives_the_same_bits(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1000, 4000), nn.ReLU(), nn.Linear(4000, 1450), nn.ReLU(), nn.Linear(1450, 200))
    weights = sum(parameter.numel() for parameter in net.parameters())
    assert weights > 10_000_000
    # The nearest codes: learning changes no size.
    small = jlcm.compress(net, torch.randn(4, 1000), bits=2, groups=4, iters=0)
    path = tmp_path / "net.jlcm"
    small.save(path)
    assert small.nbytes == small.plan.nbytes
    assert small.nbytes <= path.stat().st_size <= 1.01 * small.nbytes
    assert path.stat().st_size <= 0.066 * 4 * weights
    again = jlcm.load(path, lambda: nn.Sequential(*map(copy.copy, shapes(net))))
    x = torch.randn(3, 1000)
    assert torch.equal(again(x), small(x))
    # What stays in memory is what was kept: no wide indices, no logits, no dense weights.
    tensors = [*again.parameters(), *again.buffers()]
    assert sum(tensor.nbytes for tensor in tensors) == small.nbytes
    assert not any(tensor.dtype == torch.int64 for tensor in tensors)


def shapes(net: nn.Module) -> list[nn.Module]:
    return [
        nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else nn.ReLU() for layer in net
    ]


def test_a_damaged_file_is_refused_in_a_sentence(tmp_path) -> None:
    net = perceptron()
    small = jlcm.compress(net, inputs(), iters=0)
    path = tmp_path / "net.jlcm"
    small.save(path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(RetensorError, match="no whole safetensors file"):
        jlcm.load(path, perceptron)
    with pytest.raises(RetensorError, match="is not there"):
        jlcm.load(tmp_path / "none", perceptron)
    small.save(path)
    with pytest.raises(RetensorError, match="give a model like the one"):
        jlcm.load(path, nn.Sequential(nn.Linear(16, 8)))


def test_compressing_changes_nothing_that_is_given_and_can_be_undone() -> None:
    net, x = perceptron(), inputs()
    kept = copy.deepcopy(net.state_dict())
    small = jlcm.compress(net, x, iters=5, groups=2, seed=4)
    assert all(torch.equal(value, kept[name]) for name, value in net.state_dict().items())
    assert torch.equal(copy.deepcopy(small.model)(x), small(x))
    dense = small.decompress()
    assert not any(isinstance(module, jlcm.CodebookLayer) for module in dense.modules())
    assert torch.allclose(dense(x), small(x), atol=1e-5)
    # What was moved comes back by the permutations: the dense weights, in their order, are near the given ones.
    order = small.permutations["0"]
    assert float((dense[0].weight - net[0].weight[order]).square().mean()) < 0.2 * float(net[0].weight.var())
    program = torch.export.export(small.model, (x,))
    assert torch.allclose(program.module()(x), small(x), atol=1e-6)
    assert not torch.equal(jlcm.compress(net, x, iters=5, groups=2, seed=5)(x), small(x))


def test_the_terms_of_a_report_are_the_bytes_of_a_layer() -> None:
    net, x = perceptron(), inputs()
    small = jlcm.compress(net, x, k=16, groups=4, variant="scales", iters=0)
    assert [one.name for one in small.report] == ["0", "2", "4"]
    first, last = small.report[0], small.report[-1]
    # Rows of the first are in the order of their groups; those of the last are part of the output.
    assert first.nbytes == {"indices": 512, "codebooks": 32, "scales": 8, "bounds": 6, "labels": 0}
    assert last.nbytes == {"indices": 256, "codebooks": 32, "scales": 8, "bounds": 0, "labels": 2}
    assert sum(first.nbytes.values()) == small.model[0].nbytes


def bert() -> nn.Module:
    return BertModel(
        BertConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16,
        )
    )  # fmt: skip


def llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    )  # fmt: skip


MODELS = {
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=1), None),
    "resnet": (lambda: timm.create_model("test_resnet", num_classes=10), None),
    "bert": (bert, 60),
    "llama": (llama, 60),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_libraries_are_compressed_saved_and_loaded(name: str, tmp_path) -> None:
    torch.manual_seed(0)
    build, vocabulary = MODELS[name]
    model = build().eval()
    x = {"input_ids": torch.randint(0, 60, (4, 8))} if vocabulary else torch.randn(4, 3, 32, 32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the rows of")
        small = jlcm.compress(model, x, bits=2, groups=2, iters=3, batch=4)
    small.save(tmp_path / "model.jlcm")
    again = jlcm.load(tmp_path / "model.jlcm", build)
    with torch.no_grad():
        one, other = (made(**x) if vocabulary else made(x) for made in (small.model, again))
    one, other = (out if isinstance(out, torch.Tensor) else out[0] for out in (one, other))
    assert torch.equal(one, other)
    assert bool(torch.isfinite(one).all())
    assert small.nbytes == small.plan.nbytes < 0.5 * small.plan.dense_bytes
    if name == "llama":
        # A head that is the embedding is kept once, as it is.
        assert type(again.lm_head) is nn.Linear
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_sizes_of_a_model_without_values_are_known() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4096, 11008), nn.ReLU(), nn.Linear(11008, 4096))
    found = jlcm.uniform(net, 4)
    biases = 4 * (11008 + 4096)
    assert found.nbytes == 2 * 4096 * 11008 // 4 + biases + 2 * 4 * 2
    assert math.isnan(found.layers[0].error)


def test_groups_by_scale_are_worth_more_than_groups_by_chance_on_real_weights() -> None:
    model, _ = minilm()
    weight = model.encoder.layer[0].intermediate.dense.weight.detach()

    def error(groups: int, way: str) -> float:
        coded = jlcm.nearest_codes(weight, 4, jlcm.group_rows(weight, groups, way), groups)
        return float((coded.weight() - weight).square().mean())

    single, chance, ours = error(1, "quantiles"), error(4, "random"), error(4, "quantiles")
    assert ours < chance < single


def test_settings_out_of_range_are_refused() -> None:
    net, x = perceptron(), inputs()
    for given_, sentence in (
        ({"k": 1}, "2 to 256 codewords"),
        ({"k": 300}, "2 to 256 codewords"),
        ({"bits": 0}, "bits is a number from 1 to 8"),
        ({"groups": 9}, "'4' has 8 rows and cannot have 9 groups"),
        ({"groups": 0}, "groups is a number from 1"),
        ({"variant": "all"}, "variant is 'all'"),
        ({"gradient": "all"}, "gradient is 'all'"),
        ({"phi": "all"}, "phi is 'all'"),
        ({"optimizer": "all"}, "optimizer is 'all'"),
        ({"lr_map": -1}, "lr_map is a rate from 0"),
        ({"lr_codebook": float("nan")}, "lr_codebook is a rate from 0"),
        ({"skip": ["7"]}, "skip names '7'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            jlcm.compress(net, x, **given_)
    with pytest.raises(TypeError, match="plan is a Plan"):
        jlcm.compress(net, x, plan=3)
    with pytest.raises(ValueError, match="which the model lacks; plan anew"):
        jlcm.compress(net, x, plan=jlcm.uniform(perceptron(32), 4))
    with pytest.raises(ValueError, match="budget_bytes is a number of bytes"):
        jlcm.plan(net, 1.5, x)
    with pytest.raises(ValueError, match="no linear layer or convolution"):
        jlcm.uniform(nn.Sequential(nn.ReLU()))
    with pytest.raises(TypeError, match=r"an nn\.Module is compressed"):
        jlcm.uniform(3)
    with torch.no_grad():
        net[2].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="the weight of '2' is not finite"):
        jlcm.compress(net, x)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_models_of_other_types_come_back_in_theirs(kind: torch.dtype, bias: bool, tmp_path) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32, bias=bias), nn.ReLU(), nn.Linear(32, 8, bias=bias)).to(kind)

    net, x = build(), inputs().to(kind)
    small = jlcm.compress(net, x, iters=2, groups=2)
    assert small.nbytes == small.plan.nbytes
    small.save(tmp_path / "net.jlcm")
    again, dense = jlcm.load(tmp_path / "net.jlcm", build), small.decompress()
    assert torch.equal(again(x), small(x))
    assert torch.equal(dense(x), small(x))
    assert again[0].weight.dtype == dense[0].weight.dtype == kind


def test_what_has_no_codes_is_named_before_anything_is_learned() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.spare = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x)

    class Halved(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x / 2)

    x = inputs()
    # Learning for so long would take hours.
    with pytest.raises(ValueError, match="'spare' is never called for this calibration"):
        jlcm.compress(Unused(), x, groups=1, iters=10**8)
    assert [one.name for one in jlcm.compress(Unused(), x, groups=1, iters=0, skip=["spare"]).plan.layers] == ["one"]
    net = nn.Sequential(nn.Linear(16, 16), Halved(16, 8))
    with pytest.raises(TypeError, match=r"'1': a Halved computes otherwise.*name it in skip"):
        jlcm.compress(net, x, groups=1, iters=10**8)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        jlcm.compress(perceptron().to("meta"), x, groups=1)
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        jlcm.plan(perceptron().to("meta"), 3_000, x)
    # Its inner layer has no weight of its own.
    coded = jlcm.compress(nn.Sequential(nn.Linear(16, 8, bias=False)), x, iters=0, groups=1).model
    with pytest.raises(ValueError, match="no linear layer or convolution whose weight"):
        jlcm.compress(coded, x, iters=0, groups=1)


def test_a_budget_with_room_for_everything_leaves_everything() -> None:
    net, x = perceptron(), inputs()
    found = jlcm.plan(net, 10**9, x, codewords=(2, 4))
    assert not found.layers
    small = jlcm.compress(net, x, found)
    assert math.isnan(found.bits_per_weight)
    assert math.isnan(small.bits_per_weight)
    assert torch.equal(small(x), net(x))


def test_layers_that_are_called_by_name_are_planned() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(input=x)

    assert jlcm.plan(Named(), 200, inputs(), **FEW).nbytes <= 200


def test_layers_that_are_skipped_stay() -> None:
    net, x = perceptron(), inputs()
    small = jlcm.compress(net, x, iters=0, groups=1, skip=["0", "4"])
    assert [one.name for one in small.plan.layers] == ["2"]
    assert torch.equal(small.model[0].weight, net[0].weight)
    assert rt.fold(small.model)[2].weight.unique().numel() <= 4


def test_an_order_that_cannot_be_absorbed_falls_back_to_labels() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(torch.cumsum(self.one(x), -1))

    from dataclasses import replace

    torch.manual_seed(0)
    net, x = Summed(), inputs()
    with pytest.warns(UserWarning, match="the rows of 'one' stay where they are, because the way to 'two'"):
        jlcm.compress(net, x, groups=2, iters=0)
    with pytest.raises(RetensorError, match="the way to 'two' cannot be followed"):
        jlcm.compress(net, x, groups=2, iters=0, strict=True)
    plan = jlcm.uniform(net, 4, 2)
    wanted = replace(plan, layers=tuple(replace(one, rows="absorbed") for one in plan.layers))
    with pytest.warns(UserWarning, match="the rows of 'one' stay where they are, because the way to 'two'"):
        small = jlcm.compress(net, x, wanted, iters=0)
    assert small.model.one.labels is not None
    with pytest.raises(RetensorError, match="the way to 'two' cannot be followed"):
        jlcm.compress(net, x, wanted, iters=0, strict=True)
