"""Calibration samples: what a model, or a module inside it, is called with, kept so that any few can be taken again.

Arguments are a tree of tuples, lists and mappings. Tensors in it whose first axis grows with the batch are kept for
each sample; everything else (position encodings, a flag) is kept once.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from retensor.files import brief, described

CHUNK = 64
"""Samples that run through a model at once where nothing is trained."""


@dataclass(frozen=True)
class Storage:
    """Where samples are kept: in memory or in files of a folder, in their own type or another.

    Parameters
    ----------
    dtype : torch.dtype, optional
        Floating-point type in which floating-point tensors are kept; their own by default. They are taken out in their
        own again.
    folder : path, optional
        Where temporary files are made, which vanish with the samples; memory by default.

    Raises
    ------
    TypeError, ValueError
        Where the type is none of floating point, or there is no such folder.
    """

    dtype: torch.dtype | None = None
    folder: str | Path | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise TypeError(f"samples are kept in a floating-point type of torch's, not in {described(self.dtype)}")
        if self.folder is not None and not Path(self.folder).is_dir():
            raise ValueError(f"samples are kept in a folder, and '{brief(self.folder)}' is none; make it before")

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room for a tensor that is used in type ``dtype``."""
        kept = self.dtype if self.dtype is not None and dtype.is_floating_point else dtype
        if self.folder is None:
            return torch.empty(*shape, dtype=kept)
        with tempfile.NamedTemporaryFile(dir=self.folder) as file:
            # The file has no name any more once this block ends; it goes with the tensor that maps it.
            flat = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=kept)
        return flat.reshape(*shape)


@dataclass(frozen=True)
class Leaf:
    """One argument: a tensor of all samples, or what is one for all of them."""

    value: Any
    # Rows of the tensor that belong to one sample; 0 where it is one for all.
    rows: int
    dtype: torch.dtype | None = None

    def take(self, chosen: torch.Tensor | slice, device: torch.device) -> Any:
        """Of some samples, on a device, in the type that the module is called with."""
        if not self.rows:
            return self.value
        return self.value[chosen].flatten(0, 1).to(device=device, dtype=self.dtype)


class Samples:
    """Arguments of one module for every sample.

    Attributes
    ----------
    leaves : list of Leaf
    count : int
        Samples.
    """

    def __init__(self, leaves: list[Leaf], tree: Any, count: int, device: torch.device) -> None:
        self.leaves, self.tree, self.count, self.device = leaves, tree, count, device

    def __len__(self) -> int:
        return self.count

    def take(self, chosen: torch.Tensor | slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and named arguments for some samples."""
        found = [leaf.take(chosen, self.device) for leaf in self.leaves]
        arguments, named = pytree.tree_unflatten(found, self.tree)
        return arguments, named

    def mixed(
        self, other: Samples, chosen: torch.Tensor, share: float, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of which each number is ``other``'s with probability ``share`` and these samples' otherwise."""
        found = []
        for mine, theirs in zip(self.leaves, other.leaves, strict=True):
            value = mine.take(chosen, self.device)
            if mine.rows and value.is_floating_point() and mine is not theirs and share > 0:
                drawn = torch.rand(value.shape, generator=generator).to(value.device)
                value = torch.where(drawn < share, theirs.take(chosen, self.device), value)
            found.append(value)
        arguments, named = pytree.tree_unflatten(found, self.tree)
        return arguments, named

    def chunks(self, size: int = CHUNK) -> Iterator[slice]:
        """All samples in parts, in order."""
        for start in range(0, self.count, size):
            yield slice(start, min(start + size, self.count))

    def with_leaf(self, index: int, value: torch.Tensor) -> Samples:
        """The same arguments but for one tensor."""
        leaves = list(self.leaves)
        leaves[index] = replace(leaves[index], value=value)
        return Samples(leaves, self.tree, self.count, self.device)


def calibration_samples(calibration: Any, device: torch.device) -> Samples:
    """What a user gives as calibration data, as samples of the model's arguments.

    Parameters
    ----------
    calibration : torch.Tensor, mapping of str to tensor, tuple of tensors, or list of these
        One batch, as positional arguments or as named ones, or a list of batches of equal shape but for the first axis.
    device : torch.device
        Of the model.

    Raises
    ------
    TypeError
        Where it is something else.
    ValueError
        Where there are fewer than two samples, batches differ in shape, or the tensors of one differ in length.
    """
    batches = calibration if isinstance(calibration, list) else [calibration]
    if not batches:
        raise ValueError("calibration holds no batch; give at least two samples")
    flat: list[list[torch.Tensor]] = []
    tree: Any = None
    for batch in batches:
        leaves, spec = pytree.tree_flatten(call_of(batch))
        if tree is not None and spec != tree:
            raise ValueError("the batches of calibration differ in their arguments; all need the same ones")
        tree = spec
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or not leaf.ndim:
                raise TypeError(f"calibration holds {described(leaf)}; its batches are made of tensors alone")
        if len({len(leaf) for leaf in leaves}) != 1:
            raise ValueError(
                f"the tensors of one batch have {[len(leaf) for leaf in leaves]} samples; all need as many, and there "
                "is at least one"
            )
        flat.append(leaves)
    for parts in zip(*flat, strict=True):
        shapes = {tuple(part.shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"the samples of calibration have shapes {sorted(shapes)}; pad or cut them to one")
    leaves = [Leaf(torch.cat(parts).unsqueeze(1), 1, parts[0].dtype) for parts in zip(*flat, strict=True)]
    for leaf in leaves:
        if leaf.value.is_floating_point() and not bool(torch.isfinite(leaf.value).all()):
            raise ValueError("calibration holds numbers that are not finite; take those samples out")
    count = len(leaves[0].value)
    if count < 2:
        raise ValueError(f"calibration holds {count} sample; at least two are needed, some hundreds are usual")
    return Samples(leaves, tree, count, device)


def caught(model: nn.Module, name: str, samples: Samples, storage: Storage) -> Samples:
    """What the module of that name is called with when a model runs on samples; the model stops there.

    Raises
    ------
    ValueError
        Where it is never reached.
    RuntimeError
        Where a number that reaches it is not finite.
    """
    one, tree = _reaches(model, name, samples, slice(0, 1))
    two, same = _reaches(model, name, samples, slice(0, 2))
    if tree != same:
        raise ValueError(f"'{name}' is called with other arguments for two samples than for one; leave it out")
    leaves = [_leaf(name, first, second, len(samples), storage) for first, second in zip(one, two, strict=True)]
    for part in samples.chunks():
        for leaf, value in zip(leaves, _reaches(model, name, samples, part)[0], strict=True):
            if leaf.rows:
                check_finite(value, f"what reaches '{name}'")
                leaf.value[part] = value.unflatten(0, (-1, leaf.rows)).cpu()
            else:
                _check_alike(name, leaf.value, value)
    return Samples(leaves, tree, len(samples), samples.device)


@torch.no_grad()
def outputs(module: nn.Module, samples: Samples, storage: Storage, what: str) -> torch.Tensor:
    """What a module gives for all samples, of shape (samples, rows of a sample, ...): its first tensor.

    Raises
    ------
    RuntimeError
        Where a number is not finite.
    """
    kept: torch.Tensor | None = None
    for part in samples.chunks():
        arguments, named = samples.take(part)
        found = first_tensor(module(*arguments, **named), what)
        check_finite(found, f"what '{what}' gives")
        if not found.ndim or not len(found) or len(found) % (part.stop - part.start):
            raise ValueError(
                f"'{what}' gives a tensor of shape {list(found.shape)} for {part.stop - part.start} samples; its first "
                "axis must be the batch"
            )
        found = found.unflatten(0, (part.stop - part.start, -1))
        if kept is None:
            kept = storage.empty((len(samples), *found.shape[1:]), found.dtype)
        kept[part] = found.cpu()
    assert kept is not None
    return kept


def first_tensor(found: Any, what: str) -> torch.Tensor:
    """The tensor that a module gives, the first where it gives several."""
    for leaf in pytree.tree_leaves(found):
        if isinstance(leaf, torch.Tensor):
            return leaf
    raise ValueError(f"'{what}' gives {described(found)}, which holds no tensor; leave it out")


def check_finite(value: torch.Tensor, what: str) -> None:
    """Refuse numbers that nothing can be fitted to."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise RuntimeError(f"{what} is not finite; look at the calibration data and at the model's weights")


class _Reached(Exception):  # noqa: N818
    """Ends a run of a model where what was looked for is known."""


@torch.no_grad()
def _reaches(model: nn.Module, name: str, samples: Samples, part: slice) -> tuple[list[Any], Any]:
    """Leaves and tree of one module's arguments, for some samples."""
    found: list[tuple[list[Any], Any]] = []

    def catch(_: nn.Module, arguments: Any, named: Any) -> None:
        found.append(pytree.tree_flatten((arguments, named)))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        arguments, named = samples.take(part)
        model(*arguments, **named)
    except _Reached:
        return found[0]
    finally:
        handle.remove()
    raise ValueError(f"'{name}' is never called; leave it out")


def _leaf(name: str, one: Any, two: Any, count: int, storage: Storage) -> Leaf:
    if not isinstance(one, torch.Tensor) or one.shape == two.shape:
        _check_alike(name, one, two)
        return Leaf(one, 0)
    if not one.ndim or len(two) != 2 * len(one) or one.shape[1:] != two.shape[1:]:
        raise ValueError(
            f"'{name}' is called with tensors of shape {list(one.shape)} for one sample and {list(two.shape)} for two; "
            "its first axis must be the batch"
        )
    return Leaf(storage.empty((count, *one.shape), one.dtype), len(one), one.dtype)


def _check_alike(name: str, one: Any, other: Any) -> None:
    """Refuse to keep once for all samples what depends on them."""
    if not _alike(one, other):
        raise ValueError(
            f"'{name}' is called with {_told(one)} for some samples and {_told(other)} for others: what depends on the "
            "samples needs their axis first; name blocks that hold all of what it goes into"
        )


def _alike(one: Any, two: Any) -> bool:
    """Whether what is to be kept once for all samples is the same for some of them and for others."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        if one.shape != two.shape:
            return False
        if one.is_floating_point() or one.is_complex():
            # Kernels for fewer samples may round otherwise.
            return torch.allclose(one, two, rtol=1e-3, atol=1e-6, equal_nan=True)
        return torch.equal(one, two)
    if isinstance(one, int | float) and isinstance(two, int | float):
        return math.isclose(one, two, rel_tol=1e-3) or (one != one and two != two)
    return True


def _told(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else described(value)


def call_of(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One batch as positional and named arguments."""
    if isinstance(batch, torch.Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    raise TypeError(
        f"a batch is a tensor, a tuple of tensors or a mapping of names to tensors, not {described(batch)}; of a "
        "loader or a generator give a list of such batches"
    )
