"""Round-to-nearest against NumPy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer, tiny_model
from rounding import nearest

from cotune.compression.calibration import LayerProgress
from cotune.compression.grid import Grid
from cotune.compression.round_to_nearest import RoundToNearest, round_to_nearest


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("group_size", [32, None])
@pytest.mark.parametrize("is_symmetric", [False, True])
def test_it_is_the_nearest_of_the_grid(bits: int, group_size: int | None, is_symmetric: bool) -> None:
    weight, _ = correlated_layer(0, num_outputs=3, num_inputs=70)
    packed = round_to_nearest(weight, Grid(bits=bits, group_size=group_size, is_symmetric=is_symmetric))
    codes, values = nearest(weight.double().numpy(), bits, group_size or 70, is_symmetric)
    np.testing.assert_array_equal(packed.codes, codes)
    np.testing.assert_array_equal(packed.dequantised(), values)
    assert packed.bits == bits and packed.is_symmetric == is_symmetric


def test_by_hand() -> None:
    """-2.3 to 1.2 in 7 steps of 0.5; zero has the code round(4.6) = 5."""
    packed = round_to_nearest(torch.tensor([[1.2, -2.3]]), Grid(bits=3))
    assert packed.codes.tolist() == [[7, 0]]
    assert packed.dequantised().tolist() == [[1.0, -2.5]]


def test_layers_lose_the_same_with_texts_and_without() -> None:
    told: list[LayerProgress] = []
    models = [tiny_model(), tiny_model()]
    ids = np.random.default_rng(0).integers(0, 50, (3, 9))
    packed = [
        RoundToNearest().quantise_linears(model, texts, Grid(bits=3), on_layer=told.append)
        for model, texts in zip(models, (None, ids), strict=True)
    ]
    assert packed[0].keys() == packed[1].keys() and len(packed[0]) == 21
    for name, weight in packed[0].items():
        np.testing.assert_array_equal(weight.codes, packed[1][name].codes)
        for model in models:
            np.testing.assert_array_equal(model.get_submodule(name).weight.detach().numpy(), weight.dequantised())
    assert [progress.name for progress in told[:21]] == [progress.name for progress in told[21:]]
    assert {progress.error for progress in told[:21]} == {None}
    assert all(progress.error is not None and 0 < progress.error < 0.1 for progress in told[21:])
