"""Byte layouts of the beam frames worked out by hand, and what they refuse. Round trips are in `test_frames.py`."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cotune.errors import FrameError
from cotune.wire.frames import (
    HEADER_BYTES,
    LAYOUTS,
    MAX_BEAM_TOKENS,
    BeamCorrect,
    BeamStep,
    BeamTokens,
    Frame,
    decode,
    encode,
)

STEP = BeamStep(pos=5, parents=(0, 1, 0), tokens=(258, 2, 3), consult=(True, False, True), taps=(b"ab", b"cd"))
CORRECT = BeamCorrect(
    pos=5,
    beams=(0, 2),
    parents=(0, 1),
    codes=np.array([[1, -1], [2, 127]], np.int8),
    scales=np.array([1.0, 0.5], np.float16),
)
TEXT = BeamTokens(
    pos=5,
    rank=1,
    num_texts=2,
    score=-0.5,
    log_prob=-1.0,
    tokens=np.array([258, 3]),
    base_tokens=np.array([1, 3]),
    consulted=np.array([True, False]),
)


def head(number: int, value: int) -> bytes:
    return bytes([number, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, value, 0, 0, 0])


def test_layouts_by_hand() -> None:
    rows = bytes([0, 1, 2, 1, 0, 0, 1, 0, 2, 0, 0, 0, 0, 1, 3, 0, 0, 0])
    assert encode(STEP) == head(21, 3) + rows + b"abcd"
    where = bytes([0, 0, 2, 1])
    assert encode(CORRECT) == head(22, 2) + where + bytes([0x00, 0x3C, 1, 255, 0x00, 0x38, 2, 127])
    decisions = bytes([2, 1, 0, 0, 1, 0, 0, 0, 1, 3, 0, 0, 0, 3, 0, 0, 0, 0])
    assert encode(TEXT) == head(23, 2) + bytes([1, 2]) + struct.pack("<dd", -0.5, -1.0) + decisions
    for frame in (STEP, CORRECT, TEXT):
        assert decode(encode(frame)) == frame


@pytest.mark.parametrize(
    ("frame", "changes", "message"),
    [
        (STEP, {"parents": (0, 1)}, "2 parents, 3 tokens and 3 consults"),
        (STEP, {"parents": (), "tokens": (), "consult": (), "taps": ()}, "0 beams, expected 1 to 8"),
        (STEP, {"parents": (0,) * 9, "tokens": (1,) * 9, "consult": (False,) * 9, "taps": ()}, "9 beams"),
        (STEP, {"parents": (0, 8, 0)}, "a parent is out of range"),
        (STEP, {"parents": (0, -1, 0)}, "a parent is out of range"),
        (STEP, {"tokens": (1, 2, 2**32)}, "ids must be 0 to"),
        (STEP, {"taps": (b"ab",)}, "for 2 beams that consult"),
        (STEP, {"taps": (b"ab", b"c")}, "for 2 beams that consult"),
        (STEP, {"taps": (b"", b"")}, "for 2 beams that consult"),
        (CORRECT, {"beams": (2, 0)}, "expected them in ascending order"),
        (CORRECT, {"beams": (1, 1)}, "expected them in ascending order"),
        (CORRECT, {"beams": (1, 8)}, "a beam is out of range"),
        (CORRECT, {"parents": (1, 8)}, "a parent is out of range"),
        (CORRECT, {"parents": (1,)}, "expected as many of each"),
        (CORRECT, {"codes": np.zeros((2, 0), np.int8)}, "0 codes, expected 1 to 4096"),
        (CORRECT, {"codes": np.full((2, 3), -128, np.int8)}, "expected -127 to 127"),
        (CORRECT, {"scales": np.array([1.0, -1.0], np.float16)}, "a scale is negative"),
        (CORRECT, {"scales": np.array([1.0, np.inf], np.float16)}, "a scale is negative, nan or infinite"),
        (TEXT, {"rank": 2}, "rank is 2, expected 0 to 1"),
        (TEXT, {"num_texts": 9}, "9 texts, expected 1 to 8"),
        (TEXT, {"score": float("nan")}, "score is nan"),
        (TEXT, {"log_prob": float("-inf")}, "log_prob is -inf"),
        (TEXT, {"consulted": np.array([True])}, "expected as many of each"),
        (TEXT, {name: np.zeros(0, np.int64) for name in ("tokens", "base_tokens", "consulted")}, "0 tokens"),
    ],
)
def test_what_is_not_sent(frame: Frame, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encode(replace(frame, **changes))


@pytest.mark.parametrize(
    ("frame", "offset", "value", "message"),
    [
        (STEP, 12, 0, "0 beams"),
        (STEP, 12, 9, "9 beams"),
        (STEP, 12, 4, "truncated"),
        (STEP, HEADER_BYTES, 8, "a parent is out of range"),
        (STEP, HEADER_BYTES + 1, 2, "a consult is neither 0 nor 1"),
        (CORRECT, 12, 0, "0 corrections"),
        (CORRECT, 12, 200, "200 corrections"),
        (CORRECT, HEADER_BYTES, 3, "ascending"),
        (CORRECT, HEADER_BYTES + 3, 8, "a parent is out of range"),
        (CORRECT, HEADER_BYTES + 6, 128, "-128"),
        (CORRECT, HEADER_BYTES + 5, 0xFC, "a scale is negative"),
        (TEXT, 12, 0, "0 tokens"),
        (TEXT, 15, 1, "tokens, expected 1 to 65536"),
        (TEXT, HEADER_BYTES, 2, "rank is 2"),
        (TEXT, HEADER_BYTES + 1, 0, "0 texts"),
        (TEXT, HEADER_BYTES + 26, 2, "a consulted is neither 0 nor 1"),
    ],
)
def test_what_comes_and_is_refused(frame: Frame, offset: int, value: int, message: str) -> None:
    data = bytearray(encode(frame))
    data[offset] = value
    with pytest.raises(FrameError, match=message):
        decode(bytes(data))


def test_every_cut_is_refused() -> None:
    """But for one: two beams' taps may all lose a byte, and two corrections their last code."""
    for frame, fits in ((STEP, 2), (CORRECT, 2), (TEXT, 0)):
        data = encode(frame)
        for end in range(len(data)):
            if fits and end == len(data) - fits:
                continue
            with pytest.raises(FrameError):
                decode(data[:end])


def test_sizes_are_limited_before_anything_is_read() -> None:
    widest = BeamCorrect(
        beams=tuple(range(8)),
        parents=(7,) * 8,
        codes=np.ones((8, 4096), np.int8),
        scales=np.ones(8, np.float16),
    )
    assert len(encode(widest)) == HEADER_BYTES + LAYOUTS[22].max_payload_bytes
    longest = replace(
        TEXT,
        **{
            name: np.ones(MAX_BEAM_TOKENS, kind)
            for name, kind in zip(("tokens", "base_tokens", "consulted"), (np.int64, np.int64, np.bool_), strict=True)
        },
    )
    assert len(encode(longest)) == HEADER_BYTES + LAYOUTS[23].max_payload_bytes
    for number in (21, 22, 23):
        with pytest.raises(FrameError, match="expected at most"):
            decode(bytes([number]) + bytes(HEADER_BYTES + LAYOUTS[number].max_payload_bytes))
