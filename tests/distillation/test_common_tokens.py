from __future__ import annotations

import numpy as np
import pytest
import torch
from byte_oracle import ByteOracle, longest_match
from tokenizer_kinds import table_of

from cotune.distillation.common_tokens import CommonTokens, TopCommon
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError

FIRST = TokenBytes((b"the", b"a", b"there", b"x", None, b"q"), frozenset({4}))
SECOND = TokenBytes((b"x", b"the", b"a", b"yy", b"q", b"qu", None), frozenset({6}))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_same_bytes_and_the_same_event() -> None:
    """ "the" goes on in the first vocabulary only, "q" in the second only."""
    common = CommonTokens.of_tables(FIRST, SECOND)
    assert common.first_ids.tolist() == [1, 3] and common.second_ids.tolist() == [2, 0] and len(common) == 2
    back = common.swapped()
    assert back.first_ids.tolist() == [0, 2] and back.second_ids.tolist() == [3, 1]


def test_trained_vocabularies_in_both_directions() -> None:
    one, other = table_of("byte_level"), table_of("unigram")
    common, back = CommonTokens.of_tables(one, other), CommonTokens.of_tables(other, one)
    assert 20 < len(common) < 300
    for own, theirs in zip(common.first_ids.tolist(), common.second_ids.tolist(), strict=True):
        assert one.pieces[own] == other.pieces[theirs]
    assert torch.equal(common.swapped().first_ids, back.first_ids)
    assert torch.equal(common.swapped().second_ids, back.second_ids)


def test_the_loss_is_the_definition() -> None:
    teacher, student, common = draw(4, 6), draw(4, 7, seed=1), CommonTokens.of_tables(FIRST, SECOND)
    for top_k, temperature in ((1, 1.0), (1, 2.0), (2, 2.0), (9, 1.0)):
        top = TopCommon.of_logits(teacher, common, top_k=top_k, student_vocab=7)
        loss = top.divergence(student, common, temperature=temperature)
        p, q = (np.exp(side.numpy()) / np.exp(side.numpy()).sum(1, keepdims=True) for side in (teacher, student))
        for row in range(4):
            kept = sorted(range(2), key=lambda place: -p[row, common.first_ids[place]])[:top_k]
            events = []
            for shares, ids in ((p[row], common.first_ids), (q[row], common.second_ids)):
                listed = [shares[ids[place]] for place in kept]
                flat = np.array([*listed, 1 - sum(listed)]) ** (1 / temperature)
                events.append(flat / flat.sum())
            assert float(loss[row]) == pytest.approx(float((events[0] * np.log(events[0] / events[1])).sum()), rel=1e-9)


def test_the_gradient_agrees_with_finite_differences() -> None:
    common = CommonTokens.of_tables(FIRST, SECOND)
    top = TopCommon.of_logits(draw(2, 6), common, top_k=2, student_vocab=7)
    student = draw(2, 7, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: top.divergence(z, common, temperature=2.0), (student,))
    (gradient,) = torch.autograd.grad(top.divergence(student, common).sum(), student)
    assert (gradient.abs() > 1e-5).all()


def test_zero_for_itself_and_for_one_language_of_bytes() -> None:
    table, logits = table_of("unigram"), draw(3, len(table_of("unigram")))
    common = CommonTokens.of_tables(table, table)
    top = TopCommon.of_logits(logits, common, top_k=16, student_vocab=len(table))
    assert (top.divergence(logits, common, temperature=2.0).abs() < 1e-12).all()
    oracle = ByteOracle.of_abc()
    (_, one), (_, other) = longest_match("aa", "ab", "ac", "b", "c"), longest_match("a", "ba", "bb", "bc", "c")
    p, q = (torch.from_numpy(oracle.token_logits(side, ord("c")))[None] for side in (one, other))
    pair = CommonTokens.of_tables(one, other)
    assert [one.pieces[token] for token in pair.first_ids] == [b"c"]
    top = TopCommon.of_logits(p, pair, top_k=4, student_vocab=len(other))
    assert float(top.divergence(q, pair, temperature=2.0)) == pytest.approx(0, abs=1e-12)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InputError, match="no token in common"):
        CommonTokens.of_tables(FIRST, TokenBytes((b"zz",), frozenset()))
    common = CommonTokens.of_tables(FIRST, SECOND)
    with pytest.raises(InputError, match="top_k is 0"):
        TopCommon.of_logits(draw(1, 6), common, top_k=0, student_vocab=7)
    with pytest.raises(InputError, match="temperature is -1"):
        TopCommon.of_logits(draw(1, 6), common, top_k=1, student_vocab=7).divergence(
            draw(1, 7), common, temperature=-1.0
        )
