from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cotune.distillation.top_log_probs import SMALLEST_REST, TopLogProbs, lumped_logits
from cotune.errors import InputError

LOGITS = torch.tensor([[1.0, 4.0, 2.0, 3.0], [0.0, -1.0, 5.0, 5.5]])


def test_the_likeliest_tokens_ascending_by_id() -> None:
    top = TopLogProbs.of_logits(LOGITS, 2)
    assert top.ids.tolist() == [[1, 3], [2, 3]] and (len(top), top.top_k) == (2, 2)
    expected = np.log(np.exp([4.0, 3.0]) / np.exp([1.0, 4.0, 2.0, 3.0]).sum())
    assert top.log_probs[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("top_k", [4, 5, 1000])
def test_all_tokens_where_there_are_no_more(top_k: int) -> None:
    top = TopLogProbs.of_logits(LOGITS, top_k)
    assert top.ids.tolist() == [[0, 1, 2, 3]] * 2
    assert torch.equal(top.log_probs, LOGITS.log_softmax(1))
    assert top.ids.stride(0) == 0  # no room for ids
    assert torch.equal(top.events(4), top.log_probs) and lumped_logits(LOGITS, top.ids) is LOGITS


def test_events_are_the_shares_and_the_rest() -> None:
    top = TopLogProbs(torch.tensor([[0, 2]]), torch.tensor([[math.log(0.5), math.log(0.2)]]))
    assert top.events(5).exp().tolist()[0] == pytest.approx([0.5, 0.2, 0.3], rel=1e-6)
    sure = TopLogProbs(torch.tensor([[0]]), torch.tensor([[1e-6]])).events(5)  # a little more than 1, by rounding
    assert sure.exp().tolist()[0] == pytest.approx([1.0, SMALLEST_REST], rel=1e-5)
    assert float(sure.exp().sum()) == pytest.approx(1.0, abs=1e-7)


def test_lumped_logits_have_the_shares_of_the_whole() -> None:
    ids = TopLogProbs.of_logits(LOGITS, 2).ids
    shares = LOGITS.softmax(1)
    lumped = lumped_logits(LOGITS, ids).softmax(1)
    torch.testing.assert_close(lumped[:, :2], shares.gather(1, ids))
    torch.testing.assert_close(lumped[:, 2], 1 - shares.gather(1, ids).sum(1))
    assert lumped_logits(LOGITS.half(), ids).dtype == torch.float32


def test_positions_of_several_texts() -> None:
    first, second = TopLogProbs.of_logits(LOGITS, 2), TopLogProbs.of_logits(LOGITS[:1] * 2, 2)
    joined = TopLogProbs.joined([first, second])
    assert len(joined) == 3 and torch.equal(joined.log_probs[2:], second.log_probs)
    with pytest.raises(InputError, match=r"\[2, 3\] tokens"):
        TopLogProbs.joined([first, TopLogProbs.of_logits(LOGITS, 3)])


def test_what_is_no_distribution_is_refused() -> None:
    good = TopLogProbs.of_logits(LOGITS, 2)
    good.check(num_positions=2, top_k=2, vocab_size=4)
    TopLogProbs.of_logits(LOGITS, 4).check(num_positions=2, top_k=9, vocab_size=4)
    with pytest.raises(InputError, match=r"expected \(3, 2\)"):
        good.check(num_positions=3, top_k=2, vocab_size=4)
    for ids in ([[3, 1], [2, 3]], [[1, 1], [2, 3]], [[1, 4], [2, 3]], [[-1, 3], [2, 3]]):
        with pytest.raises(InputError, match="ascending numbers from 0 to 3"):
            TopLogProbs(torch.tensor(ids), good.log_probs).check(num_positions=2, top_k=2, vocab_size=4)
    for value in (0.1, math.nan, math.inf):
        log_probs = good.log_probs.clone()
        log_probs[1, 0] = value
        with pytest.raises(InputError, match="expected at most 1"):
            TopLogProbs(good.ids, log_probs).check(num_positions=2, top_k=2, vocab_size=4)
    with pytest.raises(InputError, match="top_k is 0"):
        TopLogProbs.of_logits(LOGITS, 0)
