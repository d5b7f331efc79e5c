"""Grids written from their formulas in NumPy, for references."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def fit_row(weights: Matrix, bits: int, is_symmetric: bool) -> tuple[float, float]:
    """Scale and zero point of the weights of one group."""
    low, high = min(0.0, weights.min()), max(0.0, weights.max())
    if is_symmetric:
        low, high = -max(-low, high), max(-low, high)
    scale = float(np.float16((high - low) / (2**bits - 1)))
    return scale, float(2 ** (bits - 1)) if is_symmetric else float(np.clip(np.round(-low / scale), 0, 2**bits - 1))


def nearest_code(weight: float, scale: float, zero: float, bits: int) -> float:
    return float(np.clip(np.round(weight / scale) + zero, 0, 2**bits - 1))


def nearest(weight: Matrix, bits: int, size: int, is_symmetric: bool = False) -> tuple[Matrix, Matrix]:
    """Codes and what they stand for, one weight after another."""
    codes, values = np.empty_like(weight), np.empty_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            scale, zero = fit_row(weight[row, start : start + size], bits, is_symmetric)
            for column in range(start, min(start + size, weight.shape[1])):
                codes[row, column] = nearest_code(weight[row, column], scale, zero, bits)
                values[row, column] = scale * (codes[row, column] - zero)
    return codes, values
