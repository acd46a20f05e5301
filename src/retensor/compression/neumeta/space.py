"""A network whose inner widths can change: which layers, which channels, and how wide each is at a width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from retensor.compression.neumeta.groups import LAYERS, ChannelGroup, Member, channel_groups, expanded
from retensor.compression.neumeta.smoothing import Solver, fuse, outputs_of, smooth_, total_variation
from retensor.errors import RetensorError
from retensor.files import brief, described
from retensor.replacing.match import matching, suggestions
from retensor.replacing.replace import copied


@dataclass(frozen=True)
class Axis:
    """The rows or the columns of a generated tensor.

    Attributes
    ----------
    full : int
        Their number at the full width.
    channels : int
        Channels at the full width; 0 where the number is the same at all widths.
    per : int
        Rows or columns a channel.
    """

    full: int
    channels: int = 0
    per: int = 1

    def size(self, width: int, reference: int) -> int:
        """Rows or columns at a width, where the full one is ``reference``."""
        return self.full if not self.channels else self.per * _channels(self.channels, width, reference)

    def source(self, width: int, reference: int) -> torch.Tensor:
        """For each row or column at a width, the one of the full tensor at the same part of the path."""
        if not self.channels:
            return torch.arange(self.full)
        count = _channels(self.channels, width, reference)
        chosen = ((torch.arange(count, dtype=torch.float64) + 0.5) * self.channels / count).long()
        return expanded(chosen.clamp_max(self.channels - 1), self.per)


def _channels(full: int, width: int, reference: int) -> int:
    return max(1, math.floor(full * width / reference + 0.5))


class WidthSpace:
    """A trained network, and the layers of it that are to be generated at any width.

    Parameters
    ----------
    model : nn.Module
        Trained, with its batch normalisations fused (:func:`fuse`). It stays as it is.
    layers : str or sequence of str
        Names or globs of layers, or of what they lie in, such as ``"layer3.2"``: all linear layers and convolutions of
        it are generated. All else keeps its values. ``"**"`` means the whole network.
    example : torch.Tensor, tuple or mapping
        An input that the model takes, arguments, or keyword arguments.

    Attributes
    ----------
    net : nn.Module
        A copy of the model, in eval mode.
    layers : tuple of str
        Generated layers, in the network's order.
    groups : tuple of ChannelGroup
        Channels whose number changes: those that only generated layers make and read.
    full_width : int
        Channels of the first of these groups; a width is given in them, and the other groups change in proportion.
    orders : mapping of tuple of str to list of int
        How :func:`fuse_and_smooth` reordered channels, by the layers that make them.
    variation : tuple of float
        The total variation of the network before and after.

    Raises
    ------
    ValueError
        Where a pattern means nothing or no layer with weights; a generated layer has a batch normalisation that is
        not fused, is grouped or depthwise, or has no inner width because fixed layers read or make its channels.
    RetensorError
        Where the network cannot be followed, or does not run at another width.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 12), nn.ReLU(), nn.Linear(12, 3))
    >>> space = WidthSpace(net, ["*"], example=torch.zeros(1, 4))
    >>> space.full_width, space.layers, space.parameters(12), space.parameters(3)
    (12, ('0', '2'), 99, 27)
    """

    def __init__(self, model: nn.Module, layers: str | Sequence[str], *, example: Any) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a space is one of an nn.Module, not of {described(model)}")
        self.net = copied(model).eval()
        self.layers = _generated(self.net, [layers] if isinstance(layers, str) else list(layers))
        groups = channel_groups(self.net, example)
        _refuse(self.net, self.layers, groups)
        self.groups = tuple(group for group in groups if _inner(group, self.layers))
        # In the network's order, so that the reference is the first.
        place = {name: i for i, (name, _) in enumerate(self.net.named_modules())}
        self.groups = tuple(sorted(self.groups, key=lambda group: place[group.producers[0]]))
        _refuse_fixed(self.layers, self.groups, groups)
        self.full_width = self.groups[0].channels
        self.orders: dict[tuple[str, ...], list[int]] = {}
        variation = total_variation(self.net)
        self.variation = (variation, variation)
        self._check_another_width(example)

    def axis(self, layer: str, side: str) -> Axis:
        """The rows (``"out"``) or columns (``"in"``) of a generated layer's weight."""
        full = int(self.net.get_submodule(layer).weight.shape[0 if side == "out" else 1])
        for group in self.groups:
            for member in group.members:
                if (member.layer, member.side) == (layer, side):
                    return Axis(full, group.channels, member.per)
        return Axis(full)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the generated tensors at a width, by name.

        Raises
        ------
        ValueError
            Where the width is below 1.
        """
        check_width(width)
        found: dict[str, tuple[int, ...]] = {}
        for name in self.layers:
            layer = self.net.get_submodule(name)
            rows = self.axis(name, "out").size(width, self.full_width)
            columns = self.axis(name, "in").size(width, self.full_width)
            found[f"{name}.weight"] = (rows, columns, *layer.weight.shape[2:])
            if layer.bias is not None:
                found[f"{name}.bias"] = (rows,)
        return found

    def parameters(self, width: int) -> int:
        """Elements of the generated tensors at a width."""
        return sum(math.prod(shape) for shape in self.shapes(width).values())

    def resampled(self, width: int) -> dict[str, torch.Tensor]:
        """The generated tensors of the full network at another width, by name.

        ``W_h[i] = W[floor((i+.5) H/h)]`` along the rows and columns that change, and columns times H/h, so that sums
        over channels keep their size.
        """
        check_width(width)
        found: dict[str, torch.Tensor] = {}
        for name in self.layers:
            layer = self.net.get_submodule(name)
            parts = resample(
                layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), self.axis(name, "out"),
                self.axis(name, "in"), width, self.full_width,
            )  # fmt: skip
            found |= {f"{name}.{label}": part for label, part in parts.items()}
        return found

    def _check_another_width(self, example: Any) -> None:
        """See that nothing in the network counts on the channels that change."""
        full = outputs_of(self.net, example)
        for width in {1, max(1, self.full_width // 2)}:
            try:
                with torch.no_grad():
                    net = _Run(self.net, self.resampled(width))
                    other = outputs_of(net, example)
            except Exception as error:  # whatever the network raises
                raise RetensorError(
                    f"the {type(self.net).__name__} does not run with {', '.join(self.layers)} at width {width}: "
                    f"{brief(error)}; generate other layers"
                ) from error
            if [tensor.shape for tensor in full] != [tensor.shape for tensor in other]:
                raise RetensorError(
                    f"the outputs of the {type(self.net).__name__} change their shape with the width of "
                    f"{', '.join(self.layers)}; generate layers whose channels are not put out"
                )


def fuse_and_smooth(
    model: nn.Module,
    layers: str | Sequence[str],
    *,
    example: Any,
    solver: Solver = "fast_tsp",
    seconds: float = 2.0,
) -> WidthSpace:
    """Fuse a trained network's batch normalisations, reorder its channels, and say which layers to generate.

    Parameters
    ----------
    model : nn.Module
        With its trained values. It stays as it is.
    layers, example
        As in :class:`WidthSpace`.
    solver : {"fast_tsp", "nearest", "none"}
        How a group's order is found (:func:`shortest_path`); ``none`` fuses only.
    seconds : float
        Most for a group.

    Raises
    ------
    ValueError, RetensorError
        As :class:`WidthSpace` does.

    Examples
    --------
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    >>> space = fuse_and_smooth(net, "**", example=torch.zeros(1, 1, 8, 8))
    >>> before, after = space.variation
    >>> after < before, sorted(space.orders["0",])
    (True, [0, 1, 2, 3, 4, 5])
    """
    fused = fuse(model, example=example)
    before = total_variation(fused)
    orders = smooth_(fused, example=example, solver=solver, seconds=seconds)
    space = WidthSpace(fused, layers, example=example)
    space.orders = orders
    space.variation = (before, space.variation[1])
    return space


def resample(
    weight: torch.Tensor, bias: torch.Tensor | None, rows: Axis, columns: Axis, width: int, reference: int
) -> dict[str, torch.Tensor]:
    """A weight and a bias along the channels' path at another width; see :meth:`WidthSpace.resampled`."""
    check_width(width)
    mine, theirs = (axis.source(width, reference).to(weight.device) for axis in (rows, columns))
    found = {"weight": weight[mine][:, theirs] * (columns.full / len(theirs))}
    return found if bias is None else found | {"bias": bias[mine]}


def check_width(width: Any) -> None:
    """Refuse what is no width."""
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"a width is a whole number of channels, not {described(width)}")
    if width < 1:
        raise ValueError(f"a width is at least 1 channel, not {width}")


class _Run(nn.Module):
    """A network with some of its tensors given."""

    def __init__(self, net: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.net = net
        self.tensors = tensors

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return functional_call(self.net, self.tensors, arguments, named)


def _generated(net: nn.Module, patterns: Sequence[Any]) -> tuple[str, ...]:
    """Names of the layers with weights that patterns mean, or that lie in what they mean."""
    if not patterns:
        raise ValueError("no layers are named; name those to generate, such as ['layer3.2']")
    outer: list[str] = []
    for pattern in patterns:
        found = matching(net, pattern)
        if not found:
            names = [name for name, _ in net.named_modules()]
            raise ValueError(f"pattern {described(pattern)} means no layer; {suggestions(pattern, names)}")
        outer += found
    chosen = tuple(
        name
        for name, module in net.named_modules()
        if isinstance(module, LAYERS) and any(name == o or name.startswith(f"{o}.") or not o for o in outer)
    )
    if not chosen:
        raise ValueError(
            f"there is no linear layer or convolution in {', '.join(map(repr, outer))}; name layers that have weights"
        )
    return chosen


def _inner(group: ChannelGroup, layers: Iterable[str]) -> bool:
    return bool(
        group.producers
        and group.consumers
        and not group.obstacles
        and all(member.layer in layers for member in group.members)
    )


def _refuse(net: nn.Module, layers: Sequence[str], groups: Sequence[ChannelGroup]) -> None:
    """Name what cannot be generated at other widths."""
    for name in layers:
        if getattr(net.get_submodule(name), "groups", 1) != 1:
            raise ValueError(
                f"'{name}' is a grouped or depthwise convolution, whose channels cannot be generated at other widths; "
                "name other layers"
            )
    for group in groups:
        if not all(member.layer in layers for member in group.members) or not group.members:
            continue
        if group.norms:
            raise ValueError(
                f"the channels of '{group.members[0].layer}' go through the batch normalisation '{group.norms[0]}', "
                "which is not fused; load the trained values, then use fuse or fuse_and_smooth"
            )
        if group.obstacles and group.consumers:
            raise ValueError(
                f"the channels of '{group.members[0].layer}' are also those of {group.obstacles[0]}, which is not "
                "generated at other widths; name other layers"
            )


def _refuse_fixed(layers: Sequence[str], inner: Sequence[ChannelGroup], groups: Sequence[ChannelGroup]) -> None:
    """Name generated layers of which nothing would change, and the fixed layers that are in the way."""
    changing = {member.layer for group in inner for member in group.members}
    for name in layers:
        if name in changing:
            continue
        others: list[Member] = [
            member
            for group in groups
            if any(mine.layer == name for mine in group.members)
            for member in group.members
            if member.layer not in layers
        ]
        told = f"'{others[0].layer}', which is fixed" if others else "the network's inputs or outputs"
        raise ValueError(
            f"'{name}' has no inner width: its channels are also those of {told}; generate that layer too, or leave "
            f"'{name}' out"
        )
