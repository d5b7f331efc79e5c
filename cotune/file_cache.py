"""A folder of files that can be made again, bounded in bytes: the least recently used ones go first."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from cotune.errors import InputError

UNFINISHED = ".part"
CHECKSUM_BYTES = hashlib.sha256().digest_size
DEFAULT_MAX_BYTES = 4 << 30


class FileCache:
    """Bytes by name, on disk.

    A file is the SHA-256 of its contents and then the contents, so that one which is cut or damaged is seen and made
    again. It appears complete or not at all. Several processes and runs may share a folder.

    Args:
        folder: made if it is not there.
        suffix: of its files; those with another are left alone.
        what: is in it, for messages.
        max_bytes: the most that all its files may take together.

    Raises:
        InputError: `max_bytes` is not positive, or the folder cannot be made.

    Example:
        >>> import tempfile
        >>> cache = FileCache(Path(tempfile.mkdtemp()), suffix=".answer", what="answer")
        >>> cache.put("a", b"42")
        >>> cache.get("a"), cache.get("b")
        (b'42', None)
    """

    def __init__(self, folder: Path, *, suffix: str, what: str, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if max_bytes <= 0:
            raise InputError(f"max_bytes is {max_bytes}, expected a positive number of bytes for the {what} cache")
        self.folder = folder
        self.max_bytes = max_bytes
        self._suffix, self._what = suffix, what
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the {what} cache {folder} cannot be made: {error.strerror}") from error
        self._drop_unfinished()
        self._size_bytes = sum(size for _, size, _ in self._files())

    @property
    def size_bytes(self) -> int:
        """Bytes of all files, of this run and of others."""
        return self._size_bytes

    def stored_bytes(self, key: str) -> int:
        """Size of a file in bytes, 0 if it is not there."""
        try:
            return self._path(key).stat().st_size
        except OSError:
            return 0

    def get(self, key: str) -> bytes | None:
        """The contents of that name, or None if they are not there or damaged; a damaged file is removed."""
        try:
            data = self._path(key).read_bytes()
        except OSError:
            return None
        contents = unsealed(data)
        if contents is None:
            self.drop(key)
            return None
        os.utime(self._path(key))
        return contents

    def put(self, key: str, contents: bytes, *, needed: Collection[str] = ()) -> None:
        """Store contents under a name; complete or not at all.

        Args:
            key: a file name without its suffix.
            contents: of one file.
            needed: names that must not be evicted to make room.

        Raises:
            InputError: they do not fit beside what is needed, or the disk does not take them.
        """
        data = sealed(contents)
        previous = self.stored_bytes(key)
        self._make_room(len(data) - previous, needed)
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=UNFINISHED, delete=False) as file:
                file.write(data)
            Path(file.name).replace(self._path(key))
        except OSError as error:
            raise InputError(f"the {self._what} cache {self.folder} cannot be written: {error.strerror}") from error
        self._size_bytes += len(data) - previous

    def drop(self, key: str) -> None:
        """Remove a file, if it is there."""
        size = self.stored_bytes(key)
        self._path(key).unlink(missing_ok=True)
        self._size_bytes -= size

    def check_bound(self, num_bytes: int) -> None:
        """Refuse a run whose files cannot fit, before they are made.

        Raises:
            InputError: `num_bytes` is more than the bound.
        """
        if num_bytes > self.max_bytes:
            raise InputError(
                f"the {self._what} cache {self.folder} may take {self.max_bytes:,} bytes and this run needs about "
                f"{num_bytes:,}; raise max_bytes, lower top_k or train on fewer texts"
            )

    def _make_room(self, num_bytes: int, needed: Collection[str]) -> None:
        if self._size_bytes + num_bytes <= self.max_bytes:
            return
        # Other processes may share the folder: look again before anything is thrown away.
        files = sorted(self._files())
        self._size_bytes = sum(size for _, size, _ in files)
        kept = sum(size for _, size, path in files if path.stem in needed)
        self.check_bound(kept + num_bytes)
        for _, size, path in files:
            if self._size_bytes + num_bytes <= self.max_bytes:
                return
            if path.stem not in needed:
                path.unlink(missing_ok=True)
                self._size_bytes -= size

    def _path(self, key: str) -> Path:
        return self.folder / (key + self._suffix)

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use in nanoseconds, size in bytes and path of each file."""
        found = []
        for path in self.folder.glob("*" + self._suffix):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicted it
                continue
            found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _drop_unfinished(self) -> None:
        # Of runs that were killed while writing; a younger file may belong to a run that is still alive.
        for path in self.folder.glob("*" + UNFINISHED):
            try:
                if time.time() - path.stat().st_mtime > 3600:
                    path.unlink()
            except FileNotFoundError:
                continue


def sealed(contents: bytes) -> bytes:
    """Contents with their checksum in front."""
    return hashlib.sha256(contents).digest() + contents


def unsealed(data: bytes) -> bytes | None:
    """What `sealed` was given, or None if anything of it changed."""
    contents = data[CHECKSUM_BYTES:]
    return contents if hashlib.sha256(contents).digest() == data[:CHECKSUM_BYTES] else None
