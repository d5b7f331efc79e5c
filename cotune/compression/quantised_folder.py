"""Write a quantised model as a folder that loads like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from cotune.durable import write_folder
from cotune.errors import InputError
from cotune.models.packed_folder import packed_files
from cotune.models.packed_weights import PackedWeight
from cotune.models.weights import digest_folder, find_model_folder

COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "projections.safetensors",
)
"""Files of a model folder that quantising leaves as they are."""


def save_quantised(
    folder: Path | str, model: PreTrainedModel, packed: Mapping[str, PackedWeight], *, method: str, source: str
) -> str:
    """Write a quantised model; `folder` holds all of it afterwards or does not exist.

    Whole weights are stored in 16 bits where these hold them exactly.

    Args:
        folder: does not exist yet.
        model: as `quantise` left it.
        packed, method: of its report.
        source: the model that it was made of, for tokenizer, chat template and the like.

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
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{folder} exists, expected a new folder; choose another place or remove it")
    source_folder = find_model_folder(source)
    whole = save(_whole_tensors(model, packed), metadata={"format": "pt"})
    files = packed_files(packed, method=method, whole=whole)
    files["config.json"] = (model.config.to_json_string() + "\n").encode()
    files |= {name: (source_folder / name).read_bytes() for name in COMPANIONS if (source_folder / name).is_file()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_folder(folder, files)
    except OSError as error:
        raise InputError(f"the model cannot be written to {folder}: {error.strerror or error}") from error
    return digest_folder(folder)


def _whole_tensors(model: PreTrainedModel, packed: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items() if name not in tied}
    for name, weight in packed.items():
        if name not in tensors or tuple(tensors[name].shape) != weight.shape:
            raise InputError(f"the packed weight {name} {weight.shape} is none of {type(model).__name__}'s weights")
    return {name: _narrowed(tensor) for name, tensor in tensors.items() if name not in packed}


def _narrowed(tensor: Tensor) -> Tensor:
    """In 16 bits if that loses nothing, which is so for what was loaded from 16 bits and not changed since."""
    tensor = tensor.cpu().contiguous()
    if tensor.dtype == torch.float32:
        for dtype in (torch.bfloat16, torch.float16):
            narrow = tensor.to(dtype)
            if torch.equal(narrow.to(torch.float32), tensor):
                return narrow
    return tensor
