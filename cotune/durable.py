"""Files and folders that are there whole or not at all, also after a power cut.

What is written goes to the disk under another name first, and gets its own name at the end. All of it is readable by
its owner alone unless a mode says otherwise.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cotune.errors import DataError, InputError

OWNER_ONLY = 0o600
SPARE_BYTES = 2**24
"""Left free on the disk beside what is large."""


@contextmanager
def replacing(path: Path, *, mode: int | None = OWNER_ONLY) -> Iterator[Path]:
    """Give a path to write to; at the end it takes the place of `path`, after an error it is gone.

    Args:
        path: what the file is called at the end; its folder exists.
        mode: of the file; None for the one that a new file has here, by the umask.

    Raises:
        OSError: the disk refuses.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "state"
        >>> with replacing(path) as unfinished:
        ...     _ = unfinished.write_bytes(b"all of it")
        >>> path.read_bytes(), [file.name for file in path.parent.iterdir()]
        (b'all of it', ['state'])
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield unfinished
        if mode is not None:
            unfinished.chmod(mode)
        sync(unfinished)
        unfinished.replace(path)
        sync(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def whole_lines(path: Path, *, max_bytes: int) -> list[bytes]:
    """The lines of a file that is only ever appended to; a last one that a killed process did not finish is cut off.

    Args:
        path: may be missing, which is as good as empty.
        max_bytes: how large it may be; more is not read.

    Returns:
        The lines, without their ends.

    Raises:
        DataError: it is too large, or cannot be read or cut.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.jsonl"
        >>> _ = path.write_bytes(b'{"a": 1}\\n{"a": ')
        >>> whole_lines(path, max_bytes=100), path.read_bytes()
        ([b'{"a": 1}'], b'{"a": 1}\\n')
    """
    try:
        if not path.exists():
            return []
        data = _read_bounded(path, max_bytes)
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.truncate(path, end)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", path=path) from None
    return data.split(b"\n")[:-1]


def finished_lines(path: Path, *, max_bytes: int) -> list[bytes]:
    """The same of a file that another process may be writing: nothing is cut, what has no end yet is left out.

    Raises:
        DataError: it is too large.
        OSError: it cannot be read.
    """
    return _read_bounded(path, max_bytes).split(b"\n")[:-1]


def _read_bounded(path: Path, max_bytes: int) -> bytes:
    if path.stat().st_size > max_bytes:
        raise DataError(f"has more than {max_bytes} bytes, expected at most that; move it away", path=path)
    return path.read_bytes()


def write_new(path: Path, data: bytes, *, mode: int = OWNER_ONLY) -> None:
    """Write a file that does not exist yet; one that does is left as it is.

    The file is made with `mode` (less what the umask takes away), so that a secret is never readable by others, not
    even while it is written. A process that is killed on the way may leave a part of the file.

    Raises:
        FileExistsError: there is something at `path`, if only a link.
        OSError: the disk refuses; nothing is left at `path`.
    """
    # A part that is renamed would replace what is there, and a link cannot be made on many phones and memory cards.
    with open(path, "xb", opener=partial(os.open, mode=mode)) as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    sync(path.parent)


def is_free(folder: Path, *, earlier: str | None = None) -> bool:
    """Whether a result may be written here: nothing is at `folder`, or an empty folder, or an earlier result.

    Args:
        folder: where the result is to be.
        earlier: name of the file by which an earlier result is known that may be written over; None: of none.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> is_free(folder), is_free(folder / "new")
        (True, True)
        >>> _ = (folder / "plugin.json").write_bytes(b"{}")
        >>> is_free(folder), is_free(folder, earlier="plugin.json")
        (False, True)
    """
    if not folder.is_dir():
        return not folder.exists() and not folder.is_symlink()
    return not any(folder.iterdir()) or (earlier is not None and (folder / earlier).is_file())


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder that does not exist yet, with all its files or not at all.

    A process that is killed on the way leaves a hidden folder beside it, which `remove_unfinished` removes.

    Raises:
        OSError: the disk refuses, or `folder` holds something already.
    """
    fresh = Path(tempfile.mkdtemp(prefix=_unfinished_prefix(folder.name), dir=folder.parent))
    try:
        for name, data in files.items():
            write_new(fresh / name, data)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(folder.parent)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into; at the end it is called `folder`, after an error it is gone.

    For files that are too large to hold in memory as `write_folder` does; they are readable by their owner alone. A
    process that is killed on the way leaves a hidden folder beside it, which `remove_unfinished` removes.

    Args:
        folder: what it is called at the end; nothing is there yet, or an empty folder.

    Raises:
        OSError: the disk refuses, or `folder` holds something already.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "model"
        >>> with new_folder(folder) as unfinished:
        ...     _ = (unfinished / "weights").write_bytes(b"all of them")
        >>> [file.name for file in folder.iterdir()], [file.name for file in folder.parent.iterdir()]
        (['weights'], ['model'])
    """
    fresh = Path(tempfile.mkdtemp(prefix=_unfinished_prefix(folder.name), dir=folder.parent))
    try:
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                path.chmod(OWNER_ONLY)
        for path in [*fresh.rglob("*"), fresh]:
            sync(path)
        fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(folder.parent)


@contextmanager
def new_sized_folder(folder: Path, *, num_bytes: int) -> Iterator[Path]:
    """`new_folder` for what is large: the disk is asked first, and refusals are one sentence.

    Args:
        folder: what it is called at the end; nothing is there yet. Folders above it are made.
        num_bytes: how much will be written, at most.

    Raises:
        InputError: there is something at `folder`, the disk has too little room, or refuses; nothing is left of it.

    Example:
        >>> with new_sized_folder(Path("my-model"), num_bytes=2**30) as unfinished:   # doctest: +SKIP
        ...     (unfinished / "model.gguf").write_bytes(data)
    """
    if folder.exists() or folder.is_symlink():
        raise InputError(f"{folder} is there already, expected a new folder; remove it, or name another one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < num_bytes + SPARE_BYTES:
            raise InputError(
                f"{folder} takes {num_bytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free there, expected that "
                f"and {SPARE_BYTES >> 20} MiB to spare; make room, take fewer bits, or name another disk"
            )
        with new_folder(folder) as unfinished:
            yield unfinished
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}; nothing is left of it") from error


def remove_folder(folder: Path) -> None:
    """Remove a folder; whoever looks meanwhile sees all of it or nothing.

    Raises:
        OSError: it cannot be renamed.
    """
    doomed = Path(tempfile.mkdtemp(prefix=_unfinished_prefix(folder.name), dir=folder.parent))
    folder.rename(doomed / folder.name)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_unfinished(parent: Path, name_start: str) -> None:
    """Remove what killed processes left of folders in `parent` whose names begin with `name_start`."""
    for left in parent.glob(_unfinished_prefix(name_start)[:-1] + "*"):
        shutil.rmtree(left, ignore_errors=True)


def sync(path: Path) -> None:
    """Have the disk keep a file's contents, or the names in a folder (which Windows does by itself)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unfinished_prefix(name: str) -> str:
    return f".unfinished-{name}."
