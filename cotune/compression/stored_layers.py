"""What lies in a model folder on disk: numbers, bits and zeros of each weight, read tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cotune.errors import InputError
from cotune.models.packed_folder import is_packed, read_packed
from cotune.models.weights import find_model_folder

WEIGHT_SUFFIXES = (".safetensors", ".onnx", ".onnx.data", ".gguf")
_NO_WEIGHTS = ("projections.safetensors",)
_NAMES = "model*.safetensors"
_BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16, "I8": 8, "U8": 8}


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor in a file, not read yet.

    Attributes:
        path: the file.
        name: in it.
        dtype: as safetensors calls it, such as BF16.
        shape: of it.
    """

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_numbers(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            InputError: the file is damaged.
        """
        try:
            with safe_open(self.path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(self.name)
                return tensor
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path} is no safetensors file ({error}); copy the model again") from error


@dataclass(frozen=True, kw_only=True)
class StoredLayer:
    """A weight matrix in a folder.

    Attributes:
        name: of the weight in the model.
        shape: (out, in).
        bits: in the file for each weight, scales and zero points counted.
        code_bits: of a code, or of a number where it is whole.
        sparsity: share of zeros, 0 to 1.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    code_bits: int
    sparsity: float

    @property
    def num_numbers(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a folder's `model*.safetensors`, by name; not those that are packed.

    Raises:
        InputError: a file is damaged.
    """
    found: dict[str, StoredTensor] = {}
    for path in sorted(folder.glob(_NAMES)):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 safetensors' file is no mapping
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[name] = StoredTensor(path=path, name=name, dtype=part.get_dtype(), shape=shape)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is no safetensors file ({error}); copy the model again") from error
    return found


def stored_layers(model: Path | str) -> list[StoredLayer]:
    """All weights of a model folder, vectors such as norms too, by name.

    Raises:
        InputError: it is no model folder, or damaged.

    Example:
        >>> layers = stored_layers("starter")
        >>> sum(layer.num_numbers for layer in layers), {layer.code_bits for layer in layers}
        (2755008, {16})
    """
    folder = find_model_folder(str(model))
    return sorted(_layers(folder), key=lambda layer: layer.name)


def folder_bytes(folder: Path) -> int:
    """Bytes of weights and graphs in a model folder of any kind.

    Example:
        >>> folder_bytes(find_model_folder("starter")) > 2 * 2_755_008
        True
    """
    return sum(
        path.stat().st_size
        for path in folder.iterdir()
        if path.name.endswith(WEIGHT_SUFFIXES) and path.name not in _NO_WEIGHTS
    )


def _layers(folder: Path) -> Iterator[StoredLayer]:
    if is_packed(folder):
        for name, weight in read_packed(folder):
            zeros = int((weight.codes == np.repeat(weight.zeros, weight.group_size, 1)[:, : weight.shape[1]]).sum())
            numbers = weight.codes.size
            yield StoredLayer(
                name=name,
                shape=weight.shape,
                bits=8 * weight.size_bytes / numbers,
                code_bits=weight.bits,
                sparsity=zeros / numbers,
            )
    for name, tensor in stored_tensors(folder).items():
        numbers = max(1, tensor.num_numbers)
        bits = _BITS.get(tensor.dtype, 8)
        zeros = tensor.num_numbers - int(tensor.read().count_nonzero())
        yield StoredLayer(name=name, shape=tensor.shape, bits=bits, code_bits=bits, sparsity=zeros / numbers)
