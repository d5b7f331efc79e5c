"""Text to ids and back, and the piece of text of each token, for tokenizers that cut characters into bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cotune.errors import InputError
from cotune.generation.text import Detokenizer, TextCodec

EMOJI = ["😀", "👩‍👩‍👧", "🇩🇪", "é", "ß", "語", "\ufffd", "a", " ", "\n"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and `starter` have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat and the hat", "Grüße aus Köln 😀😀"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2, Mistral and Gemma have it: words with a marked space, and bytes for all that is no word."""
    words = ["<unk>", "▁", "a", "b", "▁a", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


CODECS = {make.__name__: TextCodec(make().to_str().encode()) for make in (byte_level, byte_fallback)}


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_text(name: str, data: st.DataObject) -> None:
    """For any token ids, whether they spell whole characters or not."""
    codec = CODECS[name]
    size = codec.tokenizer.get_vocab_size()
    ids = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    pieces = codec.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == codec.decode(ids)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_text_of_emoji_cut_anywhere(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    ids = codec.tokenizer.encode("".join(data.draw(st.lists(st.sampled_from(EMOJI), min_size=1, max_size=6)))).ids
    ids = ids[: data.draw(st.integers(1, len(ids)))]
    assert "".join(codec.pieces(ids)) == codec.decode(ids)


@pytest.mark.parametrize("name", CODECS)
def test_a_character_belongs_to_the_last_of_its_tokens(name: str) -> None:
    codec = CODECS[name]
    ids = codec.tokenizer.encode("a語a", add_special_tokens=False).ids
    pieces = codec.pieces(ids)
    assert [piece for piece in pieces if piece] == ["a", "語", "a"]
    assert pieces[-2] == "語"


def test_special_tokens_show_nothing() -> None:
    codec = CODECS["byte_level"]
    assert codec.pieces([0, *codec.tokenizer.encode("a", add_special_tokens=False).ids, 1]) == ["", "a", ""]


def test_prompts_get_the_tokens_that_the_tokenizer_puts_in_front() -> None:
    codec = CODECS["byte_level"]
    ids = codec.encode_prompt("the cat")
    assert ids.dtype == np.int64 and ids[0] == codec.tokenizer.token_to_id("<s>")
    assert codec.decode(ids.tolist()) == "the cat"
    assert codec.encode_prompt("").tolist() == [0]


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="the prompt is empty, expected at least one character"):
        CODECS["byte_fallback"].encode_prompt("")


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"}', b"[1, 2]"])
def test_other_bytes_are_no_tokenizer(data: bytes) -> None:
    with pytest.raises(InputError, match=r"expected a tokenizer\.json; fetch it again"):
        TextCodec(data)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("text", ["a b a", "Grüße 😀😀 aus Köln", "👩‍👩‍👧 the cat", "語語 a"])
def test_what_a_detokeniser_gives_bit_by_bit_is_the_text(name: str, text: str) -> None:
    codec = CODECS[name]
    ids = codec.encode_text(text)
    running, shown = Detokenizer(codec), ""
    for token in ids:
        shown += running.add(token)
        # Never half a character, and never what later tokens take back.
        assert codec.decode(ids).startswith(shown)
    assert shown + running.rest() == codec.decode(ids)
    cut = Detokenizer(codec)
    assert "".join(map(cut.add, codec.encode_text("a語")[:-1])) == "a" and "\ufffd" in cut.rest()
