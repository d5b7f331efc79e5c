"""The other end of a resident trainer: hand over one request, wait for its answer. No torch, so it starts at once."""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from pathlib import Path

from cotune.errors import ConnectionLostError, FrameError, WireError
from cotune.federation.resident_wire import (
    HEAD,
    MAX_BODY_BYTES,
    AnswerKind,
    RequestKind,
    connect,
    receive_message,
    send_message,
)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a resident trainer says.

    Attributes:
        kind: what came of the request.
        data: an encoded reply where it was done; else empty.
        error: a sentence where it was not; else empty.
    """

    kind: AnswerKind
    data: bytes = b""
    error: str = ""


class ResidentClient:
    """Asks the resident trainer of this device. Each request has a connection of its own.

    Args:
        folder: in which the trainer listens.

    Example:
        >>> answer = ResidentClient("/run/cotune/kitchen").handle(task, timeout_s=60)  # doctest: +SKIP
    """

    def __init__(self, folder: Path | str) -> None:
        self._folder = Path(folder)

    def handle(self, data: bytes, timeout_s: float, *, kind: RequestKind = RequestKind.TASK) -> Answer:
        """Hand over an encoded task, or the question who this is.

        Raises:
            ConnectionLostError: nobody listens, or the trainer ended meanwhile.
            WireTimeoutError: the answer did not come within `timeout_s` seconds.
            FrameError: the request is too large, or the answer is none.
        """
        if len(data) > MAX_BODY_BYTES:
            raise FrameError(f"the request has {len(data)} bytes, at most {MAX_BODY_BYTES} are allowed")
        ends_s = time.monotonic() + timeout_s
        connection, token = connect(self._folder, ends_s)
        with connection:
            number, body = _exchanged(connection, token + HEAD.pack(kind, len(data)), data, ends_s)
        if number not in set(AnswerKind):
            raise FrameError(f"the trainer answered with kind {number}, expected one of {[*map(int, AnswerKind)]}")
        if number == AnswerKind.DONE:
            return Answer(kind=AnswerKind.DONE, data=body)
        return Answer(kind=AnswerKind(number), error=body.decode(errors="replace"))


def _exchanged(connection: socket.socket, head: bytes, body: bytes, ends_s: float) -> tuple[int, bytes]:
    """Send a request and get its answer, also one that was given before all of the request was taken."""
    try:
        send_message(connection, head, body, ends_s)
    except ConnectionLostError as lost:
        try:
            return receive_message(connection, ends_s)
        except WireError:
            raise lost from None
    return receive_message(connection, ends_s)
