"""Factors of a given kernel, in double precision: alternating least squares, or singular values along the bonds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from retensor.compression.apriori.formats import Format, Shape, axis_names

SWEEPS = 300
STARTS = 3


@torch.no_grad()
def decompose(
    kernel: torch.Tensor, form: Format, shape: Shape, ranks: tuple[int, ...], *, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Factors whose kernel is near the one given; nearest for ``separable`` with two axes.

    Parameters
    ----------
    kernel : torch.Tensor
        Of shape (outputs, inputs / groups, *kernel).
    form, shape, ranks
        Of the factors.
    seed : int
        Of the starts of alternating least squares.

    Returns
    -------
    dict of str to torch.Tensor
        In float64.
    """
    tensor = kernel.detach().to(torch.float64).unflatten(0, (shape.groups, -1))
    names = axis_names(shape)
    if form.name == "cp":
        outputs, inputs, *filters = _parallel_factors(tensor, ranks[0], seed)
        found = {
            "inputs": inputs.mT,
            **{name: u.mT for name, u in zip(names, filters, strict=True)},
            "outputs": outputs,
        }
        return {name: factor.contiguous() for name, factor in found.items()}
    if form.name == "separable":
        if shape.dims == 2:
            filters = _two_factors(tensor, ranks[0])
        else:
            filters = [
                u.unflatten(0, tensor.shape[:3]) for u in _parallel_factors(tensor.flatten(0, 2), ranks[0], seed)
            ]
        return {name: u.mT.contiguous() for name, u in zip(names, filters, strict=True)}
    if form.name == "tucker":
        return _tucker(tensor, ranks, names)
    return _train(tensor, form, shape, ranks, names)


def ranks_within(kernel: torch.Tensor, shape: Shape, tol: float) -> tuple[int, ...]:
    """Ranks of ``tucker``, the least of each mode, with which a kernel comes within a relative error.

    What the modes' singular values leave out adds up to the square of the error at most (De Lathauwer, De Moor,
    Vandewalle, "A multilinear singular value decomposition", 2000): each mode gets an equal part of the tolerance's.
    """
    tensor = kernel.detach().to(torch.float64).unflatten(0, (shape.groups, -1))
    modes = tensor.dim() - 1
    allowed = tol**2 * tensor.square().sum() / modes
    ranks = []
    for mode in range(modes):
        squares = torch.linalg.svdvals(_unfolded(tensor, mode)).square().sum(0)
        left_out = squares.flip(0).cumsum(0).flip(0)
        ranks.append(max(1, int((left_out > allowed).sum())))
    return tuple(ranks)


def error(kernel: torch.Tensor, form: Format, shape: Shape, factors: dict[str, torch.Tensor]) -> float:
    """The relative distance of a kernel and that of some factors, in Frobenius norm."""
    kernel = kernel.detach().to(torch.float64)
    norm = kernel.norm().item()
    return (kernel - form.kernel(shape, factors)).norm().item() / norm if norm else 0.0


def _two_factors(tensor: torch.Tensor, rank: int) -> list[torch.Tensor]:
    """The best sums of products of two vectors: singular values of each filter of a batch."""
    u, s, vh = torch.linalg.svd(tensor, full_matrices=False)
    root = s[..., :rank].sqrt().unsqueeze(-2)
    pair = [u[..., :rank] * root, vh.mT[..., :rank] * root]
    return [torch.nn.functional.pad(side, (0, rank - side.shape[-1])) for side in pair]


def _parallel_factors(tensor: torch.Tensor, rank: int, seed: int) -> list[torch.Tensor]:
    """Alternating least squares for a batch of tensors, from several starts; the best is kept.

    The first are eigenvectors, where the rank is low enough for them to be exact; then singular vectors, then chance.
    Factors are of shape (batch, mode, rank), the components' norms spread evenly.
    """
    batch, order = tensor.shape[0], tensor.dim() - 1
    norm = tensor.flatten(1).norm(dim=1)
    best: list[torch.Tensor] | None = None
    least = torch.full((batch,), math.inf, dtype=tensor.dtype)
    low = order > 2 and rank <= sorted(tensor.shape[1:])[-2]
    for start in range(-1 if low else 0, STARTS):
        generator = torch.Generator().manual_seed(seed + max(start, 0))
        if start < 0:
            factors = _eigenvectors(tensor, rank, generator)
        else:
            factors = [_start(tensor, mode, rank, generator, singular=start == 0) for mode in range(order)]
        before = torch.full_like(least, math.inf)
        for _ in range(SWEEPS):
            for mode in range(order):
                _solve(tensor, factors, mode)
            residual = (tensor - _product(factors)).flatten(1).norm(dim=1) / norm.clamp_min(1e-300)
            if bool(((before - residual < 1e-7 * residual) | (residual < 1e-13)).all()):
                break
            before = residual
        better = residual < least
        least = torch.where(better, residual, least)
        chosen = better.reshape(-1, 1, 1)
        best = factors if best is None else [torch.where(chosen, f, b) for f, b in zip(factors, best, strict=True)]
        if bool((least < 1e-12).all()):
            break
    assert best is not None
    return _even(best)


def _eigenvectors(tensor: torch.Tensor, rank: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Factors that are exact where the tensor has that rank and its two largest modes are not below it.

    Two mixtures ``A D_1 B'`` and ``A D_2 B'`` of the slices share ``A``, whose columns are eigenvectors of one times
    the inverse of the other (S. Leurgans, R. Ross, R. Abel, "A decomposition for three-way arrays", 1993).
    """
    sizes = tensor.shape[1:]
    first, second = sorted(range(len(sizes)), key=lambda mode: -sizes[mode])[:2]
    rest = [mode for mode in range(len(sizes)) if mode not in (first, second)]
    slices = tensor.permute(0, first + 1, second + 1, *(mode + 1 for mode in rest)).flatten(3)
    chance = torch.randn(slices.shape[-1], 2, generator=generator, dtype=tensor.dtype)
    one, other = (slices @ chance).unbind(-1)
    left = torch.linalg.svd(torch.cat([one, other], 2), full_matrices=False)[0][..., :rank]
    right = torch.linalg.svd(torch.cat([one, other], 1), full_matrices=False)[2][:, :rank].mT
    pencil = (left.mT @ one @ right) @ torch.linalg.pinv(left.mT @ other @ right)
    # Noise makes pairs of complex ones, whose real parts are as good a start as any.
    columns = left @ torch.linalg.eig(pencil.nan_to_num())[1].real
    rows = (torch.linalg.pinv(columns) @ one).mT
    products = torch.einsum("zar,zbr->zabr", columns, rows).flatten(1, 2)
    parts = (torch.linalg.pinv(products) @ slices.flatten(1, 2)).unflatten(2, [sizes[mode] for mode in rest])
    factors = {first: columns, second: rows}
    for i, mode in enumerate(rest):
        # Of each component, which is a product, the largest direction.
        unfolded = parts.movedim(2 + i, 2).reshape(len(tensor), rank, sizes[mode], -1)
        factors[mode] = torch.linalg.svd(unfolded, full_matrices=False)[0][..., 0].mT
    return [factors[mode] for mode in range(len(sizes))]


def _start(tensor: torch.Tensor, mode: int, rank: int, generator: torch.Generator, singular: bool) -> torch.Tensor:
    size = tensor.shape[mode + 1]
    chance = torch.randn(tensor.shape[0], size, rank, generator=generator, dtype=tensor.dtype) / math.sqrt(size)
    if singular:
        vectors = torch.linalg.svd(_unfolded(tensor, mode), full_matrices=False)[0][..., :rank]
        chance[..., : vectors.shape[-1]] = vectors
    return chance


def _unfolded(tensor: torch.Tensor, mode: int) -> torch.Tensor:
    """A batch of matrices with that mode down and all others along."""
    return tensor.movedim(mode + 1, 1).flatten(2)


def _solve(tensor: torch.Tensor, factors: list[torch.Tensor], mode: int) -> None:
    """The best factor of one mode, the others given; columns of the others are made unit first."""
    others = [i for i in range(len(factors)) if i != mode]
    for i in others:
        factors[i] = factors[i] / factors[i].norm(dim=1, keepdim=True).clamp_min(1e-300)
    gram = torch.ones_like(factors[0].mT @ factors[0])
    for i in others:
        gram = gram * (factors[i].mT @ factors[i])
    letters = "abcdef"[: len(factors)]
    terms = ",".join(f"z{letters[i]}r" for i in others)
    right = torch.einsum(f"z{letters},{terms}->z{letters[mode]}r", tensor, *(factors[i] for i in others))
    # Components that have become alike make the equations singular.
    ridge = 1e-13 * torch.eye(gram.shape[-1], dtype=gram.dtype)
    factors[mode] = torch.linalg.solve(gram + ridge, right.mT).mT


def _product(factors: Sequence[torch.Tensor]) -> torch.Tensor:
    letters = "abcdef"[: len(factors)]
    return torch.einsum(",".join(f"z{letter}r" for letter in letters) + f"->z{letters}", *factors)


def _even(factors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    norms = torch.stack([factor.norm(dim=1, keepdim=True) for factor in factors])
    each = norms.clamp_min(1e-300).log().mean(0).exp() * (norms > 0).all(0)
    return [factor / norm.clamp_min(1e-300) * each for factor, norm in zip(factors, norms, strict=True)]


def _tucker(tensor: torch.Tensor, ranks: tuple[int, ...], names: list[str]) -> dict[str, torch.Tensor]:
    """Higher-order orthogonal iteration (De Lathauwer, De Moor, Vandewalle 2000), started from singular vectors."""
    matrices = [_leading(_unfolded(tensor, mode), rank) for mode, rank in enumerate(ranks)]
    before = -1.0
    for _ in range(SWEEPS):
        for mode, rank in enumerate(ranks):
            matrices[mode] = _leading(_unfolded(_projected(tensor, matrices, mode), mode), rank)
        core = _projected(tensor, matrices, None)
        energy = core.square().sum().item()
        if energy - before <= 1e-12 * energy:
            break
        before = energy
    outputs, inputs, *filters = matrices
    axes = {name: u.mT.contiguous() for name, u in zip(names, filters, strict=True)}
    return {"inputs": inputs.mT.contiguous(), **axes, "core": core, "outputs": outputs}


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u = torch.linalg.svd(matrix, full_matrices=False)[0][..., :rank]
    return torch.nn.functional.pad(u, (0, rank - u.shape[-1]))


def _projected(tensor: torch.Tensor, matrices: Sequence[torch.Tensor], but: int | None) -> torch.Tensor:
    """The tensor times the transposed matrix of every mode but one."""
    for mode, matrix in enumerate(matrices):
        if mode != but:
            moved = tensor.movedim(mode + 1, -1)
            between = matrix.reshape(matrix.shape[0], *(1,) * (moved.dim() - 3), *matrix.shape[1:])
            tensor = (moved @ between).movedim(-1, mode + 1)
    return tensor


def _train(
    tensor: torch.Tensor, form: Format, shape: Shape, ranks: tuple[int, ...], names: list[str]
) -> dict[str, torch.Tensor]:
    """One cut after another by singular values (Oseledets, "Tensor-train decomposition", 2011)."""
    # Inputs, axes, outputs; without matrices at the ends the channels go with the outer axes.
    rest = tensor.permute(0, 2, *range(3, 3 + shape.dims), 1)
    groups, ends = shape.groups, form.name == "tt"
    sizes = [shape.group_inputs, *shape.kernel, shape.group_outputs]
    if not ends:
        sizes = [sizes[0] * sizes[1], *sizes[2:-2], sizes[-2] * sizes[-1]]
    parts, left = [], 1
    rest = rest.reshape(groups, left, -1)
    for size, rank in zip(sizes[:-1], ranks, strict=True):
        u, s, vh = torch.linalg.svd(rest.reshape(groups, left * size, -1), full_matrices=False)
        short = max(0, rank - s.shape[-1])
        # What is cut must be orthonormal, or the next cut would not be the best one.
        u = torch.nn.functional.pad(u[..., :rank], (0, short))
        rest = torch.nn.functional.pad(s[:, :rank].unsqueeze(2) * vh[:, :rank], (0, 0, 0, short))
        parts.append(u.reshape(groups, left, size, rank))
        left = rank
    parts.append(rest.reshape(groups, left, sizes[-1], 1))
    if ends:
        found = {"inputs": parts[0].squeeze(1).mT}
        found |= {name: part.permute(0, 3, 1, 2) for name, part in zip(names, parts[1:-1], strict=True)}
        found["outputs"] = parts[-1].squeeze(3).mT
    else:
        first = parts[0].reshape(groups, shape.group_inputs, shape.kernel[0], ranks[0]).permute(0, 3, 1, 2)
        last = parts[-1].reshape(groups, ranks[-1], shape.kernel[-1], shape.group_outputs).permute(0, 3, 1, 2)
        middle = [part.permute(0, 3, 1, 2) for part in parts[1:-1]]
        found = dict(zip(names, [first, *middle, last], strict=True))
    # The scale lay in the last factor alone.
    norms = torch.stack([factor.norm() for factor in found.values()]).clamp_min(1e-300)
    scales = norms.log().mean().exp() / norms
    return {name: (factor * scale).contiguous() for (name, factor), scale in zip(found.items(), scales, strict=True)}
