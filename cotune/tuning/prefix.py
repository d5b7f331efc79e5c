"""Prefix tuning (Li and Liang, arXiv 2101.00190) through peft: trained keys and values in front of each layer's.

They take positions of the context. The start is the keys and values of tokens drawn from the vocabulary, as in MeZO's
experiments (arXiv 2305.17333, appendix), without the paper's MLP; random numbers are a start from which small models
do not recover.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cotune.data.batches import EncodedExample
from cotune.models.backbone import Backbone
from cotune.models.peft_adapter import PeftAdapter
from cotune.tuning.soft_prompt import check_num_virtual_tokens


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """A prefix of keys and values."""

    num_virtual_tokens: int = 20
    """Positions in front of the text."""

    def __post_init__(self) -> None:
        check_num_virtual_tokens(self.num_virtual_tokens)

    def fresh(self, backbone: Backbone, examples: Sequence[EncodedExample], *, seed: int) -> PeftAdapter:
        """Keys and values of random tokens."""
        import peft

        config = peft.PrefixTuningConfig(task_type=peft.TaskType.CAUSAL_LM, num_virtual_tokens=self.num_virtual_tokens)
        adapter = PeftAdapter.fresh(backbone.model, config, seed=seed)
        (name,) = adapter.params
        return adapter.trained({name: _keys_and_values(backbone, self.num_virtual_tokens, seed).to(torch.float32)})


@torch.no_grad()
def _keys_and_values(backbone: Backbone, num_tokens: int, seed: int) -> Tensor:
    """Of random tokens: (tokens, layers x 2 x kv_heads x head_dim), keys before values, as peft lays them out."""
    from transformers import DynamicCache

    model = backbone.model
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(backbone.spec.vocab_size, (1, num_tokens), generator=generator)
    cache = DynamicCache()
    model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=True)
    # (2 x layers, kv_heads, tokens, head_dim)
    states = torch.stack([part[0] for layer in cache.layers for part in (layer.keys, layer.values)])
    return states.permute(2, 0, 1, 3).reshape(num_tokens, -1).cpu()
