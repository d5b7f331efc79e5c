"""The exception tree of cotune.

    CotuneError
    ├── InputError (also ValueError)      an argument, a file or a config that cannot be used
    │   ├── DataError                     a data file; names the file and the line
    │   └── MismatchError                 a plugin meets another backbone than the one it was tuned on
    ├── NonFiniteLossError                training met nan or inf
    ├── CacheFullError                    no room for more keys and values
    ├── AuditError                        a model memorised more than the caller allows
    ├── RedactionError                    a text could not be redacted; nothing of it may be sent
    ├── BudgetError                       a budget has no room for what comes next; nothing of that was sent
    └── WireError                         the other side, or the way to it
        ├── FrameError                    bytes that are no valid frame
        ├── ConnectionLostError           the connection broke; the session can be resumed
        ├── WireTimeoutError              nothing came in time
        └── RefusedError                  the other side said no, and why

Every message names what was wrong, what came, what was expected and the next step. The command line prints
`str(error)` and exits with `exit_code`.
"""

from __future__ import annotations

from pathlib import Path


def first_line(error: BaseException) -> str:
    """The first line of what a foreign exception says, or its name; as much of it as a sentence holds.

    Example:
        >>> first_line(ValueError("no such tensor\\nstack of C++ calls")), first_line(KeyError())
        ('no such tensor', 'KeyError')
    """
    lines = str(error).strip().splitlines()
    return f"{lines[0]:.300}" if lines else type(error).__name__


class CotuneError(Exception):
    """Root of all errors that cotune raises on purpose."""

    exit_code = 1


class InputError(CotuneError, ValueError):
    """An argument, a file or a configuration that cannot be used."""

    exit_code = 2


class DataError(InputError):
    """A data file that cannot be read as asked.

    Args:
        message: what is wrong and what was expected.
        path: the file.
        line: the line in it, counted from 1, where there is one.
    """

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None) -> None:
        self.path = path
        self.line = line
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + message)


class MismatchError(InputError):
    """A plugin meets a backbone, tokenizer or projection that it was not tuned on."""


class NonFiniteLossError(CotuneError):
    """Training met a loss that is nan or inf.

    Args:
        step: the optimisation step, counted from 0.
        loss: what came.
    """

    def __init__(self, step: int, loss: float) -> None:
        self.step = step
        self.loss = loss
        super().__init__(
            f"the loss at step {step} is {loss}, expected a finite number; "
            "lower the learning rate or look at the data of this step"
        )


class AuditError(CotuneError):
    """A model memorised more of its training texts than the caller allows; the audit itself went well."""

    exit_code = 3


class RedactionError(CotuneError):
    """A text could not be redacted, so nothing of it may be sent. The message never holds a part of the text.

    Args:
        detector: the detector that failed; None where none did.
    """

    def __init__(self, message: str, *, detector: str | None = None) -> None:
        self.detector = detector
        super().__init__(message)


class BudgetError(CotuneError):
    """A budget has no room for what comes next. Nothing of that was sent; what was paid for before is kept."""


class CacheFullError(CotuneError):
    """The blocks for keys and values are all in use.

    Args:
        wanted, free: numbers of blocks.
    """

    def __init__(self, wanted: int, free: int) -> None:
        self.wanted = wanted
        self.free = free
        super().__init__(
            f"{wanted} blocks of the key-value cache are wanted and {free} are free; "
            "wait until a session ends, or give the cache more memory"
        )


class WireError(CotuneError):
    """The other side, or the way to it, failed."""


class FrameError(WireError):
    """Bytes that are no valid frame of this protocol version."""


class ConnectionLostError(WireError):
    """The connection broke. A session can be resumed over a new one."""


class WireTimeoutError(WireError):
    """Nothing came within the time allowed."""


class RefusedError(WireError):
    """The other side refused, with its reason.

    Args:
        code: one of `cotune.wire.frames.ErrorCode` or `cotune.federation.signing.ReplyFault`, as an int.
        reason: one sentence from the other side.
        retry_after_s: when trying again may help, in seconds; None where it does not.
    """

    def __init__(self, code: int, reason: str, *, retry_after_s: float | None = None) -> None:
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s
        super().__init__(reason)
