"""Running what lies behind a module of a model alone, with what the module gave put in its place.

No hooks: modules of a shell of the model, which shares all tensors with it, are exchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from retensor.files import described
from retensor.quantizing.samples import check_finite, first_tensor
from retensor.replacing.match import inside, suggestions

AGREES = 1e-4
"""Difference of the outputs, relative to their largest number, below which a run of the rest is one of the model."""


FEW = 4
"""Pictures by which that is looked at."""


class Watched(nn.Module):
    """A module that keeps what it was called with and what it gave last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.input: Any = None
        self.output: Any = None

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """What the module gives."""
        self.input = arguments[0] if arguments else None
        self.output = self.inner(*arguments, **named)
        return self.output


class Given(nn.Module):
    """Gives a tensor that was put in it, whatever it is called with."""

    value: torch.Tensor

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """The tensor."""
        return self.value


class Shifted(nn.Module):
    """A module to whose output a tensor is added."""

    value: torch.Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """The sum."""
        out: torch.Tensor = self.inner(*arguments, **named) + self.value
        return out


def shell(model: nn.Module) -> nn.Module:
    """The model with the same tensors but modules of its own, which may be exchanged. Hooks stay behind."""
    made: dict[int, nn.Module] = {}

    def of(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = made[id(module)] = copy.copy(module)
            new.__dict__["_modules"] = {name: None if sub is None else of(sub) for name, sub in module._modules.items()}
            new.__dict__["training"] = False
        return made[id(module)]

    return of(model)


def exchange(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in a place of a shell."""
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = new


class Traced:
    """A model's outputs for pictures, and those of some of its modules.

    Parameters
    ----------
    model : nn.Module
    images : torch.Tensor
        Shape (pictures, ...).
    units : sequence of str
        Modules that are called once, one after another.
    keep : collection of str
        Modules whose outputs are kept.
    batch : int

    Attributes
    ----------
    order : list of str
        The units as they are called.
    logits : torch.Tensor
        Shape (pictures, classes).
    kept : dict of str to torch.Tensor
        Outputs by module, of as many rows as there are pictures, or a multiple of it.
    """

    def __init__(
        self, model: nn.Module, images: torch.Tensor, units: Sequence[str], keep: Collection[str], batch: int
    ) -> None:
        known = dict(model.named_modules())
        for name in (*units, *keep):
            if name not in known or not name:
                raise ValueError(f"the model has no module {described(name)}; {suggestions(name, known)}")
        self.model, self.images, self.batch = model, images, batch
        self.order: list[str] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in keep}
        logits: list[torch.Tensor] = []
        watching = shell(model)
        # The innermost first, so that an outer watcher goes around one that stands already.
        watched = {name: Watched(known[name]) for name in sorted({*units, *keep}, key=len, reverse=True)}
        for name, watcher in watched.items():
            watcher.inner = watching.get_submodule(name)
        for name, watcher in watched.items():
            if (outer := _within(name, watched)) is None:
                exchange(watching, name, watcher)
            else:
                exchange(watched[outer].inner, name.removeprefix(f"{outer}."), watcher)
        with torch.no_grad():
            for start in range(0, len(images), batch):
                found = first_tensor(watching(images[start : start + batch]), "the model")
                check_finite(found, "what the model gives")
                logits.append(found)
                for name in keep:
                    parts[name].append(_tensor(watched[name].output, name))
                if not start:
                    self.order = [name for name in units if watched[name].output is not None]
                    self.shapes = {name: tuple(_tensor(watched[name].output, name).shape) for name in self.order}
        self.logits = torch.cat(logits)
        self.kept = {name: torch.cat(found) for name, found in parts.items()}

    def before(self, name: str) -> tuple[list[str], str | None]:
        """Units called before the one that is or holds a module, and the last of them where it holds it."""
        at = next((i for i, unit in enumerate(self.order) if inside(name, unit)), None)
        if at is None:
            return [], None
        earlier = self.order[:at]
        return earlier, earlier[-1] if earlier and name != self.order[at] else None

    def rows(self, tensor: torch.Tensor, start: int, count: int | None = None) -> torch.Tensor:
        """Of a tensor whose first axis is the pictures' or a multiple of it, those of a batch or of so many."""
        each = len(tensor) // len(self.images)
        return tensor[start * each : (start + (count or self.batch)) * each]


class Behind:
    """A model from behind a module: called with pictures and what the module gives, it gives the model's outputs.

    Units before it are not run: they give zeros, but for the last one where the module lies inside the next, which
    gives what it gave. Where the outputs then are not the model's, because something else of what comes before is used,
    or where ``rerun`` is True, the model is run whole and what is given is its difference from what the module gives.
    """

    def __init__(self, traced: Traced, name: str, outputs: torch.Tensor, *, rerun: bool = False) -> None:
        self.traced, self.name, self.outputs = traced, name, outputs
        earlier, last = traced.before(name)
        self.last, self.rerun = (last if last in traced.kept else None), rerun
        if last is not None and self.last is None:
            earlier = []
        self.net = shell(traced.model)
        self.stub: Given | Shifted
        if not rerun:
            self.zeros: dict[str, Given] = {unit: Given() for unit in earlier}
            for unit, given in self.zeros.items():
                exchange(self.net, unit, given)
            self.stub = Given()
            exchange(self.net, name, self.stub)
            if not self._agrees():
                self.net, self.rerun = shell(traced.model), True
        if self.rerun:
            self.stub = Shifted(self.net.get_submodule(name))
            exchange(self.net, name, self.stub)

    def __call__(self, start: int, shift: torch.Tensor, count: int | None = None) -> torch.Tensor:
        """Outputs for the batch of pictures that begins at ``start``, with ``shift`` added to what the module gives."""
        images = self.traced.rows(self.traced.images, start, count)
        if self.rerun:
            self.stub.value = shift
        else:
            for unit, given in self.zeros.items():
                if unit == self.last:
                    given.value = self.traced.rows(self.traced.kept[unit], start, count)
                else:
                    shape = self.traced.shapes[unit]
                    rows = shape[0] // min(self.traced.batch, len(self.traced.images)) * len(images)
                    given.value = images.new_zeros(()).expand(rows, *shape[1:])
            self.stub.value = self.traced.rows(self.outputs, start, count) + shift
        return first_tensor(self.net(images), "the model")

    @torch.no_grad()
    def _agrees(self) -> bool:
        wanted = self.traced.logits[:FEW]
        try:
            found = self(0, torch.zeros_like(self.traced.rows(self.outputs, 0, FEW)), FEW)
        except (RuntimeError, TypeError, ValueError):
            return False
        return found.shape == wanted.shape and bool((found - wanted).abs().max() <= AGREES * wanted.abs().max())


def _within(name: str, others: Collection[str]) -> str | None:
    """The innermost of the others that a module lies in."""
    outer = [other for other in others if name.startswith(f"{other}.")]
    return max(outer, key=len) if outer else None


def _tensor(found: Any, name: str) -> torch.Tensor:
    if not isinstance(found, torch.Tensor):
        what = "is never called" if found is None else f"gives {described(found)}"
        raise ValueError(f"'{name}' {what}; a module that gives one tensor is needed")
    return found
