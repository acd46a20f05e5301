"""The claims about Weight Compander: their data, their arithmetic, and verdicts that follow the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import benchmarks.claim_weight_compander as claim
import benchmarks.weight_compander_trainings as trainings
import pytest
import torch
from benchmarks.claim_weight_compander import (
    LIMIT,
    Trainee,
    accuracy_claims,
    cost_claims,
    learned_claims,
    peak,
    pictures,
    resnet,
)
from benchmarks.measuring import Times, allocated
from benchmarks.weight_compander_trainings import (
    BASE,
    COMPANDED,
    CONTROLS,
    LEARNED,
    MLP,
    Arm,
    Outcome,
    Runs,
    Setting,
    digits,
    gain,
    share_of_cap,
    train,
)
from torch import nn

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


def test_the_bound_is_judged_against_the_cap_of_the_step_for_learned_pairs_too() -> None:
    model = wc.apply(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), learn=True)
    with torch.no_grad():
        model[1].parametrizations.weight.original.fill_(1e6)
        model[1].parametrizations.weight[0].shift_a.fill_(0.1)
    assert share_of_cap(model) == pytest.approx(1, rel=1e-6)
    with torch.no_grad():
        model[0].parametrizations.weight.original.zero_()
        model[1].parametrizations.weight.original.fill_(0.2)
    assert share_of_cap(model) == pytest.approx(0.5)
    assert share_of_cap(nn.Sequential(nn.Linear(2, 2))) == 0
    found = train(MLP, LEARNED[2], 0)
    assert found.a > 0.31
    assert 0.5 < found.over < 1


def test_trainings_on_all_cores_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(lambda _: None)
    runs.submit((MLP, arm, (3, 4)) for arm in (BASE, COMPANDED[0]))
    monkeypatch.setattr(trainings, "on_all_cores", None)
    assert runs(MLP, COMPANDED[0], (4,)) == [train(MLP, COMPANDED[0], 4)]
    assert runs.over == max(outcome.over for outcome in runs(MLP, COMPANDED[0], (3, 4)))


def in_one_process(function: Callable[..., Outcome], jobs: Sequence[tuple[Any, ...]], *_: object) -> list[Outcome]:
    return [function(*job) for job in jobs]


def test_verdicts_follow_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def verdicts(
        gain: float, over: float = 0.9, kurtosis: float = 3.0, *, noise: float = 0.001, begun: float = 0.0,
        near: float = 0.1,
    ) -> list[str]:  # fmt: skip
        def faked(setting: Setting, arm: Arm, seed: int) -> Outcome:
            jitter = noise * (seed % 2)
            if arm.start is not None:
                return outcome(0.85 + begun + jitter, near=near)
            if arm.pair is None:
                return outcome(0.85 + jitter)
            return outcome(0.85 + gain - jitter, largest=0.3, near=0.05, kurtosis=kurtosis, over=over)

        monkeypatch.setattr(trainings, "on_all_cores", in_one_process)
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
    # So much chance that a loss of half a point and more is not excluded.
    assert verdicts(0.0202, noise=0.02)[3] == "partly held"
    # All of the gain is that of the initial weights; all of the weights away from zero are.
    assert verdicts(0.01, begun=0.01)[0] == "partly held"
    assert verdicts(0.01, near=0.05)[:2] == ["held", "partly held"]
    assert verdicts(0.01, over=1.1)[1] == "not held"
    assert verdicts(0.01, kurtosis=5.0)[1] == "partly held"


def test_a_pair_that_ran_away_leaves_no_figure_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def faked(setting: Setting, arm: Arm, seed: int) -> Outcome:
        return outcome(0.0, a=1e-30, b=math.nan, largest=math.nan) if arm is LEARNED[0] else outcome(0.8)

    monkeypatch.setattr(trainings, "on_all_cores", in_one_process)
    monkeypatch.setattr(trainings, "train", faked)
    claims, (table,) = learned_claims(Runs(lambda _: None))
    assert "at x1: 16" in claims[0].ours
    assert table.rows[0][-2:] == ("none", "none")
    assert table.rows[2][-1] == pytest.approx(0.6)


def test_kept_weights_cost_their_size_and_recomputed_ones_none_of_it() -> None:
    pytest.importorskip("timm")
    plain = resnet()
    sizes = [4 * p.numel() for p in plain.parameters() if p.ndim > 1]
    base = peak(Trainee(plain), 16)
    x, _ = pictures(16)
    for learn in (False, True):
        companded = wc.apply(plain, learn=learn)
        kept, recomputed = Trainee(companded), Trainee(companded, wc.recomputed)
        assert base < peak(recomputed, 16) <= LIMIT * base
        assert peak(kept, 16) <= base + sum(sizes)

        def forward(trainee: Trainee) -> torch.Tensor:
            with trainee.around():
                out = trainee.model(x)
            # The peak is now: what the graph of the output holds, and this.
            torch.empty(2 * max(sizes), dtype=torch.uint8)
            return out

        apart = [allocated(lambda trainee=trainee: forward(trainee)) for trainee in (kept, recomputed)]
        assert apart[0] - apart[1] == sum(sizes)


def costs(monkeypatch: pytest.MonkeyPatch, times_of: dict[str, float], bytes_of: dict[str, int]) -> str:
    names = ("plain", "WC", "WC, recomputed", "WC learned", "WC learned, recomputed", "weight_norm")
    monkeypatch.setattr(claim, "trainees", lambda: {name: FakeTrainee(name) for name in names})
    monkeypatch.setattr(claim, "peak", lambda trainee, _: bytes_of.get(trainee.name, 100))
    monkeypatch.setattr(
        claim, "times", lambda calls, _: Times({name: [times_of.get(name, 1.0)] for name in calls})
    )  # fmt: skip
    return cost_claims(lambda _: None)[0][0].verdict


@dataclass
class FakeTrainee:
    name: str

    def step(self, x: torch.Tensor, y: torch.Tensor) -> None: ...


def test_cost_holds_only_where_one_mode_is_within_both_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert costs(monkeypatch, {"WC": 1.05}, {"WC": 109}) == "held"
    slow = {"WC": 1.2, "WC, recomputed": 1.3}
    assert costs(monkeypatch, slow, {"WC": 130, "WC, recomputed": 109}) == "partly held"
    assert costs(monkeypatch, {**slow, "WC": 1.05}, {"WC": 130, "WC, recomputed": 109}) == "partly held"
    assert costs(monkeypatch, slow, {"WC": 130, "WC, recomputed": 120}) == "not held"
