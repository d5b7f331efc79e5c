"""A proxy and device models of three families, with three tokenizers, learn from each other through one loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from device_models import device_model
from tokenizer_kinds import spans_of, table_of
from torch import Tensor
from transformers import PreTrainedModel

from cotune.distillation.alignment import align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.mutual_loss import MutualLoss, MutualLossConfig

TEXTS = ["the cat sat on the mat", "the dog did not", "日本 and 😀"]


def logits_of(model: PreTrainedModel, spans: list[ByteSpans]) -> Tensor:
    """Texts padded on the right."""
    width = max(len(one.input_ids) for one in spans)
    ids = torch.from_numpy(np.stack([np.pad(one.input_ids, (0, width - len(one.input_ids))) for one in spans]))
    mask = torch.tensor([[1] * len(one.input_ids) + [0] * (width - len(one.input_ids)) for one in spans])
    logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits


@pytest.mark.parametrize(("family", "kind"), [("llama", "nfkc"), ("gpt2", "byte_level"), ("mamba2", "unigram")])
def test_both_directions_come_nearer(family: str, kind: str) -> None:
    """The proxy has the byte-level tokenizer; the device's model another one, but for GPT-2's, which shares it."""
    config = MutualLossConfig(token_weight=0.5, gate=None)
    proxy_spans = [spans_of("byte_level", text, has_end=True) for text in TEXTS]
    spans = [spans_of(kind, text, has_end=True) for text in TEXTS]
    pairs = [align(one, other) for one, other in zip(proxy_spans, spans, strict=True)]
    index = [ChunkIndex.of_batch(pairs, side) for side in (0, 1)]
    assert len(index[0]) > 10
    tables = (table_of("byte_level"), table_of(kind))
    models = (device_model("llama", vocab_size=len(tables[0]), seed=1), device_model(family, vocab_size=len(tables[1])))
    for teacher, student in ((0, 1), (1, 0)):
        loss = MutualLoss(config, tables[teacher], tables[student])
        own_spans = (proxy_spans, spans)
        with torch.no_grad():
            told = 3 * logits_of(models[teacher], own_spans[teacher])
        readings = loss.read(told, index[teacher])
        optimiser, losses = torch.optim.AdamW(models[student].parameters(), lr=3e-3), []
        for _ in range(5):
            terms = loss(readings, logits_of(models[student], own_spans[student]), index[student])
            optimiser.zero_grad()
            terms.loss.backward()
            optimiser.step()
            losses.append(terms.loss.item())
        assert losses[-1] < 0.9 * losses[0], (teacher, losses)
        for name, parameter in models[student].named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
