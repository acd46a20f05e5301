"""Attention of additions: its formula, its order, its codes, and hashing."""

from __future__ import annotations

import math

import pytest
import torch
from timm.layers.attention import Attention
from timm.models.pvt_v2 import Attention as PyramidAttention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from retensor.compression import shiftadd
from retensor.compression.shiftadd.attention import unit
from retensor.compression.shiftadd.hashing import labels
from retensor.compression.shiftadd.sources import source_of
from retensor.errors import RetensorError

SMALL = {"bits": 8, "anchors": 6, "samples": 40, "similar": 5}


def attention(seed: int = 0, dim: int = 16, heads: int = 2, **settings: object) -> shiftadd.AddAttention:
    torch.manual_seed(seed)
    source = source_of(Attention(dim, heads, qkv_bias=True))
    assert source is not None
    return shiftadd.AddAttention.from_source(source, **settings)


def projected(layer: shiftadd.AddAttention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    batch, tokens, _ = x.shape
    parts = layer.qkv(x).reshape(batch, tokens, -1, layer.heads, layer.head_dim).permute(2, 0, 3, 1, 4)
    return tuple(parts)


def by_the_formula(layer: shiftadd.AddAttention, x: torch.Tensor, sparse: bool = False) -> torch.Tensor:
    """In the quadratic order, and with explicit sums."""
    q, k, v = projected(layer, x)
    scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(layer.head_dim), -1)
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    b, c = ((part - part.mean() > 0).double() for part in (q, k))
    y = 0.5 * v.double() + (b @ c.transpose(-1, -2)) @ v.double() / math.pi
    if sparse:
        y = y + (scores * (scores > 0.02)).double() @ v.double()
    y = y / y.norm(dim=-1, keepdim=True)
    kernel = layer.dwconv.weight[:, 0, :, 0].double()
    padded = torch.nn.functional.pad(v.double(), (0, 0, 4, 4))
    for t in range(9):
        y = y + kernel[:, t, None, None] * padded[:, :, t : t + v.shape[2]]
    return layer.proj(y.float().transpose(1, 2).flatten(2))


def test_the_linear_order_equals_the_quadratic_one():
    layer, x = attention().eval(), torch.randn(3, 20, 16)
    assert torch.allclose(layer(x), by_the_formula(layer, x), atol=1e-5)


def test_the_sparse_branch_is_there_in_training_alone():
    layer, x = attention(sparse=True), torch.randn(3, 20, 16)
    assert torch.allclose(layer.train()(x), by_the_formula(layer, x, sparse=True), atol=1e-5)
    assert torch.allclose(layer.eval()(x), by_the_formula(layer, x), atol=1e-5)


def test_binary_softmax_is_the_softmax_of_codes():
    layer, x = attention(attention="binary_softmax").eval(), torch.randn(2, 12, 16)
    q, k, v = projected(layer, x)
    b, c = (shiftadd.binarized(unit(part)) for part in (q, k))
    y = torch.softmax(b @ c.transpose(-1, -2) / math.sqrt(8), -1) @ v
    assert torch.allclose(layer(x), layer.proj(y.transpose(1, 2).flatten(2)), atol=1e-5)


def test_operations_grow_with_the_tokens_and_those_of_the_quadratic_order_with_their_square():
    counts = {}
    for kind in ("linear_add", "binary_softmax"):
        layer = attention(attention=kind, dim=8, heads=1).eval()
        for tokens in (784, 3136):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                layer.products(*[torch.zeros(1, 1, tokens, 8)] * 3) if kind == "linear_add" else layer._binary(
                    *torch.zeros(3, 1, 1, tokens, 8)
                )
            counts[kind, tokens] = counter.get_total_flops()
    assert counts["linear_add", 3136] == 4 * counts["linear_add", 784]
    assert counts["binary_softmax", 3136] == 16 * counts["binary_softmax", 784]


def test_the_gradient_of_codes_is_that_of_a_clamp():
    x = torch.tensor([-0.4, 0.1, 0.6, 0.9], requires_grad=True)
    code = shiftadd.binarized(x)
    assert code.tolist() == [0.0, 0.0, 1.0, 1.0]
    (code * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0]


def test_codes_depend_on_the_batch_unless_means_are_kept():
    x = torch.randn(6, 20, 16)
    layer = attention().eval()
    alone = torch.cat([layer(one[None]) for one in x])
    assert not torch.allclose(alone, layer(x), atol=1e-3)
    kept = attention(threshold="ema")
    for _ in range(4):
        kept.train()(torch.randn(6, 20, 16))
    kept.eval()
    alone = torch.cat([kept(one[None]) for one in x])
    assert torch.allclose(alone, kept(x), atol=1e-5)


def test_running_means_are_the_mean_of_the_first_batches():
    layer = attention(threshold="ema")
    with pytest.raises(RetensorError, match="have not seen a batch"):
        layer.eval()(torch.randn(1, 4, 16))
    means = []
    for _ in range(5):
        x = torch.randn(2, 20, 16)
        q, k, _ = projected(layer, x)
        means.append(torch.stack([unit(q).mean(), unit(k).mean()]).detach())
        layer.train()(x)
    assert torch.allclose(layer.means, torch.stack(means).mean(0), atol=1e-6)


@pytest.mark.parametrize("kind", ["linear_add", "binary_softmax", "ksh"])
def test_all_parameters_of_all_kinds_are_trained(kind):
    layer = attention(attention=kind, hashing=SMALL)
    x = torch.randn(3, 20, 16)
    if kind == "ksh":
        shiftadd.fit_hashes(layer, x)
    layer.train()(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("kind", ["linear_add", "binary_softmax", "ksh"])
def test_packed_attention_equals_the_float_one(kind):
    layer, x = attention(attention=kind, hashing=SMALL).eval(), torch.randn(3, 20, 16)
    if kind == "ksh":
        shiftadd.fit_hashes(layer, x)
    packed = shiftadd.PackedAddAttention.from_attention(layer)
    assert torch.allclose(packed(x), layer(x), atol=1e-5)
    with pytest.raises(RetensorError, match="eval mode only"):
        packed.train()(x)


def test_vectors_of_nothing_give_numbers():
    layer = attention().eval()
    with torch.no_grad():
        for parameter in layer.qkv.parameters():
            parameter.zero_()
    assert bool(torch.isfinite(layer(torch.zeros(1, 4, 16))).all())


def test_masks_are_refused():
    layer, x = attention().eval(), torch.zeros(1, 4, 16)
    for given in ({"is_causal": True}, {"attn_mask": torch.ones(4, 4)}):
        with pytest.raises(ValueError, match="no mask"):
            layer(x, **given)
    layer(x, (2, 2))


def test_settings_out_of_range_are_named():
    for settings, told in (
        ({"attention": "soft"}, "attention is 'soft'"),
        ({"threshold": "median"}, "threshold"),
        ({"kernel_size": 4}, "odd"),
    ):
        with pytest.raises(ValueError, match=told):
            attention(**settings)
    with pytest.raises(TypeError, match="sparse"):
        attention(sparse=1)


@pytest.mark.parametrize("reduction", [1, 4])
def test_a_pyramid_s_projections_are_joined_in_order(reduction):
    torch.manual_seed(0)
    theirs = PyramidAttention(16, 2, sr_ratio=reduction)
    layer = shiftadd.AddAttention.from_source(source_of(theirs)).eval()
    x = torch.randn(2, 16, 16)
    q, k, v = projected(layer, x)
    assert torch.allclose(q.transpose(1, 2).flatten(2), theirs.q(x), atol=1e-6)
    keys = theirs.kv(x).reshape(2, 16, 2, 2, 8).permute(2, 0, 3, 1, 4)
    assert torch.allclose(torch.stack([k, v]), keys, atol=1e-6)
    assert layer(x, (4, 4)).shape == x.shape


def test_attention_with_norms_of_its_queries_is_left():
    assert source_of(Attention(16, 2, qk_norm=True, norm_layer=nn.LayerNorm)) is None


def test_labels_are_symmetric_and_of_the_most_and_least_similar():
    points = unit(torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)))
    found = labels(points, 3)
    assert torch.equal(found, found.transpose(-1, -2))
    assert bool((found.diagonal(dim1=-2, dim2=-1) == 1).all())
    product = points @ points.transpose(-1, -2)
    assert float(product[found == 1].min()) > float(product[found == -1].max())


def test_hashes_come_nearer_to_their_labels_than_drawn_directions_do():
    g = torch.Generator().manual_seed(0)
    x = unit(torch.randn(8, 1, 16, generator=g) + 0.3 * torch.randn(8, 25, 16, generator=g)).reshape(1, 1, 200, 16)
    hashing = shiftadd.KernelHash(1, 16, samples=200)
    hashing.fit(x)
    wanted = labels(x[0], 10)

    def apart() -> float:
        codes = hashing(x)[0]
        return float((codes @ codes.transpose(-1, -2) / 16 - wanted).square().mean())

    learned = apart()
    for seed in range(5):
        hashing.a.copy_(torch.randn(hashing.a.shape, generator=torch.Generator().manual_seed(seed)))
        assert learned < apart()
    # Each further bit takes up some of what the others left.
    few = shiftadd.KernelHash(1, 16, bits=2, samples=200)
    few.fit(x)
    codes = few(x)[0]
    assert learned < float((codes @ codes.transpose(-1, -2) / 2 - wanted).square().mean())


def test_hashes_that_learned_nothing_say_so():
    layer = attention(attention="ksh", hashing=SMALL).eval()
    with pytest.raises(RetensorError, match="calibration"):
        layer(torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="at least"):
        shiftadd.fit_hashes(layer, torch.zeros(1, 4, 16))
    with pytest.raises(ValueError, match="no attention of the model is hashed"):
        shiftadd.fit_hashes(attention(), torch.zeros(1, 4, 16))
