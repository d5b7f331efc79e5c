"""The decoding pass of Llama-like models with as few operations as it needs, on the model's own weights.

transformers' modules are made for every use; a step of a small model spends most of its time in their Python. For the
architectures in `ARCHITECTURES` this file does the same arithmetic in about twenty operations a layer: query, key and
value in one product where the weights are copied anyway (see `cotune.models.packed_linear`), gate and up in another,
fused norms, angles from a table. It reads the weights where they are, watches the residual stream without hooks, and is
not used while an adapter sits in the model. All other models decode through transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cotune.generation.protocols import StepAbandonedError
from cotune.models.packed_linear import PackedProduct, is_packable
from cotune.models.packed_pass import AttentionForm, PackedPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Kinds of rotary embedding whose angles depend on the position alone.
_STATIC_ROPES = ("default", "linear", "llama3", "yarn")

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Layer:
    input_norm: Any
    qkv: Product
    q_norm: Any
    k_norm: Any
    output: Product
    middle_norm: Any
    gate_up: Product
    down: Product
    num_heads: int
    num_kv_heads: int
    head_dim: int
    form: AttentionForm


class LeanDecoder:
    """A model's decoding pass; make it with `of`."""

    def __init__(self, model: PreTrainedModel, tap_layers: tuple[int, ...]) -> None:
        self._model = model
        self._base: Any = model.base_model
        self._layers = [_layer(layer) for layer in self._base.layers]
        self._head: Product = _product([model.get_output_embeddings()])
        self._is_tapped = [layer in tap_layers for layer in range(len(self._layers) + 1)]
        self._cos, self._sin = self._angles()
        self._parts = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent._modules.items()
            if child is not None
        ]
        self._weights = [
            (module, name, weight)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if weight is not None
        ]

    @classmethod
    def of(cls, model: PreTrainedModel, tap_layers: tuple[int, ...]) -> LeanDecoder | None:
        """The lean pass of `model`, or None where it is not of a kind that this file knows, or an adapter is in it."""
        # Where several processes share the model, its layers exchange their parts in hooks.
        if type(model).__name__ not in ARCHITECTURES or (model.tp_size or 1) > 1:
            return None
        config = model.config
        rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        is_plain = all(type(p.data) is Tensor for p in model.parameters())
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        if config.hidden_act != "silu" or rope not in _STATIC_ROPES or not is_plain:
            return None
        # Quantised and otherwise special layers compute in their own way; offloaded ones bring weights by hooks.
        if any(type(m) is not nn.Linear or m._forward_pre_hooks or hasattr(m, "_hf_hook") for m in linears[:-1]):
            return None
        # What watches the model's calls, such as the guard of a soft prompt, must not be passed by.
        if model._forward_pre_hooks:
            return None
        # An adapter stands in a layer's place, whatever it is made of inside.
        if any(type(part) is not nn.Linear for layer in model.base_model.layers for part in _linears(layer)):
            return None
        return cls(model, tap_layers)

    @property
    def fits(self) -> bool:
        """Whether the model is still what this pass was made of: no adapter in it or before it, the same weights."""
        return (
            not self._model._forward_pre_hooks
            and all(parent._modules.get(name) is child for parent, name, child in self._parts)
            and all(module._parameters.get(name) is weight for module, name, weight in self._weights)
        )

    @property
    def products(self) -> list[tuple[Product, int]]:
        """One layer's matrix products and the head's, with the widths that they read; see `row_invariance`."""
        layer, hidden = self._layers[0], int(self._model.config.hidden_size)
        inner = int(self._model.config.intermediate_size)
        return [
            (layer.qkv, hidden),
            (layer.output, layer.num_heads * layer.head_dim),
            (layer.gate_up, hidden),
            (layer.down, inner),
            (self._head, hidden),
        ]

    def run(
        self,
        input_ids: Tensor,
        positions: Tensor,
        packed: PackedPass,
        rows: Callable[[Tensor], Tensor],
        is_wanted: Callable[[], bool] | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Logits (rows, vocab), f (rows, hidden) and y of each tap (rows, hidden), at `rows` of the pass.

        Args:
            input_ids, positions: int64 (all,).
            packed: what attention has to know.
            rows: picks (rows, hidden) from (all, hidden).
            is_wanted: asked after each tapped layer.

        Raises:
            StepAbandonedError: `is_wanted` said no.
        """
        y = self._base.embed_tokens(input_ids)
        cos, sin = self._cos[positions, None], self._sin[positions, None]
        states = [rows(y)] if self._is_tapped[0] else []
        for i, layer in enumerate(self._layers):
            attended = self._attend(i, layer, _norm(layer.input_norm, y), cos, sin, packed)
            y = y + layer.output(attended)
            gate, up = layer.gate_up(_norm(layer.middle_norm, y)).chunk(2, dim=-1)
            y = y + layer.down(F.silu(gate) * up)
            if self._is_tapped[i + 1]:
                if is_wanted is not None and not is_wanted():
                    raise StepAbandonedError
                states.append(rows(y))
        hidden = _norm(self._base.norm, rows(y))
        return self._head(hidden), hidden, states

    def _attend(self, index: int, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor, packed: PackedPass) -> Tensor:
        heads, kv_heads = layer.num_heads, layer.num_kv_heads
        qkv = layer.qkv(x).view(-1, heads + 2 * kv_heads, layer.head_dim)
        qk, value = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat([_norm(layer.q_norm, qk[:, :heads]), _norm(layer.k_norm, qk[:, heads:])], dim=1)
        first, second = qk.chunk(2, dim=-1)
        qk = qk * cos + torch.cat([-second, first], dim=-1) * sin
        return packed.attend(index, qk[:, :heads], qk[:, heads:], value, layer.form).flatten(1)

    def _angles(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines (context, head_dim) of all positions, in the model's number type."""
        weight = self._base.embed_tokens.weight
        positions = torch.arange(self._model.config.max_position_embeddings, device=weight.device)[None]
        with torch.inference_mode():
            cos, sin = self._base.rotary_emb(weight[:1, None], position_ids=positions)
        return cos[0], sin[0]


def _layer(layer: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    window = getattr(attention, "sliding_window", None)
    if window is None and type(attention).__name__ == "MistralAttention":
        window = getattr(attention.config, "sliding_window", None)
    head_dim = int(attention.head_dim)
    return _Layer(
        input_norm=layer.input_layernorm,
        qkv=_product([attention.q_proj, attention.k_proj, attention.v_proj]),
        q_norm=getattr(attention, "q_norm", None),
        k_norm=getattr(attention, "k_norm", None),
        output=_product([attention.o_proj]),
        middle_norm=layer.post_attention_layernorm,
        gate_up=_product([mlp.gate_proj, mlp.up_proj]),
        down=_product([mlp.down_proj]),
        num_heads=attention.q_proj.out_features // head_dim,
        num_kv_heads=attention.k_proj.out_features // head_dim,
        head_dim=head_dim,
        form=AttentionForm(attention.scaling, window),
    )


def _linears(layer: Any) -> tuple[nn.Module, ...]:
    """What `_layer` takes for linear layers."""
    attention, mlp = layer.self_attn, layer.mlp
    qkvo = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*qkvo, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _norm(norm: Any, x: Tensor) -> Tensor:
    weight: Tensor = norm.weight
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


def _product(linears: list[nn.Linear]) -> Product:
    """The outputs of several linear layers on the same rows, side by side."""
    if len(linears) > 1 and not _is_copied(linears):
        return lambda x: torch.cat([F.linear(x, linear.weight, linear.bias) for linear in linears], dim=-1)
    weight = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.cat([one.detach() for one in biases]) if len(biases) == len(linears) else None
    if biases and bias is None:
        return lambda x: torch.cat([F.linear(x, linear.weight, linear.bias) for linear in linears], dim=-1)
    if is_packable(weight):
        return PackedProduct(weight, bias)
    return lambda x: F.linear(x, weight, bias)


def _is_copied(linears: list[nn.Linear]) -> bool:
    """Whether joining the weights costs no memory to speak of: small ones, or such as are copied for packing anyway."""
    weight = linears[0].weight
    return weight.device.type == "cpu" and weight.dtype == torch.float32
