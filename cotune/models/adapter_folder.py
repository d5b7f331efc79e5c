"""From a folder to whatever was tuned and saved there: peft adapters, bottlenecks, the model's own parameters."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models import bottleneck, peft_adapter, selected
from cotune.models.bottleneck import BottleneckAdapter
from cotune.models.peft_adapter import PeftAdapter
from cotune.models.selected import SelectedParameters

MARKS: dict[str, type[PeftAdapter] | type[BottleneckAdapter] | type[SelectedParameters]] = {
    peft_adapter.CONFIG_FILE: PeftAdapter,
    bottleneck.WEIGHTS_FILE: BottleneckAdapter,
    selected.WEIGHTS_FILE: SelectedParameters,
}
"""The file that tells what a folder holds."""


def load_adapter(folder: Path, model: PreTrainedModel) -> PeftAdapter | BottleneckAdapter | SelectedParameters:
    """Read what one of the tuning methods saved; `model` is as before afterwards.

    Raises:
        InputError: there is nothing of that kind, or more than one, or it does not fit the model.
    """
    found = [mark for mark in MARKS if (folder / mark).is_file()]
    if len(found) > 1:
        raise InputError(f"{folder} holds {' and '.join(found)}, expected one of them; remove the others")
    if found:
        return MARKS[found[0]].load(folder, model)
    raise InputError(f"{folder} holds no adapter, expected one of {', '.join(MARKS)} in it; make one with cotune tune")
