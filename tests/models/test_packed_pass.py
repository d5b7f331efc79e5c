"""Many sequences in one pass: each as if it were alone, to the last bit."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_backbone, tokenizer_json
from transformers import AutoConfig, AutoModelForCausalLM

from cotune.errors import CacheFullError, InputError
from cotune.generation.protocols import RowWork, StepFeatures
from cotune.models.backbone import Backbone, BackboneCursor
from cotune.models.kv_pool import KVPool
from cotune.models.packed_pass import PROMPT_CHUNK

LONG = PROMPT_CHUNK + 70


def assert_same_bits(left: StepFeatures, right: StepFeatures) -> None:
    for name in ("logits", "hidden", "taps"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


@pytest.fixture(scope="module")
def llama() -> Backbone:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=3,
        intermediate_size=80,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return Backbone.from_model(model, tokenizer_json())


def alone(backbone: Backbone, prompt: np.ndarray, tokens: list[int]) -> list[StepFeatures]:
    """What one sequence by itself says after its prompt and after each token."""
    cursor = backbone.cursor()
    return [cursor.extend(prompt), *(cursor.extend(np.array([token])) for token in tokens)]


def work(cursor: BackboneCursor, tokens: list[int] | np.ndarray, num_outputs: int = 1) -> RowWork:
    return RowWork(cursor=cursor, token_ids=np.asarray(tokens, np.int64), num_outputs=num_outputs)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_that_join_leave_and_draft_equal_single_ones(llama: Backbone, data: st.DataObject) -> None:
    if not llama.rows_are_independent:
        pytest.skip("this machine's products depend on the number of rows")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    lengths = data.draw(st.lists(st.integers(1, LONG), min_size=2, max_size=7))
    prompts = [rng.integers(0, 300, n) for n in lengths]
    texts = [rng.integers(0, 300, 8).tolist() for _ in prompts]
    expected = [alone(llama, *pair) for pair in zip(prompts, texts, strict=True)]
    cursors = [llama.cursor(num_prompt=len(prompt)) for prompt in prompts]
    while any(cursor.length < len(p) + 8 for cursor, p in zip(cursors, prompts, strict=True)):
        batch: list[tuple[int, RowWork]] = []
        for i, (cursor, prompt, text) in enumerate(zip(cursors, prompts, texts, strict=True)):
            if data.draw(st.booleans()) or cursor.length == len(prompt) + 8:
                continue
            if cursor.length < len(prompt):
                piece = prompt[cursor.length : (cursor.length // PROMPT_CHUNK + 1) * PROMPT_CHUNK]
                batch.append((i, work(cursor, piece, int(cursor.length + len(piece) == len(prompt)))))
            else:
                start = cursor.length - len(prompt)
                tokens = text[start : start + data.draw(st.integers(1, 4))]
                batch.append((i, work(cursor, tokens, len(tokens))))
        if not batch:
            continue
        starts = {i: cursors[i].length - len(prompts[i]) for i, _ in batch}
        for (i, _), features in zip(batch, llama.extend([item for _, item in batch]), strict=True):
            first = max(0, starts[i] + 1)
            for position, got in enumerate(features, start=first):
                assert_same_bits(got, expected[i][position])
        i = data.draw(st.integers(0, len(cursors) - 1))
        if data.draw(st.booleans()) and cursors[i].length > len(prompts[i]) + 1:
            cursors[i].truncate(cursors[i].length - 1)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_pass_equals_the_model_itself(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    ids = np.random.default_rng(1).integers(2, 300, 60)
    with torch.inference_mode():
        expected = backbone.model(input_ids=torch.tensor(ids)[None]).logits[0].numpy()
    cursor = backbone.cursor(num_prompt=40)
    np.testing.assert_allclose(cursor.extend(ids[:40]).logits, expected[39], atol=1e-4)
    (rest,) = backbone.extend([work(cursor, ids[40:], 20)])
    np.testing.assert_allclose(np.stack([f.logits for f in rest]), expected[40:], atol=1e-4)
    assert backbone.model.config._attn_implementation == "sdpa"


def test_the_prompt_in_pieces_equals_the_whole(llama: Backbone) -> None:
    ids = np.random.default_rng(2).integers(0, 300, 2 * PROMPT_CHUNK + 30)
    whole = llama.cursor().extend(ids)
    with torch.inference_mode():
        expected = llama.model(input_ids=torch.tensor(ids)[None]).logits[0, -1].numpy()
    np.testing.assert_allclose(whole.logits, expected, atol=1e-4)
    cursor = llama.cursor(num_prompt=len(ids))
    for start in range(0, len(ids), PROMPT_CHUNK):
        ((*_, last),) = llama.extend([work(cursor, ids[start : start + PROMPT_CHUNK])])
    assert_same_bits(last, whole)
    with pytest.raises(InputError, match="not one piece of a prompt of 286"):
        llama.extend([work(llama.cursor(num_prompt=len(ids)), ids[:200])])


def test_a_fork_goes_its_own_way(llama: Backbone) -> None:
    prompt = np.arange(10, 80)
    stem = llama.cursor()
    stem.extend(prompt)
    twin = stem.fork()
    left = [stem.extend(np.array([t])) for t in (5, 6, 7)]
    right = [twin.extend(np.array([t])) for t in (8, 9, 10)]
    for got, expected in zip(left, alone(llama, prompt, [5, 6, 7])[1:], strict=True):
        assert_same_bits(got, expected)
    for got, expected in zip(right, alone(llama, prompt, [8, 9, 10])[1:], strict=True):
        assert_same_bits(got, expected)


def test_memory_comes_back(llama: Backbone) -> None:
    gc.collect()
    used = llama.kv_pool.num_used
    cursor = llama.cursor()
    cursor.extend(np.arange(100))
    twin = cursor.fork()
    assert llama.kv_pool.num_used == used + 2
    cursor.close()
    assert llama.kv_pool.num_used == used + 2
    del twin
    gc.collect()
    assert llama.kv_pool.num_used == used


def test_a_full_pool_refuses_and_loses_nothing() -> None:
    backbone = tiny_backbone("llama")
    backbone.kv_pool = KVPool(max_blocks=1)
    cursor = backbone.cursor()
    before = cursor.extend(np.arange(2, 62))
    with pytest.raises(CacheFullError):
        cursor.extend(np.arange(2, 12))
    with pytest.raises(CacheFullError):
        backbone.cursor().extend(np.array([3]))
    assert cursor.length == 60
    cursor.truncate(59)
    assert_same_bits(cursor.extend(np.array([61])), alone(tiny_backbone("llama"), np.arange(2, 61), [61])[1])
    assert before.logits.shape == (400,)


def test_special_attention_is_refused() -> None:
    backbone = tiny_backbone("llama")
    backbone.model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(InputError, match=r"LlamaForCausalLM is not supported: it has layers of kind chunked_attention"):
        backbone.cursor().extend(np.array([3]))
