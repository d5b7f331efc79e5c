from __future__ import annotations

import numpy as np
import pytest
from byte_tokens import BOS, EOS, TOKENIZER, byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from cotune.data.batches import EncodedExample, encode_example, fit_example, token_batches
from cotune.data.templates import Example
from cotune.errors import InputError

TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def encode(example: Example, max_length: int = 128, tokenizer: Tokenizer = TOKENIZER) -> EncodedExample:
    return encode_example(tokenizer, example, eos_token_id=EOS, max_length=max_length)


def text_of(token_ids: np.ndarray) -> str:
    return TOKENIZER.decode(token_ids.tolist(), skip_special_tokens=False)


def test_by_hand() -> None:
    encoded = encode(Example("ab", "c"))
    assert text_of(encoded.input_ids) == "<bos>abc<eos>"
    assert encoded.input_ids.dtype == np.int64
    assert encoded.first_target == 3


@given(prompt=TEXT, target=TEXT.filter(bool))
def test_generation_from_the_prompt_sees_the_same_prompt_ids(prompt: str, target: str) -> None:
    encoded = encode(Example(prompt, target), max_length=1000)
    first = encoded.first_target
    assert encoded.input_ids[:first].tolist() == TOKENIZER.encode(prompt).ids
    assert encoded.input_ids[-1] == EOS
    assert TOKENIZER.decode(encoded.input_ids[first:].tolist()) == target


def test_a_token_across_the_border_is_not_used() -> None:
    tokenizer = byte_tokenizer(merges=(("b", "c"),))
    merged = tokenizer.encode("bc", add_special_tokens=False).ids
    assert len(merged) == 1
    joined = encode(Example("a", "bc"), tokenizer=tokenizer)
    assert joined.input_ids.tolist() == [*tokenizer.encode("a").ids, *merged, EOS]
    parted = encode(Example("ab", "cd"), tokenizer=tokenizer)
    assert parted.input_ids[: parted.first_target].tolist() == tokenizer.encode("ab").ids
    assert len(parted.input_ids) == 6  # <bos> a b c d <eos>


def test_a_text_without_prompt() -> None:
    encoded = encode(Example("", "abc"))
    assert (text_of(encoded.input_ids), encoded.first_target) == ("<bos>abc<eos>", 1)
    without_start = encode(Example("", "abc"), tokenizer=byte_tokenizer(bos=False))
    assert (text_of(without_start.input_ids), without_start.first_target) == ("abc<eos>", 1)


def test_an_end_of_sequence_in_the_target_is_not_doubled() -> None:
    assert text_of(encode(Example("a", "b<eos>")).input_ids) == "<bos>ab<eos>"


def test_truncation_keeps_the_end_of_the_prompt_and_the_target() -> None:
    short_target = encode(Example("0123456789", "ab"), max_length=8)
    assert text_of(short_target.input_ids) == "<bos>6789ab<eos>"
    assert short_target.first_target == 5
    long_target = encode(Example("0123", "abcdefghij"), max_length=8)
    assert text_of(long_target.input_ids) == "<bos>123abcd"
    assert long_target.first_target == 4
    no_prompt = encode(Example("", "abcdefghij"), max_length=8)
    assert text_of(no_prompt.input_ids) == "<bos>abcdefg"


def test_a_long_document_loses_its_end_and_the_summary_stays_whole() -> None:
    article = Example("Sum:0123456789;", "abcd", document=(4, 14))  # 1 + 15 + 4 + 1 = 21 tokens
    assert text_of(encode(article, max_length=21).input_ids) == "<bos>Sum:0123456789;abcd<eos>"
    assert text_of(encode(article, max_length=20).input_ids) == "<bos>Sum:012345678;abcd<eos>"
    assert text_of(encode(article, max_length=14).input_ids) == "<bos>Sum:012;abcd<eos>"
    # Without any document it is 11 tokens; below that, the rule for other prompts holds.
    assert text_of(encode(article, max_length=11).input_ids) == "<bos>Sum:;abcd<eos>"
    assert text_of(encode(article, max_length=9).input_ids) == "<bos>m:;abcd<eos>"


def test_a_target_longer_than_half_is_kept_too() -> None:
    article = Example("S:0123456789;", "abcdefgh", document=(2, 12))
    assert text_of(encode(article, max_length=14).input_ids) == "<bos>S:0;abcdefgh<eos>"


def test_room_for_generation_counts_where_it_is_more_than_the_target() -> None:
    article = Example("S:0123456789;", "ab", document=(2, 12))
    fitted = fit_example(TOKENIZER, article, max_length=14, room=6)
    assert (fitted.prompt, fitted.document) == ("S:0123;", (2, 6))
    assert len(TOKENIZER.encode(fitted.prompt).ids) == 8
    assert fit_example(TOKENIZER, article, max_length=14, room=3) == Example("S:0123456;", "ab")
    assert fit_example(TOKENIZER, Example("0123456789", "ab"), max_length=5).prompt == "0123456789"


@given(document=TEXT, frame=st.text("ab ", max_size=4), target=TEXT.filter(bool), max_length=st.integers(2, 60))
def test_only_the_document_becomes_shorter(document: str, frame: str, target: str, max_length: int) -> None:
    tokenizer = byte_tokenizer(merges=(("a", "b"), ("ab", "a")))
    example = Example(frame + document + frame, target, (len(frame), len(frame) + len(document)))
    fitted = fit_example(tokenizer, example, max_length=max_length)
    assert fitted.document is not None
    start, end = fitted.document
    assert (fitted.prompt[:start], fitted.prompt[end:], fitted.target) == (frame, frame, target)
    assert document.startswith(fitted.prompt[start:end])
    num_target = len(tokenizer.encode(target, add_special_tokens=False).ids) + 1
    if end > start:
        assert len(tokenizer.encode(fitted.prompt).ids) + num_target <= max_length + 1
    if len(tokenizer.encode(example.prompt).ids) + num_target <= max_length - 1:
        assert fitted.prompt == example.prompt


@given(prompt=TEXT, target=TEXT.filter(bool), max_length=st.integers(2, 40), bos=st.booleans())
def test_never_longer_than_allowed_and_never_without_a_target(
    prompt: str, target: str, max_length: int, bos: bool
) -> None:
    tokenizer = byte_tokenizer(bos=bos)
    encoded = encode(Example(prompt, target), max_length, tokenizer)
    whole = len(tokenizer.encode(prompt + target).ids) + 1
    assert len(encoded.input_ids) == min(max_length, whole)
    assert 1 <= encoded.first_target < len(encoded.input_ids)
    if bos:
        assert encoded.input_ids[0] == BOS


@pytest.mark.parametrize("max_length", [-1, 0, 1])
def test_no_room_at_all(max_length: int) -> None:
    with pytest.raises(InputError, match=f"max_length is {max_length}, expected at least 2"):
        encode(Example("a", "b"), max_length)


def test_nothing_to_learn() -> None:
    with pytest.raises(InputError, match="no target tokens"):
        encode(Example("", ""), tokenizer=byte_tokenizer(bos=False))


def test_a_batch_by_hand() -> None:
    examples = [
        EncodedExample(np.array([1, 5, 6, 2]), first_target=2),
        EncodedExample(np.array([1, 7]), first_target=1),
    ]
    (batch,) = token_batches(examples, batch_size=4, pad_token_id=0, seed=0)
    assert batch.input_ids.tolist() == [[1, 7, 0, 0], [1, 5, 6, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.labels.tolist() == [[-100, 7, -100, -100], [-100, -100, 6, 2]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {np.dtype(np.int64)}


@given(
    lengths=st.lists(st.integers(2, 30), max_size=40),
    batch_size=st.integers(1, 7),
    seed=st.integers(0, 2**32),
)
def test_every_example_comes_once_and_the_seed_decides_the_order(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    examples = [EncodedExample(np.full(length, index + 1), first_target=1) for index, length in enumerate(lengths)]
    batches = list(token_batches(examples, batch_size, 0, seed))
    seen = [int(row[0]) - 1 for batch in batches for row in batch.input_ids]
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[index] for index in seen] == [int(n) for batch in batches for n in batch.attention_mask.sum(1)]
    assert all(len(batch.input_ids) <= batch_size for batch in batches)
    again = list(token_batches(examples, batch_size, 0, seed))
    assert [batch.input_ids.tolist() for batch in again] == [batch.input_ids.tolist() for batch in batches]


def test_sequences_of_similar_length_come_together() -> None:
    rng = np.random.default_rng(0)
    examples = [EncodedExample(np.ones(length, np.int64), 1) for length in rng.integers(2, 200, size=256)]
    batches = list(token_batches(examples, 8, 0, seed=1))
    padded = sum(batch.input_ids.size for batch in batches)
    assert padded < 1.1 * sum(len(each.input_ids) for each in examples)
    longest = [batch.input_ids.shape[1] for batch in batches]
    assert longest != sorted(longest)


def test_batch_size_is_checked() -> None:
    with pytest.raises(InputError, match="batch_size is 0, expected at least 1"):
        list(token_batches([], 0, 0, seed=0))
