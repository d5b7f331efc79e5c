"""One side of a comparison: a model, and what it has learnt; and how it learns.

A party with an adapter learns in its adapter, one without in all of its weights. That is all that there is to know of
it, so that the same few lines train and judge every model of every method.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cotune.data.templates import Example
from cotune.distillation.paired_texts import PairedText, pair_texts
from cotune.federation.arrays import Arrays
from cotune.federation.backbone_model import MAX_GRAD_NORM, to_arrays
from cotune.federation.causal_model import CausalModel
from cotune.federation.co_tuning_device import term_of
from cotune.federation.local_model import LocalSteps
from cotune.federation.mutual_descent import SideBatch, batches_of, held_bytes, take
from cotune.models.low_rank_terms import low_rank_terms
from cotune.tuning.gradient import GradientState

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The loss of a batch: its texts by number, the batch, and the logits of its targets, (targets, vocab).
BatchLoss = Callable[[Sequence[int], SideBatch, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Party:
    """A model and what it has learnt.

    Attributes:
        model: as it was given.
        weights: its parameters by name, where they learn; empty: as given.
        adapter: named as in peft; empty: none.
        scale: s of the adapter.
        frozen: an adapter beside it that does not learn; empty: none.
    """

    model: CausalModel
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: Arrays = field(default_factory=dict)
    scale: float = 1.0
    frozen: Arrays = field(default_factory=dict)

    @contextmanager
    def loaded(self) -> Iterator[PreTrainedModel]:
        """The model as it is now, frozen."""
        with self.model.loaded() as model:
            self._put_weights(model)
            terms = [term_of(_leaves(one, model)) for one in (self.adapter, self.frozen) if one]
            with low_rank_terms(model, terms, scale=self.scale):
                yield model

    @contextmanager
    def learning(self, steps: LocalSteps) -> Iterator[tuple[PreTrainedModel, GradientState]]:
        """The model with what learns in it, without moments yet."""
        with self.model.loaded() as model:
            self._put_weights(model)
            terms = [term_of(_leaves(self.frozen, model))] if self.frozen else []
            if self.adapter:
                state = GradientState.start(_leaves(self.adapter, model), weight_decay=0.0)
                terms.append(term_of(state.params))
            else:
                state = GradientState.inside(model, dict(model.named_parameters()), weight_decay=0.0)
            take(state, steps)
            with low_rank_terms(model, terms, scale=self.scale):
                yield model, state

    def after(self, state: GradientState) -> Party:
        """With what was learnt; inside of `learning`."""
        if self.adapter:
            return replace(self, adapter=to_arrays(state.params))
        return replace(self, weights={n: one.detach().to("cpu", copy=True) for n, one in state.params.items()})

    def read(self, examples: Sequence[Example], *, max_tokens: int) -> list[PairedText]:
        """Texts as this model reads them, on both sides.

        Raises:
            InputError: there are none, or one has no answer.
        """
        reader = self.model.reader
        return pair_texts(examples, reader, reader, max_tokens=self.model.fitting(max_tokens))

    def _put_weights(self, model: PreTrainedModel) -> None:
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.weights.items():
                parameters[name].copy_(value)


def teach(
    party: Party,
    texts: Sequence[PairedText],
    steps: LocalSteps,
    *,
    seed: int,
    side: int = 0,
    loss: BatchLoss | None = None,
    hold: Callable[[int], None] = lambda num_bytes: None,
) -> Party:
    """Let a party learn.

    Args:
        party: who.
        texts: what.
        steps: how.
        seed: of their order.
        side: which side of the texts is the party's.
        loss: of a batch; the cross-entropy of its answers if left out.
        hold: told what the model and its training hold, bytes.

    Raises:
        NonFiniteLossError: a loss is nan or inf.
    """
    with party.learning(steps) as (model, state):
        for numbers in batches_of(texts, steps, seed=seed):
            batch = SideBatch.of([texts[number] for number in numbers], side, model.device)
            logits = batch.logits(model)
            own = logits[batch.target_places]
            value = batch.answer_loss(logits) if loss is None else loss(numbers, batch, own)
            state.descend(value, max_grad_norm=MAX_GRAD_NORM)
        hold(held_bytes(model, state))
        return party.after(state)


@torch.no_grad()
def target_logits(model: PreTrainedModel, text: PairedText, side: int) -> tuple[Tensor, Tensor]:
    """What a model says at the positions that predict a text's answer, (targets, vocab), and these tokens."""
    batch = SideBatch.of([text], side, model.device)
    return batch.logits(model)[batch.target_places].float(), batch.targets


def _leaves(adapter: Arrays, model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(one)).to(model.device) for name, one in adapter.items()}
