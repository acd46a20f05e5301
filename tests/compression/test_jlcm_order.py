"""Neurons in another order: every kind of network gives what it gave, and what cannot follow is named."""

from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForSequenceClassification, BertModel, LlamaConfig, LlamaForCausalLM

from retensor.compression import jlcm
from retensor.errors import RetensorError


class Depthwise(nn.Module):
    """A residual network with batch normalisation, a depthwise convolution, and a picture flattened at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.wide, self.bn2 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.deep, self.narrow = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 8, 1)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = x + self.narrow(torch.relu(self.deep(torch.relu(self.bn2(self.wide(x))))))
        return self.head(functional.adaptive_avg_pool2d(x, 4).flatten(1))


class Joined(nn.Module):
    """Two layers side by side, read as one; the first is split in halves that gate each other before."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(5, 6), nn.Linear(5, 4), nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.one(x).relu(), self.two(x).tanh()], -1))


class Softmaxed(nn.Module):
    """The channels are sorted on their way: no order can be absorbed, though a layer reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(torch.cumsum(self.one(x), -1))


def vit() -> nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=48, depth=2, num_heads=4, init_values=1e-5
    )


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # The library's own norm works in float32 whatever the model's type.
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, nn.RMSNorm(32, eps=1e-6))
    return model


def bert(kind: type = BertModel) -> nn.Module:
    return kind(
        BertConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=16,
        )
    )


IDS = {"input_ids": torch.arange(12).reshape(2, 6)}
PICTURES = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8).sin()
ROWS = torch.linspace(-2, 2, 20).reshape(4, 5)
NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)), ROWS),
    "cnn": (Depthwise, PICTURES),
    "concat": (Joined, ROWS),
    "vit": (vit, PICTURES),
    "llama": (llama, IDS),
    "bert": (bert, IDS),
    "bert classifier": (lambda: bert(BertForSequenceClassification), IDS),
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=5), torch.randn(2, 3, 32, 32)),
}
MOVED = {
    "mlp": {"0", "2"},
    "cnn": {"stem", "wide", "narrow"},
    "concat": {"one", "two"},
    "vit": {f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    | {"patch_embed.proj"},
    "llama": {
        f"model.layers.{i}.{part}"
        for i in (0, 1)
        for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    },
    "bert": {
        f"encoder.layer.{i}.{part}"
        for i in (0, 1)
        for part in ("attention.self.query", "attention.self.key", "attention.self.value", "intermediate.dense")
    },
}


def given(model: nn.Module, example: object) -> torch.Tensor:
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, torch.Tensor) else out[0]


def ordered(model: nn.Module, example: object, **settings: object) -> jlcm.Reordering:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the rows of")
        return jlcm.reorder(model, example, **settings)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_in_order_gives_what_it_gave(name: str) -> None:
    torch.manual_seed(0)
    build, example = NETWORKS[name]
    model = build().eval()
    # Batch normalisation that was never trained would hide channels left behind.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    kept = {key: value.clone() for key, value in model.state_dict().items()}
    found = ordered(model, example, groups=4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, kept[key])
    if name in MOVED:
        assert set(found.permutations) == MOVED[name]
    for kind, allowed in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model, moved = model.to(kind), found.model.to(kind)
        x = example.to(kind) if isinstance(example, torch.Tensor) else example
        before, after = given(model, x), given(moved, x)
        assert float((before - after).abs().max()) < allowed * float(before.abs().max())
    changed = 0
    for order in found.permutations.values():
        assert order.sort().values.tolist() == list(range(len(order)))
        changed += order.tolist() != list(range(len(order)))
    assert changed > len(found.permutations) / 2


def test_rows_follow_their_permutation_and_their_groups() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))
    with torch.no_grad():
        net[0].weight *= torch.rand(16, 1).exp()
    found = jlcm.reorder(net, ROWS, groups=4)
    order = found.permutations["0"]
    assert torch.equal(found.model[0].weight, net[0].weight[order])
    assert torch.equal(found.model[0].bias, net[0].bias[order])
    assert torch.equal(found.model[2].weight, net[2].weight[:, order])
    labels = jlcm.group_rows(net[0].weight, 4)
    assert torch.equal(found.layouts["0"].labels(16), labels[order])


def test_rotated_queries_and_keys_stay_and_are_named() -> None:
    model = llama().eval()
    found = jlcm.trace(model, IDS)
    fixed = {name for name, reason in found.fixed.items() if "cannot be followed" in reason}
    assert fixed == {f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj", "k_proj")}
    with pytest.warns(UserWarning, match=r"q_proj' stay where they are.*o_proj' cannot be followed"):
        jlcm.reorder(model, IDS)
    with pytest.raises(RetensorError, match=r"q_proj' stay.*leave strict out"):
        jlcm.reorder(model, IDS, strict=True)


def test_heads_move_inside_themselves_only() -> None:
    found = jlcm.trace(vit().eval(), PICTURES)
    heads = [movable for movable in found.movables if "blocks.0.attn.qkv" in movable.rows()]
    # Four heads of values, and four of queries with their keys.
    assert [movable.channels for movable in heads] == [12] * 8
    for movable in heads:
        rows = movable.rows()["blocks.0.attn.qkv"]
        assert bool((rows // 12 == rows[0] // 12).all())


def test_a_consumer_that_mixes_channels_in_their_order_is_named() -> None:
    net = Softmaxed()
    found = jlcm.trace(net, ROWS)
    assert not found.movables
    assert found.fixed == {"one": "the way to 'two' cannot be followed", "two": "it is part of the output"}
    with pytest.warns(UserWarning, match="the rows of 'one' stay where they are"):
        assert not jlcm.reorder(net, ROWS).permutations
    with pytest.raises(RetensorError, match="the way to 'two' cannot be followed"):
        jlcm.reorder(net, ROWS, strict=True)


def test_a_reader_behind_a_zero_is_found() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.gate, self.out = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(3, 2)
            nn.init.zeros_(self.gate.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.one(x).relu()
            return self.out(self.two(hidden) + self.gate(hidden.flip(-1)))

    # What the gate reads is backwards; that its weight is zero today must not make the order free.
    assert "one" in jlcm.trace(Hidden(), ROWS).fixed


def test_experts_that_the_example_does_not_reach_keep_what_they_might_read_in_its_order() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.into = nn.Linear(5, 7), nn.Linear(7, 6)
            self.one, self.two = nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.into(self.before(x).relu()).relu()
            return torch.stack([(self.one if row[0] > 0 else self.two)(h) for row, h in zip(x, hidden, strict=True)])

    torch.manual_seed(0)
    net, example = Experts(), ROWS.abs()
    found = ordered(net, example, groups=2)
    assert set(found.permutations) == {"before"}
    for x in (ROWS, -ROWS):
        assert torch.allclose(found.model(x), net(x), atol=1e-6)
    with pytest.raises(RetensorError, match="'two', which this example never calls, cannot be followed"):
        jlcm.reorder(net, example, strict=True)


def test_tied_embeddings_move_once() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            tie_word_embeddings=True,
        )
    ).eval()
    found = ordered(model, IDS, groups=2)
    assert "model.layers.0.mlp.down_proj" in found.permutations
    before, after = given(model, IDS), given(found.model, IDS)
    assert float((before - after).abs().max()) < 1e-5 * float(before.abs().max())
    assert found.model.lm_head.weight is found.model.model.embed_tokens.weight


def test_named_layers_alone_are_ordered_and_others_refused() -> None:
    net = NETWORKS["mlp"][0]()
    assert set(jlcm.reorder(net, ROWS, {"2": 3}).permutations) == {"2"}
    with pytest.raises(ValueError, match="'4' cannot be ordered, because it is part of the output"):
        jlcm.reorder(net, ROWS, {"4": 2})
    with pytest.raises(ValueError, match="16 channels and cannot have 17 groups"):
        jlcm.reorder(net, ROWS, {"0": 17})
    with pytest.raises(ValueError, match="a number from 1, not 0"):
        jlcm.reorder(net, ROWS, 0)


def test_examples_that_are_none_are_refused() -> None:
    net = NETWORKS["mlp"][0]()
    with pytest.raises(TypeError, match="a batch is a tensor"):
        jlcm.trace(net, 3)
    with pytest.raises(TypeError, match="an example is a tensor"):
        jlcm.trace(net, (ROWS, "text"))
    with pytest.raises(ValueError, match=r"'0\.weight' is on the meta device"):
        jlcm.trace(NETWORKS["mlp"][0]().to("meta"), ROWS)
    with pytest.raises(ValueError, match="no finite tensor"):
        jlcm.trace(net, ROWS * math.inf)


def test_modes_and_gradients_are_left_as_they_were() -> None:
    net = NETWORKS["cnn"][0]().train()
    net.bn.eval()
    jlcm.trace(net, PICTURES)
    assert net.training
    assert not net.bn.training
    assert all(parameter.requires_grad for parameter in net.parameters())
