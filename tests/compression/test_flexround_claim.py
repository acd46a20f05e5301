"""The claims about FlexRound: what they compare, and verdicts that follow from the figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from benchmarks.claim_flexround import Times, compared, parts, reached
from benchmarks.flexround_costs import blocks, stepper, tokens
from benchmarks.flexround_trainings import (
    AHEAD,
    PENALTIES,
    RATES,
    SEEDS,
    TUNING,
    DepthwiseNet,
    Outcome,
    Setting,
    grid,
    tuned,
)
from torch import nn

from benchmarks import flexround_trainings
from retensor.replacing import fold_norms


def outcomes(errors: Sequence[float], blocks: tuple[float, ...] = (0.1,) * 6, beyond: float = 0.0) -> list[Outcome]:
    return [Outcome(error, 0.9, 0.95, blocks, (beyond,) * 6) for error in errors]


def test_times_are_geometric_means_over_pairs_with_an_interval() -> None:
    ours, theirs = [1.0, 2.0, 4.0], [3.0, 5.0, 11.0]
    gain = Times.lower(ours, theirs)
    assert math.exp(gain.mean.mean) == pytest.approx((3 * 2.5 * 2.75) ** (1 / 3))
    assert gain.above(2)
    assert not gain.above(2.7)
    assert Times.higher(ours, theirs).below(0.5)
    assert str(Times.lower([1.0, 1.0], [2.0, 2.0])) == "2 times (2 to 2)"


@pytest.mark.parametrize(
    ("theirs", "verdicts"),
    [
        ({"rtn": 20.0, "adaround": 4.0, "adaquant": 1.5}, ["held", "held", "held"]),
        ({"rtn": 5.0, "adaround": 1.5, "adaquant": 0.5}, ["partly held", "partly held", "not held"]),
        ({"rtn": 0.5, "adaround": 0.5, "adaquant": 1.0}, ["not held", "not held", "not held"]),
    ],
)
def test_a_verdict_is_the_intervals(theirs: dict[str, float], verdicts: list[str]) -> None:
    noise = [1.0, 1.01, 0.99, 1.0]
    found = {"flexround": outcomes([1.0, 1.0, 1.0, 1.0])}
    found |= {name: outcomes([value * part for part in noise]) for name, value in theirs.items()}
    claims = compared("vit", 3, found)
    assert [claim.verdict for claim in claims] == verdicts
    assert all(bool(claim.reason) == (claim.verdict != "held") for claim in claims)


def test_parts_help_where_most_blocks_are_worse_without_them() -> None:
    whole, fixed = Setting("vit", 3, "flexround"), Setting("vit", 3, "flexround", learn_step=False)
    alone = Setting("vit", 3, "flexround", scales=False)
    # The first unit and the last are no blocks.
    better, worse = (0.5, 0.2, 0.2, 0.2, 0.2, 0.5), (0.1, 0.3, 0.3, 0.3, 0.1, 0.1)
    found = {whole: outcomes([1.0, 1.1], better), fixed: outcomes([2.0, 2.1], worse), alone: outcomes([1.0, 1.2])}
    claims = parts("vit", 3, found, [fixed, alone])
    assert [claim.verdict for claim in claims] == ["held", "not held"]
    assert "75% of 8 blocks" in claims[0].ours


def test_codes_beyond_both_neighbours_count_where_adaround_reaches_none() -> None:
    none, some = outcomes([1.0, 1.0]), outcomes([1.0, 1.0], beyond=0.02)
    for ours, theirs, wanted in ((some, none, "held"), (none, none, "not held"), (some, some, "not held")):
        claim = reached("cnn", {"flexround": ours, "adaround": theirs, "adaquant": some}, 1)
        assert claim.verdict == wanted


def test_every_method_has_as_many_rates_and_the_best_on_the_tuning_seed_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert TUNING not in SEEDS
    assert {len(rates) for ways in RATES.values() for rates in ways.values()} == {3}
    settings = [Setting("vit", 3, name) for name in ("flexround", "adaround", "rtn")]
    assert [len(grid(setting)) for setting in settings] == [3, 3 * len(PENALTIES), 1]
    assert len(grid(Setting("vit", 3, "adaquant"))) == 3 * len(AHEAD)
    seen: list[tuple[int, Setting, bool]] = []

    def run(seed: int, setting: Setting, judged: bool) -> Outcome:
        seen.append((seed, setting, judged))
        best = RATES["vit", 3][setting.method][1]
        return outcomes([abs(setting.lr - best) + setting.regularisation])[0]

    def here(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *_: Any) -> list[Any]:
        return [function(*job) for job in jobs]

    monkeypatch.setattr(flexround_trainings, "on_all_cores", here)
    best = tuned(run, {TUNING: (), 1: ()}, settings, print, "rates")
    assert {setting.method: choice.lr for setting, choice in best.items()} == {
        "flexround": RATES["vit", 3]["flexround"][1], "adaround": RATES["vit", 3]["adaround"][1], "rtn": 0.0,
    }  # fmt: skip
    assert best[settings[1]].regularisation == min(PENALTIES)
    assert all(seed == TUNING and not judged for seed, _, judged in seen)
    assert replace(best[settings[0]], lr=0.0) == settings[0]


def test_further_rates_are_tried_where_the_best_is_at_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = max(RATES["vit", 3]["flexround"]) * 10**0.5
    seen: list[float] = []

    def run(seed: int, setting: Setting, judged: bool) -> Outcome:
        seen.append(setting.lr)
        if setting.lr > 1.1 * wanted:
            raise RuntimeError("the loss of '0' is nan at step 1; take a lower learning rate")
        return outcomes([abs(math.log(setting.lr / wanted))])[0]

    monkeypatch.setattr(
        flexround_trainings, "on_all_cores", lambda function, jobs, *_: [function(*job) for job in jobs]
    )
    setting = Setting("vit", 3, "flexround")
    best = tuned(run, {TUNING: ()}, [setting], print, "rates")
    assert best[setting].lr == pytest.approx(wanted)
    assert len(seen) == 4

    def broken(*_: Any) -> Outcome:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        tuned(broken, {TUNING: ()}, [setting], print, "rates")


def test_networks_of_the_claims_fold_and_step() -> None:
    net = fold_norms(DepthwiseNet(4, 1), example=torch.zeros(2, 1, 8, 8))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert net(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    assert blocks(32, 2)(tokens(32, 4, 3)).shape == (3, 4, 32)
    for method in ("flexround", "adaround"):
        stepper(method, 32, 4, 2)()
