"""What goes to a chat API and what comes back. A request holds nothing but what went through the redactor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cotune.errors import InputError, WireError
from cotune.sandwich.redact import RedactedJson

MAX_TOOL_CALLS = 64


@dataclass(frozen=True, kw_only=True)
class ChatRequest:
    """One request to `/v1/chat/completions`.

    Attributes:
        model: by the cloud's name for it.
        messages: what a `RedactedRequest` gave; there is no other way in.
        max_tokens: the longest answer.
        temperature, seed: sampling; a seed is sent where it is given.
        tools: schemas in the form of the API.
        is_streamed: the answer shall come in pieces, with a count of its tokens at the end.
    """

    model: str
    messages: RedactedJson
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    is_streamed: bool = False

    def __post_init__(self) -> None:
        # For callers that a type checker never saw: this is the last door before the wire.
        if not isinstance(self.messages, RedactedJson):
            raise InputError(
                f"messages is {type(self.messages).__name__}, expected what redact_messages gives; nothing is sent"
            )
        if self.max_tokens < 1:
            raise InputError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if not 0 <= self.temperature <= 2:
            raise InputError(f"temperature is {self.temperature}, expected 0 to 2")

    def body(self) -> dict[str, Any]:
        """The fields of the request, and no others."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": self.messages.value,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.seed is not None:
            fields["seed"] = self.seed
        if self.tools:
            fields["tools"] = [dict(tool) for tool in self.tools]
        if self.is_streamed:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        return fields

    @property
    def payload(self) -> bytes:
        """What travels: compact JSON in UTF-8."""
        return json.dumps(self.body(), ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    @property
    def digest(self) -> str:
        """SHA-256 of the payload, hex: the name of its answer in a cache, the same whether it is streamed or not."""
        return hashlib.sha256(replace(self, is_streamed=False).payload).hexdigest()


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """A call that the cloud wants made; `arguments` is JSON as text, with placeholders."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class ChatAnswer:
    """What came back.

    Attributes:
        text: with placeholders; empty where the cloud only calls tools.
        tool_calls: what it wants called.
        tokens_in, tokens_out: as the cloud counted them; None where it did not.
    """

    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    tokens_in: int | None = None
    tokens_out: int | None = None

    def to_bytes(self) -> bytes:
        """For a cache."""
        calls = [[call.id, call.name, call.arguments] for call in self.tool_calls]
        return json.dumps([self.text, calls, self.tokens_in, self.tokens_out]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ChatAnswer:
        """What `to_bytes` gave."""
        text, calls, tokens_in, tokens_out = json.loads(data)
        return cls(
            text=text,
            tool_calls=tuple(ToolCall(id=one, name=name, arguments=arguments) for one, name, arguments in calls),
            tokens_in=tokens_in,
            tokens_out=tokens_out,
        )

    @classmethod
    def from_completion(cls, completion: Any) -> ChatAnswer:
        """Of the JSON of a chat completion.

        Raises:
            WireError: it is none.
        """
        try:
            message = completion["choices"][0]["message"]
            calls = tuple(_tool_call(each) for each in (message.get("tool_calls") or ())[:MAX_TOOL_CALLS])
            text, usage = message.get("content"), completion.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if not isinstance(text, str | None) or not all(
                count is None or (type(count) is int and count >= 0) for count in counts
            ):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise WireError(
                "the cloud's answer is no chat completion; see what the server at that URL speaks"
            ) from None
        return cls(text=text or "", tool_calls=calls, tokens_in=counts[0], tokens_out=counts[1])


class CloudModel(Protocol):
    """A cloud that answers chat requests; many threads may ask at once."""

    def send(self, request: ChatRequest, *, timeout_s: float) -> ChatAnswer:
        """Ask once.

        Raises:
            WireTimeoutError: nothing came in time; it may have been paid for.
            ConnectionLostError: the connection broke; it may have been paid for.
            RefusedError: the cloud said no; `code` is the HTTP status.
            WireError: what came is no answer.
        """
        ...


class StreamingCloud(CloudModel, Protocol):
    """A cloud whose answers can also come piece by piece."""

    def stream(self, request: ChatRequest, *, timeout_s: float, on_text: Callable[[str], None]) -> ChatAnswer:
        """Ask once, and tell each piece of the text as it comes.

        Args:
            request: with `is_streamed` and without tools.
            timeout_s: for all of the answer.
            on_text: told the pieces; all of them make the answer's text.

        Raises:
            As `send`; also after pieces were told.
        """
        ...


def _tool_call(fields: Any) -> ToolCall:
    function = fields["function"]
    call = ToolCall(id=fields["id"], name=function["name"], arguments=function["arguments"])
    if not all(isinstance(part, str) for part in (call.id, call.name, call.arguments)):
        raise TypeError
    return call
