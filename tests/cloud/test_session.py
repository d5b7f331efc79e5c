"""One session between connections: its ticket, its cache, its end, and what happens when the model fails."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from toy import STOP, ToyBackbone, ToyCursor, toy_basis, toy_model
from virtual_network import toy_prompt

from cotune.cloud.engine import Engine
from cotune.cloud.session import Session
from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.errors import CotuneError, InputError, WireTimeoutError
from cotune.generation.protocols import StepFeatures
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import Ack, End, EndReason, Frame, Step, decode
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection

NUM_TOKENS = 10
REQUEST = GenerationRequest(prompt_ids=toy_prompt(1), max_new_tokens=NUM_TOKENS, stop_token_ids=(STOP,))


class LoggingBackbone(ToyBackbone):
    """Remembers how many tokens each forward pass read; may fail."""

    def __init__(self) -> None:
        self.passes: list[int] = []
        self.failure: Exception | None = None

    def cursor(self) -> ToyCursor:
        backbone = self

        class LoggingCursor(ToyCursor):
            def extend(self, token_ids: NDArray[np.int64], is_wanted: Callable[[], bool] | None = None) -> StepFeatures:
                backbone.passes.append(len(token_ids))
                if backbone.failure is not None:
                    raise backbone.failure
                return super().extend(token_ids)

        return LoggingCursor()


@pytest.fixture
def backbone() -> LoggingBackbone:
    return LoggingBackbone()


@pytest.fixture
async def engine(backbone: LoggingBackbone) -> AsyncIterator[Engine]:
    model = toy_model()
    object.__setattr__(model, "backbone", backbone)
    engine = Engine(model)
    yield engine
    engine.close()


def new_session(engine: Engine, *, idle_timeout_s: float = 60.0, schedule: str = "blocking") -> Session:
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
    stream = CloudStream(7, REQUEST.prompt_ids, [], config, toy_basis())
    return Session(stream, engine, idle_timeout_s=idle_timeout_s)


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
        await session.deliver(Ack(session=7, epoch=step.epoch, pos=step.pos + 1))
    return tokens


def base_tokens() -> list[int]:
    return generate(ToyBackbone(), None, REQUEST).token_ids


async def test_it_runs_to_its_end_and_says_so_once(engine: Engine) -> None:
    session, ended = new_session(engine), Ended()
    device, cloud = connection_pair()
    session.attach(cloud, ended)
    assert session.is_on(cloud) and not session.is_on(device)
    expected = base_tokens()
    assert await confirm(session, device, len(expected)) == expected
    end = await next_frame(device)
    assert isinstance(end, End) and end.reason is EndReason.LENGTH
    await asyncio.wait_for(ended.event.wait(), 5)
    assert ended.errors == [None]


async def test_the_cache_outlives_the_connection(engine: Engine, backbone: LoggingBackbone) -> None:
    session, ended = new_session(engine), Ended()
    expected = base_tokens()
    device, cloud = connection_pair()
    session.attach(cloud, ended)
    first = await confirm(session, device, 4)
    session.detach()
    assert not session.is_on(cloud)
    await cloud.close()

    device, cloud = connection_pair()
    replies = session.stream.resume(first, 0.0)
    session.attach(cloud, ended)
    await session.send(replies)
    assert first + await confirm(session, device, len(expected) - 4) == expected
    await asyncio.wait_for(ended.event.wait(), 5)
    # The prompt was read once; after the cut only the last token was read again, for its features.
    assert backbone.passes[0] == len(REQUEST.prompt_ids)
    assert set(backbone.passes[1:]) == {1}


async def test_a_connection_that_takes_over_is_the_only_one(engine: Engine) -> None:
    session, ended = new_session(engine), Ended()
    old_device, old = connection_pair()
    session.attach(old, ended)
    first = await confirm(session, old_device, 2)
    device, cloud = connection_pair()
    session.stream.resume(first, 0.0)
    session.attach(cloud, ended)
    assert len(await confirm(session, device, 3)) == 3
    assert session.is_on(cloud) and not session.is_on(old)
    # What the old one still holds came before the change.
    stale = []
    with contextlib.suppress(WireTimeoutError):
        while True:
            stale.append(decode(await old_device.receive(0.01)))
    assert all(frame.pos <= len(REQUEST.prompt_ids) + 2 for frame in stale)
    session.detach()


async def test_nothing_is_sent_where_nobody_is(engine: Engine) -> None:
    session = new_session(engine)
    await session.send([Ack(session=7, pos=1)])
    device, cloud = connection_pair()
    session.attach(cloud, Ended())
    session.detach()
    await session.send([Ack(session=7, pos=1)])
    with pytest.raises(WireTimeoutError):
        await device.receive(0.05)


async def test_a_device_that_never_answers_is_cancelled(engine: Engine) -> None:
    session, ended = new_session(engine, idle_timeout_s=0.05), Ended()
    device, cloud = connection_pair()
    session.attach(cloud, ended)
    assert isinstance(await next_frame(device), Step)
    end = await next_frame(device)
    assert isinstance(end, End) and end.reason is EndReason.CANCELLED
    await asyncio.wait_for(ended.event.wait(), 5)
    assert ended.errors == [None]


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
    backbone.failure = failure
    session, ended = new_session(engine), Ended()
    _, cloud = connection_pair()
    session.attach(cloud, ended)
    await asyncio.wait_for(ended.event.wait(), 5)
    assert [str(error) for error in ended.errors] == [words]
    # Details are for the cloud's own log.
    assert ("secret details" in caplog.text) == isinstance(failure, RuntimeError)
    backbone.failure = None
    other, fine = new_session(engine), Ended()
    device, cloud = connection_pair()
    other.attach(cloud, fine)
    assert len(await confirm(other, device, 3)) == 3
    other.detach()


async def test_tickets_are_secret_and_each_opens_one(engine: Engine) -> None:
    sessions = [new_session(engine) for _ in range(3)]
    for mine in sessions:
        assert [mine.admits(other.ticket) for other in sessions] == [mine is other for other in sessions]
        assert not mine.admits(bytes(16)) and not mine.admits(b"") and not mine.admits(mine.ticket[:-1])


async def test_a_step_that_was_dropped_leaves_no_trace(engine: Engine) -> None:
    """The cache may hold more than the plan says: a cancelled step did run. The plan is the truth."""
    session = new_session(engine, schedule="optimistic")
    cursor = engine.model.backbone.cursor()
    plan = session.stream.plan()
    clean, _ = await engine.step(cursor, plan, lambda: True)
    cursor.extend(np.array([9, 9]))
    again, _ = await engine.step(cursor, plan, lambda: True)
    assert clean is not None and again is not None
    assert np.array_equal(clean.logits, again.logits)


async def test_a_step_that_nobody_wants_is_not_begun(engine: Engine) -> None:
    session = new_session(engine, schedule="optimistic")
    cursor = engine.model.backbone.cursor()
    features, seconds = await engine.step(cursor, session.stream.plan(), lambda: False)
    assert features is None and seconds == 0.0
    assert cursor.length == 0
