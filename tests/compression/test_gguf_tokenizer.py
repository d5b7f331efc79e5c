"""Tokenizers that llama.cpp would read as they are meant are written; others are refused, with what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_tokens import BOS, EOS, byte_tokenizer
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors

import cotune.models
from cotune.compression.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_gguf_tokenizer
from cotune.errors import InputError

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = (("a", "b"), ("ab", "c"))


def read(tokenizer: Tokenizer, *, vocab_size: int = 300, bos_id: int | None = BOS, **model: Any) -> Any:
    data = json.loads(tokenizer.to_str())
    data["model"] |= model
    return read_gguf_tokenizer(json.dumps(data).encode(), vocab_size=vocab_size, bos_id=bos_id)


def split_by(*steps: Any, normalizer: Any = None) -> Tokenizer:
    tokenizer = byte_tokenizer(merges=MERGES, bos=False)
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def test_a_byte_level_tokenizer_is_written_as_it_is() -> None:
    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.add_tokens(["<mark>"])
    found = read(tokenizer)
    assert found.pre == "gpt-2"
    assert found.merges == ("a b", "ab c")
    assert len(found.tokens) == len(found.types) == 300
    assert found.tokens[BOS : EOS + 4] == ("<bos>", "<eos>", "ab", "abc", "<mark>")
    assert found.types[EOS - 2 : EOS + 5] == (NORMAL, CONTROL, CONTROL, NORMAL, NORMAL, USER_DEFINED, UNUSED)
    assert found.tokens[-1] == "[PAD299]"
    assert found.adds_bos
    assert not read(byte_tokenizer(bos=False)).adds_bos


def test_the_starter_s_tokenizer_is_one_of_them() -> None:
    folder = Path(cotune.models.__file__).parent / "starter"
    found = read_gguf_tokenizer((folder / "tokenizer.json").read_bytes(), vocab_size=2048, bos_id=1)
    assert (found.pre, found.adds_bos, len(found.tokens)) == ("gpt-2", True, 2048)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("gpt-2", [lambda: pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        (
            "smollm",
            [
                lambda: pre_tokenizers.Digits(individual_digits=True),
                lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
            ],
        ),
        (
            "llama-bpe",
            [
                lambda: pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
        ),
        (
            "qwen2",
            [
                lambda: pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"),
                lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ],
        ),
    ],
)
def test_rules_that_split_words_have_names(name: str, steps: list[Callable[[], Any]]) -> None:
    assert read(split_by(*(make() for make in steps)), ignore_merges=name == "llama-bpe").pre == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: split_by(pre_tokenizers.Whitespace()), "splits text by Whitespace, expected GPT-2's"),
        (lambda: split_by(pre_tokenizers.ByteLevel(add_prefix_space=True)), "with a space in front of texts"),
        (
            lambda: split_by(pre_tokenizers.Split(Regex("x"), "isolated"), pre_tokenizers.ByteLevel(False, False)),
            'splits text by .*"Regex": "x"',
        ),
        (
            lambda: split_by(pre_tokenizers.ByteLevel(False), normalizer=normalizers.Lowercase()),
            "normalises text by Lowercase",
        ),
        (lambda: split_by(pre_tokenizers.ByteLevel(False), normalizer=normalizers.NFC()), "splits text by"),
    ],
)
def test_other_rules_are_refused(make: Callable[[], Tokenizer], message: str) -> None:
    with pytest.raises(InputError, match=f"the tokenizer .*{message}.*export the model to ONNX instead"):
        read(make())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"byte_fallback": True}, "is a BPE model with byte fallback, expected byte-level BPE"),
        ({"end_of_word_suffix": "</w>"}, "has end_of_word_suffix '</w>', expected none"),
        ({"ignore_merges": True}, "has ignore_merges True, expected False with gpt-2's rules"),
    ],
)
def test_other_models_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read(byte_tokenizer(merges=MERGES), **model)


def test_tokens_around_texts_are_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", EOS)])
    with pytest.raises(InputError, match="adds tokens around texts"):
        read(tokenizer)


def test_a_tokenizer_of_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="the tokenizer has the token 259, the model 258"):
        read(byte_tokenizer(merges=MERGES), vocab_size=258)
    with pytest.raises(InputError, match="the tokenizer cannot be read"):
        read_gguf_tokenizer(b"{}", vocab_size=10, bos_id=None)
