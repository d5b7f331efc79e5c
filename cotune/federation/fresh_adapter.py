"""The adapter that a run tunes, of the kind that its settings name."""

from __future__ import annotations

import numpy as np
import torch

from cotune.errors import InputError
from cotune.federation.arrays import Arrays
from cotune.federation.settings import AdapterSettings
from cotune.models.adapters import LoraAdapter, LoraShape, check_inner_width
from cotune.models.backbone import Backbone
from cotune.tuning.attached import Tunable
from cotune.tuning.prefix import Prefix


def fresh_adapter(own: AdapterSettings, backbone: Backbone, *, seed: int) -> Tunable:
    """Before any start of its own: it changes nothing yet, or little in the case of a prefix.

    Raises:
        InputError: it does not fit the model.
    """
    if own.kind == "prefix":
        # Both sizes are refused before room for them is taken.
        if own.virtual_tokens >= backbone.spec.max_context:
            raise InputError(
                f"adapter.virtual_tokens is {own.virtual_tokens}, expected fewer than the {backbone.spec.max_context} "
                "positions of the model's context, so that a text fits beside them"
            )
        return Prefix(num_virtual_tokens=own.virtual_tokens).fresh(backbone, [], seed=seed)
    check_inner_width(backbone.model, "adapter.rank", own.rank)
    shape = LoraShape(rank=own.rank, alpha=own.alpha, targets=own.targets, use_rslora=own.scale == "rslora")
    return LoraAdapter.fresh(backbone.model, shape, seed=seed)


def trained_adapter(fresh: Tunable, arrays: Arrays) -> Tunable:
    """The adapter with the numbers of a federation, which can be attached and saved.

    Args:
        fresh: of `fresh_adapter`, for the same settings.
        arrays: by its names.
    """
    return fresh.trained({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()})
