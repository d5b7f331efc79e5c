"""What commands print: people read standard error and plain lines, scripts read one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Progress and remarks go to standard error, so that standard output holds results alone.
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on one line, at once."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()


class Advance(Protocol):
    """Reports progress."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress(title: str, *, enabled: bool = True) -> Iterator[Advance]:
    """A progress bar on standard error; silent where `enabled` is False, and in files and pipes."""
    if not enabled or not stderr.is_interactive:
        yield lambda done, total, note="": None
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
        console=stderr,
    )
    with bar:
        task = bar.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield advance
