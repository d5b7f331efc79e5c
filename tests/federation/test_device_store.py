"""A round that is done again begins where the round before it ended."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cotune.errors import InputError
from cotune.federation.device_store import DeviceStore


def test_rounds_build_on_the_one_before_and_old_ones_go(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "d", keep=3)
    assert store.before("r", 1) is None and store.last("r") is None
    for number in (1, 2, 3, 5, 6):
        store.save("r", number, {"x": torch.tensor([float(number)])})
    found = [store.before("r", number) for number in (4, 5, 6, 7)]
    assert [one["x"].item() for one in found if one is not None] == [3.0, 3.0, 5.0, 6.0]
    assert sorted(path.name for path in (tmp_path / "d" / "r").iterdir()) == [
        "round-000003.safetensors",
        "round-000005.safetensors",
        "round-000006.safetensors",
    ]
    # Done again, it is written again, and what came after it is not taken for what was before.
    store.save("r", 5, {"x": torch.tensor([50.0])})
    before = store.before("r", 6)
    assert before is not None and before["x"].item() == 50.0 and store.before("other", 6) is None


def test_runs_and_their_last_rounds_are_told(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path / "d")
    assert store.runs() == [] and store.last_round("r") is None
    (tmp_path / "d" / "empty").mkdir(parents=True)
    for run, number in (("s", 2), ("r", 9), ("r", 10)):
        store.save(run, number, {"x": torch.zeros(1)})
    assert store.runs() == ["r", "s"] and store.last_round("r") == 10 and store.last_round("empty") is None


def test_a_run_whose_beginning_is_gone_is_refused(tmp_path: Path) -> None:
    store = DeviceStore(tmp_path)
    store.save("r", 7, {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="has rounds from 7 on of run r, expected one before 2"):
        store.before("r", 2)
    # Round 7 was the first one: done again, it begins afresh.
    assert store.before("r", 7) is None
