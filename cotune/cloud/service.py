"""The cloud service: answers devices on any number of connections about one hosted model.

The service works on `Connection`s and does not care what carries them; `cotune.cloud.host` puts it behind a
WebSocket.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from cotune.cloud.beam_stream import BeamStream
from cotune.cloud.branches import BranchingStream, extra_tokens, may_branch
from cotune.cloud.engine import Engine, EngineConfig
from cotune.cloud.hosted import HostedModel
from cotune.cloud.limits import RateLimit
from cotune.cloud.session import Session, Stream
from cotune.cloud.stream import CloudStream, StreamConfig, StreamCounters
from cotune.errors import (
    ConnectionLostError,
    CotuneError,
    FrameError,
    InputError,
    RefusedError,
    WireTimeoutError,
)
from cotune.generation.beams import BeamOptions, check_beams
from cotune.generation.gate import Gate
from cotune.generation.sampling import Sampling
from cotune.wire.feature_frames import pack_features
from cotune.wire.frames import (
    MAX_ASSET_CHUNK_BYTES,
    MAX_BEAM_TOKENS,
    PROTOCOL_VERSION,
    AnswerCode,
    Asset,
    AssetKind,
    AssetRequest,
    EndReason,
    Error,
    ErrorCode,
    FeaturesRequest,
    Frame,
    Hello,
    Open,
    Opened,
    ScheduleCode,
    Welcome,
    decode,
    encode,
)
from cotune.wire.outbox import Outbox
from cotune.wire.transport import Connection

# How often sessions are looked through for silent devices, seconds.
_ROUND_S = 1.0
# When to come back to a cloud that is full, ms.
_RETRY_AFTER_MS = 1000

logger = logging.getLogger("cotune.cloud")


@dataclass(frozen=True, kw_only=True)
class ServiceConfig:
    """Limits of a cloud service.

    Attributes:
        max_sessions: generations at once, those waiting for their device to come back included.
        session_ttl_s: how long a session whose connection broke is kept for its device, seconds.
        idle_timeout_s: how long a device may stay silent, seconds.
        slow_reader_timeout_s: who takes nothing of what is sent for so long is hung up on, seconds.
        max_outbox_bytes: no more is computed for a device that has so many bytes still to read.
        max_sessions_per_token: generations at once of one holder of a token, texts of the OpenAI interface included;
            None for no limit.
        requests_per_minute: sessions opened, texts asked for and sequences read, for each holder of a token.
        max_window: how far any session may run ahead, tokens.
        max_branches: tokens that go on side by side where the gated schedule waits for a device; 1 for none.
        max_feature_logits: base logits in one sequence's training features, over all its positions.
        engine: limits of the batch.
    """

    max_sessions: int = 64
    session_ttl_s: float = 60.0
    idle_timeout_s: float = 300.0
    slow_reader_timeout_s: float = 30.0
    max_outbox_bytes: int = 1024 * 1024
    max_sessions_per_token: int | None = None
    requests_per_minute: int | None = None
    max_window: int = 128
    max_branches: int = 1
    max_feature_logits: int = 64 * 1024 * 1024
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        for name in (
            "max_sessions",
            "session_ttl_s",
            "idle_timeout_s",
            "slow_reader_timeout_s",
            "max_outbox_bytes",
            "max_window",
            "max_branches",
            "max_feature_logits",
        ):
            if getattr(self, name) <= 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected a number above 0")
        for name in ("max_sessions_per_token", "requests_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}, expected at least 1")


@dataclass
class Totals:
    """What all sessions and connections so far came to.

    Attributes:
        wasted_steps, rollbacks, stall_s, branchings, branches_kept: as the streams count them.
        bytes_down, bytes_up: of frames, to devices and from them.
        refusals: how often a request was refused, by reason.
        answers: of the OpenAI interface, by HTTP status.
    """

    wasted_steps: int = 0
    rollbacks: int = 0
    stall_s: float = 0.0
    branchings: int = 0
    branches_kept: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    answers: dict[int, int] = field(default_factory=dict)

    def add_stream(self, counters: StreamCounters) -> None:
        self.wasted_steps += counters.num_wasted_steps
        self.rollbacks += counters.num_rollbacks
        self.stall_s += counters.stall_s
        self.branchings += counters.num_branchings
        self.branches_kept += counters.num_branches_kept

    def add_connection(self, connection: Connection) -> None:
        self.bytes_down += connection.bytes_sent
        self.bytes_up += connection.bytes_received


class CloudService:
    """Serves one hosted model.

    Args:
        model: what is hosted.
        config: limits.

    Example:
        >>> service = CloudService(model)                                           # doctest: +SKIP
        >>> device, cloud = connection_pair()                                       # doctest: +SKIP
        >>> task = asyncio.create_task(service.handle(cloud))                       # doctest: +SKIP
    """

    def __init__(self, model: HostedModel, config: ServiceConfig | None = None) -> None:
        self.model = model
        self.config = config or ServiceConfig()
        self.engine = Engine(model, self.config.engine)
        self.sessions: dict[int, Session] = {}
        self.is_draining = False
        self._rounds: asyncio.TimerHandle | None = None
        per_minute = self.config.requests_per_minute
        self._rate = None if per_minute is None else RateLimit(per_minute)
        self._connections: set[Connection] = set()
        self._texts: Counter[str] = Counter()
        self._past = Totals()
        self._assets = {
            AssetKind.TOKENIZER: model.tokenizer_json,
            AssetKind.OUTPUT_BASIS: model.output_basis.to_bytes(),
        }

    @property
    def num_connections(self) -> int:
        """Connections of devices."""
        return len(self._connections)

    def totals(self) -> Totals:
        """What all sessions and connections came to, those that still go on included."""
        totals = replace(self._past, refusals=dict(self._past.refusals), answers=dict(self._past.answers))
        for session in self.sessions.values():
            totals.add_stream(session.stream.counters)
        for connection in self._connections:
            totals.add_connection(connection)
        return totals

    def check_rate(self, owner: str) -> None:
        """Count one request of `owner`.

        Raises:
            RefusedError: too many in a short time; says when to come back.
        """
        wait_s = 0.0 if self._rate is None else self._rate.wait_s(owner)
        if wait_s > 0:
            raise RefusedError(
                ErrorCode.BUSY,
                f"more than {self.config.requests_per_minute} requests a minute came with this token; try again in "
                f"{wait_s:.1f} s",
                retry_after_s=wait_s,
            )

    def note_refusal(self, reason: str) -> None:
        """Count a refusal, here or in front of this service."""
        self._past.refusals[reason] = self._past.refusals.get(reason, 0) + 1

    def note_answer(self, status: int) -> None:
        """Count an answer of the OpenAI interface."""
        self._past.answers[status] = self._past.answers.get(status, 0) + 1

    @contextmanager
    def text_place(self, owner: str) -> Iterator[None]:
        """Count a text of the OpenAI interface as one of its owner's generations, as long as it is being made.

        Raises:
            RefusedError: the owner has as many already as a token may, or asks too often.
        """
        self._check_share(owner)
        self.check_rate(owner)
        self._texts[owner] += 1
        try:
            yield
        finally:
            self._texts[owner] -= 1
            if not self._texts[owner]:
                del self._texts[owner]

    def _check_share(self, owner: str) -> None:
        most = self.config.max_sessions_per_token
        of_owner = self._texts[owner] + sum(
            session.owner == owner and session.stream.ended is None for session in self.sessions.values()
        )
        if most is not None and of_owner >= most:
            raise self._busy(f"{of_owner} sessions run with this token, expected at most {most}; wait until one ends")

    def close(self) -> None:
        """End all sessions and stop computing."""
        if self._rounds is not None:
            self._rounds.cancel()
        for number in list(self.sessions):
            self._drop(number)
        self.engine.close()

    async def drain(self, timeout_s: float) -> None:
        """Take no new sessions, let the running ones finish, and hand the rest back to their devices.

        A device whose text is not complete after `timeout_s` gets the end reason SHUTDOWN: it holds all confirmed
        tokens and its ticket, and goes on at another cloud, or at this one when it is back.
        """
        self.is_draining = True
        ends_s = time.monotonic() + timeout_s
        while any(session.is_attached for session in self.sessions.values()) and time.monotonic() < ends_s:
            await asyncio.sleep(0.02)
        for session in list(self.sessions.values()):
            session.end(EndReason.SHUTDOWN)

    async def handle(self, connection: Connection, owner: str = "") -> None:
        """Serve one device until its connection closes. Never raises for what a device does.

        Args:
            connection: to the device.
            owner: whose it is, for limits.
        """
        self._keep_rounds()
        self._connections.add(connection)
        visit = _Visit(self, connection, owner)
        try:
            await visit.serve()
        except WireTimeoutError:
            visit.refuse(ErrorCode.TIMEOUT, "nothing came from the device for too long; connect again")
        except ConnectionLostError:
            pass
        except FrameError as error:
            visit.refuse(ErrorCode.BAD_FRAME, str(error))
        except RefusedError as error:
            visit.refuse(ErrorCode(error.code), error.reason, retry_after_s=error.retry_after_s)
        except Exception:
            logger.exception("a connection failed")
            visit.refuse(ErrorCode.INTERNAL, "the cloud failed; its log says why, try again")
        finally:
            visit.leave()
            await visit.outbox.flush()
            await visit.outbox.close()
            await connection.close()
            self._connections.discard(connection)
            self._past.add_connection(connection)

    def open_session(self, frame: Open, owner: str = "") -> tuple[Session, list[Frame]]:
        """A new session, or the one that the frame's ticket belongs to; and what is to be sent after Opened.

        Raises:
            RefusedError: no room, or a request that this model cannot serve.
        """
        self._check(frame)
        generated = frame.generated_ids.tolist()
        known = self.sessions.get(frame.session)
        if frame.resume and known is not None and known.admits(frame.ticket):
            known.detach()
            if known.stream.is_for(frame.prompt_ids) and isinstance(known.stream, BeamStream) is (frame.num_beams > 1):
                self._reserve(known, frame)
                return known, known.stream.resume(generated, frame.taps_from, time.monotonic())
        if self.is_draining:
            raise self._busy("the cloud is shutting down and takes no new sessions; go on at another one")
        num_running = sum(session.stream.ended is None for session in self.sessions.values())
        if num_running >= self.config.max_sessions:
            raise self._busy(f"the cloud serves {num_running} sessions and takes no more; try again in a few seconds")
        self._check_share(owner)
        self.check_rate(owner)
        number = secrets.randbits(32)
        while number in self.sessions:
            number = secrets.randbits(32)
        session = Session(self._stream_for(number, frame), self.engine, owner=owner)
        self._reserve(session, frame)
        self.sessions[number] = session
        return session, session.stream.end_if_finished(time.monotonic())

    def keep_for_a_while(self, session: Session) -> None:
        """The session's connection is gone, or its text complete: drop it unless its device comes back."""
        session.detach()
        number = session.stream.session
        if session.expiry is not None:
            session.expiry.cancel()
        session.expiry = asyncio.get_running_loop().call_later(self.config.session_ttl_s, self._drop, number)

    def _drop(self, number: int) -> None:
        session = self.sessions.pop(number, None)
        if session is not None:
            if session.expiry is not None:
                session.expiry.cancel()
            session.detach()
            self.engine.put_out(session)
            self._past.add_stream(session.stream.counters)

    def _reserve(self, session: Session, frame: Open) -> None:
        num_tokens = len(frame.prompt_ids) + frame.max_new_tokens
        if isinstance(session.stream, BranchingStream):
            num_tokens += self._branch_tokens
        num_beams, num_shared = max(1, frame.num_beams), len(frame.prompt_ids)
        engine = self.engine
        most = engine.config.max_blocks
        num_blocks = engine.blocks_for(num_tokens, num_beams=num_beams, num_shared=num_shared)
        if most is not None and num_blocks > most:
            beams = f" in {num_beams} beams" if num_beams > 1 else ""
            raise RefusedError(
                ErrorCode.TOO_LARGE,
                f"{num_tokens} tokens{beams} need {num_blocks} blocks of the cloud's cache, expected at "
                f"most {most}; shorten the prompt or ask for fewer new tokens",
            )
        # Those whose devices are away make room, the longest away first; they are computed again when they come back.
        away = sorted((s for s in self.sessions.values() if not s.is_attached and s is not session), key=_heard_s)
        while not engine.reserve(session, num_tokens, num_beams=num_beams, num_shared=num_shared):
            if not away:
                raise self._busy(
                    f"the cloud's cache has {engine.num_free_blocks} free blocks and this session needs "
                    f"{num_blocks}; try again in a few seconds"
                )
            engine.put_out(away.pop(0))

    def _busy(self, reason: str) -> RefusedError:
        return RefusedError(ErrorCode.BUSY, reason, retry_after_s=_RETRY_AFTER_MS / 1e3)

    def _keep_rounds(self) -> None:
        if self._rounds is None:
            self._rounds = asyncio.get_running_loop().call_later(min(_ROUND_S, self.config.idle_timeout_s), self._round)

    def _round(self) -> None:
        """End the sessions of devices that have been silent for too long."""
        self._rounds = None
        now_s = time.monotonic()
        for session in list(self.sessions.values()):
            if session.is_attached and now_s - session.heard_s > self.config.idle_timeout_s:
                session.end(EndReason.CANCELLED)
        if self.sessions:
            self._keep_rounds()

    def asset_chunk(self, frame: AssetRequest) -> Asset:
        """A piece of a public part."""
        data = self._assets[frame.kind]
        if frame.pos > len(data):
            raise RefusedError(ErrorCode.BAD_REQUEST, f"asset offset is {frame.pos}, expected at most {len(data)}")
        chunk = data[frame.pos : frame.pos + MAX_ASSET_CHUNK_BYTES]
        return Asset(pos=frame.pos, total_bytes=len(data), chunk=chunk)

    def check_features_request(self, frame: FeaturesRequest) -> None:
        """Refuse what the model cannot read."""
        self._check_ids(frame.input_ids)
        if len(frame.input_ids) > self.model.description.max_context:
            raise RefusedError(
                ErrorCode.TOO_LARGE,
                f"the sequence has {len(frame.input_ids)} tokens, expected at most "
                f"{self.model.description.max_context}, the context of {self.model.description.model}",
            )
        num_logits = min(frame.top_k, self.model.description.vocab_size) * (len(frame.input_ids) - frame.pos)
        if not 1 <= num_logits <= self.config.max_feature_logits:
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"top_k is {frame.top_k} for {len(frame.input_ids) - frame.pos} positions, expected at least 1 "
                f"and at most {self.config.max_feature_logits} logits in all; ask for fewer",
            )

    def _check_ids(self, ids: NDArray[np.int64]) -> None:
        largest = int(ids.max(initial=0))
        if largest >= self.model.description.vocab_size:
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"token id {largest} came, expected ids below {self.model.description.vocab_size}; "
                "was the text encoded with another tokenizer?",
            )

    def _check(self, frame: Open) -> None:
        description = self.model.description
        self._check_ids(frame.prompt_ids)
        self._check_ids(frame.generated_ids)
        wanted = len(frame.prompt_ids) + frame.max_new_tokens
        if wanted > description.max_context:
            raise RefusedError(
                ErrorCode.TOO_LARGE,
                f"the prompt has {len(frame.prompt_ids)} tokens and {frame.max_new_tokens} new ones are asked for, "
                f"expected at most {description.max_context} together, the context of {description.model}",
            )
        if len(frame.generated_ids) > frame.max_new_tokens:
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"{len(frame.generated_ids)} tokens were generated already, expected at most {frame.max_new_tokens}",
            )
        if frame.deadline_ms and frame.answer is not AnswerCode.CORRECTION:
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"a deadline of {frame.deadline_ms} ms came with answer {frame.answer.name.lower()}, where the device "
                "decides and the cloud cannot go on alone; use answer correction",
            )
        if frame.num_beams > 1:
            self._check_beams(frame)
        gate = Gate.of_frame(frame)
        if gate is not None and gate.hidden_size != description.hidden_size:
            raise RefusedError(
                ErrorCode.MISMATCH,
                f"the gate has {gate.hidden_size} weights, expected {description.hidden_size}; "
                "was the plugin tuned on another model?",
            )
        needs_gate = frame.schedule is ScheduleCode.GATED or self._stream_config(frame).combination.is_gated
        if needs_gate and gate is None:
            raise RefusedError(
                ErrorCode.BAD_REQUEST,
                f"mode {frame.mode.name.lower()} with schedule {frame.schedule.name.lower()} needs a gate, "
                "and none came; tune the plugin with a gate",
            )

    def _check_beams(self, frame: Open) -> None:
        try:
            check_beams(
                mode=frame.mode.name.lower(),
                schedule=frame.schedule.name.lower(),
                answer=frame.answer.name.lower(),
                sampling=Sampling(temperature=frame.temperature, top_p=frame.top_p, seed=frame.seed),
            )
        except InputError as error:
            raise RefusedError(ErrorCode.BAD_REQUEST, str(error)) from error
        for name, value, most in (
            ("deadline_ms", frame.deadline_ms, 0),
            ("taps_from", frame.taps_from, 0),
            ("max_new_tokens", frame.max_new_tokens, MAX_BEAM_TOKENS),
        ):
            if value > most:
                raise RefusedError(
                    ErrorCode.BAD_REQUEST, f"{name} is {value} with beams, expected at most {most}; leave out the beams"
                )

    @property
    def _branch_tokens(self) -> int:
        """Room in the cache that the branches of one session need, in tokens."""
        return self.config.max_branches * extra_tokens(self.model.backbone.block_size)

    def _stream_for(self, number: int, frame: Open) -> Stream:
        config, basis = self._stream_config(frame), self.model.output_basis
        if frame.num_beams > 1:
            options = BeamOptions(num_beams=frame.num_beams, length_penalty=frame.length_penalty)
            return BeamStream(number, frame.prompt_ids, config, options, basis)
        stream = CloudStream(number, frame.prompt_ids, frame.generated_ids.tolist(), config, basis)
        if self.config.max_branches == 1 or not may_branch(config):
            return stream
        most = self.engine.config.max_blocks
        num_tokens = len(frame.prompt_ids) + frame.max_new_tokens + self._branch_tokens
        if most is not None and self.engine.blocks_for(num_tokens) > most:
            return stream
        return BranchingStream(stream, self.config.max_branches)

    def _stream_config(self, frame: Open) -> StreamConfig:
        return StreamConfig(
            mode=frame.mode.name.lower(),
            schedule=frame.schedule.name.lower(),
            answer=frame.answer.name.lower(),
            top_k=max(1, min(frame.top_k, self.model.description.vocab_size)),
            window=min(frame.window, self.config.max_window),
            max_new_tokens=frame.max_new_tokens,
            sampling=Sampling(temperature=frame.temperature, top_p=frame.top_p, seed=frame.seed),
            stop_token_ids=self.model.description.stop_token_ids,
            gate=Gate.of_frame(frame),
            deadline_s=frame.deadline_ms / 1e3 if frame.deadline_ms else None,
            taps_from=frame.taps_from,
        )


class _Visit:
    """One connection of one device, with the sessions that run on it."""

    def __init__(self, service: CloudService, connection: Connection, owner: str) -> None:
        self.service = service
        self.connection = connection
        self.owner = owner
        config = service.config
        self.outbox = Outbox(connection, full_bytes=config.max_outbox_bytes, timeout_s=config.slow_reader_timeout_s)
        self.outbox.on_room = service.engine.wake
        self.sessions: dict[int, Session] = {}
        self._last_open: int | None = None

    async def serve(self) -> None:
        await self._greet()
        while True:
            frame = decode(await self.connection.receive(self.service.config.idle_timeout_s))
            if isinstance(frame, Open):
                self._open(frame)
            elif isinstance(frame, AssetRequest):
                await self._send(self.service.asset_chunk(frame))
            elif isinstance(frame, FeaturesRequest):
                await self._features(frame)
            else:
                session = self.sessions.get(frame.session)
                # A session that another connection has taken over hears no more from this one.
                if session is not None and session.is_for(self.outbox):
                    session.deliver(frame)

    def refuse(self, code: ErrorCode, reason: str, *, session: int = 0, retry_after_s: float | None = None) -> None:
        """Say why, as far as the connection still carries it."""
        self.service.note_refusal(code.name.lower())
        retry_after_ms = 0 if retry_after_s is None else max(1, round(1e3 * retry_after_s))
        self.outbox.put(encode(Error(session=session, pos=retry_after_ms, code=code, message=reason)))

    def leave(self) -> None:
        """The connection is over: its sessions wait for their device."""
        for session in self.sessions.values():
            if session.is_for(self.outbox):
                self.service.keep_for_a_while(session)

    async def _greet(self) -> None:
        frame = decode(await self.connection.receive(self.service.config.idle_timeout_s))
        if not isinstance(frame, Hello):
            raise FrameError(f"the first frame is a {type(frame).__name__}, expected a Hello")
        if frame.version != PROTOCOL_VERSION:
            raise RefusedError(
                ErrorCode.VERSION,
                f"the device speaks protocol {frame.version}, expected {PROTOCOL_VERSION}; "
                "install the same cotune version on both sides",
            )
        await self._send(Welcome(info=self.service.model.description.to_info()))

    def _open(self, frame: Open) -> None:
        # The epoch of an Open numbers the opens of a connection: the same number again is the same frame again.
        if frame.epoch == self._last_open:
            return
        self._last_open = frame.epoch
        session, frames = self.service.open_session(frame, self.owner)
        stream = session.stream
        self.sessions[stream.session] = session
        opened = Opened(session=stream.session, epoch=stream.epoch, pos=stream.num_confirmed, ticket=session.ticket)
        for one in (opened, *frames):
            self.outbox.put(encode(one))
        session.attach(self.outbox, self._over)

    def _over(self, session: Session, error: CotuneError | None) -> None:
        number = session.stream.session
        self.sessions.pop(number, None)
        if error is not None:
            self.refuse(ErrorCode.BAD_REQUEST, str(error), session=number)
        self.service.keep_for_a_while(session)

    async def _features(self, frame: FeaturesRequest) -> None:
        self.service.check_rate(self.owner)
        self.service.check_features_request(frame)
        features = await self.service.engine.features(frame.input_ids, frame.pos, frame.top_k)
        if not frame.want_hidden:
            features = replace(features, hidden=features.hidden[:, :0])
        for chunk in pack_features(features, first_target=frame.pos, session=frame.session):
            await self._send(chunk)

    async def _send(self, frame: Frame) -> None:
        """Send what is large or asked for once: the next request is read when there is room again."""
        self.outbox.put(encode(frame))
        if self.outbox.is_full:
            await self.outbox.flush()


def _heard_s(session: Session) -> float:
    return session.heard_s
