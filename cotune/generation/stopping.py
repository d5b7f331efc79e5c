"""When a text ends: an end token, enough tokens, or a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cotune.generation.request import GenerationRequest

Detokenize = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Ending:
    """How a generation ended.

    Attributes:
        reason: `end_token`, `length` or `stop_string`.
        num_tokens: how many generated tokens belong to the text.
        num_characters: how much of their text, where a stop string cuts inside a token; else None.
    """

    reason: str
    num_tokens: int
    num_characters: int | None = None


def find_ending(token_ids: Sequence[int], request: GenerationRequest, detokenize: Detokenize | None) -> Ending | None:
    """Whether the text ends with the last of `token_ids` (the generated ones), and how.

    Call it after each token: it looks for an end in the last one only, except for stop strings, which may
    span tokens. `detokenize` is needed only for these.

    Example:
        >>> import numpy as np
        >>> find_ending([5, 2], GenerationRequest(prompt_ids=np.array([1]), stop_token_ids=(2,)), None)
        Ending(reason='end_token', num_tokens=2, num_characters=None)
    """
    if not token_ids:
        return None
    if token_ids[-1] in request.stop_token_ids:
        return Ending("end_token", len(token_ids))
    if request.stop_strings and detokenize is not None:
        text = detokenize(token_ids)
        cut = first_stop(text, request.stop_strings)
        if cut is not None:
            return Ending("stop_string", len(token_ids), cut)
    if len(token_ids) >= request.max_new_tokens:
        return Ending("length", len(token_ids))
    return None


def first_stop(text: str, stops: Sequence[str], begin: int = 0) -> int | None:
    """Where the stop string begins that ends first, and of those that end together the longest; None without one.

    So it does not matter in which pieces the text came.

    Example:
        >>> first_stop("bab", ["a", "bab"])
        1
    """
    found = [(start + len(stop), start) for stop in stops if (start := text.find(stop, begin)) >= 0]
    return min(found)[1] if found else None
