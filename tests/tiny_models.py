"""Real backbones that are small and random, with a tokenizer made on the spot, and random plugins for any backbone."""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.data.assistant_text import generate_exchanges
from cotune.device.runtime import Device
from cotune.generation.gate import Gate
from cotune.models.attention_ladder import AttentionLadder, AttentionLadderConfig
from cotune.models.backbone import Backbone
from cotune.models.side_network import SideNetwork
from cotune.models.tap_ladder import TapLadder, TapLadderConfig
from cotune.plugin import Plugin
from cotune.tuning.plugin_folder import build_plugin
from cotune.wire.codec import dequantise
from cotune.wire.features import SequenceFeatures
from cotune.wire.transport import Connection

VOCAB, CONTEXT = 400, 128
_COMMON = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "intermediate_size": 40,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        **_COMMON,
    },
    "gpt2": {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, **_COMMON},
}


@cache
def tokenizer_json() -> bytes:
    """A byte-level BPE tokenizer trained on a few generated texts; prompts begin with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{exchange.request}\n{exchange.answer}" for exchange in generate_exchanges(60, seed=0)]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer.to_str().encode()


def tiny_backbone(architecture: str, seed: int = 0) -> Backbone:
    """A random model of that architecture, a new object each time, the same weights for the same seed."""
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        # The usual initial values are so small that every architecture is nearly the identity.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    return Backbone.from_model(model, tokenizer_json())


def save_tiny(folder: Path) -> Path:
    """A tiny Llama with its tokenizer in a folder, as a user has a model."""
    tiny_backbone("llama").model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def untrained_ladder(backbone: Backbone, seed: int = 0) -> TapLadder:
    """A side network as training begins with: its head is zero."""
    description = backbone.description
    shape = TapLadderConfig(
        num_taps=description.num_taps,
        tap_dim=description.tap_dim,
        basis_dim=description.basis_dim,
        side_width=16,
        inner_width=24,
    )
    return TapLadder(shape, torch.Generator().manual_seed(seed)).eval()


def untrained_attention(backbone: Backbone, seed: int = 0) -> AttentionLadder:
    """One with a memory, of a window that is shorter than many prompts and texts."""
    description = backbone.description
    shape = AttentionLadderConfig(
        num_taps=description.num_taps,
        tap_dim=description.tap_dim,
        basis_dim=description.basis_dim,
        side_width=16,
        ff_width=12,
        head_dim=8,
        context=9,
        prompt_window=5,
    )
    return AttentionLadder(shape, torch.Generator().manual_seed(seed)).eval()


def plugin_of(backbone: Backbone, network: SideNetwork, gate: Gate | None, family: str = "parallel") -> Plugin:
    """Bind a side network to a backbone."""
    description = backbone.description
    return build_plugin(
        network,
        gate,
        family=family,
        backbone_digest=description.backbone_digest,
        projections_digest=description.projections_digest,
        tokenizer_digest=description.tokenizer_digest,
        tokenizer_json=backbone.tokenizer_json,
        output_basis=backbone.output_basis,
    )


def untrained_plugin(backbone: Backbone, family: str = "parallel") -> Plugin:
    """A plugin whose side network changes nothing, with a gate that fires at about half of the positions."""
    return plugin_of(backbone, untrained_ladder(backbone), gate_for(backbone), family)


def random_plugin(
    backbone: Backbone, ratio: float, seed: int = 0, family: str = "parallel", *, remembers: bool = False
) -> Plugin:
    """A random side network whose delta is `ratio` times as large as the base logits, as standard deviations go."""
    network = untrained_attention(backbone, seed) if remembers else untrained_ladder(backbone, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    features = probe(backbone)
    taps = torch.from_numpy(dequantise(features.tap_codes, features.tap_scales))
    with torch.no_grad():
        network.head_weight.normal_(generator=generator)
        delta = (network(taps) @ torch.from_numpy(backbone.output_basis.matrix()).T).numpy()
        network.head_weight.mul_(ratio * float(features.top_logits.std(axis=1).mean() / delta.std(axis=1).mean()))
    return plugin_of(backbone, network, gate_for(backbone, seed), family)


def gate_for(backbone: Backbone, seed: int = 0) -> Gate:
    """A random gate that fires at about half of the positions of a probe."""
    weight = np.random.default_rng(seed).standard_normal(backbone.spec.hidden_size).astype(np.float32)
    hidden = probe(backbone).hidden.astype(np.float32)
    return Gate(weight=weight, threshold=float(np.median((hidden * weight).sum(axis=1))))


@lru_cache(maxsize=4)
def probe(backbone: Backbone) -> SequenceFeatures:
    """What a backbone says of a random text; asked once, for the many plugins of a test."""
    return backbone.features(probe_ids(backbone), 1, top_k=backbone.spec.vocab_size)


def probe_ids(backbone: Backbone, num: int = 40) -> np.ndarray:
    return np.random.default_rng(5).integers(2, backbone.spec.vocab_size, num)


def device_for(plugin: Plugin) -> Device:
    """A device that has nowhere to connect to: for its NumPy side network, and the reference engine."""

    async def nowhere() -> Connection:
        raise AssertionError("this device has no cloud")

    return Device(plugin, nowhere)
