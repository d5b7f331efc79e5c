"""The offline model folder: what is read, and what is refused with one sentence."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cotune.device.offline.folder import (
    MAX_DESCRIPTION_BYTES,
    ModuleShape,
    OfflineDescription,
    OfflineFolder,
    digest_file,
    write_description,
)
from cotune.errors import InputError

FILES = {"model.onnx": b"graph", "model.onnx.data": b"weights" * 1000, "tokenizer.json": b"{}"}


def describe(files: dict[str, bytes], **changes: Any) -> OfflineDescription:
    digests = {name: sha256(data).hexdigest() for name, data in files.items()}
    fields: dict[str, Any] = {
        "runtime": "onnx",
        "files": digests,
        "vocab_size": 97,
        "context": 64,
        "num_layers": 2,
        "num_kv_heads": 1,
        "head_dim": 4,
        "bits": 4,
        "end_ids": (2,),
        "bos_id": None,
        "adapter_modules": {"model.layers.0.self_attn.q_proj": ModuleShape(in_dim=8, out_dim=8)},
        "source_digest": "a" * 64,
        "tokenizer_digest": digests.get("tokenizer.json", "b" * 64),
    }
    return OfflineDescription(**{**fields, **changes})


def write(folder: Path, files: dict[str, bytes] | None = None, **changes: Any) -> Path:
    files = FILES | (files or {})
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "offline.json").write_bytes(describe(files, **changes).to_json())
    return folder


def edit(folder: Path, **changes: Any) -> Path:
    described = folder / "offline.json"
    data = {**json.loads(described.read_bytes()), **changes}
    described.write_text(json.dumps({name: value for name, value in data.items() if value != "REMOVE"}))
    return folder


def test_a_folder_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = OfflineFolder.open(write(tmp_path / "model"))
    assert folder.description == describe(FILES)
    assert folder.tokenizer_json == b"{}" and folder.chat_template is None
    assert folder.model_file == tmp_path / "model" / "model.onnx"
    assert folder.num_model_bytes == len(FILES["model.onnx"]) + len(FILES["model.onnx.data"])
    data = json.loads((tmp_path / "model" / "offline.json").read_bytes())
    assert data["format"] == 1
    assert data["adapter_modules"] == {"model.layers.0.self_attn.q_proj": {"in": 8, "out": 8}}


def test_a_chat_template_comes_from_its_own_file_or_from_the_tokenizers_settings(tmp_path: Path) -> None:
    settings = json.dumps({"chat_template": "from settings"}).encode()
    inside = write(tmp_path / "inside", {"tokenizer_config.json": settings})
    assert OfflineFolder.open(inside).chat_template == "from settings"
    own = write(tmp_path / "own", {"tokenizer_config.json": settings, "chat_template.jinja": b"own"})
    assert OfflineFolder.open(own).chat_template == "own"
    without = write(tmp_path / "without", {"tokenizer_config.json": b'{"model_max_length": 8}'})
    assert OfflineFolder.open(without).chat_template is None
    words = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None}
    named = write(tmp_path / "named", {"tokenizer_config.json": json.dumps(words).encode()})
    assert OfflineFolder.open(named).special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    no_object = write(tmp_path / "no_object", {"tokenizer_config.json": b"[]"})
    with pytest.raises(InputError, match=r"tokenizer_config\.json holds a list, expected an object"):
        OfflineFolder.open(no_object)
    no_text = write(tmp_path / "no_text", {"chat_template.jinja": b"\xff"})
    with pytest.raises(InputError, match=r"chat_template\.jinja is no UTF-8"):
        OfflineFolder.open(no_text)
    several = write(tmp_path / "several", {"tokenizer_config.json": b'{"chat_template": [1]}'})
    with pytest.raises(InputError, match="a chat_template that is a list, expected one string"):
        OfflineFolder.open(several)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_in_any_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model")
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} is damaged or another file: its SHA-256 is .*copy the folder again"):
        OfflineFolder.open(folder)


@pytest.mark.parametrize("name", [*FILES, "offline.json"])
def test_a_missing_file_is_told_by_name(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing|has no {name}, so it is no offline model; make one"):
        OfflineFolder.open(folder)


def test_other_things_than_an_offline_model_are_called_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"is no folder, expected an offline model; make one with `cotune compress"):
        OfflineFolder.open(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no offline model but a Hugging Face model"):
        OfflineFolder.open(tmp_path)
    (tmp_path / "plugin.json").write_text("{}")
    with pytest.raises(InputError, match="no offline model but a plugin"):
        OfflineFolder.open(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "not of format 1; use the cotune that wrote it"),
        ({"runtime": "mlc"}, "runtime is 'mlc', expected one of onnx, gguf"),
        ({"runtime": "gguf"}, "files does not name model.gguf"),
        ({"files": {"../x": "0" * 64}}, r"files names '\.\./x', expected plain names"),
        ({"files": {"model.onnx": "0"}}, "has '0' for model.onnx, expected a SHA-256"),
        ({"files": {"model.onnx": 7}}, "model.onnx = 7, expected str"),
        ({"files": {"model.onnx": "0" * 64}}, "files does not name tokenizer.json"),
        ({"files": {f"f{i}": "0" * 64 for i in range(65)}}, "files has 65 entries, expected at most 64"),
        ({"vocab_size": 0}, "vocab_size is 0, expected 1 to"),
        ({"context": 2**40}, "context is 1099511627776, expected 1 to"),
        ({"context": "long"}, "context = 'long', expected int"),
        ({"num_layers": True}, "num_layers = True, expected int"),
        ({"end_ids": [97]}, "name the token 97, expected 0 to 96"),
        ({"end_ids": ["x"]}, "end_ids = 'x', expected int"),
        ({"bos_id": -1}, "name the token -1"),
        ({"bos_id": "REMOVE", "bits": "REMOVE"}, "bits = None, expected int"),
        ({"adapter_modules": {"q": {"in": 0, "out": 1}}}, "in_dim of a module is 0, expected 1 to"),
        ({"adapter_modules": {"q": [1, 2]}}, r"q = \[1, 2\], expected dict"),
        ({"source_digest": "x"}, "source_digest is 'x', expected a SHA-256"),
        ({"tokenizer_digest": "0" * 64}, "tokenizer_digest is not that of tokenizer.json"),
        ({"speed": 9}, "has the field 'speed', which format 1 does not know"),
    ],
)
def test_a_wrong_description_is_one_sentence_with_the_field(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"offline\.json cannot be used: .*{words}"):
        OfflineFolder.open(edit(write(tmp_path / "model"), **changes))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"[1]", "holds a list, expected an object"),
        (b"\xff", "it is no JSON"),
        (b"[" * 100_000, "it is no JSON"),
        (b" " * (MAX_DESCRIPTION_BYTES + 1), f"has {MAX_DESCRIPTION_BYTES + 1} bytes, expected at most"),
    ],
    ids=["list", "bytes", "deep", "large"],
)
def test_a_description_that_is_no_json_object_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    folder = write(tmp_path / "model")
    (folder / "offline.json").write_bytes(data)
    with pytest.raises(InputError, match=words):
        OfflineFolder.open(folder)


def test_what_cannot_be_read_again_is_not_written_either(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vocab_size is 0"):
        replace(describe(FILES), vocab_size=0)
    (tmp_path / "model.onnx").write_bytes(b"graph")
    about = {one.name: getattr(describe(FILES), one.name) for one in fields(OfflineDescription)}
    del about["files"], about["tokenizer_digest"]
    with pytest.raises(InputError, match=r"files does not name tokenizer\.json"):
        write_description(tmp_path, **about)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    about = {one.name: getattr(describe(FILES), one.name) for one in fields(OfflineDescription)}
    del about["files"], about["tokenizer_digest"]
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    assert write_description(tmp_path, **about) == describe(FILES)
    assert OfflineFolder.open(tmp_path).description == describe(FILES)


def test_the_digest_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_file(tmp_path / "x") == sha256(b"abc").hexdigest()
