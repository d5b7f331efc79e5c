"""Beams in the service: what is refused, how much room they get, and who is hurt by a device that talks nonsense.

The stream itself is tested with its counterpart, in `tests/device/test_beam_stream.py`.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from toy import STOP, TAP_DIM, TAPS, ToyBackbone, toy_model, toy_personal
from virtual_beams import Pair
from virtual_network import toy_prompt

from cotune.cloud.beam_stream import BeamPlan
from cotune.cloud.engine import EngineConfig
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.device.beam_stream import BeamDeviceStream
from cotune.device.client import ClientConfig, CloudClient
from cotune.errors import FrameError, RefusedError, WireError
from cotune.generation.beam_cursors import BeamCursors
from cotune.generation.beam_reference import search
from cotune.generation.beams import BeamOptions
from cotune.generation.protocols import StepAbandonedError
from cotune.generation.request import GenerationRequest
from cotune.wire.frames import (
    AnswerCode,
    BeamCorrect,
    BeamStep,
    BeamTokens,
    Error,
    ErrorCode,
    Frame,
    Hello,
    ModeCode,
    Open,
    Opened,
    ScheduleCode,
    Welcome,
    decode,
    encode,
)
from cotune.wire.inprocess import connection_pair
from cotune.wire.outbox import Outbox
from cotune.wire.transport import Connection


def open_frame(**changes: Any) -> Open:
    fields: dict[str, Any] = {
        "mode": ModeCode.INTEGRATION,
        "schedule": ScheduleCode.BLOCKING,
        "answer": AnswerCode.CORRECTION,
        "prompt_ids": toy_prompt(1),
        "max_new_tokens": 8,
        "num_beams": 4,
    }
    return Open(**{**fields, **changes})


def device_of(seed: int, num_beams: int = 4) -> tuple[BeamDeviceStream, Any]:
    request = GenerationRequest(prompt_ids=toy_prompt(seed), max_new_tokens=8, stop_token_ids=(STOP,))
    options = BeamOptions(num_beams=num_beams)
    device = BeamDeviceStream(request, toy_personal(), options, tap_shape=(TAPS, TAP_DIM))
    return device, search(ToyBackbone(), toy_personal(), request, options)


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"schedule": ScheduleCode.OPTIMISTIC}, ErrorCode.BAD_REQUEST, "nothing to run ahead with"),
        ({"answer": AnswerCode.TOKEN}, ErrorCode.BAD_REQUEST, "use answer correction"),
        ({"mode": ModeCode.LADDER}, ErrorCode.BAD_REQUEST, "mode is ladder with beams"),
        ({"temperature": 0.5}, ErrorCode.BAD_REQUEST, "temperature is 0.5 with beams"),
        ({"deadline_ms": 5}, ErrorCode.BAD_REQUEST, "deadline_ms is 5 with beams"),
        ({"taps_from": 5}, ErrorCode.BAD_REQUEST, "taps_from is 5 with beams"),
        ({"mode": ModeCode.SPA}, ErrorCode.BAD_REQUEST, "needs a gate"),
        ({"max_new_tokens": 600}, ErrorCode.TOO_LARGE, "the context of toy"),
    ],
)
async def test_what_is_refused(changes: dict[str, Any], code: ErrorCode, message: str) -> None:
    service = CloudService(toy_model())
    with pytest.raises(RefusedError, match=message) as caught:
        service.open_session(open_frame(**changes))
    assert caught.value.code == code and not service.sessions
    service.close()


async def test_room_for_all_beams_is_set_aside() -> None:
    """Blocks of 4: 5 + 8 tokens are 4 blocks, of which the first is shared: 1 + 4 * 3."""
    service = CloudService(toy_model(), ServiceConfig(engine=EngineConfig(max_blocks=16)))
    assert service.engine.blocks_for(13) == 4
    session, _ = service.open_session(open_frame())
    assert service.engine.num_reserved_blocks == 13
    with pytest.raises(RefusedError, match="has 3 free blocks and this session needs 13"):
        session.attach(connection_outbox(), lambda *_: None)
        service.open_session(open_frame())
    with pytest.raises(RefusedError, match="13 tokens in 8 beams need 25 blocks"):
        service.open_session(open_frame(num_beams=8))
    service.close()
    assert service.engine.num_reserved_blocks == 0


def connection_outbox() -> Any:
    return Outbox(connection_pair()[1], full_bytes=1000, timeout_s=5)


async def test_a_wide_search_does_not_starve_in_a_small_batch() -> None:
    """Eight beams in a batch of three rows still go through, in passes of their own."""
    service = CloudService(toy_model(), ServiceConfig(engine=EngineConfig(max_batch_rows=3)))
    tasks: list[asyncio.Task[None]] = []

    async def connector() -> Connection:
        device, cloud = connection_pair()
        tasks.append(asyncio.create_task(service.handle(cloud)))
        return device

    pairs = [device_of(seed, num_beams) for seed, num_beams in ((1, 8), (2, 2), (3, 5))]

    async def run(device: BeamDeviceStream) -> None:
        async with CloudClient(connector) as client:
            await client.generate(device)

    await asyncio.gather(*(run(device) for device, _ in pairs))
    for device, expected in pairs:
        assert device.beams == expected.beams and device.decisions == expected.decisions
    assert service.engine.num_reserved_blocks == 0
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.close()


async def test_nonsense_ends_its_own_connection_only() -> None:
    service = CloudService(toy_model())
    tasks: list[asyncio.Task[None]] = []

    async def connector() -> Connection:
        device, cloud = connection_pair()
        tasks.append(asyncio.create_task(service.handle(cloud)))
        return device

    device, expected = device_of(1)
    bad = await connector()
    await bad.send(encode(Hello()))
    await bad.send(encode(open_frame(epoch=1)))
    seen: list[Frame] = []
    while not seen or not isinstance(seen[-1], BeamStep):
        seen.append(decode(await bad.receive(5)))
    assert [type(frame) for frame in seen] == [Welcome, Opened, BeamStep]
    step = seen[-1]
    wrong = BeamCorrect(
        session=step.session,
        pos=step.pos,
        beams=(0,),
        parents=(3,),
        codes=np.ones((1, 6), np.int8),
        scales=np.ones(1, np.float16),
    )
    await bad.send(encode(wrong))
    answer = decode(await bad.receive(5))
    assert isinstance(answer, Error) and answer.code is ErrorCode.BAD_FRAME
    assert "with parents (3,) came for position 5, expected beams (0,) with parents (0,)" in answer.message
    async with CloudClient(connector, ClientConfig(timeout_s=10)) as client:
        await client.generate(device)
    assert device.beams == expected.beams
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.close()


def test_places_of_another_search_are_left_alone() -> None:
    """A plan that meets a cache which was put out and begun again gives up, and the next one begins from the prompt."""
    backbone = ToyBackbone()
    places = BeamCursors(backbone.cursor(5))
    texts = (np.array([7]), np.array([8]))
    plan = BeamPlan(epoch=0, num_steps=3, truncate_to=7, parents=(1, 0), texts=texts, num_outputs=1)
    with pytest.raises(StepAbandonedError):
        plan.prepare(places)
    with pytest.raises(StepAbandonedError):  # the parents fit, the tokens do not
        BeamPlan(epoch=0, num_steps=3, truncate_to=7, parents=(0, 0), texts=texts, num_outputs=1).prepare(places)
    assert len(places.cursors) == 2
    again = BeamPlan(epoch=0, num_steps=3, truncate_to=0, parents=None, texts=(toy_prompt(1),), num_outputs=0)
    (work,) = again.prepare(places)
    assert places.cursors == [work.cursor] and places.num_branchings == 0 and work.cursor.length == 0


def test_a_pass_whose_outcome_was_dropped_is_done_again() -> None:
    """The device came back meanwhile: the same branching and the same tokens, read once."""
    backbone = ToyBackbone()
    pair = Pair(num_beams=3)
    pair.cloud.on_frame(pair.answer(pair.step()), 0.0)
    assert pair.places is not None
    dropped = pair.cloud.plan(backbone.prompt_chunk)
    before = backbone.extend(dropped.prepare(pair.places))
    pair.cloud.resume([], 0, 0.0)
    assert pair.cloud.on_step(dropped, [one for (one,) in before], 0.01, 0.0) == []
    assert pair.cloud.counters.num_wasted_steps == 1
    again = pair.cloud.plan(backbone.prompt_chunk)
    after = backbone.extend(again.prepare(pair.places))
    assert [one.logits.tolist() for (one,) in after] == [one.logits.tolist() for (one,) in before]
    assert [cursor.length for cursor in pair.places.cursors] == [6] * 3


def test_random_frames_raise_nothing_but_wire_errors() -> None:
    """Beam frames with random fields, into both state machines in the middle of a search."""
    rng = random.Random(5)
    num_refused = 0
    for seed in range(60):
        pair = Pair(num_beams=3)
        for _ in range(seed % 3):
            pair.cloud.on_frame(pair.answer(pair.step()), 0.0)
        step = pair.step()
        for _ in range(20):
            frame = _random_frame(rng, step.pos)
            try:
                pair.cloud.on_frame(frame, 0.0)
            except FrameError:
                num_refused += 1
            try:
                pair.device.on_frame(frame)
            except WireError:
                num_refused += 1
    assert num_refused > 200


def _random_frame(rng: random.Random, pos: int) -> Frame:
    n = rng.randint(1, 4)
    where = {"session": 7, "epoch": rng.choice([0, 0, 0, 1]), "pos": pos + rng.choice([-1, 0, 0, 1])}
    ids = tuple(rng.randrange(8) for _ in range(n))
    kind = rng.randrange(3)
    if kind == 0:
        consult = tuple(rng.random() < 0.5 for _ in range(n))
        size = rng.choice([3, TAPS * (TAP_DIM + 2)])
        return BeamStep(
            **where,
            parents=tuple(rng.choice([0, 0, 0, 1, 7]) for _ in range(n)),
            tokens=tuple(rng.choice([0, 5, 96, 97, 2**31]) for _ in range(n)),
            consult=consult,
            taps=tuple(rng.randbytes(size) for _ in range(sum(consult))),
        )
    if kind == 1:
        beams = tuple(sorted(set(ids)))
        return BeamCorrect(
            **where,
            beams=beams,
            parents=tuple(rng.choice([0, 0, 1]) for _ in beams),
            codes=np.full((len(beams), rng.choice([5, 6])), rng.randint(-127, 127), np.int8),
            scales=np.full(len(beams), rng.choice([0.0, 1.0, 60000.0]), np.float16),
        )
    return BeamTokens(
        **{**where, "pos": 5},
        rank=rng.randrange(2),
        num_texts=2,
        score=-1.0,
        log_prob=-1.0,
        tokens=np.array(ids) + rng.choice([0, 95]),
        base_tokens=np.array(ids),
        consulted=np.ones(n, np.bool_),
    )
