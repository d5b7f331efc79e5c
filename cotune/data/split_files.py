"""Which files of a folder belong to which split.

Names are those that people use: `train.jsonl`, `validation-00000.parquet`, `coqa-dev-v1.0.json`, `valid.json`, a folder
for each split, or, for articles with one file each, the list of a split that XSum and CNN/DailyMail come with.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from cotune.data.row_readers import MAX_JSON_BYTES, READERS, find_suffix, read_text
from cotune.data.templates import quote_names
from cotune.errors import DataError

DEFAULT_SPLIT = "train"
# Other names of a split; the first one is ours.
SPLIT_NAMES = (("train", "training"), ("validation", "valid", "val", "dev"), ("test",))
SPLITS = tuple(names[0] for names in SPLIT_NAMES)
ARTICLE_SUFFIXES = (".story", ".summary")
XSUM_LIST = "XSum-TRAINING-DEV-TEST-SPLIT-90-5-5.json"
# CNN/DailyMail: lists of addresses; the SHA-1 of an address is the name of its story.
CNN_DAILYMAIL_LISTS = {"train": "all_train.txt", "validation": "all_val.txt", "test": "all_test.txt"}


def find_split_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder, by name.

    Args:
        folder: with data files, or with a folder for each split, or with these in a folder `data`.
        split: None takes `train`, or the only file, or all articles where no list parts them.

    Raises:
        DataError: the folder has no such file; lists what it has.
    """
    names = names_of(split or DEFAULT_SPLIT)
    for name in names:
        if (folder / name).is_dir() and (inner := data_files(folder / name)):
            return inner
    files = data_files(folder)
    if not files and (folder / "data").is_dir():
        return find_split_files(folder / "data", split)
    if not files:
        raise DataError(f"the folder holds no data file, expected one that ends in {quote_names(READERS)}", path=folder)
    if files[0].suffix in ARTICLE_SUFFIXES:
        return find_articles(folder, files, split)
    if split is None and len(files) == 1:
        return files
    chosen = files_of(files, names)
    if not chosen:
        found = quote_names(file.name for file in files)
        raise DataError(f"the folder has no file for split '{split or DEFAULT_SPLIT}'; found {found}", path=folder)
    return chosen


def list_splits(folder: Path) -> tuple[str, ...]:
    """Those of train, validation and test that the folder has.

    Raises:
        DataError: it has none of them.
    """
    found, problems = [], []
    for split in SPLITS:
        try:
            find_split_files(folder, split)
            found.append(split)
        except DataError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    return tuple(found)


def names_of(split: str) -> tuple[str, ...]:
    """All names of a split, the given one first."""
    for names in SPLIT_NAMES:
        if split in names:
            return (split, *(name for name in names if name != split))
    return (split,)


def data_files(folder: Path) -> list[Path]:
    """Files of known formats by name; JSON, which often only describes the others, where there is nothing else."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and find_suffix(file))
    data = [file for file in files if not file.name.endswith((".json", ".json.gz"))]
    return data or [file for file in files if file.name != XSUM_LIST]


def files_of(files: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The files that begin with a name of the split; else those that have it between two of `-`, `_` and `.`."""
    for pattern in (r"{}([-_.].*)", r".*[-_.]{}([-_.].*)"):
        for name in names:
            chosen = [file for file in files if re.fullmatch(pattern.format(re.escape(name)), file.name)]
            if chosen:
                return chosen
    return []


def find_articles(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The articles of a split, by the lists in the folder or beside it; all of them where no split is asked for."""
    articles = {file.stem: file for file in files if file.suffix == files[0].suffix}
    read = read_xsum_list if files[0].suffix == ".summary" else read_cnn_dailymail_list
    for place in (folder, folder.parent):
        listed = read(place, names_of(split or DEFAULT_SPLIT))
        if listed is not None:
            chosen = [articles[name] for name in sorted(listed) if name in articles]
            if not chosen:
                raise DataError(f"the list in {place} names none of the {len(articles)} articles", path=folder)
            return chosen
    if split is not None:
        lists = XSUM_LIST if files[0].suffix == ".summary" else quote_names(CNN_DAILYMAIL_LISTS.values())
        message = f"split is '{split}', but nothing parts the articles, expected a folder '{split}' or {lists}"
        raise DataError(message, path=folder)
    return list(articles.values())


def read_xsum_list(folder: Path, names: tuple[str, ...]) -> set[str] | None:
    """The ids of a split in XSum's list; None where the list is not there."""
    path = folder / XSUM_LIST
    if not path.is_file():
        return None
    try:
        lists = json.loads(read_text(path, MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise DataError(f"the list of splits is not JSON ({error})", path=path) from error
    found = [lists[name] for name in names if name in lists] if isinstance(lists, dict) else []
    if not found or not isinstance(found[0], list):
        raise DataError(f"the list of splits has no list of ids under '{names[0]}'", path=path)
    return set(map(str, found[0]))


def read_cnn_dailymail_list(folder: Path, names: tuple[str, ...]) -> set[str] | None:
    """The names of the stories whose addresses are listed for a split; None where the list is not there."""
    lists = [folder / CNN_DAILYMAIL_LISTS[name] for name in names if name in CNN_DAILYMAIL_LISTS]
    if not lists or not lists[0].is_file():
        return None
    urls = read_text(lists[0], MAX_JSON_BYTES).split()
    return {hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest() for url in urls}
