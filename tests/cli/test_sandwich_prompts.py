"""Prompt variables on the command line: a categorical one against a scripted cloud, a soft one end to end, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_backbone

from cotune.cli.sandwich_prompts import VARIABLES, HostedModel, PromptOptions, make_variable
from cotune.errors import CotuneError
from cotune.models.backbone import Backbone
from cotune.sandwich.prompts.cma_response import CmaResponse
from cotune.sandwich.prompts.latent import LatentPrompt
from cotune.sandwich.prompts.soft_prompt import soft_numbers
from cotune.sandwich.scripted_cloud import scripted_server

SLOW = ("--detector-timeout", 60)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    backbone = tiny_backbone("llama")
    monkeypatch.setattr(Backbone, "from_pretrained", lambda *_, **__: backbone)
    rows = [{"prompt": f"{n}: France", "target": "Paris"} for n in range(4)]
    for name, part in (("train", rows[:2]), ("val", rows[2:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (tmp_path / "places.json").write_text('[["Say", "Name"], ["the capital.", "a river."]]')
    (tmp_path / "start.txt").write_text("Instruction:")
    return tmp_path


def words(data: Path, *more: object) -> list[object]:
    files = [data / "train.jsonl", "--validation", data / "val.jsonl", "--out", data / "run"]
    return ["sandwich", "fit", *files, "--metric", "exact_match", "--certificate-share", 0, *SLOW, *more]


def options(data: Path, **changes: Any) -> PromptOptions:
    given = {"prompts": data / "start.txt", "writer": "tiny", "num_tokens": 2, "dim": 2, "radius": 0.5, "seed": 0}
    return PromptOptions(**{**given, "cma_evaluations": None, "num_samples": 4, **changes})


def test_a_categorical_prompt_is_found(run: Callable[..., Any], data: Path) -> None:
    def say(body: Mapping[str, Any]) -> str:
        return "Paris" if "capital" in body["messages"][0]["content"] else "Rhine"

    with scripted_server(say) as server:
        more = ["--variable", "categorical", "--prompts", data / "places.json", "--cloud", server.base_url]
        more += ["--model", "m", "--steps", 10, "--pay", "--budget-calls", 16, "--json"]
        done = run(*words(data, *more))
        assert done.status == 0, done.err
        shown = json.loads(done.out)
    assert "the capital." in shown["prompt"] and shown["score"] == 1.0 and len(server.bodies) <= 16


def test_a_soft_prompt_is_fitted_for_a_model_of_ones_own_and_asked(run: Callable[..., Any], data: Path) -> None:
    more = ["--variable", "soft", "--hosted", "tiny", "--prompt-dim", 2, "--prompt-tokens", 1, "--max-tokens", 2]
    done = run(*words(data, *more, "--steps", 1, "--pay", "--budget-calls", 400, "--json"))
    assert done.status == 0, done.err
    assert len(soft_numbers(json.loads(done.out)["prompt"])) == 2
    asked = run("sandwich", "ask", data / "start.txt", "--fitted", data / "run", *SLOW)
    assert asked.status == 0 and "1 calls" in asked.err
    ask = ("sandwich", "ask", data / "start.txt", "--fitted", data / "run")
    run(*ask, "--cloud", "http://127.0.0.1:9/v1", *SLOW).check_refusal("no API reads")
    fitted = json.loads((data / "run" / "sandwich.json").read_text())
    (data / "run" / "sandwich.json").write_text(json.dumps({**fitted, "hosted": {"model": 5}}))
    run(*ask, *SLOW).check_refusal("names no hosted model")


def test_each_variable_is_made_of_its_options(data: Path) -> None:
    latent = make_variable("latent", options(data))
    assert isinstance(latent, LatentPrompt) and latent.best(np.zeros(2)) == latent.best(np.zeros(2))
    soft = make_variable("soft", options(data, prompts=None, cma_evaluations=5))
    assert isinstance(soft, CmaResponse) and soft.best(np.zeros(2)) == "soft aaaaaaaa aaaaaaaa"
    assert make_variable("pool", options(data)).candidates(np.zeros(1)) == ["Instruction:"]
    assert set(VARIABLES) == {"pool", "categorical", "latent", "soft"}
    own = HostedModel(model="m", num_tokens=1, dim=2, seed=3)
    assert HostedModel.from_json(own.to_json()) == own


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("magic", {}, "expected one of pool, categorical, latent, soft"),
        ("pool", {"prompts": None}, "--prompts is missing"),
        ("pool", {"cma_evaluations": 5}, "expected latent or soft"),
        ("categorical", {}, "holds no places"),
        ("latent", {"writer": None}, "--writer or --edge"),
    ],
)
def test_what_cannot_be_made_is_refused(data: Path, name: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CotuneError, match=said):
        make_variable(name, options(data, **changes))


def test_options_that_do_not_go_together_are_refused(run: Callable[..., Any], data: Path) -> None:
    run(*words(data, "--variable", "soft")).check_refusal("--hosted with soft")
    run(*words(data, "--hosted", "tiny")).check_refusal("--hosted with soft")
    run(*words(data, "--prompts", data / "start.txt")).check_refusal("--model is missing")
    more = ("--prompts", data / "start.txt", "--model", "m", "--detectors", "email")
    run(*words(data, *more)).check_refusal("--cloud is missing")
