"""Reorder a network's channels so that neighbours are alike, without changing what it computes.

The order of a group of channels is a shortest Hamiltonian path between their points, of all tensors that the channels
index, under L1 distances: a city at distance 0 to all is added, the tour is solved, and cut at that city. As every
tensor's total variation along an axis is the path length of its part of the points, the network's total variation falls
by as much as its paths.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from retensor.compression.neumeta.groups import ChannelGroup, channel_groups
from retensor.errors import MissingExtraError
from retensor.files import described
from retensor.replacing.norms import run
from retensor.replacing.replace import copied

Solver: TypeAlias = Literal["fast_tsp", "nearest", "none"]

# Distances of fast-tsp are whole numbers below 2**16.
_LONGEST = 60_000


def total_variation(net: nn.Module) -> float:
    """The total variation of a network's parameters along their first two axes, a tensor.

    ``TV = (1/#tensors) sum |w[i+1,:] - w[i,:]| + |w[:,j+1] - w[:,j]|``, over parameters of any number of axes; the
    second part only for those that have two.

    Examples
    --------
    >>> net = nn.Linear(2, 3)
    >>> with torch.no_grad():
    ...     net.weight.copy_(torch.tensor([[0.0, 1], [0, 1], [2, 2]])), net.bias.copy_(torch.tensor([1.0, 1, 4]))
    (Parameter...
    >>> total_variation(net)
    4.0
    """
    sums = [_variation(parameter.detach()) for parameter in net.parameters()]
    return sum(sums) / max(1, len(sums))


def shortest_path(points: torch.Tensor, *, solver: Solver = "fast_tsp", seconds: float = 2.0) -> list[int]:
    """An order of points along which the sum of L1 distances between neighbours is small.

    Parameters
    ----------
    points : torch.Tensor
        Shape (points, values).
    solver : {"fast_tsp", "nearest", "none"}
        ``fast_tsp``: a shortest Hamiltonian path, exact up to 19 points and rounding to 1/60000 of the longest
        distance; beyond by local search. ``nearest``: the nearest point not yet visited, from the best start.
        ``none``: the given order.
    seconds : float
        Most that the search takes; it ends before where it no longer improves. What it finds can differ from run to
        run. A path longer than the given order, or than the nearest neighbours', is never returned.

    Raises
    ------
    ValueError
        Where the solver is unknown, or ``seconds`` is not above 0.
    MissingExtraError
        Where fast-tsp is not installed.

    Examples
    --------
    >>> points = torch.tensor([[0.0], [5], [1], [3]])
    >>> order = shortest_path(points)
    >>> path_length(points, order), sorted(order)
    (5.0, [0, 1, 2, 3])
    """
    if solver not in ("fast_tsp", "nearest", "none"):
        raise ValueError(f"'{solver}' is no solver; they are 'fast_tsp', 'nearest' and 'none'")
    if not seconds > 0:
        raise ValueError(f"a search takes some seconds, not {described(seconds)}")
    given = list(range(len(points)))
    if solver == "none" or len(points) < 3:
        return given
    distances = _distances(points)
    orders = [given, _nearest(distances)]
    if solver == "fast_tsp" and distances.max() > 0:
        orders.append(_solved(distances, seconds))
    # The first of equals, so that what is smooth already stays as it is.
    return min(orders, key=lambda order: _length(distances, order))


def path_length(points: torch.Tensor, order: list[int]) -> float:
    """The sum of L1 distances between neighbours along an order of points of shape (points, values).

    >>> path_length(torch.tensor([[0.0, 0], [3, 1], [1, 0]]), [0, 2, 1])
    4.0
    """
    return _length(_distances(points), order)


def smooth_(
    net: nn.Module, *, example: Any, solver: Solver = "fast_tsp", seconds: float = 2.0
) -> dict[tuple[str, ...], list[int]]:
    """Reorder the channels of every group in place; what the network computes stays.

    Groups that only one layer's outputs index (the network's), that other things than linear layers and convolutions
    hold, or whose reordering would change an output are left. So is one whose total variation would not fall.

    Returns
    -------
    mapping of tuple of str to list of int
        The order of each reordered group, by the names of the layers that make its channels: place i holds what was
        channel ``order[i]``. A time-limited search need not find the same again, so keep it.
    """
    orders: dict[tuple[str, ...], list[int]] = {}
    groups = channel_groups(net, example)
    # In double precision a reordered sum cannot be taken for another function.
    exact, inputs = copied(net).double().eval(), doubled(example)
    before = outputs_of(exact, inputs)
    for group in groups:
        if not group.movable:
            continue
        order = shortest_path(group.points(net), solver=solver, seconds=seconds)
        if order == sorted(order):
            continue
        if _changed(group, exact, order) >= 0 or not same(before, outputs_of(exact, inputs)):
            group.reorder_(exact, torch.tensor(order).argsort())
            continue
        group.reorder_(net, torch.tensor(order))
        orders[group.producers] = order
    return orders


def doubled(example: Any) -> Any:
    """An example whose floating-point tensors are of double precision."""

    def convert(value: Any) -> Any:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return tree_map(convert, example)


def outputs_of(net: nn.Module, example: Any) -> list[torch.Tensor]:
    """Tensors that come out of a network."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(run(net, example)) if isinstance(leaf, torch.Tensor)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether tensors of double precision differ by no more than the order of sums explains."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9 * max(1e-30, float(a.abs().max())))
        for a, b in zip(one, other, strict=True)
        if a.numel()
    )


def _variation(tensor: torch.Tensor) -> float:
    tensor = tensor.double()
    found = 0.0
    for axis in range(min(2, tensor.dim())):
        found += float(tensor.diff(dim=axis).abs().sum())
    return found


def _distances(points: torch.Tensor) -> torch.Tensor:
    points = points.detach().double().cpu()
    count = len(points)
    found = torch.zeros(count, count, dtype=points.dtype)
    above, below = torch.triu_indices(count, count, offset=1)
    # Several times faster than cdist where points have thousands of values.
    found[above, below] = found[below, above] = nn.functional.pdist(points, p=1)
    return found


def _length(distances: torch.Tensor, order: list[int]) -> float:
    return float(distances[order[:-1], order[1:]].sum())


def _nearest(distances: torch.Tensor) -> list[int]:
    """Nearest neighbours from every start at once, and the shortest of the paths."""
    count = len(distances)
    here = torch.arange(count)
    visited = torch.eye(count, dtype=torch.bool)
    paths, lengths = [here], torch.zeros(count, dtype=distances.dtype)
    for _ in range(count - 1):
        step, here = distances[here].masked_fill(visited, math.inf).min(dim=1)
        visited[torch.arange(count), here] = True
        lengths += step
        paths.append(here)
    found: list[int] = torch.stack(paths)[:, lengths.argmin()].tolist()
    return found


def _solved(distances: torch.Tensor, seconds: float) -> list[int]:
    try:
        import fast_tsp
    except ImportError as error:
        raise MissingExtraError("the shortest path between channels", "compression") from error
    count = len(distances)
    # The added city is the last.
    whole = torch.zeros(count + 1, count + 1, dtype=torch.int64)
    whole[:count, :count] = (distances * (_LONGEST / distances.max())).round().to(torch.int64)
    tour = fast_tsp.find_tour(whole.tolist(), seconds, stop_when_converged=True)
    cut = tour.index(count)
    return [*tour[cut + 1 :], *tour[:cut]]


def _changed(group: ChannelGroup, net: nn.Module, order: list[int]) -> float:
    """Reorder, and by how much the group's total variation rose: below 0 where it fell.

    It can rise although the path is shorter where a flattened picture puts several columns to a channel.
    """

    def variation() -> float:
        names = {member.layer for member in group.members}
        return sum(_variation(p.detach()) for name in names for p in net.get_submodule(name).parameters())

    before = variation()
    group.reorder_(net, torch.tensor(order))
    return variation() - before
