"""Requests and answers of the chat API."""

from __future__ import annotations

import json

import pytest

from cotune.errors import InputError, WireError
from cotune.sandwich.chat import ChatAnswer, ChatRequest, ToolCall
from cotune.sandwich.redact import RedactedJson

MESSAGES = RedactedJson([{"role": "user", "content": "Grüße"}], {})
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def completion(**message: object) -> dict[str, object]:
    return {"choices": [{"message": message}], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}


def test_a_request_is_its_payload_and_its_digest() -> None:
    request = ChatRequest(model="m", messages=MESSAGES, max_tokens=5, seed=1)
    assert (
        json.loads(request.payload)
        == request.body()
        == {
            "model": "m",
            "messages": MESSAGES.value,
            "max_tokens": 5,
            "temperature": 0.0,
            "seed": 1,
        }
    )
    assert request.digest == ChatRequest(model="m", messages=MESSAGES, max_tokens=5, seed=1).digest
    assert request.digest != ChatRequest(model="m", messages=MESSAGES, max_tokens=6, seed=1).digest


def test_what_was_not_redacted_is_refused() -> None:
    with pytest.raises(InputError, match="redact_messages"):
        ChatRequest(model="m", messages=[{"role": "user", "content": "x"}], max_tokens=5)  # type: ignore[arg-type]


def test_an_answer_is_read_and_survives_a_cache() -> None:
    answer = ChatAnswer.from_completion(completion(content=None, tool_calls=[CALL]))
    assert answer == ChatAnswer(
        text="", tool_calls=(ToolCall(id="c1", name="f", arguments="{}"),), tokens_in=3, tokens_out=4
    )
    assert ChatAnswer.from_bytes(answer.to_bytes()) == answer
    assert ChatAnswer.from_completion({"choices": [{"message": {"content": "hi"}}]}).tokens_in is None


@pytest.mark.parametrize(
    "given",
    [
        {},
        [],
        {"choices": []},
        completion(content=5),
        {**completion(content=""), "usage": {"prompt_tokens": -1}},
        completion(content="", tool_calls=[{"id": 5, "function": {"name": "f", "arguments": "{}"}}]),
    ],
)
def test_what_is_no_completion_is_an_error_of_the_wire(given: object) -> None:
    with pytest.raises(WireError, match="no chat completion"):
        ChatAnswer.from_completion(given)
