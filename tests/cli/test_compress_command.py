"""`cotune compress` from words to a folder that the other commands take, with its report card."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clouds import in_a_thread
from llama_folders import save_llama
from offline_folders import TinyLlama, write_onnx_folder

from cotune.cloud.hosted import HostedModel
from cotune.data.assistant_text import generate_exchanges
from cotune.models.backbone import Backbone

Run = Any
pytest.importorskip("onnx", reason="onnx is not installed")
QUICK = ("--rounds", 0, "--max-new-tokens", 2, "--eval-limit", 2, "--max-length", 24, "--calibration-length", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "mine"
    save_llama(folder, num_hidden_layers=3)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [{"request": each.request[:12], "answer": each.answer[:12]} for each in generate_exchanges(16, seed=3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_whole_chain(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    """One command; then the result is evaluated, and writes offline, with its adapter."""
    out = tmp_path / "small"
    words = ("compress", model, "--out", out, "--prune", "depth:1", "--quantize", "gptq:4", "--export", "onnx")
    made = run(*words, "--recover", "--calibration", texts, "--data", texts, *QUICK, "--json")
    assert made.status == 0, made.err
    told = json.loads(made.out)
    kinds = ["source", "prune", "recover", "quantise", "recover", "export"]
    assert [row["kind"] for row in told["rows"]] == kinds
    sizes = [row["size_bytes"] for row in told["rows"]]
    assert sizes[0] > sizes[1] == sizes[2] > sizes[3] and sizes[4] > sizes[3]
    assert all(row["judgement"]["perplexity"] > 1 for row in told["rows"])
    agreement = told["rows"][-1]["agreement"]
    assert agreement["num_prompts"] == 2 == len(agreement["differences"]) + agreement["num_texts_same"]
    adapter = tmp_path / "small.adapter"
    assert told["adapter"] == str(adapter) and (tmp_path / "small.run" / "metrics.jsonl").is_file()
    config = json.loads((tmp_path / "small.run" / "config.json").read_text())
    assert config["command"] == "cotune compress" and len(config["config"]["resolved"]["stages"]) == 5
    page = Path(told["report"]).read_text(encoding="utf-8")
    assert "quantise gptq 4 bits" in page and "Does the exported model write the same?" in page

    judged = run("evaluate", out, texts, "--adapter", adapter, "--limit", 2, "--max-new-tokens", 2, "--json")
    assert json.loads(judged.out)["nats_per_token"] == told["rows"][-1]["judgement"]["nats_per_token"]
    offline = ("device", "generate", "--offline", out, "Hello", "--max-new-tokens", 3, "--json", "--adapter", adapter)
    assert json.loads(run(*offline).out)["num_tokens"] >= 1
    run(*words, "--calibration", texts).check_refusal("is there already, expected a new name")


def test_a_model_folder_is_a_model(run: Run, model: Path, texts: Path, tmp_path: Path) -> None:
    """Without export, `evaluate` gives the score of the report card; the table is for people."""
    out = tmp_path / "small"
    words = ("compress", model, "--out", out, "--quantize", "rtn:8", "--data", texts, *QUICK)
    made = run(*words)
    assert "quantise rtn 8 bits" in made.out and "perplexity" in made.out and "report.html" in made.err
    rows = [json.loads(line) for line in (tmp_path / "small.run" / "metrics.jsonl").read_text().splitlines()]
    judged = run("evaluate", out, texts, "--limit", 2, "--max-new-tokens", 2, "--json")
    assert json.loads(judged.out)["nats_per_token"] == rows[-1]["judgement"]["nats_per_token"]


def test_an_interrupted_run_measures_nothing_twice(
    run: Run, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cotune.cli import compress_card

    words = ("compress", model, "--out", tmp_path / "small", "--prune", "magnitude:0.5", "--quantize", "rtn:4")
    words = (*words, "--data", texts, *QUICK, "--json")
    judge, calls = compress_card.judge_model, [0]

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return judge(*arguments, **options)

    monkeypatch.setattr(compress_card, "judge_model", interrupted)
    assert run(*words).status == 130
    assert not (tmp_path / "small").exists()
    told = json.loads(run(*words, "--resume").out)
    # Source and pruned model before the interrupt, the quantised one once more after it.
    assert calls[0] == 4 and len(told["rows"]) == 3 and (tmp_path / "small" / "packed.json").is_file()
    again = (*words[:3], tmp_path / "straight", *words[4:])
    straight = json.loads(run(*again).out)
    assert straight["rows"] == told["rows"]
    for name in ("packed.safetensors", "model.safetensors", "config.json"):
        assert (tmp_path / "small" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_what_cannot_run_here_is_written_and_not_judged(
    run: Run, model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GGUF file for another machine: llama.cpp takes a quarter of an hour to compile."""
    from cotune.cli import compress_card

    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setattr(compress_card, "missing_runtime", lambda folder: "llama-cpp-python")
    words = ("compress", model, "--out", tmp_path / "small", "--export", "gguf:F16", "--data", texts, *QUICK, "--json")
    told = json.loads(run(*words).out)
    source, exported = told["rows"]
    assert (tmp_path / "small" / "model.gguf").is_file() and exported["size_bytes"] > 0
    assert source["judgement"] is not None and "judgement" not in exported and "agreement" not in exported
    assert "llama-cpp-python is not installed here" in Path(told["report"]).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cloud(model: Path) -> Iterator[str]:
    with in_a_thread(HostedModel.of(Backbone.from_pretrained(str(model)))) as url:
        yield url


def test_a_teacher_behind_a_cloud(run: Run, model: Path, texts: Path, tmp_path: Path, cloud: str) -> None:
    """Every text is asked about once, and what goes there is in the ledger."""
    distill = ("--distill", "forward:2,epochs=2", "--teacher", cloud, "--train-data", texts)
    made = run("compress", model, "--out", tmp_path / "small", *distill, *QUICK, "--json")
    assert made.status == 0, made.err
    assert json.loads(made.out)["rows"][-1]["name"] == "distil forward to 2 layers"
    sent = [json.loads(line) for line in (tmp_path / "small.run" / "ledger.jsonl").read_text().splitlines()]
    assert {each["way"] for each in sent} == {"distil"}
    different = set(texts.read_text(encoding="utf-8").splitlines())
    assert sum(each["kind"] == "features request" for each in sent) == len(different) == 15


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "nothing is to be done, expected --prune, --distill, --quantize or --export"),
        (("--prune", "dpth:1"), "--prune dpth:1: the pruner is 'dpth', expected one of magnitude, wanda"),
        (("--prune", "channels:1.5"), "--prune channels:1.5: the amount is '1.5', expected a share above 0"),
        (("--quantize", "gptq:4"), "measures layers on texts and none came; give calibration texts"),
        (("--prune", "magnitude:0.5", "--recover"), "learns from texts and none came"),
        (("--quantize", "gptq:9"), "--quantize gptq:9: bits are 9"),
        (("--export", "tflite"), "--export tflite: export is 'tflite', expected onnx or gguf"),
        (("--quantize", "rtn:4", "--teacher", "starter"), "--teacher is given without --distill"),
        (("--quantize", "rtn:4", "--rounds", 1), "--rounds is 1, expected at least 2, or 0"),
        (("--quantize", "rtn:4", "--threads", 0), "--threads is 0, expected at least 1"),
        (("--quantize", "rtn:4", "--calibration-length", -1), "--calibration-length is -1, expected at least 1"),
        (("--quantize", "rtn:4", "--labels", "a,b"), "--labels are given without --data"),
        (("--quantize", "rtn:4", "--calibration", "none.jsonl"), "there is no such file"),
    ],
)
def test_refusals_leave_nothing(run: Run, model: Path, tmp_path: Path, options: tuple[object, ...], words: str) -> None:
    run("compress", model, "--out", tmp_path / "small", *options).check_refusal(words)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_that_cannot_teach_is_refused_before_anything_is_measured(
    run: Run, model: Path, texts: Path, tmp_path: Path, cloud: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cotune.cli.compress_card.ReportCard.add_source", lambda *_: pytest.fail("it was measured"))
    words = ("compress", model, "--out", tmp_path / "small", "--distill", "js:2", "--train-data", texts, *QUICK)
    same = ", expected the same; take a model with the teacher's tokenizer.json"
    run(*words, "--teacher", "starter").check_refusal(same)
    assert run(*words, "--teacher", "ws://127.0.0.1:1").err.startswith("error: no cloud answers at ws://127.0.0.1:1")
    run("compress", "starter", *words[2:], "--teacher", cloud).check_refusal(same)
    run(*words, "--teacher", tmp_path / "nowhere").check_refusal("is no folder")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_one_sentence(run: Run, model: Path, tmp_path: Path, monkeypatch: Any) -> None:
    words = ("--out", tmp_path / "small", "--export", "onnx", "--rounds", 0)
    run("compress", tmp_path / "nowhere", *words).check_refusal("is no folder")
    exported = write_onnx_folder(tmp_path / "exported", TinyLlama())
    run("compress", exported, *words).check_refusal("has no config.json")
    monkeypatch.setattr("cotune.compression.onnx_export.importlib.util.find_spec", lambda name: None)
    run("compress", model, *words).check_refusal("install cotune[export]")
    assert not (tmp_path / "small").exists() and not (tmp_path / "small.run").exists()
