"""Output neurons (rows) of a layer, put in groups of similar distributions, each with a codebook or a scale.

A row is described by its quantile function at 16 midpoints; the L2 distance of two such vectors is the Wasserstein-2
distance of the rows' distributions up to that resolution, so that k-means on them groups rows by distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from retensor.errors import MissingExtraError
from retensor.files import described

POINTS = 16
Way = Literal["quantiles", "std", "random"]


@dataclass(frozen=True)
class Layout:
    """Which rows belong to which group.

    Attributes
    ----------
    groups : int
    period : int
        Rows after which the pattern of groups repeats: those of an attention head, or all.
    bounds : tuple of int, optional
        Where groups 1, 2, ... begin within a period; None where each row has a label of its own instead.

    Raises
    ------
    ValueError
        Where there are not as many bounds as groups after the first.
    """

    groups: int
    period: int
    bounds: tuple[int, ...] | None = ()

    def __post_init__(self) -> None:
        if self.bounds is not None and len(self.bounds) != self.groups - 1:
            raise ValueError(
                f"{self.groups} groups have {self.groups - 1} bounds, not {len(self.bounds)}; None is for labels"
            )

    def labels(self, rows: int) -> torch.Tensor:
        """The group of each row, int64, where it follows from the row's place."""
        if self.bounds is None:
            raise ValueError("rows of this layout have labels of their own")
        place = torch.arange(rows) % self.period
        return torch.bucketize(place, torch.tensor(self.bounds, dtype=torch.int64), right=True)


def row_features(weight: torch.Tensor) -> torch.Tensor:
    """Quantiles of each row at ``(2 i + 1) / 32``.

    Parameters
    ----------
    weight : torch.Tensor
        Of shape (rows, ...).

    Returns
    -------
    torch.Tensor
        float64 of shape (rows, 16).

    Examples
    --------
    >>> row_features(torch.zeros(3, 5)).shape
    torch.Size([3, 16])
    """
    rows = weight.detach().reshape(len(weight), -1).cpu().double()
    at = (2 * torch.arange(POINTS, dtype=torch.float64) + 1) / (2 * POINTS)
    return torch.quantile(rows, at, dim=1).T


def group_rows(weight: torch.Tensor, groups: int, way: Way = "quantiles", seed: int = 0) -> torch.Tensor:
    """The group of each row; group 0 has the least mean scale.

    Parameters
    ----------
    weight : torch.Tensor
        Of shape (rows, ...).
    groups : int
        1 to the number of rows.
    way : {"quantiles", "std", "random"}
        k-means of the rows' quantile functions, with at least ``rows / (4 groups)`` rows in each; rows sorted by their
        standard deviation and cut in equal parts; or equal parts drawn by chance, to measure the others against.
    seed : int

    Returns
    -------
    torch.Tensor
        int64 of shape (rows,).

    Raises
    ------
    ValueError
        Where there are fewer rows than groups, or the way is none.
    MissingExtraError
        Where scikit-learn is not installed.

    Examples
    --------
    >>> group_rows(torch.tensor([[5.0, -5], [1, -1], [6, -6], [1.1, -1]]), 2)
    tensor([1, 0, 1, 0])
    """
    rows = len(weight)
    if not 1 <= groups <= rows:
        raise ValueError(f"{groups} groups of {rows} rows; there are 1 to {rows}")
    if way not in ("quantiles", "std", "random"):
        raise ValueError(f"way is {described(way)}; it is 'quantiles', 'std' or 'random'")
    scale = row_scales(weight)
    if groups == 1:
        return torch.zeros(rows, dtype=torch.int64)
    if way == "quantiles":
        return _sorted(_clustered(row_features(weight), groups, seed), scale, groups)
    if way == "random":
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    else:
        order = scale.argsort(stable=True)
    labels = torch.empty(rows, dtype=torch.int64)
    labels[order] = torch.bucketize(torch.arange(rows), torch.tensor(equal_bounds(rows, groups)), right=True)
    return labels


def row_scales(weight: torch.Tensor) -> torch.Tensor:
    """Root mean square of each row, float64."""
    return weight.detach().reshape(len(weight), -1).cpu().double().square().mean(1).sqrt()


def equal_bounds(rows: int, groups: int) -> tuple[int, ...]:
    """Where groups 1, 2, ... of as equal sizes as can be begin.

    >>> equal_bounds(10, 4)
    (2, 5, 7)
    """
    return tuple(rows * group // groups for group in range(1, groups))


def bounds_of(labels: torch.Tensor, groups: int) -> tuple[int, ...]:
    """Where groups 1, 2, ... begin once rows are sorted by their group."""
    return tuple(torch.bincount(labels, minlength=groups).cumsum(0)[:-1].tolist())


def _clustered(features: torch.Tensor, groups: int, seed: int) -> torch.Tensor:
    try:
        from sklearn.cluster import KMeans
    except ImportError as error:
        raise MissingExtraError("grouping rows by their distribution", "compression") from error
    points = features.numpy()
    distinct = len(np.unique(points, axis=0))
    found = KMeans(min(groups, distinct), n_init=10, random_state=seed).fit(points)
    apart = np.full((len(points), groups), np.inf)
    apart[:, : found.n_clusters] = found.transform(points) ** 2
    return torch.from_numpy(_filled(apart, found.labels_.astype(np.int64), groups))


def _filled(
    apart: np.ndarray[tuple[int, int], np.dtype[np.float64]], labels: np.ndarray[tuple[int], np.dtype[np.int64]],
    groups: int,
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:  # fmt: skip
    """Move rows to groups that are too small, those first that it costs least."""
    least = max(1, math.floor(len(labels) / (4 * groups)))
    for group in np.argsort(np.bincount(labels, minlength=groups)):
        while (sizes := np.bincount(labels, minlength=groups))[group] < least:
            movable = np.flatnonzero(sizes[labels] > least)
            # A group without a row has no centre; whichever row is farthest from its own founds it.
            to = np.zeros(len(movable)) if np.isinf(apart[0, group]) else apart[movable, group]
            costs = to - apart[movable, labels[movable]]
            labels[movable[np.argmin(costs)]] = group
    return labels


def _sorted(labels: torch.Tensor, scale: torch.Tensor, groups: int) -> torch.Tensor:
    """Number groups by the mean scale of their rows."""
    counts = torch.bincount(labels, minlength=groups).clamp(min=1)
    means = torch.zeros(groups, dtype=torch.float64).index_add_(0, labels, scale) / counts
    return means.argsort(stable=True).argsort()[labels]
