"""A Llama decoder as an ONNX graph, by hand, with the operators for which onnxruntime has fast CPU kernels.

For each layer, with the same op choices as onnxruntime-genai's own builder:

    SkipSimplifiedLayerNormalization    h = x + f;  RMSNorm(h) w
    MatMulNBits or FusedMatMul          q, k and v in one product; gate and up in one
    GroupQueryAttention                 rotary embedding, keys and values appended in place, attention
    QuickGelu with alpha 1              silu

Inputs and outputs, with batch 1 on a device:

    input_ids            int64 (batch, seq): a prompt, a piece of one, one token, or a draft of several
    attention_mask       int64 (batch, total): ones, as many as tokens before and in this call
    past_key_values.I.key, .value, present.I.key, .value
                         float32 (batch, kv_heads, past, head_dim). Bound to the same buffer of the whole context, keys
                         and values are appended in place; otherwise `present` has `total` positions
    first_logit          int64 (1,), may be left out: logits from this position of the call on; 0 for all, -1 for the
                         last
    MODULE.lora_A, .lora_B
                         float32 (in, rank) and (rank, out), may be left out: y = W x + (x A) B. The scale is in B, each
                         module has a rank of its own, and without an adapter it is 0
    logits               float32 (batch, seq or less, vocab)

Cosines, sines and float32 scales are worked out by onnxruntime when it opens the file, and take no room in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from cotune.compression.block_weights import BlockWeight, stacked
from cotune.compression.llama_folder import EMBEDDING, FINAL_NORM, HEAD, LlamaShape
from cotune.compression.onnx_graph import GraphParts
from cotune.models.packed_weights import PackedWeight

FIRST_LOGIT = "first_logit"

_FLOAT, _INT32, _INT64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
_ACCURACY_LEVELS = {32: 1, 8: 4}  # of MatMulNBits, by the bits of what it reads
_FACTORS = (".lora_A", ".lora_B")
_LOW_RANK, _DELTA, _ADAPTED = ".low_rank", ".delta", ".adapted"

ReadWeight = Callable[[str], PackedWeight | NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A weight in the graph: the names of its tensors, and how they lie. `bits` is 32 for float32 (out, in)."""

    tensors: tuple[str, ...]
    shape: tuple[int, int]
    bits: int = 32
    block_size: int = 0


@dataclass(frozen=True, kw_only=True)
class LlamaGraph:
    """Writes the graph of one model.

    Attributes:
        parts: where it is written.
        shape: of the model.
        read_weight: gives the weight of a module by its dotted name, as it is to be stored.
        read_vector: gives a norm's weight or a bias by the name of its tensor; None where the model has none.
        activation_bits: 8 rounds what a quantised layer reads to int8 in blocks, 32 does not.
        adapter_modules: outputs and inputs of the modules that take adapters.
    """

    parts: GraphParts
    shape: LlamaShape
    read_weight: ReadWeight
    read_vector: Callable[[str], NDArray[np.float32] | None]
    activation_bits: int
    adapter_modules: Mapping[str, tuple[int, int]]

    def write(self) -> None:
        """Append all of it, layer after layer."""
        parts, shape = self.parts, self.shape
        parts.input("input_ids", _INT64, ["batch", "seq"])
        parts.input("attention_mask", _INT64, ["batch", "total"])
        parts.input(FIRST_LOGIT, _INT64, [1], np.zeros(1, np.int64))
        parts.output("logits", _FLOAT, ["batch", "num_logits", shape.vocab_size])
        parts.tensor("one", np.array([1], np.int64))
        self._lengths()
        self._rotary_tables()
        table = self._stored(EMBEDDING, _in_blocks(self.read_weight(EMBEDDING)))
        added, residual = self._embedded(table), ""
        for i in range(shape.num_layers):
            layer = f"model.layers.{i}"
            x, residual = self._normalised(f"{layer}.input_layernorm", added, residual)
            added = self._attention(i, f"{layer}.self_attn", x)
            x, residual = self._normalised(f"{layer}.post_attention_layernorm", added, residual)
            added = self._mlp(f"{layer}.mlp", x)
        x, _ = self._normalised(FINAL_NORM, added, residual)
        parts.tensor("the_end", np.array([np.iinfo(np.int64).max], np.int64))
        x = parts.node("Slice", [x, FIRST_LOGIT, "the_end", "one"], "wanted_positions")
        head = table if shape.is_tied else self._stored(HEAD, _in_blocks(self.read_weight(HEAD)))
        self._product(x, head, "logits")

    def _lengths(self) -> None:
        """What attention reads of the mask: the last position, and how many there are."""
        parts = self.parts
        parts.tensor("scalar_one", np.array(1, np.int64))
        parts.node("ReduceSum", ["attention_mask", "one"], "num_tokens", keepdims=0)  # (batch,)
        parts.node("Sub", ["num_tokens", "scalar_one"], "last_position")
        parts.node("Cast", ["last_position"], "seqlens_k", to=_INT32)
        parts.node("Shape", ["attention_mask"], "mask_shape")
        parts.node("Gather", ["mask_shape", "scalar_one"], "total", axis=0)
        parts.node("Cast", ["total"], "total_sequence_length", to=_INT32)

    def _rotary_tables(self) -> None:
        """cos and sin of position times frequency, (context, head_dim / 2)."""
        parts, shape = self.parts, self.shape
        for name, value in (("first_position", 0), ("num_positions", shape.context), ("next_position", 1)):
            parts.tensor(name, np.array(value, np.float32))
        parts.node("Range", ["first_position", "num_positions", "next_position"], "positions_in_a_row")
        parts.node("Unsqueeze", ["positions_in_a_row", "one"], "positions")  # (context, 1)
        parts.tensor("frequencies", shape.rope_frequencies[None])
        parts.tensor("rope_scale", np.array(shape.rope_scale, np.float32))
        parts.node("Mul", ["positions", "frequencies"], "angles")
        for op in ("Cos", "Sin"):
            parts.node(op, ["angles"], f"unscaled_{op.lower()}")
            parts.node("Mul", [f"unscaled_{op.lower()}", "rope_scale"], op.lower())

    def _embedded(self, table: _Stored) -> str:
        """(batch, seq, hidden) of the tokens."""
        parts, hidden = self.parts, self.shape.hidden_size
        if table.bits == 32:
            return parts.node("Gather", [table.tensors[0], "input_ids"], "embedded")
        # By blocks, so that the codes are those of the head in memory too.
        codes, scales, *zeros = table.tensors
        parts.tensor("two", np.array([2], np.int64))
        inputs = [codes, "input_ids", parts.node("Unsqueeze", [scales, "two"], f"{EMBEDDING}.block_scales")]
        if zeros:
            inputs.append(f"{EMBEDDING}.block_zeros")
        blocks = parts.microsoft(
            "GatherBlockQuantized",
            inputs,
            ["embedded_blocks"],  # (batch, seq, blocks, block_size)
            bits=table.bits,
            block_size=table.block_size,
            gather_axis=0,
            quantize_axis=2,
        )
        parts.tensor("as_one_row", np.array([0, 0, -1], np.int64))
        x = parts.node("Reshape", [blocks, "as_one_row"], "embedded_rows")
        if hidden % table.block_size == 0:
            return x
        parts.tensor("zero", np.array([0], np.int64))
        parts.tensor("hidden_size", np.array([hidden], np.int64))
        return parts.node("Slice", [x, "zero", "hidden_size", "two"], "embedded")

    def _normalised(self, name: str, added: str, residual: str) -> tuple[str, str]:
        """RMSNorm of the residual stream after something was added to it, and the stream itself."""
        weight = self.read_vector(f"{name}.weight")
        assert weight is not None
        tensor, epsilon = self.parts.tensor(f"{name}.weight", weight), self.shape.rms_eps
        output = f"{name}.output"
        if not residual:
            self.parts.node(
                "SimplifiedLayerNormalization", [added, tensor], output, axis=-1, epsilon=epsilon, stash_type=1
            )
            return output, added
        self.parts.microsoft(
            "SkipSimplifiedLayerNormalization",
            [residual, added, tensor],
            [output, "", "", f"{name}.residual"],
            epsilon=epsilon,
        )
        return output, f"{name}.residual"

    def _attention(self, index: int, name: str, x: str) -> str:
        shape = self.shape
        qkv = self._linear(x, f"{name}.qkv_proj", [f"{name}.{letter}_proj" for letter in "qkv"])
        for half in ("key", "value"):
            dims = (shape.num_kv_heads, shape.head_dim)
            self.parts.input(f"past_key_values.{index}.{half}", _FLOAT, ["batch", dims[0], "past", dims[1]])
            self.parts.output(f"present.{index}.{half}", _FLOAT, ["batch", dims[0], "present", dims[1]])
        past = [f"past_key_values.{index}.key", f"past_key_values.{index}.value"]
        attended = self.parts.microsoft(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
            [f"{name}.attended", f"present.{index}.key", f"present.{index}.value"],
            num_heads=shape.num_heads,
            kv_num_heads=shape.num_kv_heads,
            scale=shape.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=0,
        )
        return self._linear(attended, f"{name}.o_proj", [f"{name}.o_proj"])

    def _mlp(self, name: str, x: str) -> str:
        parts = self.parts
        both = self._linear(x, f"{name}.gate_up_proj", [f"{name}.gate_proj", f"{name}.up_proj"])
        halves = [f"{name}.gate", f"{name}.up"]
        parts.split(both, halves)
        parts.microsoft("QuickGelu", [halves[0]], [f"{name}.activated"], alpha=1.0)
        inner = parts.node("Mul", [f"{name}.activated", halves[1]], f"{name}.inner")
        return self._linear(inner, f"{name}.down_proj", [f"{name}.down_proj"])

    def _linear(self, x: str, name: str, modules: Sequence[str]) -> str:
        """W x + b + (x A) B of all modules that read x, outputs side by side."""
        takes_adapter = [module in self.adapter_modules for module in modules]
        weight = _joined([_in_blocks(self.read_weight(module)) for module in modules])
        if weight is None or len(set(takes_adapter)) > 1:
            outputs = [self._linear(x, module, [module]) for module in modules]
            return self.parts.node("Concat", outputs, name, axis=-1)
        y = self._product(x, self._stored(name, weight), f"{name}.product")
        bias = self._bias(modules)
        if bias is not None:
            y = self.parts.node("Add", [y, self.parts.tensor(f"{name}.bias", bias)], f"{name}.with_bias")
        if not takes_adapter[0]:
            return y
        deltas = [self._delta(x, module) for module in modules]
        delta = deltas[0] if len(deltas) == 1 else self.parts.node("Concat", deltas, f"{name}{_DELTA}", axis=-1)
        return self.parts.node("Add", [y, delta], f"{name}{_ADAPTED}")

    def _delta(self, x: str, module: str) -> str:
        """(x A) B of one module."""
        num_out, num_in = self.adapter_modules[module]
        # A name of its own for each rank: onnxruntime may reuse a buffer for another of the same name.
        rank = f"{module}.rank"
        names = [f"{module}{factor}" for factor in _FACTORS]
        a = self.parts.input(names[0], _FLOAT, [num_in, rank], np.zeros((num_in, 0), np.float32))
        b = self.parts.input(names[1], _FLOAT, [rank, num_out], np.zeros((0, num_out), np.float32))
        low_rank = self.parts.node("MatMul", [x, a], f"{module}{_LOW_RANK}")
        return self.parts.node("MatMul", [low_rank, b], f"{module}{_DELTA}")

    def _bias(self, modules: Sequence[str]) -> NDArray[np.float32] | None:
        biases = {module: self.read_vector(f"{module}.bias") for module in modules}
        if all(bias is None for bias in biases.values()):
            return None
        shapes = self.shape.module_shapes()
        missing = {module: np.zeros(shapes[module][0], np.float32) for module, bias in biases.items() if bias is None}
        return np.concatenate([missing[module] if bias is None else bias for module, bias in biases.items()])

    def _stored(self, name: str, weight: BlockWeight | NDArray[np.float32]) -> _Stored:
        """Write a weight's tensors."""
        parts = self.parts
        if not isinstance(weight, BlockWeight):
            num_out, num_in = weight.shape
            return _Stored(tensors=(parts.tensor(f"{name}.weight", weight),), shape=(num_out, num_in))
        codes = parts.tensor(f"{name}.codes", weight.codes)
        scales = parts.node("Cast", [parts.tensor(f"{name}.scales_16", weight.scales)], f"{name}.scales", to=_FLOAT)
        tensors = [codes, scales]
        if weight.zeros is not None and weight.packed_zeros is not None:
            tensors.append(parts.tensor(f"{name}.zeros", weight.packed_zeros))
            if name == EMBEDDING:
                parts.tensor(f"{name}.block_zeros", weight.zeros[:, :, None])
        return _Stored(tensors=tuple(tensors), shape=weight.shape, bits=weight.bits, block_size=weight.block_size)

    def _product(self, x: str, weight: _Stored, output: str) -> str:
        num_out, num_in = weight.shape
        if weight.bits == 32:
            return self.parts.microsoft("FusedMatMul", [x, *weight.tensors], [output], transB=1)
        return self.parts.microsoft(
            "MatMulNBits",
            [x, *weight.tensors],
            [output],
            K=num_in,
            N=num_out,
            bits=weight.bits,
            block_size=weight.block_size,
            accuracy_level=_ACCURACY_LEVELS[self.activation_bits],
        )


def without_adapters(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without the inputs of adapters and what is done with them; its tensors are the same too."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    graph = plain.graph
    before = {node.output[0]: node.input[0] for node in graph.node if node.name.endswith(_ADAPTED)}
    kept = [node for node in graph.node if not node.name.endswith((_ADAPTED, _DELTA, _LOW_RANK))]
    for node in kept:
        node.input[:] = [before.get(name, name) for name in node.input]
    for field, entries in (
        (graph.node, kept),
        (graph.input, [one for one in graph.input if not one.name.endswith(_FACTORS)]),
        (graph.initializer, [one for one in graph.initializer if not one.name.endswith(_FACTORS)]),
    ):
        copies = [type(entry).FromString(entry.SerializeToString()) for entry in entries]
        del field[:]
        field.extend(copies)
    return plain


def with_activations(model: onnx.ModelProto, activation_bits: int) -> onnx.ModelProto:
    """The same graph with 8 or 32 bits for what quantised layers read; its tensors are the same."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    for node in changed.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = _ACCURACY_LEVELS[activation_bits]
    return changed


def _in_blocks(weight: PackedWeight | NDArray[np.float32]) -> BlockWeight | NDArray[np.float32]:
    return BlockWeight.from_packed(weight) if isinstance(weight, PackedWeight) else weight


def _joined(weights: Sequence[BlockWeight | NDArray[np.float32]]) -> BlockWeight | NDArray[np.float32] | None:
    """One weight for all outputs; None where they are stored in different ways."""
    blocks = [weight for weight in weights if isinstance(weight, BlockWeight)]
    arrays = [weight for weight in weights if not isinstance(weight, BlockWeight)]
    if blocks and arrays:
        return None
    return stacked(blocks) if blocks else np.concatenate(arrays)
