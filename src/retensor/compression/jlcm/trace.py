"""Which channels of a network can be put in another order without changing what it computes.

Nothing is read off the network's code. Each layer's output, and each other tensor of the model (norms, depthwise
convolutions, embeddings, tokens), is disturbed in turn while all other layers give what they gave before: the layers
whose input changes read it directly. Layers that are read by the same one share their channels, as writers and readers
of a residual stream do. Each set of places that follows is then tried: a random order is put in all of its places, in a
float64 copy whose parameters are disturbed too, so that no zero hides a reader, and kept only where the outputs stay.
That the trial is on generic parameters is what lets one input stand for all; where layers are not called for it (the
experts that other inputs go to), whatever might share its channels with one of them stays.

So found are hidden units, channels of convolutions with their norms and depthwise convolutions, residual streams,
parts of a concatenation, values inside a head, and queries with keys inside a head. Queries and keys that are rotated
by their position stay: each pair of them has a frequency of its own, which all heads and layers share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils import _pytree as pytree

from retensor.compression.jlcm.movable import Movable, Place, Trace, check_values, tensors_of
from retensor.files import described
from retensor.graph.modes import evaluating
from retensor.quantizing.samples import call_of
from retensor.quantizing.units import LAYERS

SAME = 1e-12
"""What a layer reads is disturbed where it differs by more, relative to its largest number: nothing else is random."""
NEAR = 1e-5
"""The most that outputs differ by, relative to their largest number, where an order changes nothing."""
LEAST = 1e-2
"""And the most of what they differ by where what reads the channels is not reordered."""


def trace(model: nn.Module, example: Any) -> Trace:
    """Find the channels of a model that can be reordered.

    Parameters
    ----------
    model : nn.Module
        Left as it is; a float64 copy of it is run, in eval mode, once for each of its tensors.
    example : torch.Tensor, tuple or mapping
        An input, arguments, or named arguments; one or two samples are enough.

    Returns
    -------
    Trace

    Raises
    ------
    TypeError
        Where the example is none.
    ValueError
        Where the model's outputs are not finite, or hold no tensor, or weights hold no values (meta device).

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    >>> found = trace(net, torch.ones(1, 4))
    >>> [(movable.channels, list(movable.rows())) for movable in found.movables], found.fixed
    ([(6, ['0'])], {'2': 'it is part of the output'})
    """
    check_values(model)
    arguments, named = pytree.tree_map(_double, call_of(example))
    copied = copy.deepcopy(model).double()
    copied.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in copied.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1 + 0.3 * _uniform(parameter.shape, generator).to(parameter.device))
            parameter.add_(0.02 * _uniform(parameter.shape, generator).to(parameter.device))
    with evaluating(copied), torch.no_grad():
        tracer = _Tracer(copied, lambda: copied(*arguments, **named), generator)
        return tracer.found()


@dataclass
class _Component:
    """Layers whose outputs meet, with the layers that read them and the other tensors on the way."""

    writers: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    output: bool = False


class _Tracer:
    def __init__(self, model: nn.Module, call: Callable[[], Any], generator: torch.Generator) -> None:
        self.model, self.call, self.generator = model, call, generator
        self.tensors = tensors_of(model)
        self.layers = {name: m for name, m in model.named_modules() if isinstance(m, LAYERS) and _plain(m)}
        self.gave: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}
        self.took: dict[str, list[torch.Tensor]] = {name: [] for name in self.layers}
        with self._hooked(self._record):
            self.out = _tensors(call())
        if not self.out or not all(bool(torch.isfinite(part).all()) for part in self.out):
            raise ValueError("the model gives no finite tensor for this example; give one that it takes")
        # The projection of torch's attention is read by its module, and is among the other tensors.
        self.unseen = {
            name: layer
            for name, layer in self.layers.items()
            if not self.gave[name] and not isinstance(layer, NonDynamicallyQuantizableLinear)
        }
        self.layers = {name: layer for name, layer in self.layers.items() if self.gave[name]}

    def found(self) -> Trace:
        movables: list[Movable] = []
        fixed: dict[str, str] = {}
        for component in self._components():
            kept: list[Movable] = []
            if component.output:
                reason = "it is part of the output"
            elif not component.readers:
                reason = "no linear layer or convolution reads it"
            elif unseen := self._unseen(component):
                reason = f"the way to '{unseen}', which this example never calls, cannot be followed"
            else:
                kept = next((good for good in self._hypotheses(component) if good), [])
                reason = f"the way to {', '.join(map(repr, component.readers[:3]))} cannot be followed"
            movables += kept
            moved = {name for movable in kept for name in movable.rows()}
            fixed |= {name: reason for name in component.writers if name not in moved}
        return Trace(tuple(movables), fixed)

    def _components(self) -> list[_Component]:
        written = {name: self._reads(name) for name in self.layers}
        inside = {f"{name}.{leaf}" for name in self.layers for leaf in ("weight", "bias")}
        others = {
            name: self._reads_tensor(tensor)
            for name, tensor in self.tensors.items()
            if name not in inside and tensor.is_floating_point() and tensor.numel() > 1
        }
        parent = {reader: reader for reader in self.layers}

        def root(name: str) -> str:
            while parent[name] != name:
                name = parent[name]
            return name

        met = [readers for readers, _ in written.values()]
        # An embedding writes to a residual stream as layers do; a table of angles, which all heads read, joins nothing.
        met += [
            readers
            for name, (readers, _) in others.items()
            if self.tensors[name].ndim > 1
            and {self._columns(reader) for reader in readers} == {self.tensors[name].shape[-1]}
        ]
        for readers in met:
            for one, other in pairwise(readers):
                parent[root(one)] = root(other)
        found: dict[str, _Component] = {}
        for name, (readers, output) in written.items():
            component = found.setdefault(root(readers[0]) if readers else f"\0{name}", _Component())
            component.writers.append(name)
            component.output |= output
        for reader in self.layers:
            if root(reader) in found:
                found[root(reader)].readers.append(reader)
        for name, (readers, output) in others.items():
            for key in {root(reader) for reader in readers} & set(found):
                found[key].others.append(name)
                found[key].output |= output and len({root(reader) for reader in readers}) == 1
        return list(found.values())

    def _unseen(self, component: _Component) -> str | None:
        """A layer that is not called and might share the component's channels, as an expert for other inputs would."""
        columns, rows = {self._columns(name) for name in component.readers}, {*map(self._rows, component.writers)}
        for name, layer in self.unseen.items():
            if layer.weight.shape[1] in columns or layer.weight.shape[0] in rows:
                return name
        return None

    def _hypotheses(self, component: _Component) -> Iterator[list[Movable]]:
        """Sets of movables by what the component may be, each tried; empty where the trial fails."""
        writers = {name: self._rows(name) for name in component.writers}
        readers = {name: self._columns(name) for name in component.readers}
        sizes = set(writers.values())
        if len(sizes) == 1 and all(columns % next(iter(sizes)) == 0 for columns in readers.values()):
            channels = next(iter(sizes))
            places = [place for name in writers for place in self._written(name, torch.arange(channels))]
            places += [
                Place(f"{name}.weight", 1, torch.arange(columns).reshape(channels, -1))
                for name, columns in readers.items()
            ]
            places += self._along(component.others, channels, torch.arange(channels))
            yield self._kept([self._movable(channels, places)])
        if len(readers) != 1:
            return
        reader, columns = next(iter(readers.items()))
        if sum(writers.values()) == columns and len(writers) > 1:
            start, joined = 0, []
            for name, channels in writers.items():
                span = torch.arange(start, start + channels)
                places = [*self._written(name, torch.arange(channels)), Place(f"{reader}.weight", 1, span[:, None])]
                places += self._along(component.others, columns, span)
                joined.append(self._movable(channels, places))
                start += channels
            yield self._kept(joined)
        yield self._attention(writers, reader, columns)

    def _attention(self, writers: Mapping[str, int], reader: str, columns: int) -> list[Movable]:
        """Values and what reads them, and queries with keys, inside each head."""
        names = list(writers)
        if len(names) == 1 and writers[names[0]] % columns == 0 and writers[names[0]] // columns == 3:
            starts = [(names[0], part * columns, columns) for part in range(3)]
        elif len(names) == 3:
            starts = [(name, 0, writers[name]) for name in names]
        else:
            return []
        for heads in _heads(self.model, reader):
            # Of grouped queries fewer heads are keys and values, each for as many queries.
            size = columns // heads
            if columns % heads or any(count % size for _, _, count in starts):
                continue
            inside = torch.arange(size)
            (query, q0, q), (key, k0, k), (value, v0, v) = starts
            if q != columns or k != v or (columns // v) * v != columns:
                continue
            each = columns // v
            pairs, values = [], []
            for head in range(v // size):
                shared = (head * each + torch.arange(each))[None, :] * size + inside[:, None]
                mine = head * size + inside
                places = [
                    *self._written(value, v0 + mine),
                    Place(f"{reader}.weight", 1, shared),
                ]
                values.append(self._movable(size, places))
                places = [*self._written(key, k0 + mine)]
                for column in shared.T:
                    places += self._written(query, q0 + column)
                pairs.append(self._movable(size, places))
            kept = self._kept(values) + self._kept(pairs)
            if kept:
                return kept
        return []

    def _movable(self, channels: int, places: Sequence[Place]) -> Movable:
        """Of places that may lie in one tensor: a fused projection holds queries and keys."""
        merged: dict[tuple[str, int], list[torch.Tensor]] = {}
        for place in places:
            merged.setdefault((place.tensor, place.dim), []).append(place.index)
        joined = (Place(tensor, dim, torch.cat(parts, 1)) for (tensor, dim), parts in merged.items())
        return Movable(channels, tuple(joined), frozenset(self.layers))

    def _written(self, name: str, rows: torch.Tensor) -> list[Place]:
        labels = [f"{name}.weight", f"{name}.bias"]
        return [Place(label, 0, rows[:, None]) for label in labels if label in self.tensors]

    def _along(self, others: Sequence[str], size: int, span: torch.Tensor) -> list[Place]:
        """Places of the other tensors: the last dimension of that size, the first of a depthwise convolution."""
        places = []
        for name in others:
            tensor = self.tensors[name]
            module = self.model.get_submodule(name.rpartition(".")[0])
            dims = [dim for dim, length in enumerate(tensor.shape) if length == size]
            if dims:
                places.append(Place(name, dims[0] if isinstance(module, LAYERS) else dims[-1], span[:, None]))
        return places

    def _kept(self, movables: list[Movable]) -> list[Movable]:
        """The movables, where the outputs stay under random orders of them all; nothing otherwise.

        How far the outputs go where the layers alone are reordered, and not what reads them, is the measure: a model
        may have operations in float32 inside, and a layer may do little.
        """
        orders = [torch.randperm(movable.channels, generator=self.generator) for movable in movables]
        apart = self._moved(movables, orders, whole=True)
        alone = self._moved(movables, orders, whole=False)
        return movables if apart <= NEAR * self._size() and apart <= LEAST * alone else []

    def _moved(self, movables: Sequence[Movable], orders: Sequence[torch.Tensor], whole: bool) -> float:
        """The largest change of an output."""
        names = {place.tensor for movable in movables for place in movable.places}
        saved = {name: self.tensors[name].clone() for name in names}
        for movable, order in zip(movables, orders, strict=True):
            movable.reorder_(self.tensors, order, movable.places[: None if whole else 1])
        out = _tensors(self.call())
        for name, tensor in saved.items():
            self.tensors[name].copy_(tensor)
        return max(float((one - other).abs().max()) for one, other in zip(out, self.out, strict=True) if one.numel())

    def _size(self) -> float:
        return max(float(part.abs().max()) for part in self.out if part.numel())

    def _reads(self, name: str) -> tuple[list[str], bool]:
        """Layers that read a layer's output directly, in the order of the model, and whether the outputs do."""
        return self._changed(disturbed=name)

    def _reads_tensor(self, tensor: torch.Tensor) -> tuple[list[str], bool]:
        saved = tensor.clone()
        tensor.mul_(1 + 0.1 * _uniform(tensor.shape, self.generator).to(tensor.device))
        tensor.add_(0.01 * _uniform(tensor.shape, self.generator).to(tensor.device))
        try:
            return self._changed()
        finally:
            tensor.copy_(saved)

    def _changed(self, disturbed: str = "") -> tuple[list[str], bool]:
        changed: dict[str, None] = {}
        turns = dict.fromkeys(self.layers, 0)

        def replay(name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            turn = turns[name]
            turns[name] += 1
            if not _same(x, self.took[name][turn]):
                changed[name] = None
            gave = self.gave[name][turn]
            if name == disturbed:
                shape = [1] * gave.ndim
                shape[1 if isinstance(self.layers[name], LAYERS[1:]) else -1] = self._rows(name)
                factor = 1 + 0.1 * _uniform(shape, self.generator)
                return gave * factor.to(gave.device) + 0.01 * _uniform(shape, self.generator).to(gave.device)
            return gave

        with self._hooked(replay):
            out = _tensors(self.call())
        return [name for name in self.layers if name in changed], not _all_same(out, self.out)

    def _record(self, name: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        # Kept as they are now: an operation in place may follow.
        self.took[name].append(x.clone())
        self.gave[name].append(out.clone())
        return out

    @contextmanager
    def _hooked(self, function: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        handles = [
            layer.register_forward_hook(
                lambda _, x, named, out, name=name: function(name, x[0] if x else named["input"], out.clone()),
                with_kwargs=True,
            )
            for name, layer in self.layers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _rows(self, name: str) -> int:
        return int(self.layers[name].weight.shape[0])

    def _columns(self, name: str) -> int:
        return int(self.layers[name].weight.shape[1])


def _plain(layer: nn.Module) -> bool:
    return getattr(layer, "groups", 1) == 1


def _heads(model: nn.Module, reader: str) -> list[int]:
    """How many heads the modules around a layer say that they have, the nearest first; then the model's settings."""
    found: dict[int, None] = {}
    parts = reader.split(".")
    around = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts), -1, -1)]
    # The parts of an attention may lie side by side.
    near = [child for module in around[1:3] for child in module.children()]
    for owner in (*around, *near, *(getattr(module, "config", None) for module in around)):
        for label in ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads"):
            value = getattr(owner, label, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                found[value] = None
    return list(found)


def _tensors(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def _all_same(found: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> bool:
    return len(found) == len(wanted) and all(map(_same, found, wanted))


def _same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    if not wanted.numel():
        return True
    return bool((found - wanted).abs().max() <= SAME * wanted.abs().max().clamp(min=1e-30))


def _uniform(shape: Sequence[int] | torch.Size, generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def _double(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor):
        raise TypeError(f"an example is a tensor, or a tuple or mapping of tensors, not {described(leaf)}")
    return leaf.double() if leaf.is_floating_point() else leaf
