r"""The random Hadamard transform: signs drawn at random, then the orthonormal Hadamard matrix, block by block.

:math:`X' = X D H` and :math:`W' = W D H` along the axis that a product sums over leave the product as it is, since
:math:`D H` is orthogonal; an outlier is spread over its block. As a butterfly it takes :math:`n \log_2 n` additions for
n numbers.
"""

from __future__ import annotations

import random
from functools import lru_cache

import torch
from torch.nn import functional

from retensor.files import described


def check_size(size: object) -> int:
    """Refuse what is no power of two from 2 on."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 2 or size & (size - 1):
        raise ValueError(f"a Hadamard transform has a size that is a power of two, 2 or more, not {described(size)}")
    return size


def rotate(x: torch.Tensor, size: int, *, dim: int = -1, seed: int = 0) -> torch.Tensor:
    """``X D H`` along an axis, in blocks of ``size``.

    Parameters
    ----------
    x : torch.Tensor
        Floating point.
    size : int
        A power of two.
    dim : int
        The axis; it is filled up with zeros to a multiple of ``size``, and stays so long.
    seed : int
        Of the signs, which all blocks share.

    Returns
    -------
    torch.Tensor

    Raises
    ------
    ValueError
        Where ``size`` is no power of two.

    Examples
    --------
    >>> x = torch.randn(3, 32)
    >>> bool(torch.allclose(rotate(x, 16) @ rotate(x, 16).T, x @ x.T, atol=1e-4))
    True
    """
    check_size(size)
    dim %= x.ndim
    missing = -x.shape[dim] % size
    if missing:
        x = functional.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing))
    signs = _signs(x, size, dim, seed)
    return _butterfly(_cut(x, size, dim) * signs, dim + 1).flatten(dim, dim + 1)


def unrotate(x: torch.Tensor, size: int, *, dim: int = -1, seed: int = 0, length: int | None = None) -> torch.Tensor:
    """What :func:`rotate` of the same size and seed was given, ``X' H D``; ``length`` of it where it was filled up.

    Examples
    --------
    >>> x = torch.randn(3, 20)
    >>> bool(torch.allclose(unrotate(rotate(x, 16), 16, length=20), x, atol=1e-5))
    True
    """
    check_size(size)
    dim %= x.ndim
    if x.shape[dim] % size:
        raise ValueError(f"an axis of {x.shape[dim]} was never rotated in blocks of {size}; it would be a multiple")
    signs = _signs(x, size, dim, seed)
    out = (_butterfly(_cut(x, size, dim), dim + 1) * signs).flatten(dim, dim + 1)
    return out if length is None else out.narrow(dim, 0, length)


def _cut(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    return x.unflatten(dim, (x.shape[dim] // size, size))


def _butterfly(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The orthonormal Hadamard transform of an axis: sums and differences of halves, then of quarters, and so on."""
    size, reach = x.shape[axis], 1
    while reach < size:
        first, second = x.unflatten(axis, (size // reach // 2, 2, reach)).unbind(axis + 1)
        x = torch.stack((first + second, first - second), axis + 1).flatten(axis, axis + 2)
        reach *= 2
    return x * size**-0.5


def _signs(x: torch.Tensor, size: int, dim: int, seed: int) -> torch.Tensor:
    signs = torch.tensor(_drawn(size, seed), dtype=x.dtype, device=x.device)
    return signs.view(size, *(1,) * (x.ndim - 1 - dim))


@lru_cache(maxsize=256)
def _drawn(size: int, seed: int) -> tuple[float, ...]:
    return tuple(random.Random(seed).choices((-1.0, 1.0), k=size))
