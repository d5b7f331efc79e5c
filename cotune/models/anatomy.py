"""What a causal language model of transformers is made of, as far as cotune needs to know."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from cotune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """What a backbone is.

    Attributes:
        name: the word or path that it was loaded by, for people.
        architecture: its class in transformers.
        hidden_size, num_layers: width of the residual stream, and how many decoder layers write to it.
        vocab_size: rows of the output embedding.
        max_context: the most tokens that one sequence may have.
        eos_token_ids: tokens that end a text.
        bos_token_id: the token that starts a text, where the model has one.
        pad_token_id: fills short rows of a batch.
        backbone_digest, tokenizer_digest: SHA-256, hex.
        num_parameters: numbers in the model, tied ones once.
    """

    name: str
    architecture: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None
    pad_token_id: int
    backbone_digest: str
    tokenizer_digest: str
    num_parameters: int


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers, first to last.

    Raises:
        InputError: an architecture without such a list.
    """
    expected = model.config.num_hidden_layers
    for child in model.base_model.children():
        if isinstance(child, nn.ModuleList) and len(child) == expected:
            return child
    raise InputError(
        f"{type(model).__name__} is not supported: no list of {expected} decoder layers in it; "
        "take a decoder-only model such as Llama, Qwen, Mistral, Gemma or GPT-2"
    )


def output_embedding(model: PreTrainedModel) -> nn.Linear:
    """The language-model head.

    Raises:
        InputError: it is not linear, or the model has layers without attention, whose state cannot be cut back.
    """
    from transformers import DynamicCache

    head = model.get_output_embeddings()
    caches = DynamicCache(config=model.config)
    if not isinstance(head, nn.Linear) or any(caches.is_linear):
        raise InputError(
            f"{type(model).__name__} is not supported: it needs a linear output embedding and attention in every "
            "layer; take a decoder-only model such as Llama, Qwen, Mistral, Gemma or GPT-2"
        )
    return head


def num_multiplying(model: PreTrainedModel) -> int:
    """Parameters without those of the input embedding, which multiply nothing: rows of it are looked up.

    Example:
        >>> num_multiplying(backbone.model)  # doctest: +SKIP
    """
    embedding: Any = model.get_input_embeddings()
    return int(sum(each.numel() for each in model.parameters()) - embedding.weight.numel())


def attention_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Heads, key-value heads and head dimension of a layer, of this rank where several share the model."""
    config = model.config.get_text_config()
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    num_ranks = model.tp_size or 1
    return heads // num_ranks, kv_heads // num_ranks, int(head_dim)


def describe(model: PreTrainedModel, head: nn.Linear, tokenizer_json: bytes, *, name: str, digest: str) -> BackboneSpec:
    """The spec of a loaded model with its output embedding `head`."""
    config = model.config
    # generation_config.json knows all end tokens of a chat model, config.json often only one.
    eos = model.generation_config.eos_token_id if model.generation_config is not None else None
    eos = config.eos_token_id if eos is None else eos
    eos_token_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pad = config.pad_token_id
    return BackboneSpec(
        name=name,
        architecture=type(model).__name__,
        hidden_size=head.in_features,
        num_layers=config.num_hidden_layers,
        vocab_size=head.out_features,
        max_context=config.max_position_embeddings,
        eos_token_ids=eos_token_ids,
        bos_token_id=config.bos_token_id,
        pad_token_id=pad if pad is not None and 0 <= pad < head.out_features else 0,
        backbone_digest=digest,
        tokenizer_digest=hashlib.sha256(tokenizer_json).hexdigest(),
        # Of low-bit weights several share a stored number.
        num_parameters=int(model.num_parameters()),
    )
