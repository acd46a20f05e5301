"""The claims about averaged experts: paired runs, and verdicts that follow from the figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmarks.claim_ewa import Costs, _kept, report
from benchmarks.ewa_trainings import (
    APART,
    COMPARED,
    CONTROL,
    CONTROL_TWO,
    COPIES,
    DECAYS,
    EARLIER,
    EARLY,
    EWAS,
    MAIN,
    ROUTED,
    SCRATCH,
    SEEDS,
    SWA,
    TUNED,
    TUNING_SEEDS,
    VANILLA,
    Key,
    Run,
    Setting,
    Tuning,
    begun,
    data_of,
    kin,
    made,
    run,
    trained,
    tune,
)
from torch import nn

from benchmarks import ewa_trainings
from retensor.claims import Report
from retensor.compression import ewa

COSTS = Costs(1.1, 1.1, 1.4, 1.0, (1.0, 1.0), 1.0, ((4, 128, 0.1),), (30, 30), (100, 105))
SHEET = SimpleNamespace(parameters=9, macs=9, off_chip_bytes=9, activation_peak_bytes=9, m_r_bytes=9)
BOTH = SimpleNamespace(names=("before", "after"), sheets=(SHEET, SHEET))
OURS = (*EWAS, COPIES, EARLY, EARLIER)


def reported(
    points: Mapping[object, float], cost: Costs = COSTS, *, train: float = 100.0, apart: float = 0.0, edge: bool = False
) -> Report:
    """A report of made-up runs: seeds differ by a point, settings by what is given, folding without averages by two."""
    runs: dict[tuple[str, Setting, int], Run] = {}
    for name, settings in COMPARED.items():
        for setting in settings:
            for seed in SEEDS:
                gain = points.get(setting, 0.0)
                test = 80.0 + seed + gain + 0.1 * (seed % 2) * bool(gain)
                ensemble = test + 2 + 0.1 * (seed % 2) if setting == APART else test
                is_one = setting.kind == "experts"
                ema = tuple(80.0 + seed for _ in DECAYS) if setting == VANILLA else ()
                runs[name, setting, seed] = Run(
                    test, train, 0.5, ensemble if is_one else None, apart if is_one else None,
                    0.1 if is_one else None, ema,
                )  # fmt: skip
    tried = {1e-3: 80.0, 2e-3: 79.0} if edge else {1e-3: 79.0, 2e-3: 80.0, 4e-3: 79.0}
    tunings = {
        (name, setting): Tuning(tried, (1.0,) * len(DECAYS)) for name, settings in TUNED.items() for setting in settings
    }
    return report(runs, tunings, cost, BOTH)


def test_verdicts_follow_from_the_figures_and_none_lacks_a_reason() -> None:
    better = reported(dict.fromkeys(OURS, 1.0))
    assert [claim.verdict for claim in better.claims] == ["held"] * len(better.claims)
    worse = reported(dict.fromkeys(OURS, -1.0))
    accuracy = [c for c in worse.claims if "%" in c.ours]
    assert len(accuracy) == 15
    assert {claim.verdict for claim in accuracy} == {"not held"}
    slow = Costs(1.3, 1.1, 1.2, 1.2, (2.0, 1.0), 2.0, ((4, 128, 0.1),), (31, 30), (100, 105))
    costly = reported({}, slow)
    assert [claim.verdict for claim in costly.claims[-5:]] == [
        "not held", "not held", "not held", "not held", "partly held",
    ]  # fmt: skip
    for found in (better, worse, costly, reported({}, replace(COSTS, activations=(100, 120)))):
        assert all(bool(claim.reason) == (claim.verdict != "held") for claim in found.claims)
        assert not any("brief" in text for claim in found.claims for text in vars(claim).values())


def test_the_joint_claim_needs_both_peers_and_a_learned_training_set() -> None:
    def joint(found: Report) -> tuple[str, str]:
        claim = next(c for c in found.claims if "above vanilla and above the control" in c.statement)
        return claim.verdict, claim.reason

    gains = dict.fromkeys(OURS, 1.0)
    assert joint(reported(gains)) == ("held", "")
    assert joint(reported({**gains, CONTROL: 2.0})) == (
        "partly held", "Not above control: FFNs begin as the mean of 4 draws.",
    )  # fmt: skip
    assert joint(reported(gains, train=99.0))[0] == "not held"


def test_the_grid_counts_settings_that_are_above_both_peers_beyond_the_interval() -> None:
    def grid(points: Mapping[object, float]) -> str:
        claim = next(c for c in reported(points).claims if "hang on the share rate" in c.statement)
        return claim.verdict

    gains = dict.fromkeys(OURS, 1.0)
    assert grid(gains) == "held"
    # The control of two draws stands against N = 2 alone.
    assert grid({**gains, CONTROL_TWO: 2.0}) == "partly held"
    assert grid({**gains, CONTROL_TWO: 2.0, CONTROL: 2.0}) == "not held"
    assert grid({}) == "not held"


def test_the_mechanism_needs_equal_logits_not_only_equal_accuracies() -> None:
    def mechanism(apart: float) -> str:
        return next(c for c in reported({}, apart=apart).claims if "foldable" in c.statement).verdict

    assert mechanism(1e-4) == "held"
    assert mechanism(1e-2) == "partly held"


def test_a_best_rate_at_the_edge_is_said() -> None:
    assert not any("at the edge" in claim.setting for claim in reported({}).claims)
    assert "at the edge" in reported({}, edge=True).claims[0].setting


def peaked(best: Mapping[Setting, float]) -> Callable[..., dict[Key, Run]]:
    """Trainings whose accuracy falls with the distance from a setting's best rate."""

    def train(keys: Sequence[Key], _: object) -> dict[Key, Run]:
        found = {}
        for key in keys:
            assert key.tuning
            assert key.seed in TUNING_SEEDS
            far = abs(key.rate / best.get(key.setting, 1.6e-2) - 1)
            found[key] = Run(90.0 - min(50.0, far), 100.0, 0.1, ema=(1.0, 2.0) if key.setting == VANILLA else ())
        return found

    return train


def test_rates_are_tried_until_both_neighbours_of_the_best_are_worse() -> None:
    found = tune(lambda _: None, peaked({VANILLA: 6.4e-2, MAIN: 1e-3, ROUTED: 10.0}))
    assert found["digits", VANILLA].rate == pytest.approx(6.4e-2)
    assert max(found["digits", VANILLA].tried) == pytest.approx(0.128)
    assert found["digits", VANILLA].decays == (1.0, 2.0)
    assert found["digits", MAIN].rate == pytest.approx(1e-3)
    assert min(found["digits", MAIN].tried) == pytest.approx(5e-4)
    assert len(found["digits", CONTROL].tried) == 3
    # Beyond all rates that may be tried, which is said.
    assert found["digits", ROUTED].at_edge
    assert not any(found["digits", setting].at_edge for setting in (VANILLA, MAIN, CONTROL))
    assert all((name, kin(name, setting)) in found for name, settings in COMPARED.items() for setting in settings)


def test_rates_are_chosen_on_pictures_that_are_neither_trained_nor_tested_on() -> None:
    for name in COMPARED:
        data, tuning = (data_of(Key(name, VANILLA, 3, 1e-3, tuning=tuning)) for tuning in (False, True))
        tested = {picture.numpy().tobytes() for picture in data.x_test}
        learned, held = ({picture.numpy().tobytes() for picture in part} for part in (tuning.x, tuning.x_test))
        # Pictures that come twice among thousands of small ones are the same bytes.
        assert len(held & (tested | learned)) <= 2
        assert len(held) >= 200


def test_settings_of_a_seed_begin_with_the_same_values() -> None:
    models = {setting: begun(setting, made(3, 8), 3) for setting in (VANILLA, CONTROL, MAIN, ROUTED)}
    network = "blocks.1.mlp"
    outside = [name for name in models[VANILLA].state_dict() if not name.startswith(("blocks.1.mlp", "blocks.3.mlp"))]
    for model in models.values():
        assert all(torch.equal(model.state_dict()[name], models[VANILLA].state_dict()[name]) for name in outside)
    experts = models[MAIN].get_parameter(f"{network}.fc1.weight")
    assert torch.equal(experts[0], models[VANILLA].get_parameter(f"{network}.fc1.weight"))
    assert torch.equal(experts, models[ROUTED].get_parameter(f"{network}.fc1.weight"))
    assert torch.equal(experts.mean(0), models[CONTROL].get_parameter(f"{network}.fc1.weight"))
    # Four draws, not copies: their mean has half the spread.
    assert float((experts.mean(0).std() / experts.std()).detach()) == pytest.approx(0.5, abs=0.05)


def test_settings_of_a_seed_see_the_same_pictures_in_the_same_order() -> None:
    seen = {}
    for setting in (VANILLA, SWA, MAIN, ROUTED):
        key = Key("digits", setting, 2, 1e-3)
        model = begun(setting, made(2, 8), 2)
        batches: list[torch.Tensor] = []
        handle = model.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[0]))
        trained(model, key, data_of(key), 6)
        handle.remove()
        seen[setting] = batches[:6]
    for batches in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(batches, seen[VANILLA], strict=True))


def test_runs_train_and_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ewa_trainings, "STEPS", dict.fromkeys(ewa_trainings.STEPS, 20))
    ewa_trainings.source.cache_clear()
    found = run(Key("digits", MAIN, 0, 4e-3))
    assert 10 < found.test <= 100
    assert found.spread is not None
    assert found.spread < 0.5
    assert found.ensemble == pytest.approx(found.test, abs=2)
    plain = run(Key("digits", VANILLA, 0, 4e-3))
    assert len(plain.ema) == len(DECAYS)
    assert plain.ensemble is None
    # A moving average over more steps is another one.
    assert run(Key("digits", SWA, 0, 4e-3)).loss != plain.loss
    # What is fine-tuned begins at the same trained network each time.
    first = run(Key("tune", VANILLA, 0, 4e-3))
    assert run(Key("tune", VANILLA, 0, 4e-3)) == first
    assert run(Key("tune", SCRATCH, 0, 4e-3)) != first
    ewa_trainings.source.cache_clear()


def test_what_is_kept_between_steps_is_counted() -> None:
    model = made(0, 8)
    assert _kept(model) == 4 * sum(p.numel() for p in model.parameters())
    experts: nn.Module = ewa.convert(model, 4)
    grown = 3 * sum(p.numel() for i in (1, 3) for p in model.blocks[i].mlp.parameters())
    assert _kept(experts) - _kept(model) == 4 * grown
