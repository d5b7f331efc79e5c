"""The exported graph is the model: logits, caches, drafts, adapters; and refusals leave nothing behind."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from llama_folders import CONTEXT, save_llama
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cotune.compression.grid import Grid
from cotune.compression.llama_folder import LlamaFolder
from cotune.compression.onnx_export import OnnxExportConfig, export_onnx, num_export_bytes, read_config
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.compression.token_agreement import reference_model
from cotune.compression.written_weights import Rounding, WrittenWeights
from cotune.device.offline.folder import OfflineFolder
from cotune.device.offline.lora_adapter import LoraAdapter, LoraFactors
from cotune.device.offline.model import OfflineSettings
from cotune.device.offline.onnx_model import OnnxModel
from cotune.errors import InputError
from cotune.models.packed_folder import packed_files

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from cotune.compression.llama_graph import with_activations  # noqa: E402

TOKENS = [0, 17, 230, 5, 399, 88, 12, 301, 64, 7, 7, 150]
WHOLE = OnnxExportConfig(rounding=Rounding(bits=32))


def logits_of(model: PreTrainedModel, tokens: Sequence[int] = TOKENS) -> NDArray[np.float32]:
    found: NDArray[np.float32] = model(torch.tensor([list(tokens)])).logits[0].detach().numpy()
    return found


def opened(folder: Path, *, has_adapter: bool = False, graph: bytes | None = None) -> OnnxModel:
    return OnnxModel(OfflineFolder.open(folder), OfflineSettings(num_threads=1, has_adapter=has_adapter), graph=graph)


def exported(folder: Path, config: OnnxExportConfig = WHOLE, *, has_adapter: bool = True) -> OnnxModel:
    export_onnx(folder / "source", folder / "out", config)
    return opened(folder / "out", has_adapter=has_adapter)


def read_in_pieces(
    model: OnnxModel, *lengths: int, adapter: LoraAdapter | None = None, tokens: Sequence[int] = TOKENS
) -> NDArray[np.float32]:
    """Logits of all positions, read in pieces of these lengths; all at once without any."""
    text, found, start = model.open(adapter), [], 0
    for length in lengths or (len(tokens),):
        found.append(text.extend(tokens[start : start + length], num_logits=length))
        start += length
    assert start == len(tokens)
    return np.concatenate(found)


def assert_same(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"num_key_value_heads": 4, "head_dim": 32, "rms_norm_eps": 0.1}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 100.0,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}}),
        ("mistral", {"sliding_window": CONTEXT}),
        ("qwen2", {}),
    ],
)
def test_whole_weights_give_the_source_s_logits(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = save_llama(tmp_path / "source", kind, **changes)
    assert_same(read_in_pieces(exported(tmp_path)), logits_of(model))


@pytest.mark.parametrize(
    "rounding",
    [
        Rounding(bits=4),
        Rounding(bits=8),
        Rounding(bits=4, embedding_bits=8),
        Rounding(bits=8, embedding_bits=32),
        Rounding(bits=4, group_size=32),
        Rounding(bits=4, is_symmetric=False),
        Rounding(bits=8, is_symmetric=False, group_size=None),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_rounded_weights_are_exactly_those_of_their_codes(rounding: Rounding, tied: bool, tmp_path: Path) -> None:
    save_llama(tmp_path / "source", hidden_size=24, tie_word_embeddings=tied)
    model = exported(tmp_path, OnnxExportConfig(rounding=rounding, activation_bits=32))
    rounded = reference_model(WrittenWeights(LlamaFolder(tmp_path / "source"), rounding))
    assert_same(read_in_pieces(model), logits_of(rounded))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_quantised_folder_s_own_codes_are_written(bits: int, tmp_path: Path) -> None:
    """Also where layers that are computed together have different bits, or none."""
    source = tmp_path / "source"
    model = save_llama(source)
    state = dict(model.named_parameters())
    grids = {"q_proj": Grid(bits=bits), "k_proj": Grid(bits=bits, is_symmetric=True), "up_proj": Grid(bits=8)}
    grids |= {"down_proj": Grid(bits=bits, group_size=None), "gate_proj": Grid(bits=3)}
    packed = {
        f"{name}.weight": round_to_nearest(state[f"{name}.weight"], grid)
        for name in LlamaFolder(source).shape.module_shapes()
        for last, grid in grids.items()
        if name.endswith(last)
    }
    with torch.no_grad():
        for name, weight in packed.items():
            state[name].copy_(torch.from_numpy(weight.dequantised()))
    whole = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    model.save_pretrained(source, state_dict=whole)
    for name, data in packed_files(packed, method="rtn", whole=(source / "model.safetensors").read_bytes()).items():
        (source / name).write_bytes(data)
    config = OnnxExportConfig(rounding=Rounding(embedding_bits=32), activation_bits=32)
    assert_same(read_in_pieces(exported(tmp_path, config)), logits_of(model))


def test_pieces_drafts_and_rollbacks_give_the_logits_of_one_pass(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "source")
    text = exported(tmp_path).open()
    expected = logits_of(model)
    assert_same(text.extend(TOKENS[:5], num_logits=5), expected[:5])
    assert_same(text.extend(TOKENS[5:6]), expected[5:6])
    text.extend([3, 4, 5])  # a draft that is not taken
    text.truncate(7)
    text.truncate(6)
    assert_same(text.extend(TOKENS[6:], num_logits=len(TOKENS) - 6), expected[6:])
    text.truncate(3)
    assert_same(text.extend(TOKENS[3:]), expected[-1:])
    text.truncate(3)
    assert_same(text.extend(TOKENS[3:], num_logits=len(TOKENS) - 7), expected[7:])


def test_without_shared_buffers_caches_grow(tmp_path: Path) -> None:
    """As contract says of `past_key_values` and `present`, for runtimes that pass them on."""
    model = save_llama(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out", WHOLE)
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs() if one.name.startswith("past_key_values")]
    outputs = [one.name for one in session.get_outputs()]
    assert outputs == ["logits", *(name.replace("past_key_values", "present") for name in names)]
    past = {name: np.zeros((1, 2, 0, 16), np.float32) for name in names}
    found = []
    for piece in (TOKENS[:6], TOKENS[6:7], TOKENS[7:]):
        total = next(iter(past.values())).shape[2] + len(piece)
        inputs = {"input_ids": np.array([piece]), "attention_mask": np.ones((1, total), np.int64)}
        logits, *present = session.run(None, inputs | past)
        found.append(logits[0])
        past = dict(zip(names, present, strict=True))
    assert next(iter(past.values())).shape == (1, 2, len(TOKENS), 16)
    assert_same(np.concatenate(found), logits_of(model))


def lora_adapter(model: PreTrainedModel, ranks: dict[str, int]) -> tuple[peft.PeftModel, LoraAdapter]:
    """peft's model with random adapters of these ranks, and what the graph is given for them."""
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=dict.fromkeys(ranks, 6)
    )
    wrapped = peft.get_peft_model(model, config).eval()
    modules: dict[str, LoraFactors] = {}
    generator = torch.Generator().manual_seed(1)
    for name, layer in wrapped.base_model.model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for factor in (a, b):
                torch.nn.init.normal_(factor.data, std=0.3, generator=generator)
            modules[name] = LoraFactors(
                a=np.ascontiguousarray(a.detach().numpy().T),
                b=np.ascontiguousarray(b.detach().numpy().T) * layer.scaling["default"],
            )
    return wrapped, LoraAdapter(name="random", modules=modules)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_adapters_are_swapped_without_a_rebuild(tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source", attention_bias=True)
    model = exported(tmp_path)
    plain = logits_of(source)
    # Ranks differ from module to module, and some have none.
    wrapped, adapter = lora_adapter(source, {"q_proj": 2, "v_proj": 5, "o_proj": 3, "up_proj": 1, "down_proj": 7})
    adapted = logits_of(wrapped)
    assert np.abs(adapted - plain).max() > 0.1
    for expected, chosen in ((plain, None), (adapted, adapter), (plain, None), (adapted, adapter)):
        assert_same(read_in_pieces(model, 4, len(TOKENS) - 4, adapter=chosen), expected)


def test_beside_it_is_the_same_graph_without_inputs_for_adapters(tmp_path: Path) -> None:
    """With what is left of sums where only some of the modules that read one input take adapters, and with biases."""
    source = save_llama(tmp_path / "source", attention_bias=True)
    config = OnnxExportConfig(rounding=Rounding(bits=32), adapter_modules=("q_proj", "gate_proj", "up_proj", "o_proj"))
    model = exported(tmp_path, config, has_adapter=False)
    plain = tmp_path / "out" / "model.plain.onnx"
    files = (plain, tmp_path / "out" / "model.onnx")
    graphs = [onnx.load(str(path), load_external_data=False).graph for path in files]
    assert [any("lora_" in one.name for one in graph.input) for graph in graphs] == [False, True]
    assert [sum(node.op_type == "MatMul" for node in graph.node) for graph in graphs] == [0, 2 * 2 * 4]
    assert (
        json.loads((tmp_path / "out" / "genai_config.json").read_bytes())["model"]["decoder"]["filename"] == plain.name
    )
    assert_same(read_in_pieces(model), logits_of(source))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("names", [(), ("q_proj", "v_proj")])
def test_only_the_chosen_modules_take_adapters(names: tuple[str, ...], tmp_path: Path) -> None:
    source = save_llama(tmp_path / "source")
    model = exported(tmp_path, OnnxExportConfig(rounding=Rounding(bits=32), adapter_modules=names))
    described = json.loads((tmp_path / "out" / "offline.json").read_bytes())
    assert len(described["adapter_modules"]) == 2 * len(names)
    assert ("model.plain.onnx" in described["files"]) == bool(names)
    assert_same(read_in_pieces(model), logits_of(source))
    if names:
        wrapped, adapter = lora_adapter(source, dict.fromkeys(names, 4))
        assert_same(read_in_pieces(model, adapter=adapter), logits_of(wrapped))


def test_int8_activations_differ_a_little_and_are_the_default(tmp_path: Path) -> None:
    save_llama(tmp_path / "source")
    found = read_in_pieces(exported(tmp_path, OnnxExportConfig()))
    graph = onnx.load(str(tmp_path / "out" / "model.onnx"), load_external_data=False)
    rounded, exact = (
        read_in_pieces(opened(tmp_path / "out", graph=with_activations(graph, bits).SerializeToString()))
        for bits in (8, 32)
    )
    np.testing.assert_array_equal(found, rounded)
    assert 1e-4 < np.abs(rounded - exact).max() / exact.std() < 0.5


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", tie_word_embeddings=True)
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    config = OnnxExportConfig(rounding=Rounding(bits=8), context=32)
    exported(tmp_path, config)
    out = tmp_path / "out"
    described = json.loads((out / "offline.json").read_bytes())
    assert {path.name for path in out.iterdir()} == {*described["files"], "offline.json"}
    assert described["files"]["chat_template.jinja"] == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert described["files"]["tokenizer.json"] == described["tokenizer_digest"]
    assert described["source_digest"] == LlamaFolder(tmp_path / "source").digest
    numbers = ("vocab_size", "context", "num_layers", "num_kv_heads", "head_dim", "bits", "end_ids", "bos_id")
    assert [described[name] for name in numbers] == [400, 32, 2, 2, 16, 8, [1], 0]
    assert described["adapter_modules"]["model.layers.1.mlp.down_proj"] == {"in": 48, "out": 32}
    assert read_config(out) == config
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    ("rounding", "tied"),
    [(Rounding(bits=4), True), (Rounding(bits=4, group_size=32, is_symmetric=False), False), (Rounding(bits=32), True)],
)
def test_its_size_is_known_before_it_is_written(rounding: Rounding, tied: bool, tmp_path: Path) -> None:
    save_llama(tmp_path / "source", hidden_size=96, intermediate_size=800, vocab_size=9000, tie_word_embeddings=tied)
    exported(tmp_path, OnnxExportConfig(rounding=rounding))
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    predicted = num_export_bytes(WrittenWeights(LlamaFolder(tmp_path / "source"), rounding))
    assert written <= predicted <= 1.3 * written


def test_the_embedding_is_stored_once_where_it_is_the_head(tmp_path: Path) -> None:
    sizes = []
    for tied in (True, False):
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        save_llama(tmp_path / "source", vocab_size=1000, tie_word_embeddings=tied)
        export_onnx(tmp_path / "source", tmp_path / str(tied))
        sizes.append((tmp_path / str(tied) / "model.onnx.data").stat().st_size)
    assert sizes[1] - sizes[0] == 1000 * (32 // 2 + 2)


def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "source")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30, 2**20))
    with pytest.raises(InputError, match=r"takes .* MiB and 1.0 MiB are free"):
        export_onnx(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_export_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_llama(tmp_path / "source")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match="No space left on device; nothing is left"):
        export_onnx(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_head_that_onnxruntime_cannot_rotate_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    save_llama(tmp_path / "source", head_dim=8)
    with pytest.raises(InputError, match="heads of 8 numbers, expected a multiple of 16"):
        export_onnx(tmp_path / "source", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_bits": 16}, "activation_bits is 16, expected 8"),
        ({"adapter_modules": ("lm_head",)}, "adapter_modules has 'lm_head', expected some of q_proj"),
    ],
)
def test_a_config_that_cannot_be_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OnnxExportConfig(**values)


@pytest.mark.parametrize(("values", "name"), [({"bits": 5}, "bits"), ({"embedding_bits": 3}, "embedding_bits")])
def test_a_rounding_that_cannot_be_is_refused(values: dict[str, Any], name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is ., expected 4, 8, or 32"):
        Rounding(**values)


def test_a_foreign_graph_is_not_read_as_an_export(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph at all")
    with pytest.raises(InputError, match="is no graph that cotune exported"):
        read_config(tmp_path)


def test_onnxruntime_genai_loads_it_and_writes_the_same_tokens(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model = save_llama(tmp_path / "source")
    export_onnx(tmp_path / "source", tmp_path / "out", WHOLE)
    params = genai.GeneratorParams(loaded := genai.Model(str(tmp_path / "out")))
    params.set_search_options(max_length=len(TOKENS) + 6, do_sample=False)
    generator = genai.Generator(loaded, params)
    generator.append_tokens(TOKENS)
    tokens = list(TOKENS)
    while not generator.is_done() and len(tokens) < len(TOKENS) + 6:
        generator.generate_next_token()
        expected = int(logits_of(model, tokens)[-1].argmax())
        tokens.append(int(generator.get_next_tokens()[0]))
        assert tokens[-1] == expected
    assert len(tokens) > len(TOKENS) + 2
