"""The studies of SPA on a tiny backbone: their arithmetic, and one whole run of a command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from spa_gate_curve import at
from spa_methods import Training, judge_backbone, judge_plugin, parameter_budget, train_plugin, trained_lora
from spa_study import Mean
from spa_table4 import CELLS, rates
from tiny_models import tiny_backbone, untrained_plugin

from cotune.data.assistant_text import generate_exchanges
from cotune.data.templates import Example
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


def test_methods_stay_within_one_budget_and_learn(backbone: Backbone, texts: list[Example], tmp_path: Path) -> None:
    budget = parameter_budget(backbone, 16)
    training = Training(learning_rate=1e-2, epochs=3, side_width=16, max_length=64)
    plugin, side = train_plugin(backbone, texts, "parallel", training, tmp_path)
    assert side["num_parameters"] == budget
    assert side["epochs"][-1][1] < side["epochs"][1][1]
    before = judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"]
    with trained_lora(backbone, texts, budget, training) as lora:
        assert 0.5 * budget < lora["num_parameters"] <= budget
        assert judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"] < before
    assert judge_backbone(backbone, texts[:4], 4, 64)["nats_per_token"] == before
    assert judge_plugin(backbone, plugin, texts[:4], 4, 64)["integration"]["nats_per_token"] < before


@pytest.mark.integration
def test_a_command_writes_its_folder_and_never_repeats_a_cell(tmp_path: Path) -> None:
    data = tmp_path / "data" / "sciq"
    data.mkdir(parents=True)
    for split, num in (("train", 24), ("test", 4)):
        rows = [{"prompt": one.request, "target": " " + one.answer} for one in generate_exchanges(num, seed=num)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(REPRODUCE / "all.py"), "--only", "spa_table4", "--budget-minutes", "5"]
    command += ["--data-root", str(tmp_path / "data"), "--datasets", "sciq", "--num-train", "24", "--num-test", "2"]
    command += ["--seeds", "1", "--learning-rates", "0.01", "--max-new-tokens", "6", "--max-length", "48"]
    command += ["--cells", str(tmp_path / "cells"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["sciq"]["teacher_forced"].keys() >= {"asks", "differs", "asks_and_differs"}
    assert "Two by two" in (tmp_path / "out" / "report.html").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["config"]["num_train"] == 24 and config["deviations"] and config["hardware"]["cores"]
    kept = (tmp_path / "cells" / "starter-sciq.jsonl").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert again.returncode == 0 and "starter-sciq:" in first.stdout and "starter-sciq:" not in again.stdout
    assert (tmp_path / "cells" / "starter-sciq.jsonl").read_text() == kept
