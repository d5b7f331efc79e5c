"""Every text that was ever sent in a run, once each: what a provider that keeps everything could read.

Leaks are measured on this union, training included (`cotune.sandwich.leak`). It holds nothing that has not left.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Self, TextIO

from cotune.durable import finished_lines, whole_lines
from cotune.errors import DataError, InputError

MAX_LOG_BYTES = 4 << 30


class SentLog:
    """The union of what was sent; a file makes it last over runs.

    Args:
        path: JSON lines of digest and payload, readable by its owner alone; None: in memory.

    Raises:
        InputError, DataError: the file cannot be written, or is no such log.

    Example:
        >>> log = SentLog(None)
        >>> log.add("d1", b"hello"), log.add("d1", b"hello"), log.payloads
        (None, None, ['hello'])
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.Lock()
        self._payloads: dict[str, str] = {}
        self._file: TextIO | None = None
        if path is not None:
            self._read(path)
            try:
                path.touch(mode=0o600)
                self._file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise InputError(f"the log {path} cannot be written: {error.strerror}") from None

    @property
    def payloads(self) -> list[str]:
        """What was sent, in order, each once."""
        with self._lock:
            return list(self._payloads.values())

    def add(self, digest: str, payload: bytes) -> None:
        """Write down what is about to leave."""
        with self._lock:
            if digest in self._payloads:
                return
            self._payloads[digest] = payload.decode("utf-8", "replace")
            if self._file is not None:
                self._file.write(json.dumps({"digest": digest, "payload": self._payloads[digest]}) + "\n")
                self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, path: Path) -> None:
        for number, line in enumerate(whole_lines(path, max_bytes=MAX_LOG_BYTES), start=1):
            digest, payload = _sent(line, path, number)
            self._payloads[digest] = payload


def read_sent(path: Path) -> list[str]:
    """The payloads of a log, also of a run that goes on meanwhile: nothing is written, an unfinished line is left out.

    Raises:
        DataError: the file cannot be read, or is no such log.
    """
    try:
        lines = finished_lines(path, max_bytes=MAX_LOG_BYTES)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}; give the sent.jsonl of a run", path=path) from None
    return [_sent(line, path, number)[1] for number, line in enumerate(lines, start=1)]


def _sent(line: bytes, path: Path, number: int) -> tuple[str, str]:
    try:
        fields = json.loads(line)
        digest, payload = fields["digest"], str(fields["payload"])
        if not isinstance(digest, str):
            raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError("is no line of a log of what was sent", path=path, line=number) from None
    return digest, payload
