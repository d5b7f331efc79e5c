"""A small JSON value as an array of a message, which carries nothing but arrays: texts, and names with their shapes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

MAX_JSON_BYTES = 2**26


def to_json_array(value: object, what: str, *, max_bytes: int = MAX_JSON_BYTES) -> NDArray[np.uint8]:
    """UTF-8 without spaces.

    Args:
        value: as JSON can hold it.
        what: it is, in the message of an error.
        max_bytes: the most that it may have.

    Raises:
        InputError: it is too long.

    Example:
        >>> to_json_array(["a"], "the questions").tobytes()
        b'["a"]'
    """
    written = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    if len(written) > max_bytes:
        raise InputError(f"{what} have {len(written):,} bytes, at most {max_bytes:,}; give fewer")
    return np.frombuffer(written, np.uint8)


def from_json_array(array: NDArray[Any], what: str) -> Any:
    """What `to_json_array` was given.

    Raises:
        InputError: it is no JSON.

    Example:
        >>> from_json_array(to_json_array({"a": [1, 2]}, "names"), "names")
        {'a': [1, 2]}
    """
    try:
        return json.loads(array.tobytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} are no JSON ({error!s:.80}); use one version of cotune") from None
