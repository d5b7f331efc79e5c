from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.data.row_readers import MAX_LINE_BYTES, READERS, find_suffix, read_csv, read_jsonl, read_parquet
from cotune.errors import DataError

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
JSON_ROWS = st.lists(st.dictionaries(TEXT, st.one_of(TEXT, st.integers(-9, 9), st.none(), st.lists(TEXT))))


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rows")


@given(rows=JSON_ROWS)
def test_jsonl_gives_back_what_json_wrote(folder: Path, rows: list[dict[str, object]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    plain = write(folder / "rows.jsonl", lines)
    packed = write(folder / "rows.jsonl.gz", gzip.compress(lines.encode()))
    expected = list(enumerate(rows, start=1))
    assert list(read_jsonl(plain)) == expected
    assert list(read_jsonl(packed)) == expected


def test_jsonl_skips_blank_lines_and_a_byte_order_mark_but_counts_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\r\n\r\n{"text": "y"}')
    assert list(read_jsonl(path)) == [(1, {"text": "x"}), (3, {"text": "y"})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": }', r"line 2: the line is not JSON \(Expecting value at character 10\)"),
        (b'{"text": "cut', r"the line is not JSON \(Invalid control character at character 14\)"),
        (b"[1, 2]", "line 2: the line is a list of a number, expected a JSON object"),
        (b'"hello"', "line 2: the line is text, expected a JSON object"),
        (b'{"text": "\xff"}', "line 2: byte 10 of the line is not UTF-8"),
        (b"[" * 100_000, "line 2: the JSON of the line is too large to read"),
        (b'{"n": ' + b"9" * 5000 + b"}", "line 2: the JSON of the line is too large to read"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", b'{"text": "x"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_jsonl(path))
    assert caught.value.path == path
    assert caught.value.line == 2


def test_a_line_over_the_limit_is_refused_before_parsing(tmp_path: Path) -> None:
    exact = b'{"text": "' + b"x" * (MAX_LINE_BYTES - 13) + b'"}\n'
    assert len(exact) == MAX_LINE_BYTES
    assert len(list(read_jsonl(write(tmp_path / "fits.jsonl", exact)))) == 1
    with pytest.raises(DataError, match="line 1: the line is longer than 8 MiB"):
        list(read_jsonl(write(tmp_path / "long.jsonl", b"x" + exact)))


@pytest.mark.parametrize("content", [b"no gzip at all", gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-12]])
def test_broken_gzip_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match="no valid gzip"):
        list(read_jsonl(write(tmp_path / "a.jsonl.gz", content)))


def test_csv_with_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'prompt,target\r\n"a ""b"",\nc",d\r\n\r\ne,f\r\n')
    assert list(read_csv(path)) == [(3, {"prompt": 'a "b",\nc', "target": "d"}), (5, {"prompt": "e", "target": "f"})]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2,3\n", "line 2: the row has 3 fields, expected 2 as in the header"),
        ("a,b\n1\n", "line 2: the row has 1 fields, expected 2"),
        ("a,a\n1,2\n", "line 1: the header names a column twice"),
        ("a,b\n" + "x" * 200_000 + ",2\n", r"line 2: the line is not CSV \(field larger"),
    ],
)
def test_bad_csv_names_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(read_csv(write(tmp_path / "bad.csv", content)))


def test_parquet_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "x", "turns": [{"speaker": "A"}]}, {"text": "y", "turns": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert list(read_parquet(tmp_path / "a.parquet")) == list(enumerate(rows, start=1))
    with pytest.raises(DataError, match="no valid Parquet"):
        list(read_parquet(write(tmp_path / "bad.parquet", "PAR1 or so")))


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it with: pip install 'cotune\[train\]'"):
        list(read_parquet(tmp_path / "a.parquet"))


def test_suffixes() -> None:
    assert find_suffix(Path("a.b.jsonl.gz")) == ".jsonl.gz"
    assert find_suffix(Path("a.txt")) is None
    assert all(find_suffix(Path(f"x{suffix}")) == suffix for suffix in READERS)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_jsonl(tmp_path / "nowhere.jsonl"))
