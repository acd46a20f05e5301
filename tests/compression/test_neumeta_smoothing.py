"""Channels that belong together, their order, and that neither fusing nor reordering changes a network."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retensor.compression import neumeta as nm
from retensor.compression.neumeta.smoothing import smooth_
from retensor.data.reference import DigitsCNN
from retensor.errors import RetensorError


def trained_like(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, in normalisations too, so that nothing is 0 or 1 by chance."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.running_var):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                for tensor in (module.bias, module.running_mean):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return net.eval()


def lenet(channels: int = 5) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, channels, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(channels, 2 * channels, 5, padding=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(8 * channels, 4 * channels), nn.ReLU(), nn.Linear(4 * channels, 10),
    )  # fmt: skip


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max())


def check_smoothing(model: nn.Module, example: torch.Tensor, groups: int, seconds: float = 0.05) -> None:
    with torch.no_grad():
        before = model(example)
        fused = nm.fuse(model, example=example)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
        assert apart(before, fused(example)) < 1e-5
        smooth = copy.deepcopy(fused)
        orders = smooth_(smooth, example=example, seconds=seconds)
        assert len(orders) == groups
        assert apart(fused(example), smooth(example)) < 1e-5
    assert nm.total_variation(smooth) < nm.total_variation(fused)
    assert any(not torch.equal(a, b) for a, b in zip(fused.parameters(), smooth.parameters(), strict=True))


def test_a_residual_net_computes_the_same_after_fusing_and_reordering() -> None:
    torch.manual_seed(0)
    check_smoothing(trained_like(DigitsCNN()), torch.randn(4, 1, 8, 8), groups=2)


def test_a_resnet_of_timm_computes_the_same_after_fusing_and_reordering() -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("resnet18", pretrained=False, num_classes=10)
    # Four residual streams and an inner width in each of eight blocks.
    check_smoothing(trained_like(model), torch.randn(2, 3, 32, 32), groups=12)


def test_a_net_that_flattens_pictures_computes_the_same_after_reordering() -> None:
    torch.manual_seed(0)
    check_smoothing(lenet(), torch.randn(3, 1, 8, 8), groups=3)


def test_total_variation_falls_by_what_the_paths_fall() -> None:
    torch.manual_seed(0)
    example = torch.zeros(1, 1, 8, 8)
    net = nm.fuse(trained_like(DigitsCNN()), example=example)
    # Without the flattened classifier, whose columns are not points of their own.
    groups = [group for group in nm.channel_groups(net, example) if group.producers == ("block.conv1",)]
    points = groups[0].points(net)
    order = nm.shortest_path(points)
    before, paths = nm.total_variation(net), [nm.path_length(points, o) for o in (list(range(32)), order)]
    groups[0].reorder_(net, torch.tensor(order))
    tensors = len(list(net.parameters()))
    assert tensors * (before - nm.total_variation(net)) == pytest.approx(paths[0] - paths[1], rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_total_variation_never_rises(seed: int) -> None:
    torch.manual_seed(seed)
    for net in (lenet(3), trained_like(DigitsCNN(6), seed)):
        for solver in ("fast_tsp", "nearest", "none"):
            space = nm.fuse_and_smooth(
                net, "**" if isinstance(net, nn.Sequential) else "block", example=torch.randn(1, 1, 8, 8),
                solver=solver, seconds=0.05,
            )  # fmt: skip
            assert space.variation[1] <= space.variation[0]
            if solver == "none":
                assert space.orders == {}
                assert space.variation[1] == space.variation[0]


@settings(max_examples=25, deadline=None)
@given(st.integers(3, 7), st.integers(1, 6), st.integers(0, 2**16))
def test_a_short_path_is_as_short_as_brute_force_finds(count: int, size: int, seed: int) -> None:
    points = torch.randn(count, size, generator=torch.Generator().manual_seed(seed))
    shortest = min(nm.path_length(points, list(order)) for order in itertools.permutations(range(count)))
    found = nm.path_length(points, nm.shortest_path(points))
    # Each distance is rounded to 1/60000 of the longest.
    assert shortest <= found + 1e-9
    assert found <= shortest + count * float(torch.cdist(points, points, p=1).max()) / 60_000


def test_a_path_of_nine_channels_is_as_short_as_brute_force_finds() -> None:
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)).double()
    distances = torch.cdist(points, points, p=1)
    orders = torch.tensor(list(itertools.permutations(range(9))))
    shortest = float(distances[orders[:, :-1], orders[:, 1:]].sum(1).min())
    assert nm.path_length(points, nm.shortest_path(points)) == pytest.approx(shortest, rel=1e-4)


def test_the_shortest_path_beats_nearest_neighbours() -> None:
    shorter = 0
    for seed in range(5):
        points = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
        tour, nearest = (nm.shortest_path(points, solver=solver, seconds=0.3) for solver in ("fast_tsp", "nearest"))
        assert sorted(tour) == sorted(nearest) == list(range(40))
        assert nm.path_length(points, tour) <= nm.path_length(points, nearest)
        shorter += nm.path_length(points, tour) < nm.path_length(points, nearest)
    assert shorter == 5


def test_points_that_are_all_alike_keep_their_order() -> None:
    assert nm.shortest_path(torch.ones(5, 3)) == [0, 1, 2, 3, 4]


def test_an_unknown_solver_and_no_seconds_are_refused() -> None:
    with pytest.raises(ValueError, match="'lkh' is no solver"):
        nm.shortest_path(torch.zeros(4, 1), solver="lkh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes some seconds, not 0"):
        nm.shortest_path(torch.zeros(4, 1), seconds=0)


class Concatenated(nn.Module):
    """A layer that takes two others' channels side by side, and one with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 5, 1), nn.Conv2d(1, 4, 1), nn.Conv2d(9, 6, 1)
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)
        self.d = nn.Conv2d(6, 7, 1)
        self.e = nn.Conv2d(7, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.c(torch.cat([self.a(x), self.b(x)], 1)))
        return self.e(torch.relu(self.d(y * self.scale)))


def test_channels_that_others_hold_are_left_and_the_net_computes_the_same() -> None:
    torch.manual_seed(0)
    net, x = Concatenated().eval(), torch.randn(2, 1, 4, 4)
    smooth = copy.deepcopy(net)
    assert set(smooth_(smooth, example=x)) == {("d",)}
    with torch.no_grad():
        assert apart(net(x), smooth(x)) < 1e-5


class Read(nn.Module):
    """A net that looks at one channel by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.a(x))
        return self.b(y) + y[:, :1]


def test_channels_read_by_their_number_are_left() -> None:
    torch.manual_seed(0)
    net = Read()
    before = copy.deepcopy(net.state_dict())
    smooth_(net, example=torch.randn(16, 3))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_reordering_and_fusing_leave_the_model_as_it_was() -> None:
    model = trained_like(DigitsCNN()).train()
    model.conv.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    space = nm.fuse_and_smooth(model, ["block"], example=torch.randn(2, 1, 8, 8))
    assert model.training
    assert not space.net.training
    assert not model.conv.weight.requires_grad
    assert model.head.weight.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_normalisation_before_its_layer_or_used_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.bn(y) + y

    before = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 2, 1))
    for net in (Twice(), before):
        x = torch.randn(2, 1, 3, 3)
        net = trained_like(net)
        fused = nm.fuse(net, example=x)
        assert any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        with torch.no_grad():
            assert torch.equal(net(x), fused(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_fusing_folds_norms_after_linear_layers_and_convolutions(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=2, dilation=2, groups=2, bias=bias), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 16, 5, bias=bias), nn.BatchNorm1d(5),
    )  # fmt: skip
    net = trained_like(net).to(dtype)
    x = torch.randn(3, 2, 4, 4, dtype=dtype)
    fused = nm.fuse(net, example=x)
    with torch.no_grad():
        one, other = net(x).float(), fused(x).float()
    # Twenty roundings of a value, at most.
    assert apart(one, other) < 20 * torch.finfo(dtype if dtype != torch.float64 else torch.float32).eps
    assert fused[1].__class__ is fused[5].__class__ is nn.Identity
    assert next(fused.parameters()).dtype == dtype


def test_a_model_that_does_not_take_the_example_is_told() -> None:
    with pytest.raises(RetensorError, match="cannot be followed for this example"):
        nm.fuse(DigitsCNN(), example=torch.zeros(1, 3, 8, 8))


def test_groups_name_the_layers_that_make_and_read_the_channels() -> None:
    groups = nm.channel_groups(lenet(), torch.zeros(1, 1, 8, 8))
    found = {group.producers: (group.channels, group.consumers, [m.per for m in group.members]) for group in groups}
    assert found == {
        ("0",): (5, ("3",), [1, 1]),
        ("3",): (10, ("7",), [1, 4]),
        ("7",): (20, ("9",), [1, 1]),
        ("9",): (10, (), [1]),
    }
