"""An offline model alone as a source of text for the OpenAI interface: no cloud, no plugin, and nothing leaves."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.chat import chat_format_of
from cotune.device.offline.generate import OfflineToken
from cotune.device.offline.writer import OfflineWriter
from cotune.device.serve.wishes import OfflineOptions, offline_options_for
from cotune.generation.request import GenerationRequest
from cotune.generation.text import Detokenizer
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.requests import CompletionRequest
from cotune.openai_api.source import Alternative, Finish, ModelCard, Piece


class OfflineSource:
    """A model on this device. Fits `DeviceSource`.

    Args:
        writer: the model.
        model_id: how requests call it.
        defaults: how to write where the request does not say.
    """

    def __init__(self, writer: OfflineWriter, *, model_id: str, defaults: OfflineOptions | None = None) -> None:
        self.defaults = defaults or OfflineOptions()
        self.card = ModelCard(id=model_id, created=int(time.time()), owned_by="cotune device")
        self._writer = writer
        self._chat_format = chat_format_of(writer.model.folder, writer.text)

    async def start(self) -> None:
        """Nothing to wait for: the model is loaded."""

    async def close(self) -> None:
        """Nothing to say to anybody: texts end with their requests."""

    def info(self) -> dict[str, object]:
        """There is nothing to choose but how to sample."""
        sampling = self.defaults.sampling
        return {
            "cloud": None,
            "plugin": None,
            "offline": self._writer.info(),
            "modes": [],
            "schedules": [],
            "answers": [],
            "defaults": {
                "max_tokens": self.defaults.max_new_tokens,
                "temperature": sampling.temperature,
                "seed": sampling.seed,
            },
        }

    def models(self) -> Sequence[ModelCard]:
        return [self.card]

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        options = offline_options_for(request, self.defaults)
        wanted = GenerationRequest(
            prompt_ids=self._prompt_ids(request),
            max_new_tokens=options.max_new_tokens,
            sampling=options.sampling,
            stop_token_ids=self._writer.model.description.end_ids,
            stop_strings=options.stop_strings,
        )
        self._check_room(request, len(wanted.prompt_ids))
        pieces = _Pieces(self._writer, wanted, is_chat=request.form == "chat")
        async with self._writer.generation(wanted, num_alternatives=request.num_alternatives) as generation:
            while generation.ending is None:
                token = await asyncio.to_thread(generation.advance)
                if token is not None:
                    yield pieces.piece(token)
            rest = pieces.rest()
            if rest:
                yield Piece(text=rest)
            reason: Literal["stop", "length"] = "length" if generation.ending.reason == "length" else "stop"
        yield Finish(
            reason=reason,
            num_prompt_tokens=len(wanted.prompt_ids),
            num_completion_tokens=pieces.num_tokens,
            extra={"metrics": pieces.metrics()},
        )

    def _prompt_ids(self, request: CompletionRequest) -> NDArray[np.int64]:
        text = self._writer.text
        if request.form == "chat":
            return text.encode_prompt(self._chat_format(request.messages))
        if isinstance(request.prompt, str):
            return text.encode_prompt(request.prompt)
        size = self._writer.model.description.vocab_size
        if max(request.prompt) >= size:
            raise ApiError(
                f"prompt holds the token {max(request.prompt)}, expected ids from 0 to {size - 1}", param="prompt"
            )
        return np.array(request.prompt, np.int64)

    def _check_room(self, request: CompletionRequest, num_prompt: int) -> None:
        if num_prompt >= self._writer.model.context:
            raise ApiError(
                f"the conversation has {num_prompt} tokens, and the offline model's context "
                f"{self._writer.model.context}; shorten it, or begin a new one",
                param="messages" if request.form == "chat" else "prompt",
                code="context_length_exceeded",
            )


class _Pieces:
    """From tokens to what is told of each."""

    def __init__(self, writer: OfflineWriter, request: GenerationRequest, *, is_chat: bool) -> None:
        self.num_tokens = 0
        self._writer = writer
        self._request = request
        self._detokenizer = Detokenizer(writer.text)
        # The space between a request and its answer belongs to the form of the prompt, not to the answer.
        self._is_at_start = is_chat
        self._started_s = time.perf_counter()

    def piece(self, token: OfflineToken) -> Piece:
        index = self.num_tokens
        self.num_tokens += 1
        is_end = token.token_id in self._request.stop_token_ids
        probability = round(math.exp(token.logprob), 4)
        return Piece(
            text="" if is_end else self._visible(self._detokenizer.add(token.token_id)),
            token_id=token.token_id,
            logprob=token.logprob,
            alternatives=tuple(
                Alternative(text=self._writer.text.decode([other]), logprob=logprob)
                for other, logprob in token.alternatives
            ),
            extra={
                "position": index,
                "token_id": token.token_id,
                "source": "local",
                "who": "local",
                "consulted": False,
                "base_text": None,
                "probability": probability,
                "probability_bounds": [probability, probability],
                "so_far": self._costs(),
            },
        )

    def rest(self) -> str:
        """Of a character that the last tokens left unfinished."""
        return self._visible(self._detokenizer.rest())

    def _visible(self, text: str) -> str:
        visible = text.lstrip() if self._is_at_start else text
        self._is_at_start = self._is_at_start and not visible
        return visible

    def _costs(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started_s
        nothing: dict[str, float] = dict.fromkeys(("M", "consult_rate", "disagree_rate", "bytes_down", "bytes_up"), 0)
        return {**nothing, "ms_per_token": round(1000 * seconds / max(1, self.num_tokens), 2)}

    def metrics(self) -> dict[str, object]:
        """Of the finished text, under the names of texts with a cloud where they mean something."""
        seconds = time.perf_counter() - self._started_s
        return {
            "mode": "offline",
            "seed": self._request.sampling.seed,
            "num_tokens": self.num_tokens,
            "local": self.num_tokens,
            **self._costs(),
            "tokens_per_s": self.num_tokens / seconds if seconds > 0 else 0.0,
        }
