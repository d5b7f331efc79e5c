"""`cotune plan`: what fits and what does not, as a table and as JSON, and bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from cotune.cli.plan_command import COMMANDS
from cotune.cli.tune_checks import METHODS as TUNE_METHODS
from cotune.evaluation.method_cost import CHECKPOINTED, METHODS
from cotune.evaluation.plan import PREFERENCE
from cotune.tuning.adaptations import ADAPTATIONS

FAST = ("--gflops", 50)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 512,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    return tmp_path


def test_every_method_of_tune_can_be_planned() -> None:
    """A new method has a cost, a place in the order and a command."""
    tuned = {
        command.split("--method ")[1].split()[0]: word for (word, _), command in COMMANDS.items() if "--m" in command
    }
    assert set(ADAPTATIONS) <= tuned.keys()
    assert {tuned[method] for method in ADAPTATIONS} <= set(METHODS)


def test_the_table_has_every_method_and_says_how_to_run_the_best(run: Any) -> None:
    done = run("plan", "starter", "--memory", "1GB", *FAST)
    assert done.status == 0 and done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == "starter: 2,755,008 parameters in float32, 1 x 256 tokens a step; MB of 1 GB"
    assert lines[1].split() == [
        "method",
        "weights",
        "grads",
        "optim",
        "activ",
        "peak",
        "fits",
        "GFLOP",
        "s",
        "result",
        "sent",
    ]
    names = [line.split("  ")[0].strip() for line in lines[2 : 2 + len(METHODS) + len(CHECKPOINTED)]]
    assert {name for name in names if not name.endswith(" + gc")} == set(METHODS)
    assert sum(name.endswith(" + gc") for name in names) == len(CHECKPOINTED)
    inference = lines[2].split()
    assert inference == ["inference", "11.0", "-", "-", "4.19", "15.2", "yes", "1.71", "0.03", "-", "-"]
    assert "…" not in done.out
    assert lines[-1].strip() == "cotune tune starter DATA --method full --out my-model"


def test_json_has_bytes_and_who_fits(run: Any) -> None:
    command = "plan llama-7b --memory 24GB --dtype bfloat16 --length 512 --batch 2 --gflops 1000 --json"
    done = run(*command.split())
    assert done.status == 0 and done.err == ""
    told = json.loads(done.out)
    assert (told["memory"], told["runtime"], told["flops_per_s"]) == (24 * 10**9, 450_000_000, 1e12)
    assert told["num_parameters"] == 6_738_415_616 and told["load"]["batch"] == 2
    rows = {(row["method"], row["has_checkpoints"]): row for row in told["methods"]}
    assert rows.keys() == {*PREFERENCE, ("inference", False)}
    for row in rows.values():
        assert row["fits"] is (row["peak"] + told["runtime"] <= told["memory"])
        assert row["step_s"] == pytest.approx(row["flops"] / 1e12)
    assert not rows["full", False]["fits"] and rows["qlora", True]["fits"]
    # In two bytes each, and no copy.
    assert rows["full", False]["weights"] == 2 * 6_738_415_616
    # A known shape is no model that could be loaded: its place is left open.
    assert told["best"]["method"] == "lora"
    assert told["best"]["command"].startswith("cotune tune MODEL DATA --method lora --rank 8 ")
    assert told["best"]["command"].endswith(" --dtype bfloat16")


def test_the_best_follows_the_memory(run: Any, folder: Path) -> None:
    told = json.loads(run("plan", folder, "--memory", "1GB", *FAST, "--json").out)
    assert told["best"]["method"] == "full"
    peaks = {(row["method"], row["has_checkpoints"]): row["peak"] for row in told["methods"]}
    least = min(peaks["full", False], peaks["full", True])

    def best(memory: int, *more: object) -> Any:
        words = ("--memory", f"{memory + 10**6}B", "--runtime", "1MB", *more)
        return json.loads(run("plan", folder / "config.json", *words, *FAST, "--json").out)["best"]

    assert best(least)["method"] == "full"
    smaller = best(least - 1, "--rank", 3)
    assert smaller["method"] != "full" and peaks[smaller["method"], smaller["has_checkpoints"]] < least


def test_what_fits_but_cannot_be_run_yet(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.cli.plan_command.COMMANDS", {})
    assert "None of the methods that fit is one that cotune can run yet." in run(
        "plan", folder, "--memory", "1GB", *FAST
    ).out.replace("\n", " ")


def test_the_rate_is_measured_if_it_is_not_given(run: Any, folder: Path) -> None:
    told = json.loads(run("plan", folder, "--memory", "1GB", "--threads", 1, "--json").out)
    assert 1e6 < told["flops_per_s"] < 1e15


def test_of_a_hub_model_the_config_alone_is_fetched(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(repo_id: str, filename: str) -> str:
        fetched.append((repo_id, filename))
        return str(folder / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetch)
    done = run("plan", "some-lab/some-model", "--memory", "1GB", *FAST)
    assert done.status == 0 and "cotune tune some-lab/some-model DATA" in done.out
    assert fetched == [("some-lab/some-model", "config.json")]


def test_without_a_network_one_sentence_says_so(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, filename: str) -> str:
        raise LocalEntryNotFoundError("there is no connection\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    run("plan", "some-lab/some-model", "--memory", "1GB", *FAST).check_refusal(
        "the config.json of some-lab/some-model cannot be had from the Hugging Face hub (there is no connection); give"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("gpt-9 --memory 4GB", "'gpt-9' is neither a folder nor a hub name such as"),
        ("./nowhere --memory 4GB", "'./nowhere' is neither a folder nor a hub name"),
        ("starter --memory 4", "--memory is '4', expected a positive number with a unit, such as 4GB"),
        ("starter --memory -4GB", "--memory is '-4GB', expected a positive number with a unit"),
        ("starter --memory 10MB", "no method fits 10 MB: the least is"),
        ("starter --memory 1GB --runtime much", "--runtime is 'much', expected"),
        ("starter --memory 1GB --batch 0", "batch is 0, expected at least 1"),
        ("starter --memory 1GB --length 513", "length is 513, expected at most the model's context, 512 tokens"),
        ("starter --memory 1GB --targets 300", "targets is 300, expected 1 to the length, 256"),
        ("starter --memory 1GB --dtype int4", "dtype is 'int4', expected one of float32"),
        ("starter --memory 1GB --gflops 0", "flops_per_s is 0.0, expected a positive number"),
        ("starter --memory 1GB --threads 0", "--threads is 0, expected at least 1"),
        ("starter --memory 1GB --device warp", "device is 'warp', which cannot be used here"),
        ("starter --memory 1GB --base-bits 5", "base_bits is 5, expected one of 4, 8"),
        ("starter --memory 1GB --rank 0", "rank is 0, expected at least 1"),
        ("starter --memory 1GB --rank 100000", "--rank is 100000, expected at most 512"),
        ("starter --memory 1GB --width 513", "--width is 513, expected at most 512"),
        ("starter --memory 1GB --virtual-tokens 511", "--virtual-tokens is 511, expected at most 510"),
        ("starter --memory 1GB --blocks 0", "num_blocks is 0, expected at least 1"),
        ("{folder}/vision --memory 1GB", "model_type is 'vit', expected a language model of type llama"),
        ("{folder}/empty --memory 1GB", "empty/config.json cannot be read (No such file or directory); give"),
        ("{folder}/half --memory 1GB", "half/config.json cannot be read as JSON"),
        ("{folder}/latin --memory 1GB", "latin/config.json cannot be read as JSON"),
    ],
)
def test_bad_input_is_one_sentence(run: Any, tmp_path: Path, arguments: str, words: str) -> None:
    (tmp_path / "vision").mkdir()
    (tmp_path / "vision" / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    (tmp_path / "empty").mkdir()
    for name, written in (("half", b'{"model_type":'), ("latin", b'{"model_type": "caf\xe9"}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(written)
    run("plan", *arguments.format(folder=tmp_path).split()).check_refusal(words)


def test_every_command_that_is_suggested_exists() -> None:
    names = ("rank", "shared_rank", "width", "side_width", "virtual_tokens")
    for (method, has_checkpoints), text in COMMANDS.items():
        assert (method, has_checkpoints) in PREFERENCE
        words = shlex.split(text.format(**dict.fromkeys(names, 1), model="m", memory="4GB"))
        if words[:2] == ["cotune", "tune"]:
            assert words[words.index("--method") + 1] in TUNE_METHODS
        else:
            assert words[:3] == ["cotune", "device", "tune"]
