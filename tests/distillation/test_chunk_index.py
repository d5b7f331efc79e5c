from __future__ import annotations

import numpy as np
import torch
from tokenizer_kinds import spans_of

from cotune.distillation.alignment import Alignment, ChunkTokens, align
from cotune.distillation.chunk_index import ChunkIndex


def alignment(first: list[int], end: list[int], usable: list[bool]) -> Alignment:
    ids = np.arange(100, 120)
    side = ChunkTokens(input_ids=ids, first_tokens=np.array(first), end_tokens=np.array(end))
    flags = np.array(usable)
    return Alignment(
        num_bytes=20,
        starts=(0, 0),
        chunk_starts=np.array(first),
        chunk_ends=np.array(end),
        is_exact=flags,
        is_predicted=np.ones(len(first), np.bool_),
        has_own_start=np.arange(len(first)) % 2 == 0,
        sides=(side, side),
    )


def test_a_token_is_predicted_by_the_position_before_it() -> None:
    batch = [alignment([1, 3, 4], [3, 4, 7], [True, False, True]), alignment([2], [4], [True])]
    index = ChunkIndex.of_batch(batch, 0)
    assert index.rows.tolist() == [0, 0, 1] and index.positions.tolist() == [0, 3, 1]
    assert index.last_ids.tolist() == [100, 103, 101]
    assert index.token_positions.tolist() == [0, 1, 3, 4, 5, 1, 2]
    assert index.token_ids.tolist() == [101, 102, 104, 105, 106, 102, 103]
    assert index.token_rows.tolist() == [0] * 5 + [1] * 2 and index.token_chunks.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert index.num_bytes.tolist() == [2, 3, 2] and index.has_own_start.tolist() == [True, True, True]


def test_both_sides_have_the_same_chunks() -> None:
    texts = ["the cat 😀 sat", "ﬁne", "", "the dog"]
    pairs = [align(spans_of("unigram", text), spans_of("byte_level", text)) for text in texts]
    one, other = (ChunkIndex.of_batch(pairs, side) for side in (0, 1))
    assert len(one) == len(other) == sum(int(pair.is_usable.sum()) for pair in pairs) > 5
    assert one.rows.tolist() == other.rows.tolist() and one.num_bytes.tolist() == other.num_bytes.tolist()
    assert int(one.positions.min()) >= 0 and int(other.token_positions.min()) >= 0
    assert one.token_ids.tolist() != other.token_ids.tolist()


def test_no_chunks_and_another_device() -> None:
    index = ChunkIndex.of_batch([], 1)
    assert len(index) == 0 and index.has_own_start.dtype == torch.bool and index.token_ids.dtype == torch.int64
    assert index.to("meta").rows.device.type == "meta"


def test_an_index_among_the_wanted_positions_reads_the_same_logits() -> None:
    pairs = [
        align(spans_of("byte_level", text), spans_of("unigram", text)) for text in ("the cat sat", "the dog 😀 ran")
    ]
    index = ChunkIndex.of_batch(pairs, 1)
    width = max(len(pair.sides[1].input_ids) for pair in pairs) + 2
    logits = torch.randn(2, width, 5, generator=torch.Generator().manual_seed(0))
    wanted = index.wanted((2, width))
    wanted[1, -1] = True  # others may be wanted too
    among = index.among(wanted)
    few = logits[wanted][None]
    assert 10 < few.shape[1] < 2 * width
    for whole, part in ((("rows", "positions"), ("rows", "positions")), (("token_rows", "token_positions"),) * 2):
        expected = logits[getattr(index, whole[0]), getattr(index, whole[1])]
        assert torch.equal(few[getattr(among, part[0]), getattr(among, part[1])], expected)
    assert torch.equal(among.token_chunks, index.token_chunks)
