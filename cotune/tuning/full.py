"""Full fine-tuning: every parameter of the model.

Memory above the model's own weights: a copy of them that is trained, its gradient and AdamW's two means, four times
the weights, and the activations. The model itself stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters, all_names


@dataclass(frozen=True, kw_only=True)
class Full:
    """Every parameter, embeddings too."""

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> SelectedParameters:
        """The model's own values.

        Raises:
            InputError: the model has low-bit weights.
        """
        return SelectedParameters.of(backbone.model, all_names(backbone.model))
