"""The token of one vocabulary that is written most like a token of another one: minimum edit distance, MinED.

What FuseLLM, arXiv 2401.10491, and FedMKT, arXiv 2406.02224, map vocabularies by; here a baseline beside alignment by
bytes. The distance is Levenshtein's, over the characters of what the tokens write,

    d(i, j) = min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + [a_i != b_j])

so that a space is a space whatever mark a tokenizer has for it; tokens that end a text are one string, and all others
that write nothing another one. Of several that are as near the first one counts. Time: for each asked token, its length
times the longest length of the others, times their number; tokens are asked once.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError

NOTHING, END = "\0", "\1"
"""Stand for a token that writes nothing of a text, and for one that ends it."""


def written(table: TokenBytes) -> list[str]:
    """What each token writes, as characters; bytes that are none become one mark each."""
    found = [NOTHING if piece is None else piece.decode(errors="replace") for piece in table.pieces]
    for token_id in table.end_ids:
        found[token_id] = END
    return found


class NearestTokens:
    """From the tokens of one vocabulary to those of another one.

    Args:
        source, target: tables of the two tokenizers.

    Raises:
        InputError: the target has no token.

    Example:
        >>> source = TokenBytes((b"hot", b"cats", None), frozenset())
        >>> NearestTokens(source, TokenBytes((None, b"cat", b"hit", b"hot"), frozenset()))([0, 1, 2]).tolist()
        [3, 1, 0]
    """

    def __init__(self, source: TokenBytes, target: TokenBytes) -> None:
        if not len(target):
            raise InputError("the target vocabulary is empty, expected at least one token")
        self._source, self._others = written(source), written(target)
        self._exact: dict[str, int] = {}
        for token_id, one in enumerate(self._others):
            self._exact.setdefault(one, token_id)
        self._lengths = np.array([len(one) for one in self._others])
        self._letters = _as_rows(self._others)
        self._known: dict[int, int] = {}

    def __call__(self, ids: Iterable[int]) -> NDArray[np.int64]:
        """int64, the nearest token of each."""
        return np.array([self._nearest(int(one)) for one in ids], np.int64)

    def whole(self) -> NDArray[np.int64]:
        """int64 (source's vocab,), of every token."""
        return self(range(len(self._source)))

    def _nearest(self, token_id: int) -> int:
        if token_id not in self._known:
            own = self._source[token_id]
            exact = self._exact.get(own)
            self._known[token_id] = int(np.argmin(self.distances(own))) if exact is None else exact
        return self._known[token_id]

    def distances(self, text: str) -> NDArray[np.int64]:
        """int64 (target's vocab,), the edit distance of each of its tokens from `text`."""
        width = self._letters.shape[1]
        # Row i holds d(i, j) for all tokens at once, (vocab, width + 1).
        row = np.tile(np.arange(width + 1), (len(self._others), 1))
        for index, letter in enumerate(text, start=1):
            following = np.empty_like(row)
            following[:, 0] = index
            changed = row[:, :-1] + (self._letters != ord(letter))
            kept = np.minimum(changed, row[:, 1:] + 1)
            for place in range(width):
                following[:, place + 1] = np.minimum(kept[:, place], following[:, place] + 1)
            row = following
        ends: NDArray[np.int64] = row[np.arange(len(row)), self._lengths]
        return ends


def edit_distance(first: str, second: str) -> int:
    """Of two strings.

    Example:
        >>> edit_distance("kitten", "sitting")
        3
    """
    row = list(range(len(second) + 1))
    for index, letter in enumerate(first, start=1):
        before, row[0] = row[0], index
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (letter != other))
    return row[-1]


def _as_rows(texts: list[str]) -> NDArray[np.int64]:
    """Code points, (texts, the longest), filled up with -1."""
    rows = np.full((len(texts), max(1, *(len(one) for one in texts)) if texts else 1), -1, np.int64)
    for row, one in zip(rows, texts, strict=True):
        row[: len(one)] = [ord(letter) for letter in one]
    return rows
