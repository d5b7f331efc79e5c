"""Freed blocks leave the process, which they do not do by themselves."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

from cotune import malloc
from cotune.cli import freed_memory

# The first block teaches glibc to keep what is smaller; the last one stands behind the others and holds them there.
CODE = """
import json
from cotune.cli.freed_memory import give_back_freed_memory
def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
done = {asked} and give_back_freed_memory()
first = bytearray(b"x") * 30_000_000
del first
before = resident()
blocks = [bytearray(b"x") * 9_000_000 for _ in range(10)]
last = bytearray(b"x") * 100_000
del blocks
print(json.dumps({{"done": done, "kept": resident() - before}}))
"""
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")


@needs_glibc
@pytest.mark.parametrize("asked", [False, True])
def test_large_blocks_go_when_they_are_freed(asked: bool) -> None:
    # Without the variables that do the same from outside.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = [sys.executable, "-c", CODE.format(asked=asked)]
    told = json.loads(subprocess.run(code, env=plain, capture_output=True, check=True, timeout=60).stdout)
    assert told["done"] is asked
    assert told["kept"] < 5_000_000 if asked else told["kept"] > 80_000_000


def test_a_system_without_the_setting_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: object())
    assert not freed_memory.give_back_freed_memory()
