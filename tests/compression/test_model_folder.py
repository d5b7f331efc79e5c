"""A whole model in a folder, there completely or not at all."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressible import tiny_model
from safetensors import safe_open
from tiny_models import tokenizer_json

from cotune.compression import model_folder
from cotune.compression.fewer_layers import drop_blocks
from cotune.compression.model_folder import save_model
from cotune.errors import InputError
from cotune.models.weights import load_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "projections.safetensors").write_bytes(b"fits")
    (folder / "README.md").write_text("about the source")
    return folder


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_tokenizer_and_template_come_along_and_projections_where_they_fit(source: Path, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    save_model(tmp_path / "made" / "same", model, source=str(source))
    always = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"}
    assert files(tmp_path / "made" / "same") == always | {"projections.safetensors"}
    drop_blocks(model, [1])
    save_model(tmp_path / "made" / "fewer", model, source=str(source))
    assert files(tmp_path / "made" / "fewer") == always
    assert files(tmp_path / "made") == {"same", "fewer"}
    with safe_open(tmp_path / "made" / "fewer" / "model.safetensors", "pt") as stored:
        names = set(stored.keys())
    assert "lm_head.weight" not in names and len(names) == 2 * 9 + 2
    assert json.loads((tmp_path / "made" / "fewer" / "config.json").read_text())["architectures"] == [
        "LlamaForCausalLM"
    ]


def test_16_bits_where_they_hold_everything(source: Path, tmp_path: Path) -> None:
    whole = tiny_model(tie_word_embeddings=True)
    cases: list[tuple[torch.dtype, str | None, torch.dtype]] = [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.float16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ]
    for index, (exact, asked, stored) in enumerate(cases):
        model = tiny_model(dtype=exact, tie_word_embeddings=True).float()
        folder = tmp_path / str(index)
        save_model(folder, model, source=str(source), dtype=asked)
        assert model.config.dtype == whole.config.dtype
        again = load_model(folder, dtype="float32", device="cpu")
        assert json.loads((folder / "config.json").read_text())["dtype"] == str(stored).removeprefix("torch.")
        for name, parameter in again.named_parameters():
            expected = model.get_parameter(name)
            assert torch.equal(parameter, expected.to(stored).float())


def test_nothing_is_left_where_the_disk_refuses(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    target = tmp_path / "place" / "model"
    copy = shutil.copyfile

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_folder.shutil, "copyfile", full)
    with pytest.raises(InputError, match=r"model cannot be written: No space left on device; nothing is left of it"):
        save_model(target, model, source=str(source))
    assert files(tmp_path / "place") == set()
    monkeypatch.setattr(model_folder.shutil, "copyfile", copy)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match=r"model takes [0-9.]+ MiB and 0\.0 MiB are free there"):
            save_model(target, model, source=str(source))
    assert files(tmp_path / "place") == set()
    save_model(target, model, source=str(source))
    with pytest.raises(InputError, match="is there already, expected a new folder"):
        save_model(target, model, source=str(source))
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float32, bfloat16, float16"):
        save_model(tmp_path / "other", model, source=str(source), dtype="int8")
    with pytest.raises(InputError, match="is no folder"):
        save_model(tmp_path / "other", model, source="./nowhere")
