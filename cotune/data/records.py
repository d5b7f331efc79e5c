"""Examples from files, folders and Hugging Face data sets.

A folder is either a data set that `datasets` saved, or holds a file for each split, such as `train.jsonl` or
`test-00000.parquet`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

from cotune.data.row_readers import READERS, NumberedRow, find_suffix
from cotune.data.templates import Example, Template, choose_template, quote_names
from cotune.errors import DataError, InputError

DEFAULT_SPLIT = "train"
# The Hub is only asked by name, so that a mistyped private path never leaves the machine.
HUB_PREFIX = "hub:"


def read_examples(
    path: Path | str,
    template: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    split: str | None = None,
) -> list[Example]:
    """Read prompts and targets.

    Args:
        path: a `.jsonl`, `.jsonl.gz`, `.csv`, `.csv.gz` or `.parquet` file, a folder, or `hub:owner/name`.
        template: a key of `cotune.data.templates.TEMPLATES`; None takes the first that fits the columns.
        limit: how many examples at most.
        seed: shuffle with it before the limit; None keeps the order of the file.
        split: which part of a folder or Hub data set; None takes `train`, or the only one.

    Raises:
        DataError: what cannot be read, with file and line, what came and what is expected.

    Example:
        >>> examples = read_examples("notes.jsonl", limit=100, seed=0)
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected at least 1")
    examples = iterate_examples(path, template, split)
    if seed is None:
        chosen = list(itertools.islice(examples, limit))
    else:
        chosen = list(examples)
        Random(seed).shuffle(chosen)
        chosen = chosen[:limit]
    if not chosen:
        raise DataError("there is no example in it, expected at least one row with a target", path=path)
    return chosen


def iterate_examples(path: Path | str, template: str | None, split: str | None) -> Iterator[Example]:
    """The examples of all rows, one after the other; the first row of each file chooses its template."""
    for source, rows in open_sources(path, split):
        chosen: Template | None = None
        for number, row in rows:
            try:
                if chosen is None:
                    chosen = choose_template(template, row)
                yield from chosen.render(row)
            except DataError as error:
                raise DataError(str(error), path=source, line=number) from error
        if chosen is None:
            raise DataError("the file holds no rows, expected at least one", path=source)


def open_sources(path: Path | str, split: str | None) -> Iterator[tuple[str, Iterator[NumberedRow]]]:
    """The name and the rows of each file behind a path."""
    if str(path).startswith(HUB_PREFIX):
        yield str(path), read_hub_dataset(str(path).removeprefix(HUB_PREFIX), split)
        return
    local = Path(path).expanduser()
    if local.is_file():
        if split is not None:
            raise DataError(f"split is '{split}', but this is a single file; give its folder or no split", path=path)
        yield open_file(local)
    elif local.is_dir() and is_saved_dataset(local):
        yield str(path), read_saved_dataset(local, split)
    elif local.is_dir():
        yield from map(open_file, find_split_files(local, split))
    else:
        raise DataError(f"there is no such file or folder; a Hub data set is '{HUB_PREFIX}owner/name'", path=path)


def open_file(path: Path) -> tuple[str, Iterator[NumberedRow]]:
    """The name and the rows of one file."""
    suffix = find_suffix(path)
    if suffix is None:
        raise DataError(f"the file name ends in '{path.suffix}', expected one of {quote_names(READERS)}", path=path)
    return str(path), READERS[suffix](path)


def find_split_files(folder: Path, split: str | None) -> list[Path]:
    """The files of a split in a folder, by name: `train.jsonl`, `train-00000.parquet`, `train_2.csv`.

    Raises:
        DataError: the folder has no such file; lists what it has.
    """
    files = sorted(file for file in folder.iterdir() if file.is_file() and find_suffix(file))
    if not files:
        raise DataError(f"the folder holds no data file, expected one that ends in {quote_names(READERS)}", path=folder)
    if split is None and len(files) == 1:
        return files
    wanted = split or DEFAULT_SPLIT
    chosen = [file for file in files if re.fullmatch(rf"{re.escape(wanted)}([-_.].*)", file.name)]
    if not chosen:
        found = quote_names(file.name for file in files)
        raise DataError(f"the folder has no file for split '{wanted}'; found {found}", path=folder)
    return chosen


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved_dataset(folder: Path, split: str | None) -> Iterator[NumberedRow]:
    """The rows of a data set on disk, numbered from 1; needs `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(DATASETS_ARE_MISSING, path=folder) from error
    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"the data set on disk cannot be read ({first_line(error)})", path=folder) from error
    if isinstance(loaded, datasets.DatasetDict):
        wanted = split or (DEFAULT_SPLIT if len(loaded) > 1 else next(iter(loaded)))
        if wanted not in loaded:
            raise DataError(f"the data set has no split '{wanted}'; found {quote_names(loaded)}", path=folder)
        loaded = loaded[wanted]
    elif split is not None:
        raise DataError(f"split is '{split}', but the data set has no splits", path=folder)
    yield from enumerate(loaded, start=1)


def read_hub_dataset(name: str, split: str | None) -> Iterator[NumberedRow]:
    """The rows of a data set on the Hub, numbered from 1; needs `datasets` and the network."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(DATASETS_ARE_MISSING, path=name) from error
    try:
        loaded = datasets.load_dataset(name, split=split or DEFAULT_SPLIT)
    except (OSError, ValueError) as error:
        raise DataError(f"the Hub gave no data set of this name ({first_line(error)})", path=name) from error
    yield from enumerate(loaded, start=1)


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its name."""
    return (str(error).splitlines() or [type(error).__name__])[0]


DATASETS_ARE_MISSING = "reading a Hugging Face data set needs datasets; install it with: pip install 'cotune[train]'"
