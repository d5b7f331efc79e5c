"""What the exporters say of a Llama in an offline model folder; the format is `cotune.device.offline.folder`'s."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.model_folder import TOKENIZER_FILES
from cotune.device.offline.folder import ModuleShape, write_description
from cotune.models.weights import read_tokenizer


def describe(
    folder: Path, source: LlamaFolder, *, runtime: str, bits: int, adapter_modules: Mapping[str, tuple[int, int]]
) -> None:
    """Put the source's tokenizer and `offline.json` to a model that is otherwise complete.

    Args:
        folder: with the model in it.
        source: what it was made of.
        runtime: `onnx` or `gguf`.
        bits: of a weight of its linear layers, 32 for float32.
        adapter_modules: outputs and inputs of the modules that take adapters, by dotted name.

    Raises:
        InputError: the source has no tokenizer that devices can read.
        OSError: the disk refuses.
    """
    read_tokenizer(source.path)
    for name in TOKENIZER_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    shape = source.shape
    write_description(
        folder,
        runtime=runtime,
        vocab_size=shape.vocab_size,
        context=shape.context,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        bits=bits,
        end_ids=shape.end_ids,
        bos_id=shape.bos_id,
        adapter_modules={
            name: ModuleShape(in_dim=num_in, out_dim=out) for name, (out, num_in) in adapter_modules.items()
        },
        source_digest=source.digest,
    )
