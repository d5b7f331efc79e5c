"""The study of memorisation: its arithmetic, scores of plugins, and one whole run of the command on a tiny model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memorisation import AUDITED, WAYS, completed, cost_of_privacy, side_scores, summarise
from study_command import Command
from tiny_models import tiny_backbone, untrained_plugin

from cotune.cli.audit_scoring import BASE, backbone_scores
from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example
from cotune.evaluation.memorisation import TextScore

TEXTS = [Example(one.request, " " + one.answer) for one in generate_exchanges(3, seed=1)]


def run(heldout: float, bits: tuple[float, float]) -> dict[str, Any]:
    """With two canaries that are there 16 times, and one that is left out."""
    part = {"heldout_nats": heldout, "train_nats": 1.0, "auc": 0.5, "extracted": 0.25, "extracted_heldout": 0.0}
    part |= {"bits": {"0": [1.0], "16": list(bits)}, "completed": {"0": 0.0, "16": 0.5}}
    return {"after": part, "before": {**part, "heldout_nats": 9.0}}


def test_a_seed_counts_once_however_many_canaries_it_has() -> None:
    found = summarise([run(2.0, (3.0, 5.0)), run(4.0, (8.0, 8.0))])
    assert (found["bits"]["16"].mean, found["bits"]["16"].num) == (6.0, 2)
    assert found["heldout_nats"].mean == 3.0 and found["completed"]["16"].mean == 0.5
    assert summarise([run(2.0, (3.0, 5.0))], "before")["heldout_nats"].mean == 9.0


def test_copies_are_in_the_order_of_their_numbers_also_where_a_cell_was_kept() -> None:
    kept = run(2.0, (3.0, 5.0))
    kept["after"] |= {"bits": {"0": [1.0], "16": [3.0], "4": [2.0]}, "completed": {"0": 0.0, "16": 0.5, "4": 0.0}}
    found = summarise([kept])
    assert list(found["bits"]) == list(found["completed"]) == ["0", "4", "16"]


def test_the_cost_of_privacy_is_of_runs_with_the_same_seed() -> None:
    plain, hidden = [run(2.0, (7.0, 9.0)), run(3.0, (8.0, 8.0))], [run(2.5, (1.0, 3.0)), run(3.5, (2.0, 2.0))]
    (said,) = cost_of_privacy({"lora": plain, "lora, epsilon 1": hidden})
    assert said == (
        "Epsilon 1 costs LoRA 0.500 ± 0.000 nats per held-out token and hides 6.00 ± 0.00 bits of a canary that is "
        "there 16 times."
    )
    assert cost_of_privacy({"lora, epsilon 1": hidden}) == [] and cost_of_privacy({"lora": plain}) == []


def test_a_secret_is_completed_by_its_whole_second_half() -> None:
    def score(*likeliest: bool) -> TextScore:
        return TextScore(np.zeros(len(likeliest)), np.array(likeliest))

    assert completed([score(False, False, True, True, True)]) == 1.0
    assert completed([score(False, True, True, True), score(True, True, True, False)]) == 0.5


def test_every_way_has_a_learning_rate_to_search_around() -> None:
    assert WAYS["lora"].base_rate == 1e-3 and WAYS["side"].base_rate == 1e-2
    assert WAYS["lora, mezo"].base_rate == 1e-4 and WAYS["lora, mezo"].is_forward_only
    assert [way.epsilon for way in WAYS.values() if way.epsilon] == [8.0, 1.0]


def test_an_untrained_plugin_scores_as_its_backbone_does() -> None:
    backbone = tiny_backbone("llama")
    found = side_scores(backbone, untrained_plugin(backbone))(TEXTS)
    expected = backbone_scores(backbone, None, None, "model", lambda done, total, note: None)(TEXTS)["model"]
    for name in (AUDITED, BASE):
        for mine, theirs in zip(found[name], expected, strict=True):
            np.testing.assert_allclose(mine.nats, theirs.nats, atol=1e-3)
            np.testing.assert_array_equal(mine.is_likeliest, theirs.is_likeliest)


@pytest.mark.integration
def test_the_command_writes_its_folder(tmp_path: Path, command: Command) -> None:
    backbone = tiny_backbone("llama")
    folder = tmp_path / "tiny"
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    ways = ["lora", "side", "full"]
    has_opacus = find_spec("opacus") is not None
    options = ["--model", str(folder), "--num-train", "10"]
    options += ["--num-test", "2", "--seeds", "1", "--epochs", "1", "--forward-epochs", "1", "--max-length", "64"]
    options += ["--ways", *ways, "lora, epsilon 1", "--times", "2", "--each", "1", "--candidates", "7"]
    options += ["--prefix-tokens", "1", "--next-tokens", "2", "--rate-factors", "1"]
    options += ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    first_status, first = command("memorisation", options)
    assert first_status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    private = ["lora, epsilon 1"] if has_opacus else []
    assert list(measured["ways"]) == ["before", *ways, *private]
    assert list(measured["refused"]) == ([] if has_opacus else ["lora, epsilon 1"])
    for row in measured["ways"].values():
        assert row["bits"].keys() == {"0", "2"} and 0 <= row["bits"]["2"]["mean"] <= 3.0
    assert measured["ways"]["full"]["train_nats"]["mean"] < measured["ways"]["before"]["train_nats"]["mean"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "exposure, bits" in page and "Members told apart".lower() in page.lower()
