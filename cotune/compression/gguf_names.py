"""What GGUF calls the tensors of the Llama family, and in which order it wants the rows of queries and keys.

transformers rotates the first half of a head against the second; llama.cpp's architecture `llama` rotates neighbours,
so that rows of q and k, and of the B of their adapters, go from (half, pair) to (pair, half). Its `qwen2` rotates
halves.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from cotune.compression.llama_folder import EMBEDDING, FINAL_NORM, HEAD, LlamaShape

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2"}
"""llama.cpp's architecture for each of transformers'."""

_MODULES = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def gguf_name(module: str) -> str:
    """The name of a module.

    Example:
        >>> gguf_name("model.layers.3.self_attn.q_proj"), gguf_name("lm_head")
        ('blk.3.attn_q', 'output')
    """
    found = _LAYER.fullmatch(module)
    return f"blk.{found[1]}.{_LAYER_MODULES[found[2]]}" if found else _MODULES[module]


def row_order(module: str, shape: LlamaShape) -> NDArray[np.int64] | None:
    """Which row of transformers' weight, bias or B each row of GGUF's is, int64 (out,); None where they are the same.

    Example:
        >>> from cotune.compression.llama_folder import LlamaFolder
        >>> row_order("model.layers.0.self_attn.k_proj", LlamaFolder("starter").shape)[:4]
        array([ 0, 16,  1, 17])
    """
    if ARCHITECTURES[shape.architecture] != "llama":
        return None
    heads = {"q_proj": shape.num_heads, "k_proj": shape.num_kv_heads}.get(module.rpartition(".")[2])
    if heads is None:
        return None
    rows = np.arange(heads * shape.head_dim).reshape(heads, 2, shape.head_dim // 2)
    return rows.swapaxes(1, 2).reshape(-1)
