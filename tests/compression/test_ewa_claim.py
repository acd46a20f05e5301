"""The claims about averaged experts: paired runs, and verdicts that follow from the figures."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from benchmarks.claim_ewa import Costs, report
from benchmarks.ewa_trainings import (
    APART,
    CONTROL,
    COPIES,
    DECAYS,
    DIGITS,
    EARLY,
    MAIN,
    MNIST,
    RATES,
    ROUTED,
    SEEDS,
    VANILLA,
    Key,
    Run,
    begun,
    data_of,
    run,
    trained,
)
from torch import nn

from benchmarks import claim_ewa, ewa_trainings
from retensor.claims import Report
from retensor.compression import ewa

COSTS = Costs(1.1, 1.1, 1.4, 1.0, (1.0, 1.0), 1.0, ((4, 128, 0.1),), (100, 30, 30), (60, 60))
SHEET = SimpleNamespace(parameters=9, macs=9, off_chip_bytes=9, activation_peak_bytes=9, m_r_bytes=9)
BOTH = SimpleNamespace(names=("before", "after"), sheets=(SHEET, SHEET))


def reported(points: dict[object, float], cost: Costs = COSTS) -> Report:
    """A report of made-up runs: seeds differ by a point, settings by what is given, folding without averages by two."""
    best = {name: rates[0] for name, rates in RATES.items()}
    runs: dict[Key, Run] = {}
    for name, settings in (("digits", DIGITS), ("mnist5k", MNIST), ("tune", (VANILLA, COPIES))):
        for setting in settings:
            for seed in SEEDS:
                test = 80.0 + seed + points.get(setting, 0.0) + 0.1 * (seed % 2) * bool(points.get(setting))
                ensemble = test + 2 + 0.1 * (seed % 2) if setting == APART else test
                is_one = setting.kind == "experts"
                ema = tuple(80.0 + seed for _ in DECAYS) if setting == VANILLA else ()
                runs[name, setting, seed, best[name]] = Run(
                    test, 100.0, 0.5, ensemble if is_one else None, 0.1 if is_one else None, ema
                )
    return report(runs, best, cost, BOTH)


def test_verdicts_follow_from_the_figures() -> None:
    better = reported(dict.fromkeys((*ewa_trainings.EWAS, COPIES, EARLY), 1.0))
    assert [claim.verdict for claim in better.claims] == ["held"] * len(better.claims)
    worse = reported(dict.fromkeys((*ewa_trainings.EWAS, COPIES, EARLY), -1.0))
    accuracy = [c for c in worse.claims if "against" in c.ours and "%" in c.ours]
    assert len(accuracy) == 8
    assert {claim.verdict for claim in accuracy} == {"not held"}
    assert all(claim.reason for claim in accuracy)
    control = reported({CONTROL: 2.0, MAIN: 1.0})
    verdicts = {claim.baseline.split(":")[0]: claim.verdict for claim in control.claims}
    assert verdicts["vanilla"] != "not held"
    assert verdicts["the control"] == "not held"
    slow = reported({}, Costs(1.3, 1.1, 1.2, 1.2, (2.0, 1.0), 2.0, ((4, 128, 0.1),), (100, 31, 30), (60, 60)))
    assert [claim.verdict for claim in slow.claims[-5:]] == [
        "not held", "not held", "not held", "not held", "partly held",
    ]  # fmt: skip


def test_settings_of_a_seed_begin_with_the_same_values() -> None:
    models = {setting: begun(setting, 3, 8) for setting in (VANILLA, CONTROL, MAIN, ROUTED)}
    network = "blocks.1.mlp"
    outside = [name for name in models[VANILLA].state_dict() if network not in name]
    for model in models.values():
        assert all(torch.equal(model.state_dict()[name], models[VANILLA].state_dict()[name]) for name in outside)
    experts = models[MAIN].get_parameter(f"{network}.fc1.weight")
    assert torch.equal(experts[0], models[VANILLA].get_parameter(f"{network}.fc1.weight"))
    assert torch.equal(experts, models[ROUTED].get_parameter(f"{network}.fc1.weight"))
    assert torch.equal(experts.mean(0), models[CONTROL].get_parameter(f"{network}.fc1.weight"))
    # Four draws, not copies: their mean has half the spread.
    assert float(experts.mean(0).std() / experts.std()) == pytest.approx(0.5, abs=0.05)


def test_settings_of_a_seed_see_the_same_pictures_in_the_same_order() -> None:
    data = data_of("digits", 2)
    seen = {}
    for setting in (VANILLA, MAIN, ROUTED):
        model = begun(setting, 2, 8)
        batches: list[torch.Tensor] = []
        handle = model.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[0]))
        trained(model, setting, data, 2, 1e-3, 12)
        handle.remove()
        seen[setting] = batches[:12]
    for batches in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(batches, seen[VANILLA], strict=True))


def test_a_run_trains_and_folds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ewa_trainings, "STEPS", 30)
    found = run(("digits", MAIN, 0, 4e-3))
    assert 10 < found.test <= 100
    assert found.spread is not None
    assert found.spread < 0.5
    assert found.ensemble == pytest.approx(found.test, abs=1)
    plain = run(("digits", VANILLA, 0, 4e-3))
    assert len(plain.ema) == len(DECAYS)
    assert plain.ensemble is None


def test_moments_are_counted() -> None:
    model = ewa_trainings.made(0, 8)
    parameters = sum(p.numel() for p in model.parameters())
    assert claim_ewa._moments(model) == 2 * parameters
    experts: nn.Module = ewa.convert(model, 4)
    grown = 3 * sum(p.numel() for p in model.blocks[1].mlp.parameters())
    assert claim_ewa._moments(experts) == 2 * (parameters + grown)
