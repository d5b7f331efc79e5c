"""Write a whole model as a folder that loads like any other, there completely or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from cotune.durable import new_sized_folder
from cotune.errors import InputError
from cotune.models.projections import FILE_NAME as PROJECTIONS_FILE
from cotune.models.weights import DTYPES, digest_folder, find_model_folder

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""What a model folder has beside weights and configs, and what compression leaves as it is."""


def save_model(folder: Path | str, model: PreTrainedModel, *, source: str, dtype: str | None = None) -> str:
    """Write a model; `folder` holds all of it afterwards or does not exist.

    Tokenizer and chat template come from `source`; its projections too, where they still fit: where layers and hidden
    size are as there.

    Args:
        folder: does not exist yet.
        model: with whole weights, in memory.
        source: the model that it was made of: a folder, a hub name or `starter`.
        dtype: `float32`, `bfloat16` or `float16`, of the weights in the file. None takes 16 bits where these hold every
            number of the model exactly, else the model's own, so that the folder loads to the same model.

    Returns:
        The digest of the new backbone.

    Raises:
        InputError: `folder` exists, an unknown dtype, or the disk refuses.

    Example:
        >>> prune(backbone.model, "depth", 2, texts)  # doctest: +SKIP
        >>> save_model("my-model-6-blocks", backbone.model, source="my-model")  # doctest: +SKIP
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}, or none")
    tensors = model_tensors(model)
    stored_as = DTYPES[dtype] if dtype is not None else _exact_dtype(model, tensors)
    tensors = {name: _stored(tensor, stored_as) for name, tensor in tensors.items()}

    def write_weights(unfinished: Path) -> None:
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})

    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    return write_model(folder, model, write_weights, source=source, dtype=stored_as, num_bytes=num_bytes)


def write_model(
    folder: Path | str,
    model: PreTrainedModel,
    write_weights: Callable[[Path], None],
    *,
    source: str,
    dtype: torch.dtype,
    num_bytes: int,
) -> str:
    """As `save_model`, with weights in whatever files `write_weights` writes into the folder that it is given.

    Args:
        dtype: that the config says of the weights.
        num_bytes: of these files, about.
    """
    folder = Path(folder)
    source_folder = find_model_folder(source)
    try:
        with new_sized_folder(folder, num_bytes=num_bytes) as unfinished:
            write_weights(unfinished)
            _save_configs(model, dtype, unfinished)
            for name in _companions(model, source_folder):
                shutil.copyfile(source_folder / name, unfinished / name)
    except SafetensorError as error:
        raise InputError(f"{folder} cannot be written: {error}; nothing is left of it") from error
    return digest_folder(folder)


def model_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a file holds, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if name not in tied}


def _exact_dtype(model: PreTrainedModel, tensors: dict[str, Tensor]) -> torch.dtype:
    """The first of bfloat16, float16 and the model's own number type that holds all weights as they are."""
    own: torch.dtype = model.dtype
    for narrow in (torch.bfloat16, torch.float16):
        if all(torch.equal(t.to(narrow).to(t.dtype), t) for t in tensors.values() if t.is_floating_point()):
            return narrow
    return own


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _save_configs(model: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    config = model.config
    before = config.dtype
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    try:
        (folder / "config.json").write_text(config.to_json_string() + "\n", encoding="utf-8")
    finally:
        config.dtype = before
    if model.generation_config is not None:
        (folder / "generation_config.json").write_text(
            model.generation_config.to_json_string() + "\n", encoding="utf-8"
        )


def _companions(model: PreTrainedModel, source: Path) -> list[str]:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    new = model.config.to_dict()
    is_same_shape = all(config.get(key) == new.get(key) for key in ("hidden_size", "num_hidden_layers"))
    names = [*TOKENIZER_FILES, *([PROJECTIONS_FILE] if is_same_shape else [])]
    return [name for name in names if (source / name).is_file()]
