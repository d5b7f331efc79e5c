"""A device's own model in co-tuning, with what it has learnt: in memory, and as a folder for any use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotune.durable import new_folder
from cotune.errors import InputError, MismatchError
from cotune.federation.catch_up import under
from cotune.federation.causal_model import CausalModel
from cotune.federation.device_store import DeviceStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL = "small/"
"""Of its parameters in a device's store."""


@contextmanager
def loaded_with(model: CausalModel, weights: Mapping[str, Tensor], *, of: Path) -> Iterator[PreTrainedModel]:
    """The model with these parameters, for as long as the block.

    Args:
        model: as it was given.
        weights: all of its parameters by name; none: as it was given.
        of: where they come from.

    Raises:
        MismatchError: they are of another model.
    """
    with model.loaded() as loaded:
        parameters = dict(loaded.named_parameters())
        if weights and {n: p.shape for n, p in parameters.items()} != {n: t.shape for n, t in weights.items()}:
            raise MismatchError(
                f"{of} is of another small model than {model.name}; give that model, or an empty folder"
            )
        with torch.no_grad():
            for name, value in weights.items():
                parameters[name].copy_(value)
        yield loaded


def save_small_model(model: CausalModel, store: DeviceStore, run_id: str, folder: Path) -> None:
    """Write a device's model as it is after its last round, as a folder that transformers loads, whole or not at all.

    Args:
        model: as it was given.
        store: of the device.
        run_id: of the run.
        folder: nothing is there yet, or an empty folder.

    Raises:
        InputError: the device has not done a round of this run, or the folder cannot be written.
        MismatchError: the store is of another model.
    """
    known = store.last(run_id)
    if known is None:
        raise InputError(f"{store.folder} has no round of run {run_id}, expected one; run a round first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with loaded_with(model, under(SMALL, known), of=store.folder) as loaded, new_folder(folder) as unfinished:
            loaded.save_pretrained(unfinished, safe_serialization=True)
            (unfinished / "tokenizer.json").write_bytes(model.tokenizer_json)
    except OSError as error:
        raise InputError(f"the small model cannot be written to {folder}: {error.strerror or error}") from error
