"""Energy by operation and by memory."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from retensor.compression import shiftadd
from retensor.compression.shiftadd.energy import DRAM, LEVELS, Work, movement


def deit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=4
    )


X = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_layer_s_operations_are_its_terms() -> None:
    for layer, name, price in ((nn.Linear(12, 7), "multiplications", 3.7),
                               (shiftadd.ShiftLinear(12, 7), "shifts", 0.13)):  # fmt: skip
        found = shiftadd.energy(layer, torch.zeros(5, 3, 12))
        assert found[name] == 15 * 12 * 7
        assert sum(found[n] for n in ("multiplications", "adds", "shifts")) == 15 * 12 * 7
        assert found["pj"]["compute"] == pytest.approx(15 * 12 * 7 * price)
        assert found["pj"]["total"] == pytest.approx(sum(found["pj"][level] for level in LEVELS))


def test_shifted_perceptrons_take_the_ratio_of_both_operations() -> None:
    plain = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
    shifted = shiftadd.convert(plain, attention=None, linears="shift", include="*")
    x = torch.zeros(10, 16)
    ratio = shiftadd.energy(shifted, x)["pj"]["compute"] / shiftadd.energy(plain, x)["pj"]["compute"]
    assert ratio == pytest.approx(0.13 / 3.7)
    assert ratio == pytest.approx(0.035, abs=2e-4)
    honest = [shiftadd.energy(m, x, accumulations=True)["pj"]["compute"] for m in (shifted, plain)]
    assert honest[0] / honest[1] == pytest.approx((0.13 + 0.9) / (3.7 + 0.9))
    eight = [shiftadd.energy(m, x, bits=8)["pj"]["compute"] for m in (shifted, plain)]
    assert eight[0] / eight[1] == pytest.approx(0.024 / 0.2)


def test_attention_s_products_are_counted_in_both_orders() -> None:
    model, heads, d, n = deit(), 4, 12, 17
    found = shiftadd.energy(model, X)["layers"]["blocks.0.attn.products"]
    assert found["multiplications"] == 2 * 4 * heads * n * n * d
    mine = shiftadd.convert(model, linears=None)
    added = shiftadd.energy(mine, X)["layers"]["blocks.0.attn.products"]
    assert added["adds"] == 2 * 4 * heads * n * d * d
    assert added["multiplications"] == 0
    assert added["pj"]["dram"] == 0
    quadratic = shiftadd.energy(shiftadd.convert(model, "binary_softmax", None), X)["layers"]["blocks.0.attn.products"]
    assert quadratic["adds"] == quadratic["multiplications"] == 4 * heads * n * n * d


def test_reduced_keys_of_a_pyramid_are_counted() -> None:
    model = timm.create_model("pvt_v2_b0", pretrained=False, embed_dims=(8, 16, 20, 16), num_classes=10)
    layers = shiftadd.energy(model, torch.zeros(1, 3, 64, 64))["layers"]
    name = next(name for name in layers if name.endswith("attn.products"))
    # 16 x 16 tokens against 2 x 2 that are left of them.
    assert layers[name]["multiplications"] == 2 * 256 * 4 * 8


def test_patches_that_do_not_overlap_are_inputs_of_a_linear_layer() -> None:
    patches, flat = nn.Conv2d(3, 20, 16, 16), nn.Linear(768, 20)
    found = shiftadd.energy(patches, torch.zeros(2, 3, 64, 64)), shiftadd.energy(flat, torch.zeros(2, 16, 768))
    assert found[0]["multiplications"] == 2 * 16 * 768 * 20
    assert found[0]["pj"] == found[1]["pj"]
    with pytest.raises(ValueError, match="no tiling"):
        shiftadd.energy(nn.Conv2d(3, 4, 15), torch.zeros(1, 3, 32, 32))


def test_a_mixture_pays_for_the_tokens_that_are_routed() -> None:
    model = deit()
    mine = shiftadd.convert(model, linears="moe").eval()
    found = shiftadd.energy(mine, X)["layers"]
    rows = shiftadd.router_report(mine, X)
    for row in rows:
        size = mine.get_submodule(row.name)
        terms = size.in_features * size.out_features
        multiplied = found.get(f"{row.name}.multiply", {"multiplications": 0})["multiplications"]
        shifted = found.get(f"{row.name}.shift", {"shifts": 0})["shifts"]
        assert (multiplied, shifted) == (row.tokens[0] * terms, row.tokens[1] * terms)
    only = {kind: shiftadd.energy(shiftadd.convert(model, linears=kind), X)["pj"] for kind in ("shift", None)}
    mixed = shiftadd.energy(mine, X)["pj"]
    assert only["shift"]["compute"] < mixed["compute"] < only[None]["compute"]


def test_packed_models_cost_the_same() -> None:
    mine = shiftadd.convert(deit(), linears="shift").eval()
    assert shiftadd.energy(shiftadd.freeze(mine), X)["pj"] == shiftadd.energy(mine, X)["pj"]


def test_the_least_a_dense_layer_moves_is_each_number_once() -> None:
    for work in (Work("multiply", 64, 32, 48), Work("multiply", 3, 16, 8, (3, 3), (16, 16), (16, 16))):
        dram, *_ = movement(work, 32)
        h, w = work.picture
        e, f = work.out_picture
        r, s = work.kernel
        numbers = (
            work.batch * h * w * work.inputs + r * s * work.inputs * work.outputs + work.batch * e * f * work.outputs
        )
        assert dram >= numbers * DRAM * 2 * (1 - 1e-12)
    # One that fits the buffer whole moves no more.
    assert movement(Work("multiply", 16, 16, 16), 32)[0] == pytest.approx(3 * 256 * DRAM * 2)
    # Ten of 16 bits against 32.
    same = movement(Work("shift", 64, 32, 48), 32), movement(Work("multiply", 64, 32, 48), 32)
    assert same[0] == pytest.approx([part * 10 / 32 for part in same[1]])


def test_the_tiling_is_the_best_of_a_search_without_shortcuts() -> None:
    n, c, m = 6, 4, 8

    def divisors(x: int) -> list[int]:
        return [i for i in range(1, x + 1) if x % i == 0]

    best = float("inf")
    for n0 in sorted({*divisors(n), 1, 2, 4}):
        n3 = -(-n // n0)
        for m0 in divisors(m):
            for m1 in divisors(m // m0):
                for m2 in divisors(m // m0 // m1):
                    m3 = m // m0 // m1 // m2
                    for c0 in divisors(c):
                        for c1 in divisors(c // c0):
                            c2 = c // c0 // c1
                            if not (
                                m0 <= 16 and m1 * c1 < 192 and c0 < 12 and n0 * c1 * c0 + n0 * m2 * m1 * m0 < 65536
                            ):
                                continue
                            i, w, o = n * c, c * m, n * m
                            dram = (m3 * i + n3 * w + o) * 200
                            buffer = (m3 * m2 * i + max(2 * (c2 - 1), 1) * o) * 6 * 3.7
                            noc = (m3 * m2 * m1 * i + n3 * w) * 2 * 3.7 + max(c2 * (c1 - 1), 1) * o * 3.7
                            register = (m3 * m2 * m1 * m0 * i + max(c2 * c1 * (c0 - 1) * 2, 1) * o) * 3.7
                            best = min(best, dram + buffer + noc + register + n * w * 2 * 3.7)
    assert sum(movement(Work("multiply", n, c, m), 32)) == pytest.approx(2 * best)


def test_other_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="32 and 8"):
        shiftadd.energy(nn.Linear(2, 2), torch.zeros(1, 2), bits=16)
    with pytest.raises(TypeError, match="accumulations"):
        shiftadd.energy(nn.Linear(2, 2), torch.zeros(1, 2), accumulations=1)
