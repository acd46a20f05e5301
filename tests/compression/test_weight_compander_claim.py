"""The claims about Weight Compander: their data, their arithmetic, and verdicts that follow the figures."""

from __future__ import annotations

from dataclasses import replace

import benchmarks.weight_compander_trainings as trainings
import pytest
import torch
from benchmarks.claim_weight_compander import LIMIT, Trainee, accuracy_claims, learned_claims, peak, resnet
from benchmarks.weight_compander_trainings import (
    BASE,
    COMPANDED,
    CONTROLS,
    MLP,
    Arm,
    Outcome,
    Runs,
    Setting,
    digits,
    gain,
    train,
)

from retensor.compression import weight_compander as wc


def outcome(accuracy: float, **others: float) -> Outcome:
    return replace(Outcome(accuracy, 0.6, 0.1, 6.0, 0.0, 0.0, 0.0), **others)


def test_a_hundred_stratified_images_train_and_all_others_test() -> None:
    split = digits(3, 0.0)
    assert (len(split.x), len(split.x_test)) == (100, 1697)
    assert all(9 <= int((split.y == label).sum()) <= 11 for label in range(10))
    noisy = digits(3, 0.2)
    assert torch.equal(noisy.x, split.x)
    assert int((noisy.y != split.y).sum()) == 20
    assert int(noisy.y.max()) < 10


def test_arms_of_a_seed_start_and_go_on_alike() -> None:
    one, other = (train(MLP, arm, 0) for arm in (BASE, Arm("linear", (1e4, 1e4))))
    assert one.accuracy == pytest.approx(other.accuracy, abs=2 / 1697)
    assert one.largest == pytest.approx(other.largest, rel=1e-3)


def test_a_clamp_and_a_cap_bound_the_weights() -> None:
    clamp = CONTROLS["a hard clamp"][0]
    assert clamp.clamp is not None
    assert train(MLP, clamp, 0).largest <= clamp.clamp * (1 + 1e-7)
    found = train(MLP, COMPANDED[0], 0)
    assert found.largest == pytest.approx(found.over * 0.3 * torch.pi / 2, rel=0.2)
    assert found.over < 1


def test_gains_are_in_points() -> None:
    apart = gain([outcome(0.5), outcome(0.6), outcome(0.7)], [outcome(0.4), outcome(0.4), outcome(0.4)])
    assert apart.mean == pytest.approx(20)


def test_verdicts_follow_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(gain: float, over: float = 0.9, kurtosis: float = 3.0) -> list[str]:
        def faked(setting: Setting, arm: Arm, seed: int) -> Outcome:
            jitter = 0.001 * (seed % 2)
            if arm.pair is None:
                return outcome(0.85 + jitter)
            return outcome(0.85 + gain - jitter, largest=0.3, near=0.05, kurtosis=kurtosis, over=over)

        monkeypatch.setattr(trainings, "train", faked)
        runs = Runs(lambda _: None)
        claims = accuracy_claims(runs)[0] + learned_claims(runs)[0]
        assert all(found.reason for found in claims if found.verdict != "held")
        return [found.verdict for found in claims]

    assert verdicts(0.01) == ["held"] * 5
    # A loss of a point; of twenty, which is a collapse.
    assert verdicts(-0.01) == ["not held", "held", "not held", "not held", "not held"]
    assert verdicts(-0.2) == ["not held", "held", "not held", "not held", "not held"]
    # No difference but by chance.
    assert verdicts(0.0012) == ["partly held", "held", "partly held", "held", "partly held"]
    assert verdicts(0.01, over=1.1)[1] == "not held"
    assert verdicts(0.01, kurtosis=5.0)[1] == "partly held"


def test_recomputed_training_stays_within_the_limit_of_memory_and_kept_weights_cost_their_size() -> None:
    pytest.importorskip("timm")
    plain = resnet()
    nbytes = sum(4 * p.numel() for p in plain.parameters() if p.ndim > 1)
    base = peak(Trainee(plain), 16)
    recomputed = peak(Trainee(wc.apply(plain), wc.recomputed), 16)
    learned = peak(Trainee(wc.apply(plain, learn=True), wc.recomputed), 16)
    kept = peak(Trainee(wc.apply(plain)), 16)
    assert base < recomputed <= LIMIT * base
    assert learned <= LIMIT * base
    assert LIMIT * base < kept < base + nbytes
