"""The plugin: a folder with everything personal, bound by digest to the backbone that it was tuned on.

    plugin.json                 format version, kind, config, digests, family, gate bias and threshold, training summary
    plugin.safetensors          the personal tensors: side network, and `gate.*` where there is a gate
    tokenizer.json              public, fetched from the cloud
    output_basis.safetensors    public, fetched from the cloud

NumPy only, never pickle. Sizes are checked before anything is read into memory.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from cotune.durable import is_free, sync, write_new
from cotune.errors import InputError, MismatchError

FORMAT_VERSION = 1
FAMILIES = ("parallel", "serial")
MAX_JSON_BYTES = 2**20
MAX_TENSOR_BYTES = 512 * 2**20
MAX_PUBLIC_BYTES = 512 * 2**20
# safetensors itself refuses larger headers only at 100 MB; a plugin has a few dozen tensors.
_MAX_HEADER_BYTES = 2**20
_GATE_WEIGHT = "gate.weight"
_GATE_LAYER = "gate.layer"
_GATE_LAYER_BIAS = "gate.layer_bias"

_JSON_FILE = "plugin.json"
_TENSOR_FILE = "plugin.safetensors"
_TOKENIZER_FILE = "tokenizer.json"
_BASIS_FILE = "output_basis.safetensors"


@dataclass(frozen=True, kw_only=True)
class GateParameters:
    """What a plugin keeps of its gate, sigma = 1[weight . u + bias > threshold], u = f or silu(layer f + layer_bias).

    Attributes:
        weight: float32 (hidden,), or (units,) behind a layer.
        bias: added to the score.
        threshold: the score above which the device is asked.
        layer: float32 (units, hidden), numbers that float16 holds; None for a linear gate.
        layer_bias: float32 (units,); None for a linear gate.
    """

    weight: NDArray[np.float32]
    bias: float
    threshold: float
    layer: NDArray[np.float32] | None = None
    layer_bias: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if self.weight.ndim != 1 or self.weight.dtype != np.float32:
            raise InputError(f"gate weight is {self.weight.dtype} {self.weight.shape}, expected float32 (hidden,)")
        if not (math.isfinite(self.bias) and math.isfinite(self.threshold)):
            raise InputError(
                f"gate bias {self.bias} and threshold {self.threshold} must be finite; tune the gate again"
            )
        if (self.layer is None) != (self.layer_bias is None):
            raise InputError("the gate has a layer without its bias, or a bias without its layer; tune the gate again")
        if self.layer is not None and (self.layer.ndim != 2 or self.layer.dtype != np.float32):
            raise InputError(f"gate layer is {self.layer.dtype} {self.layer.shape}, expected float32 (units, hidden)")

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """What is kept of it among the plugin's tensors."""
        found = {_GATE_WEIGHT: self.weight, _GATE_LAYER: self.layer, _GATE_LAYER_BIAS: self.layer_bias}
        return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A personal side network with what it needs to run beside one backbone.

    Attributes:
        kind: the architecture of the side network, a key of `cotune.models.SIDE_NETWORKS`.
        config: its configuration, JSON values only.
        tensors: its parameters, float32.
        gate: decides which tokens consult the side network; None where only ungated modes are meant.
        backbone_digest, projections_digest, tokenizer_digest: SHA-256, hex, of what it was tuned on.
        family: `parallel` (trained for z + delta: integration, spa) or `serial` (delta alone: ladder, separation).
        training: a summary of how it was tuned, JSON values only.
        tokenizer_json: the backbone's tokenizer, the bytes of `tokenizer.json`.
        output_basis: the shared output basis, the bytes of a safetensors file.
    """

    kind: str
    config: dict[str, Any]
    tensors: dict[str, NDArray[np.float32]]
    gate: GateParameters | None = None
    backbone_digest: str
    projections_digest: str
    tokenizer_digest: str
    family: str = "parallel"
    training: dict[str, Any] = field(default_factory=dict)
    tokenizer_json: bytes
    output_basis: bytes

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise InputError(f"family is {self.family!r}, expected one of {', '.join(FAMILIES)}")
        for name, tensor in self.tensors.items():
            if tensor.dtype != np.float32:
                raise InputError(f"plugin tensor {name} is {tensor.dtype}, expected float32")
            if not np.isfinite(tensor).all():
                raise InputError(f"plugin tensor {name} holds nan or inf, expected finite numbers; tune again")
        for name in (_GATE_WEIGHT, _GATE_LAYER, _GATE_LAYER_BIAS):
            if name in self.tensors:
                raise InputError(f"{name} is among the side network's tensors; give it as gate")

    @property
    def num_parameters(self) -> int:
        """Personal numbers in the side network, without the gate."""
        return sum(tensor.size for tensor in self.tensors.values())

    def check_backbone(self, backbone_digest: str, projections_digest: str, tokenizer_digest: str) -> None:
        """Refuse a backbone, projections or a tokenizer other than those that the plugin was tuned on.

        Raises:
            MismatchError: names both digests and the next step.
        """
        for what, own, other in (
            ("backbone", self.backbone_digest, backbone_digest),
            ("projections", self.projections_digest, projections_digest),
            ("tokenizer", self.tokenizer_digest, tokenizer_digest),
        ):
            if own != other:
                raise MismatchError(
                    f"the plugin was tuned on the {what} {own[:12]}, but the cloud hosts {other[:12]}; "
                    "connect to the cloud that it was tuned on, or tune a plugin for this one with "
                    "`cotune device tune`"
                )

    def save(self, folder: Path | str) -> None:
        """Write the plugin; `folder` either holds the whole plugin afterwards or is what it was before.

        A plugin that is already in `folder` is replaced.

        Raises:
            InputError: the config is no JSON, `folder` holds something else, or the disk refuses.
        """
        folder = Path(folder).resolve()
        files = {
            _JSON_FILE: self._json_bytes(),
            _TENSOR_FILE: save_tensors(self._stored_tensors()),
            _TOKENIZER_FILE: self.tokenizer_json,
            _BASIS_FILE: self.output_basis,
        }
        for name, data in files.items():
            if len(data) > _MAX_BYTES[name]:
                raise InputError(f"{name} would have {len(data)} bytes, at most {_MAX_BYTES[name]} are allowed")
        if not is_free(folder, earlier=_JSON_FILE):
            raise InputError(f"{folder} exists and is no plugin folder; choose another place or remove it")
        try:
            _write_folder(folder, files)
        except OSError as error:
            raise InputError(f"the plugin cannot be written to {folder}: {error.strerror or error}") from error

    @classmethod
    def load(cls, folder: Path | str) -> Plugin:
        """Read what `save` wrote.

        Raises:
            InputError: the folder or a file is missing, too large or not what it should be.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(
                f"{folder} is no folder, expected a plugin; make one with `cotune device tune --out {folder}`"
            )
        meta = _parse_json(_read_bounded(folder / _JSON_FILE))
        tensors = _parse_tensors(folder / _TENSOR_FILE)
        gate = None
        gate_meta = _entry(meta, "gate", dict, type(None))
        if gate_meta is not None:
            if _GATE_WEIGHT not in tensors:
                raise InputError(f"{_TENSOR_FILE} has no {_GATE_WEIGHT}, but {_JSON_FILE} has a gate; tune again")
            gate = GateParameters(
                weight=tensors.pop(_GATE_WEIGHT),
                bias=float(_entry(gate_meta, "bias", float, int)),
                threshold=float(_entry(gate_meta, "threshold", float, int)),
                layer=tensors.pop(_GATE_LAYER, None),
                layer_bias=tensors.pop(_GATE_LAYER_BIAS, None),
            )
        digests = _entry(meta, "digests", dict)
        return cls(
            kind=_entry(meta, "kind", str),
            config=_entry(meta, "config", dict),
            tensors=tensors,
            gate=gate,
            backbone_digest=_entry(digests, "backbone", str),
            projections_digest=_entry(digests, "projections", str),
            tokenizer_digest=_entry(digests, "tokenizer", str),
            family=_entry(meta, "family", str),
            training=_entry(meta, "training", dict),
            tokenizer_json=_read_bounded(folder / _TOKENIZER_FILE),
            output_basis=_read_bounded(folder / _BASIS_FILE),
        )

    def _json_bytes(self) -> bytes:
        gate = None if self.gate is None else {"bias": self.gate.bias, "threshold": self.gate.threshold}
        meta = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "config": self.config,
            "family": self.family,
            "digests": {
                "backbone": self.backbone_digest,
                "projections": self.projections_digest,
                "tokenizer": self.tokenizer_digest,
            },
            "gate": gate,
            "training": self.training,
        }
        try:
            return (json.dumps(meta, indent=2, allow_nan=False) + "\n").encode()
        except (TypeError, ValueError) as error:
            raise InputError(f"the plugin's config or training summary is no JSON: {error}") from error

    def _stored_tensors(self) -> dict[str, NDArray[np.float32]]:
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in self.tensors.items()}
        if self.gate is not None:
            tensors |= self.gate.tensors()
        return tensors


_MAX_BYTES = {
    _JSON_FILE: MAX_JSON_BYTES,
    _TENSOR_FILE: MAX_TENSOR_BYTES,
    _TOKENIZER_FILE: MAX_PUBLIC_BYTES,
    _BASIS_FILE: MAX_PUBLIC_BYTES,
}


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write everything beside `folder`, readable by its owner alone, then put it in place by renaming."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, data in files.items():
            write_new(fresh / name, data)
        _swap(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    sync(folder.parent)


def _swap(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    old = fresh.with_name(fresh.name + ".old")
    folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        old.rename(folder)
        raise
    # What else the user kept in there, such as a report, stays.
    for entry in list(old.iterdir()):
        if entry.name not in _MAX_BYTES:
            entry.rename(folder / entry.name)
    shutil.rmtree(old)


def _read_bounded(path: Path) -> bytes:
    """The bytes of one of the plugin's files; its size is looked at first."""
    limit = _MAX_BYTES[path.name]
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is not None and size <= limit:
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    if size is None:
        raise InputError(f"{path} is missing from the plugin; copy the whole folder, or tune again")
    raise InputError(f"{path} has {size} bytes, a plugin has at most {limit} there; copy the folder again")


def _parse_json(data: bytes) -> dict[str, Any]:
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{_JSON_FILE} is no JSON ({error}); copy the folder again, or tune again") from error
    if not isinstance(meta, dict):
        raise InputError(f"{_JSON_FILE} holds a {type(meta).__name__}, expected an object; tune again")
    version = meta.get("format_version")
    if version != FORMAT_VERSION:
        raise InputError(
            f"{_JSON_FILE} has format_version {version!r}, this cotune reads {FORMAT_VERSION}; "
            "use the cotune that wrote it, or tune again"
        )
    return meta


def _entry(meta: Mapping[str, Any], key: str, *types: type) -> Any:
    value = meta.get(key)
    if not isinstance(value, types) or isinstance(value, bool):
        expected = " or ".join("null" if t is type(None) else t.__name__ for t in types)
        raise InputError(f"{_JSON_FILE} has {key} = {value!r:.80}, expected {expected}; tune again")
    return value


def _parse_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    data = _read_bounded(path)
    _check_header(data, path)
    try:
        tensors: dict[str, NDArray[np.float32]] = load_tensors(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no safetensors file ({error}); copy the folder again") from error
    return tensors


def _check_header(data: bytes, path: Path) -> None:
    """Look at names, dtypes and sizes before the tensors are built."""
    try:
        (header_bytes,) = struct.unpack_from("<Q", data)
        if header_bytes > min(_MAX_HEADER_BYTES, len(data) - 8):
            raise ValueError(f"its header claims {header_bytes} bytes")
        header = json.loads(data[8 : 8 + header_bytes])
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        wrong = {name: entry["dtype"] for name, entry in entries.items() if entry["dtype"] != "F32"}
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no safetensors file ({error}); copy the folder again") from error
    if wrong:
        raise InputError(f"{path} holds tensors that are not float32: {wrong}; tune again")
