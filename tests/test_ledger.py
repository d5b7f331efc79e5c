"""The ledger: its lines, its totals, and files that are none."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cotune.errors import DataError, InputError
from cotune.ledger import EgressLedger, LedgerEntry, total_entries

GOOD = {
    "time": "2025-01-01T00:00:00.000+00:00",
    "way": "tune",
    "kind": "open",
    "bytes": 3,
    "digest": "ba7816bf8f01cfea",
}


def fixed_clock() -> datetime:
    return datetime(2025, 1, 1, tzinfo=UTC)


def test_a_line_by_hand(tmp_path: Path) -> None:
    """SHA-256 of "abc" starts with ba7816bf8f01cfea (FIPS 180-4)."""
    path = tmp_path / "ledger.jsonl"
    with EgressLedger(path, now=fixed_clock) as ledger:
        entry = ledger.record("tune", "open", b"abc")
    assert path.read_text() == json.dumps(GOOD) + "\n"
    assert EgressLedger.read(path) == [entry] == [LedgerEntry(**GOOD)]  # type: ignore[arg-type]


def test_content_is_never_stored(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with EgressLedger(path) as ledger:
        ledger.record("generate", "open", b"my private words")
    assert b"private" not in path.read_bytes()


def test_totals_by_kind_outlive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = EgressLedger(path)
    for payload in (b"12", b"345"):
        ledger.record("generate", "ack", payload)
    ledger.record("tune", "open", memoryview(b"6"))
    ledger.close()
    ledger.close()
    expected = {"ack": {"count": 2, "bytes": 5}, "open": {"count": 1, "bytes": 1}}
    assert ledger.totals() == expected == total_entries(EgressLedger.read(path))
    ledger.totals()["ack"]["bytes"] = 0
    assert ledger.totals() == expected


def test_lines_are_buffered_until_flush_and_appended(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "ledger.jsonl"
    first = EgressLedger(path)
    first.record("generate", "ack", b"1")
    assert path.read_bytes() == b""
    first.flush()
    assert len(EgressLedger.read(path)) == 1
    first.close()
    with EgressLedger(path) as second:
        second.record("generate", "ack", b"2")
    assert len(EgressLedger.read(path)) == 2


def test_without_a_file_only_the_totals_are_kept() -> None:
    with EgressLedger(None) as ledger:
        ledger.record("generate", "ack", b"1")
        ledger.flush()
    assert ledger.totals() == {"ack": {"count": 1, "bytes": 1}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is no JSON"),
        ("", "this is no JSON"),
        ("[" * 100_000, "this is no JSON"),
        ("[]", "expected a JSON object with time, way, kind, bytes, digest"),
        (json.dumps({**GOOD, "content": "x"}), "expected a JSON object with"),
        (json.dumps({**GOOD, "bytes": "3"}), "bytes is '3', expected int"),
        (json.dumps({**GOOD, "bytes": True}), "bytes is True, expected int"),
        (json.dumps({**GOOD, "kind": None}), "kind is None, expected str"),
        (json.dumps({**GOOD, "bytes": -1}), "bytes is -1, expected at least 0"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(DataError, match=message) as caught:
        EgressLedger.read(path)
    assert caught.value.line == 2
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        EgressLedger.read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be written"):
        EgressLedger(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        EgressLedger(tmp_path / "file" / "ledger.jsonl")
