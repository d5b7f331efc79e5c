"""Where the tokens of a text lie in its UTF-8 bytes, and which of them really write these bytes.

The bytes of the tokens are laid along the text. As long as they are the text's own, each token has its exact span, also
inside of a character that several tokens share. Where they are not, the tokenizer's normaliser has changed the text
(lower case, NFKC, accents stripped), or left something out, or a token is unknown: the tokenizer's offsets, which count
characters of the original text, say where the changed place ends, and all tokens up to there become one span that is
marked as not exact. Nothing is guessed: such a span can stand in an alignment, but its probability is not that of the
text.

Beside the text stand tokens without a span: those that the tokenizer adds (begin, end), and the space that
SentencePiece puts in front of a text. Time: tokens plus bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError


@dataclass(frozen=True, kw_only=True, eq=False)
class ByteSpans:
    """The spans of a text, one after the other without gaps.

    Attributes:
        input_ids: int64 (tokens,), all of them.
        num_bytes: of the text.
        start: the byte where the first span begins; more than 0 where tokens were cut in front.
        ends: int64 (spans,), ascending: the byte behind each.
        first_tokens, end_tokens: int64 (spans,): its tokens are input_ids[first:end]. Tokens between two spans write
            nothing of the text.
        is_exact: bool (spans,): whether the tokens' bytes are those of the span, but for a space put in front.
        has_own_start: bool (spans,): whether the first byte of the first token is the first byte of the span.
        end_token: index of the token that ends the text, directly behind the last span; None where there is none or
            where the text goes on.
    """

    input_ids: NDArray[np.int64]
    num_bytes: int
    start: int
    ends: NDArray[np.int64]
    first_tokens: NDArray[np.int64]
    end_tokens: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    has_own_start: NDArray[np.bool_]
    end_token: int | None

    @property
    def end(self) -> int:
        """The byte behind the last span."""
        return int(self.ends[-1]) if len(self.ends) else self.start

    @classmethod
    def of_text(
        cls,
        tokenizer: Tokenizer,
        text: str,
        table: TokenBytes,
        *,
        end_id: int | None = None,
        max_tokens: int | None = None,
    ) -> ByteSpans:
        """Encode a text, with the special tokens that the tokenizer adds, and find its spans.

        Args:
            table: of this tokenizer.
            end_id: token to put behind the text, if there is room.
            max_tokens: keep that many tokens from the front; None for all.

        Raises:
            InputError: `max_tokens` is less than 1, or the table is of another tokenizer.

        Example:
            >>> from tokenizers import Tokenizer, decoders, models, pre_tokenizers
            >>> vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"hi": 256}
            >>> tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "i")]))
            >>> tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            >>> spans = ByteSpans.of_text(tokenizer, "hi é", TokenBytes.of_tokenizer(tokenizer))
            >>> spans.ends.tolist()
            [2, 3, 4, 5]
        """
        return cls.of_encoding(tokenizer.encode(text), text, table, end_id=end_id, max_tokens=max_tokens)

    @classmethod
    def of_encoding(
        cls,
        encoding: Encoding,
        text: str,
        table: TokenBytes,
        *,
        end_id: int | None = None,
        max_tokens: int | None = None,
    ) -> ByteSpans:
        """Of a text that was encoded, and perhaps truncated on either side. Padding is left out.

        Args:
            end_id, max_tokens: as for `of_text`.

        Raises:
            InputError: `max_tokens` is less than 1, a token is not in the table, or an offset is not in the text.
        """
        if max_tokens is not None and max_tokens < 1:
            raise InputError(f"max_tokens is {max_tokens}, expected at least 1")
        tokens = [
            (token_id, offset, bool(is_added))
            for token_id, offset, is_added, is_read in zip(
                encoding.ids, encoding.offsets, encoding.special_tokens_mask, encoding.attention_mask, strict=True
            )
            if is_read
        ]
        if encoding.overflowing or (max_tokens is not None and len(tokens) + (end_id is not None) > max_tokens):
            tokens, end_id = tokens[:max_tokens], None
        ids = [token_id for token_id, _, _ in tokens]
        if end_id is not None:
            ids.append(end_id)
        if max(ids, default=0) >= len(table):
            raise InputError(
                f"the text has token {max(ids)}, expected less than {len(table)}, the size of the table; "
                "make the table from the tokenizer that encodes"
            )
        farthest = max((end for _, (_, end), _ in tokens), default=0)
        if farthest > len(text):
            raise InputError(
                f"an offset is {farthest}, expected at most {len(text)}, the characters of the text; "
                "give the text that was encoded"
            )
        raw, byte_of = text.encode(), _byte_of_character(text)
        own = [(index, token_id, *offset) for index, (token_id, offset, is_added) in enumerate(tokens) if not is_added]
        faithful = _faithful_spans(own, raw, byte_of, table)
        if faithful is not None:
            return faithful.finished(ids, table)
        walk = _Walk(raw, always_prepends=table.always_prepends)
        for index, token_id, begin, end in own:
            walk.read(index, table.pieces[token_id], int(byte_of[begin]), int(byte_of[end]))
        return walk.spans().finished(ids, table)


@dataclass(frozen=True, eq=False)
class _Spans:
    """Spans before it is known what stands behind them."""

    num_bytes: int
    start: int
    ends: NDArray[np.int64]
    first_tokens: NDArray[np.int64]
    end_tokens: NDArray[np.int64]
    is_exact: NDArray[np.bool_]
    has_own_start: NDArray[np.bool_]

    def finished(self, ids: Sequence[int], table: TokenBytes) -> ByteSpans:
        after = int(self.end_tokens[-1]) if len(self.ends) else 0
        end = int(self.ends[-1]) if len(self.ends) else self.start
        ending = [index for index in range(after, len(ids)) if ids[index] in table.end_ids]
        return ByteSpans(
            input_ids=np.array(ids, np.int64),
            num_bytes=self.num_bytes,
            start=self.start,
            ends=self.ends,
            first_tokens=self.first_tokens,
            end_tokens=self.end_tokens,
            is_exact=self.is_exact,
            has_own_start=self.has_own_start,
            end_token=ending[0] if ending and end == self.num_bytes else None,
        )


def _byte_of_character(text: str) -> NDArray[np.int64]:
    """int64 (characters + 1,): where each character begins in UTF-8, and where the text ends."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points > 0x7F).astype(np.int64) + (points > 0x7FF) + (points > 0xFFFF)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _faithful_spans(
    tokens: Sequence[tuple[int, int, int, int]], raw: bytes, byte_of: NDArray[np.int64], table: TokenBytes
) -> _Spans | None:
    """The spans of a text that its tokens write byte by byte, as most do; None for any other. What `_Walk` finds too.

    Args:
        tokens: place, id, and the first and the last character of each token.
    """
    pieces = [table.pieces[token_id] for _, token_id, _, _ in tokens]
    if not all(pieces):
        return None
    written = b"".join(piece or b"" for piece in pieces)
    is_prefixed = written[:1] == b" " and (table.always_prepends or not raw.startswith(written))
    body = written[1:] if is_prefixed else written
    is_whole = body == raw and (is_prefixed or not table.always_prepends or not tokens)
    # Cut off behind, at the end of a word and where the tokenizer says so too; any other cut is left to the walk.
    is_front = (
        bool(tokens) and raw.startswith(body) and body[-1:].strip() != b"" and int(byte_of[tokens[-1][3]]) == len(body)
    )
    if not is_whole and (not is_front or table.always_prepends):
        return None
    ends = np.cumsum([len(piece or b"") for piece in pieces], dtype=np.int64) - is_prefixed
    places = np.array([place for place, _, _, _ in tokens], np.int64)
    own = np.ones(len(tokens), np.bool_)
    own[:1] = not is_prefixed
    has_width = ends > 0
    return _Spans(
        len(raw),
        0,
        ends[has_width],
        places[has_width],
        places[has_width] + 1,
        np.ones(int(has_width.sum()), np.bool_),
        own[has_width],
    )


class _Walk:
    """Reads tokens along a text."""

    def __init__(self, text: bytes, *, always_prepends: bool) -> None:
        self._text = text
        self._always_prepends = always_prepends
        self._start: int | None = None
        self._at = 0
        self._spans: list[_Span] = []
        # The first of the tokens that have not reached a byte of their own yet.
        self._waiting: int | None = None

    def read(self, index: int, piece: bytes | None, begin: int, end: int) -> None:
        """A token that stands for text[begin:end], as the tokenizer says."""
        is_first = self._start is None
        if is_first:
            self._start = self._at = begin if self._is_cut(piece, begin) else 0
        if piece is not None and self._waiting is None and not self._is_in_changed(begin):
            own, inner = (piece, True), (piece[1:], False)
            readings = [own]
            if is_first and piece[:1] == b" ":
                readings = [inner, own] if self._always_prepends else [own, inner]
            for written, has_own_start in readings:
                if self._matches(written, begin, end):
                    if written:
                        self._add(_Span(index, index + 1, self._at + len(written), True, has_own_start))
                    return
        self._read_changed(index, begin, end)

    def spans(self) -> _Spans:
        """All of them, once every token was read."""
        if self._waiting is not None and self._spans:
            # What they say is not in the text.
            last = self._spans[-1]
            self._spans[-1] = replace(last, end_token=self._waiting + 1, is_exact=False)
        return _Spans(
            len(self._text),
            self._start or 0,
            np.array([span.end for span in self._spans], np.int64),
            np.array([span.first_token for span in self._spans], np.int64),
            np.array([span.end_token for span in self._spans], np.int64),
            np.array([span.is_exact for span in self._spans], np.bool_),
            np.array([span.has_own_start for span in self._spans], np.bool_),
        )

    def _is_cut(self, piece: bytes | None, begin: int) -> bool:
        """Whether the text's front is missing, and not only spaces that offsets leave out or a normaliser drops."""
        return bool(self._text[:begin].strip()) or (
            begin > 0 and piece is not None and not self._text.startswith(piece[:1])
        )

    def _is_in_changed(self, begin: int) -> bool:
        """Whether the token belongs to a changed place that was read already."""
        return bool(self._spans) and not self._spans[-1].is_exact and begin < self._at

    def _matches(self, piece: bytes, begin: int, end: int) -> bool:
        """Whether the text goes on with the piece, here and where the tokenizer says. Offsets may leave out spaces."""
        if not self._text.startswith(piece, self._at):
            return False
        body = piece.strip()
        first = self._at + len(piece) - len(piece.lstrip())
        return not body or (begin <= first and first + len(body) <= end)

    def _read_changed(self, index: int, begin: int, end: int) -> None:
        if self._waiting is None and self._is_in_changed(begin):
            last = self._spans.pop()
            self._add(replace(last, end_token=index + 1, end=max(last.end, end)))
            return
        first = index if self._waiting is None else self._waiting
        self._waiting = None
        if end > self._at:
            self._add(_Span(first, index + 1, end, False, False))
        else:
            self._waiting = first

    def _add(self, span: _Span) -> None:
        self._spans.append(span)
        self._at = span.end


@dataclass(frozen=True)
class _Span:
    first_token: int
    end_token: int
    end: int
    is_exact: bool
    has_own_start: bool
