"""The copy gate: by hand, against NumPy, slopes by differences, what is written, and folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.continuations import continuations, sampled
from cotune.tuning.copy_gate import (
    GATE_FILE,
    OFF_PATH,
    START_TRUST,
    CopyGate,
    copied_tokens,
    copying,
    copying_nats,
    last_hidden,
    log_mixture,
)

END = 2
PROMPTS = [np.array([1, 7, 9], np.int64), np.array([1, 5], np.int64), np.array([1, 6, 6], np.int64)]
SOURCES = [np.array([8, 3, 11, END], np.int64), np.array([30, END], np.int64), np.zeros(0, np.int64)]
tokens = st.lists(st.integers(0, 3), max_size=6).map(lambda ids: np.array(ids, np.int64))


def random_gate(backbone: Backbone, scale: float = 20.0) -> CopyGate:
    weight = np.random.default_rng(3).normal(size=backbone.spec.hidden_size) * scale
    return CopyGate(torch.from_numpy(weight).float(), torch.tensor([0.3]))


def texts_of(backbone: Backbone) -> tuple[list[EncodedExample], torch.Tensor]:
    """Three texts: the first leaves its source at the second token, the second is it, the third has none."""
    targets = [[8, 4, 11, END], [30, END], [5, 6, END]]
    encoded = [
        EncodedExample(np.array([*prompt, *target], np.int64), len(prompt))
        for prompt, target in zip(PROMPTS, targets, strict=True)
    ]
    copied = [copied_tokens(np.array(t, np.int64), source) for t, source in zip(targets, SOURCES, strict=True)]
    return encoded, torch.from_numpy(np.concatenate(copied))


def test_a_mixture_by_hand() -> None:
    """Token 0 is the source's; g is 1/4. 3/4 (0.5, 0.2, 0.3) + 1/4 (1, 0, 0), and off the path p_x alone."""
    own = torch.tensor([0.5, 0.2, 0.3]).log()
    score = torch.tensor([1 / 3]).log()
    vocabulary = torch.arange(3)
    assert log_mixture(own, score, vocabulary, torch.tensor([0])).exp().tolist() == pytest.approx([0.625, 0.15, 0.225])
    assert torch.equal(log_mixture(own, score, vocabulary, torch.tensor([OFF_PATH])), own)


def test_far_scores_stay_finite_and_have_slopes() -> None:
    """In float32 sigmoid(200) is 1: its log of 1 - g is -200, not minus infinity."""
    scores = torch.tensor([200.0, 200.0, -200.0, -200.0], requires_grad=True)
    own = torch.full((4,), -300.0, requires_grad=True)
    found = log_mixture(own, scores, torch.tensor([1, 2, 1, 2]), torch.tensor([1, 1, 1, 1]))
    assert found.tolist() == pytest.approx([0.0, -500.0, -200.0, -300.0], abs=1e-4)
    torch.autograd.backward(found.sum())
    assert scores.grad is not None and own.grad is not None
    assert scores.grad.tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0], abs=1e-6)
    assert own.grad.tolist() == pytest.approx([0.0, 1.0, 0.0, 1.0], abs=1e-6)


@given(tokens, tokens)
def test_the_path_ends_where_a_text_leaves_its_source(written: np.ndarray, source: np.ndarray) -> None:
    expected = [
        int(source[place]) if place < len(source) and written[:place].tolist() == source[:place].tolist() else OFF_PATH
        for place in range(len(written))
    ]
    assert copied_tokens(written, source).tolist() == expected


@settings(max_examples=20)
@given(st.integers(0, 10_000))
def test_a_mixture_is_numpys_and_sums_to_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, scores, copied = rng.normal(size=(4, 9)) * 3, rng.normal(size=4) * 3, rng.integers(-1, 9, 4)
    own = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = np.where(copied == OFF_PATH, 0.0, 1 / (1 + np.exp(-scores)))[:, None]
    expected = (1 - g) * own + g * (np.arange(9)[None] == copied[:, None])
    found = log_mixture(
        torch.from_numpy(logits).log_softmax(-1),
        torch.from_numpy(scores)[:, None],
        torch.arange(9),
        torch.from_numpy(copied)[:, None],
    ).exp()
    assert found.numpy() == pytest.approx(expected, rel=1e-9)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 4)


def test_nats_of_texts_are_those_of_a_reference(backbone: Backbone) -> None:
    """Each text by itself, with NumPy: softmax of the model's logits, the gate on the hidden state of length 1."""
    model, gate = backbone.model, random_gate(backbone)
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    encoded, copied = texts_of(backbone)
    with torch.no_grad():
        nats = copying_nats(model, head, params, gate, pad_batch(encoded, 0), copied)
    expected, row = [], 0
    for each in encoded:
        with torch.no_grad(), last_hidden(head) as hidden:
            logits = model(torch.from_numpy(each.input_ids)[None]).logits[0].double().numpy()
        for place in range(each.first_target, len(each.input_ids)):
            state = hidden[0][0, place - 1].double().numpy()
            score = state @ gate.weight.double().numpy() / np.linalg.norm(state) + float(gate.bias)
            own = np.exp(logits[place - 1] - np.logaddexp.reduce(logits[place - 1]))[each.input_ids[place]]
            g = 0.0 if copied[row] == OFF_PATH else 1 / (1 + np.exp(-score))
            expected.append(-np.log((1 - g) * own + g * (each.input_ids[place] == int(copied[row]))))
            row += 1
    assert nats.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_slopes_of_the_gate_and_of_the_model_are_those_of_differences(backbone: Backbone) -> None:
    model = backbone.model
    params = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    head, (encoded, copied) = model.get_output_embeddings(), texts_of(backbone)
    name = next(each for each in params if each.endswith(("o_proj.weight", "attn.c_proj.weight")))
    gate = random_gate(backbone, scale=2.0)
    drawn = torch.randn(params[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turn = F.normalize(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(1)), dim=0)

    def total(along: torch.Tensor) -> torch.Tensor:
        """Nats where model, w and b are moved by three lengths."""
        moved = {**params, name: params[name] + along[0].double() * drawn}
        tilted = CopyGate(gate.weight + along[1] * turn, gate.bias + along[2])
        whole = {each: tensor.float() for each, tensor in moved.items()}
        return copying_nats(model, head, whole, tilted, pad_batch(encoded, 0), copied).sum()

    along = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(total(along), along)
    for axis in range(3):
        step = torch.zeros(3)
        step[axis] = 5e-3
        with torch.no_grad():
            rise = float(total(step) - total(-step)) / 1e-2
        assert abs(rise) > 1e-3 and float(slope[axis]) == pytest.approx(rise, rel=0.05)


def test_an_untrained_gate_writes_the_source_and_nothing_else_changes(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    assert gate.trust(torch.ones(1, len(gate.weight))).tolist() == pytest.approx([START_TRUST])

    def write(length: int = 6) -> list[list[int]]:
        with copying(head, gate, SOURCES, lambda logits: logits.argmax(-1)) as choose:
            return continuations(model, params, PROMPTS, choose, max_new_tokens=length, stop_token_ids={END})

    alone = continuations(
        model, params, PROMPTS, lambda logits: logits.argmax(-1), max_new_tokens=6, stop_token_ids={END}
    )
    assert write() == [SOURCES[0].tolist(), SOURCES[1].tolist(), alone[2]]
    assert write(2)[0] == [8, 3]
    # A gate that trusts nothing writes what the model writes.
    gate = CopyGate(gate.weight, torch.tensor([-50.0]))
    assert write() == alone


def test_draws_follow_the_mixture_on_the_path_and_the_model_off_it(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    gate = CopyGate(gate.weight, torch.zeros(1))
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    with copying(head, gate, [SOURCES[0]] * 2000, sampled(torch.Generator().manual_seed(0), 1.0)) as choose:
        texts = continuations(model, params, [PROMPTS[0]] * 2000, choose, max_new_tokens=2)
    with torch.no_grad():
        first = model(torch.from_numpy(PROMPTS[0])[None]).logits[0, -1].softmax(-1).numpy()
    firsts = np.bincount([text[0] for text in texts], minlength=len(first)) / len(texts)
    expected = 0.5 * first + 0.5 * (np.arange(len(first)) == 8)
    assert np.abs(firsts - expected).sum() < 0.15
    stayed, left = ([text[1] for text in texts if (text[0] == 8) == is_on] for is_on in (True, False))
    assert np.mean(np.array(stayed) == 3) > 0.45 and np.mean(np.array(left) == 3) < 0.3


def test_without_a_source_the_loss_is_the_models(backbone: Backbone) -> None:
    model = backbone.model
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    encoded, copied = texts_of(backbone)
    batch = pad_batch(encoded, 0)
    with torch.no_grad():
        alone = answer_nats(model, head, params, batch)
        found = copying_nats(model, head, params, random_gate(backbone), batch, torch.full_like(copied, OFF_PATH))
    assert torch.equal(alone, found)


def test_a_gate_comes_back_from_its_folder(tmp_path: Path) -> None:
    gate = CopyGate(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25]))
    gate.save(tmp_path)
    back = CopyGate.load(tmp_path, 3)
    assert torch.equal(back.weight, gate.weight) and torch.equal(back.bias, gate.bias) and back.num_parameters == 4
    with pytest.raises(InputError, match="no copy gate of this model"):
        CopyGate.load(tmp_path, 4)
    (tmp_path / GATE_FILE).write_bytes(b"{}")
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path, 3)
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path / "none", 3)
    with pytest.raises(InputError, match="cannot be written"):
        gate.save(tmp_path / "none")
