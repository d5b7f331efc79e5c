"""Files with secrets: written once, readable by their owner alone, and refused where others can read them too."""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from cotune.durable import write_new
from cotune.errors import InputError

SECRET_BYTES = 32


@dataclass(frozen=True, repr=False)
class RandomSecret:
    """32 random bytes in a file of their own: never printed, never pickled, never overwritten.

    Each final class of it is one kind of secret, so that none is taken for another:
    `cotune.federation.run_secret.RunSecret`, `cotune.federation.sealing.SealingKey`.
    """

    value: bytes = field(repr=False)
    kind: ClassVar[str]
    """Its name in messages."""

    def __post_init__(self) -> None:
        if not isinstance(self.value, bytes) or len(self.value) != SECRET_BYTES:
            raise InputError(f"a {self.kind} has {SECRET_BYTES} bytes; make one with {type(self).__name__}.generate")

    @classmethod
    def generate(cls) -> Self:
        """A new one, from the operating system's randomness."""
        return cls(secrets.token_bytes(SECRET_BYTES))

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, readable by others, or holds something else.
        """
        data = read_secret(path, f"the {cls.kind}", max_bytes=SECRET_BYTES)
        if len(data) != SECRET_BYTES:
            raise InputError(f"{path} has {len(data)} bytes, a {cls.kind} has {SECRET_BYTES}; copy the file again")
        return cls(data)

    def save(self, path: Path | str) -> None:
        """Write the 32 bytes to a new file with mode 0600.

        Raises:
            InputError: `path` exists, or the disk refuses.
        """
        write_secret(path, self.value, f"the {self.kind}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}(hidden)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError(f"a {self.kind} is not to be copied or pickled; save it to a file")


def write_secret(path: Path | str, data: bytes, what: str) -> None:
    """Write a new file with mode 0600.

    Args:
        path: must not exist.
        data: the secret.
        what: its name in messages.

    Raises:
        InputError: `path` exists, or the disk refuses.
    """
    try:
        write_new(Path(path), data)
    except FileExistsError:
        raise InputError(f"{path} exists, and {what} is never overwritten; choose another file") from None
    except OSError as error:
        raise InputError(f"{what} cannot be written to {path}: {error.strerror or error}") from None


def read_secret(path: Path | str, what: str, *, max_bytes: int) -> bytes:
    """The bytes of a file of secrets.

    Raises:
        InputError: it is missing, larger than `max_bytes`, or readable by others than its owner.
    """
    try:
        # Looked at through one descriptor, so that the file that is checked is the file that is read.
        with Path(path).open("rb") as file:
            state = os.fstat(file.fileno())
            if os.name == "posix" and stat.S_IMODE(state.st_mode) & 0o077:
                raise InputError(
                    f"{path} has mode {stat.S_IMODE(state.st_mode):04o}, so others can read {what}, expected 0600; "
                    f"run `chmod 600 {path}` if nobody has read it, else make a new one"
                )
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"{what} cannot be read from {path}: {error.strerror or error}; make one first") from None
    if len(data) > max_bytes:
        raise InputError(f"{path} has more than {max_bytes} bytes, so it is not {what}; name the right file")
    return data
