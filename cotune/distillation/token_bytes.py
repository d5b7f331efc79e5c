"""The bytes that each token of a vocabulary writes, so that models with different tokenizers can be compared.

A table for one tokenizer, made once from its `tokenizer.json` and never for a pair. What is known of a token:

    byte-level BPE            its characters are bytes, by the alphabet of GPT-2
    byte fallback             `<0xE2>` is the byte E2
    SentencePiece, metaspace  the mark, mostly U+2581, is a space
    WordPiece                 a token that continues no word begins with a space, as its decoder writes it
    anything else             its characters in UTF-8

Special tokens write nothing. Some of them end the text; the others (padding, begin, unknown) are no event of a text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cotune.errors import InputError

NUM_EVENTS = 257
"""What can come next in a text: one of 256 bytes, or its end."""

END_EVENT = 256
NO_EVENT = 257
"""The mark of tokens that say nothing of the text; no event of its own."""

_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of each token.

    Attributes:
        pieces: for each row of the model's output embedding, the bytes, or None where the token writes nothing.
        end_ids: tokens that end a text.
        always_prepends: whether a space stands in front of every text, also of one that begins with a space.

    Raises:
        InputError: an end token that is not in the vocabulary, or that writes something.
    """

    pieces: tuple[bytes | None, ...]
    end_ids: frozenset[int]
    always_prepends: bool = False

    def __post_init__(self) -> None:
        for token_id in self.end_ids:
            if not 0 <= token_id < len(self.pieces) or self.pieces[token_id] is not None:
                raise InputError(
                    f"end token {token_id} is not among the special tokens of this vocabulary of {len(self.pieces)}; "
                    "give the id of the token that ends a text, such as </s>"
                )

    @classmethod
    def of_tokenizer(
        cls, tokenizer: Tokenizer, *, end_ids: Sequence[int] = (), vocab_size: int | None = None
    ) -> TokenBytes:
        """From a fast tokenizer.

        Args:
            end_ids: tokens that end a text; they become special where the tokenizer does not say so.
            vocab_size: rows of the model's output embedding, which is often padded; None for the tokenizer's own size.

        Raises:
            InputError: the tokenizer has more tokens than the model, or an end token is not in the vocabulary.

        Example:
            >>> from tokenizers import Tokenizer, decoders, models
            >>> tokenizer = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1, "Ġa": 2, "Ã": 3}, merges=[("Ġ", "a")]))
            >>> tokenizer.decoder = decoders.ByteLevel()
            >>> TokenBytes.of_tokenizer(tokenizer).pieces
            (b' ', b'a', b' a', b'\\xc3')
        """
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        vocab_size = size if vocab_size is None else vocab_size
        if vocab_size < size:
            raise InputError(
                f"vocab_size is {vocab_size}, expected at least {size}, the tokens of the tokenizer; "
                "give the model's own tokenizer"
            )
        writing = _Writing.of(json.loads(tokenizer.to_str()))
        pieces: list[bytes | None] = [None] * vocab_size
        for token, token_id in vocab.items():
            pieces[token_id] = writing.bytes_of(token)
        for token_id, added in tokenizer.get_added_tokens_decoder().items():
            pieces[token_id] = None if added.special else added.content.encode()
        for token_id in end_ids:
            if 0 <= token_id < vocab_size:
                pieces[token_id] = None
        return cls(tuple(pieces), frozenset(end_ids), writing.always_prepends)

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def first_events(self) -> NDArray[np.int64]:
        """int64 (vocab,): the first byte of each token, 256 where it ends the text, 257 where it is no event."""
        events = np.full(len(self.pieces), NO_EVENT, np.int64)
        for token_id, piece in enumerate(self.pieces):
            if piece:
                events[token_id] = piece[0]
        events[sorted(self.end_ids)] = END_EVENT
        return events

    @cached_property
    def possible_events(self) -> NDArray[np.bool_]:
        """bool (257,): which events this vocabulary can bring about."""
        possible = np.zeros(NUM_EVENTS + 1, np.bool_)
        possible[self.first_events] = True
        return possible[:NUM_EVENTS]

    @cached_property
    def ids_by_bytes(self) -> dict[bytes, int]:
        """The token that writes these bytes; of several the last, as byte-fallback tokens stand in front."""
        return {piece: token_id for token_id, piece in enumerate(self.pieces) if piece}

    @cached_property
    def is_prefix(self) -> NDArray[np.bool_]:
        """bool (vocab,): whether a longer token of this vocabulary begins with this one.

        Sorted, all that begin with a string come right after it. Time: vocab log vocab.
        """
        result = np.zeros(len(self.pieces), np.bool_)
        ordered = sorted(self.ids_by_bytes)
        longer = {piece for piece, after in pairwise(ordered) if after.startswith(piece)}
        for token_id, piece in enumerate(self.pieces):
            result[token_id] = piece in longer
        return result


@dataclass(frozen=True, kw_only=True)
class _Writing:
    """How a tokenizer writes bytes as tokens."""

    is_byte_level: bool
    has_fallback: bool
    space_mark: str | None
    continuation: str | None
    splits_words: bool
    """Where nothing splits at spaces, a token that continues nothing begins with what it says."""
    word_end: str | None
    unknown: str | None
    always_prepends: bool

    @classmethod
    def of(cls, parts: Mapping[str, Any]) -> _Writing:
        """From `tokenizer.json`."""
        model = parts["model"]
        steps = [
            step
            for key, within in (
                ("decoder", "decoders"),
                ("pre_tokenizer", "pretokenizers"),
                ("normalizer", "normalizers"),
            )
            for step in _flat(parts.get(key), within)
        ]
        types = {step["type"] for step in steps}
        marks = [step["replacement"] for step in steps if step["type"] == "Metaspace"]
        for step in steps:
            if step["type"] == "Replace":
                pattern = step["pattern"].get("String")
                marks += [
                    mark for mark, space in ((pattern, step["content"]), (step["content"], pattern)) if space == " "
                ]
        unknown = model.get("unk_token")
        if model["type"] == "Unigram" and model.get("unk_id") is not None:
            unknown = model["vocab"][model["unk_id"]][0]
        return cls(
            is_byte_level="ByteLevel" in types,
            has_fallback=bool(model.get("byte_fallback")) or "ByteFallback" in types,
            space_mark=marks[0] if marks else None,
            continuation=model.get("continuing_subword_prefix") or None,
            splits_words=bool(parts.get("pre_tokenizer")),
            word_end=model.get("end_of_word_suffix") or None,
            unknown=unknown,
            always_prepends="Prepend" in types,
        )

    def bytes_of(self, token: str) -> bytes | None:
        if token == self.unknown:
            return None
        if self.is_byte_level:
            try:
                return bytes(_BYTE_LEVEL[character] for character in token)
            except KeyError:
                return None
        fallback = _FALLBACK.fullmatch(token) if self.has_fallback else None
        if fallback is not None:
            return bytes([int(fallback[1], 16)])
        if self.space_mark is not None:
            token = token.replace(self.space_mark, " ")
        if self.continuation is not None:
            if token.startswith(self.continuation):
                token = token.removeprefix(self.continuation)
            elif self.splits_words:
                token = " " + token
        if self.word_end is not None and token.endswith(self.word_end):
            token = token.removesuffix(self.word_end) + " "
        return token.encode(errors="replace")


def _flat(step: Mapping[str, Any] | None, within: str) -> Iterator[Mapping[str, Any]]:
    """A step, or the steps of a sequence."""
    if step is None:
        return
    if step["type"] == "Sequence":
        for one in step[within]:
            yield from _flat(one, within)
    else:
        yield step


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: printable characters of Latin-1 stand for themselves, the other bytes for those from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + rank): byte for rank, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()
