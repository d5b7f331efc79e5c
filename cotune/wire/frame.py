"""What all frames share: the header, the limits, the base class."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple, Self

from cotune.wire.payload import PayloadReader

PROTOCOL_VERSION = 3
KIB = 1024
MAX_FRAME_BYTES = 2 * KIB * KIB
HEADER = struct.Struct("<BBHIII")
HEADER_BYTES = HEADER.size


class Header(NamedTuple):
    """The first 16 bytes."""

    type: int
    flags: int
    epoch: int
    session: int
    pos: int
    value: int

    def place(self) -> dict[str, int]:
        """The three fields that mean the same in every frame."""
        return {"epoch": self.epoch, "session": self.session, "pos": self.pos}


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame(ABC):
    """One message. Two frames are equal when they are of one type and their bytes are equal.

    Attributes:
        epoch: 0 .. 2^16-1, counts the rollbacks of a session.
        session: 0 .. 2^32-1.
        pos: 0 .. 2^32-1, a position in the token stream, or an offset where the frame says so.
    """

    epoch: int = 0
    session: int = 0
    pos: int = 0

    def flag_bits(self) -> int:
        """The flags as the header carries them."""
        return 0

    def header_value(self) -> int:
        """The value as the header carries it."""
        return 0

    def payload(self) -> bytes:
        """The bytes after the header."""
        return b""

    @classmethod
    @abstractmethod
    def parse(cls, header: Header, payload: PayloadReader) -> Self:
        """The frame from its header and payload; raises FrameError and nothing else."""

    def _parts(self) -> tuple[object, ...]:
        place = (self.epoch, self.session, self.pos)
        return (type(self), *place, self.flag_bits(), self.header_value(), self.payload())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Frame) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())
