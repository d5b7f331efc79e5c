"""Texts through cuts, silence and refusals: every token is what its author says after that history, each once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_network import Network, broken_network, endless_model
from byte_tokens import byte_tokenizer
from offline_folders import CONTEXT, TinyLlama, write_onnx_folder
from toy import STOP, TAP_DIM, TAPS, VOCAB, ToyBackbone, toy_model, toy_personal
from toy_plugin import toy_plugin

from cotune.cloud.engine import EngineConfig
from cotune.cloud.service import ServiceConfig
from cotune.device.client import ClientConfig
from cotune.device.fallback import Fallback
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.device.offline.writer import OfflineWriter
from cotune.device.reach import CloudReach, ReachConfig
from cotune.device.runtime import Device, DeviceGeneration, GenerationOptions
from cotune.device.stream import DeviceStream
from cotune.errors import ConnectionLostError, InputError, MismatchError, RefusedError, WireError
from cotune.generation.reference import begin, decide, generate
from cotune.generation.request import ANSWERS, SCHEDULES, Decision, GenerationRequest
from cotune.generation.sampling import Sampling, choose
from cotune.generation.text import TextCodec

TINY = TinyLlama()
PROMPT = "w5 w9 w30"
PROMPT_IDS = [5, 9, 30]
REFUSED = RefusedError(7, "the cloud is full", retry_after_s=0.01)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    # With an end that never comes: the toy cloud's texts decide when it is over.
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY, end_ids=())
    made = load_offline_model(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


@dataclass
class Case:
    """A device with an offline model, on a network.

    Attributes:
        on_token: called with each decision and the number of those before it, to do something to the network.
    """

    network: Network
    device: Device
    fallback: Fallback
    on_token: Callable[[int, Decision], Any] = lambda number, decision: None
    num_steps: int = 0
    on_step: Callable[[int], Any] = lambda number: None

    def up_at(self, *numbers: int, again: bool = False, restart: bool = False) -> None:
        """The network is up again at these steps of the offline model; with `again` counted from now."""
        before = self.num_steps if again else 0

        async def step(number: int) -> None:
            if number - before in numbers:
                if restart:
                    self.network.restart()
                self.network.up()
                await self.fallback.reach.wait_until_back()

        self.on_step = step

    async def run(self, **options: Any) -> DeviceGeneration:
        told: list[Decision] = []
        made_options = GenerationOptions(**{"max_new_tokens": 20, "top_k": 97, **options})

        def show(text: str, decision: Decision) -> None:
            told.append(decision)
            self.on_token(len(told), decision)

        client = self.device.hasty_client()
        async with asyncio.timeout(30):
            made = await self.device.generate_anyway(client, self.fallback, PROMPT, made_options, show)
        assert told == made.decisions
        return made


@asynccontextmanager
async def case_of(
    model: OfflineModel, network: Network, *, patience_s: float = 5.0, num_texts: int = 1
) -> AsyncIterator[Case]:
    device = Device(toy_plugin(), network.connect, ClientConfig(timeout_s=10))
    reach = CloudReach(device.greet, ReachConfig(patience_s=patience_s, first_wait_s=0.01, max_wait_s=0.05))
    case: Case

    async def run_step(step: Callable[[], list[int]]) -> list[int]:
        case.num_steps += 1
        called = case.on_step(case.num_steps)
        if called is not None:
            await called
        # Others run between two tokens, as with a real model.
        await asyncio.sleep(0)
        return step()

    fallback = Fallback(
        writer=OfflineWriter(model, num_texts=num_texts),
        reach=reach,
        cloud_text=device.text,
        cloud_tokenizer_json=device.plugin.tokenizer_json,
        run_step=run_step,
    )
    case = Case(network, device, fallback)
    await reach.answers(1.0)
    try:
        yield case
    finally:
        await reach.close()


@pytest.fixture
async def case(model: OfflineModel) -> AsyncIterator[Case]:
    async with broken_network() as network, case_of(model, network) as made:
        yield made


def check(case: Case, made: DeviceGeneration, **options: Any) -> list[bool]:
    """Each token against its history; gives who wrote which."""
    sampling = options.get("sampling", Sampling())
    history = list(PROMPT_IDS)
    for decision in made.decisions:
        if decision.local:
            assert decision.token_id == choose(TINY.logits(history)[-1], sampling, len(history))
            assert decision.source == "local" and not decision.consulted and not decision.changed
        else:
            request = GenerationRequest(
                prompt_ids=np.array(history),
                mode=options.get("mode", "integration"),
                max_new_tokens=1,
                sampling=sampling,
            )
            assert decision.token_id == generate(ToyBackbone(), case.device.personal, request).token_ids[0]
        history.append(decision.token_id)
    assert made.text == case.device.text.decode(history[len(PROMPT_IDS) :])
    return [decision.local for decision in made.decisions]


def runs(flags: list[bool]) -> list[bool]:
    """The flags, with each row of equal ones as one."""
    return [flag for i, flag in enumerate(flags) if i == 0 or flags[i - 1] != flag]


async def test_with_a_cloud_that_is_there_the_offline_model_says_nothing(case: Case) -> None:
    made = await case.run()
    assert len(made.decisions) == 20 and not any(check(case, made))
    assert case.num_steps == 0 and made.cloud["num_steps"] > 0 and made.ending.reason == "length"


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_a_cut_and_the_clouds_return_in_the_middle_of_an_answer(case: Case, schedule: str, answer: str) -> None:
    case.network.cut_after = 6
    case.up_at(4)
    made = await case.run(schedule=schedule, answer=answer)
    assert len(made.decisions) == 20 and made.ending.reason == "length"
    assert runs(check(case, made)) == [False, True, False]
    assert made.cloud["num_steps"] > 0


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, seed=4), Sampling(temperature=0.7, top_p=0.8, seed=5)])
async def test_sampled_texts_too(case: Case, sampling: Sampling) -> None:
    case.network.cut_after = 6
    case.up_at(4)
    made = await case.run(sampling=sampling)
    assert runs(check(case, made, sampling=sampling)) == [False, True, False]


async def test_many_cuts_in_one_text(case: Case) -> None:
    case.network.cut_after = 4

    async def step(number: int) -> None:
        if number % 3 == 0:
            case.network.up()
            await case.fallback.reach.wait_until_back()
            case.network.cut_after = 4

    case.on_step = step
    made = await case.run(max_new_tokens=40)
    assert len(made.decisions) == 40
    flags = runs(check(case, made))
    assert len(flags) >= 6 and case.fallback.reach.num_outages >= 3


async def test_a_cloud_that_has_forgotten_the_session_takes_over_too(case: Case) -> None:
    case.network.cut_after = 6
    case.up_at(4, restart=True)
    made = await case.run()
    assert runs(check(case, made)) == [False, True, False] and len(made.decisions) == 20


async def test_a_cut_that_is_over_at_once_needs_no_offline_model(case: Case) -> None:
    async def cut() -> None:
        await case.network.down()
        case.network.up()

    tasks: list[Any] = []
    case.on_token = lambda number, decision: tasks.append(asyncio.create_task(cut())) if number == 5 else None
    made = await case.run(schedule="blocking")
    assert not any(check(case, made)) and len(made.decisions) == 20 and len(tasks) == 1
    assert case.network.num_connections >= 3


async def test_a_cloud_that_never_comes_back(case: Case) -> None:
    case.network.cut_after = 6
    made = await case.run()
    assert runs(check(case, made)) == [False, True] and len(made.decisions) == 20
    assert made.ending.reason == "length" and set(made.cloud.values()) == {0.0}


@pytest.mark.parametrize("error", [None, REFUSED, WireError("what answers is no cotune cloud"), MismatchError("other")])
async def test_a_cloud_that_was_never_there(model: OfflineModel, error: Any) -> None:
    async with broken_network() as network:
        await network.down(error)
        async with case_of(model, network) as case:
            case.fallback.reach.note_away(network.error)  # type: ignore[arg-type]
            made = await case.run()
            assert all(check(case, made)) and len(made.decisions) == 20
            # It comes while a text is written, and this is the first that is known of it.
            case.up_at(1, again=True)
            made = await case.run(max_new_tokens=30)
            assert runs(check(case, made)) == [True, False] and len(made.decisions) == 30


async def test_a_cloud_that_falls_silent(model: OfflineModel) -> None:
    async with broken_network() as network, case_of(model, network, patience_s=0.1) as case:
        case.on_token = lambda number, decision: network.silence() if number == 5 else None
        attempts: list[int] = []

        async def step(number: int) -> None:
            attempts.append(network.num_attempts)
            if number == 4:
                network.up()
                await case.fallback.reach.wait_until_back()

        case.on_step = step
        made = await case.run(schedule="blocking")
        assert runs(check(case, made)) == [False, True, False] and len(made.decisions) == 20
        # The greeting at the start, the text, one try in the silence, and the first one of the outage: no more waiting.
        assert attempts[0] <= 4
        await case.fallback.reach.close()
        assert network.num_open == 0


async def test_a_cloud_that_is_only_slow_is_waited_for(model: OfflineModel) -> None:
    """It answers greetings, and nothing else for a while."""
    async with broken_network() as network, case_of(model, network, patience_s=0.06) as case:
        network.is_mute = True

        async def wake_up() -> None:
            before = network.num_connections
            while network.num_connections < before + 4:
                await asyncio.sleep(0.01)
            network.up()

        waking = asyncio.create_task(wake_up())
        made = await case.run()
        await waking
        assert not any(check(case, made)) and case.num_steps == 0


async def test_a_cloud_that_is_full_lets_the_offline_model_write(model: OfflineModel) -> None:
    async with broken_network(config=ServiceConfig(max_sessions=1)) as network, case_of(model, network) as case:
        client = case.device.hasty_client()
        await client.connect()
        long = GenerationOptions(max_new_tokens=400, schedule="blocking")
        holding = asyncio.create_task(case.device.generate_with(client, PROMPT, long))
        while not network.service.sessions:
            await asyncio.sleep(0)

        async def step(number: int) -> None:
            if number == 4:
                holding.cancel()
                network.restart()
                # The cloud answers all the time, so that it is tried again and again, and at last takes the text.
                await case.fallback.reach.wait_until_back()

        case.on_step = step
        made = await case.run()
        await asyncio.gather(holding, return_exceptions=True)
        await client.close()
        assert runs(check(case, made)) == [True, False] and len(made.decisions) == 20


async def test_a_text_that_the_cloud_cannot_serve_is_refused(model: OfflineModel) -> None:
    config = ServiceConfig(engine=EngineConfig(max_blocks=1))
    async with broken_network(config=config) as network, case_of(model, network) as case:
        with pytest.raises(RefusedError, match="need 6 blocks of the cloud's cache, expected at most 1"):
            await case.run()
        assert case.num_steps == 0


async def test_ends_of_all_kinds_while_the_cloud_is_away(model: OfflineModel, tmp_path: Path, case: Case) -> None:
    await case.network.down()
    whole = (await case.run()).token_ids
    assert case.fallback.reach.is_away
    stopped = await case.run(stop_strings=(f"w{whole[2]} w{whole[3]}",))
    assert stopped.text.split() == [f"w{token}" for token in whole[:2]] and stopped.ending.reason == "stop_string"
    folder = write_onnx_folder(tmp_path / "model", TINY, end_ids=(whole[4],))
    ending = load_offline_model(folder, OfflineSettings(num_threads=1))
    async with case_of(ending, case.network) as other:
        other.fallback.reach.note_away(ConnectionLostError("cut"))
        made = await other.run()
        assert made.token_ids == whole[:5] and made.ending.reason == "end_token"


async def test_a_stop_token_of_the_cloud_ends_a_local_part_too(model: OfflineModel, case: Case) -> None:
    await case.network.down()
    whole = (await case.run()).token_ids
    described = endless_model(stop_token_ids=(whole[3],))
    async with broken_network(described) as network, case_of(model, network) as known:
        await network.down()
        made = await known.run()
        assert made.token_ids == whole[:4] and made.ending.reason == "end_token"


async def test_the_clouds_shorter_context_ends_a_text_that_began_without_it(model: OfflineModel) -> None:
    async with broken_network(endless_model(max_context=10)) as network:
        await network.down()
        async with case_of(model, network) as case:
            case.fallback.reach.note_away(ConnectionLostError("away"))
            case.up_at(15)
            made = await case.run(max_new_tokens=30)
            assert made.ending.reason == "length" and 10 - len(PROMPT_IDS) <= len(made.decisions) < 30
            assert all(check(case, made))


async def test_a_text_without_room_in_the_offline_model_says_both_reasons(case: Case) -> None:
    await case.network.down()
    client = case.device.hasty_client()
    long = " ".join(["w7"] * (CONTEXT + 1))
    with pytest.raises(
        ConnectionLostError, match=r"out of reach \(no cloud answers.*cannot go on: the text has 65 tok"
    ):
        await case.device.generate_anyway(client, case.fallback, long, GenerationOptions())


async def test_the_offline_models_context_ends_a_text(case: Case) -> None:
    await case.network.down()
    made = await case.run(max_new_tokens=500)
    assert len(made.decisions) == CONTEXT - len(PROMPT_IDS) and made.ending.reason == "length"
    assert all(check(case, made))


async def test_two_texts_in_one_place_take_turns_or_go_to_the_cloud(case: Case) -> None:
    await case.network.down()
    texts = [asyncio.create_task(case.run()) for _ in range(2)]
    first, second = await asyncio.gather(*texts)
    assert first.token_ids == second.token_ids and all(decision.local for decision in second.decisions)

    release = asyncio.Event()
    case.on_step = lambda number: release.wait()
    held = asyncio.create_task(case.run())
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(case.run())
    await asyncio.sleep(0.01)
    case.network.up()
    # The one that waits for a place is written by the cloud, which is back; the other one after its step.
    made = await waiting
    assert not any(decision.local for decision in made.decisions)
    release.set()
    assert runs([decision.local for decision in (await held).decisions]) == [True, False]


async def test_who_gives_up_frees_the_place(case: Case) -> None:
    await case.network.down()
    release = asyncio.Event()
    case.on_step = lambda number: release.wait()
    for _ in range(2):
        work = asyncio.create_task(case.run())
        await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
    release.set()
    assert len((await case.run()).decisions) == 20


async def test_half_a_character_is_written_anew(model: OfflineModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a model with other tokens, in the middle of a character."""
    cloud = TextCodec(byte_tokenizer(bos=False).to_str().encode())

    class Saying:
        def read(self, token_ids: list[int]) -> Any:
            logits = np.zeros(VOCAB, np.float32)
            logits[7] = 1
            return logits

        def close(self) -> None:
            return

    writer = OfflineWriter(model)

    async def take() -> Any:
        await writer._places.acquire()
        return Saying()

    monkeypatch.setattr(writer, "take", take)
    monkeypatch.setattr(writer.text, "decode", lambda ids: "語" * len(ids))
    reach = CloudReach(lambda: asyncio.sleep(60))  # type: ignore[arg-type, return-value]
    reach.note_away(ConnectionLostError("away"))
    fallback = Fallback(writer=writer, reach=reach, cloud_text=cloud, cloud_tokenizer_json=b"another one")
    request = GenerationRequest(prompt_ids=cloud.encode_prompt("w5"), max_new_tokens=9)
    stream = DeviceStream(request, toy_personal(), tap_shape=(TAPS, TAP_DIM))
    stream.adopt(cloud.encode_text("a語")[:-1])
    client = Device(toy_plugin(), lambda: asyncio.sleep(60)).hasty_client()  # type: ignore[arg-type, return-value]
    await fallback.run(client, stream, "w5", None)
    assert cloud.decode(stream.token_ids).startswith("a語語") and "\ufffd" not in cloud.decode(stream.token_ids[:7])
    assert len(stream.token_ids) == 9
    assert stream._text == [*request.prompt_ids, *stream.token_ids]
    await reach.close()


async def test_beams_need_the_cloud(case: Case) -> None:
    with pytest.raises(InputError, match="expected 1: beams need the cloud throughout"):
        await case.run(num_beams=2, schedule="blocking")


async def test_a_side_network_that_remembers_reads_what_it_missed(case: Case) -> None:
    """The taps of the local part come when the cloud is back: its corrections are those of the whole history."""
    case.device.personal = personal = toy_personal(remembers=True)
    case.network.cut_after = 6
    case.up_at(4)
    made = await case.run()
    assert runs([decision.local for decision in made.decisions]) == [False, True, False]
    request = GenerationRequest(prompt_ids=np.array(PROMPT_IDS))
    cursor, side, features = begin(ToyBackbone(), personal, request)
    assert side is not None
    for decision in made.decisions:
        position = cursor.length
        if decision.local:
            side.read(position, *features.quantised_taps())
        else:
            assert decision.token_id == decide(features, personal, request, position, side).token_id
        features = cursor.extend(np.array([decision.token_id]))


async def test_a_cloud_that_ends_texts_and_one_that_does_not_agree(model: OfflineModel) -> None:
    async with broken_network(toy_model()) as network, case_of(model, network) as case:
        network.cut_after = 4
        case.up_at(2)
        made = await case.run(max_new_tokens=200)
        check(case, made)
        assert made.ending.reason in ("end_token", "length")
        assert (made.ending.reason == "end_token") == (made.token_ids[-1] == STOP)
