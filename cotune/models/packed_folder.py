"""A model folder with quantised weights, which loads like any other.

    model.safetensors    what was not quantised
    packed.safetensors   of each quantised weight NAME: `NAME.codes`, uint8 (out, bytes), as `pack_codes` lays them;
                         `NAME.scales`, float16 (out, groups); `NAME.zeros`, packed like the codes, unless symmetric
    packed.json          format, method, SHA-256 of both files, and for each weight bits, group_size, shape, symmetric

and config.json, tokenizer.json and so on, as everywhere. Names, sizes and digests are checked before weights are read
into memory. NumPy only, never pickle.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from cotune.errors import InputError
from cotune.models.packed_weights import (
    PackedWeight,
    check_grid,
    num_groups,
    pack_codes,
    packed_row_bytes,
    unpack_codes,
)

FORMAT_VERSION = 1
JSON_FILE = "packed.json"
PACKED_FILE = "packed.safetensors"
WHOLE_FILE = "model.safetensors"
_MAX_JSON_BYTES = 16 * 2**20
_MAX_HEADER_BYTES = 64 * 2**20
# A dimension of the largest models known is below a million.
_MAX_DIM = 2**28
_CHUNK_BYTES = 2**24
_KEYS = {"format", "method", "files", "weights"}
_WEIGHT_KEYS = {"bits", "group_size", "shape", "symmetric"}
_DTYPES = {"codes": "U8", "scales": "F16", "zeros": "U8"}


@dataclass(frozen=True, kw_only=True)
class PackedShape:
    """What `packed.json` says of one weight.

    Attributes:
        bits, group_size, shape: see `PackedWeight`.
        is_symmetric: its zero points are all the middle and not stored.
    """

    bits: int
    group_size: int
    shape: tuple[int, int]
    is_symmetric: bool

    def stored_shapes(self) -> dict[str, list[int]]:
        """The tensors that hold it, by the last part of their names."""
        num_out, num_in = self.shape
        groups = num_groups(num_in, self.group_size)
        shapes = {"codes": [num_out, packed_row_bytes(num_in, self.bits)], "scales": [num_out, groups]}
        if not self.is_symmetric:
            shapes["zeros"] = [num_out, packed_row_bytes(groups, self.bits)]
        return shapes


@dataclass(frozen=True, kw_only=True)
class PackedContents:
    """What `packed.json` says.

    Attributes:
        method: how the weights were quantised, a key of `cotune.compression.quantise.QUANTISERS`.
        digests: SHA-256, hex, of `model.safetensors` and `packed.safetensors`.
        weights: by their names in the model.
    """

    method: str
    digests: Mapping[str, str]
    weights: Mapping[str, PackedShape]


def is_packed(folder: Path) -> bool:
    """Whether a model folder holds quantised weights."""
    return (folder / JSON_FILE).is_file() or (folder / PACKED_FILE).is_file()


def packed_files(weights: Mapping[str, PackedWeight], *, method: str, whole: bytes) -> dict[str, bytes]:
    """The files `packed.json`, `packed.safetensors` and `model.safetensors` of a quantised model's folder.

    Args:
        weights: by their names in the model, such as `model.layers.0.mlp.up_proj.weight`.
        method: how they were quantised.
        whole: the bytes of a `model.safetensors` with all other weights.

    Raises:
        InputError: there are no weights.
    """
    if not weights:
        raise InputError("there are no packed weights, expected at least one; save the model as it is")
    tensors: dict[str, NDArray[Any]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, weight in sorted(weights.items()):
        tensors[f"{name}.codes"] = pack_codes(weight.codes, weight.bits)
        tensors[f"{name}.scales"] = weight.scales.astype(np.float16)
        if not weight.is_symmetric:
            tensors[f"{name}.zeros"] = pack_codes(weight.zeros, weight.bits)
        entries[name] = {
            "bits": weight.bits,
            "group_size": weight.group_size,
            "shape": list(weight.shape),
            "symmetric": weight.is_symmetric,
        }
    packed = save_tensors(tensors)
    files = {WHOLE_FILE: whole, PACKED_FILE: packed}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    contents = {"format": FORMAT_VERSION, "method": method, "files": digests, "weights": entries}
    return files | {JSON_FILE: (json.dumps(contents, indent=1) + "\n").encode()}


def read_contents(folder: Path) -> PackedContents:
    """Read and check `packed.json`.

    Raises:
        InputError: it is missing, too large, or not what it should be.
    """
    path = folder / JSON_FILE
    try:
        size = path.stat().st_size
        if size > _MAX_JSON_BYTES:
            raise InputError(f"{path} has {size} bytes, expected at most {_MAX_JSON_BYTES}; copy the model again")
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); copy the whole model again") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}); copy the model again") from error
    if isinstance(data, dict) and data.get("format") != FORMAT_VERSION:
        raise InputError(
            f"{path} has format {data.get('format')!r:.80}, this cotune reads {FORMAT_VERSION}; "
            "use the cotune that wrote it"
        )
    _expect(isinstance(data, dict) and data.keys() == _KEYS, path, "", f"the keys {', '.join(sorted(_KEYS))}")
    digests, entries = data["files"], data["weights"]
    _expect(isinstance(data["method"], str), path, "method", "a word")
    _expect(
        isinstance(digests, dict)
        and digests.keys() == {WHOLE_FILE, PACKED_FILE}
        and all(isinstance(digest, str) for digest in digests.values()),
        path,
        "files",
        f"a SHA-256 for {WHOLE_FILE} and {PACKED_FILE}",
    )
    _expect(isinstance(entries, dict) and bool(entries), path, "weights", "an object with at least one weight")
    weights = {name: _packed_shape(path, name, entry) for name, entry in entries.items()}
    return PackedContents(method=data["method"], digests=digests, weights=weights)


def read_packed(folder: Path) -> Iterator[tuple[str, PackedWeight]]:
    """The quantised weights of a model folder, one after another, after all of it was checked.

    Raises:
        InputError: a file is missing, damaged, shortened or another one than was written.

    Example:
        >>> for name, weight in read_packed(Path("my-model-int4")):  # doctest: +SKIP
        ...     print(name, weight.bits, weight.shape)
    """
    contents = read_contents(folder)
    path = folder / PACKED_FILE
    check_header(path, contents)
    for name, expected in contents.digests.items():
        _check_digest(folder / name, expected)
    try:
        with safe_open(path, framework="numpy") as file:
            for name, shape in contents.weights.items():
                yield name, _unpacked(name, shape, file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy the model again") from error


def check_header(path: Path, contents: PackedContents) -> None:
    """Hold the names, types, shapes and length of a `packed.safetensors` against `packed.json`.

    Raises:
        InputError: it is missing or holds anything else.
    """
    expected = {
        f"{name}.{part}": (_DTYPES[part], shape)
        for name, weight in contents.weights.items()
        for part, shape in weight.stored_shapes().items()
    }
    num_bytes = sum(shape[0] * shape[1] * (2 if dtype == "F16" else 1) for dtype, shape in expected.values())
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > _MAX_HEADER_BYTES:
                raise ValueError(f"its header claims {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
        found = {name: (entry["dtype"], entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); copy the whole model again") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file ({error}); copy the model again") from error
    different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if different:
        name = different[0]
        raise InputError(
            f"{path} does not fit {JSON_FILE}: {name} is {_in_words(found.get(name))}, expected "
            f"{_in_words(expected.get(name))}; copy the model again"
        )
    if size != 8 + header_bytes + num_bytes:
        raise InputError(
            f"{path} has {size} bytes, expected {8 + header_bytes + num_bytes}; it was cut or added to, "
            "copy the model again"
        )


def _in_words(tensor: tuple[str, list[int]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {tensor[1]!r:.80}"


def _packed_shape(path: Path, name: str, entry: Any) -> PackedShape:
    _expect(
        isinstance(entry, dict) and entry.keys() == _WEIGHT_KEYS,
        path,
        name,
        f"the keys {', '.join(sorted(_WEIGHT_KEYS))}",
    )
    shape = entry["shape"]
    _expect(
        isinstance(shape, list) and len(shape) == 2 and all(type(dim) is int and 0 < dim <= _MAX_DIM for dim in shape),
        path,
        name,
        f"a shape [out, in], both from 1 to {_MAX_DIM}",
    )
    _expect(
        type(entry["bits"]) is int and type(entry["group_size"]) is int and type(entry["symmetric"]) is bool,
        path,
        name,
        "whole numbers as bits and group_size and true or false as symmetric",
    )
    try:
        check_grid(entry["bits"], entry["group_size"], shape[1])
    except InputError as error:
        raise InputError(f"{path}, {name}: {error}; copy the model again") from error
    return PackedShape(
        bits=entry["bits"],
        group_size=entry["group_size"],
        shape=(shape[0], shape[1]),
        is_symmetric=entry["symmetric"],
    )


def _expect(holds: bool, path: Path, what: str, expected: str) -> None:
    if not holds:
        where = f" at {what!r:.80}" if what else ""
        raise InputError(f"{path} is damaged or foreign{where}, expected {expected}; copy the model again")


def _check_digest(path: Path, expected: str) -> None:
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                state.update(chunk)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); copy the whole model again") from error
    if state.hexdigest() != expected:
        raise InputError(
            f"{path} has SHA-256 {state.hexdigest()[:12]}, {JSON_FILE} expects {expected[:12]}; it is damaged or from "
            "another model, copy the whole model again"
        )


def _unpacked(name: str, shape: PackedShape, file: Any) -> PackedWeight:
    num_out, num_in = shape.shape
    groups = num_groups(num_in, shape.group_size)
    try:
        if shape.is_symmetric:
            zeros = np.full((num_out, groups), 2 ** (shape.bits - 1), np.uint8)
        else:
            zeros = unpack_codes(file.get_tensor(f"{name}.zeros"), shape.bits, groups)
        return PackedWeight(
            codes=unpack_codes(file.get_tensor(f"{name}.codes"), shape.bits, num_in),
            scales=file.get_tensor(f"{name}.scales").astype(np.float32),
            zeros=zeros,
            bits=shape.bits,
            group_size=shape.group_size,
        )
    except InputError as error:
        raise InputError(f"the packed weight {name} is damaged: {error}; copy the model again") from error
