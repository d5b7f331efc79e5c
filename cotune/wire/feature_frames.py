"""The features of one sequence as `Features` frames, and back, bit for bit.

A chunk holds whole targets, one array after the other, all little-endian:

    target ids u24 (n,) | tap scales f16 (n, taps) | tap codes i8 (n, taps, tap_dim) | log normalizers f32 (n,) |
    target logits f32 (n,) | top ids u24 (n, top_k) | top logits f32 (n, top_k) | hidden f16 (n, hidden)

The dimensions are not in the frame: both sides know them from `Welcome` and the request.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from cotune.errors import FrameError, InputError
from cotune.wire.codec import check_quantised
from cotune.wire.features import SequenceFeatures
from cotune.wire.frames import HEADER_BYTES, MAX_FRAME_BYTES, Features
from cotune.wire.payload import PayloadReader, pack_u24

MAX_CHUNK_BYTES = 1_000_000
"""A chunk is smaller than this, except where a single target is larger."""
_MAX_TARGET_BYTES = MAX_FRAME_BYTES - HEADER_BYTES


@dataclass(frozen=True, kw_only=True)
class FeatureShape:
    """The dimensions of one target's features."""

    num_taps: int
    """How many taps."""
    tap_dim: int
    """Width of a tap."""
    top_k: int
    """Base logits for each target: what was asked for, at most the vocabulary size."""
    hidden_dim: int = 0
    """Width of the final hidden state, 0 where it is not sent."""

    def __post_init__(self) -> None:
        for name in ("num_taps", "tap_dim", "top_k", "hidden_dim"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 0")

    @property
    def bytes_per_target(self) -> int:
        """Bytes of one target on the wire."""
        return 3 + self.num_taps * (2 + self.tap_dim) + 8 + 7 * self.top_k + 2 * self.hidden_dim

    @classmethod
    def of(cls, features: SequenceFeatures) -> FeatureShape:
        """The shape of these features."""
        _, num_taps, tap_dim = features.tap_codes.shape
        top_k, hidden_dim = features.top_ids.shape[1], features.hidden.shape[1]
        return cls(num_taps=num_taps, tap_dim=tap_dim, top_k=top_k, hidden_dim=hidden_dim)


def pack_features(
    features: SequenceFeatures, *, first_target: int, session: int = 0, epoch: int = 0
) -> Iterator[Features]:
    """Frames that carry `features`, one after the other.

    Args:
        features: at least one target; `hidden` (targets, 0) sends no hidden states.
        first_target: index in the sequence of the first target, `pos` of the first frame.
        session: as in the request.
        epoch: as in the request.

    Raises:
        FrameError: one target alone is larger than a frame.
    """
    per_target = FeatureShape.of(features).bytes_per_target
    if per_target > _MAX_TARGET_BYTES:
        raise FrameError(
            f"features frame: one target is {per_target} bytes, expected at most {_MAX_TARGET_BYTES}; "
            "ask for fewer logits with top_k"
        )
    per_chunk = max(1, (MAX_CHUNK_BYTES - 1) // per_target)
    for start in range(0, len(features), per_chunk):
        rows = slice(start, min(start + per_chunk, len(features)))
        yield Features(
            session=session,
            epoch=epoch,
            pos=first_target + start,
            num_targets=rows.stop - start,
            packed=_pack(features, rows),
        )


def unpack_features(
    frames: Sequence[Features], shape: FeatureShape, *, first_target: int, num_targets: int
) -> SequenceFeatures:
    """The features in `frames`, which carry targets first_target .. first_target + num_targets - 1 in order.

    Raises:
        FrameError: a chunk is missing, doubled or out of order, or its bytes do not fit `shape`.
    """
    expected = first_target
    chunks = []
    for frame in frames:
        if frame.pos != expected or frame.num_targets < 1:
            raise FrameError(
                f"features frame: targets {frame.pos} to {frame.pos + frame.num_targets - 1} came, "
                f"expected some from {expected} on"
            )
        chunks.append(_unpack(frame, shape))
        expected += frame.num_targets
    if expected != first_target + num_targets or not chunks:
        raise FrameError(f"{expected - first_target} targets came, expected {num_targets}")
    return _join(chunks)


def _pack(features: SequenceFeatures, rows: slice) -> bytes:
    target_ids, top_ids = features.target_ids[rows], features.top_ids[rows]
    return b"".join(
        (
            pack_u24(target_ids, "features"),
            _bytes(features.tap_scales[rows], np.float16),
            _bytes(features.tap_codes[rows], np.int8),
            _bytes(features.log_normalizer[rows], np.float32),
            _bytes(features.target_logits[rows], np.float32),
            pack_u24(top_ids.reshape(-1), "features"),
            _bytes(features.top_logits[rows], np.float32),
            _bytes(features.hidden[rows], np.float16),
        )
    )


def _bytes(values: NDArray[np.generic], dtype: type[np.generic]) -> bytes:
    if values.dtype != dtype:
        raise FrameError(f"features frame: an array is {values.dtype}, expected {np.dtype(dtype).name}")
    return values.astype(np.dtype(dtype).newbyteorder("<")).tobytes()


def _unpack(frame: Features, shape: FeatureShape) -> SequenceFeatures:
    n, expected = frame.num_targets, frame.num_targets * shape.bytes_per_target
    if len(frame.packed) != expected:
        raise FrameError(f"features frame: {len(frame.packed)} bytes for {n} targets, expected {expected} for {shape}")
    payload = PayloadReader(frame.packed, "features")
    target_ids = payload.u24(n)
    scales = payload.array("<f2", n * shape.num_taps).astype(np.float16).reshape(n, shape.num_taps)
    codes = payload.array("i1", n * shape.num_taps * shape.tap_dim).copy()
    codes = codes.reshape(n, shape.num_taps, shape.tap_dim)
    check_quantised(codes, scales)
    log_normalizer, target_logits = payload.finite_array("<f4", n), payload.logits(n)
    top_ids = payload.u24(n * shape.top_k).reshape(n, shape.top_k)
    if not (top_ids[:, 1:] > top_ids[:, :-1]).all():
        raise FrameError("features frame: the logit ids are not in ascending order")
    return SequenceFeatures(
        target_ids=target_ids,
        tap_codes=codes,
        tap_scales=scales,
        log_normalizer=log_normalizer,
        target_logits=target_logits,
        top_ids=top_ids,
        top_logits=payload.logits(n * shape.top_k).reshape(n, shape.top_k),
        hidden=payload.finite_array("<f2", n * shape.hidden_dim).reshape(n, shape.hidden_dim),
    )


def _join(chunks: list[SequenceFeatures]) -> SequenceFeatures:
    names = [field.name for field in fields(SequenceFeatures)]
    return SequenceFeatures(**{name: np.concatenate([getattr(c, name) for c in chunks]) for name in names})
