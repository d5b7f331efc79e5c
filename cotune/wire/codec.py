"""How taps become bytes: int8 with one float16 scale for each tap, and int4 and two float codecs to compare with.

`quantise` is the one definition of a quantised vector in cotune: taps on the wire, taps in training, corrections. All
of it is float32 arithmetic, so that every machine gets the same codes:

    scale = float16(absmax / 127), at most 65504
    codes = clip(rint(values / float32(scale)), -127, 127)        scale 0: codes 0
    values' = codes * float32(scale)

A vector so small that its scale underflows float16 (absmax below about 3.8e-6) becomes zeros; one so large that it
overflows saturates. Nan and infinities are a FrameError: they mean that the model that made them is broken.

int4 is the same with 7 in place of 127, and two codes in a byte. The wire speaks int8 alone; the other codecs are for
studies of what their bytes would cost in quality.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError

_MAX_CODE = np.float32(127)
_MAX_CODE_INT4 = np.float32(7)
_MAX_FLOAT16 = np.float32(65504)


class TapCodec(Protocol):
    """From the taps of one position, float32 (taps, tap_dim), to bytes and back."""

    @property
    def name(self) -> str:
        """What the codec is called in `CODECS` and on the wire."""
        ...

    def num_bytes(self, num_taps: int, tap_dim: int) -> int:
        """Exactly how many bytes `encode` gives."""
        ...

    def encode(self, taps: NDArray[np.float32]) -> bytes:
        """Bytes of taps (taps, tap_dim); FrameError for nan and infinities."""
        ...

    def decode(self, data: bytes, num_taps: int, tap_dim: int) -> NDArray[np.float32]:
        """float32 (taps, tap_dim); FrameError for bytes that no `encode` gives."""
        ...

    def round_trip(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        """What arrives of taps (..., tap_dim), without going through bytes."""
        ...


def quantise(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantise each vector along the last dimension.

    Args:
        values: float32 (..., dim), dim at least 1.

    Returns:
        codes: int8 (..., dim), in -127 .. 127.
        scales: float16 (...).

    Raises:
        FrameError: a value is nan or infinite.

    Example:
        >>> quantise(np.array([127.0, -63.6, 0.2], dtype=np.float32))
        (array([127, -64,   0], dtype=int8), np.float16(1.0))
    """
    return _quantise(values, _MAX_CODE)


def quantise_int4(values: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """As `quantise`, to codes in -7 .. 7; `dequantise` serves both.

    Example:
        >>> quantise_int4(np.array([7.0, -3.6, 0.2], dtype=np.float32))
        (array([ 7, -4,  0], dtype=int8), np.float16(1.0))
    """
    return _quantise(values, _MAX_CODE_INT4)


def _quantise(values: NDArray[np.float32], largest: np.float32) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    values = np.asarray(values, dtype=np.float32)
    absmax = np.abs(values).max(axis=-1)
    _check_finite(absmax)
    scales = np.minimum(absmax / largest, _MAX_FLOAT16).astype(np.float16)
    wide = scales.astype(np.float32)
    divisor = np.where(wide > 0, wide, _MAX_FLOAT16)[..., None]  # any large number: the codes become 0
    rounded = np.rint(values / divisor)
    return np.minimum(np.maximum(rounded, -largest), largest).astype(np.int8), scales


def dequantise(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> NDArray[np.float32]:
    """float32 (..., dim) from codes (..., dim) and scales (...)."""
    return codes.astype(np.float32) * np.asarray(scales).astype(np.float32)[..., None]


def pack_taps(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> bytes:
    """Bytes of one position: float16 scales (taps,), then int8 codes (taps, tap_dim)."""
    return scales.astype("<f2").tobytes() + codes.tobytes()


def unpack_taps(data: bytes, num_taps: int, tap_dim: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Inverse of `pack_taps`.

    Raises:
        FrameError: the length is wrong, a scale is negative, nan or infinite, or a code is -128.
    """
    _check_length(data, 2 * num_taps + num_taps * tap_dim, num_taps, tap_dim)
    scales = np.frombuffer(data, dtype="<f2", count=num_taps).astype(np.float16)
    codes = np.frombuffer(data, dtype=np.int8, offset=2 * num_taps).reshape(num_taps, tap_dim).copy()
    check_quantised(codes, scales)
    return codes, scales


def check_quantised(codes: NDArray[np.int8], scales: NDArray[np.float16]) -> None:
    """Refuse what `quantise` never gives."""
    if not ((scales >= 0) & (scales <= _MAX_FLOAT16)).all():
        raise FrameError("the taps hold a scale that is negative, nan or infinite")
    if codes.size and codes.min() == -128:
        raise FrameError("the taps hold the code -128, expected -127 to 127")


@dataclass(frozen=True)
class Int8Codec:
    """One byte for each value and a float16 scale for each tap."""

    name: str = "int8"

    def num_bytes(self, num_taps: int, tap_dim: int) -> int:
        return num_taps * (tap_dim + 2)

    def encode(self, taps: NDArray[np.float32]) -> bytes:
        return pack_taps(*quantise(taps))

    def decode(self, data: bytes, num_taps: int, tap_dim: int) -> NDArray[np.float32]:
        return dequantise(*unpack_taps(data, num_taps, tap_dim))

    def round_trip(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        return dequantise(*quantise(taps))


@dataclass(frozen=True)
class Int4Codec:
    """Half a byte for each value and a float16 scale for each tap: scales, then code + 8, the first in the low half.

    A tap of odd width ends in a code 0 that is not its own.
    """

    name: str = "int4"

    def num_bytes(self, num_taps: int, tap_dim: int) -> int:
        return num_taps * ((tap_dim + 1) // 2 + 2)

    def encode(self, taps: NDArray[np.float32]) -> bytes:
        codes, scales = quantise_int4(taps)
        halves = np.pad((codes + 8).astype(np.uint8), ((0, 0), (0, codes.shape[1] % 2)), constant_values=8)
        return scales.astype("<f2").tobytes() + (halves[:, ::2] | halves[:, 1::2] << 4).tobytes()

    def decode(self, data: bytes, num_taps: int, tap_dim: int) -> NDArray[np.float32]:
        _check_length(data, self.num_bytes(num_taps, tap_dim), num_taps, tap_dim)
        scales = np.frombuffer(data, dtype="<f2", count=num_taps).astype(np.float16)
        width = (tap_dim + 1) // 2
        packed = np.frombuffer(data, dtype=np.uint8, offset=2 * num_taps).reshape(num_taps, width)
        halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(num_taps, 2 * width)
        if (halves == 0).any() or (halves[:, tap_dim:] != 8).any():
            raise FrameError("the taps hold a half byte that no int4 code gives")
        codes = halves[:, :tap_dim].astype(np.int8) - np.int8(8)
        check_quantised(codes, scales)
        return dequantise(codes, scales)

    def round_trip(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        return dequantise(*quantise_int4(taps))


@dataclass(frozen=True)
class FloatCodec:
    """Values as little-endian floats, saturating at the largest float16 or float32."""

    name: str
    dtype: str

    def num_bytes(self, num_taps: int, tap_dim: int) -> int:
        return num_taps * tap_dim * np.dtype(self.dtype).itemsize

    def _narrow(self, taps: NDArray[np.float32]) -> NDArray[Any]:
        taps = np.asarray(taps, dtype=np.float32)
        _check_finite(taps)
        largest = np.float32(np.finfo(self.dtype).max)
        return np.clip(taps, -largest, largest).astype(self.dtype)

    def encode(self, taps: NDArray[np.float32]) -> bytes:
        return self._narrow(taps).tobytes()

    def decode(self, data: bytes, num_taps: int, tap_dim: int) -> NDArray[np.float32]:
        _check_length(data, self.num_bytes(num_taps, tap_dim), num_taps, tap_dim)
        taps = np.frombuffer(data, dtype=self.dtype).astype(np.float32).reshape(num_taps, tap_dim)
        _check_finite(taps)
        return taps

    def round_trip(self, taps: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._narrow(taps).astype(np.float32)


CODECS: dict[str, TapCodec] = {
    "int8": Int8Codec(),
    "int4": Int4Codec(),
    "float16": FloatCodec("float16", "<f2"),
    "float32": FloatCodec("float32", "<f4"),
}


def _check_finite(values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise FrameError("the taps hold nan or infinite values; look at the model that made them")


def _check_length(data: bytes, expected: int, num_taps: int, tap_dim: int) -> None:
    if len(data) != expected:
        raise FrameError(f"the taps are {len(data)} bytes, expected {expected} for {num_taps} taps of width {tap_dim}")
