"""Which numbers an export writes: a quantised folder's own codes, and whole weights rounded as asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cotune.compression.grid import Grid
from cotune.compression.llama_folder import EMBEDDING, HEAD, LlamaFolder
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError
from cotune.models.packed_weights import PackedWeight

WHOLE = 32
_ROWS_AT_A_TIME = 4096  # rounding works in float64
_BITS = (4, 8, WHOLE)


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights that a folder holds whole are rounded on their way; quantised ones are written as they are."""

    bits: int | None = None
    """Of linear layers: 4, 8, or 32 for float32. None for 4, and for 32 in a folder that has quantised weights."""
    embedding_bits: int | None = None
    """Of the embedding and the head, as above. None for those of the linear layers."""
    group_size: int | None = 128
    """Weights with one scale: 32, 64 or 128 along a row, or None for a row. onnxruntime reads two float32 numbers with
    each group, at 4 bits and groups of 32 half as much again as the codes: with 128 a token takes a third less time."""
    is_symmetric: bool = True
    """Without zero points, which saves half a bit for each weight of 32 at 4 bits and costs some quality."""

    def __post_init__(self) -> None:
        for name in ("bits", "embedding_bits"):
            if getattr(self, name) not in (None, *_BITS):
                raise InputError(f"{name} is {getattr(self, name)!r}, expected 4, 8, or 32 for float32")
        Grid(group_size=self.group_size)


@dataclass(frozen=True)
class WrittenWeights:
    """The weights of a folder as an export writes them.

    Example:
        >>> written = WrittenWeights(LlamaFolder("starter"), Rounding(bits=8))
        >>> written.bits_of("model.layers.0.mlp.up_proj"), written.weight("model.layers.0.mlp.up_proj").shape
        (8, (512, 192))
    """

    folder: LlamaFolder
    rounding: Rounding

    @property
    def linear_bits(self) -> int:
        """Of linear layers that the folder holds whole."""
        if self.rounding.bits is not None:
            return self.rounding.bits
        return WHOLE if self.folder.packed else 4

    def bits_of(self, module: str) -> int:
        """Bits of a weight of a module, 32 for float32."""
        packed = self.folder.packed.get(f"{module}.weight")
        if packed is not None:
            return packed.bits
        if module not in (EMBEDDING, HEAD):
            return self.linear_bits
        if self.rounding.embedding_bits is not None:
            return self.rounding.embedding_bits
        # Of quantised layers, in bits that an embedding can have.
        quantised = max((weight.bits for weight in self.folder.packed.values()), default=self.linear_bits)
        return max(quantised, 4)

    def modules(self) -> Iterator[str]:
        """Every module with a weight (out, in): the linear ones, the embedding, and a head of its own."""
        yield from self.folder.shape.module_shapes()
        yield EMBEDDING
        if not self.folder.shape.is_tied:
            yield HEAD

    def weight(self, module: str) -> PackedWeight | NDArray[np.float32]:
        """A module's weight (out, in)."""
        name = f"{module}.weight"
        packed = self.folder.packed.get(name)
        if packed is not None:
            return packed
        whole, bits = self.folder.whole(name), self.bits_of(module)
        if bits == WHOLE:
            return whole
        grid = Grid(bits=bits, group_size=self.rounding.group_size, is_symmetric=self.rounding.is_symmetric)
        return _rounded(whole, grid)

    def vector(self, name: str) -> NDArray[np.float32] | None:
        """A norm's weight or a bias, in float32; None where the folder has none."""
        return self.folder.whole(name) if self.folder.has(name) else None

    def dequantised(self, module: str) -> NDArray[np.float32]:
        """What `weight` stands for."""
        weight = self.weight(module)
        return weight.dequantised() if isinstance(weight, PackedWeight) else weight


def _rounded(weight: NDArray[np.float32], grid: Grid) -> PackedWeight:
    rows = (weight[start : start + _ROWS_AT_A_TIME] for start in range(0, len(weight), _ROWS_AT_A_TIME))
    return PackedWeight.of_rows([round_to_nearest(torch.from_numpy(piece), grid) for piece in rows])
