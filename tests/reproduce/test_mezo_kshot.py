"""The k-shot study: its data, its batches, what it derives, and one whole run on a tiny model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from kshot_tasks import MADE, PROMPTS, ChoiceEncoder, K, Labelled, load_kshot, make_kshot
from kshot_training import LEARNERS, Course, StepBatches, judge, judge_adapted, learn, stepping
from mean import Mean
from mezo_kshot import best_rate, order_of
from study_command import Command
from tiny_models import tiny_backbone, tokenizer_json
from tokenizers import Tokenizer

from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.choice_objectives import ChoiceBatch, ChoiceExample
from cotune.tuning.objectives import ExampleBatches


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def encoder() -> ChoiceEncoder:
    return ChoiceEncoder(Tokenizer.from_str(tokenizer_json().decode()), PROMPTS[MADE], 100)


@pytest.fixture(scope="module")
def questions(encoder: ChoiceEncoder) -> list[ChoiceExample]:
    return [encoder.encode(one) for one in make_kshot(13, num_test=2).train]


def test_made_sets_are_balanced_and_share_no_text() -> None:
    made, other = make_kshot(13, num_test=40), make_kshot(21, num_test=40)
    assert Counter(one.label for one in made.train) == {"positive": K, "negative": K}
    assert Counter(one.label for one in made.validation) == {"positive": K, "negative": K}
    texts = [one.text for part in (made.train, made.validation, made.test) for one in part]
    assert len(set(texts)) == len(texts)
    assert made.test == other.test and made.train != other.train and made.digest != other.digest
    assert make_kshot(13, num_test=40) == made


def test_sets_are_read_and_missing_ones_are_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "kshot16" / "cr"
    (folder / "seed13").mkdir(parents=True)
    (tmp_path / "cr").mkdir()
    for name, label in (("seed13/train", "positive"), ("seed13/validation", "negative"), ("test", "positive")):
        lines = [json.dumps({"text": f"{name} {i}", "label": label}) for i in range(3)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    found = load_kshot(tmp_path, "cr", 13, num_test=2)
    assert found.train[0] == Labelled("seed13/train 0", "positive") and len(found.test) == 2
    assert load_kshot(tmp_path / "kshot16", "cr", 13, num_test=2) == found
    with pytest.raises(InputError, match="--data-root is not given and sst2 is a folder there"):
        load_kshot(None, "sst2", 13, 2)
    with pytest.raises(InputError, match="no folder cr/seed21"):
        load_kshot(tmp_path, "cr", 21, 2)
    (folder / "test.jsonl").write_text('{"text": "x", "label": "so so"}')
    with pytest.raises(InputError, match="label 'so so', expected texts with labels negative, positive"):
        load_kshot(tmp_path, "cr", 13, 2)


def test_nothing_is_chosen_or_tested_by_what_was_learnt(tmp_path: Path) -> None:
    """A file of questions to choose by that repeats the training texts is replaced by others of the test file."""
    folder = tmp_path / "cr"
    (folder / "seed13").mkdir(parents=True)

    def write(name: str, texts: list[str]) -> None:
        rows = [{"text": text, "label": ("negative", "positive")[i % 2]} for i, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    learnt = [f"learnt {i}" for i in range(4)]
    write("seed13/train", learnt)
    write("seed13/validation", [f"own {i}" for i in range(3)] + ["new 5"])
    write("test", [f"new {i}" for i in range(80)] + learnt)
    own = load_kshot(tmp_path, "cr", 13, num_test=84)
    assert not own.is_validation_drawn and own.validation[0].text == "own 0"
    assert {one.text for one in own.test} == {f"new {i}" for i in range(80)} - {"new 5"}

    write("seed13/validation", learnt)
    found = load_kshot(tmp_path, "cr", 13, num_test=40)
    assert found.is_validation_drawn and found == load_kshot(tmp_path, "cr", 13, num_test=40)
    labels = Counter(one.label for one in found.validation)
    assert labels.keys() == {"negative", "positive"} and max(labels.values()) <= K and sum(labels.values()) > K
    parts = [{one.text for one in part} for part in (found.train, found.validation, found.test)]
    assert parts[0].isdisjoint(parts[1] | parts[2]) and parts[1].isdisjoint(parts[2])
    with pytest.raises(InputError, match=r"training texts in validation\.jsonl, and .* has no text left beside 84"):
        load_kshot(tmp_path, "cr", 13, num_test=84)


def test_a_question_has_its_label_word_and_a_long_text_loses_its_end(encoder: ChoiceEncoder) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json().decode())
    short = encoder.encode(Labelled("So good.", "positive"))
    assert tokenizer.decode(short.prompt_ids.tolist()) == "So good. It was"
    assert [tokenizer.decode(one.tolist()) for one in short.choices] == [" bad", " great"] and short.label == 1
    long = encoder.encode(Labelled("what a long and winding story " * 50, "negative"))
    assert 60 < len(long.prompt_ids) + max(map(len, long.choices)) <= 100
    assert tokenizer.decode(long.prompt_ids.tolist()).startswith("what a long")
    assert tokenizer.decode(long.prompt_ids.tolist()).endswith(" It was")
    with pytest.raises(InputError, match="too short for the prompt"):
        ChoiceEncoder(tokenizer, PROMPTS[MADE], 3).encode(Labelled("x", "positive"))


def test_demonstrations_are_whole_turns_and_leave_room(encoder: ChoiceEncoder) -> None:
    train = [Labelled(f"Text {i}.", "positive" if i % 2 else "negative") for i in range(40)]
    text = encoder.demonstrations(train, longest=30, seed=0)
    lines = text.splitlines()
    assert 2 <= len(lines) < 40 and len(lines) % 2 == 0
    assert all(line.endswith(" It was bad." if i % 2 == 0 else " It was great.") for i, line in enumerate(lines))
    assert len(encoder.encode(Labelled("Text 99.", "positive"), text).prompt_ids) <= 100
    assert encoder.demonstrations(train, longest=99, seed=0) == ""


def test_epochs_of_steps_go_on_where_the_last_one_ended() -> None:
    passes = ExampleBatches(list(range(5)), 2, list, seed=3)
    endless = [batch for epoch in range(3) for batch in passes.epoch(epoch)]
    batches = StepBatches(passes, 4)
    assert len(batches) == 4
    assert [*batches.epoch(0), *batches.epoch(1)] == endless[:8]
    assert list(batches.epoch(1)) == endless[4:8]


def test_the_rate_with_the_fewest_errors_is_taken_then_the_fewest_nats() -> None:
    def run(errors: float, nats: float) -> dict[str, float]:
        return {"validation_errors": errors, "validation_nats": nats}

    assert best_rate({1e-4: run(0.2, 0.1), 1e-3: run(0.1, 0.9)}) == 1e-3
    assert best_rate({1e-4: run(0.1, 0.1), 1e-3: run(0.1, 0.9)}) == 1e-4


def test_the_order_is_of_neighbours_and_only_trained_ones_may_be_equal() -> None:
    def means(**values: float) -> dict[str, Mean]:
        return {name: Mean.of([value]) for name, value in values.items()}

    found = order_of(means(zero_shot=0.5, icl=0.5, mezo=0.7, lora=0.7, full=0.6))
    assert [(one["worse"], one["holds"]) for one in found] == [
        ("zero_shot", False),
        ("icl", True),
        ("mezo", True),
        ("lora", False),
    ]
    assert found[3]["difference"] == pytest.approx(-10)
    assert order_of(means(zero_shot=0.5, mezo=0.7)) == []


def test_judging_counts_wrong_answers(backbone: Backbone, questions: list[ChoiceExample]) -> None:
    found = judge(backbone, questions)
    swapped = judge(
        backbone, [ChoiceExample(prompt_ids=q.prompt_ids, choices=q.choices, label=1 - q.label) for q in questions]
    )
    assert found["errors"] + swapped["errors"] == pytest.approx(1.0)
    assert found["nats"] > 0 and judge(backbone, questions[:1])["errors"] in (0.0, 1.0)


@pytest.mark.parametrize("name", LEARNERS)
def test_every_method_learns_and_leaves_the_model_alone(
    backbone: Backbone, questions: list[ChoiceExample], name: str
) -> None:
    learner = LEARNERS[name]
    course = Course(num_steps=60 if learner.is_forward_only else 8, num_checks=2, num_batch_examples=8)
    before = judge(backbone, questions)
    rate = {"mezo_accuracy": 3e-4, "mezo_sparse": 1e-2, "mezo_lora": 1e-3, "mezo": 1e-3}.get(name, 3e-3)
    learnt = learn(backbone, learner, questions[:16], questions[16:], course, learning_rate=rate, seed=0)
    assert [one.num_steps for one in learnt.curve] == [0, course.num_steps // 2, course.num_steps]
    (after,) = judge_adapted(backbone, learnt.adapted, questions[16:])
    start = judge(backbone, questions[16:])
    # The best check is taken by what is lowered, so it is never worse than the start.
    what = "errors" if name == "mezo_accuracy" else "nats"
    assert after[what] <= start[what] if name == "mezo_accuracy" else after[what] < start[what]
    assert judge(backbone, questions) == before
    if learner.has_mask:
        total = sum(p.numel() for p in backbone.model.parameters())
        assert learnt.num_trained == round(0.01 * total)


@pytest.mark.parametrize("name", ["full", "mezo_sparse"])
def test_single_steps_run(backbone: Backbone, questions: list[ChoiceExample], name: str) -> None:
    own = tiny_backbone("llama")
    batch = ChoiceBatch.of(questions[:4], own.spec.pad_token_id)
    course = Course(num_steps=1, num_checks=1, num_batch_examples=4)
    with stepping(own, LEARNERS[name], batch, course, seed=0) as step:
        state, metrics = step()  # type: ignore[misc]
    assert state.num_steps == 1 and np.isfinite(metrics["loss"])


def test_steps_are_a_multiple_of_the_checks() -> None:
    with pytest.raises(InputError, match="10 steps and 3 checks"):
        Course(num_steps=10, num_checks=3, num_batch_examples=1)


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(
    tmp_path: Path, tiny_model: Path, command: Command, measured_here: list[list[str]]
) -> None:
    options = ["--model", str(tiny_model), "--methods", "zero_shot", "icl", "mezo"]
    options += ["--seeds", "2", "--steps", "4", "--backprop-steps", "2", "--checks", "2", "--batch", "4"]
    options += ["--num-test", "8", "--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    first_status, first = command("mezo_kshot", options)
    assert first_status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["accuracy"]["made"].keys() == {"zero_shot", "icl", "mezo"}
    assert measured["accuracy"]["made"]["mezo"]["num"] == 2
    assert [one["worse"] for one in measured["order"]["made"]] == ["zero_shot", "icl"]
    assert measured["memory_mb"]["made"] == {"zero_shot": 5, "mezo": 5}
    assert len(measured["demonstrations"]["made"]) == 2
    assert [one[one.index("--measure") + 1] for one in measured_here] == ["zero_shot", "mezo"]
    assert "The order" in (tmp_path / "out" / "report.html").read_text()
    cells = (tmp_path / "cells" / "tiny-kshot-made.jsonl").read_text()
    again_status, _ = command("mezo_kshot", options)
    assert again_status == 0 and (tmp_path / "cells" / "tiny-kshot-made.jsonl").read_text() == cells
