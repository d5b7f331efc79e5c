"""The largest entries of each row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cotune.models.largest import largest_ids


def test_by_hand() -> None:
    values = torch.tensor([[0.5, 2.0, -1.0, 3.0, 2.5], [9.0, 8.0, 7.0, 6.0, 5.0]])
    assert largest_ids(values, 2).tolist() == [[3, 4], [0, 1]]
    assert largest_ids(values, 5).tolist() == [[0, 1, 2, 3, 4]] * 2


@given(
    num_rows=st.integers(0, 70),
    num_columns=st.integers(1, 300),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    num_values=st.sampled_from([3, 1000]),
    seed=st.integers(0, 2**31),
)
def test_holds_the_same_values_as_topk(
    num_rows: int, num_columns: int, share: float, dtype: torch.dtype, num_values: int, seed: int
) -> None:
    k = max(1, round(share * num_columns))
    generator = torch.Generator().manual_seed(seed)
    # Few different values: equal ones compete for the last places.
    values = torch.randint(num_values, (num_rows, num_columns), generator=generator).to(dtype)
    found = largest_ids(values, k)
    assert found.dtype == torch.int64 and found.shape == (num_rows, k)
    assert (found.diff(dim=1) > 0).all()
    torch.testing.assert_close(values.gather(1, found).sort(dim=1).values, values.topk(k, dim=1).values.flip(1))


@pytest.mark.parametrize("num_columns", [64, 1000, 1003])
def test_a_row_does_not_depend_on_its_neighbours(num_columns: int) -> None:
    values = torch.randint(5, (40, num_columns), generator=torch.Generator().manual_seed(0)).float()
    together = largest_ids(values, 7)
    for row in range(0, 40, 13):
        assert largest_ids(values[row : row + 1], 7).equal(together[row : row + 1])


def test_asks_for_no_gradient_and_counts_nan_as_the_largest() -> None:
    values = torch.arange(100.0).reshape(1, 100).requires_grad_()
    assert largest_ids(values, 2).tolist() == [[98, 99]]
    broken = values.detach().clone()
    broken[0, 3] = np.nan
    assert largest_ids(broken, 2).tolist() == [[3, 99]]
