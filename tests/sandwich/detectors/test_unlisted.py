"""Strict: what is not on the list is found, in whatever way it is written; lists are learnt from what many say."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.sandwich.detect import HereFinder
from cotune.sandwich.detectors.unlisted import UnlistedDetector, learn_common_words
from cotune.sandwich.folding import FoldedText
from cotune.sandwich.redact import Redactor

WORDS = ("my", "name", "is", "call", "don", "t", "2", "user", "id", "straße")


def found(text: str) -> list[str]:
    return [text[each.start : each.end] for each in UnlistedDetector(WORDS).find(text)]


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ("My name is my name.", []),
        ("my NAME: Zoe!", ["Zoe"]),
        ("call(name='p@ssw0rd', user_id=77)", ["p@ssw0rd", "77"]),
        ("name's Zoe's, is 2", ["Zoe"]),
        ("don't call 2024-01-02T10:30", ["2024-01-02T10:30"]),
        ("user_id, STRASSE, usernames", ["usernames"]),
        ("my call-name is name@my.is zoe-name", ["zoe-name"]),
        ("... -- !", []),
        ("\u738b\u5c0f\u660e is", ["\u738b\u5c0f\u660e"]),
    ],
)
def test_pieces_with_an_unlisted_word_are_found_whole(text: str, private: list[str]) -> None:
    assert found(text) == private


@settings(max_examples=50)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
@example("\u00b2")
def test_nothing_but_listed_words_is_left(text: str) -> None:
    with Redactor(finder=HereFinder({"unlisted": UnlistedDetector(WORDS)})) as redactor:
        request = redactor.request()
        sent = request.redact(text)
    left, end = "", 0
    for each in sent.replacements:
        left, end = f"{left}{sent.text[end : each.sent_start]} ", each.sent_end
    # Words are looked up as they are folded: a raised 2 is a 2.
    assert found(FoldedText.of(left + sent.text[end:]).text) == [] and request.restore(sent.text) == text


def test_common_words_are_those_that_many_texts_write_in_small_letters() -> None:
    texts = ["Ann pays 20 with the card 4711", "the card of Ann, 20; the-card", "a@card, The ann2 card"]
    assert learn_common_words(texts, min_texts=2) == ["20", "card", "the"]
    assert learn_common_words(texts, min_texts=3) == ["card"]
    with pytest.raises(InputError, match="min_texts is 1"):
        learn_common_words(texts, min_texts=1)


@pytest.mark.parametrize("words", [[], ["two words"], ["a@b"], [""]])
def test_lists_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(InputError, match="allow list"):
        UnlistedDetector(words)
