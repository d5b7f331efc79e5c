"""The second channel: every chunk's likelihood comes out on the server's tokens, in one byte for each of them."""

from __future__ import annotations

import numpy as np
import pytest
from co_tuning import domain_texts, reader_of
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.data.templates import Example
from cotune.distillation.byte_spans import ByteSpans
from cotune.distillation.paired_texts import PairedText, pair_text
from cotune.errors import InputError
from cotune.federation.public_chunks import (
    HEADS,
    MOST_NATS,
    SIZES,
    PublicText,
    from_arrays,
    from_codes,
    to_arrays,
    to_codes,
    told_of,
)

SERVER = reader_of("byte_level")


def own_text(example: Example) -> PairedText:
    return pair_text(example, SERVER, SERVER, max_tokens=64)


@given(st.lists(st.floats(-200, 0), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_codes_are_within_one_percent(values: list[float]) -> None:
    wanted = np.array(values, np.float32)
    found = from_codes(to_codes(wanted))
    assert (found <= 0).all()
    near = np.maximum(wanted, -MOST_NATS)
    assert (np.abs(found - near) <= 0.0085 * (1 - near) + 1e-5).all()


@pytest.mark.parametrize("kind", ["unigram", "nfkc", "byte_level", "word_piece"])
def test_what_a_device_tells_comes_out_at_the_same_bytes(kind: str) -> None:
    """Likelihoods of -(bytes so far) / 10, so that a chunk's number says where it ends."""
    reader = reader_of(kind)
    for example in [*domain_texts("med", 3), Example("the ﬁ", "ne dog did not 日本")]:
        own = own_text(example)
        public = from_arrays(to_arrays([PublicText.of(own)]))[0]
        assert public.text == own.text and public.num_slots == len(own.alignment)
        spans = ByteSpans.of_text(reader.tokenizer, public.text, reader.table, end_id=reader.end_id)
        aligned = public.aligned(spans)
        numbers = -aligned.chunk_ends[aligned.is_usable].astype(np.float32) / 10
        told = told_of(own, from_codes(public.codes(aligned, numbers)))
        assert np.array_equal(
            told.alignment.chunk_ends[told.alignment.is_usable], aligned.chunk_ends[aligned.is_usable]
        )
        assert np.array_equal(
            told.alignment.chunk_starts[told.alignment.is_usable], aligned.chunk_starts[aligned.is_usable]
        )
        ends = told.alignment.chunk_ends[told.alignment.is_usable]
        assert len(ends) >= 3 and np.allclose(told.log_likelihoods, -ends / 10, atol=0.0085 * (1 + ends.max() / 10))
        # The tokens are the server's: first predicted, last its end.
        side, pieces = told.alignment.sides[0], SERVER.table.pieces
        for chunk in np.flatnonzero(told.alignment.is_usable):
            ids = side.input_ids[side.first_tokens[chunk] : side.end_tokens[chunk]]
            written = b"".join(pieces[token] or b"" for token in ids.tolist())
            start, end = told.alignment.chunk_starts[chunk], told.alignment.chunk_ends[chunk]
            assert written == own.text.encode()[start:end]


def test_a_thousand_texts_of_256_tokens_are_less_than_0_4_megabytes() -> None:
    own = own_text(Example("the", " cat sat on the mats." * 3))
    public = PublicText.of(own)
    num_bytes = public.num_slots  # uint8
    assert public.codes(public.aligned(public.spans()), np.zeros(len(own.alignment), np.float32)).nbytes == num_bytes
    per_token = num_bytes / int(own.sides[0].is_target.sum())
    assert per_token * 1000 * 256 <= 0.4e6 and per_token == 1.0


def test_texts_that_do_not_belong_together_are_refused() -> None:
    arrays = to_arrays([PublicText.of(own_text(one)) for one in domain_texts("public", 2)])
    for name, wrong in ((SIZES, arrays[SIZES][:-1]), (HEADS, arrays[HEADS][:1]), (SIZES, 0 * arrays[SIZES])):
        with pytest.raises(InputError, match="public texts cannot be read"):
            from_arrays({**arrays, name: wrong})
    with pytest.raises(InputError, match="public texts cannot be read"):
        from_arrays({})
