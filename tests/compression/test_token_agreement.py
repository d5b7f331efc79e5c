"""Where an export writes what its source writes, the comparison says so; where not, it says where and why."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_folders import save_llama

from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.onnx_export import OnnxExportConfig, export_onnx
from cotune.compression.token_agreement import (
    INT8_ACTIVATIONS,
    ORDER_OF_SUMS,
    UNEXPLAINED,
    TokenAgreement,
    cause_of,
    compare_tokens,
)
from cotune.compression.written_weights import Rounding
from cotune.device.offline.folder import digest_file
from cotune.errors import InputError

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

PROMPTS = ("Please", "the little town", "a", "Tell me of")


def compared(folder: Path, config: OnnxExportConfig, **changes: Any) -> TokenAgreement:
    save_llama(folder / "source", **changes)
    export_onnx(folder / "source", folder / "out", config)
    return compare_tokens(folder / "source", folder / "out", PROMPTS, max_new_tokens=24)


@pytest.mark.parametrize("bits", [4, 32])
def test_an_exact_export_writes_the_same_tokens(bits: int, tmp_path: Path) -> None:
    found = compared(tmp_path, OnnxExportConfig(rounding=Rounding(bits=bits), activation_bits=32))
    assert found.agrees
    assert (found.num_prompts, found.num_tokens, found.num_same) == (4, 96, 96)
    assert 0 < found.largest_error < 1e-3
    assert str(found).startswith("4 of 4 texts are the same token by token, 96 of 96 choices")


def test_int8_activations_are_named_as_the_cause(tmp_path: Path) -> None:
    found = compared(tmp_path, OnnxExportConfig(rounding=Rounding(bits=4)), num_hidden_layers=4)
    assert not found.agrees
    assert found.is_explained
    assert {difference.cause for difference in found.differences} == {INT8_ACTIVATIONS}
    for difference in found.differences:
        assert difference.source_token != difference.exported_token
        assert difference.source_margin > 0 < difference.exported_margin
        assert difference.source_margin + difference.exported_margin <= 2 * difference.largest_error
    assert found.num_same < found.num_tokens


def test_another_model_in_the_graph_is_no_rounding(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out", OnnxExportConfig(rounding=Rounding(bits=32)))
    path = tmp_path / "out" / "model.plain.onnx"
    model = onnx.load(str(path), load_external_data=False)
    (damaged,) = [tensor for tensor in model.graph.initializer if tensor.name == "model.norm.weight"]
    damaged.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(damaged)[::-1].copy(), damaged.name))
    path.write_bytes(model.SerializeToString())
    described = json.loads((tmp_path / "out" / "offline.json").read_bytes())
    described["files"][path.name] = digest_file(path)
    (tmp_path / "out" / "offline.json").write_text(json.dumps(described))
    found = compare_tokens(tmp_path / "source", tmp_path / "out", PROMPTS, max_new_tokens=8)
    assert not found.is_explained
    assert {difference.cause for difference in found.differences} == {UNEXPLAINED}
    assert "unexplained" in str(found)


@pytest.mark.parametrize(
    ("exported", "with_floats", "cause"),
    [
        ([0.0, 2.0009], [0.0, 2.0009], ORDER_OF_SUMS),
        ([0.0, 2.1], [0.0, 2.0009], INT8_ACTIVATIONS),
        ([0.0, 2.1], [0.0, 2.1], UNEXPLAINED),
        ([0.0, 2.0009], [0.0, 2.1], UNEXPLAINED),
    ],
)
def test_causes_by_hand(exported: list[float], with_floats: list[float], cause: str) -> None:
    """The spread of the source's logits is 1, and sums may differ by a thousandth of it."""
    assert cause_of(np.array([0.0, 2.0]), np.array(exported), np.array(with_floats)) == cause


def test_an_export_of_another_model_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out")
    path = tmp_path / "out" / "offline.json"
    described = json.loads(path.read_bytes())
    path.write_text(json.dumps({**described, "source_digest": "0" * 64}))
    with pytest.raises(InputError, match=r"was made of the model 000000000000, .* is "):
        compare_tokens(tmp_path / "source", tmp_path / "out", PROMPTS)


def test_a_gguf_file_is_held_against_its_own_weights(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    save_llama(tmp_path / "source", intermediate_size=64)
    for kind in ("F32", "Q4_0"):
        export_gguf(tmp_path / "source", tmp_path / kind, GgufExportConfig(kind=kind))
        found = compare_tokens(tmp_path / "source", tmp_path / kind, PROMPTS, max_new_tokens=24)
        assert found.is_explained
        assert found.agrees or kind == "Q4_0"


def test_without_llama_cpp_a_gguf_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    save_llama(tmp_path / "source")
    export_gguf(tmp_path / "source", tmp_path / "out")
    with pytest.raises(InputError, match="runtime gguf need llama-cpp-python"):
        compare_tokens(tmp_path / "source", tmp_path / "out", PROMPTS)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    with pytest.raises(InputError, match=r"has no offline.json, so it is no offline model but a Hugging Face model"):
        compare_tokens(tmp_path / "source", tmp_path / "source", PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "message"), [((), "prompts are none"), (("ab " * 60,), "a prompt has .* tokens .* expected 1 to 32")]
)
def test_prompts_that_cannot_be_compared_are_refused(prompts: tuple[str, ...], message: str, tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out")
    with pytest.raises(InputError, match=message):
        compare_tokens(tmp_path / "source", tmp_path / "out", prompts)
