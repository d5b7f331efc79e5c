"""Factors of an adapter in a few bits for each number: a scale for each direction, a dither that both sides know.

    c = round(x / s + m + u),    x' = s (c - m - u),    s = max |x| / m,    m = (2^bits - 1) / 2

for the numbers x of a row of A or of a column of B, so that a direction that is small keeps its digits. The dither u,
one number in (-1/2, 1/2) for each x, comes from a seed, and whoever reads takes it off again (subtractive dither,
Roberts, 1962). Then x' - x is uniform within s / 2, with mean zero, and independent of x (Schuchman, 1964): what many
devices and rounds send adds up to the right thing, without a memory of errors, and with half of the variance that
rounding up or down at random has on average.

All codes are one array, bit beside bit, and all scales another one: names and shapes are told once, by
`cotune.federation.array_layout`. Bytes for a layer (m, n) of rank r: r (m + n) bits / 8 + 8 r, of 4 r (m + n) in
float32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.arrays import AnyArrays, Arrays, Shapes, shapes_of
from cotune.models.packed_weights import pack_codes, packed_row_bytes, unpack_codes

CODES, SCALES = "codes", "scales"
PLAIN = 32
"""Bits of float32, which goes as it is."""
_WORD = 2**16


@dataclass(frozen=True)
class RowCodes:
    """How the matrices of an adapter travel."""

    bits: int = 5
    """Of a number: 2 to 8, or 32 for float32 under the arrays' own names."""

    def __post_init__(self) -> None:
        if self.bits != PLAIN and not 2 <= self.bits <= 8:
            raise InputError(f"bits is {self.bits}, expected 2 to 8, or {PLAIN} for float32")

    def encode(self, arrays: Arrays, seed: int) -> dict[str, NDArray[Any]]:
        """`codes`, uint8, and `scales`, float32, one dimension each.

        Args:
            arrays: matrices.
            seed: of the dither, below 2^128; another one for each message.

        Example:
            >>> coded = RowCodes(4).encode({"b": np.array([[0.5, -7.5]], np.float32)}, 1)
            >>> coded["scales"].tolist(), coded["codes"].shape
            ([1.0], (1,))
        """
        if self.bits == PLAIN:
            return dict(arrays)
        rows = [_rows_of(arrays[name].astype(np.float64)) for name in sorted(arrays)]
        # Rounded first: both sides compute with these float32.
        scales = [(np.abs(one).max(axis=1, initial=0.0) / self._middle).astype(np.float32) for one in rows]
        wide = [np.broadcast_to(own[:, None], one.shape).ravel() for own, one in zip(scales, rows, strict=True)]
        flat, spread = np.concatenate([one.ravel() for one in rows]), np.concatenate(wide).astype(np.float64)
        units = np.divide(flat, spread, out=np.zeros_like(flat), where=spread > 0)
        codes = np.rint(units + self._middle + _dither(seed, len(flat)))
        codes = np.clip(codes, 0, 2 * self._middle).astype(np.uint8)
        return {CODES: pack_codes(codes[None], self.bits)[0], SCALES: np.concatenate(scales)}

    def decode(self, coded: AnyArrays, shapes: Shapes, seed: int) -> dict[str, NDArray[np.float32]]:
        """The matrices of these shapes that `encode` was given, but for the rounding.

        Raises:
            InputError: codes or scales are not those of such matrices.

        Example:
            >>> told = RowCodes(8)
            >>> found = told.decode(told.encode({"b": np.array([[1.0, -127.5]], np.float32)}, 3), {"b": (1, 2)}, 3)
            >>> np.abs(found["b"] - [[1.0, -127.5]]).max() <= 0.5
            np.True_
        """
        expected = self.coded_shapes(shapes)
        wrong = [name for name, shape in expected.items() if name not in coded or coded[name].shape != shape]
        if wrong:
            came = coded[wrong[0]].shape if wrong[0] in coded else "nothing"
            raise InputError(
                f"{wrong[0]} is {came}, expected {expected[wrong[0]]} for the adapter's shapes; use one version of "
                "cotune and one configuration everywhere"
            )
        if self.bits == PLAIN:
            return {name: coded[name] for name in expected}
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        codes = unpack_codes(coded[CODES][None], self.bits, sum(sizes.values()))[0]
        units = codes - self._middle - _dither(seed, len(codes))
        found, start, first = {}, 0, 0
        for name in sorted(shapes):
            num_rows, length = _turned(shapes[name])
            scales = coded[SCALES][first : first + num_rows].astype(np.float64)
            rows = units[start : start + sizes[name]].reshape(num_rows, length) * scales[:, None]
            found[name] = np.ascontiguousarray(_rows_back(rows, shapes[name]), np.float32)
            start, first = start + sizes[name], first + num_rows
        return found

    def rounded(self, arrays: Arrays, seed: int) -> dict[str, NDArray[np.float32]]:
        """What is read of these arrays on the other side."""
        return self.decode(self.encode(arrays, seed), shapes_of(arrays), seed)

    def coded_shapes(self, shapes: Shapes) -> Mapping[str, tuple[int, ...]]:
        """Of what `encode` gives for matrices of these shapes.

        Example:
            >>> RowCodes(5).coded_shapes({"a": (2, 8), "b": (6, 2)})
            {'codes': (18,), 'scales': (4,)}
        """
        if self.bits == PLAIN:
            return {name: tuple(shape) for name, shape in shapes.items()}
        num_codes = sum(math.prod(shape) for shape in shapes.values())
        num_rows = sum(_turned(shape)[0] for shape in shapes.values())
        return {CODES: (packed_row_bytes(num_codes, self.bits),), SCALES: (num_rows,)}

    @property
    def code_names(self) -> frozenset[str]:
        """Which arrays of `encode` are uint8."""
        return frozenset() if self.bits == PLAIN else frozenset([CODES])

    @property
    def _middle(self) -> float:
        return (float(1 << self.bits) - 1) / 2


def dither_seed(round_number: int, what: str) -> int:
    """A seed for each message of a run that has an adapter in it; no secret.

    Args:
        round_number: of the message.
        what: its direction, and whose it is where there are several.

    Example:
        >>> dither_seed(1, "down") == dither_seed(1, "down") != dither_seed(1, "up kitchen")
        True
    """
    return int.from_bytes(hashlib.sha256(f"{round_number}\0{what}".encode()).digest()[:16], "little")


def _dither(seed: int, num: int) -> NDArray[np.float64]:
    """u, the same on every machine: raw bits of Philox, 16 for each number."""
    words = np.random.Philox(key=seed).random_raw(-(-num // 4)).astype("<u8").view("<u2")[:num]
    return (words + 0.5) / _WORD - 0.5


def _turned(shape: tuple[int, ...]) -> tuple[int, int]:
    """How many directions a matrix has, and of how many numbers: an A lies, a B stands."""
    return (shape[0], shape[1]) if shape[0] <= shape[1] else (shape[1], shape[0])


def _rows_of(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Each direction as a row."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _rows_back(rows: NDArray[np.float64], shape: tuple[int, ...]) -> NDArray[np.float64]:
    return rows if rows.shape == tuple(shape) else rows.T
