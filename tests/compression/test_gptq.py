"""GPTQ against one column at a time with the inverse Hessian written out, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressible import correlated_layer, tiny_model
from rounding import Matrix, fit_row, nearest_code

from cotune.compression.calibration import LayerStatistics, compress_linears, reconstruction_error
from cotune.compression.gptq import Gptq
from cotune.compression.grid import Grid
from cotune.compression.round_to_nearest import round_to_nearest
from cotune.errors import InputError


def column_by_column(
    weight: Matrix, gram: Matrix, *, bits: int, size: int, order: list[int] | None = None, damping: float = 0.01
) -> tuple[Matrix, Matrix]:
    """Equations 2 and 3 of the paper: the error of a column goes to the others, and the column leaves H^-1."""
    num_rows, num_columns = weight.shape
    weight, hessian = weight.copy(), 2 * gram
    inverse = np.linalg.inv(hessian + damping * np.mean(np.diag(hessian)) * np.eye(num_columns))
    codes, values = np.empty_like(weight), np.empty_like(weight)
    whole, grids = weight.copy(), {}
    for column in order if order is not None else range(num_columns):
        start = column - column % size
        for row in range(num_rows):
            if order is not None:
                grids[row, start] = fit_row(whole[row, start : start + size], bits, False)
            elif column == start:
                grids[row, start] = fit_row(weight[row, start : start + size], bits, False)
            scale, zero = grids[row, start]
            codes[row, column] = nearest_code(weight[row, column], scale, zero, bits)
            values[row, column] = scale * (codes[row, column] - zero)
            error = (weight[row, column] - values[row, column]) / inverse[column, column]
            weight[row] -= error * inverse[column]
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return codes, values


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 64), (8, 128), (3, None)])
@pytest.mark.parametrize("orders_by_activation", [False, True])
def test_it_is_the_paper_s_update_column_by_column(
    bits: int, group_size: int | None, orders_by_activation: bool
) -> None:
    # More columns than a block has, and a last group that is short.
    weight, statistics = correlated_layer(1, num_outputs=3, num_inputs=144)
    order = None
    if orders_by_activation:
        order = sorted(range(144), key=lambda column: -float(statistics.squared_norms[column]))
    codes, values = column_by_column(
        weight.double().numpy(), statistics.gram.numpy(), bits=bits, size=group_size or 144, order=order
    )
    gptq = Gptq(orders_by_activation=orders_by_activation)
    packed = gptq.quantise_layer(weight, statistics, Grid(bits=bits, group_size=group_size))
    np.testing.assert_array_equal(packed.codes, codes)
    np.testing.assert_array_equal(packed.dequantised(), values)


def test_by_hand() -> None:
    """X^T X = [[2, 1], [1, 2]], and its inverse is [[2, -1], [-1, 2]] / 3.

    The grid of (1.2, -2.3) has steps of 0.5 from -2.5 to 1. The first becomes 1 and loses 0.2, so that the second
    moves by -0.2 / (2/3) * (-1/3) = 0.1, to -2.2, and becomes -2 in place of -2.5.
    """
    statistics = LayerStatistics.of_inputs(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    packed = Gptq(damping=0.0).quantise_layer(torch.tensor([[1.2, -2.3]]), statistics, Grid(bits=3))
    assert packed.dequantised().tolist() == [[1.0, -2.0]]
    # In the order of activations with a second input that is larger: -2.3 becomes -2.5, and 1.2 moves by
    # -0.2 / (2/7) * (-1/7) = 0.1, to 1.3, beyond the last code.
    larger = LayerStatistics.of_inputs(torch.tensor([[1.0, 0.0], [0.0, 3.0**0.5], [1.0, 1.0]]))
    packed = Gptq(damping=0.0, orders_by_activation=True).quantise_layer(
        torch.tensor([[1.2, -2.3]]), larger, Grid(bits=3)
    )
    assert packed.dequantised().tolist() == [[1.0, -2.5]]


def test_inputs_that_are_always_zero_leave_their_weights_to_rounding() -> None:
    weight, statistics = correlated_layer(2)
    inputs = torch.linalg.cholesky(statistics.gram, upper=True).clone()
    inputs[:, [3, 11]] = 0
    grid = Grid(bits=4, group_size=None)
    packed = Gptq().quantise_layer(weight, LayerStatistics.of_inputs(inputs), grid)
    np.testing.assert_array_equal(packed.codes[:, [3, 11]], round_to_nearest(weight, grid).codes[:, [3, 11]])
    nothing = LayerStatistics(torch.zeros(16, 16).double(), 5)
    np.testing.assert_array_equal(
        Gptq().quantise_layer(weight, nothing, grid).codes, round_to_nearest(weight, grid).codes
    )


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_it_loses_less_of_the_outputs_than_rounding(bits: int) -> None:
    for seed in range(4):
        weight, statistics = correlated_layer(seed, num_inputs=64)
        grid = Grid(bits=bits, group_size=32)
        rounded, *ours = (
            reconstruction_error(weight, torch.from_numpy(packed.dequantised()), statistics.gram)
            for packed in (
                round_to_nearest(weight, grid),
                Gptq().quantise_layer(weight, statistics, grid),
                Gptq(orders_by_activation=True).quantise_layer(weight, statistics, grid),
            )
        )
        assert max(ours) < rounded


def test_a_model_s_layers_are_quantised_in_order() -> None:
    ids = np.random.default_rng(0).integers(0, 50, (4, 12))
    ours, same = tiny_model(), tiny_model()
    grid = Grid(bits=3, group_size=None)
    packed = Gptq().quantise_linears(ours, ids, grid, skip=["mlp.up_proj"])
    expected = compress_linears(same, ids, lambda w, s: Gptq().quantise_layer(w, s, grid), skip=["mlp.up_proj"])
    assert packed.keys() == expected.keys() and len(packed) == 18
    for name, weight in packed.items():
        np.testing.assert_array_equal(weight.codes, expected[name].codes)
        np.testing.assert_array_equal(ours.get_submodule(name).weight.detach().numpy(), weight.dequantised())


def test_bad_input_is_one_clear_sentence() -> None:
    weight, _ = correlated_layer(0)
    for damping in (-1.0, float("nan")):
        with pytest.raises(InputError, match=f"damping is {damping}, expected 0 or more"):
            Gptq(damping=damping)
    singular = LayerStatistics(torch.ones(16, 16).double(), 5)
    with pytest.raises(InputError, match=r"cannot be inverted with a damping of 0.0"):
        Gptq(damping=0.0).quantise_layer(weight, singular, Grid())
    with pytest.raises(InputError, match="no calibration texts came, which gptq learns from"):
        Gptq().quantise_linears(tiny_model(), None, Grid())
