"""The claims about APHQ-ViT: what they compare, and verdicts that follow from the figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from benchmarks.aphq_vit_trainings import (
    LEARNED,
    METHODS,
    NAMES,
    SEEDS,
    SQUARES,
    TUNING,
    Outcome,
    Run,
    pictures,
    put,
    split,
)
from benchmarks.claim_aphq_vit import (
    ASIDE,
    MLP_RATES,
    ORDER,
    PAPER,
    RATES,
    averaging,
    compared,
    curvatures,
    listed,
    peers,
    smoothing,
    tuned,
)
from torch import nn

from benchmarks import aphq_vit_trainings, claim_aphq_vit
from retensor.compression import aphq
from retensor.data.reference import digits_vit
from retensor.quantizing import QuantizedLayer

SPREAD = (1.0, 1.02, 0.98, 1.0)


def runs(kl: dict[str, float], fitted: float = 0.94, swapped: float = 0.8, each: float = 2.0) -> list[Run]:
    return [
        Run(
            0.95,
            {name: Outcome(kl.get(name, 0.5) * part, 0.9) for name in METHODS},
            {"before": 0.95, "swapped": swapped * part, "fitted": fitted + 0.001 * part, "before tail": 9 * part,
             "swapped tail": 7.0, "fitted tail": 5.0},
            {"aph": 0.001 * part, "each": 0.001 * each, "aph kl": 0.1, "each kl": 0.2 * part},
        )
        for part in SPREAD
    ]  # fmt: skip


def test_verdicts_are_those_of_the_intervals() -> None:
    falling = dict(zip(ORDER, (0.5, 0.4, 0.3, 0.2, 0.1), strict=True))
    claims = compared(3, runs({**falling, "each": 0.2, "hessian": 0.1, "mr+qdrop": 0.3}))
    found = dict(zip([*PAPER, *ASIDE], [claim.verdict for claim in claims], strict=True))
    assert all(found[pair] == "held" for pair in PAPER)
    assert found["each", "aph"] == found["hessian", "aph"] == "not held"
    assert found["mr+qdrop", "mr+aph"] == "held"
    # As good is told from better, and worse is neither.
    same = dict(zip([*PAPER, *ASIDE], compared(3, runs({})), strict=True))
    assert [same[pair].verdict for pair in PAPER] == ["not held", "not held", "partly held", "partly held"]
    turned = compared(3, runs(dict(zip(ORDER, (0.1, 0.2, 0.3, 0.4, 0.5), strict=True))))
    assert {claim.verdict for claim in turned[:4]} == {"not held"}
    assert all(bool(claim.reason) == (claim.verdict != "held") for claim in claims + turned)


def test_mlps_averages_and_peers_are_judged_by_their_figures() -> None:
    claims = smoothing(runs({}))
    assert [claim.verdict for claim in claims] == ["held", "held"]
    assert smoothing(runs({}, swapped=0.95))[0].verdict == "partly held"
    assert smoothing(runs({}, fitted=0.9))[0].verdict == "not held"
    assert averaging(runs({})).verdict == "held"
    assert averaging(runs({}, each=0.5)).verdict == "not held"
    found = [{"whole": 0.95, "ours": ours, "torchao": 0.95, "onnxruntime": 0.94} for ours in (0.949, 0.9495, 0.95)]
    assert [claim.verdict for claim in peers(found)[0]] == ["held", "held"]
    assert peers([{**each, "ours": 0.9} for each in found])[0][0].verdict == "not held"
    estimates = [
        {"signs, float32": part, "8 draws, float32": 0.95, "ones, 1e-6, float32": 0.8,
         "ones beside signs, float64": less}
        for part, less in ((0.9, 1e-12), (0.91, 1e-11), (0.92, 1e-12))
    ]  # fmt: skip
    assert [claim.verdict for claim in curvatures(estimates)[0]] == ["held", "held"]
    worse = [{**each, "signs, float32": 0.7, "ones beside signs, float64": 0.1} for each in estimates]
    assert [claim.verdict for claim in curvatures(worse)[0]] == ["not held", "not held"]


def test_every_method_has_the_same_rates_on_a_network_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TUNING not in SEEDS
    assert set(NAMES) == set(METHODS)
    asked: list[tuple[Any, ...]] = []

    def tried(
        _: Any, seed: int, bits: int, lr: float, start: float | None, mlp_lr: float, names: Sequence[str]
    ) -> dict[str, float]:
        asked.append((seed, bits, lr, mlp_lr))
        # Squares alone are tried as they are, and one of them is better so.
        assert start is not None or set(names) == set(SQUARES)
        return {
            name: abs(lr - (RATES[2] if name == "qdrop" else RATES[1]))
            - mlp_lr
            + (0.1 if (start is None) == (name != "brecq") else 0.0)
            for name in names
        }

    def here(function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], *_: Any) -> list[Any]:
        return [function(*job) for job in jobs]

    monkeypatch.setattr(claim_aphq_vit, "on_all_cores", here)
    monkeypatch.setattr(claim_aphq_vit, "tried", tried)
    rates, mlp_rate = tuned({}, print)
    assert mlp_rate == MLP_RATES[-1]
    assert rates == {
        name: (RATES[2] if name == "qdrop" else RATES[1], None if name == "brecq" else 2.0) for name in LEARNED
    }
    assert {lr for _, _, lr, mlp in asked if mlp == MLP_RATES[0]} == set(RATES)
    assert {seed for seed, *_ in asked} == {TUNING}
    shown = listed(3, runs({}), rates)
    assert [row[0] for row in shown.rows[1:]] == list(NAMES.values())


def test_pictures_that_choose_are_not_those_that_fit() -> None:
    seen, others = split(3)
    assert not set(seen.tolist()) & set(others.tolist())
    assert len(seen) == len(others)
    assert pictures().test.shape[1:] == (1, 8, 8)


def test_methods_of_one_kind_share_what_is_searched_and_differ_in_what_they_learn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"ITERS": 3, "MLP_ITERS": 2}.items():
        monkeypatch.setattr(aphq_vit_trainings, name, value)
    monkeypatch.setattr(aphq_vit_trainings, "COMMON", {"calib": 16, "recon": 32, "batch": 16, "rounds": 0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = digits_vit(16, 1).eval()
    x = pictures().x[:32]
    found = put(net, x, 3, dict.fromkeys(METHODS, (0.1, 2.0)), 1e-3, tuple(METHODS), 0)

    def steps(few: aphq.Quantized) -> list[torch.Tensor]:
        return [module.scale for module in few.model.modules() if isinstance(module, QuantizedLayer)]

    for name, few in found.items():
        mlp = name.startswith("mr")
        assert all(map(torch.equal, steps(few), steps(found["mr+rtn" if mlp else "rtn"])))
        assert isinstance(few.model.blocks[0].mlp.act, aphq.ReLU if mlp else nn.GELU)
        moved = sum(share for unit in few.report for share in unit.found["moved"].values())
        assert (moved > 0) == (name in LEARNED), name
    outputs = [few(x).detach() for few in found.values()]
    assert not any(torch.equal(one, other) for i, one in enumerate(outputs) for other in outputs[:i])
