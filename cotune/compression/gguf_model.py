"""A GGUF file of `gguf_export` as a PyTorch model again: what its blocks stand for, to hold it against its source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cotune.compression.gguf_names import gguf_name, row_order
from cotune.compression.llama_folder import LlamaFolder
from cotune.errors import InputError
from cotune.models.weights import load_model


def read_gguf_tensors(path: Path) -> dict[str, NDArray[np.float32]]:
    """All tensors of a file in float32, by GGUF's names; rows of q and k as they lie there.

    Raises:
        InputError: it is no GGUF file.
    """
    with _reading(path) as reader:
        return {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            for tensor in reader.tensors
        }


@contextmanager
def _reading(path: Path) -> Iterator[gguf.GGUFReader]:
    try:
        yield gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be read as a GGUF file ({error}); export it again") from error


def has_whole_weights(path: Path) -> bool:
    """Whether nothing in a file is quantised.

    Raises:
        InputError: it is no GGUF file.
    """
    whole = (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16)
    with _reading(path) as reader:
        return all(tensor.tensor_type in whole for tensor in reader.tensors)


def load_gguf(path: Path, source: LlamaFolder) -> PreTrainedModel:
    """The model of `source` in PyTorch, float32, with the file's weights in the place of its own.

    Raises:
        InputError: the file is damaged, or another model's.

    Example:
        >>> model = load_gguf(Path("starter-q8/model.gguf"), LlamaFolder("starter"))  # doctest: +SKIP
    """
    tensors = read_gguf_tensors(path)
    model = load_model(source.path, dtype="float32", device="cpu").eval()
    model.requires_grad_(False)
    own = dict(model.named_parameters())
    for name, parameter in own.items():
        module, _, part = name.rpartition(".")
        stored = tensors.get(f"{gguf_name(module)}.{part}")
        if stored is None or stored.shape != tuple(parameter.shape):
            found = "missing" if stored is None else f"of shape {stored.shape}"
            raise InputError(
                f"{path} has {gguf_name(module)}.{part} {found}, expected {tuple(parameter.shape)} for {source.path}; "
                "name the model that it was made of"
            )
        order = row_order(module, source.shape)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(stored if order is None else stored[np.argsort(order)]))
    return model
