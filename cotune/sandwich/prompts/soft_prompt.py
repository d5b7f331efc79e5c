"""A soft prompt that travels as text: for a model of one's own that reads embeddings behind the same door as a cloud.

Numbers are written as words of eight letters, four bits each, so that they go through redactor, budget, cache and log
like any other prompt; `HostedCloud` turns them back into a prefix. A chat API would read the letters and nothing else.

    z (dim,) --soft_words--> "soft dpiaaaaa lnkaaaaa" --soft_numbers--> z --SoftPrefix--> embeddings
"""

from __future__ import annotations

import re
import threading

import numpy as np

from cotune.data.templates import format_request
from cotune.errors import InputError, RefusedError
from cotune.sandwich.bilevel.problem import Vector
from cotune.sandwich.chat import ChatAnswer, ChatRequest
from cotune.sandwich.prompts.soft_prefix import SoftPrefix

_HEX, _LETTERS = "0123456789abcdef", "abcdefghijklmnop"
_TO_LETTERS, _TO_HEX = str.maketrans(_HEX, _LETTERS), str.maketrans(_LETTERS, _HEX)
_MARK = "soft"
_WORD = re.compile("[a-p]{8}")
_BAD_REQUEST = 400


def soft_words(z: Vector) -> str:
    """z as text, in float32.

    Example:
        >>> soft_words(np.array([0.0, 1.0]))
        'soft aaaaaaaa dpiaaaaa'
    """
    letters = np.asarray(z, ">f4").tobytes().hex().translate(_TO_LETTERS)
    return " ".join([_MARK, *(letters[start : start + 8] for start in range(0, len(letters), 8))])


def soft_numbers(text: str) -> Vector:
    """The z that a text stands for.

    Raises:
        InputError: it stands for none.

    Example:
        >>> soft_numbers("soft aaaaaaaa dpiaaaaa")
        array([0., 1.])
    """
    mark, *words = text.split() or [""]
    if mark == _MARK and words and all(_WORD.fullmatch(word) for word in words):
        data = bytes.fromhex("".join(words).translate(_TO_HEX))
        numbers = np.frombuffer(data, ">f4").astype(np.float64)
        if np.isfinite(numbers).all():
            return numbers
    raise InputError(f"the prompt {text!r:.60} is no soft prompt, expected what soft_words gives")


class HostedCloud:
    """A `CloudModel` in this process that reads soft prompts.

    Args:
        prefix: of the model; whose `dim` numbers each prompt has.
    """

    def __init__(self, prefix: SoftPrefix) -> None:
        self._prefix = prefix
        self._lock = threading.Lock()

    def send(self, request: ChatRequest, *, timeout_s: float) -> ChatAnswer:
        """What the model writes behind prefix and request; see `CloudModel`. It is waited for."""
        system, *turns = request.messages.value
        try:
            z = soft_numbers(str(system["content"]))
            if len(z) != self._prefix.dim or len(turns) != 1:
                raise InputError(f"{len(z)} numbers and {len(turns)} messages, expected {self._prefix.dim} and 1")
            text = format_request(str(turns[0]["content"]))
            with self._lock:
                written = self._prefix.write(z, text, max_new_tokens=request.max_tokens)
        except InputError as error:
            raise RefusedError(_BAD_REQUEST, f"the hosted model refused: {error}") from None
        count = self._prefix.num_tokens_of
        return ChatAnswer(text=written, tokens_in=count(text) + self._prefix.num_tokens, tokens_out=count(written))
