"""llama.cpp as exact as it can be: keys and values in float32, no attention kernel that rounds queries.

As it is used, it keeps keys and values in half precision, which moves logits by up to a hundredth of their spread.
"""

from __future__ import annotations

from typing import Any

import pytest

_FLOAT32 = 0  # of ggml_type


def make_exact(llama_cpp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All texts that are opened from now on."""
    default = llama_cpp.llama_context_default_params

    def exact() -> Any:
        parameters = default()
        parameters.type_k = parameters.type_v = _FLOAT32
        parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        return parameters

    monkeypatch.setattr(llama_cpp, "llama_context_default_params", exact)
