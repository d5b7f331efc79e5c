"""The lean decoding pass against transformers' own modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from cotune.models import Backbone
from cotune.models.adapters import LoraAdapter, LoraShape
from cotune.models.lean_decoder import ARCHITECTURES, LeanDecoder

Ids = NDArray[np.int64]
Build = Callable[..., PreTrainedModel]
LEAN = ["llama", "mistral", "qwen2", "qwen3"]


def both_ways(backbone: Backbone, ids: Ids) -> tuple[Any, Any]:
    """Features of the lean pass, and of transformers' modules."""
    assert backbone._lean is not None
    cursor = backbone.cursor()
    cursor.extend(ids[:5])
    lean = [cursor.extend(ids[i : i + 1]) for i in range(5, len(ids))]
    other = Backbone.from_model(backbone.model, backbone.tokenizer_json, projections=backbone.projections)
    with patch.object(LeanDecoder, "of", return_value=None):
        cursor = other.cursor()
        cursor.extend(ids[:5])
        return lean, [cursor.extend(ids[i : i + 1]) for i in range(5, len(ids))]


@pytest.mark.parametrize("architecture", LEAN)
def test_it_computes_what_the_model_does(
    make_model: Build, tokenizer_json: bytes, token_ids: Ids, architecture: str
) -> None:
    backbone = Backbone.from_model(make_model(architecture), tokenizer_json)
    assert backbone.spec.architecture in ARCHITECTURES
    lean, modules = both_ways(backbone, token_ids)
    for left, right in zip(lean, modules, strict=True):
        for name in ("logits", "hidden", "taps"):
            np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=2e-5, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True},
        {"tie_word_embeddings": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ],
)
def test_variants_of_llama(make_model: Build, tokenizer_json: bytes, token_ids: Ids, changes: dict[str, Any]) -> None:
    lean, modules = both_ways(Backbone.from_model(make_model("llama", **changes), tokenizer_json), token_ids)
    np.testing.assert_allclose(lean[-1].logits, modules[-1].logits, atol=2e-5, rtol=1e-4)


def test_other_number_types(make_model: Build, tokenizer_json: bytes, token_ids: Ids) -> None:
    lean, modules = both_ways(Backbone.from_model(make_model("llama").bfloat16(), tokenizer_json), token_ids)
    scale = np.abs(modules[-1].logits).max()
    assert np.abs(lean[-1].logits - modules[-1].logits).max() < 0.05 * scale


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "gemma2", "gemma3_text"])
def test_other_architectures_go_through_transformers(make_model: Build, architecture: str) -> None:
    assert LeanDecoder.of(make_model(architecture), (0, 1)) is None


def test_angles_that_depend_on_the_length_are_left_to_transformers(make_model: Build) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    assert LeanDecoder.of(make_model("llama", rope_parameters=rope), (0, 1)) is None


def test_an_adapter_that_was_there_first_is_seen_too(make_model: Build, tokenizer_json: bytes, token_ids: Ids) -> None:
    model = make_model("llama")
    adapter = LoraAdapter.fresh(model, LoraShape(rank=2), seed=0)
    for tensor in adapter.params.values():
        tensor.copy_(torch.full_like(tensor, 0.1))
    late, early = (Backbone.from_model(model, tokenizer_json) for _ in range(2))
    plain = late.cursor().extend(token_ids)
    with adapter.attach(model):
        adapted = [backbone.cursor().extend(token_ids).logits for backbone in (late, early)]
    np.testing.assert_array_equal(*adapted)
    assert np.abs(adapted[0] - plain.logits).max() > 1e-3
    np.testing.assert_array_equal(early.cursor().extend(token_ids).logits, plain.logits)


def test_an_adapter_in_the_model_is_seen(make_model: Build, tokenizer_json: bytes, token_ids: Ids) -> None:
    backbone = Backbone.from_model(make_model("llama"), tokenizer_json)
    plain = backbone.cursor().extend(token_ids)
    adapter = LoraAdapter.fresh(backbone.model, LoraShape(rank=2), seed=0)
    for tensor in adapter.params.values():
        tensor.copy_(torch.full_like(tensor, 0.1))
    lean = backbone._lean
    assert lean is not None and lean.fits
    with adapter.attach(backbone.model):
        assert not lean.fits
        adapted = backbone.cursor().extend(token_ids)
        with torch.inference_mode():
            expected = backbone.model(input_ids=torch.tensor(token_ids)[None]).logits[0, -1].numpy()
        np.testing.assert_allclose(adapted.logits, expected, atol=2e-5, rtol=1e-4)
    assert lean.fits
    assert np.abs(adapted.logits - plain.logits).max() > 1e-3
    np.testing.assert_array_equal(backbone.cursor().extend(token_ids).logits, plain.logits)
