"""The small numbers that stand for words in frames. A number, once used, keeps its meaning."""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """Why one side refuses."""

    BAD_FRAME = 1
    BAD_REQUEST = 2
    MISMATCH = 3
    BUSY = 4
    UNAUTHORISED = 5
    TOO_LARGE = 6
    UNKNOWN_SESSION = 7
    INTERNAL = 8
    VERSION = 9
    TIMEOUT = 10


class ModeCode(IntEnum):
    """What the output is."""

    INTEGRATION = 1
    SEPARATION = 2
    LADDER = 3
    SPA = 4


class ScheduleCode(IntEnum):
    """Who waits for whom."""

    BLOCKING = 1
    GATED = 2
    OPTIMISTIC = 3
    DRAFTED = 4
    AUTO = 5


class AnswerCode(IntEnum):
    """What the device answers with."""

    TOKEN = 1
    CORRECTION = 2


class AssetKind(IntEnum):
    """The public parts of a backbone that a device fetches once."""

    TOKENIZER = 1
    OUTPUT_BASIS = 2


class EndReason(IntEnum):
    """Why a stream stopped, in `Close` and `End`."""

    END_TOKEN = 1
    LENGTH = 2
    STOP_STRING = 3
    CANCELLED = 4
    SHUTDOWN = 5
