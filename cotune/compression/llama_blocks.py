"""The parts of a decoder block in Llama's form, and taking rows and columns out of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.models.anatomy import decoder_layers

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Blocks of the form x + O attention(Q, K, V of norm(x)), then x + D (silu(G norm(x)) * U norm(x))."""

MULTIPLE = 32
"""Sizes stay multiples of this, which low-bit kernels with groups of 32 weights need."""


@dataclass(frozen=True)
class LlamaBlock:
    """One block.

    Attributes:
        name: in the model, such as `model.layers.0`.
        query, key, value, output: of attention.
        gate, up, down: of the feed-forward part.
        input_norm, middle_norm: RMSNorm before attention and before the feed-forward part.
    """

    name: str
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    output: nn.Linear
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    input_norm: Any
    middle_norm: Any

    @property
    def readers(self) -> dict[nn.Module, tuple[nn.Linear, ...]]:
        """The layers that read the residual stream, by the norm that they read it through."""
        return {self.input_norm: (self.query, self.key, self.value), self.middle_norm: (self.gate, self.up)}

    @property
    def writers(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers that add to the residual stream."""
        return self.output, self.down


def llama_blocks(model: PreTrainedModel) -> list[LlamaBlock]:
    """The blocks of a model, first to last.

    Raises:
        InputError: another architecture.
    """
    if type(model).__name__ not in ARCHITECTURES:
        raise InputError(
            f"{type(model).__name__} cannot be made narrower, expected one of {', '.join(ARCHITECTURES)}; "
            "drop whole blocks with depth instead"
        )
    names = {module: name for name, module in model.named_modules()}
    return [_block(names[layer], layer) for layer in decoder_layers(model)]


def _block(name: str, layer: Any) -> LlamaBlock:
    attention, mlp = layer.self_attn, layer.mlp
    return LlamaBlock(
        name,
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(mlp.gate_proj, mlp.up_proj, mlp.down_proj),
        *(layer.input_layernorm, layer.post_attention_layernorm),
    )


def keep_rows(linears: Iterable[nn.Linear], rows: Tensor) -> None:
    """Let layers put out these numbers only; biases follow."""
    for linear in linears:
        set_weight(linear, linear.weight.detach()[rows])
        if linear.bias is not None:
            linear.bias = _like(linear.bias, linear.bias.detach()[rows])


def set_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give a layer a weight (out, in) of another shape, in the number type of the old one."""
    linear.weight = _like(linear.weight, weight)
    linear.out_features, linear.in_features = weight.shape


def _like(old: Tensor, new: Tensor) -> nn.Parameter:
    return nn.Parameter(new.to(old).clone(memory_format=torch.contiguous_format), requires_grad=old.requires_grad)


def kept_size(size: int, share: float, *, multiple: int) -> int:
    """What is left of a size when a share goes: the nearest multiple, of which one at least stays.

    Raises:
        InputError: nothing would go.

    Example:
        >>> kept_size(704, 0.25, multiple=32)
        544
    """
    kept = max(1, int((1 - share) * size / multiple + 0.5)) * multiple
    if kept >= size:
        raise InputError(
            f"a share of {share:g} of {size} in steps of {multiple} leaves all, expected at least "
            f"{multiple / 2 / size:.2g}; take a larger share, or a smaller multiple"
        )
    return kept


def most_important(importance: Tensor, num: int) -> Tensor:
    """The indices of the `num` largest numbers in ascending order; of equal ones the first stay."""
    return torch.sort(importance, descending=True, stable=True).indices[:num].sort().values
