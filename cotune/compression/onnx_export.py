"""Export to ONNX for onnxruntime and onnxruntime-genai: an offline model folder.

    model.onnx          the graph of `llama_graph`
    model.plain.onnx    the same without inputs for adapters, which cost time also where there is none; only where
                        model.onnx has some
    model.onnx.data     the weights of both, which runtimes map into memory
    genai_config.json   for onnxruntime-genai
    tokenizer.json ...  as in the source
    offline.json        what it is, with the digests of all files

The graph is opened and asked for one token before the folder appears, where onnxruntime is installed.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cotune.compression.llama_folder import LAYER_MODULES, LlamaFolder, LlamaShape
from cotune.compression.offline_folder import describe
from cotune.compression.written_weights import WHOLE, Rounding, WrittenWeights
from cotune.device.offline.folder import MODEL_FILES, OfflineFolder
from cotune.device.offline.model import OfflineSettings
from cotune.device.offline.onnx_model import PLAIN_FILE, OnnxModel
from cotune.durable import new_sized_folder
from cotune.errors import InputError

GRAPH_FILE, DATA_FILE, GENAI_FILE = MODEL_FILES["onnx"], "model.onnx.data", "genai_config.json"
METADATA_KEY = "cotune.export"
"""Under this name the graph tells how it was made, as JSON."""

_ADAPTER_NAMES = tuple(name.rpartition(".")[2] for name in LAYER_MODULES)
_GENAI_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}
_GRAPH_BYTES, _LAYER_BYTES = 2**17, 2**15  # of the graph without its weights, at most
_SMALLEST_BLOCK, _HEAD_MULTIPLE = 16, 16


@dataclass(frozen=True, kw_only=True)
class OnnxExportConfig:
    """How a model becomes an ONNX graph."""

    rounding: Rounding = field(default_factory=Rounding)
    """Of weights that the folder holds whole."""
    activation_bits: int = 8
    """8: quantised layers round what they read to int8, block by block, which is what makes them fast. 32: they compute
    in float32, with the same weights."""
    adapter_modules: tuple[str, ...] = _ADAPTER_NAMES
    """Last names of the modules that take LoRA adapters at run time; () for none."""
    context: int | None = None
    """The most tokens of a text, if less than the model's."""

    def __post_init__(self) -> None:
        if self.activation_bits not in (8, 32):
            raise InputError(f"activation_bits is {self.activation_bits!r}, expected 8, or 32 for float32")
        unknown = sorted(set(self.adapter_modules) - set(_ADAPTER_NAMES))
        if unknown:
            raise InputError(
                f"adapter_modules has {unknown[0]!r}, expected some of {', '.join(_ADAPTER_NAMES)}, or none"
            )

    @classmethod
    def from_json(cls, text: str) -> OnnxExportConfig:
        """What `to_json` wrote."""
        fields = json.loads(text)
        modules = tuple(fields.pop("adapter_modules"))
        return cls(**{**fields, "rounding": Rounding(**fields["rounding"]), "adapter_modules": modules})

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def export_onnx(model: str | Path, out: Path, config: OnnxExportConfig | None = None) -> None:
    """Write an offline model folder that onnxruntime runs.

    Args:
        model: a Hugging Face folder of the Llama family, quantised or not, a hub name, or `starter`.
        out: the folder to make; nothing is there yet.
        config: how; by default 4 bits in blocks of 128, embedding and head too.

    Raises:
        InputError: the model cannot be exported, or the folder cannot be written; nothing is left of it.

    Example:
        >>> export_onnx("starter", Path("starter-int4"))  # doctest: +SKIP
    """
    config = config or OnnxExportConfig()
    check_onnx()
    source = LlamaFolder(model, context=config.context)
    check_heads(source)
    written = WrittenWeights(source, config.rounding)
    modules = source.shape.module_shapes()
    chosen = {name: modules[name] for name in modules if name.rpartition(".")[2] in config.adapter_modules}
    with new_sized_folder(out, num_bytes=num_export_bytes(written)) as folder:
        _write_graph(folder, written, config, chosen)
        genai = genai_config(source.shape, PLAIN_FILE if chosen else GRAPH_FILE)
        (folder / GENAI_FILE).write_text(json.dumps(genai, indent=1) + "\n", encoding="utf-8")
        describe(folder, source, runtime="onnx", bits=_bits(written), adapter_modules=chosen)
        _try_out(folder)


def read_config(exported: Path) -> OnnxExportConfig:
    """How a folder was exported, from its graph.

    Raises:
        InputError: it holds no graph of this exporter.
    """
    import onnx

    path = exported / GRAPH_FILE
    try:
        found = {entry.key: entry.value for entry in onnx.load(str(path), load_external_data=False).metadata_props}
        return OnnxExportConfig.from_json(found[METADATA_KEY])
    except Exception as error:  # protobuf's have no class of their own in common with others
        raise InputError(
            f"{path} is no graph that cotune exported ({type(error).__name__}); name a folder of `export_onnx`"
        ) from error


def num_export_bytes(written: WrittenWeights) -> int:
    """Bytes of graph, weights and tokenizer on disk, at most a few percent too many."""
    shape, total = written.folder.shape, 0
    for module in written.modules():
        num_out, num_in = shape.tensor_shapes()[f"{module}.weight"]
        bits = written.bits_of(module)
        if bits == WHOLE:
            total += 4 * num_out * num_in
            continue
        packed = written.folder.packed.get(f"{module}.weight")
        group_size = min((packed.group_size if packed else written.rounding.group_size) or num_in, num_in)
        is_symmetric = packed.is_symmetric if packed else written.rounding.is_symmetric
        block_size = max(next(size for size in (256, 128, 64, 32, 16, 1) if group_size % size == 0), _SMALLEST_BLOCK)
        blocks = -(-num_in // block_size)
        bits = max(bits, 4)
        zeros = 0 if is_symmetric else 2 * blocks
        total += num_out * (blocks * block_size * bits // 8 + 2 * blocks + zeros)
    vectors = 4 * shape.hidden_size * (2 * shape.num_layers + 1)
    tokenizer = sum(path.stat().st_size for path in written.folder.path.glob("*token*.json"))
    return total + vectors + tokenizer + _GRAPH_BYTES + shape.num_layers * _LAYER_BYTES


def genai_config(shape: LlamaShape, graph_file: str) -> dict[str, Any]:
    """What onnxruntime-genai reads beside a graph, as its own builder of version 0.18 writes it."""
    return {
        "model": {
            "bos_token_id": shape.bos_id,
            "context_length": shape.context,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": graph_file,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": shape.num_heads,
                "num_hidden_layers": shape.num_layers,
                "num_key_value_heads": shape.num_kv_heads,
            },
            "eos_token_id": list(shape.end_ids),
            "pad_token_id": shape.pad_id if shape.pad_id is not None else min(shape.end_ids, default=0),
            "type": _GENAI_TYPES[shape.architecture],
            "vocab_size": shape.vocab_size,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": shape.context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }


def check_onnx() -> None:
    """Refuse to begin without the package that writes graphs.

    Raises:
        InputError: onnx is not installed.
    """
    if importlib.util.find_spec("onnx") is None:
        raise InputError("writing an ONNX graph needs the package onnx; install cotune[export]")


def check_heads(source: LlamaFolder) -> None:
    """Refuse heads that onnxruntime's attention does not compute on a CPU.

    Raises:
        InputError: their width is no multiple of 16.
    """
    if source.shape.head_dim % _HEAD_MULTIPLE:
        raise InputError(
            f"{source.path} has heads of {source.shape.head_dim} numbers, expected a multiple of {_HEAD_MULTIPLE}, as "
            "onnxruntime's attention on a CPU; export it to GGUF, if its tokenizer is byte-level BPE"
        )


def _write_graph(
    folder: Path, written: WrittenWeights, config: OnnxExportConfig, adapter_modules: Mapping[str, tuple[int, int]]
) -> None:
    # onnx is not everywhere where this module is imported.
    from cotune.compression.llama_graph import LlamaGraph, without_adapters
    from cotune.compression.onnx_graph import GraphParts

    with (folder / DATA_FILE).open("wb") as data:
        parts = GraphParts(data=data, data_name=DATA_FILE)
        LlamaGraph(
            parts=parts,
            shape=written.folder.shape,
            read_weight=written.weight,
            read_vector=written.vector,
            activation_bits=config.activation_bits,
            adapter_modules=adapter_modules,
        ).write()
    model = parts.model("llama", {METADATA_KEY: config.to_json()})
    (folder / GRAPH_FILE).write_bytes(model.SerializeToString())
    if adapter_modules:
        (folder / PLAIN_FILE).write_bytes(without_adapters(model).SerializeToString())


def _bits(written: WrittenWeights) -> int:
    """Of the linear layers; the most, where they differ."""
    return max(written.bits_of(module) for module in written.modules() if module.startswith("model.layers."))


def _try_out(folder: Path) -> None:
    """Open a folder as devices do and ask its graphs for a token, where onnxruntime is installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return
    checked = OfflineFolder.open(folder)
    for has_adapter in (False, True):
        model = OnnxModel(checked, OfflineSettings(num_threads=1, has_adapter=has_adapter))
        model.open().extend([checked.description.bos_id or 0])
        model.close()
