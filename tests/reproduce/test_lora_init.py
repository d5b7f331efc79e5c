"""The study of LoRA starts: its arithmetic, and one whole run of the command on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from adaptation_study import at_edge, best_rate, edge_notes, search_wider, worded
from lora_init import STARTS, TimedStart, summarise, verdicts
from mean import Mean
from study_command import Command
from tiny_models import tiny_backbone

from cotune.errors import InputError
from cotune.tuning.lora_init import INITS


def run(*curve: float, start_s: float = 1.0) -> dict[str, Any]:
    return {"curve": list(curve), "start_s": start_s, "train_s": 2.0, "num_trained": 5}


def test_differences_are_of_runs_with_the_same_seed() -> None:
    found = summarise([run(3.0, 1.0, start_s=0.5), run(3.0, 2.0, start_s=0.1)], [run(3.0, 1.5), run(3.0, 2.5)])
    assert found["nats"].mean == 1.5 and found["nats"].low < 0
    # Both are half a nat better, so there is nothing to doubt.
    assert (found["difference"].mean, found["difference"].low, found["difference"].high) == (-0.5, -0.5, -0.5)
    assert [mean.mean for mean in found["curve"]] == [3.0, 1.5]
    assert found["start_s"] == pytest.approx(0.3)
    assert summarise([run(1.0)], None)["difference"] is None


def test_verdicts_count_only_intervals_without_zero() -> None:
    def row(mean: float, difference: Mean | None) -> dict[str, Any]:
        return {"nats": Mean.of([mean]), "difference": difference}

    rows = {
        "default": row(2.0, Mean(mean=0.0, low=0.0, high=0.0, num=3)),
        "pissa": row(1.9, Mean(mean=-0.1, low=-0.2, high=-0.05, num=3)),
        "olora": row(2.09, Mean(mean=0.09, low=0.01, high=0.2, num=3)),
        "eva": row(2.0, Mean(mean=0.0, low=-0.1, high=0.1, num=3)),
    }
    spread, who = verdicts(rows)
    assert "within 10.0 % of each other, from pissa with 1.900 to olora with 2.090" in spread
    assert "Better than the default, with a 95 % interval without 0: pissa; worse: olora; the other 1 cannot" in who
    lone = {"default": rows["default"], "eva": row(2.0, Mean.of([0.1]))}
    assert "One seed alone" in verdicts(lone)[1]


def test_the_best_rate_is_a_finite_one_and_ends_of_the_search_are_named() -> None:
    assert best_rate({0.1: None, 0.01: 2.0, 0.001: 3.0}) == 0.01
    with pytest.raises(InputError, match=r"every learning rate of 0\.1 diverged"):
        best_rate({0.1: None})
    assert at_edge(0.01, [0.01, 0.1]) == "smallest" and at_edge(0.1, [0.1]) is None
    rates = [0.01, 0.03, 0.1]
    (note,) = edge_notes({"a": 0.1, "b": 0.03}, {"a": rates, "b": rates})
    assert "largest" in note and note.endswith(": a.")
    assert worded(None) == "-" and worded(Mean.of([0.25]), 1) == "0.2"


def test_a_search_goes_on_while_the_best_rate_is_at_an_end() -> None:
    def measured(rates: list[float], best: float, *, most: int = 6) -> list[float]:
        return list(search_wider(rates, lambda rate: None if rate > 5 else abs(rate - best), most=most))

    assert measured([0.5, 1.0], 2.1) == [0.5, 1.0, 2.0, 4.0] and measured([0.5, 1.0], 0.3) == [0.125, 0.25, 0.5, 1.0]
    assert measured([0.5, 1.0], 4.0) == [0.5, 1.0, 2.0, 4.0, 8.0], "what diverged is an end, too"
    assert measured([0.5, 1.0], 0.0, most=4) == [0.125, 0.25, 0.5, 1.0] and measured([1.0], 9.0) == [1.0]
    assert measured([1.0, 2.0], 1.5) == [1.0, 2.0], "as good as another"
    assert measured([6.0, 7.0], 1.0) == [6.0, 7.0], "smaller ones are for whoever asked"


def test_every_start_of_the_product_is_compared() -> None:
    assert {start.init for start in STARTS.values()} == set(INITS)
    assert STARTS["loftq, 4 bit"].bits == 4 and STARTS["dora"].what(4, 8.0).shape.use_dora
    assert STARTS["rslora"].what(4, 8.0).shape.use_rslora and STARTS["rslora"].what(4, 8.0).shape.rank == 4


def test_the_time_of_a_start_is_kept() -> None:
    timed = TimedStart(STARTS["default"].what(2, 4.0))
    fresh = timed.fresh(tiny_backbone("llama"), [], seed=0)
    assert fresh.num_parameters > 0 and len(timed.seconds) == 1 and timed.seconds[0] > 0


@pytest.mark.integration
def test_the_command_writes_its_folder_and_never_repeats_a_cell(tmp_path: Path, command: Command) -> None:
    backbone = tiny_backbone("llama")
    folder = tmp_path / "tiny"
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    options = ["--model", str(folder), "--num-train", "10"]
    options += ["--num-test", "2", "--seeds", "2", "--epochs", "1", "--rank", "2", "--max-length", "48"]
    options += ["--learning-rates", "0.001", "0.01", "--starts", "default", "pissa", "lora_ga"]
    options += ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    first_status, first = command("lora_init", options)
    assert first_status == 0, first
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert measured["starts"].keys() == {"default", "pissa", "lora_ga"} and not measured["refused"]
    row = measured["starts"]["pissa"]
    assert len(row["curve"]) == 2 and row["nats"]["num"] == 2 and row["start_s"] > 0
    assert row["difference"]["mean"] == pytest.approx(
        row["nats"]["mean"] - measured["starts"]["default"]["nats"]["mean"]
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Each at its best learning rate" in page and measured["said"][0] in page
    kept = [path.read_text() for path in (tmp_path / "cells").iterdir()]
    again_status, again = command("lora_init", options)
    assert again_status == 0 and "lora_init-tiny-persona:" in first
    assert "lora_init-tiny-persona:" not in again
    assert [path.read_text() for path in (tmp_path / "cells").iterdir()] == kept


@pytest.mark.integration
def test_what_the_product_refuses_is_named_with_its_reason(tmp_path: Path, command: Command) -> None:
    backbone = tiny_backbone("llama")
    folder = tmp_path / "tiny"
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    options = ["--model", str(folder), "--num-train", "10"]
    options += ["--num-test", "2", "--seeds", "1", "--epochs", "1", "--rank", "12", "--max-length", "48"]
    options += ["--learning-rates", "0.001", "--starts", "default", "lora_ga"]
    options += ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    done_status, done = command("lora_init", options)
    assert done_status == 0, done
    measured = json.loads((tmp_path / "out" / "measured.json").read_text())
    assert (
        measured["starts"].keys() == {"default"}
        and "expected at most 6 for init lora_ga" in measured["refused"]["lora_ga"]
    )
