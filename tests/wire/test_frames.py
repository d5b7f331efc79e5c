"""Byte layouts worked out by hand, round trips of any frame, and decoding of any bytes."""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cotune.errors import FrameError
from cotune.wire.frames import (
    HEADER_BYTES,
    LAYOUTS,
    MAX_DRAFT_TOKENS,
    MAX_FRAME_BYTES,
    MAX_VOCAB_SIZE,
    Ack,
    AnswerCode,
    Asset,
    AssetKind,
    AssetRequest,
    BeamCorrect,
    BeamStep,
    BeamTokens,
    Close,
    Correct,
    Draft,
    End,
    EndReason,
    Error,
    ErrorCode,
    Features,
    FeaturesRequest,
    Frame,
    Hello,
    Logits,
    ModeCode,
    More,
    Object,
    Open,
    Opened,
    ScheduleCode,
    Step,
    Taps,
    Tokens,
    Welcome,
    decode,
    encode,
    kind_of,
)

U16, U24, U32 = st.integers(0, 2**16 - 1), st.integers(0, 2**24 - 1), st.integers(0, 2**32 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | U32 | FINITE | st.text(max_size=9) | st.lists(U16), max_size=4
)
LOGIT = st.floats(-1e6, 1e6, width=32) | st.just(-math.inf)


def ids(element: st.SearchStrategy[int] = U32, min_size: int = 0) -> st.SearchStrategy[np.ndarray]:
    return st.lists(element, min_size=min_size, max_size=20).map(lambda values: np.array(values, dtype=np.int64))


ASCENDING = st.sets(U24, max_size=20).map(lambda values: np.array(sorted(values), dtype=np.int64))


def floats(size: int, element: st.SearchStrategy[float] = LOGIT) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.float32, size, elements=element)


def flags(size: int) -> st.SearchStrategy[np.ndarray]:
    return arrays(np.bool_, size)


@st.composite
def place(draw: st.DrawFn) -> dict[str, int]:
    return {"epoch": draw(U16), "session": draw(U32), "pos": draw(U32)}


@st.composite
def gates(draw: st.DrawFn) -> dict[str, Any]:
    """None, a linear one, or one with a hidden layer."""
    num_weights = draw(st.integers(0, 9))
    weights = draw(floats(num_weights, st.floats(-9, 9, width=32)))
    if num_weights == 0 or draw(st.booleans()):
        return {"gate_weights": weights}
    num_inputs = draw(st.integers(1, 5))
    layer = draw(floats(num_weights * num_inputs, st.floats(-9, 9, width=16))).astype(np.float16)
    bias = draw(floats(num_weights, st.floats(-9, 9, width=32)))
    return {
        "gate_weights": weights,
        "gate_layer": layer.reshape(num_weights, num_inputs),
        "gate_layer_bias": bias,
    }


@st.composite
def opens(draw: st.DrawFn) -> Open:
    return Open(
        **draw(place()),
        resume=draw(st.booleans()),
        mode=draw(st.sampled_from(ModeCode)),
        schedule=draw(st.sampled_from(ScheduleCode)),
        answer=draw(st.sampled_from(AnswerCode)),
        top_k=draw(U16),
        window=draw(st.integers(1, 2**16 - 1)),
        max_new_tokens=draw(st.integers(1, 2**32 - 1)),
        seed=draw(st.integers(0, 2**64 - 1)),
        temperature=draw(st.floats(0, 100)),
        top_p=draw(st.floats(0, 1, exclude_min=True)),
        gate_threshold=draw(FINITE),
        gate_bias=draw(FINITE),
        ticket=draw(st.binary(min_size=16, max_size=16)),
        deadline_ms=draw(U32),
        taps_from=draw(U32),
        num_beams=draw(st.integers(0, 8)),
        length_penalty=draw(st.floats(-10, 10)),
        prompt_ids=draw(ids(min_size=1)),
        generated_ids=draw(ids()),
        **draw(gates()),
    )


@st.composite
def steps(draw: st.DrawFn) -> Step:
    top = draw(ASCENDING)
    return Step(
        **draw(place()),
        base_token=draw(U32),
        consult=draw(st.booleans()),
        provisional_end=draw(st.booleans()),
        ids=top,
        logits=draw(floats(len(top))),
        log_normalizer=draw(st.none() | FINITE),
        taps=draw(st.binary(max_size=40)),
        assumed_token=draw(st.none() | U32),
    )


@st.composite
def logits_frames(draw: st.DrawFn) -> Logits:
    top = draw(ASCENDING)
    return Logits(**draw(place()), ids=top, logits=draw(floats(len(top))), log_normalizer=draw(FINITE))


@st.composite
def tokens_frames(draw: st.DrawFn) -> Tokens:
    tokens = draw(ids())
    n = len(tokens)
    return Tokens(**draw(place()), tokens=tokens, consulted=draw(flags(n)), changed=draw(flags(n)), late=draw(flags(n)))


@st.composite
def taps_frames(draw: st.DrawFn) -> Taps:
    num_positions, size = draw(st.integers(1, 9)), draw(st.integers(0, 9))
    taps = draw(st.binary(min_size=num_positions * size, max_size=num_positions * size))
    return Taps(**draw(place()), num_positions=num_positions, taps=taps)


BEAM_ID = st.integers(0, 7)


@st.composite
def beam_steps(draw: st.DrawFn) -> BeamStep:
    rows = draw(st.lists(st.tuples(BEAM_ID, U32, st.booleans()), min_size=1, max_size=8))
    parents, tokens, consult = zip(*rows, strict=True)
    size = draw(st.integers(1, 9))
    taps = tuple(draw(st.binary(min_size=size, max_size=size)) for _ in range(sum(consult)))
    return BeamStep(**draw(place()), parents=parents, tokens=tokens, consult=consult, taps=taps)


@st.composite
def beam_corrections(draw: st.DrawFn) -> BeamCorrect:
    beams = sorted(draw(st.sets(BEAM_ID, min_size=1)))
    n = len(beams)
    return BeamCorrect(
        **draw(place()),
        beams=tuple(beams),
        parents=tuple(draw(st.lists(BEAM_ID, min_size=n, max_size=n))),
        codes=draw(arrays(np.int8, (n, draw(st.integers(1, 9))), elements=st.integers(-127, 127))),
        scales=draw(arrays(np.float16, n, elements=st.floats(0, 65504, width=16))),
    )


@st.composite
def beam_tokens(draw: st.DrawFn) -> BeamTokens:
    tokens, num_texts = draw(ids(min_size=1)), draw(st.integers(1, 8))
    n = len(tokens)
    return BeamTokens(
        **draw(place()),
        rank=draw(st.integers(0, num_texts - 1)),
        num_texts=num_texts,
        score=draw(FINITE),
        log_prob=draw(FINITE),
        tokens=tokens,
        base_tokens=draw(arrays(np.int64, n, elements=st.integers(0, 2**32 - 1))),
        consulted=draw(flags(n)),
    )


@st.composite
def corrections(draw: st.DrawFn) -> Correct:
    codes = draw(arrays(np.int8, st.integers(1, 64), elements=st.integers(-127, 127)))
    return Correct(**draw(place()), codes=codes, scale=np.float16(draw(st.floats(0, 65504, width=16))))


@st.composite
def requests(draw: st.DrawFn) -> FeaturesRequest:
    tokens = draw(ids(min_size=2))
    return FeaturesRequest(
        session=draw(U32),
        pos=draw(st.integers(1, len(tokens) - 1)),
        input_ids=tokens,
        top_k=draw(U32),
        want_hidden=draw(st.booleans()),
    )


@st.composite
def assets(draw: st.DrawFn) -> Asset:
    chunk, pos, more = draw(st.binary(max_size=40)), draw(U16), draw(U16)
    return Asset(pos=pos, chunk=chunk, total_bytes=pos + len(chunk) + more)


def built(frame: type[Frame], **fields: st.SearchStrategy[object]) -> st.SearchStrategy[Frame]:
    return st.builds(lambda where, **values: frame(**where, **values), place(), **fields)


STRATEGIES: dict[type[Frame], st.SearchStrategy[Frame]] = {
    Hello: built(Hello, version=U32, info=JSON),
    Welcome: built(Welcome, version=U32, info=JSON),
    Open: opens(),
    Opened: built(Opened, ticket=st.binary(min_size=16, max_size=16)),
    Step: steps(),
    Ack: built(Ack),
    Object: built(Object, token=U32),
    More: built(More, num_wanted=U32),
    Logits: logits_frames(),
    Correct: corrections(),
    Tokens: tokens_frames(),
    Close: built(Close, reason=st.sampled_from(EndReason)),
    End: built(End, reason=st.sampled_from(EndReason), counters=JSON),
    Error: built(Error, code=st.sampled_from(ErrorCode), message=st.text(max_size=200)),
    FeaturesRequest: requests(),
    Features: built(Features, num_targets=U32, packed=st.binary(max_size=40)),
    AssetRequest: built(AssetRequest, kind=st.sampled_from(AssetKind)),
    Asset: assets(),
    Draft: built(Draft, tokens=ids(min_size=1)),
    Taps: taps_frames(),
    BeamStep: beam_steps(),
    BeamCorrect: beam_corrections(),
    BeamTokens: beam_tokens(),
}
ANY_FRAME = st.one_of(*STRATEGIES.values())


def test_every_frame_type_is_tested() -> None:
    assert [layout.frame for layout in LAYOUTS.values()] == list(STRATEGIES)


def test_ack_is_a_bare_header() -> None:
    data = encode(Ack(epoch=0x0102, session=0x03040506, pos=0x0708090A))
    assert data == bytes([6, 0, 0x02, 0x01, 0x06, 0x05, 0x04, 0x03, 0x0A, 0x09, 0x08, 0x07, 0, 0, 0, 0])


def test_object_carries_its_token_as_value() -> None:
    assert encode(Object(pos=1, token=258)) == bytes([7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 1, 0, 0])


def test_step_layout_by_hand() -> None:
    step = Step(
        base_token=9,
        provisional_end=True,
        ids=np.array([5, 0x010203]),
        logits=np.array([1.0, -2.0], dtype=np.float32),
        log_normalizer=0.5,
        taps=b"\xaa\xbb",
    )
    by_hand = bytes([5, 0b111]) + bytes(10) + bytes([9, 0, 0, 0])
    by_hand += bytes([2, 0]) + bytes([5, 0, 0, 3, 2, 1])  # count, ids of 3 bytes
    by_hand += bytes.fromhex("0000803f 000000c0")  # 1.0 and -2.0 as float32
    by_hand += bytes.fromhex("000000000000e03f") + b"\xaa\xbb"  # 0.5 as float64, taps
    assert encode(step) == by_hand
    assert encode(Step(base_token=0, consult=False))[1] == 0


def test_step_with_an_assumed_token_by_hand() -> None:
    step = Step(base_token=9, assumed_token=258)
    assert encode(step) == bytes([5, 0b1001]) + bytes(10) + bytes([9, 0, 0, 0]) + bytes([2, 1, 0, 0]) + bytes(2)
    assert step.running_token == 258
    assert Step(base_token=9).running_token == 9
    assert Step(base_token=9, assumed_token=0).running_token == 0


def test_draft_layout_by_hand() -> None:
    frame = Draft(pos=5, tokens=np.array([1, 256]))
    by_hand = bytes([19]) + bytes(7) + bytes([5, 0, 0, 0]) + bytes([2, 0, 0, 0])
    assert encode(frame) == by_hand + bytes([1, 0, 0, 0]) + bytes([0, 1, 0, 0])


def test_taps_layout_by_hand() -> None:
    frame = Taps(pos=3, num_positions=2, taps=b"abcd")
    assert encode(frame) == bytes([20]) + bytes(7) + bytes([3, 0, 0, 0]) + bytes([2, 0, 0, 0]) + b"abcd"


def test_a_busy_cloud_says_when_to_come_back() -> None:
    data = encode(Error(code=ErrorCode.BUSY, message="full", pos=1500))
    assert data == bytes([14]) + bytes(7) + bytes([0xDC, 5, 0, 0]) + bytes([4, 0, 0, 0]) + b"full"
    again = decode(data)
    assert isinstance(again, Error)
    assert again.pos == 1500


def test_drafts_are_bounded_before_they_are_read() -> None:
    longest = Draft(tokens=np.arange(MAX_DRAFT_TOKENS))
    assert decode(encode(longest)) == longest
    for count in (0, MAX_DRAFT_TOKENS + 1):
        with pytest.raises(FrameError, match=f"{count} tokens, expected 1 to {MAX_DRAFT_TOKENS}"):
            encode(Draft(tokens=np.zeros(count, np.int64)))
        with pytest.raises(FrameError, match=f"{count} tokens, expected 1 to {MAX_DRAFT_TOKENS}"):
            decode(struct.pack("<BBHIII", 19, 0, 0, 0, 0, count))


def test_step_of_33_taps_and_32_logits_fits_one_packet() -> None:
    step = Step(base_token=1, ids=np.arange(32), logits=np.zeros(32, np.float32), taps=bytes(33 * (32 + 2)))
    assert len(encode(step)) == 16 + 2 + 32 * 7 + 1122 == 1364


def test_correct_layout_by_hand() -> None:
    frame = Correct(pos=2, codes=np.array([1, -1], dtype=np.int8), scale=np.float16(1.5))
    assert encode(frame) == bytes([10]) + bytes(7) + bytes([2]) + bytes(7) + bytes.fromhex("003e 01 ff")


def test_tokens_layout_by_hand() -> None:
    frame = Tokens(
        tokens=np.array([1, 256, 2]),
        consulted=np.array([True, True, True]),
        changed=np.array([False, True, False]),
        late=np.array([False, False, True]),
    )
    rows = bytes([1, 0, 0, 0, 1]) + bytes([0, 1, 0, 0, 3]) + bytes([2, 0, 0, 0, 5])
    assert encode(frame)[12:] == bytes([3, 0, 0, 0]) + rows


def test_open_layout_by_hand() -> None:
    frame = Open(
        mode=ModeCode.SPA,
        schedule=ScheduleCode.OPTIMISTIC,
        answer=AnswerCode.CORRECTION,
        resume=True,
        top_k=32,
        window=4,
        max_new_tokens=100,
        seed=7,
        temperature=0.5,
        top_p=1.0,
        gate_threshold=2.0,
        gate_bias=-1.0,
        ticket=b"0123456789abcdef",
        deadline_ms=250,
        taps_from=3,
        prompt_ids=np.array([3]),
        generated_ids=np.array([4]),
        gate_weights=np.array([1.0], dtype=np.float32),
        gate_layer=np.array([[0.5, -2.0]], dtype=np.float16),
        gate_layer_bias=np.array([0.25], dtype=np.float32),
    )
    by_hand = bytes([4, 3, 2, 0, 32, 0, 4, 0, 100, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0])
    by_hand += struct.pack("<4d", 0.5, 1.0, 2.0, -1.0) + b"0123456789abcdef"
    by_hand += bytes([250, 0, 0, 0, 3, 0, 0, 0]) + bytes([1, 0, 0, 0] * 3) + struct.pack("<dI", 1.0, 2)
    by_hand += bytes([3, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0x80, 0x3F])
    by_hand += struct.pack("<2ef", 0.5, -2.0, 0.25)
    assert encode(frame) == bytes([3, 1]) + bytes(14) + by_hand


@given(ANY_FRAME)
@settings(deadline=None)
def test_round_trip(frame: Frame) -> None:
    data = encode(frame)
    again = decode(data)
    assert type(again) is type(frame)
    assert again == frame and hash(again) == hash(frame)
    assert encode(again) == data
    assert decode(memoryview(bytearray(data))) == frame
    assert len(data) <= MAX_FRAME_BYTES
    assert kind_of(data) in {layout.name for layout in LAYOUTS.values()}


def assert_decodes_or_refuses(data: bytes) -> None:
    """Nothing but FrameError comes out, with one sentence; what decodes is well-formed enough to encode."""
    try:
        frame = decode(data)
    except FrameError as error:
        assert str(error) and "\n" not in str(error)
        return
    encode(frame)


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_never_raise_anything_else(data: bytes) -> None:
    assert_decodes_or_refuses(data)


@given(st.integers(1, len(LAYOUTS)), st.binary(max_size=11), U32, st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_payloads_never_raise_anything_else(number: int, place: bytes, value: int, payload: bytes) -> None:
    header = bytes([number, 0]) + place.ljust(10, b"\0")[:10] + struct.pack("<I", value)
    assert_decodes_or_refuses(header + payload)


@given(ANY_FRAME, st.data())
@settings(max_examples=500, deadline=None)
def test_mutated_frames_never_raise_anything_else(frame: Frame, data: st.DataObject) -> None:
    mutated = bytearray(encode(frame))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 1))] = data.draw(st.integers(0, 255))
    assert_decodes_or_refuses(bytes(mutated))


# The payload of these may end anywhere.
OPEN_ENDED = (Step, Error, Features, FeaturesRequest, Asset, Correct, Taps, BeamStep, BeamCorrect)


@given(ANY_FRAME, st.data())
@settings(deadline=None)
def test_truncated_frames_are_refused_where_a_length_is_known(frame: Frame, data: st.DataObject) -> None:
    whole = encode(frame)
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert_decodes_or_refuses(cut)
    if len(cut) < HEADER_BYTES or not isinstance(frame, OPEN_ENDED):
        with pytest.raises(FrameError):
            decode(cut)


FIXED_LENGTH = [kind for kind in STRATEGIES if kind not in OPEN_ENDED]


@pytest.mark.parametrize("kind", FIXED_LENGTH, ids=lambda kind: kind.__name__)
@given(data=st.data(), tail=st.binary(min_size=1, max_size=5).filter(lambda tail: tail.strip(b" \t\r\n") != b""))
@settings(max_examples=10, deadline=None)
def test_trailing_bytes_are_refused(kind: type[Frame], data: st.DataObject, tail: bytes) -> None:
    with pytest.raises(FrameError):
        decode(encode(data.draw(STRATEGIES[kind])) + tail)


@pytest.mark.parametrize("number", LAYOUTS, ids=lambda number: LAYOUTS[number].name)
def test_oversized_and_flagged_frames_are_refused_by_their_type(number: int) -> None:
    layout = LAYOUTS[number]
    header = struct.pack("<BBHIII", number, 0, 0, 0, 0, 0)
    if len(header) + layout.max_payload_bytes < MAX_FRAME_BYTES:
        with pytest.raises(FrameError, match="expected at most"):
            decode(header + bytes(layout.max_payload_bytes + 1))
    with pytest.raises(FrameError, match="flags 0x80 are unknown"):
        decode(struct.pack("<BBHIII", number, 0x80, 0, 0, 0, 0))
    if not layout.uses_value:
        with pytest.raises(FrameError, match="value is 5, expected 0"):
            decode(struct.pack("<BBHIII", number, 0, 0, 0, 0, 5))


def test_limits_fit_into_a_frame() -> None:
    assert max(layout.max_payload_bytes for layout in LAYOUTS.values()) + HEADER_BYTES <= MAX_FRAME_BYTES


def test_no_frame_is_larger_than_the_limit() -> None:
    with pytest.raises(FrameError, match="expected at most 2097152"):
        decode(bytes(MAX_FRAME_BYTES + 1))


def test_unknown_type_is_refused() -> None:
    with pytest.raises(FrameError, match="type 99 is unknown"):
        decode(bytes([99]) + bytes(15))
    assert kind_of(bytes([99])) == kind_of(b"") == "unknown"


def test_a_full_vocabulary_of_logits_fits() -> None:
    frame = Logits(ids=np.arange(MAX_VOCAB_SIZE), logits=np.zeros(MAX_VOCAB_SIZE, np.float32), log_normalizer=1.0)
    again = decode(encode(frame))
    assert isinstance(again, Logits)
    assert np.array_equal(again.ids, frame.ids)


def test_decoded_arrays_do_not_alias_the_input() -> None:
    step = Step(base_token=1, ids=np.arange(3), logits=np.ones(3, np.float32), taps=b"abc")
    buffer = bytearray(encode(step))
    again = decode(memoryview(buffer))
    buffer[:] = bytes(len(buffer))
    assert again == step


def test_header_fields_out_of_range_are_refused() -> None:
    for frame in (Ack(epoch=2**16), Ack(session=-1), Ack(pos=2**32), Object(token=-5)):
        with pytest.raises(FrameError, match="out of range"):
            encode(frame)
