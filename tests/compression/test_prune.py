"""Every way to prune: amounts are what was asked, layer by layer, and the result reloads to the same logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressible import VOCAB, tiny_model
from numpy.typing import NDArray
from tiny_models import tokenizer_json
from torch import Tensor
from transformers import PreTrainedModel

from cotune.compression.calibration import CalibrationTexts, LayerProgress
from cotune.compression.channels import Channels
from cotune.compression.hidden_size import HiddenSize
from cotune.compression.model_folder import save_model
from cotune.compression.prune import PRUNERS, ZEROS_NOTE, PruneReport, prune
from cotune.compression.pruner import Amount, Pruner
from cotune.compression.sparse_gpt import SparseGpt
from cotune.compression.sparsity import RowSparsity
from cotune.compression.wanda import Wanda
from cotune.compression.width import Width
from cotune.errors import InputError
from cotune.models.backbone import Backbone

Ids = NDArray[np.int64]
TEXTS = CalibrationTexts(np.random.default_rng(0).integers(0, VOCAB, (4, 9)))
# The tiny model is narrower than the steps that real ones take.
_hidden, _channels = HiddenSize(multiple=8), Channels(multiple=8)
SMALL: dict[str, Pruner] = {
    "hidden_size": _hidden,
    "channels": _channels,
    "width": Width(hidden_size=_hidden, channels=_channels),
}
CASES: list[tuple[str, Amount]] = [
    ("magnitude", 0.5),
    ("magnitude", "2:4"),
    ("wanda", 0.3),
    ("wanda", "2:4"),
    ("sparse_gpt", 0.7),
    ("sparse_gpt", "4:8"),
    ("sparse_gpt", RowSparsity(0.5)),
    ("depth", 1),
    ("channels", 0.25),
    ("heads", 0.5),
    ("hidden_size", 0.25),
    ("width", 0.25),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny_model().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer_json())
    return folder


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(torch.from_numpy(TEXTS.input_ids)).logits
    return out


def pruned(name: str, amount: Amount, **options: Any) -> tuple[PreTrainedModel, PruneReport]:
    model = tiny_model()
    return model, prune(model, SMALL.get(name, name), amount, TEXTS, **options)


@pytest.mark.parametrize(("name", "amount"), CASES)
def test_what_was_pruned_reloads_to_the_same_logits(name: str, amount: Amount, source: Path, tmp_path: Path) -> None:
    model, report = pruned(name, amount)
    assert report.method == name
    assert not torch.allclose(logits(model), logits(tiny_model()))
    digest = save_model(tmp_path / "pruned", model, source=str(source))
    again = Backbone.from_pretrained(str(tmp_path / "pruned"))
    assert torch.equal(logits(again.model), logits(model))
    assert again.spec.backbone_digest == digest
    assert again.spec.num_parameters == report.new_num_parameters
    # The decoding pass of a backbone, too, with its cache.
    rows = again.features(TEXTS.input_ids[0], 1, again.spec.vocab_size)
    cursor = again.cursor()
    cursor.extend(TEXTS.input_ids[0, :5])
    np.testing.assert_allclose(
        cursor.extend(TEXTS.input_ids[0, 5:6]).logits, logits(model)[0, 5].numpy(), rtol=1e-3, atol=1e-3
    )
    assert rows.top_logits.shape[0] == 8


def test_every_method_is_tried() -> None:
    assert {name for name, _ in CASES} == set(PRUNERS)


@pytest.mark.parametrize(
    ("name", "amount", "share"),
    [
        ("magnitude", 0.3, 0.3),
        ("magnitude", "2:4", 0.5),
        ("wanda", 0.3, 0.3),
        ("wanda", "1:4", 0.75),
        ("sparse_gpt", 0.3, 0.3),
        ("sparse_gpt", "2:4", 0.5),
    ],
)
def test_zeros_are_as_many_as_were_asked_layer_by_layer(name: str, amount: Amount, share: float) -> None:
    model, report = pruned(name, amount, skip=["mlp.up_proj"])
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        num_zeros = int((weight == 0).sum())
        if layer.name in ("model.embed_tokens", "lm_head") or layer.name.endswith("up_proj"):
            assert layer.sparsity == num_zeros == 0 and layer.output_error is None
            continue
        # Shares of rows are rounded in every row.
        rows, columns = layer.shape
        expected = rows * int(share * columns + 0.5) if name == "wanda" else int(share * rows * columns + 0.5)
        assert num_zeros == expected and layer.sparsity == num_zeros / weight.numel()
        assert layer.shape == layer.new_shape == tuple(weight.shape)
        assert layer.output_error is not None and 0 < layer.output_error < 1
        if isinstance(amount, str):
            kept = int(amount[0])
            assert bool(((weight.reshape(-1, 4) != 0).sum(1) == kept).all())
    assert len(report.layers) == 3 * 7 + 2
    assert report.share_of_parameters == 1 and report.note == ZEROS_NOTE


def test_wanda_and_sparse_gpt_keep_more_than_magnitude() -> None:
    dense = logits(tiny_model())
    errors = {}
    for name in ("magnitude", "wanda", "sparse_gpt"):
        model, report = pruned(name, RowSparsity(0.5))
        by_layer = [layer.output_error for layer in report.layers[1:] if layer.output_error is not None]
        assert len(by_layer) == 21
        errors[name] = (by_layer[0], float((logits(model) - dense).square().mean()))
    # In the first layer all three read the same.
    assert errors["sparse_gpt"][0] < errors["wanda"][0] < errors["magnitude"][0]
    assert errors["sparse_gpt"][1] < errors["magnitude"][1]


def test_magnitude_needs_no_texts() -> None:
    model = tiny_model()
    seen: list[LayerProgress] = []
    report = prune(model, "magnitude", 0.5, on_layer=seen.append)
    assert torch.equal(logits(model), logits(pruned("magnitude", 0.5)[0]))
    assert len(seen) == 21 and {layer.output_error for layer in report.layers} == {None}
    for name in sorted(set(PRUNERS) - {"magnitude"}):
        with pytest.raises(InputError, match="no calibration texts came"):
            prune(tiny_model(), name, 1 if name == "depth" else 0.5)


def test_sizes_before_and_after() -> None:
    _, report = pruned("depth", 2)
    dropped = report.facts["dropped_blocks"]
    gone = [layer for layer in report.layers if layer.new_shape is None]
    assert len(gone) == 14 and all(layer.sparsity is None for layer in gone)
    assert {int(layer.name.split(".")[2]) for layer in gone} == set(dropped)
    block = 4 * 32 * 32 - 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32
    assert report.num_parameters == 3 * block + 2 * VOCAB * 32 + 32
    assert report.new_num_parameters == block + 2 * VOCAB * 32 + 32 and report.note == ""
    _, report = pruned("width", 0.25)
    shapes = {layer.name: (layer.shape, layer.new_shape) for layer in report.layers}
    assert shapes["model.layers.1.mlp.down_proj"] == ((32, 48), (24, 40))
    assert shapes["model.layers.1.self_attn.q_proj"] == ((32, 32), (32, 24))
    assert shapes["model.embed_tokens"] == shapes["lm_head"] == ((VOCAB, 32), (VOCAB, 24))
    assert json.loads(json.dumps(report.as_json()))["facts"] == {"hidden_size": 24, "intermediate_size": 40}


def test_settings_are_used_and_results_repeat() -> None:
    model, _ = pruned("sparse_gpt", 0.5)
    again, _ = pruned("sparse_gpt", 0.5)
    assert torch.equal(logits(model), logits(again))
    damped = tiny_model()
    report = prune(damped, SparseGpt(damping=0.5, block_size=8), 0.5, TEXTS)
    assert not torch.equal(logits(model), logits(damped)) and report.method == "sparse_gpt"
    alone = tiny_model()
    report = prune(alone, Wanda(needs_gram=False), 0.5, TEXTS)
    assert torch.equal(logits(alone), logits(pruned("wanda", 0.5)[0]))
    assert {layer.output_error for layer in report.layers} == {None}


def test_bfloat16_is_pruned_too() -> None:
    for name, amount in (("sparse_gpt", "2:4"), ("hidden_size", 0.25), ("channels", 0.25)):
        model = tiny_model(dtype=torch.bfloat16)
        prune(model, SMALL.get(name, name), amount, TEXTS)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert bool(logits(model).isfinite().all())
        if name == "sparse_gpt":
            assert int((model.model.layers[0].mlp.up_proj.weight == 0).sum()) == 32 * 48 // 2


def test_bad_input_is_one_clear_sentence_and_changes_nothing() -> None:
    model = tiny_model()
    before = logits(model)
    cases: list[tuple[str, Any, Any]] = [
        (r"the pruner is 'wander', expected one of magnitude, wanda", "wander", 0.5),
        (r"32 inputs, expected a multiple of 5 for the pattern 2:5", "wanda", "2:5"),
        (r"48 inputs, expected a multiple of 32 for the pattern 16:32", "sparse_gpt", "16:32"),
        (r"amount is 1.5", "magnitude", 1.5),
        (r"steps of 32 leaves all", "hidden_size", 0.25),
        (r"amount is '2:4'", "width", "2:4"),
    ]
    for match, how, amount in cases:
        with pytest.raises(InputError, match=match):
            prune(model, how, amount, TEXTS)
    for name in ("depth", "channels", "heads", "width"):
        with pytest.raises(InputError, match="this method makes all blocks alike"):
            prune(model, name, 1 if name == "depth" else 0.5, TEXTS, skip=["mlp.up_proj"])
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layers.1.mlp.up_proj.weight holds nan or inf"):
        prune(model, "magnitude", 0.5)
