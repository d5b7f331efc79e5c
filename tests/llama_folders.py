"""Tiny random models of the Llama family as folders, with the byte-level tokenizer of the other tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import VOCAB, tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 64
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


def random_llama(kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model whose logits differ by much more than roundings do."""
    # The heads of a Qwen2 are together as wide as its residual stream.
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1} if kind == "qwen2" else {}
    config = AutoConfig.for_model(kind, **{**_SHAPE, **heads, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            # Norms and biases too: what is left out of a graph must show.
            torch.nn.init.normal_(parameter, mean=float(name.endswith("norm.weight")), std=0.3)
    return model.eval().requires_grad_(False)


def save_llama(folder: Path, kind: str = "llama", **changes: Any) -> PreTrainedModel:
    """Write `random_llama` as a folder; the model."""
    model = random_llama(kind, **changes)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return model
