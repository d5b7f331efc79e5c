"""An offline model behind the interface: over a real socket, with the official client, and nothing leaves."""

from __future__ import annotations

import asyncio
import json
import math
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from offline_folders import CONTEXT, TinyLlama, random_adapter, write_onnx_folder, write_peft_folder
from serving import Service, serving_source

from cotune.device.offline.generate import generate_offline
from cotune.device.offline.model import OfflineModel, OfflineSettings
from cotune.device.offline.runtimes import load_offline_model
from cotune.device.offline.writer import OfflineWriter
from cotune.device.serve.offline_source import OfflineSource
from cotune.device.serve.wishes import OfflineOptions
from cotune.errors import InputError
from cotune.generation.request import GenerationRequest
from cotune.generation.sampling import Sampling
from cotune.generation.text import TextCodec
from cotune.ledger import EgressLedger
from cotune.openai_api.requests import CompletionRequest
from cotune.openai_api.source import Finish

pytestmark = pytest.mark.integration
MODEL = "small"
QUESTION: list[Any] = [{"role": "user", "content": "w5 w9"}]
# Each word is a token; "User:" and the like are w0, as every word that is not known.
CHAT_IDS = [0, 0, 5, 9, 0, 0]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OfflineModel]:
    folder = write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TinyLlama())
    made = load_offline_model(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(model: OfflineModel) -> Iterator[Service[OfflineSource]]:
    source = OfflineSource(OfflineWriter(model, num_texts=2), model_id=MODEL, defaults=OfflineOptions(max_new_tokens=8))
    with serving_source(source, EgressLedger(None)) as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service[OfflineSource]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="anything", max_retries=0, timeout=20) as made:
        yield made


def expected_ids(model: OfflineModel, prompt: list[int], **options: Any) -> list[int]:
    request = GenerationRequest(
        prompt_ids=np.array(prompt),
        stop_token_ids=model.description.end_ids,
        **{"max_new_tokens": 8, **options},
    )
    return generate_offline(model, request).token_ids


def words(model: OfflineModel, ids: list[int]) -> str:
    shown = ids[:-1] if ids[-1] in model.description.end_ids else ids
    return TextCodec(model.folder.tokenizer_json).decode(shown)


def test_a_chat_gives_the_text_of_the_model(client: openai.OpenAI, model: OfflineModel) -> None:
    made = client.chat.completions.create(model=MODEL, messages=QUESTION)
    ids = expected_ids(model, CHAT_IDS)
    assert made.choices[0].message.content == words(model, ids)
    assert made.choices[0].finish_reason == "length"
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (len(CHAT_IDS), len(ids))
    metrics = made.model_extra["cotune"]["metrics"]  # type: ignore[index]
    assert metrics["local"] == metrics["num_tokens"] == len(ids) and metrics["bytes_up"] == 0


def test_a_stream_marks_every_token_as_local_and_knows_its_probability(
    client: openai.OpenAI, model: OfflineModel
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
            extra_body={"cotune": {"temperature": 1.0, "seed": 3}},
        )
    )
    ids = expected_ids(model, CHAT_IDS, sampling=Sampling(temperature=1.0, seed=3))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == words(model, ids)
    *tokens, last = [chunk.model_extra["cotune"] for chunk in chunks if chunk.model_extra]
    assert [token["token_id"] for token in tokens] == ids
    assert [token["position"] for token in tokens] == list(range(len(ids)))
    assert {(token["who"], token["source"]) for token in tokens} == {("local", "local")}
    assert last["metrics"]["seed"] == 3
    content = [
        one for c in chunks if c.choices and c.choices[0].logprobs for one in c.choices[0].logprobs.content or []
    ]
    assert len(content) == len(ids) and all(len(one.top_logprobs) == 2 for one in content)
    for told, one in zip(tokens, content, strict=True):
        assert told["probability"] == pytest.approx(math.exp(one.logprob), abs=1e-3)
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == len(ids)


def test_plain_prompts_stop_strings_and_ends(client: openai.OpenAI, model: OfflineModel) -> None:
    ids = expected_ids(model, [5, 9, 30])
    for prompt in ("w5 w9 w30", [5, 9, 30]):
        made = client.completions.create(model=MODEL, prompt=prompt)
        assert made.choices[0].text == words(model, ids)
    cut = client.completions.create(model=MODEL, prompt="w5 w9 w30", stop=f"w{ids[2]} w{ids[3]}")
    assert cut.choices[0].text.split() == words(model, ids[:2]).split() and cut.choices[0].finish_reason == "stop"
    with pytest.raises(openai.BadRequestError, match="prompt holds the token 97, expected ids from 0 to 96"):
        client.completions.create(model=MODEL, prompt=[97])


def test_an_end_token_ends_the_text_and_is_not_shown(model: OfflineModel, tmp_path: Path) -> None:
    ids = expected_ids(model, [5, 9, 30])
    folder = write_onnx_folder(tmp_path / "model", TinyLlama(), end_ids=(ids[3],))
    source = OfflineSource(OfflineWriter(load_offline_model(folder)), model_id=MODEL)

    async def read() -> list[Any]:
        return [item async for item in source.complete(CompletionRequest(form="text", model=MODEL, prompt=(5, 9, 30)))]

    *pieces, finish = asyncio.run(read())
    num_tokens = ids.index(ids[3]) + 1
    assert "".join(piece.text for piece in pieces) == words(model, ids[: num_tokens - 1])
    assert isinstance(finish, Finish) and (finish.reason, finish.num_completion_tokens) == ("stop", num_tokens)
    assert len(pieces) == num_tokens


def test_the_context_is_a_limit_with_its_own_code(client: openai.OpenAI) -> None:
    made = client.completions.create(model=MODEL, prompt=" ".join(["w7"] * (CONTEXT - 3)), max_tokens=100)
    assert made.usage is not None and made.usage.total_tokens == CONTEXT
    with pytest.raises(openai.BadRequestError, match="70 tokens, and the offline model's context 64") as caught:
        client.completions.create(model=MODEL, prompt=" ".join(["w7"] * 70))
    assert caught.value.code == "context_length_exceeded"


def test_wishes_that_need_a_cloud_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"'cotune\.mode' is not known"):
        client.completions.create(model=MODEL, prompt="w5", extra_body={"cotune": {"mode": "spa"}})


async def test_many_at_once_get_each_their_own_text(service: Service[OfflineSource], model: OfflineModel) -> None:
    """More than there are places for; the others wait."""

    async def one(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0, timeout=20) as mine:
            made = await mine.completions.create(model=MODEL, prompt=[number])
            assert made.choices[0].text == words(model, expected_ids(model, [number]))

    await asyncio.gather(*(one(number) for number in range(5, 12)))


async def test_who_hangs_up_frees_the_place(model: OfflineModel) -> None:
    source = OfflineSource(OfflineWriter(model), model_id=MODEL)
    request = CompletionRequest(form="text", model=MODEL, prompt=(5,), max_tokens=40)
    for _ in range(3):
        items = source.complete(request)
        await anext(items)
        await items.aclose()
    async with asyncio.timeout(10):
        assert len([item async for item in source.complete(request)]) == 41


def test_nothing_leaves_and_the_page_is_told(service: Service[OfflineSource], client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="w5")
    assert service.ledger.totals() == {}
    with urllib.request.urlopen(f"{service.url}/cotune/ledger", timeout=10) as answer:
        assert json.load(answer) == {"kinds": {}, "bytes": 0}
    with urllib.request.urlopen(f"{service.url}/cotune/info", timeout=10) as answer:
        info = json.load(answer)
    assert info["model"] == MODEL and info["cloud"] is None and info["plugin"] is None
    assert info["offline"] == {"bits": 32, "context": CONTEXT, "adapter": None}
    assert info["defaults"]["max_tokens"] == 8


async def test_another_adapter_writes_the_next_text(model: OfflineModel, tmp_path: Path) -> None:
    writer = OfflineWriter(model)
    source = OfflineSource(writer, model_id=MODEL)
    request = CompletionRequest(form="text", model=MODEL, prompt=(5, 9, 30), max_tokens=8)

    async def tokens() -> list[int]:
        return [item.extra["token_id"] async for item in source.complete(request) if not isinstance(item, Finish)]  # type: ignore[index]

    plain = await tokens()
    writer.adapter = model.load_adapter(write_peft_folder(tmp_path / "mine", random_adapter()))
    adapted = await tokens()
    writer.adapter = None
    assert await tokens() == plain != adapted


async def test_a_template_that_does_not_fit_is_an_error_of_the_request(tmp_path: Path) -> None:
    texts = {"chat_template.jinja": "{{ raise_exception('no turns of the system') }}"}
    folder = write_onnx_folder(tmp_path / "model", TinyLlama(), texts=texts)
    source = OfflineSource(OfflineWriter(load_offline_model(folder)), model_id=MODEL)
    with pytest.raises(InputError, match="no turns of the system"):
        await anext(source.complete(CompletionRequest(form="chat", model=MODEL)))
