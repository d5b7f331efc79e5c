"""Streams, cut anywhere: the same text, the usage, and an end that is none is an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import ConnectionLostError, WireError
from cotune.sandwich.scripted_cloud import Reply, events
from cotune.sandwich.streamed_answer import StreamedAnswer

BODY = {"messages": [{"content": "one two"}], "model": "m", "stream": True, "stream_options": {"include_usage": True}}


@settings(max_examples=30)
@given(text=st.text(st.characters(blacklist_categories=["Cs"]), max_size=20), size=st.integers(1, 40))
def test_however_it_is_cut_the_text_is_the_same(text: str, size: int) -> None:
    data, answer = events(BODY, Reply(text=text)).encode(), StreamedAnswer()
    told = [piece for start in range(0, len(data), size) for piece in answer.feed(data[start : start + size])]
    whole = answer.finish()
    assert "".join(told) == whole.text == text and all(told)
    assert (whole.tokens_in, whole.tokens_out) == (2, len(text.split()))


def test_other_lines_do_not_count_and_no_usage_is_none() -> None:
    answer = StreamedAnswer()
    chunk = json.dumps({"choices": [{"delta": {"role": "assistant", "content": None}}]})
    assert list(answer.feed(f": hello\r\nevent: x\r\ndata: {chunk}\r\n\r\ndata:[DONE]\r\n".encode())) == []
    assert (answer.finish().text, answer.finish().tokens_out) == ("", None)


@pytest.mark.parametrize("rest", [b"", b'data: {"choices": [{"delta": {"content": "x"}}]}'])
def test_a_stream_that_breaks_off_is_no_answer(rest: bytes) -> None:
    answer = StreamedAnswer()
    list(answer.feed(rest))
    with pytest.raises(ConnectionLostError, match="ended before"):
        answer.finish()


@pytest.mark.parametrize("data", ["[]", "{", '{"choices": 5}', '{"choices": [{}]}', '{"error": {"message": "no"}}'])
def test_what_is_no_chunk_is_an_error_of_the_wire(data: str) -> None:
    with pytest.raises(WireError):
        list(StreamedAnswer().feed(f"data: {data}\n".encode()))
