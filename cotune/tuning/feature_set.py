"""The features of many sequences in one block of memory: what a device trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.wire.features import SequenceFeatures


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """All target positions of a list of sequences, in order; arrays share the first dimension.

    Attributes:
        target_ids: int64 (positions,), the token that each position has to predict.
        tap_codes: int8 (positions, taps, tap_dim), kept quantised; tap = code * scale.
        tap_scales: float16 (positions, taps).
        log_normalizer: float32 (positions,), log sum exp of all base logits, nats.
        target_logits: float32 (positions,), base logit of the target.
        top_ids: int32 (positions, top_k), ids of the largest base logits, ascending by id.
        top_logits: float32 (positions, top_k).
        hidden: float16 (positions, hidden), final hidden state, read by the gate.
        offsets: int64 (sequences + 1,), sequence s holds positions offsets[s] .. offsets[s + 1] - 1.
    """

    target_ids: NDArray[np.int64]
    tap_codes: NDArray[np.int8]
    tap_scales: NDArray[np.float16]
    log_normalizer: NDArray[np.float32]
    target_logits: NDArray[np.float32]
    top_ids: NDArray[np.int32]
    top_logits: NDArray[np.float32]
    hidden: NDArray[np.float16]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.target_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def for_lengths(cls, lengths: Sequence[int], like: SequenceFeatures) -> FeatureSet:
        """Room for sequences of `lengths` target positions each, shaped like `like`, to be filled by `put`."""
        total = sum(lengths)
        return cls(
            target_ids=np.zeros(total, np.int64),
            tap_codes=np.zeros((total, *like.tap_codes.shape[1:]), np.int8),
            tap_scales=np.zeros((total, *like.tap_scales.shape[1:]), np.float16),
            log_normalizer=np.zeros(total, np.float32),
            target_logits=np.zeros(total, np.float32),
            top_ids=np.zeros((total, *like.top_ids.shape[1:]), np.int32),
            top_logits=np.zeros((total, *like.top_logits.shape[1:]), np.float32),
            hidden=np.zeros((total, *like.hidden.shape[1:]), np.float16),
            offsets=np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64),
        )

    @classmethod
    def from_sequences(cls, sequences: Sequence[SequenceFeatures]) -> FeatureSet:
        """Concatenate sequences.

        Raises:
            InputError: there are none, or their shapes differ.
        """
        if not sequences:
            raise InputError("there are no sequences of features, expected at least one")
        whole = cls.for_lengths([len(sequence) for sequence in sequences], sequences[0])
        for index, sequence in enumerate(sequences):
            whole.put(index, sequence)
        return whole

    def put(self, index: int, features: SequenceFeatures) -> None:
        """Fill in sequence number `index`.

        Raises:
            InputError: its shape is not that of this set.
        """
        place = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        for name in _ARRAYS:
            room, values = getattr(self, name)[place], getattr(features, name)
            if room.shape != values.shape:
                raise InputError(
                    f"{name} of sequence {index} has shape {values.shape}, expected {room.shape} as in the others; "
                    "clear the feature cache if the model or its taps changed"
                )
            room[...] = values

    def select(self, sequences: Sequence[int]) -> FeatureSet:
        """The sequences with these indices, in this order, as a new set."""
        positions = [np.arange(self.offsets[s], self.offsets[s + 1]) for s in sequences]
        chosen = np.concatenate(positions) if positions else np.zeros(0, np.int64)
        lengths = [len(p) for p in positions]
        return FeatureSet(
            **{name: getattr(self, name)[chosen] for name in _ARRAYS},
            offsets=np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64),
        )

    def digest(self) -> str:
        """SHA-256, hex, of everything that training reads; tells whether a checkpoint belongs to this data."""
        state = hashlib.sha256()
        for name in (*_ARRAYS, "offsets"):
            array = np.ascontiguousarray(getattr(self, name))
            state.update(f"{name} {array.dtype} {array.shape}".encode())
            state.update(array.data)
        return state.hexdigest()


# The arrays that a `SequenceFeatures` has too.
_ARRAYS = (
    "target_ids",
    "tap_codes",
    "tap_scales",
    "log_normalizer",
    "target_logits",
    "top_ids",
    "top_logits",
    "hidden",
)
