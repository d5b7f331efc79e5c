"""Codes, scales and zero points of a quantised weight, and how codes lie in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import InputError
from cotune.models import packed_weights
from cotune.models.packed_weights import PackedWeight, pack_codes, unpack_codes


def fields(**changed: Any) -> dict[str, Any]:
    """Of a weight of 2 outputs and 70 inputs in 3 groups, the last of 6."""
    rng = np.random.default_rng(0)
    return {
        "codes": rng.integers(0, 8, (2, 70), np.uint8),
        "scales": rng.random((2, 3), np.float32).astype(np.float16).astype(np.float32),
        "zeros": rng.integers(0, 8, (2, 3), np.uint8),
        "bits": 3,
        "group_size": 32,
        **changed,
    }


def test_a_weight_is_scale_times_code_less_zero() -> None:
    weight = PackedWeight(**fields())
    expected = [
        [
            weight.scales[o, i // 32] * (float(weight.codes[o, i]) - float(weight.zeros[o, i // 32]))
            for i in range(weight.shape[1])
        ]
        for o in range(weight.shape[0])
    ]
    found = weight.dequantised()
    assert found.dtype == np.float32
    # float16 has 11 bits and code less zero at most 9, so that the product in float32 is exact.
    np.testing.assert_array_equal(found, np.array(expected, np.float64))


def test_a_group_may_be_the_whole_row() -> None:
    weight = PackedWeight(
        codes=np.array([[0, 1, 255]], np.uint8),
        scales=np.array([[0.5]], np.float32),
        zeros=np.array([[128]], np.uint8),
        bits=8,
        group_size=3,
    )
    np.testing.assert_array_equal(weight.dequantised(), [[-64, -63.5, 63.5]])
    assert weight.is_symmetric
    assert not PackedWeight(**fields()).is_symmetric


@given(data=st.data(), bits=st.sampled_from([8, 4, 3]), rows=st.integers(1, 4), num=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_codes_are_what_was_packed_and_lie_where_it_says(data: st.DataObject, bits: int, rows: int, num: int) -> None:
    seed = data.draw(st.integers(0, 2**16))
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, num), np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (rows, (num * bits + 7) // 8)
    for o in range(rows):
        as_number = int.from_bytes(packed[o].tobytes(), "little")
        assert as_number == sum(int(code) << (i * bits) for i, code in enumerate(codes[o]))
    np.testing.assert_array_equal(unpack_codes(packed, bits, num), codes)


def test_large_weights_are_packed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.random.default_rng(0).integers(0, 8, (11, 21), np.uint8)
    at_once = pack_codes(codes, 3)
    monkeypatch.setattr(packed_weights, "_CODES_AT_A_TIME", 50)
    np.testing.assert_array_equal(pack_codes(codes, 3), at_once)
    np.testing.assert_array_equal(unpack_codes(at_once, 3, 21), codes)


def test_the_size_is_that_of_the_packed_arrays() -> None:
    weight = PackedWeight(**fields())
    arrays = [pack_codes(weight.codes, 3), weight.scales.astype(np.float16), pack_codes(weight.zeros, 3)]
    assert weight.size_bytes == sum(array.nbytes for array in arrays)
    symmetric = PackedWeight(**fields(zeros=np.full((2, 3), 4, np.uint8)))
    assert symmetric.size_bytes == sum(array.nbytes for array in arrays[:2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 5}, "bits are 5, expected one of 8, 4, 3"),
        ({"group_size": 16}, "group_size is 16, expected 32, 64 or 128"),
        ({"group_size": 128}, "at most the row's 70 numbers"),
        ({"codes": np.zeros((2, 0), np.uint8)}, "codes have shape"),
        ({"codes": np.zeros(70, np.uint8)}, "codes have shape"),
        ({"codes": np.zeros((2, 70), np.int8)}, "codes are int8"),
        ({"codes": np.full((2, 70), 8, np.uint8)}, "codes go up to 8, expected 0 to 7"),
        ({"zeros": np.full((2, 3), 9, np.uint8)}, "zeros go up to 9"),
        ({"zeros": np.zeros((2, 2), np.uint8)}, r"zeros are uint8 \(2, 2\), expected uint8 \(2, 3\)"),
        ({"scales": np.ones((2, 3))}, "scales are float64"),
        ({"scales": np.full((2, 3), 0.1, np.float32)}, "scales hold numbers that float16 does not"),
        ({"scales": np.full((2, 3), np.inf, np.float32)}, "scales hold numbers that float16 does not"),
        ({"scales": np.full((2, 3), np.nan, np.float32)}, "scales hold numbers that float16 does not"),
        ({"scales": np.full((2, 3), 1e6, np.float32)}, "scales hold numbers that float16 does not"),
    ],
)
def test_what_is_no_weight_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        PackedWeight(**fields(**changed))


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (np.zeros((1, 3), np.uint8), "expected uint8 rows of 2 bytes for 5 codes of 3 bits"),
        (np.zeros((1, 2), np.int8), "packed codes are int8"),
        (np.array([[0, 128]], np.uint8), "bits set behind the last code"),
    ],
)
def test_what_are_no_packed_codes_is_refused(packed: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        unpack_codes(packed, 3, 5)
