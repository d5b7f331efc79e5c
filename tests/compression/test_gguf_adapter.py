"""An adapter file, added as llama.cpp adds it to the file of its model, is the adapter on the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from llama_folders import save_llama
from numpy.typing import NDArray
from safetensors.numpy import load_file
from transformers import PreTrainedModel

from cotune.compression.gguf_export import GgufExportConfig, export_gguf
from cotune.compression.llama_folder import LlamaFolder
from cotune.errors import InputError

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

from cotune.compression.gguf_adapter import export_gguf_adapter  # noqa: E402
from cotune.compression.gguf_model import load_gguf, read_gguf_tensors  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

TOKENS = torch.tensor([[0, 17, 230, 5, 399, 88, 12, 301, 64, 7, 7, 150]])


def save_adapter(model: PreTrainedModel, folder: Path, **options: Any) -> NDArray[np.float32]:
    """A random LoRA as peft saves it; the adapted model's logits. The model is as before afterwards."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.3, generator=generator)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    logits: NDArray[np.float32] = wrapped(TOKENS).logits[0].detach().numpy()
    wrapped.unload()
    return logits


def merged_as_llama_cpp(model_file: Path, adapter_file: Path, source: LlamaFolder) -> NDArray[np.float32]:
    """Logits of the file's model after W + (alpha / rank) B A in every weight, in the file's order of rows."""
    tensors, adapter = read_gguf_tensors(model_file), read_gguf_tensors(adapter_file)
    alpha = float(gguf.GGUFReader(adapter_file).fields["adapter.lora.alpha"].contents())
    for name, a in adapter.items():
        if name.endswith(".lora_a"):
            b = adapter[name.replace(".lora_a", ".lora_b")]
            tensors[name.removesuffix(".lora_a")] += alpha / b.shape[1] * b @ a
    writer = gguf.GGUFWriter(model_file.with_name("merged.gguf"), "llama")
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    logits: NDArray[np.float32] = load_gguf(model_file.with_name("merged.gguf"), source)(TOKENS).logits[0].numpy()
    return logits


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True, "target_modules": ["k_proj", "v_proj", "up_proj"]},
        {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_added_by_llama_cpp_s_rule_it_is_the_adapter(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "source", kind)
    expected = save_adapter(model, tmp_path / "lora", **options)
    export_gguf(tmp_path / "source", tmp_path / "out", GgufExportConfig(kind="F32"))
    export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")
    source = LlamaFolder(tmp_path / "source")
    found = merged_as_llama_cpp(tmp_path / "out" / "model.gguf", tmp_path / "lora.gguf", source)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5 * float(np.abs(expected).max()))
    assert np.abs(expected - model(TOKENS).logits[0].numpy()).max() > 0.1


def test_the_file_has_one_alpha_and_scaled_factors(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "source")
    save_adapter(model, tmp_path / "lora", target_modules=["o_proj"])
    export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")
    own = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    stored = read_gguf_tensors(tmp_path / "lora.gguf")
    for i in (0, 1):
        module, name = f"base_model.model.model.layers.{i}.self_attn.o_proj", f"blk.{i}.attn_output.weight"
        np.testing.assert_array_equal(stored[f"{name}.lora_a"], own[f"{module}.lora_A.weight"])
        np.testing.assert_array_equal(stored[f"{name}.lora_b"], own[f"{module}.lora_B.weight"] * np.float32(1.5))
    fields = gguf.GGUFReader(tmp_path / "lora.gguf").fields
    facts = {name: fields[name].contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert facts == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "sets use_dora, which an offline model cannot take"),
        ({"target_modules": ["lm_head"]}, "changes 'lm_head', which this offline model cannot swap"),
    ],
)
def test_more_than_lora_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_adapter(save_llama(tmp_path / "source"), tmp_path / "lora", **options)
    with pytest.raises(InputError, match=message):
        export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")
    assert not (tmp_path / "lora.gguf").exists()


def test_another_model_s_adapter_is_refused(tmp_path: Path) -> None:
    save_adapter(save_llama(tmp_path / "other", hidden_size=48), tmp_path / "lora")
    save_llama(tmp_path / "source")
    with pytest.raises(InputError, match=r"has lora_A .* and lora_B .* for .*proj, expected \(rank, (32|48)\)"):
        export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")


def test_a_disk_that_refuses_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_adapter(save_llama(tmp_path / "source"), tmp_path / "lora")
    (tmp_path / "lora.gguf").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(InputError, match="No space left on device"):
        export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")
    assert (tmp_path / "lora.gguf").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"source", "lora", "lora.gguf"}


def test_llama_cpp_adds_it(tmp_path: Path) -> None:
    """Through the high-level interface, which takes an adapter when it opens a model."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    model = save_llama(tmp_path / "source")
    expected = save_adapter(model, tmp_path / "lora")
    export_gguf(tmp_path / "source", tmp_path / "out", GgufExportConfig(kind="F32"))
    export_gguf_adapter(tmp_path / "lora", tmp_path / "source", tmp_path / "lora.gguf")
    opened = llama_cpp.Llama(
        # Keys and values in float32: in half precision logits move by up to a hundredth of their spread.
        type_k=0,
        type_v=0,
        model_path=str(tmp_path / "out" / "model.gguf"),
        lora_path=str(tmp_path / "lora.gguf"),
        n_ctx=64,
        logits_all=True,
        verbose=False,
    )
    opened.eval(TOKENS[0].tolist())
    assert np.abs(opened.scores[: TOKENS.shape[1]] - expected).max() < 1e-3 * expected.std()
