"""What was folded: the server has what devices have, layers may have none, and a round is its own."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.federation.folds import fold_arrays, folds_in, round_of
from cotune.federation.row_codes import RowCodes

A, B = "{}.lora_A.default.weight", "{}.lora_B.default.weight"
SHAPES = {A.format("q"): (4, 11), B.format("q"): (9, 4), A.format("v"): (4, 11), B.format("v"): (5, 4)}


def factors(layer: str, rank: int, num_out: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(rank)
    return {
        A.format(layer): rng.standard_normal((rank, 11)).astype(np.float32),
        B.format(layer): rng.standard_normal((num_out, rank)).astype(np.float32),
    }


@pytest.mark.parametrize("bits", [5, 32])
def test_what_is_read_is_what_was_folded_but_for_the_rounding(bits: int) -> None:
    codes = RowCodes(bits)
    first, second = factors("q", 2, 9), factors("q", 1, 9) | factors("v", 3, 5)
    arrays = fold_arrays(3, first, SHAPES, codes) | fold_arrays(12, second, SHAPES, codes)
    assert {round_of(name) for name in arrays} == {3, 12}
    found = folds_in(arrays | {"x": np.ones(1, np.float32)}, SHAPES, codes)
    assert list(found) == [3, 12]
    for own, told in ((first, found[3]), (second, found[12])):
        assert own.keys() == told.keys()
        for name, array in own.items():
            most = 0.0 if bits == 32 else np.abs(array).max() / 31
            assert np.abs(told[name] - array).max() <= 1.001 * most
    # A device of another rank has the same.
    narrow = {name: (1, n) if "lora_A" in name else (m, 1) for name, (m, n) in SHAPES.items()}
    again = folds_in(arrays, narrow, codes)
    assert all(np.array_equal(again[12][name], found[12][name]) for name in found[12])
    assert fold_arrays(1, {}, SHAPES, codes) == {}


def test_what_is_of_another_adapter_is_refused() -> None:
    arrays = fold_arrays(1, factors("q", 2, 9), SHAPES, RowCodes(5))
    with pytest.raises(InputError, match="round 1 folded is of 2 layers, expected 1"):
        folds_in(arrays, {name: one for name, one in SHAPES.items() if name.startswith("q")}, RowCodes(5))
    arrays["fold/000001/ranks"] = np.array([3, 0])
    with pytest.raises(InputError, match="codes is"):
        folds_in(arrays, SHAPES, RowCodes(5))
