"""`cotune device serve`: how it starts, ends, and refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from serving import endless_model
from toy import toy_model
from toy_plugin import toy_plugin


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    toy_plugin().save(tmp_path / "my-plugin")
    return tmp_path / "my-plugin"


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    with in_a_thread(toy_model()) as url:
        yield url


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cotune", "device", "serve", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "COTUNE_TOKEN"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal_ends_it_cleanly(plugin: Path, cloud: str, tmp_path: Path, number: int) -> None:
    process = start(plugin, "--cloud", cloud, "--port", 0, "--json", "--ledger", tmp_path / "ledger.jsonl")
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        assert told["model"] == "my-plugin" and told["base_url"] == f"{told['url']}/v1"
        body = {"model": "my-plugin", "prompt": "w5", "max_tokens": 3}
        request = urllib.request.Request(
            f"{told['base_url']}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            assert json.load(response)["usage"]["completion_tokens"] == 3
        process.send_signal(number)
        out, err = process.communicate(timeout=15)
        assert (process.returncode, out, err) == (0, "", "")
    finally:
        process.kill()
        process.communicate()
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert kinds[:3] == ["hello", "hello", "open"]
    assert {json.loads(line)["way"] for line in (tmp_path / "ledger.jsonl").read_text().splitlines()} == {"serve"}


@pytest.mark.integration
def test_a_second_signal_ends_it_at_once_and_without_noise(plugin: Path) -> None:
    with in_a_thread(endless_model()) as url:
        options = ("--port", 0, "--json", "--rtt-ms", 60, "--schedule", "blocking", "--max-new-tokens", 400)
        process = start(plugin, "--cloud", url, *options)
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            body = {"model": "my-plugin", "prompt": "w5", "stream": True}
            request = urllib.request.Request(
                f"{told['base_url']}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=10) as response:
                assert response.readline().startswith(b"data: {")
                process.terminate()
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(timeout=0.7)
                process.terminate()
                out, err = process.communicate(timeout=4)
            assert (process.returncode, out, err) == (0, "", "")
        finally:
            process.kill()
            process.communicate()


@pytest.mark.integration
def test_it_says_what_to_do_next(plugin: Path, cloud: str) -> None:
    process = start(plugin, "--cloud", cloud, "--port", 0, "--name", "me")
    try:
        assert process.stderr is not None
        told = ""
        while "API key" not in told:
            told += process.stderr.readline()
        assert "me: " in told and "chat page at http://127.0.0.1:" in told and "model me" in told
        process.terminate()
        assert process.wait(timeout=15) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "which others can reach; give --tls-cert, --tls-key and --token-file"),
        (["--mode", "ladder"], "mode ladder needs a plugin of family serial"),
        (["--schedule", "soon"], "schedule is 'soon', expected one of"),
        (["--temperature", "101"], "temperature is 101"),
        (["--max-concurrent", "0"], "max_concurrent is 0, expected a number above 0"),
        (["--port", "70000"], "port is 70000, expected 0 to 65535"),
        (["--token-file", "missing"], "token file missing cannot be read"),
        (["--cloud-token-file", "missing"], "token file missing cannot be read"),
        (["--tls-cert", "missing", "--tls-key", "missing"], "--tls-cert missing and --tls-key missing cannot be used"),
        (["--allow-host", "a b"], "--allow-host is 'a b'"),
    ],
)
def test_refusals(run: Any, plugin: Path, options: list[str], words: str) -> None:
    run("device", "serve", plugin, "--cloud", "ws://127.0.0.1:9", "--port", 0, *options).check_refusal(words)


def test_a_folder_that_is_no_plugin_is_refused(run: Any, tmp_path: Path) -> None:
    run("device", "serve", tmp_path, "--cloud", "ws://127.0.0.1:9").check_refusal("plugin.json")


def test_a_cloud_that_is_not_there_is_told(run: Any, plugin: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{unused.getsockname()[1]}"
    run("device", "serve", plugin, "--cloud", url, "--port", 0).check_refusal(f"no cloud answers at {url}", status=1)


def test_a_cloud_with_another_model_is_told(run: Any, cloud: str, tmp_path: Path) -> None:
    toy_plugin(tokenizer_digest="0" * 64).save(tmp_path / "other")
    words = "tuned on tokenizer 000000000000 but the cloud hosts toy"
    run("device", "serve", tmp_path / "other", "--cloud", cloud, "--port", 0).check_refusal(words)


def test_help_shows_how(run: Any) -> None:
    told = run("device", "serve", "--help")
    assert told.status == 0 and "cotune device serve my-plugin --cloud" in told.out and "--allow-host" in told.out
