"""Rows with a column of private values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cotune.errors import DataError, InputError
from cotune.sandwich.examples import PrivateExample, read_private_examples


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_private_values_stand_beside_any_template(tmp_path: Path) -> None:
    rows = [{"prompt": "Call Ann", "target": "Done", "private": ["Ann"]}, {"prompt": "b", "target": "c"}]
    found = read_private_examples(write(tmp_path / "a.jsonl", *rows))
    assert found == [PrivateExample("Call Ann", "Done", ("Ann",)), PrivateExample("b", "c")]
    assert "Ann" not in repr(found)
    assert len(read_private_examples(tmp_path / "a.jsonl", limit=1, seed=0)) == 1
    rows = [{"prompt": "Call(name): call Ann", "target": "Done", "private": ["Ann"], "public": ["Call(name)"]}]
    (one,) = read_private_examples(write(tmp_path / "b.jsonl", *rows))
    assert one.public == ("Call(name)",) and one.private == ("Ann",)


@pytest.mark.parametrize("private", ["Ann", [5], [" "]])
def test_a_column_that_is_no_list_of_texts_is_refused_by_its_line(tmp_path: Path, private: object) -> None:
    path = write(
        tmp_path / "a.jsonl", {"prompt": "a", "target": "b"}, {"prompt": "a", "target": "b", "private": private}
    )
    with pytest.raises(DataError, match="line 2: column 'private'"):
        read_private_examples(path)


def test_an_empty_request_is_refused() -> None:
    with pytest.raises(InputError, match="empty request or target"):
        PrivateExample(" ", "x")
