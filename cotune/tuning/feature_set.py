"""The features of many sequences in one block of memory: what a device trains on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cotune.errors import InputError
from cotune.models.projections import check_tap_indices
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
        first_targets: int64 (sequences,), the place of each sequence's first target position in its whole text.
        lead_codes, lead_scales: taps of the positions just before these, for side networks that remember; they are
            read and never judged.
        lead_offsets: int64 (sequences + 1,), as `offsets`, in them.
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
    first_targets: NDArray[np.int64]
    lead_codes: NDArray[np.int8]
    lead_scales: NDArray[np.float16]
    lead_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.target_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @classmethod
    def for_lengths(
        cls,
        lengths: Sequence[int],
        like: SequenceFeatures,
        *,
        leads: Sequence[int] | None = None,
        first_targets: Sequence[int] | None = None,
    ) -> FeatureSet:
        """Room for sequences shaped like `like`, to be filled by `put`.

        Args:
            lengths: target positions of each.
            like: a sample.
            leads: positions before these; None for none.
            first_targets: the place of each first target in its whole text; None where it does not matter.
        """
        total = sum(lengths)
        num_leads = [0] * len(lengths) if leads is None else leads
        places = [1] * len(lengths) if first_targets is None else first_targets
        return cls(
            target_ids=np.zeros(total, np.int64),
            tap_codes=np.zeros((total, *like.tap_codes.shape[1:]), np.int8),
            tap_scales=np.zeros((total, *like.tap_scales.shape[1:]), np.float16),
            log_normalizer=np.zeros(total, np.float32),
            target_logits=np.zeros(total, np.float32),
            top_ids=np.zeros((total, *like.top_ids.shape[1:]), np.int32),
            top_logits=np.zeros((total, *like.top_logits.shape[1:]), np.float32),
            hidden=np.zeros((total, *like.hidden.shape[1:]), np.float16),
            offsets=_offsets(lengths),
            first_targets=np.asarray(places, np.int64),
            lead_codes=np.zeros((sum(num_leads), *like.tap_codes.shape[1:]), np.int8),
            lead_scales=np.zeros((sum(num_leads), *like.tap_scales.shape[1:]), np.float16),
            lead_offsets=_offsets(num_leads),
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
        """Fill in sequence number `index`, first the positions before its targets, if it has room for any.

        Raises:
            InputError: its shape is not that of this set.
        """
        place, lead = _part(self.offsets, index), _part(self.lead_offsets, index)
        num_lead = lead.stop - lead.start
        rooms = [(name, getattr(self, name)[place], getattr(features, name)[num_lead:]) for name in _ARRAYS]
        rooms.append(("tap_codes", self.lead_codes[lead], features.tap_codes[:num_lead]))
        rooms.append(("tap_scales", self.lead_scales[lead], features.tap_scales[:num_lead]))
        for name, room, values in rooms:
            if room.shape != values.shape:
                raise InputError(
                    f"{name} of sequence {index} has shape {values.shape}, expected {room.shape} as in the others; "
                    "clear the feature cache if the model or its taps changed"
                )
            room[...] = values

    def select(self, sequences: Sequence[int]) -> FeatureSet:
        """The sequences with these indices, in this order, as a new set."""
        chosen, lengths = _chosen(self.offsets, sequences)
        leads, num_leads = _chosen(self.lead_offsets, sequences)
        return FeatureSet(
            **{name: getattr(self, name)[chosen] for name in _ARRAYS},
            offsets=_offsets(lengths),
            first_targets=self.first_targets[np.asarray(sequences, np.int64)],
            lead_codes=self.lead_codes[leads],
            lead_scales=self.lead_scales[leads],
            lead_offsets=_offsets(num_leads),
        )

    def keep_taps(self, indices: Sequence[int]) -> FeatureSet:
        """What a cloud with these taps alone would send, see `Projections.keep_taps`.

        Args:
            indices: of the taps that stay, ascending.

        Raises:
            InputError: no index, an unknown one, or another order.
        """
        check_tap_indices(indices, self.tap_codes.shape[1])
        chosen = list(indices)
        return dataclasses.replace(
            self,
            tap_codes=self.tap_codes[:, chosen],
            tap_scales=self.tap_scales[:, chosen],
            lead_codes=self.lead_codes[:, chosen],
            lead_scales=self.lead_scales[:, chosen],
        )

    def digest(self) -> str:
        """SHA-256, hex, of everything that training reads; tells whether a checkpoint belongs to this data."""
        state = hashlib.sha256()
        for name in (*_ARRAYS, "offsets", "first_targets", "lead_codes", "lead_scales", "lead_offsets"):
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


def _offsets(lengths: Sequence[int]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]).astype(np.int64)


def _part(offsets: NDArray[np.int64], index: int) -> slice:
    return slice(int(offsets[index]), int(offsets[index + 1]))


def _chosen(offsets: NDArray[np.int64], sequences: Sequence[int]) -> tuple[NDArray[np.int64], list[int]]:
    """The positions of these sequences, one after the other, and how many each has."""
    parts = [np.arange(offsets[s], offsets[s + 1]) for s in sequences]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64), [len(part) for part in parts]
