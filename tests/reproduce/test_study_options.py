from __future__ import annotations

import argparse
import os
import re
import signal
from pathlib import Path

import adaptation_study
import mezo_kshot
import pytest
import spa_study
import survey_memory
from study_options import HERE, add_run_options, open_cells, plain_endings, results_of, study_parser

from cotune.errors import InputError

PARSERS = {
    "spa_table2": spa_study.make_parser("spa_table2", "words"),
    "lora_init": adaptation_study.make_parser("lora_init", "words"),
    "mezo_kshot": mezo_kshot.make_parser(),
    "survey_memory": survey_memory.make_parser(),
}


@pytest.mark.parametrize("name", PARSERS)
def test_every_study_has_the_same_options(name: str) -> None:
    args = PARSERS[name].parse_args([])
    assert (args.model, args.data_root, args.dtype, args.device, args.threads) == ("starter", None, "float32", "cpu", 1)
    assert args.budget_minutes is None and args.cells == HERE / "cells" and args.out is None
    told = re.sub(r"\s+", " ", PARSERS[name].format_help())
    assert f"usage: python reproduce/{name}.py" in told
    assert f"reproduce/results/MODEL/{name})" in told.replace("- ", "-") and "examples:" in told


def test_features_are_kept_where_there_are_some() -> None:
    parser = study_parser("x", None, "examples:")
    add_run_options(parser, "x")
    assert not hasattr(parser.parse_args([]), "cache")
    parser = study_parser("x", None, "examples:")
    add_run_options(parser, "x", has_cache=True)
    assert parser.parse_args([]).cache == Path("runs/reproduce")


def test_cells_and_results_go_where_the_user_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = PARSERS["mezo_kshot"].parse_args(["--cells", str(tmp_path), "--budget-minutes", "1", "--model", "a/small"])
    assert open_cells(args).get("table", {"seed": 1}, lambda: {"score": 2})["score"] == 2
    assert (tmp_path / "table.jsonl").is_file() and capsys.readouterr().out
    assert results_of(args, "mezo_kshot") == HERE / "results" / "small" / "mezo_kshot"
    assert results_of(argparse.Namespace(out=tmp_path, model="x"), "mezo_kshot") == tmp_path
    args.budget_minutes = 0.0
    with pytest.raises(InputError, match=r"budget_minutes is 0\.0"):
        open_cells(args)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--seeds", "0"], "--seeds is 0, expected a whole number of at least 1"),
        (["--num-test", "2.5"], "--num-test is 2.5, expected a whole number of at least 1"),
        (["--learning-rates", "0.1", "-1"], "--learning-rates is -1, expected a positive number"),
        (["--budget-minutes", "nan"], "--budget-minutes is nan, expected a positive number"),
        (["--words"], "unrecognized arguments: --words"),
    ],
)
def test_a_number_out_of_range_is_refused_before_anything_is_computed(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        PARSERS["spa_table2"].parse_args(options)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {sentence}; see python reproduce/spa_table2.py --help\n"


def test_a_study_that_is_told_to_end_closes_what_it_opened() -> None:
    before, closed = signal.getsignal(signal.SIGTERM), []
    with pytest.raises(SystemExit) as ended, plain_endings():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            closed.append(True)
    assert ended.value.code == 128 + signal.SIGTERM and closed and signal.getsignal(signal.SIGTERM) is before
