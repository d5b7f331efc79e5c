"""The egress ledger: one JSON line for each thing that leaves a device.

    {"time": "2025-11-21T02:55:00.123+00:00", "way": "generate", "kind": "ack", "bytes": 16, "digest": "0f3a..."}

`way` is the way of working (generate, tune, ...), `kind` what it was, `bytes` its size, `digest` the first 16 hex
digits of its SHA-256. Content is never stored, but a short message can be guessed back from its digest: keep a
ledger as private as the device's texts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self, TextIO

from cotune.errors import DataError, InputError

DIGEST_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class LedgerEntry:
    """One thing that left the device."""

    time: str
    """When, ISO 8601 in UTC."""
    way: str
    """The way of working it belonged to."""
    kind: str
    """What it was; on the wire, the name of the frame."""
    bytes: int
    """Its size."""
    digest: str
    """First 16 hex digits of its SHA-256."""


class EgressLedger:
    """Counts everything that leaves, and writes it down if it has a file.

    Args:
        path: JSON lines are appended here, buffered until `flush` or `close`; None keeps only the totals.
        now: the clock, for tests.

    Raises:
        InputError: the file cannot be written.

    Example:
        >>> ledger = EgressLedger(None)
        >>> _ = ledger.record("generate", "ack", bytes(16))
        >>> ledger.totals()
        {'ack': {'count': 1, 'bytes': 16}}
    """

    def __init__(self, path: Path | str | None, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._totals: dict[str, dict[str, int]] = {}
        self._now = now
        self._file: TextIO | None = None
        if path is not None:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = Path(path).open("a", encoding="utf-8")  # noqa: SIM115  closed by close()
            except OSError as error:
                raise InputError(
                    f"the ledger {path} cannot be written: {error.strerror}; choose another file"
                ) from None

    def record(self, way: str, kind: str, payload: bytes | memoryview) -> LedgerEntry:
        """Write down that `payload` leaves."""
        entry = LedgerEntry(
            time=self._now().isoformat(timespec="milliseconds"),
            way=way,
            kind=kind,
            bytes=len(payload),
            digest=hashlib.sha256(payload).hexdigest()[:DIGEST_DIGITS],
        )
        _add(self._totals, entry)
        if self._file is not None:
            self._file.write(json.dumps(asdict(entry)) + "\n")
        return entry

    def totals(self) -> dict[str, dict[str, int]]:
        """For each kind recorded here, `count` and `bytes`."""
        return {kind: dict(total) for kind, total in self._totals.items()}

    def flush(self) -> None:
        """Hand all lines to the operating system."""
        if self._file is not None:
            self._file.flush()

    def close(self) -> None:
        """Flush and close the file; totals stay readable. Closing twice is fine."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def read(path: Path | str) -> list[LedgerEntry]:
        """All entries of a ledger file, oldest first.

        Raises:
            DataError: the file cannot be read, or a line is no ledger entry; names the line.
        """
        try:
            lines = Path(path).read_bytes().splitlines()
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", path=path) from None
        return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def total_entries(entries: Iterable[LedgerEntry]) -> dict[str, dict[str, int]]:
    """For each kind, `count` and `bytes`, as `EgressLedger.totals` gives them."""
    totals: dict[str, dict[str, int]] = {}
    for entry in entries:
        _add(totals, entry)
    return totals


def _add(totals: dict[str, dict[str, int]], entry: LedgerEntry) -> None:
    total = totals.setdefault(entry.kind, {"count": 0, "bytes": 0})
    total["count"] += 1
    total["bytes"] += entry.bytes


_FIELD_TYPES = {"time": str, "way": str, "kind": str, "bytes": int, "digest": str}


def _parse(line: bytes, path: Path | str, number: int) -> LedgerEntry:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("expected a ledger entry, this is no JSON", path=path, line=number) from None
    if not isinstance(fields, dict) or fields.keys() != _FIELD_TYPES.keys():
        raise DataError(f"expected a JSON object with {', '.join(_FIELD_TYPES)}", path=path, line=number)
    for name, kind in _FIELD_TYPES.items():
        if type(fields[name]) is not kind:
            raise DataError(f"{name} is {fields[name]!r}, expected {kind.__name__}", path=path, line=number)
    if fields["bytes"] < 0:
        raise DataError(f"bytes is {fields['bytes']}, expected at least 0", path=path, line=number)
    return LedgerEntry(**fields)
