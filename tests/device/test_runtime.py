"""One call from a prompt to a personal text: what it gives, what it refuses, and what it shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from toy import HIDDEN, STOP, ToyBackbone, toy_basis, toy_model
from toy_plugin import toy_plugin

from cotune.cloud.service import CloudService
from cotune.device.client import CloudClient
from cotune.device.runtime import Device, GenerationOptions
from cotune.errors import ConnectionLostError, InputError, MismatchError, WireTimeoutError
from cotune.generation.gate import Gate
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, SCHEDULES, Decision
from cotune.generation.sampling import Sampling
from cotune.wire.emulator import EmulatedConnection, NetworkProfile
from cotune.wire.inprocess import connection_pair
from cotune.wire.transport import Connection

PROMPT = "w5 w9 w30"


@asynccontextmanager
async def toy_device(**changes: Any) -> AsyncIterator[Device]:
    service = CloudService(toy_model())
    tasks: list[asyncio.Task[None]] = []

    async def connector() -> Connection:
        device, cloud = connection_pair()
        tasks.append(asyncio.create_task(service.handle(cloud)))
        return device

    yield Device(toy_plugin(**changes), connector)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.close()


async def never() -> Connection:
    pytest.fail("nothing may be sent")


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
async def test_one_call_gives_the_text_and_what_it_cost(schedule: str, answer: str) -> None:
    async with toy_device() as device:
        options = GenerationOptions(schedule=schedule, answer=answer, max_new_tokens=12)
        shown: list[tuple[str, Decision]] = []
        made = await device.generate(PROMPT, options, lambda piece, decision: shown.append((piece, decision)))
        expected = generate(ToyBackbone(), device.personal, device.request_for(PROMPT, options, (STOP,)))
    assert made.decisions == expected.decisions and made.ending == expected.ending
    assert made.token_ids == expected.token_ids
    assert made.prompt == PROMPT and made.options == options
    assert made.text == " ".join(f"w{token}" for token in made.token_ids)
    assert "".join(made.pieces) == made.text and len(made.pieces) == len(made.token_ids)
    assert "".join(piece for piece, _ in shown) == made.text
    assert [decision for _, decision in shown] == made.decisions
    assert made.bytes_up > 0 and made.bytes_down > 0 and made.num_reconnects == 0
    assert 0 < made.device_s < made.wall_s
    assert made.cloud["num_steps"] >= len(made.token_ids)
    if schedule == "blocking":
        assert made.cloud["num_wasted_steps"] == 0 and made.cloud["num_delayed"] == len(made.token_ids)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("schedule", ["drafted", "auto"])
async def test_a_device_that_knows_the_text_drafts_it(schedule: str, answer: str) -> None:
    """Its own texts hold what it is going to write, so that most of it is read a few tokens at a time."""
    options = GenerationOptions(schedule=schedule, answer=answer, max_new_tokens=40)
    async with toy_device() as device:
        plain = await device.generate(PROMPT, GenerationOptions(answer=answer, max_new_tokens=40))
        device.draft_from([f"{PROMPT} {plain.text}", "w1 w2 w3"])
        drafted = await device.generate(PROMPT, options)
        again = await device.generate(PROMPT, options)
    assert drafted.decisions == again.decisions == plain.decisions
    assert drafted.cloud["num_drafts_kept"] > len(plain.decisions) / 2
    assert drafted.cloud["num_steps"] < plain.cloud["num_steps"] / 2
    assert plain.cloud["num_drafted"] == 0


async def test_a_deadline_reaches_the_cloud_and_late_tokens_are_marked() -> None:
    # Every answer takes 40 ms to get there.
    async with toy_device() as device:
        near = device._connector

        async def far() -> Connection:
            return EmulatedConnection(await near(), NetworkProfile.of_rtt(40))

        device._connector = far
        made = await device.generate(PROMPT, GenerationOptions(max_new_tokens=8, deadline_ms=1))
    assert any(decision.late for decision in made.decisions)
    assert made.cloud["num_late"] == sum(decision.late for decision in made.decisions)
    assert all(not decision.changed for decision in made.decisions if decision.late)


async def test_a_stop_string_cuts_the_text() -> None:
    async with toy_device() as device:
        whole = await device.generate(PROMPT, GenerationOptions(max_new_tokens=8))
        third = whole.text.split()[2]
        for answer in ANSWERS:
            options = GenerationOptions(answer=answer, max_new_tokens=8, stop_strings=(" " + third,))
            made = await device.generate(PROMPT, options)
            assert made.ending.reason == "stop_string"
            assert made.text == " ".join(whole.text.split()[:2])
            assert made.token_ids == whole.token_ids[:3]


async def test_sampling_depends_on_its_seed_alone() -> None:
    async with toy_device() as device:

        async def draw(seed: int) -> list[int]:
            sampling = Sampling(temperature=1.0, top_p=0.9, seed=seed)
            return (await device.generate(PROMPT, GenerationOptions(sampling=sampling, max_new_tokens=8))).token_ids

        assert await draw(1) == await draw(1)
        assert len({tuple(await draw(seed)) for seed in range(5)}) > 1


async def test_one_client_serves_many_generations() -> None:
    async with toy_device() as device, CloudClient(device._connector) as client:
        first, again = [
            await device.generate_with(client, PROMPT, GenerationOptions(max_new_tokens=6)) for _ in range(2)
        ]
        assert first.decisions == again.decisions
        # Costs are those of each alone.
        assert abs(first.bytes_up - again.bytes_up) <= first.bytes_up / 2
        assert client.bytes_sent == first.bytes_up + again.bytes_up


async def test_a_shut_gate_gives_the_base_model() -> None:
    async with toy_device() as device:
        shut = device.with_gate(Gate(weight=np.zeros(HIDDEN, np.float32), threshold=1.0))
        made = await shut.generate(PROMPT, GenerationOptions(mode="spa", max_new_tokens=8))
        request = device.request_for(PROMPT, GenerationOptions(max_new_tokens=8), (STOP,))
        assert made.token_ids == generate(ToyBackbone(), None, request).token_ids
        assert not any(decision.consulted for decision in made.decisions)
        assert device.personal.gate is not shut.personal.gate


def test_a_request_gets_the_form_of_the_training_prompts() -> None:
    device = Device(toy_plugin(), never)
    assert device.format_prompt("w5 {x} {prompt}") == "w1 w5 {x} {prompt} w4"
    assert Device(toy_plugin(training={}), never).format_prompt("w5") == "w5"


@pytest.mark.parametrize(("family", "mode"), [("parallel", "integration"), ("serial", "ladder")])
def test_the_default_mode_always_consults(family: str, mode: str) -> None:
    device = Device(toy_plugin(family=family), never)
    assert device.default_mode == mode
    device.check(GenerationOptions(mode=mode))


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"mode": "ladder"}, "mode ladder needs a plugin of family serial, and this one is parallel; use mode int"),
        ({"family": "serial"}, {"mode": "spa"}, "needs a plugin of family parallel, and this one is serial"),
        ({"gate": None}, {"mode": "spa"}, "mode spa with schedule optimistic needs a gate, and the plugin has none"),
        ({"gate": None}, {"schedule": "gated"}, "with schedule gated needs a gate"),
    ],
)
async def test_what_a_plugin_cannot_do_is_refused_before_anything_is_sent(
    changes: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        await Device(toy_plugin(**changes), never).generate(PROMPT, GenerationOptions(**options))


async def test_an_empty_prompt_is_refused() -> None:
    async with toy_device() as device:
        with pytest.raises(InputError, match="the prompt is empty"):
            await device.generate("")


@pytest.mark.parametrize("what", ["backbone", "tokenizer", "projections"])
async def test_a_plugin_of_another_model_is_refused_in_one_sentence(what: str) -> None:
    async with toy_device(**{f"{what}_digest": "0123456789ab" + "f" * 52}) as device:
        with pytest.raises(MismatchError, match=f"tuned on {what} 0123456789ab but the cloud hosts toy") as caught:
            await device.generate(PROMPT)
    assert "\n" not in str(caught.value)


async def test_a_plugin_with_another_output_basis_is_refused() -> None:
    """Both sides would compute other logits from the same correction."""
    async with toy_device(output_basis=toy_basis(seed=9).to_bytes()) as device:
        with pytest.raises(MismatchError, match="tuned on output basis"):
            await device.generate(PROMPT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "mine"}, "mode is 'mine', expected one of integration"),
        ({"schedule": "guessed"}, "schedule is 'guessed', expected one of blocking, gated, optimistic, drafted, auto"),
        ({"answer": "logits"}, "answer is 'logits', expected one of token, correction"),
        ({"top_k": 0}, "top_k is 0, expected 1 to 65535"),
        ({"window": 2**16}, "window is 65536, expected 1 to 65535"),
        ({"max_new_tokens": 2**32}, "max_new_tokens"),
        ({"deadline_ms": -1}, "deadline_ms is -1, expected 0"),
        ({"deadline_ms": 5, "answer": "token"}, "deadline_ms is 5 with answer token, where only the device can decide"),
    ],
)
def test_impossible_options_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        GenerationOptions(**changes)


@pytest.mark.parametrize("error", [ConnectionLostError("no cloud answers"), WireTimeoutError("nothing came")])
async def test_a_cloud_that_is_not_there_is_an_error_of_the_wire(error: Exception) -> None:
    async def gone() -> Connection:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await Device(toy_plugin(), gone).generate(PROMPT)


def test_a_damaged_plugin_is_refused_when_the_device_is_made() -> None:
    plugin = toy_plugin()
    for broken in (
        replace(plugin, kind="transformer"),
        replace(plugin, tokenizer_json=b"{}"),
        replace(plugin, output_basis=b"\0"),
        replace(plugin, tensors={}),
    ):
        with pytest.raises(InputError):
            Device(broken, never)
