"""Streams: the same text however they are cut, and little that waits."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.sandwich.placeholders import PlaceholderMap
from cotune.sandwich.restore_stream import StreamRestorer


def a_map(style: Any) -> PlaceholderMap:
    placeholders = PlaceholderMap(random.Random(0), style=style)
    placeholders.placeholder_for("EMAIL", "a", 'ann"@x.org')
    placeholders.placeholder_for("EMAIL", "a", "ANN@x.org")
    placeholders.placeholder_for("PERSON", "b", "Ann Lee")
    placeholders.placeholder_for("PHONE", "c", "(415) 555-2671")
    placeholders.placeholder_for("PHONE", "d", "4155550000", is_number=True, is_glued=True)
    return placeholders


TYPED, SURROGATE = a_map("typed"), a_map("surrogate")
SENT = {id(each): [entry.placeholder for entry in each.entries] for each in (TYPED, SURROGATE)}


def pieces(placeholders: PlaceholderMap) -> st.SearchStrategy[str]:
    known = SENT[id(placeholders)]
    cut = st.builds(lambda text, end: text[:end], st.sampled_from(known), st.integers(1, 20))
    recased = st.sampled_from(known).map(str.lower)
    escaped = st.sampled_from(known).map(lambda text: text.replace("<", "\\<").replace(">", "\\>").replace("_", "\\_"))
    entity = st.sampled_from(known).map(lambda text: text.replace("<", "&lt;").replace(">", "&gt;"))
    signs = st.sampled_from(
        ["<", ">", "\\", "_2", "12", "e", "E", "phone ", " ", "%3C", '"', "&", "(", ")", "-", "x", "<EMAIL_1234>"]
    )
    return st.one_of(st.sampled_from(known), cut, recased, escaped, entity, signs)


def fed(placeholders: PlaceholderMap, text: str, cuts: list[int], is_json: bool) -> str:
    stream = StreamRestorer(placeholders, is_json=is_json)
    places = sorted({min(cut, len(text)) for cut in cuts})
    chunks = [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]
    return "".join([*(stream.feed(chunk) for chunk in chunks), stream.finish()])


@pytest.mark.parametrize("placeholders", [TYPED, SURROGATE], ids=["typed", "surrogate"])
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_way_to_cut_gives_the_same_text(placeholders: PlaceholderMap, data: st.DataObject) -> None:
    text = "".join(data.draw(st.lists(pieces(placeholders), max_size=8)))
    cuts = data.draw(st.lists(st.integers(0, 200), max_size=8))
    is_json = data.draw(st.booleans())
    whole = placeholders.restore(text, is_json=is_json)
    assert fed(placeholders, text, cuts, is_json) == whole
    assert fed(placeholders, text, list(range(len(text))), is_json) == whole


def test_plain_text_does_not_wait() -> None:
    stream = StreamRestorer(TYPED)
    for word in ("Hello ", "there, ", "1 < 2 ", "and <b>", "bold</b> "):
        assert stream.feed(word) == word and stream.num_waiting == 0


def test_a_whole_placeholder_is_given_out_at_once() -> None:
    stream = StreamRestorer(TYPED)
    assert stream.feed(f"To {SENT[id(TYPED)][2]}") == "To Ann Lee"


def test_what_waits_is_bounded() -> None:
    stream = StreamRestorer(TYPED)
    longest = 0
    for chunk in ["<", "EMAIL_", *["12 " * 50, "< " * 100, "EMAIL " * 100, "\\" * 300, "&lt;" * 100]]:
        stream.feed(chunk)
        longest = max(longest, stream.num_waiting)
    assert 0 < longest <= 2 * TYPED.longest


def test_a_stream_that_ends_in_the_middle_gives_out_the_rest() -> None:
    stream = StreamRestorer(TYPED)
    assert stream.feed("see <EMA") == "see " and stream.num_waiting == 4
    assert stream.finish() == "<EMA" and stream.num_waiting == 0
    assert stream.finish() == ""
