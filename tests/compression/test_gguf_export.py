"""A GGUF file read back by the gguf package is the source: weights, order of rows, metadata; llama.cpp where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llama_folders import save_llama
from numpy.typing import NDArray
from tiny_models import tokenizer_json
from transformers import PreTrainedModel

from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.grid import Grid
from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError
from cotune.models.packed_folder import packed_files

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

from cotune.compression.gguf_model import load_gguf, read_gguf_tensors  # noqa: E402

TOKENS = [0, 17, 230, 5, 399, 88, 12, 301, 64, 7, 7, 150]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def logits_of(model: PreTrainedModel, tokens: Sequence[int] = TOKENS) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model(torch.tensor([list(tokens)])).logits[0].detach().numpy()
    return found


def exported(folder: Path, kind: str = "F32", **options: Any) -> Path:
    export_gguf(folder / "source", folder / "out", GgufExportConfig(kind=kind, **options))
    return folder / "out" / "model.gguf"


def read_back(path: Path) -> PreTrainedModel:
    return load_gguf(path, LlamaFolder(path.parents[1] / "source"))


def metadata(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def rotated_as_llama_cpp(
    heads: NDArray[np.float32], frequencies: NDArray[np.float64], positions: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Neighbours of (seq, heads, head_dim) turned by position times frequency, as llama.cpp's `llama` does."""
    pairs = heads.reshape(*heads.shape[:-1], -1, 2).astype(np.float64)
    angles = positions[:, None, None] * frequencies
    cos, sin = np.cos(angles), np.sin(angles)
    turned = np.stack([pairs[..., 0] * cos - pairs[..., 1] * sin, pairs[..., 0] * sin + pairs[..., 1] * cos], axis=-1)
    return turned.reshape(heads.shape)


def forward_as_llama_cpp(path: Path, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Logits (seq, vocab) of a file of architecture llama, from its tensors and metadata alone, in NumPy."""
    w, about = read_gguf_tensors(path), metadata(path)
    heads, kv_heads = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    dim, eps = about["llama.rope.dimension_count"], about["llama.attention.layer_norm_rms_epsilon"]
    frequencies = about["llama.rope.freq_base"] ** -(np.arange(0, dim, 2) / dim) / w.get("rope_freqs.weight", 1.0)
    positions = np.arange(len(tokens))

    def norm(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w[f"{name}.weight"]

    def linear(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T.astype(np.float64) + w.get(f"{name}.bias", 0.0)

    x = w["token_embd.weight"][list(tokens)].astype(np.float64)
    for i in range(about["llama.block_count"]):
        h = norm(x, f"blk.{i}.attn_norm")
        q, k, v = (
            linear(h, f"blk.{i}.attn_{which}").reshape(len(tokens), num, dim)
            for which, num in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = (rotated_as_llama_cpp(each, frequencies, positions) for each in (q, k))
        k, v = (np.repeat(each, heads // kv_heads, axis=1) for each in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim)
        scores[:, positions[:, None] < positions] = -np.inf
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        x = x + linear(np.einsum("hqk,khd->qhd", shares, v).reshape(len(tokens), -1), f"blk.{i}.attn_output")
        h = norm(x, f"blk.{i}.ffn_norm")
        gate = linear(h, f"blk.{i}.ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"blk.{i}.ffn_up"), f"blk.{i}.ffn_down")
    head = "output" if "output.weight" in w else "token_embd"
    return linear(norm(x, "output_norm"), head)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_read_as_llama_cpp_reads_it_a_whole_file_gives_the_source_s_logits(
    kind: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    expected = logits_of(save_llama(tmp_path / "source", kind, **changes))
    found = forward_as_llama_cpp(exported(tmp_path), TOKENS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


def test_a_qwen_whose_heads_llama_cpp_cannot_read_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", "qwen2", head_dim=32)
    with pytest.raises(InputError, match="has 2 heads of 32 numbers and a hidden size of 32, expected 32 numbers"):
        exported(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_qwen_s_rows_stay_in_order(tmp_path: Path) -> None:
    """llama.cpp's `qwen2` turns halves against each other, as transformers does."""
    model = save_llama(tmp_path / "source", "qwen2")
    path = exported(tmp_path)
    tensors = read_gguf_tensors(path)
    for part in ("weight", "bias"):
        own = model.get_parameter(f"model.layers.1.self_attn.q_proj.{part}").numpy()
        np.testing.assert_array_equal(tensors[f"blk.1.attn_q.{part}"], own)
    np.testing.assert_array_equal(logits_of(read_back(path)), logits_of(model))
    assert metadata(path)["general.architecture"] == "qwen2"


@pytest.mark.parametrize(("kind", "largest_error"), [("F32", 0.0), ("F16", 0), ("Q8_0", 0.5 / 127), ("Q4_0", 1 / 8)])
def test_weights_differ_by_their_format_s_rounding_alone(kind: str, largest_error: float, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "source", intermediate_size=64, tie_word_embeddings=True)
    found = dict(read_back(exported(tmp_path, kind)).named_parameters())
    errors = []
    for name, parameter in model.named_parameters():
        difference = (found[name] - parameter).abs()
        if parameter.ndim == 1:
            assert float(difference.max()) == 0
            continue
        largest = parameter.reshape(-1, 32).abs().amax(1, keepdim=True)
        errors.append(float((difference.reshape(-1, 32) / largest).max()))
    # Scales are float16 themselves.
    assert largest_error / 2 <= max(errors) <= largest_error + (0 if kind == "F32" else 2**-11)


def test_rows_that_are_no_multiple_of_a_block_become_f16(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", intermediate_size=40)
    reader = gguf.GGUFReader(exported(tmp_path, "Q4_0", embedding_kind="Q8_0"))
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["output_norm.weight"] == "F32"


def test_a_quantised_folder_s_own_codes_are_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = save_llama(source)
    grids = {"q_proj": Grid(bits=4, is_symmetric=True), "k_proj": Grid(bits=8, is_symmetric=True)}
    # Rows of 48 and groups of 32: a block would cross the border of a group.
    grids |= {"v_proj": Grid(bits=3), "down_proj": Grid(bits=4)}
    packed = {
        name: round_to_nearest(parameter, grid)
        for name, parameter in model.named_parameters()
        for last, grid in grids.items()
        if name.endswith(f"{last}.weight")
    }
    whole = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    model.save_pretrained(source, state_dict=whole)
    for name, data in packed_files(packed, method="rtn", whole=(source / "model.safetensors").read_bytes()).items():
        (source / name).write_bytes(data)
    path = exported(tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    names = ("attn_q", "attn_k", "attn_v", "ffn_down", "ffn_up")
    assert [kinds[f"blk.1.{name}.weight"] for name in names] == ["Q4_0", "Q8_0", "Q4_1", "F16", "F32"]
    found = dict(read_back(path).named_parameters())
    for name, weight in packed.items():
        expected = weight.dequantised()
        is_exact = name.endswith(("q_proj.weight", "k_proj.weight"))
        error = np.abs(found[name].numpy() - expected).max() / np.abs(expected).max()
        assert error == 0 if is_exact else 0 < error < 1e-3
    assert json.loads((path.parent / "offline.json").read_bytes())["bits"] == 8


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    path = exported(tmp_path, "Q4_0", context=32)
    about = metadata(path)
    described = json.loads((path.parent / "offline.json").read_bytes())
    assert about["general.architecture"] == "llama"
    assert about["llama.context_length"] == described["context"] == 32
    assert about["llama.attention.key_length"] == 16
    assert about["tokenizer.ggml.bos_token_id"] == 0
    assert about["tokenizer.ggml.eos_token_id"] == 1
    assert about["tokenizer.ggml.add_bos_token"] is True
    assert about["tokenizer.chat_template"] == "{{ messages }}"
    assert about["cotune.source_digest"] == described["source_digest"]
    assert about["tokenizer.ggml.pre"] == "gpt-2"
    words = json.loads(tokenizer_json())["model"]["vocab"]
    assert about["tokenizer.ggml.tokens"] == sorted(words, key=lambda word: words[word])
    assert (described["runtime"], described["bits"]) == ("gguf", 4)
    assert {entry.name for entry in path.parent.iterdir()} == {*described["files"], "offline.json"}


def test_k_quants_need_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "source")
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"kind is Q4_K_M, which llama.cpp makes itself, and llama-cpp-python is not"):
        exported(tmp_path, "Q4_K_M")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_yarn_is_refused_for_gguf(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", rope_parameters={"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0})
    with pytest.raises(InputError, match="a rotary embedding of type 'yarn', expected default or linear or llama3"):
        exported(tmp_path)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(InputError, match=r"takes .* MiB and 1.0 MiB are free"):
        exported(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    with pytest.raises(InputError, match="No space left on device; nothing is left"):
        exported(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "Q5_0"}, "kind is 'Q5_0', expected one of F32, F16"),
        ({"embedding_kind": "Q4_K_M"}, "embedding_kind is 'Q4_K_M', expected one of F32"),
        ({"kind": "Q4_K_M", "embedding_kind": "Q8_0"}, "of which llama.cpp chooses"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GgufExportConfig(**values)


def test_another_model_s_file_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    path = exported(tmp_path)
    save_llama(tmp_path / "other", hidden_size=48)
    with pytest.raises(InputError, match=r"has .* of shape .*, expected .* for .*other"):
        load_gguf(path, LlamaFolder(tmp_path / "other"))
    path.write_bytes(b"no GGUF at all")
    with pytest.raises(InputError, match="cannot be read as a GGUF file"):
        read_gguf_tensors(path)
