"""Offline model folders by hand: a tiny Llama as an ONNX graph, and the same in NumPy to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file
from toy import VOCAB
from toy_plugin import words_json

from cotune.device.offline.folder import ModuleShape, write_description

HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, LAYERS, CONTEXT = 16, 24, 2, 1, 16, 2, 64
END = 2
EPSILON, ROPE_BASE = 1e-5, 10_000.0
Array = NDArray[np.float32]


def linear_shapes() -> dict[str, tuple[int, int]]:
    """(in, out) of each linear layer that takes an adapter, by dotted name."""
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes[f"{attention}.q_proj"] = HIDDEN, HEADS * HEAD_DIM
        shapes[f"{attention}.k_proj"] = HIDDEN, KV_HEADS * HEAD_DIM
        shapes[f"{attention}.v_proj"] = HIDDEN, KV_HEADS * HEAD_DIM
        shapes[f"{attention}.o_proj"] = HEADS * HEAD_DIM, HIDDEN
        shapes[f"{mlp}.gate_proj"] = HIDDEN, INNER
        shapes[f"{mlp}.up_proj"] = HIDDEN, INNER
        shapes[f"{mlp}.down_proj"] = INNER, HIDDEN
    return shapes


@dataclass
class TinyLlama:
    """Random weights, (in, out); `logits` is what the graph has to give.

    Attributes:
        vocab_size: of embedding and head.
        seed: of the weights.
    """

    vocab_size: int = VOCAB
    seed: int = 1
    weights: dict[str, Array] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        shapes: dict[str, tuple[int, ...]] = {"embed": (self.vocab_size, HIDDEN), "head": (HIDDEN, self.vocab_size)}
        shapes |= linear_shapes()
        self.weights = {name: rng.standard_normal(shape).astype(np.float32) * 0.5 for name, shape in shapes.items()}
        self.weights["head"] *= 3

    def logits(self, token_ids: Sequence[int], adapter: Mapping[str, tuple[Array, Array]] | None = None) -> Array:
        """float32 (seq, vocab) of a whole text, computed in float64."""
        x = self.weights["embed"][list(token_ids)].astype(np.float64)
        for layer in range(LAYERS):
            x = x + self._attention(x, f"model.layers.{layer}.self_attn", adapter or {})
            h = _norm(x)
            mlp = f"model.layers.{layer}.mlp"
            gate = self._linear(h, f"{mlp}.gate_proj", adapter or {})
            inner = gate / (1 + np.exp(-gate)) * self._linear(h, f"{mlp}.up_proj", adapter or {})
            x = x + self._linear(inner, f"{mlp}.down_proj", adapter or {})
        return np.asarray(_norm(x) @ self.weights["head"], np.float32)

    def _linear(self, x: NDArray[Any], name: str, adapter: Mapping[str, tuple[Array, Array]]) -> NDArray[Any]:
        y = x @ self.weights[name]
        if name in adapter:
            a, b = adapter[name]
            y = y + x @ a @ b
        return y

    def _attention(self, x: NDArray[Any], name: str, adapter: Mapping[str, tuple[Array, Array]]) -> NDArray[Any]:
        h, seq = _norm(x), len(x)
        q = _rotate(self._linear(h, f"{name}.q_proj", adapter).reshape(seq, HEADS, HEAD_DIM))
        k = _rotate(self._linear(h, f"{name}.k_proj", adapter).reshape(seq, KV_HEADS, HEAD_DIM))
        v = self._linear(h, f"{name}.v_proj", adapter).reshape(seq, KV_HEADS, HEAD_DIM)
        out = np.zeros((seq, HEADS, HEAD_DIM))
        for head in range(HEADS):
            kv = head * KV_HEADS // HEADS
            scores = q[:, head] @ k[:, kv].T / np.sqrt(HEAD_DIM)
            scores[np.triu_indices(seq, 1)] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv]
        return self._linear(out.reshape(seq, -1), f"{name}.o_proj", adapter)


def _norm(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPSILON))


def _angles() -> NDArray[np.float64]:
    frequencies = ROPE_BASE ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    return np.arange(CONTEXT)[:, None] * frequencies


def _rotate(x: NDArray[Any]) -> NDArray[Any]:
    angles = _angles()[: len(x), None]
    left, right = x[..., : HEAD_DIM // 2], x[..., HEAD_DIM // 2 :]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class _Graph:
    """Nodes and initialisers as they are added."""

    def __init__(self, *, with_adapters: bool) -> None:
        self.with_adapters = with_adapters
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def node(
        self, kind: str, inputs: Sequence[str], output: str, *more: str, domain: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output, *more], domain=domain, **attributes))
        return output

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants[name] = value
        return name


def _linear(graph: _Graph, x: str, name: str) -> str:
    if not graph.with_adapters:
        return graph.node("MatMul", [x, name], f"{name}.out")
    base = graph.node("MatMul", [x, name], f"{name}.base")
    inner = graph.node("MatMul", [x, f"{name}.lora_A"], f"{name}.inner")
    shift = graph.node("MatMul", [inner, f"{name}.lora_B"], f"{name}.shift")
    return graph.node("Add", [base, shift], f"{name}.out")


def _norm_node(graph: _Graph, x: str, output: str) -> str:
    return graph.node("SimplifiedLayerNormalization", [x, "ones"], output, axis=-1, epsilon=EPSILON)


def make_graph(
    model: TinyLlama, *, with_adapters: bool = True, one_rank: bool = True, first_logit: bool = False
) -> onnx.ModelProto:
    """The model as onnxruntime-genai's builder lays it out, with adapters as inputs.

    Args:
        model: the weights.
        with_adapters: it has inputs for them.
        one_rank: all adapters' ranks have the same name, and so must be the same.
        first_logit: the last positions alone may be asked for.
    """
    graph = _Graph(with_adapters=with_adapters)
    for name, weight in model.weights.items():
        graph.constant(name, weight)
    graph.constant("ones", np.ones(HIDDEN, np.float32))
    graph.constant("cos", np.cos(_angles()).astype(np.float32))
    graph.constant("sin", np.sin(_angles()).astype(np.float32))
    graph.constant("axis_1", np.array([1], np.int64))
    graph.constant("one", np.array([1], np.int64))
    graph.constant("index_1", np.array(1, np.int64))
    counted = graph.node("ReduceSum", ["attention_mask", "axis_1"], "counted", keepdims=0)
    graph.node("Cast", [graph.node("Sub", [counted, "one"], "last")], "seqlens", to=TensorProto.INT32)
    shape = graph.node("Shape", ["attention_mask"], "mask_shape")
    graph.node("Cast", [graph.node("Gather", [shape, "index_1"], "total_64")], "total", to=TensorProto.INT32)
    x = graph.node("Gather", ["embed", "input_ids"], "x0")
    for layer in range(LAYERS):
        attention, mlp = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        h = _norm_node(graph, x, f"h{layer}")
        q, k, v = (_linear(graph, h, f"{attention}.{one}_proj") for one in "qkv")
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        mixed = graph.node(
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens", "total", "cos", "sin"],
            f"attention{layer}",
            f"present.{layer}.key",
            f"present.{layer}.value",
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            rotary_interleaved=0,
        )
        x = graph.node("Add", [x, _linear(graph, mixed, f"{attention}.o_proj")], f"x{layer}.mid")
        h = _norm_node(graph, x, f"h{layer}.mlp")
        gate, up = _linear(graph, h, f"{mlp}.gate_proj"), _linear(graph, h, f"{mlp}.up_proj")
        active = graph.node("Mul", [gate, graph.node("Sigmoid", [gate], f"sigmoid{layer}")], f"active{layer}")
        inner = graph.node("Mul", [active, up], f"inner{layer}")
        x = graph.node("Add", [x, _linear(graph, inner, f"{mlp}.down_proj")], f"x{layer + 1}")
    final = _norm_node(graph, x, "final")
    if first_logit:
        graph.constant("first_logit", np.zeros(1, np.int64))
        graph.constant("the_end", np.array([np.iinfo(np.int64).max], np.int64))
        final = graph.node("Slice", [final, "first_logit", "the_end", "axis_1"], "wanted")
    graph.node("MatMul", [final, "head"], "logits")
    inputs = [
        _value("input_ids", TensorProto.INT64, [1, "seq"]),
        _value("attention_mask", TensorProto.INT64, [1, "total"]),
    ]
    if first_logit:
        inputs.append(_value("first_logit", TensorProto.INT64, [1]))
    length = "num_logits" if first_logit else "seq"
    outputs = [_value("logits", TensorProto.FLOAT, [1, length, model.vocab_size])]
    for layer in range(LAYERS):
        for kind in ("key", "value"):
            inputs.append(_cache_value(f"past_key_values.{layer}.{kind}", "past"))
            outputs.append(_cache_value(f"present.{layer}.{kind}", "total"))
    for name, (width_in, width_out) in linear_shapes().items() if with_adapters else ():
        rank = "rank" if one_rank else f"rank of {name}"
        graph.constant(f"{name}.lora_A", np.zeros((width_in, 0), np.float32))
        graph.constant(f"{name}.lora_B", np.zeros((0, width_out), np.float32))
        inputs.append(_value(f"{name}.lora_A", TensorProto.FLOAT, [width_in, rank]))
        inputs.append(_value(f"{name}.lora_B", TensorProto.FLOAT, [rank, width_out]))
    constants = [numpy_helper.from_array(value, name) for name, value in graph.constants.items()]
    return helper.make_model(
        helper.make_graph(graph.nodes, "tiny", inputs, outputs, constants),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def _value(name: str, kind: int, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _cache_value(name: str, length: str) -> onnx.ValueInfoProto:
    return _value(name, TensorProto.FLOAT, [1, KV_HEADS, length, HEAD_DIM])


def write_onnx_folder(
    folder: Path,
    model: TinyLlama | None = None,
    *,
    tokenizer_json: bytes | None = None,
    texts: Mapping[str, str] | None = None,
    graph: onnx.ModelProto | None = None,
    plain: onnx.ModelProto | None = None,
    **changes: Any,
) -> Path:
    """An offline model folder that holds `model`.

    Args:
        folder: is made.
        model: the weights.
        tokenizer_json: the words of the toy model, if left out.
        texts: more files, such as a chat template.
        graph: another one than the model's.
        plain: one without adapters beside it.
        **changes: of the description.
    """
    model = model or TinyLlama()
    folder.mkdir(parents=True)
    onnx.save_model(
        graph or make_graph(model),
        str(folder / "model.onnx"),
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=64,
    )
    if plain is not None:
        onnx.save_model(plain, str(folder / "model.plain.onnx"))
    (folder / "tokenizer.json").write_bytes(words_json() if tokenizer_json is None else tokenizer_json)
    for name, text in (texts or {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    modules = {name: ModuleShape(in_dim=a, out_dim=b) for name, (a, b) in linear_shapes().items()}
    fields: dict[str, Any] = {
        "runtime": "onnx",
        "vocab_size": model.vocab_size,
        "context": CONTEXT,
        "num_layers": LAYERS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "bits": 32,
        "end_ids": (END,),
        "bos_id": None,
        "adapter_modules": modules,
        "source_digest": "5" * 64,
    }
    write_description(folder, **{**fields, **changes})
    return folder


def random_adapter(rank: int = 3, *, seed: int = 1, names: Sequence[str] = ()) -> dict[str, tuple[Array, Array]]:
    """A (in, rank) and B (rank, out) of some modules, all of them if none is named; B is scaled already."""
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.standard_normal((width_in, rank)).astype(np.float32) * 0.3,
            rng.standard_normal((rank, width_out)).astype(np.float32) * 0.3,
        )
        for name, (width_in, width_out) in linear_shapes().items()
        if not names or name in names
    }


def write_peft_folder(
    folder: Path, adapter: Mapping[str, tuple[Array, Array]], *, scale: float = 1.0, **config: Any
) -> Path:
    """The adapter as peft writes it: A (rank, in), B (out, rank), to be multiplied by alpha / rank = `scale`."""
    import json

    folder.mkdir(parents=True)
    rank = next(iter(adapter.values()))[0].shape[1]
    tensors = {}
    for name, (a, b) in adapter.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = np.ascontiguousarray(a.T)
        tensors[f"base_model.model.{name}.lora_B.weight"] = np.ascontiguousarray(b.T / np.float32(scale))
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank * scale, "use_rslora": False, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
