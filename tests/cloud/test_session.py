"""One session between connections: its ticket, its cache, its end, and what happens when the model fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import pytest
from toy import STOP, ToyBackbone, toy_basis, toy_model
from virtual_network import toy_prompt

from cotune.cloud.engine import Engine, EngineConfig
from cotune.cloud.session import Session
from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.errors import CotuneError, InputError, WireTimeoutError
from cotune.generation.protocols import RowWork, StepFeatures
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import Ack, End, EndReason, Frame, Step, decode
from cotune.wire.inprocess import connection_pair
from cotune.wire.outbox import Outbox
from cotune.wire.transport import Connection

NUM_TOKENS = 10
REQUEST = GenerationRequest(prompt_ids=toy_prompt(1), max_new_tokens=NUM_TOKENS, stop_token_ids=(STOP,))


class LoggingBackbone(ToyBackbone):
    """Remembers how many tokens of each sequence every pass read; may fail."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        self.failure: Exception | None = None
        self.fails_at: int | None = None

    def extend(self, work: Sequence[RowWork], is_wanted: Callable[[], bool] | None = None) -> list[list[StepFeatures]]:
        self.passes.append([len(item.token_ids) for item in work])
        if self.failure is not None and (self.fails_at is None or any(self.fails_at in w.token_ids for w in work)):
            raise self.failure
        return super().extend(work)


@pytest.fixture
def backbone() -> LoggingBackbone:
    return LoggingBackbone()


@pytest.fixture
async def engine(backbone: LoggingBackbone) -> AsyncIterator[Engine]:
    engine = engine_of(backbone)
    yield engine
    engine.close()


def engine_of(backbone: ToyBackbone, **limits: int) -> Engine:
    model = toy_model()
    object.__setattr__(model, "backbone", backbone)
    return Engine(model, EngineConfig(**limits))


def new_session(engine: Engine, *, schedule: str = "blocking", seed: int = 1) -> Session:
    config = StreamConfig(
        mode="integration",
        schedule=schedule,
        answer="token",
        top_k=4,
        window=4,
        max_new_tokens=NUM_TOKENS,
        sampling=Sampling(),
        stop_token_ids=(STOP,),
        gate=None,
    )
    return Session(CloudStream(7, toy_prompt(seed), [], config, toy_basis()), engine)


def pair() -> tuple[Connection, Outbox]:
    """A device's end, and the outbox on the cloud's."""
    device, cloud = connection_pair()
    return device, Outbox(cloud)


class Ended:
    """Takes what a session says when it is over."""

    def __init__(self) -> None:
        self.errors: list[CotuneError | None] = []
        self.event = asyncio.Event()

    def __call__(self, session: Session, error: CotuneError | None) -> None:
        self.errors.append(error)
        self.event.set()


async def next_frame(device: Connection) -> Frame:
    return decode(await device.receive(5))


async def confirm(session: Session, device: Connection, num: int) -> list[int]:
    """Answer `num` steps with an acknowledgement each; the base tokens."""
    tokens = []
    for _ in range(num):
        step = await next_frame(device)
        assert isinstance(step, Step)
        tokens.append(step.base_token)
        session.deliver(Ack(session=7, epoch=step.epoch, pos=step.pos + 1))
    return tokens


def base_tokens() -> list[int]:
    return generate(ToyBackbone(), None, REQUEST).token_ids


async def test_it_runs_to_its_end_and_says_so_once(engine: Engine) -> None:
    session, ended = new_session(engine), Ended()
    device, outbox = pair()
    session.attach(outbox, ended)
    assert session.is_for(outbox) and session.is_attached
    expected = base_tokens()
    assert await confirm(session, device, len(expected)) == expected
    end = await next_frame(device)
    assert isinstance(end, End) and end.reason is EndReason.LENGTH
    await asyncio.wait_for(ended.event.wait(), 5)
    assert ended.errors == [None]
    assert engine.num_rows == 0
    assert session.place.cursor is None


async def test_the_cache_outlives_the_connection(engine: Engine, backbone: LoggingBackbone) -> None:
    session, ended = new_session(engine), Ended()
    expected = base_tokens()
    device, outbox = pair()
    session.attach(outbox, ended)
    first = await confirm(session, device, 4)
    session.detach()
    assert not session.is_attached
    await outbox.close()

    device, outbox = pair()
    replies = session.stream.resume(first, 0, 0.0)
    session.attach(outbox, ended)
    session.send(replies)
    assert first + await confirm(session, device, len(expected) - 4) == expected
    await asyncio.wait_for(ended.event.wait(), 5)
    # The prompt was read once; after the cut only the last token was read again, for its features.
    assert backbone.passes[0] == [len(REQUEST.prompt_ids)]
    assert all(one == [1] for one in backbone.passes[1:])


async def test_a_cache_that_was_put_out_is_computed_again(engine: Engine, backbone: LoggingBackbone) -> None:
    session, ended = new_session(engine), Ended()
    expected = base_tokens()
    device, outbox = pair()
    assert engine.reserve(session, 15)
    session.attach(outbox, ended)
    first = await confirm(session, device, 4)
    session.detach()
    engine.put_out(session)
    assert (engine.num_reserved_blocks, session.place.cursor) == (0, None)
    device, outbox = pair()
    session.stream.resume(first, 0, 0.0)
    session.attach(outbox, ended)
    assert first + await confirm(session, device, len(expected) - 4) == expected
    # The prompt, then what came after it in one pass.
    assert [5] in backbone.passes[1:] and [4] in backbone.passes


async def test_a_connection_that_takes_over_is_the_only_one(engine: Engine) -> None:
    session, ended = new_session(engine), Ended()
    old_device, old = pair()
    session.attach(old, ended)
    first = await confirm(session, old_device, 2)
    device, outbox = pair()
    session.stream.resume(first, 0, 0.0)
    session.attach(outbox, ended)
    assert len(await confirm(session, device, 3)) == 3
    assert session.is_for(outbox) and not session.is_for(old)
    # What the old one still holds came before the change.
    stale = []
    with contextlib.suppress(WireTimeoutError):
        while True:
            stale.append(decode(await old_device.receive(0.01)))
    assert all(frame.pos <= len(REQUEST.prompt_ids) + 2 for frame in stale)
    session.detach()


async def test_nothing_is_sent_where_nobody_is(engine: Engine) -> None:
    session = new_session(engine)
    session.send([Ack(session=7, pos=1)])
    device, outbox = pair()
    session.attach(outbox, Ended())
    session.detach()
    session.send([Ack(session=7, pos=1)])
    with pytest.raises(WireTimeoutError):
        await device.receive(0.05)


async def test_a_reader_who_cannot_keep_up_is_not_computed_for(engine: Engine, backbone: LoggingBackbone) -> None:
    session = new_session(engine, schedule="optimistic")
    device, cloud = connection_pair()
    outbox = Outbox(cloud, full_bytes=1)
    outbox.on_room = engine.wake
    session.attach(outbox, Ended())
    # Full from the moment that the first step waits in it, until that is taken off its hands.
    assert isinstance(await next_frame(device), Step)
    assert isinstance(await next_frame(device), Step)
    session.detach()
    outbox.put(b"x")
    assert session.is_blocked


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (InputError("the sequence would have 513 tokens"), "the sequence would have 513 tokens"),
        (RuntimeError("CUDA error: secret details"), "the cloud failed in this session; its log says why, try again"),
    ],
)
async def test_a_model_that_fails_ends_the_session_alone(
    engine: Engine,
    backbone: LoggingBackbone,
    failure: Exception,
    words: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bad, good = new_session(engine, seed=1), new_session(engine, seed=2)
    backbone.failure, backbone.fails_at = failure, int(bad.stream.tokens[0])
    assert backbone.fails_at not in good.stream.tokens
    spoiled, fine = Ended(), Ended()
    device, outbox = pair()
    bad.attach(pair()[1], spoiled)
    good.attach(outbox, fine)
    await asyncio.wait_for(spoiled.event.wait(), 5)
    assert [str(error) for error in spoiled.errors] == [words]
    # Details are for the cloud's own log.
    assert ("secret details" in caplog.text) == isinstance(failure, RuntimeError)
    backbone.failure = None
    assert len(await confirm(good, device, 3)) == 3
    assert fine.errors == []
    good.detach()


async def test_tickets_are_secret_and_each_opens_one(engine: Engine) -> None:
    sessions = [new_session(engine) for _ in range(3)]
    for mine in sessions:
        assert [mine.admits(other.ticket) for other in sessions] == [mine is other for other in sessions]
        assert not mine.admits(bytes(16)) and not mine.admits(b"") and not mine.admits(mine.ticket[:-1])
