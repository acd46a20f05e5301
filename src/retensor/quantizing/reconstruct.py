"""Reconstruction: the parts of a model put in few bits one after another, each fitted to what it gave before.

For each unit in the order of the model, with ``X`` what reaches it in the given model, ``X'`` what reaches it behind
the units that are done, and ``Y = f(X)`` what it gave: minimise the distance of ``f'(X_mix)`` and ``Y`` by what the
method learns, where each number of ``X_mix`` is of ``X'`` with probability ``input_mix`` and of ``X`` otherwise; then
put the result in the unit's place. A method is what stands in the layers while they are fitted, its optimisers and its
loss (:class:`Method`); everything else is here, once.

Y. Li and others, BRECQ, ICLR 2021, arXiv 2102.05426 (block by block); X. Wei, R. Gong, Y. Li, X. Liu, F. Yu, QDrop,
ICLR 2022, arXiv 2203.05740 (mixed inputs).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from retensor.bars import watched
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.quantizing.layers import QuantizedLayer
from retensor.quantizing.samples import CHUNK, Samples, Storage, calibration_samples, caught, first_tensor, outputs
from retensor.quantizing.units import LAYERS, Unit, find_units
from retensor.replacing.replace import copied, move_hooks, put_everywhere
from retensor.replacing.state import save
from retensor.units import check_seed

CHECKS = 10
"""How often the samples that are held out are looked at while a unit is fitted."""


@dataclass
class Fitting:
    """One unit while it is fitted.

    Attributes
    ----------
    unit : Unit
    model : nn.Module
        The student as it stands: units before are done. Its modules may be changed in place.
    teacher : nn.Module
        The given model, which nothing may change.
    clean, inputs : Samples
        What reaches the unit in the teacher and in the student.
    target : torch.Tensor
        What the unit gives in the teacher, of shape (samples, rows of a sample, ...).
    kept : dict
        What a method wants to remember of this unit.
    output : torch.Tensor, optional
        What the unit gives in the student, once it is done.
    chosen : torch.Tensor, optional
        Numbers of the samples of the step that is being taken.
    """

    unit: Unit
    model: nn.Module
    teacher: nn.Module
    clean: Samples
    inputs: Samples
    target: torch.Tensor
    kept: dict[str, Any] = field(default_factory=dict)
    output: torch.Tensor | None = None
    chosen: torch.Tensor | None = None

    @property
    def module(self) -> nn.Module:
        """The unit in the student."""
        return self.model.get_submodule(self.unit.name)

    def layer(self, name: str) -> nn.Module:
        """A layer of the student by its name in the model."""
        return self.model.get_submodule(name)

    def place(self, name: str, new: nn.Module) -> None:
        """Put a module in the place of one of the student's, whose hooks it takes over, under all names it has."""
        old = self.layer(name)
        move_hooks(old, new)
        put_everywhere(self.model, old, new)


class Method:
    """What a way of putting weights in few bits brings: subclasses say what is learned and how.

    One object serves all units; what belongs to one is kept in :attr:`Fitting.kept`.
    """

    def begin(self, fitting: Fitting) -> Sequence[torch.optim.Optimizer]:
        """Put what is learned in the unit's layers; the optimisers that train it, none where nothing is trained."""
        raise NotImplementedError

    def loss(self, fitting: Fitting, found: torch.Tensor, wanted: torch.Tensor, done: float) -> torch.Tensor:
        """What a step lowers: by default squares summed over axis 1 and averaged over the others.

        Parameters
        ----------
        fitting : Fitting
        found, wanted : torch.Tensor
            What the unit gives for some samples, and what it gave in the teacher; shape (batch, ...).
        done : float
            The part of the steps that was taken, from 0 to below 1.
        """
        squares = (found - wanted).square()
        return (squares.sum(1) if squares.ndim > 1 else squares).mean()

    def rate(self, done: float) -> float:
        """The part of each optimiser's rate that a step takes: by default down to nothing along a cosine.

        A group of parameters that has a function ``rate`` of its own takes that.
        """
        return 0.5 + 0.5 * math.cos(math.pi * done)

    def after_step(self, fitting: Fitting, done: float) -> None:
        """Called after each step."""

    @contextmanager
    def judged(self, fitting: Fitting) -> Iterator[None]:
        """While this lasts the unit gives what it would in few bits, as far as it does not while it is fitted.

        The error at the beginning and those of samples that are held out are taken so.
        """
        yield

    def end(self, fitting: Fitting) -> dict[str, Any]:
        """Put what was found in the unit's place, in few bits; what to report of it."""
        raise NotImplementedError


@dataclass(frozen=True)
class UnitReport:
    """What became of one unit.

    Attributes
    ----------
    name : str
    layers : tuple of str
    before, after : float
        Mean square of the difference from what the unit gave, relative to that of what it gave, over all samples as
        they reach it in the student: when the method began, and with the result in place.
    seconds : float
    found : dict
        What the method reports.
    """

    name: str
    layers: tuple[str, ...]
    before: float
    after: float
    seconds: float
    found: dict[str, Any]


@dataclass(frozen=True)
class Reconstruction:
    """A model in few bits, and how each unit came out.

    Attributes
    ----------
    model : nn.Module
        In eval mode; its parameters take no gradients.
    report : tuple of UnitReport
        In the order of the model.
    """

    model: nn.Module
    report: tuple[UnitReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all packed weights, with steps and zero points; of nothing else."""
        return sum(module.nbytes for module in self.model.modules() if isinstance(module, QuantizedLayer))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to a file (:func:`retensor.save`); :func:`retensor.load` reads it, given the original."""
        save(self.model, path)


# A caller who turned gradients off for evaluating fits with them all the same.
@torch.inference_mode(False)
@torch.enable_grad()
def reconstruct(
    model: nn.Module,
    calibration: Any,
    method: Method,
    *,
    blocks: Literal["auto"] | Sequence[str] = "auto",
    steps: int = 500,
    batch: int = 32,
    input_mix: float = 0.5,
    held_out: float = 0.0,
    storage: Storage | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Put a model in few bits, unit by unit.

    Parameters
    ----------
    model : nn.Module
        Left as it is; it runs in eval mode. Normalisation that follows a layer is best folded into it before.
    calibration
        Samples of its arguments, without labels: a tensor, a tuple or mapping of tensors, or a list of such batches.
    method : Method
    blocks : "auto" or sequence of str
        See :func:`retensor.quantizing.find_units`.
    steps, batch : int
        Steps for each unit, and samples of each.
    input_mix : float
        The part of a unit's inputs that comes from behind the units in few bits, number by number.
    held_out : float
        The part of the samples that no step uses; of the values at ten moments those are kept whose error on it is
        least. 0 keeps the last.
    storage : Storage, optional
        Where what reaches units is kept: the largest part of the memory taken.
    seed : int
        Of the order of samples and of the mixing.

    Returns
    -------
    Reconstruction

    Raises
    ------
    TypeError, ValueError
        Where an argument is out of range or does not fit the model.
    RuntimeError
        Where numbers are not finite, named by the unit, or weights hold no values (meta device).
    """
    _check(model, method, steps, batch, input_mix, held_out)
    if storage is not None and not isinstance(storage, Storage):
        raise TypeError(f"storage is a Storage, not {described(storage)}")
    check_seed(seed)
    samples = calibration_samples(calibration, _device(model))
    storage = storage or Storage()
    generator = torch.Generator().manual_seed(seed)
    report: list[UnitReport] = []
    student = copied(model)
    student.requires_grad_(False)
    with evaluating(model), evaluating(student), _without_cache(model), _without_cache(student):
        units = find_units(model, samples, blocks)
        before: Fitting | None = None
        for unit in watched(units, type(method).__name__, len(units)):
            start = time.monotonic()
            fitting = before = _fitting(unit, before, model, student, samples, storage)
            optimizers = method.begin(fitting)
            with method.judged(fitting):
                error = _error(fitting)
            if optimizers and steps:
                _fit(fitting, method, optimizers, steps, batch, input_mix, held_out, generator)
            found = method.end(fitting)
            fitting.output = outputs(fitting.module, fitting.inputs, storage, unit.name)
            after = _relative(fitting.output, fitting.target)
            report.append(UnitReport(unit.name, unit.layers, error, after, time.monotonic() - start, found))
    student.requires_grad_(False)
    return Reconstruction(student.eval(), tuple(report))


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Keep language models of transformers from handing one cache of keys and values to all of their blocks.

    Whatever runs one of them again would add to it.
    """
    settings = {id(found): found for module in model.modules() if (found := getattr(module, "config", None))}
    cached = [found for found in settings.values() if getattr(found, "use_cache", None) is True]
    try:
        for found in cached:
            found.use_cache = False
        yield
    finally:
        for found in cached:
            found.use_cache = True


def _fitting(
    unit: Unit, before: Fitting | None, model: nn.Module, student: nn.Module, samples: Samples, storage: Storage
) -> Fitting:
    """What reaches a unit: from the unit before where nothing lies between, else by a run of both models."""
    if before is not None and before.output is not None and unit.follows is not None:
        clean = before.clean.with_leaf(unit.follows, before.target)
        inputs = clean.with_leaf(unit.follows, before.output)
    else:
        clean = caught(model, unit.name, samples, storage)
        inputs = clean if before is None else caught(student, unit.name, samples, storage)
    target = outputs(model.get_submodule(unit.name), clean, storage, unit.name)
    return Fitting(unit, student, model, clean, inputs, target)


def _fit(
    fitting: Fitting,
    method: Method,
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    batch: int,
    input_mix: float,
    held_out: float,
    generator: torch.Generator,
) -> None:
    order = torch.randperm(len(fitting.clean), generator=generator)
    apart = min(round(held_out * len(order)), len(order) - 1)
    looked_at, used = order[:apart], order[apart:]
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    learned = [value for optimizer in optimizers for group in optimizer.param_groups for value in group["params"]]
    best, least = [value.detach().clone() for value in learned], math.inf
    turn = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        done = step / steps
        if apart and step % max(1, steps // CHECKS) == 0:
            with method.judged(fitting):
                best, least = _better(fitting, looked_at, learned, best, least)
        if len(turn) < min(batch, len(used)):
            turn = torch.cat([turn, used[torch.randperm(len(used), generator=generator)]])
        chosen, turn = turn[:batch], turn[batch:]
        fitting.chosen = chosen
        arguments, named = fitting.clean.mixed(fitting.inputs, chosen, input_mix, generator)
        found = first_tensor(fitting.module(*arguments, **named), fitting.unit.name)
        loss = method.loss(fitting, found, _wanted(fitting, chosen, found), done)
        if not math.isfinite(loss.item()):
            raise RuntimeError(
                f"the loss of '{fitting.unit.name}' is {loss.item()} at step {step}; take a lower learning rate"
            )
        for optimizer, rate in zip(optimizers, rates, strict=True):
            optimizer.zero_grad(set_to_none=True)
            for group, highest in zip(optimizer.param_groups, rate, strict=True):
                group["lr"] = highest * group.get("rate", method.rate)(done)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        method.after_step(fitting, done)
    if apart:
        with method.judged(fitting):
            best, _ = _better(fitting, looked_at, learned, best, least)
        with torch.no_grad():
            for value, kept in zip(learned, best, strict=True):
                value.copy_(kept)


def _better(
    fitting: Fitting, chosen: torch.Tensor, learned: list[torch.Tensor], best: list[torch.Tensor], least: float
) -> tuple[list[torch.Tensor], float]:
    """The values of least error on samples that no step uses, of those so far and the present ones."""
    error = _error(fitting, chosen)
    return ([value.detach().clone() for value in learned], error) if error < least else (best, least)


@torch.no_grad()
def _error(fitting: Fitting, chosen: torch.Tensor | None = None) -> float:
    """Relative mean square of the difference, on some samples or all, as they reach the unit in the student."""
    chosen = torch.arange(len(fitting.inputs)) if chosen is None else chosen
    apart = size = 0.0
    for part in chosen.split(CHUNK):
        arguments, named = fitting.inputs.take(part)
        found = first_tensor(fitting.module(*arguments, **named), fitting.unit.name)
        wanted = _wanted(fitting, part, found)
        apart += float((found - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
    return apart / size if size else apart


def _wanted(fitting: Fitting, chosen: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    return fitting.target[chosen].flatten(0, 1).to(found)


def _relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    size = float(wanted.double().square().sum())
    return float((found.double() - wanted.double()).square().sum()) / size if size else 0.0


def _device(model: nn.Module) -> torch.device:
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if any(device.type == "meta" for device in devices):
        raise RuntimeError("weights on the meta device hold no values; load the model's weights first")
    if len(devices) > 1:
        raise ValueError(f"the model lies on {len(devices)} devices; move it to one")
    return devices.pop() if devices else torch.device("cpu")


def _check(model: Any, method: Any, steps: Any, batch: Any, input_mix: Any, held_out: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"an nn.Module is put in few bits, not {described(model)}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("a scripted model cannot be put in few bits; do it before scripting")
    if isinstance(model, LAYERS):
        raise ValueError(
            f"the model is one {type(model).__name__}, and parts of a model are put in few bits; give "
            "nn.Sequential(layer)"
        )
    if not isinstance(method, Method):
        raise TypeError(f"method is a Method, not {described(method)}")
    for name, value, least in (("steps", steps, 0), ("batch", batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is a whole number from {least}, not {described(value)}")
    for name, share, most in (("input_mix", input_mix, 1.0), ("held_out", held_out, 0.9)):
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= most:
            raise ValueError(f"{name} is a part from 0 to {most:g}, not {described(share)}")
