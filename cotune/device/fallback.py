"""One text to its end, whatever becomes of the network: with the cloud while it is there, alone while it is not.

    cloud cut, refused or silent  ->  one quick try to reach it  ->  the offline model goes on from the text so far
    the cloud answers a probe     ->  the session goes on with all tokens that the device holds

Each token is in the stream once, whoever decided it, and says so (`Decision.local`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from cotune.device.client import CloudClient
from cotune.device.offline.continuation import Continuation
from cotune.device.offline.reader import TextReader
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import CloudReach
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, CotuneError, InputError, RefusedError, WireTimeoutError
from cotune.generation.request import Decision
from cotune.generation.text import TextCodec
from cotune.wire.description import CloudDescription

OnDecision = Callable[[Decision], None]

# So often in a row a session of a cloud that answers at once may break without a new token before it counts as away.
_MAX_FUTILE = 2
# The longest that a cloud that was silent, and answered a greeting, is left to itself, seconds.
_MAX_WAIT_S = 2.0
# Of a cloud that was never there, in tokens that nobody here can count: what the offline model reads is checked later.
_ANY_CONTEXT = 2**31


class _AwayError(CotuneError):
    """The cloud is out of reach, and why; `is_sure` where it has been tried by other means. Caught here."""

    def __init__(self, cause: CotuneError, *, is_sure: bool = False) -> None:
        self.cause = cause
        self.is_sure = is_sure
        super().__init__(str(cause))


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """What a device does when its cloud is away.

    Attributes:
        writer: the offline model.
        reach: what is known of the cloud.
        cloud_text: the cloud's tokenizer.
        cloud_tokenizer_json: the same as bytes.
        run_step: runs a step of the model somewhere else than in the event loop.
    """

    writer: OfflineWriter
    reach: CloudReach
    cloud_text: TextCodec
    cloud_tokenizer_json: bytes
    run_step: Callable[[Callable[[], list[int]]], Awaitable[list[int]]] = asyncio.to_thread

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens of the cloud that end a text, as far as is known by now."""
        if self.reach.description is not None:
            return self.reach.description.stop_token_ids
        description = self.writer.model.description
        return description.end_ids if description.reads_with(self.cloud_tokenizer_json) else ()

    @property
    def max_context(self) -> int:
        """Of the cloud's tokens, prompt and text together, as far as is known by now."""
        if self.reach.description is not None:
            return self.reach.description.max_context
        model = self.writer.model
        return model.context if model.description.reads_with(self.cloud_tokenizer_json) else _ANY_CONTEXT

    async def start(self) -> CloudDescription | None:
        """Look for the cloud, which may come later: what it hosts, or None where it is away.

        Raises:
            MismatchError: it is there, and hosts another model than expected.
            RefusedError: it is there, and refuses for good.
            WireError: what answers is no cloud.
        """
        try:
            return await self.reach.greet()
        except RefusedError as error:
            if error.retry_after_s is None:
                raise
            self.reach.note_away(error)
        except (ConnectionLostError, WireTimeoutError) as error:
            self.reach.note_away(error)
        return None

    async def run(self, client: CloudClient, stream: DeviceStream, prompt: str, on_decision: OnDecision | None) -> None:
        """Run `stream` to its end; where that comes without the cloud, `stream.cloud_counters` stays None.

        Args:
            client: need not be connected; it should give up at once where a connection breaks.
            stream: what to generate.
            prompt: its prompt as text.
            on_decision: called with each decided token.

        Raises:
            RefusedError: the cloud is there and cannot serve this text.
            WireError: the cloud is away, and the text has no room in the offline model.
        """
        num_futile = 0
        async with AsyncExitStack() as stack:
            alone = _Alone(self, stream, prompt, on_decision or _ignore)
            stack.callback(alone.close)
            while not stream.has_ended():
                if not self.reach.is_away and num_futile < _MAX_FUTILE:
                    before = stream.num_decided
                    try:
                        await self._with_cloud(client, stream, on_decision)
                        continue
                    except _AwayError as error:
                        away = error
                    finally:
                        self.reach.close_later(client.let_go())
                    num_futile = 0 if stream.num_decided > before else num_futile + 1
                    if stream.has_ended() or not await self._is_gone(away, num_futile):
                        continue
                    self.reach.note_away(away.cause)
                await alone.go_on()
                num_futile = 0

    async def _is_gone(self, away: _AwayError, num_futile: int) -> bool:
        """Whether the cloud cannot be reached by one quick try, or is of no use where it can."""
        if away.is_sure or num_futile >= _MAX_FUTILE:
            return True
        return not await self.reach.answers(self.reach.patience_s / 2)

    async def _with_cloud(self, client: CloudClient, stream: DeviceStream, on_decision: OnDecision | None) -> None:
        """To the end of the text, or until the cloud is away."""
        work = asyncio.create_task(self._talk(client, stream, on_decision))
        half_s = wait_s = self.reach.patience_s / 2
        since_s = time.monotonic()
        try:
            while True:
                since_s = max(since_s, client.heard_s)
                left_s = since_s + wait_s - time.monotonic()
                done, _ = await asyncio.wait({work}, timeout=max(0.0, left_s))
                if done:
                    work.result()
                    return
                if client.heard_s > since_s:
                    wait_s = half_s
                    continue
                # A cloud that is only slow answers a greeting; it is not asked all the time.
                is_there = await self.reach.answers(half_s)
                if not is_there and client.heard_s <= since_s and not work.done():
                    silence = WireTimeoutError("the cloud is silent, and does not answer a new connection")
                    raise _AwayError(silence, is_sure=True)
                wait_s = min(max(half_s, _MAX_WAIT_S), 2 * wait_s)
                since_s = time.monotonic()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _talk(self, client: CloudClient, stream: DeviceStream, on_decision: OnDecision | None) -> None:
        def tell(decision: Decision) -> None:
            self.reach.note_progress()
            if on_decision is not None:
                on_decision(decision)

        try:
            await client.connect()
        except CotuneError as error:
            # Also what answers and is no cloud: the page of a network that wants to be paid first, say.
            raise _AwayError(error) from error
        self._fit(stream)
        if stream.has_ended():
            return
        try:
            await client.generate(stream, tell)
        except RefusedError as error:
            if error.retry_after_s is None:
                raise
            raise _AwayError(error) from error
        except (ConnectionLostError, WireTimeoutError) as error:
            raise _AwayError(error) from error

    def _fit(self, stream: DeviceStream) -> None:
        """Give a text that may have begun without the cloud the ends and the room of the cloud's model."""
        description = self.reach.description
        assert description is not None, "a cloud that is not away has said what it hosts"
        room = description.max_context - len(stream.request.prompt_ids)
        stream.request = replace(
            stream.request,
            stop_token_ids=description.stop_token_ids,
            max_new_tokens=max(1, min(stream.request.max_new_tokens, room)),
        )
        if stream.num_decided >= stream.request.max_new_tokens:
            stream.end_alone("length")


class _Alone:
    """The part of a text that the offline model writes, over all outages."""

    def __init__(self, fallback: Fallback, stream: DeviceStream, prompt: str, on_decision: OnDecision) -> None:
        self._fallback = fallback
        self._stream = stream
        self._prompt = prompt
        self._on_decision = on_decision
        self._reader: TextReader | None = None
        self._continuation: Continuation | None = None

    def close(self) -> None:
        """Give the place in the model back."""
        if self._reader is not None:
            self._fallback.writer.give_back(self._reader)
            self._reader = None

    async def go_on(self) -> None:
        """Write until the text ends or the cloud is back."""
        reach, stream = self._fallback.reach, self._stream
        continuation = await self._opened()
        if continuation is None:
            return
        try:
            stream.forget_last(continuation.begin(stream.token_ids))
        except InputError as error:
            raise ConnectionLostError(
                f"the cloud is out of reach ({reach.why}), and the offline model cannot go on: {error}; shorten the "
                "conversation, or give --context"
            ) from error
        while not stream.has_ended() and (reach.is_away or not continuation.is_between):
            tokens = await self._fallback.run_step(continuation.advance)
            for decision in stream.adopt(tokens):
                self._on_decision(decision)
            if continuation.ending is not None and not stream.has_ended():
                stream.end_alone(continuation.ending)

    async def _opened(self) -> Continuation | None:
        """The model's text, when there is a place for it; None where the cloud is back before."""
        if self._continuation is not None:
            return self._continuation
        fallback = self._fallback
        place = asyncio.create_task(fallback.writer.take())
        back = asyncio.create_task(fallback.reach.wait_until_back())
        try:
            await asyncio.wait({place, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.cancel()
            if not place.done():
                place.cancel()
            await asyncio.gather(place, back, return_exceptions=True)
            if not place.cancelled() and place.exception() is None:
                self._reader = place.result()
        if self._reader is None:
            if not place.cancelled():
                place.result()
            return None
        self._continuation = Continuation(
            fallback.writer.model,
            self._reader,
            own=fallback.writer.text,
            cloud=fallback.cloud_text,
            cloud_tokenizer_json=fallback.cloud_tokenizer_json,
            prompt=self._prompt,
            request=self._stream.request,
        )
        return self._continuation


def _ignore(decision: Decision) -> None:
    return
