"""Quantised weights in the blocks of onnxruntime's MatMulNBits and GatherBlockQuantized.

A row is cut into blocks of 16 to 256 numbers, a power of two; the last is filled up. Codes have 4 or 8 bits, two of
4 bits in a byte, the first in the low half. A block has one scale and one zero point, in the middle (8 or 128) unless
another is stored. What a `PackedWeight` stands for stays exactly the same: 3-bit codes take 4 bits, and a group that
is no power of two is cut into blocks that share its scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.models.packed_weights import PackedWeight

_BLOCK_SIZES = (256, 128, 64, 32, 16)
_PADDED_BLOCK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockWeight:
    """A weight (out, in) in blocks.

    Attributes:
        codes: uint8 (out, blocks, block_size * bits / 8), packed.
        scales: float16 (out, blocks).
        zeros: uint8 (out, blocks), one in each byte; None where all are in the middle.
        bits: 4 or 8.
        block_size: a power of two from 16 to 256.
        num_in: numbers of a row that count; the rest of its last block is filling.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.float16]
    zeros: NDArray[np.uint8] | None
    bits: int
    block_size: int
    num_in: int

    @classmethod
    def from_packed(cls, weight: PackedWeight) -> BlockWeight:
        """The same weight, laid out anew.

        Example:
            >>> codes = np.arange(32, dtype=np.uint8)[None] % 16
            >>> packed = PackedWeight(
            ...     codes=codes, scales=np.ones((1, 1), np.float32), zeros=np.full((1, 1), 8, np.uint8),
            ...     bits=4, group_size=32)
            >>> BlockWeight.from_packed(packed).codes[0, 0, :3]
            array([16, 50, 84], dtype=uint8)
        """
        num_out, num_in = weight.shape
        bits = 8 if weight.bits == 8 else 4
        block_size = _block_size(weight)
        num_blocks = -(-num_in // block_size)
        # A narrower symmetric weight is moved to the middle of the wider range.
        shift = 2 ** (bits - 1) - 2 ** (weight.bits - 1) if weight.is_symmetric else 0
        codes = np.full((num_out, num_blocks * block_size), 2 ** (bits - 1), np.uint8)
        codes[:, :num_in] = weight.codes + np.uint8(shift)
        groups = np.arange(num_blocks) * block_size // weight.group_size
        return cls(
            codes=_packed(codes, bits).reshape(num_out, num_blocks, block_size * bits // 8),
            scales=weight.scales[:, groups].astype(np.float16),
            zeros=None if weight.is_symmetric else np.ascontiguousarray(weight.zeros[:, groups]),
            bits=bits,
            block_size=block_size,
            num_in=num_in,
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return len(self.codes), self.num_in

    @property
    def packed_zeros(self) -> NDArray[np.uint8] | None:
        """Zero points packed like the codes, uint8 (out, ceil(blocks * bits / 8)), as MatMulNBits reads them."""
        return None if self.zeros is None else _packed(self.zeros, self.bits)

    def dequantised(self) -> NDArray[np.float32]:
        """The weight (out, in), as onnxruntime works it out."""
        num_out, num_blocks, _ = self.codes.shape
        codes = self.codes if self.bits == 8 else np.stack([self.codes & 15, self.codes >> 4], axis=-1)
        blocks = codes.reshape(num_out, num_blocks, self.block_size).astype(np.float32)
        blocks -= np.float32(2 ** (self.bits - 1)) if self.zeros is None else self.zeros[:, :, None]
        blocks *= self.scales.astype(np.float32)[:, :, None]
        return blocks.reshape(num_out, -1)[:, : self.num_in]


def stacked(weights: Sequence[BlockWeight]) -> BlockWeight | None:
    """Weights of the same inputs as one weight, outputs one after another; None where their blocks differ.

    Example:
        >>> packed = PackedWeight(
        ...     codes=np.zeros((2, 32), np.uint8), scales=np.ones((2, 1), np.float32),
        ...     zeros=np.full((2, 1), 8, np.uint8), bits=4, group_size=32)
        >>> stacked([BlockWeight.from_packed(packed)] * 3).shape
        (6, 32)
    """
    first = weights[0]
    if len({(weight.bits, weight.block_size, weight.num_in) for weight in weights}) > 1:
        return None
    zeros = None
    if any(weight.zeros is not None for weight in weights):
        middle = 2 ** (first.bits - 1)
        zeros = np.concatenate(
            [np.full(w.scales.shape, middle, np.uint8) if w.zeros is None else w.zeros for w in weights]
        )
    return BlockWeight(
        codes=np.concatenate([weight.codes for weight in weights]),
        scales=np.concatenate([weight.scales for weight in weights]),
        zeros=zeros,
        bits=first.bits,
        block_size=first.block_size,
        num_in=first.num_in,
    )


def _block_size(weight: PackedWeight) -> int:
    """The largest block within which the scale does not change."""
    num_in = weight.shape[1]
    # Where one group is the whole row, its scale goes on into the filling.
    length = num_in if weight.group_size == num_in else weight.group_size
    return next((size for size in _BLOCK_SIZES if length % size == 0), _PADDED_BLOCK)


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Rows of codes (rows, num) as bytes, filled up with zeros."""
    if bits == 8:
        return codes
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return padded[:, ::2] | padded[:, 1::2] << np.uint8(4)
