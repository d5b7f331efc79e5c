"""IA3 (Liu et al., arXiv 2205.05638) through peft: a few activations are scaled.

They are keys, values and what enters the feed-forward's last layer. A vector for each of these layers starts at one, so
that a fresh adapter is exactly the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.models.adapters import has_transposed_weights
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter


@dataclass(frozen=True, kw_only=True)
class Ia3:
    """Scales of the layers that peft names for the architecture."""

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> PeftAdapter:
        """All scales one.

        Raises:
            InputError: peft does not know the architecture.
        """
        import peft

        config = peft.IA3Config(
            task_type=peft.TaskType.CAUSAL_LM, fan_in_fan_out=has_transposed_weights(backbone.model)
        )
        return PeftAdapter.fresh(backbone.model, config, seed=seed)
