"""Factors in a few bits: by hand, bounded, without bias and independent of what is sent; every direction for itself."""

from __future__ import annotations

import numpy as np
import pytest

from cotune.errors import InputError
from cotune.federation.arrays import num_bytes, shapes_of
from cotune.federation.row_codes import CODES, SCALES, RowCodes, dither_seed


def factors(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    strength = np.array([10.0, 1.0, 1e-4])
    a = rng.standard_normal((3, 40)) * strength[:, None]
    b = rng.standard_normal((50, 3)) * strength
    return {"q.lora_A.weight": a.astype(np.float32), "q.lora_B.weight": b.astype(np.float32)}


@pytest.mark.parametrize("bits", range(2, 9))
def test_each_direction_keeps_its_digits_whatever_the_others_are(bits: int) -> None:
    own, codes = factors(), RowCodes(bits)
    coded = codes.encode(own, 1)
    assert {name: array.shape for name, array in coded.items()} == codes.coded_shapes(shapes_of(own))
    assert coded[CODES].dtype == np.uint8 and num_bytes(coded) == -(-270 * bits // 8) + 6 * 4
    found = codes.decode({**coded, "fold/x": np.ones(2, np.float32)}, shapes_of(own), 1)
    for name, axis in (("q.lora_A.weight", 1), ("q.lora_B.weight", 0)):
        error, step = np.abs(found[name] - own[name]).max(axis=axis), np.abs(own[name]).max(axis=axis) * 2
        assert (error <= 0.5001 * step / (2**bits - 1)).all() and (error > 0).all()
        assert found[name].dtype == np.float32 and found[name].flags["C_CONTIGUOUS"]


def test_by_hand() -> None:
    """m = 7.5 and s = 1: what is decoded lies s / 2 around, on a grid that the dither moves."""
    codes, own = RowCodes(4), {"b": np.array([[7.5], [0.3], [-2.75]], np.float32)}
    coded = codes.encode(own, 3)
    assert coded[SCALES].tolist() == [1.0]
    grid = codes.decode(coded, {"b": (3, 1)}, 3)["b"][:, 0]
    other = codes.encode(own, 4)
    moved = codes.decode(other, {"b": (3, 1)}, 4)["b"][:, 0]
    assert np.abs(grid - own["b"][:, 0]).max() <= 0.5 and not np.array_equal(grid, moved)
    # Read with the dither of another message, it is off by both.
    assert np.abs(codes.decode(coded, {"b": (3, 1)}, 4)["b"][:, 0] - own["b"][:, 0]).max() > 0.2


def test_the_error_is_unbiased_uniform_and_says_nothing_of_what_was_sent() -> None:
    own, codes = {"b": np.array([[7.5], [0.3], [-2.75], [0.0], [0.49]], np.float32)}, RowCodes(4)
    draws = np.stack([codes.rounded(own, dither_seed(number, "down"))["b"][:, 0] for number in range(3000)])
    error = draws - own["b"][:, 0]
    assert np.abs(error.mean(0)).max() < 0.03
    # s^2 / 12 for every number, where rounding up or down at random gives f (1 - f) s^2.
    assert np.allclose(error.var(0), 1 / 12, rtol=0.1)
    assert np.abs(np.corrcoef(error.T) - np.eye(5)).max() < 0.1
    assert (codes.encode(own, 5)[CODES] == codes.encode(own, 5)[CODES]).all()


def test_nothing_stays_nothing_and_32_bits_stay_as_they_are() -> None:
    assert not RowCodes(5).rounded({"b": np.zeros((2, 3), np.float32)}, 1)["b"].any()
    own, plain = factors(), RowCodes(32)
    assert plain.encode(own, 1).keys() == own.keys() == plain.coded_shapes(shapes_of(own)).keys()
    assert all((plain.rounded(own, 1)[name] == own[name]).all() for name in own) and not plain.code_names


def test_what_is_no_adapter_of_these_shapes_is_refused() -> None:
    codes, own = RowCodes(5), factors()
    coded = codes.encode(own, 1)
    with pytest.raises(InputError, match="bits is 9, expected 2 to 8"):
        RowCodes(9)
    with pytest.raises(InputError, match=r"codes is \(169,\), expected \(152,\)"):
        codes.decode(coded, {**shapes_of(own), "q.lora_A.weight": (3, 31)}, 1)
    with pytest.raises(InputError, match="scales is nothing"):
        codes.decode({CODES: coded[CODES]}, shapes_of(own), 1)
    coded[CODES][-1] |= 128
    with pytest.raises(InputError, match="bits set behind the last code"):
        codes.decode(coded, shapes_of(own), 1)
