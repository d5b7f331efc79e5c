"""Text to token ids and back, with the tokenizer that came from the cloud."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cotune.errors import InputError


class TextCodec:
    """A tokenizer as generation needs it.

    Args:
        tokenizer_json: the bytes of a `tokenizer.json`.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        try:
            self.tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        except Exception as error:  # the library raises bare Exceptions
            raise InputError(
                f"the tokenizer cannot be read ({error}), expected a tokenizer.json; fetch it again from the cloud"
            ) from error

    def encode_prompt(self, text: str) -> NDArray[np.int64]:
        """Token ids (prompt,) of a prompt, with the tokens that the tokenizer puts at the start.

        Raises:
            InputError: there is no token in it.
        """
        ids = self.tokenizer.encode(text).ids
        if not ids:
            raise InputError("the prompt is empty, expected at least one character")
        return np.array(ids, np.int64)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a piece of text, without tokens at its start."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Their text, without special tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The text that each token adds; joined they are `decode(token_ids)`.

        A character whose bytes are spread over tokens belongs to the last of these.
        """
        whole = self.decode(token_ids)
        pieces: list[str] = []
        num_shown = 0
        for end in range(1, len(token_ids) + 1):
            # Tokens that follow may change how bytes are read: only what stays in the whole text is a token's own.
            text = whole if end == len(token_ids) else self.decode(token_ids[:end]).rstrip("\ufffd")
            num_agreed = max(num_shown, _num_common(text, whole))
            pieces.append(whole[num_shown:num_agreed])
            num_shown = num_agreed
        return pieces


class Detokenizer:
    """The text that each token adds, without decoding everything again for each.

    Args:
        text: the tokenizer.
    """

    def __init__(self, text: TextCodec) -> None:
        self._text = text
        self._ids: list[int] = []
        self._start = 0
        self._shown = 0

    def add(self, token_id: int) -> str:
        """What can be shown now; empty in the middle of a character."""
        self._ids.append(token_id)
        before, after = self._window()
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        # Tokens before the last shown one no longer change how later ones are read.
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]

    def rest(self) -> str:
        """What was held back."""
        before, after = self._window()
        return after[len(before) :]

    def _window(self) -> tuple[str, str]:
        return self._text.decode(self._ids[self._start : self._shown]), self._text.decode(self._ids[self._start :])


def _num_common(left: str, right: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
