"""Looking at what a plugin holds before a side network is built from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

Tensors = dict[str, NDArray[np.float32]]


def read_dimension(config: Mapping[str, Any], name: str) -> int:
    """A count or width of a config.

    Raises:
        KeyError: it is not there.
        ValueError: it is no integer from 1 to 2^20.
    """
    value = config[name]
    if type(value) is not int or not 1 <= value <= 2**20:
        raise ValueError(f"{name} is {value!r}")
    return value


def check_tensors(tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors with other names, shapes or types.

    Raises:
        InputError: names the tensor, and what it should be.
    """
    if tensors.keys() != expected.keys():
        raise InputError(f"the plugin has tensors {sorted(tensors)}, expected {sorted(expected)}; tune again")
    for name, shape in expected.items():
        if tensors[name].shape != shape or tensors[name].dtype != np.float32:
            raise InputError(
                f"plugin tensor {name} is {tensors[name].dtype} {tensors[name].shape}, "
                f"expected float32 {shape}; tune again"
            )


def check_taps(tap_codes: NDArray[np.int8], tap_scales: NDArray[np.float16], num_taps: int, tap_dim: int) -> None:
    """Refuse taps of another shape.

    Raises:
        InputError: names both shapes.
    """
    if tap_codes.shape != (num_taps, tap_dim) or tap_scales.shape != (num_taps,):
        raise InputError(
            f"the taps have shapes {tap_codes.shape} and {tap_scales.shape}, "
            f"expected ({num_taps}, {tap_dim}) and ({num_taps},) for this plugin"
        )
