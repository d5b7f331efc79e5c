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
    REACH,
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
    drawn = np.random.default_rng(3).normal(size=(2, backbone.spec.hidden_size)) * scale
    weight, source_weight = torch.from_numpy(drawn).float()
    return CopyGate(weight, source_weight, torch.tensor([0.3]))


def texts_of(backbone: Backbone) -> tuple[list[EncodedExample], torch.Tensor]:
    """Three texts: the first has another second token than its source, the second is it, the third has none."""
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


@pytest.mark.parametrize(
    ("written", "source", "expected"),
    [
        ("abcd", "abcd", "abcd"),
        ("axcd", "abcd", "ab-d"),  # a word replaced: the next one by the text alone
        ("axbcd", "abcd", "ab-cd"),  # inserted
        ("acd", "abcd", "abd"),  # left out
        ("xyzab", "abcd", "a---b"),
        ("ba", "abcd", "ac"),  # never back
        ("abcdx", "abcd", "abcd-"),  # over
        ("ab", "", "--"),
        ("", "ab", ""),
    ],
)
def test_where_a_text_stands_in_its_source_by_hand(written: str, source: str, expected: str) -> None:
    def ids(text: str) -> np.ndarray:
        return np.array([OFF_PATH if letter == "-" else ord(letter) for letter in text], np.int64)

    assert copied_tokens(ids(written), ids(source)).tolist() == ids(expected).tolist()


def test_a_place_far_ahead_is_not_looked_for() -> None:
    for distance, token in ((REACH - 1, 99), (REACH, OFF_PATH)):
        source = np.array([5] * distance + [7, 99], np.int64)
        assert copied_tokens(np.array([7, 7], np.int64), source)[1] == token


@given(tokens, tokens)
def test_a_path_goes_forward_and_through_the_source(written: np.ndarray, source: np.ndarray) -> None:
    """What follows a token is offered only behind that token in c, at growing places, and all of c while z is c."""
    found, place = copied_tokens(written, source), 0
    for step, token in enumerate(found.tolist()):
        if step and token != OFF_PATH:
            place += next(i for i, each in enumerate(source[place:]) if each == written[step - 1]) + 1
            assert source[place] == token
        elif step and written[step - 1] in source[place:]:
            # Nowhere to go on from: it was c's last token.
            assert source[place:].tolist().index(written[step - 1]) == len(source) - place - 1
            place = len(source)
    same = next((i for i, (a, b) in enumerate(zip(written, source, strict=False)) if a != b), len(source))
    assert found[: same + 1].tolist() == source[: min(same + 1, len(written))].tolist() + [OFF_PATH] * (
        min(same + 1, len(written)) - min(same + 1, len(written), len(source))
    )


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
    """Each text by itself, with NumPy: softmax of the logits, the gate on hidden state and embedding of length 1."""
    model, gate = backbone.model, random_gate(backbone)
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    encoded, copied = texts_of(backbone)
    with torch.no_grad():
        nats = copying_nats(model, head, params, gate, pad_batch(encoded, 0), copied)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    expected, row = [], 0
    for each in encoded:
        with torch.no_grad(), last_hidden(head) as hidden:
            logits = model(torch.from_numpy(each.input_ids)[None]).logits[0].double().numpy()
        for place in range(each.first_target, len(each.input_ids)):
            state = hidden[0][0, place - 1].double().numpy()
            source = table[max(int(copied[row]), 0)]
            score = state @ gate.weight.double().numpy() / np.linalg.norm(state) + float(gate.bias)
            score += source @ gate.source_weight.double().numpy() / np.linalg.norm(source)
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
        """Nats where model, w, v and b are moved by four lengths."""
        moved = {**params, name: params[name] + along[0].double() * drawn}
        tilted = CopyGate(gate.weight + along[1] * turn, gate.source_weight + along[2] * turn, gate.bias + along[3])
        whole = {each: tensor.float() for each, tensor in moved.items()}
        return copying_nats(model, head, whole, tilted, pad_batch(encoded, 0), copied).sum()

    along = torch.zeros(4, requires_grad=True)
    (slope,) = torch.autograd.grad(total(along), along)
    for axis in range(4):
        step = torch.zeros(4)
        step[axis] = 2e-3
        with torch.no_grad():
            rise = float(total(step) - total(-step)) / 4e-3
        assert abs(rise) > 1e-3 and float(slope[axis]) == pytest.approx(rise, rel=0.05, abs=2e-3)


def test_an_untrained_gate_writes_the_source_and_nothing_else_changes(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    params = dict(model.named_parameters())
    ones = torch.ones(1, len(gate.weight))
    assert gate.trust(ones, ones).tolist() == pytest.approx([START_TRUST])

    def write(length: int = 6) -> list[list[int]]:
        with copying(model, gate, SOURCES, lambda logits: logits.argmax(-1)) as choose:
            return continuations(model, params, PROMPTS, choose, max_new_tokens=length, stop_token_ids={END})

    alone = continuations(
        model, params, PROMPTS, lambda logits: logits.argmax(-1), max_new_tokens=6, stop_token_ids={END}
    )
    assert write() == [SOURCES[0].tolist(), SOURCES[1].tolist(), alone[2]]
    assert write(2)[0] == [8, 3]
    # A gate that trusts nothing writes what the model writes.
    gate = CopyGate(gate.weight, gate.source_weight, torch.tensor([-50.0]))
    assert write() == alone


def test_draws_follow_the_mixture_on_the_path_and_the_model_off_it(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    gate = CopyGate(gate.weight, gate.source_weight, torch.zeros(1))
    params = dict(model.named_parameters())
    with copying(model, gate, [SOURCES[0]] * 2000, sampled(torch.Generator().manual_seed(0), 1.0)) as choose:
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
    gate = CopyGate.of(torch.tensor([1.0, -2.0, 0.5, 3.0, 4.0, 5.0, 0.25]))
    assert gate.source_weight.tolist() == [3.0, 4.0, 5.0] and gate.bias.tolist() == [0.25]
    gate.save(tmp_path)
    back = CopyGate.load(tmp_path, 3)
    assert all(map(torch.equal, back.tensors, gate.tensors)) and back.num_parameters == 7
    with pytest.raises(InputError, match="no copy gate of this model"):
        CopyGate.load(tmp_path, 4)
    (tmp_path / GATE_FILE).write_bytes(b"{}")
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path, 3)
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path / "none", 3)
    with pytest.raises(InputError, match="cannot be written"):
        gate.save(tmp_path / "none")
