"""Measured memory is that of the work: known blocks are found, and a child's failure is told."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cotune.errors import CotuneError, InputError
from cotune.evaluation.measured_memory import peak_bytes, run_measured

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the resident set's peak is Linux's")
MEASURE = """
import json
from cotune.evaluation.measured_memory import peak_bytes
def hold(num_bytes):
    return len(bytearray(b"x") * num_bytes)
hold(1000)
sizes = (40_000_000, 20_000_000)
print(json.dumps({"peaks": [peak_bytes(lambda: hold(size)) for size in sizes]}))
"""


@needs_linux
def test_the_peak_of_a_child_is_that_of_its_blocks_and_falls_again() -> None:
    first, second = run_measured(["-c", MEASURE])["peaks"]
    assert first == pytest.approx(40_000_000, rel=0.05)
    assert second == pytest.approx(20_000_000, rel=0.05), "the first block's peak is forgotten"


def test_a_child_that_fails_is_told_with_its_last_words() -> None:
    with pytest.raises(CotuneError, match=r"exit status 1.*too large a number"):
        run_measured(["-c", "raise SystemExit('too large a number')"])
    for code in ("pass", "print('no number')", "print(5)"):
        with pytest.raises(CotuneError, match="gave no measurement"):
            run_measured(["-c", code])
    with pytest.raises(CotuneError, match=r"took longer than 0\.2 s"):
        run_measured(["-c", "import time; time.sleep(60)"], timeout_s=0.2)


@needs_linux
def test_a_system_without_the_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotune.evaluation.measured_memory._CLEAR", Path("/nowhere/clear_refs"))
    with pytest.raises(InputError, match="measure on Linux, or on CUDA"):
        peak_bytes(lambda: None)


def test_cuda_counts_what_is_held_beyond_what_was() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="which PyTorch does not find here"):
            peak_bytes(lambda: None, "cuda")
        pytest.skip("no CUDA device")
    before = torch.ones(1_000_000, device="cuda")
    peak = peak_bytes(lambda: torch.ones(2_000_000, device="cuda") + 1, "cuda")
    assert peak == pytest.approx(16_000_000, rel=0.01)
    assert before.sum() == 1_000_000
