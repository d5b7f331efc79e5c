"""Finished cells: kept at once, never repeated, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cells import Cells, OutOfTimeError

from cotune.errors import InputError


def silent(line: str) -> None:
    """Nobody listens."""


def test_a_cell_is_run_once_also_by_the_next_process(tmp_path: Path) -> None:
    runs: list[int] = []

    def run() -> dict[str, Any]:
        runs.append(1)
        return {"score": 0.5}

    first = Cells(tmp_path, tell=silent)
    assert first.get("xsum", {"seed": 0, "rate": 0.1}, run)["score"] == 0.5
    assert first.get("xsum", {"rate": 0.1, "seed": 0}, run)["score"] == 0.5
    again = Cells(tmp_path, tell=silent)
    assert again.get("xsum", {"seed": 0, "rate": 0.1}, run)["score"] == 0.5
    assert (len(runs), again.num_run) == (1, 0)
    again.get("xsum", {"seed": 1, "rate": 0.1}, run)
    again.get("sciq", {"seed": 0, "rate": 0.1}, run)
    assert len(runs) == 3


def test_a_run_that_fails_leaves_no_cell(tmp_path: Path) -> None:
    def broken() -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Cells(tmp_path, tell=silent).get("xsum", {"seed": 0}, broken)
    assert Cells(tmp_path, tell=silent).get("xsum", {"seed": 0}, lambda: {"score": 1.0})["score"] == 1.0


def test_a_line_that_was_cut_is_no_cell_and_harms_no_other(tmp_path: Path) -> None:
    cells = Cells(tmp_path, tell=silent)
    cells.get("xsum", {"seed": 0}, lambda: {"score": 1.0})
    cells.get("xsum", {"seed": 1}, lambda: {"score": 2.0})
    path = tmp_path / "xsum.jsonl"
    path.write_text(path.read_text()[:-9])
    resumed = Cells(tmp_path, tell=silent)
    assert resumed.get("xsum", {"seed": 1}, lambda: {"score": 3.0})["score"] == 3.0
    last = Cells(tmp_path, tell=silent)
    assert [last.get("xsum", {"seed": seed}, dict)["score"] for seed in (0, 1)] == [1.0, 3.0]
    assert last.num_run == 0


def test_no_cell_is_begun_after_the_budget(tmp_path: Path) -> None:
    Cells(tmp_path, tell=silent).get("xsum", {"seed": 0}, lambda: {"score": 1.0})
    spent = Cells(tmp_path, budget_minutes=1e-9, tell=silent)
    assert spent.get("xsum", {"seed": 0}, dict)["score"] == 1.0
    with pytest.raises(OutOfTimeError, match="budget is spent before xsum: seed 1"):
        spent.get("xsum", {"seed": 1}, dict)
    with pytest.raises(InputError, match="budget_minutes is 0"):
        Cells(tmp_path, budget_minutes=0)


def test_numbers_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Cells(tmp_path, tell=silent).get("xsum", {"seed": 0}, lambda: {"score": float("nan")})
    assert not (tmp_path / "xsum.jsonl").exists()
