"""Features of a sequence through frames, bit for bit; chunks; what does not fit."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotune.errors import FrameError, InputError
from cotune.wire.feature_frames import MAX_CHUNK_BYTES, FeatureShape, pack_features, unpack_features
from cotune.wire.features import SequenceFeatures
from cotune.wire.frames import Features, decode, encode

SHAPE = FeatureShape(num_taps=3, tap_dim=4, top_k=5, hidden_dim=6)


def random_features(num_targets: int, shape: FeatureShape, seed: int = 0) -> SequenceFeatures:
    rng = np.random.default_rng(seed)
    vocab = max(shape.top_k, 1) * 3
    top_ids = [np.sort(rng.choice(vocab, shape.top_k, replace=False)) for _ in range(num_targets)]
    return SequenceFeatures(
        target_ids=rng.integers(0, 2**24, num_targets),
        tap_codes=rng.integers(-127, 128, (num_targets, shape.num_taps, shape.tap_dim)).astype(np.int8),
        tap_scales=rng.random((num_targets, shape.num_taps)).astype(np.float16),
        log_normalizer=rng.normal(size=num_targets).astype(np.float32),
        target_logits=rng.normal(size=num_targets).astype(np.float32),
        top_ids=np.array(top_ids, dtype=np.int64).reshape(num_targets, shape.top_k),
        top_logits=rng.normal(size=(num_targets, shape.top_k)).astype(np.float32),
        hidden=rng.normal(size=(num_targets, shape.hidden_dim)).astype(np.float16),
    )


def assert_same(a: SequenceFeatures, b: SequenceFeatures) -> None:
    for field in fields(SequenceFeatures):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert left.dtype == right.dtype, field.name
        assert left.shape == right.shape, field.name
        assert left.tobytes() == right.tobytes(), field.name


def through_the_wire(frames: list[Features]) -> list[Features]:
    decoded = [decode(encode(frame)) for frame in frames]
    assert all(isinstance(frame, Features) for frame in decoded)
    return [frame for frame in decoded if isinstance(frame, Features)]


@given(st.integers(1, 9), st.integers(0, 4), st.integers(1, 5), st.integers(0, 6), st.integers(0, 4))
@settings(deadline=None)
def test_exact_round_trip(n: int, num_taps: int, tap_dim: int, top_k: int, hidden_dim: int) -> None:
    shape = FeatureShape(num_taps=num_taps, tap_dim=tap_dim, top_k=top_k, hidden_dim=hidden_dim)
    features = random_features(n, shape)
    assert FeatureShape.of(features) == shape
    frames = through_the_wire(list(pack_features(features, first_target=7, session=3, epoch=2)))
    assert {(frame.session, frame.epoch) for frame in frames} == {(3, 2)}
    assert_same(unpack_features(frames, shape, first_target=7, num_targets=n), features)


def test_bytes_by_hand() -> None:
    """3 target id + 3 * (2 + 4) taps + 4 log normaliser + 4 target logit + 5 * (3 + 4) logits + 6 * 2 hidden."""
    assert SHAPE.bytes_per_target == 3 + 18 + 8 + 35 + 12
    (frame,) = pack_features(random_features(2, SHAPE), first_target=1)
    assert frame.num_targets == 2
    assert len(frame.packed) == 2 * 76


def test_long_sequences_come_in_chunks() -> None:
    shape = FeatureShape(num_taps=33, tap_dim=32, top_k=32, hidden_dim=4096)
    features = random_features(400, shape)
    frames = through_the_wire(list(pack_features(features, first_target=10)))
    assert len(frames) == 4  # 9,549 bytes for each target, 104 in a chunk
    assert all(len(frame.packed) < MAX_CHUNK_BYTES for frame in frames)
    assert [frame.pos for frame in frames][:2] == [10, 10 + frames[0].num_targets]
    assert_same(unpack_features(frames, shape, first_target=10, num_targets=400), features)


def test_missing_doubled_and_swapped_chunks_are_refused() -> None:
    features = random_features(400, FeatureShape(num_taps=33, tap_dim=32, top_k=32, hidden_dim=4096))
    shape, frames = FeatureShape.of(features), list(pack_features(features, first_target=1))
    wrong = [frames[:-1], frames[1:], [*frames, frames[-1]], [frames[1], frames[0], *frames[2:]], []]
    for chunks in wrong:
        with pytest.raises(FrameError, match="expected"):
            unpack_features(chunks, shape, first_target=1, num_targets=400)
    with pytest.raises(FrameError, match="expected some from 1 on"):
        unpack_features([Features(pos=1, num_targets=0, packed=b"")], shape, first_target=1, num_targets=0)


@given(st.data())
def test_broken_chunks_never_raise_anything_else(data: st.DataObject) -> None:
    (frame,) = pack_features(random_features(2, SHAPE), first_target=1)
    packed = bytearray(frame.packed)
    for _ in range(3):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    broken = replace(frame, packed=bytes(packed))
    try:
        features = unpack_features([broken], SHAPE, first_target=1, num_targets=2)
    except FrameError:
        return
    assert np.isfinite(features.hidden).all()
    assert (features.top_ids[:, 1:] > features.top_ids[:, :-1]).all()


def test_wrong_lengths_are_refused() -> None:
    (frame,) = pack_features(random_features(2, SHAPE), first_target=1)
    for packed, count in [(frame.packed[:-1], 2), (frame.packed + b"\0", 2), (frame.packed, 2**32 - 1)]:
        broken = replace(frame, packed=packed, num_targets=count)
        with pytest.raises(FrameError, match="bytes for"):
            unpack_features([broken], SHAPE, first_target=1, num_targets=2)


def test_broken_values_are_refused() -> None:
    features = random_features(2, SHAPE)
    for changes, message in [
        ({"tap_scales": -features.tap_scales - np.float16(1)}, "scale"),
        ({"tap_codes": np.full_like(features.tap_codes, -128)}, "-128"),
        ({"log_normalizer": np.full(2, np.nan, np.float32)}, "nan or infinite"),
        ({"target_logits": np.full(2, np.inf, np.float32)}, "nan or"),
        ({"top_ids": features.top_ids[:, ::-1]}, "ascending"),
        ({"top_logits": np.full((2, 5), np.nan, np.float32)}, "nan or"),
        ({"hidden": np.full((2, 6), np.inf, np.float16)}, "nan or infinite"),
    ]:
        frames = list(pack_features(replace(features, **changes), first_target=1))
        with pytest.raises(FrameError, match=message):
            unpack_features(frames, SHAPE, first_target=1, num_targets=2)


def test_what_cannot_be_sent_is_refused() -> None:
    features = random_features(1, SHAPE)
    with pytest.raises(FrameError, match="float64, expected float32"):
        list(pack_features(replace(features, target_logits=np.zeros(1)), first_target=1))
    huge = random_features(1, FeatureShape(num_taps=1, tap_dim=1, top_k=300_000))
    with pytest.raises(FrameError, match="ask for fewer logits"):
        list(pack_features(huge, first_target=1))
    with pytest.raises(InputError, match="top_k is -1"):
        FeatureShape(num_taps=1, tap_dim=1, top_k=-1)
