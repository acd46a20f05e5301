"""Fitting a family: what the loss is made of, the bypass trap, and every mistake that can be named."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.data import DataLoader

import retensor as rt
from retensor.compression import neumeta as nm
from retensor.compression.neumeta.field import values
from retensor.compression.neumeta.hyper import skeleton
from retensor.data.reference import DigitsCNN

X = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(8)
LOADER = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def family(model: nn.Module | None = None) -> nm.NeuMeta:
    torch.manual_seed(0)
    space = nm.fuse_and_smooth(model or DigitsCNN(12), "block", example=X, seconds=0.05)
    return nm.NeuMeta(space, hidden=12, depth=2, freqs=3)


def percent(net: nn.Module, split: rt.data.Split) -> float:
    return 100 * rt.data.accuracy(net, split.x_test, split.y_test)


def plain(solver: str, steps: int) -> tuple[nm.NeuMeta, nn.Module, rt.data.Split, list[float]]:
    """A family of the network without normalisation after a warm start."""
    model, split = rt.data.reference("digits-cnn-plain")
    space = nm.fuse_and_smooth(model, ["block"], example=split.x[:2], seconds=0.5, solver=solver)  # type: ignore[arg-type]
    hyper = nm.NeuMeta(space, hidden=96, depth=3, freqs=8)
    return hyper, model, split, nm.warm_start(hyper, steps=steps, widths=range(8, 33))


def test_networks_work_at_all_widths_after_a_warm_start() -> None:
    hyper, _, split, losses = plain("fast_tsp", 400)
    assert len(losses) == 400
    assert hyper.trained.tolist() == [8, 32]
    bypass = percent(hyper.bypassed(), split)
    right = {width: percent(hyper.sample(width, k=20), split) for width in (32, 24, 16, 8)}
    assert min(right.values()) >= bypass + 40, (right, bypass)


def test_fitting_changes_the_implicit_functions_alone() -> None:
    hyper = family()
    before = copy.deepcopy(hyper.state_dict())
    report = nm.fit(hyper, LOADER, widths=range(4, 13), steps=5, on_trap="ignore")
    assert len(report.losses) == 5
    changed = {name for name, value in hyper.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".fields." in name or name == "trained" for name in changed)
    assert hyper.trained.tolist() == [4, 12]
    assert set(report.dead) == set(report.loss) == set(report.accuracy) == {4, 8, 12}


def test_epochs_go_through_the_loader_that_often() -> None:
    assert len(nm.fit(family(), LOADER, widths=[6], epochs=3).losses) == 6
    endless = (LOADER[i % 2] for i in range(10_000))
    with pytest.raises(ValueError, match="does not tell how many batches"):
        nm.fit(family(), endless, widths=[6])


def test_the_same_seed_fits_the_same() -> None:
    def losses(seed: int) -> list[float]:
        return nm.fit(family(), LOADER, widths=range(4, 13), steps=4, seed=seed).losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_the_loss_is_the_task_the_norms_and_the_reconstruction() -> None:
    model = DigitsCNN(12)

    def first(width: int, **weights: float) -> float:
        return nm.fit(family(model), LOADER, widths=[width], noise=0.0, steps=1, ema=0, **weights).losses[0]

    def hyper_weights(width: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        hyper = family(model)
        return hyper.weights(width), hyper.targets()

    for width in (5, 12):
        tensors, targets = hyper_weights(width)
        task = first(width, reg=0, recon=0)
        norms = sum(float(value.detach().norm()) for value in tensors.values())
        assert first(width, reg=0.1, recon=0) - task == pytest.approx(0.1 * norms, rel=1e-4)
        if width < 12:
            assert first(width, reg=0, recon=1e4) == task
            continue
        parts = []
        for name, value in tensors.items():
            size = targets[name].abs() + 1e-6
            parts.append(float(((value.detach() - targets[name]) ** 2 * size / size.max()).mean()))
        # A large weight, so that the difference keeps its digits.
        assert first(width, reg=0, recon=1e4) - task == pytest.approx(1e4 * sum(parts) / len(parts), rel=1e-4)


def test_the_running_mean_is_what_is_left() -> None:
    def fitted(ema: float) -> list[torch.Tensor]:
        hyper = family()
        nm.fit(hyper, LOADER, widths=[6], noise=0.0, steps=2, ema=ema, on_trap="ignore")
        return [parameter.detach() for parameter in hyper.fields()]

    one = family()
    nm.fit(one, LOADER, widths=[6], noise=0.0, steps=1, ema=0, milestones=(), on_trap="ignore")
    last, mean = fitted(0), fitted(0.9)
    assert any(not torch.equal(a, b) for a, b in zip(last, mean, strict=True))
    # Half of the steps of two are after one, whose rate is a tenth.
    for first, second, both in zip(one.fields(), last, mean, strict=True):
        torch.testing.assert_close(both, 0.9 * first.detach() + 0.1 * second, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_quarter_of_the_block_works_about_as_well_as_the_full_network_and_reordering_helps() -> None:
    right = {}
    for solver in ("fast_tsp", "none"):
        hyper, model, split, _ = plain(solver, 400)
        order = torch.Generator().manual_seed(0)
        loader = DataLoader(split.train_set(), 64, shuffle=True, generator=order)
        nm.fit(hyper, loader, widths=range(8, 33), recon=10.0, steps=500, lr=3e-4, milestones=())
        right[solver] = percent(hyper.sample(8, k=20), split)
    assert right["fast_tsp"] >= percent(model, split) - 6, right
    assert right["fast_tsp"] >= right["none"] + 5, right


@pytest.mark.parametrize("call", ["weights", "warm_start", "fit"])
def test_noise_moves_all_six_coordinates_by_no_more_than_half_of_it(monkeypatch: Any, call: str) -> None:
    hyper, nu, seen = family(), 0.5, []

    def spied(fields: Any, raws: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(raws)
        return values(fields, raws)

    monkeypatch.setattr("retensor.compression.neumeta.hyper.values", spied)
    if call == "weights":
        hyper.weights(6, noise=nu)
    elif call == "warm_start":
        nm.warm_start(hyper, steps=1, widths=[6], noise=nu)
    else:
        nm.fit(hyper, LOADER, widths=[6], noise=nu, steps=1, on_trap="ignore")
    still = [raw for layer in hyper.layers.values() for raw in layer.coordinates(6).values()]
    moved = torch.cat([raw - calm for raw, calm in zip(seen[0], still, strict=True)])
    assert float(moved.abs().max()) <= nu / 2 + 1e-5
    # Of some two hundred entries, the furthest of each coordinate are near the ends.
    assert (moved.amax(0) > 0.45 * nu).all()
    assert (moved.amin(0) < -0.45 * nu).all()
    assert torch.linalg.matrix_rank(moved) == 6


@pytest.mark.parametrize("clip", [1e-4, 0])
def test_steps_are_those_of_adamw_by_hand_with_clipped_gradients(clip: float) -> None:
    model, x, lr, decay, steps = DigitsCNN(12).double(), X.double(), 1e-2, 0.3, 3
    torch.manual_seed(0)
    space = nm.fuse_and_smooth(model, "block", example=x, solver="none")
    one, other = (nm.NeuMeta(space, hidden=6, depth=2, freqs=2) for _ in range(2))
    nm.fit(
        one, [(x, Y)], widths=[6], noise=0.0, reg=0, steps=steps, lr=lr, weight_decay=decay, milestones=(), clip=clip,
        ema=0, on_trap="ignore",
    )  # fmt: skip
    net, parameters = skeleton(other), other.fields()
    means = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    largest = 0.0
    for step in range(1, steps + 1):
        loss = functional.cross_entropy(functional_call(net, other.weights(6), (x,)), Y)
        for p, grad, (first, second) in zip(parameters, torch.autograd.grad(loss, parameters), means, strict=True):
            largest = max(largest, float(grad.abs().max()))
            g = grad.clamp(-clip, clip) if clip else grad
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            move = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            with torch.no_grad():
                p.copy_((1 - lr * decay) * p - lr * move)
    assert largest > 10 * clip
    for a, b in zip(one.fields(), parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def killed() -> nm.NeuMeta:
    """A family whose inner channels are far below 0."""
    hyper = family()
    with torch.no_grad():
        hyper.layers["block.conv1"].fields["bias"].last.bias.fill_(-1e3)
    return hyper


def test_dead_channels_are_counted() -> None:
    assert nm.dead_share(killed(), 5, X) == 1.0
    hyper = family()
    with torch.no_grad():
        hyper.layers["block.conv1"].fields["bias"].last.bias.fill_(1e3)
    assert nm.dead_share(hyper, 5, X) == 0.0


def test_the_bypass_trap_fails_loudly() -> None:
    with pytest.raises(nm.BypassTrapError, match="100% of the inner channels never fire at width 12") as caught:
        nm.fit(killed(), LOADER, widths=range(4, 13), steps=1)
    report = caught.value.report
    assert isinstance(caught.value, rt.RetensorError)
    assert report.trapped
    assert report.dead == {4: 1.0, 8: 1.0, 12: 1.0}
    assert report.bypass_accuracy is not None
    with pytest.warns(UserWarning, match="never fire"):
        nm.fit(killed(), LOADER, widths=range(4, 13), steps=1, on_trap="warn")
    assert nm.fit(killed(), LOADER, widths=range(4, 13), steps=1, on_trap="ignore").trapped


def report_of(loss: dict[int, float], full: float, dead: float = 0.0) -> nm.FitReport:
    return nm.FitReport([], {4: dead, 8: 0.0, 12: 0.0}, loss, bypass_loss=2.0, full_loss=full)


def test_a_family_is_trapped_where_channels_of_any_width_are_dead_or_no_loss_differs_from_the_bypass() -> None:
    alike, one_works = {4: 1.95, 8: 2.0, 12: 2.05}, {4: 1.95, 8: 2.0, 12: 0.4}
    assert report_of(alike, full=0.1).trapped
    assert not report_of(one_works, full=0.1).trapped
    assert report_of(one_works, full=0.1, dead=0.9).trapped
    assert not report_of(one_works, full=0.1, dead=0.8).trapped
    # Layers that do nothing in the full network either are nothing to go around.
    assert not report_of(alike, full=2.0).trapped


def test_a_fit_without_warm_start_at_a_high_rate_is_trapped() -> None:
    model, split = rt.data.reference("digits-cnn", seed=1)
    space = nm.fuse_and_smooth(model, "block", example=split.x[:2], seconds=0.5)
    hyper = nm.NeuMeta(space, hidden=96, depth=3, freqs=8, seed=1)
    loader = DataLoader(split.train_set(), 64, shuffle=True, generator=torch.Generator().manual_seed(1))
    with pytest.raises(nm.BypassTrapError):
        nm.fit(hyper, loader, widths=range(8, 33), recon=10.0, steps=150, lr=3e-3, seed=1)


def test_the_report_tells_what_the_network_is_worth_without_the_layers() -> None:
    hyper = family()
    report = nm.fit(hyper, LOADER, widths=[6], steps=1, on_trap="ignore")
    with torch.no_grad():
        outputs, full = hyper.bypassed()(X[:4]), skeleton(hyper)(X[:4])
    assert report.full_loss == pytest.approx(float(functional.cross_entropy(full, Y[:4])), rel=1e-5)
    assert report.bypass_loss == pytest.approx(float(functional.cross_entropy(outputs, Y[:4])), rel=1e-5)
    assert report.bypass_accuracy == float((outputs.argmax(-1) == Y[:4]).double().mean())


def test_a_task_of_other_targets_has_no_accuracy() -> None:
    loader = [(X, torch.randn(8, 10))]
    report = nm.fit(family(), loader, functional.mse_loss, widths=[6], steps=1)
    assert report.accuracy == {}
    assert report.bypass_accuracy is None


def test_a_loss_that_is_no_number_is_told() -> None:
    with pytest.raises(FloatingPointError, match="at step 0; take a lower learning rate"):
        nm.fit(family(), LOADER, lambda outputs, _: outputs.sum() * torch.nan, widths=[6], steps=1)


@pytest.mark.parametrize("width", [0, -3])
def test_a_width_below_one_is_refused(width: int) -> None:
    hyper = family()
    for call in (
        lambda: hyper.sample(width),
        lambda: hyper.weights(width),
        lambda: hyper.generated_parameters(width),
        lambda: nm.fit(hyper, LOADER, widths=[4, width]),
        lambda: nm.warm_start(hyper, widths=[4, width]),
        lambda: setattr(hyper, "width", width),
        lambda: nm.WidthSpace(nm.fuse(DigitsCNN(4), example=X), "block", example=X).shapes(width),
    ):
        with pytest.raises(ValueError, match=f"a width is at least 1 channel, not {width}"):
            call()


def test_a_width_that_is_no_whole_number_is_refused() -> None:
    for width in (2.5, True, "8"):
        with pytest.raises(TypeError, match="a width is a whole number of channels"):
            family().sample(width)  # type: ignore[arg-type]


def test_a_normalisation_that_is_not_fused_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'block.conv1' go through the batch normalisation 'block.bn1', which is not"):
        nm.WidthSpace(DigitsCNN(4), "block", example=X)
    net = DigitsCNN(4)
    # The inner channels alone are fused.
    net.block.conv1, net.block.bn1 = nn.Conv2d(16, 4, 3, padding=1), nn.Identity()
    with pytest.raises(ValueError, match=r"outputs of 'block.conv2' go through the batch normalisation 'block.bn2'"):
        nm.WidthSpace(net, "block", example=X)


def test_a_normalisation_of_fixed_layers_may_stay() -> None:
    net = DigitsCNN(4)
    net.block = DigitsCNN(4, norm=False).block
    assert nm.WidthSpace(net, "block", example=X).full_width == 4


def test_a_group_that_crosses_a_fixed_layer_is_refused() -> None:
    net = nm.fuse(DigitsCNN(4), example=X)
    with pytest.raises(ValueError, match=r"'block.conv1' has no inner width.*'block.conv2', which is fixed"):
        nm.WidthSpace(net, ["block.conv1"], example=X)
    with pytest.raises(ValueError, match="'head' has no inner width"):
        nm.WidthSpace(net, ["block", "head"], example=X)


def grouped(groups: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=groups), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_or_depthwise_convolution_is_refused(groups: int) -> None:
    with pytest.raises(ValueError, match="'2' is a grouped or depthwise convolution"):
        nm.WidthSpace(grouped(groups), "**", example=X)
    with pytest.raises(ValueError, match="the grouped convolution '2', which is not generated"):
        nm.WidthSpace(grouped(groups), ["0", "4"], example=X)


class Reads(nn.Module):
    """A net that counts on its inner width."""

    def __init__(self, put_out: bool) -> None:
        super().__init__()
        self.a, self.b, self.put_out = nn.Linear(3, 8), nn.Linear(8, 2), put_out

    def forward(self, x: torch.Tensor) -> Any:
        y = torch.relu(self.a(x))
        return (self.b(y), y) if self.put_out else self.b(y.view(-1, 8))


def test_a_network_that_counts_on_its_width_or_puts_it_out_is_refused() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(rt.RetensorError, match="does not run with a, b at width"):
        nm.WidthSpace(Reads(False), "**", example=x)
    with pytest.raises(rt.RetensorError, match="outputs of the Reads change their shape"):
        nm.WidthSpace(Reads(True), "**", example=x)


def test_patterns_that_mean_nothing_are_refused() -> None:
    net = nm.fuse(DigitsCNN(4), example=X)
    with pytest.raises(ValueError, match="'blok' means no layer; names here are such as 'block'"):
        nm.WidthSpace(net, "blok", example=X)
    with pytest.raises(ValueError, match="no layers are named"):
        nm.WidthSpace(net, [], example=X)
    with pytest.raises(ValueError, match="no linear layer or convolution in 'bn'"):
        nm.WidthSpace(net, ["bn"], example=X)
    with pytest.raises(TypeError, match=r"a space is one of an nn.Module"):
        nm.WidthSpace("resnet", "block", example=X)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:the family was never fitted")
def test_arguments_of_a_family_and_of_a_sample_are_checked() -> None:
    hyper = family()
    for given, message in (
        ({}, "give a width, or the part of parameters"),
        ({"width": 3, "params": 0.5}, "and not both"),
        ({"params": 0}, "above 0, not 0"),
        ({"params": "half"}, "above 0, not 'half'"),
        ({"width": 3, "k": 0}, "over k samples, at least 1, not 0"),
        ({"width": 3, "k": 1, "noise": float("nan")}, "noise is a finite number, 0 or above, not nan"),
    ):
        with pytest.raises(ValueError, match=message):
            hyper.sample(**given)  # type: ignore[arg-type]
    space = nm.WidthSpace(nm.fuse(DigitsCNN(4), example=X), "block", example=X)
    for name in ("hidden", "depth", "freqs"):
        with pytest.raises(ValueError, match=f"{name} is a whole number from 1, not 0"):
            nm.NeuMeta(space, **{name: 0})
    with pytest.raises(TypeError, match="a family is made of a WidthSpace"):
        nm.NeuMeta(DigitsCNN())  # type: ignore[arg-type]


def test_arguments_of_fitting_are_checked() -> None:
    hyper = family()
    for given, message in (
        ({"widths": []}, "there are no widths to draw from"),
        ({"widths": [3], "steps": -1}, "-1 steps or epochs cannot be taken"),
        ({"widths": [3], "noise": -1.0}, "noise is a finite number, 0 or above, not -1.0"),
        ({"widths": [3], "noise": float("inf")}, "noise is a finite number, 0 or above, not inf"),
        ({"widths": [3], "clip": -1.0}, "clip is a finite number, 0 or above, not -1.0"),
        ({"widths": [3], "recon": float("nan")}, "recon is a finite number, 0 or above, not nan"),
        ({"widths": [3], "reg": "much"}, "reg is a finite number, 0 or above, not 'much'"),
        ({"widths": [3], "ema": 1.0}, "ema is below 1, not 1.0"),
        ({"widths": [3], "milestones": (100, 150)}, "a milestone is a part of the steps, between 0 and 1, not 100"),
        ({"widths": [3], "milestones": (0.0,)}, "between 0 and 1, not 0.0"),
        ({"widths": [3], "on_trap": "hide"}, "on_trap is 'hide'"),
    ):
        with pytest.raises(ValueError, match=message):
            nm.fit(hyper, LOADER, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the loader has no batches"):
        nm.fit(hyper, [], widths=[3])
    with pytest.raises(ValueError, match="the loader has no batches"):
        nm.fit(hyper, [], widths=[3], steps=2)
    with pytest.raises(ValueError, match="there are no widths"):
        nm.warm_start(hyper, widths=[])
    with pytest.raises(ValueError, match="noise is a finite number"):
        nm.warm_start(hyper, widths=[3], noise=float("inf"))


def test_nothing_is_shown_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    nm.warm_start(family(), steps=2, widths=[5])
    assert capfd.readouterr() == ("", "")
