"""The routes over a source that is only a list: answers, streams, errors, limits, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from asgi import ask
from starlette.applications import Starlette

from cotune.errors import ConnectionLostError, CotuneError, InputError, MismatchError, RefusedError, WireTimeoutError
from cotune.openai_api.requests import CompletionRequest
from cotune.openai_api.routes import ApiLimits, OpenAiApi
from cotune.openai_api.source import Alternative, Finish, ModelCard, Piece

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "Once"}
PATHS = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)]


class ListSource:
    """Says the same words each time, and may wait or fail between them."""

    def __init__(self, words: Sequence[str] = ("Good", " day"), wait_s: float = 0.0) -> None:
        self.words, self.wait_s = words, wait_s
        self.first_error: Exception | None = None
        self.last_error: Exception | None = None
        self.requests: list[CompletionRequest] = []
        self.num_open = self.num_given = 0

    def models(self) -> list[ModelCard]:
        return [ModelCard(id="m", created=5, owned_by="me"), ModelCard(id="a/b", created=5, owned_by="me")]

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        self.requests.append(request)
        self.num_open += 1
        try:
            if self.first_error is not None:
                raise self.first_error
            for number, word in enumerate(self.words):
                await asyncio.sleep(self.wait_s)
                other = (Alternative(text="x", logprob=-2.0),) * request.num_alternatives
                yield Piece(text=word, token_id=number, logprob=-0.5, alternatives=other, extra={"position": number})
                self.num_given += 1
            if self.last_error is not None:
                raise self.last_error
            yield Finish(reason="length", num_prompt_tokens=3, num_completion_tokens=2, extra={"metrics": {"M": 1}})
        finally:
            self.num_open -= 1


def app_of(source: ListSource, **limits: Any) -> Starlette:
    return Starlette(routes=OpenAiApi(source, ApiLimits(**limits)).routes)


async def test_models_are_listed_and_shown() -> None:
    app = app_of(ListSource())
    listed = (await ask(app, "GET", "/v1/models")).json
    assert listed["object"] == "list" and [model["id"] for model in listed["data"]] == ["m", "a/b"]
    card = {"id": "a/b", "object": "model", "created": 5, "owned_by": "me"}
    assert (await ask(app, "GET", "/v1/models/a/b")).json == card
    missing = await ask(app, "GET", "/v1/models/other")
    assert missing.status == 404 and missing.json["error"]["code"] == "model_not_found"


async def test_a_whole_chat_answer() -> None:
    reply = await ask(app_of(ListSource()), "POST", "/v1/chat/completions", CHAT)
    answer = reply.json
    assert reply.status == 200 and answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Good day", "refusal": None}
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert answer["cotune"] == {"metrics": {"M": 1}}


async def test_a_streamed_chat_answer() -> None:
    body = {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    reply = await ask(app_of(ListSource()), "POST", "/v1/chat/completions", body)
    assert (
        reply.headers["content-type"].startswith("text/event-stream") and reply.headers["cache-control"] == "no-store"
    )
    opening, first, second, closing, used, done = reply.events
    assert opening["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"] for chunk in (first, second)] == [{"content": "Good"}, {"content": " day"}]
    assert [chunk["cotune"] for chunk in (first, second)] == [{"position": 0}, {"position": 1}]
    assert closing["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    assert closing["cotune"] == {"metrics": {"M": 1}} and closing["usage"] is None
    assert used["choices"] == [] and used["usage"]["total_tokens"] == 5
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in reply.events[:-1]}) == 1
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in reply.events[:-1])


async def test_a_text_whole_and_streamed() -> None:
    app = app_of(ListSource())
    whole = (await ask(app, "POST", "/v1/completions", TEXT)).json
    assert whole["object"] == "text_completion" and whole["choices"][0]["text"] == "Good day"
    *chunks, done = (await ask(app, "POST", "/v1/completions", {**TEXT, "stream": True})).events
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Good", " day", ""] and done == "[DONE]"
    assert "usage" not in chunks[-1]


async def test_log_probabilities_in_both_forms() -> None:
    app = app_of(ListSource())
    chat = (await ask(app, "POST", "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 1})).json
    first, _ = chat["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "Good",
        "logprob": -0.5,
        "bytes": [71, 111, 111, 100],
        "top_logprobs": [{"token": "x", "logprob": -2.0, "bytes": [120]}],
    }
    text = (await ask(app, "POST", "/v1/completions", {**TEXT, "logprobs": 1})).json
    assert text["choices"][0]["logprobs"] == {
        "tokens": ["Good", " day"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"x": -2.0}, {"x": -2.0}],
        "text_offset": [0, 4],
    }


async def test_a_stop_string_ends_the_text() -> None:
    for path, body in PATHS:
        reply = await ask(app_of(ListSource()), "POST", path, {**body, "stop": " da"})
        assert reply.json["choices"][0]["finish_reason"] == "stop" and "day" not in json.dumps(reply.json)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InputError("no such mode"), 400, "invalid_value"),
        (MismatchError("another model"), 502, "cloud_error"),
        (ConnectionLostError("gone"), 502, "cloud_error"),
        (WireTimeoutError("silent"), 504, "cloud_timeout"),
        (RefusedError(4, "full", retry_after_s=2.5), 503, "cloud_busy"),
        (RefusedError(5, "wrong token"), 502, "cloud_error"),
        (CotuneError("odd"), 500, "internal_error"),
        (RuntimeError("a secret detail"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_text_has_its_own_status(
    error: Exception, status: int, code: str, stream: bool
) -> None:
    source = ListSource()
    source.first_error = error
    reply = await ask(app_of(source), "POST", "/v1/chat/completions", {**CHAT, "stream": stream})
    assert reply.status == status and reply.json["error"]["code"] == code
    assert reply.json["error"].keys() == {"message", "type", "param", "code"}
    assert reply.headers.get("retry-after") == ("3" if status == 503 else None)
    assert "secret" not in reply.body.decode() and source.num_open == 0


@pytest.mark.parametrize("error", [ConnectionLostError("gone"), RuntimeError("a secret detail")])
async def test_an_error_in_the_middle_ends_the_stream_with_an_error_object(error: Exception) -> None:
    source = ListSource()
    source.last_error = error
    reply = await ask(app_of(source), "POST", "/v1/chat/completions", {**CHAT, "stream": True})
    *_, word, failure, done = reply.events
    assert word["choices"][0]["delta"]["content"] == " day" and done == "[DONE]"
    assert failure["error"]["type"] == "server_error" and "secret" not in reply.body.decode()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"raw": b"{", "headers": {}}, 400),
        ({"raw": b"\xff", "headers": {}}, 400),
        ({"raw": b"[" * 100_000, "headers": {}}, 400),
        ({"raw": b'{"model": NaN}', "headers": {}}, 400),
        ({"raw": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"raw": b"{}", "headers": {"content-type": "application/x-www-form-urlencoded"}}, 415),
        ({"raw": b"{}", "headers": {"content-length": "1001"}}, 413),
        ({"raw": b"{}", "headers": {"content-length": "9" * 5000}}, 413),
        ({"raw": b" " * 1001, "headers": {}}, 413),
    ],
)
async def test_bodies_that_are_not_read(sent: dict[str, Any], status: int) -> None:
    source = ListSource()
    limit = 1_000_000 if sent["raw"][:2] == b"[[" else 1000
    reply = await ask(app_of(source, max_body_bytes=limit), "POST", "/v1/chat/completions", **sent)
    assert reply.status == status and reply.json["error"]["message"] and not source.requests


async def test_one_request_too_many_is_told_to_come_back() -> None:
    source = ListSource(wait_s=0.05)
    app = app_of(source, max_concurrent=2, retry_after_s=7)
    body = {**CHAT, "stream": True}
    replies = await asyncio.gather(*(ask(app, "POST", "/v1/chat/completions", body) for _ in range(3)))
    assert sorted(reply.status for reply in replies) == [200, 200, 429]
    refused = next(reply for reply in replies if reply.status == 429)
    assert refused.headers["retry-after"] == "7" and refused.json["error"]["type"] == "rate_limit_error"
    # The places are free again.
    assert (await ask(app, "POST", "/v1/chat/completions", body)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_s", [0.0, 0.06])
async def test_who_hangs_up_ends_the_work(stream: bool, after_s: float) -> None:
    source = ListSource(["x"] * 1000, wait_s=0.02)
    app = app_of(source, max_concurrent=1)
    await ask(app, "POST", "/v1/chat/completions", {**CHAT, "stream": stream}, hang_up_after_s=after_s)
    assert source.num_open == 0 and source.num_given < 50
    source.words, source.wait_s = ("ok",), 0.0
    assert (await ask(app, "POST", "/v1/chat/completions", CHAT)).status == 200


async def test_a_client_that_takes_nothing_is_given_up() -> None:
    source = ListSource(["x"] * 1000)
    api = OpenAiApi(source, ApiLimits(send_timeout_s=0.05))
    (route,) = [route for route in api.routes if route.path == "/v1/chat/completions"]
    num_sent = 0

    async def stuck(message: Any) -> None:
        nonlocal num_sent
        num_sent += 1
        if num_sent > 5:
            await asyncio.sleep(3600)

    body = [json.dumps({**CHAT, "stream": True}).encode()]

    async def receive() -> dict[str, Any]:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        await asyncio.sleep(3600)
        return {}

    scope = {"type": "http", "method": "POST", "path": route.path, "headers": [(b"content-type", b"application/json")]}
    async with asyncio.timeout(10):
        await route.app(scope, receive, stuck)
    assert source.num_open == 0 and api.num_running == 0 and num_sent == 6


@pytest.mark.parametrize("name", ["max_concurrent", "max_body_bytes", "body_timeout_s", "send_timeout_s"])
def test_impossible_limits_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0, expected a number above 0"):
        ApiLimits(**{name: 0})
