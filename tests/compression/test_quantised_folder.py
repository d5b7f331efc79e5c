"""A quantised model's folder is written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressible import tiny_model
from safetensors.torch import load_file
from tiny_models import tokenizer_json

from cotune.compression.quantise import quantise
from cotune.compression.quantised_folder import save_quantised
from cotune.errors import InputError
from cotune.models import Backbone, Projections


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    model = tiny_model()
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "README.md").write_text("about the source")
    Projections.random(tap_layers=range(4), hidden_size=32, seed=4).save(folder / "projections.safetensors")
    return folder


def test_the_folder_has_all_that_a_model_needs(source: Path, tmp_path: Path) -> None:
    backbone = Backbone.from_pretrained(str(source))
    report = quantise(backbone.model, "rtn", embedding_bits=4, head_bits=4)
    out = tmp_path / "new" / "out"
    digest = save_quantised(out, backbone.model, report.packed, method="rtn", source=str(source))
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "packed.json",
        "packed.safetensors",
        "projections.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    loaded = Backbone.from_pretrained(str(out))
    assert loaded.spec.backbone_digest == digest != backbone.spec.backbone_digest
    assert loaded.spec.tokenizer_digest == backbone.spec.tokenizer_digest
    assert loaded.spec.eos_token_ids == (2, 7)
    assert loaded.projections.digest == backbone.projections.digest
    assert loaded.spec.num_parameters == backbone.spec.num_parameters
    assert json.loads((out / "packed.json").read_text())["method"] == "rtn"
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))
    whole = load_file(out / "model.safetensors")
    assert len(whole) == 7 and all("norm" in name for name in whole)


def test_whole_weights_take_16_bits_where_these_hold_them(source: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(0.1)
        model.model.layers[0].input_layernorm.weight.fill_(1 + 2.0**-10)
    report = quantise(model, "rtn")
    save_quantised(tmp_path / "out", model, report.packed, method="rtn", source=str(source))
    whole = load_file(tmp_path / "out" / "model.safetensors")
    assert whole["model.norm.weight"].dtype == torch.float32
    assert whole["model.layers.0.input_layernorm.weight"].dtype == torch.float16
    assert whole["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16
    for name, tensor in whole.items():
        assert torch.equal(tensor.float(), model.get_parameter(name))


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    report = quantise(model, "rtn")
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "packed.json":
            raise OSError(28, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=r"out cannot be written: No space left on device"):
        save_quantised(tmp_path / "here" / "out", model, report.packed, method="rtn", source=str(source))
    assert list((tmp_path / "here").iterdir()) == []


def test_bad_input_is_one_clear_sentence(source: Path, tmp_path: Path) -> None:
    model = tiny_model()
    report = quantise(model, "rtn")
    with pytest.raises(InputError, match="source is there already, expected a new folder"):
        save_quantised(source, model, report.packed, method="rtn", source=str(source))
    with pytest.raises(InputError, match="is no folder"):
        save_quantised(tmp_path / "out", model, report.packed, method="rtn", source="./missing")
    other = tiny_model(intermediate_size=40)
    with pytest.raises(InputError, match=r"the packed weight .*mlp.* is none of LlamaForCausalLM's weights"):
        save_quantised(tmp_path / "out", other, report.packed, method="rtn", source=str(source))
    with pytest.raises(InputError, match="is none of LlamaForCausalLM's weights"):
        weights = {"nothing.weight": next(iter(report.packed.values()))}
        save_quantised(tmp_path / "out", model, weights, method="rtn", source=str(source))
    assert not (tmp_path / "out").exists()
