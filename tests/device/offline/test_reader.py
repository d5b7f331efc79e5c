"""Reading towards any tokens: what is read, in which pieces, and that the logits are those of a fresh text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from offline_folders import TinyLlama

from cotune.device.offline.reader import TextReader, num_common


class NumpyText:
    """An `OfflineText` in NumPy that remembers what was asked of it."""

    def __init__(self, model: TinyLlama) -> None:
        self.model = model
        self.tokens: list[int] = []
        self.calls: list[list[int] | int] = []
        self.is_closed = False

    @property
    def length(self) -> int:
        return len(self.tokens)

    def extend(self, token_ids: Sequence[int] | Any, *, num_logits: int = 1) -> Any:
        assert not self.is_closed and 1 <= num_logits <= len(token_ids)
        self.calls.append(list(token_ids))
        self.tokens += token_ids
        return self.model.logits(self.tokens)[-num_logits:]

    def truncate(self, length: int) -> None:
        assert 0 <= length <= len(self.tokens)
        self.calls.append(length)
        del self.tokens[length:]

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def text() -> NumpyText:
    return NumpyText(TinyLlama())


def test_pieces_begin_at_fixed_places(text: NumpyText) -> None:
    reader = TextReader(text, piece=4)
    ids = list(range(10, 20))
    assert reader.read(ids) is None and reader.read(ids) is None
    logits = reader.read(ids)
    np.testing.assert_array_equal(logits, text.model.logits(ids)[-1])
    assert text.calls == [ids[:4], ids[4:8], ids[8:]]
    # From wherever it stands, a piece ends where the next one begins.
    assert reader.read([*ids, *range(30, 38)]) is None
    assert text.calls[3:] == [[30, 31]]


def test_what_is_known_is_not_read_again(text: NumpyText) -> None:
    reader = TextReader(text)
    reader.read([5, 6, 7])
    reader.read([5, 6, 7, 8])
    reader.read([5, 6, 9])
    reader.read([5, 6])
    reader.read([70])
    assert text.calls == [[5, 6, 7], [8], 2, [9], 1, [6], 0, [70]]
    reader.close()
    assert text.is_closed


def test_any_walk_gives_the_logits_of_a_fresh_text(text: NumpyText) -> None:
    rng, reader, ids = random.Random(0), TextReader(text, piece=5), [3]
    for _ in range(60):
        ids = ids[: rng.randrange(1, len(ids) + 1)] + [rng.randrange(97) for _ in range(rng.randrange(8))]
        while (logits := reader.read(ids)) is None:
            pass
        np.testing.assert_array_equal(logits, text.model.logits(ids)[-1])
        assert reader.tokens == ids == text.tokens


def test_what_two_texts_have_in_common() -> None:
    assert num_common([], [1]) == 0 and num_common([1, 2], [1, 2, 3]) == 2 and num_common([1, 2, 3], [1, 9, 3]) == 1
