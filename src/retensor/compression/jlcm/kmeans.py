"""Optimal k-means of numbers: the clusters of least squared distance there are, by dynamic programming.

The clusters of sorted numbers are runs of them, and with ``F_k(j)`` the least cost of the first j numbers in k runs,

    F_k(j) = min_i F_{k-1}(i) + cost(i, j),

where the best i never falls as j grows, so that one layer takes O(n log n) by divide and conquer (H. Wang and M. Song,
Ckmeans.1d.dp: Optimal k-means Clustering in One Dimension by Dynamic Programming, The R Journal 3/2, 2011; X. Wu,
Optimal Quantization by Matrix Searching, J. Algorithms 12, 1991). No table of the best i is kept: the middle cut is
where the first k/2 runs and the last ones meet most cheaply, and both sides are cut in turn (D. S. Hirschberg, A Linear
Space Algorithm for Computing Maximal Common Subsequences, CACM 18, 1975), at twice the time and O(n) memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from retensor.planning.compiled import compiled

Array = np.ndarray[Any, np.dtype[Any]]


def kmeans_1d(values: torch.Tensor, k: int, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Centres of the k clusters of least weighted squared distance.

    Parameters
    ----------
    values : torch.Tensor
        Finite, of any shape.
    k : int
        At least 1.
    weights : torch.Tensor, optional
        Not negative, of the same shape; 1 by default.

    Returns
    -------
    torch.Tensor
        float64 of shape (k,), ascending. Where there are fewer distinct values than k, the greatest is repeated.

    Raises
    ------
    ValueError
        Where there is no value, one is not finite, or weights are negative or all nothing.

    Examples
    --------
    >>> kmeans_1d(torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]), 2)
    tensor([ 0.5000, 11.0000], dtype=torch.float64)
    """
    if k < 1 or not values.numel():
        raise ValueError(f"{values.numel()} numbers cannot be put in {k} clusters; give at least one of each")
    flat = values.detach().reshape(-1).cpu().double().numpy()
    mass = np.ones_like(flat) if weights is None else weights.detach().reshape(-1).cpu().double().numpy()
    if len(mass) != len(flat) or not np.isfinite(flat).all() or not np.isfinite(mass).all() or (mass < 0).any():
        raise ValueError("numbers to be clustered are finite, with a weight each that is not negative")
    flat, mass = flat[mass > 0], mass[mass > 0]
    if not len(flat):
        raise ValueError("all weights are 0; give some number a weight")
    # Equal numbers lie in one cluster: they are one number with their weights' sum, which changes nothing.
    points, places = np.unique(flat, return_inverse=True)
    mass = np.bincount(places, mass)
    if len(points) <= k:
        return torch.from_numpy(np.pad(points, (0, k - len(points)), mode="edge"))
    # Squares of numbers far from 0 would cancel.
    middle = float(np.average(points, weights=mass))
    return torch.from_numpy(np.sort(_centres(points - middle, mass, k)) + middle)


def nearest(values: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Which of ascending centres is nearest to each number; the lower one where two are.

    >>> nearest(torch.tensor([-3.0, 0.4, 2.0]), torch.tensor([0.0, 1.0]))
    tensor([0, 0, 1])
    """
    return torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)


def _centres(points: Array, mass: Array, k: int) -> Array:
    """Means of the best runs; runs still to be cut are kept as (first, end, number of runs)."""
    found: list[float] = []
    open_: list[tuple[int, int, int]] = [(0, len(points), k)]
    while open_:
        first, end, runs = open_.pop()
        if runs == 1:
            found.append(float(np.average(points[first:end], weights=mass[first:end])))
            continue
        x, w = points[first:end], mass[first:end]
        left = runs // 2
        ahead = _costs(x, w, left)
        behind = _costs(-x[::-1], w[::-1], runs - left)[::-1]
        # With i numbers on the left.
        cut = left + int(np.argmin((ahead + behind)[left : len(x) - (runs - left) + 1]))
        open_ += [(first, first + cut, left), (first + cut, end, runs - left)]
    return np.array(found)


def _costs(x: Array, w: Array, runs: int) -> Array:
    """Least cost of the first j numbers in that many runs, for j from 0 to n; infinite where there are fewer."""
    sums = [np.concatenate([[0.0], np.cumsum(part)]) for part in (w, w * x, w * x * x)]
    return np.asarray(_layers(sums[0], sums[1], sums[2], runs))


@compiled
def _layers(s0: Any, s1: Any, s2: Any, runs: Any) -> Any:
    n = len(s0) - 1
    before = np.full(n + 1, np.inf)
    before[0] = 0.0
    now = np.empty(n + 1)
    # Parts of a layer that are open: from, to, and where their best cut lies at least and at most.
    stack = np.empty((128, 4), np.int64)
    for run in range(1, runs + 1):
        now[:run] = np.inf
        top = 0
        stack[0] = (run, n, run - 1, n - 1)
        while top >= 0:
            a, b, low, high = stack[top]
            top -= 1
            if a > b:
                continue
            j = (a + b) // 2
            least, at = np.inf, low
            for i in range(low, min(high, j - 1) + 1):
                part = s1[j] - s1[i]
                cost = before[i] + max(0.0, s2[j] - s2[i] - part * part / (s0[j] - s0[i]))
                if cost < least:
                    least, at = cost, i
            now[j] = least
            stack[top + 1] = (a, j - 1, low, at)
            stack[top + 2] = (j + 1, b, at, high)
            top += 2
        before, now = now, before
    return before
