"""The tiny Llama as a GGUF file in float32, for the llama.cpp runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from offline_folders import (
    CONTEXT,
    END,
    EPSILON,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    ROPE_BASE,
    TinyLlama,
)

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(gguf: Any, path: Path, model: TinyLlama) -> None:
    """Write it with the `gguf` package.

    Args:
        gguf: the package.
        path: of the file.
        model: the weights.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"w{i}".encode() for i in range(model.vocab_size)])
    writer.add_token_types([1] * model.vocab_size)
    writer.add_token_merges(["w 0"])
    writer.add_eos_token_id(END)
    ones = np.ones(HIDDEN, np.float32)
    writer.add_tensor("token_embd.weight", model.weights["embed"])
    writer.add_tensor("output.weight", np.ascontiguousarray(model.weights["head"].T))
    writer.add_tensor("output_norm.weight", ones)
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", ones)
        for name, short in _NAMES.items():
            weight = model.weights[f"model.layers.{layer}.{name}"].T
            if short in ("attn_q", "attn_k"):
                weight = _interleaved(weight)
            writer.add_tensor(f"blk.{layer}.{short}.weight", np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _interleaved(weight: Any) -> Any:
    """Rows in llama.cpp's order: the halves of each head's rotation side by side."""
    num_heads = weight.shape[0] // HEAD_DIM
    return weight.reshape(num_heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(weight.shape)
