"""Rows from one file: JSONL and JSON (plain or gzip), CSV, Parquet, and the article files of two data sets.

Text is UTF-8; a line or an article is at most 8 MiB, a JSON file at most 256 MiB.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from cotune.data.article_files import parse_story, parse_summary
from cotune.data.templates import Row, name_type
from cotune.errors import DataError

MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_JSON_BYTES = 256 * 1024 * 1024
# The key under which a JSON object has its rows, as in CoQA and SQuAD.
ROWS_KEY = "data"

NumberedRow = tuple[int, Row]

NO_SPACE = re.compile(r"[^ \t\r\n]")


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked where the name ends in `.gz`; what the system says becomes a `DataError`."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rb") as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            with path.open("rb") as file:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"the file is no valid gzip ({error}); pack it again", path=path) from error
    except OSError as error:
        raise DataError(f"the file cannot be read ({error.strerror or error})", path=path) from error


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines with their ends.

    Raises:
        DataError: a line is longer than `MAX_LINE_BYTES` or is not UTF-8.
    """
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(
                    f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB, expected one row of text a line",
                    path=path,
                    line=number,
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                message = f"byte {error.start} of the line is not UTF-8; save the file as UTF-8"
                raise DataError(message, path=path, line=number) from error
            yield number, text


def _fault(error: json.JSONDecodeError) -> str:
    """What is wrong; some of Python's words end where a place would follow."""
    return error.msg.removesuffix(" at")


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            message = (
                f"the line is not JSON ({_fault(error)} at character {error.pos + 1}), expected one JSON object a line"
            )
            raise DataError(message, path=path, line=number) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"the JSON of the line is too large to read ({error})", path=path, line=number) from error
        if not isinstance(row, dict):
            message = f'the line is {name_type(row)}, expected a JSON object such as {{"prompt": ..., "target": ...}}'
            raise DataError(message, path=path, line=number)
        yield number, row


def read_text(path: Path, max_bytes: int) -> str:
    """All of a file.

    Raises:
        DataError: it is larger than `max_bytes` or is not UTF-8.
    """
    with open_bytes(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(
            f"the file is larger than {max_bytes // 2**20} MiB, expected less; cut it into lines of JSON (.jsonl)",
            path=path,
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"byte {error.start} of the file is not UTF-8; save it as UTF-8", path=path) from error


def read_json(path: Path) -> Iterator[NumberedRow]:
    """A list of objects, or an object with such a list under `data`; numbered by the line where an object begins.

    JSON lines are read too, as many a `.json` file holds them.
    """
    text = read_text(path, MAX_JSON_BYTES)
    try:
        start = find_list(text)
        if start is None and is_tall_object(text):
            message = f"the file is one JSON object, expected a list of objects, or one under '{ROWS_KEY}'"
            raise DataError(message, path=path)
        if start is None:
            yield from read_jsonl(path)
            return
        line, counted = 1, 0
        for position, row in list_items(text, start):
            line, counted = line + text.count("\n", counted, position), position
            if not isinstance(row, dict):
                message = f"the list holds {name_type(row)}, expected only JSON objects"
                raise DataError(message, path=path, line=line)
            yield line, row
    except json.JSONDecodeError as error:
        message = f"the file is not JSON ({_fault(error)} at character {error.colno} of the line)"
        raise DataError(message, path=path, line=error.lineno) from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"the JSON of the file is too large to read ({error})", path=path) from error


def find_list(text: str) -> int | None:
    """Where the list of rows opens; None where the text is no list and no object with one under `data`."""
    decoder, position = json.JSONDecoder(), skip_space(text, 0)
    if text[position : position + 1] != "{":
        return position if text[position : position + 1] == "[" else None
    position = skip_space(text, position + 1)
    while text[position : position + 1] == '"':
        key, position = decoder.raw_decode(text, position)
        position = skip_space(text, position)
        if text[position : position + 1] != ":":
            raise json.JSONDecodeError("Expecting ':' delimiter", text, position)
        position = skip_space(text, position + 1)
        if key == ROWS_KEY and text[position : position + 1] == "[":
            return position
        _, position = decoder.raw_decode(text, position)
        position = skip_space(text, position)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
    return None


def is_tall_object(text: str) -> bool:
    """Whether the whole text is one JSON object of several lines, and so no row of JSON lines either."""
    start = skip_space(text, 0)
    if text[start : start + 1] != "{":
        return False
    _, after = json.JSONDecoder().raw_decode(text, start)
    return skip_space(text, after) == len(text) and "\n" in text[start:after]


def list_items(text: str, position: int) -> Iterator[tuple[int, object]]:
    """Start and value of each item of the JSON list that opens at `position`, one after the other."""
    decoder, position = json.JSONDecoder(), skip_space(text, position + 1)
    while text[position : position + 1] != "]":
        item, after = decoder.raw_decode(text, position)
        yield position, item
        position = skip_space(text, after)
        if text[position : position + 1] == ",":
            position = skip_space(text, position + 1)
        elif text[position : position + 1] != "]":
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)


def skip_space(text: str, position: int) -> int:
    """The first position from this one on that is no white space."""
    found = NO_SPACE.search(text, position)
    return len(text) if found is None else found.start()


def read_story(path: Path) -> Iterator[NumberedRow]:
    """The one article of a CNN/DailyMail `.story` file."""
    yield from read_article(path, parse_story)


def read_summary(path: Path) -> Iterator[NumberedRow]:
    """The one article of an XSum `.summary` file."""
    yield from read_article(path, parse_summary)


def read_article(path: Path, parse: Callable[[str], Row]) -> Iterator[NumberedRow]:
    """The one row of a file that is one article."""
    text = read_text(path, MAX_LINE_BYTES)
    try:
        row = parse(text)
    except DataError as error:
        raise DataError(str(error), path=path) from error
    yield 1, row


def read_csv(path: Path) -> Iterator[NumberedRow]:
    """A header line with the names of the columns, then rows of as many fields."""
    reader = csv.reader(line for _, line in read_lines(path))
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = fields
                if len(set(header)) < len(header):
                    raise DataError(f"the header names a column twice: {fields}", path=path, line=reader.line_num)
            elif len(fields) != len(header):
                message = f"the row has {len(fields)} fields, expected {len(header)} as in the header"
                raise DataError(message, path=path, line=reader.line_num)
            else:
                yield reader.line_num, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise DataError(f"the line is not CSV ({error})", path=path, line=reader.line_num) from error


def read_parquet(path: Path) -> Iterator[NumberedRow]:
    """The rows of a Parquet file, numbered from 1; needs pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        message = "reading Parquet needs pyarrow; install it with: pip install 'cotune[train]'"
        raise DataError(message, path=path) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"the file is no valid Parquet ({error})", path=path) from error


READERS: dict[str, Callable[[Path], Iterator[NumberedRow]]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".json.gz": read_json,
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
    ".story": read_story,
    ".summary": read_summary,
}


def find_suffix(path: Path) -> str | None:
    """The key of `READERS` with which the file name ends."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)
