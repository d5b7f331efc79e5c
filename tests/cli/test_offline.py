"""`cotune device generate` and `serve` with an offline model: alone, beside a cloud, and without PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from offline_folders import CONTEXT, END, TinyLlama, random_adapter, write_onnx_folder, write_peft_folder
from toy import toy_model
from toy_plugin import toy_plugin

from cotune.device.offline.drafter import OfflineDrafter
from cotune.generation.sampling import Sampling, choose

TINY = TinyLlama()
NOWHERE = "ws://127.0.0.1:9"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx_folder(tmp_path_factory.mktemp("offline") / "small", TINY)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    toy_plugin().save(tmp_path / "my-plugin")
    return tmp_path / "my-plugin"


@pytest.fixture(scope="module")
def cloud() -> Iterator[str]:
    with in_a_thread(toy_model()) as url:
        yield url


def expected(prompt: list[int], num: int, adapter: Any = None, sampling: Sampling | None = None) -> list[int]:
    path = list(prompt)
    while len(path) < len(prompt) + num:
        path.append(choose(TINY.logits(path, adapter)[-1], sampling or Sampling(), len(path)))
        if path[-1] == END:
            break
    return path[len(prompt) :]


def test_an_offline_model_writes_alone(run: Any, model: Path, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    arguments = ("device", "generate", "--offline", model, "w5 w9 w30", "--max-new-tokens", 8, "--threads", 1)
    told = run(*arguments, "--json", "--ledger", ledger)
    made = json.loads(told.out)
    assert told.err == "" and made["token_ids"] == expected([5, 9, 30], 8)
    assert made["text"] == " ".join(f"w{token}" for token in made["token_ids"])
    assert made["egress"] == {} and ledger.read_text() == "" and made["ending"] == "length"
    assert made["num_prompt_tokens"] == 3 and made["first_token_s"] > 0
    shown = run(*arguments)
    assert shown.out.split() == made["text"].split() and "nothing left it" in shown.err


def test_sampling_adapter_and_stop_strings(run: Any, model: Path, tmp_path: Path) -> None:
    weights = random_adapter()
    folder = write_peft_folder(tmp_path / "lora", weights)
    sampling = Sampling(temperature=1.0, seed=5)
    arguments = ("device", "generate", "--offline", model, "w5 w9", "--json", "--temperature", 1, "--seed", 5)
    made = json.loads(run(*arguments, "--adapter", folder, "--max-new-tokens", 6).out)
    assert made["token_ids"] == expected([5, 9], 6, weights, sampling)
    cut = json.loads(run(*arguments, "--adapter", folder, "--stop", f"w{made['token_ids'][2]}").out)
    assert cut["ending"] == "stop_string" and cut["text"].split() == made["text"].split()[:2]


def test_a_chat_template_unless_raw(run: Any, tmp_path: Path) -> None:
    texts = {"chat_template.jinja": "w1 {{ messages[0].content }} w4"}
    model = write_onnx_folder(tmp_path / "chatty", TINY, texts=texts)
    arguments = ("device", "generate", "--offline", model, "w5", "--json", "--max-new-tokens", 4)
    assert json.loads(run(*arguments).out)["token_ids"] == expected([1, 5, 4], 4)
    assert json.loads(run(*arguments, "--raw").out)["token_ids"] == expected([5], 4)


def test_with_a_cloud_that_is_away_the_offline_model_writes_for_the_plugin(
    run: Any, model: Path, plugin: Path, cloud: str
) -> None:
    arguments = ("device", "generate", plugin, "w5 w9", "--offline", model, "--max-new-tokens", 6)
    made = json.loads(run(*arguments, "--cloud", NOWHERE, "--json").out)
    assert made["token_ids"] == expected([1, 5, 9, 4], 6)
    assert made["sources"] == ["local"] * 6 and made["egress"] == {}
    shown = run(*arguments, "--cloud", NOWHERE)
    assert "6 tokens are the offline model's, because the cloud was out of reach" in shown.err
    there = json.loads(run(*arguments, "--cloud", cloud, "--json").out)
    assert "local" not in there["sources"] and there["egress"]["open"]["count"] == 1


def test_the_offline_model_drafts_where_the_schedule_is_drafted(
    run: Any, model: Path, plugin: Path, cloud: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether a draft is sent depends on how far the cloud is by then, so that what is counted is who was asked.
    asked: list[list[int]] = []
    draft = OfflineDrafter.draft
    monkeypatch.setattr(OfflineDrafter, "draft", lambda self, path, k: asked.append(path) or draft(self, path, k))
    arguments = ("device", "generate", plugin, "w5 w9", "--cloud", cloud, "--max-new-tokens", 12, "--json")
    plain = json.loads(run(*arguments).out)
    assert not asked
    # A busy machine is no cloud that is away.
    patient = ("--fallback-after", 60, "--window", 1)
    drafted = json.loads(run(*arguments, "--schedule", "drafted", "--offline", model, *patient).out)
    assert drafted["token_ids"] == plain["token_ids"] and asked
    asked.clear()
    other = write_onnx_folder(tmp_path / "other", TINY, tokenizer_json=b'{"version": "1.0"}')
    refused = run(*arguments, "--schedule", "drafted", "--offline", other)
    assert refused.status == 2
    lookup = json.loads(run(*arguments, "--schedule", "drafted").out)
    assert lookup["token_ids"] == plain["token_ids"] and not asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--offline", "MODEL"], "PROMPT is empty"),
        (["--offline", "nowhere", "w5"], "nowhere is no folder, expected an offline model"),
        (["PLUGIN", "w5", "--offline", "MODEL"], "PLUGIN is given without --cloud, expected both, or --offline and"),
        (["PLUGIN", "w5"], "--cloud is missing, expected PLUGIN, PROMPT and --cloud, or --offline and PROMPT"),
        (["PLUGIN", "--cloud", NOWHERE], "PROMPT is missing"),
        (["--cloud", NOWHERE], "PLUGIN is missing"),
        (["PLUGIN", "w5", "--cloud", NOWHERE, "--threads", "2"], "--threads is given without --offline"),
        (["PLUGIN", "w5", "--cloud", NOWHERE, "--memory-limit", "1GB"], "--memory-limit is given without --offline"),
        (["--offline", "MODEL", "w5", "--schedule", "drafted"], "--schedule needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "w5", "--num-beams", "2"], "--num-beams needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "w5", "--rtt-ms", "50"], "--rtt-ms needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "w5", "--context", "65"], "context is 65, expected at most 64"),
        (["--offline", "MODEL", "w5", "--threads", "0"], "num_threads is 0"),
        (["--offline", "MODEL", "w5", "--memory-limit", "1MB"], "expected at most 1.0 MiB, the memory limit"),
        (["--offline", "MODEL", "w5", "--memory-limit", "much"], "--memory-limit is 'much'"),
        (["--offline", "MODEL", "w5", "--adapter", "nowhere"], "adapter_config.json is missing"),
        (["--offline", "MODEL", "w5 " * CONTEXT], "the prompt has 64 tokens, expected fewer than 64"),
        (["PLUGIN", "w5", "--cloud", NOWHERE, "--offline", "MODEL", "--num-beams", "2"], "beams need the cloud"),
        (["PLUGIN", "w5", "--cloud", NOWHERE, "--offline", "MODEL", "--fallback-after", "0"], "patience_s is 0"),
    ],
)
def test_refusals(run: Any, model: Path, plugin: Path, arguments: list[str], words: str) -> None:
    known = {"MODEL": model, "PLUGIN": plugin}
    run("device", "generate", *[known.get(one, one) for one in arguments]).check_refusal(words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PLUGIN is missing, expected PLUGIN and --cloud, or --offline alone"),
        (["PLUGIN"], "--cloud is missing"),
        (["PLUGIN", "--offline", "MODEL"], "--cloud is missing"),
        (["--cloud", NOWHERE, "--offline", "MODEL"], "PLUGIN is missing"),
        (["--offline", "MODEL", "--mode", "spa"], "--mode needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "--schedule", "optimistic"], "--schedule needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "--fallback-after", "1"], "--fallback-after needs PLUGIN and --cloud"),
        (["--offline", "MODEL", "--timeout-s", "1"], "--timeout-s needs PLUGIN and --cloud"),
        (["PLUGIN", "--cloud", NOWHERE, "--context", "9"], "--context is given without --offline"),
        (["--offline", "MODEL", "--memory-limit", "1MB"], "expected at most 1.0 MiB, the memory limit"),
    ],
)
def test_refusals_to_serve(run: Any, model: Path, plugin: Path, arguments: list[str], words: str) -> None:
    known = {"MODEL": model, "PLUGIN": plugin}
    told = run("device", "serve", *[known.get(one, one) for one in arguments], "--port", 0)
    told.check_refusal(words)


def serve(*arguments: object) -> subprocess.Popen[str]:
    # What would load PyTorch fails, in whatever module.
    blocked = "import sys; sys.modules.update(torch=None, transformers=None, onnx=None); sys.argv[0] = 'cotune'; "
    code = blocked + "from cotune.cli.main import main; main()"
    command = [sys.executable, "-c", code, "device", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def complete(told: dict[str, str], prompt: str) -> dict[str, Any]:
    body = json.dumps({"model": told["model"], "prompt": prompt, "max_tokens": 5}).encode()
    request = urllib.request.Request(f"{told['base_url']}/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return dict(json.load(response))


@pytest.mark.integration
def test_it_serves_alone_and_for_an_absent_cloud_in_a_process_without_torch(
    model: Path, plugin: Path, tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    alone = serve("--offline", model, "--port", 0, "--json", "--threads", 1, "--ledger", ledger)
    fallback = serve(plugin, "--cloud", NOWHERE, "--offline", model, "--port", 0, "--json", "--ledger", ledger)
    try:
        for process, name in ((alone, "small"), (fallback, "my-plugin")):
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            assert told["model"] == name
            made = complete(told, "w5 w9 w30")
            assert made["choices"][0]["text"].split() == [f"w{token}" for token in expected([5, 9, 30], 5)]
            assert made["cotune"]["metrics"]["local"] == 5
            process.terminate()
            assert (process.wait(timeout=20), process.stderr.read() if process.stderr else "") == (0, "")
    finally:
        for process in (alone, fallback):
            process.kill()
            process.communicate()
    assert ledger.read_text() == ""


def test_help_shows_how(run: Any) -> None:
    for command in ("generate", "serve"):
        told = run("device", command, "--help")
        assert told.status == 0 and "--offline" in told.out and "--fallback-after" in told.out
        assert "--offline my-model" in " ".join(told.out.split())
