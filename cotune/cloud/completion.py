"""Plain completions: the backbone alone, as a row in the same batch as the devices' sessions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

import numpy as np

from cotune.cloud.engine import Engine
from cotune.cloud.row import Place
from cotune.cloud.stream import StepPlan
from cotune.errors import CotuneError, RefusedError
from cotune.generation.gate import Gate
from cotune.generation.protocols import StepFeatures
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import choose, log_probabilities, most_probable
from cotune.wire.codes import ErrorCode

# A reader who is this many tokens behind is computed nothing for until it has caught up.
_MOST_UNREAD = 256


@dataclass(frozen=True, kw_only=True)
class PlainToken:
    """One token of a plain completion.

    Attributes:
        token_id: what was chosen.
        logprob: natural logarithm of its probability under the backbone, at temperature 1.
        alternatives: the likeliest tokens and their log probabilities, the likeliest first.
    """

    token_id: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...]


class PlainSteps:
    """The text of one plain completion. Fits `Steps`.

    Args:
        request: what to do; its mode is not looked at.
        num_alternatives: how many likely tokens to report at each place; None computes no probabilities.
    """

    gate: Gate | None = None
    chance = 1.0

    def __init__(self, request: GenerationRequest, num_alternatives: int | None = None) -> None:
        self.request = request
        self.num_prompt = len(request.prompt_ids)
        self.tokens: list[int] = request.prompt_ids.tolist()
        self.num_cached = 0
        self.is_over = False
        self._num_alternatives = num_alternatives

    @property
    def is_in_prompt(self) -> bool:
        return self.num_cached < self.num_prompt

    def wants_step(self) -> bool:
        return not self.is_over

    def plan(self, prompt_chunk: int) -> StepPlan:
        first = self.num_cached
        last = len(self.tokens)
        if first < self.num_prompt:
            last = min(self.num_prompt, (first // prompt_chunk + 1) * prompt_chunk)
        ids = np.array(self.tokens[first:last], np.int64)
        return StepPlan(epoch=0, truncate_to=first, token_ids=ids, num_outputs=int(last == len(self.tokens)))

    def is_current(self, plan: StepPlan) -> bool:
        return not self.is_over

    def forget_cache(self) -> None:
        self.num_cached = 0

    def take(self, plan: StepPlan, features: Sequence[StepFeatures]) -> PlainToken | None:
        """The token that the outcome of `plan` decides, if it decides one."""
        self.num_cached = plan.truncate_to + len(plan.token_ids)
        if not features:
            return None
        logits = features[-1].logits
        token_id = choose(logits, self.request.sampling, len(self.tokens))
        self.tokens.append(token_id)
        num_generated = len(self.tokens) - self.num_prompt
        self.is_over = token_id in self.request.stop_token_ids or num_generated >= self.request.max_new_tokens
        if self._num_alternatives is None:
            return PlainToken(token_id=token_id, logprob=None, alternatives=())
        logprobs = log_probabilities(logits)
        return PlainToken(
            token_id=token_id,
            logprob=float(logprobs[token_id]),
            alternatives=most_probable(logprobs, self._num_alternatives),
        )


class CompletionRow:
    """A plain completion in the engine. Fits `Row`."""

    def __init__(self, steps: PlainSteps) -> None:
        self._steps = steps
        self._place = Place()
        self._made: asyncio.Queue[PlainToken | CotuneError] = asyncio.Queue()

    @property
    def steps(self) -> PlainSteps:
        return self._steps

    @property
    def place(self) -> Place:
        return self._place

    @property
    def is_blocked(self) -> bool:
        return self._made.qsize() >= _MOST_UNREAD

    due_s: float | None = None

    def on_step(
        self, plan: StepPlan, features: Sequence[StepFeatures] | None, seconds: float, now_s: float, share: float
    ) -> None:
        if features is not None and (token := self._steps.take(plan, features)) is not None:
            self._made.put_nowait(token)

    def on_time(self, now_s: float) -> None:
        return

    def on_idle(self, now_s: float) -> None:
        return

    def on_failure(self, error: CotuneError) -> None:
        self._steps.is_over = True
        self._made.put_nowait(error)

    @property
    def is_drained(self) -> bool:
        """Whether every token that was made has been read."""
        return self._made.empty()

    async def next(self) -> PlainToken:
        """The next token, when it is there."""
        made = await self._made.get()
        if isinstance(made, CotuneError):
            raise made
        return made


async def complete(
    engine: Engine, request: GenerationRequest, num_alternatives: int | None = None
) -> AsyncGenerator[PlainToken, None]:
    """The tokens of one plain completion as they are made; closing the generator ends it.

    Args:
        engine: does the forward passes.
        request: what to do; stop strings are left to the caller.
        num_alternatives: as in `PlainSteps`.

    Raises:
        RefusedError: the engine's cache has no room; says when to come back.
    """
    row = CompletionRow(PlainSteps(request, num_alternatives))
    num_tokens = len(request.prompt_ids) + request.max_new_tokens
    if not engine.reserve(row, num_tokens):
        raise RefusedError(
            ErrorCode.BUSY,
            f"the cloud's cache has {engine.num_free_blocks} free blocks and this text needs "
            f"{engine.blocks_for(num_tokens)}; try again in a few seconds",
            retry_after_s=1.0,
        )
    engine.start(row)
    try:
        while not (row.steps.is_over and row.is_drained):
            yield await row.next()
            engine.wake()
    finally:
        row.steps.is_over = True
        engine.put_out(row)
