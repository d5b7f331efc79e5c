"""An exported GGUF file, run by llama.cpp here, to hold it against its source; and K-quants, which it makes itself.

llama-cpp-python is no dependency: it compiles for a quarter of an hour. Built with its defaults on a processor with AMX
it crashes at the first product of any quantised model, so that the extra buffers that AMX needs are switched off.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.compression.llama_folder import LlamaShape
from cotune.errors import InputError


class LlamaCppDecoder:
    """One text in one GGUF file.

    Attributes:
        length: tokens that have been read.

    Raises:
        InputError: llama-cpp-python is not installed, or cannot open the file.

    Example:
        >>> decoder = LlamaCppDecoder(Path("starter-q8/model.gguf"), shape)  # doctest: +SKIP
        >>> decoder.extend([1, 17, 4]).shape  # doctest: +SKIP
        (3, 2048)
    """

    def __init__(self, path: Path, shape: LlamaShape, *, num_threads: int = 1) -> None:
        llama_cpp = _installed()
        try:
            with _without_extra_buffers(llama_cpp):
                self._llama: Any = llama_cpp.Llama(
                    model_path=str(path), n_ctx=shape.context, n_threads=num_threads, logits_all=True, verbose=False
                )
        except (ValueError, RuntimeError, AssertionError) as error:
            raise InputError(f"llama.cpp cannot open {path.name}: {error}; export it again") from error
        self._context = shape.context

    @property
    def length(self) -> int:
        return int(self._llama.n_tokens)

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on."""
        self._llama.n_tokens = min(self.length, length)

    def extend(self, token_ids: Sequence[int], *, first_logit: int = 0) -> NDArray[np.float32]:
        """Append tokens; logits float32 (seq, vocab), of those from `first_logit` on, -1 for the last alone.

        Raises:
            InputError: the text would be longer than the context.
        """
        start, total = self.length, self.length + len(token_ids)
        if not start < total <= self._context:
            raise InputError(f"the text would have {total} tokens, expected at most {self._context} and one more")
        self._llama.eval(list(token_ids))
        return np.array(self._llama.scores[start:total][first_logit:], np.float32)


def quantise_by_llama_cpp(whole: Path, out: Path, kind: str) -> None:
    """Make a K-quant of a whole GGUF file.

    Args:
        whole: F16 or F32.
        out: what to write.
        kind: such as Q4_K_M.

    Raises:
        InputError: llama-cpp-python is not installed, or refuses the file.
    """
    import gguf

    llama_cpp = _installed()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    params.nthread = 1
    failed = llama_cpp.llama_model_quantize(bytes(whole), bytes(out), ctypes.byref(params))
    if failed or not out.is_file():
        raise InputError(f"llama.cpp made no {kind} of the model (error {failed}); take Q4_0 or Q8_0")


def _installed() -> ModuleType:
    if importlib.util.find_spec("llama_cpp") is None:
        raise InputError(
            "running a GGUF file needs llama-cpp-python, which is not installed; install it (it compiles for a quarter "
            "of an hour), or export to ONNX"
        )
    return importlib.import_module("llama_cpp")


@contextmanager
def _without_extra_buffers(llama_cpp: ModuleType) -> Iterator[None]:
    """Inside, models are opened without the buffers that AMX would be used with; `Llama` has no word for it."""
    binding = llama_cpp.llama_cpp
    defaults: Callable[[], Any] = binding.llama_model_default_params

    def changed() -> Any:
        params = defaults()
        params.use_extra_bufts = False
        return params

    binding.llama_model_default_params = changed
    try:
        yield
    finally:
        binding.llama_model_default_params = defaults
