"""The offline model folder as exporters write it: there whole or not at all, described by `offline.json`.

`cotune.device.offline.folder` reads it, and says what each entry means.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cotune.compression.llama_folder import LlamaFolder
from cotune.durable import new_folder
from cotune.errors import InputError
from cotune.models.weights import read_tokenizer

FORMAT = 1
DESCRIPTION_FILE = "offline.json"

_COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_SPARE_BYTES = 2**24
"""Left free on the disk beside the model."""


@contextmanager
def offline_folder(out: Path, *, num_bytes: int) -> Iterator[Path]:
    """Give a folder to write a model into; at the end it is called `out`, after an error nothing is left.

    Args:
        out: what it is called at the end; nothing is there yet.
        num_bytes: how much will be written, at most.

    Raises:
        InputError: there is something at `out`, the disk has too little room, or refuses.
    """
    if out.exists() or out.is_symlink():
        raise InputError(f"{out} is there already, expected a new folder; remove it, or name another one")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out.parent).free
        if free < num_bytes + _SPARE_BYTES:
            raise InputError(
                f"{out} takes {num_bytes / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free there, expected that and "
                f"{_SPARE_BYTES >> 20} MiB to spare; make room, take fewer bits, or name another disk"
            )
        with new_folder(out) as folder:
            yield folder
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}; nothing is left of it") from error


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
        OSError: the disk refuses.
    """
    for name in _COPIED_FILES:
        if (source.path / name).is_file():
            shutil.copyfile(source.path / name, folder / name)
    shape = source.shape
    description = {
        "format": FORMAT,
        "runtime": runtime,
        "files": {path.name: _digest(path) for path in sorted(folder.iterdir())},
        "vocab_size": shape.vocab_size,
        "context": shape.context,
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "bits": bits,
        "end_ids": list(shape.end_ids),
        "bos_id": shape.bos_id,
        "adapter_modules": {name: {"in": num_in, "out": out} for name, (out, num_in) in adapter_modules.items()},
        "source_digest": source.digest,
        "tokenizer_digest": hashlib.sha256(read_tokenizer(source.path)).hexdigest(),
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """What `describe` wrote.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = folder / DESCRIPTION_FILE
    try:
        described = json.loads(path.read_bytes())
        if described["format"] != FORMAT:
            raise ValueError(f"format {described['format']!r:.20}")
        return {name: described[name] for name in ("runtime", "context", "source_digest")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}), expected the folder of an exported model; export the model again"
        ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
