"""The survey's first experiment: its rows, what it derives, and one whole run of the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from method_memory import CASES
from study_command import Command
from survey_memory import ROWS, Study, above_weights, make_parser, predict, verdicts_of

from cotune.errors import InputError
from cotune.evaluation.method_cost import METHODS
from cotune.evaluation.model_shape import KNOWN_SHAPES, ModelShape
from cotune.evaluation.workload import Workload
from cotune.tuning.adaptations import ADAPTATIONS
from cotune.tuning.estimators import ESTIMATORS

SHAPE = ModelShape(hidden=64, inner=160, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=500)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_measured_predicted_and_tuned_as_the_same_method(name: str) -> None:
    row = ROWS[name]
    case = CASES[row.case]
    assert (case.predicted, case.has_checkpoints, case.base_bits) == (row.planned, row.has_checkpoints, row.base_bits)
    assert row.planned in METHODS
    assert row.method is None or row.method in ADAPTATIONS
    assert row.estimator in ESTIMATORS and row.group in ("full", "PEFT", "MEFT")


def test_weights_that_are_loaded_first_are_not_counted() -> None:
    load = Workload(batch=2, length=32)
    for name in ROWS:
        cost = predict(name, SHAPE, load)
        if name == "side":
            assert above_weights(cost, SHAPE, load) == cost.peak
        else:
            assert 0 < above_weights(cost, SHAPE, load) < cost.peak
    # 601,344 bytes of weights, 256,000 of activations.
    mezo = predict("mezo, lora", SHAPE, load)
    assert above_weights(mezo, SHAPE, load) == mezo.peak - 601_344


def test_at_seven_billion_the_forward_only_methods_need_the_least() -> None:
    load = Workload(batch=1, length=512, dtype="bfloat16")
    shape = KNOWN_SHAPES["llama-7b"]
    above = {}
    for name in ("full", "lora", "lora + checkpoints", "mezo, lora"):
        cost = predict(name, shape, load)
        above[name] = above_weights(cost, shape, load)
    assert above["mezo, lora"] < above["lora + checkpoints"] < above["lora"] < above["full"]


def test_goals_are_held_against_what_was_measured() -> None:
    def row(measured: float | None, predicted: float, step_ms: float | None) -> dict[str, float | None]:
        return {"measured_above_mb": measured, "predicted_above_mb": predicted, "step_ms": step_ms}

    rows = {
        "full": row(200.0, 180.0, 10.0),
        "lora": row(150.0, 100.0, 8.0),
        "side": row(40.0, 38.0, 5.0),
        "side, local": row(None, 30.0, None),
    }
    found = {one["what"]: (one["measured"], one["holds"]) for one in verdicts_of(rows)}
    assert found == {
        "side: memory of full tuning's": (20.0, True),
        "side: time of LoRA's": (62.5, False),
        "full: prediction off the peak": (pytest.approx(10.0), True),
        "lora: prediction off the peak": (pytest.approx(100 / 3), False),
        "side: prediction off the peak": (pytest.approx(5.0), True),
    }


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is Linux's")
def test_a_row_is_measured_in_a_process_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--num-train", "10", "--num-test", "1", "--batch", "2", "--length", "16"]
    study = Study(make_parser().parse_args([*map(str, options), "--cells", str(tmp_path / "cells")]))
    found = study.measured("ia3", str(tiny_model))
    assert 0 < found["peak_bytes"] < 2e6 and found["step_s"] > 0


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(
    tmp_path: Path, tiny_model: Path, command: Command, measured_here: list[list[str]]
) -> None:
    options = ["--model", str(tiny_model), "--methods", "side", "mezo, lora", "ia3"]
    options += ["--num-train", "24", "--num-test", "3", "--epochs", "1", "--side-epochs", "1", "--forward-epochs", "1"]
    options += ["--seeds", "1", "--batch", "2", "--length", "16", "--max-length", "48", "--shapes", "llama-7b"]
    options += ["--cells", str(tmp_path / "cells"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]
    first_status, first = command("survey_memory", options)
    assert first_status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["methods"].keys() == {"side", "mezo, lora", "ia3"}
    asked = [(one[one.index("--child") + 1], one[one.index("--shape") + 1]) for one in measured_here]
    assert asked == [(ROWS[name].case, str(tiny_model)) for name in ("side", "mezo, lora", "ia3")]
    for row in measured["methods"].values():
        assert row["measured_above_mb"] == 5 and row["step_ms"] > 0 and row["nats"]["mean"] > 0
    assert all(row["predicted_above_mb"] > 0 for row in measured["methods"].values())
    assert measured["shapes"]["llama-7b"]["mezo, lora"]["whole_mb"] > 25_000
    assert "llama-7b" in (tmp_path / "out" / "report.html").read_text()
    cells = {path.name: path.read_text() for path in (tmp_path / "cells").iterdir()}
    again_status, _ = command("survey_memory", options)
    assert again_status == 0
    assert {path.name: path.read_text() for path in (tmp_path / "cells").iterdir()} == cells


def test_missing_data_is_one_sentence(tmp_path: Path) -> None:
    args = make_parser().parse_args(["--data-root", str(tmp_path)])
    with pytest.raises(InputError, match="has no folder sciq; give --dataset, or leave --data-root out"):
        Study(args)
