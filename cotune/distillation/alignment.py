"""Where two tokenizers agree in a text: shared boundaries, and the chunks between them.

With the byte spans of both tokenizers, two pointers over their ends find the boundaries
b_0 < b_1 < ... that both have; chunk k is the bytes (b_(k-1), b_k]. At a shared boundary both models have read the same
bytes of the text, so that what they expect next can be compared. No table of the two vocabularies is needed. Time:
tokens of both, plus bytes.

Not every chunk can be used, and an alignment says which:

- *exact*: in both, the tokens write the chunk's bytes. Else a normaliser changed the text, or a token is unknown.
- *predicted*: in both, a token stands in front of the chunk. The first token of a text without a begin token is
  predicted by nothing.
- *own start*: in both, the first token's first byte is the chunk's first byte. SentencePiece's space in front of a text
  is not.

What one side does not cover, because it was truncated, is in no chunk. Where it was truncated in front, the two
contexts differ; `starts` tells it. The end of the text is a chunk of no bytes, where both sides say it with a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.distillation.byte_spans import ByteSpans
from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class ChunkTokens:
    """One side's tokens of each chunk.

    Attributes:
        input_ids: int64 (tokens,), of the whole text.
        first_tokens, end_tokens: int64 (chunks,), the chunk is input_ids[first:end]. What is between two chunks writes
            nothing of the text.
    """

    input_ids: NDArray[np.int64]
    first_tokens: NDArray[np.int64]
    end_tokens: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """Chunks of one text, in its order.

    Attributes:
        num_bytes: of the text.
        starts: for each side, the byte where its tokens begin.
        chunk_starts, chunk_ends: int64 (chunks,), bytes.
        is_exact, is_predicted, has_own_start: bool (chunks,), on both sides; see the module's text.
        sides: the tokens of the first and of the second tokenizer.
    """

    num_bytes: int
    starts: tuple[int, int]
    chunk_starts: NDArray[np.int64]
    chunk_ends: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    is_predicted: NDArray[np.bool_]
    has_own_start: NDArray[np.bool_]
    sides: tuple[ChunkTokens, ChunkTokens]

    def __len__(self) -> int:
        return len(self.chunk_ends)

    @property
    def is_usable(self) -> NDArray[np.bool_]:
        """bool (chunks,): whose probabilities can be compared."""
        return self.is_exact & self.is_predicted

    @property
    def usable_share(self) -> float:
        """The share of the text's bytes that usable chunks have, 0 to 1; 1 for an empty text."""
        sizes = (self.chunk_ends - self.chunk_starts)[self.is_usable]
        return int(sizes.sum()) / self.num_bytes if self.num_bytes else 1.0

    def swapped(self) -> Alignment:
        """The same, seen from the other side."""
        return Alignment(
            num_bytes=self.num_bytes,
            starts=self.starts[::-1],
            chunk_starts=self.chunk_starts,
            chunk_ends=self.chunk_ends,
            is_exact=self.is_exact,
            is_predicted=self.is_predicted,
            has_own_start=self.has_own_start,
            sides=self.sides[::-1],
        )


def align(first: ByteSpans, second: ByteSpans, *, from_byte: int = 0) -> Alignment:
    """Align two tokenizations of one text.

    Args:
        from_byte: leave out chunks that begin before this byte, such as those of a prompt. A chunk across it, where one
            tokenizer has a token across it, is left out too.

    Raises:
        InputError: the two are of different texts, or `from_byte` is outside of the text.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from cotune.distillation.token_bytes import TokenBytes
        >>> def spans(*tokens):
        ...     tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="?",
        ...                                            continuing_subword_prefix=""))
        ...     return ByteSpans.of_text(tokenizer, "abcde", TokenBytes.of_tokenizer(tokenizer))
        >>> align(spans("ab", "c", "de"), spans("a", "bc", "de")).chunk_ends.tolist()
        [3, 5]
    """
    if first.num_bytes != second.num_bytes:
        raise InputError(
            f"the texts have {first.num_bytes} and {second.num_bytes} bytes, expected the same text on both sides"
        )
    if not 0 <= from_byte <= first.num_bytes:
        raise InputError(f"from_byte is {from_byte}, expected 0 to {first.num_bytes}, the bytes of the text")
    shared = _marks(first) & _marks(second)
    boundaries = np.flatnonzero(shared)
    boundaries = boundaries[boundaries >= from_byte]
    chunk_starts, chunk_ends = boundaries[:-1].astype(np.int64), boundaries[1:].astype(np.int64)
    one, other = _gather(first, chunk_starts, chunk_ends), _gather(second, chunk_starts, chunk_ends)
    if first.end_token is not None and second.end_token is not None:
        # The end is said right after the last byte, so that it is a chunk of no bytes.
        chunk_starts, chunk_ends = np.append(chunk_starts, first.num_bytes), np.append(chunk_ends, first.num_bytes)
        one, other = one.with_end(first.end_token), other.with_end(second.end_token)
    return Alignment(
        num_bytes=first.num_bytes,
        starts=(first.start, second.start),
        chunk_starts=chunk_starts,
        chunk_ends=chunk_ends,
        is_exact=one.is_exact & other.is_exact,
        is_predicted=(one.first_tokens > 0) & (other.first_tokens > 0),
        has_own_start=one.has_own_start & other.has_own_start,
        sides=(one.tokens(first), other.tokens(second)),
    )


def num_usable(alignments: Sequence[Alignment]) -> int:
    """Usable chunks of several texts."""
    return sum(int(one.is_usable.sum()) for one in alignments)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Side:
    """Of each chunk."""

    first_tokens: NDArray[np.int64]
    end_tokens: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    has_own_start: NDArray[np.bool_]

    def with_end(self, token: int) -> _Side:
        return _Side(
            first_tokens=np.append(self.first_tokens, token),
            end_tokens=np.append(self.end_tokens, token + 1),
            is_exact=np.append(self.is_exact, True),
            has_own_start=np.append(self.has_own_start, True),
        )

    def tokens(self, spans: ByteSpans) -> ChunkTokens:
        return ChunkTokens(input_ids=spans.input_ids, first_tokens=self.first_tokens, end_tokens=self.end_tokens)


def _marks(spans: ByteSpans) -> NDArray[np.bool_]:
    """bool (bytes + 1,): where spans begin or end."""
    marks = np.zeros(spans.num_bytes + 1, np.bool_)
    marks[spans.start] = True
    marks[spans.ends] = True
    return marks


def _gather(spans: ByteSpans, starts: NDArray[np.int64], ends: NDArray[np.int64]) -> _Side:
    """The spans of each chunk, which are whole ones."""
    by_byte = np.zeros(spans.num_bytes + 1, np.int64)
    by_byte[spans.ends] = np.arange(1, len(spans.ends) + 1)
    first, end = by_byte[starts], by_byte[ends]  # spans[first:end]; a start that no span ends at is the first one's
    num_changed = np.concatenate([[0], np.cumsum(~spans.is_exact)])
    return _Side(
        first_tokens=spans.first_tokens[first],
        end_tokens=spans.end_tokens[end - 1],
        is_exact=num_changed[end] == num_changed[first],
        has_own_start=spans.has_own_start[first],
    )
