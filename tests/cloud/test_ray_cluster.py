"""Replicas on Ray Serve: a device whose replica dies goes on at another, with the same text."""

from __future__ import annotations

import asyncio
import builtins
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from batched_texts import held_out_prompts
from clouds import get
from processes import descendants, python, read_json, wait_until
from tiny_models import device_for, random_plugin
from websockets.asyncio.client import connect as raw_connect
from websockets.exceptions import InvalidStatus
from websockets.typing import Origin

from cotune.cloud.ray_cluster import ClusterConfig, check_ray
from cotune.device.client import ClientConfig, CloudClient
from cotune.device.stream import DeviceStream
from cotune.errors import InputError, RefusedError
from cotune.generation.reference import generate
from cotune.generation.request import GenerationRequest
from cotune.models.backbone import Backbone
from cotune.plugin import Plugin
from cotune.wire.websocket import connect

NUM_DEVICES = 4
NUM_TOKENS = 60
STUBBORN = ClientConfig(timeout_s=30, first_backoff_s=0.05, max_backoff_s=0.5, max_attempts=50)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_missing_ray_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_ray(name: str, *args: Any, **options: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(InputError, match=r'pip install "cotune\[cloud,ray\]"'):
        check_ray()


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="replicas is 0, expected at least 1"):
        ClusterConfig(replicas=0)
    with pytest.raises(InputError, match="gpus is -1, expected 0 or more"):
        ClusterConfig(gpus=-1)


def test_ray_is_not_loaded_before_it_is_needed() -> None:
    assert "ray" not in sys.modules


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray Serve: pip install 'cotune[ray]'")
async def test_a_killed_replica_costs_no_text(tmp_path: Path) -> None:
    log, port = tmp_path / "log", free_port()
    command = ["-m", "cotune", "cloud", "starter", "--engine", "ray", "--replicas", "2", "--threads", "1", "--json"]
    backbone = Backbone.from_pretrained("starter")
    plugin = random_plugin(backbone, 1.0)
    requests = [
        GenerationRequest(
            prompt_ids=held_out_prompts(backbone, NUM_DEVICES)[seed],
            max_new_tokens=NUM_TOKENS,
            stop_token_ids=backbone.spec.eos_token_ids,
        )
        for seed in range(NUM_DEVICES)
    ]
    with python(*command, "--port", str(port), log=log) as cloud:
        url = (await asyncio.to_thread(read_json, cloud, log))["url"]
        replicas = [one for one in descendants(cloud) if one.name().startswith("ray::ServeRepl")]
        assert len(replicas) == 2
        killed: list[int] = []
        reconnects = 0

        def strike(_: object) -> None:
            if not killed and sum(len(stream.decisions) for stream in streams) >= 12:
                killed.append(replicas[0].pid)
                replicas[0].kill()

        async def run(stream: DeviceStream) -> int:
            async with CloudClient(lambda: connect(url), STUBBORN) as client:
                await client.generate(stream, strike)
                return client.num_reconnects

        streams = [stream_for(backbone, plugin, request) for request in requests]
        async with asyncio.timeout(60):
            reconnects = sum(await asyncio.gather(*map(run, streams)))
        assert killed and reconnects >= 1
        expected = [generate(backbone, device_for(plugin).personal, request).token_ids for request in requests]
        assert [stream.token_ids for stream in streams] == expected

        # Asked to end in the middle of a text, the cloud first lets it finish; then nothing is left.
        started = [one for one in descendants(cloud) if is_alive(one)]
        longest = max(range(NUM_DEVICES), key=lambda i: len(expected[i]))
        last = stream_for(backbone, plugin, requests[longest])

        def end(_: object) -> None:
            if len(last.decisions) == 3:
                cloud.terminate()

        async with asyncio.timeout(60), CloudClient(lambda: connect(url), STUBBORN) as client:
            await client.generate(last, end)
        assert last.token_ids == expected[longest]
        assert await asyncio.to_thread(cloud.wait, 60) == 0, log.read_text()[-3000:]
        assert await asyncio.to_thread(wait_until, lambda: not any(map(is_alive, started)))


@pytest.mark.integration
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray Serve: pip install 'cotune[ray]'")
async def test_a_replica_serves_the_same_application(tmp_path: Path) -> None:
    """Tokens, health, metrics, the OpenAI interface, and no web pages: as `cotune.cloud.host` serves them."""
    log, port, tokens = tmp_path / "log", free_port(), tmp_path / "tokens"
    tokens.write_text("s3cret\n", encoding="utf-8")
    command = ["-m", "cotune", "cloud", "starter", "--engine", "ray", "--replicas", "1", "--threads", "1", "--json"]
    with python(*command, "--port", str(port), "--token-file", str(tokens), log=log) as cloud:
        url = (await asyncio.to_thread(read_json, cloud, log))["url"]
        for token in (None, "wrong"):
            with pytest.raises(RefusedError, match="does not accept the token"):
                await connect(url, token=token)
        with pytest.raises(InvalidStatus, match="403"):
            await raw_connect(url, origin=Origin("https://evil.example"), additional_headers=bearer("s3cret"))
        async with CloudClient(lambda: connect(url, token="s3cret")) as device:
            assert device.description.model == "starter"
        assert await get(url, "/healthz") == (200, "ok\n")
        for path in ("/metrics", "/v1/models"):
            assert (await get(url, path))[0] == 401
            assert (await get(url, path, "s3cret"))[0] == 200
            assert (await get(url, path, "s3cret", Origin="https://evil.example"))[0] == 403
        _, metrics = await get(url, "/metrics", "s3cret")
        assert 'cotune_refusals_total{reason="invalid_api_key"} 4' in metrics
        web = url.replace("ws", "http", 1)
        async with openai.AsyncOpenAI(base_url=web + "/v1", api_key="s3cret", max_retries=0, timeout=20) as client:
            asked: dict[str, Any] = {"model": "starter", "prompt": "Please turn", "max_tokens": 8, "temperature": 0}
            whole = (await client.completions.create(**asked)).choices[0].text
            stream = await client.completions.create(**asked, stream=True)
            pieces = [chunk.choices[0].text async for chunk in stream if chunk.choices]
        assert whole and "".join(pieces) == whole and len(pieces) > 4


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def stream_for(backbone: Backbone, plugin: Plugin, request: GenerationRequest) -> DeviceStream:
    shape = backbone.description.num_taps, backbone.description.tap_dim
    return DeviceStream(request, device_for(plugin).personal, tap_shape=shape, schedule="blocking")
