"""An offline model on llama.cpp, where llama-cpp-python is installed: the second runtime, for GGUF files.

It compiles for a quarter of an hour, so that it is no dependency. What is used of it is the small part of its C
interface below; tokens are made and read by cotune's own tokenizer, as everywhere.
"""

from __future__ import annotations

import ctypes
import importlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.device.offline.folder import OfflineDescription, OfflineFolder
from cotune.device.offline.model import Adapter, OfflineSettings, check_extension, check_truncation
from cotune.errors import InputError

TESTED_VERSION = "0.3.36"
MAX_ADAPTER_BYTES = 512 * 2**20

_MAGIC = b"GGUF"
_MAX_BATCH = 512
_USED = (
    "LLAMA_LOAD_MODE_MMAP",
    "llama_adapter_lora_init",
    "llama_backend_init",
    "llama_batch_free",
    "llama_batch_init",
    "llama_context_default_params",
    "llama_decode",
    "llama_free",
    "llama_get_logits_ith",
    "llama_get_memory",
    "llama_init_from_model",
    "llama_log_callback",
    "llama_log_set",
    "llama_memory_seq_rm",
    "llama_model_default_params",
    "llama_model_free",
    "llama_model_get_vocab",
    "llama_model_load_from_file",
    "llama_model_n_ctx_train",
    "llama_model_n_layer",
    "llama_set_adapters_lora",
    "llama_vocab_n_tokens",
)


@dataclass(frozen=True)
class GgufAdapter:
    """A LoRA adapter in llama.cpp's memory; it goes with its model. Fits `Adapter`."""

    name: str
    pointer: Any
    model: Any


class LlamaModel:
    """A GGUF file in llama.cpp. Fits `OfflineModel`.

    Args:
        folder: of runtime `gguf`.
        settings: context and threads.

    Raises:
        InputError: llama-cpp-python is not installed or of another kind, or the file is damaged or another model.

    Example:
        >>> model = LlamaModel(OfflineFolder.open("my-gguf"))            # doctest: +SKIP
        >>> mine = model.load_adapter(Path("my-adapter.gguf"))           # doctest: +SKIP
        >>> logits = model.open(mine).extend([5, 9, 30])                 # doctest: +SKIP
    """

    def __init__(self, folder: OfflineFolder, settings: OfflineSettings | None = None) -> None:
        settings = settings or OfflineSettings()
        self.folder = folder
        self.context = settings.context_of(folder.description)
        self.num_texts = settings.num_texts
        self._num_threads = settings.threads
        _check_magic(folder.model_file)
        self._llama = llama_binding()
        parameters = self._llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = self._llama.LLAMA_LOAD_MODE_MMAP
        # A build for this very machine crashes in its AMX products (ggml-org/llama.cpp issue 20824). Without buffers
        # of their own, weights do not get there.
        parameters.use_extra_bufts = not has_amx()
        self._model = self._llama.llama_model_load_from_file(bytes(folder.model_file), parameters)
        if not self._model:
            raise InputError(
                f"{folder.model_file} is no model that llama.cpp can open; copy the folder again, export the model "
                "again, or free some memory"
            )
        try:
            self._check()
        except InputError:
            self.close()
            raise

    def _check(self) -> None:
        """Hold the file against its description."""
        llama, description = self._llama, self.description
        found = {
            "vocab_size": llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)),
            "num_layers": llama.llama_model_n_layer(self._model),
        }
        for name, number in found.items():
            if number != getattr(description, name):
                raise InputError(
                    f"{self.folder.model_file} is another model than {self.folder.path} describes: its {name} is "
                    f"{number}, expected {getattr(description, name)}; export it again"
                )
        longest = llama.llama_model_n_ctx_train(self._model)
        if self.context > longest:
            raise InputError(f"context is {self.context}, expected at most {longest}, which this model was made for")

    @property
    def description(self) -> OfflineDescription:
        return self.folder.description

    def load_adapter(self, path: Path) -> GgufAdapter:
        _check_magic(path, most=MAX_ADAPTER_BYTES)
        pointer = self._llama.llama_adapter_lora_init(self._open_model(), bytes(path))
        if not pointer:
            raise InputError(f"{path} is no LoRA adapter of this model, expected one exported for it as GGUF")
        return GgufAdapter(path.name, pointer, self._model)

    def open(self, adapter: Adapter | None = None) -> LlamaText:
        model = self._open_model()
        if adapter is not None and (not isinstance(adapter, GgufAdapter) or adapter.model is not model):
            raise InputError(f"adapter {adapter.name} was loaded by another runtime or model; load it with this model")
        return LlamaText(self._llama, model, self.description.vocab_size, self.context, self._num_threads, adapter)

    def close(self) -> None:
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def _open_model(self) -> Any:
        if not self._model:
            raise InputError("the offline model is closed, expected an open one; load it again")
        return self._model


class LlamaText:
    """One text: a context of llama.cpp with one sequence in it. Fits `OfflineText`; `LlamaModel.open` makes it."""

    def __init__(
        self, llama: Any, model: Any, vocab_size: int, context: int, num_threads: int, adapter: GgufAdapter | None
    ) -> None:
        self.length = 0
        self._lock = Lock()
        self._llama = llama
        self._vocab_size = vocab_size
        self._context = context
        self._batch_size = min(context, _MAX_BATCH)
        parameters = llama.llama_context_default_params()
        parameters.n_ctx = context
        parameters.n_batch = parameters.n_ubatch = self._batch_size
        parameters.n_seq_max = 1
        parameters.n_threads = parameters.n_threads_batch = num_threads
        self._state: Any = llama.llama_init_from_model(model, parameters)
        if not self._state:
            raise InputError(
                f"llama.cpp has no room for a text of {context} tokens; take a shorter context, or free some memory"
            )
        # Also where nobody closes it.
        self._free = weakref.finalize(self, llama.llama_free, self._state)
        # What the context points to has to stay.
        self._adapter = adapter
        if adapter is not None:
            kind = getattr(llama, "llama_adapter_lora_p_ctypes", ctypes.c_void_p)
            pointers, scales = (kind * 1)(adapter.pointer), (ctypes.c_float * 1)(1.0)
            if llama.llama_set_adapters_lora(self._state, pointers, 1, scales) != 0:
                self.close()
                raise InputError(f"llama.cpp cannot use the adapter {adapter.name}; export it for this model again")

    def extend(self, token_ids: Sequence[int] | NDArray[np.int64], *, num_logits: int = 1) -> NDArray[np.float32]:
        with self._lock:
            return self._extend(token_ids, num_logits)

    def _extend(self, token_ids: Sequence[int] | NDArray[np.int64], num_logits: int) -> NDArray[np.float32]:
        if not self._state:
            raise InputError("the text is closed, expected an open one; open another")
        ids = check_extension(
            token_ids, length=self.length, context=self._context, vocab_size=self._vocab_size, num_logits=num_logits
        )
        logits = np.empty((num_logits, self._vocab_size), np.float32)
        first_wanted = len(ids) - num_logits
        for start in range(0, len(ids), self._batch_size):
            piece = ids[start : start + self._batch_size].tolist()
            wanted = [start + i >= first_wanted for i in range(len(piece))]
            failure = self._decode(self.length + start, piece, wanted)
            if failure:
                # Of the pieces before, nothing stays either.
                self._cut(self.length)
                raise InputError(
                    f"the offline model failed at token {self.length} (llama_decode gave {failure}); is there enough "
                    "memory?"
                )
            for i in (i for i, is_wanted in enumerate(wanted) if is_wanted):
                row = self._llama.llama_get_logits_ith(self._state, i)
                logits[start + i - first_wanted] = np.ctypeslib.as_array(row, shape=(self._vocab_size,))
        self.length += len(ids)
        return logits

    def _decode(self, position: int, piece: Sequence[int], wanted: Sequence[bool]) -> int:
        batch = self._llama.llama_batch_init(len(piece), 0, 1)
        try:
            batch.n_tokens = len(piece)
            for i, (token, is_wanted) in enumerate(zip(piece, wanted, strict=True)):
                batch.token[i] = token
                batch.pos[i] = position + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = is_wanted
            return int(self._llama.llama_decode(self._state, batch))
        finally:
            self._llama.llama_batch_free(batch)

    def truncate(self, length: int) -> None:
        check_truncation(length, length=self.length)
        self._cut(length)
        self.length = length

    def _cut(self, length: int) -> None:
        self._llama.llama_memory_seq_rm(self._llama.llama_get_memory(self._state), 0, length, -1)

    def close(self) -> None:
        # A step that is under way writes into the context until its end.
        with self._lock:
            self._state = None
            self._free()


def has_amx(cpu_info: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this processor has tiles (AMX)."""
    try:
        lines = cpu_info.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.startswith("flags")), "")
    return any(flag.startswith("amx") for flag in flags.split())


def _check_magic(path: Path, *, most: int | None = None) -> None:
    try:
        if most is not None and path.stat().st_size > most:
            raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {most}")
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}), expected a GGUF file") from error
    if start != _MAGIC:
        raise InputError(f"{path} begins with {start!r}, expected a GGUF file; export it again")


# The binding, once it has been told to be quiet, with the function that swallows its words.
_QUIET: list[tuple[Any, Any]] = []


def llama_binding() -> Any:
    """llama-cpp-python's C interface, told to be quiet.

    Raises:
        InputError: it is not installed, or lacks what is used of it.
    """
    try:
        llama: Any = importlib.import_module("llama_cpp")
    except (ImportError, OSError) as error:
        raise InputError(
            f"offline models of runtime gguf need llama-cpp-python ({error}); run: pip install llama-cpp-python=="
            f"{TESTED_VERSION}, which compiles for a while, or export the model as ONNX"
        ) from error
    missing = [name for name in _USED if not hasattr(llama, name)]
    if missing:
        raise InputError(
            f"llama-cpp-python {getattr(llama, '__version__', '?')} has no {missing[0]}, expected a version like "
            f"{TESTED_VERSION}; install that, or export the model as ONNX"
        )
    if all(known is not llama for known, _ in _QUIET):
        swallow = llama.llama_log_callback(_swallow)
        llama.llama_log_set(swallow, ctypes.c_void_p(0))
        llama.llama_backend_init()
        _QUIET.append((llama, swallow))
    return llama


def _swallow(level: int, text: bytes, data: Any) -> None:
    return
