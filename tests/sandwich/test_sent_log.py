"""What was sent, kept over runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from cotune.errors import DataError, InputError
from cotune.sandwich.sent_log import SentLog, read_sent


def test_each_payload_is_kept_once_and_for_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    with SentLog(path) as log:
        log.add("d1", "to Jürgen".encode())
        log.add("d2", b"\xff")
        log.add("d1", b"not looked at: the digest is known")
    assert path.stat().st_mode & 0o777 == 0o600
    with SentLog(path) as log:
        assert log.payloads == ["to Jürgen", "�"]
        log.add("d1", b"again")
        log.add("d3", b"third")
    with SentLog(path) as log:
        assert log.payloads == ["to Jürgen", "�", "third"]


@pytest.mark.parametrize("cut", (b'{"digest": "d2", "pay', b'{"digest": "d2", "payload": "x"}'))
def test_a_line_that_a_killed_process_did_not_finish_is_cut(tmp_path: Path, cut: bytes) -> None:
    path = tmp_path / "sent.jsonl"
    path.write_bytes(b'{"digest": "d1", "payload": "first"}\n' + cut)
    with SentLog(path) as log:
        log.add("d3", b"third")
    with SentLog(path) as log:
        assert log.payloads == ["first", "third"]


@pytest.mark.parametrize("line", (b"no JSON", b"[]", b'{"digest": "d1"}', b'{"digest": [], "payload": ""}'))
def test_a_foreign_file_is_refused(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "sent.jsonl"
    path.write_bytes(b'{"digest": "d1", "payload": "first"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"sent.jsonl, line 2: is no line of a log of what was sent"):
        SentLog(path)


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the log .*sent.jsonl cannot be written: No such file or directory"):
        SentLog(tmp_path / "missing" / "sent.jsonl")


def test_a_log_that_is_being_written_is_read_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "sent.jsonl"
    with SentLog(path) as log:
        log.add("a", b"one")
        path.write_bytes(path.read_bytes() + b'{"digest": "b", "pay')
        before = path.read_bytes()
        assert read_sent(path) == ["one"] and path.read_bytes() == before
    for name, text in (("missing", None), ("nonsense", "[5]\n")):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=r"cannot be read|no line of a log"):
            read_sent(tmp_path / name)
