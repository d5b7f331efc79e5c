"""Targets by MinED and DTW, worked by hand on two tokenizers that differ in two places."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from byte_oracle import longest_match

from cotune.data.templates import Example
from cotune.distillation.mapped_targets import SparseTargets, TokenMap
from cotune.distillation.paired_texts import Reader, pair_text
from cotune.errors import InputError

# "<" begins, ">" ends a text, "?" is unknown: 0, 1 and 2.
TEACHER, STUDENT = longest_match("a", "bbbb", "xx", "yy", "ccccc"), longest_match("a", "bbb", "xxyy", "ccccc", "b")
A, BBBB, X, Y, C = 3, 4, 5, 6, 7
a, bbb, xy, c, b = 3, 4, 5, 6, 7
READERS = (Reader(*TEACHER, end_id=1), Reader(*STUDENT, end_id=1))
TEXT = pair_text(Example("a", "abbbbcccccxxyya"), *READERS, max_tokens=16)
# What lies beside the student's targets among the teacher's: a, bbb, b, c, xy, a and the end.
BESIDE = [[0], [1], [1], [2], [3, 4], [5], [6]]


@pytest.fixture(scope="module")
def mapped() -> TokenMap:
    return TokenMap(TEACHER[1], STUDENT[1])


def test_the_text_is_read_as_the_numbers_say(mapped: TokenMap) -> None:
    assert TEXT.sides[0].input_ids.tolist() == [0, A, A, BBBB, C, X, Y, A, 1]
    assert TEXT.sides[1].input_ids.tolist() == [0, a, a, bbb, b, c, xy, a, 1]
    assert mapped.nearest([0, 1, A, BBBB, C]).tolist() == [0, 1, a, bbb, c]
    assert mapped.warped(TEXT, teacher=0).beside == [[0], [1], [2], [3], [3], [4], [5, 6], [7], [8]]


def test_pooled_targets_are_means_over_what_lies_beside(mapped: TokenMap) -> None:
    one = mapped.warped(TEXT, teacher=0)
    logits = torch.arange(7 * 8, dtype=torch.float32).reshape(7, 8).sin() * 2
    targets, places = mapped.pooled([one], logits, temperature=2.0)
    p, to = (logits / 2.0).softmax(1), mapped.nearest.whole()
    assert places.tolist() == [0, 1, 2, 3, 4, 5, 6] and torch.allclose(targets.sum(1), torch.ones(7))
    for place, rows in enumerate(BESIDE):
        wanted = torch.zeros(8)
        for row in rows:
            for token_id in range(8):
                wanted[to[token_id]] += p[row, token_id] / len(rows)
        assert torch.allclose(targets[place], wanted, atol=1e-6)


def test_the_way_back_pools_what_was_split() -> None:
    back = TokenMap(STUDENT[1], TEACHER[1])
    one = back.warped(TEXT, teacher=1)
    assert one.beside[3] == [3, 4], "bbbb lies beside its two parts"
    logits = torch.zeros(7, 8)
    logits[1, bbb], logits[2, c] = 50.0, 50.0
    targets, places = back.pooled([one, one], torch.cat([logits, logits]), temperature=1.0)
    assert places.tolist() == list(range(14)) and torch.equal(targets[:7], targets[7:])
    # Half of each of the two positions, on the tokens that are nearest.
    assert back.nearest([bbb, c]).tolist() == [BBBB, C]
    assert targets[1, [BBBB, C]].tolist() == pytest.approx([0.5, 0.5])
    with pytest.raises(InputError, match="give the teacher's"):
        back.pooled([one], logits[:1], temperature=1.0)


def test_what_has_no_match_is_put_on_the_token_that_was_read_or_on_the_next(mapped: TokenMap) -> None:
    """The off-by-one of the published code, and its absence."""
    one = mapped.warped(TEXT, teacher=0)
    ids = np.tile(np.array([A, BBBB]), (7, 1))
    logits = np.array([[1, 2], [3, 0], [0.5, 0.5], [0, 4], [1, 1], [5, 0], [7, 0]], np.float32)
    for is_fixed in (False, True):
        found = mapped.matched(one, ids, logits, is_fixed=is_fixed)
        assert len(found) == 7 and np.allclose(found.probs.sum(1), 1)
        # After "a" both have read the same one token: what the teacher says there, with its tokens renamed.
        assert found.ids[0].tolist() == [a, bbb]
        assert np.allclose(found.probs[0], [1 / (1 + math.e), math.e / (1 + math.e)])
        assert np.allclose(found.probs[1], [math.e**3 / (1 + math.e**3), 1 / (1 + math.e**3)])
        # "bbb" is the nearest to the one token beside it, so that it counts as the same; "b", beside it too, is not.
        assert found.ids[2].tolist() == [a, bbb] and found.probs[2].tolist() == [0.5, 0.5]
        assert found.probs[3].tolist() == [1.0, 0.0] and found.ids[3, 0] == (c if is_fixed else b)
        assert np.allclose(found.probs[4], [1 / (1 + math.e**4), math.e**4 / (1 + math.e**4)])
        # Two tokens lie beside "xxyy", after which a comes.
        assert found.probs[5].tolist() == [1.0, 0.0] and found.ids[5, 0] == (a if is_fixed else xy)
        assert np.allclose(found.probs[6], [math.e**7 / (1 + math.e**7), 1 / (1 + math.e**7)])


def test_of_several_on_one_token_the_largest_counts(mapped: TokenMap) -> None:
    one = mapped.warped(TEXT, teacher=0)
    ids, logits = np.tile(np.array([C, C, A]), (7, 1)), np.tile(np.array([1.0, 3.0, 3.0], np.float32), (7, 1))
    found = mapped.matched(one, ids, logits, is_fixed=True)
    assert found.ids[0].tolist() == [c, a, 0] and np.allclose(found.probs[0], [0.5, 0.5, 0.0])


def test_cross_entropy_by_hand_and_its_gradient() -> None:
    targets = SparseTargets.of_logits(np.array([[0, 2]]), np.log(np.array([[1.0, 3.0]], np.float32)))
    both = SparseTargets.joined([targets, SparseTargets(np.array([[1]]), np.array([[1.0]], np.float32))])
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.5, 0.5, 0.5]], requires_grad=True)
    value = both.cross_entropy(logits)
    log_q = [[one - math.log(sum(map(math.exp, row))) for one in row] for row in ([0, 1, 2], [0.5] * 3)]
    assert value.item() == pytest.approx(-(0.25 * log_q[0][0] + 0.75 * log_q[0][2] + log_q[1][1]) / 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(value, logits)
    q = logits.detach().softmax(1)
    assert torch.allclose(gradient, (q - torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]])) / 2, atol=1e-6)
    with pytest.raises(InputError, match="1 rows of logits"):
        both.cross_entropy(logits[:1])
