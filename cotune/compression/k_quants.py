"""K-quants: formats of GGUF that llama.cpp alone makes, out of a whole file."""

from __future__ import annotations

import ctypes
from pathlib import Path

from cotune.device.offline.llama_model import llama_binding
from cotune.errors import InputError


def quantise_by_llama_cpp(whole: Path, out: Path, kind: str) -> None:
    """Make a K-quant of a whole GGUF file.

    Args:
        whole: F16 or F32.
        out: what to write.
        kind: such as Q4_K_M.

    Raises:
        InputError: llama-cpp-python is not installed, or refuses the file.

    Example:
        >>> quantise_by_llama_cpp(Path("whole.gguf"), Path("model.gguf"), "Q4_K_M")  # doctest: +SKIP
    """
    import gguf

    llama = llama_binding()
    params = llama.llama_model_quantize_default_params()
    params.ftype = int(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    params.nthread = 1
    failed = llama.llama_model_quantize(bytes(whole), bytes(out), ctypes.byref(params))
    if failed or not out.is_file():
        raise InputError(f"llama.cpp made no {kind} of the model (error {failed}); take Q4_0 or Q8_0")
