"""Brings a text in a model to any tokens, from whatever it holds: what it has in common with them is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.memory import PROMPT_PIECE
from cotune.device.offline.model import OfflineText


class TextReader:
    """A text that knows its own tokens.

    It reads in pieces that begin at fixed places, so that what a fresh text computes depends on its tokens alone and
    not on who asked for them, and so that nobody waits long for one call.

    Args:
        text: an empty one; it belongs to this object from now on.
        piece: tokens that one call reads at most.
    """

    def __init__(self, text: OfflineText, *, piece: int = PROMPT_PIECE) -> None:
        self.tokens: list[int] = []
        self._text = text
        self._piece = piece

    def read(self, token_ids: Sequence[int]) -> NDArray[np.float32] | None:
        """Read on towards `token_ids`, one piece at most.

        Args:
            token_ids: at least one token, of any text.

        Returns:
            Logits of the token after the last of them, float32 (vocab,); None where there is more to read: call again.

        Raises:
            InputError: they are more than the context, or unknown to the model.

        Example:
            >>> while (logits := reader.read(prompt)) is None:   # doctest: +SKIP
            ...     pass
        """
        num_kept = min(num_common(self.tokens, token_ids), len(token_ids) - 1)
        if num_kept < len(self.tokens):
            self._text.truncate(num_kept)
            del self.tokens[num_kept:]
        end = min(len(token_ids), (num_kept // self._piece + 1) * self._piece)
        piece = list(token_ids[num_kept:end])
        logits = self._text.extend(piece)
        self.tokens += piece
        return logits[0] if end == len(token_ids) else None

    def close(self) -> None:
        """Give the text's memory back."""
        self._text.close()


def num_common(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens both begin with.

    Example:
        >>> num_common([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
