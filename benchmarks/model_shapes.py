"""Shapes of known models, to be filled with random weights, and how many numbers each way to personalise them trains.

A shape decides times and bytes; weights do not. What does not change either, such as the base of the rotary
embedding, is left at its default.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from split_layers import LayerShape
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cotune.errors import InputError
from cotune.evaluation.model_shape import KNOWN_CONFIGS, plain_config
from cotune.models.anatomy import attention_shape
from cotune.models.spa_ladder import SpaLadder, SpaLadderConfig
from cotune.models.tap_ladder import TapLadderConfig

_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # of the tokenizer of `starter`
DEVICE_CONFIGS: dict[str, dict[str, object]] = {
    "1m": plain_config("llama", 128, 384, 4, 4, 2, 2048, 2048, tie_word_embeddings=True, **_ENDS),
    "25m": plain_config("llama", 384, 1024, 12, 6, 2, 16_384, 2048, tie_word_embeddings=True, **_ENDS),
    "151m": plain_config("llama", 768, 2048, 16, 12, 4, 32_768, 2048, **_ENDS),
    "600m": plain_config("llama", 1280, 3456, 32, 20, 4, 32_768, 2048, tie_word_embeddings=True, **_ENDS),
}
"""Shapes that small devices may hold, of no published model, by their number of parameters."""


def named_config(name: str) -> PreTrainedConfig:
    """The config of one of `KNOWN_CONFIGS` or `DEVICE_CONFIGS`.

    Raises:
        InputError: an unknown name.
    """
    configs = {**KNOWN_CONFIGS, **DEVICE_CONFIGS}
    if name not in configs:
        known = ", ".join(configs)
        raise InputError(f"shape is {name!r}, expected one of {known}; give another one as --config FILE")
    return AutoConfig.for_model(**configs[name])


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
