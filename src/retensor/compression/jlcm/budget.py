"""One option of each list, of small total error, in a number of bytes: a multiple-choice knapsack.

Greedily: all lists begin at their smallest option and go along the lower convex hull of (bytes, error), the step of
largest drop of error for each byte first (E. Zemel, The Linear Multiple Choice Knapsack Problem, Operations Research
28, 1980); what is left of the budget goes to whichever option lowers the error most. Until a step does not fit, every
choice is optimal for the bytes that it takes; the result is within one step's drop of the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def knapsack(options: Sequence[Sequence[tuple[int, float]]], budget: int) -> list[int]:
    """One option of each list, of small total error, whose bytes fit.

    Parameters
    ----------
    options : sequence of sequence of (bytes, error)
    budget : int
        At least the sum of the fewest bytes of each.

    Returns
    -------
    list of int
        The place of each option in its list.

    Examples
    --------
    >>> knapsack([[(1, 9.0), (3, 1.0)], [(1, 5.0), (2, 4.0)]], 5)
    [1, 1]
    """
    hulls = [_hull(found) for found in options]
    at = [0] * len(hulls)
    left = budget - sum(options[i][hull[0]][0] for i, hull in enumerate(hulls))
    if left < 0:
        raise ValueError(f"the smallest options take {budget - left} bytes, more than the {budget} there are")

    def step(i: int) -> tuple[int, float]:
        (b0, e0), (b1, e1) = (options[i][hulls[i][at[i] + more]] for more in (0, 1))
        return b1 - b0, e0 - e1

    def waiting(i: int) -> tuple[float, int]:
        more, drop = step(i)
        return -drop / more, i

    heap = [waiting(i) for i, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(heap)
    while heap:
        _, i = heapq.heappop(heap)
        if step(i)[0] > left:
            continue
        left -= step(i)[0]
        at[i] += 1
        if at[i] + 1 < len(hulls[i]):
            heapq.heappush(heap, waiting(i))
    chosen = [hull[place] for hull, place in zip(hulls, at, strict=True)]
    while True:
        gains = [
            (options[i][chosen[i]][1] - error, i, place)
            for i, found in enumerate(options)
            for place, (size, error) in enumerate(found)
            if size - options[i][chosen[i]][0] <= left and error < options[i][chosen[i]][1]
        ]
        if not gains:
            return chosen
        _, i, place = max(gains)
        left -= options[i][place][0] - options[i][chosen[i]][0]
        chosen[i] = place


def _hull(options: Sequence[tuple[int, float]]) -> list[int]:
    """Places of the options on the lower convex hull of (bytes, error), smallest first, each of less error."""
    order = sorted(range(len(options)), key=lambda i: options[i])
    hull: list[int] = []
    for i in order:
        size, error = options[i]
        if hull and error >= options[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (b0, e0), (b1, e1) = options[hull[-2]], options[hull[-1]]
            if (e0 - e1) * (size - b1) > (e1 - error) * (b1 - b0):
                break
            hull.pop()
        hull.append(i)
    return hull
