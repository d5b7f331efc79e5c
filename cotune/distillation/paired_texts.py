"""A text as two models read it: the same string on both sides, its chunks, and the tokens that are its answer.

Both tokenizers encode prompt and target as one string, so that their chunks lie on the same bytes; the prompt ends at
one byte, from which on there are chunks and targets. A token across that byte is a target of neither side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cotune.data.batches import fit_example
from cotune.data.templates import Example
from cotune.distillation.alignment import Alignment, align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError


@dataclass(frozen=True, eq=False)
class Reader:
    """How one model reads a text.

    Attributes:
        tokenizer: fast, without truncation or padding of its own.
        table: its tokens' bytes, as long as the rows of the model's output embedding.
        end_id: the token that ends a text.
    """

    tokenizer: Tokenizer
    table: TokenBytes
    end_id: int

    @classmethod
    def of_model(cls, tokenizer_json: bytes, *, end_id: int, vocab_size: int) -> Reader:
        """From a model's `tokenizer.json`.

        Args:
            end_id: of the model.
            vocab_size: rows of its output embedding.

        Raises:
            InputError: the tokenizer has more tokens than the model, or lacks the end token.
        """
        tokenizer = Tokenizer.from_str(tokenizer_json.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, TokenBytes.of_tokenizer(tokenizer, end_ids=[end_id], vocab_size=vocab_size), end_id)


@dataclass(frozen=True, eq=False)
class SideOfText:
    """One model's tokens of a text.

    Attributes:
        input_ids: int64 (tokens,).
        is_target: bool (tokens,), the answer and its end.
    """

    input_ids: NDArray[np.int64]
    is_target: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PairedText:
    """One text on both sides.

    Attributes:
        text: prompt and target, as far as both sides could take them.
        from_byte: where the target begins.
        sides: as the first and as the second model read it.
        alignment: its chunks behind the prompt, in the same order of sides.
    """

    text: str
    from_byte: int
    sides: tuple[SideOfText, SideOfText]
    alignment: Alignment

    def swapped(self) -> PairedText:
        """The same, seen from the other side."""
        return PairedText(self.text, self.from_byte, self.sides[::-1], self.alignment.swapped())


def pair_text(example: Example, first: Reader, second: Reader, *, max_tokens: int) -> PairedText:
    """Encode a text for both models.

    Too long a prompt loses the end of its document, as `fit_example` says, and then its start, the same on both sides;
    what is still too long loses the end of its target.

    Args:
        max_tokens: the most on either side, special ones included.

    Raises:
        InputError: `max_tokens` is less than 2, or one side has no target token.
    """
    if max_tokens < 2:
        raise InputError(
            f"max_tokens is {max_tokens}, expected at least 2: a token of the prompt and one of the target"
        )
    for reader in (first, second):
        example = without_excess(reader, fit_example(reader.tokenizer, example, max_length=max_tokens), max_tokens)
    text, from_byte = example.prompt + example.target, len(example.prompt.encode())
    spans = [
        ByteSpans.of_text(one.tokenizer, text, one.table, end_id=one.end_id, max_tokens=max_tokens)
        for one in (first, second)
    ]
    sides = (_side(spans[0], from_byte), _side(spans[1], from_byte))
    if not (sides[0].is_target.any() and sides[1].is_target.any()):
        raise InputError(
            f"a text of {len(text.encode())} bytes has no target token behind its prompt of {from_byte}; "
            "give it an answer, or leave it out"
        )
    return PairedText(text, from_byte, sides, align(*spans, from_byte=from_byte))


def pair_texts(examples: Sequence[Example], first: Reader, second: Reader, *, max_tokens: int) -> list[PairedText]:
    """`pair_text` of each.

    Raises:
        InputError: there are none, or one has no target; says which.
    """
    if not examples:
        raise InputError("there are no texts, expected at least one")
    found = []
    for index, example in enumerate(examples):
        try:
            found.append(pair_text(example, first, second, max_tokens=max_tokens))
        except InputError as error:
            raise InputError(f"text {index}: {error}") from None
    return found


def without_excess(reader: Reader, example: Example, max_tokens: int) -> Example:
    """Without the start of its prompt, where prompt, target and end have more than `max_tokens` tokens."""
    while True:
        encoding = reader.tokenizer.encode(example.prompt + example.target)
        excess = len(encoding.ids) + 1 - max_tokens
        if excess <= 0:
            return example
        own = [end for (_, end), added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not added]
        # Tokens at the cut may be others than before, so that one pass can be too little.
        cut = max(1, own[min(excess, len(own)) - 1])
        # A last word of the prompt stays: something has to predict the first target.
        kept = example.prompt[min(cut, max(0, len(example.prompt) - 1)) :]
        if kept == example.prompt:
            return example
        example = replace(example, prompt=kept, document=None)


def _side(spans: ByteSpans, from_byte: int) -> SideOfText:
    is_target = np.zeros(len(spans.input_ids), np.bool_)
    starts = np.concatenate([[spans.start], spans.ends[:-1]]) if len(spans.ends) else spans.ends
    for first, end in zip(spans.first_tokens[starts >= from_byte], spans.end_tokens[starts >= from_byte], strict=True):
        is_target[first:end] = True
    if spans.end_token is not None:
        is_target[spans.end_token] = True
    is_target[:1] = False  # nothing predicts it
    return SideOfText(spans.input_ids, is_target)
