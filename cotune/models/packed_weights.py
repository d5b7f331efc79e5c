"""Weights in 8, 4 or 3 bits: what they are, and how their codes lie in bytes. NumPy only.

A row of a weight is cut into groups of 32, 64 or 128 numbers (the last may be shorter), or is one group. A group has
one scale and one zero point, and its weights are scale * (code - zero).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

BITS = (8, 4, 3)
GROUP_SIZES = (32, 64, 128)

# Rows that are packed at a time have about this many codes, so that the bits in between stay few.
_CODES_AT_A_TIME = 2**22


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeight:
    """The weight of a layer, weight[o, i] = scales[o, g] * (codes[o, i] - zeros[o, g]) with g = i // group_size.

    Attributes:
        codes: uint8 (out, in), 0 to 2**bits - 1.
        scales: float32 (out, num_groups), numbers that float16 holds, so that a file holds the same weight.
        zeros: uint8 (out, num_groups), 0 to 2**bits - 1; 2**(bits - 1) everywhere for a symmetric weight.
        bits: 8, 4 or 3.
        group_size: 32, 64, 128, or `in` for a whole row.

    Raises:
        InputError: an array is of another type or shape, or holds what it must not.

    Example:
        >>> weight = PackedWeight(
        ...     codes=np.array([[0, 7, 15]], np.uint8),
        ...     scales=np.array([[0.5]], np.float32),
        ...     zeros=np.array([[8]], np.uint8),
        ...     bits=4,
        ...     group_size=3,
        ... )
        >>> weight.dequantised()
        array([[-4. , -0.5,  3.5]], dtype=float32)
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8]
    bits: int
    group_size: int

    @classmethod
    def of_rows(cls, parts: Sequence[PackedWeight]) -> PackedWeight:
        """Weights of one grid, the outputs of each behind those of the one before.

        Example:
            >>> codes, scale = np.array([[8]], np.uint8), np.array([[0.5]], np.float32)
            >>> row = PackedWeight(codes=codes, scales=scale, zeros=codes, bits=4, group_size=1)
            >>> PackedWeight.of_rows([row, row]).shape
            (2, 1)
        """
        return cls(
            codes=np.concatenate([part.codes for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zeros=np.concatenate([part.zeros for part in parts]),
            bits=parts[0].bits,
            group_size=parts[0].group_size,
        )

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.size == 0:
            raise InputError(f"codes have shape {self.codes.shape}, expected (out, in) with at least one of each")
        check_grid(self.bits, self.group_size, self.codes.shape[1])
        groups = (self.codes.shape[0], num_groups(self.codes.shape[1], self.group_size))
        for name, array, dtype, shape in (
            ("codes", self.codes, np.uint8, self.codes.shape),
            ("scales", self.scales, np.float32, groups),
            ("zeros", self.zeros, np.uint8, groups),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise InputError(
                    f"{name} are {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape} for groups of "
                    f"{self.group_size}"
                )
        for name, array in (("codes", self.codes), ("zeros", self.zeros)):
            if array.max() >= 2**self.bits:
                raise InputError(
                    f"{name} go up to {array.max()}, expected 0 to {2**self.bits - 1} for {self.bits} bits"
                )
        with np.errstate(over="ignore"):
            in_file = self.scales.astype(np.float16).astype(np.float32)
        if not np.array_equal(in_file, self.scales) or not np.isfinite(in_file).all():
            raise InputError("scales hold numbers that float16 does not, expected finite ones that it holds")

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        num_out, num_in = self.codes.shape
        return num_out, num_in

    @property
    def is_symmetric(self) -> bool:
        """Whether all zero points are the middle, and need not be stored."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    @property
    def size_bytes(self) -> int:
        """Bytes in a file: packed codes, float16 scales, and packed zero points where it is not symmetric."""
        num_out, num_in = self.shape
        groups = num_groups(num_in, self.group_size)
        zeros = 0 if self.is_symmetric else packed_row_bytes(groups, self.bits)
        return num_out * (packed_row_bytes(num_in, self.bits) + 2 * groups + zeros)

    def dequantised(self) -> NDArray[np.float32]:
        """The weight (out, in). Each number is one product, rounded once."""
        weight = np.repeat(self.zeros, self.group_size, axis=1)[:, : self.shape[1]].astype(np.float32)
        np.subtract(self.codes, weight, out=weight)
        weight *= np.repeat(self.scales, self.group_size, axis=1)[:, : self.shape[1]]
        return weight


def check_grid(bits: int, group_size: int, num_in: int) -> None:
    """Refuse bits and groups that a `PackedWeight` with `num_in` inputs cannot have.

    Raises:
        InputError: says which are possible.
    """
    if bits not in BITS:
        raise InputError(f"bits are {bits!r}, expected one of {', '.join(map(str, BITS))}")
    if group_size not in (*GROUP_SIZES, num_in) or group_size > num_in:
        raise InputError(
            f"group_size is {group_size!r}, expected 32, 64 or 128, at most the row's {num_in} numbers, or "
            f"{num_in} for the whole row"
        )


def num_groups(num_in: int, group_size: int) -> int:
    """Groups in a row; the last may be shorter."""
    return -(-num_in // group_size)


def packed_row_bytes(num_codes: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return -(-num_codes * bits // 8)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Lay codes bit beside bit; each row begins with a byte of its own.

    Bit b of code i of a row is bit (i * bits + b) of the row, counted from the lowest bit of its first byte. What is
    left of the last byte is zero.

    Args:
        codes: uint8 (rows, num), 0 to 2**bits - 1.

    Returns:
        uint8 (rows, ceil(num * bits / 8)).

    Example:
        >>> [f"{byte:08b}" for byte in pack_codes(np.array([[1, 2, 7]], np.uint8), 3)[0]]
        ['11010001', '00000001']
    """
    packed = np.empty((len(codes), packed_row_bytes(codes.shape[1], bits)), np.uint8)
    for rows in _row_slices(codes.shape):
        spread = np.unpackbits(codes[rows, :, None], axis=2, count=bits, bitorder="little")  # (rows, num, bits)
        packed[rows] = np.packbits(spread.reshape(len(spread), -1), axis=1, bitorder="little")
    return packed


def unpack_codes(packed: NDArray[np.uint8], bits: int, num_codes: int) -> NDArray[np.uint8]:
    """What `pack_codes` packed, uint8 (rows, num_codes).

    Raises:
        InputError: rows of another length, or bits that are no code's are set.

    Example:
        >>> unpack_codes(np.array([[0b11010001, 1]], np.uint8), 3, 3)
        array([[1, 2, 7]], dtype=uint8)
    """
    expected = packed_row_bytes(num_codes, bits)
    if packed.ndim != 2 or packed.dtype != np.uint8 or packed.shape[1] != expected:
        raise InputError(
            f"packed codes are {packed.dtype} {packed.shape}, expected uint8 rows of {expected} bytes for {num_codes} "
            f"codes of {bits} bits"
        )
    codes = np.empty((len(packed), num_codes), np.uint8)
    for rows in _row_slices(codes.shape):
        spread = np.unpackbits(packed[rows], axis=1, bitorder="little")
        if spread[:, num_codes * bits :].any():
            raise InputError("packed codes have bits set behind the last code of a row, expected zeros there")
        spread = spread[:, : num_codes * bits].reshape(len(spread), num_codes, bits)
        codes[rows] = np.packbits(spread, axis=2, bitorder="little")[:, :, 0]
    return codes


def _row_slices(shape: tuple[int, ...]) -> list[slice]:
    step = max(1, _CODES_AT_A_TIME // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]
