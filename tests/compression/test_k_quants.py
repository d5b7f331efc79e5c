"""llama.cpp reads exported files as they are meant, and makes K-quants. It all needs llama-cpp-python, CI has none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from exact_llama import make_exact
from llama_folders import save_llama

from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.k_quants import quantise_by_llama_cpp
from cotune.compression.llama_folder import LlamaFolder
from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.llama_model import LlamaModel
from cotune.device.offline.model import OfflineSettings
from cotune.errors import InputError

pytest.importorskip("gguf", reason="gguf is not installed")

TOKENS = [0, 17, 230, 5, 399, 88, 12, 301, 64, 7, 7, 150]


@pytest.mark.parametrize(
    ("architecture", "kind", "is_exact", "largest_error"),
    [
        ("llama", "F32", True, 2e-5),
        ("qwen2", "F32", True, 2e-5),
        # Keys and values in half precision.
        ("llama", "F32", False, 0.01),
        # Activations are rounded to int8 in blocks: a twenty-fifth in the root mean square, up to ten times that.
        ("llama", "Q8_0", False, 0.5),
        ("llama", "Q4_0", False, 0.5),
    ],
)
def test_it_gives_the_logits_of_the_file(
    architecture: str,
    kind: str,
    is_exact: bool,
    largest_error: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    if is_exact:
        make_exact(llama_cpp, monkeypatch)
    from cotune.compression.gguf_model import load_gguf

    save_llama(tmp_path / "source", architecture, intermediate_size=64)
    export_gguf(tmp_path / "source", tmp_path / "out", GgufExportConfig(kind=kind))
    source = LlamaFolder(tmp_path / "source")
    expected = load_gguf(tmp_path / "out" / "model.gguf", source)(torch.tensor([TOKENS])).logits[0].numpy()
    model = LlamaModel(OfflineFolder.open(tmp_path / "out"), OfflineSettings(num_threads=1))
    text = model.open()
    found = np.concatenate([text.extend(TOKENS[:5], num_logits=5), text.extend(TOKENS[5:], num_logits=7)])
    assert np.abs(found - expected).max() <= largest_error * expected.std()
    assert np.sqrt(np.mean((found - expected) ** 2)) <= largest_error / 5 * expected.std()
    text.truncate(7)
    assert np.abs(text.extend(TOKENS[7:]) - expected[-1:]).max() <= largest_error * expected.std()
    text.close()
    model.close()


def test_it_makes_k_quants(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    from cotune.compression.gguf_model import load_gguf

    model = save_llama(tmp_path / "source", hidden_size=256, intermediate_size=256)
    export_gguf(tmp_path / "source", tmp_path / "out", GgufExportConfig(kind="Q4_K_M"))
    found = load_gguf(tmp_path / "out" / "model.gguf", LlamaFolder(tmp_path / "source"))
    name = "model.layers.0.self_attn.q_proj.weight"
    error = (found.get_parameter(name) - model.get_parameter(name)).norm() / model.get_parameter(name).norm()
    assert 0.01 < float(error) < 0.12
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", "tokenizer.json", "offline.json"}


def test_without_llama_cpp_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match="need llama-cpp-python"):
        quantise_by_llama_cpp(tmp_path / "whole.gguf", tmp_path / "model.gguf", "Q4_K_M")
    assert not list(tmp_path.iterdir())
