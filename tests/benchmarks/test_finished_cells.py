"""A long benchmark goes on where it was interrupted, and only there."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from finished_cells import FinishedCells

from cotune.errors import InputError

KEYS = ("mbps", "method")


def settings(out: Path, **changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"out": out, "resume": True, "seed": 0, "mbps": [1, 10], "turns": 2} | changes)


def cells_of(args: argparse.Namespace) -> FinishedCells:
    return FinishedCells("network", args, KEYS, free=("mbps",))


def test_finished_cells_are_kept_at_once_and_found_again(tmp_path: Path) -> None:
    out = tmp_path / "results" / "network.json"
    cells = cells_of(settings(out))
    cells.keep([{"mbps": 10, "method": "spa", "rate": 1.5}])
    cells.keep([{"mbps": 1, "method": "lora", "rate": 0.5}])
    again = cells_of(settings(out, mbps=[1, 10, 100]))
    assert (10, "spa") in again
    assert (1.0, "lora") in again
    assert (10, "lora") not in again
    assert [row["mbps"] for row in again.rows] == [1, 10]
    again.keep([{"mbps": 100, "method": "spa", "rate": 2.5}])
    assert len(json.loads(out.read_text(encoding="utf-8"))["results"]["rows"]) == 3


def test_without_resume_all_is_new(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    cells_of(settings(out)).keep([{"mbps": 10, "method": "spa"}])
    assert (10, "spa") not in cells_of(settings(out, resume=False))


def test_cells_of_other_settings_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    cells_of(settings(out)).keep([{"mbps": 10, "method": "spa"}])
    with pytest.raises(InputError, match="another turns"):
        cells_of(settings(out, turns=3))


@pytest.mark.parametrize("text", ["{", "[]", '{"config": {}, "results": {"rows": [{"mbps": 1}]}}'])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    out = tmp_path / "network.json"
    out.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="no result file of network"):
        cells_of(settings(out))
