from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import table_of, tokenizer_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from cotune.distillation.token_bytes import END_EVENT, NO_EVENT, TokenBytes
from cotune.errors import InputError


def piece(kind: str, token: str) -> bytes | None:
    token_id = tokenizer_of(kind).token_to_id(token)
    assert token_id is not None, token
    return table_of(kind).pieces[token_id]


def test_what_a_token_writes() -> None:
    assert piece("byte_level", "Ġthe") == b" the" and piece("byte_level", "ðŁ") == b"\xf0\x9f"
    assert piece("byte_level", "Ċ") == b"\n" and piece("byte_level", "<|end|>") is None
    assert (
        piece("unigram", "<0xF0>") == b"\xf0"
        and piece("unigram", "▁") == b" "
        and piece("unigram", "日") == "日".encode()
    )
    assert piece("unigram", "<unk>") is None and piece("unigram", "</s>") is None
    assert piece("nfkc", "▁the") == b" the" and piece("nfkc", "<0x0A>") == b"\n"
    assert piece("word_piece", "the") == b" the" and piece("word_piece", "##s") == b"s"
    assert piece("word_piece", "[UNK]") is None
    assert [table_of(kind).always_prepends for kind in ("byte_level", "unigram", "nfkc")] == [False, False, True]


def test_the_byte_level_alphabet_is_the_tokenizers_own() -> None:
    """Its pre-tokenizer writes a character's bytes as characters; 0xC0, 0xC1 and above 0xF4 are not in UTF-8."""
    table, splitter = table_of("byte_level"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ids = tokenizer_of("byte_level").get_vocab()
    seen = set()
    for character in [
        *map(chr, range(0x800)),
        *map(chr, range(0x800, 0xD800, 61)),
        *map(chr, range(0xE000, 0x10000, 61)),
        *map(chr, range(0x10000, 0x110000, 4093)),
    ]:
        ((mapped, _),) = splitter.pre_tokenize_str(character)
        assert b"".join(table.pieces[ids[one]] or b"?" for one in mapped) == character.encode()
        seen.update(character.encode())
    assert len(seen) == 256 - 13
    assert {table.pieces[ids[one]] for one in pre_tokenizers.ByteLevel.alphabet()} == {bytes([b]) for b in range(256)}


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "nfkc"])
@given(text=st.text(st.sampled_from("the cats, 日本😀é")))
@settings(max_examples=25, deadline=None)
def test_decoding_says_the_same(kind: str, text: str) -> None:
    tokenizer, table = tokenizer_of(kind), table_of(kind)
    written = b"".join(table.pieces[token_id] or b"" for token_id in tokenizer.encode(text).ids)
    assert written == (b" " if kind == "nfkc" and text else b"") + text.encode() or (
        kind == "unigram" and written == b" " + text.encode()
    )


def test_first_events() -> None:
    table = TokenBytes((b"ab", None, b"\xf0\x9f", None, b"", b"a"), frozenset({3}))
    assert table.first_events.tolist() == [97, NO_EVENT, 0xF0, END_EVENT, NO_EVENT, 97]
    assert np.flatnonzero(table.possible_events).tolist() == [97, 0xF0, END_EVENT]
    assert table.ids_by_bytes == {b"ab": 0, b"\xf0\x9f": 2, b"a": 5}


def test_of_two_tokens_with_the_same_bytes_the_fallback_gives_way() -> None:
    vocab = {"<unk>": 0, "<0x41>": 1, "A": 2}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    table = TokenBytes.of_tokenizer(tokenizer)
    assert table.pieces == (None, b"A", b"A") and table.ids_by_bytes == {b"A": 2}


@pytest.mark.parametrize("kind", ["byte_level", "unigram", "word_piece"])
def test_prefixes_are_those_that_a_longer_token_begins_with(kind: str) -> None:
    table = table_of(kind)
    known = {one for one in table.pieces if one}
    longer = [any(other != one and other.startswith(one) for other in known) if one else False for one in table.pieces]
    assert table.is_prefix.tolist() == longer and 0 < sum(longer) < len(table)


def test_added_tokens_padding_and_word_ends() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"Ġ": 0, "a": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_tokens(["日本"])
    tokenizer.add_special_tokens([AddedToken("<pad>", special=True)])
    table = TokenBytes.of_tokenizer(tokenizer, vocab_size=6)
    assert table.pieces == (b" ", b"a", "日本".encode(), None, None, None)
    suffixed = Tokenizer(models.BPE(vocab={"lo": 0, "w</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    suffixed.decoder = decoders.BPEDecoder()
    assert TokenBytes.of_tokenizer(suffixed).pieces == (b"lo", b"w ")
    bare = Tokenizer(models.WordPiece({"a": 0, "##b": 1, "?": 2}, unk_token="?"))
    assert TokenBytes.of_tokenizer(bare).pieces == (b"a", b"b", None)


def test_an_end_token_writes_nothing() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "stop": 1}, unk_token="a"))
    assert TokenBytes.of_tokenizer(tokenizer, end_ids=[1]).first_events.tolist() == [NO_EVENT, END_EVENT]


def test_what_cannot_be_a_table() -> None:
    tokenizer = tokenizer_of("byte_level")
    with pytest.raises(InputError, match="vocab_size is 10, expected at least"):
        TokenBytes.of_tokenizer(tokenizer, vocab_size=10)
    with pytest.raises(InputError, match="end token 999"):
        TokenBytes.of_tokenizer(tokenizer, end_ids=[999])
    with pytest.raises(InputError, match="end token 0"):
        TokenBytes((b"a",), frozenset({0}))
