"""Two tokenizations of a text, token by token, by dynamic time warping over edit distances.

As FuseLLM, arXiv 2401.10491, and FedMKT, arXiv 2406.02224, align; here a baseline beside alignment by bytes. The path
from the first to the last pair of tokens takes steps (1, 1), (1, 0) and (0, 1) and has the least sum of costs

    D(i, j) = d(a_i, b_j) + min(D(i - 1, j - 1), D(i - 1, j), D(i, j - 1))

with the edit distance d of what the two tokens write; where sums tie, (1, 1) goes before (1, 0) before (0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from cotune.distillation.nearest_tokens import edit_distance
from cotune.errors import InputError

_distance = lru_cache(maxsize=2**16)(edit_distance)


def warp(first: Sequence[str], second: Sequence[str]) -> list[list[int]]:
    """For each token of `second` the places in `first` that it lies beside, at least one, ascending.

    Raises:
        InputError: one of the two is empty.

    Example:
        >>> warp(["a", "mead", "ow"], ["a", "meadow"])
        [[0], [1, 2]]
    """
    if not first or not second:
        raise InputError(f"the texts have {len(first)} and {len(second)} tokens, expected at least one on each side")
    costs = np.array([[_distance(one, other) for other in second] for one in first], np.float64)
    sums = np.full((len(first) + 1, len(second) + 1), np.inf)
    sums[0, 0] = 0.0
    for i in range(len(first)):
        for j in range(len(second)):
            sums[i + 1, j + 1] = costs[i, j] + min(sums[i, j], sums[i, j + 1], sums[i + 1, j])
    found: list[list[int]] = [[] for _ in second]
    i, j = len(first), len(second)
    while i and j:
        found[j - 1].append(i - 1)
        # `min` keeps the first of equals.
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda place: float(sums[place]))
    return [places[::-1] for places in found]
