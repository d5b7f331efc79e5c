"""The hosted backbone alone as a source of text for the OpenAI interface."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.completion import complete
from cotune.cloud.service import CloudService
from cotune.errors import RefusedError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.text import Detokenizer, TextCodec
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.plain_chat import plain_chat_format
from cotune.openai_api.requests import CompletionRequest
from cotune.openai_api.source import Alternative, ChatFormat, Finish, ModelCard, Piece
from cotune.wire.codes import ErrorCode

DEFAULT_MAX_TOKENS = 256


class PlainSource:
    """A service's backbone. Fits `TextSource`.

    Args:
        service: has the engine; full or draining, it refuses.
        chat_format: makes a prompt of a conversation, special tokens included where the model has any.
    """

    def __init__(self, service: CloudService, chat_format: ChatFormat = plain_chat_format) -> None:
        self._service = service
        self._chat_format = chat_format
        self._card = ModelCard(id=service.model.description.model, created=int(time.time()), owned_by="cotune cloud")

    @cached_property
    def _text(self) -> TextCodec:
        # At the first text: a cloud for devices alone needs no tokenizer.
        return TextCodec(self._service.model.tokenizer_json)

    def models(self) -> Sequence[ModelCard]:
        return [self._card]

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        if request.extension:
            raise ApiError(
                f"cotune is {sorted(request.extension)}, and a cloud takes no such wishes; leave it out", param="cotune"
            )
        generation = self._generation(request)
        detokenizer = Detokenizer(self._text)
        wanted = max(1, request.num_alternatives) if request.logprobs else None
        reason: Literal["stop", "length"] = "length"
        num_tokens, text = 0, ""
        async with aclosing(complete(self._service.engine, generation, wanted)) as tokens:
            async for token in tokens:
                num_tokens += 1
                is_end = token.token_id in generation.stop_token_ids
                piece = "" if is_end else detokenizer.add(token.token_id)
                alternatives = tuple(
                    Alternative(text=self._text.decode([other]), logprob=logprob)
                    for other, logprob in token.alternatives[: request.num_alternatives]
                )
                yield Piece(text=piece, token_id=token.token_id, logprob=token.logprob, alternatives=alternatives)
                text += piece
                if is_end or any(stop in text for stop in request.stop):
                    reason = "stop"
                    break
        rest = detokenizer.rest()
        if rest:
            yield Piece(text=rest)
        yield Finish(reason=reason, num_prompt_tokens=len(generation.prompt_ids), num_completion_tokens=num_tokens)

    def _generation(self, request: CompletionRequest) -> GenerationRequest:
        if self._service.is_draining:
            raise RefusedError(
                ErrorCode.BUSY, "the cloud is shutting down and takes no new texts; ask another one", retry_after_s=5.0
            )
        prompt_ids = self._prompt_ids(request)
        description = self._service.model.description
        room = description.max_context - len(prompt_ids)
        if room < 1:
            raise ApiError(
                f"the prompt has {len(prompt_ids)} tokens, expected fewer than {description.max_context}, the context "
                f"of {description.model}; shorten it",
                param="messages" if request.form == "chat" else "prompt",
                code="context_length_exceeded",
            )
        return GenerationRequest(
            prompt_ids=prompt_ids,
            max_new_tokens=min(room, request.max_tokens or DEFAULT_MAX_TOKENS),
            sampling=Sampling(
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=request.seed or 0,
            ),
            stop_token_ids=description.stop_token_ids,
        )

    def _prompt_ids(self, request: CompletionRequest) -> NDArray[np.int64]:
        if request.form == "chat":
            return self._text.encode_prompt(self._chat_format(request.messages))
        if isinstance(request.prompt, str):
            return self._text.encode_prompt(request.prompt)
        size = self._service.model.description.vocab_size
        if not request.prompt or max(request.prompt) >= size:
            raise ApiError(
                f"prompt holds {len(request.prompt)} tokens, expected ids from 0 to {size - 1}", param="prompt"
            )
        return np.array(request.prompt, np.int64)
