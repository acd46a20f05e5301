"""A network whose inner widths can change: which layers, which channels, and how wide each is at a width."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from retensor.compression.neumeta.groups import ChannelGroup, Member, channel_groups, expanded
from retensor.compression.neumeta.smoothing import Solver, outputs_of, smooth_, total_variation
from retensor.errors import RetensorError
from retensor.files import brief, described
from retensor.replacing.match import inside, matching, suggestions
from retensor.replacing.norms import LAYERS, normalised
from retensor.replacing.norms import fold_norms as fuse
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
        """Rows or columns at a width, where the full one is ``reference``.

        >>> Axis(full=32, channels=16, per=2).size(4, reference=8), Axis(full=32).size(4, reference=8)
        (16, 32)
        """
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


@dataclass(frozen=True)
class Geometry:
    """The shapes of a generated layer's tensors at any width, and its full tensors at any width.

    Attributes
    ----------
    rows, columns : Axis
    reference : int
        The full width.
    kernel : tuple of int
    bias : bool
    """

    rows: Axis
    columns: Axis
    reference: int
    kernel: tuple[int, ...] = ()
    bias: bool = True

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of ``weight`` and ``bias`` at a width."""
        rows, columns = (axis.size(width, self.reference) for axis in (self.rows, self.columns))
        return {"weight": (rows, columns, *self.kernel)} | ({"bias": (rows,)} if self.bias else {})

    def resampled(self, weight: torch.Tensor, bias: torch.Tensor | None, width: int) -> dict[str, torch.Tensor]:
        """Full tensors along the channels' path at another width; see :meth:`WidthSpace.resampled`."""
        mine, theirs = (axis.source(width, self.reference).to(weight.device) for axis in (self.rows, self.columns))
        found = {"weight": weight[mine][:, theirs] * (self.columns.full / len(theirs))}
        return found if bias is None else found | {"bias": bias[mine]}


class WidthSpace:
    """A trained network, and the layers of it that are to be generated at any width.

    Parameters
    ----------
    model : nn.Module
        Trained, with its batch normalisations fused (:func:`retensor.replacing.fold_norms`). It stays as it is.
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
    movable : mapping of tuple of str to int
        All groups that can be reordered, of fixed layers too: the layers that make their channels, and how many.
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
        _refuse(self.net, self.layers, groups, normalised(self.net, example))
        # In the network's order, so that the reference is the first.
        place = {name: i for i, (name, _) in enumerate(self.net.named_modules())}
        movable = sorted((group for group in groups if group.movable), key=lambda group: place[group.producers[0]])
        self.movable = {group.producers: group.channels for group in movable}
        self.groups = tuple(group for group in movable if _within(group, self.layers))
        _refuse_fixed(self.layers, self.groups, groups)
        self.full_width = self.groups[0].channels
        self.orders: dict[tuple[str, ...], list[int]] = {}
        variation = total_variation(self.net)
        self.variation = (variation, variation)
        self._check_another_width(example)

    def geometry(self, name: str) -> Geometry:
        """The shapes of a generated layer at any width."""
        layer = self.net.get_submodule(name)
        rows, columns, *kernel = layer.weight.shape
        sides = {
            member.side: (group.channels, member.per)
            for group in self.groups
            for member in group.members
            if member.layer == name
        }
        return Geometry(
            Axis(rows, *sides.get("out", ())), Axis(columns, *sides.get("in", ())), self.full_width, tuple(kernel),
            layer.bias is not None,
        )  # fmt: skip

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the generated tensors at a width, by name.

        Raises
        ------
        ValueError
            Where the width is below 1.
        """
        check_width(width)
        return {
            f"{name}.{label}": shape
            for name in self.layers
            for label, shape in self.geometry(name).shapes(width).items()
        }

    def parameters(self, width: int) -> int:
        """Elements of the generated tensors at a width.

        Raises
        ------
        ValueError
            Where the width is below 1.
        """
        return sum(math.prod(shape) for shape in self.shapes(width).values())

    def resampled(self, width: int) -> dict[str, torch.Tensor]:
        """The generated tensors of the full network at another width, by name.

        ``W_h[i] = W[floor((i+.5) H/h)]`` along the rows and columns that change, and columns times H/h, so that sums
        over channels keep their size.

        Raises
        ------
        ValueError
            Where the width is below 1.
        """
        check_width(width)
        found: dict[str, torch.Tensor] = {}
        for name in self.layers:
            layer = self.net.get_submodule(name)
            bias = None if layer.bias is None else layer.bias.detach()
            parts = self.geometry(name).resampled(layer.weight.detach(), bias, width)
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


def check_width(width: Any) -> None:
    """Refuse what is no width."""
    if isinstance(width, bool) or not isinstance(width, int):
        raise TypeError(f"a width is a whole number of channels, not {described(width)}")
    if width < 1:
        raise ValueError(f"a width is at least 1 channel, not {width}")


def check_amounts(**amounts: Any) -> None:
    """Refuse what is no finite number from 0 on."""
    for name, amount in amounts.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < math.inf:
            raise ValueError(f"{name} is a finite number, 0 or above, not {described(amount)}")


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
        if isinstance(module, LAYERS) and any(inside(name, other) for other in outer)
    )
    if not chosen:
        raise ValueError(
            f"there is no linear layer or convolution in {', '.join(map(repr, outer))}; name layers that have weights"
        )
    return chosen


def _within(group: ChannelGroup, layers: Iterable[str]) -> bool:
    return bool(group.members) and all(member.layer in layers for member in group.members)


def _refuse(net: nn.Module, layers: Sequence[str], groups: Sequence[ChannelGroup], norms: Mapping[str, str]) -> None:
    """Name what cannot be generated at other widths; ``norms`` are those that would still fuse, by layer."""
    for name in layers:
        if getattr(net.get_submodule(name), "groups", 1) != 1:
            raise ValueError(
                f"'{name}' is a grouped or depthwise convolution, whose channels cannot be generated at other widths; "
                "name other layers"
            )
    for group in groups:
        if not _within(group, layers):
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
    for name in layers:
        if name in norms:
            raise ValueError(
                f"the outputs of '{name}' go through the batch normalisation '{norms[name]}', which is not fused; load "
                "the trained values, then use fuse or fuse_and_smooth"
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
