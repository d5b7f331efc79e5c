"""P-tuning (Liu et al., arXiv 2103.10385) through peft: a soft prompt that a small MLP makes while it is trained.

What is saved is the prompt that came out; the MLP is not needed any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter
from cotune.tuning.soft_prompt import check_num_virtual_tokens


@dataclass(frozen=True, kw_only=True)
class PTuning:
    """A soft prompt with an encoder."""

    num_virtual_tokens: int = 20
    """Embeddings in front of the text."""

    def __post_init__(self) -> None:
        check_num_virtual_tokens(self.num_virtual_tokens)

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> PeftAdapter:
        """Random embeddings and a random MLP of the model's width."""
        import peft

        config = peft.PromptEncoderConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            num_virtual_tokens=self.num_virtual_tokens,
            encoder_hidden_size=backbone.spec.hidden_size,
        )
        return PeftAdapter.fresh(backbone.model, config, seed=seed)
