"""The limit is the kernel's, counts what is mapped, and leaves out what libraries only reserve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit of addresses is Linux's")

# Memory that is asked for, a file that is mapped, or addresses that were reserved before the limit.
_PROGRAM = """
import mmap, sys
sys.path.insert(0, {benchmarks!r})
from limited_decode import NoRoomError, _kilobytes, limit_memory
reserved = mmap.mmap(-1, 2**30, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
resident = _kilobytes("VmRSS") * 1024
try:
    print(round((limit_memory(resident + {room}) - {room}) / 2**20))
except NoRoomError as error:
    print(error)
    sys.exit()
weights = open({file!r}, "rb")
for size in (20, 60):
    try:
        block = bytearray(size << 20) if {what!r} == "memory" else mmap.mmap(
            weights.fileno(), size << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        print(size, "fits")
        del block
    except (MemoryError, OSError):
        print(size, "does not fit")
"""


def said(what: str, room: int, file: Path) -> list[str]:
    with file.open("wb") as made:
        made.truncate(64 << 20)
    program = _PROGRAM.format(benchmarks=str(BENCHMARKS), what=what, room=room, file=str(file))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("what", ["memory", "file"])
def test_more_than_the_room_is_refused_by_the_kernel(what: str, tmp_path: Path) -> None:
    assert said(what, 40 << 20, tmp_path / "weights") == ["0", "20 fits", "60 does not fit"]


def test_a_runtime_that_is_larger_than_the_limit_is_told(tmp_path: Path) -> None:
    (sentence,) = said("memory", -(1 << 20), tmp_path / "weights")
    assert sentence.startswith("the runtime alone takes ") and " MiB, expected less than " in sentence


def test_options_are_measured_as_they_are_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    from offline_folders import CONTEXT, write_onnx_folder
    from toy import VOCAB

    folder = write_onnx_folder(tmp_path / "model")
    found = {}
    for limit in (2**22, 2**30):
        command = [str(BENCHMARKS / "limited_decode.py"), str(folder), "--format", "onnx4", "--vocab", str(VOCAB)]
        command += ["--limit-bytes", str(limit), "--context", str(CONTEXT), "--prompt", "8", "--tokens", "4"]
        command += ["--runs", "2"]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True)
        found[limit] = json.loads(done.stdout)
    assert found[2**22]["fits"] is False and "the runtime alone takes" in found[2**22]["error"]
    whole = found[2**30]
    assert whole["fits"] and whole["load_s"] > 0 and whole["peak_bytes"] >= whole["runtime_bytes"] > 0
    assert whole["prefill"]["num"] == 2 and whole["decode"]["num"] == 8
    assert 0 < whole["decode"]["lower_quartile"] <= whole["decode"]["median"] <= whole["decode"]["upper_quartile"]
