"""The claims about FP4: trainings that repeat, scales without range that do not train, and verdicts by figures."""

from __future__ import annotations

import pytest
import torch
from benchmarks.measuring import Difference, Mean

from benchmarks import claim_fp4 as claim
from benchmarks import fp4_sweeping as sweeping
from benchmarks import fp4_trainings as trainings
from retensor.compression import fp4

WAY = claim.WAYS["UE5M3+ts, SR, RHT(dW)"]


@pytest.mark.parametrize("task", trainings.TASKS)
def test_each_task_trains_in_four_bits_and_repeats(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainings, "EPOCHS", 1)
    monkeypatch.setattr(trainings, "STEPS", dict.fromkeys(trainings.STEPS, 5))
    first = trainings.trained(task, WAY, 1)
    assert first == trainings.trained(task, WAY, 1)
    assert first != trainings.trained(task, None, 1)
    assert first != trainings.trained(task, WAY, 1, tuning=True)
    model, batch = trainings.network(task)
    assert isinstance(WAY, fp4.Recipe)
    made = trainings.in_fp4(model, WAY, task)
    layers = [layer for layer in made.modules() if isinstance(layer, fp4.FP4Linear)]
    cost = fp4.overhead(model, WAY, batch, include=trainings.HIDDEN[task])
    assert len(cost.operands) == 6 * len(layers) > 0
    # The last layer is in full precision.
    assert type(list(made.modules())[-1]) is torch.nn.Linear or task == "vit"


def test_without_range_scales_do_not_train_and_with_it_they_do() -> None:
    accuracies = {
        way: trainings.trained("digits", claim.WAYS[way], 1)["accuracy"]
        for way in (claim.FULL, "E4M3, SR", "UE5M3, SR")
    }
    assert accuracies["E4M3, SR"] < 0.75
    assert accuracies["UE5M3, SR"] > 0.9
    assert accuracies[claim.FULL] > 0.93


def test_what_stochastic_rounding_adds_to_a_gradient_averages_out() -> None:
    nearest, chance = (claim.WAYS[f"UE5M3+ts, {name}"] for name in ("RTN", "SR"))
    assert nearest is not None
    assert chance is not None
    one, mean = trainings.gradient_errors(nearest, 1, draws=16)
    assert one == pytest.approx(mean)
    drawn, averaged = trainings.gradient_errors(chance, 1, draws=16)
    assert averaged < drawn


def test_verdicts_follow_from_intervals() -> None:
    up, none, down = (Difference(mean, 0.1, 0.2) for mean in (1.0, 0.1, -1.0))

    def told(at_least: bool = False, **gains: Difference) -> str:
        return claim._told("s", "s", "b", "p", gains, at_least).verdict

    assert told(a=up, b=up) == "held"
    assert told(a=up, b=none) == "partly held"
    assert told(a=none, b=down) == "not held"
    assert told(True, a=none, b=up) == "held"
    assert told(True, a=none, b=down) == "partly held"
    assert "a: Below it." in claim._told("s", "s", "b", "p", {"a": down}).reason
    assert Mean.of([1.0, 1.0]).half == 0


def test_the_swept_grid_makes_recipes_and_costs() -> None:
    made, skipped = fp4.configurations(sweeping.GRID)
    assert len(made) == 60
    assert len(skipped) == 12
    costs = {str(recipe): sweeping.cost_of(recipe) for _, recipe in made[:6]}
    assert all(0 < cost.ratio < 0.2 for cost in costs.values())


def test_the_effect_of_a_part_is_over_runs_that_differ_in_it_alone() -> None:
    def loss(recipe: fp4.Recipe | None, seed: int) -> float:
        if recipe is None or recipe.fwd is None:
            return 0.0
        bare = recipe.fwd.scale == "e4m3" and not recipe.fwd.tensor_scale
        return 5.0 if bare else seed + recipe.fwd.block - 0.5 * (recipe.rounding_bwd == "stochastic")

    found = fp4.sweep(loss, sweeping.GRID, [1, 2])
    gain = sweeping._effect(found, "rounding_bwd", "nearest", "stochastic")
    assert (gain.mean, gain.half) == (0.5, 0)
    assert sweeping._effect(found, "hadamard", {}, {"wgrad": 16}).mean == 0
    assert sweeping._effect(found, "tensor_scale", False, True, "ue5m3").mean == 0


def test_every_count_of_the_cost_model_is_equal() -> None:
    (found,), _ = claim.counted(lambda text: None)
    assert found.verdict == "held", found.ours
