"""Moves along directions of signs: what a device and the server do alike, so that both end at the same bits.

    theta <- theta + sum_j amount_j z_j

Symbols: z_j in {-1, 1}^d, a pure function of its seed (`cotune.tuning.directions`); the sum is taken in float32, one
direction after another, and theta is rounded once. d is the size of all tuned arrays, in alphabetical order of names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.federation.arrays import Arrays, Shapes
from cotune.tuning.tuned_numbers import TunedNumbers

# Directions that are taken together. A part of the arithmetic: all devices must use the same.
CHUNK = 64
MAX_DIRECTIONS = 2**24
"""Of a round: a device's numbers for them take 64 MiB."""


@torch.no_grad()
def move_along(params: Mapping[str, Tensor], direction_seeds: Sequence[int], amounts: Sequence[float]) -> None:
    """Move tensors in place; directions whose amount is 0 cost nothing."""
    numbers = TunedNumbers(params)
    steps = [(seed, amount) for seed, amount in zip(direction_seeds, amounts, strict=True) if amount]
    for start in range(0, len(steps), CHUNK):
        chunk = steps[start : start + CHUNK]
        numbers.add([numbers.direction(seed, num_pages=1) for seed, _ in chunk], [amount for _, amount in chunk])


def moved(arrays: Arrays, direction_seeds: Sequence[int], amounts: Sequence[float]) -> dict[str, NDArray[np.float32]]:
    """Moved copies of arrays."""
    tensors = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
    move_along(tensors, direction_seeds, amounts)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def summed(shapes: Shapes, direction_seeds: Sequence[int], amounts: Sequence[float]) -> dict[str, NDArray[np.float64]]:
    """sum_j amount_j z_j in float64, over arrays of these shapes."""
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    move_along(tensors, direction_seeds, amounts)
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def coordinates(vector: Arrays, direction_seeds: Sequence[int]) -> NDArray[np.float64]:
    """<vector, z_j> for each direction, float64 (K,): what Ferret sends instead of the vector."""
    numbers = TunedNumbers({name: torch.from_numpy(np.array(array, np.float32)) for name, array in vector.items()})
    found = []
    for seed in direction_seeds:
        direction = numbers.direction(seed, num_pages=1)
        found.append(
            sum(float(block.read().double() @ block.signs(direction, torch.float64)) for block in numbers.blocks())
        )
    return np.array(found)
