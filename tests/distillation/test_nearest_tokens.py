"""Minimum edit distance between vocabularies, against a recursion that is the definition."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import table_of

from cotune.distillation.nearest_tokens import NOTHING, NearestTokens, edit_distance, written
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError


def reference(first: str, second: str) -> int:
    """Levenshtein's distance as it is defined."""

    @cache
    def distance(i: int, j: int) -> int:
        if min(i, j) == 0:
            return max(i, j)
        same = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, same)

    return distance(len(first), len(second))


WORDS = st.lists(st.text(alphabet="ab é", max_size=4), min_size=1, max_size=4)


@settings(max_examples=20, deadline=None)
@given(WORDS, st.text(alphabet="ab éc", max_size=4))
def test_distances_of_a_whole_vocabulary_are_those_of_the_recursion(words: list[str], asked: str) -> None:
    table = TokenBytes(tuple(one.encode() or None for one in words), frozenset())
    nearest = NearestTokens(TokenBytes((asked.encode() or None,), frozenset()), table)
    wanted = [reference(asked, one or NOTHING) for one in words]
    assert nearest.distances(asked).tolist() == wanted
    assert [edit_distance(asked, one or NOTHING) for one in words] == wanted
    sought = [reference(asked or NOTHING, one or NOTHING) for one in words]
    assert nearest([0]).tolist() == [sought.index(min(sought))]


def test_spaces_are_spaces_and_specials_are_near_specials() -> None:
    """A byte-level and a metaspace vocabulary: what both write is mapped to itself, whatever the marks."""
    source, target = table_of("byte_level"), table_of("unigram")
    found = NearestTokens(source, target).whole()
    texts = (written(source), written(target))
    common = set(texts[0]) & set(texts[1])
    assert " the" in common
    for token_id, text in enumerate(texts[0]):
        assert (texts[1][found[token_id]] == text) == (text in common)
    assert target.pieces[found[[one is None for one in source.pieces].index(True)]] is None


def test_a_target_like_no_string_at_all_is_still_some_token() -> None:
    """The weakness that is known of the map: an unrelated string is taken."""
    source, target = TokenBytes((b"xyz",), frozenset()), TokenBytes((b"abcd", b"ab"), frozenset())
    assert np.array_equal(NearestTokens(source, target).whole(), [1])


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="target vocabulary is empty"):
        NearestTokens(TokenBytes((b"a",), frozenset()), TokenBytes((), frozenset()))
