"""The whole service over real sockets, with a cloud that is cut, stopped and started again under its texts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import openai
import pytest
from broken_network import endless_model
from clouds import RestartableCloud
from offline_folders import TinyLlama, write_onnx_folder
from serving import MODEL
from toy import ToyBackbone
from toy_plugin import toy_plugin

from cotune.device.client import ClientConfig
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import ReachConfig
from cotune.device.runtime import GenerationOptions
from cotune.device.serve.personal_source import PersonalSource
from cotune.device.serve.server import ServeConfig, serve
from cotune.errors import MismatchError, RefusedError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.ledger import EgressLedger
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.ledgered import LedgeredConnection
from cotune.wire.transport import Connection
from cotune.wire.websocket import connect

pytestmark = pytest.mark.integration
TINY = TinyLlama()
QUESTION: list[Any] = [{"role": "user", "content": "w5 w9 w30"}]
PROMPT_IDS = [1, 5, 9, 30, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY, end_ids=())
    made = load_offline_model(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


@dataclass
class Served:
    """A service whose cloud may come and go.

    Attributes:
        cloud: not started yet.
        profile: of the network.
        local_s: what a token of the offline model takes, seconds.
    """

    cloud: RestartableCloud
    source: PersonalSource
    ledger: EgressLedger
    url: str = ""
    profile: NetworkProfile | None = None
    local_s: float = 0.01

    async def ask(self, at: dict[int, Callable[[], Any]] | None = None, **options: Any) -> list[dict[str, Any]]:
        """What each chunk tells of itself; the last is that of the end. `at` awaits something after so many tokens."""
        told = []
        async with openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="x", max_retries=0, timeout=20) as client:
            stream = await client.chat.completions.create(
                model=MODEL, messages=QUESTION, stream=True, extra_body={"cotune": options}
            )
            text = ""
            async for chunk in stream:
                text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
                if chunk.model_extra and "cotune" in chunk.model_extra:
                    told.append(chunk.model_extra["cotune"])
                    if at and len(told) in at:
                        await at.pop(len(told))()
        ids = [one["token_id"] for one in told[:-1]]
        assert text == self.source.device.text.decode(ids)
        check(self.source, told[:-1])
        return told

    async def info(self) -> dict[str, Any]:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rpartition(":")[2]))
        host = self.url.removeprefix("http://")
        writer.write(f"GET /cotune/info HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        writer.close()
        return dict(json.loads(answer.partition(b"\r\n\r\n")[2]))


def check(source: PersonalSource, tokens: list[dict[str, Any]]) -> None:
    """Each token is what its author says after that history, once and in order."""
    history = list(PROMPT_IDS)
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    for token in tokens:
        if token["who"] == "local":
            assert token["token_id"] == int(TINY.logits(history)[-1].argmax()) and token["source"] == "local"
        else:
            request = GenerationRequest(prompt_ids=np.array(history), max_new_tokens=1)
            expected = generate(ToyBackbone(), source.device.personal, request).token_ids
            assert [token["token_id"]] == expected and token["source"] in ("cloud", "device")
        history.append(token["token_id"])


def runs(told: list[dict[str, Any]]) -> list[bool]:
    """Whether the offline model wrote, with each row of equal ones as one."""
    flags = [one["who"] == "local" for one in told[:-1]]
    return [flag for i, flag in enumerate(flags) if i == 0 or flags[i - 1] != flag]


@asynccontextmanager
async def served(model: OfflineModel, *, with_cloud: bool = True, **changes: Any) -> AsyncIterator[Served]:
    cloud, ledger = RestartableCloud(endless_model()), EgressLedger(None)
    made: Served

    async def connector() -> Connection:
        connection = await connect(cloud.url or "ws://127.0.0.1:9")
        if made.profile is not None:
            connection = EmulatedConnection(connection, made.profile, 0)
        return LedgeredConnection(connection, ledger, "serve")

    source = PersonalSource(
        toy_plugin(),
        connector,
        model_id=MODEL,
        defaults=GenerationOptions(max_new_tokens=24, schedule="blocking"),
        config=ClientConfig(timeout_s=10),
        offline=OfflineWriter(model, num_texts=2),
        reach_config=ReachConfig(patience_s=10, first_wait_s=0.01, max_wait_s=0.03),
    )
    made = Served(cloud, source, ledger, **changes)

    async def slowly(step: Callable[[], list[int]]) -> list[int]:
        await asyncio.sleep(made.local_s)
        return await asyncio.to_thread(step)

    assert source.fallback is not None
    source.fallback = replace(source.fallback, run_step=slowly)
    if with_cloud:
        await cloud.start()
    stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = ServeConfig(port=0, grace_s=1)
    task = asyncio.create_task(serve(source, ledger.totals, config, on_ready=ready.set_result, stop=stop))
    await asyncio.wait({task, ready}, return_when=asyncio.FIRST_COMPLETED)
    try:
        if task.done():
            await task
        made.url = await ready
        yield made
    finally:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)
        await cloud.stop()


async def test_the_cloud_stops_and_comes_back_in_the_middle_of_an_answer(model: OfflineModel) -> None:
    async with served(model, profile=NetworkProfile(delay_ms=2)) as service:
        told = await service.ask({4: service.cloud.stop, 9: service.cloud.start})
        assert runs(told) == [False, True, False] and len(told) == 25
        metrics = told[-1]["metrics"]
        assert metrics["local"] == sum(one["who"] == "local" for one in told[:-1]) > 0
        assert metrics["num_tokens"] == 24
        assert all(one["base_text"] is None and one["consulted"] is False for one in told[:-1] if one["who"] == "local")
        assert (await service.info())["offline"]["is_away"] is False


async def test_a_network_that_is_cut_again_and_again_loses_and_repeats_nothing(model: OfflineModel) -> None:
    profile = NetworkProfile(delay_ms=1, disconnect_every_frames=24)
    async with served(model, profile=profile, local_s=0.0) as service:
        for schedule in ("blocking", "optimistic"):
            told = await service.ask(schedule=schedule)
            assert len(told) == 25 and told[-1]["metrics"]["num_tokens"] == 24


async def test_a_service_starts_without_its_cloud_and_takes_it_when_it_comes(model: OfflineModel) -> None:
    async with served(model, with_cloud=False) as service:
        info = await service.info()
        assert info["cloud"] is None and info["offline"]["is_away"] is True
        assert "no cloud answers" in info["offline"]["why"]
        told = await service.ask()
        assert runs(told) == [True] and told[-1]["metrics"]["local"] == 24
        # Nothing was sent to anybody, not even a greeting.
        assert service.ledger.totals() == {}
        told = await service.ask({5: service.cloud.start})
        assert runs(told) == [True, False]
        assert (await service.info())["cloud"]["model"] == "toy"
        assert set(service.ledger.totals()) == {"hello", "open", "correct"}


async def test_several_texts_at_once_through_an_outage(model: OfflineModel) -> None:
    async with served(model, profile=NetworkProfile(delay_ms=2)) as service:
        first = asyncio.create_task(service.ask({4: service.cloud.stop, 9: service.cloud.start}))
        others = [asyncio.create_task(service.ask()) for _ in range(2)]
        for told in await asyncio.gather(first, *others):
            assert len(told) == 25


async def test_who_hangs_up_during_an_outage_frees_the_place(model: OfflineModel) -> None:
    async with served(model, with_cloud=False) as service:
        for _ in range(3):
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", timeout=20) as client:
                stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
                await anext(aiter(stream))
                await stream.close()
        assert len(await service.ask()) == 25


async def test_a_cloud_that_is_there_and_wrong_is_told_at_the_start(model: OfflineModel) -> None:
    async with served(model) as service:
        other = PersonalSource(
            toy_plugin(backbone_digest="0" * 64),
            service.cloud.connect,
            model_id=MODEL,
            defaults=GenerationOptions(),
            offline=OfflineWriter(model),
        )
        with pytest.raises(MismatchError, match="tuned on backbone 000000000000"):
            await other.start()
        await other.close()


async def test_a_token_that_is_not_accepted_is_told_at_the_start(model: OfflineModel) -> None:
    async def refuse() -> Connection:
        raise RefusedError(2, "the cloud does not accept the token")

    source = PersonalSource(
        toy_plugin(), refuse, model_id=MODEL, defaults=GenerationOptions(), offline=OfflineWriter(model)
    )
    with pytest.raises(RefusedError, match="does not accept the token"):
        await source.start()
    await source.close()
