from __future__ import annotations

import pytest
import torch
from tokenizer_kinds import table_of

from cotune.distillation.merged_bytes import MergedBytes
from cotune.distillation.token_bytes import TokenBytes


def test_by_hand() -> None:
    table = TokenBytes((b"a", b"ab", b"abc", b"ax", None, b"c", b"a"), frozenset({4}))
    merged = MergedBytes(table)(torch.arange(7))
    found = {(int(token), chr(int(byte))) for token, byte in merged.nonzero()}
    # "abc" goes on from "a" with "b", as "ab" does; the second token for "a" is the same text.
    assert found == {(0, "b"), (0, "x"), (1, "c"), (6, "b"), (6, "x")}
    assert merged.shape == (7, 257)


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_every_longer_token_is_found(kind: str) -> None:
    table = table_of(kind)
    merged = MergedBytes(table)(torch.arange(len(table)))
    known = [piece for piece in table.pieces if piece]
    for token_id, piece in enumerate(table.pieces):
        longer = {one[len(piece)] for one in known if one.startswith(piece) and one != piece} if piece else set()
        assert set(merged[token_id].nonzero()[:, 0].tolist()) == longer
        assert bool(table.is_prefix[token_id]) == bool(longer)
