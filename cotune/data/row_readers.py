"""Rows from one file: JSONL (plain or gzip), CSV, Parquet. Text is UTF-8, a line is at most 8 MiB."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from cotune.data.templates import Row, name_type
from cotune.errors import DataError

MAX_LINE_BYTES = 8 * 1024 * 1024

NumberedRow = tuple[int, Row]


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


def read_jsonl(path: Path) -> Iterator[NumberedRow]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            message = (
                f"the line is not JSON ({error.msg} at character {error.pos + 1}), expected one JSON object a line"
            )
            raise DataError(message, path=path, line=number) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"the JSON of the line is too large to read ({error})", path=path, line=number) from error
        if not isinstance(row, dict):
            message = f'the line is {name_type(row)}, expected a JSON object such as {{"prompt": ..., "target": ...}}'
            raise DataError(message, path=path, line=number)
        yield number, row


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
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".parquet": read_parquet,
}


def find_suffix(path: Path) -> str | None:
    """The key of `READERS` with which the file name ends."""
    return next((suffix for suffix in READERS if path.name.endswith(suffix)), None)
