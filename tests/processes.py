"""Programs of cotune as real processes, which tests start, watch and kill by their own ids."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@contextmanager
def python(*arguments: str, log: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process, and all that it starts, which end with the block at the latest."""
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
    try:
        yield process
    finally:
        for one in descendants(process):
            kill(one)
        process.kill()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def kill(process: psutil.Process) -> None:
    """SIGKILL, if it still is."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """All processes below one."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def read_json(process: subprocess.Popen[str], log: Path) -> dict[str, Any]:
    """The line of JSON that a process prints when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, log.read_text()[-3000:]
    return json.loads(line)  # type: ignore[no-any-return]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> bool:
    """Whether `condition` came true in time."""
    ends_s = time.monotonic() + timeout_s
    while time.monotonic() < ends_s:
        if condition():
            return True
        time.sleep(0.05)
    return condition()
