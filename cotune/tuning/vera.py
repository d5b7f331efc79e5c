"""VeRA (Kopiczko et al., arXiv 2310.11454) through peft: one frozen random A and B for all layers, scaled by vectors.

    y = W x + b * (B (d * (A x)))

Symbols: d (rank,) starts at 0.1 and b (out,) at zero, so that a fresh adapter is exactly the base model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.adapters import check_inner_width, has_transposed_weights, linear_targets
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter


@dataclass(frozen=True, kw_only=True)
class Vera:
    """Scales of shared random matrices, on every linear layer but the output embedding."""

    rank: int = 64
    """Of the shared matrices."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank is {self.rank}, expected at least 1")

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> PeftAdapter:
        """Matrices by the seed; they are saved with the scales.

        Raises:
            InputError: a rank beyond the model's widest layer.
        """
        import peft

        check_inner_width(backbone.model, "rank", self.rank)
        config = peft.VeraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=self.rank,
            target_modules=list(linear_targets(backbone.model)),
            projection_prng_key=seed,
            save_projection=True,
            fan_in_fan_out=has_transposed_weights(backbone.model),
        )
        return PeftAdapter.fresh(backbone.model, config, seed=seed)
