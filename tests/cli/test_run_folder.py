from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from cotune.cli.run_folder import CONFIG_FILE, command_line, run_folder
from cotune.errors import InputError


class RefusedError(Exception):
    """Stands for anything that ends a run."""


def broken_run(folder: Path, *files: tuple[str, str]) -> None:
    with pytest.raises(RefusedError), run_folder(folder, "cotune tune", {"seed": 1}) as made:
        assert made == folder and json.loads((folder / CONFIG_FILE).read_text())["config"] == {"seed": 1}
        for name, text in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        raise RefusedError


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_run_that_ends_well_keeps_its_config(tmp_path: Path) -> None:
    with run_folder(tmp_path / "a" / "run", "cotune tune", {"seed": 1}):
        pass
    assert list(contents(tmp_path)) == ["a/run/config.json"]


def test_a_run_without_anything_leaves_no_trace(tmp_path: Path) -> None:
    broken_run(tmp_path / "a" / "run")
    assert not any(tmp_path.iterdir())
    broken_run(tmp_path / "run", ("lora/metrics.jsonl", ""))
    assert not any(tmp_path.iterdir()), "an empty file is nothing"


def test_what_was_made_stays_with_its_config(tmp_path: Path) -> None:
    broken_run(tmp_path / "run", ("lora/checkpoint.safetensors", "numbers"), ("lora/metrics.jsonl", ""))
    assert contents(tmp_path / "run").keys() == {"config.json", "lora/checkpoint.safetensors", "lora/metrics.jsonl"}


def test_what_was_there_stays_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "lora").mkdir(parents=True)
    (folder / "mine").mkdir()
    earlier = {"config.json": "earlier", "lora/checkpoint.safetensors": "numbers", "empty": ""}
    for name, text in earlier.items():
        (folder / name).write_text(text)
    broken_run(folder, ("side/metrics.jsonl", ""))
    assert contents(folder) == earlier
    assert (folder / "mine").is_dir() and not (folder / "side").exists()
    # A run that went on from there is what the folder now holds.
    broken_run(folder, ("lora/checkpoint.safetensors", "other numbers"))
    assert contents(folder)["config.json"] != "earlier"
    # A folder of the user, without a run.
    (tmp_path / "own").mkdir()
    broken_run(tmp_path / "own")
    assert (tmp_path / "own").is_dir() and not any((tmp_path / "own").iterdir())


def test_a_file_in_the_way_is_one_clear_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="cannot be made"), run_folder(tmp_path / "file" / "run", "cotune tune", {}):
        pytest.fail("there is no folder")
    assert contents(tmp_path) == {"file": "mine"}


def test_numbers_that_json_lacks_are_written_as_words(tmp_path: Path) -> None:
    """Such as an open gate of fwdllm, `max_variance = inf`."""
    with run_folder(tmp_path, "cotune federate", {"gate": float("inf"), "rest": [1.5, {"low": float("-inf")}]}):
        pass
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["config"] == {"gate": "inf", "rest": [1.5, {"low": "-inf"}]}


def test_the_command_to_repeat_begins_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/cotune", "federate", "my config.toml", "--resume", "--out", "a"])
    assert command_line() == "cotune federate 'my config.toml' --out a"
