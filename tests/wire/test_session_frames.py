"""What the frames of a generation refuse, when they are made and when they come."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cotune.errors import FrameError
from cotune.wire.frames import (
    AnswerCode,
    Correct,
    Draft,
    End,
    EndReason,
    Logits,
    ModeCode,
    Open,
    Opened,
    ScheduleCode,
    Step,
    Taps,
    Tokens,
    decode,
    encode,
)

HEADER = 16
OPEN = Open(
    mode=ModeCode.INTEGRATION,
    schedule=ScheduleCode.BLOCKING,
    answer=AnswerCode.TOKEN,
    prompt_ids=np.array([1]),
    max_new_tokens=5,
    gate_weights=np.array([1.0], dtype=np.float32),
)


def patched(data: bytes, offset: int, layout: str, value: object) -> bytes:
    """`data` with one payload field overwritten."""
    changed = bytearray(data)
    struct.pack_into("<" + layout, changed, HEADER + offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -0.1}, "expected 0 to 100"),
        ({"temperature": 100.1}, "expected 0 to 100"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"gate_threshold": float("inf")}, "gate_threshold is inf"),
        ({"gate_bias": float("-inf")}, "gate_bias is -inf"),
        ({"gate_layer": np.zeros((1, 3), np.float32)}, "gate_layer must be float16"),
        ({"gate_layer": np.zeros((2, 3), np.float16)}, r"gate_layer is \(2, 3\)"),
        ({"gate_layer": np.full((1, 2), np.inf, np.float16), "gate_layer_bias": np.zeros(1, np.float32)}, "infinite"),
        (
            {
                "gate_weights": np.zeros(65, np.float32),
                "gate_layer": np.zeros((65, 2), np.float16),
                "gate_layer_bias": np.zeros(65, np.float32),
            },
            "65 units, expected at most 64",
        ),
        ({"window": 0}, "window is 0"),
        ({"window": 2**16}, "out of range"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"seed": -1}, "out of range"),
        ({"seed": 2**64}, "out of range"),
        ({"prompt_ids": np.array([], dtype=np.int64)}, "prompt_ids is empty"),
        ({"prompt_ids": np.array([-1])}, "ids must be 0 to"),
        ({"prompt_ids": np.array([1.5])}, "ids must be integers"),
        ({"generated_ids": np.array([[1]])}, "ids must be integers"),
        ({"gate_weights": np.array([np.nan], dtype=np.float32)}, "gate weight is nan"),
        ({"gate_weights": np.array([1.0])}, "gate_weights must be float32"),
        ({"deadline_ms": -1}, "out of range"),
        ({"taps_from": 2**32}, "out of range"),
        ({"ticket": b"short"}, "a ticket of 5 bytes, expected 16"),
        ({"mode": 9}, "9 is no ModeCode; known are 1 integration, 2 separation, 3 ladder, 4 spa"),
        ({"prompt_ids": np.zeros(400_000, dtype=np.int64)}, "expected at most"),
    ],
)
def test_open_refuses_to_be_sent(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encode(replace(OPEN, **changes))


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, "B", 9, "no ModeCode"),
        (1, "B", 0, "no ScheduleCode"),
        (2, "B", 7, "no AnswerCode"),
        (3, "B", 9, "num_beams is 9"),
        (6, "H", 0, "window is 0"),
        (8, "I", 0, "max_new_tokens is 0"),
        (20, "d", float("nan"), "temperature is nan"),
        (20, "d", 1e9, "temperature is"),
        (28, "d", 0.0, "top_p is 0.0"),
        (36, "d", float("inf"), "gate_threshold is inf"),
        (44, "d", float("nan"), "gate_bias is nan"),
        (76, "I", 2**32 - 1, "truncated"),
        (80, "I", 2**31, "truncated"),
        (84, "I", 2**30, "truncated"),
        (88, "d", float("nan"), "length_penalty is nan"),
        (88, "d", -11.0, "length_penalty is -11"),
        (96, "I", 1, "truncated"),
        (104, "f", float("nan"), "gate weight is nan"),
    ],
)
def test_open_refuses_what_comes(offset: int, layout: str, value: object, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        decode(patched(encode(OPEN), offset, layout, value))


def test_open_without_a_prompt_is_refused() -> None:
    data = patched(encode(replace(OPEN, gate_weights=np.empty(0, np.float32))), 76, "I", 0)
    with pytest.raises(FrameError, match="prompt_ids is empty"):
        decode(data[:-4])


def step(ids: list[int], logits: list[float], log_normalizer: float | None = None) -> Step:
    return Step(
        base_token=0,
        ids=np.array(ids, dtype=np.int64),
        logits=np.array(logits, dtype=np.float32),
        log_normalizer=log_normalizer,
    )


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (step([2, 1], [0, 0]), "ascending"),
        (step([1, 1], [0, 0]), "ascending"),
        (step([1, 2], [0]), "2 ids but 1 logits"),
        (step([1], [float("nan")]), "nan or"),
        (step([1], [float("inf")]), "nan or"),
        (step([2**24], [0]), "ids must be 0 to 16777215"),
        (step([], [], float("nan")), "log_normalizer is nan"),
        (step(list(range(2**16)), [0.0] * 2**16), "out of range"),
    ],
)
def test_step_refuses_to_be_sent(frame: Step, message: str) -> None:
    with pytest.raises(FrameError, match=message):
        encode(frame)


def test_step_refuses_what_comes() -> None:
    data = encode(step([1, 2], [0, 0], 1.0))
    for offset, layout, value, message in [
        (0, "H", 3, "ascending"),  # the third id would be zero
        (0, "H", 60_000, "truncated"),
        (2, "B", 2, "ascending"),
        (8, "f", float("nan"), "a logit is nan"),
        (16, "d", float("inf"), "log_normalizer is inf"),
    ]:
        with pytest.raises(FrameError, match=message):
            decode(patched(data, offset, layout, value))


def test_ruled_out_tokens_may_have_minus_infinity() -> None:
    frame = step([1, 2], [float("-inf"), 0])
    assert decode(encode(frame)) == frame


def test_correct_refuses_what_would_break_exact_sums() -> None:
    good = Correct(codes=np.array([-127, 127], dtype=np.int8), scale=np.float16(1))
    assert decode(encode(good)) == good
    for changes, message in [
        ({"codes": np.array([-128], dtype=np.int8)}, "a code is -128"),
        ({"codes": np.empty(0, np.int8)}, "0 codes, expected 1 to 4096"),
        ({"codes": np.zeros(4097, np.int8)}, "4097 codes"),
        ({"codes": np.zeros(2, np.int16)}, "codes must be int8"),
        ({"scale": np.float16(-1)}, "scale is -1"),
        ({"scale": np.float16("nan")}, "scale is nan"),
    ]:
        with pytest.raises(FrameError, match=message):
            encode(replace(good, **changes))
    for offset, layout, value, message in [(0, "e", -1.0, "scale is -1"), (2, "b", -128, "code is -128")]:
        with pytest.raises(FrameError, match=message):
            decode(patched(encode(good), offset, layout, value))


def test_logits_refuse_more_than_a_vocabulary() -> None:
    header = struct.pack("<BBHIII", 9, 0, 0, 0, 0, 2**32 - 1)
    with pytest.raises(FrameError, match="4294967295 logits, expected at most 262144"):
        decode(header + bytes(100))
    count = 262_145
    with pytest.raises(FrameError, match="262145 logits"):
        encode(Logits(ids=np.arange(count), logits=np.zeros(count, np.float32), log_normalizer=0.0))


def test_tokens_refuse_unequal_lengths_and_unknown_flags() -> None:
    no = np.array([False])
    good = Tokens(tokens=np.array([7]), consulted=np.array([True]), changed=no, late=no)
    for name in ("consulted", "changed", "late"):
        with pytest.raises(FrameError, match=f"1 tokens, .*2 {name}.*, expected as many of each"):
            encode(replace(good, **{name: np.array([True, False])}))
    with pytest.raises(FrameError, match="late must be bool"):
        encode(replace(good, late=np.array([0])))
    with pytest.raises(FrameError, match="unknown flags"):
        decode(patched(encode(good), 4, "B", 8))
    with pytest.raises(FrameError, match="truncated"):
        decode(struct.pack("<BBHIII", 11, 0, 0, 0, 0, 2**32 - 1) + bytes(10))


def test_an_assumed_token_is_a_whole_token() -> None:
    for token in (-1, 2**32):
        with pytest.raises(FrameError, match="out of range"):
            encode(Step(base_token=0, assumed_token=token))
    with pytest.raises(FrameError, match="truncated"):
        decode(struct.pack("<BBHIII", 5, 8, 0, 0, 0, 0) + bytes(3))


def test_taps_are_as_long_at_every_position() -> None:
    with pytest.raises(FrameError, match="5 bytes for 2 positions"):
        encode(Taps(num_positions=2, taps=b"abcde"))
    for value in (0, 2, 2**32 - 1):
        with pytest.raises(FrameError, match=f"5 bytes for {value} positions"):
            decode(struct.pack("<BBHIII", 20, 0, 0, 0, 0, value) + b"abcde")


def test_drafts_hold_token_ids() -> None:
    with pytest.raises(FrameError, match="ids must be 0 to"):
        encode(Draft(tokens=np.array([-1])))
    with pytest.raises(FrameError, match="truncated"):
        decode(struct.pack("<BBHIII", 19, 0, 0, 0, 0, 3) + bytes(8))


def test_opened_needs_a_whole_ticket() -> None:
    with pytest.raises(FrameError, match="ticket of 3 bytes"):
        encode(Opened(ticket=b"abc"))


def test_end_refuses_large_or_strange_counters() -> None:
    with pytest.raises(FrameError, match="expected at most 16384"):
        encode(End(reason=EndReason.LENGTH, counters={"text": "x" * 20_000}))
    for counters in ({"a": float("nan")}, {"a": b"bytes"}, {"a": {1, 2}}):
        with pytest.raises(FrameError, match="cannot be written as JSON"):
            encode(End(reason=EndReason.LENGTH, counters=counters))
    with pytest.raises(FrameError, match="99 is no EndReason"):
        decode(struct.pack("<BBHIII", 13, 0, 0, 0, 0, 99) + b"{}")
