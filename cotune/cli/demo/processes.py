"""The demo's processes: started, listened to, and stopped whatever happens."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from cotune.errors import CotuneError

STOP_TIMEOUT_S = 10.0


class Child:
    """A process of ours that says in JSON lines how far it is.

    Args:
        name: for messages.
        arguments: for the Python interpreter.
        log: file for its standard error.
    """

    def __init__(self, name: str, arguments: list[str], log: Path) -> None:
        self.name = name
        self._log = log
        self._lines: Queue[str | None] = Queue()
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True
            )
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def first(self, timeout_s: float) -> dict[str, Any]:
        """Its first line.

        Raises:
            CotuneError: it ended or was silent before.
        """
        try:
            line = self._lines.get(timeout=timeout_s)
        except Empty:
            raise CotuneError(f"the {self.name} process said nothing for {timeout_s:.0f} s; see {self._log}") from None
        if line is None:
            raise self._failure()
        return dict(json.loads(line))

    def follow(self, tell: Callable[[dict[str, Any]], None]) -> None:
        """Report its lines until it ends.

        Raises:
            CotuneError: it failed.
        """
        while (line := self._lines.get()) is not None:
            tell(json.loads(line))
        if self._process.wait() != 0:
            raise self._failure()

    def stop(self) -> None:
        """End it, gently first."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _failure(self) -> CotuneError:
        said = self._log.read_text(errors="replace").strip().splitlines()
        last = said[-1].removeprefix("error: ") if said else "it said nothing"
        return CotuneError(f"the {self.name} process failed: {last} (all of it in {self._log})")


@contextmanager
def started(name: str, arguments: list[str], log: Path) -> Iterator[Child]:
    """A child that is stopped at the end, also on error."""
    child = Child(name, arguments, log)
    try:
        yield child
    finally:
        child.stop()


def say(stage: str, done: int, total: int, note: str = "") -> None:
    """From inside a child: how far it is."""
    sys.stdout.write(json.dumps({"stage": stage, "done": done, "total": total, "note": note}) + "\n")
    sys.stdout.flush()
