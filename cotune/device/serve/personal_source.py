"""The personal model as a source of text for the OpenAI interface: one conversation with the cloud for each text."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from cotune.device.client import ClientConfig, CloudClient, Connector
from cotune.device.fallback import Fallback
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import ReachConfig
from cotune.device.runtime import Device, DeviceGeneration, GenerationOptions
from cotune.device.serve.costs import RunningCosts, metrics
from cotune.device.serve.prompt import chat_prompt
from cotune.device.serve.watched_stream import WatchedStream
from cotune.device.serve.wishes import options_for
from cotune.device.side_network import open_side_network
from cotune.errors import CotuneError
from cotune.generation.modes import MODES
from cotune.generation.request import ANSWERS, SCHEDULES, Decision, GenerationRequest
from cotune.openai_api.api_error import ApiError
from cotune.openai_api.requests import CompletionRequest
from cotune.openai_api.source import Finish, ModelCard, Piece
from cotune.plugin import Plugin
from cotune.wire.description import CloudDescription
from cotune.wire.frames import Close, EndReason, encode
from cotune.wire.transport import Connection

# To tell the cloud that a text is not wanted any more, seconds. Without it the cloud finds out by itself, later.
_FAREWELL_TIMEOUT_S = 1.0
_CLOSE_TIMEOUT_S = 3.0


class PersonalSource:
    """A plugin and its cloud. Fits `TextSource`.

    Args:
        plugin: the personal part.
        connector: makes a connection to the cloud, one for each text.
        model_id: how requests call it.
        defaults: how to make a text where the request does not say.
        config: patience.
        offline: goes on where the cloud is out of reach; None for nothing that does.
        reach_config: when that is.
    """

    def __init__(
        self,
        plugin: Plugin,
        connector: Connector,
        *,
        model_id: str,
        defaults: GenerationOptions,
        config: ClientConfig | None = None,
        offline: OfflineWriter | None = None,
        reach_config: ReachConfig | None = None,
    ) -> None:
        self.device = Device(plugin, connector, config)
        self.device.check(defaults)
        self.fallback = None if offline is None else self.device.fallback_to(offline, reach_config)
        self.defaults = defaults
        self.cloud: CloudDescription | None = None
        self.card = ModelCard(id=model_id, created=int(time.time()), owned_by="cotune device")
        self._connector = connector
        self._config = config or ClientConfig()
        self._running: set[asyncio.Task[Finish]] = set()

    async def close(self) -> None:
        """End all texts that are being made, and say so to the cloud."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=_CLOSE_TIMEOUT_S)
        if self.fallback is not None:
            await self.fallback.reach.close()

    async def check_cloud(self) -> CloudDescription:
        """Make sure that the cloud is there, and hosts the plugin's model.

        Raises:
            MismatchError: it hosts another one.
            WireError: it is not there, or refuses.
        """
        async with CloudClient(self._connector, self._config) as client:
            self.device.check_cloud(client.description)
            self.cloud = client.description
        return self.cloud

    async def start(self) -> None:
        """Make sure that the cloud is there; see `check_cloud`. With an offline model it may come later.

        Raises:
            MismatchError: it is there, and hosts another model than the plugin's.
            WireError: it is not there, and there is no offline model; or it is, and refuses for good.
        """
        if self.fallback is None:
            await self.check_cloud()
            return
        self.cloud = await self.fallback.start()

    def info(self) -> dict[str, object]:
        """What can be chosen with this plugin, and what is where nobody does."""
        plugin, defaults, cloud = self.device.plugin, self.defaults, self.cloud
        if self.fallback is not None:
            cloud = self.fallback.reach.description
        has_gate = self.device.personal.gate is not None
        modes = [mode for mode in MODES.values() if mode.family == plugin.family and (has_gate or not mode.is_gated)]
        return {
            "cloud": None if cloud is None else {"model": cloud.model, "max_context": cloud.max_context},
            "offline": None if self.fallback is None else self._offline_info(self.fallback),
            "plugin": {"num_parameters": plugin.num_parameters, "family": plugin.family, "has_gate": has_gate},
            "modes": [mode.name for mode in modes],
            "schedules": [name for name in SCHEDULES if has_gate or name != "gated"],
            "answers": list(ANSWERS),
            "defaults": {
                "mode": defaults.mode,
                "schedule": defaults.schedule,
                "answer": defaults.answer,
                "max_tokens": defaults.max_new_tokens,
                "temperature": defaults.sampling.temperature,
                "seed": defaults.sampling.seed,
            },
        }

    def _offline_info(self, fallback: Fallback) -> dict[str, object]:
        return {**fallback.writer.info(), "is_away": fallback.reach.is_away, "why": fallback.reach.why}

    def models(self) -> Sequence[ModelCard]:
        return [self.card]

    async def complete(self, request: CompletionRequest) -> AsyncGenerator[Piece | Finish, None]:
        options = options_for(request, self.defaults)
        self.device.check(options)
        generation = _Generation(
            self.device, _Line(self._connector), self._config, options, request, fallback=self.fallback
        )
        pieces: asyncio.Queue[Piece | None] = asyncio.Queue()
        task = asyncio.create_task(generation.run(pieces.put_nowait))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            yield await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class _Line:
    """Remembers the connection in use, for a farewell over it."""

    def __init__(self, connector: Connector) -> None:
        self._connector = connector
        self.connection: Connection | None = None

    async def connect(self) -> Connection:
        self.connection = await self._connector()
        return self.connection


class _Generation:
    """One text."""

    def __init__(
        self,
        device: Device,
        line: _Line,
        config: ClientConfig,
        options: GenerationOptions,
        request: CompletionRequest,
        *,
        fallback: Fallback | None,
    ) -> None:
        self._fallback = fallback
        # A side network keeps working memory: each text that is being made has its own.
        self._device = copy.copy(device)
        self._device.personal = replace(device.personal, corrector=open_side_network(device.plugin))
        self._device.make_stream = self._make_stream
        self._line = line
        self._config = config
        self._options = options
        self._is_chat = request.form == "chat"
        self._has_begun = False
        self._prompt_ids = None if isinstance(request.prompt, str) else np.array(request.prompt, np.int64)
        self._prompt = self._text_of(request)
        self._max_context = 0
        self._stream: WatchedStream | None = None
        self._costs = RunningCosts(waits_for_device=options.schedule in ("blocking", "gated"))
        self._token_ids: list[int] = []

    def _text_of(self, request: CompletionRequest) -> str:
        if request.form == "chat":
            return chat_prompt(request.messages, self._device.format_prompt)
        if isinstance(request.prompt, str):
            return request.prompt
        size = self._device.personal.output_basis.vocab_size
        if max(request.prompt) >= size:
            raise ApiError(
                f"prompt holds the token {max(request.prompt)}, expected ids from 0 to {size - 1}", param="prompt"
            )
        # Never read: the ids themselves are.
        return self._device.text.decode(request.prompt) or " "

    def _make_stream(self, request: GenerationRequest, *args: Any, **options: Any) -> WatchedStream:
        """The stream, with the prompt's own ids, and no more tokens than the context has room for."""
        if self._prompt_ids is not None:
            request = replace(request, prompt_ids=self._prompt_ids)
        room = self._max_context - len(request.prompt_ids)
        if room < 1:
            raise ApiError(
                f"the conversation has {len(request.prompt_ids)} tokens, and the model's context {self._max_context}; "
                "shorten it, or begin a new one",
                param="messages",
                code="context_length_exceeded",
            )
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        self._stream = WatchedStream(request, *args, **options)
        return self._stream

    async def run(self, give: Callable[[Piece], None]) -> Finish:
        """Make the text; `give` gets each piece as it comes."""
        started_s = time.perf_counter()
        shown: list[str] = []
        async with self._client() as client:

            def show(text: str, decision: Decision) -> None:
                # The space between a request and its answer belongs to the form of the prompt, not to the answer.
                visible = text.lstrip() if self._is_chat and not self._has_begun else text
                self._has_begun |= bool(visible)
                shown.append(text)
                seconds = time.perf_counter() - started_s
                give(self._piece(visible, decision, client, seconds))

            try:
                made = await self._generate(client, show)
            except asyncio.CancelledError:
                await self._say_farewell()
                raise
        assert self._stream is not None
        # A character that the last tokens left unfinished was not shown.
        whole, text = self._device.text.decode(made.token_ids), "".join(shown)
        if whole.startswith(text) and len(whole) > len(text):
            give(Piece(text=whole[len(text) :]))
        reason: Literal["stop", "length"] = "length" if made.ending.reason == "length" else "stop"
        return Finish(
            reason=reason,
            num_prompt_tokens=len(self._stream.request.prompt_ids),
            num_completion_tokens=len(made.token_ids),
            extra={"metrics": metrics(made)},
        )

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[CloudClient]:
        """A client of this text; also how long the text may be."""
        if self._fallback is None:
            async with CloudClient(self._line.connect, self._config) as client:
                self._max_context = client.description.max_context
                yield client
        else:
            # Whoever runs it connects it, and closes its connections.
            self._max_context = self._fallback.max_context
            yield self._device.hasty_client(self._line.connect)

    async def _generate(self, client: CloudClient, show: Callable[[str, Decision], None]) -> DeviceGeneration:
        if self._fallback is None:
            return await self._device.generate_with(client, self._prompt, self._options, show)
        return await self._device.generate_anyway(client, self._fallback, self._prompt, self._options, show)

    def _piece(self, text: str, decision: Decision, client: CloudClient, seconds: float) -> Piece:
        assert self._stream is not None
        index = len(self._token_ids)
        self._token_ids.append(decision.token_id)
        self._costs.add(decision)
        bounds = self._stream.probability(len(self._stream.request.prompt_ids) + index)
        middle = None if bounds is None else bounds.middle
        extra = {
            "position": index,
            "token_id": decision.token_id,
            "source": decision.source,
            "who": _who(decision),
            "consulted": decision.consulted,
            "base_text": self._device.text.decode([decision.base_token_id]) if decision.changed else None,
            "probability": None if middle is None else round(middle, 4),
            "probability_bounds": None if bounds is None else [round(bounds.low, 4), round(bounds.high, 4)],
            "so_far": self._costs.so_far(bytes_down=client.bytes_received, bytes_up=client.bytes_sent, seconds=seconds),
        }
        logprob = math.log(middle) if middle else None
        return Piece(text=text, token_id=decision.token_id, logprob=logprob, extra=extra)

    async def _say_farewell(self) -> None:
        """Tell the cloud that nobody wants the rest, so that it need not keep it for a device that comes back."""
        stream, connection = self._stream, self._line.connection
        if stream is None or connection is None or not stream.session or connection.closed:
            return
        close = Close(session=stream.session, pos=stream.next_position, reason=EndReason.CANCELLED)
        with contextlib.suppress(CotuneError, TimeoutError):
            async with asyncio.timeout(_FAREWELL_TIMEOUT_S):
                await connection.send(encode(close))


def _who(decision: Decision) -> str:
    """Who decided it.

    cloud: alone; agreed: the device confirmed it; changed: the device's token; late: the device did not answer; local:
    the offline model, while the cloud was out of reach.
    """
    if decision.local:
        return "local"
    if decision.late:
        return "late"
    if decision.changed:
        return "changed"
    return "agreed" if decision.consulted else "cloud"
