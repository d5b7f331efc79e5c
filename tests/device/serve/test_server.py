"""The whole service over real sockets: the official `openai` client, limits, guards, and how it starts and ends."""

from __future__ import annotations

import asyncio
import http.client
import json
import ssl
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import trustme
from serving import MODEL, Service, endless_model, serving, source_of
from toy import STOP, ToyBackbone, toy_model
from toy_plugin import toy_plugin

from cotune.device.runtime import GenerationOptions
from cotune.device.serve.personal_source import PersonalSource
from cotune.device.serve.server import ServeConfig, serve
from cotune.errors import ConnectionLostError, InputError, MismatchError
from cotune.generation.reference import generate
from cotune.generation.request import ANSWERS, SCHEDULES
from cotune.ledger import EgressLedger
from cotune.openai_api.routes import ApiLimits

pytestmark = pytest.mark.integration
QUESTION: list[Any] = [{"role": "user", "content": "w5 w9 w30"}]


@pytest.fixture(scope="module")
def service() -> Iterator[Service[PersonalSource]]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(service: Service[PersonalSource]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="anything", max_retries=0, timeout=20) as made:
        yield made


def expected(service: Service[PersonalSource], prompt: str = "w1 w5 w9 w30 w4", **options: Any) -> str:
    """What the reference engine writes."""
    device = service.source.device
    request = device.request_for(prompt, GenerationOptions(**{"max_new_tokens": 12, **options}), (STOP,))
    return device.text.decode(generate(ToyBackbone(), device.personal, request).token_ids)


def ask(
    service: Service[PersonalSource], path: str, method: str = "GET", body: bytes = b"", **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=10)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "cotune device"


def test_a_chat_gives_the_personal_text(service: Service[PersonalSource], client: openai.OpenAI) -> None:
    made = client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert made.choices[0].message.content == expected(service)
    assert made.choices[0].finish_reason in ("stop", "length")
    assert made.usage is not None and made.usage.prompt_tokens == 5
    metrics = made.model_extra["cotune"]["metrics"]  # type: ignore[index]
    assert metrics["num_tokens"] == made.usage.completion_tokens and metrics["mode"] == "integration"


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_stream_in_every_form_is_the_same_text(
    service: Service[PersonalSource], client: openai.OpenAI, schedule: str, answer: str
) -> None:
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=QUESTION,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"cotune": {"schedule": schedule, "answer": answer, "top_k": 97}},
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == expected(service)
    told = [chunk.model_extra["cotune"] for chunk in chunks if chunk.model_extra]
    *tokens, last = told
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    assert {token["who"] for token in tokens} <= {"cloud", "agreed", "changed"}
    assert all((token["source"] == "device") == (token["who"] == "changed") for token in tokens)
    assert all((token["base_text"] is not None) == (token["who"] == "changed") for token in tokens)
    # All logits came, so that the device knows each probability; in the correction form it knows none.
    assert all((token["probability"] is not None) == (answer == "token") for token in tokens)
    metrics, so_far = last["metrics"], tokens[-1]["so_far"]
    assert metrics["schedule"] == schedule and metrics["answer"] == answer
    assert so_far["disagree_rate"] == pytest.approx(metrics["disagree_rate"], abs=1e-3)
    assert 0 < so_far["bytes_up"] <= metrics["bytes_up"] and 0 < so_far["bytes_down"] <= metrics["bytes_down"]
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == metrics["num_tokens"]


def test_log_probabilities_where_the_device_knows_them(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": MODEL, "messages": QUESTION, "logprobs": True}
    known = client.chat.completions.create(**options, extra_body={"cotune": {"answer": "token", "top_k": 97}})
    assert known.choices[0].logprobs is not None and known.choices[0].logprobs.content is not None
    assert all(token.logprob <= 0 for token in known.choices[0].logprobs.content)
    assert client.chat.completions.create(**options).choices[0].logprobs is None


def test_a_plain_prompt_as_text_and_as_token_ids(service: Service[PersonalSource], client: openai.OpenAI) -> None:
    for prompt in ("w5 w9 w30", [5, 9, 30]):
        made = client.completions.create(model=MODEL, prompt=prompt, max_tokens=7)
        assert made.choices[0].text == expected(service, "w5 w9 w30", max_new_tokens=7)
        assert made.usage is not None and made.usage.prompt_tokens == 3
    with pytest.raises(openai.BadRequestError, match="prompt holds the token 97, expected ids from 0 to 96"):
        client.completions.create(model=MODEL, prompt=[97])


def test_a_stop_string_is_not_part_of_the_text(service: Service[PersonalSource], client: openai.OpenAI) -> None:
    whole = expected(service).split()
    for stream in (False, True):
        made: Any = client.chat.completions.create(
            model=MODEL, messages=QUESTION, stop=f"{whole[3]} {whole[4]}", stream=stream
        )
        if stream:
            chunks = list(made)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = made.choices[0].message.content, made.choices[0].finish_reason
        assert (text.split(), reason) == (whole[:3], "stop")


def test_earlier_turns_are_part_of_the_prompt(service: Service[PersonalSource], client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}, *QUESTION]
    made = client.chat.completions.create(model=MODEL, messages=turns)
    assert made.choices[0].message.content == expected(service, "w1 w5 w4 w6\n\nw1 w5 w9 w30 w4")


def test_more_tokens_than_the_context_has_room_for_are_cut(
    service: Service[PersonalSource], client: openai.OpenAI
) -> None:
    made = client.completions.create(model=MODEL, prompt=" ".join(["w7"] * 508), max_tokens=100_000)
    assert made.choices[0].finish_reason == "length" and made.usage is not None
    assert made.usage.total_tokens == 512
    with pytest.raises(openai.BadRequestError, match="600 tokens, and the model's context 512") as caught:
        client.completions.create(model=MODEL, prompt=" ".join(["w7"] * 600))
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model": "gpt"}, openai.NotFoundError, "model is 'gpt', expected 'my-plugin'"),
        ({"n": 2}, openai.BadRequestError, "one text is made for each request"),
        ({"extra_body": {"cotune": {"mode": "ladder"}}}, openai.BadRequestError, "needs a plugin of family serial"),
        ({"extra_body": {"cotune": {"mood": 1}}}, openai.BadRequestError, r"'cotune\.mood' is not known"),
    ],
)
def test_bad_requests_are_errors_of_the_client(
    client: openai.OpenAI, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    for stream in (False, True):
        with pytest.raises(kind, match=words):
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, "stream": stream, **changes})


async def test_several_clients_at_once_get_each_their_own_text(service: Service[PersonalSource]) -> None:
    async def one(number: int) -> None:
        async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="x", max_retries=0, timeout=20) as mine:
            schedule = SCHEDULES[number % len(SCHEDULES)]
            answer = ANSWERS[number % 2]
            stream = await mine.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"w{number}"}],
                stream=True,
                extra_body={"cotune": {"schedule": schedule, "answer": answer}},
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == expected(service, f"w1 w{number} w4")

    await asyncio.gather(*(one(number) for number in range(6, 14)))


def test_the_ledger_and_the_facts_for_the_page(service: Service[PersonalSource], client: openai.OpenAI) -> None:
    before = json.loads(ask(service, "/cotune/ledger")[1])
    client.chat.completions.create(model=MODEL, messages=QUESTION)
    after = json.loads(ask(service, "/cotune/ledger")[1])
    assert after["bytes"] > before["bytes"] and after["kinds"] == service.ledger.totals()
    assert after["kinds"]["open"]["count"] == before["kinds"]["open"]["count"] + 1
    info = json.loads(ask(service, "/cotune/info")[1])
    assert info["modes"] == ["integration", "spa"] and info["schedules"] == list(SCHEDULES)
    assert info["defaults"]["max_tokens"] == 12 and info["cloud"]["model"] == "toy"


def test_requests_that_are_not_from_here_are_refused_over_the_wire(service: Service[PersonalSource]) -> None:
    for path in ("/", "/v1/models", "/cotune/ledger"):
        assert ask(service, path)[0] == 200
        assert ask(service, path, Host="evil.example")[0] == 403
        assert ask(service, path, Origin="http://evil.example")[0] == 403
        assert ask(service, path, Sec_Fetch_Site="cross-site")[0] == 403
    body = json.dumps({"model": MODEL, "messages": QUESTION}).encode()
    assert ask(service, "/v1/chat/completions", "POST", body, Content_Type="text/plain")[0] == 415
    assert ask(service, "/v1/chat/completions", "POST", body, Content_Type="application/json")[0] == 200
    assert ask(service, "/v1/chat/completions")[0] == 405
    assert ask(service, "/../server.py")[0] == 404 and ask(service, "/page/chat.js")[0] == 404


def test_one_text_too_many_is_told_to_come_back() -> None:
    config = ServeConfig(port=0, limits=ApiLimits(max_concurrent=1), grace_s=1)
    with (
        serving(config, model=endless_model(), rtt_ms=60, schedule="blocking", max_new_tokens=200) as slow,
        openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0, timeout=20) as client,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=MODEL, messages=QUESTION)
        assert caught.value.response.headers["retry-after"] == "1"
        # Who hangs up frees the place, and the cloud hears that nobody wants the rest.
        stream.close()
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and "close" not in slow.ledger.totals():
            time.sleep(0.02)
        assert slow.ledger.totals()["close"]["count"] == 1
        patient = client.with_options(max_retries=5)
        assert patient.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2).usage is not None


def test_the_end_lets_running_texts_finish() -> None:
    config = ServeConfig(port=0, grace_s=5)
    with ThreadPoolExecutor(1) as pool, serving(config, model=endless_model(), rtt_ms=60, schedule="blocking") as slow:

        def read() -> str:
            with openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0, timeout=20) as client:
                stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
                return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

        reading = pool.submit(read)
        until_s = time.monotonic() + 10
        while time.monotonic() < until_s and "correct" not in slow.ledger.totals():
            time.sleep(0.01)
        assert not reading.done()
    assert len(reading.result(timeout=10).split()) == 12


def test_the_end_waits_only_so_long() -> None:
    config = ServeConfig(port=0, grace_s=1)
    options: dict[str, Any] = {"rtt_ms": 60, "schedule": "blocking", "max_new_tokens": 400}
    with serving(config, model=endless_model(), **options) as slow:
        client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="x", max_retries=0, timeout=20)
        stream = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True)
        next(stream)
        started_s = time.monotonic()
    assert 0.9 < time.monotonic() - started_s < 5
    stream.close()
    client.close()


def test_tls_and_tokens(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.issue_cert("localhost", "127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
    (tmp_path / "keys").write_text("s3cret\n")
    config = ServeConfig(
        host="127.0.0.1",
        port=0,
        tls_cert=tmp_path / "cert.pem",
        tls_key=tmp_path / "cert.pem",
        token_file=tmp_path / "keys",
        grace_s=1,
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)

    def status(path: str, **headers: str) -> int:
        place = secure.url.removeprefix("https://")
        connection = http.client.HTTPSConnection(place, timeout=10, context=context)
        try:
            connection.request("GET", path, headers=headers)
            return connection.getresponse().status
        finally:
            connection.close()

    with serving(config) as secure:
        assert secure.url.startswith("https://")
        assert status("/") == 200 and status("/chat.js") == 200
        assert status("/v1/models") == 401 and status("/cotune/ledger") == 401
        assert status("/v1/models", Authorization="Bearer wrong") == 401
        assert status("/v1/models", Authorization="Bearer s3cret") == 200


async def start(source: Any, config: ServeConfig) -> None:
    await serve(source, dict, config, on_ready=lambda url: pytest.fail("it must not start"))


async def test_a_cloud_that_is_not_there_is_told_at_the_start() -> None:
    source = source_of("ws://127.0.0.1:9", EgressLedger(None))
    with pytest.raises(ConnectionLostError, match=r"no cloud answers at ws://127\.0\.0\.1:9: connection refused"):
        await start(source, ServeConfig(port=0))


def test_a_cloud_with_another_model_is_told_at_the_start() -> None:
    plugin = toy_plugin(backbone_digest="0" * 64)
    with pytest.raises(MismatchError, match="tuned on backbone 000000000000"), serving(plugin=plugin):
        pass


async def test_a_port_that_is_taken_is_told(service: Service[PersonalSource]) -> None:
    port = int(service.url.rpartition(":")[2])
    with pytest.raises(InputError, match=f"port {port}: address already in use; choose another --port"):
        await start(source_of("ws://127.0.0.1:9", EgressLedger(None)), ServeConfig(port=port))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host": "0.0.0.0"}, "which others can reach; give --tls-cert, --tls-key and --token-file"),
        ({"host": "laptop.local", "token_file": Path("x")}, "which others can reach"),
        ({"tls_cert": Path("x")}, "only one of --tls-cert and --tls-key"),
        ({"port": 65_536}, "port is 65536"),
        ({"allow_hosts": ("http://x",)}, "--allow-host is 'http://x'"),
        ({"allow_hosts": ("*",)}, "--allow-host is"),
        ({"grace_s": 0}, "grace_s is 0"),
    ],
)
def test_unsafe_or_impossible_places_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ServeConfig(**changes)


def test_a_plugin_that_cannot_do_the_default_is_refused() -> None:
    with pytest.raises(InputError, match="needs a gate, and the plugin has none"):
        source_of("ws://127.0.0.1:9", EgressLedger(None), plugin=toy_plugin(gate=None), mode="spa")


def test_the_toy_model_is_what_the_tests_think() -> None:
    assert toy_model().description.max_context == 512
