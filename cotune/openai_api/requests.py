"""From the JSON of `/v1/chat/completions` and `/v1/completions` to one request, checked strictly.

Fields that would change the text and are not supported are refused; those that only matter to the service of
OpenAI (`user`, `metadata`, ...) are accepted and change nothing; all others are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cotune.openai_api.api_error import ApiError
from cotune.openai_api.fields import Fields, shown

EXTENSION = "cotune"
"""The field that holds what only cotune knows, in requests, chunks and answers."""

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_TOKENS = 2**31 - 1
MAX_TEMPERATURE = 2.0

# Of the whole body, its message count is bounded on its own: each message costs more memory than its bytes.
MAX_MESSAGES = 1_000
MAX_PARTS = 1_000

_HARMLESS = (
    "metadata",
    "parallel_tool_calls",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, kw_only=True)
class CompletionRequest:
    """A text that a client wants. What is None was left to the source.

    Attributes:
        form: `chat` has messages, `text` has a prompt.
        model: name of the model.
        messages: the conversation, for `chat`.
        prompt: a text, or token ids, for `text`.
        max_tokens: stop after so many.
        temperature, top_p, seed: sampling; a seed is 0 .. 2^64 - 1.
        stop: strings that end the text.
        stream: send pieces as they come.
        include_usage: end a stream with a chunk that holds the usage.
        logprobs: give each token's log probability where it is known.
        num_alternatives: how many likely tokens to list at each place.
        extension: the fields of the `cotune` object, for the source to check.
    """

    form: Literal["chat", "text"]
    model: str
    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] = ""
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    num_alternatives: int = 0
    extension: Mapping[str, object] = field(default_factory=dict)


def parse_chat(body: object) -> CompletionRequest:
    """The request in the body of `/v1/chat/completions`.

    Raises:
        ApiError: a field is missing, of another type, out of range, unknown, or asks for what is not there.
    """
    fields = Fields(body)
    messages = _messages(fields)
    limits = [fields.integer(name, 1, MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    logprobs = fields.flag("logprobs")
    alternatives = fields.integer("top_logprobs", 0, 20)
    if alternatives and not logprobs:
        raise ApiError("top_logprobs is given without logprobs, expected logprobs true with it", param="top_logprobs")
    for name in ("tools", "functions"):
        fields.only(name, [], because="calling tools is not supported")
    fields.only("tool_choice", "none", "auto", because="calling tools is not supported")
    fields.only("function_call", "none", "auto", because="calling functions is not supported")
    fields.only("response_format", {"type": "text"}, because="only plain text is supported")
    fields.only("modalities", ["text"], because="only text is supported")
    fields.only("audio", because="only text is supported")
    fields.only("web_search_options", because="searching the web is not supported")
    return CompletionRequest(
        form="chat",
        messages=messages,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        logprobs=logprobs,
        num_alternatives=alternatives or 0,
        **_shared(fields),
    )


def parse_text(body: object) -> CompletionRequest:
    """The request in the body of `/v1/completions`.

    Raises:
        ApiError: as `parse_chat`.
    """
    fields = Fields(body)
    prompt = _prompt(fields)
    max_tokens = fields.integer("max_tokens", 1, MAX_TOKENS)
    alternatives = fields.integer("logprobs", 0, 5)
    fields.only("best_of", 1, because="one text is made for each request")
    fields.only("echo", False, because="the prompt is not repeated")
    fields.only("suffix", "", because="a text is only continued, not filled in")
    return CompletionRequest(
        form="text",
        prompt=prompt,
        max_tokens=max_tokens,
        logprobs=alternatives is not None,
        num_alternatives=alternatives or 0,
        **_shared(fields),
    )


def _shared(fields: Fields) -> dict[str, Any]:
    """What both forms have; the last to read of the fields."""
    model = fields.text("model")
    if not model:
        raise fields.missing("model", "the name of a model that /v1/models lists")
    stream = fields.flag("stream")
    options = fields.take("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise ApiError("stream_options is given without stream, expected stream true", param="stream_options")
        inner = Fields(options, "stream_options")
        include_usage = inner.flag("include_usage")
        inner.finish(("include_obfuscation",))
    top_p = fields.number("top_p", 0, 1)
    if top_p == 0:
        raise fields.wrong("top_p", "a number above 0 and at most 1; for the likeliest token set temperature to 0")
    seed = fields.integer("seed", -(2**63), 2**64 - 1)
    fields.only("n", 1, because="one text is made for each request; send several requests")
    fields.only("logit_bias", {}, because="changing single logits is not supported")
    for name in ("frequency_penalty", "presence_penalty"):
        fields.only(name, 0, 0.0, because="penalties are not supported")
    extension = fields.take(EXTENSION)
    if extension is not None and not isinstance(extension, dict):
        raise fields.wrong(EXTENSION, "a JSON object")
    shared = {
        "model": model,
        "temperature": fields.number("temperature", 0, MAX_TEMPERATURE),
        "top_p": top_p,
        "seed": None if seed is None else seed % 2**64,
        "stop": _stops(fields),
        "stream": stream,
        "include_usage": include_usage,
        "extension": extension or {},
    }
    fields.finish(_HARMLESS)
    return shared


def _messages(fields: Fields) -> tuple[Message, ...]:
    value = fields.take("messages")
    if value is None:
        raise fields.missing("messages", "a list of messages")
    if not isinstance(value, list) or not value:
        raise fields.wrong("messages", "a list of at least one message")
    if len(value) > MAX_MESSAGES:
        raise ApiError(
            f"messages has {len(value)} entries, expected at most {MAX_MESSAGES}; leave out the oldest",
            param="messages",
        )
    return tuple(_message(item, f"messages[{i}]") for i, item in enumerate(value))


def _message(value: object, name: str) -> Message:
    fields = Fields(value, name)
    role = fields.take("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise fields.wrong("role", "system, user or assistant; calling tools is not supported")
    content = _content(fields)
    for field_name in ("tool_calls", "function_call", "audio", "refusal"):
        fields.only(field_name, [], because="only text is supported")
    fields.finish(("name", "annotations"))
    return Message(role=_ROLES[role], content=content)  # type: ignore[arg-type]


def _content(fields: Fields) -> str:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong("content", "a string or a list of text parts")
    if len(value) > MAX_PARTS:
        raise ApiError(
            f"{fields.path('content')} has {len(value)} parts, expected at most {MAX_PARTS}",
            param=fields.path("content"),
        )
    texts = []
    for i, item in enumerate(value):
        part = Fields(item, f"{fields.path('content')}[{i}]")
        kind, text = part.take("type"), part.take("text")
        if kind != "text" or not isinstance(text, str):
            raise ApiError(
                f"{fields.path('content')}[{i}] is of type {shown(kind)}, expected a text part: only text is supported",
                param=f"{fields.path('content')}[{i}]",
                code="unsupported_parameter",
            )
        part.finish()
        texts.append(text)
    return "".join(texts)


def _prompt(fields: Fields) -> str | tuple[int, ...]:
    value = fields.take("prompt")
    if value is None:
        raise fields.missing("prompt", "a string or a list of token ids")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(type(item) is int and 0 <= item < 2**31 for item in value):
        return tuple(value)
    raise fields.wrong("prompt", "one prompt that is not empty: a string, a list with one string, or token ids")


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [] if value is None else value if isinstance(value, list) else [value]
    good = all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops)
    if len(stops) > MAX_STOPS or not good:
        raise fields.wrong(
            "stop", f"a string or up to {MAX_STOPS} strings, each of 1 to {MAX_STOP_CHARACTERS} characters"
        )
    return tuple(stops)
