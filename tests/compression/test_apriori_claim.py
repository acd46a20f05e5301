"""What the claim file compares is what it says, and what it measures is there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from benchmarks.apriori_conv_costs import peak, tensorly_net
from benchmarks.apriori_conv_trainings import KINDS, SMALL, Run, build, count, depthwise_width, of, ratio
from benchmarks.claim_apriori_conv import clearly_below, within
from benchmarks.measuring import Mean
from torch import nn

from retensor.compression import apriori as ap


def test_networks_of_one_size_are_of_one_size() -> None:
    sizes = {kind: count(build(kind, 0)) for kind in KINDS}
    assert sizes["dense"] == 30_097
    assert sizes["cp24"] == 3_745
    assert sizes["cp12"] == 1_921
    assert sizes[f"dense{SMALL[0]}"] < sizes["cp24"] < sizes[f"dense{SMALL[1]}"]
    for kind in ("depthwise", "vh", "tucker", "tt"):
        assert sizes[kind] == pytest.approx(sizes["cp24"], rel=0.1), kind
    assert depthwise_width() > 24
    x = torch.randn(1, 2, 32, 32)
    for kind in KINDS:
        assert build(kind, 0)(x).shape == (1, 1, 32, 32)
        convolutions = [layer for layer in build(kind, 0).body if not isinstance(layer, nn.ReLU)]
        assert len(convolutions) == 3


def test_the_peer_has_the_parameters_of_the_compressed_network() -> None:
    pytest.importorskip("tltorch")
    peer = tensorly_net(24, 5, 24)
    # Its components have a weight each besides.
    assert count(peer) == 3_745 + 3 * 24
    assert peer(torch.randn(1, 2, 9, 9)).shape == (1, 1, 9, 9)


def runs() -> list[Run]:
    return [
        Run(kind, 30, seed, size, error, 2 * error, 3 * error)
        for kind, size, error in [("cp24", 400, 0.1), ("dense8", 200, 0.4), ("dense9", 800, 0.1), ("dense", 3000, 0.05)]
        for seed in range(3)
    ]


def test_small_networks_are_interpolated_on_both_logarithms_and_pairs_are_of_one_seed() -> None:
    assert of(runs(), "small", 30, "train") == pytest.approx([0.2] * 3)
    found = ratio(runs(), "cp24", "dense", "test")
    assert (found.mean, found.half) == pytest.approx((2, 0))
    assert runs()[0].gap == pytest.approx(0.1)


def test_verdicts_follow_the_figures() -> None:
    def judged(rule: Callable[[Mean, float], str], limit: float, *pairs: tuple[float, float]) -> list[str]:
        return [rule(Mean(mean, half / 2, half), limit) for mean, half in pairs]

    assert judged(within, 1.15, (1.1, 0.4), (1.2, 0.1), (1.2, 0.04)) == ["held", "partly held", "not held"]
    assert judged(clearly_below, 1, (0.8, 0.1), (0.8, 0.4), (1.0, 0.0)) == ["held", "partly held", "not held"]


def test_recomputation_needs_no_more_memory_than_the_dense_network_and_keeping_does() -> None:
    x, y = torch.randn(8, 2, 32, 32), torch.randn(8, 1, 32, 32)
    dense = build("dense", 0)
    found = {
        "dense": peak(dense, x, y),
        "kept": peak(ap.compress(dense, rank=24), x, y),
        "recomputed": peak(ap.compress(dense, rank=24, recompute=True), x, y),
    }
    assert found["recomputed"][0] < 0.2 * found["dense"][0]
    assert found["recomputed"][1] <= 1.05 * found["dense"][1]
    assert sum(found["recomputed"]) <= sum(found["dense"])
    assert found["kept"][1] > found["recomputed"][1]
