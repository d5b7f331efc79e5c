"""Soft prompts (Lester et al., arXiv 2104.08691) through peft: trained embeddings in front of the text.

They take positions of the context. The start is the embeddings of tokens drawn from the vocabulary, which the paper
finds better than random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter


@dataclass(frozen=True, kw_only=True)
class SoftPrompt:
    """A soft prompt."""

    num_virtual_tokens: int = 20
    """Embeddings in front of the text."""

    def __post_init__(self) -> None:
        check_num_virtual_tokens(self.num_virtual_tokens)

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> PeftAdapter:
        """Embeddings of random tokens."""
        import peft

        config = peft.PromptTuningConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_tuning_init=peft.PromptTuningInit.SAMPLE_VOCAB,
        )
        return PeftAdapter.fresh(backbone.model, config, seed=seed)


def check_num_virtual_tokens(num_virtual_tokens: int) -> None:
    """Refuse an empty prompt.

    Raises:
        InputError: it is empty.
    """
    if num_virtual_tokens < 1:
        raise InputError(f"num_virtual_tokens is {num_virtual_tokens}, expected at least 1")
