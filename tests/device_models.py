"""Tiny causal language models of three families, as devices may have: Llama-like, GPT-2-like and recurrent.

The recurrent one is Mamba-2, which transformers has without any code of its own here. Its reference path runs on a CPU.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cotune.models.seeded import seeded

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mamba2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 16,
    },
}


def device_model(family: str, *, vocab_size: int, seed: int = 0) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family, **FAMILIES[family], vocab_size=vocab_size, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    with seeded(seed):
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, PreTrainedModel)
    return model.eval()
