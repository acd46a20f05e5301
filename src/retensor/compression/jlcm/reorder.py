"""Output neurons put in the order of their groups, with everything that reads them: the function stays.

A row's group then follows from its place alone. A layer whose rows nothing else has to follow is ordered by its own
groups; where several layers share an order (a residual stream, gates, queries and keys inside a head), channels are
sorted by their scale, the mean over those layers, and cut in equal parts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from retensor.compression.jlcm.grouping import Layout, Way, bounds_of, equal_bounds, group_rows, row_scales
from retensor.compression.jlcm.movable import Movable, Trace, tensors_of
from retensor.compression.jlcm.trace import trace
from retensor.errors import RetensorError
from retensor.replacing.match import suggestions
from retensor.replacing.replace import copied


class Reordering(NamedTuple):
    """A model in another order that gives the same, and how it was ordered.

    Attributes
    ----------
    model : nn.Module
    permutations : dict of str to torch.Tensor
        For each layer, int64 of shape (rows,): which row of the given model stands in each place. Layers whose rows
        stayed are left out.
    layouts : dict of str to Layout
        The groups of each layer whose rows were ordered by groups.
    """

    model: nn.Module
    permutations: dict[str, torch.Tensor]
    layouts: dict[str, Layout]


@dataclass(frozen=True)
class Order:
    """How the rows of a layer can be ordered.

    Attributes
    ----------
    movables : tuple of Movable
        Which move all of its rows, each once.
    own : bool
        Whether nothing else has to follow but what reads them.
    period : int
        Channels of each of the movables.
    """

    movables: tuple[Movable, ...]
    own: bool
    period: int


def reorder(
    model: nn.Module,
    example: Any,
    groups: int | Mapping[str, int] = 4,
    *,
    way: Way = "quantiles",
    strict: bool = False,
    seed: int = 0,
    found: Trace | None = None,
) -> Reordering:
    """Order the output neurons of a model's layers by groups of similar distributions.

    Parameters
    ----------
    model : nn.Module
        Left as it is; the result is a copy.
    example : torch.Tensor, tuple or mapping
        An input of the model, arguments or named arguments; its values do not matter.
    groups : int or mapping of layer to int
        Of every layer that can be ordered and has as many channels, or of those that are named.
    way : {"quantiles", "std", "random"}
        As in :func:`group_rows`, for layers that are ordered by themselves.
    strict : bool
        Whether a layer whose readers cannot be followed is an error and not a warning. (That rows which are part of
        the output stay where they are is neither.)
    seed : int
    found : Trace, optional
        What :func:`trace` found, to spare the work.

    Returns
    -------
    Reordering

    Raises
    ------
    RetensorError
        Where ``strict`` and a layer's readers cannot be followed, named.
    ValueError
        Where a named layer is none that can be ordered, or has fewer channels than groups.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> x = torch.randn(5, 4)
    >>> ordered = reorder(net, x, groups=2)
    >>> torch.allclose(ordered.model(x), net(x), atol=1e-6), list(ordered.permutations)
    (True, ['0'])
    """
    found = trace(model, example) if found is None else found
    complain(found, strict)
    orders = row_orders(model, found)
    if isinstance(groups, Mapping):
        for name, count in groups.items():
            if name not in orders:
                reason = found.fixed.get(name, "its rows cannot all be moved")
                known = suggestions(name, dict.fromkeys(orders))
                raise ValueError(f"the rows of '{name}' cannot be ordered, because {reason}; {known}")
            if not 1 <= count <= orders[name].period:
                raise ValueError(f"'{name}' has {orders[name].period} channels and cannot have {count} groups")
        wanted = dict(groups)
    else:
        if groups < 1:
            raise ValueError(f"groups is a number from 1, not {groups}")
        wanted = {name: groups for name, order in orders.items() if order.period >= groups}
    result = copied(model)
    tensors = tensors_of(result)
    rows = {name: torch.arange(len(tensors[f"{name}.weight"])) for name in wanted}
    layouts: dict[str, Layout] = {}
    moved: dict[int, torch.Tensor] = {}
    for name, count in wanted.items():
        order = orders[name]
        if order.own:
            labels = group_rows(tensors[f"{name}.weight"], count, way, seed)
            layouts[name] = Layout(count, order.period, bounds_of(labels, count))
            moved[id(order.movables[0])] = labels.argsort(stable=True)
        else:
            layouts[name] = Layout(count, order.period, equal_bounds(order.period, count))
            for movable in order.movables:
                moved.setdefault(id(movable), by_scale(model, movable))
    changed: dict[str, torch.Tensor] = {}
    for movable in found.movables:
        if id(movable) not in moved:
            continue
        movable.reorder_(tensors, moved[id(movable)])
        for name, index in movable.rows().items():
            mine = changed.setdefault(name, rows.get(name, torch.arange(len(tensors[f"{name}.weight"]))).clone())
            mine[index.flatten()] = mine[index[moved[id(movable)]].flatten()]
    return Reordering(result, changed, layouts)


def row_orders(model: nn.Module, found: Trace) -> dict[str, Order]:
    """Layers all of whose rows can be moved, in patterns that repeat."""
    rows: dict[str, list[tuple[Movable, torch.Tensor]]] = {}
    for movable in found.movables:
        for name, index in movable.rows().items():
            rows.setdefault(name, []).append((movable, index))
    orders: dict[str, Order] = {}
    for name, parts in rows.items():
        count = len(model.get_submodule(name).weight)
        period = parts[0][0].channels
        covered = torch.cat([index.flatten() for _, index in parts])
        if any(movable.channels != period for movable, _ in parts) or covered.sort().values.tolist() != [*range(count)]:
            continue
        if any(bool((index % period != torch.arange(period)[:, None]).any()) for _, index in parts):
            continue
        own = len(parts) == 1 and len(parts[0][0].rows()) == 1 and period == count
        orders[name] = Order(tuple(movable for movable, _ in parts), own, period)
    return orders


def by_scale(model: nn.Module, movable: Movable) -> torch.Tensor:
    """Channels sorted by the mean, over the layers that make them, of the logarithm of their rows' scale."""
    score = torch.zeros(movable.channels, dtype=torch.float64)
    for name, index in movable.rows().items():
        scale = row_scales(model.get_submodule(name).weight).clamp(min=1e-30).log()
        score += (scale - scale.mean())[index].mean(1)
    return score.argsort(stable=True)


def labels_in_place(model: nn.Module, name: str, order: Order, groups: int, way: Way, seed: int) -> torch.Tensor:
    """The group that each row of the given model would have once it is ordered."""
    if order.own:
        return group_rows(model.get_submodule(name).weight, groups, way, seed)
    labels = torch.empty(len(model.get_submodule(name).weight), dtype=torch.int64)
    parts = Layout(groups, order.period, equal_bounds(order.period, groups)).labels(order.period)
    for movable in order.movables:
        index = movable.rows()[name]
        labels[index[by_scale(model, movable)]] = parts[:, None].expand(-1, index.shape[1])
    return labels


def complain(found: Trace, strict: bool) -> None:
    """Say which layers' readers cannot be followed."""
    lost = {name: reason for name, reason in found.fixed.items() if "cannot be followed" in reason}
    if not lost:
        return
    name, reason = next(iter(lost.items()))
    others = f", nor those of {len(lost) - 1} others" if len(lost) > 1 else ""
    sentence = f"the rows of '{name}' stay where they are, because {reason}{others}"
    if strict:
        raise RetensorError(f"{sentence}; leave strict out to go on without them")
    warnings.warn(f"{sentence}; their groups are labels of a few bits a row instead", UserWarning, stacklevel=3)
