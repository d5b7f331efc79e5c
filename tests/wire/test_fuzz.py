"""Noise against everything that reads frames; longer with `pytest tests/wire/test_fuzz.py --fuzz-seconds 600`.

Frames that are random, mutated, cut, glued together or merely senseless go into the decoder, into both state machines
and into a running service. Nothing but the errors that are meant for it may come out, and a device that behaves gets
its text meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import time

import numpy as np
import pytest
from toy import STOP, TAP_DIM, TAPS, ToyBackbone, toy_basis, toy_model, toy_personal
from virtual_network import toy_prompt

from cotune.cloud.service import CloudService
from cotune.cloud.stream import CloudStream, StreamConfig
from cotune.device.client import CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, CotuneError, FrameError, InputError
from cotune.generation.protocols import RowWork
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.wire.frames import LAYOUTS, Frame, Hello, decode, encode
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection


@pytest.fixture
def ends_s(request: pytest.FixtureRequest) -> float:
    return time.monotonic() + float(request.config.getoption("--fuzz-seconds")) / 3


class Noise:
    """An endless supply of bytes that look more or less like frames."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.known: list[bytes] = [encode(Hello())]

    def next(self) -> bytes:
        rng = self.rng
        kind = rng.randrange(5)
        if kind == 0:
            return rng.randbytes(rng.randrange(80))
        if kind == 1:  # a header that is right, and a payload that may be
            number = rng.choice(list(LAYOUTS))
            head = bytes([number, rng.choice([0, 1, 2, 3, 7, 15])]) + rng.randbytes(2)
            small = b"".join(rng.choice([0, 1, 2, 7, 2**31]).to_bytes(4, "little") for _ in range(3))
            return head + small + rng.randbytes(rng.choice([0, 0, 2, 5, 16, 88, 120]))
        data = bytearray(rng.choice(self.known))
        if kind == 2:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
        elif kind == 3:
            del data[rng.randrange(len(data)) :]
        else:
            data += rng.choice(self.known)[: rng.randrange(40)]
        return bytes(data)

    def frames(self, num: int) -> list[Frame]:
        """What of the noise is a frame."""
        found: list[Frame] = []
        while len(found) < num:
            try:
                found.append(decode(self.next()))
            except FrameError:
                continue
        return found


def test_the_decoder_knows_one_error(ends_s: float) -> None:
    noise, num, kinds = Noise(1), 0, set[type[Frame]]()
    while time.monotonic() < ends_s or num < 500:
        data = noise.next()
        num += 1
        try:
            frame = decode(data)
        except FrameError:
            continue
        assert encode(frame)
        kinds.add(type(frame))
        if len(noise.known) < 400:
            noise.known.append(data)
    assert len(kinds) >= 10


@pytest.mark.parametrize("answer", ["token", "correction"])
def test_both_state_machines_survive_any_frame(answer: str, ends_s: float) -> None:
    noise, backbone, num = Noise(2), ToyBackbone(), 0
    while time.monotonic() < ends_s or num < 20:
        num += 1
        schedule = noise.rng.choice(["blocking", "optimistic", "drafted", "auto"])
        config = StreamConfig(
            mode="integration",
            schedule=schedule,
            answer=answer,
            top_k=4,
            window=6,
            max_new_tokens=12,
            sampling=Sampling(),
            stop_token_ids=(STOP,),
            gate=None,
        )
        cloud = CloudStream(7, toy_prompt(num), [], config, toy_basis())
        device = DeviceStream(
            GenerationRequest(prompt_ids=toy_prompt(num), max_new_tokens=12, stop_token_ids=(STOP,)),
            toy_personal(),
            tap_shape=(TAPS, TAP_DIM),
            schedule=schedule,
            answer=answer,
        )
        device.open_frame()
        cursor = backbone.cursor()
        for step, frame in enumerate(noise.frames(40)):
            # Half of the noise is about this very session, epoch and place.
            if noise.rng.random() < 0.5:
                place = {"session": 7, "epoch": cloud.epoch, "pos": cloud.num_confirmed + noise.rng.randrange(-1, 3)}
                place["pos"] = max(0, place["pos"])
                for name, value in place.items():
                    object.__setattr__(frame, name, value)
            cloud.on_frame(frame, float(step))
            try:
                device.on_frame(frame)
            except CotuneError:
                break
            if cloud.wants_step():
                plan = cloud.plan(backbone.prompt_chunk)
                if cursor.length > plan.truncate_to:
                    cursor.truncate(plan.truncate_to)
                work = RowWork(cursor=cursor, token_ids=plan.token_ids, num_outputs=plan.num_outputs)
                cloud.on_step(plan, backbone.extend([work])[0], 0.01, float(step))
            assert cloud.num_confirmed <= cloud.num_decoded <= len(cloud.tokens)
            assert cloud.num_cached < len(cloud.tokens) or cloud.ended is not None or len(cloud.tokens) == 5


async def test_a_service_serves_others_meanwhile(ends_s: float) -> None:
    service, noise = CloudService(toy_model()), Noise(3)
    tasks: set[asyncio.Task[None]] = set()
    request = GenerationRequest(prompt_ids=toy_prompt(1), max_new_tokens=10, stop_token_ids=(STOP,))
    expected = generate(ToyBackbone(), toy_personal(0.3), request).token_ids

    async def connector() -> Connection:
        device, cloud = connection_pair()
        task = asyncio.create_task(service.handle(cloud))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return device

    num = 0
    try:
        while time.monotonic() < ends_s or num < 20:
            num += 1
            vandal = await connector()
            try:
                if noise.rng.random() < 0.8:
                    await vandal.send(encode(Hello()))
                for _ in range(noise.rng.randint(1, 20)):
                    await vandal.send(noise.next())
            except (ConnectionLostError, InputError):
                pass
            if num % 10 == 0:
                async with CloudClient(connector) as client:
                    stream = DeviceStream(request, toy_personal(0.3), tap_shape=(TAPS, TAP_DIM))
                    await client.generate(stream)
                assert stream.token_ids == expected
            await asyncio.sleep(0)
            await vandal.close()
        while tasks:
            await asyncio.wait(tasks, timeout=10)
    finally:
        for task in tasks:
            task.cancel()
        service.close()
    assert service.sessions == {}
    assert service.engine.num_reserved_blocks == 0
    assert np.isfinite(service.engine.counters.busy_s)
