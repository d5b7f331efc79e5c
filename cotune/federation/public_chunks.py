"""The second channel: how likely a small device finds the chunks of public texts, in one byte for each token.

A device without room for the proxy gets public texts once, with where the tokens of the server's answers lie. In each
round it tells, for each of these tokens, the likelihood of the chunk that ends with it, if its own tokens have a
boundary there too:

    code 0..253  the chunk since the last boundary has log-likelihood l = 1 - exp(STEP code), nats
    code 254     a boundary, but the chunk cannot be compared
    code 255     no boundary here

Steps are even in log(1 - l): half a step is 0.8 % of 1 - l. So 1,000 texts of 256 tokens are 256 kB, less than the
0.4 MB that float16 would take for the chunks alone, and no boundaries have to be sent beside them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotune.data.templates import Example
from cotune.distillation.alignment import Alignment, ChunkTokens, align
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.paired_texts import PairedText
from cotune.errors import InputError
from cotune.federation.json_array import from_json_array, to_json_array

MOST_NATS = 64.0
NO_NUMBER, NO_BOUNDARY = 254, 255
STEP = float(np.log1p(MOST_NATS)) / (NO_NUMBER - 1)
# What the two marks are decoded to; likelihoods are 0 or less.
NO_NUMBER_VALUE, NO_BOUNDARY_VALUE = 1.0, 2.0
TEXTS, SIZES, HEADS = "public/texts", "public/sizes", "public/heads"
MAX_PIECE_BYTES = 255


@dataclass(frozen=True, eq=False)
class PublicText:
    """A text that the server hands out.

    Attributes:
        text: prompt and target.
        start: the byte where the first of the marked tokens begins.
        sizes: int64 (marks,), bytes of each.
        has_end: whether the server's tokens say the end of the text.
    """

    text: str
    start: int
    sizes: NDArray[np.int64]
    has_end: bool

    @property
    def num_slots(self) -> int:
        """Numbers that a device tells of it."""
        return len(self.sizes) + self.has_end

    def example(self) -> Example:
        """As a text to learn from: what lies in front of the marks is the prompt."""
        whole = self.text.encode()
        return Example(whole[: self.start].decode(errors="ignore"), whole[self.start :].decode(errors="ignore"))

    @classmethod
    def of(cls, own: PairedText) -> PublicText:
        """Of a text that the server's model reads on both sides.

        Raises:
            InputError: a token of it has more bytes than one byte can tell.
        """
        chunks = own.alignment
        sizes = chunks.chunk_ends - chunks.chunk_starts
        has_end = bool(len(sizes)) and sizes[-1] == 0
        sizes = sizes[:-1] if has_end else sizes
        if (sizes > MAX_PIECE_BYTES).any():
            raise InputError(
                f"a public text has a token of {sizes.max()} bytes, expected at most {MAX_PIECE_BYTES}; leave it out"
            )
        start = int(chunks.chunk_starts[0]) if len(sizes) else own.alignment.num_bytes
        return cls(own.text, start, sizes, bool(has_end))

    def spans(self) -> ByteSpans:
        """The marks as if they were a tokenizer's, a token for each."""
        num = len(self.sizes)
        return ByteSpans(
            input_ids=np.arange(num + 2),
            num_bytes=len(self.text.encode()),
            start=self.start,
            ends=self.start + np.cumsum(self.sizes),
            first_tokens=np.arange(1, num + 1),
            end_tokens=np.arange(2, num + 2),
            is_exact=np.ones(num, np.bool_),
            has_own_start=np.ones(num, np.bool_),
            end_token=num + 1 if self.has_end else None,
        )

    def aligned(self, spans: ByteSpans) -> Alignment:
        """The marks beside a device's own tokens.

        Raises:
            InputError: the spans are of another text.
        """
        return align(self.spans(), spans)

    def codes(self, aligned: Alignment, log_likelihoods: NDArray[np.float32]) -> NDArray[np.uint8]:
        """What the device tells, uint8 (slots,).

        Args:
            aligned: from `aligned`.
            log_likelihoods: (usable chunks,), nats.
        """
        codes = np.full(self.num_slots, NO_BOUNDARY, np.uint8)
        slots = aligned.sides[0].end_tokens - 2
        codes[slots] = NO_NUMBER
        codes[slots[aligned.is_usable]] = to_codes(log_likelihoods)
        if len(aligned) and aligned.chunk_starts[0] > self.start:
            # What lies in front of the first boundary that both have is no chunk.
            codes[np.searchsorted(self.spans().ends, aligned.chunk_starts[0])] = NO_NUMBER
        return codes


def to_codes(log_likelihoods: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Of likelihoods, nats, 0 or less.

    Example:
        >>> to_codes(np.array([0.0, -1.0, -1e9], np.float32)).tolist()
        [0, 42, 253]
    """
    units = np.log1p(-np.minimum(log_likelihoods.astype(np.float64), 0.0)) / STEP
    return np.asarray(np.minimum(np.rint(units), NO_NUMBER - 1), np.uint8)


def from_codes(codes: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Likelihoods, nats, and above 0 the two marks.

    Example:
        >>> from_codes(np.array([0, 42, 254, 255], np.uint8)).round(2).tolist()
        [0.0, -1.0, 1.0, 2.0]
    """
    found = 1.0 - np.exp(STEP * codes.astype(np.float64))
    found[codes == NO_NUMBER], found[codes == NO_BOUNDARY] = NO_NUMBER_VALUE, NO_BOUNDARY_VALUE
    return found.astype(np.float32)


def to_arrays(texts: Sequence[PublicText]) -> dict[str, NDArray[Any]]:
    """As a task carries them, once.

    Raises:
        InputError: they are too long together.
    """
    return {
        TEXTS: to_json_array([one.text for one in texts], "the public texts"),
        SIZES: np.concatenate([np.zeros(0, np.uint8), *(one.sizes.astype(np.uint8) for one in texts)]),
        HEADS: np.array([[one.start, len(one.sizes), one.has_end] for one in texts], np.int64).reshape(-1, 3),
    }


def from_arrays(arrays: Mapping[str, NDArray[Any]]) -> list[PublicText]:
    """What `to_arrays` gave.

    Raises:
        InputError: they are missing, or do not belong together.
    """
    try:
        texts = from_json_array(arrays[TEXTS], "the public texts")
        heads, sizes = arrays[HEADS].astype(np.int64), arrays[SIZES].astype(np.int64)
        if not isinstance(texts, list) or len(texts) != len(heads) or int(heads[:, 1].sum()) != len(sizes):
            raise ValueError("their numbers differ")
        found, first = [], 0
        for text, (start, num, has_end) in zip(texts, heads.tolist(), strict=True):
            own = sizes[first : first + num]
            first += num
            if (
                not isinstance(text, str)
                or not 0 <= start <= start + own.sum() <= len(text.encode())
                or (own < 1).any()
            ):
                raise ValueError("a text is shorter than its marks")
            found.append(PublicText(text, start, own, bool(has_end)))
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise InputError(f"the public texts cannot be read ({error!s:.80}); use one version of cotune") from None
    return found


@dataclass(frozen=True, eq=False)
class Told:
    """What a device told of one text, as chunks of the server's tokens.

    Attributes:
        alignment: the same tokens on both sides.
        log_likelihoods: float32 (usable chunks,), nats.
    """

    alignment: Alignment
    log_likelihoods: NDArray[np.float32]


def told_of(own: PairedText, values: NDArray[np.float32]) -> Told:
    """Chunks and likelihoods from what a device told.

    Args:
        own: the text as the server's model reads it on both sides.
        values: float32 (slots,), from `from_codes`.
    """
    chunks, side = own.alignment, own.alignment.sides[0]
    lasts = np.flatnonzero(values < NO_BOUNDARY_VALUE)
    firsts = np.concatenate([[0], lasts[:-1] + 1]).astype(np.int64)[: len(lasts)]
    unusable = np.concatenate([[0], np.cumsum(~chunks.is_usable)])
    usable = (values[lasts] <= 0) & (unusable[lasts + 1] == unusable[firsts])
    tokens = ChunkTokens(
        input_ids=side.input_ids, first_tokens=side.first_tokens[firsts], end_tokens=side.end_tokens[lasts]
    )
    alignment = Alignment(
        num_bytes=chunks.num_bytes,
        starts=chunks.starts,
        chunk_starts=chunks.chunk_starts[firsts],
        chunk_ends=chunks.chunk_ends[lasts],
        is_exact=usable,
        is_predicted=usable,
        has_own_start=chunks.has_own_start[firsts],
        sides=(tokens, tokens),
    )
    return Told(alignment, values[lasts][usable])
