"""What is quoted, in several kinds of marks; what only looks quoted."""

from __future__ import annotations

import pytest

from cotune.sandwich.detectors.quoted import QuotedDetector


@pytest.mark.parametrize(
    ("text", "private"),
    [
        ('call it "my new account".', ["my new account"]),
        ("\u201cone\u201d \u201etwo\u201c \u00abthree\u00bb \u2018four\u2019", ["one", "two", "three", "four"]),
        ("it's Ann's, don't 'hush 7', isn't", ["hush 7"]),
        ('" spaced " and ""', ["spaced"]),
        ("{\"name\": \"Ann\", 'id' : 'x'}", ["Ann", "x"]),
        ('the word "foo": two', ["foo"]),
        ('an "open quote\nends" not', []),
        ('"..." and "' + "x" * 200 + '"', []),
    ],
)
def test_what_is_quoted_is_found(text: str, private: list[str]) -> None:
    assert [text[each.start : each.end] for each in QuotedDetector().find(text)] == private
