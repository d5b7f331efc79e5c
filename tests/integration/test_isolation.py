"""Many devices on one cloud: each gets its own text, whatever happens to the others and to itself."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from clouds import restartable
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import ServiceConfig
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError
from cotune.generation.reference import Generation, Personal, generate
from cotune.generation.request import ANSWERS, GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.models.backbone import Backbone
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

STUBBORN = ClientConfig(timeout_s=60, first_backoff_s=0.01, max_backoff_s=0.3, max_attempts=400)
SCHEDULES = ("optimistic", "gated", "blocking", "auto")


@dataclass(frozen=True)
class Person:
    """One device with its plugin, what it asks, and what the reference says."""

    personal: Personal
    request: GenerationRequest
    expected: Generation
    schedule: str
    answer: str

    @classmethod
    def make(cls, backbone: Backbone, seed: int, num_tokens: int, ratio: float) -> Person:
        rng = np.random.default_rng(seed)
        mode = ("integration", "spa")[seed % 2]
        request = GenerationRequest(
            prompt_ids=rng.integers(2, backbone.spec.vocab_size, 3 + seed % 40),
            mode=mode,
            max_new_tokens=num_tokens,
            sampling=Sampling() if seed % 3 else Sampling(temperature=0.8, seed=seed),
        )
        personal = device_for(random_plugin(backbone, ratio, seed)).personal
        expected = generate(backbone, personal, request)
        return cls(personal, request, expected, SCHEDULES[seed % 4], ANSWERS[seed // 4 % 2])

    def stream(self, backbone: Backbone) -> DeviceStream:
        shape = backbone.description.num_taps, backbone.description.tap_dim
        return DeviceStream(
            self.request, self.personal, tap_shape=shape, schedule=self.schedule, answer=self.answer, window=16
        )


async def test_64_sessions_under_cuts_and_rollbacks_each_get_their_own_text() -> None:
    backbone = tiny_backbone("llama")
    hosted = HostedModel.of(backbone)
    object.__setattr__(hosted, "description", _without_stop_tokens(hosted))
    people = [Person.make(backbone, seed, 16, ratio=1.0) for seed in range(64)]
    assert len({tuple(person.expected.token_ids) for person in people}) > 60
    changed = sum(decision.changed for person in people for decision in person.expected.decisions)
    assert changed > 100  # rollbacks happen
    num_cuts = 0

    async with restartable(hosted, ServiceConfig(max_branches=3)) as cloud:

        async def run(seed: int, person: Person) -> list[int]:
            nonlocal num_cuts
            rng = random.Random(seed)

            async def connector() -> Connection:
                profile = NetworkProfile(
                    delay_ms=2.0,
                    jitter_ms=2.0,
                    duplicate_probability=0.1,
                    disconnect_every_frames=rng.randint(20, 60),
                )
                return EmulatedConnection(await cloud.connect(), profile, seed=rng.getrandbits(32))

            async with CloudClient(connector, STUBBORN) as client:
                stream = person.stream(backbone)
                await client.generate(stream)
                num_cuts += client.num_reconnects
                return stream.token_ids

        texts = await asyncio.gather(*(run(seed, person) for seed, person in enumerate(people)))
    for person, token_ids in zip(people, texts, strict=True):
        assert token_ids == person.expected.token_ids
    assert num_cuts > 30


def _without_stop_tokens(hosted: HostedModel) -> object:
    from dataclasses import replace

    return replace(hosted.description, stop_token_ids=())


async def test_a_ticket_opens_its_own_session_only() -> None:
    """A stolen session number with another ticket, or a ticket with another number, starts from nothing."""
    backbone = tiny_backbone("llama")
    mine, other = (Person.make(backbone, seed, 12, ratio=1.0) for seed in (1, 2))
    async with restartable(HostedModel.of(backbone)) as cloud:
        tickets: dict[int, bytes] = {}

        async def begin(person: Person) -> DeviceStream:
            stream = person.stream(backbone)
            async with CloudClient(cloud.connect) as client:
                # Cut after the first tokens: the session stays on the cloud.
                def stop(_: object) -> None:
                    if len(stream.decisions) >= 3:
                        raise ConnectionLostError("cut by the test")

                with pytest.raises(ConnectionLostError):
                    await client._run(stream, stop)
            tickets[stream.session] = stream.open_frame().ticket
            return stream

        first, second = await begin(mine), await begin(other)
        assert len(set(tickets.values())) == 2
        # The second device tries the first one's session number with its own ticket.
        before = second.session
        second.session = first.session
        async with CloudClient(cloud.connect) as client:
            await client.generate(second)
        assert second.session not in (first.session, before)
        assert second.token_ids == other.expected.token_ids
        async with CloudClient(cloud.connect) as client:
            await client.generate(first)
        assert first.token_ids == mine.expected.token_ids


@contextmanager
def cloud_process(port: int, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    arguments = [sys.executable, "-m", "cotune", "cloud", "starter", "--port", str(port), "--threads", "1", "--json"]
    with log.open("ab") as file:
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=file)
    try:
        yield process
    finally:
        process.kill()
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def test_a_killed_cloud_loses_no_text(starter: Backbone, tmp_path: Path) -> None:
    """SIGKILL during 8 generations, a new cloud in its place: all 8 texts are those of an undisturbed run."""
    people = [Person.make(starter, seed, 32, ratio=1.5) for seed in range(8)]
    # An end token would end a text early; what is expected ends there too.
    stops = starter.spec.eos_token_ids
    port = free_port()
    log = tmp_path / "cloud.log"
    under_way = asyncio.Event()

    async def run(person: Person) -> DeviceStream:
        stream = person.stream(starter)

        def watch(_: object) -> None:
            if len(stream.decisions) >= 6:
                under_way.set()

        async def connector() -> Connection:
            profile = NetworkProfile(delay_ms=5.0)
            return EmulatedConnection(await connect(f"ws://127.0.0.1:{port}"), profile)

        async with CloudClient(connector, STUBBORN) as client:
            await client.generate(stream, watch)
        return stream

    def expected(person: Person) -> list[int]:
        token_ids = person.expected.token_ids
        ends = [i for i, token in enumerate(token_ids) if token in stops]
        return token_ids[: ends[0] + 1] if ends else token_ids

    loop = asyncio.get_running_loop()
    with cloud_process(port, log) as first:
        assert first.stdout is not None
        assert await asyncio.wait_for(loop.run_in_executor(None, first.stdout.readline), 120)
        for person in people:
            object.__setattr__(person.request, "stop_token_ids", stops)
        tasks = [asyncio.create_task(run(person)) for person in people]
        await asyncio.wait_for(under_way.wait(), 60)
        os.kill(first.pid, signal.SIGKILL)
        first.wait(30)
        num_done = sum(task.done() for task in tasks)
        started_s = time.monotonic()
        with cloud_process(port, log) as second:
            assert second.stdout is not None
            streams = await asyncio.wait_for(asyncio.gather(*tasks), 120)
    assert num_done < 8
    assert time.monotonic() - started_s < 120
    for person, stream in zip(people, streams, strict=True):
        assert stream.token_ids == expected(person)
