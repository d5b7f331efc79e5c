"""One string on both sides: chunks and targets begin where the prompt ends, also where it had to be cut."""

from __future__ import annotations

import pytest
from tokenizer_kinds import END, table_of, tokenizer_of

from cotune.data.templates import Example
from cotune.distillation.paired_texts import PairedText, Reader, pair_text, pair_texts
from cotune.errors import InputError

EXAMPLE = Example("Where is the naïve cat?", " On the mat 😀.")


def reader(kind: str) -> Reader:
    return Reader(tokenizer_of(kind), table_of(kind), END[kind])


def target_text(pair: PairedText, side: int, kind: str) -> bytes:
    own = pair.sides[side]
    pieces = table_of(kind).pieces
    return b"".join(pieces[token] or b"" for token in own.input_ids[own.is_target].tolist())


@pytest.mark.parametrize("kind", ["unigram", "nfkc", "byte_level"])
def test_targets_are_the_answer_and_its_end_and_chunks_lie_within_it(kind: str) -> None:
    pair = pair_text(EXAMPLE, reader("byte_level"), reader(kind), max_tokens=64)
    for side, name in enumerate(("byte_level", kind)):
        assert target_text(pair, side, name) == EXAMPLE.target.encode()
        own = pair.sides[side]
        assert own.is_target[-1] and own.input_ids[-1] == END[name]
    start = len(EXAMPLE.prompt.encode())
    assert len(pair.alignment) > 3 and pair.alignment.chunk_starts.min() == start
    assert pair.alignment.is_usable.all() and pair.alignment.chunk_ends.max() == pair.alignment.num_bytes
    back = pair.swapped()
    assert back.sides == pair.sides[::-1] and back.alignment.sides == pair.alignment.sides[::-1]


def test_a_long_prompt_loses_its_start_on_both_sides_alike() -> None:
    long = Example("the dog ran far away. " * 8 + EXAMPLE.prompt, EXAMPLE.target)
    pair = pair_text(long, reader("byte_level"), reader("unigram"), max_tokens=40)
    assert all(len(side.input_ids) <= 40 for side in pair.sides)
    assert pair.alignment.num_bytes < len(long.prompt.encode()) and pair.alignment.starts == (0, 0)
    for side, name in enumerate(("byte_level", "unigram")):
        assert target_text(pair, side, name) == EXAMPLE.target.encode()


def test_a_target_that_is_too_long_alone_loses_its_end() -> None:
    pair = pair_text(Example("A:", " the cat" * 20), reader("byte_level"), reader("unigram"), max_tokens=12)
    assert all(len(side.input_ids) == 12 and side.is_target.sum() >= 9 for side in pair.sides)


def test_a_token_across_the_end_of_the_prompt_is_no_target() -> None:
    whole = tokenizer_of("byte_level").encode("the dog").tokens
    assert whole[0] == "the"
    pair = pair_text(Example("t", "he dog"), reader("byte_level"), reader("byte_level"), max_tokens=16)
    assert target_text(pair, 0, "byte_level") == b" dog" and pair.alignment.chunk_starts.min() == 3


def test_texts_without_a_target_are_refused() -> None:
    # A begin token and one token of the prompt leave no room.
    with pytest.raises(InputError, match="text 0: a text of 18 bytes has no target token behind its prompt of 1"):
        pair_texts([EXAMPLE], reader("unigram"), reader("byte_level"), max_tokens=3)
    with pytest.raises(InputError, match="there are no texts"):
        pair_texts([], reader("unigram"), reader("unigram"), max_tokens=8)
    with pytest.raises(InputError, match="max_tokens is 1"):
        pair_text(EXAMPLE, reader("unigram"), reader("unigram"), max_tokens=1)
