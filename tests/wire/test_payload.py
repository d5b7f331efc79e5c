"""The bounded reader by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotune.errors import FrameError
from cotune.wire.payload import PayloadReader, pack_u24, unpack_u24


def test_u24_by_hand() -> None:
    assert pack_u24(np.array([1, 0x010203, 2**24 - 1]), "x") == bytes([1, 0, 0, 3, 2, 1, 255, 255, 255])
    assert unpack_u24(b"").tolist() == []


@given(st.lists(st.integers(0, 2**24 - 1)))
def test_u24_round_trip(ids: list[int]) -> None:
    again = unpack_u24(pack_u24(np.array(ids, dtype=np.int64), "x"))
    assert again.dtype == np.int64
    assert again.tolist() == ids


def test_the_reader_never_takes_more_than_there_is() -> None:
    reader = PayloadReader(b"HEADabcdef", "test", offset=4)
    assert reader.take(2) == b"ab"
    with pytest.raises(FrameError, match="test frame is truncated: 5 more bytes expected, 4 came"):
        reader.take(5)
    with pytest.raises(FrameError, match="test frame has 4 trailing bytes"):
        reader.end()
    assert reader.rest() == b"cdef"
    reader.end()


def test_a_huge_count_allocates_nothing() -> None:
    with pytest.raises(FrameError, match="truncated"):
        PayloadReader(b"1234", "test").array("<f8", 2**60)


def test_finite_arrays_refuse_nan() -> None:
    data = np.array([1, np.inf], dtype="<f2").tobytes()
    with pytest.raises(FrameError, match="nan or infinite"):
        PayloadReader(data, "test").finite_array("<f2", 2)
