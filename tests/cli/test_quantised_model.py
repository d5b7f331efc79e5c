"""A quantised model is a MODEL to every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models

from cotune.compression.quantise import quantise
from cotune.compression.quantised_folder import save_quantised
from cotune.data.assistant_text import generate_exchanges

Run = Callable[..., object]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One model quantised, and the same numbers as transformers writes them."""
    quantised, whole = (tmp_path_factory.mktemp("models") / name for name in ("quantised", "whole"))
    backbone = tiny_models.tiny_backbone("llama")
    backbone.model.save_pretrained(whole)
    (whole / "tokenizer.json").write_bytes(backbone.tokenizer_json)
    report = quantise(backbone.model, "rtn", bits=4, embedding_bits=8)
    save_quantised(quantised, backbone.model, report.packed, method="rtn", source=str(whole))
    backbone.model.save_pretrained(whole)
    return quantised, whole


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    rows = [{"request": each.request, "answer": each.answer} for each in generate_exchanges(3, seed=1)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "texts.jsonl"


def test_it_is_evaluated_and_tuned_as_its_numbers_are(
    run: Run, folders: tuple[Path, Path], texts: Path, tmp_path: Path
) -> None:
    ours, theirs = (json.loads(run("evaluate", model, texts, "--max-new-tokens", 1, "--json").out) for model in folders)
    assert ours["nats_per_token"] == theirs["nats_per_token"] > 0
    adapters = []
    for model in folders:
        out = tmp_path / f"from_{model.name}"
        made = run(
            *("tune", model, texts, "--method", "lora", "--rank", 2, "--out", out, "--epochs", 1),
            *("--learning-rate", 0.05, "--json"),
        )
        assert made.status == 0 and made.err == "", made.err
        adapters.append((out / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_a_damaged_one_is_one_sentence(run: Run, folders: tuple[Path, Path], texts: Path, tmp_path: Path) -> None:
    quantised, _ = folders
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in quantised.iterdir():
        (damaged / path.name).write_bytes(path.read_bytes()[: -9 if path.name == "packed.safetensors" else None])
    run("evaluate", damaged, texts).check_refusal("it was cut or added to, copy the model again")
