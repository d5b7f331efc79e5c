"""Biases and norms only (BitFit, Zaken et al., arXiv 2106.10199).

Llama-like models have no biases; their norms' weights are tuned, which BitFit leaves alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.models.selected import SelectedParameters, bias_and_norm_names


@dataclass(frozen=True, kw_only=True)
class BiasAndNorms:
    """Every bias, and every parameter of a norm layer."""

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> SelectedParameters:
        """The model's own values.

        Raises:
            InputError: the model has neither.
        """
        return SelectedParameters.of(backbone.model, bias_and_norm_names(backbone.model))
