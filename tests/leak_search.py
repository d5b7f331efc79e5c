"""Do the bytes of a plugin's tensors occur in what was sent, in any form that somebody might send them in?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from cotune.wire.codec import quantise

WINDOW_BYTES = 16
_KEY_BYTES = 8


def forms(tensor: NDArray[np.float32]) -> Iterator[tuple[str, bytes]]:
    """A tensor as bytes: row by row and column by column, as float32, float16 and int8 (by row and as a whole)."""
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor[None]
    columns = np.swapaxes(tensor, -1, -2).reshape(-1, tensor.shape[-2]) if tensor.ndim > 1 else rows
    for name, matrix in (("rows", rows), ("columns", columns)):
        yield f"{name} as float32", np.ascontiguousarray(matrix, "<f4").tobytes()
        yield f"{name} as float16", np.ascontiguousarray(matrix, "<f2").tobytes()
        yield f"{name} as int8", quantise(matrix)[0].tobytes()
        yield f"{name} as int8 of one scale", quantise(matrix.ravel())[0].tobytes()


class SentBytes:
    """Everything that was sent, searchable."""

    def __init__(self, frames: list[bytes]) -> None:
        self._data = b"".join(frames)
        self._keys = np.unique(_keys(self._data))

    def __len__(self) -> int:
        return len(self._data)

    def holds_part_of(self, data: bytes) -> bool:
        """Whether any 16 bytes in a row of `data` that are not all the same occur in what was sent."""
        keys = _keys(data)
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        for start in np.flatnonzero(self._keys[place] == keys):
            window = data[start : start + WINDOW_BYTES]
            if len(window) == WINDOW_BYTES and len(set(window)) > 1 and window in self._data:
                return True
        return False

    def leaks(self, tensors: Mapping[str, NDArray[np.float32]]) -> list[str]:
        """Which tensors occur, and in which form."""
        return [
            f"{name}: {form}"
            for name, tensor in tensors.items()
            for form, data in forms(tensor)
            if self.holds_part_of(data)
        ]


def directions_alike(
    update: Mapping[str, NDArray[np.float32]], private: Mapping[str, NDArray[np.float32]]
) -> list[str]:
    """Which adapter matrices of a decoded update have a direction that is a private one, but for its sign and rounding.

    Codes of few bits, with a dither and a place of their own, cannot be searched for as bytes. Rounding to 5 bits is
    off by at most a 31st of the largest number of a direction; an eighth leaves room for what is added to it.
    """
    found = []
    for name, matrix in private.items():
        for own in _directions(matrix):
            most = np.abs(own).max() / 8
            near = [np.abs(one - sign * own).max() < most for one in _directions(update[name]) for sign in (1, -1)]
            if any(near):
                found.append(name)
    return found


def _directions(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of an A, which lies, and columns of a B, which stands."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _keys(data: bytes) -> NDArray[np.uint64]:
    """The first eight bytes from every offset on, as numbers."""
    windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(data, np.uint8), _KEY_BYTES)
    return np.ascontiguousarray(windows).view("<u8")[:, 0]
