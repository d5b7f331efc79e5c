"""Bytes that a model does not expect after a token only because a longer token would have come instead.

This is the bias of tokenization. With "the" and "there" in a vocabulary, a model that has read
"the" knows that no "r" follows, as a tokenizer that takes the longest token would have gone on. Another vocabulary's
model at the same boundary does not know that. For a token t,

    X(t) = {c: a longer token of the vocabulary begins with the bytes of t and then c}

Where longer tokens grow byte by byte and the longest one is taken, the next byte outside of X(t) is expected as the
text has it, up to a factor: two models over one language agree on the bytes outside of X of both. With BPE, which
merges in another order, that is so approximately.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cotune.distillation.token_bytes import NUM_EVENTS, TokenBytes


class MergedBytes:
    """X of every token of a vocabulary.

    Example:
        >>> merged = MergedBytes(TokenBytes((b"the", b"there", b"x"), frozenset()))
        >>> [chr(c) for c in merged(torch.tensor([0]))[0].nonzero()[:, 0]], int(merged(torch.tensor([1, 2])).sum())
        (['r'], 0)
    """

    def __init__(self, table: TokenBytes) -> None:
        known, rows = table.ids_by_bytes, {b"": 0}
        found: list[tuple[int, int]] = []
        for piece in known:
            for size in range(1, len(piece)):
                if piece[:size] in known:
                    found.append((rows.setdefault(piece[:size], len(rows)), piece[size]))
        sets = np.zeros((len(rows), NUM_EVENTS), np.bool_)
        for row, byte in found:
            sets[row, byte] = True
        self._sets = torch.from_numpy(sets)
        self._row_of_token = torch.tensor([rows.get(piece or b"", 0) for piece in table.pieces], dtype=torch.int64)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """X of these tokens, bool (tokens, 257), on their device; empty for tokens that write nothing."""
        sets, rows = self._sets.to(token_ids.device), self._row_of_token.to(token_ids.device)
        return sets[rows[token_ids]]
