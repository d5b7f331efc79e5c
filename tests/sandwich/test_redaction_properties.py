"""For any text: it comes back, and nothing private is in what is sent, however one looks at it."""

from __future__ import annotations

import json
import random
import re
import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from redactors import redactor_here

from cotune.sandwich.redact import Redactor

GOLD = [
    "ann.lee@example.org",
    "+49 30 901820-99",
    "GB82 WEST 1234 5698 7654 32",
    "4111 1111 1111 1111",
    "192.0.2.77",
    "https://acme.example/x?id=7",
    "Ann Lee",
    "Blue Heron",
    "Jürgen Groß",
    "王小明",
]
SEPARATORS = [" ", "\n", ", ", " (", ") ", '"', " is: ", "\t- "]
WORDS = [
    "the",
    "plan",
    "é",
    "<EMAIL_1234>",
    "EMAIL_12",
    "5",
    "\\n",
    "\\u0041",
    "{",
    "}",
    "<b>",
    "&lt;",
    "\u200b",
    "\ud800",
    "ﬁ",
]


def disguised(value: str, way: int) -> str:
    ways = [value, value.upper(), value.lower(), unicodedata.normalize("NFD", value), value[:2] + "\u200b" + value[2:]]
    return ways[way]


gold = st.builds(disguised, st.sampled_from(GOLD), st.integers(0, 4))
texts = st.lists(
    st.tuples(st.one_of(gold, st.sampled_from(WORDS), st.text(max_size=6)), st.sampled_from(SEPARATORS)), max_size=8
)
STYLES = pytest.mark.parametrize("style", ["typed", "surrogate"])
REDACTORS: dict[str, Redactor] = {style: redactor_here(style=style) for style in ("typed", "surrogate")}


def written(parts: list[tuple[str, str]]) -> str:
    return "".join(word + separator for word, separator in parts)


def plain(text: str) -> str:
    """As somebody looks who knows what to look for."""
    kept = "".join(letter for letter in unicodedata.normalize("NFKC", text) if unicodedata.category(letter) != "Cf")
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", kept).casefold())


@STYLES
@settings(max_examples=30, deadline=None)
@given(parts=texts, seed=st.integers(0, 5))
def test_what_is_redacted_comes_back(style: str, parts: list[tuple[str, str]], seed: int) -> None:
    text = written(parts)
    request = REDACTORS[style].request(random.Random(seed))
    sent = request.redact(text).text
    assert request.restore(sent) == text
    assert request.restore(request.redact(text).text) == text


@STYLES
@settings(max_examples=30, deadline=None)
@given(parts=texts, seed=st.integers(0, 5))
def test_nothing_private_is_in_what_is_sent(style: str, parts: list[tuple[str, str]], seed: int) -> None:
    sent = REDACTORS[style].request(random.Random(seed)).redact(written(parts)).payload
    seen = [sent.decode("utf-8", "surrogatepass"), sent.decode("utf-8", "surrogatepass").lower()]
    for value in GOLD:
        assert not any(plain(value) in plain(each) for each in seen), value


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts.map(written)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(gold, st.sampled_from(["to", "phone", "card"])), inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2).map(json.dumps),
        st.lists(st.one_of(gold, st.integers(10**9, 10**15)), max_size=3).map(
            lambda each: json.dumps(each, ensure_ascii=False, indent=1)
        ),
    ),
    max_leaves=6,
)


@STYLES
@settings(max_examples=30, deadline=None)
@given(value=json_values)
def test_json_comes_back_and_holds_nothing_private(style: str, value: Any) -> None:
    request = REDACTORS[style].request(random.Random(0))
    sent = request.redact_json(value)
    assert request.restore_json(sent.value) == value
    assert request.restore_json(json.loads(sent.payload.decode("utf-8", "surrogatepass"))) == value
    seen = plain(json.dumps(sent.value, ensure_ascii=False)) + plain(str(sent.value))
    for private in GOLD:
        assert plain(private) not in seen


@settings(max_examples=20, deadline=None)
@given(parts=texts, cuts=st.lists(st.integers(0, 300), max_size=6))
def test_an_echo_in_a_stream_comes_back(parts: list[tuple[str, str]], cuts: list[int]) -> None:
    text = written(parts)
    for redactor in REDACTORS.values():
        request = redactor.request(random.Random(1))
        sent = request.redact(text).text
        stream = request.restore_stream()
        places = sorted({min(cut, len(sent)) for cut in cuts})
        chunks = [sent[start:end] for start, end in zip([0, *places], [*places, len(sent)], strict=True)]
        assert "".join([*map(stream.feed, chunks), stream.finish()]) == text
