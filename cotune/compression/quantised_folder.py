"""Write a quantised model as a folder that loads like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.model_folder import model_tensors, write_model
from cotune.errors import InputError
from cotune.models.packed_folder import packed_files
from cotune.models.packed_weights import PackedWeight


def save_quantised(
    folder: Path | str, model: PreTrainedModel, packed: Mapping[str, PackedWeight], *, method: str, source: str
) -> str:
    """Write a quantised model; `folder` holds all of it afterwards or does not exist.

    Each whole weight is stored in 16 bits where these hold it exactly.

    Args:
        folder: does not exist yet.
        model: as `quantise` left it.
        packed, method: of its report.
        source: the model that it was made of, see `save_model`.

    Returns:
        The digest of the new backbone.

    Raises:
        InputError: `folder` exists, the weights are no parameters of the model, or the disk refuses.

    Example:
        >>> report = quantise(backbone.model, "rtn")  # doctest: +SKIP
        >>> save_quantised(
        ...     "my-model-int4", backbone.model, report.packed, method=report.method, source="my-model"
        ... )  # doctest: +SKIP
    """
    tensors = model_tensors(model)
    for name, weight in packed.items():
        if name not in tensors or tuple(tensors[name].shape) != weight.shape:
            raise InputError(f"the packed weight {name} {weight.shape} is none of {type(model).__name__}'s weights")
    whole = {name: _narrowed(tensor) for name, tensor in tensors.items() if name not in packed}
    files = packed_files(packed, method=method, whole=save(whole, metadata={"format": "pt"}))

    def write_weights(unfinished: Path) -> None:
        for name, data in files.items():
            (unfinished / name).write_bytes(data)

    num_bytes = sum(len(data) for data in files.values())
    return write_model(folder, model, write_weights, source=source, dtype=model.dtype, num_bytes=num_bytes)


def _narrowed(tensor: Tensor) -> Tensor:
    """In 16 bits if that loses nothing, which is so for what was loaded from 16 bits and not changed since."""
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(torch.float32), tensor):
                return narrow.contiguous()
    return tensor.contiguous()
