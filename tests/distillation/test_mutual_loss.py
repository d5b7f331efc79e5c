from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from byte_oracle import ByteOracle, longest_match
from tokenizer_kinds import spans_of, table_of
from torch import Tensor

from cotune.distillation.alignment import Alignment, align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.chunk_gate import ChunkGate
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.merged_bytes import MergedBytes
from cotune.distillation.mutual_loss import ChunkReadings, MutualLoss, MutualLossConfig
from cotune.distillation.next_byte import next_byte_log_probs
from cotune.errors import InputError

TEXTS = ["the cat 😀 sat on naïve mats", "日本 and the ﬁne dog"]
OFF = {"byte_weight": 0.0, "chunk_weight": 0.0, "token_weight": 0.0}
EACH_TERM = pytest.mark.parametrize("term", list(OFF))


def only(term: str, **settings: object) -> MutualLossConfig:
    return MutualLossConfig(**(OFF | {term: 1.0} | settings))  # type: ignore[arg-type]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(teacher: str, student: str) -> list[Alignment]:
    return [align(spans_of(teacher, text, has_end=True), spans_of(student, text, has_end=True)) for text in TEXTS]


def logits_of(kind: str, seed: int) -> Tensor:
    return draw(2, 48, len(table_of(kind)), seed=seed)


def test_the_loss_is_the_specifications_formula() -> None:
    """All terms, gated, for two texts, with loops over tokens."""
    pairs, gate = batch_of("byte_level", "unigram"), ChunkGate(margin=0.1, tau_g=0.7)
    config = MutualLossConfig(byte_weight=0.7, chunk_weight=0.4, token_weight=0.3, top_k=5, gate=gate)
    loss = MutualLoss(config, table_of("byte_level"), table_of("unigram"))
    z_t, z_s = logits_of("byte_level", 1), logits_of("unigram", 2)
    readings = loss.read(z_t, ChunkIndex.of_batch(pairs, 0))
    terms = loss(readings, z_s, ChunkIndex.of_batch(pairs, 1))
    sides = [(z_t.softmax(-1).numpy(), table_of("byte_level")), (z_s.softmax(-1).numpy(), table_of("unigram"))]
    common = [(int(a), int(b)) for a, b in zip(*(_common(loss)), strict=True)]
    total, count = 0.0, 0
    for row, pair in enumerate(pairs):
        for chunk in np.flatnonzero(pair.is_usable):
            likely, firsts = [], []
            for (probs, _), side in zip(sides, pair.sides, strict=True):
                places = range(side.first_tokens[chunk], side.end_tokens[chunk])
                likely.append(sum(math.log(probs[row, place - 1, side.input_ids[place]]) for place in places))
                firsts.append(probs[row, side.first_tokens[chunk] - 1])
            size = max(1, int(pair.chunk_ends[chunk] - pair.chunk_starts[chunk]))
            gate_k = 1 / (1 + math.exp(-((likely[0] - likely[1]) / size - 0.1) / 0.7))
            p, q = (math.exp(one / 2) for one in likely)
            term = 0.4 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
            if pair.has_own_start[chunk]:
                flat = []
                for shares, (_, table) in zip(firsts, sides, strict=True):
                    sums = np.array([shares[table.first_events == event].sum() for event in range(257)]) ** 0.5
                    flat.append(sums / sums.sum())
                term += 4 * 0.7 * float((flat[0] * np.log(flat[0] / flat[1])).sum())
                top = sorted(common, key=lambda ids: -firsts[0][ids[0]])[:5]
                flat = []
                for shares, at in zip(firsts, (0, 1), strict=True):
                    listed = [shares[ids[at]] for ids in top]
                    root = np.array([*listed, 1 - sum(listed)]) ** 0.5
                    flat.append(root / root.sum())
                term += 4 * 0.3 * float((flat[0] * np.log(flat[0] / flat[1])).sum())
            total, count = total + gate_k * term, count + 1
    assert count == len(terms.gates) > 15
    assert terms.loss.item() == pytest.approx(total / count, rel=1e-9)
    assert loss.mixed(torch.tensor(3.0), terms.loss).item() == pytest.approx(1.5 + total / count / 2, rel=1e-6)


def _common(loss: MutualLoss) -> tuple[list[int], list[int]]:
    assert loss._common is not None
    return loss._common.first_ids.tolist(), loss._common.second_ids.tolist()


@EACH_TERM
def test_every_terms_gradient_agrees_with_finite_differences_and_is_not_zero(term: str) -> None:
    """The teacher's tokens are one letter each, the student's up to two; both directions of learning."""
    text = "abcabcc"
    sides = [longest_match("a", "b", "c"), longest_match("a", "b", "c", "ab")]
    spans = [ByteSpans.of_text(tokenizer, text, table, end_id=1) for tokenizer, table in sides]
    for way in ((0, 1), (1, 0)):
        pair = align(spans[way[0]], spans[way[1]])
        index = [ChunkIndex.of_batch([pair], side) for side in (0, 1)]
        loss = MutualLoss(only(term, gate=None), sides[way[0]][1], sides[way[1]][1])
        teacher = draw(1, len(spans[way[0]].input_ids), len(sides[way[0]][1]), seed=5)
        student = draw(1, len(spans[way[1]].input_ids), len(sides[way[1]][1]), seed=6).requires_grad_()
        readings = loss.read(teacher, index[0])
        assert torch.autograd.gradcheck(lambda z, r=readings, x=loss, i=index[1]: x(r, z, i).loss, (student,))
        (gradient,) = torch.autograd.grad(loss(readings, student, index[1]).loss, student)
        assert (gradient[0, index[1].positions].abs().max(dim=1).values > 1e-6).all()
        used = set(index[1].token_positions.tolist())
        unused = [place for place in range(student.shape[1]) if place not in used]
        assert unused and not gradient[0, unused].any()


@EACH_TERM
def test_the_gate_weighs_gradients_and_has_none_of_its_own(term: str) -> None:
    pairs = batch_of("nfkc", "byte_level")
    index = [ChunkIndex.of_batch(pairs, side) for side in (0, 1)]
    gated = MutualLoss(only(term), table_of("nfkc"), table_of("byte_level"))
    plain = MutualLoss(only(term, gate=None), table_of("nfkc"), table_of("byte_level"))
    readings, student = gated.read(logits_of("nfkc", 1), index[0]), logits_of("byte_level", 2).requires_grad_()
    terms = gated(readings, student, index[1])
    (with_gate,) = torch.autograd.grad(terms.loss, student)
    (without,) = torch.autograd.grad(plain(readings, student, index[1]).loss, student)
    first = 3
    place = (int(index[1].rows[first]), int(index[1].positions[first]))
    assert 0 < float(terms.gates[first]) < 1
    torch.testing.assert_close(with_gate[place], float(terms.gates[first]) * without[place])
    told = {"byte_weight": terms.byte, "chunk_weight": terms.chunk, "token_weight": terms.token}
    assert [name for name, value in told.items() if value is not None] == [term]


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "nfkc", "word_piece"])
def test_a_model_distilled_from_itself_has_nothing_to_learn(kind: str) -> None:
    pairs = batch_of(kind, kind)
    index, student = ChunkIndex.of_batch(pairs, 0), logits_of(kind, 3).float().requires_grad_()
    loss = MutualLoss(MutualLossConfig(token_weight=1.0), table_of(kind), table_of(kind))
    terms = loss(loss.read(student, index), student, index)
    assert len(index) > 5 and abs(terms.loss.item()) < 1e-6
    (gradient,) = torch.autograd.grad(terms.loss, student)
    assert float(gradient.abs().max()) < 1e-7
    assert (terms.gates - 0.5).abs().max() < 1e-6


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_two_tokenizers_over_one_language_of_bytes_have_nothing_to_learn(temperature: float) -> None:
    """No token begins with another one, so that every term is zero, and not only that of bytes."""
    oracle = ByteOracle.of_abc()
    sides = [longest_match("aa", "ab", "ac", "b", "c"), longest_match("a", "ba", "bb", "bc", "c")]
    texts = ["caabacbbc", "bcacaac", "c", "acc"]
    spans = [[ByteSpans.of_text(tokenizer, text, table, end_id=1) for text in texts] for tokenizer, table in sides]
    pairs = [align(*both) for both in zip(*spans, strict=True)]
    assert any(len(pair) < min(len(side.input_ids) for side in pair.sides) for pair in pairs)
    config = MutualLossConfig(token_weight=1.0, temperature=temperature, tau=temperature, gate=None)
    for way in ((0, 1), (1, 0)):
        loss = MutualLoss(config, sides[way[0]][1], sides[way[1]][1])
        logits = [
            [oracle.logits(one, sides[side][1], text) for one, text in zip(spans[side], texts, strict=True)]
            for side in way
        ]
        for number, pair in enumerate(pairs):
            seen = pair if way == (0, 1) else pair.swapped()
            index = [ChunkIndex.of_batch([seen], side) for side in (0, 1)]
            assert bool(seen.is_usable.all())
            terms = loss(loss.read(logits[0][number], index[0]), logits[1][number], index[1])
            assert terms.loss.item() == pytest.approx(0.0, abs=1e-12)


def test_what_one_tokenizer_merges_is_left_out_and_then_two_agree_again() -> None:
    """Models that know, as real ones do, that a longer token did not come: no "b" after "a" where "ab" is a token."""
    oracle, text = ByteOracle.of_abc(), "cabcacabccbcac"
    sides = [longest_match("a", "b", "c", "ab", "abc"), longest_match("a", "b", "c", "bc", "ca")]
    spans = [ByteSpans.of_text(tokenizer, text, table, end_id=1) for tokenizer, table in sides]
    logits = []
    for one, (_, table) in zip(spans, sides, strict=True):
        own, merged = oracle.logits(one, table, text), MergedBytes(table)
        firsts = torch.from_numpy(np.minimum(table.first_events, 256))
        told = merged(torch.from_numpy(one.input_ids))[:, firsts]
        assert bool(told.any())
        logits.append(own.masked_fill(told[None], -40.0))
    pair = align(*spans)
    for way, seen in (((0, 1), pair), ((1, 0), pair.swapped())):
        index = [ChunkIndex.of_batch([seen], side) for side in (0, 1)]
        losses = {}
        for drops in (False, True):
            loss = MutualLoss(only("byte_weight", gate=None, drops_merged=drops), sides[way[0]][1], sides[way[1]][1])
            readings = loss.read(logits[way[0]], index[0])
            student = logits[way[1]].clone().requires_grad_()
            terms = loss(readings, student, index[1])
            (gradient,) = torch.autograd.grad(terms.loss, student)
            assert torch.isfinite(gradient).all()
            losses[drops] = terms.loss.item()
        assert losses[False] > 0.1 and losses[True] == pytest.approx(0.0, abs=1e-12)
        with pytest.raises(InputError, match="drops_merged is set and the teacher told nothing"):
            loss(replace(readings, merged=None), student, index[1])


# The label-shift toy: every letter is always followed by the same other one, so that a model which was taught by one
# position too early or too late says the letter that it has just read.
CYCLE = "abcd" * 4


def student_after(learn: Callable[[Tensor, ByteSpans], Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """What a table of next tokens says after some steps of a loss, and what is right.

    Args:
        learn: from logits (1, tokens, vocab) and the spans of the text to a loss.
    """
    tokenizer, table = longest_match("a", "b", "c", "d", "cd")
    spans = ByteSpans.of_text(tokenizer, CYCLE, table)
    weight = torch.zeros(len(table), len(table), requires_grad=True)
    optimiser = torch.optim.Adam([weight], lr=0.3)
    ids = torch.from_numpy(spans.input_ids)
    for _ in range(30):
        optimiser.zero_grad()
        learn(weight[ids][None], spans).backward()
        optimiser.step()
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    pairs = list(zip(spans.input_ids[1:-1].tolist(), spans.input_ids[2:].tolist(), strict=True))
    said = {names[one]: names[int(weight[one].argmax())] for one, _ in pairs}
    return said, {names[one]: names[after] for one, after in pairs}


def cycle_loss(config: MutualLossConfig, shift: int = 0) -> Callable[[Tensor, ByteSpans], Tensor]:
    """Ours, from a teacher that knows the cycle and has one token for each letter."""
    tokenizer, table = longest_match("a", "b", "c", "d")
    own = ByteSpans.of_text(tokenizer, CYCLE, table)
    right = torch.nn.functional.one_hot(torch.from_numpy(np.append(own.input_ids[1:], 3)), len(table))
    _, student_table = longest_match("a", "b", "c", "d", "cd")
    loss = MutualLoss(config, table, student_table)

    def learn(logits: Tensor, spans: ByteSpans) -> Tensor:
        pair = align(own, spans)
        readings = loss.read(12.0 * right[None].float(), ChunkIndex.of_batch([pair], 0))
        index = ChunkIndex.of_batch([pair], 1)
        shifted = replace(index, positions=index.positions + shift, token_positions=index.token_positions + shift)
        return loss(readings, logits, shifted).loss

    return learn


def one_hot_loss(shift: int) -> Callable[[Tensor, ByteSpans], Tensor]:
    """FedMKT's target where its tokens are not aligned: the token at a position, or, with a shift of 1, the next."""

    def learn(logits: Tensor, spans: ByteSpans) -> Tensor:
        ids = torch.from_numpy(spans.input_ids)
        return torch.nn.functional.cross_entropy(logits[0, 1 : len(ids) - shift], ids[1 + shift :])

    return learn


@EACH_TERM
def test_the_next_token_is_taught_and_not_the_current_one(term: str) -> None:
    said, right = student_after(cycle_loss(only(term, gate=None, temperature=1.0, tau=1.0)))
    assert set(right) == {"a", "b", "cd"}
    if term == "byte_weight":  # the first byte is known, which of its tokens is the text's to say
        assert {one: token[0] for one, token in said.items()} == {one: token[0] for one, token in right.items()}
    elif term == "chunk_weight":
        assert said == right
    else:  # "cd" is no token of the teacher, and "c" goes on in one of the two only
        assert said["a"] == "b" and said["cd"] == "a"


def test_an_off_by_one_teaches_copying() -> None:
    said, right = student_after(one_hot_loss(0))
    assert said != right and all(said[one] == one for one in right), "FedMKT as published"
    said, right = student_after(one_hot_loss(1))
    assert said == right, "with its off-by-one fixed"
    said, _ = student_after(cycle_loss(only("chunk_weight", gate=None, tau=1.0), shift=1))
    assert all(said[one] == one for one in ("a", "b")), "ours, if it were shifted"


def test_chunk_likelihoods_alone_are_enough_for_the_second_channel() -> None:
    pairs = batch_of("unigram", "byte_level")
    index = [ChunkIndex.of_batch(pairs, side) for side in (0, 1)]
    loss = MutualLoss(only("chunk_weight"), table_of("unigram"), table_of("byte_level"))
    readings = loss.read(logits_of("unigram", 1), index[0])
    assert readings.next_bytes is None and readings.top_common is None
    sent = ChunkReadings(readings.log_likelihoods.half())
    student = logits_of("byte_level", 2)
    exact = loss(readings, student, index[1]).loss.item()
    assert loss(sent, student, index[1]).loss.item() == pytest.approx(exact, rel=1e-2)


def test_readings_have_no_gradient_and_no_chunks_have_no_loss() -> None:
    loss = MutualLoss(MutualLossConfig(token_weight=0.5), table_of("unigram"), table_of("byte_level"))
    none = ChunkIndex.of_batch([], 0)
    student = logits_of("byte_level", 2).requires_grad_()
    terms = loss(loss.read(logits_of("unigram", 1).requires_grad_(), none), student, none)
    assert terms.loss.item() == 0
    terms.loss.backward()
    assert student.grad is not None and not student.grad.any()
    index = ChunkIndex.of_batch(batch_of("unigram", "byte_level"), 0)
    readings = loss.read(logits_of("unigram", 1).requires_grad_(), index)
    assert readings.next_bytes is not None and readings.top_common is not None
    assert not any(
        one.requires_grad for one in (readings.log_likelihoods, readings.next_bytes, readings.top_common.log_probs)
    )


def test_half_precision_logits_give_a_float32_loss() -> None:
    pairs = batch_of("unigram", "byte_level")
    index = [ChunkIndex.of_batch(pairs, side) for side in (0, 1)]
    loss = MutualLoss(MutualLossConfig(), table_of("unigram"), table_of("byte_level"))
    values = []
    for dtype in (torch.bfloat16, torch.float64):
        teacher, student = logits_of("unigram", 1).bfloat16(), logits_of("byte_level", 2).bfloat16()
        terms = loss(loss.read(teacher.to(dtype), index[0]), student.to(dtype), index[1])
        values.append(terms.loss.item())
        assert terms.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    pairs = batch_of("unigram", "byte_level")
    index = ChunkIndex.of_batch(pairs, 1)
    loss = MutualLoss(MutualLossConfig(token_weight=1.0), table_of("unigram"), table_of("byte_level"))
    readings, student = loss.read(logits_of("unigram", 1), ChunkIndex.of_batch(pairs, 0)), logits_of("byte_level", 2)
    with pytest.raises(InputError, match="expected 0; give both sides of the same alignments"):
        loss(readings, student, ChunkIndex.of_batch([], 1))
    with pytest.raises(InputError, match="byte_weight is set and the teacher told nothing"):
        loss(replace(readings, next_bytes=None), student, index)
    with pytest.raises(InputError, match="token_weight is set and the teacher told nothing"):
        loss(replace(readings, top_common=None), student, index)
    assert readings.next_bytes is not None
    with pytest.raises(InputError, match="told 1 positions"):
        loss(replace(readings, next_bytes=readings.next_bytes[:1]), student, index)
    unigram = table_of("unigram")
    assert next_byte_log_probs(torch.zeros(1, len(unigram)), unigram).shape == (1, 257)


@pytest.mark.parametrize(
    "settings",
    [
        {"mix": 1.5},
        {"byte_weight": -1.0},
        {"token_weight": math.inf},
        {"temperature": 0.0},
        {"tau": -1.0},
        {"top_k": 0},
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(settings))):
        MutualLossConfig(**settings)  # type: ignore[arg-type]


def test_readings_of_texts_are_those_of_their_batch() -> None:
    pairs = batch_of("byte_level", "unigram")
    config = MutualLossConfig(token_weight=0.3, top_k=5, drops_merged=True)
    loss = MutualLoss(config, table_of("byte_level"), table_of("unigram"))
    logits = logits_of("byte_level", 1)
    whole = loss.read(logits, ChunkIndex.of_batch(pairs, 0))
    parts = [loss.read(logits[row : row + 1], ChunkIndex.of_batch([pair], 0)) for row, pair in enumerate(pairs)]
    index, student = ChunkIndex.of_batch(pairs, 1), logits_of("unigram", 2)
    assert torch.equal(loss(ChunkReadings.joined(parts), student, index).loss, loss(whole, student, index).loss)
    sizes = [(len(one.log_likelihoods), 0 if one.next_bytes is None else len(one.next_bytes)) for one in parts]
    for one, part in zip(whole.of_texts(*zip(*sizes, strict=True)), parts, strict=True):
        assert one.top_common is not None and part.top_common is not None
        assert one.next_bytes is not None and part.next_bytes is not None
        assert one.merged is not None and part.merged is not None
        assert torch.equal(one.log_likelihoods, part.log_likelihoods) and torch.equal(one.merged, part.merged)
        assert torch.equal(one.next_bytes, part.next_bytes)
        assert torch.equal(one.top_common.places, part.top_common.places)
        assert torch.equal(one.top_common.log_probs, part.top_common.log_probs)
    bare = MutualLoss(only("chunk_weight"), table_of("byte_level"), table_of("unigram"))
    joined = ChunkReadings.joined([bare.read(logits, ChunkIndex.of_batch(pairs, 0))])
    assert joined.next_bytes is joined.top_common is joined.merged is None
