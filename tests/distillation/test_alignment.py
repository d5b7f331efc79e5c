from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import HARD_TEXTS, spans_of, table_of, tokenizer_of
from tokenizers import Tokenizer, models

from cotune.distillation.alignment import Alignment, align, num_usable
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError

PAIRS = [("byte_level", "unigram"), ("unigram", "nfkc"), ("byte_level", "word_piece"), ("nfkc", "trimmed")]


def splits(text: str, *tokens: str) -> ByteSpans:
    """A tokenizer that cuts a text into these tokens."""
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(dict.fromkeys(tokens))}, unk_token="?"))
    tokenizer.model.continuing_subword_prefix = ""
    tokenizer.model.max_input_chars_per_word = 1000
    spans = ByteSpans.of_text(tokenizer, text, TokenBytes.of_tokenizer(tokenizer))
    assert spans.ends.tolist() == np.cumsum([len(token) for token in tokens]).tolist()
    return spans


def chunks(alignment: Alignment, text: str) -> list[str]:
    raw = text.encode()
    return [
        raw[start:end].decode(errors="backslashreplace")
        for start, end in zip(alignment.chunk_starts, alignment.chunk_ends, strict=True)
    ]


def test_shared_boundaries_by_hand() -> None:
    text = "abcdefg"
    alignment = align(splits(text, "ab", "c", "de", "fg"), splits(text, "a", "bc", "d", "ef", "g"))
    assert chunks(alignment, text) == ["abc", "defg"]
    one, other = alignment.sides
    assert (one.first_tokens.tolist(), one.end_tokens.tolist()) == ([0, 2], [2, 4])
    assert (other.first_tokens.tolist(), other.end_tokens.tolist()) == ([0, 2], [2, 5])
    assert alignment.is_predicted.tolist() == [False, True] and alignment.is_exact.all()
    assert alignment.usable_share == 4 / 7 and num_usable([alignment, alignment]) == 2
    # A prompt of four bytes: the chunk across its end is left out with those before it.
    assert len(align(splits(text, "ab", "c", "de", "fg"), splits(text, "a", "bc", "d", "ef", "g"), from_byte=4)) == 0
    assert chunks(align(splits(text, "abcd", "efg"), splits(text, "ab", "cd", "efg"), from_byte=4), text) == ["efg"]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@given(text=HARD_TEXTS, has_end=st.booleans(), cut=st.none() | st.integers(2, 12), prompt=st.integers(0, 6))
@settings(max_examples=30, deadline=None)
def test_chunks_are_what_both_sides_say(
    pair: tuple[str, str], text: str, has_end: bool, cut: int | None, prompt: int
) -> None:
    """Whatever the tokenizers, the text and the truncation of one side."""
    one, other = spans_of(pair[0], text, has_end=has_end), spans_of(pair[1], text, has_end=has_end, max_tokens=cut)
    raw, from_byte = text.encode(), len(text[:prompt].encode())
    alignment = align(one, other, from_byte=from_byte)
    expected = sorted(({one.start, *one.ends.tolist()}) & {other.start, *other.ends.tolist()})
    expected = [boundary for boundary in expected if boundary >= from_byte]
    is_ended = one.end_token is not None and other.end_token is not None
    assert alignment.chunk_starts.tolist() == expected[:-1] + [len(raw)] * is_ended
    assert alignment.chunk_ends.tolist() == expected[1:] + [len(raw)] * is_ended
    for side, kind, spans in zip(alignment.sides, pair, (one, other), strict=True):
        table = table_of(kind)
        for index in np.flatnonzero(alignment.is_exact):
            start, end = alignment.chunk_starts[index], alignment.chunk_ends[index]
            ids = spans.input_ids[side.first_tokens[index] : side.end_tokens[index]]
            written = b"".join(table.pieces[token_id] or b"" for token_id in ids)
            assert written == raw[start:end] or (not alignment.has_own_start[index] and written[1:] == raw[start:end])
            if alignment.has_own_start[index]:
                event = raw[start] if end > start else 256
                assert table.first_events[ids[0]] == event
    if "word_piece" not in pair and "nfkc" not in pair and cut is None:
        assert alignment.is_exact.all()
    if cut is not None and len(alignment):
        assert alignment.chunk_ends.max() <= other.end, "what one side does not cover is in no chunk"
    back = alignment.swapped()
    assert back.sides == alignment.sides[::-1] and np.array_equal(back.is_usable, alignment.is_usable)


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "nfkc", "word_piece"])
@given(text=HARD_TEXTS)
@settings(max_examples=15, deadline=None)
def test_a_tokenizer_agrees_with_itself_in_every_span(kind: str, text: str) -> None:
    spans = spans_of(kind, text)
    alignment = align(spans, spans)
    assert alignment.chunk_ends.tolist() == spans.ends.tolist()
    assert alignment.is_exact.tolist() == spans.is_exact.tolist()
    assert np.array_equal(alignment.sides[0].first_tokens, spans.first_tokens)


def test_a_begin_token_on_one_side() -> None:
    """Nothing predicts the first token of the side without one; nothing else is lost or shifted."""
    text = "the cat sat"
    with_begin = spans_of("unigram", text)
    without = ByteSpans.of_encoding(
        tokenizer_of("unigram").encode(text, add_special_tokens=False), text, table_of("unigram")
    )
    assert len(with_begin.input_ids) == len(without.input_ids) + 1
    alignment = align(with_begin, without)
    assert alignment.chunk_ends.tolist() == with_begin.ends.tolist()
    assert (alignment.sides[0].first_tokens - alignment.sides[1].first_tokens == 1).all()
    assert alignment.is_predicted[1:].all()
    assert alignment.is_predicted[0] == (without.first_tokens[0] > 0)
    bytes_side = spans_of("byte_level", text)
    assert not align(with_begin, bytes_side).is_predicted[0] and align(with_begin, bytes_side).is_predicted[1:].all()


def test_the_end_is_said_by_both_or_not_aligned() -> None:
    text = "the cat"
    ended, open_ended = spans_of("byte_level", text, has_end=True), spans_of("unigram", text)
    assert align(ended, open_ended).chunk_ends.tolist()[-1] == len(text)
    assert (align(ended, open_ended).chunk_ends > align(ended, open_ended).chunk_starts).all()
    both = align(ended, spans_of("unigram", text, has_end=True))
    assert both.chunk_starts[-1] == both.chunk_ends[-1] == len(text) and both.is_usable[-1] and both.has_own_start[-1]
    assert both.sides[0].input_ids[both.sides[0].first_tokens[-1]] == 0
    assert both.sides[1].input_ids[both.sides[1].first_tokens[-1]] == 2


def test_a_front_that_one_side_lost_is_told() -> None:
    text = "the cat sat on the mat"
    encoding = tokenizer_of("nfkc").encode(text, add_special_tokens=False)
    encoding.truncate(3, direction="left")
    late = ByteSpans.of_encoding(encoding, text, table_of("nfkc"))
    alignment = align(spans_of("byte_level", text), late)
    assert alignment.starts == (0, late.start) and late.start > 0
    assert alignment.chunk_starts[0] >= late.start and alignment.chunk_ends[-1] == len(text)


def test_changed_text_is_aligned_around_and_not_used() -> None:
    alignment = align(spans_of("byte_level", "the Cat sat"), spans_of("word_piece", "the Cat sat"))
    usable = dict(zip(chunks(alignment, "the Cat sat"), alignment.is_usable.tolist(), strict=True))
    assert usable == {"the": False, " Cat": False, " sat": True}  # the first is exact, but not predicted


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="expected the same text"):
        align(spans_of("unigram", "a"), spans_of("unigram", "ab"))
    with pytest.raises(InputError, match="from_byte is 9"):
        align(spans_of("unigram", "a"), spans_of("unigram", "a"), from_byte=9)
