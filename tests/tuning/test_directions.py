from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from philox_reference import philox_block, reference_signs

from cotune.errors import InputError
from cotune.tuning.directions import SIGNS_PER_BLOCK, Direction, direction_seed, philox, place_parameters, unpack

SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_signs_are_kept_and_are_those_that_are_made_anew(dtype: torch.dtype) -> None:
    short, long = Direction(3, num_signs=1000), Direction(3, num_signs=2**20 + 1)
    for start, num in ((0, 1000), (31, 5), (640, 360), (999, 1)):
        for direction in (short, long):
            assert torch.equal(direction.read_signs(start, num, dtype), Direction(3).signs(start, num, dtype))
    assert short.keeps_signs and not long.keeps_signs and not Direction(3).keeps_signs
    assert short.read_signs(5, 9, dtype).data_ptr() == short.read_signs(5, 9, dtype).data_ptr()
    assert torch.equal(short.read_signs(5, 9, torch.float16), Direction(3).signs(5, 9, torch.float16))
    # What is not kept is the caller's own.
    long.read_signs(0, 9, dtype).zero_()
    assert torch.equal(long.read_signs(0, 9, dtype), short.read_signs(0, 9, dtype))
    with pytest.raises(InputError, match="signs 999 to 1001 of a direction of 1000"):
        short.read_signs(999, 2, dtype)


def test_the_reference_gives_the_authors_known_answers() -> None:
    """From `kat_vectors` of Random123, the authors' library."""
    ones = 0xFFFFFFFF
    assert philox_block(0, [0] * 4) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox_block(2**64 - 1, [ones] * 4) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert philox_block(0x299F31D0A4093822, pi) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@given(seed=SEEDS, counters=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_blocks_are_those_of_the_reference(seed: int, counters: list[int]) -> None:
    expected = [philox_block(seed, [counter & 0xFFFFFFFF, counter >> 32, 0, 0]) for counter in counters]
    assert philox(seed, torch.tensor(counters)).tolist() == expected


@given(seed=SEEDS, start=st.integers(0, 2**40), num=st.integers(1, 300))
@settings(max_examples=30, deadline=None)
def test_signs_are_those_of_the_reference_in_every_type(seed: int, start: int, num: int) -> None:
    expected = reference_signs(seed, start, num)
    direction = Direction(seed)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        signs = direction.signs(start, num, dtype)
        assert signs.dtype == dtype and np.array_equal(signs.double().numpy(), expected)


def test_a_sign_is_the_same_in_whatever_piece_it_comes() -> None:
    """Across pages, from a cache that is too small for them, and in rows."""
    page = 2**20
    whole, piecewise = Direction(3, num_pages=9), Direction(3, num_pages=1)
    expected = whole.signs(0, 2 * page + 77)
    for start, num in ((page - 50, 100), (0, 10), (2 * page, 77), (page - 1, page + 2), (5, 1)):
        assert torch.equal(piecewise.signs(start, num), expected[start : start + num]), start
    short = Direction(3, num_signs=200)
    assert torch.equal(short.signs(0, 200), expected[:200]) and torch.equal(short.signs(150, 900), expected[150:1050])
    starts = torch.tensor([0, 31, 500, page - 3, 2 * page - 128])
    rows = torch.stack([expected[start : start + 200] for start in starts])
    assert torch.equal(whole.rows(starts, 200), rows)
    assert torch.equal(whole.rows(starts, 200, torch.bfloat16).float(), rows)
    starts = starts // SIGNS_PER_BLOCK * SIGNS_PER_BLOCK
    assert torch.equal(
        whole.rows(starts, 200, aligned=True), torch.stack([expected[start : start + 200] for start in starts])
    )


def test_signs_are_balanced_and_uncorrelated() -> None:
    """Sums of n independent signs have standard deviation sqrt(n); 5 of them is a chance of one in two million."""
    num = 2**17
    signs = torch.stack([Direction(seed).signs(0, num) for seed in (0, 1, 2**63)]).double()
    bound = 5 * num**0.5
    assert signs.sum(1).abs().max() < bound
    gram = signs @ signs.T
    assert (gram - num * torch.eye(3)).abs().max() < bound, "directions of neighbouring seeds"
    for lag in (1, 2, 16, 31, 32, 128):
        assert (signs[:, lag:] * signs[:, :-lag]).sum(1).abs().max() < bound, lag
    lanes = signs.view(3, -1, 32).sum(1)
    assert lanes.abs().max() < 5.5 * (num / 32) ** 0.5, "each of the 32 bits of a word"


def test_unpacking_gives_new_numbers_and_refuses_integers() -> None:
    words = torch.tensor([0, -1], dtype=torch.int32)
    signs = unpack(words)
    signs.zero_()
    assert words.tolist() == [0, -1]
    assert unpack(words, torch.float16).tolist() == [1.0] * 32 + [-1.0] * 32
    with pytest.raises(InputError, match=r"dtype is torch\.int32"):
        unpack(words, torch.int32)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_an_impossible_seed_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed is {seed}"):
        Direction(seed)


def test_seeds_of_directions_differ_and_fit_into_int64() -> None:
    seeds = [direction_seed(seed, step, index) for seed in range(3) for step in range(20) for index in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**60


def test_places_depend_on_names_and_sizes_alone() -> None:
    places = place_parameters({"b": 129, "c": 1, "a": 1})
    assert places == place_parameters({"a": 1, "b": 129, "c": 1}) == {"a": 0, "b": 128, "c": 384}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_gives_the_same_bits() -> None:
    here, there = Direction(2**63 + 11), Direction(2**63 + 11, "cuda")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(here.signs(1000, 2**21, dtype), there.signs(1000, 2**21, dtype).cpu())
    starts = torch.tensor([5, 2**30 + 3])
    assert torch.equal(here.rows(starts, 300), there.rows(starts.cuda(), 300).cpu())
