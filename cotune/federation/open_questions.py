"""Public questions that nobody has answered: the proxy answers them where it is, and others learn what it is sure of.

What devices know may be asked in public, say by a catalogue that names all products: then knowledge of one device can
reach the cloud's model, and other devices' small ones, which have none of its texts. With the shared adapter, and
without a private one, the proxy writes

    y    = the likeliest token, again and again
    p    = exp(the mean of log p over the tokens of y, its end too)

and y is learnt as an answer where p is at least `sure_above`; all other questions stay open. Each device asks its own
copy of the proxy and the server asks its own: questions travel once, and answers never.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from cotune.data.templates import Example
from cotune.distillation.paired_texts import Reader
from cotune.errors import InputError
from cotune.federation.greedy_texts import write_greedily
from cotune.federation.json_array import from_json_array, to_json_array
from cotune.federation.number_ranges import check_at_least

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUESTIONS = "public/questions"
MAX_QUESTION_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class Answering:
    """How questions are answered, and how much is learnt from them."""

    max_new_tokens: int = 16
    """Of an answer; a longer one is cut."""
    sure_above: float = 0.5
    """Mean probability of an answer's tokens from which on it is learnt; 0: all are."""
    share: float = 0.5
    """Of the public texts in a step, questions that the proxy answered, where it answered any."""
    per_round: int = 64
    """Questions that the proxy is asked in a round, drawn anew each time."""

    def __post_init__(self) -> None:
        check_at_least(1, max_new_tokens=self.max_new_tokens, per_round=self.per_round)
        for name in ("sure_above", "share"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 1")

    def chosen(self, questions: Sequence[str], *, seed: int) -> list[str]:
        """Those of one round, in their own order.

        Example:
            >>> Answering(per_round=2).chosen(["a?", "b?", "c?"], seed=0)
            ['b?', 'c?']
        """
        places = Random(seed).sample(range(len(questions)), min(self.per_round, len(questions)))
        return [questions[place] for place in sorted(places)]

    def part_of(self, num_texts: int, public: Sequence[object], answered: Sequence[object]) -> int:
        """How many of the public texts in a step are answered questions; all where there is nothing else.

        Example:
            >>> own = Answering(share=0.5)
            >>> own.part_of(4, ["a text"], ["an answer"]), own.part_of(4, [], ["an answer"]), own.part_of(4, [], [])
            (2, 4, 0)
        """
        if not answered:
            return 0
        return self.num_of(num_texts) if public else num_texts

    def num_of(self, num_texts: int) -> int:
        """How many of so many public texts are answered questions, beside others."""
        return round(self.share * num_texts)

    def answered(
        self, model: PreTrainedModel, reader: Reader, questions: Sequence[str], *, max_tokens: int
    ) -> list[Example]:
        """The questions that a model is sure of, with its answers.

        Args:
            model: loaded, with what answers attached.
            reader: its own.
            questions: prompts; one that leaves no room for an answer stays open.
            max_tokens: of question and answer.
        """
        room = max_tokens - self.max_new_tokens
        fitting = [one for one in questions if 0 < len(reader.tokenizer.encode(one).ids) <= room]
        written = write_greedily(model, reader, fitting, max_new_tokens=self.max_new_tokens)
        return [
            Example(question, one.text)
            for question, one in zip(fitting, written, strict=True)
            # Bytes that are no text could not be read again as the model wrote them.
            if one.text.strip() and "\ufffd" not in one.text and math.exp(one.log_likelihood) >= self.sure_above
        ]


def to_arrays(questions: Sequence[str]) -> dict[str, NDArray[Any]]:
    """As a task carries them, once; nothing where there are none.

    Raises:
        InputError: they are too long together.
    """
    if not questions:
        return {}
    return {QUESTIONS: to_json_array(list(questions), "the questions", max_bytes=MAX_QUESTION_BYTES)}


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[str]:
    """What `to_arrays` gave; none where there are none.

    Raises:
        InputError: they cannot be read.

    Example:
        >>> from_arrays(to_arrays(["What colour is the kettle?"]))
        ['What colour is the kettle?']
    """
    if QUESTIONS not in arrays:
        return []
    found = from_json_array(arrays[QUESTIONS], "the questions")
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found):
        raise InputError(f"the questions are {found!r:.80}, expected a list of texts; use one version of cotune")
    return found
