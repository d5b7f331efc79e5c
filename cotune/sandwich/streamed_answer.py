"""An answer that comes as server-sent events, in the form of the OpenAI interface: bytes in, pieces of text out.

data: {"choices": [{"delta": {"content": "Par"}}]}
data: {"choices": [{"delta": {"content": "is"}}]}
data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 1}}
data: [DONE]
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from cotune.errors import ConnectionLostError, WireError
from cotune.sandwich.chat import ChatAnswer

_DONE = "[DONE]"


class StreamedAnswer:
    """Reads a stream, however it is cut into pieces.

    Example:
        >>> answer = StreamedAnswer()
        >>> event = b'data: {"choices": [{"delta": {"content": "Hi"}}]}' + bytes([10, 10])
        >>> list(answer.feed(event[:20])), list(answer.feed(event[20:])), list(answer.feed(b"data: [DONE]"))
        ([], ['Hi'], [])
        >>> answer.finish().text
        'Hi'
    """

    def __init__(self) -> None:
        self._rest = b""
        self._texts: list[str] = []
        self._usage: Any = None
        self._is_done = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """Take bytes; gives the texts of the events that are whole by now.

        Raises:
            WireError: an event is none of a chat completion.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            yield from self._event(line)

    def finish(self) -> ChatAnswer:
        """The whole answer.

        Raises:
            ConnectionLostError: the stream ended before the answer did.
            WireError: as `feed`, of the last line.
        """
        rest, self._rest = self._rest, b""
        # A last event without its line end may hold text that nobody was told of: then the answer is not whole.
        if list(self._event(rest)) or not self._is_done:
            raise ConnectionLostError("the cloud's stream ended before its answer did")
        message = {"message": {"content": "".join(self._texts)}}
        return ChatAnswer.from_completion({"choices": [message], "usage": self._usage})

    def _event(self, line: bytes) -> Iterator[str]:
        if not line.startswith(b"data:"):
            return  # names of events, comments and empty lines
        data = line.removeprefix(b"data:").strip()
        if data == _DONE.encode():
            self._is_done = True
            return
        try:
            chunk = json.loads(data)
            if chunk.get("error"):
                raise WireError("the cloud broke its stream off with an error; ask again")
            self._usage = chunk.get("usage") or self._usage
            text = "".join(each["delta"].get("content") or "" for each in chunk["choices"][:1])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise WireError(
                "the cloud's stream is no chat completion; see what the server at that URL speaks"
            ) from None
        if text:
            self._texts.append(text)
            yield text
