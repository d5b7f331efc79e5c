"""Restoring an answer while it comes: a placeholder may be split over any number of chunks."""

from __future__ import annotations

from cotune.sandwich.placeholders import PlaceholderMap


class StreamRestorer:
    """Gives out text as soon as it is sure, and the same text however the answer is cut into chunks.

    What could still become a placeholder waits: at most twice the longest one (some 130 characters).

    Args:
        placeholders: of the request.
        is_json: the stream is a JSON document, such as the arguments of a tool call.

    Example:
        >>> import random
        >>> placeholders = PlaceholderMap(random.Random(0))
        >>> _ = placeholders.placeholder_for("PERSON", "ann", "Ann")
        >>> stream = StreamRestorer(placeholders)
        >>> [stream.feed(chunk) for chunk in ("Dear <PER", "SON_73", "11>, hello")] + [stream.finish()]
        ['Dear ', '', 'Ann, hello', '']
    """

    def __init__(self, placeholders: PlaceholderMap, *, is_json: bool = False) -> None:
        self._placeholders = placeholders
        self._is_json = is_json
        self._buffer = ""
        self._next = 0  # what is before it has been given out; one character of that is kept as context

    @property
    def num_waiting(self) -> int:
        """Characters that came and were not given out."""
        return len(self._buffer) - self._next

    def feed(self, chunk: str) -> str:
        """Take a chunk; gives what is sure by now."""
        self._buffer += chunk
        return self._advance(is_last=False)

    def finish(self) -> str:
        """The rest, when the answer is over."""
        return self._advance(is_last=True)

    def _advance(self, *, is_last: bool) -> str:
        written: list[str] = []
        while match := self._placeholders.search(self._buffer, self._next, is_json=self._is_json):
            # It may still grow (another digit, a closing bracket) as long as less than a placeholder follows.
            follows = len(self._buffer) - match.end()
            is_closed = (match["close"] or "").endswith(">") and not self._is_json
            if not (is_last or is_closed or follows >= self._placeholders.longest):
                break
            written.append(self._buffer[self._next : match.start()])
            written.append(self._placeholders.replacement(match, self._is_json))
            self._next = match.end()
        end = len(self._buffer)
        if not is_last:
            end = self._first_doubt(match.start() if match else end)
        written.append(self._buffer[self._next : end])
        self._next = end
        kept = max(0, self._next - 1)
        self._buffer, self._next = self._buffer[kept:], self._next - kept
        return "".join(written)

    def _first_doubt(self, limit: int) -> int:
        earliest = max(self._next, len(self._buffer) - self._placeholders.longest)
        for start in range(earliest, limit):
            if self._placeholders.may_begin_at(self._buffer, start, is_json=self._is_json):
                return start
        return limit
