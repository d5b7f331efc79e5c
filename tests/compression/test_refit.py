"""Least squares for layers that lose inputs, against NumPy's solver."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer

from cotune.compression.calibration import LayerStatistics
from cotune.compression.refit import refit
from cotune.errors import InputError

KEPT = torch.tensor([0, 3, 4, 9])


def test_it_is_least_squares_on_the_inputs_that_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(50, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    weight = torch.randn(6, 10, generator=generator)
    gram = LayerStatistics.of_inputs(inputs).gram
    expected = np.linalg.lstsq(inputs[:, KEPT].double().numpy(), (inputs @ weight.T).double().numpy(), rcond=None)[0].T
    np.testing.assert_allclose(refit(weight, gram, KEPT, damping=0.0).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_damping_pulls_towards_the_old_weight() -> None:
    """With inputs (1, 1) and (1, 1): G = [[2, 2], [2, 2]]; keeping the second, 3 + 1 * 2 / (2 + damping * 2)."""
    gram = torch.full((2, 2), 2.0).double()
    new = refit(torch.tensor([[1.0, 3.0]]), gram, torch.tensor([1]), damping=1.0)
    torch.testing.assert_close(new, torch.tensor([[3.5]]))


def test_what_nothing_is_read_of_stays() -> None:
    weight, _ = correlated_layer(0)
    assert torch.equal(refit(weight, torch.zeros(16, 16).double(), KEPT), weight[:, KEPT])


def test_a_matrix_without_an_inverse_is_one_clear_sentence() -> None:
    with pytest.raises(InputError, match=r"4 dimensions cannot be inverted with a damping of 0\.0"):
        refit(torch.ones(2, 16), torch.ones(16, 16).double(), KEPT, damping=0.0)
