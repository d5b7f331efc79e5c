"""The small part of llama-cpp-python that cotune uses, over a tiny Llama in NumPy.

It is as strict as the C library is dangerous: what would be a crash there is a failed assertion here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from offline_folders import LAYERS, TinyLlama, random_adapter


class _Params:
    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


class _Batch:
    def __init__(self, size: int) -> None:
        self.size = size
        self.n_tokens = 0
        self.token = [-1] * size
        self.pos = [-1] * size
        self.n_seq_id = [0] * size
        self.seq_id = [[-1] for _ in range(size)]
        self.logits = [False] * size
        self.is_freed = False


class _Context:
    def __init__(self, params: _Params) -> None:
        self.params = params
        self.tokens: list[int] = []
        self.adapter: dict[str, Any] | None = None
        self.rows: dict[int, Any] = {}
        self.is_freed = False


class FakeLlama(ModuleType):
    """Set it as `llama_cpp`.

    Args:
        model: what every file holds.
        context: which the file says that it was trained for.
    """

    __version__ = "0.0.fake"
    llama_adapter_lora_p_ctypes = ctypes.c_void_p

    def __init__(self, model: TinyLlama | None = None, *, context: int = 64) -> None:
        super().__init__("llama_cpp")
        self.LLAMA_LOAD_MODE_MMAP = 1
        self.tiny = model or TinyLlama()
        self.context = context
        self.contexts: list[_Context] = []
        self.batches: list[_Batch] = []
        self.adapters: list[dict[str, Any]] = []
        self.model_params: _Params | None = None
        self.num_models = 0
        self.num_inits = 0
        self.fail_at: int | None = None
        self.refuse: set[str] = set()

    def llama_backend_init(self) -> None:
        self.num_inits += 1

    def llama_log_callback(self, function: Callable[..., None]) -> Callable[..., None]:
        return function

    def llama_log_set(self, callback: Callable[..., None], data: Any) -> None:
        callback(2, b"chatter\n", data)

    def llama_model_default_params(self) -> _Params:
        return _Params(n_gpu_layers=99, load_mode=-1, use_extra_bufts=True)

    def llama_model_load_from_file(self, path: bytes, params: _Params) -> str | None:
        assert Path(path.decode()).is_file()
        self.model_params = params
        if "model" in self.refuse:
            return None
        self.num_models += 1
        return f"model {self.num_models}"

    def llama_model_free(self, model: str) -> None:
        assert all(context.is_freed for context in self.contexts)
        self.num_models -= 1

    def llama_model_get_vocab(self, model: str) -> str:
        return f"vocab of {model}"

    def llama_vocab_n_tokens(self, vocab: str) -> int:
        assert vocab.startswith("vocab of")
        return self.tiny.vocab_size

    def llama_model_n_layer(self, model: str) -> int:
        return LAYERS

    def llama_model_n_ctx_train(self, model: str) -> int:
        return self.context

    def llama_context_default_params(self) -> _Params:
        return _Params(n_ctx=512, n_batch=2048, n_ubatch=512, n_seq_max=1, n_threads=4, n_threads_batch=4)

    def llama_init_from_model(self, model: str, params: _Params) -> _Context | None:
        if "context" in self.refuse:
            return None
        self.contexts.append(_Context(params))
        return self.contexts[-1]

    def llama_free(self, context: _Context) -> None:
        assert not context.is_freed
        context.is_freed = True

    def llama_adapter_lora_init(self, model: str, path: bytes) -> int | None:
        if "adapter" in self.refuse:
            return None
        self.adapters.append(random_adapter(seed=len(Path(path.decode()).read_bytes())))
        return len(self.adapters)

    def llama_set_adapters_lora(self, context: _Context, adapters: Any, count: int, scales: Any) -> int:
        assert (count, list(scales)) == (1, [1.0])
        context.adapter = self.adapters[adapters[0] - 1]
        return -1 if "set" in self.refuse else 0

    def llama_batch_init(self, num_tokens: int, embd: int, num_seq_max: int) -> _Batch:
        assert (embd, num_seq_max) == (0, 1)
        self.batches.append(_Batch(num_tokens))
        return self.batches[-1]

    def llama_batch_free(self, batch: _Batch) -> None:
        assert not batch.is_freed
        batch.is_freed = True

    def llama_decode(self, context: _Context, batch: _Batch) -> int:
        assert not context.is_freed and 1 <= batch.n_tokens <= min(batch.size, context.params.n_batch)
        assert batch.pos == list(range(len(context.tokens), len(context.tokens) + batch.n_tokens))
        assert all(count == 1 for count in batch.n_seq_id) and all(ids == [0] for ids in batch.seq_id)
        assert len(context.tokens) + batch.n_tokens <= context.params.n_ctx
        context.tokens += batch.token
        if self.fail_at is not None and len(context.tokens) >= self.fail_at:
            return 1
        logits = self.tiny.logits(context.tokens, context.adapter)[-batch.n_tokens :]
        context.rows = {i: logits[i] for i in range(batch.n_tokens) if batch.logits[i]}
        return 0

    def llama_get_logits_ith(self, context: _Context, i: int) -> Any:
        return np.ascontiguousarray(context.rows[i]).ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_get_memory(self, context: _Context) -> Sequence[int]:
        assert not context.is_freed
        return context.tokens

    def llama_memory_seq_rm(self, memory: list[int], seq_id: int, start: int, end: int) -> bool:
        assert (seq_id, end) == (0, -1)
        del memory[start:]
        return True
