"""The frozen backbone, for every supported architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_models import tiny_backbone
from transformers import PreTrainedModel

from cotune.errors import InputError
from cotune.generation.protocols import StepAbandonedError, StepFeatures
from cotune.models import Backbone, Projections
from cotune.wire.codec import quantise
from cotune.wire.features import SequenceFeatures

Ids = NDArray[np.int64]


def assert_close(left: StepFeatures, right: StepFeatures, atol: float = 2e-5) -> None:
    for name in ("logits", "hidden", "taps"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=atol, rtol=1e-4, err_msg=name)


def assert_identical(left: StepFeatures, right: StepFeatures) -> None:
    for name in ("logits", "hidden", "taps"):
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name), err_msg=name)


def fresh(backbone: Backbone, ids: Ids) -> StepFeatures:
    return backbone.cursor().extend(ids)


def test_logits_are_those_of_transformers_to_the_last_bit(backbone: Backbone, token_ids: Ids) -> None:
    with torch.inference_mode():
        expected = backbone.model(input_ids=torch.tensor([token_ids.tolist()])).logits
    np.testing.assert_array_equal(
        backbone.forward_states(torch.tensor([token_ids.tolist()])).logits.numpy(), expected.numpy()
    )
    np.testing.assert_allclose(fresh(backbone, token_ids).logits, expected[0, -1].numpy(), atol=1e-5)


def test_taps_are_projections_of_the_normalised_residual_stream(backbone: Backbone, token_ids: Ids) -> None:
    ids = torch.tensor([token_ids.tolist()])
    with torch.inference_mode():
        known = backbone.model(input_ids=ids, output_hidden_states=True).hidden_states
    got = backbone.forward_states(ids)
    # transformers gives the inputs of all layers, then the last layer's output after the final norm.
    for i, y in enumerate(known[:-1]):
        np.testing.assert_array_equal(got.states[0, :, i].numpy(), y[0].numpy())
    np.testing.assert_allclose(got.hidden[0].numpy(), known[-1][0].numpy(), atol=1e-5)
    final_norm = next(m for name, m in backbone.model.base_model.named_children() if name in ("norm", "ln_f"))
    with torch.inference_mode():
        np.testing.assert_allclose(final_norm(got.states[0, :, -1]).numpy(), got.hidden[0].numpy(), atol=1e-5)

    y = got.states[0].double().numpy()  # (seq, taps, hidden)
    normalised = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-6)
    expected = np.einsum("ith,tdh->itd", normalised, backbone.projections.taps)
    np.testing.assert_allclose(got.taps[0].numpy(), expected, atol=1e-4)
    np.testing.assert_allclose(fresh(backbone, token_ids).taps, expected[-1], atol=1e-4)


def test_cached_equals_uncached(backbone: Backbone, token_ids: Ids) -> None:
    cursor = backbone.cursor()
    cursor.extend(token_ids[:4])
    for length in range(5, len(token_ids) + 1):
        assert_close(cursor.extend(token_ids[length - 1 : length]), fresh(backbone, token_ids[:length]))
    assert cursor.length == len(token_ids)


@pytest.mark.parametrize("kept", [0, 1, 5, 12, 20])
def test_truncate_and_redo_equals_a_fresh_prefill(backbone: Backbone, token_ids: Ids, kept: int) -> None:
    cursor = backbone.cursor()
    cursor.extend(token_ids[::-1].copy() if kept == 0 else token_ids[: kept + 1])
    cursor.extend(np.full(7, 3))
    cursor.truncate(kept)
    assert cursor.length == kept
    assert_close(cursor.extend(token_ids[kept:]), fresh(backbone, token_ids))


def test_redoing_a_step_gives_the_same_bits(backbone: Backbone, token_ids: Ids) -> None:
    cursor = backbone.cursor()
    cursor.extend(token_ids[:10])
    first = [cursor.extend(token_ids[i : i + 1]) for i in range(10, 18)]
    cursor.truncate(12)
    cursor.extend(np.array([5]))
    cursor.truncate(12)
    for i in range(12, 18):
        assert_identical(cursor.extend(token_ids[i : i + 1]), first[i - 10])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_equals_a_fresh_prefill(llama: Backbone, data: st.DataObject) -> None:
    cursor, held = llama.cursor(), np.zeros(0, np.int64)
    for _ in range(4):
        more = np.array(data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=8)))
        features, held = cursor.extend(more), np.concatenate([held, more])
        assert_close(features, fresh(llama, held))
        kept = data.draw(st.integers(0, len(held)))
        cursor.truncate(kept)
        held = held[:kept]


def assert_features_close(left: SequenceFeatures, right: SequenceFeatures) -> None:
    np.testing.assert_array_equal(left.target_ids, right.target_ids)
    np.testing.assert_array_equal(left.top_ids, right.top_ids)
    for name in ("log_normalizer", "target_logits", "top_logits"):
        np.testing.assert_allclose(getattr(left, name), getattr(right, name), atol=2e-5, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(left.hidden.astype(np.float32), right.hidden.astype(np.float32), atol=2e-3, rtol=2e-3)
    # A code may differ by one where a value lies on the edge.
    assert np.abs(left.tap_codes.astype(np.int64) - right.tap_codes).max() <= 1
    np.testing.assert_allclose(left.tap_scales.astype(np.float32), right.tap_scales.astype(np.float32), rtol=2e-3)


def test_features_agree_with_decoding(backbone: Backbone, token_ids: Ids) -> None:
    features = backbone.features(token_ids, first_target=3, top_k=5)
    assert len(features) == len(token_ids) - 3
    np.testing.assert_array_equal(features.target_ids, token_ids[3:])
    for t in (3, 9, len(token_ids) - 1):
        step, row = fresh(backbone, token_ids[:t]), t - 3
        top = np.sort(np.argsort(-step.logits)[:5])
        np.testing.assert_array_equal(features.top_ids[row], top)
        np.testing.assert_allclose(features.top_logits[row], step.logits[top], atol=2e-5)
        np.testing.assert_allclose(features.target_logits[row], step.logits[token_ids[t]], atol=2e-5)
        exact = np.log(np.exp(step.logits.astype(np.float64)).sum())
        np.testing.assert_allclose(features.log_normalizer[row], exact, atol=2e-5)
        np.testing.assert_allclose(features.hidden[row], step.hidden, atol=5e-3, rtol=2e-3)
        codes, scales = quantise(step.taps)
        assert np.abs(features.tap_codes[row].astype(np.int64) - codes).max() <= 1
        np.testing.assert_allclose(features.tap_scales[row], scales, rtol=2e-3)


def test_batch_equals_single(backbone: Backbone, token_ids: Ids) -> None:
    sequences = [(token_ids, 3), (token_ids[:5], 1), (token_ids[4:16], 11), (token_ids[2:4], 1)]
    together = backbone.features_batch(sequences, top_k=6)
    for (ids, first), features in zip(sequences, together, strict=True):
        assert_features_close(features, backbone.features(ids, first, 6))


def test_logits_of_targets_are_those_of_the_model(backbone: Backbone, token_ids: Ids) -> None:
    sequences = [(token_ids, 3), (token_ids[:5], 1), (token_ids[2:4], 1)]
    together = backbone.target_logits(sequences)
    start = 0
    for ids, first in sequences:
        expected = backbone.model(torch.from_numpy(ids[None])).logits[0, first - 1 : -1]
        end = start + len(expected)
        np.testing.assert_allclose(together[start:end].numpy(), expected.detach().numpy(), atol=3e-5, rtol=1e-4)
        start = end
    assert start == len(together) and together.dtype == torch.float32
    # A loss may keep it for its gradient, which a tensor of the inference mode refuses.
    assert not together.is_inference() and not together.requires_grad
    for bad in ([], [(token_ids, 0)], [(token_ids[:3], 3)]):
        with pytest.raises(InputError, match="expected"):
            backbone.target_logits(bad)


def test_batch_of_states_equals_single(backbone: Backbone, token_ids: Ids) -> None:
    batch = np.zeros((2, len(token_ids)), np.int64)
    batch[0], batch[1, :9] = token_ids, token_ids[3:12]
    mask = np.arange(len(token_ids)) < np.array([[len(token_ids)], [9]])
    together = backbone.forward_states(torch.tensor(batch), torch.tensor(mask.astype(np.int64)))
    alone = backbone.forward_states(torch.tensor(batch[1:, :9]))
    for name in ("logits", "hidden", "taps", "states"):
        np.testing.assert_allclose(
            getattr(together, name)[1, :9].numpy(), getattr(alone, name)[0].numpy(), atol=3e-5, rtol=1e-4
        )


def test_top_k_of_the_whole_vocabulary_keeps_all(llama: Backbone, token_ids: Ids) -> None:
    features = llama.features(token_ids, 1, top_k=10_000)
    np.testing.assert_array_equal(features.top_ids[0], np.arange(llama.spec.vocab_size))
    sums = np.exp(features.top_logits.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(np.log(sums), features.log_normalizer, atol=1e-5)


def test_dtypes_are_those_of_the_protocols(llama: Backbone, token_ids: Ids) -> None:
    step = fresh(llama, token_ids)
    assert {step.logits.dtype, step.hidden.dtype, step.taps.dtype} == {np.dtype(np.float32)}
    assert step.taps.shape == (4, 24)
    features = llama.features(token_ids, 2, 4)
    kinds = {name: array.dtype.name for name, array in vars(features).items()}
    assert kinds == {
        "target_ids": "int64",
        "tap_codes": "int8",
        "tap_scales": "float16",
        "log_normalizer": "float32",
        "target_logits": "float32",
        "top_ids": "int64",
        "top_logits": "float32",
        "hidden": "float16",
    }


def test_weights_never_get_gradients(llama: Backbone, token_ids: Ids) -> None:
    assert not llama.model.training
    states = llama.forward_states(torch.tensor([token_ids.tolist()]))
    assert not any(parameter.requires_grad for parameter in llama.model.parameters())
    assert not states.logits.requires_grad and not states.taps.requires_grad
    # Unlike inference tensors, these may enter another network's graph.
    weight = torch.ones(states.taps.shape[-1], requires_grad=True)
    (states.taps * weight).sum().backward()
    assert weight.grad is not None


def test_the_model_still_works_on_its_own(llama: Backbone, token_ids: Ids) -> None:
    ids = torch.tensor([token_ids.tolist()])
    with torch.inference_mode():
        before = llama.model(input_ids=ids).logits
    cursor = llama.cursor()
    cursor.extend(token_ids)
    with pytest.raises(InputError):
        cursor.extend(np.array([10**6]))
    with torch.inference_mode():
        assert torch.equal(llama.model(input_ids=ids).logits, before)


def test_two_cursors_do_not_meet(llama: Backbone, token_ids: Ids) -> None:
    left, right = llama.cursor(), llama.cursor()
    left.extend(token_ids[:5])
    right.extend(token_ids[5:12])
    assert_close(left.extend(token_ids[5:6]), fresh(llama, token_ids[:6]))
    assert_close(right.extend(token_ids[12:13]), fresh(llama, token_ids[5:13]))


def test_a_subset_of_layers_can_be_tapped(
    make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes, token_ids: Ids, llama: Backbone
) -> None:
    projections = Projections.random(tap_layers=(1, 3), hidden_size=24, tap_dim=7, basis_dim=5)
    some = Backbone.from_model(make_model("llama"), tokenizer_json, projections=projections)
    states = some.forward_states(torch.tensor([token_ids.tolist()]))
    assert states.taps.shape == (1, len(token_ids), 2, 7)
    whole = llama.forward_states(torch.tensor([token_ids.tolist()]))
    assert torch.equal(states.states, whole.states[:, :, [1, 3]])
    assert some.output_basis.codes.shape == (61, 5)


def test_identity_projections_give_raw_states(
    make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes, token_ids: Ids
) -> None:
    identity = Projections.identity(tap_layers=range(4), hidden_size=24)
    backbone = Backbone.from_model(make_model("llama"), tokenizer_json, projections=identity)
    states = backbone.forward_states(torch.tensor([token_ids.tolist()]))
    assert torch.equal(states.taps, states.states)
    np.testing.assert_allclose(fresh(backbone, token_ids).taps, states.states[0, -1].numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.zeros(0, np.int64), "at least one token"),
        (np.zeros((1, 2), np.int64), "expected int64"),
        (np.zeros(2, np.float32), "expected int64"),
        (np.array([-1]), "vocabulary"),
        (np.array([61]), "vocabulary"),
        (np.zeros(41, np.int64), "context holds 40"),
    ],
)
def test_bad_tokens_are_input_errors(llama: Backbone, ids: Ids, message: str) -> None:
    cursor = llama.cursor()
    with pytest.raises(InputError, match=message):
        cursor.extend(ids)
    assert cursor.length == 0


def test_the_context_is_used_to_the_last_token(backbone: Backbone) -> None:
    cursor = backbone.cursor()
    cursor.extend(np.full(39, 5))
    cursor.extend(np.array([6]))
    with pytest.raises(InputError, match="41 tokens"):
        cursor.extend(np.array([7]))
    assert cursor.length == 40
    cursor.truncate(39)
    cursor.extend(np.array([7]))


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_beyond_the_cache_is_an_input_error(llama: Backbone, length: int) -> None:
    cursor = llama.cursor()
    cursor.extend(np.array([1, 2, 3]))
    with pytest.raises(InputError, match="cache holds 3"):
        cursor.truncate(length)


@pytest.mark.parametrize("prefix", [0, 5])
def test_an_interrupted_pass_leaves_the_cursor_as_it_was(llama: Backbone, token_ids: Ids, prefix: int) -> None:
    cursor = llama.cursor()
    if prefix:
        cursor.extend(token_ids[:prefix])

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cursor.extend(np.array([7, 8, 9]), interrupt)
    assert cursor.length == prefix
    assert_close(cursor.extend(token_ids[prefix:]), fresh(llama, token_ids))


@pytest.mark.parametrize(("first_target", "top_k"), [(0, 4), (5, 4), (-1, 4), (2, 0)])
def test_bad_feature_requests_are_input_errors(llama: Backbone, first_target: int, top_k: int) -> None:
    with pytest.raises(InputError, match="expected"):
        llama.features(np.array([1, 2, 3, 4, 5]), first_target, top_k)


def test_no_sequences_no_features(llama: Backbone) -> None:
    assert llama.features_batch([], 4) == []


def test_projections_of_another_model_are_refused(
    make_model: Callable[..., PreTrainedModel], tokenizer_json: bytes
) -> None:
    for wrong in (
        Projections.random(tap_layers=range(4), hidden_size=25),
        Projections.random(tap_layers=range(5), hidden_size=24),
    ):
        with pytest.raises(InputError, match="fit projections for this model"):
            Backbone.from_model(make_model("llama"), tokenizer_json, projections=wrong)


def test_the_description_is_what_devices_bind_to(llama: Backbone) -> None:
    description = llama.description
    assert description.backbone_digest == llama.spec.backbone_digest
    assert description.tokenizer_digest == llama.spec.tokenizer_digest
    assert description.projections_digest == llama.projections.digest
    assert (description.num_taps, description.tap_dim, description.basis_dim) == (4, 24, 24)
    assert (description.vocab_size, description.hidden_size, description.max_context) == (61, 24, 40)
    assert description.stop_token_ids == (2,)


def test_the_output_basis_is_the_head_times_the_basis(llama: Backbone) -> None:
    head = llama.model.get_output_embeddings().weight.double().numpy()
    exact = head @ llama.projections.basis
    step = np.abs(exact).max(1) / 127
    assert (np.abs(llama.output_basis.matrix() - exact) <= step[:, None] * 0.51).all()


def test_a_pass_that_nobody_wants_any_more_leaves_the_cursor_as_it_was(backbone: Backbone) -> None:
    cursor, fresh = backbone.cursor(), backbone.cursor()
    prompt, token = np.array([5, 6, 7]), np.array([8])
    cursor.extend(prompt)
    answers = iter([True, False])
    with pytest.raises(StepAbandonedError):
        cursor.extend(token, lambda: next(answers))
    assert cursor.length == 3
    fresh.extend(prompt)
    assert np.array_equal(cursor.extend(token).logits, fresh.extend(token).logits)


def test_a_pass_whose_tokens_are_all_wanted_picks_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone("llama")
    asked: list[tuple[list[int], int]] = []
    run_packed = backbone.run_packed

    def watched(packed: Any, input_ids: Any, rows: list[int], is_wanted: Any) -> Any:
        asked.append((rows, len(input_ids)))
        return run_packed(packed, input_ids, rows, is_wanted)

    monkeypatch.setattr(backbone, "run_packed", watched)
    cursor = backbone.cursor()
    cursor.extend(np.arange(2, 9))
    cursor.extend(np.array([5]))
    (prompt_rows, _), (step_rows, num_rows) = asked
    assert prompt_rows[0] == 6
    assert step_rows == list(range(num_rows))
