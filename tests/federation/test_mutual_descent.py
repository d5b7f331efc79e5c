"""Steps on the texts and on readings: logits where they are wanted alone, losses that fall, memory counted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from co_tuning import KINDS, domain_texts, reader_of
from device_models import device_model
from torch.nn import functional as F
from transformers import PreTrainedModel

from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.mutual_loss import ChunkReadings, MutualLoss, MutualLossConfig
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.federation.local_model import LocalSteps
from cotune.federation.mutual_descent import SideBatch, batches_of, descend_on, held_bytes, read_chunks
from cotune.tuning.gradient import GradientState

PROXY, SMALL = reader_of("byte_level"), reader_of(KINDS["mamba2"])
STEPS = LocalSteps(num_steps=6, batch_size=3, learning_rate=1e-2)


def texts_of() -> list[PairedText]:
    return pair_texts(domain_texts("law"), PROXY, SMALL, max_tokens=64)


def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    return (
        device_model("llama", vocab_size=len(PROXY.table), seed=1),
        device_model("mamba2", vocab_size=len(SMALL.table), seed=2),
    )


@pytest.mark.parametrize("side", [0, 1])
def test_logits_of_the_wanted_positions_give_what_all_logits_give(side: int) -> None:
    texts, model = texts_of()[:3], models()[side]
    batch = SideBatch.of(texts, side, model.device)
    with torch.no_grad():
        few = batch.logits(model)
        whole = model(input_ids=batch.input_ids, use_cache=False).logits
    assert few.shape[0] == int(batch.wanted.sum()) < batch.input_ids.numel()
    labels = torch.full(batch.input_ids.shape, -100)
    for row, text in enumerate(texts):
        own = text.sides[side]
        labels[row, : len(own.input_ids) - 1] = torch.from_numpy(np.where(own.is_target, own.input_ids, -100)[1:])
    expected = F.cross_entropy(whole.reshape(-1, whole.shape[-1]), labels.reshape(-1))
    assert batch.answer_loss(few).item() == pytest.approx(expected.item(), rel=1e-4)
    loss = MutualLoss(MutualLossConfig(), PROXY.table, SMALL.table if side else PROXY.table)
    if side == 0:
        index = ChunkIndex.of_batch([text.alignment for text in texts], 0)
        read, again = loss.read(few[None], batch.index), loss.read(whole, index)
        assert torch.allclose(read.log_likelihoods, again.log_likelihoods, atol=1e-4)
        assert read.next_bytes is not None and again.next_bytes is not None
        assert torch.allclose(read.next_bytes.exp(), again.next_bytes.exp(), atol=1e-5)


@pytest.mark.parametrize(("teacher", "student"), [(0, 1), (1, 0)])
def test_both_ways_the_student_learns_from_readings(teacher: int, student: int) -> None:
    texts, both = texts_of(), models()
    tables = (PROXY.table, SMALL.table)
    config = MutualLossConfig(mix=1.0, gate=None)
    loss = MutualLoss(config, tables[teacher], tables[student])
    readings = read_chunks(both[teacher], texts, teacher, loss)
    model = both[student]
    state = GradientState.inside(model, dict(model.named_parameters()), weight_decay=0.0)

    def distance() -> float:
        with torch.no_grad():
            batch = SideBatch.of(texts, student, model.device)
            return float(loss(ChunkReadings.joined(readings), batch.logits(model)[None], batch.index).loss)

    before = distance()
    told = descend_on(
        model, state, texts, student, batches_of(texts, STEPS, seed=0), STEPS, loss=loss, readings=readings.__getitem__
    )
    assert distance() < 0.8 * before and math.isfinite(told)


@pytest.mark.parametrize("side", [0, 1])
def test_texts_that_are_read_together_are_read_as_alone(side: int) -> None:
    texts, tables = texts_of(), (PROXY.table, SMALL.table)
    config = MutualLossConfig(token_weight=0.5, top_k=4, drops_merged=True)
    loss, model = MutualLoss(config, tables[side], tables[1 - side]), models()[side]
    together = read_chunks(model, texts, side, loss)
    assert len({len(text.sides[side].input_ids) for text in texts}) > 1, "some are padded"
    for one, text in zip(together, texts, strict=True):
        (alone,) = read_chunks(model, [text], side, loss)
        assert torch.allclose(one.log_likelihoods, alone.log_likelihoods, atol=1e-4)
        assert one.next_bytes is not None and alone.next_bytes is not None
        assert torch.allclose(one.next_bytes.exp(), alone.next_bytes.exp(), atol=1e-5)
        assert one.top_common is not None and alone.top_common is not None
        assert torch.allclose(one.top_common.log_probs, alone.top_common.log_probs, atol=1e-4)
        assert one.merged is not None and alone.merged is not None and torch.equal(one.merged, alone.merged)


def test_without_a_loss_the_texts_alone_are_learnt() -> None:
    texts, (proxy, _) = texts_of(), models()
    state = GradientState.inside(proxy, dict(proxy.named_parameters()), weight_decay=0.0)
    batch = SideBatch.of(texts, 0, proxy.device)
    with torch.no_grad():
        before = batch.answer_loss(batch.logits(proxy)).item()
    descend_on(proxy, state, texts, 0, batches_of(texts, STEPS, seed=0), STEPS)
    with torch.no_grad():
        assert batch.answer_loss(batch.logits(proxy)).item() < before - 0.1


def test_every_text_has_its_turn_and_the_seed_decides() -> None:
    texts = texts_of()
    batches = batches_of(texts, STEPS, seed=3)
    assert len(batches) == 6 and all(len(one) == 3 for one in batches)
    assert sorted(batches[0] + batches[1]) == sorted(batches[2] + batches[3]) == list(range(6))
    assert batches == batches_of(texts, STEPS, seed=3) != batches_of(texts, STEPS, seed=4)


def test_what_is_held_is_weights_gradients_and_moments() -> None:
    model = torch.nn.Linear(3, 2, bias=False)  # 24 bytes
    leaf = torch.zeros(5, requires_grad=True)
    state = GradientState.start({"x": leaf}, weight_decay=0.0)
    assert held_bytes(model) == 24  # type: ignore[arg-type]
    assert held_bytes(model, state) == 24 + 2 * 20  # type: ignore[arg-type]
    state.descend((state.params["x"] - 1).square().sum(), max_grad_norm=1.0)
    assert held_bytes(model, state) == 24 + 2 * 20 + 2 * 20 + 4  # type: ignore[arg-type]
    inside = GradientState.inside(model, {"weight": model.weight.detach().clone()}, weight_decay=0.0)
    assert held_bytes(model, inside) == 48  # type: ignore[arg-type]
