"""`cotune federate answer`: a device's own model and the proxy with its adapter, one answer of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from co_tuning import model_folder

from cotune.federation.agreed_answers import answer_together
from cotune.federation.causal_model import CausalModel
from cotune.federation.own_domain import OwnDomain
from cotune.federation.tuned_model import TunedModel
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.backbone import Backbone

ROWS = [("the far cat?", " hats"), ("hello world?", " the"), ("two hats?", " other")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("answer")
    proxy = model_folder(found / "proxy", "llama", "byte_level", seed=7)
    model_folder(found / "small", "mamba2", "unigram", seed=3)
    model = Backbone.from_pretrained(str(proxy)).model
    fresh = LoraAdapter.fresh(model, LoraShape(rank=2, alpha=4.0), seed=1)
    learnt = {name: torch.ones_like(one) if "lora_B" in name else one for name, one in fresh.params.items()}
    fresh.trained(learnt).save(found / "adapter", model)
    lines = [json.dumps({"prompt": prompt, "completion": answer}) for prompt, answer in ROWS]
    (found / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (found / "questions.jsonl").write_text('{"prompt": "the far cat?"}\n', encoding="utf-8")
    return found


def options(root: Path) -> list[object]:
    return ["--small", root / "small", "--proxy", root / "proxy", "--adapter", root / "adapter", "--max-new-tokens", 3]


def test_answers_are_those_of_both_models_and_are_scored(root: Path, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "answers.jsonl"
    outcome = run("federate", "answer", root / "heldout.jsonl", *options(root), "--score", "--out", out, "--json")
    assert outcome.status == 0, outcome.err
    told = json.loads(outcome.out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    writers = {
        "small": TunedModel(CausalModel(str(root / "small"))),
        "proxy": TunedModel(CausalModel(str(root / "proxy")), root / "adapter"),
    }
    wanted = answer_together(writers, [prompt for prompt, _ in ROWS], max_new_tokens=3, max_tokens=256)
    assert [(row["prompt"], row["answer"], row["by"]) for row in rows] == [
        (prompt, one.text, one.by) for (prompt, _), one in zip(ROWS, wanted, strict=True)
    ]
    assert told["num_questions"] == 3 and told["out"] == str(out)
    assert set(told["scores"]) == {"small", "proxy", "together"}
    assert all(set(one) == {"exact_match", "rouge_l"} for one in told["scores"].values())

    # What both said, as the truth: together they are always right then.
    lines = [json.dumps({"prompt": row["prompt"], "completion": f" {row['answer'].strip() or 'x'}"}) for row in rows]
    again = tmp_path / "again.jsonl"
    again.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scored = json.loads(run("federate", "answer", again, *options(root), "--score", "--json").out)
    assert scored["scores"]["together"]["exact_match"] == 1.0 and len(scored["answers"]) == 3


def test_the_small_model_counts_by_the_domain_of_the_question(root: Path, tmp_path: Path, run: Any) -> None:
    for name, prompts in (("own", ["the cat?", "the far cat"]), ("public", ["two hats?", "two?"]), ("open", ["hello"])):
        rows = [json.dumps({"prompt": prompt}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    given = [
        "--own",
        tmp_path / "own.jsonl",
        "--others",
        tmp_path / "public.jsonl",
        "--others",
        tmp_path / "open.jsonl",
    ]
    outcome = run("federate", "answer", root / "heldout.jsonl", *options(root), *given, "--json")
    assert outcome.status == 0, outcome.err
    told = [row["weights"] for row in json.loads(outcome.out)["answers"]]
    prompts = [prompt for prompt, _ in ROWS]
    chances = OwnDomain.of(["the cat?", "the far cat"], ["two hats?", "two?", "hello"]).chances(prompts)
    assert [one["small"] for one in told] == pytest.approx(chances) and chances[0] > 0.5 > chances[2]
    assert all(one["small"] + one["proxy"] == pytest.approx(1) for one in told)


def test_questions_need_no_answers_and_the_terminal_shows_them(root: Path, run: Any) -> None:
    outcome = run("federate", "answer", root / "questions.jsonl", *options(root))
    assert outcome.status == 0 and outcome.out.startswith("the far cat?"), outcome.err
    limited = run("federate", "answer", root / "heldout.jsonl", *options(root), "--limit", 1, "--json")
    assert [row["prompt"] for row in json.loads(limited.out)["answers"]] == ["the far cat?"]


def test_what_cannot_be_answered_is_refused_and_nothing_is_written(root: Path, tmp_path: Path, run: Any) -> None:
    ask, out = ("federate", "answer", root / "heldout.jsonl"), tmp_path / "out.jsonl"
    run(*ask, *options(root), "--out", root / "heldout.jsonl").check_refusal("which exists; give a new file")
    run(*ask, *options(root), "--out", tmp_path / "no" / "a.jsonl").check_refusal("there is no folder")
    run(*ask, *options(root)[:-2], "--max-new-tokens", 0).check_refusal("--max-new-tokens is 0")
    run(*ask, *options(root), "--max-tokens", 4, "--out", out).check_refusal("ask for shorter answers")
    run(*ask, *options(root)[:4], "--adapter", tmp_path / "none").check_refusal("--adapter is")
    run(*ask, *options(root)[:4], "--adapter", root / "small", "--out", out).check_refusal("of another shape")
    run(*ask, "--small", tmp_path / "none", *options(root)[2:], "--out", out).check_refusal(str(tmp_path / "none"))
    run("federate", "answer", root / "questions.jsonl", *options(root), "--score").check_refusal("completion")
    some = root / "questions.jsonl"
    run(*ask, *options(root), "--own", some, "--out", out).check_refusal("--own is given without --others")
    run(*ask, *options(root), "--others", some, "--out", out).check_refusal("--others is given without --own")
    run(*ask, *options(root), "--own", some, "--others", some, "--out", out).check_refusal("own has 1 prompts")
    assert not out.exists()
