"""Studies' commands in this process: what a shell would start, without loading PyTorch again each time."""

from __future__ import annotations

import contextlib
import io
import json
import runpy
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from study_command import Command
from tiny_models import tiny_backbone

REPRODUCE = Path(__file__).parents[2] / "reproduce"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs `python reproduce/NAME.py OPTIONS`."""

    def run(name: str, options: Sequence[object]) -> tuple[int, str]:
        path = REPRODUCE / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, options)])
        num_threads, status = torch.get_num_threads(), 0
        capfd.readouterr()
        try:
            # Warnings are no errors where users run it.
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1 if ended.code else 0
            if isinstance(ended.code, str):
                sys.stderr.write(ended.code + "\n")
        finally:
            torch.set_num_threads(num_threads)
        captured = capfd.readouterr()
        return status, captured.out + captured.err

    return run


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What a study measures in children runs in this process, with 5 MB as every peak; gives what they were asked.

    A child that loads PyTorch costs more than all else in such a test. `test_survey_memory.py` has a real one.
    """
    asked: list[list[str]] = []

    def peak(work: Callable[[], object], device: str = "cpu") -> int:
        work()
        return 5_000_000

    def run(arguments: Sequence[str], **ignored: object) -> dict[str, object]:
        asked.append(list(arguments))
        said = io.StringIO()
        num_threads = torch.get_num_threads()
        with monkeypatch.context() as patched, contextlib.redirect_stdout(said):
            patched.setattr(sys, "argv", list(arguments))
            runpy.run_path(arguments[0], run_name="__main__")
        torch.set_num_threads(num_threads)
        return dict(json.loads(said.getvalue().splitlines()[-1]))

    monkeypatch.setattr("cotune.evaluation.measured_memory.run_measured", run)
    monkeypatch.setattr("cotune.evaluation.measured_memory.peak_bytes", peak)
    return asked


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A random backbone as a folder named `tiny`."""
    backbone, folder = tiny_backbone("llama"), tmp_path / "tiny"
    backbone.model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    return folder
