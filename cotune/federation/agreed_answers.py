"""Answers by several models of one device, such as its own small one and the proxy: a product of experts.

Each writes its likeliest answer, and each says how likely all of these are. The one whose product of probabilities,

    argmax_y  prod_m p_m(y | prompt) ^ w_m,     y among what the models wrote,

is largest is given (a product of experts, Hinton 2002, doi 10.1162/089976602760128018, over a list of candidates, so
that tokenizers need not agree). A model that guesses writes nonsense that the other one finds unlikely; one that knows
writes what the other one can at least believe. Where a question tells who is likelier to know, as
`cotune.federation.own_domain` finds out, w says so; else all count alike. One model at a time is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from cotune.data.batches import encode_example, pad_batch, similar_lengths
from cotune.data.templates import Example
from cotune.distillation.paired_texts import without_excess
from cotune.errors import InputError
from cotune.federation.causal_model import CausalModel
from cotune.federation.greedy_texts import write_greedily
from cotune.tuning.answer_loss import answer_nats

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZE = 32
"""Texts that a model judges at once."""


class Writer(Protocol):
    """A model that answers, with what it has learnt."""

    @property
    def model(self) -> CausalModel:
        """What it was before: its tokenizer and its context."""

    def loaded(self) -> AbstractContextManager[PreTrainedModel]:
        """It, in memory inside of the block and no longer."""


@dataclass(frozen=True)
class AgreedAnswer:
    """An answer and what its writers think of it.

    Attributes:
        text: without the end; empty only where nobody wrote anything.
        by: who wrote it; the first one, where several did.
        log_likelihoods: nats of the text and its end, by writer, 0 or less; none where nobody wrote anything.
        weights: w, how much each writer counted.
        written: what each wrote.
    """

    text: str
    by: str
    log_likelihoods: Mapping[str, float]
    weights: Mapping[str, float]
    written: Mapping[str, str]


def answer_together(
    writers: Mapping[str, Writer],
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    max_tokens: int,
    weights: Sequence[Mapping[str, float]] | None = None,
    advance: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> list[AgreedAnswer]:
    """One answer to each prompt.

    Args:
        writers: by name, in the order in which they are loaded; one alone answers for itself.
        prompts: of any number; the start of one that leaves no room for an answer is cut.
        max_new_tokens: of an answer, at least 1.
        max_tokens: of prompt and answer, more than `max_new_tokens`; less where a model's context is smaller.
        weights: of each prompt, how much each writer counts, 0 or more; None: all alike.
        advance: told after each pass of a model: how many of how many, and what is done.

    Raises:
        InputError: there is no writer, an answer leaves no room for its prompt, or weights are not of these prompts
            and writers, below 0 or no numbers.

    Example:
        >>> together = {"small": TunedModel(small), "proxy": TunedModel(proxy, Path("together"))}  # doctest: +SKIP
        >>> answer_together(together, ["Where is the kettle?"], max_new_tokens=8, max_tokens=128)  # doctest: +SKIP
        [AgreedAnswer(text=' In the kitchen', by='small', log_likelihoods={'small': -0.4, 'proxy': -1.3},
                      weights={'small': 1.0, 'proxy': 1.0},
                      written={'small': ' In the kitchen', 'proxy': ' On the stove'})]
    """
    if not writers:
        raise InputError("there is no writer, expected at least one")
    for name, one in writers.items():
        if one.model.fitting(max_tokens) <= max_new_tokens + 1:
            raise InputError(
                f"max_new_tokens is {max_new_tokens} and {name} reads {one.model.fitting(max_tokens)} tokens, expected "
                "room for a prompt; ask for shorter answers"
            )
    names = list(writers)
    if weights is None:
        weights = [dict.fromkeys(names, 1.0)] * len(prompts)
    _check_weights(weights, names, len(prompts))
    if not prompts:
        return []
    cut = {name: _cut(one.model, prompts, max_new_tokens, max_tokens) for name, one in writers.items()}
    answers: dict[str, list[str]] = {}
    scores: dict[str, dict[tuple[int, str], float]] = {}

    def tell(what: str) -> None:
        advance(len(answers) + len(scores), 2 * len(names), what)

    def judge(name: str, model: PreTrainedModel) -> None:
        asked = sorted({(number, text) for own in answers.values() for number, text in enumerate(own) if text.strip()})
        texts = [Example(cut[name][number], text) for number, text in asked]
        values = _log_likelihoods(model, writers[name].model, texts, max_tokens)
        scores[name] = dict(zip(asked, values, strict=True))
        tell(f"{name} has judged")

    for name in names:
        with writers[name].loaded() as model:
            reader = writers[name].model.reader
            written = write_greedily(model, reader, cut[name], max_new_tokens=max_new_tokens)
            answers[name] = [one.text for one in written]
            tell(f"{name} has answered")
            if name == names[-1]:
                # All answers are there while it is.
                judge(name, model)
    for name in names[:-1]:
        with writers[name].loaded() as model:
            judge(name, model)
    return [_chosen(number, names, answers, scores, own) for number, own in enumerate(weights)]


def _check_weights(weights: Sequence[Mapping[str, float]], names: Sequence[str], num_prompts: int) -> None:
    if len(weights) != num_prompts:
        raise InputError(f"weights are of {len(weights)} prompts, expected {num_prompts}, one for each")
    for number, one in enumerate(weights):
        if set(one) != set(names) or not all(0 <= value < math.inf for value in one.values()):
            raise InputError(
                f"weights[{number}] is {dict(one)}, expected a number of 0 or more for each of {', '.join(names)}"
            )


def _cut(own: CausalModel, prompts: Sequence[str], max_new_tokens: int, max_tokens: int) -> list[str]:
    """The prompts, with room for an answer behind each."""
    room = own.fitting(max_tokens) - max_new_tokens
    return [without_excess(own.reader, Example(one, ""), room).prompt for one in prompts]


@torch.no_grad()
def _log_likelihoods(
    model: PreTrainedModel, own: CausalModel, texts: Sequence[Example], max_tokens: int
) -> list[float]:
    """Of each target and its end, behind the same tokens of the prompt, whatever the target."""
    reader, most = own.reader, own.fitting(max_tokens)
    encoded = [encode_example(reader.tokenizer, one, eos_token_id=reader.end_id, max_length=most) for one in texts]
    head, params = model.get_output_embeddings(), dict(model.named_parameters())
    found = [0.0] * len(texts)
    for numbers in similar_lengths([len(one.input_ids) for one in encoded], BATCH_SIZE, seed=0):
        rows = [encoded[number] for number in numbers]
        nats = answer_nats(model, head, params, pad_batch(rows, reader.end_id)).double()
        counts = [len(one.input_ids) - one.first_target for one in rows]
        for number, part in zip(numbers, torch.split(nats, counts), strict=True):
            found[number] = -float(part.sum())
    return found


def _chosen(
    number: int,
    names: Sequence[str],
    answers: Mapping[str, Sequence[str]],
    scores: Mapping[str, Mapping[tuple[int, str], float]],
    weights: Mapping[str, float],
) -> AgreedAnswer:
    # The first writer of a text keeps it.
    written = {name: answers[name][number] for name in names}
    said = {text: name for name, text in reversed(written.items()) if text.strip()}
    if not said:
        return AgreedAnswer("", names[0], {}, weights, written)
    found = {text: {name: scores[name][number, text] for name in names} for text in said}
    best = max(said, key=lambda text: sum(weights[name] * one for name, one in found[text].items()))
    return AgreedAnswer(best, said[best], found[best], weights, written)
