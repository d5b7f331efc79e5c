"""What a forward-only method lowers: a number for each example of a batch, differentiable or not.

MeZO (Malladi et al., arXiv 2305.17333, section 3.3) needs values alone, so accuracy, F1 and Rouge-L can be tuned
directly. Every objective is a loss, lower is better; those that people maximise are taken as 1 - score:

    AnswerNats     -log p of the target tokens                              of a `TokenBatch`
    ChoiceNats     -log softmax over the label words' log p, at the label   of a `ChoiceBatch`
    ChoiceErrors   1 where another label word is likelier, else 0           of a `ChoiceBatch`
    TextErrors     1 - score of the greedy text, such as F1 or Rouge-L      of a `TextBatch`

The last three are in `cotune.tuning.choice_objectives` and `cotune.tuning.text_objectives`. A `Score` makes such an
objective for a model and its texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from cotune.data.batches import IGNORED_LABEL, EncodedExample, TokenBatch
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import answer_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BatchT_contra = TypeVar("BatchT_contra", contravariant=True)
ExampleT = TypeVar("ExampleT")
BatchT_co = TypeVar("BatchT_co", covariant=True)
ScoreBatchT = TypeVar("ScoreBatchT")


@dataclass(frozen=True, kw_only=True)
class ExampleLosses:
    """Losses of a batch.

    Attributes:
        sums: of each example, float64 (examples,).
        counts: how many terms each sum has: target tokens, or 1; float64 (examples,).
    """

    sums: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if not float(self.counts.sum()) > 0:
            raise InputError("no example of this batch has a target, expected at least one; look at the labels")

    @property
    def mean(self) -> float:
        """Over all terms of the batch."""
        return float(self.sums.sum() / self.counts.sum())

    def per_example(self) -> Tensor:
        """Each example's own mean, float64 (examples,); 0 for one without a term."""
        return self.sums / self.counts.clamp(min=1)


class Objective(Protocol[BatchT_contra]):
    """A loss that needs no gradient."""

    def __call__(self, model: PreTrainedModel, params: Mapping[str, Tensor], batch: BatchT_contra) -> ExampleLosses:
        """Losses of a batch.

        Args:
            model: as it is, or with an adapter attached.
            params: stand in for the model's parameters of these names.
            batch: of the kind that the objective reads.

        Raises:
            InputError: no example has a target.
        """
        ...


Collate = Callable[[Sequence[EncodedExample]], BatchT_co]
"""Makes one batch."""


class Score(Protocol[ScoreBatchT]):
    """What people maximise, by its name: 1 - score is the objective. Its `repr` tells it from any other."""

    @property
    def name(self) -> str:
        """For words."""
        ...

    def prepare(
        self, backbone: Backbone, examples: Sequence[EncodedExample]
    ) -> tuple[Objective[ScoreBatchT], Collate[ScoreBatchT]]:
        """The objective for these texts, and how they become its batches.

        Raises:
            InputError: the texts have no such score.
        """
        ...


class AnswerNats:
    """-log p of each target token, the loss of LoRA and adapters, see `cotune.tuning.answer_loss`."""

    def __call__(self, model: PreTrainedModel, params: Mapping[str, Tensor], batch: TokenBatch) -> ExampleLosses:
        nats = answer_nats(model, model.get_output_embeddings(), dict(params), batch).double()
        is_target = torch.from_numpy(batch.labels[:, 1:] != IGNORED_LABEL)
        rows = is_target.nonzero()[:, 0].to(nats.device)
        sums = torch.zeros(len(batch.labels), dtype=torch.float64, device=nats.device).index_add_(0, rows, nats)
        return ExampleLosses(sums=sums, counts=is_target.sum(1).to(sums))


class ExampleBatches(Generic[ExampleT, BatchT_co]):
    """Batches of any examples, in an order that depends on seed and epoch only.

    Args:
        examples: to draw from.
        num_batch_examples: the most in one batch.
        collate: makes a batch, such as `lambda examples: ChoiceBatch.of(examples, pad_token_id)`.
        seed: of the order.

    Raises:
        InputError: there is no example, or no room for one.
    """

    def __init__(
        self,
        examples: Sequence[ExampleT],
        num_batch_examples: int,
        collate: Callable[[Sequence[ExampleT]], BatchT_co],
        *,
        seed: int,
    ) -> None:
        if not examples:
            raise InputError("there are no examples, expected at least one")
        if num_batch_examples < 1:
            raise InputError(f"num_batch_examples is {num_batch_examples}, expected at least 1")
        self._examples, self._size, self._collate, self._seed = examples, num_batch_examples, collate, seed

    def __len__(self) -> int:
        return -(-len(self._examples) // self._size)

    def epoch(self, epoch: int) -> Iterator[BatchT_co]:
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._examples))
        for start in range(0, len(order), self._size):
            yield self._collate([self._examples[i] for i in order[start : start + self._size]])
