"""Named arrays and one JSON object as one block of bytes: the safetensors format, read with suspicion.

    8 bytes   length of the header, little-endian
    header    JSON: for each array its dtype, shape and place; the object, as canonical JSON text, in the metadata
    numbers   little-endian, without gaps, to the last byte

The library writes. Reading is ours, because every length is compared with the bytes that came before anything is
allocated: the arrays are read-only views of those bytes, and the header, the one part that becomes Python objects, is
at most `MAX_HEADER_BYTES`. Any other reader of safetensors can open these blocks too.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save as save_safetensors

from cotune.errors import FrameError
from cotune.federation.arrays import AnyArrays

MAX_BLOCK_BYTES = 2**30
MAX_HEADER_BYTES = 2**19
"""Room for about 3,000 arrays."""
MAX_ARRAYS = 4096
MAX_DIMENSIONS = 8
MAX_NAME_CHARACTERS = 256

_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8"), "U8": np.dtype("u1")}
_METADATA = "__metadata__"
_NOTE = "cotune"
_LENGTH = struct.Struct("<Q")


def pack(arrays: AnyArrays, note: dict[str, Any], what: str) -> bytes:
    """One block of bytes with these arrays and this JSON object.

    Args:
        arrays: float32, int64 or uint8.
        note: JSON values only, without nan and infinities.
        what: the name of the block, for messages.

    Raises:
        FrameError: an array or the note cannot be written, or the block would be larger than `unpack` reads.
    """
    for name, array in arrays.items():
        _check_name(name, what)
        is_small = array.ndim <= MAX_DIMENSIONS and math.prod(max(one, 1) for one in array.shape) <= MAX_BLOCK_BYTES
        if array.dtype not in _DTYPES.values() or not is_small:
            raise FrameError(
                f"{what}: array {name!r} is {array.dtype} {array.shape}, expected float32, int64 or uint8 with at most "
                f"{MAX_DIMENSIONS} dimensions and {MAX_BLOCK_BYTES} bytes"
            )
    tensors = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        block = save_safetensors(tensors, metadata={_NOTE: canonical_json(note)})
    except (SafetensorError, TypeError, ValueError, RecursionError) as error:
        raise FrameError(f"{what} cannot be written: {error}") from None
    (header_bytes,) = _LENGTH.unpack_from(block)
    _check_limit(len(tensors), MAX_ARRAYS, "arrays", what)
    _check_limit(header_bytes, MAX_HEADER_BYTES, "bytes of header", what)
    _check_limit(len(block), MAX_BLOCK_BYTES, "bytes", what)
    return block


def unpack(block: bytes, what: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The arrays and the note that `pack` was given.

    Args:
        block: bytes from anywhere.
        what: the name of the block, for messages.

    Returns:
        Read-only views of `block`, names in the order of their places, and the note.

    Raises:
        FrameError: whatever else the bytes are.

    Example:
        >>> block = pack({"a": np.ones(2, np.float32)}, {"round": 3}, "example")
        >>> unpack(block, "example")
        ({'a': array([1., 1.], dtype=float32)}, {'round': 3})
    """
    _check_limit(len(block), MAX_BLOCK_BYTES, "bytes", what)
    if len(block) < _LENGTH.size:
        raise FrameError(f"{what} has {len(block)} bytes, expected at least {_LENGTH.size}")
    (header_bytes,) = _LENGTH.unpack_from(block)
    if header_bytes > len(block) - _LENGTH.size:
        raise FrameError(f"{what} claims a header of {header_bytes} bytes, {len(block) - _LENGTH.size} came")
    _check_limit(header_bytes, MAX_HEADER_BYTES, "bytes of header", what)
    start = _LENGTH.size + header_bytes
    text = block[_LENGTH.size : start]
    if any(each in text for each in b"\t\n\r"):
        # Spaces fill a header up to a multiple of eight bytes; what else JSON takes for a space could stand for them.
        raise FrameError(
            f"{what}: its header has tabs or ends of lines, expected none; use the same version everywhere"
        )
    header = _parse_object(text, what)
    metadata = header.pop(_METADATA, None)
    if not isinstance(metadata, dict) or metadata.keys() != {_NOTE} or not isinstance(metadata[_NOTE], str):
        raise FrameError(f"{what} has metadata {metadata!r:.80}, expected one text {_NOTE!r}")
    _check_limit(len(header), MAX_ARRAYS, "arrays", what)
    arrays = _views(block, start, header, what)
    return arrays, _parse_note(metadata[_NOTE], what)


def canonical_json(value: dict[str, Any]) -> str:
    """The one text of a JSON object: ASCII, compact, keys sorted.

    Raises:
        TypeError, ValueError, RecursionError: it is no JSON object, or holds nan or an infinity.
    """
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False)


def _views(block: bytes, start: int, header: dict[str, Any], what: str) -> dict[str, NDArray[Any]]:
    """Each array of the header, where its place is the one behind the array before it."""
    places = sorted((_place(name, entry, what), name) for name, entry in header.items())
    arrays: dict[str, NDArray[Any]] = {}
    expected = start
    for (begin, end), name in places:
        dtype, shape = _DTYPES[header[name]["dtype"]], header[name]["shape"]
        count = math.prod(shape)
        if start + begin != expected or end - begin != count * dtype.itemsize or start + end > len(block):
            raise FrameError(
                f"{what}: array {name!r} claims bytes {begin} to {end} for {dtype} {tuple(shape)}, "
                f"expected {count * dtype.itemsize} bytes from {expected - start} within {len(block) - start}"
            )
        arrays[name] = np.frombuffer(block, dtype=dtype, count=count, offset=start + begin).reshape(shape)
        expected = start + end
    if expected != len(block):
        raise FrameError(f"{what} has {len(block) - expected} bytes too many behind its arrays")
    return arrays


def _place(name: str, entry: object, what: str) -> tuple[int, int]:
    """Where an array begins and ends; its entry of the header is checked."""
    _check_name(name, what)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise FrameError(f"{what}: array {name!r} has {entry!r:.80}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FrameError(f"{what}: array {name!r} has dtype {dtype!r:.20}, expected one of {', '.join(_DTYPES)}")
    # NumPy refuses shapes that are too large even where one dimension is 0 and there is not a number in them.
    is_shape = _are_counts(shape) and len(shape) <= MAX_DIMENSIONS
    if not is_shape or math.prod(max(one, 1) for one in shape) > MAX_BLOCK_BYTES:
        raise FrameError(
            f"{what}: array {name!r} has shape {shape!r:.80}, expected at most {MAX_DIMENSIONS} counts "
            f"and {MAX_BLOCK_BYTES} bytes"
        )
    if not (_are_counts(offsets) and len(offsets) == 2):
        raise FrameError(f"{what}: array {name!r} has data_offsets {offsets!r:.80}, expected two counts")
    return offsets[0], offsets[1]


def _are_counts(value: object) -> bool:
    """A list of integers from 0 on."""
    return isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)


def _check_name(name: object, what: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
        raise FrameError(
            f"{what}: {name!r:.80} is no name of an array, expected 1 to {MAX_NAME_CHARACTERS} printable characters"
        )


def _check_limit(number: int, limit: int, unit: str, what: str) -> None:
    if number > limit:
        raise FrameError(f"{what} has {number} {unit}, at most {limit} are allowed")


def _parse_note(text: str, what: str) -> dict[str, Any]:
    note = _parse_object(text.encode(errors="surrogatepass"), what)
    # One object has one text, so that nothing in a block can be changed without changing what it says.
    if canonical_json(note) != text:
        raise FrameError(f"{what}: its note is not written as this cotune writes it; use the same version everywhere")
    return note


def _parse_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(
            data.decode(), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_keys
        )
    except (ValueError, RecursionError) as error:
        raise FrameError(f"{what}: its header is no valid JSON ({error!s:.120})") from None
    if not isinstance(value, dict):
        raise FrameError(f"{what}: its header holds a {type(value).__name__}, expected an object")
    return value


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is not allowed")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
