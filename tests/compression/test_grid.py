"""Scales, zero points and codes, by hand and as properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.compression.grid import Grid
from cotune.errors import InputError


def test_an_asymmetric_grid_by_hand() -> None:
    """Row one spans -1.5 to 2 in 7 steps of 0.5, and zero is its code 3. Row two begins at zero."""
    grid = Grid(bits=3, group_size=None)
    weight = torch.tensor([[-1.5, 2.0, 0.6], [1.0, 7.0, 3.4]])
    scales, zeros = grid.fit(weight)
    assert scales.tolist() == [[0.5], [1.0]] and zeros.tolist() == [[3.0], [0.0]]
    assert grid.codes(weight, scales, zeros).tolist() == [[0.0, 7.0, 4.0], [1.0, 7.0, 3.0]]
    assert grid.rounded(weight).tolist() == [[-1.5, 2.0, 0.5], [1.0, 7.0, 3.0]]


def test_a_symmetric_grid_by_hand() -> None:
    """-3.5 to 3.5 in 7 steps of 1 around the code 4: 3.5 rounds to 4, whose code 8 there is not, and becomes 3."""
    grid = Grid(bits=3, group_size=None, is_symmetric=True)
    weight = torch.tensor([[3.5, -3.5, 1.2, -1.2]])
    scales, zeros = grid.fit(weight)
    assert scales.tolist() == [[1.0]] and zeros.tolist() == [[4.0]]
    assert grid.codes(weight, scales, zeros).tolist() == [[7.0, 0.0, 5.0, 3.0]]
    assert grid.rounded(weight).tolist() == [[3.0, -4.0, 1.0, -1.0]]


def test_every_group_has_its_own_grid_and_the_last_may_be_short() -> None:
    weight = torch.randn(3, 70, generator=torch.Generator().manual_seed(0))
    grid = Grid(bits=4, group_size=32)
    scales, zeros = grid.fit(weight)
    assert scales.shape == (3, 3)
    for group, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 70))):
        alone = Grid(bits=4, group_size=None).fit(weight[:, columns])
        assert torch.equal(scales[:, [group]], alone[0]) and torch.equal(zeros[:, [group]], alone[1])
        assert torch.equal(grid.rounded(weight)[:, columns], Grid(bits=4, group_size=None).rounded(weight[:, columns]))
    # A row that is shorter than a group is one.
    assert Grid(group_size=128).fit(weight)[0].shape == (3, 1)
    assert Grid(group_size=128).group_size_of(70) == 70 and Grid(group_size=64).group_size_of(70) == 64


@given(
    seed=st.integers(0, 1000),
    bits=st.sampled_from([8, 4, 3]),
    is_symmetric=st.booleans(),
    size=st.sampled_from([1e-6, 1e-3, 1.0, 300.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_is_at_most_half_a_step_away(seed: int, bits: int, is_symmetric: bool, size: float) -> None:
    weight = size * torch.randn(4, 40, generator=torch.Generator().manual_seed(seed))
    grid = Grid(bits=bits, group_size=32, is_symmetric=is_symmetric)
    scales, zeros = grid.fit(weight)
    held = scales.numpy().astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(scales.numpy(), held)
    assert bool((scales > 0).all()) and zeros.max() < 2**bits and zeros.min() >= 0
    step = grid.spread(scales, 40)
    # At the ends: the zero point is rounded by half a step, and the scale in float16 by 2**-11 of the range or, where
    # it is subnormal, by 2**-25 for each step.
    at_ends = 1.0 + 2**bits * (2.0**-11 + 2.0**-25 / step)
    assert bool(((weight - grid.rounded(weight)).abs() <= step * at_ends).all())
    codes = grid.codes(weight, step, grid.spread(zeros, 40))
    inside = (codes > 0) & (codes < 2**bits - 1)
    assert bool(((weight - grid.rounded(weight)).abs() <= 0.5001 * step)[inside].all())


def test_the_range_may_be_cut() -> None:
    weight = torch.tensor([[-4.0, 3.0, 1.0]])
    scales, zeros = Grid(bits=3, group_size=None).fit(weight, shrink=0.5)
    assert scales.tolist() == [[0.5]] and zeros.tolist() == [[4.0]]


def test_zeros_stay_zeros() -> None:
    for is_symmetric in (False, True):
        assert Grid(is_symmetric=is_symmetric).rounded(torch.zeros(2, 40)).tolist() == torch.zeros(2, 40).tolist()


def test_a_packed_weight_has_the_grid_s_values() -> None:
    weight = torch.randn(5, 70, generator=torch.Generator().manual_seed(1))
    grid = Grid(bits=3, group_size=64)
    scales, zeros = grid.fit(weight)
    codes = grid.codes(weight, grid.spread(scales, 70), grid.spread(zeros, 70))
    packed = grid.pack(codes, scales, zeros)
    assert (packed.bits, packed.group_size, packed.shape) == (3, 64, (5, 70))
    np.testing.assert_array_equal(packed.dequantised(), grid.rounded(weight).numpy())


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(InputError, match="bits are 2, expected one of 8, 4, 3"):
        Grid(bits=2)
    with pytest.raises(InputError, match=r"group_size is 16, expected one of \(32, 64, 128\), or None"):
        Grid(group_size=16)
    for bad in (float("nan"), float("inf"), 1e9):
        with pytest.raises(InputError, match="expected finite numbers with steps that float16 holds"):
            Grid().fit(torch.tensor([[1.0, bad]]))
