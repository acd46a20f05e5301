"""What the claim file compares is what it says, and what it measures is there."""

from __future__ import annotations

import math

import pytest
import torch
from benchmarks.apriori_conv_costs import Speed, peak, tensorly_net
from benchmarks.apriori_conv_trainings import (
    CLEAN,
    FEW,
    FULL,
    KINDS,
    RATES,
    SEEDS,
    SMALL,
    TRAINED,
    Decoded,
    Ratio,
    Run,
    best,
    build,
    count,
    depthwise_width,
    of,
    ratio,
    rolled,
)
from benchmarks.claim_apriori_conv import (
    accuracy_claims,
    decoder_claim,
    overfitting_claim,
    shown,
    traffic_claims,
    worst,
)
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


ERRORS = {"cp24": 0.1, "dense": 0.1, "dense8": 0.4, "dense9": 0.4, "depthwise": 0.3}


def made(factors: dict[str, float], scatter: float = 0.0) -> list[Run]:
    """Runs of all kinds; errors of cp, R = 24, are multiplied by factors for each figure, more in odd seeds."""
    found = []
    for training, kinds in TRAINED.items():
        for kind in kinds:
            for seed in SEEDS:
                figures = {}
                for what in ("train", "test", "rollout"):
                    more = factors.get(what, 1) * (1 + scatter * (-1) ** seed) if kind == "cp24" else 1
                    figures[what] = more * ERRORS.get(kind, 0.2)
                found.append(Run(kind, training, seed, count(build(kind, 0)), **figures, diverged=0.0))
    return found


def test_small_networks_are_interpolated_on_both_logarithms() -> None:
    sizes = {"cp24": 400, "dense8": 200, "dense9": 800}
    runs = [
        Run(kind, FULL, seed, sizes[kind], error, 2 * error, 3 * error, 0.0)
        for kind, error in (("cp24", 0.1), ("dense8", 0.4), ("dense9", 0.1))
        for seed in range(3)
    ]
    assert of(runs, "small", "train") == pytest.approx([0.2] * 3)
    assert ratio(runs, "cp24", "small", "test").mean == pytest.approx(0.5)
    assert runs[0].gap == pytest.approx(0.1)


def test_ratios_are_geometric_and_a_bar_is_met_by_the_whole_interval() -> None:
    one = Ratio.of([1.0, 100.0, 1.0], [10.0, 10.0, 1.0])
    assert one.mean == pytest.approx(1)
    assert one.low * one.high == pytest.approx(1)
    assert Ratio.of([2.0, 2.0], [1.0, 1.0]).below(2.01) == "held"
    # Students t: the interval of 1 and 1.2 reaches far above.
    assert Ratio.of([1.0, 1.2], [1.0, 1.0]).within(1.15) == "partly held"
    assert Ratio.of([0.7, 1.0], [1.0, 1.0]).below(1) == "not held"
    assert Ratio.of([1.3, 1.31], [1.0, 1.0]).within(1.15) == "not held"
    assert Ratio.of([1e300, 1e300], [1e-300, 1e-300]).within(1.15) == "not held"
    broken = Ratio.of([0.1, math.inf, 0.1], [1.0, 1.0, 1.0])
    assert broken.within(1.15) == "not held"
    assert (broken.below(1), str(broken)) == ("not held", "diverged in 1 of 3 seeds")


def test_equivalence_is_held_by_evidence_alone_for_one_step_and_rollouts_apart() -> None:
    def verdicts(factors: dict[str, float], scatter: float = 0.0) -> list[str]:
        return [claim.verdict for claim in accuracy_claims(made(factors, scatter))]

    assert verdicts({}) == ["held"] * 6
    assert verdicts({"rollout": 1.3}) == ["held", "not held", "held", "held", "held", "held"]
    assert verdicts({"test": 1.1}, scatter=0.2)[0] == "partly held"


def test_a_verdict_that_needs_noise_says_so() -> None:
    runs = [
        Run(run.kind, run.training, run.seed, run.parameters, run.train, run.test, 1e6, 1.0)
        if run.kind == "cp24" and run.training == CLEAN
        else run
        for run in made({})
    ]
    rollout = accuracy_claims(runs)[1]
    assert rollout.verdict == "partly held"
    assert "holds with noise and does not without" in rollout.reason
    assert "cp, R = 24 0% with noise and 100% without" in rollout.reason
    assert "without. " not in accuracy_claims(made({}))[1].reason


def test_a_training_that_breaks_off_is_not_held_and_breaks_nothing() -> None:
    runs = [
        Run(run.kind, run.training, run.seed, run.parameters) if run.kind == "cp24" and run.seed == 1 else run
        for run in made({})
    ]
    assert [claim.verdict for claim in accuracy_claims(runs)] == ["not held"] * 6
    assert "diverged in 1 of 5 seeds" in accuracy_claims(runs)[0].ours
    assert overfitting_claim(runs).verdict == "not held"
    assert "diverged in 1 of 5" in shown(of(runs, "cp24", "test", FEW))
    assert shown([math.inf, math.inf]) == "diverged in 2 of 2"


def test_overfitting_is_reduced_where_the_gap_is_smaller_beyond_its_interval() -> None:
    assert overfitting_claim(made({"test": 1.5, "train": 1.5})).verdict == "not held"
    lower = [Run(run.kind, run.training, run.seed, 1, 0.1, 0.15 + 0.1 * (run.kind == "dense"), 0.1) for run in made({})]
    assert overfitting_claim(lower).verdict == "held"


def test_decoders_are_judged_by_their_interval_and_rates_at_an_edge_are_told() -> None:
    dense = Decoded(300, RATES[1], [0.1, 0.1, 0.1])
    even = decoder_claim({True: Decoded(100, RATES[-1], [0.1, 0.1, 0.1]), False: dense})
    assert even.verdict == "held"
    assert "tried: compressed." in even.reason
    assert decoder_claim({True: Decoded(100, RATES[1], [0.1, 0.11, 0.13]), False: dense}).verdict == "partly held"
    broken = decoder_claim({True: Decoded(100, RATES[1], [0.1, math.inf, 0.1]), False: dense})
    assert (broken.verdict, broken.reason) == ("not held", "")


def test_parts_of_a_claim_are_joined() -> None:
    assert worst("held", "held") == "held"
    assert worst("held", "not held") == worst("held", "partly held") == "partly held"
    assert worst("partly held", "partly held") == "partly held"
    assert worst("not held", "partly held") == worst("not held", "not held") == "not held"


def test_learning_rates_at_half_the_training_are_those_of_the_whole() -> None:
    half = next(training for training in TRAINED if training.steps < FULL.steps)
    rates = {("cp24", FULL): dict(zip(RATES, (0.3, 0.1, math.inf, 0.2), strict=True))}
    assert best(rates, "cp24", FULL) == best(rates, "cp24", half) == RATES[1]


def test_rollouts_that_leave_all_numbers_are_counted() -> None:
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 1e30 * x[:, :1]

    u = torch.randn(2, 42, 4, 4)
    assert rolled(Wrong(), u) == (math.inf, 1.0)
    error, share = rolled(ap.WaveStepper(2), torch.ones(2, 42, 4, 4))
    assert math.isfinite(error)
    assert 0 <= share <= 1


def test_both_sides_of_a_time_are_in_the_faster_memory_format() -> None:
    forward = {"dense": 4.0, "dense, channels last": 2.0, "cp": 1.0, "cp, fused": 0.1, "tensorly-torch": 5.0,
               "tensorly-torch, channels last": 4.0}  # fmt: skip
    found = Speed(24, 5, forward, {name: 2 * seconds for name, seconds in forward.items()} | {"cp": 1.0}, 0.1)
    assert found.of("cp", "dense") == 0.5
    assert found.of("cp", "tensorly-torch") == 0.25
    assert found.of("cp", "dense", training=True) == 0.25


def test_traffic_of_parameters_and_activations_is_judged_apart() -> None:
    class Sheet:
        def __init__(self, streamed: int, total: int | None) -> None:
            self.streamed_bytes, self.off_chip_bytes = streamed, total

    def verdicts(dense: Sheet, cp: Sheet) -> list[str]:
        return [claim.verdict for claim in traffic_claims(dense, cp, [10, 10])]

    assert verdicts(Sheet(100, 150), Sheet(10, 60)) == ["held", "not held"]
    assert verdicts(Sheet(100, 100), Sheet(10, 10)) == ["held", "not held"]
    assert verdicts(Sheet(100, 150), Sheet(10, None)) == ["not held", "not held"]


def test_recomputation_needs_no_more_memory_than_the_dense_network_and_keeping_does() -> None:
    x, y = torch.randn(8, 2, 32, 32), torch.randn(8, 1, 32, 32)
    dense = build("dense", 0)
    found = {
        "dense": peak(dense, x, y),
        "kept": peak(ap.compress(dense, rank=24), x, y),
        "recomputed": peak(ap.compress(dense, rank=24, recompute=True), x, y),
    }
    assert found["recomputed"][0] < 0.2 * found["dense"][0]
    assert found["recomputed"][1] <= 1.001 * found["dense"][1]
    assert sum(found["recomputed"]) <= sum(found["dense"])
    assert found["kept"][1] > found["recomputed"][1]
