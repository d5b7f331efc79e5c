"""A tiny Llama on ONNX Runtime against NumPy; cache, truncation and adapters to the last bit."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import onnx
import pytest
from offline_folders import (
    CONTEXT,
    LAYERS,
    TinyLlama,
    linear_shapes,
    make_graph,
    random_adapter,
    write_onnx_folder,
    write_peft_folder,
)
from onnx import TensorProto, helper
from toy import VOCAB

from cotune.device.offline.folder import ModuleShape, OfflineFolder
from cotune.device.offline.model import OfflineSettings
from cotune.device.offline.onnx_model import OnnxModel
from cotune.errors import InputError

IDS = np.random.default_rng(7).integers(3, VOCAB, CONTEXT)
TINY = TinyLlama()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> OfflineFolder:
    return OfflineFolder.open(write_onnx_folder(tmp_path_factory.mktemp("offline") / "model", TINY))


@pytest.fixture(scope="module")
def model(folder: OfflineFolder) -> Iterator[OnnxModel]:
    made = OnnxModel(folder, OfflineSettings(num_threads=1))
    yield made
    made.close()


def all_logits(model: OnnxModel, ids: Any, *pieces: int, adapter: Any = None) -> Any:
    """Of every position, read in pieces of these lengths and then token by token."""
    text = model.open(adapter)
    found, done = [], 0
    for piece in (*pieces, *[1] * (len(ids) - sum(pieces))):
        found.append(text.extend(ids[done : done + piece], num_logits=piece))
        done += piece
    text.close()
    return np.concatenate(found)


def test_the_logits_are_those_of_the_model(model: OnnxModel) -> None:
    expected = TINY.logits(IDS)
    assert expected.std() > 1
    for pieces in ((CONTEXT,), (), (5, 1, 20)):
        np.testing.assert_allclose(all_logits(model, IDS, *pieces), expected, atol=2e-4)


def test_only_the_wanted_logits_come(model: OnnxModel) -> None:
    whole = model.open().extend(IDS[:9], num_logits=9)
    assert whole.shape == (9, VOCAB) and whole.dtype == np.float32
    np.testing.assert_array_equal(model.open().extend(IDS[:9], num_logits=2), whole[7:])
    assert model.open().extend(IDS[:9]).shape == (1, VOCAB)


def test_after_a_cut_everything_is_as_if_it_had_never_been_longer(model: OnnxModel) -> None:
    text = model.open()
    text.extend(IDS[:10])
    first = text.extend(IDS[10:15], num_logits=5)
    text.extend(IDS[40:60])
    text.truncate(10)
    assert text.length == 10
    np.testing.assert_array_equal(text.extend(IDS[10:15], num_logits=5), first)
    text.truncate(0)
    text.extend(IDS[:10])
    np.testing.assert_array_equal(text.extend(IDS[10:15], num_logits=5), first)
    with pytest.raises(InputError, match="length is 16, expected 0 to 15"):
        text.truncate(16)


def test_texts_of_one_model_do_not_disturb_each_other(model: OnnxModel) -> None:
    alone = all_logits(model, IDS[:20], 4)
    left, right = model.open(), model.open()
    found = [left.extend(IDS[:4], num_logits=4)]
    right.extend(IDS[30:50])
    for token in IDS[4:20]:
        found.append(left.extend([token]))
        right.extend([token])
    np.testing.assert_array_equal(np.concatenate(found), alone)


def test_texts_in_threads_are_the_same(model: OnnxModel) -> None:
    alone = all_logits(model, IDS[:30], 8)
    found: list[Any] = []
    threads = [Thread(target=lambda: found.append(all_logits(model, IDS[:30], 8))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for one in found:
        np.testing.assert_array_equal(one, alone)


def test_the_context_is_a_limit_with_a_clear_error(folder: OfflineFolder) -> None:
    short = OnnxModel(folder, OfflineSettings(context=12, num_threads=1))
    text = short.open()
    text.extend(IDS[:12])
    with pytest.raises(InputError, match="the text would have 13 tokens, expected at most 12, the context"):
        text.extend([5])
    assert text.length == 12
    np.testing.assert_allclose(all_logits(short, IDS[:12], 5), TINY.logits(IDS[:12]), atol=2e-4)
    with pytest.raises(InputError, match="context is 65, expected at most 64"):
        OnnxModel(folder, OfflineSettings(context=CONTEXT + 1))


def test_an_adapter_changes_the_logits_and_is_swapped_without_a_rebuild(model: OnnxModel, tmp_path: Path) -> None:
    weights = {"mine": random_adapter(3, seed=1), "yours": random_adapter(1, seed=2, names=list(linear_shapes())[3:5])}
    adapters: dict[str, Any] = {
        name: model.load_adapter(write_peft_folder(tmp_path / name, one, scale=2.0)) for name, one in weights.items()
    }
    plain = all_logits(model, IDS[:20], 6)
    for name in ("mine", "yours", "mine"):
        found = all_logits(model, IDS[:20], 6, adapter=adapters[name])
        np.testing.assert_allclose(found, TINY.logits(IDS[:20], weights[name]), atol=3e-4)
        assert np.abs(found - plain).max() > 0.1
    # What another text had is not there any more, to the last bit; side by side neither.
    np.testing.assert_array_equal(all_logits(model, IDS[:20], 6), plain)
    mine, bare = model.open(adapters["mine"]), model.open()
    mine.extend(IDS[:6])
    np.testing.assert_array_equal(bare.extend(IDS[:6], num_logits=6), plain[:6])


def as_exported(folder: Path, **changes: Any) -> OfflineFolder:
    """Ranks of their own, logits of the last positions alone, and a second graph without adapters."""
    graph = make_graph(TINY, one_rank=False, first_logit=True)
    plain = make_graph(TINY, with_adapters=False, first_logit=True)
    return OfflineFolder.open(write_onnx_folder(folder, TINY, graph=graph, plain=plain, **changes))


def test_a_graph_that_computes_the_wanted_logits_alone(tmp_path: Path) -> None:
    model = OnnxModel(as_exported(tmp_path / "model"), OfflineSettings(num_threads=1))
    text = model.open()
    text.extend(IDS[:5])
    found = text.extend(IDS[5:15], num_logits=4)
    np.testing.assert_allclose(found, TINY.logits(IDS[:15])[11:], atol=2e-4)
    np.testing.assert_allclose(text.extend(IDS[15:18], num_logits=3), TINY.logits(IDS[:18])[15:], atol=2e-4)
    assert text._graph.takes_first_logit


def test_the_graph_without_adapters_is_used_where_there_is_none(tmp_path: Path) -> None:
    folder = as_exported(tmp_path / "model")
    some = random_adapter(2, names=list(linear_shapes())[2:5])
    peft = write_peft_folder(tmp_path / "mine", some)
    model = OnnxModel(folder, OfflineSettings(num_threads=1))
    assert set(model._graphs) == {"model.plain.onnx"}
    adapter = model.load_adapter(peft)
    # Modules with ranks of their own need no zeros for those that it does not change.
    assert set(adapter.modules) == set(some)
    np.testing.assert_allclose(all_logits(model, IDS[:9], 4, adapter=adapter), TINY.logits(IDS[:9], some), atol=3e-4)
    plain = model.open()
    assert plain._graph is model._graphs["model.plain.onnx"]
    np.testing.assert_allclose(plain.extend(IDS[:9], num_logits=9), TINY.logits(IDS[:9]), atol=2e-4)
    # Where an adapter will come, the weights are not held twice.
    only = OnnxModel(folder, OfflineSettings(num_threads=1, has_adapter=True))
    only.load_adapter(peft)
    assert set(only._graphs) == {"model.onnx"}
    np.testing.assert_allclose(only.open().extend(IDS[:9]), TINY.logits(IDS[:9])[8:], atol=2e-4)


def test_a_plain_graph_of_another_model_is_refused(tmp_path: Path) -> None:
    small = make_graph(TinyLlama(vocab_size=50), with_adapters=False)
    folder = OfflineFolder.open(write_onnx_folder(tmp_path / "model", TINY, plain=small))
    with pytest.raises(InputError, match=r"model\.plain\.onnx is another model than .*expected \[1, any, 97\]"):
        OnnxModel(folder)


def test_an_adapter_of_another_model_or_runtime_is_refused(model: OnnxModel, tmp_path: Path) -> None:
    name = next(iter(linear_shapes()))
    a, b = random_adapter()[name]
    with pytest.raises(InputError, match=r"expected \(rank, 16\) and \(32, rank\)"):
        model.load_adapter(write_peft_folder(tmp_path / "wide", {name: (np.vstack([a, a]), b)}))
    with pytest.raises(InputError, match="changes 'lm_head', which this offline model cannot swap"):
        model.load_adapter(write_peft_folder(tmp_path / "head", {"lm_head": (a, b)}))

    class Foreign:
        name = "x.gguf"

    with pytest.raises(InputError, match=r"adapter x\.gguf was loaded by another runtime"):
        model.open(Foreign())


def test_what_is_closed_stays_closed(folder: OfflineFolder) -> None:
    model = OnnxModel(folder, OfflineSettings(num_threads=1))
    text = model.open()
    text.close()
    with pytest.raises(InputError, match="the text is closed"):
        text.extend([5])
    model.close()
    with pytest.raises(InputError, match="the offline model is closed"):
        model.open()


def test_a_text_is_closed_after_the_step_that_is_under_way(
    folder: OfflineFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = OnnxModel(folder, OfflineSettings(num_threads=1)).open()
    has_begun, may_end, order = Event(), Event(), list[str]()

    class Slow:
        def run_with_iobinding(self, binding: Any) -> None:
            has_begun.set()
            assert may_end.wait(10)
            order.append("step")

    monkeypatch.setattr(text, "_graph", replace(text._graph, session=Slow()))
    step = Thread(target=lambda: text.extend([5]))
    closing = Thread(target=lambda: (text.close(), order.append("closed")))
    step.start()
    assert has_begun.wait(10)
    closing.start()
    closing.join(0.05)
    may_end.set()
    step.join(10)
    closing.join(10)
    assert order == ["step", "closed"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_weights_are_mapped_from_the_file(model: OnnxModel) -> None:
    maps = Path("/proc/self/maps").read_text()
    assert str(model.folder.path / "model.onnx.data") in maps


def rewritten(folder: Path, graph: onnx.ModelProto | None = None, **changes: Any) -> OfflineFolder:
    return OfflineFolder.open(write_onnx_folder(folder, TINY, graph=graph, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": LAYERS + 1}, r"it has no input past_key_values\.2\.key"),
        ({"vocab_size": VOCAB + 1}, r"its output logits has shape \[1, 'seq', 97\], expected \[1, any, 98\]"),
        (
            {"head_dim": 8},
            r"its input past_key_values\.0\.key has shape \[1, 1, 'past', 16\], expected \[1, 1, any, 8\]",
        ),
        ({"adapter_modules": {"lm_head": ModuleShape(in_dim=1, out_dim=2)}}, "it has no input lm_head.lora_A"),
        (
            {"adapter_modules": {next(iter(linear_shapes())): ModuleShape(in_dim=1, out_dim=32)}},
            r"q_proj\.lora_A has shape \[16, 'rank'\], expected \[1, any\]",
        ),
    ],
)
def test_a_graph_of_another_model_is_refused(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(
        InputError, match=rf"model\.onnx is another model than .* describes: .*{words}.*export it again"
    ):
        OnnxModel(rewritten(tmp_path / "model", **changes))


def test_a_graph_that_wants_more_or_counts_in_other_numbers_is_refused(tmp_path: Path) -> None:
    graph = make_graph(TINY)
    graph.graph.input.append(helper.make_tensor_value_info("position_ids", TensorProto.INT64, [1, "seq"]))
    with pytest.raises(InputError, match="it has the input position_ids, which nothing here fills"):
        OnnxModel(rewritten(tmp_path / "more", graph))
    graph = make_graph(TINY)
    graph.graph.node.append(helper.make_node("Cast", ["logits"], ["wide"], to=TensorProto.DOUBLE))
    graph.graph.output[0].CopyFrom(helper.make_tensor_value_info("wide", TensorProto.DOUBLE, [1, "seq", VOCAB]))
    for node in graph.graph.node:
        for names in (node.input, node.output):
            names[:] = [{"logits": "narrow", "wide": "logits"}.get(name, name) for name in names]
    graph.graph.output[0].name = "logits"
    with pytest.raises(InputError, match=r"its logits are tensor\(double\), expected all float or all float16"):
        OnnxModel(rewritten(tmp_path / "wide", graph))


def with_bytes(folder: Path, **files: bytes) -> OfflineFolder:
    """The folder with other files whose digests are right."""
    write_onnx_folder(folder, TINY)
    for name, data in files.items():
        (folder / name.replace("__", ".")).write_bytes(data)
    digests = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.name != "offline.json"
    }
    described = OfflineFolder.open(write_onnx_folder(folder.with_name("like"), TINY)).description
    (folder / "offline.json").write_bytes(replace(described, files=digests).to_json())
    return OfflineFolder.open(folder)


@pytest.mark.parametrize(
    "files",
    [{"model__onnx": b"GGUF and nothing else"}, {"model__onnx": b""}, {"model__onnx__data": b"too short"}],
    ids=["foreign", "empty", "short"],
)
def test_a_damaged_or_foreign_file_is_one_clear_error(tmp_path: Path, files: Any, capfd: Any) -> None:
    with pytest.raises(InputError, match=r"model\.onnx is (no model that onnxruntime|another model than)"):
        OnnxModel(with_bytes(tmp_path / "model", **files))
    assert capfd.readouterr() == ("", "")


def test_weights_outside_the_folder_are_not_read(tmp_path: Path) -> None:
    folder = write_onnx_folder(tmp_path / "model", TINY)
    (folder / "model.onnx.data").rename(tmp_path / "elsewhere")
    data = (folder / "model.onnx").read_bytes()
    assert b"model.onnx.data" in data
    proto = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../elsewhere"
    (folder / "model.onnx.data").write_bytes(b"")
    with pytest.raises(InputError, match="is no model that onnxruntime"):
        OnnxModel(with_bytes(tmp_path / "other", model__onnx=proto.SerializeToString()))


def test_without_onnxruntime_the_extra_is_named(folder: OfflineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"model\.onnx needs onnxruntime \(.*\); run: pip install 'cotune\[edge\]'"):
        OnnxModel(folder)


def test_a_failing_step_is_one_clear_error(folder: OfflineFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(folder, OfflineSettings(num_threads=1))
    text = model.open()
    text.extend([5])

    class Broken:
        def run_with_iobinding(self, binding: Any) -> None:
            raise RuntimeError("Failed to allocate memory\nmore")

    monkeypatch.setattr(text, "_graph", replace(text._graph, session=Broken()))
    with pytest.raises(InputError, match=r"failed at token 1 \(Failed to allocate memory\); is there enough memory"):
        text.extend([6])
    assert text.length == 1
