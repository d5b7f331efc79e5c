"""Export to GGUF for llama.cpp: an offline model folder with `model.gguf`, the tokenizer and `offline.json`.

F32, F16, Q8_0 and Q4_0 are written here, one tensor at a time; norms and biases stay float32, and a tensor whose rows
are no multiple of 32 becomes F16. The weights of a quantised folder are written as they are, see `gguf_weights`.
K-quants, such as Q4_K_M, are made by llama.cpp itself of an F16 file, where llama-cpp-python is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.compression.gguf_names import ARCHITECTURES, gguf_name, row_order
from cotune.compression.gguf_tokenizer import GgufTokenizer, read_gguf_tokenizer
from cotune.compression.llama_folder import EMBEDDING, FINAL_NORM, HEAD, LlamaFolder, LlamaShape
from cotune.compression.offline_folder import describe
from cotune.device.offline.folder import MODEL_FILES
from cotune.durable import new_sized_folder
from cotune.errors import InputError
from cotune.models.packed_weights import PackedWeight
from cotune.models.weights import read_tokenizer

MODEL_FILE = MODEL_FILES["gguf"]
OWN_KINDS = ("F32", "F16", "Q8_0", "Q4_0")
K_KINDS = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")

_BLOCK = 32
_BLOCK_BYTES = {"F32": 128, "F16": 64, "Q8_0": 34, "Q4_0": 18, "Q4_1": 20}
_QUANTISATION_VERSION = 2
_METADATA_BYTES = 2**20  # besides the tokenizer
_F16_FILE = "whole.gguf"


@dataclass(frozen=True, kw_only=True)
class GgufExportConfig:
    """How a model becomes a GGUF file."""

    kind: str = "Q4_0"
    """Of weights that the folder holds whole: F32, F16, Q8_0 or Q4_0, or one of llama.cpp's K-quants."""
    embedding_kind: str | None = None
    """Of the embedding and the head, F32, F16, Q8_0 or Q4_0; None for `kind`."""
    context: int | None = None
    """The most tokens of a text, if less than the model's."""

    def __post_init__(self) -> None:
        if self.kind not in (*OWN_KINDS, *K_KINDS):
            raise InputError(f"kind is {self.kind!r}, expected one of {', '.join((*OWN_KINDS, *K_KINDS))}")
        if self.embedding_kind not in (None, *OWN_KINDS):
            raise InputError(f"embedding_kind is {self.embedding_kind!r}, expected one of {', '.join(OWN_KINDS)}")
        if self.kind in K_KINDS and self.embedding_kind is not None:
            raise InputError(
                f"embedding_kind is {self.embedding_kind!r} and kind {self.kind}, of which llama.cpp chooses the "
                "embedding's kind itself; leave embedding_kind out"
            )


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A tensor that will be written: known before any weight is read."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], NDArray[Any]]

    @property
    def num_bytes(self) -> int:
        numbers = int(np.prod(self.shape))
        return numbers * _BLOCK_BYTES[self.kind] // _BLOCK


def export_gguf(model: str | Path, out: Path, config: GgufExportConfig | None = None) -> None:
    """Write an offline model folder that llama.cpp runs.

    Args:
        model: a Hugging Face folder of the Llama family, quantised or not, a hub name, or `starter`.
        out: the folder to make; nothing is there yet.
        config: how; by default Q4_0, the embedding and the head too.

    Raises:
        InputError: the model or its tokenizer cannot be exported, llama-cpp-python is missing for a K-quant, or the
            folder cannot be written; nothing is left of it.

    Example:
        >>> export_gguf("starter", Path("starter-q8"), GgufExportConfig(kind="Q8_0"))  # doctest: +SKIP
    """
    config = config or GgufExportConfig()
    check_gguf()
    source = LlamaFolder(model, context=config.context)
    tokenizer_json, tokenizer = check_gguf_source(source)
    by_llama_cpp = config.kind in K_KINDS
    if by_llama_cpp:
        check_k_quants(source, config.kind)
    kind = "F16" if by_llama_cpp else config.kind
    planned = list(_planned(source, kind, config.embedding_kind or kind))
    num_bytes = sum(tensor.num_bytes for tensor in planned) * (2 if by_llama_cpp else 1)
    with new_sized_folder(out, num_bytes=num_bytes + 3 * len(tokenizer_json) + _METADATA_BYTES) as folder:
        written = folder / (_F16_FILE if by_llama_cpp else MODEL_FILE)
        _write(written, source, tokenizer, planned, kind)
        if by_llama_cpp:
            from cotune.compression.k_quants import quantise_by_llama_cpp

            quantise_by_llama_cpp(written, folder / MODEL_FILE, config.kind)
            written.unlink()
        describe(
            folder, source, runtime="gguf", bits=_bits(source, config), adapter_modules=source.shape.module_shapes()
        )


def check_gguf_source(source: LlamaFolder) -> tuple[bytes, GgufTokenizer]:
    """Refuse a model that llama.cpp would read as another one.

    Returns:
        Its `tokenizer.json`, and what of it goes into the file.

    Raises:
        InputError: its rotary embedding, its heads or its tokenizer has no words in GGUF.
    """
    _check_rope(source)
    _check_heads(source)
    tokenizer_json, shape = read_tokenizer(source.path), source.shape
    return tokenizer_json, read_gguf_tokenizer(tokenizer_json, vocab_size=shape.vocab_size, bos_id=shape.bos_id)


def check_gguf() -> None:
    """Refuse to begin without the package that writes GGUF files.

    Raises:
        InputError: gguf is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise InputError("writing a GGUF file needs the package gguf; install cotune[export]")


def check_k_quants(source: LlamaFolder, kind: str) -> None:
    """Refuse K-quants where they cannot be made.

    Raises:
        InputError: llama-cpp-python is not installed, or the weights are quantised already.
    """
    if source.packed:
        raise InputError(
            f"kind is {kind} and {source.path} is quantised already, expected a whole model to round once; take one, "
            "or kind Q4_0 or Q8_0, which keep the folder's own codes"
        )
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(
            f"kind is {kind}, which llama.cpp makes itself, and llama-cpp-python is not installed; install it (it "
            f"compiles for a quarter of an hour), or take one of {', '.join(OWN_KINDS)}"
        )


def _check_rope(source: LlamaFolder) -> None:
    shape = source.shape
    is_qwen = ARCHITECTURES[shape.architecture] == "qwen2"
    allowed = ("default",) if is_qwen else ("default", "linear", "llama3")
    if shape.rope_type not in allowed or shape.rope_scale != 1.0:
        raise InputError(
            f"{source.path} has a rotary embedding of type {shape.rope_type!r}, expected "
            f"{' or '.join(allowed)} for GGUF; export it to ONNX"
        )


def _check_heads(source: LlamaFolder) -> None:
    shape = source.shape
    width = shape.num_heads * shape.head_dim
    # llama.cpp reads the width of a head from the file for `llama`, and takes it from the hidden size for `qwen2`.
    if ARCHITECTURES[shape.architecture] == "qwen2" and width != shape.hidden_size:
        raise InputError(
            f"{source.path} has {shape.num_heads} heads of {shape.head_dim} numbers and a hidden size of "
            f"{shape.hidden_size}, expected {shape.hidden_size} numbers in all heads, which is what llama.cpp reads of "
            "this architecture; export it to ONNX"
        )


def _planned(source: LlamaFolder, kind: str, embedding_kind: str) -> Iterator[_Planned]:
    shape = source.shape
    yield _planned_weight(source, EMBEDDING, embedding_kind)
    if shape.rope_type != "default":
        # Factors on the frequencies of the base, the same for all layers.
        base = shape.rope_theta ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
        factors = (base / shape.rope_frequencies).astype(np.float32)
        yield _Planned(name="rope_freqs.weight", shape=factors.shape, kind="F32", make=lambda: factors)
    for i in range(shape.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield _planned_vector(source, f"model.layers.{i}.{norm}", "weight")
    for module in shape.module_shapes():
        yield _planned_weight(source, module, kind)
        if source.has(f"{module}.bias"):
            yield _planned_vector(source, module, "bias")
    yield _planned_vector(source, FINAL_NORM, "weight")
    if not shape.is_tied:
        yield _planned_weight(source, HEAD, embedding_kind)


def _planned_weight(source: LlamaFolder, module: str, kind: str) -> _Planned:
    from cotune.compression.gguf_weights import fits_gguf_blocks

    num_out, num_in = source.shape.tensor_shapes()[f"{module}.weight"]
    packed = source.packed.get(f"{module}.weight")
    if packed is not None and fits_gguf_blocks(packed):
        kind = "Q8_0" if packed.bits == 8 else "Q4_0" if packed.is_symmetric else "Q4_1"
    elif packed is not None or (kind in ("Q8_0", "Q4_0") and num_in % _BLOCK):
        kind, packed = "F16", None
    return _Planned(
        name=f"{gguf_name(module)}.weight",
        shape=(num_out, num_in),
        kind=kind,
        make=lambda: _stored(source, module, packed, kind),
    )


def _planned_vector(source: LlamaFolder, module: str, part: str) -> _Planned:
    order = row_order(module, source.shape)

    def make() -> NDArray[np.float32]:
        values = source.whole(f"{module}.{part}")
        return values if order is None else values[order]

    num = source.shape.module_shapes().get(module, (source.shape.hidden_size, 0))[0]
    return _Planned(name=f"{gguf_name(module)}.{part}", shape=(num,), kind="F32", make=make)


def _stored(source: LlamaFolder, module: str, packed: PackedWeight | None, kind: str) -> NDArray[Any]:
    """A weight's numbers as they lie in the file."""
    import gguf

    from cotune.compression.gguf_weights import in_gguf_blocks

    order = row_order(module, source.shape)
    if packed is not None:
        rows, found = in_gguf_blocks(packed)
        assert found.name == kind
        return rows if order is None else rows[order]
    whole = source.whole(f"{module}.weight")
    whole = whole if order is None else whole[order]
    stored: NDArray[Any] = gguf.quants.quantize(whole, gguf.GGMLQuantizationType[kind])
    return stored


def _write(path: Path, source: LlamaFolder, tokenizer: GgufTokenizer, planned: list[_Planned], kind: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.shape.architecture])
    try:
        _add_metadata(writer, source, kind)
        _add_tokenizer(writer, tokenizer, source)
        for tensor in planned:
            kind_of_it = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes, kind_of_it)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in planned:
            writer.write_tensor_data(np.ascontiguousarray(tensor.make()))
    finally:
        writer.close()


def _add_metadata(writer: Any, source: LlamaFolder, kind: str) -> None:
    import gguf

    shape: LlamaShape = source.shape
    writer.add_name(source.path.name)
    types = gguf.LlamaFileType
    writer.add_file_type(types.ALL_F32 if kind == "F32" else types[f"MOSTLY_{kind}"])
    writer.add_quantization_version(_QUANTISATION_VERSION)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_layers)
    writer.add_feed_forward_length(shape.mlp_width)
    writer.add_head_count(shape.num_heads)
    writer.add_head_count_kv(shape.num_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_string("cotune.source_digest", source.digest)


def _add_tokenizer(writer: Any, tokenizer: GgufTokenizer, source: LlamaFolder) -> None:
    shape = source.shape
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(list(tokenizer.tokens))
    writer.add_token_types(list(tokenizer.types))
    if tokenizer.merges:
        writer.add_token_merges(list(tokenizer.merges))
    if shape.bos_id is not None:
        writer.add_bos_token_id(shape.bos_id)
    if shape.end_ids:
        writer.add_eos_token_id(shape.end_ids[0])
    if shape.pad_id is not None:
        writer.add_pad_token_id(shape.pad_id)
    writer.add_add_bos_token(tokenizer.adds_bos)
    template = source.path / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _bits(source: LlamaFolder, config: GgufExportConfig) -> int:
    """Of a weight of the linear layers; the most, where they differ."""
    if source.packed:
        return max(weight.bits for weight in source.packed.values())
    return int("".join(filter(str.isdigit, config.kind.partition("_")[0])))
