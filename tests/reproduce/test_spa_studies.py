"""The studies of SPA on a tiny backbone: their arithmetic, and one whole run of a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mean import Mean
from spa_gate_curve import at
from spa_judging import judge_backbone, judge_plugin
from spa_study import plugin_row
from spa_table4 import CELLS, rates
from spa_training import Method, Training, cloud_for, parameter_budget, train_plugin, trained_in_cloud
from study_command import Command
from tiny_models import tiny_backbone, untrained_plugin

from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example
from cotune.errors import InputError
from cotune.models.backbone import Backbone

REPRODUCE = Path(__file__).parents[2] / "reproduce"


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return tiny_backbone("llama")


@pytest.fixture(scope="module")
def texts() -> list[Example]:
    return [Example(one.request, " " + one.answer) for one in generate_exchanges(30, seed=1)]


def test_the_papers_rates_follow_from_its_only_consistent_reading() -> None:
    found = rates(dict(zip(CELLS, (0.568, 0.052, 0.214, 0.166), strict=True)))
    assert found["asks"] == pytest.approx(0.62) and found["differs"] == pytest.approx(0.782)
    assert found["asks where they differ"] == pytest.approx(0.726, abs=1e-3)
    assert found["asks where they agree"] == pytest.approx(0.239, abs=1e-3)
    assert found["differs where it asks"] == pytest.approx(0.916, abs=1e-3)


def test_a_curve_is_read_between_its_points() -> None:
    curve = [[0.0, 4.0], [0.5, 3.0], [1.0, 2.8]]
    assert [at(curve, m) for m in (0.0, 0.25, 0.75, 1.0)] == pytest.approx([4.0, 3.5, 2.9, 2.8])


def test_means_say_when_there_is_no_interval() -> None:
    assert str(Mean.of([1.0, 2.0, 3.0])) == "2.00 ± 2.48"
    assert str(Mean.of([1.0])) == "1.00" and Mean.of([1.0]).low is None


def test_an_untrained_plugin_scores_as_the_base_model(backbone: Backbone, texts: list[Example]) -> None:
    base = judge_backbone(backbone, texts[:4], 8, 64)
    found = judge_plugin(backbone, untrained_plugin(backbone), texts[:4], 8, 64)
    for mode in ("integration", "spa"):
        assert found[mode]["rouge_l"] == base["rouge_l"]
        assert found[mode]["nats_per_token"] == pytest.approx(base["nats_per_token"], abs=1e-4)
        assert found[mode]["changed_rate"] == 0.0
    assert found["base_nats"] == pytest.approx(base["nats_per_token"], abs=1e-4)
    assert found["integration"]["consult_rate"] == 1.0 and 0 < found["spa"]["consult_rate"] < 1
    for way in ("teacher_forced", "free_running"):
        assert sum(found[way].values()) == pytest.approx(1.0)
        assert found[way]["asks_and_differs"] == found[way]["passes_and_differs"] == 0.0


def training_of(backbone: Backbone, method: Method, epochs: int = 3) -> Training:
    return Training(
        method=method,
        learning_rate=1e-2,
        epochs=epochs,
        budget=parameter_budget(backbone, 16),
        side_width=16,
        max_length=64,
    )


@pytest.mark.parametrize(
    "method",
    [
        Method(family="parallel"),
        Method(family="serial"),
        Method(family="parallel", side="published"),
        Method(family="parallel", taps=1),
        Method(family="parallel", bits=4),
        Method(family="parallel", width=8, down="personal"),
    ],
    ids=lambda method: method.name,
)
def test_side_networks_stay_within_the_budget_and_learn(
    backbone: Backbone, texts: list[Example], tmp_path: Path, method: Method
) -> None:
    training, cloud = training_of(backbone, method), cloud_for(backbone, method)
    plugin, learnt = train_plugin(cloud, texts, training, tmp_path)
    assert learnt["num_parameters"] <= training.budget
    assert learnt["epochs"][-1][1] < learnt["epochs"][1][1]
    judged = judge_plugin(cloud, plugin, texts[:4], 4, 64)
    base = judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"]
    first = "integration" if method.family == "parallel" else "ladder"
    assert judged[first]["nats_per_token"] < (base if method.family == "parallel" else 6.0)
    assert len(judged[first]["rouge_l_each"]) == 4


def test_the_number_of_taps_and_their_bits_are_those_of_the_cloud(backbone: Backbone) -> None:
    assert cloud_for(backbone, Method(family="parallel")) is backbone
    assert cloud_for(backbone, Method(family="parallel", taps=1)).projections.num_taps == 1
    coarse = cloud_for(backbone, Method(family="parallel", bits=4))
    token_ids = np.array([5, 6, 7, 8])
    assert abs(coarse.features(token_ids, 1, 4).tap_codes).max() == 7
    assert abs(backbone.features(token_ids, 1, 4).tap_codes).max() == 127


@pytest.mark.parametrize("family", ["lora", "adapter"])
def test_methods_in_the_cloud_stay_within_the_budget_and_leave_nothing(
    backbone: Backbone, texts: list[Example], family: str
) -> None:
    training = training_of(backbone, Method(family=family))
    before = judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"]
    with trained_in_cloud(backbone, texts, training) as learnt:
        assert 0.5 * training.budget < learnt["num_parameters"] <= training.budget
        assert judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"] < before
    assert judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"] == before


def test_rows_are_named_by_what_sets_them_apart() -> None:
    row = plugin_row("ladder", side="attention", init="backbone", taps=2)
    assert row.method is not None and row.method.name == "serial, attention, from the backbone, 2 taps"


def test_differences_are_of_the_same_texts() -> None:
    found = Mean.of_differences([[3.0, 5.0], [5.0, 5.0]], [[1.0, 2.0]])
    assert (found.mean, found.num) == (3.0, 2) and found.low == found.high == 3.0
    with pytest.raises(InputError, match="same texts"):
        Mean.of_differences([[1.0]], [[1.0, 2.0]])


@pytest.mark.integration
def test_a_command_writes_its_folder_and_never_repeats_a_cell(tmp_path: Path, command: Command) -> None:
    options = ["--budget-minutes", "5"]
    options += ["--datasets", "persona", "--num-train", "24", "--num-test", "2", "--epochs", "3"]
    options += ["--seeds", "1", "--learning-rates", "0.01", "--max-new-tokens", "6", "--max-length", "48"]
    options += ["--cells", str(tmp_path / "cells"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    status, first = command("spa_table4", options)
    assert status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["persona"]["teacher_forced"].keys() >= {"asks", "differs", "asks_and_differs"}
    assert "Two by two" in (tmp_path / "out" / "report.html").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["config"]["num_train"] == 24 and config["deviations"] and config["hardware"]["cores"]
    kept = (tmp_path / "cells" / "starter-persona.jsonl").read_text()
    # As a shell starts it, and by the command of all studies.
    all_of_them = [sys.executable, str(REPRODUCE / "all.py"), "--only", "spa_table4", *options]
    again = subprocess.run(all_of_them, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0 and "spa_table4         done" in again.stdout, again.stdout + again.stderr
    assert "starter-persona:" in first and "starter-persona:" not in again.stdout
    assert (tmp_path / "cells" / "starter-persona.jsonl").read_text() == kept
