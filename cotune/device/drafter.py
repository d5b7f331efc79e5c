"""How a text may go on, guessed on the device: by look-up in its own texts and in the conversation so far.

A draft decides nothing. The cloud reads it in one pass, and each of its tokens is confirmed or replaced as any other,
so that a bad draft costs time and no quality. What can be turned into a `Drafter` is whatever continues token ids: the
look-up below, or a small model that the device has for the time when it is offline.

Prompt look-up decoding (Saxena, 2023) and REST (He et al., arXiv 2311.08252) draft in this way.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

_BREAK = -1
# The most places that are asked how they go on.
_MAX_VOTES = 64


class Drafter(Protocol):
    """Continues one text; made anew for each generation. An offline model fits too."""

    def draft(self, history: list[int], k: int) -> list[int]:
        """At most `k` tokens that may follow `history`, none where it does not know.

        Args:
            history: prompt and text so far; from call to call its end may grow or change.
        """
        ...


class TextIndex:
    """Token ids of a device's own texts, to be found by what stands before them. It stays on the device.

    All positions are sorted by the tokens before them, read backwards, so that those with the longest common past are
    neighbours (a suffix array). About 8 bytes for each token.

    Args:
        texts: token ids of each text.
        longest: tokens of the past that are compared.
        max_tokens: the last so many tokens of all texts are kept.

    Example:
        >>> index = TextIndex([[5, 6, 7, 8], [1, 6, 7, 9], [2, 6, 7, 9]])
        >>> index.find([3, 6, 7]), index.find([5, 6, 7])
        ((2, 9), (3, 8))
    """

    def __init__(self, texts: Sequence[Sequence[int]] = (), *, longest: int = 8, max_tokens: int = 2_000_000) -> None:
        if longest < 1 or max_tokens < 1:
            raise InputError(f"longest is {longest} and max_tokens {max_tokens}, expected at least 1")
        self.longest = longest
        parts: list[NDArray[np.int32]] = []
        num_left = max_tokens
        for text in reversed(texts):
            ids = np.asarray(text[-num_left:], np.int32)
            if len(ids) and ids.min() < 0:
                raise InputError(f"a text holds token id {ids.min()}, expected ids of at least 0")
            parts += [ids, np.full(longest, _BREAK, np.int32)]
            num_left -= len(ids)
            if num_left <= 0:
                break
        self._tokens = np.concatenate([*reversed(parts), np.empty(0, np.int32)])
        self._order = self._sorted_positions()

    @property
    def num_tokens(self) -> int:
        return len(self._order)

    def _sorted_positions(self) -> NDArray[np.int32]:
        positions = np.flatnonzero(self._tokens != _BREAK).astype(np.int32)
        # There are as many breaks before each text as tokens are compared, so that no past reaches another text.
        columns = [self._tokens[positions - back] for back in range(1, self.longest + 1)]
        # The last key counts most. Equal pasts stay in the order of the texts.
        return positions[np.lexsort(columns[::-1])] if len(positions) else positions

    def _past(self, rank: int, length: int) -> tuple[int, ...]:
        position = int(self._order[rank])
        return tuple(self._tokens[position - length : position][::-1].tolist())

    def find(self, history: Sequence[int]) -> tuple[int, int] | None:
        """(length of the longest known end of `history`, the most frequent token after it, the last one of equals)."""
        past = tuple(history[: -self.longest - 1 : -1])
        ranks = range(len(self._order))
        here = bisect_left(ranks, past, key=lambda rank: self._past(rank, self.longest))
        near = [self._past(rank, self.longest) for rank in (here - 1, here) if 0 <= rank < len(ranks)]
        length = max((_num_common(past, one) for one in near), default=0)
        if length == 0:
            return None
        first = bisect_left(ranks, past[:length], key=lambda rank: self._past(rank, length))
        last = bisect_right(ranks, past[:length], lo=first, key=lambda rank: self._past(rank, length))
        places = np.sort(self._order[first:last])[-_MAX_VOTES:]
        return length, _most_frequent(self._tokens[places].tolist())


class LookupDrafter:
    """Continues a text as it went on where its end stood before: in the device's texts, or in the text itself.

    The longest known end counts; of equal ones that in the text itself, which is the more recent.

    Args:
        index: the device's own texts.
        shortest: tokens that must agree before anything is drafted.

    Example:
        >>> LookupDrafter(TextIndex([[1, 2, 3, 4]])).draft([9, 1, 2], k=5)
        [3, 4]
    """

    def __init__(self, index: TextIndex | None = None, *, shortest: int = 2) -> None:
        if shortest < 1:
            raise InputError(f"shortest is {shortest}, expected at least 1")
        self._index = index or TextIndex()
        self._shortest = shortest
        self._seen: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def draft(self, history: list[int], k: int) -> list[int]:
        self._read(history)
        path = list(history)
        while len(path) < len(history) + k:
            token = self._next(path)
            if token is None:
                break
            path.append(token)
        return path[len(history) :]

    def _read(self, history: list[int]) -> None:
        """Take in what is new in `history`; what it no longer holds is found out when it is looked up."""
        start = len(self._seen)
        if history[:start] != self._seen:
            start = _num_common(history, self._seen)
        self._seen = list(history)
        for position in range(max(start, self._shortest), len(history)):
            for length in range(self._shortest, min(self._index.longest, position) + 1):
                self._places[tuple(history[position - length : position])] = position

    def _next(self, path: list[int]) -> int | None:
        own_length, own = self._find(path)
        found = self._index.find(path)
        if found is None or found[0] < self._shortest or found[0] <= own_length:
            return own
        return found[1]

    def _find(self, path: list[int]) -> tuple[int, int | None]:
        """As `TextIndex.find`, in the text itself; there the last continuation counts."""
        for length in range(min(self._index.longest, len(path)), self._shortest - 1, -1):
            past = tuple(path[-length:])
            position = self._places.get(past)
            if position is None or position >= len(self._seen):
                continue
            if tuple(self._seen[position - length : position]) == past:
                return length, self._seen[position]
        return 0, None


def _num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with; breaks are no tokens."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b or a == _BREAK), min(len(left), len(right)))


def _most_frequent(tokens: list[int]) -> int:
    counts = Counter(tokens)
    most = max(counts.values())
    return next(token for token in reversed(tokens) if counts[token] == most)
