"""Every command doing its work, on the built-in model with a dozen tiny texts: real processes, sockets and signals."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cotune
from cotune import __version__
from cotune.data import DEMO_PERSONA, persona_split
from cotune.plugin import Plugin
from cotune.tuning.loop import LoopConfig

STARTER = Path(cotune.__file__).parent / "models" / "starter" / "model.safetensors"
KEYS_OF_A_GENERATION = {
    "mode",
    "schedule",
    "num_tokens",
    "token_ids",
    "text",
    "sources",
    "M",
    "consult_rate",
    "disagree_rate",
    "bytes_down_per_token",
    "bytes_up_per_token",
    "wasted_cloud_steps",
    "cloud_ms_per_token",
    "device_ms_per_token",
    "stall_ms_per_token",
    "tokens_per_s",
    "certificate_misses",
}
# One thread a process: the model is small, and sums in another order would differ in their last bits.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COTUNE_TOKEN": ""}

needs_starter = pytest.mark.skipif(
    not STARTER.is_file(), reason="the starter model has no weights yet; make them with scripts/train_starter.py"
)


def cotune_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::ResourceWarning", "-m", "cotune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT)


@dataclass(frozen=True)
class Scene:
    """A cloud process, texts, and a plugin tuned on them by a device process."""

    folder: Path
    url: str
    told: dict[str, Any]

    @property
    def texts(self) -> Path:
        return self.folder / "texts.jsonl"

    @property
    def plugin(self) -> Path:
        return self.folder / "plugin"


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("commands")
    exchanges, _ = persona_split(DEMO_PERSONA, 0, 12, 1)
    rows = [{"request": exchange.request, "answer": exchange.answer} for exchange in exchanges]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "cotune", "cloud", "starter", "--port", "0", "--threads", "1", "--json"]
    cloud = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert cloud.stdout is not None
    try:
        ready = json.loads(cloud.stdout.readline())
        assert ready["model"] == "starter" and len(ready["backbone_digest"]) == 64
        url = ready["url"]
        tuned = cotune_process(
            *("device", "tune", folder / "texts.jsonl", "--cloud", url, "--out", folder / "plugin"),
            *("--epochs", 1, "--heldout-share", 0.4, "--json"),
        )
        assert tuned.returncode == 0, tuned.stderr
        assert tuned.stderr == ""
        yield Scene(folder, url, json.loads(tuned.stdout))
    finally:
        # Asked to end, a cloud ends well, also with devices that are still connected.
        cloud.send_signal(signal.SIGTERM)
        out, err = cloud.communicate(timeout=30)
    assert (cloud.returncode, out, err) == (0, "", "")


@needs_starter
@pytest.mark.integration
def test_device_tune_makes_a_plugin_and_a_run(scene: Scene) -> None:
    told, run = scene.told, scene.folder / "plugin.run"
    plugin = Plugin.load(scene.plugin)
    assert told["plugin"] == str(scene.plugin) and told["run"] == str(run)
    assert told["num_parameters"] == plugin.num_parameters > 0
    assert plugin.gate is not None and plugin.training["num_examples"] == 12
    assert plugin.training["prompt_format"] == "User: {prompt}\nAssistant:"
    assert np.isfinite([told["base_nats_per_token"], told["side_nats_per_token"]]).all()
    assert told["egress"]["features request"]["count"] == 12
    assert told["bytes_down"] > told["bytes_up"] > 0
    config = json.loads((run / "config.json").read_text())
    assert config["command"] == "cotune device tune"
    assert config["config"]["personal"]["side"]["loop"]["epochs"] == 1
    assert config["versions"]["cotune"] == __version__
    assert "<svg" in (run / "report.html").read_text()
    # Nothing unfinished stays behind, and the private weights are in the plugin and the run alone.
    assert {path.name for path in scene.folder.iterdir()} >= {"plugin", "plugin.run", "texts.jsonl"}
    assert not [path for path in scene.folder.rglob("*") if path.name.endswith(".part") or path.name.startswith(".")]


@needs_starter
@pytest.mark.integration
def test_device_generate_prints_one_json_object(scene: Scene) -> None:
    """A process of its own, without PyTorch."""
    ledger = scene.folder / "ledger.jsonl"
    arguments = ("device", "generate", scene.plugin, "What is my dog called?", "--cloud", scene.url)
    done = cotune_process(*arguments, "--max-new-tokens", 12, "--ledger", ledger, "--json")
    assert done.returncode == 0 and done.stderr == ""
    made = json.loads(done.stdout)
    assert made.keys() >= KEYS_OF_A_GENERATION
    assert made["mode"] == "integration" and made["schedule"] == "optimistic" and made["answer"] == "correction"
    lists = ("token_ids", "sources", "tokens", "consulted")
    assert {len(made[name]) for name in lists} == {made["num_tokens"]} and 0 < made["num_tokens"] <= 12
    assert set(made["sources"]) <= {"cloud", "device"}
    assert made["consult_rate"] == 1.0 and 0 <= made["disagree_rate"] <= 1
    assert made["disagree_rate"] == pytest.approx(made["sources"].count("device") / made["num_tokens"])
    assert "".join(made["tokens"]) == made["text"]
    assert min(made[name] for name in ("bytes_down_per_token", "cloud_ms_per_token", "tokens_per_s")) > 0
    assert made["egress"]["hello"]["count"] == made["egress"]["open"]["count"] == 1
    assert ledger.read_text().count("\n") == sum(total["count"] for total in made["egress"].values())


@needs_starter
@pytest.mark.integration
def test_every_schedule_answer_and_mode_from_the_command_line(scene: Scene, run: Any) -> None:
    arguments = ("device", "generate", scene.plugin, "Hi", "--cloud", scene.url, "--max-new-tokens", 8, "--json")
    for sampling in ((), ("--temperature", 0.9, "--top-p", 0.9, "--seed", 7)):
        texts = set()
        for mode in ("integration", "spa"):
            made = [
                run(*arguments, *sampling, "--mode", mode, "--schedule", schedule, "--answer", answer)
                for schedule in ("blocking", "gated", "optimistic")
                for answer in ("token", "correction")
            ]
            assert all(outcome.status == 0 and outcome.err == "" for outcome in made)
            assert len({tuple(json.loads(outcome.out)["token_ids"]) for outcome in made}) == 1
            texts.add(json.loads(made[0].out)["text"])
        assert texts


@needs_starter
@pytest.mark.integration
def test_device_generate_drafts_from_texts_and_says_what_that_sent(run: Any, scene: Scene, tmp_path: Path) -> None:
    arguments = ("device", "generate", scene.plugin, "Hi", "--cloud", scene.url, "--max-new-tokens", 12)
    plain = json.loads(run(*arguments, "--json").out)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": plain["text"] + " and so on, and so on"}) + "\n")
    drafting = ("--schedule", "drafted", "--draft-from", texts)
    drafted = json.loads(run(*arguments, *drafting, "--json").out)
    assert drafted["token_ids"] == plain["token_ids"]
    assert drafted["drafted"] >= drafted["drafts_kept"] > 0
    assert drafted["egress"]["draft"]["count"] > 0
    assert "draft" not in plain["egress"] and plain["late"] == [] and plain["drafted"] == 0
    assert "tokens drafted" in run(*arguments, *drafting).err
    run(*arguments, "--draft-from", texts).check_refusal(
        "--draft-from needs --schedule drafted or auto, got optimistic"
    )
    run(*arguments, "--schedule", "auto", "--draft-from", tmp_path / "none").check_refusal("none")


@needs_starter
@pytest.mark.integration
def test_device_generate_marks_late_tokens(run: Any, scene: Scene) -> None:
    arguments = ("device", "generate", scene.plugin, "Hi", "--cloud", scene.url, "--max-new-tokens", 6)
    late = json.loads(run(*arguments, "--deadline-ms", 1, "--rtt-ms", 200, "--json").out)
    assert late["late"] == list(range(late["num_tokens"]))
    assert "because the device was late" in run(*arguments, "--deadline-ms", 1, "--rtt-ms", 200).err
    run(*arguments, "--deadline-ms", 5, "--answer", "token").check_refusal("deadline_ms is 5 with answer token")


@needs_starter
@pytest.mark.integration
def test_device_generate_prints_the_text_alone_on_standard_output(
    scene: Scene, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--cloud", scene.url, "--max-new-tokens", 10)
    made = json.loads(run("device", "generate", scene.plugin, "Hello [you]", *arguments, "--json").out)
    shown = run("device", "generate", scene.plugin, "Hello [you]", *arguments)
    assert shown.status == 0
    assert shown.out.strip() == made["text"].strip()
    assert f"{made['num_tokens']} tokens" in shown.err and "round trips" in shown.err
    # From standard input, and over an emulated network.
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    run("device", "generate", scene.plugin, "-", *arguments).check_refusal("PROMPT is empty")
    slow = json.loads(run("device", "generate", scene.plugin, "Hello [you]", *arguments, "--rtt-ms", 10, "--json").out)
    assert slow["token_ids"] == made["token_ids"]


@needs_starter
@pytest.mark.integration
def test_evaluate_judges_a_plugin_and_a_model(scene: Scene, run: Any) -> None:
    common = ("--limit", 4, "--max-new-tokens", 8, "--json")
    plugin = run("evaluate", scene.plugin, scene.texts, "--cloud", scene.url, *common)
    gated = run("evaluate", scene.plugin, scene.texts, "--cloud", scene.url, "--mode", "spa", *common)
    model = run("evaluate", "starter", scene.texts, *common)
    for outcome in (plugin, gated, model):
        assert outcome.status == 0 and outcome.err == ""
        told = json.loads(outcome.out)
        assert told["num_texts"] == 4
        assert all(0 <= told[name] <= 1 for name in ("rouge_l", "exact_match", "token_f1"))
        assert told["perplexity"] == pytest.approx(np.exp(told["nats_per_token"]))
        assert told["bits_per_byte"] > 0
    assert json.loads(gated.out)["mode"] == "spa"
    words = run("evaluate", "starter", scene.texts, *common[:-1])
    assert words.status == 0 and "perplexity" in words.out and "starter on 4 texts" in words.out


@needs_starter
@pytest.mark.integration
def test_evaluate_tells_how_often_the_right_label_word_is_the_likeliest(scene: Scene, run: Any, tmp_path: Path) -> None:
    for target, accuracy in (("Rome", 1), ("qzxjkqzxjk", 0)):
        path = tmp_path / f"{target}.jsonl"
        path.write_text(json.dumps({"request": "Where is it?", "answer": target}) + "\n", encoding="utf-8")
        common = ("--labels", "qzxjkqzxjk,Rome", "--max-new-tokens", 2, "--json")
        for outcome in (
            run("evaluate", scene.plugin, path, "--cloud", scene.url, *common),
            run("evaluate", "starter", path, *common),
        ):
            assert outcome.status == 0, outcome.err
            assert json.loads(outcome.out)["label_accuracy"] == accuracy


@needs_starter
@pytest.mark.integration
def test_evaluate_cuts_documents_that_are_longer_than_the_context(scene: Scene, run: Any, tmp_path: Path) -> None:
    rows = [{"document": "Rain fell on Rome. " * 2000, "summary": f"Rain {index}."} for index in range(4)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "train.jsonl").write_text("no rows", encoding="utf-8")
    common = (tmp_path, "--split", "test", "--template", "xsum", "--share", 0.5, "--max-new-tokens", 4, "--json")
    for outcome in (run("evaluate", "starter", *common), run("evaluate", scene.plugin, *common, "--cloud", scene.url)):
        assert outcome.status == 0, outcome.err
        assert json.loads(outcome.out)["num_texts"] == 2


@needs_starter
@pytest.mark.integration
def test_ledger_shows_what_left(scene: Scene, run: Any) -> None:
    folder = scene.folder / "plugin.run"
    told = json.loads(run("ledger", folder, "--json").out)
    assert told["egress"]["features request"]["count"] == 12
    assert told == json.loads(run("ledger", folder / "ledger.jsonl", "--json").out)
    table = run("ledger", folder)
    assert table.status == 0 and "features request" in table.out and "12" in table.out


@needs_starter
@pytest.mark.integration
def test_a_side_network_with_a_memory_is_tuned_and_used(scene: Scene, run: Any) -> None:
    out = scene.folder / "remembers"
    tuned = run(
        *("device", "tune", scene.texts, "--cloud", scene.url, "--out", out, "--side", "attention"),
        *("--prompt-window", 6, "--tap-step", 2, "--epochs", 1, "--heldout-share", 0.4, "--json"),
    )
    assert tuned.status == 0, tuned.err
    plugin = Plugin.load(out)
    assert plugin.kind == "attention_ladder" and plugin.config["prompt_window"] == 6
    assert plugin.config["tap_indices"] == [0, 2, 4, 6]
    told = json.loads(tuned.out)
    assert told["egress"]["features request"]["count"] == 12
    made = {}
    for schedule in ("blocking", "optimistic"):
        common = ("device", "generate", out, "Where do I live?", "--cloud", scene.url, "--max-new-tokens", 10, "--json")
        outcome = run(*common, "--schedule", schedule)
        assert outcome.status == 0, outcome.err
        made[schedule] = json.loads(outcome.out)
    assert made["blocking"]["token_ids"] == made["optimistic"]["token_ids"]
    # The prompt's last positions and every token's taps came: seven taps of 32 and a scale each.
    assert made["blocking"]["bytes_down_per_token"] * 10 > (6 + 10) * 7 * 34
    beams = run("device", "generate", out, "x", "--cloud", scene.url, "--num-beams", 2, "--schedule", "blocking")
    assert beams.status != 0 and "the side network remembers earlier positions" in beams.err.replace("\n", " ")
    judged = run("evaluate", out, scene.texts, "--cloud", scene.url, "--limit", 2, "--max-new-tokens", 4, "--json")
    assert judged.status == 0, judged.err


@needs_starter
@pytest.mark.integration
@pytest.mark.parametrize("method", ["lora", "adapter", "side"])
def test_tune_on_one_machine(scene: Scene, run: Any, method: str) -> None:
    """The folder's name is a trap for the library that prints: it must come out as it is."""
    out = scene.folder / f"{method} [bold]x[/]"
    common = ("tune", "starter", scene.texts, "--method", method, "--out", out, "--epochs", 1, "--heldout-share", 0.4)
    outcome = run(*common, "--json")
    assert outcome.status == 0 and outcome.err == ""
    told = json.loads(outcome.out)
    assert (told["method"], told["out"], told["run"]) == (method, str(out), f"{out}.run")
    assert told["num_parameters"] > 0
    assert np.isfinite([told["base_nats_per_token"], told["heldout_nats_per_token"]]).all()
    if method != "side":
        assert (out / {"lora": "adapter_config.json", "adapter": "bottleneck.safetensors"}[method]).is_file()
        judged = run(
            "evaluate", "starter", scene.texts, "--adapter", out, "--limit", 2, "--max-new-tokens", 4, "--json"
        )
        assert judged.status == 0 and json.loads(judged.out)["num_texts"] == 2
    else:
        # The plugin of `device tune` on the same texts, from the same backbone.
        mine, theirs = Plugin.load(out), Plugin.load(scene.plugin)
        assert mine.backbone_digest == theirs.backbone_digest and mine.config == theirs.config
    again = run(*common, "--resume")
    assert again.status == 0 and again.out == ""
    assert out.name in again.err.replace("\n", "")


@needs_starter
@pytest.mark.integration
def test_tune_a_side_network_that_starts_from_the_backbone(scene: Scene, run: Any) -> None:
    out = scene.folder / "from-backbone"
    common = ("tune", "starter", scene.texts, "--method", "side", "--side", "attention", "--side-init", "backbone")
    outcome = run(*common, "--out", out, "--epochs", 1, "--heldout-share", 0.4, "--side-width", 32, "--json")
    assert outcome.status == 0 and outcome.err == ""
    told, plugin = json.loads(outcome.out), Plugin.load(out)
    assert told["num_parameters"] == plugin.num_parameters
    assert (plugin.kind, plugin.config["side_width"]) == ("attention_ladder", 32)
    assert told["heldout_nats_per_token"] <= told["base_nats_per_token"] + 1e-6


# A device that saves its run all the time instead of every ten seconds. Where PAUSE names a file, it makes
# that and waits, in the middle of the training.
@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the other processes here have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


IMPATIENT = """
import os, pathlib, signal, sys, time
# Whoever runs tests in the background of a shell has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from cotune.tuning.checkpoint import Checkpoint
from cotune.tuning.loop import LoopConfig
LoopConfig.__init__.__kwdefaults__["checkpoint_interval_s"] = 0.0
save, saved = Checkpoint.save, []
def pausing(self, *args):
    save(self, *args)
    saved.append(self)
    if len(saved) == 9:
        pathlib.Path(os.environ["PAUSE"]).touch()
        time.sleep(60)
Checkpoint.save = pausing
from cotune.cli.main import main
sys.argv[0] = "cotune"
main()
"""


@needs_starter
@pytest.mark.integration
def test_an_interrupted_tuning_resumes_to_the_same_plugin(
    scene: Scene, tmp_path: Path, run: Any, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of the training of a real process, then `--resume`, against a run without a break."""
    script = tmp_path / "impatient.py"
    script.write_text(IMPATIENT, encoding="utf-8")
    arguments = ["device", "tune", str(scene.texts), "--cloud", scene.url, "--epochs", "14", "--heldout-share", "0.4"]

    paused = tmp_path / "paused"
    broken = subprocess.Popen(
        [sys.executable, str(script), *arguments, "--out", str(tmp_path / "broken")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "PAUSE": str(paused)},
    )
    deadline_s = time.monotonic() + 120
    while not paused.is_file() and broken.poll() is None and time.monotonic() < deadline_s:
        time.sleep(0.05)
    broken.send_signal(signal.SIGINT)
    out, err = broken.communicate(timeout=30)
    assert broken.returncode == 130
    assert out == ""
    assert err == "interrupted; run the same command with --resume where it offers that, to go on\n"
    assert not (tmp_path / "broken").exists() and not (tmp_path / "broken.run" / "gate").exists()

    # The last lines may be of steps after the last checkpoint.
    metrics = tmp_path / "broken.run" / "side" / "metrics.jsonl"
    kept = metrics.read_text().splitlines()[:-2]
    assert kept
    monkeypatch.setitem(LoopConfig.__init__.__kwdefaults__, "checkpoint_interval_s", 0.0)
    for name, more in (("broken", ["--resume"]), ("whole", [])):
        outcome = run(*arguments, "--out", tmp_path / name, "--json", *more)
        assert outcome.status == 0, outcome.err
        told = json.loads(outcome.out)
        # The features of an interrupted run are not asked for again.
        assert ("features request" in told["egress"]) == (name == "whole")
    for file in ("plugin.json", "plugin.safetensors"):
        assert (tmp_path / "broken" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # Also the times of the steps before the break: they were not done again.
    assert metrics.read_text().splitlines()[: len(kept)] == kept
    losses = [
        [
            {key: value for key, value in json.loads(line).items() if key != "elapsed_s"}
            for line in (tmp_path / f"{name}.run" / "side" / "metrics.jsonl").read_text().splitlines()
        ]
        for name in ("broken", "whole")
    ]
    assert losses[0] == losses[1]


def test_the_version_is_printed(run: Any) -> None:
    outcome = run("--version")
    assert (outcome.status, outcome.out) == (0, f"cotune {__version__}\n")


@pytest.mark.parametrize("command", ["demo", "cloud", "device tune", "device generate", "tune", "evaluate", "ledger"])
def test_help_shows_an_example(run: Any, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = run(*command.split(), "--help")
    assert outcome.status == 0 and outcome.err == ""
    usage, _, examples = outcome.out.partition("Examples:")
    assert f"cotune {command}" in usage
    assert f"cotune {command} " in examples or f"cotune {command}\n" in examples


def test_the_first_help_lists_every_command(run: Any) -> None:
    outcome = run("--help")
    assert outcome.status == 0
    for command in ("demo", "cloud", "device", "tune", "evaluate", "ledger"):
        assert command in outcome.out
