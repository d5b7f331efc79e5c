from __future__ import annotations

import dataclasses
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import END, HARD_TEXTS, spans_of, table_of, tokenizer_of
from tokenizers import Regex, Tokenizer, models, normalizers

from cotune.distillation import byte_spans
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.token_bytes import TokenBytes
from cotune.errors import InputError

KINDS = ["byte_level", "trimmed", "unigram", "nfkc", "word_piece"]


def starts_of(spans: ByteSpans) -> list[int]:
    return [spans.start, *spans.ends.tolist()][: len(spans.ends)]


def pieces(spans: ByteSpans, text: str) -> list[tuple[str, bool]]:
    raw = text.encode()
    starts = starts_of(spans)
    return [
        (raw[start:end].decode(errors="backslashreplace"), bool(exact))
        for start, end, exact in zip(starts, spans.ends, spans.is_exact, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(text=HARD_TEXTS)
@settings(max_examples=30, deadline=None)
def test_exact_spans_are_written_by_their_tokens_and_the_rest_is_said(kind: str, text: str) -> None:
    spans, table, raw = spans_of(kind, text), table_of(kind), text.encode()
    starts = starts_of(spans)
    assert spans.start == 0 or not raw[: spans.start].strip() or kind == "word_piece"
    assert all(end > start for start, end in zip(starts, spans.ends, strict=True)), "spans go forward"
    assert (spans.end_tokens > spans.first_tokens).all() and (spans.first_tokens[1:] >= spans.end_tokens[:-1]).all()
    for index, (start, end) in enumerate(zip(starts, spans.ends, strict=True)):
        ids = spans.input_ids[spans.first_tokens[index] : spans.end_tokens[index]]
        written = b"".join(table.pieces[token_id] or b"" for token_id in ids)
        if spans.is_exact[index]:
            assert written == (b"" if spans.has_own_start[index] else b" ") + raw[start:end]
        else:
            assert written != raw[start:end]
    if kind in ("byte_level", "trimmed", "unigram"):  # nothing is lost by these
        assert spans.is_exact.all() and spans.end == len(raw)
    if kind == "nfkc" and unicodedata.normalize("NFKC", text) == text:
        assert spans.is_exact.all() and spans.end == len(raw)


@pytest.mark.parametrize("kind", ["byte_level", "trimmed", "unigram", "nfkc"])
@given(text=HARD_TEXTS, cut=st.none() | st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_the_short_way_for_faithful_texts_finds_what_the_walk_finds(kind: str, text: str, cut: int | None) -> None:
    quick = spans_of(kind, text.strip(), max_tokens=cut)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_spans, "_faithful_spans", lambda *_: None)
        walked = spans_of(kind, text.strip(), max_tokens=cut)
    for field in dataclasses.fields(ByteSpans):
        assert np.array_equal(getattr(quick, field.name), getattr(walked, field.name)), field.name


def test_the_short_way_is_taken() -> None:
    raw = b"the cat"
    assert byte_spans._faithful_spans([], raw, np.arange(8), table_of("unigram")) is None
    encoding = tokenizer_of("unigram").encode("the cat", add_special_tokens=False)
    own = [(index, one, *encoding.offsets[index]) for index, one in enumerate(encoding.ids)]
    assert byte_spans._faithful_spans(own, raw, np.arange(8), table_of("unigram")) is not None
    assert byte_spans._faithful_spans(own[:1], raw, np.arange(8), table_of("unigram")) is not None


def test_characters_over_several_tokens() -> None:
    assert pieces(spans_of("byte_level", "a🤖龘"), "a🤖龘") == [
        (one, True) for one in ("a", r"\xf0\x9f", r"\xa4", r"\x96", r"\xe9", r"\xbe", r"\x98")
    ]
    assert [one for one, _ in pieces(spans_of("unigram", "z龘"), "z龘")] == ["z", r"\xe9", r"\xbe", r"\x98"]


def test_normalisers_that_lose() -> None:
    wide = "one ﬁ \uff26"
    assert pieces(spans_of("nfkc", wide), wide)[-3:] == [("ﬁ", False), (" ", True), ("\uff26", False)]
    # All four letters of one character: there is no boundary between them.
    spans = spans_of("nfkc", "aⅷb")
    assert pieces(spans, "aⅷb") == [("a", True), ("ⅷ", False), ("b", True)]
    assert spans.end_tokens[1] - spans.first_tokens[1] >= 1
    assert pieces(spans_of("word_piece", "the Naïve cat"), "the Naïve cat") == [
        ("the", True), (" Naïve", False), (" cat", True),
    ]  # fmt: skip
    # A word with nothing but a space in front of it is known, a comma that has none is not.
    assert pieces(spans_of("word_piece", "cat, the\ncat"), "cat, the\ncat") == [
        ("cat", True), (",", False), (" the", True), ("\ncat", False),
    ]  # fmt: skip


def test_a_space_in_front_of_the_text_is_not_of_the_text() -> None:
    for kind in ("nfkc", "word_piece", "unigram"):
        spans = spans_of(kind, "the cat")
        assert spans.is_exact.all() and spans.has_own_start[1:].all()
    assert not spans_of("nfkc", "the").has_own_start[0]
    # Llama's normaliser puts one before a space too: the second one is of the text.
    spans = spans_of("nfkc", " the")
    assert spans.is_exact.all() and spans.end == 4
    # As a token of its own it has no span.
    alone = spans_of("unigram", "zoo")
    assert alone.first_tokens[0] == 2 and alone.has_own_start[0]


def test_begin_end_and_unknown() -> None:
    spans = spans_of("unigram", "cat", has_end=True)
    assert spans.input_ids[0] == 1 and spans.first_tokens[0] >= 1 and spans.end_token == len(spans.input_ids) - 1
    assert spans_of("unigram", "cat").end_token is None
    unknown = spans_of("word_piece", "the Ω cat")
    assert pieces(unknown, "the Ω cat") == [("the", True), (" Ω", False), (" cat", True)]
    # A special token that somebody wrote into the text is not what the text says.
    assert pieces(spans_of("byte_level", "a<|end|>a"), "a<|end|>a") == [("a", True), ("<|end|>", False), ("a", True)]


def test_truncated_behind_there_is_no_end() -> None:
    text = "the cat 😀 sat"
    whole = spans_of("byte_level", text, has_end=True)
    cut = spans_of("byte_level", text, has_end=True, max_tokens=5)
    assert cut.input_ids.tolist() == whole.input_ids[:5].tolist() and cut.ends.tolist() == whole.ends[:5].tolist()
    assert cut.end_token is None and cut.num_bytes == whole.num_bytes
    full = spans_of("byte_level", text, has_end=True, max_tokens=len(whole.input_ids))
    assert full.end_token == len(whole.input_ids) - 1


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "nfkc"])
def test_truncated_in_front_the_spans_begin_later(kind: str) -> None:
    text = "the cat sat on the mat"
    encoding = tokenizer_of(kind).encode(text, add_special_tokens=False)
    encoding.truncate(4, direction="left")
    spans = ByteSpans.of_encoding(encoding, text, table_of(kind))
    assert spans.start > 0 and spans.end == len(text) and spans.is_exact.all() and spans.has_own_start.all()
    assert spans.ends.tolist() == spans_of(kind, text).ends[-4:].tolist()


def test_a_normaliser_that_drops_characters() -> None:
    tokenizer = Tokenizer(models.WordPiece({"ab": 0, "?": 1, "##c": 2}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace("-", "")
    spans = ByteSpans.of_text(tokenizer, "a-bc", TokenBytes.of_tokenizer(tokenizer))
    assert pieces(spans, "a-bc") == [("a-b", False), ("c", True)]
    # What is dropped behind the last token is not covered, so that no end follows.
    behind = ByteSpans.of_text(tokenizer, "abc-", TokenBytes.of_tokenizer(tokenizer))
    assert behind.end == 3 and behind.num_bytes == 4


def test_what_a_normaliser_adds_belongs_to_what_follows() -> None:
    tokenizer = Tokenizer(models.WordPiece({"x": 0, "##a": 1, "?": 2, "##x": 3}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace("b", "xa")
    spans = ByteSpans.of_text(tokenizer, "b", TokenBytes.of_tokenizer(tokenizer))
    assert spans.ends.tolist() == [1] and not spans.is_exact[0] and spans.end_tokens.tolist() == [2]


def test_a_text_that_is_not_read_to_its_end_has_no_end() -> None:
    """WordPiece drops the last space, so that an end token does not stand behind the text as it is."""
    assert spans_of("word_piece", "cat", has_end=True).end_token is not None
    assert spans_of("word_piece", "cat ", has_end=True).end_token is None


def test_the_same_letters_elsewhere_are_not_it() -> None:
    """The first b is dropped; the token stands for the second one, and the offsets know it."""
    tokenizer = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "?": 2}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace(Regex("(?<=a)b"), "")
    spans = ByteSpans.of_text(tokenizer, "abb", TokenBytes.of_tokenizer(tokenizer))
    assert pieces(spans, "abb") == [("a", True), ("bb", False)]


def test_what_a_normaliser_adds_at_the_end_is_not_of_the_text() -> None:
    tokenizer = Tokenizer(models.WordPiece({"ab": 0, "##z": 1, "?": 2}, unk_token="?"))
    tokenizer.normalizer = normalizers.Replace(Regex("$"), "z")
    spans = ByteSpans.of_text(tokenizer, "ab", TokenBytes.of_tokenizer(tokenizer))
    assert spans.input_ids.tolist() == [0, 1]
    assert pieces(spans, "ab") == [("ab", False)] and spans.end_tokens.tolist() == [2]


@pytest.mark.parametrize("direction", ["left", "right"])
def test_padding_is_left_out(direction: str) -> None:
    """Also where the padding token is the one that ends a text, as often with GPT-2."""
    tokenizer = Tokenizer.from_str(tokenizer_of("byte_level").to_str())
    tokenizer.enable_padding(direction=direction, pad_id=0, pad_token="<|end|>", length=30)
    padded = ByteSpans.of_text(tokenizer, "the cat", table_of("byte_level"))
    plain = spans_of("byte_level", "the cat")
    assert padded.input_ids.tolist() == plain.input_ids.tolist() and padded.end_token is None
    assert padded.first_tokens.tolist() == plain.first_tokens.tolist()


def test_a_tokenizer_that_truncates_by_itself_says_no_end() -> None:
    tokenizer = Tokenizer.from_str(tokenizer_of("byte_level").to_str())
    tokenizer.enable_truncation(3)
    cut = ByteSpans.of_text(tokenizer, "the cat sat", table_of("byte_level"), end_id=0)
    assert len(cut.input_ids) == 3 and cut.end_token is None and 0 not in cut.input_ids


def test_no_text() -> None:
    spans = spans_of("byte_level", "", has_end=True)
    assert len(spans.ends) == 0 and spans.end == 0 and spans.end_token == 0


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = tokenizer_of("byte_level")
    with pytest.raises(InputError, match="max_tokens is 0"):
        spans_of("byte_level", "a", max_tokens=0)
    with pytest.raises(InputError, match="make the table from the tokenizer"):
        ByteSpans.of_encoding(tokenizer.encode("the"), "the", TokenBytes((b"a",), frozenset()))
    with pytest.raises(InputError, match="give the text that was encoded"):
        ByteSpans.of_encoding(tokenizer.encode("the cat"), "the", table_of("byte_level"))
    with pytest.raises(InputError, match="expected less than"):
        ByteSpans.of_encoding(tokenizer.encode("a"), "a", table_of("byte_level"), end_id=10**6)


def test_the_end_ids_are_those_of_the_table() -> None:
    assert spans_of("nfkc", "a", has_end=True).input_ids[-1] == END["nfkc"]
    assert np.array_equal(spans_of("nfkc", "a").input_ids, spans_of("nfkc", "a", has_end=True).input_ids[:-1])
