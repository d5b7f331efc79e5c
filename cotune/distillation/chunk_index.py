"""Where the chunks of aligned texts are in the logits of one model.

The logits at a position are about the token after it: chunk k, whose tokens are [first, end), is predicted by the
logits at first - 1 to end - 2. That shift is made here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cotune.distillation.alignment import Alignment


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkIndex:
    """The usable chunks of a batch of texts, one text after the other.

    Attributes:
        rows, positions: int64 (chunks,): logits[row, position] predicts the chunk's first token.
        last_ids: int64 (chunks,), the token at that position.
        token_rows, token_positions: int64 (tokens,): logits[row, position] predicts a token of a chunk.
        token_ids: int64 (tokens,), which token.
        token_chunks: int64 (tokens,), of which chunk.
        num_bytes: int64 (chunks,), 0 for the end of a text.
        has_own_start: bool (chunks,), whether the chunk's first byte is what both sides predict here.
    """

    rows: Tensor
    positions: Tensor
    last_ids: Tensor
    token_rows: Tensor
    token_positions: Tensor
    token_ids: Tensor
    token_chunks: Tensor
    num_bytes: Tensor
    has_own_start: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of_batch(cls, alignments: Sequence[Alignment], side: int) -> ChunkIndex:
        """Of the texts of a batch, in its order.

        Args:
            side: 0 or 1, which of the two models.

        Example:
            >>> index = ChunkIndex.of_batch([alignment], 0)  # doctest: +SKIP
            >>> logits[index.rows, index.positions].shape  # doctest: +SKIP
            torch.Size([17, 32000])
        """
        firsts, ends, rows, last, ids, token_rows, sizes, own = [], [], [], [], [], [], [], []
        for row, alignment in enumerate(alignments):
            usable = alignment.is_usable
            tokens = alignment.sides[side]
            first, end = tokens.first_tokens[usable], tokens.end_tokens[usable]
            firsts.append(first)
            ends.append(end)
            rows.append(np.full(len(first), row))
            last.append(tokens.input_ids[first - 1])
            places = _ranges(first, end)
            ids.append(tokens.input_ids[places])
            token_rows.append(np.full(len(places), row))
            sizes.append((alignment.chunk_ends - alignment.chunk_starts)[usable])
            own.append(alignment.has_own_start[usable])
        first, end = _joined(firsts), _joined(ends)
        return cls(
            rows=torch.from_numpy(_joined(rows)),
            positions=torch.from_numpy(first - 1),
            last_ids=torch.from_numpy(_joined(last)),
            token_rows=torch.from_numpy(_joined(token_rows)),
            token_positions=torch.from_numpy(_ranges(first, end) - 1),
            token_ids=torch.from_numpy(_joined(ids)),
            token_chunks=torch.from_numpy(np.repeat(np.arange(len(first)), end - first)),
            num_bytes=torch.from_numpy(_joined(sizes)),
            has_own_start=torch.from_numpy(np.concatenate([np.zeros(0, np.bool_), *own])),
        )

    def wanted(self, shape: tuple[int, int]) -> Tensor:
        """bool (batch, seq), the positions whose logits are read."""
        wanted = torch.zeros(shape, dtype=torch.bool, device=self.rows.device)
        wanted[self.rows, self.positions] = True
        wanted[self.token_rows, self.token_positions] = True
        return wanted

    def among(self, wanted: Tensor) -> ChunkIndex:
        """The same chunks in the logits of some positions alone, (1, wanted positions, vocab), in their order.

        Args:
            wanted: bool (batch, seq), all positions of `ChunkIndex.wanted` among them.

        Example:
            >>> index.among(wanted)  # of logits[wanted][None]  # doctest: +SKIP
        """
        place = wanted.reshape(-1).cumsum(0).reshape(wanted.shape) - 1
        return replace(
            self,
            rows=torch.zeros_like(self.rows),
            positions=place[self.rows, self.positions],
            token_rows=torch.zeros_like(self.token_rows),
            token_positions=place[self.token_rows, self.token_positions],
        )

    def to(self, device: torch.device | str) -> ChunkIndex:
        """The same on another device."""
        return ChunkIndex(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def _ranges(first: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """first[0] .. end[0] - 1, first[1] .. end[1] - 1, and so on."""
    sizes = end - first
    before = np.cumsum(sizes) - sizes
    places: NDArray[np.int64] = np.arange(int(sizes.sum())) + np.repeat(first - before, sizes)
    return places


def _joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)
