"""Bounded reading and writing of frame payloads: every length is checked before anything is allocated.

All numbers are little-endian. Whatever the bytes are, the only exception from this file is `FrameError`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError

Code = TypeVar("Code", bound=IntEnum)

MAX_U24 = 2**24 - 1
FLOAT64 = struct.Struct("<d")


class PayloadReader:
    """Takes one payload apart from front to back.

    Args:
        data: bytes with the payload at their end; arrays that come out of it are copies.
        what: the name of the frame, for messages.
        offset: where the payload starts.
    """

    def __init__(self, data: bytes, what: str, *, offset: int = 0) -> None:
        self.what = what
        self._data = data
        self._offset = offset

    @property
    def num_left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._offset

    def take(self, num_bytes: int) -> bytes:
        """The next `num_bytes` bytes."""
        if num_bytes > self.num_left:
            raise FrameError(f"{self.what} frame is truncated: {num_bytes} more bytes expected, {self.num_left} came")
        start = self._offset
        self._offset += num_bytes
        return self._data[start : self._offset]

    def rest(self) -> bytes:
        """All bytes not read yet."""
        return self.take(self.num_left)

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields, as `struct` reads them."""
        return layout.unpack(self.take(layout.size))

    def array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next `count` numbers of `dtype`, as a read-only array over a copy of their bytes."""
        return np.frombuffer(self.take(count * np.dtype(dtype).itemsize), dtype=dtype)

    def u24(self, count: int) -> NDArray[np.int64]:
        """The next `count` ids of 3 bytes."""
        return unpack_u24(self.take(3 * count))

    def ascending_u24(self, count: int) -> NDArray[np.int64]:
        """The next `count` ids of 3 bytes, strictly ascending."""
        ids = self.u24(count)
        if not (ids[1:] > ids[:-1]).all():
            raise FrameError(f"{self.what} frame: the logit ids are not in ascending order")
        return ids

    def u32(self, count: int) -> NDArray[np.int64]:
        """The next `count` ids of 4 bytes."""
        return self.array("<u4", count).astype(np.int64)

    def logits(self, count: int) -> NDArray[np.float32]:
        """The next `count` float32 logits; -inf rules a token out, nan and +inf are refused."""
        logits = self.array("<f4", count).astype(np.float32)
        check_logits(logits, self.what)
        return logits

    def finite_array(self, dtype: str, count: int) -> NDArray[Any]:
        """The next `count` floats of `dtype`, none nan or infinite."""
        values = self.array(dtype, count).astype(np.dtype(dtype).newbyteorder("="))
        if not np.isfinite(values).all():
            raise FrameError(f"{self.what} frame: a value is nan or infinite")
        return values

    def finite(self) -> float:
        """The next float64, finite."""
        (value,) = self.unpack(FLOAT64)
        return check_finite(value, "log_normalizer", self.what)

    def json_object(self) -> dict[str, object]:
        """The rest, as one JSON object in UTF-8 without nan or infinities."""
        try:
            value = json.loads(self.rest().decode(), parse_constant=_refuse_constant, parse_float=_finite_float)
        except (ValueError, RecursionError) as error:
            raise FrameError(f"{self.what} frame: the payload is no valid JSON ({error})") from None
        if not isinstance(value, dict):
            raise FrameError(f"{self.what} frame: expected a JSON object, got {type(value).__name__}")
        return value

    def end(self) -> None:
        """Refuse bytes that nobody asked for."""
        if self.num_left:
            raise FrameError(f"{self.what} frame has {self.num_left} trailing bytes")


def pack_u24(ids: NDArray[np.int64], what: str) -> bytes:
    """Ids (n,) in 0 .. 2^24-1 as 3 little-endian bytes each."""
    ids = check_ids(ids, what, MAX_U24)
    return ids.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()


def pack_logit_ids(ids: NDArray[np.int64], what: str) -> bytes:
    """As `pack_u24`, for ids that must ascend."""
    packed = pack_u24(ids, what)
    ids = np.asarray(ids)
    if not (ids[1:] > ids[:-1]).all():
        raise FrameError(f"{what} frame: the logit ids are not in ascending order")
    return packed


def unpack_u24(data: bytes) -> NDArray[np.int64]:
    """Inverse of `pack_u24`; `len(data)` is a multiple of 3."""
    wide = np.zeros((len(data) // 3, 4), dtype=np.uint8)
    wide[:, :3] = np.frombuffer(data, dtype=np.uint8).reshape(-1, 3)
    return wide.view("<u4")[:, 0].astype(np.int64)


def pack_u32(ids: NDArray[np.int64], what: str) -> bytes:
    """Ids (n,) in 0 .. 2^32-1 as 4 little-endian bytes each."""
    return check_ids(ids, what, 2**32 - 1).astype("<u4").tobytes()


def pack_logits(logits: NDArray[np.float32], count: int, what: str) -> bytes:
    """`count` float32 logits."""
    logits = vector(logits, np.float32, "logits", what)
    if len(logits) != count:
        raise FrameError(f"{what} frame: {count} ids but {len(logits)} logits")
    check_logits(logits, what)
    return logits.astype("<f4").tobytes()


def pack_json(value: dict[str, object], what: str) -> bytes:
    """One JSON object, compact, ASCII, keys in order."""
    try:
        return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise FrameError(f"{what} frame: the payload cannot be written as JSON ({error})") from None


def pack_struct(layout: struct.Struct, values: Sequence[object], what: str) -> bytes:
    """Fields by `struct`; a value that its field cannot hold is a FrameError."""
    try:
        return layout.pack(*values)
    except (struct.error, OverflowError) as error:
        raise FrameError(f"{what} frame: a field is out of range ({error}); values {tuple(values)}") from None


def check_ids(ids: NDArray[np.int64], what: str, largest: int) -> NDArray[np.int64]:
    """One-dimensional integers in 0 .. `largest`."""
    ids = np.asarray(ids)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise FrameError(f"{what} frame: ids must be integers (n,), got {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() > largest):
        raise FrameError(f"{what} frame: ids must be 0 to {largest}, got {ids.min()} to {ids.max()}")
    return ids


def check_logits(logits: NDArray[np.float32], what: str) -> None:
    """Refuse nan and +inf."""
    if not (logits < np.inf).all():
        raise FrameError(f"{what} frame: a logit is nan or +inf")


def check_finite(value: float, name: str, what: str) -> float:
    """Refuse nan and infinities."""
    if not math.isfinite(value):
        raise FrameError(f"{what} frame: {name} is {value}, expected a finite number")
    return value


def vector(values: NDArray[Any], dtype: type[np.generic], name: str, what: str) -> NDArray[Any]:
    """`values` if it is one-dimensional and of `dtype`."""
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype != dtype:
        expected = np.dtype(dtype).name
        raise FrameError(f"{what} frame: {name} must be {expected} (n,), got {values.dtype} {values.shape}")
    return values


def member(kind: type[Code], value: int, what: str) -> Code:
    """`value` as a member of the enumeration `kind`."""
    try:
        return kind(value)
    except ValueError:
        known = ", ".join(f"{member.value} {member.name.lower()}" for member in kind)
        raise FrameError(f"{what} frame: {value} is no {kind.__name__}; known are {known}") from None


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value
