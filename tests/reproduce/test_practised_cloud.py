"""A cloud's model that practised: which texts, in which form, and a folder that the studies' cloud can host."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from practised_cloud import practice_texts
from sandwich_tasks import Sizes, examples_of, load_task
from study_command import Command

from cotune.errors import InputError
from cotune.models.weights import find_model_folder

SMALL = {"--num-train": 2, "--num-unlabelled": 1, "--num-validation": 1, "--num-test": 2, "--seeds": 2}


def sizes(seed: int, num_unlabelled: int = 4) -> Sizes:
    return Sizes(num_train=3, num_unlabelled=num_unlabelled, num_validation=2, num_test=5, seed=seed)


def test_what_any_seed_of_the_study_uses_is_not_practised_and_half_of_the_prompts_is() -> None:
    tasks = [load_task("nlu", None, sizes(seed)) for seed in range(2)]
    train = examples_of("nlu", None, "train")
    texts = practice_texts(tasks, train)
    used = {one.request for task in tasks for one in task.train} | {one for task in tasks for one in task.unlabelled}
    assert len(used) > 7 and len(texts) == len(train) - len(used)
    assert not any(request in one.prompt for one in texts for request in used)
    prompts = tasks[0].prompts
    assert {one.prompt.splitlines()[0] for one in texts} == {f"System: {prompt}" for prompt in prompts[2:]}
    free = [one for one in train if one.request not in used]
    clear = [f"\nUser: {one.request}\nAssistant:" in text.prompt for one, text in zip(free, texts, strict=True)]
    # About half of them with placeholders, and all with their own answer.
    assert 0.3 < sum(clear) / len(clear) < 0.7
    hidden = [text for text, is_clear in zip(texts, clear, strict=True) if not is_clear]
    assert all("<EMAIL_" in text.prompt and "example.org" not in text.prompt for text in hidden)
    assert [text.target for text in texts] == [f" {one.target}" for one in free]
    # A model with a chat template reads the same texts in it, and ends them itself.
    told = practice_texts(tasks, train, template=lambda turns: "|".join(content for _, content in turns))
    assert [text.target for text in told] == [one.target for one in free]
    assert {text.prompt.split("|")[0] for text in told} == set(prompts[2:])
    with pytest.raises(InputError, match="and the study takes all of them; give fewer --seeds"):
        practice_texts([load_task("nlu", None, sizes(0, num_unlabelled=1000))], train)


@pytest.mark.integration
def test_the_command_writes_a_folder_that_can_be_hosted(tmp_path: Path, tiny_model: Path, command: Command) -> None:
    options: list[object] = [word for pair in SMALL.items() for word in pair]
    options += ["--model", tiny_model, "--epochs", 1, "--batch-size", 64, "--out", tmp_path / "practised"]
    options += ["--data-sets", "trec", "--max-context", 96, "--num-texts", 40]
    status, said = command("practised_cloud", options)
    assert status == 0, said
    folder = find_model_folder(str(tmp_path / "practised"))
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 96
    assert "40 texts of trec, 1 epochs" in said
    assert len((tmp_path / "practised.jsonl").read_text().splitlines()) == 40
    status, said = command("practised_cloud", options)
    assert status != 0 and "which is there, expected a new folder" in said
