"""A LoRA adapter of peft as a GGUF file, which llama.cpp puts on a model of `gguf_export` and takes off again.

llama.cpp adds (alpha / rank) B A x with one alpha for the file and the rank of each B. B comes with its own scale in
it, so that alpha is a rank here, and a B of another rank is multiplied once more. Rows of B of queries and keys are in
the order of the weight's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cotune.compression.gguf_export import check_gguf
from cotune.compression.gguf_names import ARCHITECTURES, gguf_name, row_order
from cotune.compression.llama_folder import LlamaFolder
from cotune.device.offline.folder import ModuleShape
from cotune.device.offline.lora_adapter import LoraAdapter
from cotune.durable import replacing
from cotune.errors import InputError


def export_gguf_adapter(adapter: Path, model: str | Path, out: Path) -> None:
    """Write a peft adapter folder as one GGUF file.

    Args:
        adapter: the folder, with a plain or rank-stabilised LoRA.
        model: that it was tuned on: a Hugging Face folder of the Llama family, a hub name, or `starter`.
        out: the file to make; an older one is replaced at the end.

    Raises:
        InputError: the adapter is more than LoRA on linear layers or does not fit the model, or the file cannot be
            written; what was at `out` is as before.

    Example:
        >>> export_gguf_adapter(Path("my-lora"), "starter", Path("my-lora.gguf"))  # doctest: +SKIP
    """
    check_gguf()
    source = LlamaFolder(model)
    shapes = source.shape.module_shapes()
    lora = LoraAdapter.read(
        adapter, {name: ModuleShape(in_dim=num_in, out_dim=num_out) for name, (num_out, num_in) in shapes.items()}
    )
    try:
        with replacing(out) as unfinished:
            _write(unfinished, lora, source)
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error


def _write(path: Path, lora: LoraAdapter, source: LlamaFolder) -> None:
    import gguf

    alpha = lora.rank
    writer = gguf.GGUFWriter(path, ARCHITECTURES[source.shape.architecture])
    try:
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", float(alpha))
        writer.add_string("cotune.source_digest", source.digest)
        for module, factors in lora.modules.items():
            order = row_order(module, source.shape)
            b = factors.b.T * np.float32(len(factors.b) / alpha)
            name = f"{gguf_name(module)}.weight"
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(factors.a.T))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b if order is None else b[order]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
