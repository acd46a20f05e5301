"""Sweeps: resumed from any file that a kill leaves, their frontier, their picture; and what keeps a training going."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from retensor.compression import fp4
from retensor.errors import RetensorError

GRID = {"scale": ["e8m0", "ue5m3"], "tensor_scale": [False, True], "rounding_bwd": ["nearest", "stochastic"]}


def train(recipe: fp4.Recipe | None, seed: int) -> dict[str, float]:
    if recipe is None:
        return {"loss": 0.5, "accuracy": 0.9}
    assert recipe.seed == seed
    if recipe.fwd is not None and recipe.fwd.scale == "e8m0" and recipe.rounding_bwd == "stochastic":
        raise FloatingPointError("the loss is nan at step 3")
    return {"loss": 1.0 + seed - bool(recipe.fwd and recipe.fwd.tensor_scale), "accuracy": 0.8}


def cost(recipe: fp4.Recipe) -> fp4.Overhead:
    return fp4.product_overhead(64, 64, 64, recipe)


def test_a_sweep_runs_every_combination_once_and_says_what_it_skipped() -> None:
    told: list[tuple[int, int]] = []
    found = fp4.sweep(train, GRID, [0, 1], cost=cost, progress=lambda *done: told.append(done))
    # Scales of e8m0 take no scale of the tensor: 6 of 8 recipes, and full precision.
    assert len(found.runs) == 14
    assert len(found.skipped) == 2
    assert all("all the range" in reason for reason in found.skipped.values())
    assert told[-1] == (14, 14)
    failed = [run for run in found.runs if run.failed]
    assert len(failed) == 2
    assert all(run.failed == "the loss is nan at step 3" and "loss" not in run.figures for run in failed)
    records = found.records()
    assert {"task", "scale", "tensor_scale", "rounding_bwd", "seed", "loss", "accuracy", "overhead", "bits"} <= set(
        records[-1]
    )
    assert records[0] == {
        "task": "task", "format": "float32", "seed": 0, "overhead": 0.0, "passes": 0.0, "bits": 32.0, "loss": 0.5,
        "accuracy": 0.9, "failed": None, "seconds": records[0]["seconds"],
    }  # fmt: skip
    assert len(pytest.importorskip("pandas").DataFrame(records)) == 14
    # E8M0 with stochastic rounding failed, and full precision is no recipe.
    assert len(found.points()) == 5
    assert [point.settings for point in found.points(baseline=True)] == [{"format": "float32"}]
    front = found.pareto()
    assert front[-1].y == 0.5
    assert all(point.settings["rounding_bwd"] == "nearest" for point in front)
    assert [a.x < b.x and a.y > b.y for a, b in itertools.pairwise(front)] == [True] * (len(front) - 1)


def test_a_stopped_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    asked: list[int] = []

    def counted(recipe: fp4.Recipe | None, seed: int) -> float:
        asked.append(seed)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return float(len(asked))

    with pytest.raises(KeyboardInterrupt):
        fp4.sweep(counted, {"block": [8, 16]}, [0, 1], path)
    assert len(path.read_text().splitlines()) == 4
    assert json.loads(path.read_text().splitlines()[0]) == {"schema": "retensor.fp4-sweep/1"}
    # A kill in the middle of a line: that run is made again.
    path.write_text(path.read_text() + '{"task": "task", "sett')
    found = fp4.sweep(counted, {"block": [8, 16]}, [0, 1], path)
    assert len(asked) == 7
    assert [run.figures["loss"] for run in found.runs] == [1, 2, 3, 5, 6, 7]
    again = fp4.sweep(counted, {"block": [8, 16]}, [0, 1], path)
    assert len(asked) == 7
    assert again.runs == found.runs
    # More seeds and settings run what is missing alone.
    fp4.sweep(counted, {"block": [8, 16, 32]}, [0, 1], path, baseline=False)
    assert len(asked) == 9


def test_a_sweep_in_parallel_is_the_same(tmp_path: Path) -> None:
    alone = fp4.sweep(train, GRID, [0, 1])
    beside = fp4.sweep(train, GRID, [0, 1], tmp_path / "runs.jsonl", jobs=2)
    strip = [(run.task, run.settings, run.seed, run.figures, run.failed) for run in alone.runs]
    assert strip == [(run.task, run.settings, run.seed, run.figures, run.failed) for run in beside.runs]


def test_damaged_and_strange_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    for content, said in (
        ("", "no sweep of FP4 trainings"),
        ('{"schema": "other"}\n', "no sweep of FP4 trainings"),
        ("[1]\n", "no sweep of FP4 trainings"),
        ('{"schema": "retensor.fp4-sweep/1"}\n{"task"\n{}\n', "line 2 of .* is damaged"),
        ('{"schema": "retensor.fp4-sweep/1"}\n{"task": 1}\n', "line 2 of .* is damaged"),
    ):
        path.write_text(content)
        with pytest.raises(RetensorError, match=said):
            fp4.sweep(train, {"block": [16]}, [0], path)
    with pytest.raises(RetensorError):
        fp4.sweep(train, {"block": [16]}, [0], tmp_path)


def test_bad_grids_and_losses_are_named() -> None:
    for grid, kind, said in (
        ({"scales": ["e8m0"]}, ValueError, "'scales' of the grid is no part of a format or a recipe"),
        ({"scale": "e8m0"}, TypeError, "is a sequence of what it may be"),
        ({"block": []}, TypeError, "is a sequence of what it may be"),
    ):
        with pytest.raises(kind, match=said):
            fp4.configurations(grid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="returns a loss"):
        fp4.sweep(lambda recipe, seed: {"accuracy": 1.0}, {"block": [16]}, [0])
    lost = fp4.sweep(lambda recipe, seed: math.nan, {"block": [16]}, [0], baseline=False)
    assert lost.runs[0].failed == "loss is nan"
    with pytest.raises(ValueError, match="no setting of task 'task'"):
        lost.pareto()
    both = fp4.sweep({"a": train, "b": train}, {"block": [16]}, [0], cost={"a": cost, "b": cost})
    with pytest.raises(ValueError, match="the sweep has the tasks a, b; name one"):
        both.pareto()
    assert len(both.pareto(task="a")) == 1


@given(points=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_frontier_is_what_no_point_beats(points: list[tuple[int, int]]) -> None:
    runs = tuple(
        fp4.Run("t", {"block": i}, 0, {"overhead": float(x), "loss": float(y)}) for i, (x, y) in enumerate(points)
    )
    front = {(point.x, point.y) for point in fp4.Sweep(runs).pareto()}
    brute = {
        (x, y) for x, y in points if not any((a <= x and b <= y) and (a, b) != (x, y) for a, b in points)
    }  # fmt: skip
    assert front == brute


def test_points_are_named_by_what_is_on() -> None:
    settings = {
        "scale": "ue5m3", "tensor_scale": True, "block": 16, "hadamard": {"wgrad": 16}, "q_grad": "ste",
        "scale_grad": "ste", "outlier": None,
    }  # fmt: skip
    (point,) = fp4.Sweep((fp4.Run("t", settings, 0, {"overhead": 1.0, "loss": 1.0}),)).points()
    assert point.name == "ue5m3, tensor_scale, block 16, hadamard wgrad 16, scale_grad ste"


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    found = fp4.sweep(train, GRID, [0, 1], cost=cost)
    for name in ("a.svg", "b.png"):
        found.plot(tmp_path / name, dark=name == "b.png")
    text = (tmp_path / "a.svg").read_text()
    assert "loss against overhead" in text
    assert "ue5m3" in text
    assert "full precision 0.5" in text
    before = (tmp_path / "a.svg").read_bytes()
    found.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == before
    with pytest.raises(ValueError, match=r"neither .svg nor .png"):
        found.plot(tmp_path / "a.pdf")


def test_long_names_stay_in_the_picture(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    settings = {
        "element": "e2m1", "scale": "ue5m3", "tensor_scale": True, "block": 16, "rounding_bwd": "stochastic",
        "hadamard": dict.fromkeys(fp4.GEMMS, 16), "q_grad": "linear", "scale_grad": "relaxed", "outlier": 0.999,
    }  # fmt: skip
    found = fp4.Sweep((fp4.Run("t", settings, 0, {"overhead": 0.1, "loss": 1.2345}),))
    found.plot(tmp_path / "a.png")
    edge = image.imread(tmp_path / "a.png")[:, -8:]
    assert (edge == edge[0, 0]).all()
    found.plot(tmp_path / "a.svg")
    assert "1.234" in (tmp_path / "a.svg").read_text()


def test_loss_scaling_by_a_power_of_two_changes_nothing_and_clipping_bounds_the_norm() -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    steps = []
    for scale in (1.0, 1024.0):
        net = nn.Linear(4, 1)
        nn.init.ones_(net.weight)
        nn.init.zeros_(net.bias)
        norm = fp4.train_step(net, net(x).square().mean(), torch.optim.SGD(net.parameters(), 0.1), loss_scale=scale)
        steps.append((norm, net.weight.tolist()))
    assert steps[0] == steps[1]
    net = nn.Linear(4, 1)
    before = net.weight.detach().clone()
    fp4.train_step(net, 1000 * net(x).mean(), torch.optim.SGD(net.parameters(), 1.0), clip=0.5)
    assert float((net.weight.detach() - before).norm()) <= 0.5 + 1e-5
    kept = net.weight.detach().clone()
    assert math.isnan(fp4.train_step(net, net(x).sum() * math.nan, torch.optim.SGD(net.parameters(), 1.0)))
    assert torch.equal(net.weight, kept)
    for options in ({"loss_scale": 0.0}, {"clip": -1.0}, {"loss_scale": math.inf}):
        with pytest.raises(ValueError, match="a number above 0"):
            fp4.train_step(net, net(x).sum(), torch.optim.SGD(net.parameters(), 1.0), **options)  # type: ignore[arg-type]


def test_small_gradients_reach_a_narrow_format_by_loss_scaling() -> None:
    # Without a scale of the tensor E4M3 loses blocks below 6 * 2^-10: all of this gradient.
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    recipe = fp4.Recipe(None, fp4.Format(scale="e4m3"))
    norms = []
    for scale in (1.0, 2.0**16):
        net = fp4.convert(nn.Sequential(nn.Linear(32, 16)), recipe)
        fp4.train_step(net, net(x).mean() * 1e-3, torch.optim.SGD(net.parameters(), 0.0), loss_scale=scale)
        norms.append(float(net[0].weight.grad.norm()))
    assert norms[0] == 0
    assert norms[1] > 0


def step_with(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[float]) -> list[float]:
    found = []
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        found.append(float(weight.detach()))
    return found


def test_without_spikes_the_optimizer_is_adamw_and_spikes_are_cut() -> None:
    calm = [1.0, 0.8, 1.2, 0.9]
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ours = step_with(fp4.SpikeAwareAdamW([one], lr=0.1), one, calm)
    theirs = step_with(torch.optim.AdamW([other], lr=0.1), other, calm)
    assert ours == theirs
    spiky: list[Any] = [*calm, 1e6]
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    made = fp4.SpikeAwareAdamW([one], lr=0.1, threshold=100.0, accumulate=4)
    step_with(made, one, spiky)
    plain = torch.optim.AdamW([other], lr=0.1)
    step_with(plain, other, spiky)
    assert float(plain.state[other]["exp_avg_sq"]) > 1e6 * float(made.state[one]["exp_avg_sq"])


def test_nothing_is_cut_before_moments_have_seen_some_gradients() -> None:
    # After one gradient of 1 the second moment is 0.001, and 5000 times that is less than the square of 3.
    growing = [1.0, 3.0, 9.0, 5.0, 5.0, 5.0]
    one, other = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    ours = step_with(fp4.SpikeAwareAdamW([one], lr=0.1), one, growing)
    assert ours == step_with(torch.optim.AdamW([other], lr=0.1), other, growing)
    one = nn.Parameter(torch.ones(1))
    assert ours != step_with(fp4.SpikeAwareAdamW([one], lr=0.1, accumulate=0), one, growing)
    # The same after a reset: 4 steps on, nothing is cut for 3 steps.
    weight = nn.Parameter(torch.ones(1))
    optimizer = fp4.SpikeAwareAdamW([weight], lr=0.0, threshold=1.0, reset=4, accumulate=3)
    cut = []
    for _ in range(8):
        weight.grad = torch.ones(1)
        optimizer.step()
        cut.append(weight.grad.item() < 1)
    assert cut == [False, False, False, True] * 2


def test_moments_are_forgotten_and_the_rate_rises_again() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = fp4.SpikeAwareAdamW([weight], lr=0.1, reset=3, warmup=4, weight_decay=0.0)
    path = [0.0, *step_with(optimizer, weight, [1.0] * 9)]
    moves = [round((a - b) / 0.1, 4) for a, b in itertools.pairwise(path)]
    # A step of Adam under a constant gradient is the rate; after a reset it rises along a cosine.
    rise = [0.5 - 0.5 * math.cos(math.pi * (i + 1) / 4) for i in range(3)]
    assert moves == pytest.approx([1, 1, 1, *rise, *rise], abs=1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.1
    # What is kept goes on as if it had not stopped.
    first, again = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    halves = [fp4.SpikeAwareAdamW([one], lr=0.1, reset=3, warmup=4, weight_decay=0.0) for one in (first, again)]
    step_with(halves[0], first, [1.0] * 5)
    halves[1].load_state_dict(copy.deepcopy(halves[0].state_dict()))
    again.data.copy_(first.data)
    assert step_with(halves[1], again, [1.0] * 4) == path[-4:]
    for options in ({"threshold": 0.0}, {"reset": -1}, {"warmup": 1.5}, {"accumulate": True}):
        with pytest.raises(ValueError, match="is a number"):
            fp4.SpikeAwareAdamW([weight], **options)  # type: ignore[arg-type]
