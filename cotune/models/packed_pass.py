"""One forward pass over the new tokens of many sequences, laid end to end, each with its own keys and values.

Linear layers and norms see one long row of tokens and do not care whose they are; only attention looks at which
sequence a token belongs to. So prompts in pieces, single tokens and drafts of several mix freely in one pass.

What one token's features are must not depend on who else is in the pass. Two rules see to that in attention:

- a generated token attends alone, as a batch element of its own with one query, over keys padded to whole blocks;
- a prompt is read in pieces that begin at multiples of `PROMPT_CHUNK`, each piece in one call of its own.

The linear layers' part in this is `cotune.models.row_invariance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.errors import InputError
from cotune.models.kv_pool import BLOCK_SIZE, KVPool, num_blocks_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_CHUNK = 128
"""Prompts are read in pieces of this many tokens, so that a long one does not stall the others."""

_IMPLEMENTATION = "cotune_packed"


class KVSequence:
    """One sequence's blocks in a pool.

    Attributes:
        length: tokens whose keys and values are kept.
        num_prompt: the first so many tokens are read as a prompt; None until the first is read.
    """

    def __init__(self, pool: KVPool, num_prompt: int | None = None) -> None:
        self.pool = pool
        self.num_prompt = num_prompt
        self._given_num_prompt = num_prompt
        self.length = 0
        self.blocks: list[int] = []

    def make_room(self, num_tokens: int) -> None:
        """Own blocks for `num_tokens` more tokens, alone.

        Raises:
            CacheFullError: the pool has none left; nothing has changed.
        """
        end = self.length + num_tokens
        first = self.length // BLOCK_SIZE
        shared = [i for i in range(first, len(self.blocks)) if self.pool.is_shared(self.blocks[i])]
        new = self.pool.take(max(0, num_blocks_for(end) - len(self.blocks)) + len(shared))
        for i in shared:
            copy = new.pop()
            self.pool.copy(self.blocks[i], copy)
            self.pool.drop([self.blocks[i]])
            self.blocks[i] = copy
        self.blocks += new

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on."""
        kept = num_blocks_for(length)
        self.pool.drop(self.blocks[kept:])
        del self.blocks[kept:]
        self.length = length
        if length == 0:
            self.num_prompt = self._given_num_prompt
        elif self.num_prompt is not None and length < self.num_prompt:
            # What comes now is no longer that prompt.
            self.num_prompt = length

    def fork(self) -> KVSequence:
        """A copy that shares the blocks until one of both writes to them."""
        twin = KVSequence(self.pool, self.num_prompt)
        twin.length = self.length
        twin.blocks = list(self.blocks)
        self.pool.share(twin.blocks)
        return twin


@dataclass(frozen=True)
class Piece:
    """New tokens of one sequence in a pass."""

    sequence: KVSequence
    token_ids: list[int]

    @property
    def is_prompt(self) -> bool:
        return self.sequence.length < (self.sequence.num_prompt or 0)


def pieces_of(sequence: KVSequence, token_ids: list[int]) -> Iterator[list[int]]:
    """Cut the tokens that come next into what may be in one pass: prompt pieces, then the rest."""
    if sequence.num_prompt is None:
        sequence.num_prompt = len(token_ids)
    start, left = sequence.length, token_ids
    while left:
        end = start + len(left)
        if start < sequence.num_prompt:
            end = min(end, sequence.num_prompt, (start // PROMPT_CHUNK + 1) * PROMPT_CHUNK)
        piece, left = left[: end - start], left[end - start :]
        yield piece
        start = end


@dataclass(frozen=True)
class AttentionForm:
    """What is special about a layer's attention.

    Attributes:
        scale: factor of the scores; None for 1 / sqrt(head_dim).
        window: a token sees the last so many, itself included; None for all.
        softcap: scores s become softcap * tanh(s / softcap), as in Gemma 2; None for none.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """(batch, heads, queries, head_dim) of keys and values (batch, keys, kv_heads, head_dim)."""
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        groups = queries.shape[1] // keys.shape[1]
        if self.softcap is None:
            return F.scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=groups > 1
            )
        scale = queries.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = queries @ keys.repeat_interleave(groups, dim=1).transpose(-1, -2) * scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32).to(queries.dtype)
        return weights @ values.repeat_interleave(groups, dim=1)


@dataclass
class PackedPass:
    """What attention has to know of one pass. Make room in the sequences first.

    Args:
        pool: holds the keys and values.
        pieces: the new tokens.
        num_rows: tokens in the pass; those beyond the pieces' are padding.
        device: of the model.
    """

    pool: KVPool
    pieces: Sequence[Piece]
    num_rows: int
    device: torch.device
    positions: NDArray[np.int64] = field(init=False)
    _slots: Tensor = field(init=False)
    _chunks: list[_Chunk] = field(init=False, default_factory=list)
    _singles: _Singles | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        positions = np.zeros(self.num_rows, np.int64)
        slots: list[NDArray[np.int64]] = []
        rows: list[int] = []
        owners: list[KVSequence] = []
        start = 0
        for piece in self.pieces:
            sequence, end = piece.sequence, start + len(piece.token_ids)
            own = np.arange(sequence.length, sequence.length + len(piece.token_ids))
            positions[start:end] = own
            blocks = np.asarray(sequence.blocks)
            slots.append(blocks[own // BLOCK_SIZE] * BLOCK_SIZE + own % BLOCK_SIZE)
            if piece.is_prompt:
                self._chunks.append(_Chunk(sequence, slice(start, end), own, self.device))
            else:
                rows.extend(range(start, end))
                owners.extend([sequence] * len(piece.token_ids))
            start = end
        self.positions = positions
        self._slots = torch.from_numpy(np.concatenate(slots)).to(self.device)
        if rows:
            self._singles = _Singles(rows, owners, positions[rows], self.device)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, form: AttentionForm) -> Tensor:
        """(rows, heads, head_dim) from queries of that shape and new keys and values (rows, kv_heads, head_dim)."""
        num_new = len(self._slots)
        self.pool.write(layer, self._slots, keys[:num_new], values[:num_new])
        output = queries.new_zeros((*queries.shape[:2], values.shape[-1]))
        if self._singles is not None:
            rows = self._singles.rows
            read = self._singles.read(self.pool, layer)
            attended = form.attend(queries[rows, :, None], *read, self._singles.mask(form.window))
            output[rows] = attended[:, :, 0]
        for chunk in self._chunks:
            read = chunk.read(self.pool, layer)
            attended = form.attend(queries[chunk.rows].transpose(0, 1)[None], *read, chunk.mask(form.window))
            output[chunk.rows] = attended[0].transpose(0, 1)
        return output

    def finish(self) -> None:
        """The pass is done: its tokens are in the sequences."""
        for piece in self.pieces:
            piece.sequence.length += len(piece.token_ids)


class _Reader:
    """Reads a table of blocks, and keeps the masks of a pass, which many layers share."""

    def __init__(self, table: NDArray[np.int64], positions: NDArray[np.int64], device: torch.device) -> None:
        self._positions = torch.from_numpy(positions).to(device)
        self._keys = torch.arange(table.shape[1] * BLOCK_SIZE, device=device)
        self._masks: dict[int | None, Tensor] = {}
        self._first = int(table[0, 0])
        self._num_blocks = table.shape[1]
        self._is_run = len(table) == 1 and bool((np.diff(table[0]) == 1).all())
        self._table = torch.from_numpy(table).to(device)

    def read(self, pool: KVPool, layer: int) -> tuple[Tensor, Tensor]:
        if self._is_run:
            return pool.view(layer, self._first, self._num_blocks)
        return pool.read(layer, self._table)

    def visible(self, window: int | None) -> Tensor:
        """bool (queries, keys): no key after the query's position, and none further back than the window."""
        mask = self._masks.get(window)
        if mask is None:
            mask = self._keys <= self._positions[:, None]
            if window is not None:
                mask &= self._keys > self._positions[:, None] - window
            self._masks[window] = mask
        return mask


class _Singles(_Reader):
    """Generated tokens: each a batch element with one query."""

    def __init__(
        self, rows: list[int], owners: list[KVSequence], positions: NDArray[np.int64], device: torch.device
    ) -> None:
        width = num_blocks_for(int(positions.max()) + 1)
        table = np.zeros((len(rows), width), np.int64)
        for row, owner in zip(table, owners, strict=True):
            blocks = owner.blocks[:width]
            row[: len(blocks)] = blocks
        super().__init__(table, positions, device)
        is_all = rows == list(range(len(rows)))
        self.rows: slice | Tensor = slice(0, len(rows)) if is_all else torch.tensor(rows, device=device)

    def mask(self, window: int | None) -> Tensor:
        return self.visible(window)[:, None, None]


class _Chunk(_Reader):
    """A piece of a prompt: one call with many queries."""

    def __init__(self, sequence: KVSequence, rows: slice, positions: NDArray[np.int64], device: torch.device) -> None:
        table = np.array([sequence.blocks[: num_blocks_for(int(positions[-1]) + 1)]], np.int64)
        super().__init__(table, positions, device)
        self.rows = rows

    def mask(self, window: int | None) -> Tensor:
        return self.visible(window)[None, None]


@contextmanager
def packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Within it the model's layers attend as the `PackedPass` says that is passed to them as `packed`."""
    from transformers import AttentionInterface

    # transformers' own way to add an attention function; masks for it are not made, as it is not in their mapping.
    AttentionInterface.register(_IMPLEMENTATION, _attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = _IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = before


def check_attention(model: PreTrainedModel) -> None:
    """Refuse a model whose attention is not what a packed pass computes.

    Raises:
        InputError: chunked or other special attention.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds or not model._can_set_attn_implementation():
        what = f"layers of kind {', '.join(sorted(kinds))}" if kinds else "its own form of attention"
        raise InputError(
            f"{type(model).__name__} is not supported: it has {what}; "
            "take a model with full or sliding attention such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: PackedPass,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    layer: int = module.layer_idx  # type: ignore[assignment]
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    return packed.attend(layer, queries, keys, values, AttentionForm(scaling, sliding_window, softcap))[None], None
