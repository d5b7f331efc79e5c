from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tokenizer_kinds import spans_of, table_of

from cotune.distillation.alignment import align
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.chunk_likelihood import SMALLEST_REST, chunk_divergence, chunk_log_likelihoods
from cotune.errors import InputError


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_chunk_is_as_likely_as_its_tokens_together() -> None:
    texts = ["the cat 😀", "日本 dog"]
    pairs = [align(spans_of("unigram", text), spans_of("nfkc", text)) for text in texts]
    index = ChunkIndex.of_batch(pairs, 0)
    logits = draw(2, 32, len(table_of("unigram")))
    log_probs = logits.log_softmax(-1)
    expected = []
    for row, pair in enumerate(pairs):
        side = pair.sides[0]
        for chunk in np.flatnonzero(pair.is_usable):
            places = range(side.first_tokens[chunk], side.end_tokens[chunk])
            expected.append(sum(float(log_probs[row, place - 1, side.input_ids[place]]) for place in places))
    np.testing.assert_allclose(chunk_log_likelihoods(logits, index).numpy(), expected, rtol=1e-12)
    single = chunk_log_likelihoods(logits.float(), index)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5)


def test_all_chunks_together_are_the_cross_entropy() -> None:
    text = "the cat sat, the dog did not"
    spans = spans_of("unigram", text)
    index = ChunkIndex.of_batch([align(spans, spans)], 0)
    logits = draw(1, len(spans.input_ids), len(table_of("unigram")))
    first = int(spans.first_tokens[0])
    targets = torch.from_numpy(spans.input_ids)[first:]
    entropy = torch.nn.functional.cross_entropy(logits[0, first - 1 : -1], targets, reduction="sum")
    assert float(chunk_log_likelihoods(logits, index).sum()) == pytest.approx(-float(entropy), rel=1e-12)


def test_the_divergence_by_hand() -> None:
    """p = 1/2, q = 1/4 at tau 1; at tau 2 p = 1/2, q = 1/4 of likelihoods 1/4 and 1/16."""
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    for tau, p, q in ((1.0, 0.5, 0.25), (2.0, 0.25, 0.0625)):
        l_t, l_s = torch.tensor([p]).log(), torch.tensor([q]).log()
        assert float(chunk_divergence(l_t, l_s, tau=tau)) == pytest.approx(expected, rel=1e-6)
        assert float(chunk_divergence(l_s, l_s, tau=tau)) == 0.0


def test_sure_and_hopeless_chunks_stay_finite() -> None:
    l_t = torch.tensor([0.0, -1e-9, -400.0, 0.0, -400.0], requires_grad=True)
    l_s = torch.tensor([0.0, -3.0, -3.0, -400.0, 0.0], requires_grad=True)
    loss = chunk_divergence(l_t.detach(), l_s, tau=1.0)
    assert torch.isfinite(loss).all() and (loss >= -1e-6).all() and loss[0].item() == 0
    assert loss[4].item() == pytest.approx(-math.log(SMALLEST_REST), rel=1e-3)
    loss.sum().backward()
    assert l_s.grad is not None and torch.isfinite(l_s.grad).all()


def test_gradients_agree_with_finite_differences() -> None:
    l_t = -draw(6).abs() - 0.1
    l_s = (-draw(6, seed=1).abs() - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda own: chunk_divergence(l_t, own, tau=1.5), (l_s,))
    text = "the龘"
    index = ChunkIndex.of_batch([align(spans_of("unigram", text), spans_of("unigram", text))], 0)
    logits = draw(1, len(spans_of("unigram", text).input_ids), len(table_of("unigram"))).requires_grad_()
    (gradient,) = torch.autograd.grad(chunk_log_likelihoods(logits, index).sum(), logits)
    place, token = int(index.token_positions[0]), int(index.token_ids[0])
    for other, bump in ((token, 1e-6), (7, 1e-6)):
        moved = torch.zeros_like(logits)
        moved[0, place, other] = bump
        up, down = (chunk_log_likelihoods(logits + sign * moved, index).sum() for sign in (1, -1))
        assert float(gradient[0, place, other]) == pytest.approx((up - down).item() / 2e-6, abs=1e-8)
    assert gradient[0, place, token] > 0


def test_tau_is_positive() -> None:
    with pytest.raises(InputError, match="is 0"):
        chunk_divergence(torch.zeros(1), torch.zeros(1), tau=0.0)
