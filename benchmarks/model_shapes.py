"""Shapes of known models, to be filled with random weights, and how many numbers each way to personalise them trains.

A shape decides times and bytes; weights do not. What does not change either, such as the base of the rotary
embedding, is left at its default.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from split_layers import LayerShape
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cotune.errors import InputError
from cotune.models.anatomy import attention_shape
from cotune.models.spa_ladder import SpaLadder, SpaLadderConfig
from cotune.models.tap_ladder import TapLadderConfig


def _shape(
    model_type: str,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    context: int,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
        "tie_word_embeddings": tied,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": _shape("llama", 4096, 11008, 32, 32, 32, 32_000, 2048),
    "llama-13b": _shape("llama", 5120, 13_824, 40, 40, 40, 32_000, 2048),
    "llama-3-8b": _shape("llama", 4096, 14_336, 32, 32, 8, 128_256, 8192),
    "mistral-7b": {**_shape("mistral", 4096, 14_336, 32, 32, 8, 32_000, 32_768), "sliding_window": None},
    "qwen2.5-0.5b": _shape("qwen2", 896, 4864, 24, 14, 2, 151_936, 32_768, tied=True),
    "qwen2.5-1.5b": _shape("qwen2", 1536, 8960, 28, 12, 2, 151_936, 32_768, tied=True),
    "qwen2.5-7b": _shape("qwen2", 3584, 18_944, 28, 28, 4, 152_064, 32_768),
    "tinyllama-1.1b": _shape("llama", 2048, 5632, 22, 32, 4, 32_000, 2048),
}


def named_config(name: str) -> PreTrainedConfig:
    """The config of one of `SHAPES`.

    Raises:
        InputError: an unknown name.
    """
    if name not in SHAPES:
        raise InputError(f"shape is {name!r}, expected one of {', '.join(SHAPES)}; give another one as --config FILE")
    settings = dict(SHAPES[name])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def read_config(path: Path) -> PreTrainedConfig:
    """The config in a `config.json` of transformers; no code of it is run.

    Raises:
        InputError: there is none, or it is of no known kind.
    """
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is no config of transformers ({reason}); give the config.json of a model") from error


def with_layers(config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same shape with other than its own number of layers.

    Raises:
        InputError: less than one layer, or more than it has.
    """
    if not 1 <= num_layers <= config.num_hidden_layers:
        raise InputError(f"layers is {num_layers}, expected 1 to {config.num_hidden_layers}")
    cut = copy.deepcopy(config)
    cut.num_hidden_layers = num_layers
    if getattr(cut, "layer_types", None):
        cut.layer_types = cut.layer_types[:num_layers]
    return cut


def random_model(config: PreTrainedConfig, device: str, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model with random weights, made where it stays and in its number type; on `meta` it has none."""
    place = torch.device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []), place:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def num_parameters(config: PreTrainedConfig) -> int:
    """Numbers in a model of this shape, tied ones once."""
    return sum(p.numel() for p in random_model(config, "meta", torch.float32, 0).parameters())


def layer_shape(config: PreTrainedConfig) -> LayerShape:
    """What low-rank modules on a device have to fit."""
    heads, kv_heads, head_dim = attention_shape(random_model(with_layers(config, 1), "meta", torch.float32, 0))
    return LayerShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        q_width=heads * head_dim,
        kv_width=kv_heads * head_dim,
    )


def num_lora(shape: LayerShape, rank: int) -> int:
    """Numbers of LoRA on q, k and v of all layers."""
    widths = (shape.q_width, shape.kv_width, shape.kv_width)
    return shape.num_layers * sum(rank * (shape.hidden_size + width) for width in widths)


def num_adapter(shape: LayerShape, bottleneck: int) -> int:
    """Numbers of adapters after attention and MLP of all layers."""
    return shape.num_places("adapter") * (2 * shape.hidden_size * bottleneck + bottleneck + shape.hidden_size)


def num_spa_ladder(shape: LayerShape, side_width: int = 32) -> int:
    """Numbers of the side network as published with SPA."""
    config = SpaLadderConfig(num_taps=shape.num_layers + 1, hidden_size=shape.hidden_size, side_width=side_width)
    with torch.device("meta"):
        return sum(p.numel() for p in SpaLadder(config).parameters())


def num_tap_ladder(config: TapLadderConfig, gate_width: int = 0) -> int:
    """Numbers of our side network, and of a gate that reads `gate_width` numbers."""
    return config.num_parameters + (gate_width + 1 if gate_width else 0)
