"""The int8 rule by hand, its error bound, its edges; the float codecs; bytes and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from cotune.errors import FrameError
from cotune.wire.codec import CODECS, TapCodec, dequantise, pack_taps, quantise, quantise_int4, unpack_taps

ANY_CODEC = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
NORMAL = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 0.001)
TAPS = arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 9)), elements=NORMAL)
ANY_FINITE = arrays(
    np.float32, array_shapes(max_dims=3), elements=st.floats(allow_nan=False, allow_infinity=False, width=32)
)


def test_three_values_by_hand() -> None:
    """absmax 254 gives scale 2; 3/2 = 1.5 and 1/2 = 0.5 round half to even."""
    codes, scales = quantise(np.array([254.0, -3.0, 1.0], dtype=np.float32))
    assert codes.tolist() == [127, -2, 0]
    assert scales == np.float16(2.0)
    assert dequantise(codes, scales).tolist() == [254.0, -4.0, 0.0]


def test_a_scale_that_rounds_down_clips_at_127() -> None:
    """absmax/127 = 2049 has no float16, 2048 is nearest: 260223/2048 = 127.06."""
    codes, scales = quantise(np.array([2049 * 127.0, -2049 * 127.0], dtype=np.float32))
    assert scales == np.float16(2048)
    assert codes.tolist() == [127, -127]


def test_zeros_and_underflow_become_zero() -> None:
    codes, scales = quantise(np.array([[0, 0], [1e-6, -1e-6], [1e-45, 0]], dtype=np.float32))
    assert not codes.any()
    assert not scales.any()


def test_overflow_saturates() -> None:
    codes, scales = quantise(np.array([3e38, -1e5, 0], dtype=np.float32))
    assert scales == np.float16(65504)
    assert codes.tolist() == [127, -2, 0]


@ANY_CODEC
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinities_are_refused(codec: TapCodec, bad: float) -> None:
    taps = np.array([[1.0, bad]], dtype=np.float32)
    for broken in (codec.encode, codec.round_trip):
        with pytest.raises(FrameError, match="nan or infinite"):
            broken(taps)


@given(ANY_FINITE)
def test_any_finite_values_quantise(values: np.ndarray) -> None:
    codes, scales = quantise(values)
    assert codes.shape == values.shape and codes.dtype == np.int8
    assert scales.shape == values.shape[:-1] and scales.dtype == np.float16
    assert codes.min() >= -127
    assert np.isfinite(scales).all() and (np.asarray(scales) >= 0).all()


@given(TAPS)
def test_the_error_is_at_most_half_a_step(taps: np.ndarray) -> None:
    """Half a step of rounding, and up to 0.0625 steps of clipping where float16 rounded the scale down."""
    codes, scales = quantise(taps)
    step = scales.astype(np.float32)[:, None]
    subnormal = 127 * 2.0**-24  # one unit in the last place of a subnormal scale
    assert (np.abs(dequantise(codes, scales) - taps) <= 0.57 * step + subnormal).all()


@given(TAPS)
def test_every_vector_is_quantised_by_itself(taps: np.ndarray) -> None:
    codes, scales = quantise(np.stack([taps, taps[::-1]]))
    for row, tap in enumerate(taps):
        alone, scale = quantise(tap)
        assert np.array_equal(codes[0, row], alone)
        assert scales[0, row] == scale
    assert np.array_equal(codes[1, ::-1], codes[0])


def test_layout_by_hand() -> None:
    codes = np.array([[1, -1], [127, 0]], dtype=np.int8)
    scales = np.array([1.0, 1.5], dtype=np.float16)
    assert pack_taps(codes, scales) == bytes.fromhex("003c 003e 01ff 7f00")


@ANY_CODEC
@given(taps=TAPS)
def test_decode_gives_what_round_trip_promises(codec: TapCodec, taps: np.ndarray) -> None:
    data = codec.encode(taps)
    assert len(data) == codec.num_bytes(*taps.shape)
    decoded = codec.decode(data, *taps.shape)
    assert decoded.dtype == np.float32
    assert np.array_equal(decoded, codec.round_trip(taps))
    assert np.array_equal(codec.round_trip(np.stack([taps, taps]))[1], decoded)


def test_sizes_and_names() -> None:
    assert {name: codec.num_bytes(33, 32) for name, codec in CODECS.items()} == {
        "int8": 1122,
        "int4": 594,
        "float16": 2112,
        "float32": 4224,
    }
    assert [codec.name for codec in CODECS.values()] == list(CODECS)


def test_float32_is_exact_and_float16_saturates() -> None:
    taps = np.array([[1e-40, 1e30], [0.1, -1e30]], dtype=np.float32)
    assert np.array_equal(CODECS["float32"].round_trip(taps), taps)
    assert CODECS["float16"].round_trip(taps)[:, 1].tolist() == [65504, -65504]


@ANY_CODEC
def test_wrong_lengths_are_refused(codec: TapCodec) -> None:
    data = codec.encode(np.ones((2, 3), dtype=np.float32))
    for wrong in (data[:-1], data + b"\0", b""):
        with pytest.raises(FrameError, match="for 2 taps of width 3"):
            codec.decode(wrong, 2, 3)


def test_what_quantise_never_gives_is_refused() -> None:
    one = np.ones((1, 2), dtype=np.int8)
    for scale in (-1, np.nan, np.inf):
        with pytest.raises(FrameError, match="negative, nan or infinite"):
            unpack_taps(pack_taps(one, np.array([scale], dtype=np.float16)), 1, 2)
    with pytest.raises(FrameError, match="the code -128"):
        unpack_taps(pack_taps(one * -128, np.ones(1, dtype=np.float16)), 1, 2)
    with pytest.raises(FrameError, match="nan or infinite"):
        CODECS["float16"].decode(np.array([np.nan], dtype="<f2").tobytes(), 1, 1)


def test_int4_by_hand() -> None:
    """absmax 14 gives scale 2; the codes are 7, -2 (half to even) and 1, as 15, 6, 9 and a filling 8."""
    taps = np.array([[14.0, -3.0, 2.0]], dtype=np.float32)
    codes, scales = quantise_int4(taps)
    assert codes.tolist() == [[7, -2, 1]] and scales == np.float16(2)
    data = CODECS["int4"].encode(taps)
    assert data == bytes.fromhex("0040 6f 89")
    assert CODECS["int4"].decode(data, 1, 3).tolist() == [[14.0, -4.0, 2.0]]
    for wrong in ("0040 60 89", "0040 6f 79"):  # a code of -8; another filling
        with pytest.raises(FrameError, match="half byte"):
            CODECS["int4"].decode(bytes.fromhex(wrong), 1, 3)


@given(TAPS)
def test_the_error_of_int4_is_at_most_half_a_step(taps: np.ndarray) -> None:
    codes, scales = quantise_int4(taps)
    step = scales.astype(np.float32)[:, None]
    assert np.abs(codes).max() <= 7
    assert (np.abs(dequantise(codes, scales) - taps) <= 0.51 * step + 7 * 2.0**-24).all()


@given(st.binary(max_size=64), st.integers(0, 4), st.integers(0, 9), st.sampled_from(sorted(CODECS)))
def test_any_bytes_decode_or_are_refused(data: bytes, num_taps: int, tap_dim: int, name: str) -> None:
    try:
        taps = CODECS[name].decode(data, num_taps, tap_dim)
    except FrameError:
        return
    assert taps.shape == (num_taps, tap_dim)
    assert np.isfinite(taps).all()


def test_unpacked_arrays_can_be_written() -> None:
    codes, scales = unpack_taps(CODECS["int8"].encode(np.ones((2, 3), dtype=np.float32)), 2, 3)
    codes[:], scales[:] = 0, 0
