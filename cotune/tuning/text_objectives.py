"""Objectives over generated texts, such as F1 and Rouge-L: no gradient, and none is needed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from cotune.data.batches import EncodedExample
from cotune.errors import InputError
from cotune.models.backbone import Backbone
from cotune.tuning.continuations import continuations
from cotune.tuning.objectives import Collate, ExampleLosses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """Prompts and what should follow.

    Attributes:
        prompts: token ids, int64, at least one each.
        references: the texts that a generated one is compared with.
    """

    prompts: tuple[NDArray[np.int64], ...]
    references: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) != len(self.references):
            raise InputError(
                f"{len(self.prompts)} prompts met {len(self.references)} references, expected as many of each, and one"
            )
        if not all(len(prompt) for prompt in self.prompts):
            raise InputError("a prompt is empty, expected at least one token")


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """A score of generated texts, by its name.

    Attributes:
        name: for fingerprints and words.
        metric: of a text against its references, in [0, 1], higher is better.
    """

    name: str
    metric: Callable[[str, Sequence[str]], float] = field(repr=False)

    def prepare(self, backbone: Backbone, examples: Sequence[EncodedExample]) -> tuple[TextErrors, Collate[TextBatch]]:
        """1 - score, for texts as long as the longest answer of the examples, and their answers as references."""
        longest = max(len(one.input_ids) - one.first_target for one in examples)
        tokenizer = Tokenizer.from_str(backbone.tokenizer_json.decode())

        def decode(token_ids: Sequence[int]) -> str:
            text: str = tokenizer.decode(list(token_ids), skip_special_tokens=True)
            return text.strip()

        def collate(chosen: Sequence[EncodedExample]) -> TextBatch:
            return TextBatch(
                prompts=tuple(one.input_ids[: one.first_target] for one in chosen),
                references=tuple((decode(one.input_ids[one.first_target :].tolist()),) for one in chosen),
            )

        stop = backbone.spec.eos_token_ids
        errors = TextErrors(metric=self.metric, decode=decode, max_new_tokens=longest, stop_token_ids=stop)
        return errors, collate


@dataclass(frozen=True, kw_only=True)
class TextErrors:
    """1 - score of greedy texts: `cotune.evaluation.token_f1`, `rouge_l`, `exact_match` or any other in [0, 1].

    With a perturbed model each generated token sweeps over the tuned parameters again: prefer an adapter or a mask.
    """

    metric: Callable[[str, Sequence[str]], float]
    """Score of a text against its references."""
    decode: Callable[[Sequence[int]], str]
    """Token ids to text."""
    max_new_tokens: int
    """Longest text."""
    stop_token_ids: Collection[int] = ()
    """A text ends before any of them."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {self.max_new_tokens}, expected at least 1")

    def __call__(self, model: PreTrainedModel, params: Mapping[str, Tensor], batch: TextBatch) -> ExampleLosses:
        texts = greedy_texts(
            model, params, batch.prompts, max_new_tokens=self.max_new_tokens, stop_token_ids=self.stop_token_ids
        )
        pairs = zip(texts, batch.references, strict=True)
        errors = [1 - self.metric(self.decode(text), references) for text, references in pairs]
        sums = torch.tensor(errors, dtype=torch.float64)
        return ExampleLosses(sums=sums, counts=torch.ones_like(sums))


def greedy_texts(
    model: PreTrainedModel,
    params: Mapping[str, Tensor],
    prompts: Sequence[NDArray[np.int64]],
    *,
    max_new_tokens: int,
    stop_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """The likeliest next token again and again; as `continuations`, without the stop token."""
    texts = continuations(
        model,
        params,
        prompts,
        lambda logits: logits.argmax(-1),
        max_new_tokens=max_new_tokens,
        stop_token_ids=stop_token_ids,
    )
    return [text[:-1] if text[-1] in stop_token_ids else text for text in texts]
