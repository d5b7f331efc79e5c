"""JSON as text: what is a document, and where findings in it may be cut."""

from __future__ import annotations

import json

import pytest

from cotune.sandwich.finding import Finding
from cotune.sandwich.json_text import clip_to_tokens, escape_json, is_json_document, unescape_json


@pytest.mark.parametrize(
    ("text", "is_document"),
    [
        ("{}", True),
        (" [1]\n", True),
        ("12", False),
        ('"a"', False),
        ("{a}", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_what_is_a_document(text: str, is_document: bool) -> None:
    assert is_json_document(text) is is_document


def clipped(text: str, wanted: str) -> list[tuple[str, bool]]:
    start = text.index(wanted)
    pieces = clip_to_tokens(text, [Finding(start, start + len(wanted), "KEY", "k")])
    return [(text[each.start : each.end], is_number) for each, is_number in pieces]


def test_quotes_and_brackets_are_never_cut_out() -> None:
    text = '{"a": "one \\" two", "b": [123, -4.5e6], "c": null}'
    assert clipped(text, "one") == [("one", False)]
    assert clipped(text, 'two", "b') == [("two", False), ("b", False)]
    assert clipped(text, "23, -4") == [("123", True), ("-4.5e6", True)]
    assert clipped(text, "null") == []


def test_two_findings_in_one_string() -> None:
    text = '{"a": "one two"}'
    pieces = clip_to_tokens(text, [Finding(7, 10, "KEY", "k"), Finding(11, 14, "IP", "i")])
    assert [(each.start, each.end, each.kind, each.identity) for each, _ in pieces] == [
        (7, 10, "KEY", "k"),
        (11, 14, "IP", "i"),
    ]


def test_two_findings_in_one_number_are_one() -> None:
    pieces = clip_to_tokens("[123456]", [Finding(1, 3, "KEY", "k"), Finding(4, 6, "IP", "i")])
    assert [(each.start, each.end) for each, _ in pieces] == [(1, 7)]


def test_escapes() -> None:
    assert json.loads(f'"{escape_json(chr(10) + chr(34) + "é")}"') == '\n"é'
    assert unescape_json('\\n\\"\\u00e9') == '\n"é'
    assert unescape_json("half\\") == "half\\"
