"""The llama.cpp runtime over a fake of its binding, and over the real one where it is installed."""

from __future__ import annotations

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exact_llama import make_exact
from fake_llama import FakeLlama
from offline_folders import CONTEXT, LAYERS, TinyLlama, random_adapter, write_onnx_folder
from toy import VOCAB

from cotune.device.offline import llama_model
from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.llama_model import LlamaModel, has_amx
from cotune.device.offline.model import OfflineSettings
from cotune.errors import InputError

IDS = np.random.default_rng(7).integers(3, VOCAB, CONTEXT)
TINY = TinyLlama()
EXPECTED = TINY.logits(IDS)


def gguf_folder(path: Path, data: bytes = b"GGUF and the rest", **changes: Any) -> OfflineFolder:
    """What describes the tiny Llama as a GGUF file."""
    described = OfflineFolder.open(write_onnx_folder(path, TINY)).description
    (path / "model.gguf").write_bytes(data)
    files = {name: described.files[name] for name in ("tokenizer.json",)} | {"model.gguf": sha256(data).hexdigest()}
    description = replace(described, runtime="gguf", files=files, **changes)
    (path / "offline.json").write_bytes(description.to_json())
    return OfflineFolder.open(path)


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> FakeLlama:
    fake = FakeLlama(TINY)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    monkeypatch.setattr(llama_model, "_QUIET", [])
    return fake


@pytest.fixture
def model(llama: FakeLlama, tmp_path: Path) -> LlamaModel:
    return LlamaModel(gguf_folder(tmp_path / "model"), OfflineSettings(num_threads=3))


def test_the_logits_are_those_of_the_model(model: LlamaModel, llama: FakeLlama) -> None:
    text = model.open()
    first = text.extend(IDS[:20], num_logits=3)
    rest = [text.extend([token]) for token in IDS[20:]]
    np.testing.assert_array_equal(np.concatenate([first, *rest]), EXPECTED[17:])
    params = llama.contexts[0].params
    assert (params.n_ctx, params.n_threads, params.n_threads_batch, params.n_seq_max) == (CONTEXT, 3, 3, 1)
    assert all(batch.is_freed for batch in llama.batches) and llama.num_inits == 1
    # Logits cost a product with the whole vocabulary each: no more of them than were asked for.
    assert sum(sum(batch.logits) for batch in llama.batches) == 3 + len(rest)


def test_long_extensions_go_in_pieces(model: LlamaModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_model, "_MAX_BATCH", 7)
    np.testing.assert_array_equal(model.open().extend(IDS[:30], num_logits=12), EXPECTED[18:30])


def test_after_a_cut_everything_is_as_if_it_had_never_been_longer(model: LlamaModel) -> None:
    text = model.open()
    text.extend(IDS[:10])
    text.extend(IDS[40:60])
    text.truncate(10)
    np.testing.assert_array_equal(text.extend(IDS[10:15], num_logits=5), EXPECTED[10:15])
    assert text.length == 15
    with pytest.raises(InputError, match="length is 16"):
        text.truncate(16)


def test_a_failure_leaves_the_text_as_it_was(
    model: LlamaModel, llama: FakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama_model, "_MAX_BATCH", 4)
    text = model.open()
    text.extend(IDS[:5])
    llama.fail_at = 12
    with pytest.raises(InputError, match=r"failed at token 5 \(llama_decode gave 1\); is there enough memory"):
        text.extend(IDS[5:15])
    llama.fail_at = None
    assert text.length == 5
    np.testing.assert_array_equal(text.extend(IDS[5:7], num_logits=2), EXPECTED[5:7])
    assert all(batch.is_freed for batch in llama.batches)


def test_adapters_are_set_for_each_text(model: LlamaModel, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF1")
    mine = model.load_adapter(tmp_path / "mine.gguf")
    assert mine.name == "mine.gguf"
    found = model.open(mine).extend(IDS[:9], num_logits=9)
    np.testing.assert_array_equal(found, TINY.logits(IDS[:9], random_adapter(seed=5)))
    np.testing.assert_array_equal(model.open().extend(IDS[:9], num_logits=9), TINY.logits(IDS[:9]))


def test_adapters_that_cannot_be_used_are_told(model: LlamaModel, llama: FakeLlama, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF1")
    mine = model.load_adapter(tmp_path / "mine.gguf")
    other = LlamaModel(gguf_folder(tmp_path / "other"))
    with pytest.raises(InputError, match=r"adapter mine\.gguf was loaded by another runtime or model"):
        other.open(mine)
    llama.refuse = {"set"}
    with pytest.raises(InputError, match=r"cannot use the adapter mine\.gguf"):
        model.open(mine)
    assert llama.contexts[-1].is_freed
    llama.refuse = {"adapter"}
    with pytest.raises(InputError, match="is no LoRA adapter of this model"):
        model.load_adapter(tmp_path / "mine.gguf")
    (tmp_path / "peft").write_bytes(b"not")
    with pytest.raises(InputError, match="begins with b'not', expected a GGUF file"):
        model.load_adapter(tmp_path / "peft")
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\), expected a GGUF file"):
        model.load_adapter(tmp_path / "nothing")
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(llama_model.MAX_ADAPTER_BYTES + 1)
    with pytest.raises(InputError, match="has 536870913 bytes"):
        model.load_adapter(tmp_path / "huge")


@pytest.mark.parametrize("flags", ["fpu amx_bf16 amx_int8 amx_tile", "fpu avx512f"])
def test_the_way_round_the_crash_on_processors_with_tiles(
    llama: FakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name: x amx\nflags\t\t: {flags}\n")
    assert has_amx(info) == ("amx" in flags) and not has_amx(tmp_path / "nothing")
    monkeypatch.setattr(llama_model, "has_amx", lambda: has_amx(info))
    LlamaModel(gguf_folder(tmp_path / "model"))
    params = llama.model_params
    assert params is not None and params.use_extra_bufts == ("amx" not in flags)
    assert params.load_mode == 1 and params.n_gpu_layers == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": VOCAB + 1}, "its vocab_size is 97, expected 98; export it again"),
        ({"num_layers": LAYERS + 1}, "its num_layers is 2, expected 3; export it again"),
        ({"context": 128}, "context is 128, expected at most 64, which this model was made for"),
    ],
)
def test_a_file_of_another_model_is_refused_and_given_back(
    llama: FakeLlama, tmp_path: Path, changes: Any, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        LlamaModel(gguf_folder(tmp_path / "model", **changes))
    assert llama.num_models == 0


def test_damaged_files_and_too_little_memory(llama: FakeLlama, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.gguf begins with b'ab', expected a GGUF file"):
        LlamaModel(gguf_folder(tmp_path / "foreign", b"ab"))
    llama.refuse = {"model"}
    with pytest.raises(InputError, match=r"model\.gguf is no model that llama\.cpp can open"):
        LlamaModel(gguf_folder(tmp_path / "damaged"))
    llama.refuse = {"context"}
    with pytest.raises(InputError, match=r"llama\.cpp has no room for a text of 64 tokens"):
        LlamaModel(gguf_folder(tmp_path / "large")).open()


def test_what_is_closed_stays_closed(model: LlamaModel, llama: FakeLlama) -> None:
    text = model.open()
    text.close()
    text.close()
    with pytest.raises(InputError, match="the text is closed"):
        text.extend([5])
    forgotten = model.open()
    del forgotten
    assert all(context.is_freed for context in llama.contexts)
    model.close()
    model.close()
    assert llama.num_models == 0
    with pytest.raises(InputError, match="the offline model is closed"):
        model.open()


def test_without_the_binding_or_with_another_kind_of_it(
    tmp_path: Path, llama: FakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = gguf_folder(tmp_path / "model")
    monkeypatch.delattr(FakeLlama, "llama_get_memory")
    with pytest.raises(InputError, match=r"llama-cpp-python 0\.0\.fake has no llama_get_memory, expected a version"):
        LlamaModel(folder)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(InputError, match=r"need llama-cpp-python \(.*\); run: pip install llama-cpp-python==0\.3\.36"):
        LlamaModel(folder)


def test_the_real_binding_has_everything_that_is_used() -> None:
    real = pytest.importorskip("llama_cpp", reason="llama-cpp-python compiles for a quarter of an hour")
    assert [name for name in llama_model._USED if not hasattr(real, name)] == []
    parameters = real.llama_model_default_params()
    assert all(hasattr(parameters, name) for name in ("n_gpu_layers", "load_mode", "use_extra_bufts"))
    parameters = real.llama_context_default_params()
    names = ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch")
    assert all(hasattr(parameters, name) for name in names)


def test_the_real_binding_gives_the_logits_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python compiles for a quarter of an hour")
    make_exact(llama_cpp, monkeypatch)
    gguf = pytest.importorskip("gguf")
    from tiny_gguf import write_tiny_gguf

    write_tiny_gguf(gguf, tmp_path / "made.gguf", TINY)
    model = LlamaModel(gguf_folder(tmp_path / "model", (tmp_path / "made.gguf").read_bytes()))
    text = model.open()
    text.extend(IDS[:10])
    text.extend(IDS[40:50])
    text.truncate(10)
    np.testing.assert_allclose(text.extend(IDS[10:15], num_logits=5), EXPECTED[10:15], atol=1e-4)
