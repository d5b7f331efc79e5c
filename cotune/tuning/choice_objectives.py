"""Objectives over label words: which answer of a few a model finds likeliest, for the forward-only methods.

    score_j = log p(choice_j | prompt) = sum over its tokens

`ChoiceNats` is the cross-entropy over these scores, as in MeZO's k-shot study (arXiv 2305.17333); `ChoiceErrors` is
1 - accuracy, which has no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.answer_loss import only_rows
from cotune.tuning.objectives import Collate, ExampleLosses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ChoiceExample:
    """A question with a few answers.

    Attributes:
        prompt_ids: int64 (prompt,), at least one.
        choices: token ids of each label word (the verbaliser) or answer, int64, at least one each.
        label: which of them is right.
    """

    prompt_ids: NDArray[np.int64]
    choices: tuple[NDArray[np.int64], ...]
    label: int

    def __post_init__(self) -> None:
        if not len(self.prompt_ids) or not self.choices or not all(len(choice) for choice in self.choices):
            raise InputError("a choice example has an empty prompt or choice, expected at least one token in each")
        if not 0 <= self.label < len(self.choices):
            raise InputError(f"label is {self.label}, expected 0 to {len(self.choices) - 1}, one of the choices")


@dataclass(frozen=True, kw_only=True)
class ChoiceBatch:
    """Choice examples laid out for one forward pass.

    A row is one text that must be read: the prompt and a choice without its last token. Choices of one token share it.

    Attributes:
        input_ids, attention_mask: int64 (rows, seq).
        wanted: positions that predict a choice's token, bool (rows, seq).
        terms: int64 (terms, 3): which wanted position, which token there, which choice of all it belongs to.
        num_tokens: of each choice, int64 (examples, choices); 0 where an example has fewer choices.
        labels: int64 (examples,).
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    wanted: NDArray[np.bool_]
    terms: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def of(cls, examples: Sequence[ChoiceExample], pad_token_id: int) -> ChoiceBatch:
        """Lay examples out.

        Raises:
            InputError: there is none.
        """
        if not examples:
            raise InputError("there are no examples, expected at least one")
        num_choices = max(len(example.choices) for example in examples)
        texts: dict[tuple[int, ...], int] = {}
        places: list[tuple[int, int, int, int]] = []  # row, position, token, choice
        num_tokens = np.zeros((len(examples), num_choices), np.int64)
        for i, example in enumerate(examples):
            for j, choice in enumerate(example.choices):
                text = (*example.prompt_ids.tolist(), *choice[:-1].tolist())
                row = texts.setdefault(text, len(texts))
                first = len(example.prompt_ids) - 1
                places += [(row, first + k, int(token), i * num_choices + j) for k, token in enumerate(choice)]
                num_tokens[i, j] = len(choice)
        shape = (len(texts), max(map(len, texts)))
        input_ids, attention_mask = np.full(shape, pad_token_id, np.int64), np.zeros(shape, np.int64)
        for row, text in enumerate(texts):
            input_ids[row, : len(text)] = text
            attention_mask[row, : len(text)] = 1
        wanted = np.zeros(shape, np.bool_)
        for row, position, _, _ in places:
            wanted[row, position] = True
        order = wanted.cumsum().reshape(shape) - 1
        terms = np.array([(order[row, position], token, choice) for row, position, token, choice in places], np.int64)
        labels = np.array([example.label for example in examples], np.int64)
        return cls(
            input_ids=input_ids,
            attention_mask=attention_mask,
            wanted=wanted,
            terms=terms,
            num_tokens=num_tokens,
            labels=labels,
        )


def choice_scores(
    model: PreTrainedModel, params: Mapping[str, Tensor], batch: ChoiceBatch, *, by_length: bool = False
) -> Tensor:
    """Log-likelihood of each choice, nats, float64 (examples, choices); -inf where an example has fewer.

    Args:
        model, params: as in `Objective`.
        batch: the choices.
        by_length: divide by the choice's number of tokens.
    """
    device = next(iter(params.values())).device
    position, token, choice = torch.from_numpy(batch.terms).to(device).unbind(1)
    inputs = {
        "input_ids": torch.from_numpy(batch.input_ids).to(device),
        "attention_mask": torch.from_numpy(batch.attention_mask).to(device),
        "use_cache": False,
    }
    with only_rows(model.get_output_embeddings(), torch.from_numpy(batch.wanted).to(device)):
        logits = functional_call(model, dict(params), kwargs=inputs).logits  # (positions, vocab)
    nats = (logits.float().logsumexp(-1)[position] - logits[position, token].float()).double()
    num_tokens = torch.from_numpy(batch.num_tokens).to(device)
    scores = torch.zeros(num_tokens.numel(), dtype=torch.float64, device=device).index_add_(0, choice, -nats)
    scores = scores.view(num_tokens.shape).masked_fill(num_tokens == 0, -torch.inf)
    return scores / num_tokens.clamp(min=1) if by_length else scores


@dataclass(frozen=True, kw_only=True)
class ChoiceNats:
    """Cross-entropy over label words: -log softmax_j(score_j) at the label."""

    by_length: bool = False
    """Divide a choice's log-likelihood by its number of tokens."""

    def __call__(self, model: PreTrainedModel, params: Mapping[str, Tensor], batch: ChoiceBatch) -> ExampleLosses:
        scores = choice_scores(model, params, batch, by_length=self.by_length)
        labels = torch.from_numpy(batch.labels).to(scores.device)
        sums = -scores.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        return ExampleLosses(sums=sums, counts=torch.ones_like(sums))


@dataclass(frozen=True, kw_only=True)
class ChoiceErrors:
    """1 - accuracy: 1 where the likeliest choice is not the label; the first of equals is taken."""

    by_length: bool = False
    """Divide a choice's log-likelihood by its number of tokens."""

    def __call__(self, model: PreTrainedModel, params: Mapping[str, Tensor], batch: ChoiceBatch) -> ExampleLosses:
        scores = choice_scores(model, params, batch, by_length=self.by_length)
        if not bool((scores.amax(1) < torch.inf).all()):  # nan is no answer, and no error that tuning could mend
            return ExampleLosses(sums=torch.full_like(scores[:, 0], torch.nan), counts=torch.ones_like(scores[:, 0]))
        sums = (scores.argmax(1) != torch.from_numpy(batch.labels).to(scores.device)).double()
        return ExampleLosses(sums=sums, counts=torch.ones_like(sums))


@dataclass(frozen=True, kw_only=True)
class LabelAccuracy:
    """The share of texts whose own label word is the likeliest, raised by `ChoiceErrors`.

    Attributes:
        words: the label words of the texts, in the order of their choices; for fingerprints.
    """

    words: tuple[str, ...]
    name: ClassVar[str] = "accuracy"

    def prepare(
        self, backbone: Backbone, examples: Sequence[EncodedExample]
    ) -> tuple[ChoiceErrors, Collate[ChoiceBatch]]:
        """1 - accuracy, of texts that `cotune.data.label_words.encode_labelled` made with the same words.

        Raises:
            InputError: a text has other choices.
        """
        for one in examples:
            if len(one.choices) != len(self.words):
                raise InputError(
                    f"a text has {len(one.choices)} choices, expected {len(self.words)}, one for each label word; "
                    "encode it with encode_labelled"
                )

        def collate(chosen: Sequence[EncodedExample]) -> ChoiceBatch:
            asked = [
                ChoiceExample(prompt_ids=one.input_ids[: one.first_target], choices=one.choices, label=one.label)
                for one in chosen
            ]
            return ChoiceBatch.of(asked, backbone.spec.pad_token_id)

        return ChoiceErrors(), collate
