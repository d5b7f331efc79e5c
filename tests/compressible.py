"""Small things to compress: a random model, and layers whose inputs are correlated, as real ones are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cotune.compression.calibration import LayerStatistics

VOCAB = 50


def tiny_model(architecture: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A random model of three blocks, the same each time."""
    shape: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def correlated_layer(seed: int, *, num_outputs: int = 12, num_inputs: int = 16) -> tuple[Tensor, LayerStatistics]:
    """A weight, and what it reads: mixtures of a few causes, of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    causes = torch.randn(200, num_inputs // 3, generator=generator)
    mixing = torch.randn(num_inputs // 3, num_inputs, generator=generator)
    sizes = torch.randn(num_inputs, generator=generator).exp()
    inputs = (causes @ mixing + 0.3 * torch.randn(200, num_inputs, generator=generator)) * sizes
    return weight, LayerStatistics.of_inputs(inputs)
