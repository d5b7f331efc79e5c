from __future__ import annotations

import numpy as np
import pytest
import torch

from cotune.data.batches import IGNORED_LABEL, EncodedExample, TokenBatch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import TokenBatches, answer_nats
from cotune.tuning.objectives import AnswerNats, ExampleBatches, ExampleLosses


def test_means_by_hand() -> None:
    losses = ExampleLosses(sums=torch.tensor([6.0, 0.0, 2.0]), counts=torch.tensor([3.0, 0.0, 1.0]))
    assert losses.mean == 2.0
    assert losses.per_example().tolist() == [2.0, 0.0, 2.0]


def test_nats_of_each_example_are_those_of_its_own_tokens(backbone: Backbone, examples: list[EncodedExample]) -> None:
    model, params = backbone.model, dict(backbone.model.named_parameters())
    head = model.get_output_embeddings()
    (batch,) = TokenBatches(examples[:4], 4, pad_token_id=0, seed=0).epoch(0)
    with torch.no_grad():
        losses = AnswerNats()(model, params, batch)
        assert losses.mean == pytest.approx(float(answer_nats(model, head, params, batch).mean()), rel=1e-6)
        for row in range(4):
            one = TokenBatch(batch.input_ids[row, None], batch.attention_mask[row, None], batch.labels[row, None])
            nats = answer_nats(model, head, params, one)
            assert float(losses.sums[row]) == pytest.approx(float(nats.sum()), rel=1e-5)
            assert int(losses.counts[row]) == len(nats)


def test_labels_that_are_all_ignored_are_refused(backbone: Backbone, examples: list[EncodedExample]) -> None:
    (batch,) = TokenBatches(examples[:2], 2, pad_token_id=0, seed=0).epoch(0)
    ignored = TokenBatch(batch.input_ids, batch.attention_mask, np.full_like(batch.labels, IGNORED_LABEL))
    with pytest.raises(InputError, match="all labels of the batch are ignored"):
        AnswerNats()(backbone.model, dict(backbone.model.named_parameters()), ignored)


def test_batches_are_complete_and_reproducible() -> None:
    batches = ExampleBatches(range(7), 3, list, seed=1)
    epochs = [list(batches.epoch(epoch)) for epoch in (0, 0, 1)]
    assert len(batches) == 3 and [len(batch) for batch in epochs[0]] == [3, 3, 1]
    assert sorted(number for batch in epochs[0] for number in batch) == list(range(7))
    assert epochs[0] == epochs[1] != epochs[2]
    assert epochs[0] != list(ExampleBatches(range(7), 3, list, seed=2).epoch(0))
    with pytest.raises(InputError, match="no examples"):
        ExampleBatches([], 3, list, seed=1)
    with pytest.raises(InputError, match="num_batch_examples is 0"):
        ExampleBatches([1], 0, list, seed=1)
