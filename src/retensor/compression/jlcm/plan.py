"""Which codebooks each layer of a model gets: the same for all, or those of least error in a given number of bytes.

For a budget each layer has a list of options (codewords, groups, variant, where its rows' groups come from, or to stay
as it is), each with its bytes and its error; :mod:`.budget` takes one of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from retensor.bars import watched
from retensor.compression.jlcm.budget import knapsack
from retensor.compression.jlcm.grouping import Layout, Way, equal_bounds, group_rows
from retensor.compression.jlcm.initial import nearest_codes
from retensor.compression.jlcm.layer import VARIANTS, Coding, Variant, check_codewords, codebook_bits_of
from retensor.compression.jlcm.movable import Trace, check_values
from retensor.compression.jlcm.reorder import Order, labels_in_place, row_orders
from retensor.compression.jlcm.trace import trace
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.quantizing.layers import layer_settings
from retensor.quantizing.samples import call_of
from retensor.quantizing.units import LAYERS

Rows = Literal["one", "absorbed", "labels"]
CODEWORDS = (2, 4, 8, 16, 32, 64, 128, 256)
GROUPS = (1, 2, 4)
SAMPLE, EACH = 4096, 8
"""Order statistics by which the error of an option is estimated: of a layer, and of a codeword at least."""


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets.

    Attributes
    ----------
    name : str
    shape : tuple of int
    k, groups : int
    variant : {"codebooks", "scales"}
    rows : {"one", "absorbed", "labels"}
        One group; groups that follow from the order of the rows, which what reads them follows; or a label for each
        row.
    nbytes : int
        Of indices, codebooks, scales, bounds and labels.
    error : float
        Estimated, relative to the layer's output; not a number where it was not worked out.
    codebook_bits : int
    """

    name: str
    shape: tuple[int, ...]
    k: int
    groups: int
    variant: Variant
    rows: Rows
    nbytes: int
    error: float = math.nan
    codebook_bits: int = 16


@dataclass(frozen=True)
class Plan:
    """Codebooks for a model.

    Attributes
    ----------
    layers : tuple of LayerPlan
        Others stay as they are.
    other_bytes : int
        Of all tensors of the model but the weights of those layers.
    dense_bytes : int
        Of all tensors of the model as it is.
    budget : int, optional
        Bytes that were asked for.
    """

    layers: tuple[LayerPlan, ...]
    other_bytes: int
    dense_bytes: int
    budget: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the compressed model; a file has a header besides."""
        return self.other_bytes + sum(layer.nbytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Of the layers that have codebooks, with everything that is kept for them; not a number where none has."""
        if not self.layers:
            return math.nan
        return 8 * sum(layer.nbytes for layer in self.layers) / sum(math.prod(layer.shape) for layer in self.layers)

    def table(self) -> str:
        """The plan for people."""
        width = max([len(layer.name) for layer in self.layers] + [5])
        lines = [f"{'layer':{width}}  {'k':>4}  groups  {'variant':9}  {'rows':8}  {'bytes':>10}"]
        lines += [
            f"{one.name:{width}}  {one.k:4}  {one.groups:6}  {one.variant:9}  {one.rows:8}  {one.nbytes:10,}"
            for one in self.layers
        ]
        lines.append(f"{'other tensors':{width + 34}}{self.other_bytes:10,}")
        return "\n".join([*lines, f"{self.nbytes:,} bytes of {self.dense_bytes:,}"])


def uniform(
    model: nn.Module,
    k: int = 4,
    groups: int = 1,
    variant: Variant = "codebooks",
    *,
    example: Any = None,
    skip: Sequence[str] = (),
) -> Plan:
    """The same codebooks for every linear layer and convolution.

    Parameters
    ----------
    model : nn.Module
        On the meta device too, where no example is given.
    k, groups : int
        Codewords and groups; at most as many groups as any layer has rows.
    variant : {"codebooks", "scales"}
    example : optional
        An input of the model; with it, rows are ordered by groups where what reads them can follow. Without, each row
        has a label.
    skip : sequence of str
        Names of layers that stay.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError, TypeError
        Where a setting is out of range, a layer has fewer rows than groups, or a weight is not finite.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))
    >>> found = uniform(net, k=4)
    >>> found.nbytes, found.dense_bytes
    (6224, 83008)
    """
    found = trace(model, example) if example is not None and needs_trace(groups) else None
    return uniform_for(model, k, groups, variant, found, skip)


def needs_trace(groups: Any) -> bool:
    """Whether rows are put in groups; whatever is no number of groups is refused elsewhere."""
    return isinstance(groups, int) and groups > 1


def uniform_for(
    model: nn.Module, k: int, groups: int, variant: Variant, found: Trace | None, skip: Sequence[str]
) -> Plan:
    """:func:`uniform` for a model that was traced."""
    check_codewords(k)
    if variant not in VARIANTS:
        raise ValueError(f"variant is {described(variant)}; it is 'codebooks' or 'scales'")
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups is a number from 1, not {described(groups)}")
    layers = coded_layers(model, skip)
    orders = {} if found is None else row_orders(model, found)
    plans = []
    for name, layer in layers.items():
        shape = tuple(layer.weight.shape)
        if groups > shape[0]:
            raise ValueError(
                f"'{name}' has {shape[0]} rows and cannot have {groups} groups; take fewer, or name it in skip"
            )
        # Inside small heads a pattern would fix too much; labels are free to follow the weights.
        own = name in orders and orders[name].own
        rows: Rows = "one" if groups == 1 else "absorbed" if own else "labels"
        plans.append(_planned(name, layer, k, groups, variant if groups > 1 else "codebooks", rows, orders.get(name)))
    kept = [one for one in plans if one.nbytes < layers[one.name].weight.nbytes]
    return _plan(model, kept, layers)


def plan(
    model: nn.Module,
    budget_bytes: int,
    example: Any,
    *,
    codewords: Sequence[int] = CODEWORDS,
    groups: Sequence[int] = GROUPS,
    variants: Sequence[Variant] = ("codebooks", "scales"),
    way: Way = "quantiles",
    skip: Sequence[str] = (),
    seed: int = 0,
) -> Plan:
    """The codebooks of least error, summed over layers, that fit in a number of bytes.

    A layer's error is that of its output, relative to it, as weights that are off by chance make it:
    ``|W - W'|**2 E[x**2] / (rows E[(W x)**2])``.

    Parameters
    ----------
    model : nn.Module
        Left as it is; it runs on the example in eval mode.
    budget_bytes : int
        Of all tensors of the compressed model; what has no codebook counts too. (A file has a header besides: its
        names and settings, under a kilobyte a layer.)
    example : torch.Tensor, tuple or mapping
        Inputs of the model; some dozens measure what reaches the layers.
    codewords, groups, variants : sequence
        What a layer may have.
    way : {"quantiles", "std"}
        How rows are put in groups.
    skip : sequence of str
        Names of layers that stay.
    seed : int

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        Where the budget is below the smallest plan there is, which is named, or a setting is out of range.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 16))
    >>> found = plan(net, 8_000, torch.randn(32, 64), codewords=(2, 4, 16))
    >>> found.nbytes <= 8_000
    True
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int) or budget_bytes < 1:
        raise ValueError(f"budget_bytes is a number of bytes, not {described(budget_bytes)}")
    for k in codewords:
        check_codewords(k)
    layers = coded_layers(model, skip)
    check_values(model)
    power = _powers(model, layers, example)
    orders = row_orders(model, trace(model, few(example)))
    options: dict[str, list[LayerPlan | None]] = {}
    for name in watched(list(layers), "options", len(layers)):
        layer, found = layers[name], []
        for count in (count for count in groups if count <= layer.weight.shape[0]):
            kinds: list[tuple[Rows, torch.Tensor]] = [
                ("one" if count == 1 else "labels", group_rows(layer.weight, count, way, seed))
            ]
            if count > 1 and name in orders and count <= orders[name].period:
                labels = labels_in_place(model, name, orders[name], count, way, seed)
                # What a label would say anyway is free in an order of the layer's own.
                kinds = [*(() if orders[name].own else kinds), ("absorbed", labels)]
            for rows, labels in kinds:
                for variant in variants if count > 1 else variants[:1]:
                    found += [
                        _planned(
                            name, layer, k, count, "codebooks" if count == 1 else variant, rows, orders.get(name),
                            power.get(name, 1.0) * estimate(layer.weight, k, labels, count, variant),
                        )
                        for k in codewords
                    ]  # fmt: skip
        options[name] = [*(one for one in found if one.nbytes < layer.weight.nbytes), None]
    everything = _plan(model, [], layers).dense_bytes
    fixed = everything - sum(layer.weight.nbytes for layer in layers.values())

    def size(name: str, option: LayerPlan | None) -> tuple[int, float]:
        return (layers[name].weight.nbytes, 0.0) if option is None else (option.nbytes, option.error)

    sizes = {name: [size(name, option) for option in found] for name, found in options.items()}
    least = fixed + sum(min(one[0] for one in found) for found in sizes.values())
    if budget_bytes < least:
        raise ValueError(
            f"a budget of {budget_bytes:,} bytes is below the {least:,} that this model takes at least: {fixed:,} of "
            f"tensors without codebooks, and {least - fixed:,} of the smallest codes; give more, or a narrower type"
        )
    chosen = knapsack(list(sizes.values()), budget_bytes - fixed)
    taken = [options[name][place] for name, place in zip(options, chosen, strict=True)]
    return _plan(model, [one for one in taken if one is not None], layers, budget_bytes)


def estimate(weight: torch.Tensor, k: int, labels: torch.Tensor, groups: int, variant: Variant) -> float:
    """``|W - W'|**2`` over ``|W|**2`` for the nearest codes, by order statistics of each group.

    Eight for each codeword leave out a 64th of the error.
    """
    rows = weight.detach().reshape(len(weight), -1).cpu().double()
    parts, kinds, counts = [], [], []
    for group in range(groups):
        values = rows[labels == group].flatten().sort().values
        if not len(values):
            continue
        # One codebook is fitted to all groups together.
        share = 1 if variant == "codebooks" else groups
        count = min(len(values), max(SAMPLE // groups, -(-EACH * k // share)))
        at = ((torch.arange(count, dtype=torch.float64) + 0.5) * (len(values) / count)).long()
        parts.append(values[at])
        kinds.append(torch.full((count,), group))
        counts.append(torch.full((count,), len(values) / count, dtype=torch.float64))
    sample, kind, mass = torch.cat(parts), torch.cat(kinds), torch.cat(counts)
    coded = nearest_codes(sample[:, None], k, kind, groups, variant)
    off = ((coded.weight()[:, 0] - sample).square() * mass).sum()
    return float(off / (sample.square() * mass).sum().clamp(min=1e-300))


def coded_layers(model: nn.Module, skip: Sequence[str] = ()) -> dict[str, nn.Module]:
    """Layers whose weight can be coded: linear ones and convolutions, whose weight nothing else holds.

    Raises
    ------
    ValueError
        Where a weight is not finite, ``skip`` names no such layer, or there is none.
    TypeError
        Where it is no model, or a layer makes something else of its weight than torch's own.
    """
    found = candidates(model)
    for name in skip:
        if name not in found:
            raise ValueError(f"skip names {described(name)}, which is no layer that could be coded")
    found = {name: layer for name, layer in found.items() if name not in skip}
    if not found:
        raise ValueError("the model has no linear layer or convolution whose weight could be coded")
    for name, layer in found.items():
        check_layer(name, layer)
    return found


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions whose weight nothing else holds, whatever its values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is compressed, not {described(model)}")
    holders: dict[int, int] = {}
    for module in {id(module): module for module in model.modules()}.values():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
        and not isinstance(module, NonDynamicallyQuantizableLinear)
        and (weight := module._parameters.get("weight")) is not None
        and holders[id(weight)] == 1
    }


def check_layer(name: str, layer: nn.Module) -> None:
    """Refuse a layer whose weight has no codes."""
    try:
        layer_settings(layer)
    except TypeError as error:
        raise TypeError(f"'{name}': {error}; or name it in skip") from None
    if not layer.weight.is_meta and not bool(torch.isfinite(layer.weight).all()):
        raise ValueError(f"the weight of '{name}' is not finite; train again, or name it in skip")


def layout_of(one: LayerPlan, order: Order | None) -> Layout:
    """Groups as the plan has them; where they begin is not known before rows are ordered."""
    period = order.period if order is not None and one.rows == "absorbed" else one.shape[0]
    return Layout(one.groups, period, None if one.rows == "labels" else equal_bounds(period, one.groups))


def _planned(
    name: str, layer: nn.Module, k: int, groups: int, variant: Variant, rows: Rows, order: Order | None,
    error: float = math.nan,
) -> LayerPlan:  # fmt: skip
    shape, bits = tuple(layer.weight.shape), codebook_bits_of(layer.weight)
    made = LayerPlan(name, shape, k, groups, variant, rows, 0, error, bits)
    nbytes = Coding(k, layout_of(made, order), variant, bits).nbytes(shape)
    return LayerPlan(name, shape, k, groups, variant, rows, nbytes, error, bits)


def _plan(
    model: nn.Module, taken: Sequence[LayerPlan], layers: Mapping[str, nn.Module], budget: int | None = None
) -> Plan:
    # Nothing is counted twice that is one tensor; on the meta device tensors are told apart by themselves.
    kept = {
        (id(tensor) if tensor.is_meta else (tensor.data_ptr(), tuple(tensor.shape))): tensor.nbytes
        for tensor in model.state_dict(keep_vars=True).values()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }
    dense = sum(kept.values())
    other = dense - sum(layers[one.name].weight.nbytes for one in taken)
    return Plan(tuple(taken), other, dense, budget)


@torch.no_grad()
def _powers(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> dict[str, float]:
    """For each layer that is called, what makes a relative error of its weight one of its output."""
    sums = {name: [0.0, 0, 0.0, 0] for name in layers}

    def see(name: str, layer: nn.Module, x: torch.Tensor, out: torch.Tensor) -> None:
        if layer.bias is not None:
            shape = [1] * out.ndim
            shape[-1 if isinstance(layer, nn.Linear) else 1] = -1
            out = out - layer.bias.reshape(shape)
        for place, part in ((0, x), (2, out)):
            sums[name][place] += float(part.double().square().sum())
            sums[name][place + 1] += part.numel()

    handles = [
        layer.register_forward_hook(
            lambda layer, x, named, out, name=name: see(name, layer, x[0] if x else named["input"], out),
            with_kwargs=True,
        )
        for name, layer in layers.items()
    ]
    try:
        arguments, named = call_of(example)
        with evaluating(model):
            model(*arguments, **named)
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for name, (x, xs, y, ys) in sums.items():
        if x and y:
            size = float(layers[name].weight.detach().double().square().sum()) / layers[name].weight.shape[0]
            found[name] = size * (x / xs) / (y / ys)
    return found


def few(example: Any) -> Any:
    """Two samples of an example: enough to follow channels."""
    from torch.utils import _pytree as pytree

    return pytree.tree_map(lambda leaf: leaf[:2] if isinstance(leaf, torch.Tensor) and leaf.ndim else leaf, example)
