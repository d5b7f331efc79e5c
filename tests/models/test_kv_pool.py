"""Blocks that sequences share out among themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import CacheFullError, InputError
from cotune.models.kv_pool import BLOCK_SIZE, KVPool, num_blocks_for


def test_blocks_are_counted() -> None:
    pool = KVPool(max_blocks=3)
    first = pool.take(2)
    assert (first, pool.num_used, pool.num_free) == ([0, 1], 2, 1)
    with pytest.raises(CacheFullError, match="2 blocks of the key-value cache are wanted and 1 are free"):
        pool.take(2)
    assert pool.num_used == 2
    pool.drop(first)
    assert pool.num_used == 0
    assert pool.take(3) == [0, 1, 2]


def test_a_shared_block_is_free_when_its_last_owner_drops_it() -> None:
    pool = KVPool(max_blocks=1)
    (block,) = pool.take(1)
    pool.share([block])
    assert pool.is_shared(block)
    pool.drop([block])
    assert not pool.is_shared(block)
    assert pool.num_free == 0
    pool.drop([block])
    assert pool.num_free == 1


def test_a_pool_needs_room() -> None:
    with pytest.raises(InputError, match="max_blocks is 0"):
        KVPool(max_blocks=0)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (BLOCK_SIZE, 1), (BLOCK_SIZE + 1, 2)])
def test_number_of_blocks(tokens: int, blocks: int) -> None:
    assert num_blocks_for(tokens) == blocks


def test_what_is_written_is_read_after_growth_and_copies() -> None:
    pool = KVPool()
    blocks = pool.take(2)
    keys = torch.arange(2 * BLOCK_SIZE * 3, dtype=torch.float32).view(-1, 1, 3)
    slots = torch.arange(2 * BLOCK_SIZE)
    pool.write(0, slots, keys, -keys)
    many = pool.take(100)
    pool.copy(blocks[1], many[-1])
    read, values = pool.read(0, torch.tensor([[blocks[0], many[-1]], blocks]))
    assert torch.equal(read[0], keys)
    assert torch.equal(read[1], keys)
    assert torch.equal(values, -read)
    view, _ = pool.view(0, blocks[0], 2)
    assert torch.equal(view[0], keys)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "share"]), st.integers(1, 6)), max_size=40))
def test_no_block_has_two_lives(steps: list[tuple[str, int]]) -> None:
    pool, held = KVPool(max_blocks=20), []
    for what, number in steps:
        if what == "take":
            try:
                held.append(pool.take(number))
            except CacheFullError:
                assert number > (pool.num_free or 0)
        elif held:
            blocks = held[number % len(held)]
            if what == "drop":
                held.remove(blocks)
                pool.drop(blocks)
            else:
                pool.share(blocks)
                held.append(list(blocks))
        assert pool.num_used == len({block for blocks in held for block in blocks})
