"""Finished cells of studies: each is one run with one setting, kept in a file at once and never repeated.

A study asks for the cells that it needs; what is there already costs nothing, whatever study it was made for. The file
has one JSON line for each cell. A line that a crash cut short is no cell.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cotune.errors import CotuneError, InputError

Key = Mapping[str, str | int | float | bool | None]
Value = dict[str, Any]


class OutOfTimeError(CotuneError):
    """The budget is spent; what is finished is kept."""


class Cells:
    """Cells in a folder, one file for each `group`.

    Args:
        folder: made where it is not there.
        budget_minutes: no cell is begun after so much time; None for no limit.
        tell: told what is run, and what was there already.
    """

    def __init__(
        self, folder: Path, *, budget_minutes: float | None = None, tell: Callable[[str], None] = print
    ) -> None:
        if budget_minutes is not None and not budget_minutes > 0:
            raise InputError(f"budget_minutes is {budget_minutes}, expected a positive number")
        self._folder = folder
        self._tell = tell
        self._ends_s = None if budget_minutes is None else time.monotonic() + 60 * budget_minutes
        self._known: dict[str, dict[str, Value]] = {}
        self.num_run = 0

    def get(self, group: str, key: Key, run: Callable[[], Value]) -> Value:
        """The value of a cell, from the file or by `run`.

        Args:
            group: name of the file.
            key: all that the value depends on.
            run: makes the value, as JSON holds it.

        Raises:
            OutOfTimeError: it is not there, and the budget is spent.
        """
        known = self._load(group)
        name = json.dumps(dict(key), sort_keys=True)
        if name in known:
            return known[name]
        what = ", ".join(f"{k} {v}" for k, v in key.items() if v is not None)
        if self._ends_s is not None and time.monotonic() > self._ends_s:
            raise OutOfTimeError(f"the budget is spent before {group}: {what}; run again to go on")
        self._tell(f"{group}: {what}")
        started_s = time.monotonic()
        value = {**run(), "cell_s": round(time.monotonic() - started_s, 1)}
        line = json.dumps({"key": dict(key), "value": value}, allow_nan=False, sort_keys=True)
        with self._path(group).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        known[name] = json.loads(line)["value"]
        self.num_run += 1
        return known[name]

    def _path(self, group: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder / f"{group}.jsonl"

    def _load(self, group: str) -> dict[str, Value]:
        if group in self._known:
            return self._known[group]
        known = self._known[group] = {}
        path = self._path(group)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            for line in text.splitlines():
                try:
                    record = json.loads(line)
                    known[json.dumps(record["key"], sort_keys=True)] = record["value"]
                except (ValueError, KeyError, TypeError):
                    continue
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        return known
