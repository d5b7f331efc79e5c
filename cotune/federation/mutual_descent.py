"""Steps of one model over texts that two models read: on the texts alone, or also on what the other one said of them.

    DST    CE of the answers
    SAML   (1 - a) CE + a (the gated terms of `cotune.distillation.mutual_loss`)

The other model is not here: what the loss needs of it was read before, see `cotune.federation.reading_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cotune.data.batches import similar_lengths
from cotune.distillation.chunk_index import ChunkIndex
from cotune.distillation.mutual_loss import ChunkReadings, MutualLoss
from cotune.distillation.paired_texts import PairedText
from cotune.federation.backbone_model import MAX_GRAD_NORM
from cotune.federation.local_model import LocalSteps
from cotune.tuning.answer_loss import only_rows
from cotune.tuning.gradient import GradientState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a teacher said of the text with this number.
Readings = Callable[[int], ChunkReadings]


@dataclass(frozen=True, eq=False)
class SideBatch:
    """One side of some texts, padded on the right.

    Attributes:
        input_ids: int64 (batch, seq), without each row's last token, which is predicted and never read.
        wanted: bool (batch, seq), the positions whose logits are needed.
        index: the chunks, in the logits of the wanted positions.
        target_places: int64 (targets,), which of the wanted positions predict a token of an answer.
        targets: int64 (targets,), these tokens.
    """

    input_ids: Tensor
    wanted: Tensor
    index: ChunkIndex
    target_places: Tensor
    targets: Tensor

    @classmethod
    def of(cls, texts: Sequence[PairedText], side: int, device: torch.device) -> SideBatch:
        """Of these texts."""
        own = [text.sides[side] for text in texts]
        width = max(len(one.input_ids) for one in own)
        # Padding is behind everything that is read, where no causal model sees it: any token will do.
        ids = torch.zeros(len(own), width, dtype=torch.int64)
        is_target = torch.zeros(len(own), width, dtype=torch.bool)
        for row, one in enumerate(own):
            ids[row, : len(one.input_ids)] = torch.from_numpy(one.input_ids)
            is_target[row, : len(one.input_ids)] = torch.from_numpy(one.is_target)
        index = ChunkIndex.of_batch([text.alignment for text in texts], side)
        predicts, before = is_target[:, 1:], ids[:, :-1]
        wanted = index.wanted((len(own), width - 1)) | predicts
        return cls(
            input_ids=before.to(device),
            wanted=wanted.to(device),
            index=index.among(wanted).to(device),
            target_places=predicts[wanted].nonzero()[:, 0].to(device),
            targets=ids[:, 1:][predicts].to(device),
        )

    def logits(self, model: PreTrainedModel) -> Tensor:
        """At the wanted positions, (wanted, vocab), in the model's number type."""
        with only_rows(model.get_output_embeddings(), self.wanted):
            logits: Tensor = model(input_ids=self.input_ids, use_cache=False).logits
        return logits

    def answer_loss(self, logits: Tensor) -> Tensor:
        """CE, the mean over the answers' tokens, nats."""
        return F.cross_entropy(logits[self.target_places].float(), self.targets)


def batches_of(texts: Sequence[PairedText], steps: LocalSteps, *, seed: int) -> list[list[int]]:
    """The texts of each step, by number: every text once, then again in another order."""
    # By bytes, which are the same on both sides.
    lengths = [text.alignment.num_bytes for text in texts]

    def endless() -> Iterator[list[int]]:
        epoch = 0
        while True:
            own = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
            yield from similar_lengths(lengths, min(steps.batch_size, len(texts)), own)
            epoch += 1

    return list(islice(endless(), steps.num_steps))


@torch.no_grad()
def read_chunks(
    model: PreTrainedModel, texts: Sequence[PairedText], side: int, loss: MutualLoss
) -> list[ChunkReadings]:
    """What a model says of each of these texts, as the loss needs it, in one pass.

    Rounding depends on which texts are read together; nothing else does.
    """
    batch = SideBatch.of(texts, side, model.device)
    starts = [text.alignment.has_own_start[text.alignment.is_usable] for text in texts]
    read = loss.read(batch.logits(model)[None], batch.index)
    return read.of_texts([len(own) for own in starts], [int(own.sum()) for own in starts])


def descend_on(
    model: PreTrainedModel,
    state: GradientState,
    texts: Sequence[PairedText],
    side: int,
    batches: Sequence[Sequence[int]],
    steps: LocalSteps,
    *,
    loss: MutualLoss | None = None,
    readings: Readings | None = None,
) -> float:
    """Take the steps; what learns is in `state` and part of the model.

    Args:
        model: loaded, with what is attached to it.
        state: leaves that the model computes with.
        texts: all of them.
        side: which of the two the model is.
        batches: from `batches_of`.
        steps: learning rate and optimiser.
        loss: of the other model's readings; None for the texts alone.
        readings: for texts by number; with a loss.

    Returns:
        Mean loss of the steps, nats.

    Raises:
        NonFiniteLossError: a loss is nan or inf.
    """
    take(state, steps)
    total = 0.0
    for numbers in batches:
        batch = SideBatch.of([texts[number] for number in numbers], side, model.device)
        logits = batch.logits(model)
        value = batch.answer_loss(logits)
        if loss is not None:
            assert readings is not None, "a loss needs readings"
            told = ChunkReadings.joined([readings(number) for number in numbers])
            value = loss.mixed(value, loss(told, logits[None], batch.index).loss)
        total += state.descend(value, max_grad_norm=MAX_GRAD_NORM)["loss"]
    return total / len(batches)


def take(state: GradientState, steps: LocalSteps) -> None:
    """Give a fresh state the optimiser and the learning rate of these steps."""
    if steps.optimizer == "sgd":
        state.optimizer = torch.optim.SGD(list(state.params.values()))
    state.learning_rate = steps.learning_rate


def held_bytes(model: PreTrainedModel, state: GradientState | None = None) -> int:
    """Of a model's weights and, where it trains, of what trains beside them, its gradients and its optimiser's state.

    Activations are not counted.
    """
    own = {id(one): one for one in [*model.parameters(), *model.buffers()]}
    kept: int = sum(one.nbytes for one in own.values())
    if state is None:
        return kept
    kept += sum(one.nbytes for one in state.params.values() if id(one) not in own)
    gradients = sum(one.nbytes for one in state.params.values())
    memories = sum(
        value.nbytes for one in state.optimizer.state.values() for value in one.values() if isinstance(value, Tensor)
    )
    return kept + gradients + memories
