"""Named arrays: what an adapter is between two rounds, in NumPy.

Names are those of `LoraAdapter.params`. Whatever depends on an order takes the names sorted.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError

Arrays = Mapping[str, NDArray[np.float32]]
AnyArrays = Mapping[str, NDArray[Any]]
Shapes = Mapping[str, tuple[int, ...]]


def num_bytes(arrays: AnyArrays) -> int:
    """Bytes of the numbers alone, without names and headers.

    Example:
        >>> num_bytes({"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.uint8)})
        29
    """
    return sum(array.nbytes for array in arrays.values())


def shapes_of(arrays: AnyArrays) -> dict[str, tuple[int, ...]]:
    """The shape of each array, names sorted."""
    return {name: arrays[name].shape for name in sorted(arrays)}


def digest(arrays: AnyArrays) -> str:
    """SHA-256, hex, over sorted names, dtypes, shapes and little-endian bytes.

    Every text has its length in front and every array its number of dimensions, so that two different sets of arrays
    are never the same bytes. The layout in memory and the machine's byte order do not matter.

    Example:
        >>> one = np.arange(6, dtype=np.float32).reshape(2, 3)
        >>> digest({"a": one}) == digest({"a": np.asfortranarray(one)})
        True
        >>> digest({"a": one}) == digest({"a": one.reshape(3, 2)})
        False
    """
    seen = hashlib.sha256(struct.pack("<Q", len(arrays)))
    for name in sorted(arrays):
        array = arrays[name]
        little = np.asarray(array, dtype=array.dtype.newbyteorder("<"), order="C")
        for text in (name, array.dtype.name):
            seen.update(struct.pack("<Q", len(text.encode())) + text.encode())
        seen.update(struct.pack(f"<{1 + array.ndim}Q", array.ndim, *array.shape))
        seen.update(little.reshape(-1).view(np.uint8).data)
    return seen.hexdigest()


def to_vector(arrays: Arrays) -> NDArray[np.float32]:
    """All numbers, float32 (d,): arrays by sorted name, each row by row.

    Example:
        >>> to_vector({"b": np.array([3], np.float32), "a": np.array([[1, 2]], np.float32)})
        array([1., 2., 3.], dtype=float32)
    """
    pieces = [np.asarray(arrays[name], dtype=np.float32).reshape(-1) for name in sorted(arrays)]
    return np.concatenate([np.empty(0, np.float32), *pieces])


def from_vector(vector: NDArray[np.float32], shapes: Shapes) -> dict[str, NDArray[np.float32]]:
    """Inverse of `to_vector`; the arrays are copies.

    Args:
        vector: (d,).
        shapes: of the arrays, d numbers in all.

    Raises:
        InputError: `vector` has another length than `shapes` ask for.
    """
    wanted = sum(math.prod(shape) for shape in shapes.values())
    if vector.shape != (wanted,):
        raise InputError(f"vector has shape {vector.shape}, the shapes ask for ({wanted},); give one of this adapter")
    arrays: dict[str, NDArray[np.float32]] = {}
    start = 0
    for name in sorted(shapes):
        end = start + math.prod(shapes[name])
        arrays[name] = np.array(vector[start:end], dtype=np.float32).reshape(shapes[name])
        start = end
    return arrays


def difference(after: Arrays, before: Arrays) -> dict[str, NDArray[np.float32]]:
    """after - before, array by array.

    Raises:
        InputError: the two have other names or shapes.
    """
    _check_alike(after, before)
    return {name: np.subtract(after[name], before[name], dtype=np.float32) for name in after}


def add(base: Arrays, delta: Arrays, *, scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    """base + scale * delta, array by array, in float64 and rounded once to float32.

    Raises:
        InputError: the two have other names or shapes.

    Example:
        >>> add({"a": np.ones(2, np.float32)}, {"a": np.full(2, 4, np.float32)}, scale=0.5)["a"]
        array([3., 3.], dtype=float32)
    """
    _check_alike(base, delta)
    return {
        name: (base[name].astype(np.float64) + scale * delta[name].astype(np.float64)).astype(np.float32)
        for name in base
    }


def norm(arrays: Arrays) -> float:
    """The Euclidean norm of all numbers together, summed in float64."""
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays.values()))


def check_arrays(arrays: AnyArrays, shapes: Shapes, *, codes: Collection[str] = ()) -> None:
    """Refuse arrays that are not float32, finite, and named and shaped as `shapes` say.

    Args:
        arrays: from anywhere.
        shapes: of all of them.
        codes: names of those that are uint8 instead.

    Raises:
        InputError: names the first array that is wrong, what came and what was expected.
    """
    missing, unknown = sorted(shapes.keys() - arrays.keys()), sorted(arrays.keys() - shapes.keys())
    if missing or unknown:
        parts = [f"no {name!r}" for name in missing[:1]] + [f"an unknown {name!r}" for name in unknown[:1]]
        raise InputError(
            f"arrays has {len(arrays)} names with {' and '.join(parts)}, expected the {len(shapes)} of this round's "
            "adapter; tune the same configuration on every device"
        )
    for name in sorted(shapes):
        array = arrays[name]
        dtype = np.dtype(np.uint8 if name in codes else np.float32)
        if array.dtype != dtype or array.shape != tuple(shapes[name]):
            raise InputError(
                f"array {name!r} is {array.dtype} {array.shape}, expected {dtype} {tuple(shapes[name])}; "
                "tune the same configuration on every device"
            )
        if not np.isfinite(array).all():
            bad = int(array.size - np.isfinite(array).sum())
            raise InputError(
                f"array {name!r} holds nan or inf in {bad} of {array.size} places, expected finite numbers; "
                "leave this reply out or lower the learning rate"
            )


def _check_alike(one: Arrays, other: Arrays) -> None:
    if shapes_of(one) != shapes_of(other):
        differing = sorted(
            name
            for name in one.keys() | other.keys()
            if name not in one or name not in other or one[name].shape != other[name].shape
        )
        raise InputError(
            f"the two sets of arrays differ in names or shapes at {differing[0]!r}; give two of the same adapter"
        )
