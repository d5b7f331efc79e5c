"""The official client against real servers on loopback: what travels, what fails, and what never gets out."""

from __future__ import annotations

import json
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from clouds import in_a_thread
from redactors import redactor_here
from tiny_models import tiny_backbone

from cotune.cloud.hosted import HostedModel
from cotune.errors import ConnectionLostError, CotuneError, InputError, RefusedError, WireError, WireTimeoutError
from cotune.sandwich.chat import ChatRequest
from cotune.sandwich.cloud_gate import CloudGate
from cotune.sandwich.openai_cloud import ApiKey, OpenAiCloud, check_base_url, retry_after_s
from cotune.sandwich.pipeline import Pipeline, PipelineConfig
from cotune.sandwich.redact import RedactedJson
from cotune.sandwich.scripted_cloud import Answer, Reply, ScriptedServer, scripted_server

REQUEST = ChatRequest(
    model="m",
    messages=RedactedJson([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Grüße 👋"}], {}),
    max_tokens=9,
    seed=3,
    tools=({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},),
)
KEY = ApiKey("sk-very-secret")


@contextmanager
def asked(answer: Answer, **options: object) -> Iterator[tuple[OpenAiCloud, ScriptedServer]]:
    with scripted_server(answer) as server, closing(OpenAiCloud(server.base_url, KEY, **options)) as cloud:  # type: ignore[arg-type]
        yield cloud, server


def test_exactly_the_payload_travels_and_the_answer_comes_back() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    with asked(lambda body: Reply(text="two words", tool_calls=[call])) as (cloud, server):
        answer = cloud.send(REQUEST, timeout_s=20)
    assert json.loads(server.bodies[0]) == json.loads(REQUEST.payload)
    assert len(server.bodies[0]) == len(REQUEST.payload)
    assert (answer.text, answer.tokens_out, answer.tool_calls[0].arguments) == ("two words", 2, '{"a": 1}')


@pytest.mark.parametrize("status", [400, 429, 500, 307])
def test_a_status_is_a_refusal_sent_once_with_its_pause(status: int) -> None:
    headers = {"Retry-After": "3", "Location": "http://127.0.0.1:9/v1"}
    refuses = asked(lambda body: Reply(text="no", status=status, headers=headers))
    with refuses as (cloud, server), pytest.raises(RefusedError) as caught:
        cloud.send(REQUEST, timeout_s=20)
    assert (caught.value.code, caught.value.retry_after_s, len(server.bodies)) == (status, 3.0, 1)


def test_a_server_that_repeats_the_key_does_not_get_it_into_the_message() -> None:
    refuses = asked(lambda body: Reply(text="wrong key sk-very-secret", status=401))
    with refuses as (cloud, _), pytest.raises(RefusedError) as caught:
        cloud.send(REQUEST, timeout_s=20)
    shown = "".join(traceback.format_exception(caught.value))
    assert "[key]" in str(caught.value) and "sk-very" not in shown
    assert "sk-very" not in repr(KEY)


def test_silence_and_dripping_end_in_time() -> None:
    release = threading.Event()

    def wait(body: object) -> str:
        release.wait(20)
        return "late"

    with asked(wait) as (cloud, _):
        began = time.monotonic()
        with pytest.raises(WireTimeoutError, match=r"0\.2 s"):
            cloud.send(REQUEST, timeout_s=0.2)
        assert time.monotonic() - began < 10
        release.set()


def test_dripping_answers_are_cut_off() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(OpenAiCloud(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")) as cloud,
    ):

        def drip() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n")
                try:
                    for _ in range(400):
                        connection.sendall(b" ")
                        time.sleep(0.05)
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        with pytest.raises(WireTimeoutError):
            cloud.send(REQUEST, timeout_s=0.3)
        thread.join(20)
        assert not thread.is_alive()


def test_nobody_there_and_nonsense_are_errors_of_the_wire() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with closing(OpenAiCloud(f"http://127.0.0.1:{port}/v1")) as cloud, pytest.raises(ConnectionLostError):
        cloud.send(REQUEST, timeout_s=5)
    with asked(lambda body: "x" * 5000, max_answer_bytes=1000) as (cloud, _), pytest.raises(WireError, match="1000"):
        cloud.send(REQUEST, timeout_s=20)


@pytest.mark.parametrize(
    "url", ["", "ws://h/v1", "https://", "http://example.org/v1", "https://me:pw@host/v1", "http://h:port/v1"]
)
def test_urls_that_cannot_or_should_not_be_are_refused(url: str) -> None:
    with pytest.raises(InputError):
        check_base_url(url)


def test_encrypted_and_loopback_urls_are_fine() -> None:
    for url in ("https://api.example.org/v1", "http://localhost:7070/v1", "http://[::1]:7070/v1"):
        check_base_url(url)


@pytest.mark.parametrize("secret", ["", "a b", "schlüssel", "key\n"])
def test_a_key_that_is_none_is_refused(secret: str) -> None:
    with pytest.raises(InputError) as caught:
        ApiKey(secret)
    assert not secret or secret not in str(caught.value)


def test_pauses_are_numbers() -> None:
    assert [retry_after_s(text) for text in ("0", "1.5", "-1", "inf", "Wed, 21 Oct", None)] == [0, 1.5, *[None] * 4]


def test_our_own_cloud_on_loopback_answers_a_whole_pipeline() -> None:
    hosted = HostedModel.of(tiny_backbone("llama"))
    with (
        in_a_thread(hosted) as url,
        redactor_here() as redactor,
        closing(OpenAiCloud(url.replace("ws", "http", 1) + "/v1")) as cloud,
    ):
        gate = CloudGate(cloud)
        config = PipelineConfig(model=hosted.description.model, max_tokens=4)
        done = Pipeline(redactor, gate, config).run("Ann Lee wrote from ann@example.org")
    assert done.cost.calls == 1 and 0 < done.cost.tokens_out <= 4 and done.cost.tokens_in > 0
    assert "Ann" not in gate.sent.payloads[0] and "ann@" not in gate.sent.payloads[0]
    assert isinstance(done.text, str)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(CotuneError, match=r"pip install 'cotune\[sandwich\]'"):
        OpenAiCloud("http://127.0.0.1:1/v1")


def test_a_stream_tells_pieces_and_says_so_in_what_travels() -> None:
    told: list[str] = []
    request = ChatRequest(model="m", messages=REQUEST.messages, max_tokens=9, is_streamed=True)
    with asked(lambda body: "Grüße und so") as (cloud, server):
        answer = cloud.stream(request, timeout_s=20, on_text=told.append)
    assert answer.text == "".join(told) == "Grüße und so" and len(told) == 4 and answer.tokens_out == 3
    sent = json.loads(server.bodies[0])
    assert sent == json.loads(request.payload) and sent["stream"] is True
    assert request.digest == ChatRequest(model="m", messages=REQUEST.messages, max_tokens=9).digest


def test_our_own_cloud_streams_the_same_text() -> None:
    hosted = HostedModel.of(tiny_backbone("llama"))
    with (
        in_a_thread(hosted) as url,
        redactor_here() as redactor,
        closing(OpenAiCloud(url.replace("ws", "http", 1) + "/v1")) as cloud,
    ):
        config = PipelineConfig(model=hosted.description.model, max_tokens=6)
        told: list[str] = []
        line = Pipeline(redactor, CloudGate(cloud), config)
        streamed = line.run_streamed("Say something.", told.append)
        assert streamed.text == "".join(told) == line.run("Say something.").text
    assert streamed.cost.tokens_out > 0


def test_a_connection_that_breaks_while_it_streams_is_an_error_of_the_wire() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        closing(OpenAiCloud(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")) as cloud,
    ):

        def break_off() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(
                    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 9999\r\n\r\n"
                )

        thread = threading.Thread(target=break_off)
        thread.start()
        with pytest.raises(ConnectionLostError, match="broke"):
            cloud.send(REQUEST, timeout_s=10)
        thread.join(20)
        assert not thread.is_alive()
