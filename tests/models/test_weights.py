"""Loading models: from a name to weights, a tokenizer and digests, or to one clear sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from cotune.errors import InputError
from cotune.models import Backbone, Projections
from cotune.models.weights import digest_folder, digest_model, find_model_folder

MakeModel = Callable[..., PreTrainedModel]


def save(model: PreTrainedModel, tokenizer_json: bytes, folder: Path, **options: object) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    return folder


@pytest.fixture
def folder(make_model: MakeModel, tokenizer_json: bytes, tmp_path: Path) -> Path:
    return save(make_model("llama"), tokenizer_json, tmp_path / "model")


def test_a_saved_backbone_loads_as_it_was(backbone: Backbone, token_ids: NDArray[np.int64], tmp_path: Path) -> None:
    loaded = Backbone.from_pretrained(str(save(backbone.model, backbone.tokenizer_json, tmp_path / "model")))
    for name in ("logits", "hidden", "taps"):
        before = getattr(backbone.cursor().extend(token_ids), name)
        np.testing.assert_array_equal(getattr(loaded.cursor().extend(token_ids), name), before)
    assert loaded.spec.architecture == backbone.spec.architecture
    assert loaded.spec.tokenizer_digest == backbone.spec.tokenizer_digest
    assert loaded.spec.eos_token_ids == backbone.spec.eos_token_ids
    assert loaded.spec.backbone_digest == backbone.spec.backbone_digest


def test_the_digest_depends_on_the_weights_alone(folder: Path, make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    digest = digest_folder(folder)
    assert digest == digest_model(model)
    in_pieces = tmp_path / "pieces"
    model.save_pretrained(in_pieces, max_shard_size="10KB")
    assert len(list(in_pieces.glob("*.safetensors"))) > 1
    assert digest_folder(in_pieces) == digest
    for dtype in ("float32", "bfloat16", "float16"):
        loaded = Backbone.from_pretrained(str(folder), dtype=dtype)
        assert loaded.spec.backbone_digest == digest
        assert loaded.cursor().extend(np.array([3, 4])).logits.dtype == np.float32

    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert digest_model(model) != digest


def test_the_digest_counts_tied_weights_once(make_model: MakeModel, tmp_path: Path) -> None:
    tied = make_model("llama", tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert digest_folder(tmp_path) == digest_model(tied) != digest_model(make_model("llama"))


def test_the_starter_is_built_in() -> None:
    starter = Backbone.from_pretrained("starter")
    assert starter.spec.name == "starter"
    assert 1_000_000 <= starter.spec.num_parameters <= 4_000_000
    assert starter.cursor().extend(np.array([1])).logits.shape == (starter.spec.vocab_size,)


def test_projections_come_from_the_argument_the_folder_or_seed_0(folder: Path, tmp_path: Path) -> None:
    by_default = Backbone.from_pretrained(str(folder)).projections
    seed_0 = Projections.random(tap_layers=range(4), hidden_size=24, seed=0)
    assert by_default.digest == seed_0.digest
    in_folder = Projections.random(tap_layers=range(4), hidden_size=24, seed=1)
    in_folder.save(folder / "projections.safetensors")
    assert Backbone.from_pretrained(str(folder)).projections.digest == in_folder.digest
    seed_0.save(tmp_path / "given.safetensors")
    given = Backbone.from_pretrained(str(folder), projections=tmp_path / "given.safetensors")
    assert given.projections.digest == seed_0.digest
    with pytest.raises(InputError, match="is no file"):
        Backbone.from_pretrained(str(folder), projections=tmp_path / "missing.safetensors")


def test_end_tokens_come_from_the_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    assert Backbone.from_pretrained(str(folder)).spec.eos_token_ids == (2, 7)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "no weights"),
        ("tokenizer.json", "has no tokenizer.json"),
    ],
)
def test_a_missing_file_is_named(folder: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InputError, match=message):
        Backbone.from_pretrained(str(folder))


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model.bin\)"):
        Backbone.from_pretrained(str(folder))


def test_weights_that_do_not_fit_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not fit its config"):
        Backbone.from_pretrained(str(folder))


def headed(header: object) -> bytes:
    """A safetensors file of a header and nothing else."""
    data = json.dumps(header).encode()
    return len(data).to_bytes(8, "little") + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0[]",
        b"PK\x03\x04" * 9,
        headed({"a": 3}),
        headed({"a": {"dtype": "F32", "shape": [1]}}),
        headed({"a": {"dtype": "F32", "shape": [2**60], "data_offsets": [0, 2**62]}}),
        headed({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", 4]}}),
        headed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-(2**40), 4]}}),
    ],
)
def test_weights_that_are_no_safetensors_are_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=r"model"):
        Backbone.from_pretrained(str(folder))
    with pytest.raises(InputError, match="no safetensors file"):
        digest_folder(folder)


def test_broken_configs_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    for broken in ("{", json.dumps({**config, "model_type": "nonsense"}), "[]"):
        (folder / "config.json").write_text(broken)
        with pytest.raises(InputError, match="cannot be loaded"):
            Backbone.from_pretrained(str(folder))


def test_remote_code_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match="cannot be loaded"):
        Backbone.from_pretrained(str(folder))


def test_an_encoder_is_refused(tokenizer_json: bytes, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=61, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    save(T5ForConditionalGeneration(config), tokenizer_json, tmp_path)
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        Backbone.from_pretrained(str(tmp_path))


def test_unknown_dtypes_and_devices_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="expected one of float32"):
        Backbone.from_pretrained(str(folder), dtype="int3")
    with pytest.raises(InputError, match="device is 'toaster'"):
        Backbone.from_pretrained(str(folder), device="toaster")


@pytest.mark.parametrize("model", ["./missing", "/no/such/folder", "", "a/b/c"])
def test_a_missing_folder_is_named(model: str) -> None:
    with pytest.raises(InputError, match="is no folder"):
        find_model_folder(model)


def test_a_hub_name_is_downloaded_without_pickles_and_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked[name] = options
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert Backbone.from_pretrained("someone/tiny").spec.name == "someone/tiny"
    assert asked == {"someone/tiny": {"allow_patterns": ["*.json", "model*.safetensors", "packed.safetensors"]}}


def test_an_unreachable_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: object) -> str:
        raise LocalEntryNotFoundError("cannot reach the hub\nand much more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=r"someone/tiny is neither a folder .* check the name") as caught:
        Backbone.from_pretrained("someone/tiny")
    assert "\n" not in str(caught.value)


def test_loading_is_silent_and_gives_the_settings_back(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    Backbone.from_pretrained(str(folder))
    assert capfd.readouterr() == ("", "")
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
