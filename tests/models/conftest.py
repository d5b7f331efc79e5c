"""Tiny random models of every supported architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cotune.models import Backbone

VOCAB = 61
HIDDEN = 24
LAYERS = 3
CONTEXT = 40
WINDOW = 6

_LLAMA_LIKE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": {**_LLAMA_LIKE, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": _LLAMA_LIKE,
    "mistral": {**_LLAMA_LIKE, "sliding_window": WINDOW},
    "gemma": _LLAMA_LIKE,
    "gemma2": {**_LLAMA_LIKE, "sliding_window": WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
    "gemma3_text": {**_LLAMA_LIKE, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": LAYERS,
        "n_head": 4,
        "n_positions": CONTEXT,
        "vocab_size": VOCAB,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def build_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A random model of the given type, the same each time."""
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # The usual initial values are so small that every architecture is nearly the identity.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A byte-like tokenizer of VOCAB words."""
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer.to_str().encode()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def backbone(request: pytest.FixtureRequest, tokenizer_json: bytes) -> Backbone:
    """A backbone of each architecture, with random projections."""
    return Backbone.from_model(build_model(request.param), tokenizer_json)


@pytest.fixture(scope="session")
def llama(tokenizer_json: bytes) -> Backbone:
    return Backbone.from_model(build_model("llama"), tokenizer_json)


@pytest.fixture(scope="session")
def token_ids() -> NDArray[np.int64]:
    """A sequence three windows long."""
    return np.random.default_rng(0).integers(3, VOCAB, 3 * WINDOW + 3)
