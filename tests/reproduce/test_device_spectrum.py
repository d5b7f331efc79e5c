"""The spectrum of devices: rows by hand, and one whole run of the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from device_spectrum import FORMATS, Row, make_parser, run_limited
from study_command import Command

from cotune.errors import CotuneError


def test_a_row_knows_the_smallest_limit_that_fits() -> None:
    cells = {100: {"fits": False}, 200: {"fits": True, "load_s": 1.0}, 400: {"fits": True, "load_s": 2.0}}
    row = Row(model="m", kind="onnx4", threads=1, cells=cells)
    assert row.least == 200 and row.fitting == cells[200]
    none = Row(model="m", kind="onnx4", threads=1, cells={100: {"fits": False}})
    assert none.least is None and none.fitting is None


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_process_that_dies_does_not_fit_and_one_that_fails_is_an_error() -> None:
    died = run_limited(["-c", "import os; os.abort()"], threads=1)
    assert died == {"fits": False, "error": "the process was ended by SIGABRT"}
    said = "libgomp: Thread creation failed: Resource temporarily unavailable"
    without = run_limited(["-c", f"raise SystemExit({said!r})"], threads=2)
    assert without == {"fits": False, "error": f"PyTorch got no memory: {said}"}
    with pytest.raises(CotuneError, match=r"gave no measurement: .*ZeroDivisionError"):
        run_limited(["-c", "1 / 0"], threads=1)
    with pytest.raises(CotuneError, match=r"took longer than 0\.2 s"):
        run_limited(["-c", "import time; time.sleep(9)"], threads=1, timeout_s=0.2)


def test_the_default_shapes_and_limits_are_those_of_the_issue() -> None:
    args = make_parser().parse_args([])
    assert args.memory[0] == "256MB" and args.memory[-1] == "16GB" and args.models == ["starter"]
    assert args.shapes == ["1m", "25m", "151m", "600m"] and len(FORMATS) == 6


@pytest.mark.integration
@pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux's")
def test_the_command_writes_its_folder_and_never_repeats_a_cell(tmp_path: Path, command: Command) -> None:
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    options = ["--models", "starter", "--shapes", "--formats", "onnx4", "--memory", "1GB", "20MB", "--threads", "1"]
    options += ["--runs", "1", "--tokens", "2", "--prompt", "4", "--work", str(tmp_path / "work")]
    options += ["--cells", str(tmp_path / "cells"), "--out", str(tmp_path / "out")]
    first_status, first = command("device_spectrum", options)
    assert first_status == 0, first
    (row,) = json.loads((tmp_path / "out" / "measured.json").read_text())["rows"]
    assert (row["model"], row["format"], row["threads"], row["least_bytes"]) == ("starter", "ONNX 4 bit", 1, 10**9)
    small, large = row["cells"]["20000000"], row["cells"]["1000000000"]
    assert not small["fits"] and "the runtime alone takes" in small["error"]
    assert large["fits"] and large["load_s"] > 0 and large["decode"]["num"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ONNX 4 bit under 20 MB: the runtime alone takes" in page and "<svg" in page
    assert str(tmp_path) not in page + (tmp_path / "out" / "config.json").read_text()
    cells = {path.name: path.read_text() for path in (tmp_path / "cells").iterdir()}
    again_status, _ = command("device_spectrum", options)
    assert again_status == 0
    assert {path.name: path.read_text() for path in (tmp_path / "cells").iterdir()} == cells
    wrong_status, wrong = command("device_spectrum", [*options, "--prompt", "5000"])
    assert wrong_status == 1 and "prompt and tokens are 5002, expected at most 256, the context with starter" in wrong
