"""Factors of an adapter in 8 bits for each number, with one scale for each direction.

    x ~ s (c - 128),    s = max |x| / 127

for the numbers of a row of A or of a column of B, so that a direction that is small keeps its digits. With a seed the
rounding goes up or down with the probabilities that make its mean exact, which is what sums over devices want.

Bytes for a layer of rank r: r (in + out) + 8 r, of 4 r (in + out) in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.federation.arrays import Arrays, Shapes

CODES, SCALE = "codes/", "scale/"
ZERO, LARGEST = 128, 127


def to_codes(arrays: Arrays, *, seed: int | None = None) -> dict[str, NDArray[Any]]:
    """Codes, uint8 under `codes/NAME`, and scales, float32 under `scale/NAME`.

    Args:
        arrays: matrices.
        seed: of the rounding; None rounds to the nearest.

    Example:
        >>> coded = to_codes({"b": np.array([[1.0, -127.0, 0.0], [0.0, 0.0, 0.0]], np.float32)})
        >>> coded["codes/b"].tolist(), coded["scale/b"].tolist()
        ([[129, 1, 128], [128, 128, 128]], [1.0, 0.0])
    """
    draw = None if seed is None else np.random.default_rng(seed)
    found: dict[str, NDArray[Any]] = {}
    for name in sorted(arrays):
        array = arrays[name].astype(np.float64)
        axis = _long_axis(array.shape)
        # Rounded first: both sides compute with this float32.
        scale = (np.abs(array).max(axis=axis, initial=0.0) / LARGEST).astype(np.float32)
        wide = np.expand_dims(scale.astype(np.float64), axis)
        units = np.divide(array, wide, out=np.zeros_like(array), where=wide > 0)
        whole = np.rint(units) if draw is None else np.floor(units + draw.random(units.shape))
        found[CODES + name] = (np.clip(whole, -LARGEST, LARGEST) + ZERO).astype(np.uint8)
        found[SCALE + name] = scale
    return found


def from_codes(coded: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
    """The numbers that `to_codes` stands for; other names are left out.

    Example:
        >>> from_codes({"codes/b": np.array([[129, 1]], np.uint8), "scale/b": np.ones(1, np.float32)})
        {'b': array([[   1., -127.]], dtype=float32)}
    """
    found = {}
    for name in coded:
        if name.startswith(CODES):
            own, codes = name.removeprefix(CODES), coded[name]
            scale = np.expand_dims(coded[SCALE + own].astype(np.float64), _long_axis(codes.shape))
            found[own] = ((codes.astype(np.float64) - ZERO) * scale).astype(np.float32)
    return found


def coded_shapes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """Of what `to_codes` gives for arrays of these shapes."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        found[CODES + name] = tuple(shape)
        found[SCALE + name] = (shape[1 - _long_axis(shape)],)
    return found


def _long_axis(shape: tuple[int, ...]) -> int:
    """Along which the numbers of one direction lie."""
    return 1 if shape[0] <= shape[1] else 0
