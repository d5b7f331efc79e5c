"""The copy gate: by hand, against NumPy, slopes by differences, what is written, and folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from cotune.data.batches import EncodedExample, pad_batch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_nats
from cotune.tuning.continuations import continuations, sampled
from cotune.tuning.copy_gate import (
    AHEAD,
    EDIT_RANK,
    GATE_FILE,
    OFF_PATH,
    REACH,
    START_TRUST,
    CopyGate,
    SourcePath,
    copying,
    copying_nats,
    log_mixture,
)

END = 2
PROMPTS = [np.array([1, 7, 9], np.int64), np.array([1, 5], np.int64), np.array([1, 6, 6], np.int64)]
SOURCES = [np.array([8, 3, 11, END], np.int64), np.array([30, END], np.int64), np.zeros(0, np.int64)]
tokens = st.lists(st.integers(0, 3), max_size=6).map(lambda ids: np.array(ids, np.int64))


def random_gate(backbone: Backbone, scale: float = 20.0) -> CopyGate:
    fresh, rng = CopyGate.fresh(backbone.spec.hidden_size), np.random.default_rng(3)
    numbers = [torch.from_numpy(rng.normal(size=tensor.shape)).float() for tensor in fresh.tensors]
    scales = (scale, scale / 4, 0.3, scale / 4, 1.0, 0.5, 0.5)
    return CopyGate(*(each * factor for each, factor in zip(numbers, scales, strict=True)))


def texts_of(backbone: Backbone) -> tuple[list[EncodedExample], SourcePath]:
    """Three texts: the first has another second token than its source, the second is it, the third has none."""
    targets = [[8, 4, 11, END], [30, END], [5, 6, END]]
    encoded = [
        EncodedExample(np.array([*prompt, *target], np.int64), len(prompt))
        for prompt, target in zip(PROMPTS, targets, strict=True)
    ]
    paths = [SourcePath.of(np.array(t, np.int64), source) for t, source in zip(targets, SOURCES, strict=True)]
    return encoded, SourcePath.joined(paths)


def test_a_mixture_by_hand() -> None:
    """g is 1/4, alpha points at tokens 0 and 1 with 0.8 and 0.2: 3/4 (0.5, 0.2, 0.3) + 1/4 (0.8, 0.2, 0)."""
    own, copied = torch.tensor([0.5, 0.2, 0.3]).log(), torch.tensor([0.8, 0.2, 0.0]).log()
    score = torch.tensor([1 / 3]).log()
    found = log_mixture(own, score, copied, torch.tensor([True])).exp().tolist()
    assert found == pytest.approx([0.575, 0.2, 0.225])
    assert torch.equal(log_mixture(own, score, copied, torch.tensor([False])), own)


def test_far_scores_stay_finite_and_have_slopes() -> None:
    """In float32 sigmoid(200) is 1: its log of 1 - g is -200, not minus infinity."""
    scores = torch.tensor([200.0, 200.0, -200.0, -200.0], requires_grad=True)
    own, copied = torch.full((4,), -300.0, requires_grad=True), torch.tensor([0.0, -1e9, 0.0, -1e9])
    found = log_mixture(own, scores, copied, torch.tensor([True]))
    assert found.tolist() == pytest.approx([0.0, -500.0, -200.0, -300.0], abs=1e-4)
    torch.autograd.backward(found.sum())
    assert scores.grad is not None and own.grad is not None
    assert scores.grad.tolist() == pytest.approx([0.0, -1.0, 1.0, 0.0], abs=1e-6)
    assert own.grad.tolist() == pytest.approx([0.0, 1.0, 0.0, 1.0], abs=1e-6)


def test_places_by_hand() -> None:
    """s makes the token at the second place e times as likely on c, and r the third one off it."""
    gate, ahead, is_there = CopyGate.fresh(2), torch.zeros(2, AHEAD, 2), torch.zeros(2, AHEAD, dtype=torch.bool)
    place_weight, place_bias = torch.zeros(2, 2), torch.zeros(2, AHEAD)
    place_weight[0, 1], place_bias[1, 2] = 1.0, 1.0
    ahead[:, 1] = torch.tensor([0.0, 1.0])
    is_there[:, :3] = True
    gate = replace(gate, place_weight=place_weight, place_bias=place_bias)
    found = gate.places(ahead, torch.tensor([0, 1]), is_there).exp()
    total = 2 + np.e
    assert found[:, :3].flatten().tolist() == pytest.approx(
        [1 / total, np.e / total, 1 / total] + [1 / total] * 2 + [np.e / total]
    )
    assert not found[:, 3:].any()


@pytest.mark.parametrize(
    ("written", "source", "ahead", "off"),
    [
        ("abcd", "abcd", "abcd", "...."),
        ("axcd", "abcd", "abbd", "..x."),  # a word replaced
        ("axbcd", "abcd", "abbcd", "..x.."),  # inserted
        ("acd", "abcd", "abd", "..."),  # left out
        ("xyzab", "abcd", "aaaab", ".xxx."),
        ("ba", "abcd", "ac", ".."),  # never back
        ("abcdx", "abcd", "abcd-", "....."),  # over
        ("ab", "", "--", ".x"),
        ("", "ab", "", ""),
    ],
)
def test_where_a_text_stands_in_its_source_by_hand(written: str, source: str, ahead: str, off: str) -> None:
    def ids(text: str) -> np.ndarray:
        return np.array([OFF_PATH if letter == "-" else ord(letter) for letter in text], np.int64)

    path = SourcePath.of(ids(written), ids(source))
    assert path.ahead[:, 0].tolist() == ids(ahead).tolist() and len(path) == len(written)
    assert path.is_off.tolist() == [letter == "x" for letter in off]


def test_what_is_ahead_is_filled_up() -> None:
    path = SourcePath.of(np.array([5], np.int64), np.array([5, 6, 7], np.int64))
    assert path.ahead.tolist() == [[5, 6, 7] + [OFF_PATH] * (AHEAD - 3)]
    nothing = SourcePath.of(np.array([5, 9], np.int64), np.zeros(0, np.int64))
    assert nothing.is_empty and nothing.ahead.shape == (2, AHEAD) and not path.is_empty
    both = SourcePath.joined([nothing, path])
    assert not both.is_empty and len(both) == 3


def test_a_place_far_ahead_is_not_looked_for() -> None:
    for distance, is_off in ((REACH - 1, 0), (REACH, 1)):
        source = np.array([5] * distance + [7, 99], np.int64)
        assert SourcePath.of(np.array([7, 7], np.int64), source).is_off[1] == is_off


@given(tokens, tokens)
def test_a_path_goes_forward_and_all_the_way_with_its_source(written: np.ndarray, source: np.ndarray) -> None:
    """j grows by the nearest place of each token, and stays where there is none."""
    path, place = SourcePath.of(written, source), 0
    for step, token in enumerate(written.tolist()):
        rest = source[place:].tolist()
        assert path.ahead[step].tolist() == (rest + [OFF_PATH] * AHEAD)[:AHEAD]
        is_off = token not in rest
        place += 0 if is_off else rest.index(token) + 1
        assert step + 1 == len(written) or path.is_off[step + 1] == is_off


def test_nats_of_texts_are_those_of_a_reference(backbone: Backbone) -> None:
    """Each text by itself, with NumPy: the equations at the head of the module."""
    model, gate = backbone.model, random_gate(backbone)
    w, v, b, s, r, down, up = (tensor.double().numpy() for tensor in gate.tensors)
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    encoded, path = texts_of(backbone)
    with torch.no_grad():
        nats = copying_nats(model, head, params, gate, pad_batch(encoded, 0), path)
    table = model.get_input_embeddings().weight.detach().double().numpy()
    out = head.weight.detach().double().numpy()
    expected, row = [], 0
    for each in encoded:
        with torch.no_grad():
            hidden = model(torch.from_numpy(each.input_ids)[None], output_hidden_states=True).hidden_states[-1]
        for place in range(each.first_target, len(each.input_ids)):
            state, token = hidden[0, place - 1].double().numpy(), each.input_ids[place]
            there = [int(t) for t in path.ahead[row] if t != OFF_PATH]
            e, o = np.zeros((AHEAD, len(state))), path.is_off[row]
            for k, t in enumerate(there):
                e[k] = table[t] / np.linalg.norm(table[t])
            logits = out @ (state + up @ down @ e.ravel())
            own = np.exp(logits - np.logaddexp.reduce(logits))[token]
            score = state @ w / np.linalg.norm(state) + e.ravel() @ v + b[o]
            alpha = np.exp((e @ s[o] + r[o])[: len(there)])
            copied = alpha @ (np.array(there) == token) / alpha.sum() if there else 0.0
            g = 1 / (1 + np.exp(-score)) if there else 0.0
            expected.append(-np.log((1 - g) * own + g * copied))
            row += 1
    assert nats.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_slopes_of_the_gate_and_of_the_model_are_those_of_differences(backbone: Backbone) -> None:
    model = backbone.model
    params = {name: tensor.detach().double() for name, tensor in model.named_parameters()}
    head, (encoded, path) = model.get_output_embeddings(), texts_of(backbone)
    name = next(each for each in params if each.endswith(("o_proj.weight", "attn.c_proj.weight")))
    gate = random_gate(backbone, scale=2.0)
    drawn = torch.randn(params[name].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turns = [
        F.normalize(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1 + number)), dim=0)
        for number, tensor in enumerate(gate.tensors)
    ]

    def total(along: torch.Tensor) -> torch.Tensor:
        """Nats where the model, w, v, b, s, r, D and U are moved by eight lengths."""
        moved = {**params, name: params[name] + along[0].double() * drawn}
        tilted = CopyGate(
            *(t + along[1 + i] * turn for i, (t, turn) in enumerate(zip(gate.tensors, turns, strict=True)))
        )
        whole = {each: tensor.float() for each, tensor in moved.items()}
        return copying_nats(model, head, whole, tilted, pad_batch(encoded, 0), path).sum()

    along = torch.zeros(8, requires_grad=True)
    (slope,) = torch.autograd.grad(total(along), along)
    for axis in range(8):
        step = torch.zeros(8)
        step[axis] = 2e-3
        with torch.no_grad():
            rise = float(total(step) - total(-step)) / 4e-3
        assert abs(rise) > 1e-3 and float(slope[axis]) == pytest.approx(rise, rel=0.05, abs=2e-3)


def test_an_untrained_gate_writes_the_source_and_nothing_else_changes(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    params = dict(model.named_parameters())
    ones = torch.ones(2, AHEAD, len(gate.weight))
    trust = gate.scores(ones[:, 0], ones, torch.tensor([0, 1])).sigmoid()
    assert trust.tolist() == pytest.approx(START_TRUST) and not gate.edits(ones).any()

    def write(length: int = 6) -> list[list[int]]:
        with copying(model, gate, SOURCES, lambda logits: logits.argmax(-1)) as choose:
            return continuations(model, params, PROMPTS, choose, max_new_tokens=length, stop_token_ids={END})

    alone = continuations(
        model, params, PROMPTS, lambda logits: logits.argmax(-1), max_new_tokens=6, stop_token_ids={END}
    )
    assert write() == [SOURCES[0].tolist(), SOURCES[1].tolist(), alone[2]]
    assert write(2)[0] == [8, 3]
    # A gate that trusts nothing writes what the model writes.
    gate = replace(gate, bias=torch.full((2,), -50.0))
    assert write() == alone


def test_draws_follow_the_mixture_on_the_path_and_the_model_off_it(backbone: Backbone) -> None:
    model, gate = backbone.model, CopyGate.fresh(backbone.spec.hidden_size)
    gate = replace(gate, bias=torch.zeros(2), place_bias=50 * torch.eye(AHEAD)[[0, 0]])
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


def test_edits_rewrite_a_source_by_a_rule(backbone: Backbone) -> None:
    """Eight examples of a rule, "20 for 10 and else as it is": the gate learns it, and it holds in other sources."""
    model, hidden_size = backbone.model, backbone.spec.hidden_size
    params, head = dict(model.named_parameters()), model.get_output_embeddings()

    def sources(seed: int) -> list[np.ndarray]:
        words = np.random.default_rng(seed).integers(8, 12, (8, 3))
        return [np.array([a, 7, b, 7, c, END], np.int64) for a, b, c in words]

    def rewritten(source: np.ndarray) -> np.ndarray:
        return np.where(source == 10, 20, source)

    batch = pad_batch([EncodedExample(np.array([1, *rewritten(each)]), 1) for each in sources(0)], 0)
    path = SourcePath.joined([SourcePath.of(rewritten(each), each) for each in sources(0)])
    numbers = torch.cat([tensor.flatten() for tensor in CopyGate.fresh(hidden_size).tensors]).requires_grad_()
    rule = torch.optim.Adam([numbers], lr=0.05)
    for _ in range(100):
        rule.zero_grad()
        torch.autograd.backward(
            copying_nats(model, head, params, CopyGate.of(numbers, hidden_size), batch, path).mean()
        )
        rule.step()
    with (
        torch.no_grad(),
        copying(model, CopyGate.of(numbers, hidden_size), sources(1), lambda p: p.argmax(-1)) as choose,
    ):
        written = continuations(model, params, [np.array([1])] * 8, choose, max_new_tokens=8, stop_token_ids={END})
    assert any(20 in each for each in written)
    assert written == [rewritten(each).tolist() for each in sources(1)]


def test_without_a_source_the_loss_is_the_models(backbone: Backbone) -> None:
    model = backbone.model
    params, head = dict(model.named_parameters()), model.get_output_embeddings()
    encoded, path = texts_of(backbone)
    batch, empty = pad_batch(encoded, 0), SourcePath(np.full_like(path.ahead, OFF_PATH), path.is_off)
    with torch.no_grad():
        alone = answer_nats(model, head, params, batch)
        found = copying_nats(model, head, params, random_gate(backbone), batch, empty)
    assert empty.is_empty and torch.equal(alone, found)


def test_a_gate_comes_back_from_its_folder(tmp_path: Path) -> None:
    size = CopyGate.fresh(3).num_parameters
    gate = CopyGate.of(torch.arange(float(size)), 3)
    assert size == 3 + 3 * AHEAD + 2 + 2 * 3 + 2 * AHEAD + EDIT_RANK * 3 * AHEAD + 3 * EDIT_RANK
    assert gate.bias.tolist() == [3.0 + 3 * AHEAD, 4.0 + 3 * AHEAD] and gate.up.shape == (3, EDIT_RANK)
    gate.save(tmp_path)
    back = CopyGate.load(tmp_path, 3)
    assert all(map(torch.equal, back.tensors, gate.tensors)) and back.num_parameters == size
    with pytest.raises(InputError, match="no copy gate of this model"):
        CopyGate.load(tmp_path, 4)
    (tmp_path / GATE_FILE).write_bytes(b"{}")
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path, 3)
    with pytest.raises(InputError, match="no copy gate"):
        CopyGate.load(tmp_path / "none", 3)
    with pytest.raises(InputError, match="cannot be written"):
        gate.save(tmp_path / "none")
