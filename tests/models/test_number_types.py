"""float32 and bfloat16, CPU and CUDA, one device or a map of several: nothing assumes one of them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from batched_texts import held_out_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from cotune.errors import InputError
from cotune.generation.protocols import RowWork, StepFeatures
from cotune.models.backbone import Backbone, BackboneCursor
from cotune.models.weights import _check_placed

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
)
DTYPES = ["float32", "bfloat16"]
DEVICES = ["cpu", CUDA]
NUM_STEPS = 6


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def work(cursor: BackboneCursor, tokens: np.ndarray) -> RowWork:
    return RowWork(cursor=cursor, token_ids=tokens)


def read_alone(backbone: Backbone, prompt: np.ndarray) -> list[StepFeatures]:
    """Greedy steps of one text by itself."""
    cursor = backbone.cursor()
    steps = [cursor.extend(prompt)]
    for _ in range(NUM_STEPS):
        steps.append(cursor.extend(np.array([steps[-1].logits.argmax()])))
    return steps


def read_together(backbone: Backbone, prompts: list[np.ndarray]) -> list[list[StepFeatures]]:
    """As `read_alone`, all texts in one batch."""
    cursors = [backbone.cursor(len(prompt)) for prompt in prompts]
    steps: list[list[StepFeatures]] = [[] for _ in prompts]
    tokens = prompts
    for _ in range(NUM_STEPS + 1):
        outputs = backbone.extend(list(map(work, cursors, tokens)))
        for row, (features,) in zip(steps, outputs, strict=True):
            row.append(features)
        tokens = [np.array([row[-1].logits.argmax()]) for row in steps]
    return steps


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_batch_are_as_if_alone(device: str, dtype: str) -> None:
    backbone = Backbone.from_pretrained("starter", dtype=dtype, device=device)
    prompts = held_out_prompts(backbone, 5)
    together = read_together(backbone, prompts)
    if device == "cpu":
        assert backbone.rows_are_independent
    for prompt, row in zip(prompts, together, strict=True):
        for mine, other in zip(read_alone(backbone, prompt), row, strict=True):
            for name in ("logits", "hidden", "taps"):
                ours, theirs = getattr(mine, name), getattr(other, name)
                assert ours.dtype == np.float32
                if backbone.rows_are_independent:
                    np.testing.assert_array_equal(ours, theirs)
                else:
                    np.testing.assert_allclose(ours, theirs, atol=1e-3 if dtype == "float32" else 0.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_and_values_are_of_the_models_type_and_place(device: str, dtype: str) -> None:
    backbone = Backbone.from_pretrained("starter", dtype=dtype, device=device)
    backbone.cursor().extend(np.array([1, 5, 9]))
    for tensors in (backbone.kv_pool._keys, backbone.kv_pool._values):
        for tensor in tensors.values():
            assert tensor.dtype == getattr(torch, dtype)
            assert tensor.device.type == device


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_agrees_with_float32_on_nearly_all_tokens(device: str) -> None:
    """Teacher-forced on the float32 model's own greedy texts; near ties may fall the other way."""
    exact = Backbone.from_pretrained("starter")
    coarse = Backbone.from_pretrained("starter", dtype="bfloat16", device=device)
    same: list[bool] = []
    for prompt in held_out_prompts(exact, 6):
        tokens = [int(step.logits.argmax()) for step in read_alone(exact, prompt)]
        whole = np.concatenate([prompt, tokens])
        features = coarse.features(whole, len(prompt), 1)
        same += (features.top_ids[:, 0] == tokens).tolist()
    assert np.mean(same) > 0.9


def test_a_device_map_gives_the_same_bits() -> None:
    plain, mapped = Backbone.from_pretrained("starter"), Backbone.from_pretrained("starter", device_map="auto")
    if mapped.model.device.type != "cpu":
        pytest.skip("the map took a GPU")
    (prompt,) = held_out_prompts(plain, 1)
    for left, right in zip(read_alone(plain, prompt), read_alone(mapped, prompt), strict=True):
        np.testing.assert_array_equal(left.logits, right.logits)
        np.testing.assert_array_equal(left.taps, right.taps)


def test_a_model_that_does_not_fit_is_refused() -> None:
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, intermediate_size=16, num_attention_heads=2, vocab_size=9)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    with pytest.raises(InputError, match=r"does not fit the GPUs .* --tensor-parallel"):
        _check_placed(model)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_layers_on_two_gpus_give_the_tokens_of_one() -> None:
    one = Backbone.from_pretrained("starter", device="cuda")
    two = Backbone.from_pretrained("starter", device_map="balanced")
    for prompt in held_out_prompts(one, 2):
        for left, right in zip(read_alone(one, prompt), read_alone(two, prompt), strict=True):
            assert left.logits.argmax() == right.logits.argmax()
