from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from cotune.data.split_files import XSUM_LIST, find_split_files, list_splits
from cotune.errors import DataError


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n", encoding="utf-8")
    return folder


def found(folder: Path, split: str | None) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_split_files(folder, split)]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train.jsonl", "validation.jsonl", "test.jsonl"), ("train.jsonl", "validation.jsonl", "test.jsonl")),
        (("train.json", "valid.json", "test.json"), ("train.json", "valid.json", "test.json")),
        (("coqa-train-v1.0.json", "coqa-dev-v1.0.json"), ("coqa-train-v1.0.json", "coqa-dev-v1.0.json", None)),
        (("train/a.story", "val/b.story"), ("train/a.story", "val/b.story", None)),
        (("data/train-0.parquet", "data/test-0.parquet"), ("data/train-0.parquet", None, "data/test-0.parquet")),
        # What only describes the data is no data.
        (("test.jsonl", "tests.jsonl", "dataset_info.json", "train.json"), (None, None, "test.jsonl")),
        (("val.csv", "validation.csv", "my-train.csv"), ("my-train.csv", "validation.csv", None)),
    ],
)
def test_names_of_public_data_sets(tmp_path: Path, names: tuple[str, ...], splits: tuple[str | None, ...]) -> None:
    touch(tmp_path, *names)
    assert list_splits(tmp_path) == tuple(
        split for split, name in zip(("train", "validation", "test"), splits, strict=True) if name
    )
    for split, name in zip(("train", "validation", "test"), splits, strict=True):
        if name is not None:
            assert found(tmp_path, split) == [name]


def test_the_default_split(tmp_path: Path) -> None:
    assert found(touch(tmp_path / "one", "notes.jsonl", "about.json"), None) == ["notes.jsonl"]
    assert found(touch(tmp_path / "two", "train_1.csv", "train_0.csv", "dev.csv"), None) == [
        "train_0.csv",
        "train_1.csv",
    ]
    assert found(tmp_path / "two", "dev") == ["dev.csv"]
    assert found(touch(tmp_path / "stories", "a.story", "b.story"), None) == ["a.story", "b.story"]


def test_the_lists_of_xsum(tmp_path: Path) -> None:
    folder = touch(tmp_path / "bbc", "1.summary", "2.summary", "3.summary")
    lists = {"train": ["3", "1", "99"], "validation": [], "test": ["2"]}
    (tmp_path / XSUM_LIST).write_text(json.dumps(lists), encoding="utf-8")
    assert found(folder, None) == found(folder, "train") == ["1.summary", "3.summary"]
    assert found(folder, "test") == ["2.summary"]
    assert list_splits(folder) == ("train", "test")
    with pytest.raises(DataError, match=r"names none of the 3 articles"):
        find_split_files(folder, "validation")
    (tmp_path / XSUM_LIST).write_text("[", encoding="utf-8")
    with pytest.raises(DataError, match="the list of splits is not JSON"):
        find_split_files(folder, "test")
    (tmp_path / XSUM_LIST).write_text('{"test": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="has no list of ids under 'test'"):
        find_split_files(folder, "test")


def test_the_lists_of_cnn_dailymail(tmp_path: Path) -> None:
    url = "http://example.org/rain"
    name = f"{hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()}.story"
    folder = touch(tmp_path, name, "other.story")
    (tmp_path / "all_val.txt").write_text(f"{url}\nhttp://example.org/none\n", encoding="utf-8")
    assert found(folder, "validation") == [name]
    assert list_splits(folder) == ("validation",)
    with pytest.raises(DataError, match=r"nothing parts the articles, expected a folder 'test' or 'all_test\.txt', "):
        find_split_files(folder, "test")


def test_folders_without_what_is_asked(tmp_path: Path) -> None:
    for work in (lambda: find_split_files(tmp_path, None), lambda: list_splits(tmp_path)):
        with pytest.raises(DataError, match=r"the folder holds no data file, expected one that ends in '\.csv', "):
            work()
    touch(tmp_path, "a.jsonl", "b.jsonl")
    with pytest.raises(DataError, match=r"no file for split 'train'; found 'a\.jsonl', 'b\.jsonl'"):
        list_splits(tmp_path)
