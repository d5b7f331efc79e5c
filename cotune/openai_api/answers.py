"""The JSON objects of answers: whole ones, the chunks of a stream, and the list of models."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cotune.openai_api.requests import EXTENSION, CompletionRequest
from cotune.openai_api.source import Finish, ModelCard, Piece

Json = dict[str, Any]


class Answer:
    """The answer to one request, whole or in chunks.

    Args:
        request: what was asked for.
    """

    def __init__(self, request: CompletionRequest) -> None:
        self._request = request
        self._is_chat = request.form == "chat"
        self._num_characters = 0
        whole, chunk = ("chat.completion", "chat.completion.chunk") if self._is_chat else ("text_completion",) * 2
        self._head: Json = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": chunk if request.stream else whole,
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, pieces: Sequence[Piece], finish: Finish) -> Json:
        """The answer where nothing is streamed."""
        text = "".join(piece.text for piece in pieces)
        message = {"role": "assistant", "content": text, "refusal": None}
        content = {"message": message} if self._is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": self._logprobs(pieces), "finish_reason": finish.reason}
        return {**self._head, "choices": [choice], "usage": usage(finish), **_extension(finish.extra)}

    def opening(self) -> Json | None:
        """The chunk before the first piece; a plain text has none."""
        return self._chunk({"role": "assistant", "content": ""}) if self._is_chat else None

    def piece(self, piece: Piece) -> Json:
        """The chunk of one piece."""
        content = {"content": piece.text} if self._is_chat else {"text": piece.text}
        return {**self._chunk(content, logprobs=self._logprobs([piece])), **_extension(piece.extra)}

    def closing(self, finish: Finish) -> list[Json]:
        """The chunks after the last piece."""
        content: Json = {} if self._is_chat else {"text": ""}
        chunks = [{**self._chunk(content, finish_reason=finish.reason), **_extension(finish.extra)}]
        if self._request.include_usage:
            chunks.append({**self._head, "choices": [], "usage": usage(finish)})
        return chunks

    def _chunk(self, content: Json, *, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
        inner = {"delta": content} if self._is_chat else content
        choice = {"index": 0, **inner, "logprobs": logprobs, "finish_reason": finish_reason}
        nothing_yet = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "choices": [choice], **nothing_yet}

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        """In the form of the request; None where they are not wanted, or not known for every token."""
        offset = self._num_characters
        self._num_characters += sum(len(piece.text) for piece in pieces)
        tokens = [piece for piece in pieces if piece.token_id is not None]
        if not self._request.logprobs or not tokens or any(piece.logprob is None for piece in tokens):
            return None
        if self._is_chat:
            return {"content": [_chat_logprob(piece) for piece in tokens], "refusal": None}
        offsets = []
        for piece in tokens:
            offsets.append(offset)
            offset += len(piece.text)
        return {
            "tokens": [piece.text for piece in tokens],
            "token_logprobs": [piece.logprob for piece in tokens],
            "top_logprobs": [{other.text: other.logprob for other in piece.alternatives} for piece in tokens],
            "text_offset": offsets,
        }


def usage(finish: Finish) -> Json:
    """Tokens read and written."""
    return {
        "prompt_tokens": finish.num_prompt_tokens,
        "completion_tokens": finish.num_completion_tokens,
        "total_tokens": finish.num_prompt_tokens + finish.num_completion_tokens,
    }


def model_object(card: ModelCard) -> Json:
    """One model."""
    return {"id": card.id, "object": "model", "created": card.created, "owned_by": card.owned_by}


def model_list(cards: Sequence[ModelCard]) -> Json:
    """All models."""
    return {"object": "list", "data": [model_object(card) for card in cards]}


def _chat_logprob(piece: Piece) -> Json:
    return {
        **_token(piece.text, piece.logprob),
        "top_logprobs": [_token(other.text, other.logprob) for other in piece.alternatives],
    }


def _token(text: str, logprob: float | None) -> Json:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _extension(extra: Mapping[str, object] | None) -> Json:
    return {} if extra is None else {EXTENSION: dict(extra)}
