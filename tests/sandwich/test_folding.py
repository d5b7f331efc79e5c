"""Folding: each trap by hand, and places that lead back for any text."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.sandwich import folding
from cotune.sandwich.folding import FoldedText, fold_views


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("a\u200bn\u00adn\u2060@x", "ann@x"),
        ("\uff14\uff11\uff11\uff11", "4111"),
        ("٤١١١", "4111"),
        ("ann\uff20x\uff0eorg", "ann@x.org"),
        ("ann@x。org", "ann@x.org"),
        ("555\u2011\u2212\u2013", "555---"),
        ("a\u00a0b\u202fc\u3000d", "a b c d"),
        ("e\u0301", "é"),
        ("ﬁne", "fine"),
        ("\u1112\u1161\u11ab", "한"),
        ("caf\\u00e9 \\ud83d\\ude00", "café 😀"),
        ("a\\nb", "a\\nb"),
        ("☎\ufe0f", "☎"),
    ],
)
def test_each_trap(text: str, folded: str) -> None:
    assert FoldedText.of(text).text == folded


def test_json_escapes_are_read_where_the_text_is_json() -> None:
    folded = FoldedText.of('{"a": "x\\n\\"ann\\/\\\\"}', escapes="json")
    assert folded.text == '{"a": "x\n"ann/\\"}'
    start = folded.text.index("ann")
    assert folded.original_span(start, start + 3) == (12, 15)


def test_case_folding_keeps_its_places() -> None:
    folded = FoldedText.of("xStraße").casefolded()
    assert folded.text == "xstrasse" and folded.original_span(5, 7) == (5, 6)
    assert folded.original_span(1, 8) == (1, 7)


def test_invisible_characters_are_looked_at_in_two_ways() -> None:
    assert [view.text for view in fold_views("é\u200bb")] == ["éb", "é b"]
    assert len(fold_views("plain")) == 1 and len(fold_views("é")) == 1


def test_escapes_are_looked_at_in_two_ways() -> None:
    assert [view.text for view in fold_views("the\\n+49")] == ["the\\n+49", "the\n+49"]
    nested = json.dumps(json.dumps({"a": "x\n1"}))
    view = fold_views(nested, is_json=True)[1]
    assert view.text == '"{"a": "x\n1"}"'
    assert nested[slice(*view.original_span(view.text.index("1"), view.text.index("1") + 1))] == "1"


@settings(max_examples=60)
@given(st.text(max_size=30))
def test_places_lead_back(text: str) -> None:
    for view in fold_views(text):
        assert len(view.text) == len(view.starts) == len(view.ends)
        for index in range(len(view.text)):
            start, end = view.original_span(index, index + 1)
            assert 0 <= start < end <= len(text)
        assert list(view.starts) == sorted(view.starts)


@settings(max_examples=60)
@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "Zs"]), max_size=30))
def test_a_folded_text_is_in_normal_form(text: str) -> None:
    folded = FoldedText.of(text.replace("\\", "")).text
    assert unicodedata.normalize("NFKC", folded) == folded or not unicodedata.is_normalized("NFC", text)


def test_every_invisible_character_is_looked_at_in_two_ways() -> None:
    """The quick test for invisible characters knows all that folding removes."""
    for code in range(0x110000):
        letter = chr(code)
        if unicodedata.category(letter) == "Cf" or letter in "\ufe00\ufe0f\u034f\u3164":
            assert len(fold_views(f"a{letter}b")) == 2, hex(code)


def test_what_is_skipped_for_speed_folds_to_itself() -> None:
    for code in range(0x10000):
        letter = chr(code)
        if folding._PLAIN.fullmatch(letter):
            assert folding._fold_cluster(letter, "") == letter and not folding._continues(letter), hex(code)
