"""Keeps stop strings out of a text that is shown while it grows."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace

from cotune.generation.stopping import first_stop
from cotune.openai_api.source import Finish, Piece


async def cut_at_stops(
    items: AsyncIterator[Piece | Finish], stops: Sequence[str]
) -> AsyncGenerator[Piece | Finish, None]:
    """The same pieces up to the first stop string; a piece waits while it may be the beginning of one.

    Tokens that lie behind the cut are left out; the usage still counts them, since they were made.
    """
    held: deque[tuple[Piece, int]] = deque()  # with the length of the text up to and with it
    text, num_shown, cut = "", 0, None
    async for item in items:
        if isinstance(item, Finish):
            while held:
                piece, end = held.popleft()
                yield _shortened(piece, end, cut)
            yield item if cut is None else replace(item, reason="stop")
            return
        if cut is not None:
            continue
        text += item.text
        held.append((item, len(text)))
        # A stop string that begins before what is shown would have been found by now.
        cut = first_stop(text, stops, num_shown)
        if cut is not None:
            while held and held[-1][1] - len(held[-1][0].text) >= cut:
                held.pop()
            continue
        safe = len(text) - _longest_beginning(text[num_shown:], stops)
        while held and held[0][1] <= safe:
            piece, num_shown = held.popleft()
            yield piece


def _shortened(piece: Piece, end: int, cut: int | None) -> Piece:
    if cut is None or end <= cut:
        return piece
    begin = end - len(piece.text)
    return replace(piece, text=piece.text[: max(0, cut - begin)])


def _longest_beginning(text: str, stops: Sequence[str]) -> int:
    """How many of the last characters of `text` may be the beginning of a stop string."""
    return max(
        (n for stop in stops for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])),
        default=0,
    )
