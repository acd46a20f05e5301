"""Whole models: planned, ordered, started at the nearest codes, and learned unit by unit."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from retensor.compression.jlcm.grouping import Layout, Way, group_rows
from retensor.compression.jlcm.initial import Coded, nearest_codes
from retensor.compression.jlcm.layer import CodebookLayer, Coding, Variant
from retensor.compression.jlcm.learn import Gradient, JointLearning, Phi, Rule
from retensor.compression.jlcm.movable import Trace, check_values
from retensor.compression.jlcm.plan import (
    LayerPlan,
    Plan,
    candidates,
    check_layer,
    coded_layers,
    few,
    needs_trace,
    uniform_for,
)
from retensor.compression.jlcm.reorder import complain, reorder, row_orders
from retensor.compression.jlcm.trace import trace
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.quantizing.reconstruct import UnitReport, reconstruct
from retensor.quantizing.samples import Storage, call_of
from retensor.quantizing.units import called_layers
from retensor.replacing import fold, save
from retensor.replacing import load as load_state

LR_MAP = 0.03
LR_CODEBOOK = 1e-3


@dataclass(frozen=True)
class LayerReport:
    """What became of one layer.

    Attributes
    ----------
    name : str
    nbytes : dict of str to int
        By term: indices, codebooks, scales, bounds, labels.
    weight_error : tuple of float
        ``|W - W'|**2 / |W|**2`` with the nearest codes, and with those that were learned.
    flips, mean_jump, longest_jump : float
        The part of the indices that learning changed, and how many places of the sorted codebook they went.
    """

    name: str
    nbytes: dict[str, int]
    weight_error: tuple[float, float]
    flips: float
    mean_jump: float
    longest_jump: float


@dataclass(frozen=True)
class Compressed:
    """A model whose weights are indices into codebooks.

    Attributes
    ----------
    model : nn.Module
        With a :class:`CodebookLayer` in the place of each coded layer, and its neurons in the order of their groups.
    plan : Plan
    report : tuple of LayerReport
    units : tuple of UnitReport
        The error of each unit's output before and after learning.
    permutations : dict of str to torch.Tensor
        Which row of the given model stands in each place, for layers whose rows were moved.
    """

    model: nn.Module
    plan: Plan
    report: tuple[LayerReport, ...]
    units: tuple[UnitReport, ...]
    permutations: dict[str, torch.Tensor]

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """What the model gives."""
        return self.model(*arguments, **named)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors of the model: what a file holds besides its header."""
        return resident_bytes(self.model)

    @property
    def bits_per_weight(self) -> float:
        """Of coded layers, with all that is kept for them; not a number where there is none."""
        layers = [module for module in self.model.modules() if isinstance(module, CodebookLayer)]
        if not layers:
            return math.nan
        return 8 * sum(layer.nbytes for layer in layers) / sum(layer.indices().numel() for layer in layers)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Keep the model in a file, as :func:`retensor.save` does; :func:`load` reads it."""
        save(self.model, path)

    def decompress(self) -> nn.Module:
        """The model with plain layers of the same weights."""
        return fold(self.model)


def compress(
    model: nn.Module,
    calibration: Any,
    plan: Plan | None = None,
    *,
    bits: int = 2,
    k: int | None = None,
    groups: int = 4,
    variant: Variant = "codebooks",
    gradient: Gradient = "proximal",
    phi: Phi = "inverse",
    iters: int = 500,
    lr_map: float = LR_MAP,
    lr_codebook: float = LR_CODEBOOK,
    optimizer: Literal["momentum", "shared"] = "momentum",
    commit: bool = False,
    batch: int = 32,
    input_mix: float = 0.5,
    held_out: float = 0.0,
    blocks: Literal["auto"] | Sequence[str] = "auto",
    way: Way = "quantiles",
    skip: Sequence[str] = (),
    strict: bool = False,
    storage: Storage | None = None,
    seed: int = 0,
) -> Compressed:
    """Compress a model: indices into small codebooks, learned so that its units give what they gave before.

    Parameters
    ----------
    model : nn.Module
        Left as it is; it runs in eval mode.
    calibration
        Samples of its arguments, without labels: a tensor, a tuple or mapping of tensors, or a list of such batches.
    plan : Plan, optional
        Of :func:`retensor.compression.jlcm.plan` or ``uniform`` for this model; without, one of ``k`` codewords,
        ``groups`` and ``variant`` for every layer.
    bits, k : int
        ``k`` codewords, ``2**bits`` where it is not given.
    groups : int
        Of rows; at most as many as any layer has.
    variant : {"codebooks", "scales"}
        A codebook for each group, or one codebook and a scale for each group.
    gradient : {"proximal", "softmax", "linear"}
    phi : {"inverse", "exponential"}
        Of the proximal gradient: see :mod:`retensor.compression.jlcm.learn`. On the small transformers of this
        library's claims ``softmax``, at a rate of 1, ends at somewhat less error.
    iters : int
        Steps for each unit; 0 keeps the nearest codes.
    lr_map, lr_codebook : float
        Rates: of the logits, in logits; of codewords and scales, relative to the spread of the codebook and to 1.
    optimizer : {"momentum", "shared"}
        Of the logits.
    commit : bool
        Whether indices stay for the last fifth of the steps, while codebooks are learned.
    batch, input_mix, held_out, blocks, storage
        As in :func:`retensor.quantizing.reconstruct`.
    way : {"quantiles", "std", "random"}
        How rows are put in groups.
    skip : sequence of str
        Names of layers that stay.
    strict : bool
        Whether it is an error and not a warning where a layer has groups of rows and what reads them cannot follow an
        order, so that each row has a label.
    seed : int

    Returns
    -------
    Compressed

    Raises
    ------
    ValueError, TypeError
        Where a setting is out of range, weights or samples are not finite, or the plan is one of another model.
    RetensorError
        Where ``strict`` and rows cannot be ordered.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    >>> small = compress(net, torch.randn(64, 16), bits=2, groups=4, iters=20)
    >>> small(torch.randn(3, 16)).shape, small.nbytes == small.plan.nbytes
    (torch.Size([3, 8]), True)
    """
    rule = Rule(gradient, phi)
    for name, value in (("lr_map", lr_map), ("lr_codebook", lr_codebook)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ValueError(f"{name} is a rate from 0, not {described(value)}")
    if optimizer not in ("momentum", "shared"):
        raise ValueError(f"optimizer is {described(optimizer)}; it is 'momentum' or 'shared'")
    example = few(calibration[0] if isinstance(calibration, list) and calibration else calibration)
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is compressed, not {described(model)}")
    check_values(model)
    found: Trace | None = None
    if plan is None:
        if k is None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 8):
            raise ValueError(f"bits is a number from 1 to 8, not {described(bits)}")
        coded_layers(model, skip)
        found = trace(model, example) if needs_trace(groups) else None
        plan = uniform_for(model, 2**bits if k is None else k, groups, variant, found, skip)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a Plan, not {described(plan)}")
    _check_plan(model, plan, example)
    if found is None and any(one.groups > 1 for one in plan.layers):
        found = trace(model, example)
    ordered, start, permutations = _started(model, example, plan, found, way, strict, seed)
    method = JointLearning(start, rule, lr_map, lr_codebook, optimizer, commit)
    done = reconstruct(
        ordered, calibration, method, blocks=blocks, steps=iters, batch=batch, input_mix=input_mix, held_out=held_out,
        storage=storage, seed=seed,
    )  # fmt: skip
    moved = {name: found for unit in done.report for name, found in unit.found.items()}
    report = []
    for one in plan.layers:
        layer, weight = done.model.get_submodule(one.name), ordered.get_submodule(one.name).weight.detach().double()
        size = weight.square().sum().clamp(min=1e-300)
        errors = (
            float((start[one.name][1].weight().reshape(weight.shape) - weight).square().sum() / size),
            float((layer.weight.double() - weight).square().sum() / size),
        )
        report.append(LayerReport(one.name, layer.coding.bytes_by_term(one.shape), errors, **moved[one.name]))
    return Compressed(done.model, plan, tuple(report), done.report, permutations)


def load(path: str | os.PathLike[str], model_factory: Callable[[], nn.Module] | nn.Module) -> nn.Module:
    """Read a model that was saved.

    Parameters
    ----------
    path : str or path
    model_factory : function or nn.Module
        A function that makes a model like the one that was compressed, or such a model; its values do not matter.

    Returns
    -------
    nn.Module
        With the codes in its layers, in eval mode.

    Raises
    ------
    RetensorError
        Where the file is missing, damaged or of another model.
    """
    base = model_factory if isinstance(model_factory, nn.Module) else model_factory()
    return load_state(path, base).eval()


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a model's state has, each once."""
    kept = {
        (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype): tensor.nbytes
        for tensor in model.state_dict().values()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }
    return sum(kept.values())


def _started(
    model: nn.Module, example: Any, plan: Plan, found: Trace | None, way: Way, strict: bool, seed: int
) -> tuple[nn.Module, dict[str, tuple[Coding, Coded]], dict[str, torch.Tensor]]:
    """The model in its order, and each layer's nearest codes."""
    layouts: dict[str, Layout] = {}
    permutations: dict[str, torch.Tensor] = {}
    if found is not None:
        grouped = {one.name for one in plan.layers if one.groups > 1}
        complain(replace(found, fixed={name: why for name, why in found.fixed.items() if name in grouped}), strict)
        orders = row_orders(model, found)
        wanted = {one.name: one.groups for one in plan.layers if one.rows == "absorbed"}
        kept = {name: count for name, count in wanted.items() if name in orders}
        if kept:
            # What else stays where it is was not asked for.
            found = replace(found, fixed={})
            model, permutations, layouts = reorder(model, example, kept, way=way, seed=seed, found=found)
    start: dict[str, tuple[Coding, Coded]] = {}
    for one in plan.layers:
        weight = model.get_submodule(one.name).weight
        layout, labels = _layout(one, layouts, weight, way, seed)
        coding = Coding(one.k, layout, one.variant, one.codebook_bits)
        start[one.name] = coding, nearest_codes(weight, one.k, labels, one.groups, one.variant)
    return model, start, permutations


def _layout(
    one: LayerPlan, layouts: dict[str, Layout], weight: torch.Tensor, way: Way, seed: int
) -> tuple[Layout, torch.Tensor]:
    rows = len(weight)
    if one.groups == 1:
        return Layout(1, rows), torch.zeros(rows, dtype=torch.int64)
    if one.name in layouts:
        return layouts[one.name], layouts[one.name].labels(rows)
    return Layout(one.groups, rows, None), group_rows(weight, one.groups, way, seed)


def _check_plan(model: nn.Module, plan: Plan, example: Any) -> None:
    layers = candidates(model)
    for one in plan.layers:
        if one.name not in layers or tuple(layers[one.name].weight.shape) != one.shape:
            raise ValueError(f"the plan has '{one.name}' of shape {list(one.shape)}, which the model lacks; plan anew")
        check_layer(one.name, layers[one.name])
    with evaluating(model):
        called = called_layers(model, *call_of(example))
    for one in plan.layers:
        if one.name not in called:
            raise ValueError(f"'{one.name}' is never called for this calibration; name it in skip")
