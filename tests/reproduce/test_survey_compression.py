"""The study of compressed models: its verdicts by hand, and one whole run of the command on a tiny model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from mean import Mean
from study_command import Command
from survey_compression import GOAL_RECIPE, ORDERS, THINNER, TUNED, Row, parse_recipe, recipe, verdicts


def row(name: str, order: str, rouge_l: float, nats: float, share: float = 1.0, more: Sequence[float] = ()) -> Row:
    each = [rouge_l, *more]
    return Row(
        dataset="trec",
        name=name,
        order=order,
        rouge_l=Mean.of(each),
        rouge_l_each=each,
        exact_match=Mean.of([0.0]),
        nats=Mean.of([nats]),
        size_bytes=1000 * share,
        share_of_bf16=share,
    )


def test_verdicts_by_hand() -> None:
    rows = [
        row(TUNED, "", 0.50, 1.0, more=[0.50, 0.50]),
        row(GOAL_RECIPE, ORDERS[0], 0.49, 1.25, 0.28, more=[0.495, 0.50]),
        row(GOAL_RECIPE, ORDERS[1], 0.40, 1.5, 0.40),
        row("wanda:0.5", ORDERS[0], 0.3, 2.0),
        row("magnitude:0.5", ORDERS[0], 0.2, 2.5),
        row("wanda:0.5", ORDERS[1], 0.3, 1.75),
    ]
    four, sparse, orders = verdicts(rows)
    assert four == (
        f"trec: {GOAL_RECIPE} keeps 99.0 % of Rouge-L (98.0 to 100.0 by seed) at 28 % of the size in bf16, for "
        "+0.250 nats per token: the goal (98 % of Rouge-L under 30 %) holds."
    )
    assert "Wanda is 0.500 nats better than magnitude" in sparse
    # 0.25 nats better first, 0.25 nats worse.
    assert "better by nats than to tune the compressed one in 1 of 2 recipes, by +0.000" in orders
    for worse in (row(GOAL_RECIPE, ORDERS[0], 0.48, 1.25, 0.28), row(GOAL_RECIPE, ORDERS[0], 0.50, 1.25, 0.31)):
        assert "is missed" in verdicts([rows[0], worse])[0]
    both = verdicts([rows[0], rows[1], row(THINNER, ORDERS[0], 0.40, 1.25, 0.28)])
    assert [one.endswith("holds.") for one in both[:2]] == [True, False] and f"trec: {THINNER} keeps 80.0 %" in both[1]
    assert verdicts([row(GOAL_RECIPE, ORDERS[0], 0.5, 1.0)]) == []


def test_recipes_are_stages_in_words() -> None:
    assert [stage.kind for stage in parse_recipe("channels:0.25+wanda:2:4+gptq:4")] == ["prune", "prune", "quantise"]
    for wrong, words in (("tidy:3", "is tidy:3, expected magnitude"), ("gptq:5", "bits are 5")):
        with pytest.raises(argparse.ArgumentTypeError, match=words):
            recipe(wrong)


@pytest.mark.integration
def test_the_command_writes_its_folder(tmp_path: Path, command: Command, tiny_model: Path) -> None:
    options: list[object] = ["--model", tiny_model, "--num-train", 20, "--num-test", 2, "--seeds", 1, "--epochs", 1]
    options += ["--batch-size", 8, "--max-length", 32, "--learning-rates", 0.02, "--rank", 2]
    options += ["--recipes", "depth:1+rtn:4", "depth:3", "--max-new-tokens", 2]
    options += ["--calibration-texts", 2, "--calibration-length", 16]
    options += ["--cells", tmp_path / "cells", "--out", tmp_path / "out"]
    status, said = command("survey_compression", options)
    assert status == 0, said
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    found = {(one["name"], one["order"]): one for one in measured["rows"]}
    assert set(found) == {
        ("model as it was", ""),
        (TUNED, ""),
        *(("depth:1+rtn:4", order) for order in ORDERS),
    }
    before, tuned = found["model as it was", ""], found[TUNED, ""]
    # So few steps may not make it better.
    assert 0 < tuned["nats"]["mean"] != before["nats"]["mean"]
    first, second = (found["depth:1+rtn:4", order] for order in ORDERS)
    # The adapter beside the second one counts.
    assert first["size_bytes"] < second["size_bytes"] and first["share_of_bf16"] < 1
    assert len(measured["refused"]) == 2 and all(
        "than are left of the model" in why for why in measured["refused"].values()
    )
    assert "compressed, then tuned" in (tmp_path / "out" / "report.html").read_text()
    # Finished cells are never run again.
    status, again = command("survey_compression", options)
    assert status == 0 and "recipe depth:1+rtn:4" in said and "recipe depth:1+rtn:4" not in again
