"""Every quantiser on whole models: bits as asked for, errors, what comes back from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressible import VOCAB
from compressible import tiny_model as any_model
from tiny_models import tokenizer_json
from transformers import PreTrainedModel

from cotune.compression import quantise as quantise_module
from cotune.compression.awq import Awq
from cotune.compression.calibration import CalibrationTexts, LayerProgress, head_statistics, reconstruction_error
from cotune.compression.gptq import Gptq
from cotune.compression.grid import Grid
from cotune.compression.quantise import QUANTISERS, QuantisationReport, quantise, quantiser_named
from cotune.compression.quantised_folder import save_quantised
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError
from cotune.models import Backbone
from cotune.models.packed_folder import read_packed
from cotune.models.weights import load_model

TEXTS = CalibrationTexts(np.random.default_rng(0).integers(0, VOCAB, (6, 16)))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LINEARS = sorted(
    f"model.layers.{i}.{name}_proj.weight"
    for i in range(2)
    for name in (*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down")))
)


def tiny_model(**changes: Any) -> PreTrainedModel:
    return any_model(num_hidden_layers=2, **changes)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder to take the tokenizer from."""
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = model(torch.from_numpy(TEXTS.input_ids)).logits
    return output


@pytest.mark.parametrize("how", QUANTISERS)
@pytest.mark.parametrize(
    ("bits", "group_size", "is_symmetric", "dtype"),
    [(4, 32, False, "float32"), (3, None, True, "bfloat16"), (8, 128, False, "float32")],
)
def test_bits_are_as_asked_for_layer_by_layer_and_come_back_the_same(
    source: Path, tmp_path: Path, how: str, bits: int, group_size: int | None, is_symmetric: bool, dtype: str
) -> None:
    model = Backbone.from_pretrained(str(source), dtype=dtype).model
    before = logits(model)
    report = quantise(
        model,
        how,
        bits=bits,
        group_size=group_size,
        is_symmetric=is_symmetric,
        calibration=TEXTS,
        embedding_bits=8,
        head_bits=4,
    )
    assert sorted(report.packed) == sorted([*LINEARS, EMBEDDING, HEAD]) == sorted(each.name for each in report.layers)
    for layer in report.layers:
        weight, values = report.packed[layer.name], model.get_parameter(layer.name).detach()
        expected_bits = {EMBEDDING: 8, HEAD: 4}.get(layer.name, bits)
        expected_size = values.shape[1] if group_size is None else min(group_size, values.shape[1])
        assert (layer.bits, layer.group_size, layer.shape) == (expected_bits, expected_size, tuple(values.shape))
        assert (weight.bits, weight.group_size, weight.shape) == (layer.bits, layer.group_size, layer.shape)
        assert layer.is_symmetric == weight.is_symmetric == is_symmetric
        assert torch.equal(values, torch.from_numpy(weight.dequantised()).to(values.dtype))
        for group in values.float().split(expected_size, dim=1):
            assert max(len(row.unique()) for row in group) <= 2**expected_bits
        assert (layer.output_error is None) == (layer.name == EMBEDDING)
    changed = float((logits(model) - before).norm() / before.norm())
    assert 0 < changed < {8: 0.1, 4: 0.7, 3: 1.2}[bits]

    digest = save_quantised(tmp_path / "out", model, report.packed, method=report.method, source=str(source))
    loaded = Backbone.from_pretrained(str(tmp_path / "out"), dtype=dtype)
    assert loaded.spec.backbone_digest == digest
    assert torch.equal(logits(loaded.model), logits(model))
    for name, weight in read_packed(tmp_path / "out"):
        np.testing.assert_array_equal(weight.codes, report.packed[name].codes)


@pytest.mark.parametrize("bits", [4, 3])
def test_learning_from_texts_loses_less_than_rounding(bits: int) -> None:
    """In the first block, whose inputs are the same for all."""

    def lost(report: QuantisationReport) -> float:
        own = [each for each in report.layers if each.name.startswith("model.layers.0.")]
        assert len(own) == 7
        return sum(each.output_error for each in own if each.output_error is not None)

    errors = {how: lost(quantise(tiny_model(), how, bits=bits, calibration=TEXTS)) for how in QUANTISERS}
    assert errors["gptq"] < errors["rtn"] and errors["awq"] < errors["rtn"]


def test_sizes_are_those_of_the_files(source: Path, tmp_path: Path) -> None:
    model = tiny_model()
    report = quantise(model, "rtn", bits=4, group_size=None, skip=["mlp.down_proj"], embedding_bits=3)
    save_quantised(tmp_path / "out", model, report.packed, method=report.method, source=str(source))
    stored = {name: weight.size_bytes for name, weight in read_packed(tmp_path / "out")}
    assert {layer.name: layer.size_bytes for layer in report.layers} == stored
    whole = VOCAB * 32 + 2 * 32 * 48 + 5 * 32  # head, down projections and norms
    assert report.whole_numbers == whole
    assert report.size_bytes == sum(stored.values()) + 2 * whole
    assert report.share_of_bf16 == report.size_bytes / (2 * model.num_parameters())
    # A row of 32 codes in 4 bits, one scale in 16 and one zero point in a byte: 4.75 bits. Embeddings have 3.75.
    linear = report.bits_per_weight * (model.num_parameters() - whole) - 3.75 * VOCAB * 32
    assert linear / (model.num_parameters() - whole - VOCAB * 32) == pytest.approx(4.75)


def test_tied_embeddings_are_quantised_once(source: Path, tmp_path: Path) -> None:
    for options in ({"embedding_bits": 4}, {"head_bits": 4}, {"embedding_bits": 4, "head_bits": 4}):
        model = tiny_model(tie_word_embeddings=True)
        report = quantise(model, "rtn", **options)
        assert sorted(report.packed) == sorted([*LINEARS, EMBEDDING])
        assert report.whole_numbers == 5 * 32
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    save_quantised(tmp_path / "out", model, report.packed, method="rtn", source=str(source))
    assert torch.equal(logits(load_model(tmp_path / "out", dtype="float32", device="cpu").eval()), logits(model))
    with pytest.raises(InputError, match="embedding_bits are 4 and head_bits 8, expected the same"):
        quantise(tiny_model(tie_word_embeddings=True), "rtn", embedding_bits=4, head_bits=8)


def test_the_same_texts_give_the_same_codes() -> None:
    for how in ("gptq", "awq"):
        first, second = (quantise(tiny_model(), how, bits=3, calibration=TEXTS) for _ in range(2))
        for name, weight in first.packed.items():
            np.testing.assert_array_equal(weight.codes, second.packed[name].codes)


def test_methods_take_settings_and_tell_their_progress() -> None:
    told: list[LayerProgress] = []
    report = quantise(tiny_model(), Gptq(orders_by_activation=True), bits=3, calibration=TEXTS, on_layer=told.append)
    assert report.method == "gptq" and len(told) == 14
    other = quantise(tiny_model(), "gptq", bits=3, calibration=TEXTS)
    assert any(not np.array_equal(report.packed[name].codes, other.packed[name].codes) for name in LINEARS)
    assert [f"{each.name}.weight" for each in told] == [layer.name for layer in report.layers]
    assert [each.error for each in told] == [layer.output_error for layer in report.layers]
    assert quantise(tiny_model(), Awq(max_clip=0), calibration=TEXTS).method == "awq"
    assert type(quantiser_named("gptq")) is Gptq


def test_the_report_is_json() -> None:
    report = quantise(tiny_model(), "rtn", bits=3)
    told = json.loads(json.dumps(report.as_json()))
    assert told["method"] == "rtn" and len(told["layers"]) == 14
    assert told["layers"][0] == {
        "name": "model.layers.0.self_attn.q_proj.weight",
        "shape": [32, 32],
        "bits": 3,
        "group_size": 32,
        "is_symmetric": False,
        "size_bytes": 32 * (12 + 2 + 1),
        "output_error": None,
    }
    assert told["share_of_bf16"] == report.share_of_bf16 < 0.6


def test_bad_input_is_one_clear_sentence() -> None:
    model = tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for options, message in (
        ({"how": "best"}, "the quantiser is 'best', expected one of rtn, gptq, awq"),
        ({"bits": 5}, "bits are 5, expected one of 8, 4, 3"),
        ({"group_size": 8}, "group_size is 8, expected one of"),
        ({"embedding_bits": 2}, "bits are 2, expected one of 8, 4, 3"),
        ({"how": "gptq"}, "no calibration texts came"),
        ({"how": "awq"}, "no calibration texts came"),
        ({"skip": ["x"]}, "skip names 'x'"),
    ):
        with pytest.raises(InputError, match=message):
            quantise(model, **{"how": "rtn", **options})
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with torch.no_grad():
        model.get_parameter(EMBEDDING)[3, 3] = torch.nan
    with pytest.raises(InputError, match=f"{EMBEDDING} holds nan or inf, expected finite weights"):
        quantise(model, "rtn")


@pytest.mark.parametrize("how", ["gptq", "awq"])
def test_a_head_of_its_own_is_quantised_for_what_it_reads(how: str) -> None:
    model = tiny_model()
    reads = head_statistics(quantised_blocks(how), TEXTS.input_ids)
    expected = quantiser_named(how).quantise_layer(model.get_parameter(HEAD).detach().clone(), reads, Grid(bits=3))
    report = quantise(model, how, bits=4, calibration=TEXTS, head_bits=3)
    np.testing.assert_array_equal(report.packed[HEAD].codes, expected.codes)
    rounded = round_to_nearest(tiny_model().get_parameter(HEAD).detach(), Grid(bits=3))
    lost = reconstruction_error(
        tiny_model().get_parameter(HEAD).detach(), torch.from_numpy(rounded.dequantised()), reads.gram
    )
    told = {each.name: each.output_error for each in report.layers}[HEAD]
    assert told is not None and 0 < told < lost


def quantised_blocks(how: str) -> PreTrainedModel:
    model = tiny_model()
    quantise(model, how, bits=4, calibration=TEXTS)
    return model


def test_a_head_that_is_the_embedding_keeps_its_rows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning from what the head reads alone, rows move far in directions that it never reads."""

    def moved(share: float) -> tuple[float, float]:
        monkeypatch.setattr(quantise_module, "LOOKUP_SHARE", share)
        model = tiny_model(tie_word_embeddings=True)
        before = model.get_parameter(EMBEDDING).detach().clone()
        few = CalibrationTexts(TEXTS.input_ids[:1, :8])
        report = quantise(model, "gptq", bits=4, calibration=few, embedding_bits=3)
        error = {each.name: each.output_error for each in report.layers}[EMBEDDING]
        assert error is not None
        return float((model.get_parameter(EMBEDDING) - before).detach().norm()), error

    (far, little), (near, more) = moved(0.0), moved(1.0)
    assert near < far and little < more


def test_rows_of_a_head_are_quantised_alike_however_many_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = quantise(tiny_model(), "gptq", calibration=TEXTS, head_bits=4).packed[HEAD]
    monkeypatch.setattr(quantise_module, "_ROWS_AT_A_TIME", 7)
    np.testing.assert_array_equal(
        quantise(tiny_model(), "gptq", calibration=TEXTS, head_bits=4).packed[HEAD].codes, whole.codes
    )
