"""Width: the residual stream and the channels of the feed-forward part become narrower by the same share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cotune.compression.calibration import LayerProgress
from cotune.compression.channels import Channels
from cotune.compression.hidden_size import HiddenSize
from cotune.compression.pruner import Amount, Facts


@dataclass(frozen=True, kw_only=True)
class Width:
    """`HiddenSize`, then `Channels`, which repairs with what the narrower stream still holds. Heads stay."""

    hidden_size: HiddenSize = field(default_factory=HiddenSize)
    channels: Channels = field(default_factory=Channels)

    def prune(
        self,
        model: PreTrainedModel,
        amount: Amount,
        input_ids: NDArray[np.int64] | None,
        *,
        skip: Collection[str] = (),
        batch_size: int = 4,
        on_layer: Callable[[LayerProgress], None] | None = None,
    ) -> Facts:
        """See `Pruner`. `amount` is a share of either size."""
        facts: dict[str, object] = {}
        for part in (self.hidden_size, self.channels):
            facts |= part.prune(model, amount, input_ids, skip=skip, batch_size=batch_size, on_layer=on_layer)
        return facts
