from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import tiny_backbone

from cotune.data.batches import EncodedExample
from cotune.evaluation.allocations import count_allocations
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches, answer_nats, digest_examples


def test_batches_are_reproducible_and_complete(examples: list[EncodedExample]) -> None:
    batches = TokenBatches(examples, 4, pad_token_id=0, seed=1)
    first, again, next_epoch = (list(batches.epoch(epoch)) for epoch in (0, 0, 1))
    assert len(first) == len(batches) == 3
    assert all(np.array_equal(a.labels, b.labels) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a.labels, b.labels) for a, b in zip(first, next_epoch, strict=True))
    assert sum(len(batch.labels) for batch in first) == len(examples)


def test_nats_by_hand(backbone: Backbone, examples: list[EncodedExample]) -> None:
    (batch,) = TokenBatches(examples[:3], 3, pad_token_id=0, seed=0).epoch(0)
    model = backbone.model
    nats = answer_nats(model, model.get_output_embeddings(), dict(model.named_parameters()), batch)
    expected = []
    for row, labels in zip(batch.input_ids, batch.labels, strict=True):
        scores = backbone.forward_states(torch.from_numpy(row)[None]).logits[0].log_softmax(-1)
        expected += [-scores[t - 1, labels[t]] for t in range(1, len(row)) if labels[t] != -100]
    torch.testing.assert_close(nats, torch.stack(expected), rtol=1e-4, atol=1e-5)
    # The output embedding is as before.
    assert model(torch.from_numpy(batch.input_ids)).logits.shape[:2] == batch.input_ids.shape


def test_padding_costs_no_memory_of_its_own(examples: list[EncodedExample]) -> None:
    """With an attention mask, a matrix of seq x seq would be kept for each layer."""
    backbone = tiny_backbone("llama")
    model, params = backbone.model, dict(backbone.model.named_parameters())
    model.requires_grad_(True)
    rng = np.random.default_rng(0)
    texts = [EncodedExample(rng.integers(0, 400, length), length - 5) for length in (120, 120, 60)]

    def kept_bytes(pair: list[EncodedExample]) -> int:
        (batch,) = TokenBatches(pair, 2, pad_token_id=1, seed=0).epoch(0)
        return count_allocations(lambda: answer_nats(model, model.get_output_embeddings(), params, batch)).peak_bytes

    assert kept_bytes(texts[1:]) == pytest.approx(kept_bytes(texts[:2]), rel=0.001)


def test_the_digest_tells_examples_apart(examples: list[EncodedExample]) -> None:
    digests = {
        digest_examples(examples),
        digest_examples(examples[1:]),
        digest_examples(examples[:4], examples[4:]),
        digest_examples([EncodedExample(example.input_ids, 2) for example in examples]),
    }
    assert len(digests) == 4 and digest_examples(list(examples)) in digests
    assert digest_examples(examples) == digest_examples(list(examples))


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        TokenBatches([], 4, pad_token_id=0, seed=0)
