"""`cotune tune` and `cotune evaluate` in this process, with every kind of result, on the built-in model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cotune
from cotune.cli.tune_checks import ATTACHED_METHODS, METHODS, RESULT_FILES, SPARSE_CRITERIA, ZO_RULES
from cotune.plugin import Plugin
from cotune.tuning.adaptations import ADAPTATIONS
from cotune.tuning.estimators import RULES
from cotune.tuning.lora_init import INITS
from cotune.tuning.sparse_mask import CRITERIA

STARTER = Path(cotune.__file__).parent / "models" / "starter" / "model.safetensors"
needs_starter = pytest.mark.skipif(
    not STARTER.is_file(), reason="the starter model has no weights yet; make them with scripts/train_starter.py"
)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": f"User: Where is box {i}?\nAssistant:", "completion": f" In room {i % 3}."} for i in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_words_of_the_command_are_those_of_the_tables(run: Any) -> None:
    assert tuple(ADAPTATIONS) == ATTACHED_METHODS and METHODS[-1] == "side"
    assert (tuple(RULES), CRITERIA) == (ZO_RULES, SPARSE_CRITERIA)
    told = " ".join(run("tune", "--help").out.split())
    assert all(name in told for name in (*METHODS, *INITS))
    assert RESULT_FILES.keys() <= set(METHODS)


@needs_starter
@pytest.mark.parametrize(
    ("method", "options", "kept"),
    [
        ("full", ("--merged", "MERGED", "--gradient-checkpointing"), "selected.safetensors"),
        ("lora", ("--rank", 2, "--alpha", 4, "--init", "pissa", "--merged", "MERGED"), "adapter_config.json"),
        ("prefix", ("--virtual-tokens", 5, "--learning-rate", 0.2, "--gradient-checkpointing"), "adapter_config.json"),
        ("adapter", ("--width", 3), "bottleneck.safetensors"),
        ("blocks", ("--memory-budget", "60MB", "--batch-size", 4), "selected.safetensors"),
    ],
)
def test_what_was_tuned_is_judged(
    tmp_path: Path, texts: Path, run: Any, method: str, options: tuple[object, ...], kept: str
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    given = [merged if option == "MERGED" else option for option in options]
    common = ("tune", "starter", texts, "--method", method, "--out", out, "--epochs", 2, *given)
    outcome = run(*common, "--json")
    assert outcome.status == 0 and outcome.err == "", outcome.err
    told = json.loads(outcome.out)
    assert told["method"] == method and (out / kept).is_file()
    assert told["heldout_nats_per_token"] < told["base_nats_per_token"]
    assert told["tokens_per_s"] > 0 and told["seconds"] > 0
    assert (told["predicted_peak_bytes"] is None) == (method == "blocks")
    kept_summary = json.loads((tmp_path / "out.run" / "summary.json").read_text(encoding="utf-8"))
    page = (tmp_path / "out.run" / "report.html").read_text(encoding="utf-8")
    assert kept_summary == told and f"{method} on starter" in page and "<svg" in page
    config = json.loads((tmp_path / "out.run" / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["method"] == method and config["resolved"]["loop"]["epochs"] == 2
    expected = 0.2 if method == "prefix" else ADAPTATIONS[method].learning_rate
    assert config["resolved"]["loop"]["learning_rate"] == expected

    limits = ("--limit", 3, "--max-new-tokens", 4, "--json")
    judged = run("evaluate", "starter", texts, "--adapter", out, *limits)
    assert judged.status == 0 and judged.err == "", judged.err
    scores = json.loads(judged.out)
    base = json.loads(run("evaluate", "starter", texts, *limits).out)
    assert scores["nats_per_token"] < base["nats_per_token"]
    if merged in given:
        whole = json.loads(run("evaluate", merged, texts, *limits).out)
        assert whole["nats_per_token"] == pytest.approx(scores["nats_per_token"], abs=1e-3)
    if method == "lora":
        assert json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))["r"] == 4, "twice the rank of 2"
        by_other_name = json.loads(run("evaluate", "starter", texts, "--lora", out, *limits).out)
        assert np.isclose(by_other_name["nats_per_token"], scores["nats_per_token"])
    if method == "blocks":
        # A run that is over is resumed to the same result.
        again = json.loads(run(*common, "--resume", "--json").out)
        assert again["peak_bytes"] >= told["peak_bytes"] > 0, "the most of all parts of the run"
        assert {**again, "peak_bytes": 0} == {**told, "peak_bytes": 0}


@needs_starter
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--method", "blocks", "--memory-budget", "1MB"), "memory"),
        (("--method", "lora", "--init", "eva", "--rank", 4096), "rank"),
        (("--method", "lora", "--max-length", 513), "--max-length is 513, expected at most 512"),
        (("--method", "prefix", "--virtual-tokens", 9, "--max-length", 504), "at most 503, the tokens that the model"),
        (("--method", "soft_prompt", "--virtual-tokens", 600), "--virtual-tokens is 600, expected at most 510"),
        (("--method", "side", "--max-length", 100_000), "--max-length is 100000, expected at most 512"),
    ],
)
def test_a_refusal_after_loading_leaves_nothing(
    tmp_path: Path, texts: Path, run: Any, options: tuple[object, ...], words: str
) -> None:
    out = tmp_path / "new" / "out"
    run("tune", "starter", texts, *options, "--out", out).check_refusal(words)
    assert list(tmp_path.iterdir()) == [texts]
    # What a user or an earlier run put there stays as it is.
    kept = tmp_path / "new" / "out.run"
    kept.mkdir(parents=True)
    for name in ("config.json", "notes.txt"):
        (kept / name).write_text("mine", encoding="utf-8")
    run("tune", "starter", texts, *options, "--out", out).check_refusal(words)
    assert {path.name: path.read_text(encoding="utf-8") for path in kept.iterdir()} == {
        "config.json": "mine",
        "notes.txt": "mine",
    }


@needs_starter
def test_an_earlier_result_of_another_method_is_kept(tmp_path: Path, texts: Path, run: Any) -> None:
    out = tmp_path / "out"
    common = ("tune", "starter", texts, "--epochs", 1, "--out", out)
    assert run(*common, "--method", "bias").status == 0
    run(*common, "--method", "lora").check_refusal(f"--out is {out}, which holds something else")
    assert run(*common, "--method", "full", "--json").status == 0, "another result of the same kind is written over"


@needs_starter
def test_a_score_gets_better_without_a_gradient(tmp_path: Path, texts: Path, run: Any) -> None:
    options = ("--estimator", "zeroth_order", "--objective", "token_f1", "--zo-rule", "momentum", "--sparse-share", 0.5)
    common = ("tune", "starter", texts, "--method", "lora", "--limit", 10, "--max-length", 64, "--epochs", 1)
    outcome = run(*common, "--out", tmp_path / "out", *options, "--json")
    assert outcome.status == 0 and outcome.err == "", outcome.err
    told = json.loads(outcome.out)
    assert 0 <= told["base_token_f1"] <= told["heldout_token_f1"] <= 1
    assert "heldout_nats_per_token" not in told
    assert "Loss (1 - token_f1)" in (tmp_path / "out.run" / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    words = ("good", "bad")
    rows = [
        {"prompt": f"User: Is box {i} good or bad?\nAssistant:", "completion": f" {words[i % 2]}"} for i in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@needs_starter
def test_accuracy_of_label_words_is_raised_and_judged(tmp_path: Path, reviews: Path, run: Any) -> None:
    out = tmp_path / "out"
    common = ("tune", "starter", reviews, "--estimator", "zeroth_order", "--objective", "accuracy")
    outcome = run(*common, "--epochs", 2, "--heldout-share", 0.4, "--out", out, "--json")
    assert outcome.status == 0 and outcome.err == "", outcome.err
    told = json.loads(outcome.out)
    assert 0 <= told["base_accuracy"] <= told["heldout_accuracy"] <= 1 and "heldout_nats_per_token" not in told
    config = json.loads((tmp_path / "out.run" / "config.json").read_text(encoding="utf-8"))["config"]
    assert config["labels"] == ["bad", "good"], "the words that the targets are"
    run(*common, "--labels", "good,fine", "--out", out).check_refusal(
        "has the target 'bad', expected one of the labels"
    )

    limits = ("--limit", 4, "--max-new-tokens", 2)
    judged = run("evaluate", "starter", reviews, "--adapter", out, "--labels", "good,bad", *limits, "--json")
    assert judged.status == 0 and judged.err == "", judged.err
    scores = json.loads(judged.out)
    assert scores["label_accuracy"] in (0, 0.25, 0.5, 0.75, 1)
    # A word that nobody writes is never the likeliest.
    for target, accuracy in (("good", 1), ("qzxjkqzxjk", 0)):
        asked = tmp_path / f"{target}.jsonl"
        asked.write_text(json.dumps({"prompt": "Is it good?", "completion": f" {target}"}) + "\n", encoding="utf-8")
        found = run("evaluate", "starter", asked, "--labels", "qzxjkqzxjk,good", "--max-new-tokens", 2, "--json")
        assert json.loads(found.out)["label_accuracy"] == accuracy
    words = run("evaluate", "starter", reviews, "--labels", "good", "--labels", "bad", *limits).out
    assert "accuracy" in words and "label words good, bad" in words
    silent = run("evaluate", "starter", reviews, *limits)
    assert "label words" not in silent.out
    run("evaluate", "starter", reviews, "--labels", "good,fine").check_refusal("a text has the target 'bad'")


def test_too_many_labels_are_texts(tmp_path: Path, run: Any) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": "Where?", "completion": f" In room {i}."} for i in range(51)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    common = ("tune", "starter", path, "--estimator", "zeroth_order", "--objective", "accuracy")
    run(*common, "--out", tmp_path / "out").check_refusal("are 51 different words, expected 2 to 50 label words")
    assert list(tmp_path.iterdir()) == [path]


@needs_starter
def test_a_private_plugin_has_no_gate_and_says_what_it_spent(tmp_path: Path, texts: Path, run: Any) -> None:
    pytest.importorskip("opacus", reason="needs cotune[private]")
    common = ("tune", "starter", texts, "--method", "side", "--limit", 12, "--epochs", 1, "--out", tmp_path / "out")
    # So much that the slow accountant is not asked.
    outcome = run(*common, "--dp-epsilon", 60, "--json")
    assert outcome.status == 0 and outcome.err == "", outcome.err
    told = json.loads(outcome.out)
    assert "epsilon" in told["privacy"] and told["privacy_assumptions"]
    plugin = Plugin.load(tmp_path / "out")
    assert plugin.gate is None and plugin.training["privacy"] == told["privacy"]
    page = (tmp_path / "out.run" / "report.html").read_text(encoding="utf-8")
    assert "What it gives away of a text" in page and "No texts were held out" in page
    again = run(*common, "--dp-epsilon", 4, "--side", "attention", "--side-init", "backbone")
    again.check_refusal("--side-init backbone looks at the private texts")


@needs_starter
def test_zeroth_order_can_be_private(tmp_path: Path, texts: Path, run: Any) -> None:
    pytest.importorskip("opacus", reason="needs cotune[private]")
    common = ("tune", "starter", texts, "--limit", 12, "--epochs", 1, "--dp-epsilon", 60, "--out", tmp_path / "out")
    outcome = run(*common, "--estimator", "zeroth_order", "--directions", 2, "--json")
    assert outcome.status == 0 and outcome.err == "", outcome.err
    assert "epsilon" in json.loads(outcome.out)["privacy"]
    run(*common, "--estimator", "forward_gradient").check_refusal("its gate looks at the texts without noise")
    run(*common, "--zo-eps", 0.1).check_refusal("'backprop', which has no zo_eps")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--objective", "bleu"), "--objective is 'bleu', expected one of nats, rouge_l, token_f1, exact_match"),
        (("--objective", "rouge_l"), "--objective is 'rouge_l' and --estimator 'backprop', expected zeroth_order"),
        (("--objective", "accuracy"), "--objective is 'accuracy' and --estimator 'backprop', expected zeroth_order"),
        (("--labels", "a,b"), "--labels is given and --objective is 'nats', expected accuracy"),
        (("--method", "side", "--labels", "a,b"), "--method is 'side', which has no --labels; leave it out"),
        (("--sparse-by", "gradient"), "--sparse-by is given without --sparse-share"),
        (("--sparse-by", "luck"), "--sparse-by is 'luck', expected one of gradient, magnitude"),
        (("--sparse-share", "3"), "--sparse-share is 3.0, expected above 0 and at most 1"),
        (("--zo-rule", "sgd"), "--zo-rule is 'sgd', expected one of plain, momentum, adam"),
        (("--method", "side", "--zo-rule", "adam"), "--method is 'side', which has no --zo-rule; leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, texts: Path, run: Any, options: tuple[str, ...], words: str
) -> None:
    run("tune", "starter", texts, "--out", tmp_path / "out", *options).check_refusal(words)
    assert not (tmp_path / "out").exists()
