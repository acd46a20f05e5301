"""Where the learning starts: the codebooks, scales and indices nearest to the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from retensor.compression.jlcm.kmeans import kmeans_1d, nearest
from retensor.compression.jlcm.layer import Variant

ROUNDS = 4


@dataclass(frozen=True)
class Coded:
    """A weight as indices.

    Attributes
    ----------
    indices : torch.Tensor
        uint8 of shape (rows, columns).
    codebook : torch.Tensor
        float64 of shape (codebooks, k).
    scales : torch.Tensor, optional
        float64 of shape (groups,).
    labels : torch.Tensor
        int64 of shape (rows,), the group of each row.
    """

    indices: torch.Tensor
    codebook: torch.Tensor
    scales: torch.Tensor | None
    labels: torch.Tensor

    def weight(self) -> torch.Tensor:
        """What the indices stand for, float64 of shape (rows, columns)."""
        shared = len(self.codebook) == 1
        rows = self.codebook[torch.zeros_like(self.labels) if shared else self.labels]
        found = rows.gather(1, self.indices.long())
        return found if self.scales is None else found * self.scales[self.labels][:, None]


def nearest_codes(
    weight: torch.Tensor, k: int, labels: torch.Tensor, groups: int, variant: Variant = "codebooks"
) -> Coded:
    """The codes of a weight: one exact k-means for each group, or one for all with a scale for each.

    With scales, ``sum_g s_g**2 sum (W / s_g - C[I])**2`` is lowered in turn over the codebook, which is exact, and over
    the scales, which have a closed form; they begin at the root mean square of their group.

    Parameters
    ----------
    weight : torch.Tensor
        Of shape (rows, ...).
    k : int
        Codewords.
    labels : torch.Tensor
        int64 of shape (rows,), from 0 to ``groups - 1``.
    groups : int
    variant : {"codebooks", "scales"}

    Returns
    -------
    Coded

    Raises
    ------
    ValueError
        Where a weight is not finite.

    Examples
    --------
    >>> coded = nearest_codes(torch.tensor([[0.0, 1.0, 4.0, 5.0]]), 2, torch.tensor([0]), 1)
    >>> coded.indices, coded.codebook
    (tensor([[0, 0, 1, 1]], dtype=torch.uint8), tensor([[0.5000, 4.5000]], dtype=torch.float64))
    """
    rows = weight.detach().reshape(len(weight), -1).cpu().double()
    labels = labels.cpu()
    if variant == "codebooks" or groups == 1:
        codebook = torch.stack(
            [kmeans_1d(part if (part := rows[labels == g]).numel() else rows.new_zeros(1), k) for g in range(groups)]
        )
        indices = torch.empty(rows.shape, dtype=torch.uint8)
        for g in range(groups):
            indices[labels == g] = nearest(rows[labels == g], codebook[g]).to(torch.uint8)
        return Coded(indices, codebook, None, labels)
    counts = torch.bincount(labels, minlength=groups).clamp(min=1)
    power = rows.square().mean(1)
    scales = (torch.zeros(groups, dtype=torch.float64).index_add_(0, labels, power) / counts).sqrt()
    whole = power.mean().sqrt()
    # Near 1, so that 16 bits keep them.
    scales = torch.where(scales > 0, scales / whole, 1.0)
    best: Coded | None = None
    least = torch.inf
    for _ in range(ROUNDS):
        each = scales[labels][:, None]
        codebook = kmeans_1d(rows / each, k, (each**2).expand_as(rows))
        indices = nearest(rows / each, codebook)
        found = codebook[indices]
        up = torch.zeros(groups, dtype=torch.float64).index_add_(0, labels, (rows * found).sum(1))
        down = torch.zeros(groups, dtype=torch.float64).index_add_(0, labels, found.square().sum(1))
        scales = torch.where((up > 0) & (down > 0), up / down.clamp(min=1e-300), scales)
        coded = Coded(indices.to(torch.uint8), codebook[None], scales, labels)
        error = float((coded.weight() - rows).square().sum())
        if error >= least:
            break
        best, least = coded, error
    assert best is not None
    return best
