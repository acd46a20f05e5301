"""The function ``Psi``, its inverse and its slope."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from retensor.files import described

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are companded."""

PART = 1 << 17
"""Elements of a tensor that are worked on at once on a processor: half a megabyte of float32."""


def psi(v: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """``a arctan(v / b)``, elementwise, with a backward pass that keeps ``v`` and nothing else.

    Parameters
    ----------
    v : torch.Tensor
        Latent weights of any shape; float16, bfloat16, float32 or float64. The half types are computed in float32 and
        rounded once.
    a, b : float or torch.Tensor
        Above zero; tensors must broadcast to the shape of ``v``, and have gradients. Of the half types, they are
        computed with in float32.

    Returns
    -------
    torch.Tensor
        Weights of the shape and type of ``v``.

    Raises
    ------
    ValueError
        Where a number ``a`` or ``b`` is not above zero. Tensors are not looked into.
    TypeError
        Where ``v`` is of another type.

    Notes
    -----
    The time goes by weight and not by sample. A training step of resnet18 at 64x64 pixels and batch 16 takes about
    1.25 times as long on a processor (with torch's ``weight_norm`` 1.1), and holds 1.3 times as much at its peak;
    :func:`recomputed` gives most of that memory back for more time.

    Examples
    --------
    >>> psi(torch.tensor([-1e9, 0.0, 0.2]), 0.3, 0.2)
    tensor([-0.4712,  0.0000,  0.2356])
    """
    _check_type(v, "latent weights")
    a, b = _factor(a, "a", v), _factor(b, "b", v)
    if torch.compiler.is_compiling():
        # A compiler fuses plain operators by itself, and an exported graph has names anyone knows.
        return (a * torch.atan(v.to(exact(v.dtype)) / b)).to(v.dtype)
    w = _Psi.apply(v, a, b)
    recipes = _recipes.get()
    if recipes is not None and not _transformed(w, v, a, b):
        recipes.append(w, v, a, b)
    return w


def psi_inverse(
    w: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float, *, rounded: bool = False
) -> torch.Tensor:
    """The latent weights ``b tan(w / a)`` of weights below the cap; worked out in float64, without gradients.

    Parameters
    ----------
    w : torch.Tensor
        Weights of any shape; float16, bfloat16, float32 or float64.
    a, b : float or torch.Tensor
        Above zero; tensors must broadcast to the shape of ``w``.
    rounded : bool
        Whether ``w`` may be a result of :func:`psi`, which rounding takes to the cap and one step past it: such a
        weight then has a latent one that saturates.

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``w``, and finite.

    Raises
    ------
    ValueError
        Where a number ``a`` or ``b`` is not above zero, or a weight is at the cap ``a pi / 2`` or above.
    TypeError
        Where ``w`` is of another type.

    Examples
    --------
    >>> psi_inverse(torch.tensor([0.0, 0.2356]), 0.3, 0.2)
    tensor([0.0000, 0.2000])
    """
    _check_type(w, "weights")
    wide = w.detach().to(torch.float64)
    a, b = (_factor(value, name, wide).detach().to(torch.float64) for value, name in ((a, "a"), (b, "b")))
    cap, size = a * (math.pi / 2), wide.abs()
    if bool((size > cap * (1 + torch.finfo(w.dtype).eps) if rounded else size >= cap).any()):
        raise ValueError(
            f"weights up to {size.max().item():.6g} are no values of a function below a pi / 2 = "
            f"{cap.max().item():.6g}; the least a is above {least(wide):.6g}"
        )
    limit = torch.finfo(w.dtype).max
    return (b * torch.tan((wide / a).clamp(-math.pi / 2, math.pi / 2))).clamp(-limit, limit).to(w.dtype)


def psi_slope(v: torch.Tensor, a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    """The derivative ``(a / b) / (1 + (v / b)^2)`` of :func:`psi`.

    Parameters
    ----------
    v : torch.Tensor
        Latent weights of any shape; float16, bfloat16, float32 or float64.
    a, b : float or torch.Tensor
        Above zero; tensors must broadcast to the shape of ``v``.

    Returns
    -------
    torch.Tensor
        Of the shape and type of ``v``.

    Raises
    ------
    ValueError
        Where a number ``a`` or ``b`` is not above zero.
    TypeError
        Where ``v`` is of another type.

    Examples
    --------
    >>> psi_slope(torch.tensor([0.0, 0.2]), 0.3, 0.2)
    tensor([1.5000, 0.7500])
    """
    _check_type(v, "latent weights")
    a, b = _factor(a, "a", v), _factor(b, "b", v)
    return (a / b / (1 + (v.to(exact(v.dtype)) / b) ** 2)).to(v.dtype)


@contextmanager
def recomputed() -> Iterator[None]:
    """Let the backward pass work companded weights out again instead of keeping them from the forward pass.

    A layer keeps its weight for the gradient of its input. A plain weight is there anyway, but a companded one is a
    second tensor of the weights' size. Run the forward pass inside, the backward pass where you like; gradients are
    the same in every bit, for one more evaluation of :func:`psi` a layer. A training step of resnet18 at 64x64 pixels
    and batch 16 takes about 1.35 times as long as the plain model's instead of 1.25, and holds 1.1 times as much at
    its peak instead of 1.3. Under autocast it is the copy in the lower type that layers keep, and nothing is saved.

    Raises
    ------
    RuntimeError
        In the backward pass, where latent weights have changed since the forward pass.

    Examples
    --------
    >>> from retensor.compression import weight_compander as wc
    >>> model = wc.apply(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)))
    >>> with wc.recomputed():
    ...     loss = model(torch.ones(1, 8)).sum()
    >>> loss.backward()
    """
    recipes = _Recipes()
    token = _recipes.set(recipes)
    try:
        with torch.autograd.graph.saved_tensors_hooks(recipes.pack, _unpack):
            yield
    finally:
        _recipes.reset(token)


class _Psi(torch.autograd.Function):
    """``psi`` with one new tensor in each direction; autograd's own chain would keep two more of the weights' size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return _weights(v, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        v, a, b = ctx.saved_tensors
        x, g = v.to(exact(v.dtype)), grad.to(exact(v.dtype))
        needs_a, needs_b = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or _transformed(x, g, a, b):
            # A derivative of this one is asked for, or many are worked out at once: nothing may be done in place.
            grad_v = g * (a / b) / (1 + (x / b) ** 2)
            grad_a = (g * torch.atan(x / b)).sum_to_size(a.shape) if needs_a else None
            grad_b = -(grad_v * x).sum_to_size(b.shape) / b if needs_b else None
            return grad_v.to(v.dtype), grad_a, grad_b
        grad_v = torch.empty_like(x)
        grad_a, grad_b = torch.zeros_like(a) if needs_a else None, torch.zeros_like(b) if needs_b else None
        # The slope as 1 / (b / a + v^2 / (a b)), the square taken last, so that nothing leaves the range of the type.
        scale, base = a.rsqrt() * b.rsqrt(), b / a
        for x_, g_, grad_ in _parts(x, g, grad_v, pair=(a, b)):
            if grad_a is not None:
                grad_a += _summed(g_, x_.div(b).atan_(), a)
            torch.mul(x_, scale, out=grad_)
            torch.addcmul(base, grad_, grad_, out=grad_)
            torch.div(g_, grad_, out=grad_)
            if grad_b is not None:
                grad_b -= _summed(grad_, x_, b)
        return grad_v.to(v.dtype), grad_a, None if grad_b is None else grad_b / b


def _weights(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x = v.to(exact(v.dtype))
    if _transformed(x, a, b):
        return (a * torch.atan(x / b)).to(v.dtype)
    w = torch.empty_like(x)
    for x_, w_ in _parts(x, w, pair=(a, b)):
        torch.div(x_, b, out=w_).atan_().mul_(a)
    return w.to(v.dtype)


def _transformed(*tensors: torch.Tensor) -> bool:
    """Whether a transformation of :mod:`torch.func` wraps a tensor; it allows for no operation in place."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)


def _parts(*tensors: torch.Tensor, pair: tuple[torch.Tensor, ...]) -> Iterable[tuple[torch.Tensor, ...]]:
    """The same pieces of several tensors, each small enough to stay in a core's cache from one operation to the next.

    On a processor the operations of ``psi`` take as long as memory does; three passes over pieces are one over memory.
    """
    first = tensors[0]
    whole = (
        first.device.type != "cpu"
        or first.numel() <= PART
        or any(factor.numel() > 1 for factor in pair)
        or not all(tensor.is_contiguous() for tensor in tensors)
    )
    return [tensors] if whole else zip(*(tensor.view(-1).split(PART) for tensor in tensors), strict=True)


def _summed(one: torch.Tensor, other: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The product of two tensors, summed to a shape; where it is one number, without a tensor for the product."""
    if like.numel() == 1 and one.is_contiguous() and other.is_contiguous():
        return torch.dot(one.view(-1), other.view(-1)).view(like.shape)
    return (one * other).sum_to_size(like.shape)


@dataclass(frozen=True)
class _Recipe:
    """How a weight is made again."""

    v: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    versions: tuple[int, ...]


@dataclass(frozen=True)
class _Packed:
    """A weight, or a view of one, in the place of which its recipe is kept."""

    recipe: _Recipe
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Recipes:
    """Of the weights of one forward pass."""

    def __init__(self) -> None:
        # By the storage's identity; the weak reference beside it keeps that from being given to another storage.
        self._known: dict[int, tuple[StorageWeakRef, _Recipe]] = {}

    def append(self, w: torch.Tensor, v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        storage = StorageWeakRef(w.untyped_storage())
        tensors = v.detach(), a.detach(), b.detach()
        self._known[storage.cdata] = storage, _Recipe(*tensors, tuple(tensor._version for tensor in tensors))

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Packed:
        if tensor.layout is not torch.strided:
            return tensor
        _, recipe = self._known.get(tensor.untyped_storage()._cdata, (None, None))
        if recipe is None or tensor.dtype != recipe.v.dtype:
            return tensor
        return _Packed(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())


_recipes: ContextVar[_Recipes | None] = ContextVar("recipes", default=None)


@torch.no_grad()
def _unpack(packed: torch.Tensor | _Packed) -> torch.Tensor:
    if not isinstance(packed, _Packed):
        return packed
    recipe = packed.recipe
    if tuple(tensor._version for tensor in (recipe.v, recipe.a, recipe.b)) != recipe.versions:
        raise RuntimeError(
            "latent weights have changed since the forward pass under recomputed(); go backward before the optimiser "
            "takes its step"
        )
    return _weights(recipe.v, recipe.a, recipe.b).as_strided(packed.size, packed.stride, packed.offset)


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in for tensors of a type."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _check_type(tensor: torch.Tensor, what: str) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{what} are real floating-point numbers of 16 to 64 bits, not {tensor.dtype}")


def _factor(value: torch.Tensor | float, name: str, beside: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        # The half types hold neither the squares of small numbers nor the digits of a learning rate's steps.
        return value.to(exact(value.dtype))
    return torch.tensor(number(value, name), dtype=exact(beside.dtype), device=beside.device)


def number(value: Any, name: str) -> float:
    """A number above zero, or a sentence that says what was given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < float(value) < math.inf:
        raise ValueError(f"{name} is {described(value)}; it is a finite number above zero")
    return float(value)


def positive(value: torch.Tensor | float, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A number or tensor above zero in a type, or a sentence that says what was given."""
    given = value if isinstance(value, torch.Tensor) else torch.tensor(number(value, name), dtype=torch.float64)
    kept = given.detach().to(dtype)
    # What has a shape and no values is filled in later.
    if not kept.is_meta and not bool(((kept > 0) & kept.isfinite()).all()):
        raise ValueError(f"{name} is {described(value)}; all of it are finite numbers above zero in {dtype}")
    return kept


def not_negative(value: Any, name: str) -> float:
    """A number of at least zero, or a sentence that says what was given."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {described(value)}; it is a finite number of at least zero")
    return float(value)


def least(w: torch.Tensor) -> float:
    """What ``a`` must exceed for a tensor of weights."""
    return w.abs().max().item() * 2 / math.pi
