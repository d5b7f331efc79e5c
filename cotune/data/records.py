"""Examples from files, folders and Hugging Face data sets.

A folder is either a data set that `datasets` saved, or holds files for each split, such as `train.jsonl` or
`test-00000.parquet`; `cotune.data.split_files` tells which. docs/data.md lists formats and data sets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotune.data.row_readers import READERS, NumberedRow, find_suffix
from cotune.data.sampling import draw
from cotune.data.split_files import DEFAULT_SPLIT, SPLITS, find_split_files, list_splits, names_of
from cotune.data.templates import (
    ANSWER_COLUMNS,
    Example,
    Template,
    choose_question_template,
    choose_template,
    quote_names,
)
from cotune.errors import DataError, first_line

# The Hub is only asked by name, so that a mistyped private path never leaves the machine.
HUB_PREFIX = "hub:"


@dataclass(frozen=True, kw_only=True)
class DatasetSplits:
    """The examples of a data set by split; a split that the data set lacks is empty."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def read_examples(
    path: Path | str,
    template: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    split: str | None = None,
    *,
    share: float | None = None,
) -> list[Example]:
    """Read prompts and targets.

    Args:
        path: a file that ends as `cotune.data.row_readers.READERS` lists, a folder, or `hub:owner/name`, with
            `:configuration` behind it where a data set has several.
        template: a key of `TEMPLATES`, or of `DATASETS` to accept only the columns of that data set; None takes the
            first template that fits the columns.
        limit: how many examples at most.
        seed: draw by it; a smaller draw is the beginning of a larger one. None takes the first ones of the file.
        split: which part of a folder or Hub data set; None takes `train`, or the only one.
        share: part of the examples to take, above 0 and at most 1. With a limit, both hold.

    Raises:
        DataError: what cannot be read, with file and line, what came and what is expected.

    Example:
        >>> examples = read_examples("notes.jsonl", limit=100, seed=0)
    """
    chosen = draw(iterate_examples(path, template, split), limit=limit, share=share, seed=seed)
    if not chosen:
        raise DataError("there is no example in it, expected at least one row with a target", path=path)
    return chosen


def read_prompts(
    path: Path | str, template: str | None = None, limit: int | None = None, seed: int | None = None
) -> list[str]:
    """Read prompts alone: rows may lack an answer, and what they have of one is not looked at.

    Args:
        path, template, limit, seed: as for `read_examples`.

    Raises:
        DataError: what cannot be read, with file and line, what came and what is expected.

    Example:
        >>> prompts = read_prompts("questions.jsonl", limit=100, seed=0)
    """
    chosen = draw(_iterate_prompts(path, template), limit=limit, share=None, seed=seed)
    if not chosen:
        raise DataError("there is no question in it, expected at least one row", path=path)
    return chosen


def read_splits(
    path: Path | str,
    dataset: str | None = None,
    *,
    seed: int = 0,
    num_train: int | None = None,
    train_share: float | None = None,
    num_validation: int | None = None,
    num_test: int | None = None,
) -> DatasetSplits:
    """Read training, validation and test examples, each drawn by the seed.

    Args:
        path: a folder, or `hub:owner/name`.
        dataset: a key of `DATASETS` or `TEMPLATES`; None recognises it by its columns.
        seed: of the three draws; with one seed, a smaller training set is the beginning of a larger one.
        num_train, num_validation, num_test: how many examples at most; None takes all.
        train_share: part of the training examples to take, above 0 and at most 1.

    Raises:
        DataError: what cannot be read, or the data set has no splits.

    Example:
        >>> splits = read_splits("data/xsum", "xsum", train_share=0.1, num_test=300, seed=1)
    """
    limits = {"train": num_train, "validation": num_validation, "test": num_test}
    shares = {"train": train_share}
    present = available_splits(path)
    return DatasetSplits(
        **{
            split: read_examples(path, dataset, limits[split], seed, present[split], share=shares.get(split))
            if split in present
            else []
            for split in SPLITS
        }
    )


def available_splits(path: Path | str) -> dict[str, str]:
    """Those of train, validation and test that a data set has, each with the name that it has there.

    Raises:
        DataError: it has none of them, or is a single file.
    """
    if str(path).startswith(HUB_PREFIX):
        found = hub_splits(str(path).removeprefix(HUB_PREFIX))
    else:
        folder = Path(path).expanduser()
        if not folder.is_dir():
            raise DataError("there is no such folder, expected one with a file for each split", path=path)
        if not is_saved_dataset(folder):
            return {split: split for split in list_splits(folder)}
        found = saved_splits(folder)
    present = {split: name for split in SPLITS for name in reversed(names_of(split)) if name in found}
    if not present:
        raise DataError(
            f"the data set has none of the splits {', '.join(SPLITS)}; found {quote_names(found)}", path=path
        )
    return present


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


def _iterate_prompts(path: Path | str, template: str | None) -> Iterator[str]:
    for source, rows in open_sources(path, None):
        for number, row in rows:
            try:
                chosen = choose_question_template(template, row)
                answer = {name: "?" for name in chosen.columns if name in ANSWER_COLUMNS}
                yield from (each.prompt for each in chosen.render({**row, **answer}))
            except DataError as error:
                raise DataError(str(error), path=source, line=number) from error


def open_sources(path: Path | str, split: str | None) -> Iterator[tuple[str, Iterator[NumberedRow]]]:
    """The name and the rows of each file behind a path."""
    if str(path).startswith(HUB_PREFIX):
        yield str(path), read_hub_dataset(str(path).removeprefix(HUB_PREFIX), split)
        return
    if not str(path):
        raise DataError(f"the path of the data is empty, expected a file, a folder, or '{HUB_PREFIX}owner/name'")
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


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load_saved(folder: Path) -> Any:
    """A data set on disk, whole or by split; needs `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(DATASETS_ARE_MISSING, path=folder) from error
    try:
        return datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"the data set on disk cannot be read ({first_line(error)})", path=folder) from error


def saved_splits(folder: Path) -> list[str]:
    """The names of the splits of a data set on disk; none where it is one whole."""
    return list(load_saved(folder)) if (folder / "dataset_dict.json").is_file() else []


def read_saved_dataset(folder: Path, split: str | None) -> Iterator[NumberedRow]:
    """The rows of a data set on disk, numbered from 1; needs `datasets`."""
    loaded = load_saved(folder)
    if (folder / "dataset_dict.json").is_file():
        wanted = split or (DEFAULT_SPLIT if len(loaded) > 1 else next(iter(loaded)))
        if wanted not in loaded:
            raise DataError(f"the data set has no split '{wanted}'; found {quote_names(loaded)}", path=folder)
        loaded = loaded[wanted]
    elif split is not None:
        raise DataError(f"split is '{split}', but the data set has no splits", path=folder)
    yield from enumerate(loaded, start=1)


def hub_splits(name: str) -> list[str]:
    """The names of the splits of a data set on the Hub; needs `datasets` and the network."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(DATASETS_ARE_MISSING, path=name) from error
    try:
        return [str(split) for split in datasets.get_dataset_split_names(*hub_parts(name))]
    except (OSError, ValueError) as error:
        raise DataError(f"the Hub gave no data set of this name ({first_line(error)})", path=name) from error


def read_hub_dataset(name: str, split: str | None) -> Iterator[NumberedRow]:
    """The rows of a data set on the Hub, numbered from 1; needs `datasets` and the network."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(DATASETS_ARE_MISSING, path=name) from error
    try:
        loaded = datasets.load_dataset(*hub_parts(name), split=split or DEFAULT_SPLIT)
    except (OSError, ValueError) as error:
        raise DataError(f"the Hub gave no data set of this name ({first_line(error)})", path=name) from error
    yield from enumerate(loaded, start=1)


def hub_parts(name: str) -> tuple[str, str | None]:
    """`owner/name` and the configuration after a colon, which some data sets need; None where there is none.

    Example:
        >>> hub_parts("abisee/cnn_dailymail:3.0.0")
        ('abisee/cnn_dailymail', '3.0.0')
    """
    repository, _, configuration = name.partition(":")
    return repository, configuration or None


DATASETS_ARE_MISSING = "reading a Hugging Face data set needs datasets; install it with: pip install 'cotune[train]'"
