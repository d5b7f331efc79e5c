"""Packed weights in GGUF's blocks, read back by the gguf package."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.models.packed_weights import PackedWeight

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

from cotune.compression.gguf_weights import fits_gguf_blocks, in_gguf_blocks  # noqa: E402


def random_weight(bits: int, symmetric: bool, group_size: int = 32, num_in: int = 128) -> PackedWeight:
    generator = np.random.default_rng(bits)
    groups = (5, -(-num_in // group_size))
    middle = np.full(groups, 2 ** (bits - 1), np.uint8)
    return PackedWeight(
        codes=generator.integers(0, 2**bits, (5, num_in), dtype=np.uint8),
        scales=generator.uniform(0.5, 2.0, groups).astype(np.float16).astype(np.float32),
        zeros=middle if symmetric else generator.integers(0, 2**bits, groups, dtype=np.uint8),
        bits=bits,
        group_size=group_size,
    )


@pytest.mark.parametrize(
    ("bits", "symmetric", "kind", "largest_error"),
    [
        (3, True, "Q4_0", 0.0),
        (4, True, "Q4_0", 0.0),
        (8, True, "Q8_0", 0.0),
        # m = -d z is rounded to float16, 11 bits.
        (3, False, "Q4_1", 2**-11),
        (4, False, "Q4_1", 2**-11),
        # Rounded anew to 127 steps on either side, with a float16 scale.
        (8, False, "Q8_0", 0.5 / 127 + 2**-11),
    ],
)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_blocks_stand_for_the_same_numbers(
    bits: int, symmetric: bool, kind: str, largest_error: float, group_size: int
) -> None:
    weight = random_weight(bits, symmetric, group_size)
    assert fits_gguf_blocks(weight)
    rows, found = in_gguf_blocks(weight)
    assert found.name == kind
    expected = weight.dequantised()
    error = np.abs(gguf.quants.dequantize(rows, found) - expected).max() / np.abs(expected).max()
    assert error <= largest_error
    assert (error == 0) == (largest_error == 0)


@pytest.mark.parametrize(("group_size", "num_in"), [(32, 48), (48, 48), (64, 96 + 16)])
def test_groups_that_blocks_would_cross_are_seen(group_size: int, num_in: int) -> None:
    assert not fits_gguf_blocks(random_weight(4, True, group_size, num_in))
