"""Names and shapes of arrays, told once as an array of a message, so that later messages hold their numbers alone.

A name in the header of a message costs more than a hundred bytes: of an adapter with 200 matrices that is a twentieth
of what it weighs in 5 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.arrays import AnyArrays, Shapes
from cotune.federation.json_array import from_json_array, to_json_array

LAYOUT = "layout"


def to_layout(shapes: Shapes) -> dict[str, NDArray[np.uint8]]:
    """These shapes as one array, names sorted."""
    return {LAYOUT: to_json_array({name: list(shapes[name]) for name in sorted(shapes)}, "names and shapes")}


def from_layout(arrays: AnyArrays) -> dict[str, tuple[int, ...]]:
    """The shapes of `to_layout`; other arrays are left alone.

    Raises:
        InputError: there is none, or it is no such text.

    Example:
        >>> from_layout(to_layout({"b": (3, 2), "a": (2, 5)}))
        {'a': (2, 5), 'b': (3, 2)}
    """
    if LAYOUT not in arrays:
        raise InputError(f"arrays have no {LAYOUT!r}, expected one with the first task; use one version of cotune")
    told = from_json_array(arrays[LAYOUT], f"names and shapes in {LAYOUT}")
    if not isinstance(told, dict) or not all(_is_shape(one) for one in told.values()):
        raise InputError(f"{LAYOUT} is {told!r:.80}, expected two sizes for each name; use one version of cotune")
    return {name: (one[0], one[1]) for name, one in told.items()}


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(one) is int and one >= 1 for one in value)
