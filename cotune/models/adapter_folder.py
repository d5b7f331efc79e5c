"""The one door from a folder to whatever `cotune tune` wrote there, by what the folder says of itself.

Peft's adapters, bottlenecks, the model's own parameters and whole merged models are attached to a model; a plugin with
a side network stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cotune.errors import InputError
from cotune.models import bottleneck, peft_adapter, selected
from cotune.models.bottleneck import BottleneckAdapter
from cotune.models.low_bit import is_low_bit
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.selected import SelectedParameters
from cotune.models.weights import DTYPES, load_model
from cotune.plugin import Plugin

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Adapter = PeftAdapter | BottleneckAdapter | SelectedParameters
PLUGIN_FILE = "plugin.json"
MODEL_FILE = "config.json"
MARKS: dict[str, Callable[[Path, PreTrainedModel], Adapter | Plugin]] = {
    peft_adapter.CONFIG_FILE: PeftAdapter.load,
    bottleneck.WEIGHTS_FILE: BottleneckAdapter.load,
    selected.WEIGHTS_FILE: SelectedParameters.load,
    PLUGIN_FILE: lambda folder, model: Plugin.load(folder),
}
"""The file that tells what a folder holds, and what reads it."""


def load_result(folder: Path, model: PreTrainedModel) -> Adapter | Plugin:
    """Read what any method of `cotune tune` saved, or peft, or a whole merged model; `model` is as before afterwards.

    Args:
        folder: of the result.
        model: that it was tuned on. A plugin is not held against it here: that needs the digests of its backbone.

    Raises:
        InputError: there is nothing of that kind, or more than one, or it does not fit the model.

    Example:
        >>> result = load_result(Path("my-lora"), backbone.model)  # doctest: +SKIP
    """
    found = [mark for mark in MARKS if (folder / mark).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} holds {' and '.join(found)}, expected one of them; remove the others")
    if found:
        return MARKS[found[0]](folder, model)
    # Last: an adapter's folder may hold the config of its model too.
    if (folder / MODEL_FILE).is_file():
        return load_merged(folder, model)
    raise InputError(
        f"{folder} holds no adapter, expected one of {', '.join([*MARKS, MODEL_FILE])} in it; make one with cotune tune"
    )


def load_adapter(folder: Path, model: PreTrainedModel) -> Adapter:
    """As `load_result`, of what can be attached to the model.

    Raises:
        InputError: as there, or it is a plugin.
    """
    found = load_result(folder, model)
    if isinstance(found, Plugin):
        raise InputError(
            f"{folder} is a plugin, which stands beside a model, expected an adapter; use it with cotune device"
        )
    return found


def load_merged(folder: Path, model: PreTrainedModel) -> SelectedParameters:
    """A whole model of the same shape as `model`, as the parameters in which it differs; others are the model's own.

    The folder's model is in memory for a moment.

    Raises:
        InputError: it cannot be loaded, is of another shape, or `model` has low-bit weights.
    """
    if is_low_bit(model):
        raise InputError(
            f"{folder} is a whole model and the one that it is put on has low-bit weights; load that without base bits"
        )
    own = dict(model.named_parameters())
    number_type = next(name for name, dtype in DTYPES.items() if dtype == next(iter(own.values())).dtype)
    whole = load_model(folder, dtype=number_type, device=str(model.device))
    theirs = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    if {n: p.shape for n, p in theirs.items()} != {n: p.shape for n, p in own.items()}:
        raise InputError(
            f"{folder} is a whole {type(whole).__name__} of another shape than this {type(model).__name__}; "
            "take the model that it was tuned on"
        )
    return SelectedParameters(
        params={name: own[name].detach() if torch.equal(theirs[name], own[name]) else theirs[name] for name in theirs}
    )
