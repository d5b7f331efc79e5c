"""Look-up drafts: the longest known end first, the most frequent continuation, in own texts and in the text itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.device.drafter import LookupDrafter, TextIndex
from cotune.errors import InputError

TOKENS = st.lists(st.integers(0, 3), max_size=14)


def find_slowly(texts: list[list[int]], history: list[int], longest: int) -> tuple[int, int] | None:
    """`TextIndex.find`, by looking everywhere."""
    for length in range(min(longest, len(history)), 0, -1):
        end = history[-length:]
        after = [
            text[i] for text in texts for i in range(length, len(text)) if text[i - length : i] == end
        ]  # fmt: skip
        if after:
            counts = Counter(after)
            most = max(counts.values())
            return length, next(token for token in reversed(after) if counts[token] == most)
    return None


@given(st.lists(TOKENS, max_size=5), TOKENS, st.integers(1, 4))
def test_the_index_finds_what_a_search_everywhere_finds(
    texts: list[list[int]], history: list[int], longest: int
) -> None:
    assert TextIndex(texts, longest=longest).find(history) == find_slowly(texts, history, longest)


@given(TOKENS.filter(lambda history: len(history) > 2), st.integers(1, 3))
def test_the_text_itself_is_looked_up_too(history: list[int], shortest: int) -> None:
    """Its last place with the longest known end counts."""
    drafted = LookupDrafter(shortest=shortest).draft(history, 1)
    for length in range(min(8, len(history)), shortest - 1, -1):
        places = [i for i in range(length, len(history)) if history[i - length : i] == history[-length:]]
        if places:
            assert drafted == [history[places[-1]]]
            return
    assert drafted == []


def test_a_draft_goes_on_to_the_end_of_what_it_knows() -> None:
    drafter = LookupDrafter(TextIndex([[1, 2, 3, 4, 5]]))
    assert drafter.draft([9, 1, 2], 2) == [3, 4]
    assert drafter.draft([9, 1, 2], 9) == [3, 4, 5]
    assert drafter.draft([9, 9, 2], 9) == []
    assert drafter.draft([], 3) == []
    assert drafter.draft([1, 2], 0) == []


def test_texts_do_not_run_into_each_other() -> None:
    assert TextIndex([[1, 2], [3, 4]]).find([1, 2]) is None
    assert TextIndex([[1, 2], [2, 5]]).find([1, 2]) == (1, 5)


def test_the_longer_end_counts_and_of_equals_the_text_itself() -> None:
    index = TextIndex([[7, 1, 2, 5], [1, 2, 5]])
    assert LookupDrafter(index).draft([0, 1, 2, 6, 1, 2], 1) == [6]
    assert LookupDrafter(index).draft([0, 1, 2, 6, 7, 1, 2], 1) == [5]


def test_a_text_that_changes_behind_its_back_is_read_anew() -> None:
    drafter = LookupDrafter()
    assert drafter.draft([1, 2, 3, 1, 2], 1) == [3]
    assert drafter.draft([1, 2, 4, 1, 2], 2) == [4, 1]
    assert drafter.draft([1, 2], 1) == []
    long = [1, 2, 4, 1, 2, 5, 1, 2]
    assert drafter.draft(long, 1) == LookupDrafter().draft(long, 1) == [5]


def test_memory_is_bounded_and_the_last_texts_are_kept() -> None:
    index = TextIndex([[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_tokens=5)
    assert index.num_tokens == 5
    assert index.find([4, 5]) == (1, 6)
    assert index.find([1, 2]) is None
    assert index.find([7, 8]) == (2, 9)
    assert TextIndex().num_tokens == 0 and TextIndex().find([1]) is None


def test_a_large_index_is_fast_enough_to_build() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.zipf(1.3, 100).clip(0, 5_000).tolist() for _ in range(200)]
    assert LookupDrafter(TextIndex(texts)).draft(texts[7][:50], 8) == texts[7][50:58]


def test_impossible_arguments_are_refused() -> None:
    with pytest.raises(InputError, match="a text holds token id -1"):
        TextIndex([[1, -1]])
    for arguments in ({"longest": 0}, {"max_tokens": 0}):
        with pytest.raises(InputError, match="expected at least 1"):
            TextIndex([], **arguments)
    with pytest.raises(InputError, match="shortest is 0"):
        LookupDrafter(shortest=0)
