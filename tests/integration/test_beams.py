"""Beam search between a device and a cloud on real backbones and sockets: the reference's texts, no lost memory."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np
import pytest
from clouds import RestartableCloud, fronted, restartable
from tiny_models import device_for, random_plugin, tiny_backbone

from cotune.cloud.engine import EngineConfig
from cotune.cloud.hosted import HostedModel
from cotune.cloud.service import CloudService, ServiceConfig
from cotune.device.beam_stream import BeamDeviceStream
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError
from cotune.generation.beam_reference import BeamGeneration, search
from cotune.generation.beams import BeamOptions
from cotune.generation.reference import Personal, generate
from cotune.generation.request import GenerationRequest
from cotune.models.backbone import Backbone
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.frames import EndReason, Frame, Opened
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration

EAGER = ClientConfig(timeout_s=20, first_backoff_s=0.002, max_backoff_s=0.05, max_attempts=2000)


@dataclass(frozen=True)
class Case:
    """One search, and what the reference says about it."""

    request: GenerationRequest
    personal: Personal
    options: BeamOptions
    expected: BeamGeneration

    @classmethod
    def make(cls, backbone: Backbone, seed: int, mode: str = "spa", num_tokens: int = 12) -> Case:
        personal = device_for(random_plugin(backbone, 1.0, seed)).personal
        request = GenerationRequest(
            prompt_ids=np.random.default_rng(seed).integers(2, backbone.spec.vocab_size, 3 + 9 * (seed % 8)),
            mode=mode,
            max_new_tokens=num_tokens,
            stop_token_ids=backbone.spec.eos_token_ids,
        )
        options = BeamOptions(num_beams=2 + seed % 7, length_penalty=(0.0, 1.0, 2.0)[seed % 3])
        return cls(request, personal, options, search(backbone, personal, request, options))

    def stream(self, backbone: Backbone, schedule: str = "blocking") -> BeamDeviceStream:
        shape = backbone.description.num_taps, backbone.description.tap_dim
        return BeamDeviceStream(self.request, self.personal, self.options, tap_shape=shape, schedule=schedule)

    def check(self, stream: BeamDeviceStream) -> None:
        assert stream.decisions == self.expected.decisions and stream.ending == self.expected.ending
        assert stream.beams == self.expected.beams
        assert stream.counters == self.expected.counters


async def emptied(service: CloudService, backbone: Backbone) -> int:
    """Blocks in use once the engine's thread has done what it was told."""
    await service.engine.run(lambda: None)
    return backbone.kv_pool.num_used


async def test_every_mode_and_schedule_on_one_connection(backbone: Backbone) -> None:
    cases = [Case.make(backbone, seed, mode) for seed, mode in enumerate(("integration", "spa", "integration", "spa"))]
    assert backbone.kv_pool.num_used == 0
    service = CloudService(HostedModel.of(backbone))
    async with fronted(service) as url, CloudClient(lambda: connect(url)) as client:
        for number, case in enumerate(cases):
            stream = case.stream(backbone, ("blocking", "gated")[number // 2])
            await client.generate(stream)
            case.check(stream)
            assert await emptied(service, backbone) == 0
            assert service.engine.num_reserved_blocks == 0


async def test_beams_and_others_in_one_batch_under_cuts_and_delays() -> None:
    """Nine searches and three plain generations at once, with more sequences than rows in the batch."""
    backbone = tiny_backbone("llama")
    cases = [Case.make(backbone, seed, ("spa", "integration")[seed % 2]) for seed in range(9)]
    plain = [generate(backbone, case.personal, case.request) for case in cases[:3]]
    shape = backbone.description.num_taps, backbone.description.tap_dim
    service = CloudService(HostedModel.of(backbone), ServiceConfig(engine=EngineConfig(max_batch_rows=11)))
    async with fronted(service) as url:
        num_cuts = 0

        async def run(number: int, stream: BeamDeviceStream | DeviceStream) -> None:
            nonlocal num_cuts
            made: list[Connection] = []

            async def connector() -> Connection:
                cut = 12 + number if number % 3 else None
                profile = NetworkProfile(
                    delay_ms=1.0, jitter_ms=1.0, duplicate_probability=0.1, disconnect_every_frames=cut
                )
                made.append(EmulatedConnection(await connect(url), profile, seed=100 * number + len(made)))
                return made[-1]

            async with CloudClient(connector, EAGER) as client:
                await client.generate(stream)
            num_cuts += len(made) - 1

        searches = [case.stream(backbone) for case in cases]
        others = [DeviceStream(case.request, case.personal, tap_shape=shape) for case in cases[:3]]
        await asyncio.gather(*(run(number, stream) for number, stream in enumerate([*searches, *others])))
        for case, stream in zip(cases, searches, strict=True):
            case.check(stream)
        assert [other.decisions for other in others] == [generation.decisions for generation in plain]
        assert num_cuts > 5
        # What was computed for devices that were cut off is kept for them for a while, all else is free.
        for session in list(service.sessions):
            service._drop(session)
        assert await emptied(service, backbone) == 0 and service.engine.num_reserved_blocks == 0


async def test_a_cloud_that_lost_the_search_starts_it_again() -> None:
    """The service is restarted in the middle of the search; ticket, beams and cache are gone."""
    backbone = tiny_backbone("gpt2")
    some = (Case.make(backbone, seed, "integration") for seed in range(3, 40))
    case = next(case for case in some if case.expected.counters.num_steps >= 12)
    stream = RestartingStream(case, backbone, at=7)
    async with restartable(HostedModel.of(backbone)) as cloud:
        stream.cloud = cloud
        async with CloudClient(cloud.connect, EAGER) as client:
            await client.generate(stream)
            assert client.num_reconnects >= 1
        assert stream.restarting is not None
        await stream.restarting
        assert cloud.num_restarts == 1
    # The second search was opened at the end of the prompt, as the first.
    assert stream.opened_at == [len(case.request.prompt_ids)] * 2
    case.check(stream)


class RestartingStream(BeamDeviceStream):
    """Restarts the cloud when its beams have `at` tokens, and notes where it is told to go on."""

    def __init__(self, case: Case, backbone: Backbone, at: int) -> None:
        shape = backbone.description.num_taps, backbone.description.tap_dim
        super().__init__(case.request, case.personal, case.options, tap_shape=shape)
        self.at = at
        self.cloud: RestartableCloud | None = None
        self.restarting: asyncio.Task[None] | None = None
        self.opened_at: list[int] = []

    def on_frame(self, frame: Frame) -> list[Frame]:
        replies = super().on_frame(frame)
        if isinstance(frame, Opened):
            self.opened_at.append(frame.pos)
        if self.num_decided == self.at and self.restarting is None and self.cloud is not None:
            self.restarting = asyncio.create_task(self.cloud.restart())
        return replies


@pytest.mark.parametrize("away", ["kept", "put out", "shut down"])
async def test_a_device_that_comes_back_goes_on_where_it_was(away: str) -> None:
    """The cloud keeps the search for its ticket, with its cache, without it, and after a drain."""
    backbone = tiny_backbone("llama")
    some = (Case.make(backbone, seed, "integration") for seed in range(3, 40))
    case = next(case for case in some if case.expected.counters.num_steps >= 12)
    service = CloudService(HostedModel.of(backbone))
    async with fronted(service) as url:
        stream = CuttingStream(case, backbone, at=6)
        async with CloudClient(lambda: connect(url)) as client:
            with pytest.raises(ConnectionLostError):
                await client._run(stream, None)
        (session,) = service.sessions.values()
        while session.is_attached:
            await asyncio.sleep(0.005)
        assert await emptied(service, backbone) >= 1
        if away == "put out":
            service.engine.put_out(session)
            assert await emptied(service, backbone) == 0
        elif away == "shut down":
            session.end(EndReason.SHUTDOWN)
        stream.at = -1
        async with CloudClient(lambda: connect(url)) as client:
            await client.generate(stream)
        case.check(stream)
        assert stream.opened_at[1] > stream.opened_at[0]  # not from the start
        assert await emptied(service, backbone) == 0 and service.engine.num_reserved_blocks == 0


class CuttingStream(RestartingStream):
    """Loses its connection when its beams have `at` tokens."""

    def on_frame(self, frame: Frame) -> list[Frame]:
        replies = super().on_frame(frame)
        if self.num_decided == self.at:
            raise ConnectionLostError("cut by the test")
        return replies
