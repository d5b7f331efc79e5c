"""A model that is not loaded: what is known of it, and that nothing of it stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from co_tuning import model_folder
from tokenizer_kinds import END, table_of

from cotune.errors import InputError
from cotune.federation.causal_model import CausalModel


@pytest.mark.parametrize(("family", "kind", "fits"), [("gpt2", "byte_level", 128), ("mamba2", "unigram", 500)])
def test_what_is_known_without_loading_it(tmp_path: Path, family: str, kind: str, fits: int) -> None:
    model = CausalModel(str(model_folder(tmp_path / "m", family, kind)))
    assert model.reader.end_id == END[kind] and len(model.reader.table) == len(table_of(kind))
    assert model.fitting(500) == fits and model.fitting(7) == 7
    assert model.size_bytes > (tmp_path / "m" / "model.safetensors").stat().st_size
    with model.loaded() as loaded:
        first = next(loaded.parameters())
        assert first.numel() > 0 and not first.requires_grad and not loaded.training
    assert all(one.numel() == 0 for one in loaded.parameters()) and first.numel() == 0
    with model.loaded() as again:
        assert next(again.parameters()).numel() > 0


def test_a_config_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", "llama", "byte_level")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for change, words in (
        ({"eos_token_id": None}, "has eos_token_id None"),
        ({"model_type": "abacus"}, "cannot be read"),
    ):
        path.write_text(json.dumps(config | change), encoding="utf-8")
        with pytest.raises(InputError, match=words):
            assert CausalModel(str(folder)).reader
    with pytest.raises(InputError, match="is no folder"):
        assert CausalModel(str(tmp_path / "nowhere")).digest
