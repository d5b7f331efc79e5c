from __future__ import annotations

import numpy as np
import pytest
import torch
from byte_oracle import ByteOracle, longest_match
from hypothesis import given, settings
from tokenizer_kinds import HARD_TEXTS, spans_of, table_of

from cotune.distillation.alignment import align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.divergences import ReverseKl
from cotune.distillation.next_byte import next_byte_divergence, next_byte_log_probs, shared_events
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError

TABLE = TokenBytes((b"a", b"ab", b"b", None, None, b"\xe6\x97"), frozenset({4}))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_bytes_by_hand() -> None:
    """Probabilities .1 .2 .3 | pad .2 | end .15 | E6 .05: without padding, each over .8."""
    log_probs = next_byte_log_probs(torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.15, 0.05]]).log(), TABLE)
    expected = {97: 0.3 / 0.8, 98: 0.3 / 0.8, 256: 0.15 / 0.8, 0xE6: 0.05 / 0.8}
    assert log_probs.shape == (1, 257)
    for event in range(257):
        assert float(log_probs[0, event].exp()) == pytest.approx(expected.get(event, 0.0), rel=1e-5)
    other = TokenBytes((b"a", b"bc", b"x", None), frozenset({3}))
    assert shared_events(TABLE, other).tolist() == [97, 98, 256]
    # Over what both have: (.3, .3, .15) / .75 against (.2, .2, .1) / .5, which agree.
    theirs = next_byte_log_probs(torch.tensor([[0.2, 0.2, 0.5, 0.1]]).log(), other)
    assert float(next_byte_divergence(log_probs, theirs, shared_events(TABLE, other))) == pytest.approx(0, abs=1e-6)


def test_the_loss_is_the_definition() -> None:
    student_table = TokenBytes((b"b", b"\xe6", b"ba", b"aa", None), frozenset({4}))
    teacher, student = draw(4, 6), draw(4, 5, seed=1)
    events = shared_events(TABLE, student_table)
    sides = []
    for logits, table in ((teacher, TABLE), (student, student_table)):
        weights = np.exp(logits.numpy())
        sums = np.array([[row[table.first_events == event].sum() for event in events] for row in weights]) ** (1 / 3)
        sides.append(sums / sums.sum(1, keepdims=True))
    p, q = sides
    read = next_byte_log_probs(teacher, TABLE), next_byte_log_probs(student, student_table)
    forward = next_byte_divergence(*read, events, temperature=3.0)
    np.testing.assert_allclose(forward.numpy(), (p * np.log(p / q)).sum(1), rtol=1e-10)
    reverse = next_byte_divergence(*read, events, temperature=3.0, divergence=ReverseKl())
    np.testing.assert_allclose(reverse.numpy(), (q * np.log(q / p)).sum(1), rtol=1e-10)


def test_the_gradient_agrees_with_finite_differences() -> None:
    teacher, student = next_byte_log_probs(draw(2, 6), TABLE), draw(2, 6, seed=2).requires_grad_()
    events = shared_events(TABLE, TABLE)

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return next_byte_divergence(teacher, next_byte_log_probs(logits, TABLE), events, temperature=2.0)

    assert torch.autograd.gradcheck(loss, (student,))
    (gradient,) = torch.autograd.grad(loss(student).sum(), student)
    assert (gradient[:, [0, 1, 2, 4, 5]].abs() > 1e-4).all() and gradient[:, 3].tolist() == [0, 0]


@given(text=HARD_TEXTS)
@settings(max_examples=8, deadline=None)
def test_two_vocabularies_over_one_language_of_bytes_agree(text: str) -> None:
    """Byte-level BPE and Unigram with byte fallback as they were trained, over any text, at any temperature."""
    oracle = ByteOracle.drawn(3)
    sides = [spans_of("byte_level", text, has_end=True), spans_of("unigram", text, has_end=True)]
    pair = align(*sides)
    read = []
    for side, kind in enumerate(("byte_level", "unigram")):
        index = ChunkIndex.of_batch([pair], side)
        logits = oracle.logits(sides[side], table_of(kind), text)
        read.append(next_byte_log_probs(logits[0, index.positions], table_of(kind)))
    events = shared_events(table_of("byte_level"), table_of("unigram"))
    assert len(events) == 257
    own = torch.from_numpy(pair.has_own_start[pair.is_usable])
    for temperature in (1.0, 2.0):
        loss = next_byte_divergence(read[0][own], read[1][own], events, temperature=temperature)
        assert (loss.abs() < 1e-12).all()


def test_flattened_tokens_would_not_agree() -> None:
    """Why bytes are flattened and not tokens: above T = 1, a byte with more tokens would get more than its share."""
    oracle, text = ByteOracle.of_abc(), "abcabcc"
    sides = [longest_match("aa", "ab", "ac", "b", "c"), longest_match("a", "ba", "bb", "bc", "c")]
    as_bytes, as_tokens = [], []
    for tokenizer, table in sides:
        logits = oracle.token_logits(table, ord("c"))
        assert ByteSpans.of_text(tokenizer, text, table).is_exact.all()
        as_bytes.append(next_byte_log_probs(torch.from_numpy(logits)[None], table))
        as_tokens.append(next_byte_log_probs(torch.from_numpy(logits)[None] / 2, table))
    events = shared_events(sides[0][1], sides[1][1])
    assert float(next_byte_divergence(*as_bytes, events, temperature=2.0)) == pytest.approx(0, abs=1e-12)
    assert float(next_byte_divergence(*as_tokens, events)) > 0.02


def test_events_that_are_left_out() -> None:
    """Over a and the end: (.3, .15) / .45 against (.2, .2) / .4; where nothing is left, nothing is lost."""
    table = TokenBytes((b"a", b"b", None), frozenset({2}))
    teacher, student = (
        next_byte_log_probs(torch.tensor([shares] * 2, dtype=torch.float64).log(), table)
        for shares in ([0.3, 0.55, 0.15], [0.2, 0.6, 0.2])
    )
    merged = torch.zeros(2, 257, dtype=torch.bool)
    merged[0, ord("b")] = True
    merged[1] = True
    student.requires_grad_()
    loss = next_byte_divergence(teacher, student, shared_events(table, table), merged=merged)
    expected = 2 / 3 * np.log(2 / 3 / 0.5) + 1 / 3 * np.log(1 / 3 / 0.5)
    assert loss.tolist() == pytest.approx([expected, 0.0])
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert torch.isfinite(gradient).all() and gradient[0, ord("a")] < 0 and not gradient[1].any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"the logits are \(1, 3\), expected \(positions, 6\)"):
        next_byte_log_probs(torch.zeros(1, 3), TABLE)
    with pytest.raises(InputError, match="no first byte in common"):
        shared_events(TABLE, TokenBytes((b"z",), frozenset()))
    read = next_byte_log_probs(draw(1, 6), TABLE)
    with pytest.raises(InputError, match="temperature is 0"):
        next_byte_divergence(read, read, shared_events(TABLE, TABLE), temperature=0.0)
